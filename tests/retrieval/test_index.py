"""The index on disk: what is in it after changes, interruptions and mistakes, and who may write it."""

import json
import os
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from galleries import WIDTH, about, features, listed, made_index, paths_in, stored

from vireid_timm.retrieval import index as index_module
from vireid_timm.retrieval.index import ABOUT, IMAGES, LOCK, About, Changed, Index

TIMES = ['2026-11-01T21:59:59', '2026-11-01T22:00:00', '2026-11-01T22:00:00.500000', '2026-11-02T00:00:00', None]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    names = ['north/a.jpg', 'north/b.jpg', 'south/c.jpg', 'south/d.jpg', 'e.jpg']
    columns = dict(camera=[1, 2, 3, 'gate', None], time=TIMES, identity=['anna', 'ben', None, 'anna', '7'])
    return made_index(tmp_path / 'index', names, **columns)


def test_what_was_added_is_there_again(index: Index) -> None:
    again = Index(index.folder)
    assert len(again) == 5 and again.about == about() and again.pending == 0
    view = again.view()
    assert again.images(view, view.rows)[3] == ('south/d.jpg', 'gate', '2026-11-02T00:00:00', 'anna')
    assert again.images(view, view.rows)[4] == ('e.jpg', None, None, '7')
    np.testing.assert_array_equal(view.features, features(5).numpy())
    assert set(os.listdir(index.folder)) == {ABOUT, IMAGES, LOCK, 'features-0.f16'}


def test_others_see_changes_after_the_commit_and_all_at_once(index: Index) -> None:
    other = Index(index.folder)
    assert len(other.view().rows) == 5
    index.append(listed(['f.jpg', 'e.jpg']), features(2, 1).numpy())
    assert index.remove(['north/a.jpg', 'nowhere.jpg']) == 1
    assert paths_in(other) == ['north/a.jpg', 'north/b.jpg', 'south/c.jpg', 'south/d.jpg', 'e.jpg']
    assert paths_in(index) == ['north/b.jpg', 'south/c.jpg', 'south/d.jpg', 'f.jpg', 'e.jpg']
    index.commit()
    assert paths_in(other) == paths_in(index)
    np.testing.assert_array_equal(stored(other)['e.jpg'], features(2, 1)[1].numpy())


def test_what_was_not_committed_is_gone_and_its_place_is_used_again(index: Index) -> None:
    index.append(listed(['f.jpg']), features(1, 1).numpy())
    index.close()
    index.close()  # once more does no harm
    with pytest.raises(ValueError, match='was it closed'):
        index.remove(['a.jpg'])
    again = Index(index.folder)
    assert len(again) == 5
    again.append(listed(['g.jpg']), features(1, 2).numpy())
    again.commit()
    np.testing.assert_array_equal(stored(again)['g.jpg'], features(1, 2)[0].numpy())
    assert len(again.view().features) == 6


def test_features_move_together_when_most_are_unused(index: Index) -> None:
    other = Index(index.folder)
    old = other.view()
    index.remove(['north/a.jpg', 'south/c.jpg'])
    index.commit()
    assert index.view().generation == 0 and len(index.view().features) == 5
    expected = stored(index)
    index.remove(['north/b.jpg'])
    index.commit()
    view = index.view()
    assert view.generation == 1 and view.rows.tolist() == [0, 1] and len(view.features) == 2
    assert sorted(os.listdir(index.folder)) == sorted([ABOUT, IMAGES, LOCK, 'features-1.f16'])
    for path, row in stored(index).items():
        np.testing.assert_array_equal(row, expected[path])
    # Who was searching meanwhile can still read the old features, and finds out that their rows no longer count.
    np.testing.assert_array_equal(old.features, features(5).numpy())
    with pytest.raises(Changed):
        other.images(old, old.rows)
    assert paths_in(other) == ['south/d.jpg', 'e.jpg']
    index.append(listed(['f.jpg']), features(1, 1).numpy())
    index.commit()
    np.testing.assert_array_equal(stored(other)['f.jpg'], features(1, 1)[0].numpy())


def test_one_writer_at_a_time(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, 'PATIENCE', 0.05)
    other = Index(index.folder)
    index.remove(['e.jpg'])
    with pytest.raises(ValueError, match='another process is writing the index'):
        other.remove(['e.jpg'])
    index.commit()
    assert other.remove(['e.jpg']) == 0 and other.remove(['south/d.jpg']) == 1
    other.close()
    index.hold()
    index.commit()
    with pytest.raises(ValueError, match='another process is writing the index'):
        other = Index(index.folder)
        other.remove(['e.jpg'])
    index.close()


