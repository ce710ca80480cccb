"""Three real processes train as one: gradients are those of the joined batch, and weights stay the same bit for bit.

They are started once and write down what they found, which the tests compare with a single process: this one.
Only `torchrun` itself needs more.
"""

import csv
import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import yaml
from processes import METHOD, start_two
from torch import distributed
from torch.multiprocessing import start_processes

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.data.loader import load_batches
from vireid_timm.distributed import rank_and_world_size
from vireid_timm.loss.prototype import PrototypeContrast
from vireid_timm.loss.triplet import WeightedRegularizedTriplet
from vireid_timm.models.dual_stream import DualStreamResNet
from vireid_timm.run_folder import load_checkpoint
from vireid_timm.training import loop
from vireid_timm.training.task import ViReIDTask, infrared_rows

PROCESSES = 3  # with two, the order in which gradients are added up would not matter
BATCHES = 2  # that each process accumulates for a step
NUM_CLASSES = 4 * PROCESSES * BATCHES
CHANNELS = dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=[8, 16, 24, 32])

# Everything that several processes have to agree on: averages, dropout, accumulation, validation.
SETTINGS = {
    'dataset': 'synthetic',
    'dataset_kwargs': dict(identities=8, test_identities=2, images_per_modality=4, size=[64, 32]),
    'model': 'vireid_dml_r10t',
    'model_kwargs': {'resnet_args': CHANNELS},
    'input_size': [3, 64, 32],
    'drop': 0.2,
    'identities_per_batch': 2,
    'images_per_modality': 2,
    'val_share': 0.25,
    'epochs': 2,
    'lr': 0.01,
    'warmup_epochs': 0,
    'pad': 2,
    'workers': 0,
    'amp': False,
    'device': 'cpu',
    'gather_features': True,
    'cached_triplet': True,
    'grad_accum_steps': 2,
    'model_ema': True,
    'model_ema_decay': 0.5,
}

Batch = tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]

# Where some parameters get no gradient, for which DistributedDataParallel would wait: (model, losses).
PARTIAL = {
    'baseline': ('vireid_base_r10t', {}),
    'joint identity loss alone': ('vireid_dml_r10t', {'id_branches': ['joint'], 'mutual': 'none'}),
    'one pair': ('vireid_dml_r10t', {'id_branches': ['joint'], 'mutual': 'joint-to-global'}),
    'no fusion': ('vireid_dml_r10t', {'id_branches': ['global'], 'mutual': 'none', 'loss': {}}),
}


def _model(name: str = 'vireid_dml_r10t', **options: Any) -> DualStreamResNet:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(64, 32), num_classes=NUM_CLASSES, resnet_args=CHANNELS, **options)
    return model.train()


def _batch(number: int, dtype: torch.dtype = torch.float64) -> Batch:
    """The batch of that number: two images of each modality for each of two identities of its own."""
    draw = torch.Generator().manual_seed(number)
    visible, infrared = torch.rand(2, 4, 3, 64, 32, generator=draw, dtype=dtype)
    identities = torch.tensor([0, 0, 1, 1]) + 2 * number
    # One identity of the next batch too: joined batches have positives as well as negatives in common.
    identities[3] += 2
    return (visible, infrared), identities.repeat(2) % NUM_CLASSES


def _own_batches(rank: int, count: int = BATCHES) -> list[Batch]:
    return [_batch(rank * count + number) for number in range(count)]


def _accumulate(task: ViReIDTask, batches: Sequence[Batch], cached: bool) -> dict[str, Any]:
    """Gradients and terms after the batches of one optimiser step, exactly as a training loop goes about it."""
    joined = [None] * len(batches)
    if cached:
        features = [task.cache_features(inputs) for inputs, _ in batches]
        joined = task.join_triplet(features, [labels for _, labels in batches], infrared_rows(*batches[0][0]))
    triplets = []
    for number, ((inputs, labels), part) in enumerate(zip(batches, joined)):
        with nullcontext() if number + 1 == len(batches) else task.no_sync():
            result = task(inputs, labels, joined=part)
            (result['loss'] / len(batches)).backward()
        triplets.append(result['triplet'].item())
    parameters = task.get_eval_model().named_parameters()
    return {'triplets': triplets, 'gradients': {name: value.grad.clone() for name, value in parameters}}


