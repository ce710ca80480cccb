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
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler, dispatch_clip_grad
from tqdm import tqdm

from .augment import Augment
from .batches import TrainData, batches, create_augments, load_data
from .config import TrainConfig, load_yaml
from .device import autocast_dtype, resolve_device
from .evaluate import evaluate
from .files import save_json
from .hub import save_model_config, save_model_folder
from .models import DualStreamResNet
from .records import Dataset
from .report import Report
from .runs import (
    BEST,
    CLASS_MAP,
    CONFIG,
    LAST,
    MODEL_CONFIG,
    load_checkpoint,
    log_file,
    plot_curves,
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
        run = _set_up(config, device)
        run.folder.mkdir(parents=True, exist_ok=True)
        with log_file(run.folder):
            return _fit(run)


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


@dataclass
class _Progress:
    """What a resumed run has to know beside weights and optimiser. Batches and augmentation follow from the epoch."""

    epoch: int = 0
    best_epoch: int = -1
    best_mAP: float | None = None
    summary: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Run:
    """A run that has been set up."""

    config: TrainConfig
    folder: Path
    data: TrainData
    size: tuple[int, int, int]
    task: ViReIDTask
    augments: dict[str, Augment]
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    num_epochs: int
    device: torch.device
    dtype: torch.dtype | None
    scaler: NativeScaler | None
    progress: _Progress = field(default_factory=_Progress)

    @property
    def updates_per_epoch(self) -> int:
        return -(-self.data.sampler.batches_per_epoch // self.config.grad_accum_steps)

    @property
    def eval_model(self) -> nn.Module:
        return self.task.get_eval_model(ema=self.config.model_ema)


def _set_up(config: TrainConfig, device: torch.device) -> _Run:
    model_args = _model_args(config)
    # Before the data are read: a wrong name or argument should not cost minutes.
    pretrained_cfg = _probe_model(config, model_args)
    size = tuple(config.input_size or pretrained_cfg['input_size'])
    data = load_data(config, size)
    model = _create_model(config, model_args, len(data.class_map)).to(device)
    optimizer = create_optimizer_v2(
        parameter_groups(model, _backbone_lr_scale(config)),
        opt=config.opt,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        **config.opt_kwargs,
    )
    scheduler, num_epochs = create_scheduler(config, optimizer, data.sampler.batches_per_epoch)
    dtype = autocast_dtype(device, config.amp, config.amp_dtype)
    scaler = NativeScaler(device.type) if dtype == torch.float16 else None
    task = _create_task(config, model, device)
    run = _Run(
        config,
        _run_folder(config, data.dataset),
        data,
        size,
        task,
        create_augments(config, model),
        optimizer,
        scheduler,
        num_epochs,
        device,
        dtype,
        scaler,
    )
    if config.resume:
        _resume(run)
    return run


def _fit(run: _Run) -> TrainResult:
    config, folder, progress = run.config, run.folder, run.progress
    save_config(folder, {**asdict(config), 'resume': ''})
    save_json(folder / CLASS_MAP, run.data.class_map)
    save_model_config(run.eval_model, folder / MODEL_CONFIG, model_args=_model_args(config), input_size=run.size)
    _log_start(run)
    for epoch in range(progress.epoch, run.num_epochs):
        row = {'epoch': epoch, **train_one_epoch(run, epoch)}
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1)
        last = epoch + 1 == run.num_epochs
        report = None
        if run.data.validation is not None and (last or (epoch + 1) % config.val_interval == 0):
            report = _validate(run)
            row.update(_validation_row(report))
        if _is_best(progress, row, last and run.data.validation is None):
            progress.best_epoch, progress.best_mAP = epoch, row.get('eval_mAP')
            _save_best(run, row, report)
        progress.summary.append(row)
        progress.epoch = epoch + 1
        write_summary(folder, progress.summary)
        save_checkpoint(folder, _checkpoint(run))
    plot_curves(folder, progress.summary)
    _logger.info(f'Done: {folder} (best model in {folder / BEST}, from epoch {progress.best_epoch})')
    return TrainResult(folder, folder / BEST, progress.best_epoch, progress.best_mAP, progress.summary)


def train_one_epoch(run: _Run, epoch: int) -> dict[str, float]:
    """One pass over the sampler's batches.

    Returns:
        Means of loss, its terms and accuracy, prefixed `train_`, the pictures per second and the learning rate.

    Raises:
        FloatingPointError: A loss that is not finite.
    """
    config, task, optimizer = run.config, run.task, run.optimizer
    task.train()
    run.data.sampler.set_epoch(epoch)
    generator = torch.Generator(run.device).manual_seed(_epoch_seed(config.seed, epoch))
    torch.manual_seed(_epoch_seed(config.seed, epoch))  # dropout
    num_batches = len(run.data.sampler)
    accumulate = config.grad_accum_steps
    meter = _Meter()
    start = time.perf_counter()
    optimizer.zero_grad()
    bar = tqdm(batches(run.data, run.augments, run.device, generator), f'epoch {epoch}', num_batches, disable=None)
    for step, (inputs, labels, _) in enumerate(bar):
        # The last group of an epoch may be smaller than the others.
        group = min(accumulate, num_batches - step // accumulate * accumulate)
        update = step % accumulate == group - 1
        with nullcontext() if update else task.no_sync():
            with torch.autocast(run.device.type, dtype=run.dtype or torch.bfloat16, enabled=run.dtype is not None):
                result = task(inputs, labels)
            meter.add(result, labels)
            _backward(run, result['loss'] / group, update)
        if update:
            optimizer.zero_grad()
            num_updates = epoch * run.updates_per_epoch + step // accumulate + 1
            task.update_ema(step=num_updates)
            if run.scheduler is not None:
                run.scheduler.step_update(num_updates)
        if step % config.log_interval == 0 or step + 1 == num_batches:
            means = meter.read(epoch)
            speed = (step + 1) * len(labels) / (time.perf_counter() - start)
            bar.set_postfix({**{name: f'{value:.3g}' for name, value in means.items()}, 'images/s': f'{speed:.0f}'})
    lr = max(group['lr'] for group in optimizer.param_groups)
    _logger.info(
        f'epoch {epoch}: {" ".join(f"{name} {value:.4g}" for name, value in means.items())} '
        f'lr {lr:.3g}, {speed:.0f} images/s'
    )
    return {**{f'train_{name}': value for name, value in means.items()}, 'train_pictures_per_second': speed, 'lr': lr}


def _backward(run: _Run, loss: torch.Tensor, update: bool) -> None:
    config = run.config
    parameters = run.task.get_clip_parameters() if config.clip_grad is not None else None
    if run.scaler is not None:
        run.scaler(
            loss,
            run.optimizer,
            clip_grad=config.clip_grad,
            clip_mode=config.clip_mode,
            parameters=parameters,
            need_update=update,
        )
        return
    loss.backward()
    if update:
        if config.clip_grad is not None:
            dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
        run.optimizer.step()


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
                f'the loss became NaN or infinite in epoch {epoch} at step {self.first_bad.item()}; '
                'what was saved is from before. Try a lower --lr, --clip-grad 10, or --no-amp'
            )
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
            f'cannot create the model {config.model!r}: {error} (models of this library: {names})'
        ) from error
    return model.pretrained_cfg