def test_threads_may_add_while_others_read(index: Index) -> None:
    problems = []

    def add(number: int) -> None:
        for part in range(10):
            index.append(listed([f'{number}/{part}.jpg']), features(1, 100 * number + part).numpy())
            index.commit()

    def read() -> None:
        while adding[0].is_alive():
            view = index.view('camera IS NULL')
            images = index.images(view, view.rows)
            if len(images) != len(view.rows) or view.rows.max() >= len(view.features):
                problems.append(view)

    adding = [threading.Thread(target=add, args=(number,)) for number in range(3)]
    reading = [threading.Thread(target=read) for _ in range(2)]
    for thread in adding + reading:
        thread.start()
    for thread in adding + reading:
        thread.join()
    assert not problems and len(index) == 35
    for number in range(3):
        for part in range(10):
            np.testing.assert_array_equal(
                stored(index)[f'{number}/{part}.jpg'], features(1, 100 * number + part)[0].numpy()
            )


def test_the_difference_to_a_listing(index: Index) -> None:
    now = listed(['north/a.jpg', 'north/b.jpg', 'south/c.jpg', 'new.jpg', 'e.jpg'], camera=[1, 2, 9, 5, None])
    now = [
        image._replace(time=time, identity=name) for image, time, name in zip(now, TIMES, ['anna', 'x', *[None] * 3])
    ]
    now[0] = now[0]._replace(mtime=2)
    now[3] = now[3]._replace(time=None)
    now[4] = now[4]._replace(identity='7', time=None)
    todo, counts = index.difference(now)
    assert todo == [now[3], now[0]]
    assert counts == {'new': 1, 'changed': 1, 'relabelled': 2, 'dropped': 1, 'unchanged': 1}
    index.commit()
    view = index.view()
    assert index.images(view, view.rows)[1] == ('north/b.jpg', 2, '2026-11-01T22:00:00', 'x')
    assert index.images(view, view.rows)[2] == ('south/c.jpg', 9, '2026-11-01T22:00:00.500000', None)
    assert paths_in(index) == ['north/a.jpg', 'north/b.jpg', 'south/c.jpg', 'e.jpg']
    assert index.difference(now[:3] + now[4:])[1]['dropped'] == 0


def test_a_listing_of_another_gallery_changes_nothing(index: Index) -> None:
    with pytest.raises(ValueError, match='none of the 5 images in .* is in the gallery given'):
        index.difference(listed(['else/a.jpg']))
    index.close()
    assert len(Index(index.folder)) == 5


@pytest.mark.parametrize(
    ('where', 'expected'),
    [
        ('camera != 3', 'abd'),
        ("camera = '2' OR camera IS NULL", 'be'),
        ("camera = 'gate'", 'd'),
        ("path LIKE 'north/%'", 'ab'),
        ("path GLOB 'south*' AND identity = 'anna'", 'd'),
        ("time > '2026-11-01T22:00'", 'cd'),
        ("time >= '2026-11-01 22:00:00'", 'bcd'),
        ("time = '2026-11-01T22:00'", 'b'),
        ("'2026-11-02' <= time", 'd'),
        ("time BETWEEN '2026-11-01T22:00' AND '2026-11-01T22:00:00.5'", 'bc'),
        ("substr(time, 12, 2) IN ('21', '00')", 'ad'),
        ('identity IS NULL -- a comment', 'c'),
        ('1', 'abcde'),
        ('0', ''),
        ('NULL', ''),
        ('camera != 3) AND (identity IS NOT NULL', 'abd'),
    ],
)
def test_where_selects(index: Index, where: str, expected: str) -> None:
    assert ''.join(path[-5] for path in paths_in(index, where)) == expected
    assert len(paths_in(index)) == 5


@pytest.mark.parametrize(
    'where',
    [
        '',
        'camera !=',
        'camra = 3',
        'row < 3',
        'rowid < 3',
        'size > 0',
        'images.mtime > 0',
        '1; DROP TABLE images',
        '1); DELETE FROM images; --',
        '1) UNION SELECT 99 --',
        '1) UNION SELECT next_row FROM state WHERE (1',
        'camera IN (SELECT next_row FROM state)',
        'EXISTS (SELECT 1 FROM sqlite_master)',
        'path IN (SELECT path FROM images WHERE camera = 1)',
        '(SELECT count(*) FROM images) > 0',
        "load_extension('x')",
        'randomblob(1000000000) IS NOT NULL',
        'zeroblob(1000000000) IS NOT NULL',
        '1 /*',
        'path = ?',
        'camera = 1\0',
    ],
)
def test_other_expressions_are_refused(index: Index, where: str) -> None:
    with pytest.raises(ValueError, match=r'cannot search where .* over path, camera, time, identity, such as'):
        index.view(where)
    assert len(index.view().rows) == 5
    index.append(listed(['f.jpg']), features(1).numpy())  # nothing is forbidden any more
    index.commit()