def _apart(batches: Sequence[Batch], groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What `_accumulate` has to find: all graphs held at once, the triplet over each group of batches, mean of groups.

    Every batch goes through the network alone, since batch norm sees it alone.
    """
    model = _model().double()
    task = ViReIDTask(model, loss={}, verbose=False)
    branches = [model.forward_branches(*inputs) for inputs, _ in batches]
    others = sum(
        sum(task._terms(branch, labels, labels < 0, None).values()) for branch, (_, labels) in zip(branches, batches)
    ) / len(batches)
    triplets = [
        WeightedRegularizedTriplet()(
            torch.cat([branches[number].features for number in group]),
            torch.cat([batches[number][1] for number in group]),
        )
        for group in groups
    ]
    (others + sum(triplets) / len(groups)).backward()
    return {
        'triplets': [value.item() for value in triplets],
        'gradients': {name: value.grad for name, value in model.named_parameters()},
    }


def _steps(task: ViReIDTask, rank: int, steps: int = 3, **precision: Any) -> None:
    """Optimiser steps with accumulation, momentum, averaging and clipping, on batches of this process's own."""
    optimizer = torch.optim.SGD(task.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        batches = [_batch(100 * step + 10 * number + rank, torch.float32) for number in range(BATCHES)]
        with torch.autocast('cpu', torch.bfloat16, **precision) if precision else nullcontext():
            _accumulate(task, batches, cached=step == 1)
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)


def _work(rank: int, folder: str, scenarios: dict[str, Callable[[int, Path], Any]]) -> None:
    warnings.simplefilter('error')
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # as in setup.cfg
        warnings.simplefilter('default', category)
    torch.set_num_threads(1)
    meeting = f'file://{folder}/meeting'
    distributed.init_process_group('gloo', init_method=meeting, rank=rank, world_size=PROCESSES)
    try:
        torch.save({name: scenario(rank, Path(folder)) for name, scenario in scenarios.items()}, f'{folder}/{rank}.pt')
    finally:
        distributed.destroy_process_group()


def _gathered(rank: int, _: Path) -> dict[str, Any]:
    """Batch norm frozen, so that a single process can take the joined batch in one go."""
    task = ViReIDTask(_model().double(), gather_features=True, verbose=False).prepare_distributed()
    return _accumulate(task.eval(), _own_batches(rank, 1), cached=False)


def _others(rank: int, _: Path) -> dict[str, Any]:
    """Losses that know the modality, and prototypes, which follow the batches of all processes."""
    weights = {'hetero_center': 0.5, 'cross_modality_triplet': 1.0, 'prototype': 1.0}
    task = ViReIDTask(_model().double(), loss=weights, gather_features=True, verbose=False).prepare_distributed()
    task.eval()(*_own_batches(rank, 1)[0])['loss'].backward()
    gradients = {name: value.grad.clone() for name, value in task.get_eval_model().named_parameters()}
    unseen = task.prototype.prototypes.any()
    task.train()
    for batch in _own_batches(rank):
        task(*batch)
    return {'gradients': gradients, 'unseen': unseen, 'prototypes': task.prototype.prototypes}


def _gathered_and_cached(rank: int, _: Path) -> dict[str, Any]:
    task = ViReIDTask(_model().double(), gather_features=True, verbose=False).prepare_distributed()
    return _accumulate(task, _own_batches(rank), cached=True)


def _cached(rank: int, _: Path) -> dict[str, Any]:
    task = ViReIDTask(_model().double(), verbose=False).prepare_distributed()
    return _accumulate(task, _own_batches(rank), cached=True)


def _trained(rank: int, _: Path) -> dict[str, Any]:
    model = _model()
    model.set_grad_checkpointing()
    task = ViReIDTask(model, gather_features=True, verbose=False)
    task.setup_ema(decay=0.5)
    task.prepare_distributed()
    _steps(task, rank)
    found = {'before': task.get_eval_model().state_dict(), 'average before': task.get_eval_model(ema=True).state_dict()}
    found = {name: {key: value.clone() for key, value in state.items()} for name, state in found.items()}
    task.share_running_statistics('reduce')
    return {
        **found,
        'weights': task.get_checkpoint_state()['state_dict'],
        'average': task.get_checkpoint_state(ema=True)['state_dict_ema'],
    }


def _broadcast(rank: int, _: Path) -> dict[str, Any]:
    task = ViReIDTask(_model(), verbose=False).prepare_distributed()
    _steps(task, rank, steps=1)
    before = {name: value.clone() for name, value in task.get_eval_model().state_dict().items()}
    task.share_running_statistics('broadcast')
    return {'before': before, 'weights': task.get_eval_model().state_dict()}


def _compiled(rank: int, _: Path) -> dict[str, torch.Tensor]:
    model = _model('vireid_base_r10t').to(memory_format=torch.channels_last)
    task = ViReIDTask(model, gather_features=True, verbose=False)
    task.compile(backend='eager')
    task.prepare_distributed()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the compiler's own, about itself
        _steps(task, rank, steps=2, enabled=True)
    return {name: value.detach() for name, value in task.get_eval_model().named_parameters()}


def _partial(rank: int, _: Path) -> dict[str, Any]:
    found = {}
    for name, (model, losses) in PARTIAL.items():
        task = ViReIDTask(_model(model), verbose=False, **losses).prepare_distributed()
        for number in range(2):  # the second forward would find what the first has waited for in vain
            task(*_batch(10 * number + rank, torch.float32))['loss'].backward()
        parameters = dict(task.get_eval_model().named_parameters())
        found[name] = {
            'frozen': [name for name, value in parameters.items() if not value.requires_grad],
            'gradients': {name: value.grad for name, value in parameters.items() if value.grad is not None},
        }
    return found


def _errors(rank: int, _: Path) -> dict[str, str]:
    def message(call: Callable[[], Any]) -> str:
        with pytest.raises(ValueError) as raised:
            call()
        return str(raised.value)

    (visible, infrared), labels = _batch(rank, torch.float32)
    task = ViReIDTask(_model(), gather_features=True, verbose=False).prepare_distributed()
    rows = 4 - rank
    uneven = message(lambda: task((visible[:rows], infrared[:rows]), labels[: 2 * rows]))
    task((visible, infrared), labels)
    return {
        'uneven': uneven,
        'changed': message(lambda: task((visible[:2], infrared[:2]), labels[[0, 1, 4, 5]])),
        'synchronised batch norm': message(ViReIDTask(_model(), verbose=False).convert_sync_batchnorm),
    }


def _runs(rank: int, folder: Path) -> dict[str, Any]:
    """The command itself: from start to end, stopped and resumed, diverged, with a mistake."""
    command = ['train', '--config', str(folder / 'settings.yaml'), '--output', str(folder / 'runs')]
    found = {}

    def run(name: str, *arguments: str) -> None:
        out, err = io.StringIO(), io.StringIO()
        with _written(folder / 'runs') as written, redirect_stdout(out), redirect_stderr(err):
            status = main([*command, *arguments])
        found[name] = {'status': status, 'out': out.getvalue(), 'err': err.getvalue(), 'written': written}

    def stop(*arguments: Any) -> Any:
        if rank == 1:  # the other one hears of it
            signal.raise_signal(signal.SIGTERM)
        return train_step(*arguments)

    train_step = loop.train_step
    run('whole', '--experiment', 'whole')
    with mock.patch.object(loop, 'train_step', stop):
        run('stopped', '--experiment', 'stopped')
    run('resumed', '--resume', str(folder / 'runs' / 'stopped'))
    run('diverged', '--experiment', 'diverged', '--lr', '1e30')
    run('mistaken', '--experiment', 'mistaken', '--model', 'vireid_dml_r51')
    return found


@contextmanager
def _written(folder: Path) -> Iterator[list[str]]:
    """What Python opens for writing, makes, renames or removes in a folder as long as the block runs."""
    events, active = [], True

    def watch(event: str, arguments: tuple) -> None:
        if not active or event not in ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir'):
            return
        reading = event == 'open' and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not reading and str(arguments[0]).startswith(str(folder)):
            events.append(f'{event} {arguments[0]}')

    sys.addaudithook(watch)  # for good, so it has to be switched off
    yield events
    active = False


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        _gathered,
        _others,
        _gathered_and_cached,
        _cached,
        _trained,
        _broadcast,
        _compiled,
        _partial,
        _errors,
        _runs,
    )
}


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by scenario."""
    folder = tmp_path_factory.mktemp('processes')
    (folder / 'settings.yaml').write_text(yaml.safe_dump(SETTINGS))
    start_processes(_work, (str(folder), SCENARIOS), nprocs=PROCESSES, start_method=METHOD)
    return [{'folder': folder, **torch.load(folder / f'{rank}.pt', weights_only=True)} for rank in range(PROCESSES)]


def _assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def _assert_gradients(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found['gradients'], expected, rtol=1e-7, atol=1e-10)


def _split(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is trained, and the running statistics of batch norm."""
    statistics = {name: value for name, value in state.items() if name.rpartition('.')[2].startswith('running_')}
    return {name: value for name, value in state.items() if name not in statistics}, statistics


