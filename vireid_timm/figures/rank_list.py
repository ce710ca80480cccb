"""Rank lists (paper, fig. 6): each query with its results, best first, as an image or as a page for a browser."""

import base64
import functools
import html
import io
import logging
from collections.abc import Sequence
from pathlib import PurePath
from string import Template
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..data.images import ImageError, load_image
from ..text import format_list

_logger = logging.getLogger(__name__)

# From Okabe and Ito's palette, which colour-blind people can tell apart; a tick or a cross says the same.
HIT = (0, 158, 115)
MISS = (213, 94, 0)
UNKNOWN = (150, 150, 150)
QUERY = (0, 0, 0)

_MARGIN = 8
_FRAME = 3
# Lines of a tick and of a cross, as shares of the round badge that they are drawn in.
_STROKES = {
    True: [[(0.27, 0.53), (0.43, 0.69), (0.74, 0.33)]],
    False: [[(0.32, 0.32), (0.68, 0.68)], [(0.68, 0.32), (0.32, 0.68)]],
}
_SIGNS = {True: '&#10003;', False: '&#10007;'}
_MEANING = {True: 'same person', False: 'another person'}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1a1a1a; --faint: #5c5c5c; --back: #fff; --line: #d8d8d8; }
@media (prefers-color-scheme: dark) { :root { --text: #eee; --faint: #aaa; --back: #161616; --line: #3c3c3c; } }
body { margin: 1rem; font: 0.875rem/1.35 system-ui, sans-serif; color: var(--text); background: var(--back); }
h1 { font-size: 1.25rem; }
h2 { font-size: 1rem; font-weight: 600; }
section { border-top: 1px solid var(--line); padding: 0.5rem 0; }
.row { display: flex; gap: 1.25rem; align-items: flex-start; }
ol { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 0; padding: 0; list-style: none; }
figure { flex: none; margin: 0; width: ${width}px; }
.frame { position: relative; border: 4px solid $unknown; line-height: 0; }
.frame img { width: 100%; height: auto; }
.query .frame { border-color: var(--text); }
.hit .frame { border-color: $hit; }
.miss .frame { border-color: $miss; }
.mark { position: absolute; top: 0; right: 0; width: 1.5rem; border-radius: 0 0 0 0.75rem; text-align: center; }
.mark { font: bold 1rem/1.5rem sans-serif; color: #fff; }
.hit .mark { background: $hit; }
.miss .mark { background: $miss; }
figcaption { padding-top: 0.25rem; font-size: 0.75rem; overflow-wrap: anywhere; }
.path { color: var(--faint); }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Result(NamedTuple):
    """One image of a rank list. What is None is not shown.

    Attributes:
        path: File, or the address of a rendered image.
        identity: The person's name.
        camera: Camera number.
        time: When the image was taken, as text; only a page shows it.
        similarity: Inner product with the query's features.
        probability: That it shows the query's person, from 0 to 1.
        hit: Whether it does; None where nobody knows.
    """

    path: str
    identity: str | None = None
    camera: int | None = None
    time: str | None = None
    similarity: float | None = None
    probability: float | None = None
    hit: bool | None = None


class RankRow(NamedTuple):
    """A query and its results.

    Attributes:
        query: The query.
        results: Its results, best first; there may be none.
        note: A line above the row.
    """

    query: Result
    results: Sequence[Result]
    note: str = ''


def rank_list_image(rows: Sequence[RankRow], size: tuple[int, int] = (128, 64)) -> Image.Image:
    """Draw one row per query: the query, then its results, with a frame and a tick or a cross where hits are known.

    Identity, camera, similarity and probability are written below each image. The font has ASCII letters only; others
    become `?`. A crossed-out box replaces an image that cannot be read, and a warning names it.

    Args:
        rows: At least one.
        size: Height and width of each image in pixels. The aspect ratio is not kept, as is usual in person re-ID.

    Raises:
        ValueError: There is no row.
    """
    images = _load_images(rows, size)
    font = _font(max(11, size[1] // 7))
    caption_lines = max(len(_caption(result)) for row in rows for result in (row.query, *row.results))
    cells = [
        [
            _cell(images[result.path], result, QUERY if column == 0 else _colour(result.hit), font, caption_lines)
            for column, result in enumerate((row.query, *row.results))
        ]
        for row in rows
    ]
    width, height = cells[0][0].size
    line = _line_height(font)
    legend = _legend(font) if any(result.hit is not None for row in rows for result in row.results) else None
    lefts = _lefts(max(map(len, cells)), width)
    note_height = line if any(row.note for row in rows) else 0
    top = 2 * _MARGIN + line + (legend.height if legend else 0)
    step = note_height + height + 2 * _MARGIN
    sheet_width = max(lefts[-1] + width, legend.width if legend else 0) + _MARGIN
    sheet = Image.new('RGB', (sheet_width, top + len(rows) * step), (255, 255, 255))
    if legend:
        sheet.paste(legend, (0, _MARGIN))
    for column, left in enumerate(lefts):
        _write(sheet, (left, top - line), str(column) if column else 'query', font, width)
    for number, (row, row_cells) in enumerate(zip(rows, cells, strict=True)):
        y = top + number * step + _MARGIN // 2
        _write(sheet, (_MARGIN, y), row.note, font, sheet_width - 2 * _MARGIN)
        for left, cell in zip(lefts, row_cells):
            sheet.paste(cell, (left, y + note_height))
        if not row.results:
            _write(sheet, (2 * _MARGIN + width, y + note_height + _FRAME), 'no result', font, sheet_width)
    return sheet


def rank_list_page(rows: Sequence[RankRow], title: str, size: tuple[int, int] = (192, 96)) -> str:
    """Return a web page like `rank_list_image`, which also shows times and file names.

    It is one file with the images in it. It has no script, loads nothing from anywhere, and follows the browser's dark
    mode.

    Args:
        rows: At least one.
        title: Heading.
        size: Height and width of each image in pixels.

    Raises:
        ValueError: There is no row.
    """
    sources = {path: data_uri(image) for path, image in _load_images(rows, size).items()}
    body = '\n'.join(_section(row, sources, size) for row in rows)
    colours = {'hit': f'rgb{HIT}', 'miss': f'rgb{MISS}', 'unknown': f'rgb{UNKNOWN}'}
    page = _PAGE.substitute(colours, title=html.escape(title), width=size[1], body=body)
    return page.encode('utf-8', 'backslashreplace').decode('utf-8')  # file names may be in another encoding


def data_uri(image: Image.Image) -> str:
    """Return an image as an address that holds it, for a page."""
    buffer = io.BytesIO()
    image.save(buffer, format='JPEG', quality=90)
    return f'data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _section(row: RankRow, sources: dict[str, str], size: tuple[int, int]) -> str:
    results = '\n'.join(
        f'<li>{_figure(result, f"result {rank}", sources, size)}</li>' for rank, result in enumerate(row.results, 1)
    )
    return '\n'.join(
        [
            '<section>',
            f'<h2>{html.escape(row.note)}</h2>' if row.note else '',
            f'<div class="row">{_figure(row.query, "query", sources, size)}',
            f'<ol>\n{results}\n</ol></div>' if results else '<p>no result</p></div>',
            '</section>',
        ]
    )


def _figure(result: Result, role: str, sources: dict[str, str], size: tuple[int, int]) -> str:
    """Return an image with its mark and caption; the image's alternative text says all of it."""
    kind = 'query' if role == 'query' else {True: 'hit', False: 'miss', None: 'unknown'}[result.hit]
    lines = _page_caption(result)
    spoken = [role, *([] if result.hit is None else [_MEANING[result.hit]]), result.path, *lines]
    mark = '' if result.hit is None else f'<span class="mark" aria-hidden="true">{_SIGNS[result.hit]}</span>'
    path, name = (html.escape(text) for text in (result.path, PurePath(result.path).name))
    alt = html.escape(', '.join(spoken))
    return (
        f'<figure class="{kind}"><div class="frame">'
        f'<img src="{sources[result.path]}" width="{size[1]}" height="{size[0]}" alt="{alt}">{mark}</div>'
        f'<figcaption><b>{role.removeprefix("result ")}</b> '
        f'{"<br>".join([*map(html.escape, lines), f"""<span class="path" title="{path}">{name}</span>"""])}'
        '</figcaption></figure>'
    )


def _load_images(rows: Sequence[RankRow], size: tuple[int, int]) -> dict[str, Image.Image]:
    """Load every image of the rows once, by path."""
    if not rows:
        raise ValueError('a rank list needs at least one query')
    images, broken = {}, []
    for path in dict.fromkeys(result.path for row in rows for result in (row.query, *row.results)):
        try:
            images[path] = Image.fromarray(load_image(path, size))
        except ImageError as error:
            broken.append(error.args[0])
            images[path] = _crossed_out(size)
    if broken:
        _logger.warning(f'{len(broken)} of {len(images)} images are not shown: {format_list(broken, separator="; ")}')
    return images


def _crossed_out(size: tuple[int, int]) -> Image.Image:
    height, width = size
    box = Image.new('RGB', (width, height), (225, 225, 225))
    draw = ImageDraw.Draw(box)
    for ends in ((0, 0, width, height), (0, height, width, 0)):
        draw.line(ends, fill=UNKNOWN, width=2)
    return box


def _colour(hit: bool | None) -> tuple[int, int, int]:
    return UNKNOWN if hit is None else HIT if hit else MISS


def _cell(
    image: Image.Image,
    result: Result,
    colour: tuple[int, int, int],
    font: _Font,
    caption_lines: int,
) -> Image.Image:
    """Return an image in its frame, with its mark and its caption, which is as many lines high as the longest."""
    width, height = (side + 2 * _FRAME for side in image.size)
    cell = Image.new('RGB', (width, height + caption_lines * _line_height(font)), (255, 255, 255))
    cell.paste(colour, (0, 0, width, height))
    cell.paste(image, (_FRAME, _FRAME))
    if result.hit is not None:
        badge = _badge(result.hit, max(15, image.width // 5))
        cell.paste(badge, (width - badge.width, 0), badge)
    for number, text in enumerate(_caption(result)):
        _write(cell, (1, height + number * _line_height(font)), text, font, width)
    return cell


@functools.cache
def _badge(hit: bool, side: int) -> Image.Image:
    """Return a disc with a tick or a cross, transparent around it."""
    scale = 4 * side  # drawn larger, then reduced: Pillow draws without antialiasing
    badge = Image.new('RGBA', (scale, scale))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, scale - 1, scale - 1), fill=(*_colour(hit), 255))
    for stroke in _STROKES[hit]:
        draw.line(
            [(x * scale, y * scale) for x, y in stroke], fill=(255, 255, 255, 255), width=scale // 9, joint='curve'
        )
    return badge.resize((side, side), Image.Resampling.BOX)


def _caption(result: Result) -> list[str]:
    """Return what is known about an image in few letters, a line each; both scores share one."""
    scores = [
        *([] if result.similarity is None else [f'{result.similarity:.3f}']),
        *([] if result.probability is None else [_percent(result.probability)]),
    ]
    return [*_who_and_where(result), *(['  '.join(scores)] if scores else [])]


def _page_caption(result: Result) -> list[str]:
    return [
        *_who_and_where(result),
        *([] if result.time is None else [result.time.replace('T', ' ')]),
        *([] if result.similarity is None else [f'similarity {result.similarity:.3f}']),
        *([] if result.probability is None else [f'probability {_percent(result.probability)}']),
    ]


def _who_and_where(result: Result) -> list[str]:
    return [
        *([] if result.identity is None else [result.identity]),
        *([] if result.camera is None else [f'camera {result.camera}']),
    ]


def _percent(share: float) -> str:
    """Return a share as whole percents; neither 0% nor 100% where it is not quite that."""
    if 0 < share < 0.005:
        return '<1%'
    return '>99%' if 0.995 <= share < 1 else f'{share:.0%}'


def _legend(font: _Font) -> Image.Image:
    """Return the line that explains the marks."""
    line = _line_height(font)
    parts = [(hit, _badge(hit, line), _MEANING[hit]) for hit in (True, False)]
    width = sum(line + int(_length(text, font)) + 3 * _MARGIN for _, _, text in parts)
    legend = Image.new('RGB', (width + _MARGIN, line + _MARGIN), (255, 255, 255))
    x = _MARGIN
    for _, badge, text in parts:
        legend.paste(badge, (x, 0), badge)
        _write(legend, (x + line + _MARGIN // 2, 0), text, font, width)
        x += line + int(_length(text, font)) + 3 * _MARGIN
    return legend


def _font(size: int) -> _Font:
    """Return the font in Pillow; before Pillow 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def _line_height(font: _Font) -> int:
    return int(getattr(font, 'size', 11) * 1.3)


def _length(text: str, font: _Font) -> float:
    """Return the width of a text in pixels."""
    return ImageDraw.Draw(Image.new('L', (1, 1))).textlength(text, font)


def _lefts(columns: int, width: int) -> list[int]:
    """Return where each column begins; the query stands apart."""
    return [_MARGIN + column * (width + _MARGIN) + (_MARGIN if column else 0) for column in range(columns)]


def _write(sheet: Image.Image, position: tuple[int, int], text: str, font: _Font, width: float) -> None:
    """Write one line of text, cut to `width` pixels."""
    text = text.encode('ascii', 'replace').decode()
    if _length(text, font) > width:
        while text and _length(f'{text}...', font) > width:
            text = text[:-1]
        text = f'{text}...'
    ImageDraw.Draw(sheet).text(position, text, fill=(0, 0, 0), font=font)
