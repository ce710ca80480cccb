"""The parts of the web demo's page as HTML: the query with its results, examples, an explanation, messages."""

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..data.images import ImageError, load_image
from ..figures.rank_list import HIT, MISS, data_uri
from ..retrieval.gallery import Answer, Match
from .galleries import Query

TITLE = 'Find the same person in visible and infrared images'
# The words of the README, in short.
RESPONSIBLE_USE = (
    '<p><b>What this must not be used for.</b> This software identifies people. Do not use it for mass surveillance, '
    'to track or single out people without a legal basis, or to infer anything about them beyond &ldquo;these two '
    'images may show the same person&rdquo;. Its rankings are guesses: a person has to check them, and no decision '
    'about anybody may rest on them alone. It errs more often on people, clothes and cameras unlike those it was '
    'trained on.</p>'
)
RENDERED = '<p>All people in the examples and in the gallery are rendered: they do not exist.</p>'

_RESULT_SIZE, _EXAMPLE_SIZE = (256, 128), (128, 64)  # height and width of the shown images, in pixels
_QUERY_SIDE = 320
_MARKS = {True: ('hit', '&#10003;', 'same person'), False: ('miss', '&#10007;', 'another person'), None: ('', '', '')}

# Colours are Gradio's, which follow the browser's dark mode; the marks are those of rank lists.
CSS = f"""
.gradio-container {{ max-width: 1240px !important; margin: 0 auto !important; }}
.vireid {{ line-height: 1.4; overflow-wrap: anywhere; }}
.vireid .html-container {{ padding: 0 !important; }}
.vireid h1 {{ margin: 0; font-size: 1.6rem; font-weight: 600; line-height: 1.3; }}
.vireid h2 {{ margin: 0; font-size: 1.15rem; font-weight: 600; }}
.vireid p {{ margin: 0.25rem 0; }}
.vireid .faint {{ opacity: 0.75; font-size: 0.9rem; }}
.vireid img {{ display: block; width: 100%; height: auto; border-radius: 6px; }}
.vireid button {{ padding: 0; border: 0; background: none; color: inherit; font: inherit; text-align: inherit; }}
.vireid button {{ cursor: pointer; }}
.vireid button:hover img, .vireid button:focus-visible img {{ outline: 3px solid var(--color-accent); }}
.vireid .answer {{ display: grid; grid-template-columns: 1fr 5fr; gap: 1.25rem; margin-top: 0.75rem; }}
.vireid figure {{ margin: 0; }}
.vireid .query img {{ border: 3px solid var(--body-text-color); }}
.vireid ol {{ display: grid; grid-template-columns: repeat(5, 1fr); gap: 1.1rem 0.9rem; }}
.vireid ol {{ margin: 0; padding: 0; list-style: none; }}
.vireid .result, .vireid .frame, .vireid .caption span {{ display: block; width: 100%; }}
.vireid .frame {{ position: relative; }}
.vireid .result img {{ aspect-ratio: 1 / 2; border: 3px solid var(--border-color-primary); }}
.vireid .hit img {{ border-color: rgb{HIT}; }}
.vireid .miss img {{ border-color: rgb{MISS}; }}
.vireid .rank, .vireid .mark {{ position: absolute; top: 0; min-width: 1.7rem; color: #fff; text-align: center; }}
.vireid .rank, .vireid .mark {{ font: bold 0.95rem/1.7rem sans-serif; }}
.vireid .rank {{ left: 0; border-radius: 6px 0 8px 0; background: #000b; }}
.vireid .mark {{ right: 0; border-radius: 0 6px 0 8px; }}
.vireid .hit .mark {{ background: rgb{HIT}; }}
.vireid .miss .mark {{ background: rgb{MISS}; }}
.vireid .caption {{ display: block; padding-top: 0.3rem; font-size: 0.82rem; }}
.vireid .caption b {{ font-size: 1rem; }}
.vireid .bar {{ height: 5px; margin: 0.15rem 0 0.25rem; border-radius: 3px; background: var(--border-color-primary); }}
.vireid .bar i {{ display: block; height: 100%; border-radius: 3px; background: var(--color-accent); }}
.vireid .missing {{ display: grid; aspect-ratio: 1 / 2; place-items: center; text-align: center; }}
.vireid .missing {{ border: 1px dashed var(--border-color-primary); border-radius: 6px; }}
.vireid .examples {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.5rem; margin-top: 0.4rem; }}
.vireid .message {{ padding: 0.75rem 1rem; border-left: 5px solid rgb{MISS}; }}
.vireid .explanation img {{ max-width: 560px; margin-top: 0.5rem; background: #fff; }}
@media (max-width: 760px) {{
  .gradio-container main {{ padding: 0.75rem !important; }}
  .vireid h1 {{ font-size: 1.3rem; }}
  .vireid .answer {{ display: block; }}
  .vireid .query {{ display: grid; grid-template-columns: 96px 1fr; gap: 0.75rem; margin-bottom: 1rem; }}
  .vireid ol {{ grid-template-columns: repeat(3, 1fr); gap: 0.8rem 0.5rem; }}
  .vireid ol .caption {{ font-size: 0.75rem; }}
  .vireid .examples {{ grid-template-columns: repeat(8, 1fr); gap: 0.3rem; }}
}}
"""


