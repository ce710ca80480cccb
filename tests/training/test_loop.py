"""The training loop on rendered images: it learns, resumes to the same weights, and says what is wrong."""

import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from killing import EXPERIMENT, THIN, equal, train_command
from PIL import Image
from processes import METHOD
from torch import distributed
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.data.images import load_image
from vireid_timm.data.layouts import write_layout
from vireid_timm.data.loader import load_batches
from vireid_timm.data.store import ImageStore
from vireid_timm.evaluation.features import weights_fingerprint
from vireid_timm.hub.folder import load_model, model_calibration, save_model_folder
from vireid_timm.run_folder import load_checkpoint, open_run_folder
from vireid_timm.training import loop
from vireid_timm.training.checkpoint import save_checkpoint
from vireid_timm.training.config import TrainConfig, load_yaml
from vireid_timm.training.loop import TrainResult, _choose_retrieval, train
from vireid_timm.training.progress import Progress
from vireid_timm.training.run import (
    Run,
    TrainData,
    create_augments,
    create_optimizer,
    create_run,
    create_scheduler,
    frozen_norms,
    load_data,
    parameter_groups,
)

SMALL = {
    'dataset': 'synthetic',
    'dataset_kwargs': dict(identities=8, test_identities=2, images_per_modality=2, size=(64, 32)),
    'model': 'vireid_dml_r10t',
    'input_size': [3, 64, 32],
    'identities_per_batch': 4,
    'images_per_modality': 2,
    'val_share': 0.25,
    'epochs': 2,
    'lr': 0.05,
    'pad': 2,
    'warmup_epochs': 0,
    'workers': 0,
    'amp': False,
    'cache': 'ram',
}


# Without --deterministic a GPU's kernels differ from run to run, so tests that compare weights run on the CPU.
EXACT = {'device': 'cpu'}


def _train(output: Path, **settings: Any) -> TrainResult:
    return train({**SMALL, 'output': str(output), **settings})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder)['state_dict']


def test_a_run_learns_and_leaves_a_model_that_timm_loads(tmp_path: Path) -> None:
    result = _train(tmp_path, epochs=6, val_share=0.0, opt='adamw', lr=0.002, augment=['rcc'])
    losses = [row['train_id_joint'] for row in result.summary]
    assert losses[-1] < 0.8 * losses[0]
    names = {path.name for path in result.folder.iterdir()}
    files = '.lock args.yaml best class_map.json config.json curves.png last.pth previous.pth summary.csv train.log'
    assert names == set(files.split())
    assert 'epoch 5: loss' in (result.folder / 'train.log').read_text()
    assert json.loads((result.folder / 'class_map.json').read_text()) == {f'{i:05d}': i for i in range(8)}
    assert result.best_epoch == 5 and result.best_mAP is None

    model = timm.create_model(f'local-dir:{result.best}', pretrained=True).eval()
    reference = _weights(result.folder)
    assert model.num_classes == 8
    assert all(torch.equal(value, reference[name]) for name, value in model.state_dict().items())
    assert tuple(model.pretrained_cfg['input_size']) == (3, 64, 32)


def test_validation_chooses_the_best_epoch(tmp_path: Path) -> None:
    result = _train(tmp_path, epochs=3, val_interval=1)
    scores = [row['eval_mAP'] for row in result.summary]
    assert result.best_mAP == max(scores) and result.best_epoch == scores.index(max(scores))
    facts = json.loads((result.best / 'config.json').read_text())['vireid']
    assert facts['epoch'] == result.best_epoch and facts['validation']['mAP'] == result.best_mAP
    assert 'infrared-to-visible' in (result.best / 'README.md').read_text()


class _Killed(Exception):
    """Stands for the end of the process."""


def test_validation_identities_give_the_best_model_a_calibration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = dict(identities=20, test_identities=2, images_per_modality=2, size=(64, 32), seed=7)
    settings = dict(model='vireid_dml_r10t.synthvi', pretrained=True, lr=1e-5, dataset_kwargs=people, val_share=0.5)
    run = _train(tmp_path, epochs=1, **settings)
    found = model_calibration(run.best)
    assert found.mismatch({**found.settings, 'weights': weights_fingerprint(load_model(run.best))}) == ''
    assert found.fitted_on['split'] == 'validation' and found.fitted_on['identities'] == 10
    assert found.fitted_on['options']['seed'] == 7
    config = (run.best / 'config.json').read_bytes()
    monkeypatch.setattr(loop, 'calibrate', None)  # nothing is fitted again
    assert train({'resume': str(run.folder)}).best == run.best
    assert (run.best / 'config.json').read_bytes() == config
    monkeypatch.undo()
    caplog.set_level(logging.INFO, 'vireid_timm')
    few = _train(tmp_path / 'few', epochs=1)
    assert model_calibration(few.best) is None
    assert 'No calibration from similarities to probabilities: a calibration needs at least 10 people' in caplog.text