def _create_model(config: TrainConfig, model_args: dict[str, Any], num_classes: int) -> nn.Module:
    pretrained = config.pretrained and not config.resume  # the checkpoint has all weights
    try:
        model = timm.create_model(config.model, pretrained=pretrained, num_classes=num_classes, **model_args)
    except (RuntimeError, OSError) as error:
        raise ValueError(f'cannot load the weights of {config.model!r}: {error}') from error
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def _create_task(config: TrainConfig, model: nn.Module, device: torch.device) -> ViReIDTask:
    task = ViReIDTask(
        model,
        config.id_branches,
        config.mutual,
        config.global_weight,
        config.fusion_weight,
        config.triplet_weight,
        config.smoothing,
        device=device,
    )
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


def create_scheduler(
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    num_batches: int,
) -> tuple[Scheduler | None, int]:
    """timm's scheduler of that name and the epochs that it takes; None for `none`."""
    return create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_milestones=config.decay_milestones,
        cooldown_epochs=config.cooldown_epochs,
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
    if (folder / LAST).exists():
        raise ValueError(f'{folder} holds a run already; continue it with --resume {folder}, or choose another name')
    return folder


def _log_start(run: _Run) -> None:
    config, data = run.config, run.data
    held_out = len(data.validation.test.identities()) if data.validation is not None else 0
    parameters = sum(parameter.numel() for parameter in run.task.parameters())
    precision = str(run.dtype or torch.float32).removeprefix('torch.')
    _logger.info(
        f'{config.model}, {parameters / 1e6:.2f} M parameters, pictures {run.size[1]}x{run.size[2]}, '
        f'on {run.device} in {precision}'
    )
    _logger.info(
        f'{len(data.records):,} pictures of {len(data.class_map):,} identities to train on, {held_out} held out for '
        f'validation; {len(data.sampler)} batches of {data.sampler.identities_per_batch} identities x '
        f'({config.pictures_per_modality} visible + {config.pictures_per_modality} infrared) per epoch'
    )
    _logger.info(f'Everything goes to {run.folder}')


