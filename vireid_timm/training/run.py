"""From settings to a run that is ready to train: data, network, task, optimiser, schedule."""

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.augment import Augment
from ..data.records import Dataset
from ..device import autocast_dtype
from ..distributed import on_primary, together
from ..models.dual_stream import DualStreamResNet
from ..run_folder import folder_of, has_checkpoint, holds_run
from .batches import TrainData, create_augments, load_data
from .config import TrainConfig
from .progress import summary_writer_type
from .task import ViReIDTask

_logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside weights and optimiser.

    Batches, augmentation and dropout follow from seed, epoch and step, so that no generator has a state to keep.

    Attributes:
        epoch: Epochs that are complete, validation included.
        step: Batches of the next epoch that are done; always between two optimiser steps.
        sums: Sums of the loss terms over these batches.
        row: The epoch's row of `summary.csv`, once all of its batches are done.
        best_epoch: Whose model was kept; -1 before there is one.
        best_mAP: Its mAP on the validation identities; None without validation.
        summary: Rows of the complete epochs.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    row: dict[str, Any] | None = None
    best_epoch: int = -1
    best_mAP: float | None = None
    summary: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
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
    progress: Progress = field(default_factory=Progress)

    @property
    def batches_per_epoch(self) -> int:
        return self.data.sampler.batches_per_epoch

    @property
    def updates_per_epoch(self) -> int:
        return _num_updates(self.batches_per_epoch, self.config)

    @property
    def num_updates(self) -> int:
        """Optimiser steps that are done."""
        return self.progress.epoch * self.updates_per_epoch + _num_updates(self.progress.step, self.config)

    @property
    def model(self) -> nn.Module:
        """The network that is trained, without the wrappers around it."""
        return self.task.get_eval_model()

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated and saved: with --model-ema the average."""
        return self.task.get_eval_model(ema=self.config.model_ema)


def set_up(config: TrainConfig, device: torch.device) -> Run:
    """Everything that training needs, from the settings; nothing is written but the image store.

    The initial weights are drawn from torch's global generators, which the caller seeds. Several processes make this
    call together.

    Args:
        config: The settings.
        device: Where to train.

    Raises:
        ValueError: A setting or data that cannot work; the text says which and what to do.
    """
    run = together(lambda: _set_up(config, device))
    run.folder = on_primary(lambda: run.folder)  # its name may hold the time
    run.task.prepare_distributed()
    return run


def _set_up(config: TrainConfig, device: torch.device) -> Run:
    """One process's share, in which it exchanges nothing with the others."""
    # Before the data are read: a wrong name or argument should not cost minutes.
    _check_settings(config)
    probe = _probe_model(config)
    create_scheduler(config, create_optimizer(config, probe, fused=False), num_batches=10**6)  # enough for any
    size = tuple(config.input_size or probe.pretrained_cfg['input_size'])
    data = load_data(config, size, device)
    folder = _run_folder(config, data.dataset)
    model = _create_model(config, len(data.class_map)).to(device)
    task = _create_task(config, model, device)
    dtype = autocast_dtype(device, config.amp, config.amp_dtype)
    scaler = NativeScaler(device.type) if dtype == torch.float16 else None
    # Fused SGD takes part of a step that the scaler skips: its momentum is lost, and the weights with it.
    optimizer = create_optimizer(config, model, fused=scaler is None)
    scheduler, num_epochs = create_scheduler(config, optimizer, data.sampler.batches_per_epoch)
    return Run(
        config,
        folder,
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


def _check_settings(config: TrainConfig) -> None:
    """Settings that do not go together, or not with what is there."""
    folder = Path(config.output) / config.experiment
    if config.experiment and not config.resume and holds_run(folder):
        if has_checkpoint(folder):
            way = f'continue it with --resume {folder}, or choose another name'
        else:
            way = 'its checkpoints are gone, so choose another name, or move that folder away'
        raise ValueError(f'{folder} holds a run already; {way}')
    if config.input_size and config.input_size[0] != 3:
        raise ValueError(
            f'--input-size is channels, height and width; images have 3 channels, not {config.input_size[0]}'
        )
    if config.sched == 'plateau':
        raise ValueError('--sched plateau would never decay here; choose multistep, cosine, wsd, ...')
    if config.cached_triplet and config.grad_accum_steps < 2:
        raise ValueError('--cached-triplet compares accumulated batches: give --grad-accum-steps 2 or more, too')
    if config.freeze_bn and not config.pretrained:
        raise ValueError('--freeze-bn keeps the statistics of pretrained weights: give --pretrained, too')
    if config.tensorboard:
        summary_writer_type()


def model_args(config: TrainConfig) -> dict[str, Any]:
    """Arguments of the model that the settings give in one way or another."""
    args = dict(config.model_kwargs)
    if config.drop:
        args['drop_rate'] = config.drop
    if config.input_size:
        args.update(in_chans=config.input_size[0], img_size=tuple(config.input_size[1:]))
    return args


def _probe_model(config: TrainConfig) -> DualStreamResNet:
    """The model, built without weights or memory."""
    names = ', '.join(timm.list_models('vireid_*'))
    try:
        for args in ({}, model_args(config)):
            model = timm.create_model(config.model, pretrained=False, device='meta', **args)
            if not isinstance(model, DualStreamResNet):
                raise ValueError(f'{config.model!r} is not a visible-infrared re-ID model; choose one of {names}')
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f'cannot create the model {config.model!r}: {error} (models of this library: {names})'
        ) from error
    return model


