"""Numbers, lists and tables as text for people."""

from collections.abc import Sequence


def format_bytes(count: int) -> str:
    """Return a number of bytes as text, e.g. `12.3 MB` or `1.23 GB`."""
    return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.1f} MB'


def format_list(names: Sequence[str], limit: int = 5, separator: str = ', ') -> str:
    """Return the first `limit` names, separated by commas, then how many more there are."""
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return f'{separator.join(names[:limit])}{more}'


def aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Return the rows of a table as lines with aligned columns; the columns in `left` are flush left, others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        '  '.join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