def test_gathered_loss_and_gradients_are_those_of_a_single_process(found: list[dict[str, Any]]) -> None:
    inputs, labels = zip(*[batch for rank in range(PROCESSES) for batch in _own_batches(rank, 1)])
    visible, infrared = (torch.cat(images) for images in zip(*inputs))
    halves = zip(*[each.chunk(2) for each in labels])
    model = _model().double().eval()
    result = ViReIDTask(model, verbose=False)((visible, infrared), torch.cat([torch.cat(half) for half in halves]))
    result['loss'].backward()

    for process in found:
        assert process['_gathered']['triplets'] == pytest.approx([result['triplet'].item()])
        _assert_gradients(process['_gathered'], {name: value.grad for name, value in model.named_parameters()})


def test_other_losses_see_all_processes_and_prototypes_are_the_same_on_each(found: list[dict[str, Any]]) -> None:
    model = _model().double().eval()
    task = ViReIDTask(model, loss={'hetero_center': 0.5, 'cross_modality_triplet': 1.0}, verbose=False)
    inputs, labels = zip(*[_own_batches(rank, 1)[0] for rank in range(PROCESSES)])
    visible, infrared = (torch.cat(images) for images in zip(*inputs))
    halves = zip(*[each.chunk(2) for each in labels])
    task((visible, infrared), torch.cat([torch.cat(half) for half in halves]))['loss'].backward()
    for process in found:
        _assert_gradients(process['_others'], {name: value.grad for name, value in model.named_parameters()})

    expected = PrototypeContrast(NUM_CLASSES, model.num_features)
    for step in range(BATCHES):
        batches = [_own_batches(rank)[step] for rank in range(PROCESSES)]
        features = [_model().double().forward_branches(*inputs).features.detach() for inputs, _ in batches]
        expected.update(torch.cat(features), torch.cat([labels for _, labels in batches]))
    for process in found:
        assert not process['_others']['unseen'], 'eval mode moves nothing'
        torch.testing.assert_close(process['_others']['prototypes'], expected.prototypes, rtol=1e-5, atol=1e-6)
        assert torch.equal(process['_others']['prototypes'], found[0]['_others']['prototypes'])


