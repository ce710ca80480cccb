"""Galleries and queries as folders and CSV files."""

import logging
import os
from pathlib import Path

import pytest
from image_files import noise
from PIL import Image

from vireid_timm.data.listing import list_images, listed_image, normalized_time


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8, 4, 3)).save(folder / name)


def warnings_in(caplog: pytest.LogCaptureFixture) -> str:
    return '\n'.join(record.message for record in caplog.records if record.levelno == logging.WARNING)


def test_a_folder_is_listed_at_any_depth_with_cameras_from_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 'c3_a.jpg', 'deep/er/cam12_b.PNG', 'deep/c.bmp', 'anna/C4_d.jpg', '.hidden/e.jpg')
    (tmp_path / 'notes.txt').write_text('no image')
    (tmp_path / 'deep' / 'Thumbs.db').write_text('litter')
    (tmp_path / 'deep' / 'back').symlink_to(tmp_path)
    (tmp_path / 'gone.jpg').symlink_to(tmp_path / 'nowhere.jpg')
    found = list_images(tmp_path)
    assert [(os.path.relpath(image.path, tmp_path), image.camera) for image in found] == [
        ('anna/C4_d.jpg', 4),
        ('c3_a.jpg', 3),
        ('deep/c.bmp', None),
        ('deep/er/cam12_b.PNG', 12),
        ('gone.jpg', None),
    ]
    assert all((image.time, image.identity) == (None, None) for image in found)
    status = os.stat(tmp_path / 'c3_a.jpg')
    assert (found[1].size, found[1].mtime) == (status.st_size, status.st_mtime_ns) and found[4].size == -1
    assert '1 files are ignored for their suffix' in warnings_in(caplog) and 'notes.txt' in warnings_in(caplog)
    assert '1 links lead back' in warnings_in(caplog)


def test_folders_may_be_identities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 'visible/anna/a.jpg', 'visible/ben/2026/b.jpg')
    found = list_images(tmp_path, folders_are_identities=True)
    assert [image.identity for image in found] == ['anna', '2026']
    monkeypatch.chdir(tmp_path / 'visible' / 'anna')
    (image,) = list_images('.', folders_are_identities=True)
    assert image.identity == 'anna' and image.path == str(tmp_path / 'visible' / 'anna' / 'a.jpg')


@pytest.mark.parametrize('mark', ['', '\ufeff'])
@pytest.mark.parametrize('separator', [',', ';', '\t'])
def test_a_csv_file_may_give_camera_time_and_identity(
    separator: str, mark: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 'images/a.jpg', 'images/b.jpg', 'c.jpg', 'd.jpg')
    lines = [
        ['Path', ' IDENTITY', 'camera', 'Time', 'note'],
        ['images/a.jpg', 'anna', '3', '2026-11-01 22:15', 'x'],
        [str(tmp_path / 'images' / 'b.jpg'), '', '2.0', '2026-11-01T22:15:30+01:00', 'x'],
        ['images\\b.jpg', 'nan', '2', '2026-11-01T21:15:30Z', 'x'],  # the same line again
        ['c.jpg', 'ben', 'north gate', 'NaT', 'x'],
        ['missing.jpg', 'ben', '', '', 'x'],
        ['d.jpg', 'N/A', 'nan', '', 'x'],
    ]
    file = tmp_path / 'gallery.csv'
    file.write_text(mark + '\n'.join(map(separator.join, lines)) + '\n', encoding='utf-8')
    found = [(os.path.relpath(image.path, tmp_path), *image[1:4]) for image in list_images(file)]
    assert found == [
        ('images/a.jpg', 3, '2026-11-01T22:15:00', 'anna'),
        ('images/b.jpg', 2, '2026-11-01T21:15:30Z', None),
        ('c.jpg', 'north gate', None, 'ben'),
        ('d.jpg', None, None, None),
    ]
    said = warnings_in(caplog)
    assert 'note' in said and '1 lines of' in said and '1 files in' in said and 'missing.jpg' in said


def test_a_csv_file_needs_only_paths(tmp_path: Path) -> None:
    write(tmp_path, 'a.jpg')
    (tmp_path / 'list.csv').write_text('path\na.jpg\n')
    assert list_images(tmp_path / 'list.csv') == [listed_image(tmp_path / 'a.jpg')]


@pytest.mark.parametrize(
    ('lines', 'error', 'message'),
    [
        (['file', 'a.jpg'], ValueError, 'the first line lacks path; expected:'),
        (['path,time', 'a.jpg,yesterday'], ValueError, "line 2: 'yesterday' is no ISO 8601 time"),
        (['path,time', 'a.jpg,2026-02-30'], ValueError, 'line 2: .2026-02-30. is no ISO 8601 time'),
        (['path', '""'], ValueError, 'line 2: the path is empty'),
        (['path,camera', 'a.jpg'], ValueError, 'line 2: expected 2 values'),
        (['path,camera', 'a.jpg,1', 'a.jpg,2'], ValueError, 'lines 2 and 3: .*a.jpg is listed twice, with different'),
        (['path', 'b.jpg', 'c.jpg'], FileNotFoundError, 'none of the 2 files in .* is there, e.g. .*b.jpg'),
        (['path'], ValueError, 'has no image'),
        ([], ValueError, 'the first line lacks path'),
    ],
)
def test_a_wrong_csv_file_is_named_with_its_line(
    lines: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    write(tmp_path, 'a.jpg')
    (tmp_path / 'list.csv').write_text('\n'.join(lines))
    with pytest.raises(error, match=message):
        list_images(tmp_path / 'list.csv')


def test_what_is_no_gallery_is_named(tmp_path: Path) -> None:
    write(tmp_path, 'a.jpg')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='there is no folder or CSV file .*nowhere'):
        list_images(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='empty has no image'):
        list_images(tmp_path / 'empty')
    with pytest.raises(ValueError, match='a.jpg is an image; expected a folder'):
        list_images(tmp_path / 'a.jpg')


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('2026-11-01', '2026-11-01T00:00:00'),
        ('2026-11-01T22:15', '2026-11-01T22:15:00'),
        (' 2026-11-01 22:15:07 ', '2026-11-01T22:15:07'),
        ('2026-11-01T22:15:07.5', '2026-11-01T22:15:07.500000'),
        ('2026-11-01T22:15:07.123456789', '2026-11-01T22:15:07.123456'),
        ('2026-11-01T22:15Z', '2026-11-01T22:15:00Z'),
        ('2026-11-01t22:15:00+02:00', '2026-11-01T20:15:00Z'),
        ('2026-11-01 22:15:00 -0530', '2026-11-02T03:45:00Z'),
        ('2026-11-01T00:15+01', '2026-10-31T23:15:00Z'),
    ],
)
def test_times_have_one_form(text: str, expected: str) -> None:
    assert normalized_time(text) == expected == normalized_time(expected)


@pytest.mark.parametrize(
    'text', ['', 'now', '22:15', '2026-11', '2026-13-01', '2026-11-01T24:30', '1.11.2026', '0001-01-01T00:00+02:00']
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match='is no ISO 8601 time'):
        normalized_time(text)
