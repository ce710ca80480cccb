"""Ranks join, leave, exchange and fail together."""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from processes import start_two
from torch import distributed

from vireid_timm.cli.main import main
from vireid_timm.distributed import (
    all_ranks,
    any_rank,
    from_rank_zero,
    gather,
    is_lost_rank,
    is_rank_zero,
    is_reported_here,
    mean_over_ranks,
    process_group,
    rank_and_world_size,
)


def test_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError('mine')

    for tasks in ('1', '4'):  # a shell of a SLURM allocation is not one of its tasks
        monkeypatch.setenv('SLURM_NTASKS', tasks)
        with process_group('cpu') as device:
            assert device == torch.device('cpu') and rank_and_world_size() == (0, 1) and is_rank_zero()
    monkeypatch.setenv('SLURM_PROCID', '1')
    assert is_rank_zero(), 'without an address to meet at it runs alone, and has to log and write'
    assert all_ranks(lambda: 'done') == 'done' and from_rank_zero('mine') == 'mine'
    with pytest.raises(KeyError, match='mine') as raised:
        all_ranks(fail)
    assert is_reported_here(raised.value)
    assert (any_rank(True), any_rank(False)) == (True, False)
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert mean_over_ranks(values).tolist() == [1.0, 2.0]
    assert gather(values).tolist() == [[1.0, 2.0]] and not gather(values).requires_grad


def _work(folder: Path) -> None:
    """What each of two ranks does and writes down, before, while and after it is in a group."""
    found = {'before': [is_rank_zero(), *rank_and_world_size()]}
    with process_group('cpu') as device:
        with process_group('cpu') as again:  # the inner one neither joins nor leaves
            found['device'] = [str(device), str(again)]
        rank, world_size = rank_and_world_size()
        found['joined'] = [is_rank_zero(), rank, world_size]

        def outcome(failing: Sequence[int] = (), error: Exception | None = None) -> str:
            def work() -> str:
                if rank in failing:
                    raise error
                return f'result {rank}'

            try:
                return all_ranks(work)
            except Exception as caught:
                return f'{type(caught).__name__}: {caught}' + ' (reported here)' * is_reported_here(caught)

        found['success'] = outcome()
        found['failure'] = outcome([1], OSError('disk full'))
        found['without words'] = outcome([1], KeyError())
        found['both'] = outcome([0, 1], OSError(f'disk {rank} full'))
        found['afterwards'] = outcome()
        found['alone'] = is_reported_here(OSError('of this rank only'))
        found['from rank 0'] = from_rank_zero(f'value {rank}')
        found['any'] = [any_rank(flags[rank]) for flags in ([False, False], [False, True], [True, True])]
        values = torch.tensor([1.0 + rank, 4.0, float('nan') if rank else 0.0])
        found['mean'] = mean_over_ranks(values).tolist()
        found['values'] = values.tolist()[:2]
        found['gathered'] = gather(torch.tensor([[rank, 2 * rank, 3]]).T).tolist()  # not contiguous
    found['left'] = list(rank_and_world_size())
    (folder / f'{rank}.json').write_text(json.dumps(found))


# Mistakes that every rank makes, before the ranks join and afterwards; and the exit status.
MISTAKES = {
    'train --epochz 3': 2,
    'train --epochs many': 2,
    'eval': 2,
    'train --resume nowhere': 1,
    'train --config nowhere.yaml': 1,
    'train --dry-run --epochs 0': 1,
    'train --device xpu': 1,
    'train --device meta --data-dir nowhere': 1,
    'train --device cpu --data-dir nowhere': 1,
    'eval --device cpu --model vireid_dml_r10t.synthvi --input-size 32 64 3': 1,
    'eval --device cpu --model nobody --dataset synthetic': 1,
    'eval --device cpu --model vireid_dml_r10t.synthvi --data-dir nowhere': 1,
    'eval --device cpu --model vireid_dml_r10t.synthvi --dataset synthetic --protocol all-single': 1,
    'eval --device cpu --model vireid_dml_r10t.synthvi --dataset synthetic --failures -1': 1,
}


def _mistakes(done: Path) -> int:
    for number, (words, status) in enumerate(MISTAKES.items()):
        try:
            assert main(words.split()) == status, words
        except SystemExit as stopped:
            assert stopped.code == status, words
        # Both ranks must have left the group before they meet at the same port again.
        (done / f'{number} {os.getpid()}').touch()
        while len(list(done.glob(f'{number} *'))) < 2:
            time.sleep(0.01)
    return 0


