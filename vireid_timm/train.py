"""The training loop: a thin one over timm's task, optimisers, schedulers, scaler and averaging."""
import datetime
import json
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, dispatch_clip_grad
from tqdm import tqdm

from .augment import Augment
from .batches import TrainData, batches, create_augments, load_data
from .config import TrainConfig, load_yaml
from .device import autocast_dtype, resolve_device
from .evaluate import Report, evaluate
from .files import save_json
from .hub import save_model_folder
from .models import DualStreamResNet
from .records import Dataset
from .runs import (
    BEST,
    CLASS_MAP,
    CONFIG,
    load_checkpoint,
    plot_curves,
    read_summary,
    save_checkpoint,
    save_config,
    write_summary,
)
from .task import ViReIDTask

_logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What `train` returns.

    Attributes:
        folder: The run's folder.
        best: The Hub-ready folder of the best (without validation: the last) epoch's model.
        best_epoch: That epoch, from 0.
        best_mAP: Its mAP on the validation identities, mean over both directions; None without validation.
        summary: One row per epoch, as in `summary.csv`.
    """
    folder: Path
    best: Path
    best_epoch: int
    best_mAP: float | None
    summary: list[dict[str, Any]] = field(default_factory=list)


def train(config: TrainConfig | Mapping[str, Any]) -> TrainResult:
    """Train a network; what `vireid train` does.

    Args:
        config: A `TrainConfig`, or settings by name over its defaults. With `resume` given as a setting, those of the
            resumed run are the defaults.

    Returns:
        Where the run's folder and best model are, and how it went.

    Raises:
        ValueError: A setting or data that cannot work; the text says which and what to do.
        FloatingPointError: The loss became NaN or infinite; the last checkpoint is intact.
    """
    if not isinstance(config, TrainConfig):
        config = TrainConfig.from_mapping(resumed_settings(config))
    device = resolve_device(config.device)
    # Initial weights and dropout draw from torch's global generators: they are lent here and given back.
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(config.seed)
        return _train(config, device)


def resumed_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over those of the run that `resume` names, if it names one."""
    resume = given.get('resume')
    if not resume:
        return dict(given)
    folder = Path(resume)
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / CONFIG).is_file():
        raise ValueError(f'--resume {resume}: no {CONFIG} there; give a run folder that `vireid train` wrote')
    return {**load_yaml(folder / CONFIG), **given, 'resume': str(folder)}


def _train(config: TrainConfig, device: torch.device) -> TrainResult:
    model_args = _model_args(config)
    # Cheap, and before the data are read: a wrong name or argument should not cost minutes.
    pretrained_cfg = _probe_model(config, model_args)
    size = tuple(config.input_size or pretrained_cfg['input_size'])
    data = load_data(config, size)
    model = _create_model(config, model_args, len(data.class_map)).to(device)
    task = _create_task(config, model, device)
    optimizer = create_optimizer_v2(
        parameter_groups(model, _backbone_lr_scale(config)), opt=config.opt, lr=config.lr, momentum=config.momentum,
        weight_decay=config.weight_decay, **config.opt_kwargs)
    scheduler, num_epochs = _create_scheduler(config, optimizer, len(data.sampler))
    dtype = autocast_dtype(device, config.amp, config.amp_dtype)
    scaler = NativeScaler(device.type) if dtype == torch.float16 else None
    folder = _run_folder(config, data.dataset)
    state = _Progress()
    if config.resume:
        state = _resume(folder, config, task, optimizer, scaler)
    if scheduler is not None and state.epoch > 0:
        scheduler.step(state.epoch)
    save_config(folder, {**asdict(config), 'resume': ''})
    save_json(folder / CLASS_MAP, data.class_map)
    _log_start(folder, config, data, model, size, device, dtype)
    loop = _Loop(config, data, task, optimizer, scheduler, scaler, device, dtype, create_augments(config, model))
    for epoch in range(state.epoch, num_epochs):
        row = {'epoch': epoch, **train_one_epoch(loop, epoch)}
        if scheduler is not None:
            scheduler.step(epoch + 1)
        eval_model = task.get_eval_model(ema=config.model_ema)
        last = epoch + 1 == num_epochs
        report = None
        if data.validation is not None and (last or (epoch + 1) % config.val_interval == 0):
            report = _validate(config, eval_model, data.validation, size, device, dtype)
            row.update(_validation_row(report))
        _keep_if_best(state, folder, config, eval_model, data, row, report, size, last)
        state.summary.append(row)
        state.epoch = epoch + 1
        write_summary(folder, state.summary)
        save_checkpoint(folder, _checkpoint(state, config, task, optimizer, scaler, data.class_map))
    plot_curves(folder, state.summary)
    _logger.info(f'Done: {folder} (best model in {folder / BEST}, from epoch {state.best_epoch})')
    return TrainResult(folder, folder / BEST, state.best_epoch, state.best_mAP, state.summary)


