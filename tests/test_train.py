"""The training loop on rendered pictures: it learns, resumes to the same weights, and says what is wrong."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import vireid_timm
from vireid_timm.batches import batches, create_augments, load_data
from vireid_timm.config import TrainConfig
from vireid_timm.runs import load_checkpoint
from vireid_timm.synth import write_layout
from vireid_timm.train import _epoch_seed, create_scheduler, parameter_groups, train

SMALL = {
    'dataset': 'synthetic',
    'dataset_kwargs': dict(identities=8, test_identities=2, pictures_per_modality=2, size=(64, 32)),
    'model': 'vireid_dml_r10t',
    'input_size': [3, 64, 32],
    'identities_per_batch': 4,
    'pictures_per_modality': 2,
    'val_share': 0.25,
    'epochs': 2,
    'lr': 0.05,
    'pad': 2,
    'warmup_epochs': 0,
    'workers': 0,
    'amp': False,
    'cache': 'ram',
}


def _train(output: Path, **settings: Any) -> vireid_timm.TrainResult:
    return train({**SMALL, 'output': str(output), **settings})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder)['state_dict']


def test_a_run_learns_and_leaves_a_model_that_timm_loads(tmp_path: Path) -> None:
    result = _train(tmp_path, epochs=6, val_share=0.0, opt='adamw', lr=0.002, reprob=0.0)
    losses = [row['train_id_joint'] for row in result.summary]
    assert losses[-1] < 0.8 * losses[0]
    names = {path.name for path in result.folder.iterdir()}
    files = 'args.yaml best class_map.json config.json curves.png last.pth summary.csv train.log'
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


@pytest.mark.parametrize('on_updates', [False, True])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path, on_updates: bool) -> None:
    # The step schedule does not depend on the number of epochs, so that two of three are those of a run of three.
    settings = dict(
        model_ema=True, model_ema_decay=0.9, drop=0.1, sched='step', decay_epochs=1, sched_on_updates=on_updates
    )
    whole = _train(tmp_path, experiment='whole', epochs=3, **settings)
    part = _train(tmp_path, experiment='part', epochs=2, **settings)
    resumed = train({'resume': str(part.folder), 'epochs': 3})
    assert resumed.folder == part.folder
    for key in ('state_dict', 'state_dict_ema'):
        first, second = load_checkpoint(whole.folder)[key], load_checkpoint(part.folder)[key]
        assert all(torch.equal(first[name], second[name]) for name in first)
    columns = ('epoch', 'train_loss', 'lr')
    assert [[str(row[name]) for name in columns] for row in resumed.summary] == [
        [str(row[name]) for name in columns] for row in whole.summary
    ]


def _numpy_state() -> np.ndarray:
    return np.random.get_bit_generator().state['state']['key'].copy()


def test_the_same_seed_gives_the_same_run_and_the_callers_random_state_is_not_touched(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), _numpy_state(), random.getstate()
    first = _train(tmp_path, experiment='first', epochs=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], _numpy_state()) and before[2] == random.getstate()
    torch.manual_seed(6)
    second = _train(tmp_path, experiment='second', epochs=1)
    third = _train(tmp_path, experiment='third', epochs=1, seed=7)
    weights = [_weights(result.folder)['layer4.0.conv1.weight'] for result in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


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
    settings = dict(epochs=1, opt='momentum', momentum=0.0, weight_decay=0.0, lr=0.1, sched='none', val_share=0.0)
    accumulated = _weights(_train(tmp_path, experiment='two', grad_accum_steps=2, **settings).folder)
    single = {**SMALL, **settings, 'output': str(tmp_path), 'experiment': 'none'}
    start = _initial_weights(single)
    model, gradients = _gradients_by_hand(TrainConfig.from_mapping(single), start)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(accumulated[name], start[name] - 0.1 * gradients[name], rtol=1e-4, atol=1e-6)


def _initial_weights(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(TrainConfig.from_mapping(settings).seed)
        model = timm.create_model('vireid_dml_r10t', num_classes=8, in_chans=3, img_size=(64, 32))
    return {name: value.clone() for name, value in model.state_dict().items()}


def _gradients_by_hand(config: TrainConfig, start: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, dict]:
    model = timm.create_model('vireid_dml_r10t', num_classes=8, in_chans=3, img_size=(64, 32)).train()
    model.load_state_dict(start)
    model = model.to(memory_format=torch.channels_last)
    task = vireid_timm.ViReIDTask(model, verbose=False)
    data = load_data(config, (3, 64, 32))
    generator = torch.Generator().manual_seed(_epoch_seed(config.seed, 0))
    drawn = list(batches(data, create_augments(config, model), torch.device('cpu'), generator))
    assert len(drawn) == 3
    gradients: dict[str, torch.Tensor] = {}
    for group in (drawn[:2], drawn[2:]):  # the last group is smaller
        task.zero_grad()
        for inputs, labels, _ in group:
            (task(inputs, labels)['loss'] / len(group)).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradients[name] = gradients.get(name, 0) + parameter.grad
                parameter -= 0.1 * parameter.grad
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
        data = load_data(config, (3, 64, 32))
    assert '9999' in caplog.text and '9999' not in data.class_map and len(data.class_map) == 4
    assert (data.labels < 0).sum() == 1


def test_a_diverging_loss_names_epoch_and_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    first = _train(tmp_path, experiment='run', epochs=1)
    before = _weights(first.folder)
    with pytest.raises(FloatingPointError, match=r'epoch 1 at step \d+.*--lr'):
        train({'resume': str(first.folder), 'epochs': 3, 'lr': 1e30, 'log_interval': 1})
    after = _weights(first.folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


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
    ],
)
def test_settings_that_cannot_work_are_errors_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _train(tmp_path / 'runs', **settings)
    assert not (tmp_path / 'runs').exists()


def test_a_run_folder_is_never_overwritten_and_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    first = _train(tmp_path, experiment='run', epochs=1)
    with pytest.raises(ValueError, match='--resume'):
        _train(tmp_path, experiment='run', epochs=1)
    with pytest.raises(ValueError, match='vireid_base_r10t'):
        train({'resume': str(first.folder), 'model': 'vireid_base_r10t'})
    (first.folder / 'last.pth').write_bytes(b'not a checkpoint')
    with pytest.raises(ValueError, match=r'last\.pth is damaged'):
        train({'resume': str(first.folder)})