def introduction(modalities: Sequence[str]) -> str:
    """Return the heading, and what to do with images of some modalities."""
    return (
        f'<h1>{TITLE}</h1><p>Give an image of one person from head to feet, {" or ".join(modalities)}, and see who is '
        'most similar in images of the other kind.</p>'
    )


def empty(gallery_size: int, query_modality: str, gallery_modality: str) -> str:
    """Return the placeholder that is shown until there is a query."""
    return f'<p class="faint">{gallery_size:,} {gallery_modality} images can be searched by {query_modality} ones.</p>'


def message(text: str) -> str:
    """Return what went wrong, in plain words."""
    return f'<p class="message" role="alert">{html.escape(text)}</p>'


def example_strip(examples: Sequence[Query]) -> str:
    """Return examples as images to click; each has its number as `data-number`."""
    if not examples:
        return ''
    buttons = ''.join(
        f'<button type="button" data-number="{number}" aria-label="{example.modality} example {number + 1}">'
        f'{_image(example.path, _EXAMPLE_SIZE)}</button>'
        for number, example in enumerate(examples)
    )
    return f'<div class="faint">Or try one of these:</div><div class="examples">{buttons}</div>'


def answer(query: Query, image: Image.Image, found: Answer, gallery_size: int, gallery_modality: str) -> str:
    """Return a query and its image beside its results; each result has its rank as `data-rank`."""
    results = ''.join(f'<li>{_result(query, rank, match)}</li>' for rank, match in enumerate(found.results, 1))
    hints = ['Click one to see what the model looked at.']
    if any(_is_hit(query, match) is not None for match in found.results):
        hints.append('A tick or a cross says whether it really is the same person.')
    if found.results and found.nobody is None:
        hints.append('There are no probabilities: the model is not calibrated.')
    return (
        f'<h2>The most similar of {gallery_size:,} {gallery_modality} images</h2>'
        f'<div class="faint">{" ".join(hints)}</div>'
        f'<div class="answer"><figure class="query">{_query_image(image)}'
        f'<figcaption class="caption">{_about(query, found)}</figcaption></figure><ol>{results}</ol></div>'
    )


def explanation(image: Image.Image, rank: int) -> str:
    """Return a drawn explanation of the similarity of the query and a result."""
    size = f'width="{image.width}" height="{image.height}"'
    return (
        f'<div class="explanation"><h2>What the model looked at in the query and in result {rank}</h2>'
        '<div class="faint">Grad-CAM of each branch of the network: what is bright made the two images more similar.'
        f'</div><img src="{data_uri(image)}" {size} alt="Grad-CAM of both images"></div>'
    )


def _query_image(image: Image.Image) -> str:
    scale = min(1, _QUERY_SIDE / max(image.size))
    image = image.resize([max(1, round(scale * side)) for side in image.size])
    return f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" alt="query">'


def _about(query: Query, found: Answer) -> str:
    """Return what is known about a query as lines."""
    lines = [f'<b>{"Your" if query.is_upload else "Example:"} {query.modality} image</b>']
    lines.append(html.escape(_name(query.path) if query.identity is None else f'person {query.identity}'))
    if found.nobody is not None:
        lines += [f'<b>{_percent(found.nobody)}</b> not in the gallery', _bar(found.nobody)]
    return _lines(lines)


def _result(query: Query, rank: int, match: Match) -> str:
    kind, mark, meaning = _MARKS[_is_hit(query, match)]
    lines = []
    if match.probability is not None:
        lines = [f'<b>{_percent(match.probability)}</b> same person', _bar(match.probability)]
    lines.append(f'similarity {match.similarity:.3f}')
    about = {'camera': match.camera, 'person': match.identity, '': match.time}
    lines += [f'{name} {html.escape(str(value))}' for name, value in about.items() if value is not None]
    mark = mark and f'<span class="mark" title="{meaning}">{mark}</span>'
    return (
        f'<button type="button" class="result {kind}" data-rank="{rank}" title="{html.escape(_name(match.path))}">'
        f'<span class="frame">{_image(match.path, _RESULT_SIZE, meaning)}<span class="rank">{rank}</span>{mark}</span>'
        f'<span class="caption">{_lines(lines)}</span></button>'
    )


def _lines(lines: Sequence[str]) -> str:
    return ''.join(f'<span>{line}</span>' for line in lines)


def _image(path: str, size: tuple[int, int], alt: str = '') -> str:
    try:
        image = Image.fromarray(load_image(path, size))
    except ImageError:  # of a gallery whose files have moved
        return '<span class="missing">this file cannot be read</span>'
    return f'<img src="{data_uri(image)}" width="{size[1]}" height="{size[0]}" alt="{alt}">'


def _is_hit(query: Query, match: Match) -> bool | None:
    return None if None in (query.identity, match.identity) else query.identity == match.identity


def _bar(share: float) -> str:
    return f'<span class="bar" aria-hidden="true"><i style="width: {100 * share:.0f}%"></i></span>'


def _percent(share: float) -> str:
    return '&lt; 1 %' if share < 0.01 else '&gt; 99 %' if share > 0.99 else f'{share:.0%}'.replace('%', ' %')


def _name(path: str) -> str:
    return Path(path).name.encode('utf-8', 'backslashreplace').decode()  # it may be in another encoding
