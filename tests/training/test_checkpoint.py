"""Checkpoints: one is whole at any moment, damage is detected, and a run resumes only with the same premises."""

import dataclasses
import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vireid_timm import files
from vireid_timm.run_folder import (
    CONFIG,
    DAMAGED,
    LAST,
    PREVIOUS,
    has_checkpoint,
    load_checkpoint,
    newest_checkpoint,
)
from vireid_timm.training.checkpoint import CheckpointInterval, resolved_config, set_damaged_aside, write_checkpoint
from vireid_timm.training.config import TrainConfig


def _state(number: int, size: int = 64) -> dict[str, Any]:
    weights = {'layer.weight': torch.arange(size) * 0.5 + number, 'layer.bias': torch.full((3,), 1.0 * number)}
    return {'arch': 'vireid_dml_r10t', 'epoch': number, 'state_dict': weights}


def _number(folder: Path) -> int:
    return load_checkpoint(folder)['epoch']


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    for number in range(3):
        write_checkpoint(tmp_path, _state(number))
        assert has_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]
    assert [load_checkpoint(tmp_path / name)['epoch'] for name in (LAST, PREVIOUS)] == [2, 1]
    assert newest_checkpoint(tmp_path)[0].name == LAST


@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('name', ['fsync', 'replace'])
def test_wherever_the_process_ends_a_whole_checkpoint_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    """Before and after every call that changes what is on the disk, as a killed process would leave it."""
    real: Callable[..., None] = getattr(os, name)
    seen = []

    def watched(*args: Any) -> None:
        if after:
            real(*args)
        if saved:
            seen.append(_number(tmp_path))
        if not after:
            real(*args)

    saved = False
    monkeypatch.setattr(files.os, name, watched)
    write_checkpoint(tmp_path, _state(0))
    saved = True
    for number in (1, 2, 3):
        write_checkpoint(tmp_path, _state(number))
    assert len(seen) == 3 * 2 and set(seen) <= {0, 1, 2, 3}
    assert seen == sorted(seen)  # never older than the one before


def test_weights_that_are_saved_again_leave_the_previous_ones(tmp_path: Path) -> None:
    for number, replace in ((1, False), (2, False), (2, True), (3, False)):
        write_checkpoint(tmp_path, _state(number), replace)
        assert (load_checkpoint(tmp_path / PREVIOUS)['epoch'] if number > 1 else 1) == max(1, number - 1)
    assert _number(tmp_path) == 3


def test_any_changed_byte_is_seen_or_harmless(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _state(1, size=8))
    content = (tmp_path / LAST).read_bytes()
    expected = load_checkpoint(tmp_path)
    damaged = 0
    for position in range(len(content)):
        spoiled = bytearray(content)
        spoiled[position] ^= 0x10  # in one place this makes a folder of a record, which torch reads as noise
        (tmp_path / LAST).write_bytes(spoiled)
        try:
            state = load_checkpoint(tmp_path / LAST)
        except ValueError as error:
            assert LAST in str(error)
            damaged += 1
            continue
        assert all(torch.equal(state['state_dict'][key], value) for key, value in expected['state_dict'].items())
        assert state['epoch'] == expected['epoch']
    assert damaged > len(content) / 10  # the rest is padding, and fields of the archive that nobody reads


