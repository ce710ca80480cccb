"""Lines and curves of a run: rates, time left and memory against a hand-made clock, TensorBoard's files read back."""

import logging
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import METHOD
from torch.multiprocessing import start_processes

from vireid_timm.device import peak_memory
from vireid_timm.training.loop import train
from vireid_timm.training.progress import NonFiniteLoss, Progress, summary_writer_type

CPU = torch.device('cpu')
TERMS = {'loss': 3.25, 'id_joint': 2.5, 'triplet': 0.75, 'accuracy': 0.125}
RATES = {'new': 0.1, 'pretrained': 0.01}


class Clock:
    """Time that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _progress(clock: Clock, **settings: object) -> Progress:
    defaults = dict(num_epochs=4, steps_per_epoch=40, images_per_step=64, device=CPU, log_interval=15, clock=clock)
    return Progress(**{**defaults, **settings})


def _add(progress: Progress, loss: float = TERMS['loss']) -> None:
    """One batch with these terms, one of whose eight images is classified rightly."""
    logits, labels = torch.eye(2)[[0] * 8], torch.tensor([0] + [1] * 7)
    terms = {**TERMS, 'loss': loss}
    del terms['accuracy']
    progress.add({**{name: torch.tensor(value) for name, value in terms.items()}, 'output': logits}, labels)


def _train(
    progress: Progress, clock: Clock, epoch: int, seconds: list[float], first_step: int = 0, loss: float = TERMS['loss']
) -> float:
    """One epoch whose steps take the given seconds; its images per second."""
    progress.start_epoch(epoch, first_step, {name: first_step * value for name, value in TERMS.items()})
    for duration in seconds:
        clock.now += duration
        _add(progress, loss)
        progress.log_if_due(RATES)
    return progress.end_epoch(RATES)['train_images_per_second']


def _found(pattern: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [match for line in caplog.messages for match in re.findall(pattern, line)]


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'vireid_timm')


def test_a_line_says_what_timms_says_and_fits_a_log_file(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    assert _train(_progress(clock), clock, 0, [2.0] * 40) == pytest.approx(32)
    memory = r'\d+\.\d\d GB'
    assert re.fullmatch(
        r'Train: 0 \[15/40 \( 38%\)\]  loss 3\.25 id_joint 2\.5 triplet 0\.75 accuracy 12\.5%  '
        rf'lr 0\.1 \(pretrained part 0\.01\)  32\.0 images/s  {memory}  ETA 04:50',
        caplog.messages[2],
    ), caplog.messages
    assert re.fullmatch(
        r'epoch 0: loss 3\.25 id_joint 2\.5 triplet 0\.75 accuracy 12\.5% lr 0\.1 \(pretrained part 0\.01\), '
        rf'32\.0 images/s, {memory}, took 01:20, ETA 04:00',
        caplog.messages[-1],
    ), caplog.messages
    # After the first and the tenth step of a process, and at every interval; the last step is the epoch's own line.
    assert _found(r'\[ ?(\d+)/40', caplog) == ['1', '10', '15', '30']
    assert not [line for line in caplog.messages if {'\r', '\n', '\x1b'} & set(line)]


def test_no_line_is_lost_where_batches_are_accumulated(caplog: pytest.LogCaptureFixture) -> None:
    """Asked after every fourth batch: as soon as a step was passed that a line is due for."""
    progress = _progress(Clock())
    for epoch in range(2):
        progress.start_epoch(epoch)
        for step in range(40):
            _add(progress)
            if (step + 1) % 4 == 0:
                progress.log_if_due(RATES)
        progress.end_epoch(RATES)
    assert _found(r'\[ ?(\d+)/40', caplog) == ['4', '12', '16', '32', '16', '32']


def test_a_single_learning_rate_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    progress = _progress(Clock())
    _add(progress)
    progress.end_epoch({'new': 0.05, 'pretrained': 0.05})
    assert 'accuracy 12.5% lr 0.05,' in caplog.messages[0]


def test_images_per_second_are_the_intervals_and_the_time_left_the_mean_of_all_but_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    progress = _progress(clock, num_epochs=2)
    # A first step that compiles for a minute, then 9 at a second, then faster ones.
    speed = _train(progress, clock, 0, [60.0] + [1.0] * 9 + [0.5] * 30)
    assert speed == pytest.approx(40 * 64 / 84)
    assert _found(r'([\d.]+) images/s', caplog) == ['1.1', '64.0', '128.0', '128.0', '30.5']
    left = {10: 70 * 1.0, 15: 65 * 11.5 / 14, 30: 50 * 19 / 29, 40: 40 * 24 / 39}
    assert _found(r'ETA (\S+)', caplog) == ['?', *(f'{int(s) // 60:02d}:{int(s) % 60:02d}' for s in left.values())]


def test_what_happens_between_epochs_counts_in_no_rate(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = _progress(clock)
    for epoch in range(4):
        _train(progress, clock, epoch, [1.0] * 40)
        clock.now += 10_000.0  # validation
    assert set(_found(r'([\d.]+) images/s', caplog)) == {'64.0'}
    assert _found(r'took \S+ ETA (\S+)', caplog) == ['02:00', '01:20', '00:40', '00:00']


def test_a_resumed_run_counts_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = _progress(clock, num_epochs=3, steps_done=2 * 40 + 20)
    assert _train(progress, clock, 2, [4.0] * 20, first_step=20) == pytest.approx(16)
    assert _found(r'\[(\d+)/40', caplog) == ['21', '30']
    assert _found(r'ETA (\S+)', caplog) == ['?', '00:40', '00:00']


def test_hours_and_days_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    _train(_progress(clock, num_epochs=1001), clock, 0, [3.0] * 40)
    assert _found(r'ETA (\S+)', caplog)[-1] == '33:20:00'


def _need_as_much_again(number: int) -> None:
    before = peak_memory(CPU)
    torch.ones(before // 4)  # as many bytes
    assert 1.5 * before < peak_memory(CPU) < 3 * before


def test_memory_is_what_the_process_needed_at_most() -> None:
    """In a process of its own: a peak never falls, so that an earlier one of this process could hide it."""
    start_processes(_need_as_much_again, nprocs=1, start_method=METHOD)


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: series -> points, those that a restart withdrew left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()['scalars']}


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    clock = Clock()
    progress = _progress(clock, tensorboard=tmp_path / 'tensorboard', num_epochs=2, steps_per_epoch=20)
    for epoch in range(2):
        _train(progress, clock, epoch, [2.0] * 20)
        progress.log_validation({'mAP': 0.25 * (epoch + 1)})
    progress.close()
    scalars = _scalars(tmp_path / 'tensorboard')
    steps = [1, 10, 15, 35]
    assert scalars.pop('speed/memory_gb')
    assert scalars == {
        **{f'train/{name}': [(step, value) for step in steps] for name, value in TERMS.items()},
        'lr/new': [(step, pytest.approx(0.1)) for step in steps],
        'lr/pretrained': [(step, pytest.approx(0.01)) for step in steps],
        'speed/images_per_second': [(step, pytest.approx(32)) for step in steps],
        **{f'epoch/{name}': [(step, value) for step in (20, 40)] for name, value in TERMS.items()},
        'epoch/images_per_second': [(step, pytest.approx(32)) for step in (20, 40)],
        'validation/mAP': [(20, 0.25), (40, 0.5)],
    }


@pytest.mark.parametrize('steps_done', [0, 20])
def test_tensorboard_forgets_what_a_run_does_again(tmp_path: Path, steps_done: int) -> None:
    """A run killed in the second epoch resumes after the first, or starts over; its numbers differ here."""
    clock = Clock()
    first = _progress(clock, tensorboard=tmp_path, num_epochs=2, steps_per_epoch=20)
    _train(first, clock, 0, [1.0] * 20)
    first.start_epoch(1)
    for _ in range(17):
        clock.now += 1.0
        _add(first)
        first.log_if_due(RATES)
    first.close()
    assert _scalars(tmp_path)['train/loss'] == [(step, 3.25) for step in (1, 10, 15, 35)]
    resumed = _progress(clock, tensorboard=tmp_path, num_epochs=2, steps_per_epoch=20, steps_done=steps_done)
    for epoch in range(steps_done // 20, 2):
        _train(resumed, clock, epoch, [1.0] * 20, loss=1.5)
    resumed.close()
    scalars = _scalars(tmp_path)
    if steps_done:
        assert scalars['train/loss'] == [(1, 3.25), (10, 3.25), (15, 3.25), (21, 1.5), (30, 1.5), (35, 1.5)]
        assert scalars['epoch/loss'] == [(20, 3.25), (40, 1.5)]
    else:
        assert scalars['train/loss'] == [(1, 1.5), (10, 1.5), (15, 1.5), (35, 1.5)]
        assert scalars['epoch/loss'] == [(20, 1.5), (40, 1.5)]


def test_a_missing_tensorboard_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ValueError, match=r'vireid_timm\[tensorboard\]'):
        summary_writer_type()
    with pytest.raises(ValueError, match=r'vireid_timm\[tensorboard\]'):
        _progress(Clock(), tensorboard=tmp_path / 'tensorboard')
    assert not (tmp_path / 'tensorboard').exists()


def test_a_run_tells_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    settings = {
        'dataset': 'synthetic',
        'dataset_kwargs': dict(identities=8, test_identities=2, images_per_modality=2, size=(64, 32)),
        **{'model': 'vireid_base_r10t', 'input_size': [3, 64, 32], 'val_share': 0.25, 'pad': 2},
        **{'identities_per_batch': 2, 'images_per_modality': 2, 'warmup_epochs': 0, 'lr': 0.01, 'val_interval': 1},
        **{'workers': 0, 'amp': False, 'cache': 'ram', 'output': str(tmp_path), 'experiment': 'run'},
    }
    train({**settings, 'epochs': 1, 'tensorboard': True, 'log_interval': 2})
    result = train({'resume': str(tmp_path / 'run'), 'epochs': 2})
    per_epoch = 4
    log = (tmp_path / 'run/train.log').read_text()
    assert re.findall(r'Train: (\d) \[(\d)/4', log) == [('0', '1'), ('0', '2'), ('1', '1'), ('1', '2')]
    assert len(re.findall(r'epoch \d: loss .* images/s, .*, took \d\d:\d\d, ETA \d\d:\d\d\n', log)) == 2
    scalars = _scalars(tmp_path / 'run/tensorboard')
    assert [step for step, _ in scalars['train/loss']] == [1, 2, 5, 6]
    for series, column in (('epoch/loss', 'train_loss'), ('validation/mAP', 'eval_mAP')):
        expected = [(per_epoch * (epoch + 1), float(row[column])) for epoch, row in enumerate(result.summary)]
        assert scalars[series] == [(step, pytest.approx(value)) for step, value in expected]


def _results(count: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(count):
        terms = torch.rand(2, generator=generator)
        logits, labels = torch.rand(6, 3, generator=generator), torch.randint(3, (6,), generator=generator)
        results.append(({'loss': terms.sum(), 'a': terms[0], 'b': terms[1], 'output': logits}, labels))
    return results


def _naive(results: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> dict[str, float]:
    means = {name: sum(float(result[name]) for result, _ in results) / len(results) for name in ('loss', 'a', 'b')}
    hits = [sum(int(row.argmax() == label) for row, label in zip(r['output'], labels)) / 6 for r, labels in results]
    return {**means, 'accuracy': sum(hits) / len(hits)}


def _of(steps: int) -> Progress:
    return Progress(num_epochs=1, steps_per_epoch=steps + 1, images_per_step=6, device=CPU, log_interval=10**6)


def test_means_are_those_of_a_loop(caplog: pytest.LogCaptureFixture) -> None:
    results, progress = _results(15), _of(15)
    for number, (result, labels) in enumerate(results, start=1):
        progress.add(result, labels)
        if number in (1, 10):
            progress.log_if_due(RATES)
            assert progress.means() == pytest.approx(_naive(results[:number]), rel=1e-12, abs=1e-7)
    losses = [_naive(part)['loss'] for part in (results[:1], results[1:10])]  # a line has the means since the last one
    assert _found(r'loss ([\d.]+)', caplog) == [f'{loss:.4g}' for loss in losses]
    row = progress.end_epoch(RATES)
    naive = _naive(results)
    assert {name: row[f'train_{name}'] for name in naive} == pytest.approx(naive, rel=1e-12, abs=1e-7)
    assert row['lr'] == 0.1


def test_when_it_is_read_and_resumed_changes_no_bit() -> None:
    results = _results(50)
    often, once = _of(50), _of(50)
    for number, (result, labels) in enumerate(results):
        often.add(result, labels)
        once.add(result, labels)
        if number % 7 == 0:
            often.read()
        if number == 30:
            often.read()
            step, sums = often.step, often.sums
            often = _of(50)
            often.start_epoch(0, step, sums)
    often.read()
    once.read()
    assert often.sums == once.sums and often.step == once.step == 50


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_found_by_its_step(bad: float) -> None:
    progress = _of(20)
    progress.start_epoch(0, 10)
    for number, (result, labels) in enumerate(_results(6)):
        progress.add({**result, 'loss': torch.tensor(bad) if number in (4, 5) else result['loss']}, labels)
        if number == 2:
            progress.read()
    with pytest.raises(NonFiniteLoss) as caught:
        progress.read()
    assert caught.value.step == 14 and caught.value.own