@pytest.mark.parametrize('start', ['after-bn', 'before-bn'])
def test_validation_identities_choose_what_the_best_model_retrieves_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, start: str
) -> None:
    caplog.set_level(logging.INFO, 'vireid_timm')
    model = timm.create_model('vireid_dml_r10t', pretrained=True, retrieval=start)
    save_model_folder(model, tmp_path / 'model')
    people = dict(identities=20, test_identities=2, images_per_modality=2, size=(64, 32), seed=7)
    settings = dict(model=f'local-dir:{tmp_path / "model"}', pretrained=True, dataset_kwargs=people, val_share=0.5)
    run = _train(tmp_path, epochs=1, lr=1e-5, **settings)
    best = load_model(run.best)
    learned = json.loads((run.folder / 'class_map.json').read_text())
    records = vireid_timm.create_dataset('synthetic', **people).train
    held_out = records[~np.isin(records.identity, list(learned))]
    visible = held_out.modality == 'visible'
    scores = {}
    for kind in ('after-bn', 'before-bn'):
        features = vireid_timm.embed(best, held_out, features=kind, size=(64, 32))[0]
        similarity = features[visible] @ features[~visible].T
        same = torch.tensor(held_out.identity[visible][:, None] == held_out.identity[~visible][None])
        scores[kind] = np.mean([_mean_ap(similarity, same), _mean_ap(similarity.T, same.T)])
    assert best.retrieval == max(scores, key=scores.get)
    stated = [f'{100 * score:.1f} % {kind}' for kind, score in scores.items()]
    assert f'Validation mAP of the best model: {", ".join(stated)}; it retrieves {best.retrieval}' in caplog.text
    facts = json.loads((run.best / 'config.json').read_text())
    assert facts['model_args']['retrieval'] == best.retrieval
    assert facts['vireid']['validation']['mAP'] == pytest.approx(max(scores.values()), abs=1e-6)
    assert f'features {best.retrieval}' in (run.best / 'README.md').read_text()
    assert load_model(run.folder / 'last.pth').retrieval == best.retrieval
    assert timm.create_model(f'local-dir:{run.best}', pretrained=True).num_classes == 10
    given = _train(tmp_path / 'given', epochs=1, lr=1e-5, model_kwargs={'retrieval': start}, **settings)
    assert load_model(given.best).retrieval == start


def _mean_ap(similarity: torch.Tensor, same: torch.Tensor) -> float:
    found = []
    for row, matches in zip(similarity, same):
        ranked = matches[row.argsort(descending=True, stable=True)].double()
        found.append((ranked * ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)).sum() / ranked.sum())
    return float(torch.stack(found).mean())


def _killed_after(monkeypatch: pytest.MonkeyPatch, saves: int, settings: dict[str, Any]) -> Path:
    """Start a run and end it right after that many checkpoints; return its folder."""
    folder = Path(settings['output']) / settings['experiment']
    left = saves

    def save(run: Run, **options: Any) -> None:
        nonlocal left
        save_checkpoint(run, **options)
        left -= 1
        if left == 0:
            raise _Killed

    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(loop, 'save_checkpoint', save)
        train(settings)
    return folder


@pytest.mark.parametrize(
    ('saves', 'settings'),
    [
        (1, dict(model_ema=True, model_ema_decay=0.9, drop=0.1, sched='step', decay_epochs=1)),
        (4, dict(model_ema=True, model_ema_warmup=True, drop=0.1, opt='lookahead_adamw', sched_on_updates=True)),
        (5, dict(grad_accum_steps=2, cached_triplet=True, drop=0.1, clip_grad=1.0, opt='lamb', sched='none')),
        (2, dict(amp=True, amp_dtype='float16', grad_accum_steps=2, epochs=1)),
        (3, dict(loss={'triplet': 1.0, 'prototype': 0.5}, augment=['three_way', 'mrle', 'rrle', 'rfa', 'erasing'])),
    ],
)
def test_a_run_killed_within_an_epoch_resumes_to_the_same_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int, settings: dict[str, Any]
) -> None:
    """Weights, averages, optimiser, scaler and the table of epochs; five batches per epoch, a checkpoint after each."""
    many = dict(identities=16, test_identities=2, images_per_modality=2, size=(64, 32))
    common = {**SMALL, 'dataset_kwargs': many, 'identities_per_batch': 3, 'output': str(tmp_path), **settings}
    common.update(checkpoint_interval='1', deterministic=True, model_kwargs=THIN, **EXACT)
    whole = train({**common, 'experiment': 'whole'})
    folder = _killed_after(monkeypatch, saves, {**common, 'experiment': 'killed'})
    resumed = train({'resume': str(folder)})
    states = [load_checkpoint(folder) for folder in (whole.folder, resumed.folder)]
    assert states[0]['epoch'] == len(states[0]['state']['summary']) == common['epochs']
    assert equal(*states)
    lines = [(run.folder / 'summary.csv').read_text().splitlines() for run in (whole, resumed)]
    assert len(lines[0]) == len(lines[1]) == common['epochs'] + 1


def test_features_that_are_not_finite_are_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model('vireid_dml_r10t.synthvi', pretrained=True, num_classes=0)
    with torch.no_grad():
        model.joint_head.neck.weight[0] = torch.inf
    people = vireid_timm.create_dataset('synthetic', identities=0, test_identities=3, images_per_modality=1)
    data = SimpleNamespace(validation=people, validation_store=None)
    with caplog.at_level(logging.INFO, 'vireid_timm'):
        _choose_retrieval(SimpleNamespace(data=data, device=torch.device('cpu'), input_size=(3, 64, 32)), model)
    assert model.retrieval == 'before-bn' and '% before-bn; it retrieves before-bn' in caplog.text
    assert 'after-bn' not in caplog.text


