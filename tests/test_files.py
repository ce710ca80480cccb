"""Files and folders appear whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from vireid_timm import files
from vireid_timm.files import lock, remove_leftovers, save_json, whole_file, whole_folder


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
    for name in ('.best.89abcdef.old', '.best.89abcdef.part'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'model').write_text('x')
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_lock_ends_with_its_file_and_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / 'log'
    with open(path, 'w') as first, open(path) as second:
        assert lock(first) and not lock(second)
    with open(path) as third:
        assert lock(third)
    program = f"""if True:
        import runpy, sys
        lock = runpy.run_path({files.__file__!r})['lock']  # without the package, which takes seconds to import
        file = open({str(path)!r})
        print(lock(file), flush=True)
        sys.stdin.read()
    """
    holder = subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder, open(path) as file:
        assert holder.stdout.readline() == 'True\n'
        assert not lock(file)
        holder.kill()
        assert lock(file, wait=True)
