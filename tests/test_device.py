"""Devices fall back aloud, precision is chosen by the device, several processes go about one job together."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vireid_timm.device import (
    autocast_dtype,
    end_distributed,
    init_distributed,
    is_primary,
    named_device,
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
    assert together(lambda: 'done') == 'done'
    with pytest.raises(KeyError, match='mine'):
        together(fail)
    end_distributed()


# What each of two processes does and writes down, before, while and after it works with the other.
PROGRAM = """if True:
    import json, sys
    from pathlib import Path
    from vireid_timm.device import end_distributed, init_distributed, is_primary, process, together

    found = {'before': [is_primary(), *process()]}
    found['device'] = str(init_distributed('cpu'))
    number, count = process()
    found['joined'] = [is_primary(), number, count]

    def outcome(failing, error):
        def work():
            if number in failing:
                raise error
            return f'result {number}'
        try:
            return together(work)
        except Exception as caught:
            return f'{type(caught).__name__}: {caught}'

    found['success'] = outcome([], None)
    found['failure'] = outcome([1], OSError('disk full'))
    found['without words'] = outcome([1], KeyError())
    found['both'] = outcome([0, 1], OSError(f'disk {number} full'))
    found['afterwards'] = outcome([], None)
    end_distributed()
    found['left'] = list(process())
    Path(sys.argv[1], f'{number}.json').write_text(json.dumps(found))
"""


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp('processes')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        meeting = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': '2'}
    running = [
        subprocess.Popen(
            [sys.executable, '-c', PROGRAM, str(folder)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **meeting, 'RANK': number, 'LOCAL_RANK': number, 'OMP_NUM_THREADS': '1'},
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
        assert found['device'] == 'cpu'
        assert found['joined'] == [number == 0, number, 2]
        assert found['left'] == [0, 1]


def test_two_processes_fail_together(two_processes: list[dict]) -> None:
    first, second = two_processes
    for name in ('success', 'afterwards'):
        assert (first[name], second[name]) == ('result 0', 'result 1')
    assert first['failure'] == 'ValueError: process 1 of 2: disk full'
    assert second['failure'] == 'OSError: disk full'
    assert first['without words'] == 'ValueError: process 1 of 2: KeyError'
    assert (first['both'], second['both']) == ('OSError: disk 0 full', 'OSError: disk 1 full')