def test_losses_can_change_when_resuming(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = _train(tmp_path, experiment='run', model_kwargs=THIN, val_share=0.0, epochs=1, augment=['three_way'])
    with caplog.at_level(logging.INFO, 'vireid_timm'):
        resumed = train({'resume': str(first.folder), 'epochs': 2, 'loss': {'prototype': 1, 'pml.CircleLoss': 0.01}})
    assert 'The run had no prototypes: they start anew' in caplog.text
    state = load_checkpoint(resumed.folder)['task_state']['prototypes']
    assert state.any(1).all(), 'everybody was seen'
    assert 'train_triplet' in resumed.summary[0] and 'train_triplet' not in resumed.summary[1]
    assert resumed.summary[1]['train_pml.CircleLoss'] > 0 and resumed.summary[1]['train_prototype'] > 0
    train({'resume': str(first.folder), 'epochs': 3, 'loss': {}})
    assert 'task_state' not in load_checkpoint(resumed.folder)


def test_more_epochs_continue_a_finished_run(tmp_path: Path) -> None:
    # The step schedule does not depend on the number of epochs, so that two of three are those of a run of three.
    settings = dict(sched='step', decay_epochs=1, val_share=0.0, model_kwargs=THIN, **EXACT)
    whole = _train(tmp_path, experiment='whole', epochs=3, **settings)
    part = _train(tmp_path, experiment='part', epochs=2, **settings)
    resumed = train({'resume': str(part.folder), 'epochs': 3})
    assert resumed.folder == part.folder and resumed.best_epoch == 2
    assert equal(load_checkpoint(whole.folder), load_checkpoint(part.folder))


@pytest.mark.parametrize(
    ('interval', 'saves', 'val_share', 'epochs'),
    [('', 2, 0.0, 1), ('', 2, 0.25, 1), ('1', 5, 0.0, 2)],
)
def test_a_run_that_is_to_have_fewer_epochs_ends_as_one_that_was_begun_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: str, saves: int, val_share: float, epochs: int
) -> None:
    """After the first of three epochs, and within the second one, which is brought to its end."""
    settings = {**SMALL, **EXACT, 'output': str(tmp_path), 'val_share': val_share, 'model_kwargs': THIN}
    settings['checkpoint_interval'] = interval
    folder = _killed_after(monkeypatch, saves, {**settings, 'experiment': 'killed', 'epochs': 3})
    assert not (folder / 'best').exists()
    resumed = train({'resume': str(folder), 'epochs': 1})
    whole = train({**settings, 'experiment': 'whole', 'epochs': epochs})
    assert equal(load_checkpoint(folder), load_checkpoint(whole.folder))
    assert (resumed.best_epoch, resumed.best_mAP) == (whole.best_epoch, whole.best_mAP) and resumed.best.is_dir()
    assert json.loads((resumed.best / 'config.json').read_text())['vireid']['epoch'] == epochs - 1


def test_a_run_goes_back_to_its_previous_checkpoint_if_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _train(tmp_path, experiment='run', model_kwargs=THIN, val_share=0.0)
    previous, last = (load_checkpoint(first.folder / name) for name in ('previous.pth', 'last.pth'))
    assert (previous['epoch'], last['epoch']) == (1, 2)
    loaded = vireid_timm.load_model(first.folder / 'previous.pth').state_dict()
    assert loaded and all(torch.equal(value, previous['state_dict'][name]) for name, value in loaded.items())
    with caplog.at_level(logging.INFO, 'vireid_timm'):
        train({'resume': str(first.folder / 'previous.pth'), 'lr': 0.001})
    assert f'Resuming {first.folder} from epoch 1 (previous.pth)' in caplog.text
    now, before = (load_checkpoint(first.folder / name) for name in ('last.pth', 'previous.pth'))
    assert now['epoch'] == 2 and not equal(now['state_dict'], last['state_dict']) and equal(before, last)
    assert not (first.folder / 'damaged.pth').exists()


