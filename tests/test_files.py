"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from vireid_timm.files import save_json, whole_file, whole_folder


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