@pytest.mark.parametrize('slurm', [False, True])
def test_a_mistake_of_every_rank_is_one_line(slurm: bool, tmp_path: Path) -> None:
    done = tmp_path / 'done'
    done.mkdir()
    statuses, said = start_two(_mistakes, done, folder=tmp_path, slurm=slurm)
    assert statuses == [0, 0], said
    errors = [
        [line for line in path.read_text().splitlines() if ': error: ' in line]
        for path in sorted(tmp_path.glob('*.txt'))
    ]
    assert [len(lines) for lines in errors] == [len(MISTAKES), 0], said


@pytest.mark.parametrize(('local_rank', 'processes'), [(0, '3'), (2, '3'), (2, None)])
def test_more_ranks_than_gpus(local_rank: int, processes: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('vireid_timm.distributed.resolve_device', torch.device)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for name, value in {'RANK': local_rank, 'LOCAL_RANK': local_rank, 'WORLD_SIZE': 3, 'MASTER_ADDR': 'here'}.items():
        monkeypatch.setenv(name, str(value))
    if processes:
        monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
    else:
        monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    with pytest.raises(ValueError, match='there are 2 GPUs for (3|more) processes') as raised, process_group():
        pass
    # torchrun tells every rank how many there are, so the first one knows.
    assert is_reported_here(raised.value) == (local_rank == 0 or processes is None)


def _die(folder: Path) -> None:
    """One of two ranks dies while the other waits for it."""
    with process_group('cpu'):
        if rank_and_world_size()[0] == 1:
            os._exit(9)
        with pytest.raises(RuntimeError) as raised:
            any_rank(False)
        (folder / 'lost').write_text(str(is_lost_rank(raised.value)))


def test_only_a_lost_rank_is_taken_for_one() -> None:
    assert is_lost_rank(RuntimeError('[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer'))
    assert is_lost_rank(distributed.DistBackendError('NCCL error: ncclRemoteError: A call failed possibly due to ...'))
    for error in (
        distributed.DistNetworkError('EADDRINUSE'),
        RuntimeError('shapes differ'),
        ValueError('gloo/transport'),
    ):
        assert not is_lost_rank(error)


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp('processes')
    statuses, said = start_two(_work, folder, folder=folder, slurm=True)
    assert statuses == [0, 0], said
    return [json.loads((folder / f'{number}.json').read_text(encoding='utf-8')) for number in range(2)]


def test_a_rank_that_died_is_noticed(tmp_path: Path) -> None:
    statuses, said = start_two(_die, tmp_path, folder=tmp_path)
    assert statuses == [0, 9], said
    assert (tmp_path / 'lost').read_text() == 'True'


def test_two_ranks_join_and_leave(two_ranks: list[dict]) -> None:
    for rank, found in enumerate(two_ranks):
        assert found['before'] == [rank == 0, 0, 1]
        assert found['device'] == ['cpu', 'cpu']
        assert found['joined'] == [rank == 0, rank, 2]
        assert found['left'] == [0, 1]


def test_two_ranks_fail_together_and_report_once(two_ranks: list[dict]) -> None:
    first, second = two_ranks
    for name in ('success', 'afterwards'):
        assert (first[name], second[name]) == ('result 0', 'result 1')
    assert first['failure'] == 'ValueError: rank 1 of 2: disk full (reported here)'
    assert second['failure'] == 'OSError: disk full'
    assert first['without words'] == 'ValueError: rank 1 of 2: KeyError (reported here)'
    assert first['both'] == 'OSError: disk 0 full (reported here)'
    assert second['both'] == 'OSError: disk 1 full'
    assert first['alone'] and second['alone'], 'rank 0 may not know of it'


def test_two_ranks_exchange_values(two_ranks: list[dict]) -> None:
    for rank, found in enumerate(two_ranks):
        assert found['from rank 0'] == 'value 0'
        assert found['any'] == [False, True, True]
        assert found['mean'][:2] == [1.5, 4.0]
        assert math.isnan(found['mean'][2])
        assert found['values'] == [1.0 + rank, 4.0]
        assert found['gathered'] == [[[0], [0], [3]], [[1], [2], [3]]]
