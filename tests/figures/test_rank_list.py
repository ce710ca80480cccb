import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vireid_timm.figures.rank_list import HIT, MISS, UNKNOWN, RankRow, Result, rank_list_image, rank_list_page
from vireid_timm.synthvi.render import image_address

SIZE = (64, 32)
ADDRESS = image_address('visible', 0, 1, 0, size=SIZE)
QUERY = Result(image_address('infrared', 0, 1, 0, size=SIZE))


def _frames(image: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """Return the columns of the sides of frames, which are taller than letters."""
    return np.flatnonzero((np.asarray(image) == colour).all(axis=2).sum(axis=0) > SIZE[0]).tolist()


def _heights_of_frames(image: Image.Image) -> list[int]:
    black = (np.asarray(image)[:, 8:11] == 0).all(axis=(1, 2))  # the left sides of the queries' frames
    edges = np.flatnonzero(np.diff(np.pad(black, 1).astype(int)))
    return [int(height) for height in np.diff(edges)[::2]]


def test_hits_and_misses_have_their_colours_and_marks_in_the_order_given() -> None:
    row = RankRow(QUERY, [Result(ADDRESS, hit=True), Result(ADDRESS, hit=False), Result(ADDRESS)])
    image = rank_list_image([row], SIZE)
    hit, miss, unknown = (_frames(image, colour) for colour in (HIT, MISS, UNKNOWN))
    assert image.mode == 'RGB'
    assert len(unknown) == 6 and max(hit) < min(miss) and max(miss) < min(unknown)
    # The image itself is covered by a mark where a hit is known, and by the same one for every hit.
    inside = [np.asarray(image)[:, columns[2] + 1 : columns[2] + 1 + SIZE[1]] for columns in (hit, miss, unknown)]
    assert (inside[0] != inside[2]).any() and (inside[1] != inside[2]).any()
    white = [(part == 255).all(axis=2).sum() for part in inside]
    assert white[0] != white[1]  # a tick is not a cross


def test_every_row_has_its_images_in_full_whatever_their_number() -> None:
    rows = [RankRow(QUERY, [Result(ADDRESS)] * count, note) for count, note in ((3, ''), (0, 'nobody'), (1, ''))]
    image = rank_list_image(rows, SIZE)
    assert _heights_of_frames(image) == [SIZE[0] + 6] * 3
    assert image.width == rank_list_image(rows[:1], SIZE).width
    assert _heights_of_frames(rank_list_image([RankRow(QUERY, [])], SIZE)) == [SIZE[0] + 6]
    with pytest.raises(ValueError, match='at least one query'):
        rank_list_image([])


def test_each_thing_known_adds_a_line() -> None:
    heights = [
        rank_list_image([RankRow(QUERY, [Result(ADDRESS, **known)])], SIZE).height
        for known in ({}, {'similarity': 0.5}, {'similarity': 0.5, 'probability': 0.1}, {'identity': 'A' * 99})
    ]
    assert heights[0] < heights[1] == heights[2] == heights[3]
    names = RankRow(QUERY._replace(identity='张\udcd5'), [Result(ADDRESS, '张', 3, '22:14', 0.5, 0.9999)], 'é')
    assert rank_list_image([names], SIZE).height > heights[1]


@pytest.mark.parametrize('draw', [rank_list_image, lambda rows: rank_list_page(rows, 'title')])
def test_a_missing_image_is_named_and_the_others_are_shown(draw, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, 'vireid_timm'):
        draw([RankRow(QUERY, [Result('missing.png'), Result(ADDRESS)]), RankRow(QUERY, [Result('missing.png')])])
    (record,) = caplog.records
    assert '1 of 3 images' in record.message and 'missing.png' in record.message


class _Page(HTMLParser):
    """What a browser would load and read aloud."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.images, self.words = [], [], ''
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == 'img':
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_page_is_one_file_that_runs_nothing_and_loads_nothing(tmp_path: Path) -> None:
    bad = '"><script>alert(1)</script>\udcd5'
    known = Result(ADDRESS, bad, 3, '2026-11-01T22:14:03', 0.8614, 0.9999, True)
    rows = [RankRow(Result(bad, bad), [known, Result(ADDRESS, hit=False)], f'note {bad}'), RankRow(QUERY, [])]
    text = rank_list_page(rows, f'title {bad}', SIZE)
    (tmp_path / 'page.html').write_text(text, encoding='utf-8')
    page = _Page(text)
    assert 'script' not in page.tags and not re.findall(r'//\w', re.sub('base64,[^"]*', '', text))
    assert set(page.tags) >= {'title', 'h1', 'h2', 'ol', 'li', 'figcaption'}
    assert len(page.images) == 4
    assert all(image['src'].startswith('data:image/jpeg;base64,') for image in page.images)
    alt = page.images[1]['alt']
    for said in (
        'result 1',
        'same person',
        '<script>',
        'camera 3',
        '2026-11-01 22:14:03',
        'similarity 0.861',
        'probability >99%',
    ):
        assert said in alt
    assert 'another person' in page.images[2]['alt'] and page.images[3]['alt'].startswith('query')
    assert 'no result' in page.words and 'title "><script>' in page.words


@pytest.mark.parametrize(('share', 'shown'), [(0, '0%'), (0.004, '<1%'), (0.42, '42%'), (0.9951, '>99%'), (1, '100%')])
def test_a_probability_is_certain_only_if_it_is(share: float, shown: str) -> None:
    text = rank_list_page([RankRow(QUERY, [Result(ADDRESS, probability=share)])], 'title', SIZE)
    assert f'probability {shown}' in _Page(text).words
