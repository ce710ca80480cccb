"""Steps as CUDA graphs, as far as a CPU goes: a tape of operations on fixed memory stands for the GPU's recording."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from killing import THIN, equal
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vireid_timm.run_folder import load_checkpoint
from vireid_timm.training import graph, loop, run, step
from vireid_timm.training.config import TrainConfig
from vireid_timm.training.dry_run import TIMED_STEPS, dry_run
from vireid_timm.training.graph import StepGraph, why_no_graph
from vireid_timm.training.loop import train
from vireid_timm.training.run import Run, create_optimizer, create_run

pytestmark = pytest.mark.usefixtures('one_thread')

SETTINGS = {
    'dataset': 'synthetic',
    'dataset_kwargs': dict(identities=12, test_identities=2, images_per_modality=2, size=(64, 32)),
    'model': 'vireid_dml_r10t',
    'model_kwargs': THIN,
    'input_size': [3, 64, 32],
    'identities_per_batch': 4,
    'images_per_modality': 1,
    'val_share': 0.2,
    'val_interval': 1,
    'epochs': 2,
    'lr': 0.05,
    'pad': 2,
    'warmup_epochs': 1,
    'workers': 0,
    'amp': False,
    'cache': 'ram',
    'device': 'cpu',
    'drop': 0.1,
}


class _Tape(TorchDispatchMode):
    """Every operation with its very tensors, as a graph has every kernel with its addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and not func.name().startswith(('aten::detach', 'aten::empty', 'aten::_unsafe_view')):
            self.operations.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Compute everything again from what now lies in the tensors that come in, into the same results."""
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                for new, old in zip(_listed(func(*args, **kwargs)), _listed(result), strict=True):
                    if isinstance(old, torch.Tensor) and new is not old and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


def _listed(result: Any) -> Any:
    return result if isinstance(result, (tuple, list)) else [result]


class _Recorder:
    """Like `CudaRecorder`: a recording changes nothing, and a replay sees nothing of Python."""

    recordings = replays = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == 'cpu'

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        tape, is_recorded = _Tape(), False
        with tape:
            work()
        type(self).recordings += 1

        def replay() -> None:
            nonlocal is_recorded
            type(self).replays += 1
            if is_recorded:  # the recording on a CPU was the first replay
                tape.replay()
            is_recorded = True

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[_Recorder]:
    """Runs on the CPU record their steps."""
    counted = type('Counted', (_Recorder,), {})
    monkeypatch.setattr(graph, 'CudaRecorder', counted)
    monkeypatch.setattr(run, 'why_no_graph', lambda config, *_, **__: '' if config.cuda_graphs else 'told not to')
    return counted


class _Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    'settings',
    [
        dict(model_ema=True, model_ema_decay=0.9, sched_on_updates=True, sched='cosine'),
        # The device has learning rates in float32, so here they are powers of two.
        dict(opt='adamw', lr=2**-8, warmup_epochs=0, decay_milestones=[2], decay_rate=0.5, clip_grad=1.0),
        dict(
            opt='momentum',
            momentum=0.0,
            model_ema=True,
            model_ema_warmup=True,
            clip_grad=0.1,
            clip_mode='agc',
            smoothing=0.1,
        ),
        dict(clip_grad=0.1, clip_mode='value', mutual='none', id_branches=['joint'], amp=True),
        dict(augment=['three_way', 'rrle'], loss={'prototype': 1.0, 'hetero_center': 0.01, 'triplet': 1.0}),
    ],
)
def test_a_recorded_run_equals_an_ordinary_one(
    tmp_path: Path, recorder: type[_Recorder], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Weights, averages, optimiser and table, over validations and changing learning rates; and resumed in between."""
    common = {**SETTINGS, 'output': str(tmp_path), 'checkpoint_interval': '3', **settings}
    ordinary = train({**common, 'experiment': 'ordinary', 'cuda_graphs': False})
    assert recorder.recordings == 0
    recorded = train({**common, 'experiment': 'recorded'})
    assert recorder.recordings == 1 and recorder.replays > 6

    def killed(run: Run, group: Any) -> Any:
        if run.num_updates == 7:
            raise _Killed
        return step.train_step(run, group)

    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(loop, 'train_step', killed)
        train({**common, 'experiment': 'killed'})
    resumed = train({'resume': str(tmp_path / 'killed')})
    assert recorder.recordings == 3
    states = [load_checkpoint(result.folder) for result in (ordinary, recorded, resumed)]
    assert states[0]['epoch'] == 2 and equal(states[0], states[1]) and equal(states[0], states[2])