def test_the_triplet_over_all_accumulated_batches_of_all_processes(found: list[dict[str, Any]]) -> None:
    batches = [batch for rank in range(PROCESSES) for batch in _own_batches(rank)]
    expected = _apart(batches, [range(len(batches))])
    for process in found:
        assert process['_gathered_and_cached']['triplets'] == pytest.approx(BATCHES * expected['triplets'])
        _assert_gradients(process['_gathered_and_cached'], expected['gradients'])


def test_the_triplet_over_the_accumulated_batches_of_each_process(found: list[dict[str, Any]]) -> None:
    batches = [batch for rank in range(PROCESSES) for batch in _own_batches(rank)]
    expected = _apart(batches, [[0, 1], [2, 3], [4, 5]])
    assert len({round(triplet, 6) for triplet in expected['triplets']}) == PROCESSES
    for process, triplet in zip(found, expected['triplets']):
        assert process['_cached']['triplets'] == pytest.approx(BATCHES * [triplet])
        _assert_gradients(process['_cached'], expected['gradients'])


def test_weights_stay_the_same_in_all_processes(found: list[dict[str, Any]]) -> None:
    start = _model().state_dict()
    first, *others = (process['_trained'] for process in found)
    for state in ('before', 'average before'):
        trained, statistics = _split(first[state])
        assert all((trained[name] != start[name]).any() for name in trained)
        for other in others:
            _assert_same(_split(other[state])[0], trained)
            assert all((value != statistics[name]).any() for name, value in _split(other[state])[1].items()), (
                'each has seen images of its own'
            )


