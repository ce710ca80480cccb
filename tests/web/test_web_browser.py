"""The web demo's page in a real browser."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from browser import Browser
from web_demo import BROKEN, PEOPLE, Demo

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason=f'no browser here: none of {", ".join(browser.NAMES)}')

RESULTS = 'document.querySelectorAll("#answer .result").length'


@pytest.fixture(scope='module')
def chromium() -> Iterator[Browser]:
    folder = Path(tempfile.mkdtemp())  # of a short name, for its sockets
    with Browser(folder) as started:
        yield started
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def page(chromium: Browser, demo: Demo) -> Browser:
    """The page as a visitor finds it, with the first example searched."""
    chromium.open(demo.address)
    chromium.wait_for(f'{RESULTS} === 10')
    return chromium


def _wait_for_text(page: Browser, text: str, selector: str = '#answer') -> None:
    page.wait_for(f'(document.querySelector({selector!r})?.innerText ?? "").includes({text!r})')


def test_a_visitor_without_an_image_sees_results_and_why(page: Browser) -> None:
    text = page.text('#answer')
    assert f'The most similar of {2 * PEOPLE} visible images' in text and 'Example: infrared image' in text
    assert len(re.findall(r'\d %\s+same person', text)) == 10 and text.count('similarity') == 10
    assert 'must not be used for' in page.text() and 'rendered' in page.text()
    page.click('.examples button[data-number="3"]')
    page.wait_for(rf'document.querySelector("#answer").innerText.match(/person \d+\n/)[0] !== {_person(text)!r}')
    page.click('.result[data-rank="2"]')
    _wait_for_text(page, 'in result 2', '#explanation')
    page.wait_for('document.querySelector("#explanation img").naturalWidth > 100')
    page.click('.examples button[data-number="0"]')
    page.wait_for('!document.querySelector("#explanation img")')


def _person(answer: str) -> str:
    """The line of the query's person."""
    return re.search(r'person \d+\n', answer)[0]


def test_an_upload_is_searched_in_either_direction(page: Browser, image_files: Path) -> None:
    page.upload(image_files / 'infrared.png')
    _wait_for_text(page, 'infrared.png')
    assert 'Your infrared image' in page.text('#answer') and page.value(RESULTS) == 10
    assert 'visible images' in page.text('#answer') and '✓' not in page.text('#answer')
    page.click('input[type=radio][value=visible]')
    _wait_for_text(page, 'Your visible image')
    assert 'infrared images' in page.text('#answer') and 'infrared.png' in page.text('#answer')
    page.upload(image_files / 'visible.png')
    _wait_for_text(page, 'visible.png')
    page.click('.examples button')
    _wait_for_text(page, 'Example: visible image')
    page.click('input[type=radio][value=infrared]')
    _wait_for_text(page, 'Example: infrared image')


@pytest.mark.parametrize('name', BROKEN)
def test_after_a_broken_upload_the_page_says_why_and_goes_on(page: Browser, image_files: Path, name: str) -> None:
    page.upload(image_files / name)
    _wait_for_text(page, BROKEN[name])
    assert page.text('#answer').startswith(f'{name}: this image cannot be read')
    page.upload(image_files / 'infrared.png')
    page.wait_for(f'{RESULTS} === 10')


def test_what_is_too_heavy_is_refused_in_the_page(page: Browser, image_files: Path) -> None:
    page.upload(image_files / 'heavy.png')
    _wait_for_text(page, 'exceed the maximum allowed size', 'body')
    page.click('.examples button[data-number="1"]')
    page.wait_for(f'{RESULTS} === 10')


@pytest.mark.parametrize('width', [360, 768])
def test_a_phone_never_scrolls_sideways(chromium: Browser, demo: Demo, width: int) -> None:
    chromium.open(demo.address, width=width, height=760)
    chromium.wait_for(f'{RESULTS} === 10')
    chromium.click('.result[data-rank="1"]')
    chromium.wait_for('document.querySelector("#explanation img")?.naturalWidth > 100')
    assert chromium.value('document.documentElement.scrollWidth <= innerWidth && innerWidth') == width
    outside = f'[...document.querySelectorAll(".vireid *")].filter(e => e.getBoundingClientRect().right > {width} + 1)'
    assert chromium.value(f'{outside}.length') == 0


def test_the_page_asks_no_other_host(page: Browser, demo: Demo) -> None:
    asked = [address for address in page.requests if not address.startswith(('data:', 'blob:'))]
    assert asked and {address for address in asked if not address.startswith(f'{demo.address}/')} == set()
    scripts = [error for error in page.errors if 'upload_progress' not in error and 'Failed to load' not in error]
    assert not scripts