def test_averaging_and_loss_scaling_can_be_switched_on_and_off_when_resuming(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _train(tmp_path, experiment='run', model_kwargs=THIN, val_share=0.0, epochs=1)
    begun = _weights(first.folder)
    on = dict(model_ema=True, model_ema_decay=1.0, amp=True, amp_dtype='float16')  # an average that never moves
    with caplog.at_level(logging.INFO, 'vireid_timm'):
        train({'resume': str(first.folder), 'epochs': 2, **on})
    assert 'The run had no average of the weights: it starts from those of the checkpoint' in caplog.text
    state = load_checkpoint(first.folder)
    assert state['amp_scaler'] and not equal(state['state_dict'], begun)
    for name in ('layer4.0.conv1.weight', 'joint_head.fc.weight'):
        assert torch.equal(state['state_dict_ema'][name], begun[name])
    train({'resume': str(first.folder), 'epochs': 3, 'model_ema': False, 'amp': False})
    assert not {'state_dict_ema', 'amp_scaler'} & set(load_checkpoint(first.folder))


def _numpy_state() -> np.ndarray:
    return np.random.get_bit_generator().state['state']['key'].copy()


def test_the_same_seed_gives_the_same_run_and_the_callers_random_state_is_not_touched(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), _numpy_state(), random.getstate()
    first = _train(tmp_path, experiment='first', epochs=1, **EXACT)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], _numpy_state()) and before[2] == random.getstate()
    torch.manual_seed(6)
    second = _train(tmp_path, experiment='second', epochs=1, **EXACT)
    third = _train(tmp_path, experiment='third', epochs=1, seed=7, **EXACT)
    weights = [_weights(result.folder)['layer4.0.conv1.weight'] for result in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_deterministic_run_on_a_gpu_is_the_same_again_and_when_it_is_resumed(tmp_path: Path) -> None:
    for output, epochs in (('whole', '2'), ('part', '1'), ('part', '2')):  # each in a process of its own, for cuBLAS
        command = train_command(tmp_path / output, '--device', 'cuda', '--epochs', epochs)
        subprocess.run([sys.executable, '-m', 'vireid_timm', *command], timeout=300, check=True)
    assert equal(*(load_checkpoint(tmp_path / output / EXPERIMENT) for output in ('whole', 'part')))


def test_accumulation_clipping_mixed_precision_and_updates_schedule_run(tmp_path: Path) -> None:
    result = _train(
        tmp_path,
        epochs=1,
        grad_accum_steps=2,
        clip_grad=1.0,
        amp=True,
        sched='cosine',
        sched_on_updates=True,
        opt='adamw',
        lr=1e-3,
        grad_checkpointing=True,
        channels_last=False,
    )
    assert np.isfinite(result.summary[0]['train_loss'])


def test_accumulated_gradients_are_those_of_the_mean_loss(tmp_path: Path) -> None:
    """Two batches accumulated equal one step on the mean of their gradients, with statistics of its own each."""
    settings = dict(epochs=1, opt='momentum', momentum=0.0, weight_decay=0.0, lr=0.01, sched='none', val_share=0.0)
    settings.update(EXACT)
    accumulated = _weights(_train(tmp_path, experiment='two', grad_accum_steps=2, **settings).folder)
    single = {**SMALL, **settings, 'output': str(tmp_path), 'experiment': 'none'}
    start = _initial_weights(single)
    model, gradients = _gradients_by_hand(TrainConfig.from_mapping(single), start)
    for name, _ in model.named_parameters():
        step, expected = start[name] - accumulated[name], 0.01 * gradients[name]
        # Batch norm over few values amplifies what another order of additions rounds differently.
        assert (step - expected).norm() <= 0.01 * expected.norm() + 1e-6, name


def _initial_weights(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(TrainConfig.from_mapping(settings).seed)
        model = timm.create_model('vireid_dml_r10t', num_classes=8, in_chans=3, img_size=(64, 32))
    return {name: value.clone() for name, value in model.state_dict().items()}


def _drawn(data: TrainData, augments: dict[str, Any], device: torch.device, seed: int) -> list[Any]:
    return list(load_batches(data.store, data.labels, data.sampler, augments, device, epoch=0, seed=seed))


def _gradients_by_hand(config: TrainConfig, start: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, dict]:
    model = timm.create_model('vireid_dml_r10t', num_classes=8, in_chans=3, img_size=(64, 32)).train()
    model.load_state_dict(start)
    model = model.to(memory_format=torch.channels_last)
    task = vireid_timm.ViReIDTask(model, verbose=False)
    data = load_data(config, (3, 64, 32), torch.device('cpu'))
    drawn = _drawn(data, create_augments(config, model), torch.device('cpu'), config.seed)
    assert len(drawn) == 3
    gradients: dict[str, torch.Tensor] = {}
    for group in (drawn[:2], drawn[2:]):  # the last group is smaller
        task.zero_grad()
        for _, inputs, labels, _ in group:
            (task(inputs, labels)['loss'] / len(group)).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradients[name] = gradients.get(name, 0) + parameter.grad
                parameter -= 0.01 * parameter.grad
    return model, gradients


def test_learning_rates_are_agws(tmp_path: Path) -> None:
    """Linear warm-up over 10 epochs, a tenth from epoch 20 and a hundredth from 50; pretrained parts at a tenth."""
    model = timm.create_model('vireid_dml_r10t.c3_in1k', num_classes=4)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.1)
    scheduler, epochs = create_scheduler(TrainConfig(), optimizer, 10)
    assert epochs == 80
    for epoch in range(80):
        rate = 0.1 * (epoch + 1) / 10 if epoch < 10 else 0.1 if epoch < 20 else 0.01 if epoch < 50 else 0.001
        assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([0.1 * rate, rate]), epoch
        scheduler.step(epoch + 1)


def test_what_is_new_gets_the_full_learning_rate() -> None:
    def names(model: torch.nn.Module, row: int) -> set[str]:
        group = {id(parameter) for parameter in parameter_groups(model, 0.1)[row]['params']}
        return {name for name, parameter in model.named_parameters() if id(parameter) in group}

    imagenet = timm.create_model('vireid_dml_r10t.c3_in1k', num_classes=4)
    assert {name.split('.')[0] for name in names(imagenet, 0)} == {'stem', 'layer1', 'layer2', 'layer3', 'layer4'}
    assert {name.split('.')[0] for name in names(imagenet, 1)} == {'fusion', 'joint_head', 'global_head', 'fusion_head'}


def test_identities_of_one_modality_are_named_and_get_no_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_layout(tmp_path / 'data', 'folder', identities=4, size=(64, 32), workers=0)
    (tmp_path / 'data/train/infrared/9999').mkdir()
    first = sorted((tmp_path / 'data/train/infrared').glob('0*/*'))[0]
    first.rename(tmp_path / 'data/train/infrared/9999' / first.name)
    config = TrainConfig.from_mapping(
        {**SMALL, 'dataset': 'folder', 'data_dir': str(tmp_path / 'data'), 'dataset_kwargs': {}, 'val_share': 0.0}
    )
    with caplog.at_level(logging.WARNING, 'vireid_timm'):
        data = load_data(config, (3, 64, 32), torch.device('cpu'))
    assert '9999' in caplog.text and '9999' not in data.class_map and len(data.class_map) == 4
    assert (data.labels < 0).sum() == 1


def _nan_at(epoch: int, step: int) -> Any:
    """A task's forward whose loss is NaN at one step; epochs have three."""
    real, calls = vireid_timm.ViReIDTask.forward, 0

    def forward(self: vireid_timm.ViReIDTask, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        result = real(self, *args, **kwargs)
        calls += 1
        return {**result, 'loss': result['loss'] * torch.nan} if calls == 3 * epoch + step + 1 else result

    return forward


def test_a_nan_loss_names_its_step_saves_its_images_and_never_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = (
        tmp_path / 'run',
        dict(experiment='run', val_share=0.0, epochs=3, checkpoint_interval='1', model_kwargs=THIN, **EXACT),
    )
    monkeypatch.setattr(vireid_timm.ViReIDTask, 'forward', _nan_at(epoch=1, step=1))
    with pytest.raises(FloatingPointError, match=r'epoch 1 at step 1;.*nan-epoch1-step1.*--lr'):
        _train(tmp_path, **settings)
    assert (load_checkpoint(folder)['epoch'], load_checkpoint(folder)['state']['step']) == (1, 1)
    about = json.loads((folder / 'nan-epoch1-step1/batch.json').read_text())
    assert [record['modality'] for record in about] == ['visible'] * 8 + ['infrared'] * 8
    assert len({record['identity'] for record in about}) == 4
    for record in about:
        with Image.open(folder / 'nan-epoch1-step1' / record['file']) as image:
            assert image.size == (32, 64)

    monkeypatch.undo()  # and it resumes from the checkpoint before
    resumed = train({'resume': str(folder)})
    monkeypatch.undo()
    whole = _train(tmp_path, **{**settings, 'experiment': 'whole'})
    assert equal(load_checkpoint(whole.folder), load_checkpoint(resumed.folder))


def test_names_that_are_not_utf8_are_saved_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an archive from another system: of the people, of the data's folder and of the run's."""
    root, odd = tmp_path / 'data\udcd5', '\udcd5\udcc5'
    try:
        write_layout(root, 'folder', identities=4, test_identities=2, size=(64, 32), workers=0)
    except (OSError, UnicodeError) as error:
        pytest.skip(f'this file system has no such names: {error}')
    for person in sorted(root.glob('train/*/*')):
        person.rename(person.with_name(odd + person.name))
    settings = dict(dataset='folder', data_dir=str(root), dataset_kwargs={}, model_kwargs=THIN, experiment=f'run{odd}')
    result = _train(tmp_path, val_share=0.0, epochs=1, **settings)
    names = {f'{odd}{number:05d}': number for number in range(4)}
    assert json.loads((result.folder / 'class_map.json').read_text()) == names
    assert load_yaml(result.folder / 'args.yaml')['data_dir'] == str(root)
    monkeypatch.setattr(vireid_timm.ViReIDTask, 'forward', _nan_at(epoch=0, step=1))
    with pytest.raises(FloatingPointError):
        train({'resume': str(result.folder), 'epochs': 3})
    (batch,) = result.folder.glob('nan-*/batch.json')
    for record in json.loads(batch.read_text()):
        assert record['identity'] in names and Path(record['path']).is_file()
    log = (result.folder / 'train.log').read_text()
    assert f'Everything goes to {tmp_path}/run\\udcd5\\udcc5' in log and 'Resuming' in log


def test_the_images_of_a_nan_batch_are_those_that_the_network_saw(tmp_path: Path) -> None:
    plain = dict(pad=0, hflip=0.0, augment=[], epochs=1, val_share=0.0)
    with pytest.raises(FloatingPointError):  # the loss overflows after the first step
        _train(tmp_path, experiment='run', lr=1e30, log_interval=1, **plain)
    (folder,) = (tmp_path / 'run').glob('nan-epoch0-step*')
    for record in json.loads((folder / 'batch.json').read_text()):
        with Image.open(folder / record['file']) as image:
            assert np.array_equal(np.asarray(image), load_image(record['path'], (64, 32)))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss can have a gradient that is not: the step after it would have told."""
    real = loop.train_step

    def train_step(run: Run, group: Any) -> Any:
        results = real(run, group)
        if run.num_updates == 3 + 1:
            run.model.global_head.fc.weight.data[0, 0] = torch.inf
        return results

    monkeypatch.setattr(loop, 'train_step', train_step)
    with pytest.raises(FloatingPointError, match='weights became NaN or infinite in epoch 1 before step 2'):
        _train(tmp_path, experiment='run', val_share=0.0, checkpoint_interval='1', model_kwargs=THIN)
    assert load_checkpoint(tmp_path / 'run')['state']['step'] == 1


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'model': 'vireid_dml_r51'}, 'vireid_dml_r51.*vireid_dml_r50'),
        ({'model': 'resnet18'}, 'not a visible-infrared re-ID model'),
        ({'model_kwargs': {'fuse_layer': 3}}, 'fuse_layer'),
        ({'identities_per_batch': 100}, '100 identities.*there are'),
        ({'learning_rate': 0.1}, "no setting 'learning_rate'"),
        ({'dataset': 'sysu'}, "unknown dataset 'sysu'"),
        ({'dataset': 'folder', 'data_dir': 'no/such/folder', 'dataset_kwargs': {}}, 'no/such/folder'),
        ({'id_branches': ['part']}, "no branch 'part'"),
        ({'resume': 'no/such/run'}, 'no/such/run'),
        ({'cached_triplet': True}, '--grad-accum-steps'),
        ({'checkpoint_interval': '10 minutes'}, "500, 10m, or nothing for none, got '10 minutes'"),
        ({'augment': ['rcc', 'mixup']}, "unknown augmentation 'mixup'; expected some of rcc"),
        ({'augment': ['rcc'], 'cre_fill': [0, 0, 0]}, 'name cre in --augment, too'),
        ({'loss': {'triplet': 1, 'pml.RoundLoss': 1}}, "no loss 'RoundLoss'"),
        ({'opt': 'sgdx'}, "cannot create the optimiser 'sgdx'.*list_optimizers"),
        ({'opt': 'lookahead_adahessian'}, 'needs second derivatives'),
        ({'opt_kwargs': {'foo': 1}}, "cannot create the optimiser 'sgd'.*foo.*--opt-kwargs"),
        ({'opt_kwargs': {'lr': 1}}, '--opt-kwargs.* except lr'),
        ({'sched': 'plateau'}, 'would never decay'),
        ({'input_size': [1, 64, 32]}, 'images have 3 channels, not 1'),
        ({'sched': 'cosin'}, "'cosin'"),
        ({'decay_milestones': [51, 21]}, '--decay-milestones have to rise, got 51 21'),
        ({'decay_milestones': [3, 9, 7]}, '--decay-milestones have to rise, got 3 9 7'),
        ({'model_kwargs': {'num_classes': 100}}, '--model-kwargs num_classes: training chooses it'),
    ],
)
def test_settings_that_cannot_work_are_errors_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _train(tmp_path / 'runs', **settings)
    assert not (tmp_path / 'runs').exists()