@pytest.mark.parametrize('spoil', [lambda content: b'', lambda content: content[: len(content) // 2], None])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[bytes], bytes] | None
) -> None:
    for number in (1, 2):
        write_checkpoint(tmp_path, _state(number))
    content = (tmp_path / LAST).read_bytes()
    middle = content.index(torch.full((3,), 2.0).numpy().tobytes())
    flipped = content[:middle] + b'\xff' + content[middle + 1 :]  # torch alone would load this
    assert torch.load(_written(tmp_path / 'other.pth', flipped), weights_only=True)['epoch'] == 2
    _written(tmp_path / LAST, spoil(content) if spoil else flipped)
    with caplog.at_level(logging.WARNING, 'vireid_timm'):
        path, state = newest_checkpoint(tmp_path)
    assert (path.name, state['epoch']) == (PREVIOUS, 1)
    assert f'{tmp_path / LAST} is damaged' in caplog.text and PREVIOUS in caplog.text

    set_damaged_aside(path)  # else the next one would push the only good one out
    write_checkpoint(tmp_path, _state(3))
    assert [load_checkpoint(tmp_path / name)['epoch'] for name in (LAST, PREVIOUS)] == [3, 1]
    assert (tmp_path / DAMAGED).exists()


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file can be opened, as on a network file system that is gone; then memory is short."""
    for number in (1, 2):
        write_checkpoint(tmp_path, _state(number))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match='Too many open files'):
            newest_checkpoint(tmp_path)
        with pytest.raises(OSError, match='Too many open files'):
            set_damaged_aside(tmp_path / PREVIOUS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(torch, 'load', _raise_memory_error)
        newest_checkpoint(tmp_path)
    assert _number(tmp_path) == 2 and not (tmp_path / DAMAGED).exists()


def _raise_memory_error(*args: Any, **options: Any) -> None:
    raise MemoryError


def test_a_whole_checkpoint_is_never_set_aside(tmp_path: Path) -> None:
    for number in (1, 2):
        write_checkpoint(tmp_path, _state(number))
    set_damaged_aside(tmp_path / PREVIOUS)
    assert _number(tmp_path) == 2


def test_two_damaged_checkpoints_are_both_named(tmp_path: Path) -> None:
    for name in (LAST, PREVIOUS):
        _written(tmp_path / name, b'nothing')
    with pytest.raises(
        ValueError, match=rf'{LAST} is damaged.*{PREVIOUS} is damaged.*has no undamaged checkpoint left'
    ):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match='no checkpoint in'):
        load_checkpoint(tmp_path / '..')


def test_a_process_that_died_between_the_renames_left_the_previous_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _state(1))
    (tmp_path / LAST).rename(tmp_path / PREVIOUS)
    path, state = newest_checkpoint(tmp_path)
    assert (path.name, state['epoch'], has_checkpoint(tmp_path)) == (PREVIOUS, 1, True)
    set_damaged_aside(path)
    write_checkpoint(tmp_path, _state(2))
    assert [load_checkpoint(tmp_path / name)['epoch'] for name in (LAST, PREVIOUS)] == [2, 1]


def test_a_disk_that_takes_no_more_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """The kernel refuses the write in its middle, as it does on a full disk."""
    write_checkpoint(tmp_path, _state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large') as caught:
            write_checkpoint(tmp_path, _state(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / LAST)
    assert [path.name for path in tmp_path.iterdir()] == [LAST] and _number(tmp_path) == 1


def test_a_checkpoint_is_due_every_so_many_steps_or_minutes() -> None:
    now = 0.0
    steps = CheckpointInterval('3', clock=lambda: now)
    assert [step for step in range(1, 10) if steps.due(step)] == [3, 6, 9]
    minutes, never = CheckpointInterval('1.5m', clock=lambda: now), CheckpointInterval('', clock=lambda: now)
    due = []
    for second in range(0, 300, 10):
        now = float(second)
        assert not never.due(1)
        if minutes.due(1):
            due.append(second)
            minutes.restart()
    assert due == [90, 180, 270]


def test_settings_given_win_over_those_of_the_resumed_run(tmp_path: Path) -> None:
    run = tmp_path / 'runs/first'
    run.mkdir(parents=True)
    (run / 'args.yaml').write_text('model: vireid_base_r10t\nlr: 0.5\nepochs: 7\nexperiment: first\n')
    write_checkpoint(run, _state(1))
    for given in ({'resume': str(run)}, {'resume': str(run / LAST)}):
        config = resolved_config({**given, 'epochs': 9})
        assert (config.model, config.lr, config.epochs, config.resume) == ('vireid_base_r10t', 0.5, 9, str(run))
    automatic = resolved_config({'resume': 'auto', 'output': str(tmp_path / 'runs'), 'experiment': 'first', 'lr': 0.1})
    assert (automatic.resume, automatic.model, automatic.lr) == (str(run), 'vireid_base_r10t', 0.1)
    whole = TrainConfig(resume='auto', output=str(tmp_path / 'runs'), experiment='first')
    assert resolved_config(whole) == TrainConfig(resume=str(run), output=str(tmp_path / 'runs'), experiment='first')
    write_checkpoint(run, _state(2))
    back = resolved_config({'resume': str(run / PREVIOUS)})
    assert (back.resume, back.lr) == (str(run / PREVIOUS), 0.5)


def test_settings_given_as_an_object_are_checked_as_others_are() -> None:
    with pytest.raises(ValueError, match='grad_accum_steps must be at least 1, got 0'):
        resolved_config(TrainConfig(grad_accum_steps=0))


def test_auto_starts_anew_where_there_is_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / 'killed').mkdir()  # before its first checkpoint
    (tmp_path / 'killed/args.yaml').write_text('epochs: 7\n')
    for experiment in ('none', 'killed'):
        with caplog.at_level(logging.INFO, 'vireid_timm'):
            config = resolved_config({'resume': 'auto', 'output': str(tmp_path), 'experiment': experiment})
        assert config.resume == '' and config.epochs == TrainConfig().epochs
        assert f'No checkpoint in {tmp_path / experiment}: a new run' in caplog.text


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'resume': 'auto'}, '--experiment'),
        ({'resume': 'no/such/run'}, 'no/such/run.*args.yaml'),
        ({'resume': '{tmp}/empty'}, 'no checkpoint yet'),
        ({'resume': '{tmp}/run/previous.pth'}, r'no such checkpoint; --resume \S+/run takes'),
        ({'resume': '{tmp}/run/epoch3.pth'}, r'epoch3\.pth.*give a run folder.*or last\.pth or previous\.pth in it'),
        ({'resume': '{tmp}/empty', 'epoch': 3}, "did you mean 'epochs'"),
    ],
)
def test_what_cannot_be_resumed_is_named(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    for name in ('empty', 'run'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'args.yaml').write_text('epochs: 7\n')
    write_checkpoint(tmp_path / 'run', _state(1))
    with pytest.raises(ValueError, match=message):
        resolved_config({**given, 'resume': given['resume'].format(tmp=tmp_path)})


def test_data_and_model_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'model').mkdir()
    for given, absolute in (
        ({'data_dir': 'images', 'model': 'model'}, (f'{tmp_path}/images', f'{tmp_path}/model')),
        (
            {'data_dir': '~/images', 'model': 'local-dir:model'},
            (f'{tmp_path}/home/images', f'local-dir:{tmp_path}/model'),
        ),
        ({'data_dir': '/images', 'model': 'hf-hub:me/it'}, ('/images', 'hf-hub:me/it')),
        ({'model': 'vireid_dml_r50.tv_in1k'}, ('', 'vireid_dml_r50.tv_in1k')),
    ):
        config = resolved_config(given)
        assert (config.data_dir, config.model) == absolute
        run = tmp_path / 'run'
        run.mkdir(exist_ok=True)
        (run / CONFIG).write_text(yaml.safe_dump(dataclasses.asdict(config)))
        (run / LAST).touch()
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir('/')
            assert resolved_config({'resume': str(run)}) == dataclasses.replace(config, resume=str(run))