@dataclass
class _Progress:
    """What a resumed run has to know beside weights and optimiser. Batches and augmentation follow from the epoch."""
    epoch: int = 0
    best_epoch: int = -1
    best_mAP: float | None = None
    summary: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Loop:
    """What every epoch needs."""
    config: TrainConfig
    data: TrainData
    task: ViReIDTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: NativeScaler | None
    device: torch.device
    dtype: torch.dtype | None
    augments: dict[str, Augment]


def train_one_epoch(loop: _Loop, epoch: int) -> dict[str, float]:
    """One pass over the sampler's batches.

    Returns:
        Means of loss, its terms and accuracy, prefixed `train_`, the pictures per second and the learning rate.

    Raises:
        FloatingPointError: A loss that is not finite.
    """
    config, task, optimizer = loop.config, loop.task, loop.optimizer
    task.train()
    loop.data.sampler.set_epoch(epoch)
    generator = torch.Generator(loop.device).manual_seed(_epoch_seed(config.seed, epoch))
    torch.manual_seed(_epoch_seed(config.seed, epoch))  # dropout
    num_batches = len(loop.data.sampler)
    accumulate = config.grad_accum_steps
    updates_per_epoch = -(-num_batches // accumulate)
    meter = _Meter()
    start = time.perf_counter()
    optimizer.zero_grad()
    bar = tqdm(batches(loop.data, loop.augments, loop.device, generator), f'epoch {epoch}', num_batches, disable=None)
    for step, (inputs, labels, _) in enumerate(bar):
        # The last group of an epoch may be smaller than the others.
        group = min(accumulate, num_batches - step // accumulate * accumulate)
        update = step % accumulate == group - 1
        with nullcontext() if update else task.no_sync():
            with torch.autocast(loop.device.type, dtype=loop.dtype or torch.bfloat16, enabled=loop.dtype is not None):
                result = task(inputs, labels)
            meter.add(result, labels)
            _backward(loop, result['loss'] / group, update)
        if update:
            optimizer.zero_grad()
            num_updates = epoch * updates_per_epoch + step // accumulate + 1
            task.update_ema(step=num_updates)
            if loop.scheduler is not None:
                loop.scheduler.step_update(num_updates)
        if step % config.log_interval == 0 or step + 1 == num_batches:
            means = meter.read(epoch)
            speed = (step + 1) * len(labels) / (time.perf_counter() - start)
            bar.set_postfix({**{name: f'{value:.3g}' for name, value in means.items()}, 'images/s': f'{speed:.0f}'})
    lr = max(group['lr'] for group in optimizer.param_groups)
    _logger.info(
        f'epoch {epoch}: {" ".join(f"{name} {value:.4g}" for name, value in means.items())} '
        f'lr {lr:.3g}, {speed:.0f} images/s')
    return {**{f'train_{name}': value for name, value in means.items()}, 'train_pictures_per_second': speed, 'lr': lr}


def _backward(loop: _Loop, loss: torch.Tensor, update: bool) -> None:
    config = loop.config
    parameters = loop.task.get_clip_parameters() if config.clip_grad is not None else None
    if loop.scaler is not None:
        loop.scaler(
            loss, loop.optimizer, clip_grad=config.clip_grad, clip_mode=config.clip_mode, parameters=parameters,
            need_update=update)
        return
    loss.backward()
    if update:
        if config.clip_grad is not None:
            dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
        loop.optimizer.step()


class _Meter:
    """Means of loss terms over an epoch, kept on the device: nothing waits for it until `read`."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0
        self.first_bad: torch.Tensor | None = None

    def add(self, result: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        accuracy = (result['output'].detach().argmax(dim=1) == labels).float().mean()
        for name, value in {**result, 'accuracy': accuracy}.items():
            if name != 'output':
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        bad = ~torch.isfinite(result['loss'].detach())
        step = torch.where(bad, self.count, -1)
        self.first_bad = step if self.first_bad is None else torch.where(self.first_bad >= 0, self.first_bad, step)
        self.count += 1

    def read(self, epoch: int) -> dict[str, float]:
        """Means so far; waits for the device."""
        if self.first_bad is not None and self.first_bad.item() >= 0:
            raise FloatingPointError(
                f'the loss became NaN or infinite in epoch {epoch} at step {self.first_bad.item()}; the last '
                'checkpoint is from before. Try a lower --lr, --clip-grad 10, or --no-amp')
        return {name: (total / self.count).item() for name, total in self.sums.items()}


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _model_args(config: TrainConfig) -> dict[str, Any]:
    args = dict(config.model_kwargs)
    if config.drop:
        args['drop_rate'] = config.drop
    if config.input_size:
        args.update(in_chans=config.input_size[0], img_size=tuple(config.input_size[1:]))
    return args


def _probe_model(config: TrainConfig, model_args: dict[str, Any]) -> dict[str, Any]:
    """The pretrained cfg of the model, built without weights or memory."""
    names = ', '.join(timm.list_models('vireid_*'))
    try:
        for args in ({}, model_args):
            model = timm.create_model(config.model, pretrained=False, device='meta', **args)
            if not isinstance(model, DualStreamResNet):
                raise ValueError(f'{config.model!r} is not a visible-infrared re-ID model; choose one of {names}')
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f'cannot create the model {config.model!r}: {error} (models of this library: {names})') from error
    return model.pretrained_cfg


def _create_model(config: TrainConfig, model_args: dict[str, Any], num_classes: int) -> nn.Module:
    try:
        model = timm.create_model(config.model, pretrained=config.pretrained, num_classes=num_classes, **model_args)
    except (RuntimeError, OSError) as error:
        raise ValueError(f'cannot load the weights of {config.model!r}: {error}') from error
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def _create_task(config: TrainConfig, model: nn.Module, device: torch.device) -> ViReIDTask:
    task = ViReIDTask(
        model, config.id_branches, config.mutual, config.global_weight, config.fusion_weight, config.triplet_weight,
        config.smoothing, device=device)
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    if config.torchcompile:
        task.compile()
    return task


def _backbone_lr_scale(config: TrainConfig) -> float:
    if config.backbone_lr_scale is not None:
        return config.backbone_lr_scale
    return 0.1 if config.pretrained else 1.0


def parameter_groups(model: nn.Module, backbone_lr_scale: float) -> list[dict[str, Any]]:
    """What was pretrained at a scaled learning rate (AGW's recipe), everything new at the full one.

    ImageNet weights fill stem and trunk; re-ID weights fill everything but the classifiers. The scale is timm's
    `lr_scale`, which its schedulers apply, warm-up included.
    """
    tag = model.pretrained_cfg.get('tag') or ''
    reid_weights = not tag.endswith('in1k')

    def is_pretrained(name: str) -> bool:
        return '.fc.' not in name if reid_weights else name.startswith(('stem.', 'layer'))

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {'params': [p for name, p in named if is_pretrained(name)], 'lr_scale': backbone_lr_scale},
        {'params': [p for name, p in named if not is_pretrained(name)], 'lr_scale': 1.0},
    ]


def _create_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, num_batches: int) -> tuple[Any, int]:
    return create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_milestones=config.decay_milestones,
        cooldown_epochs=config.cooldown_epochs,
        patience_epochs=config.patience_epochs,
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=0.1 * config.lr if config.warmup_lr is None else config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=not config.sched_on_updates,
        updates_per_epoch=-(-num_batches // config.grad_accum_steps),
    )


def _run_folder(config: TrainConfig, dataset: Dataset) -> Path:
    if config.resume:
        return Path(config.resume)
    model = config.model.rstrip('/').split('/')[-1].replace(':', '-')
    name = config.experiment or f'{datetime.datetime.now():%Y%m%d-%H%M%S}-{model}-{dataset.name}'
    folder = Path(config.output) / name
    if (folder / CONFIG).exists():
        raise ValueError(f'{folder} holds a run already; continue it with --resume {folder}, or choose another name')
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _log_start(
        folder: Path,
        config: TrainConfig,
        data: TrainData,
        model: nn.Module,
        size: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype | None,
) -> None:
    held_out = len(data.validation.test.identities()) if data.validation is not None else 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(
        f'{config.model}, {parameters / 1e6:.2f} M parameters, pictures {size[1]}x{size[2]}, on {device} in '
        f'{str(dtype or torch.float32).removeprefix("torch.")}')
    _logger.info(
        f'{len(data.records):,} pictures of {len(data.class_map):,} identities to train on, {held_out} held out for '
        f'validation; {len(data.sampler)} batches of {data.sampler.identities_per_batch} identities x '
        f'({config.pictures_per_modality} visible + {config.pictures_per_modality} infrared) per epoch')
    _logger.info(f'Everything goes to {folder}')


def _validate(
        config: TrainConfig,
        model: nn.Module,
        validation: Dataset,
        size: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype | None,
) -> Report:
    return evaluate(
        model, validation, device=device, size=size[1:], amp_dtype=dtype, cache=config.cache,
        skip_broken=config.skip_broken, workers=config.workers)


def _validation_row(report: Report) -> dict[str, float]:
    results = report.protocols.values()
    row = {
        f'eval_{metric}': sum(result.mean[metric] for result in results) / len(results)
        for metric in ('rank1', 'mAP', 'mINP')
    }
    _logger.info(f'validation: {", ".join(f"{name[5:]} {100 * value:.2f} %" for name, value in row.items())}')
    return row


def _keep_if_best(
        state: _Progress,
        folder: Path,
        config: TrainConfig,
        model: nn.Module,
        data: TrainData,
        row: dict[str, Any],
        report: Report | None,
        size: tuple[int, int, int],
        last: bool,
) -> None:
    """Save the model Hub-ready if the validation says so; without validation, after the last epoch."""
    mAP = row.get('eval_mAP')
    if mAP is None and not (last and data.validation is None):
        return
    if mAP is not None and state.best_mAP is not None and mAP <= state.best_mAP:
        return
    state.best_epoch, state.best_mAP = row['epoch'], mAP
    facts = {
        'dataset': data.dataset.name,
        'dataset_options': data.dataset.options,
        'identities': len(data.class_map),
        'epoch': row['epoch'],
        'validation': {name[5:]: value for name, value in row.items() if name.startswith('eval_')},
        'num_features': model.num_features,
        'training': asdict(config),
    }
    facts = json.loads(json.dumps(facts, default=str))
    table = '' if report is None else f'On held-out training identities (validation):\n\n{report}'
    save_model_folder(
        model, folder / BEST, facts=facts, model_args=_model_args(config), table=table, input_size=size)


def _checkpoint(
        state: _Progress,
        config: TrainConfig,
        task: ViReIDTask,
        optimizer: torch.optim.Optimizer,
        scaler: NativeScaler | None,
        class_map: dict[str, int],
) -> dict[str, Any]:
    return {
        'arch': config.model,
        'model_args': _model_args(config),
        'epoch': state.epoch,
        'progress': asdict(state),
        'optimizer': optimizer.state_dict(),
        'class_map': class_map,
        **task.get_checkpoint_state(),
        **(task.get_checkpoint_state(ema=True) if task.has_ema() else {}),
        **({'amp_scaler': scaler.state_dict()} if scaler is not None else {}),
    }


def _resume(
        folder: Path,
        config: TrainConfig,
        task: ViReIDTask,
        optimizer: torch.optim.Optimizer,
        scaler: NativeScaler | None,
) -> _Progress:
    checkpoint = load_checkpoint(folder)
    if checkpoint['arch'] != config.model:
        raise ValueError(f'{folder} holds a run of {checkpoint["arch"]}, which cannot go on as {config.model}')
    try:
        task.load_checkpoint_state(checkpoint['state_dict'])
        if task.has_ema():
            task.load_checkpoint_state(checkpoint['state_dict_ema'], ema=True)
        optimizer.load_state_dict(checkpoint['optimizer'])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f'the checkpoint in {folder} does not fit the settings: {error}') from error
    if scaler is not None and 'amp_scaler' in checkpoint:
        scaler.load_state_dict(checkpoint['amp_scaler'])
    _logger.info(f'Continuing {folder} after {checkpoint["epoch"]} epochs')
    progress = _Progress(**checkpoint['progress'])
    progress.summary = read_summary(folder)[:progress.epoch]
    return progress