def test_a_run_is_resumed_only_as_what_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = _train(tmp_path, experiment='run', model_kwargs=THIN, epochs=1)
    with pytest.raises(ValueError, match='--resume'):
        _train(tmp_path, experiment='run', epochs=1)
    for settings, message in (
        ({'model': 'vireid_base_r10t'}, 'vireid_base_r10t'),
        ({'seed': 7}, r'another seed \(42, now 7\)'),
        ({'identities_per_batch': 2}, r'identities per batch \(4, now 2\)'),
        ({'grad_accum_steps': 2}, r'batches per optimiser step \(1, now 2\)'),
        ({'opt': 'adamw'}, r'another optimiser \(sgd, now adamw\)'),
        ({'val_share': 0.0}, r'another training identities \(6, now 8\)'),
        ({'dataset_kwargs': {**SMALL['dataset_kwargs'], 'seed': 5}}, 'another training images'),
        ({'input_size': [3, 128, 64]}, r'another input size \(\[3, 64, 32\], now \[3, 128, 64\]\)'),
        ({'model_kwargs': {**THIN, 'last_stride': 2}}, 'another model arguments'),
        ({'experiment': 'other'}, f'continues the run in {tmp_path}/run, not in --experiment other: leave that out'),
        ({'output': str(tmp_path / 'other')}, f'not in --output {tmp_path}/other: .*--model {tmp_path}/run'),
    ):
        before = {path: path.read_bytes() for path in first.folder.iterdir() if path.is_file()}
        with pytest.raises(ValueError, match=message):
            train({'resume': str(first.folder), **settings})
        assert {path: path.read_bytes() for path in before} == {**before, first.folder / 'train.log': mock.ANY}
    assert train({'resume': str(first.folder), 'output': str(tmp_path), 'experiment': 'run'}).folder == first.folder
    with caplog.at_level(logging.INFO, 'vireid_timm'):
        again = train({'resume': 'auto', 'output': str(tmp_path), 'experiment': 'run'})
    assert 'All 1 epochs are done already' in caplog.text
    assert (again.folder, again.best_epoch, len(again.summary)) == (first.folder, first.best_epoch, 1)