def _create_model(config: TrainConfig, num_classes: int) -> nn.Module:
    pretrained = config.pretrained and not config.resume  # the checkpoint has all weights
    try:
        model = timm.create_model(config.model, pretrained=pretrained, num_classes=num_classes, **model_args(config))
    except (RuntimeError, OSError) as error:
        raise ValueError(f'cannot load the weights of {config.model!r}: {error}') from error
    if pretrained and not _has_imagenet_weights(model):
        model.reset_classifier(num_classes)  # as many identities are not the same ones
        _logger.info(
            f'Weights of {config.model}: all but the classifiers, which are new, for the {num_classes} identities here'
        )
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
        gather_features=config.gather_features,
        device=device,
    )
    if config.sync_bn:
        task.convert_sync_batchnorm()
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    if config.torchcompile:
        task.compile()
    return task


def _has_imagenet_weights(model: nn.Module) -> bool:
    return (model.pretrained_cfg.get('tag') or '').endswith('in1k')


def _is_pretrained(model: nn.Module) -> Callable[[str], bool]:
    """Which names the weights of the model's tag fill: ImageNet's stem and trunk, re-ID's all but the classifiers."""
    if _has_imagenet_weights(model):
        return lambda name: name.startswith(('stem.', 'layer'))
    return lambda name: '.fc.' not in name


def frozen_norms(config: TrainConfig, model: nn.Module) -> list[nn.Module]:
    """The batch norms that keep their statistics: with --freeze-bn those that were loaded."""
    if not config.freeze_bn:
        return []
    is_pretrained = _is_pretrained(model)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and is_pretrained(name) and '_non_local.' not in name
    ]


def create_optimizer(config: TrainConfig, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """timm's optimiser of that name, in torch's fused form, if wanted, where there is one.

    Raises:
        ValueError: No such optimiser, not with these arguments, or not for this training loop.
    """

    def create(**options: Any) -> torch.optim.Optimizer:
        return create_optimizer_v2(
            parameter_groups(model, _backbone_lr_scale(config)),
            opt=config.opt,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            **options,
            **config.opt_kwargs,
        )

    fused = fused and not {'fused', 'foreach'} & set(config.opt_kwargs)
    try:
        try:
            optimizer = create(fused=True) if fused else create()
        except (TypeError, RuntimeError):  # fused: not this optimiser, or not on this device
            optimizer = create()
    except (TypeError, KeyError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(
            f'cannot create the optimiser {config.opt!r}: {error}; --opt is one of timm.optim.list_optimizers(), and '
            '--opt-kwargs are its arguments but lr, momentum and weight_decay, which have flags'
        ) from error
    if getattr(optimizer, 'is_second_order', False):
        raise ValueError(f'--opt {config.opt} needs second derivatives, which are not computed here; choose another')
    return optimizer


def _backbone_lr_scale(config: TrainConfig) -> float:
    if config.backbone_lr_scale is not None:
        return config.backbone_lr_scale
    return 0.1 if config.pretrained else 1.0


def parameter_groups(model: nn.Module, backbone_lr_scale: float) -> list[dict[str, Any]]:
    """What was pretrained at a scaled learning rate (AGW's recipe), everything new at the full one.

    The scale is timm's `lr_scale`, which its schedulers apply, warm-up included.
    """
    is_pretrained = _is_pretrained(model)
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
        updates_per_epoch=_num_updates(num_batches, config),
    )


def _num_updates(num_batches: int, config: TrainConfig) -> int:
    """Optimiser steps that so many batches of an epoch take; the last one may have fewer batches."""
    return -(-num_batches // config.grad_accum_steps)


def _run_folder(config: TrainConfig, dataset: Dataset) -> Path:
    if config.resume:
        return folder_of(config.resume)
    model = config.model.rstrip('/').split('/')[-1].replace(':', '-')
    name = config.experiment or f'{datetime.datetime.now():%Y%m%d-%H%M%S}-{model}-{dataset.name}'
    return Path(config.output) / name