def test_running_statistics_are_averaged_over_the_processes(found: list[dict[str, Any]]) -> None:
    first = found[0]['_trained']
    trained, statistics = _split(first['weights'])
    _assert_same(trained, _split(first['before'])[0])
    before = [_split(process['_trained']['before'])[1] for process in found]
    mean = {name: sum(each[name] for each in before) / PROCESSES for name in statistics}
    torch.testing.assert_close(statistics, mean)
    for process in found:
        _assert_same(process['_trained']['weights'], first['weights'])
        # The averaged network takes those of process 0, which are the ones in a checkpoint.
        _assert_same(process['_trained']['average'], first['average before'])


def test_running_statistics_of_process_0_for_all(found: list[dict[str, Any]]) -> None:
    for process in found:
        _assert_same(process['_broadcast']['weights'], found[0]['_broadcast']['before'])


def test_compiled_channels_last_and_in_bfloat16(found: list[dict[str, Any]]) -> None:
    start = dict(_model('vireid_base_r10t').named_parameters())
    assert all((value != start[name]).any() for name, value in found[0]['_compiled'].items())
    for process in found:
        _assert_same(process['_compiled'], found[0]['_compiled'])


@pytest.mark.parametrize('name', PARTIAL)
def test_parameters_that_no_loss_reaches(name: str, found: list[dict[str, Any]]) -> None:
    model, losses = PARTIAL[name]
    model = _model(model)
    ViReIDTask(model, verbose=False, **losses)(*_batch(0, torch.float32))['loss'].backward()
    unreached = [name for name, value in model.named_parameters() if value.grad is None]
    assert bool(unreached) == (name != 'baseline')
    for process in found:
        assert process['_partial'][name]['frozen'] == unreached
        _assert_same(process['_partial'][name]['gradients'], found[0]['_partial'][name]['gradients'])