def _validate(run: _Run) -> Report:
    return evaluate(
        run.eval_model,
        run.data.validation,
        device=run.device,
        size=run.size[1:],
        amp_dtype=run.dtype,
        cache=run.config.cache,
        skip_broken=run.config.skip_broken,
        workers=run.config.workers,
    )


def _validation_row(report: Report) -> dict[str, float]:
    results = report.protocols.values()
    row = {
        f'eval_{metric}': sum(result.mean[metric] for result in results) / len(results)
        for metric in ('rank1', 'mAP', 'mINP')
    }
    _logger.info(f'validation: {", ".join(f"{name[5:]} {100 * value:.2f} %" for name, value in row.items())}')
    return row


def _is_best(progress: _Progress, row: dict[str, Any], final: bool) -> bool:
    """Whether to keep this epoch's model: by its validation, or without one because it is the last."""
    mAP = row.get('eval_mAP')
    if mAP is None:
        return final
    return progress.best_mAP is None or mAP > progress.best_mAP


def _save_best(run: _Run, row: dict[str, Any], report: Report | None) -> None:
    facts = {
        'dataset': run.data.dataset.name,
        'dataset_options': run.data.dataset.options,
        'identities': len(run.data.class_map),
        'epoch': row['epoch'],
        'validation': {name[5:]: value for name, value in row.items() if name.startswith('eval_')},
        'num_features': run.eval_model.num_features,
        'training': asdict(run.config),
    }
    save_model_folder(
        run.eval_model,
        run.folder / BEST,
        facts=json.loads(json.dumps(facts, default=str)),  # data roots may be paths
        model_args=_model_args(run.config),
        table='' if report is None else f'On held-out training identities (validation):\n\n{report}',
        input_size=run.size,
    )


def _checkpoint(run: _Run) -> dict[str, Any]:
    return {
        'arch': run.config.model,
        'class_map': run.data.class_map,
        'epoch': run.progress.epoch,
        'progress': asdict(run.progress),
        'optimizer': run.optimizer.state_dict(),
        **run.task.get_checkpoint_state(),
        **(run.task.get_checkpoint_state(ema=True) if run.task.has_ema() else {}),
        **({run.scaler.state_dict_key: run.scaler.state_dict()} if run.scaler is not None else {}),
    }


def _resume(run: _Run) -> None:
    """Put the state of the run's last checkpoint into model, averages, optimiser, schedule and scaler."""
    checkpoint = load_checkpoint(run.folder)
    if checkpoint['arch'] != run.config.model:
        raise ValueError(f'{run.folder} holds a run of {checkpoint["arch"]}, which cannot go on as {run.config.model}')
    if checkpoint['class_map'] != run.data.class_map:
        raise ValueError(f'the training identities are not those that {run.folder} was started with')
    try:
        run.task.load_checkpoint_state(checkpoint['state_dict'])
        if run.task.has_ema():
            run.task.load_checkpoint_state(checkpoint['state_dict_ema'], ema=True)
        run.optimizer.load_state_dict(checkpoint['optimizer'])
        if run.scaler is not None:
            run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f'the checkpoint in {run.folder} does not fit the settings: {error}') from error
    run.progress = _Progress(**checkpoint['progress'])
    if run.scheduler is not None:  # one of the two acts, by what the schedule counts
        run.scheduler.step(run.progress.epoch)
        run.scheduler.step_update(run.progress.epoch * run.updates_per_epoch)
    _logger.info(f'Continuing {run.folder} after {run.progress.epoch} epochs')
