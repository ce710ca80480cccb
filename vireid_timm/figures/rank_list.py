"""Rank lists as an image: queries and their first results (paper, fig. 6)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..data.images import load_image

HIT = (40, 170, 70)
MISS = (205, 50, 45)
_MARGIN = 6
_FRAME = 3


def rank_list_image(
    queries: Sequence[str],
    found: Sequence[Sequence[str]],
    hits: Sequence[Sequence[bool]],
    size: tuple[int, int] = (128, 64),
) -> Image.Image:
    """Draw one row per query: the query, then its results, best first, with green frames for hits and red for misses.

    Args:
        queries: Path of each query, [Q].
        found: Paths of the results of each query, [Q][K].
        hits: Whether each result shows the query's person, [Q][K].
        size: Height and width of each image.

    Raises:
        ImageError: An image cannot be read.
    """
    height, width = size
    columns = 1 + max(len(row) for row in found)
    step_x, step_y = width + 2 * _FRAME + _MARGIN, height + 2 * _FRAME + _MARGIN
    sheet = Image.new('RGB', (columns * step_x + 2 * _MARGIN, len(queries) * step_y + _MARGIN + 16), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 3), 'query', fill=(0, 0, 0))
    draw.text((step_x + 2 * _MARGIN, 3), 'nearest first: green = same person, red = another person', fill=(0, 0, 0))
    for row, (query, paths, marks) in enumerate(zip(queries, found, hits, strict=True)):
        colours = [(0, 0, 0), *(HIT if mark else MISS for mark in marks)]
        for column, (path, colour) in enumerate(zip([query, *paths], colours, strict=True)):
            x = _MARGIN + column * step_x + (_MARGIN if column else 0)
            y = 16 + row * step_y
            draw.rectangle((x, y, x + width + 2 * _FRAME - 1, y + height + 2 * _FRAME - 1), fill=colour)
            sheet.paste(Image.fromarray(np.asarray(load_image(path, size))), (x + _FRAME, y + _FRAME))
    return sheet
