"""Files and folders appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vireid_timm import files
from vireid_timm.files import STALE_AFTER, check_writable, remove_leftovers, save_json, whole_file, whole_folder


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / 'deep' / 'a.txt'
    with whole_file(target) as temporary:
        temporary.write_text('new')
        assert not target.exists()
    assert target.read_text() == 'new'
    assert [path.name for path in target.parent.iterdir()] == ['a.txt']


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / 'a.txt'
    target.write_text('old')
    with pytest.raises(RuntimeError), whole_file(target) as temporary:
        temporary.write_text('half')
        raise RuntimeError
    assert target.read_text() == 'old'
    assert [path.name for path in tmp_path.iterdir()] == ['a.txt']


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / 'model'
    for text in ('one', 'two'):
        with whole_folder(target) as temporary:
            (temporary / f'{text}.txt').write_text(text)
    assert [path.name for path in target.iterdir()] == ['two.txt']
    with pytest.raises(RuntimeError), whole_folder(target) as temporary:
        (temporary / 'three.txt').write_text('three')
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ['two.txt']
    assert [path.name for path in tmp_path.iterdir()] == ['model']


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / 'a.json'
    save_json(target, {'a': 1})
    with pytest.raises(TypeError):
        save_json(target, {'a': object()})
    assert target.read_text() == '{\n  "a": 1\n}\n'


def test_the_file_before_moves_to_another_name(tmp_path: Path) -> None:
    target, previous = tmp_path / 'a.txt', tmp_path / 'b.txt'
    for text in ('one', 'two', 'three'):
        with whole_file(target, previous=previous) as temporary:
            temporary.write_text(text)
    assert (target.read_text(), previous.read_text()) == ('three', 'two')
    with pytest.raises(RuntimeError), whole_file(target, previous=previous):
        raise RuntimeError
    assert (target.read_text(), previous.read_text()) == ('three', 'two')


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    """A full disk says what is wrong, but not where."""
    with pytest.raises(OSError, match='No space left on device') as caught, whole_file(tmp_path / 'a.txt') as temporary:
        temporary.symlink_to('/dev/full')
        with open(temporary, 'w') as file:
            file.write('text')
    assert caught.value.filename == str(tmp_path / 'a.txt')
    with pytest.raises(FileNotFoundError, match='elsewhere') as other, whole_file(tmp_path / 'a.txt'):
        open(tmp_path / 'elsewhere')
    assert other.value.filename == str(tmp_path / 'elsewhere')
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = {'last.pth', '.last.pth.part', '.hidden', 'notes.0123abcd.part', '.a.0123abcg.part'}
    for name in (*kept, '.last.pth.0123abcd.part'):
        (tmp_path / name).write_text('x')
    for name in ('best', '.best.89abcdef.old', '.best.89abcdef.part'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'model').write_text(name)
    remove_leftovers(tmp_path, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, 'best'}
    assert (tmp_path / 'best/model').read_text() == 'best'


def test_only_old_leftovers_are_removed_where_others_may_write(tmp_path: Path) -> None:
    for name, age in (('.a.0123abcd.part', 60), ('.b.0123abcd.part', STALE_AFTER + 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'model').write_text('x')
        for path in (tmp_path / name / 'model', tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    remove_leftovers(tmp_path, alone=False)
    assert [path.name for path in tmp_path.iterdir()] == ['.a.0123abcd.part']
    os.utime(tmp_path / '.a.0123abcd.part', (0, 0))
    remove_leftovers(tmp_path, alone=False)
    assert (tmp_path / '.a.0123abcd.part').exists(), 'a file in it is written to'


# Writes a folder anew and is killed before the second of the two renames.
REPLACER = """if True:
    import os, runpy, signal, sys
    files, replace = runpy.run_path(sys.argv[1]), os.replace
    def once(source, target):
        os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    with files['whole_folder'](sys.argv[2]) as temporary:
        (temporary / 'model').write_text(sys.argv[3])
        os.replace = once
"""


def test_a_folder_outlives_whoever_is_killed_while_replacing_it(tmp_path: Path) -> None:
    target = tmp_path / 'best'
    with whole_folder(target) as temporary:
        (temporary / 'model').write_text('one')
    for text in ('two', 'three'):
        done = subprocess.run([sys.executable, '-c', REPLACER, files.__file__, target, text], check=False)
        assert done.returncode == -signal.SIGKILL and not target.exists()
        remove_leftovers(tmp_path, alone=False)
        assert (target / 'model').read_text() == 'one'
    remove_leftovers(tmp_path, alone=True)
    assert [path.name for path in tmp_path.iterdir()] == ['best']


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, replace = tmp_path / 'best', os.replace
    with whole_folder(target) as temporary:
        (temporary / 'model').write_text('one')

    def refuse(source: Path, destination: Path) -> None:
        if source.name.endswith('.part'):
            raise OSError(errno.EIO, 'Input/output error')
        replace(source, destination)

    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(OSError, match='Input/output error.*best'), whole_folder(target) as temporary:
        (temporary / 'model').write_text('two')
    assert (target / 'model').read_text() == 'one'
    assert [path.name for path in tmp_path.iterdir()] == ['best']


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file', tmp_path / 'deep/new/file'):
        check_writable(path)
    check_writable(tmp_path, is_folder=True)
    for path in (tmp_path, tmp_path / 'file/new', '/proc/new'):
        with pytest.raises(OSError) as caught:
            check_writable(path)
        assert caught.value.filename == str(path)
    assert [path.name for path in tmp_path.iterdir()] == ['file']
