"""A hook of mkdocs: links to files outside docs/ work in the repository only, so the site shows their text alone."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return a page without its links to files above docs/."""
    return re.sub(r'\[([^\]]+)\]\(\.\./[^)]*\)', r'\1', markdown)