def test_a_dry_run_measures_recorded_steps(recorder: type[_Recorder]) -> None:
    assert 'ms per optimiser step' in dry_run(SETTINGS)
    assert (recorder.recordings, recorder.replays) == (1, 1 + TIMED_STEPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_recorded_run_on_a_gpu_stays_near_an_ordinary_one(tmp_path: Path) -> None:
    common = {**SETTINGS, 'device': 'cuda', 'deterministic': True, 'lr': 0.01, 'output': str(tmp_path)}
    ordinary = train({**common, 'experiment': 'ordinary', 'cuda_graphs': False})
    recorded = train({**common, 'experiment': 'recorded'})
    assert 'steps as a CUDA graph' in (recorded.folder / 'train.log').read_text()
    for one, other in zip(ordinary.summary, recorded.summary, strict=True):
        assert one['train_loss'] == pytest.approx(other['train_loss'], rel=1e-3)


def test_a_recorded_step_still_finds_nan(tmp_path: Path, recorder: type[_Recorder]) -> None:
    with pytest.raises(FloatingPointError, match='loss became NaN or infinite in epoch 0 at step 5'):
        with mock.patch.object(loop, 'learning_rates', _huge_from(4)):
            train({**SETTINGS, 'output': str(tmp_path), 'experiment': 'run', 'log_interval': 2})
    assert recorder.replays == 3 and len(list((tmp_path / 'run').glob('nan-epoch0-step5/*.png'))) == 8


def _huge_from(step: int) -> Callable[[Run], dict[str, float]]:
    real = loop.learning_rates

    def rates(run: Run) -> dict[str, float]:
        if run.state.step == step:
            for group in run.optimizer.param_groups:
                group['lr'] = 1e38
        return real(run)

    return rates


def test_a_step_that_cannot_be_recorded_is_an_error_that_says_what_to_do(
    tmp_path: Path, recorder: type[_Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: _Recorder, work: Callable[[], None]) -> None:
        try:
            raise RuntimeError('operation not permitted when stream is capturing\nand so on')
        finally:
            raise RuntimeError('capture was invalidated')

    monkeypatch.setattr(recorder, 'record', broken)
    expected = 'step cannot become a CUDA graph: operation not permitted when stream is capturing; give --no-cuda'
    with pytest.raises(ValueError, match=expected):
        train({**SETTINGS, 'output': str(tmp_path)})


@pytest.mark.parametrize(
    ('settings', 'reason'),
    [
        ({}, ''),
        (dict(opt='adamw'), ''),
        (dict(clip_grad=1.0, clip_mode='agc', model_ema=True, drop=0.1, deterministic=True), ''),
        (dict(cuda_graphs=False), '--no-cuda-graphs'),
        (dict(torchcompile=True), '--torchcompile'),
        (dict(grad_accum_steps=2), '--grad-accum-steps'),
        (dict(grad_accum_steps=2, cached_triplet=True), '--grad-accum-steps'),
        (dict(grad_checkpointing=True), '--grad-checkpointing'),
        (dict(opt='lamb'), '--opt lamb'),
        (dict(opt='lookahead_adamw'), '--opt lookahead_adamw'),
        (dict(opt_kwargs={'fused': False}), '--opt sgd'),
        (dict(loss={'triplet': 1.0, 'prototype': 1.0}), ''),
        (dict(loss={'triplet': 1.0, 'pml.CircleLoss': 0.1}), 'pytorch-metric-learning'),
    ],
)
def test_what_cannot_be_recorded_is_named(settings: dict[str, Any], reason: str) -> None:
    config = TrainConfig.from_mapping(settings)
    optimizer = create_optimizer(config, timm.create_model('vireid_base_r10t', num_classes=2, **THIN))
    found = why_no_graph(config, optimizer, torch.device('cuda'), scaled=False)
    assert found == '' if reason == '' else reason in found
    assert 'float16' in why_no_graph(TrainConfig(), optimizer, torch.device('cuda'), scaled=True)
    assert 'cpu' in why_no_graph(TrainConfig(), optimizer, torch.device('cpu'), scaled=False)
    with mock.patch.object(graph, 'rank_and_world_size', lambda: (0, 2)):
        assert 'processes' in why_no_graph(TrainConfig(), optimizer, torch.device('cuda'), scaled=False)


class _NoHostData(TorchDispatchMode):
    """Refuses tensors that Python makes from its numbers: a recording would copy them from memory that is gone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert not func.name().startswith('aten::lift_fresh'), 'a tensor is made from numbers of the host'
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'settings',
    [
        dict(amp=True),
        dict(opt='adamw', clip_grad=1.0, mutual='joint-to-global', smoothing=0.1),
        dict(
            clip_grad=1.0,
            clip_mode='agc',
            mutual_constant='teacher',
            model_kwargs={**THIN, 'spatial_weights': 'static'},
        ),
        dict(clip_grad=1.0, clip_mode='value', model='vireid_base_r10t'),
        dict(
            model='vireid_dml',
            model_kwargs={'backbone': 'swin_tiny_patch4_window7_224', 'backbone_args': dict(embed_dim=12)},
        ),
        dict(
            model='vireid_dml',
            model_kwargs={'backbone': 'vit_small_patch16_dinov3', 'backbone_args': dict(embed_dim=48, depth=4)},
        ),
    ],
)
def test_what_is_recorded_never_reads_back_from_the_device(
    tmp_path: Path, recorder: type[_Recorder], settings: dict[str, Any]
) -> None:
    """Fake tensors have no values: whatever would wait for one, or depend on it in its shape, is an error."""
    config = TrainConfig.from_mapping({**SETTINGS, 'val_share': 0.0, **settings})
    with torch.random.fork_rng():
        run = create_run(config, tmp_path, torch.device('cpu'))
    loop.training_mode(run)
    fake = FakeTensorMode()
    for module in run.task.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(fake.from_tensor(value.detach())))
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake.from_tensor(value))
    with fake:
        run.optimizer = create_optimizer(config, run.model)
        recorded = StepGraph(run.optimizer, run.device)
        images, labels = torch.rand(4, 3, 64, 32), torch.zeros(8, dtype=torch.int64)
        for count in range(3):
            with recorded._recordable(capturable=True), _NoHostData() if count else nullcontext():
                result = step._learn(run, images, images, labels, joined=None, count=1, update=True)
        assert result['loss'].shape == ()
        with pytest.raises(Exception, match='_local_scalar_dense'):
            result['loss'].item()
        with pytest.raises(AssertionError, match='numbers of the host'), _NoHostData():
            torch.tensor(0.6)