def test_what_a_run_has_left_is_never_overwritten(tmp_path: Path) -> None:
    """Not even where its checkpoints were removed to save space."""
    first = _train(tmp_path, experiment='run', model_kwargs=THIN, epochs=1)
    (first.folder / 'last.pth').unlink()
    for resume in ('', 'auto'):
        with pytest.raises(ValueError, match='holds a run already; its checkpoints are gone'):
            _train(tmp_path, experiment='run', resume=resume)
    shutil.rmtree(first.best)
    with pytest.raises(ValueError, match='checkpoints are gone'):
        _train(tmp_path, experiment='run')
    (first.folder / 'summary.csv').unlink()  # as one that was killed before its first checkpoint
    assert _train(tmp_path, experiment='run', resume='auto', model_kwargs=THIN, epochs=1).folder == first.folder


def test_a_run_that_is_killed_while_it_ends_its_first_epoch_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its best model is there already, which nothing may overwrite that is not this run."""

    def write_summary(*args: Any) -> None:
        raise _Killed

    settings = dict(experiment='run', model_kwargs=THIN, epochs=1, val_share=0.0, resume='auto')
    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(loop, '_write_summary', write_summary)
        _train(tmp_path, **settings)
    assert (tmp_path / 'run/best').is_dir()
    result = _train(tmp_path, **settings)
    assert (result.best_epoch, len(result.summary)) == (0, 1)


@pytest.mark.parametrize(('sched', 'rates'), [('multistep', [0.015, 0.03]), ('none', [0.03, 0.03])])
def test_todays_settings_of_the_optimiser_hold_after_resuming(tmp_path: Path, sched: str, rates: list[float]) -> None:
    first = _train(
        tmp_path,
        experiment='run',
        model_kwargs=THIN,
        epochs=1,
        val_share=0.0,
        sched=sched,
        opt_kwargs={'nesterov': False},
    )
    today = dict(weight_decay=0.25, momentum=0.5, lr=0.03, backbone_lr_scale=0.5, opt_kwargs={})
    train({'resume': str(first.folder), 'epochs': 2, **today})
    groups = load_checkpoint(first.folder)['optimizer']['param_groups']
    for group in groups:
        assert (group['weight_decay'], group['momentum'], group['nesterov']) == (0.25, 0.5, True)
    assert [group['lr_scale'] for group in groups] == [0.5, 1.0]
    assert [group['lr'] for group in groups] == pytest.approx(rates)


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(tmp_path: Path) -> None:
    first = _train(tmp_path, experiment='run', model_kwargs=THIN, **EXACT)
    expected = load_checkpoint(first.folder)
    (first.folder / 'last.pth').write_bytes(b'not a checkpoint')
    train({'resume': str(first.folder)})
    assert equal(load_checkpoint(first.folder), expected)
    assert (first.folder / 'damaged.pth').read_bytes() == b'not a checkpoint'
    for name in ('last.pth', 'previous.pth'):
        (first.folder / name).write_bytes(b'neither')
    with pytest.raises(ValueError, match=r'last\.pth is damaged.*previous\.pth is damaged'):
        train({'resume': str(first.folder)})


def test_a_run_folder_belongs_to_one_process(tmp_path: Path) -> None:
    first = _train(tmp_path, experiment='run', model_kwargs=THIN, epochs=1)
    (first.folder / '.last.pth.0123abcd.part').write_bytes(b'half')
    (first.folder / '.best.0123abcd.old').mkdir()
    before = load_checkpoint(first.folder)
    with open_run_folder(first.folder):
        assert [path.name for path in first.folder.glob('.*')] == ['.lock']  # nothing of a killed process
        with pytest.raises(ValueError, match='another process is training in'):
            train({'resume': str(first.folder), 'epochs': 2})
    assert equal(load_checkpoint(first.folder), before)


def test_a_failure_in_the_background_stops_the_run_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image store that vanished, or a worker that died, as the reading threads meet it."""
    real, reads = ImageStore.__getitem__, 0

    def read(self: ImageStore, rows: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        if reads > 8:
            raise FileNotFoundError(2, 'No such file or directory', 'pixels.bin')
        return real(self, rows)

    monkeypatch.setattr(ImageStore, '__getitem__', read)
    with pytest.raises(FileNotFoundError, match='pixels.bin'):
        _train(tmp_path, experiment='run', epochs=4, val_share=0.0, checkpoint_interval='1', model_kwargs=THIN)
    state = load_checkpoint(tmp_path / 'run')
    assert 3 * state['epoch'] + state['state']['step'] >= 4  # what was read ahead was not needed yet
    monkeypatch.undo()
    assert len(train({'resume': str(tmp_path / 'run')}).summary) == 4


class _NoUnknownShapes(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU: their value or shape is not known before it is computed."""

    refused = ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', '_unique2', 'is_nonzero')

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.refused, f'{name} waits for the device'
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Refuses what makes the host wait for a GPU, also what reads a tensor on the CPU without an operation."""

    def refusing(name: str) -> Callable[..., None]:
        def refuse(*args: Any) -> None:
            raise AssertionError(f'{name} waits for the device')

        return refuse

    with pytest.MonkeyPatch.context() as patched, _NoUnknownShapes():
        for name in ('item', 'tolist', 'cpu', 'numpy', '__array__', '__bool__', '__int__', '__index__', '__float__'):
            patched.setattr(torch.Tensor, name, refusing(name))
        yield


@pytest.mark.parametrize('read', [bool, float, np.asarray, torch.nonzero, methodcaller('tolist'), methodcaller('cpu')])
def test_waiting_for_the_device_is_seen(read: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match='waits for the device'), _no_waiting():
        read(torch.ones(1))


def test_drawing_batches_never_waits_for_the_device() -> None:
    """Tensors on `meta` have no values that the host could read."""
    config, meta = TrainConfig.from_mapping({**SMALL, 'val_share': 0.0}), torch.device('meta')
    data = load_data(config, (3, 64, 32), torch.device('cpu'))
    augments = create_augments(config, timm.create_model('vireid_dml_r10t', num_classes=8))
    drawn = _drawn(data, augments, meta, config.seed)
    assert len(drawn) == 3
    for batch in drawn:
        assert all(images.is_meta and images.shape == (8, 3, 64, 32) for images in batch.inputs)
        assert batch.labels.is_meta


@pytest.mark.parametrize(
    'settings',
    [
        dict(model_ema=True, sched_on_updates=True, clip_grad=1.0, drop=0.1),
        dict(grad_accum_steps=2, cached_triplet=True, opt='adamw', amp=True, mutual='none'),
        dict(grad_accum_steps=2, cached_triplet=True, augment=['three_way'], loss={'hetero_center': 0.1}),
        dict(loss={'prototype': 1.0, 'hetero_center_triplet': 1.0, 'cross_modality_triplet': 1.0}),
    ],
)
def test_the_host_never_waits_for_the_device_within_a_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = TrainConfig.from_mapping({**SMALL, 'output': str(tmp_path), 'val_share': 0.0, **settings})
    with torch.random.fork_rng():
        run = create_run(config, tmp_path, torch.device('cpu'))
        loop.training_mode(run)
        progress = Progress(num_epochs=1, steps_per_epoch=3, images_per_step=16, device=run.device)
        drawn = _drawn(run.data, run.augments, run.device, config.seed)[:2]
        with _no_waiting():
            for group in ([drawn[0]], [drawn[1]]) if config.grad_accum_steps == 1 else (drawn,):
                for batch, result in zip(group, loop.train_step(run, group)):
                    progress.add(result, batch.labels)
                run.state.step += len(group)
        progress.read()
    assert progress.step == 2 and np.isfinite(progress.means()['loss'])


def test_too_little_memory_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    monkeypatch.setattr(vireid_timm.ViReIDTask, 'forward', forward)
    with pytest.raises(ValueError, match='a step of 16 images does not fit .* cpu; try fewer --identities-per-batch'):
        _train(tmp_path, model_kwargs=THIN)


@pytest.mark.parametrize('deterministic', [False, True])
def test_the_callers_switches_are_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    seen, switches = [], torch.utils.deterministic
    real = loop.train_step

    def train_step(run: Run, group: Any) -> Any:
        seen.append((torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory))
        return real(run, group)

    monkeypatch.setattr(loop, 'train_step', train_step)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    _train(tmp_path, epochs=1, deterministic=deterministic)
    assert set(seen) == {(deterministic, not deterministic)} and switches.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    assert 'CUBLAS_WORKSPACE_CONFIG' not in os.environ


def test_torchs_fused_optimisers_are_used_unless_told_otherwise() -> None:
    model = timm.create_model('vireid_base_r10t', num_classes=4)

    def fused(**settings: Any) -> Any:
        return create_optimizer(TrainConfig(**settings), model).param_groups[0].get('fused')

    assert fused() and fused(opt='adamw') and fused(opt='nesterov')
    assert not fused(opt_kwargs={'fused': False}) and not fused(opt_kwargs={'foreach': True})
    assert fused(opt='lamb') is None and fused(opt='sgdw') is None
    assert not create_optimizer(TrainConfig(), model, fused=False).param_groups[0]['fused']


def test_fine_tuning_makes_a_new_classifier_and_can_hold_batch_norm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From a saved model onto as many other identities: only what was loaded keeps its statistics."""
    first = _train(tmp_path, experiment='first', epochs=1, val_share=0.0)
    options = {**SMALL['dataset_kwargs'], 'seed': 3}
    settings = dict(model=f'local-dir:{first.best}', pretrained=True, dataset_kwargs=options, val_share=0.0, lr=1e-8)
    settings.update(backbone_lr_scale=1.0, warmup_epochs=0, weight_decay=0.0, epochs=1)
    with caplog.at_level(logging.INFO, 'vireid_timm'):
        held, free = (
            _weights(_train(tmp_path, experiment=f'second-{freeze}', freeze_bn=freeze, **settings).folder)
            for freeze in (True, False)
        )
    assert 'except for the classifiers: these are new, for 8 identities' in caplog.text
    assert 'frozen batch norm' not in caplog.text
    settings['model'] = f'local-dir:{tmp_path}/second-True/best'
    for freeze in (True, False):
        _train(tmp_path, experiment=f'third-{freeze}', freeze_bn=freeze, **settings)
        assert ('were trained with frozen batch norm; without --freeze-bn' in caplog.text) is not freeze
    start = _weights(first.folder)
    for name, value in start.items():
        if '.fc.' in name:
            assert not torch.allclose(held[name], value, atol=1e-4), name
        elif name.endswith(('running_mean', 'running_var', 'num_batches_tracked')):
            assert torch.equal(held[name], value) and not torch.equal(free[name], value), name
        else:
            torch.testing.assert_close(held[name], value, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='--pretrained'):
        _train(tmp_path, freeze_bn=True)


def test_freezing_leaves_norms_alone_that_imagenet_weights_do_not_fill() -> None:
    model = timm.create_model('vireid_dml_r10t.c3_in1k', num_classes=4)
    frozen = set(map(id, frozen_norms(TrainConfig(freeze_bn=True), model)))
    names = {name for name, module in model.named_modules() if id(module) in frozen}
    assert names and all(name.startswith(('stem.', 'layer')) for name in names)
    assert not frozen_norms(TrainConfig(), model)


def _two_runs(rank: int, folder: str) -> None:
    """One of two ranks: scores differ in a last bit, a loss that only one cannot compute, SIGTERM."""
    torch.set_num_threads(1)
    meeting, patience = f'file://{folder}/meeting', timedelta(minutes=2)
    distributed.init_process_group('gloo', init_method=meeting, rank=rank, world_size=2, timeout=patience)
    found = {}

    def run(name: str, **settings: Any) -> None:
        config = Path(folder) / f'{name}-{rank}.json'  # which is YAML, too
        small = {**SMALL, 'identities_per_batch': 2, 'device': 'cpu', 'model_kwargs': THIN, 'val_interval': 1}
        config.write_text(json.dumps({**small, 'output': folder, 'experiment': name, **settings}))
        with redirect_stderr(io.StringIO()) as said:
            found[name] = [main(['train', '--config', str(config)])]
        found[name].append(said.getvalue())

    def scores(report: vireid_timm.Report) -> dict[str, float]:
        """Process 1 believes in a second epoch that is better, process 0 does not."""
        calls.append(report)
        return {'rank1': 0.5, 'mAP': 0.5 + 1e-12 * rank * len(calls), 'mINP': 0.5}

    def evaluate(*args: Any, **options: Any) -> vireid_timm.Report:
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    calls, real = [], loop.evaluate
    with mock.patch.object(loop, '_scores', scores):
        run('differ')
    with mock.patch.object(vireid_timm.ViReIDTask, 'forward', _nan_at(epoch=0, step=0 if rank == 1 else 1000)):
        run('diverged', log_interval=1)
    with mock.patch.object(loop, 'evaluate', evaluate):
        run('stopped')
    (Path(folder) / f'{rank}.json').write_text(json.dumps(found))
    distributed.destroy_process_group()


def test_two_ranks_decide_as_one_and_each_says_what_only_it_knows(tmp_path: Path) -> None:
    start_processes(_two_runs, (str(tmp_path),), nprocs=2, start_method=METHOD)
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    assert first['differ'][0] == second['differ'][0] == 0, (first['differ'], second['differ'])
    assert load_checkpoint(tmp_path / 'differ')['epoch'] == 2

    assert first['diverged'][0] == second['diverged'][0] == 1
    assert 'at step 0, on rank 1 of 2; the last' in first['diverged'][1]
    assert f'images are in {tmp_path / "diverged" / "nan-epoch0-step0-rank*"}' in first['diverged'][1]
    assert [path.name for path in (tmp_path / 'diverged').glob('nan-*')] == ['nan-epoch0-step0-rank1']

    assert second['stopped'] == [
        128 + signal.SIGTERM,
        f'vireid: stopped by SIGTERM: resume with: torchrun ... -m vireid_timm train --resume {tmp_path / "stopped"}\n',
    ]
    assert first['stopped'][0] == 1 and 'another rank is gone; its own message says why' in first['stopped'][1]
