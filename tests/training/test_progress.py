"""Lines and curves of a run: rates, time left and memory against a hand-made clock, TensorBoard's files read back."""

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import METHOD
from torch.multiprocessing import start_processes

from vireid_timm.device import peak_memory
from vireid_timm.training.progress import Tracker, summary_writer_type
from vireid_timm.training.train import train

CPU = torch.device('cpu')
TERMS = {'loss': 3.25, 'id_joint': 2.5, 'triplet': 0.75, 'accuracy': 0.125}
RATES = {'new': 0.1, 'pretrained': 0.01}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _tracker(clock: Clock, **settings: object) -> Tracker:
    defaults = dict(num_epochs=4, steps_per_epoch=40, images_per_step=64, device=CPU, log_interval=15, clock=clock)
    return Tracker(**{**defaults, **settings})


def _train(
    tracker: Tracker, clock: Clock, epoch: int, seconds: list[float], first_step: int = 0, terms: dict = TERMS
) -> float:
    """One epoch whose steps take the given seconds, as the training loop goes about it."""
    tracker.start(first_step)
    for step, duration in enumerate(seconds, start=first_step + 1):
        clock.now += duration
        if tracker.due(step):
            tracker.interval(epoch, step, terms, RATES)
    return tracker.epoch_done(epoch, terms, RATES)


def _found(pattern: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [match for line in caplog.messages for match in re.findall(pattern, line)]


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'vireid_timm')


def test_a_line_says_what_timms_says_and_fits_a_log_file(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    assert _train(_tracker(clock), clock, 0, [2.0] * 40) == pytest.approx(32)
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


def test_no_line_is_lost_where_batches_are_accumulated() -> None:
    """Asked after every fourth batch: as soon as a step was passed that a line is due for."""
    tracker = _tracker(Clock())
    reported = []
    for epoch in range(2):
        tracker.start()
        for step in range(4, 40, 4):
            if tracker.due(step):
                reported.append(step)
                tracker.interval(epoch, step, TERMS, RATES)
        tracker.epoch_done(epoch, TERMS, RATES)
    assert reported == [4, 12, 16, 32, 16, 32]


def test_a_single_learning_rate_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tracker = _tracker(Clock())
    tracker.epoch_done(0, TERMS, {'new': 0.05, 'pretrained': 0.05})
    assert 'accuracy 12.5% lr 0.05,' in caplog.messages[0]


def test_images_per_second_are_the_intervals_and_the_time_left_the_mean_of_all_but_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    tracker = _tracker(clock, num_epochs=2)
    # A first step that compiles for a minute, then 9 at a second, then faster ones.
    speed = _train(tracker, clock, 0, [60.0] + [1.0] * 9 + [0.5] * 30)
    assert speed == pytest.approx(40 * 64 / 84)
    assert _found(r'([\d.]+) images/s', caplog) == ['1.1', '64.0', '128.0', '128.0', '30.5']
    left = {10: 70 * 1.0, 15: 65 * 11.5 / 14, 30: 50 * 19 / 29, 40: 40 * 24 / 39}
    assert _found(r'ETA (\S+)', caplog) == ['?', *(f'{int(s) // 60:02d}:{int(s) % 60:02d}' for s in left.values())]


def test_what_happens_between_epochs_counts_in_no_rate(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tracker = _tracker(clock)
    for epoch in range(4):
        _train(tracker, clock, epoch, [1.0] * 40)
        clock.now += 10_000.0  # validation
    assert set(_found(r'([\d.]+) images/s', caplog)) == {'64.0'}
    assert _found(r'took \S+ ETA (\S+)', caplog) == ['02:00', '01:20', '00:40', '00:00']


def test_a_resumed_run_counts_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tracker = _tracker(clock, num_epochs=3, steps_done=2 * 40 + 20)
    assert _train(tracker, clock, 2, [4.0] * 20, first_step=20) == pytest.approx(16)
    assert _found(r'\[(\d+)/40', caplog) == ['21', '30']
    assert _found(r'ETA (\S+)', caplog) == ['?', '00:40', '00:00']


def test_hours_and_days_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    _train(_tracker(clock, num_epochs=1001), clock, 0, [3.0] * 40)
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
    tracker = _tracker(clock, tensorboard=tmp_path / 'tensorboard', num_epochs=2, steps_per_epoch=20)
    for epoch in range(2):
        _train(tracker, clock, epoch, [2.0] * 20)
        tracker.validated(epoch, {'mAP': 0.25 * (epoch + 1)})
    tracker.close()
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
    """Killed in the second epoch; it goes on after the first one, or begins anew. Then it has other numbers here."""
    clock = Clock()
    first = _tracker(clock, tensorboard=tmp_path, num_epochs=2, steps_per_epoch=20)
    _train(first, clock, 0, [1.0] * 20)
    first.start()
    for step in range(1, 18):
        clock.now += 1.0
        if first.due(step):
            first.interval(1, step, TERMS, RATES)
    first.close()
    assert _scalars(tmp_path)['train/loss'] == [(step, 3.25) for step in (1, 10, 15, 35)]
    resumed = _tracker(clock, tensorboard=tmp_path, num_epochs=2, steps_per_epoch=20, steps_done=steps_done)
    for epoch in range(steps_done // 20, 2):
        _train(resumed, clock, epoch, [1.0] * 20, terms={**TERMS, 'loss': 1.5})
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
        _tracker(Clock(), tensorboard=tmp_path / 'tensorboard')
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
