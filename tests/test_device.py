"""Devices fall back aloud, precision is chosen by the device, several processes go about one job together."""

import json
import logging
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vireid_timm.device import (
    any_process,
    autocast_dtype,
    end_distributed,
    init_distributed,
    is_announced,
    is_primary,
    mean_over_processes,
    named_device,
    on_primary,
    process,
    resolve_device,
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


# What each of two processes does and writes down, before, while and after it works with the other.
PROGRAM = """if True:
    import json, sys
    from pathlib import Path
    import torch
    from vireid_timm import device

    found = {'before': [device.is_primary(), *device.process()]}
    found['device'] = [str(device.init_distributed('cpu')) for _ in range(2)]
    number, count = device.process()
    found['joined'] = [device.is_primary(), number, count]

    def outcome(share, failing=(), error=None):
        def work():
            if number in failing:
                raise error
            return f'result {number}'
        try:
            return share(work)
        except Exception as caught:
            return f'{type(caught).__name__}: {caught}' + ' (announced)' * device.is_announced(caught)

    found['success'] = outcome(device.together)
    found['failure'] = outcome(device.together, [1], OSError('disk full'))
    found['without words'] = outcome(device.together, [1], KeyError())
    found['both'] = outcome(device.together, [0, 1], OSError(f'disk {number} full'))
    found['primary'] = outcome(device.on_primary)
    found['primary failure'] = outcome(device.on_primary, [0], OSError('disk full'))
    found['other failure'] = outcome(device.on_primary, [1], OSError('never raised'))
    found['afterwards'] = outcome(device.together)
    found['any'] = [device.any_process(flags[number]) for flags in ([False, False], [False, True], [True, True])]
    values = torch.tensor([1.0 + number, 4.0, float('nan') if number else 0.0])
    found['mean'] = device.mean_over_processes(values).tolist()
    found['values'] = values.tolist()[:2]
    device.end_distributed()
    found['left'] = list(device.process())
    Path(sys.argv[1], f'{number}.json').write_text(json.dumps(found))
"""


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp('processes')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        # As SLURM's srun starts them; tests/test_distributed.py has torchrun.
        meeting = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'SLURM_NTASKS': '2'}
    running = [
        subprocess.Popen(
            [sys.executable, '-c', PROGRAM, str(folder)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **meeting, 'SLURM_PROCID': number, 'SLURM_LOCALID': number, 'OMP_NUM_THREADS': '1'},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in ('0', '1')
    ]
    try:
        errors = [each.communicate(timeout=60)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0, 0], errors
    return [json.loads((folder / f'{number}.json').read_text(encoding='utf-8')) for number in range(2)]


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