def test_errors_are_the_same_in_all_processes(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert '[8, 6, 4] rows' in process['_errors']['uneven']
        assert '8 rows so far, now 4' in process['_errors']['changed']
        assert '--sync-bn' in process['_errors']['synchronised batch norm']


def _assert_one_voice(found: list[dict[str, Any]], name: str, status: int) -> dict[str, Any]:
    """All processes end with that status and only the first one speaks: what it found."""
    first, *others = (process['_runs'][name] for process in found)
    for process in (first, *others):
        assert process['status'] == status, process['err']
    for process in others:
        assert (process['out'], process['err'], process['written']) == ('', '', [])
    return first


def test_a_run_of_several_processes_has_one_folder_and_one_voice(found: list[dict[str, Any]]) -> None:
    first = _assert_one_voice(found, 'whole', status=0)
    folder = found[0]['folder'] / 'runs' / 'whole'
    assert (folder / 'best' / 'model.safetensors').is_file()
    assert f'Run: {folder}' in first['out'] and 'epoch 1: loss' in first['err']
    assert first['written']
    assert '3 ranks' in first['err']
    # Validation compares the weights of the processes, running statistics included, and would have failed.
    assert 'validation: rank1' in first['err']


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_to_the_same_weights(
    found: list[dict[str, Any]],
) -> None:
    first = _assert_one_voice(found, 'stopped', status=128 + signal.SIGTERM)
    assert 'Saved epoch 0, step 2 of 3' in first['err'] and 'resume with: torchrun' in first['err']

    folder = found[0]['folder'] / 'runs'
    assert 'from epoch 0, step 2' in _assert_one_voice(found, 'resumed', status=0)['err']
    whole, resumed = (load_checkpoint(folder / name) for name in ('whole', 'stopped'))
    for state in ('state_dict', 'state_dict_ema', 'optimizer'):
        torch.testing.assert_close(resumed[state], whole[state], rtol=0, atol=0)
    rows = [(folder / name / 'summary.csv').read_text().splitlines() for name in ('whole', 'stopped')]
    whole, resumed = (list(csv.DictReader(lines)) for lines in rows)
    for row in (*whole, *resumed):
        del row['train_images_per_second']
    assert resumed == whole


def test_another_number_of_ranks_cannot_resume(found: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r'another number of ranks \(3, now 1\)'):
        vireid_timm.train({'resume': str(found[0]['folder'] / 'runs' / 'whole'), 'epochs': 3})


def _train_with_images_that_vanish_on_one_rank(folder: Path) -> int:
    def vanish(*arguments: Any, **options: Any) -> Iterator[Any]:
        batches = load_batches(*arguments, **options)
        yield next(batches)
        if rank_and_world_size()[0] == 1:
            raise OSError('the images are gone')
        yield from batches

    with mock.patch.object(loop, 'load_batches', vanish):
        return main(['train', '--config', str(folder / 'settings.yaml'), '--output', str(folder)])


def test_an_error_on_one_rank_ends_all_and_is_told_once(tmp_path: Path) -> None:
    """Both are real processes: the other one finds its partner gone."""
    (tmp_path / 'settings.yaml').write_text(yaml.safe_dump(SETTINGS))
    statuses, said = start_two(_train_with_images_that_vanish_on_one_rank, tmp_path, folder=tmp_path)
    assert statuses == [1, 1], said
    errors = [line for line in said.splitlines() if line.startswith('vireid: error: ')]
    assert sorted(errors) == [
        'vireid: error: another rank is gone; its own message says why',
        'vireid: error: the images are gone',
    ]


@pytest.mark.parametrize(('name', 'message'), [('diverged', 'NaN or infinite'), ('mistaken', 'vireid_dml_r51')])
def test_an_error_in_all_processes_is_one_message(name: str, message: str, found: list[dict[str, Any]]) -> None:
    # Each saves its own images of a batch that diverged.
    for process in found:
        process['_runs'][name]['written'] = []
    said = _assert_one_voice(found, name, status=1)['err']
    assert said.count('vireid: error: ') == 1 and message in said


def test_torchrun_stops_a_run_cleanly(tmp_path: Path) -> None:
    (tmp_path / 'settings.yaml').write_text(yaml.safe_dump({**SETTINGS, 'epochs': 1000}))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    train = ['-m', 'vireid_timm', 'train', '--config', str(tmp_path / 'settings.yaml'), '--output', str(tmp_path)]
    with subprocess.Popen(
        [*torchrun, *train, '--experiment', 'run'],
        cwd=Path(__file__).parents[2],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith('epoch 0: loss'):
                process.terminate()
    said = ''.join(lines)
    assert process.returncode != 0
    for line in ('Everything goes to', 'epoch 0: loss', 'stopped by SIGTERM'):
        assert said.count(line) == 1, said
    assert load_checkpoint(tmp_path / 'run')['epoch'] < 10  # of a thousand