@pytest.mark.parametrize('time', ['yesterday', '22:00', '2026-11-01T22:00Z', '', '2026-13-01'])
def test_times_are_compared_with_times(index: Index, time: str) -> None:
    with pytest.raises(ValueError, match=f"times are compared with '{time}'; expected ISO 8601"):
        index.view(f"time > '{time}'")


def test_times_with_an_offset_are_compared_as_moments(tmp_path: Path) -> None:
    times = ['2026-11-01T20:00:00Z', '2026-11-01T21:00:00Z']
    index = made_index(tmp_path / 'index', ['a.jpg', 'b.jpg'], time=times)
    assert paths_in(index, "time > '2026-11-01T21:00+01:00'") == ['b.jpg']
    with pytest.raises(ValueError, match="times are compared with '2026-11-01T21:00'"):
        index.view("time > '2026-11-01T21:00'")


def test_names_of_any_bytes(tmp_path: Path) -> None:
    names = [os.fsdecode(b'caf\xe9/\xff.jpg'), 'straße/東京.jpg', 'it\'s "quoted"; --.jpg', 'line\nbreak.jpg']
    index = made_index(tmp_path / os.fsdecode(b'ind\xe9x ?#%'), names, identity=names)
    again = Index(index.folder)
    assert paths_in(again) == names
    assert again.rows_like([(names[0], None, None, names[1])]).tolist() == [0, 1]
    assert again.difference(listed(names, identity=names))[1]['unchanged'] == 4
    assert again.remove(names[:1]) == 1


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        (ABOUT, b'{', 'index.json is damaged'),
        (ABOUT, b'[]', 'index.json is damaged'),
        (ABOUT, b'{"format": 1}', 'index.json is damaged'),
        (ABOUT, json.dumps({'format': 99}).encode(), 'format 99 is of a newer version'),
        (IMAGES, b'no database at all' * 100, 'is damaged'),
        (IMAGES, b'', 'index'),
        ('features-0.f16', b'short', 'features-0.f16 has 5 of 80 bytes'),
    ],
)
def test_damage_is_named(index: Index, name: str, content: bytes, message: str) -> None:
    index.close()
    (index.folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        Index(index.folder).view()


def test_missing_files_are_named(index: Index, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='there is no index in .*nowhere; make one with: vireid index'):
        Index(tmp_path / 'nowhere')
    (index.folder / 'features-0.f16').unlink()
    with pytest.raises(ValueError, match='has 0 of 80 bytes'):
        Index(index.folder).view()
    (index.folder / IMAGES).unlink()
    with pytest.raises(ValueError, match='images.sqlite is missing'):
        Index(index.folder)


def test_an_index_is_not_made_where_something_else_is(index: Index, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match='already holds an index'):
        Index.create(index.folder, about())
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'a.jpg').touch()
    with pytest.raises(ValueError, match='holds other files .a.jpg.'):
        Index.create(tmp_path / 'images', about())
    # What a process left that was killed while it made one is no obstacle.
    (tmp_path / 'partial').mkdir()
    (tmp_path / 'partial' / LOCK).touch()
    (tmp_path / 'partial' / IMAGES).write_bytes(b'half a database')
    assert len(Index.create(tmp_path / 'partial', about())) == 0


def test_an_older_reader_of_the_table_needs_nothing_of_ours(index: Index) -> None:
    with sqlite3.connect(index.folder / IMAGES) as database:
        assert database.execute('SELECT count(*) FROM images WHERE camera = 2').fetchone() == (1,)
    database.close()


def test_a_difference_of_models_is_in_words() -> None:
    own = about()
    assert own.difference(about()) == '' and own.difference(about(model='moved', calibration={})) == ''
    assert own.difference(about(modality='infrared', size=(8, 4))) == (
        'modality visible, not infrared, size (4, 2), not (8, 4)'
    )
    assert isinstance(own, About) and own.dimensions == WIDTH
