"""Devices fall back aloud, precision is chosen by the device, several processes go about one job together."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from processes import start_two

from vireid_timm.device import autocast_dtype, named_device, resolve_device
from vireid_timm.distributed import (
    any_process,
    end_distributed,
    has_lost_contact,
    init_distributed,
    is_announced,
    is_primary,
    mean_over_processes,
    on_primary,
    process,
    together,
)


def test_a_missing_device_falls_back_to_the_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        assert resolve_device('cuda').type == 'cuda'
        return
    with caplog.at_level(logging.INFO, 'vireid_timm'):
        assert resolve_device('cuda') == torch.device('cpu')
    assert 'computing on the CPU' in caplog.text


def test_an_unknown_device_is_an_error() -> None:
    for choose in (named_device, resolve_device, init_distributed):
        with pytest.raises(ValueError, match="unknown device 'gpu'"):
            choose('gpu')


def test_a_named_device_need_not_be_there() -> None:
    assert named_device('cuda:7') == torch.device('cuda', 7)
    assert named_device(torch.device('cpu')) == torch.device('cpu')


def test_precision_can_be_forced_and_is_float32_or_bfloat16_otherwise() -> None:
    cpu = torch.device('cpu')
    assert autocast_dtype(cpu, False) is None
    assert autocast_dtype(cpu, True) == torch.bfloat16
    assert autocast_dtype(cpu, True, 'float16') == torch.float16
    assert autocast_dtype(cpu, None) in (None, torch.bfloat16)


def test_a_process_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError('mine')

    for tasks in ('1', '4'):  # a shell of a SLURM allocation is not one of its tasks
        monkeypatch.setenv('SLURM_NTASKS', tasks)
        assert init_distributed('cpu') == torch.device('cpu')
        assert process() == (0, 1)
        assert is_primary()
    for share in (together, on_primary):
        assert share(lambda: 'done') == 'done'
        with pytest.raises(KeyError, match='mine') as raised:
            share(fail)
        assert not is_announced(raised.value)  # to whom?
    assert (any_process(True), any_process(False)) == (True, False)
    assert mean_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    end_distributed()


def _work(folder: Path) -> None:
    """What each of two processes does and writes down, before, while and after it works with the other."""
    found = {'before': [is_primary(), *process()]}
    found['device'] = [str(init_distributed('cpu')) for _ in range(2)]
    number, count = process()
    found['joined'] = [is_primary(), number, count]

    def outcome(share: Callable, failing: Sequence[int] = (), error: Exception | None = None) -> str:
        def work() -> str:
            if number in failing:
                raise error
            return f'result {number}'

        try:
            return share(work)
        except Exception as caught:
            return f'{type(caught).__name__}: {caught}' + ' (announced)' * is_announced(caught)

    found['success'] = outcome(together)
    found['failure'] = outcome(together, [1], OSError('disk full'))
    found['without words'] = outcome(together, [1], KeyError())
    found['both'] = outcome(together, [0, 1], OSError(f'disk {number} full'))
    found['primary'] = outcome(on_primary)
    found['primary failure'] = outcome(on_primary, [0], OSError('disk full'))
    found['other failure'] = outcome(on_primary, [1], OSError('never raised'))
    found['afterwards'] = outcome(together)
    found['any'] = [any_process(flags[number]) for flags in ([False, False], [False, True], [True, True])]
    values = torch.tensor([1.0 + number, 4.0, float('nan') if number else 0.0])
    found['mean'] = mean_over_processes(values).tolist()
    found['values'] = values.tolist()[:2]
    end_distributed()
    found['left'] = list(process())
    (folder / f'{number}.json').write_text(json.dumps(found))


def _die(folder: Path) -> None:
    """One of two processes dies while the other waits for it."""
    init_distributed('cpu')
    if process()[0] == 1:
        os._exit(9)
    with pytest.raises(RuntimeError) as raised:
        any_process(False)
    (folder / 'lost').write_text(str(has_lost_contact(raised.value)))
    end_distributed()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp('processes')
    statuses, said = start_two(_work, folder, folder=folder, slurm=True)
    assert statuses == [0, 0], said
    return [json.loads((folder / f'{number}.json').read_text(encoding='utf-8')) for number in range(2)]


def test_a_process_that_died_is_noticed(tmp_path: Path) -> None:
    statuses, said = start_two(_die, tmp_path, folder=tmp_path)
    assert statuses == [0, 9], said
    assert (tmp_path / 'lost').read_text() == 'True'


def test_two_processes_join_and_leave(two_processes: list[dict]) -> None:
    for number, found in enumerate(two_processes):
        assert found['before'] == [number == 0, 0, 1]
        assert found['device'] == ['cpu', 'cpu'], 'nobody joins twice'
        assert found['joined'] == [number == 0, number, 2]
        assert found['left'] == [0, 1]


def test_two_processes_fail_together(two_processes: list[dict]) -> None:
    first, second = two_processes
    for name in ('success', 'afterwards'):
        assert (first[name], second[name]) == ('result 0', 'result 1')
    assert first['failure'] == 'ValueError: process 1 of 2: disk full (announced)'
    assert second['failure'] == 'OSError: disk full (announced)'
    assert first['without words'] == 'ValueError: process 1 of 2: KeyError (announced)'
    assert first['both'] == 'OSError: disk 0 full (announced)'
    assert second['both'] == 'OSError: disk 1 full (announced)'


def test_one_process_works_for_both(two_processes: list[dict]) -> None:
    for found in two_processes:
        assert found['primary'] == found['other failure'] == 'result 0'
    first, second = two_processes
    assert first['primary failure'] == 'OSError: disk full (announced)'
    assert second['primary failure'] == 'ValueError: process 0 of 2: disk full (announced)'


def test_two_processes_exchange_flags_and_numbers(two_processes: list[dict]) -> None:
    for number, found in enumerate(two_processes):
        assert found['any'] == [False, True, True]
        assert found['mean'][:2] == [1.5, 4.0]
        assert math.isnan(found['mean'][2])
        assert found['values'] == [1.0 + number, 4.0]
