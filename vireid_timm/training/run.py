"""From settings to a run that is ready to train: data, network, task, optimiser, schedule."""

import datetime
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler
from torch.nn.modules.batchnorm import _BatchNorm

from ..constants import INFRARED, VISIBLE
from ..data.augment import Augment
from ..data.readers import create_dataset, split_identities
from ..data.records import Dataset, Records, class_map_of
from ..data.sampler import IdentityModalitySampler
from ..data.store import ImageStore, disk_problem, image_store
from ..device import autocast_dtype
from ..distributed import all_ranks, rank_and_world_size
from ..hub.folder import resolve_model_name
from ..hub.provenance import known_facts
from ..models.branches import DualStream
from ..options import check_kinds, parse_augmentations
from ..run_folder import LAST, PREVIOUS, folder_of, has_checkpoint, holds_run
from ..text import format_bytes
from .config import TrainConfig
from .graph import StepGraph, why_no_graph
from .progress import summary_writer_type
from .task import ViReIDTask

_logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """How far a run is: what a checkpoint holds besides weights and optimiser.

    Batches, augmentation and dropout follow from seed, epoch and step, so no generator has a state to save.

    Attributes:
        step: Batches of the current epoch that are done; always between two optimiser steps.
        sums: Sums of the loss terms over these batches.
        row: The current epoch's row of the table, once all of its batches are done.
        summary: The table of complete epochs, as in `summary.csv`.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    row: dict[str, Any] | None = None
    summary: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Number of complete epochs, which is the number of the current one."""
        return len(self.summary)

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the epoch with the best mAP, the first of equals; of the last epoch if none was validated."""
        validated = [row for row in self.summary if 'eval_mAP' in row]
        return max(validated, key=lambda row: row['eval_mAP']) if validated else next(reversed(self.summary), None)


@dataclass
class TrainData:
    """The images of a run.

    Attributes:
        dataset: As read.
        records: Images to train on, those that can be read.
        store: Their pixels; row i of the store is row i of `records`.
        labels: Class label of each, [N] long; -1 for identities that batches skip.
        class_map: Identity name -> class label.
        sampler: Batches of rows.
        validation: Held-out identities as a dataset of their own; None if there are none.
        validation_store: Their pixels.
        broken: What is wrong with each image that is skipped because it cannot be read.
        digest: Of names, identities and modalities of the images to train on, wherever they are: 12 digits.
    """

    dataset: Dataset
    records: Records
    store: ImageStore
    labels: torch.Tensor
    class_map: dict[str, int]
    sampler: IdentityModalitySampler
    validation: Dataset | None
    validation_store: ImageStore
    broken: list[str]
    digest: str


@dataclass
class Run:
    """A run that has been set up."""

    config: TrainConfig
    folder: Path
    data: TrainData
    input_size: tuple[int, int, int]
    task: ViReIDTask
    augments: dict[str, Augment]
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    num_epochs: int
    device: torch.device
    amp_dtype: torch.dtype | None
    scaler: NativeScaler | None
    graph: StepGraph | None = None
    state: TrainState = field(default_factory=TrainState)

    @property
    def batches_per_epoch(self) -> int:
        return self.data.sampler.batches_per_epoch

    @property
    def updates_per_epoch(self) -> int:
        return _num_updates(self.batches_per_epoch, self.config)

    @property
    def num_updates(self) -> int:
        """Number of optimiser steps that are done."""
        return self.state.epoch * self.updates_per_epoch + _num_updates(self.state.step, self.config)

    @property
    def is_last_epoch(self) -> bool:
        return self.state.epoch + 1 == self.num_epochs

    @property
    def precision(self) -> str:
        return str(self.amp_dtype or torch.float32).removeprefix('torch.')

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def model(self) -> nn.Module:
        """The network that is trained, without the wrappers around it."""
        return self.task.get_eval_model()

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated and saved: with --model-ema the average."""
        return self.task.get_eval_model(ema=self.config.model_ema)


def run_folder_of(config: TrainConfig) -> Path:
    """Return the folder of the run that the settings describe; the name of a new one may hold the time."""
    if config.resume:
        return folder_of(config.resume)
    model = config.model.rstrip('/').split('/')[-1].replace(':', '-')
    return Path(config.output) / (
        config.experiment or f'{datetime.datetime.now():%Y%m%d-%H%M%S}-{model}-{config.dataset}'
    )


def create_run(config: TrainConfig, folder: Path, device: torch.device) -> Run:
    """Create everything that training needs; writes nothing but the image store. Collective.

    The initial weights are drawn from torch's global generators, which the caller seeds.

    Args:
        config: The settings.
        folder: The run's folder.
        device: Where to train.

    Raises:
        ValueError: A setting or data that cannot work; the message says which and what to do.
    """
    run = all_ranks(lambda: _create_run(config, folder, device))
    run.task.prepare_distributed()
    return run


def _create_run(config: TrainConfig, folder: Path, device: torch.device) -> Run:
    # Before the data are read: a wrong name or argument should not cost minutes.
    refuse_existing_run(config, folder)
    _check_settings(config)
    probe = _probe_model(config)
    optimizer = create_optimizer(config, probe, fused=False)
    create_scheduler(config, optimizer, updates_per_epoch=10**6)
    _check_room(config, folder, probe, optimizer)
    size = tuple(config.input_size or probe.pretrained_cfg['input_size'])
    data = load_data(config, size, device)
    model = _create_model(config, len(data.class_map)).to(device)
    task = _create_task(config, model, device)
    amp_dtype = autocast_dtype(device, config.amp, config.amp_dtype)
    scaler = NativeScaler(device.type) if amp_dtype == torch.float16 else None
    # Not fused with a scaler: where it skips a step, fused SGD has already changed the momentum.
    optimizer = create_optimizer(config, model, fused=scaler is None)
    updates_per_epoch = _num_updates(data.sampler.batches_per_epoch, config)
    scheduler, num_epochs = create_scheduler(config, optimizer, updates_per_epoch)
    run = Run(
        config=config,
        folder=folder,
        data=data,
        input_size=size,
        task=task,
        augments=create_augments(config, model),
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        device=device,
        amp_dtype=amp_dtype,
        scaler=scaler,
    )
    reason = why_no_graph(config, optimizer, device, scaled=scaler is not None)
    if not reason:
        run.graph = StepGraph(optimizer, device)
    elif device.type == 'cuda':
        _logger.info(f'Steps do not become a CUDA graph: {reason}')
    _warn_of_traps(run)
    return run


def _num_updates(num_batches: int, config: TrainConfig) -> int:
    """Return the optimiser steps for that many batches of an epoch; the last one may have fewer batches."""
    return -(-num_batches // config.grad_accum_steps)


def refuse_existing_run(config: TrainConfig, folder: Path) -> None:
    """Refuse a new run in a folder that holds one."""
    if config.resume or not holds_run(folder):
        return
    if has_checkpoint(folder):
        fix = f'resume it with --resume {folder}, or choose another name'
    else:
        fix = 'its checkpoints are gone, so choose another name, or move that folder away'
    raise ValueError(f'{folder} holds a run already; {fix}')


def _warn_of_traps(run: Run) -> None:
    """Log what is no error, but hardly what anyone wants."""
    config, (_, height, width) = run.config, run.input_size
    people = len(run.data.class_map)
    if people == 1:
        _logger.warning('There is one identity to train on: nothing can be learned without others')
    elif run.data.sampler.identities_per_batch * rank_and_world_size()[1] == 1:
        _logger.warning(
            '--identities-per-batch 1: batches without different identities teach little, and the triplet loss nothing'
        )
    if config.pretrained and not (config.freeze_bn or config.resume or config.pretrained_path):
        trained = known_facts(resolve_model_name(config.model))[1].get('training') or {}
        if trained.get('freeze_bn'):
            _logger.warning(
                f'The weights of {config.model} were trained with frozen batch norm; without --freeze-bn its '
                'statistics are replaced, which can cost most of what they know'
            )
    if run.scheduler is not None and config.warmup_epochs >= run.num_epochs:
        _logger.warning(
            f'The warm-up of {config.warmup_epochs} epochs does not end within the {run.num_epochs} epochs of the run; '
            'give fewer --warmup-epochs'
        )
    if width > height:
        _logger.warning(
            f'--input-size: images of height {height} and width {width} show people lying down; the order is channels, '
            'height, width'
        )
    if config.pad > 0.1 * min(height, width):
        _logger.warning(
            f'--pad {config.pad} moves images of {height}x{width} by more than a tenth of their size; '
            f'--pad {round(0.07 * min(height, width))} suits them'
        )


def _check_settings(config: TrainConfig) -> None:
    """Refuse settings that contradict each other."""
    if config.input_size and config.input_size[0] != 3:
        raise ValueError(
            f'--input-size is channels, height and width; images have 3 channels, not {config.input_size[0]}'
        )
    for name in {'num_classes', 'pretrained', 'device', 'dtype'} & set(config.model_kwargs):
        raise ValueError(f'--model-kwargs {name}: training chooses it; leave it out')
    if config.decay_milestones != sorted(config.decay_milestones):
        raise ValueError(f'--decay-milestones have to rise, got {" ".join(map(str, config.decay_milestones))}')
    if config.sched == 'plateau':
        raise ValueError('--sched plateau would never decay here; choose multistep, cosine, wsd, ...')
    if config.cached_triplet and config.grad_accum_steps < 2:
        raise ValueError('--cached-triplet compares accumulated batches: give --grad-accum-steps 2 or more, too')
    if config.cre_fill and 'cre' not in parse_augmentations(config.augment):
        raise ValueError('--cre-fill is what the augmentation cre fills in: name cre in --augment, too')
    if config.freeze_bn and not config.pretrained:
        raise ValueError('--freeze-bn keeps the statistics of pretrained weights: give --pretrained, too')
    if config.pretrained_path and not config.pretrained:
        raise ValueError('--pretrained-path is the file that --pretrained loads: give --pretrained, too')
    if config.pretrained_path and not config.resume and not Path(config.pretrained_path).is_file():
        raise ValueError(f'--pretrained-path: there is no file {config.pretrained_path}')
    if config.tensorboard:
        summary_writer_type()


def _check_room(config: TrainConfig, folder: Path, probe: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a run folder that cannot be written, or on a disk that is too full for the run's checkpoints.

    A run keeps two of them, and writes a third before it drops the oldest. The sizes are lower bounds: the classifiers
    are not in the probe, and optimisers may keep more than one value per weight.
    """
    weights = sum(tensor.nbytes for tensor in probe.state_dict().values())
    has_state = bool(optimizer.defaults.get('momentum') or 'betas' in optimizer.defaults)
    checkpoint = weights * (1 + has_state + config.model_ema)
    new = 3 - sum((folder / name).exists() for name in (LAST, PREVIOUS))
    problem = disk_problem(folder, new * checkpoint)
    if problem is not None:
        raise ValueError(
            f'cannot train in {folder}: {problem.strerror}; checkpoints take at least {format_bytes(checkpoint)} each, '
            f'and there has to be room for {new}; make room or choose another --output'
        )


def load_data(config: TrainConfig, size: tuple[int, int, int], device: torch.device) -> TrainData:
    """Read the records, hold out validation identities, decode the images and set up the sampler.

    Args:
        config: The settings.
        size: Channels, height and width of the network's input.
        device: Where batches will be needed.

    Raises:
        ValueError: Data that cannot be trained on.
        OSError: The image store cannot be written.
    """
    rank, world_size = rank_and_world_size()
    dataset = create_dataset(config.dataset, config.data_dir or None, **config.dataset_kwargs)
    records, held_out = split_identities(dataset.train, config.val_share, config.seed)
    # One store for every --seed and --val-share: images held out by one are trained on with another.
    store = image_store(
        dataset.train,
        size[1:],
        cache=config.cache,
        device=device,
        skip_broken=config.skip_broken,
        workers=config.workers,
        others=dataset.test if rank == 0 else None,
    )
    is_held_out = np.isin(dataset.train.identity, held_out.identities())
    intact = np.isin(np.arange(len(store)), store.intact())
    records = records[intact[~is_held_out]]
    sampler = IdentityModalitySampler(
        records.identity,
        records.modality,
        identities_per_batch=config.identities_per_batch,
        images_per_modality=config.images_per_modality,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )
    class_map = class_map_of(records[~np.isin(records.identity, sampler.skipped)])
    return TrainData(
        dataset=dataset,
        records=records,
        store=store.select(np.flatnonzero(intact & ~is_held_out)),
        labels=torch.tensor([class_map.get(name, -1) for name in records.identity.tolist()]),
        class_map=class_map,
        sampler=sampler,
        validation=Dataset('validation', dataset.root, records[:0], held_out) if len(held_out) else None,
        validation_store=store.select(np.flatnonzero(is_held_out)),
        broken=list(store.broken.values()),
        digest=_digest(records),
    )


def _digest(records: Records) -> str:
    names = [Path(path).name for path in records.path.tolist()]
    columns = (names, records.identity.tolist(), records.modality.tolist())
    text = '\n'.join('\n'.join(column) for column in columns)
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:12]


def model_args(config: TrainConfig) -> dict[str, Any]:
    """Return the model's arguments that the settings give in one way or another."""
    args = dict(config.model_kwargs)
    if config.drop:
        args['drop_rate'] = config.drop
    if config.input_size:
        args.update(in_chans=config.input_size[0], img_size=tuple(config.input_size[1:]))
    return args


def _probe_model(config: TrainConfig) -> DualStream:
    """Create the model on the meta device: without weights and without memory."""
    name, args = resolve_model_name(config.model), model_args(config)
    known = timm.list_models('vireid_*')
    names = f'models of this library: {", ".join(known)}'
    if timm.is_model(name.partition('.')[0]) and name.partition('.')[0] not in known:
        raise ValueError(f'{config.model!r} is not a visible-infrared re-ID model; {names}')
    try:
        check_kinds(args, [timm.create_model], 'argument ')
        model = timm.create_model(name, pretrained=False, device='meta', **args)
    except Exception as error:  # wrong arguments make timm and torch raise any type
        hint = f'; check --model-kwargs ({names})' if args else f' ({names})'
        raise ValueError(f'cannot create the model {config.model!r}: {error}{hint}') from error
    if not isinstance(model, DualStream):
        raise ValueError(f'{config.model!r} is not a visible-infrared re-ID model; {names}')
    return model


def _create_model(config: TrainConfig, num_classes: int) -> nn.Module:
    pretrained = config.pretrained and not config.resume  # the checkpoint has all weights
    name, args = resolve_model_name(config.model), model_args(config)
    if config.pretrained_path:
        args['pretrained_cfg_overlay'] = {'file': config.pretrained_path}
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **args)
    except (RuntimeError, OSError) as error:
        source = config.pretrained_path or f'the weights of {config.model!r}'
        raise ValueError(f'cannot load {source}: {error}') from error
    if pretrained and not model.starts_from_backbone:
        model.reset_classifier(num_classes)  # even as many identities are other ones
        _logger.info(
            f'Weights of {config.model} loaded, except for the classifiers: these are new, for {num_classes} identities'
        )
    if not config.pretrained and not config.resume:
        cfg = model.pretrained_cfg
        own = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
        if not cfg.get('file'):  # the weights of its tag are not in the package
            own = getattr(model, 'backbone', own)
        _logger.info(
            f'The weights start at random, which takes many images and epochs: --pretrained starts from {own}, '
            '--config fine_tune from a small model that knows the task'
        )
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def _create_task(config: TrainConfig, model: nn.Module, device: torch.device) -> ViReIDTask:
    task = ViReIDTask(
        model,
        id_branches=config.id_branches,
        mutual=config.mutual,
        global_weight=config.global_weight,
        fusion_weight=config.fusion_weight,
        mutual_constant=config.mutual_constant,
        loss=config.loss,
        smoothing=config.smoothing,
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


def create_augments(config: TrainConfig, model: nn.Module) -> dict[str, Augment]:
    """Return the training augmentation of each modality, with the model's own normalisation."""
    data_config = resolve_model_data_config(model)
    return {
        modality: Augment(
            modality,
            data_config['mean'],
            data_config['std'],
            pad=config.pad,
            flip=config.hflip,
            augmentations=config.augment,
            cre_fill='random' if config.cre_fill is None else config.cre_fill,
        )
        for modality in (VISIBLE, INFRARED)
    }


def _is_pretrained(model: nn.Module) -> Callable[[str], bool]:
    """Return a test for the parameters that pretrained weights cover: stem and trunk, or all but the classifiers."""
    if model.starts_from_backbone:
        return lambda name: name.startswith(model.pretrained_prefixes)
    return lambda name: '.fc.' not in name


def frozen_norms(config: TrainConfig, model: nn.Module) -> list[nn.Module]:
    """Return the batch norms that keep their statistics: with --freeze-bn those that were loaded."""
    if not config.freeze_bn:
        return []
    is_pretrained = _is_pretrained(model)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and is_pretrained(name) and '_non_local.' not in name
    ]


def create_optimizer(config: TrainConfig, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """Create timm's optimiser of that name, in torch's fused form where there is one.

    Raises:
        ValueError: No such optimiser, not with these arguments, or not usable here.
    """
    scale = config.backbone_lr_scale if config.backbone_lr_scale is not None else 0.1 if config.pretrained else 1.0
    fused = fused and not {'fused', 'foreach'} & set(config.opt_kwargs)
    try:
        check_kinds(config.opt_kwargs, [create_optimizer_v2, get_optimizer_class(config.opt.split('_')[-1], False)])
        create = partial(create_optimizer_v2, **optimizer_kwargs(config), **config.opt_kwargs)
        try:
            optimizer = create(parameter_groups(model, scale), **({'fused': True} if fused else {}))
        except (TypeError, RuntimeError):  # not fused: this optimiser, or this device
            optimizer = create(parameter_groups(model, scale))
    except Exception as error:  # wrong arguments make timm and torch raise any type
        raise ValueError(
            f'cannot create the optimiser {config.opt!r}: {error}; --opt is one of timm.optim.list_optimizers(), and '
            '--opt-kwargs are its arguments except lr, momentum and weight_decay, which have flags'
        ) from error
    if getattr(optimizer, 'is_second_order', False):
        raise ValueError(f'--opt {config.opt} needs second derivatives, which are not computed here; choose another')
    return optimizer


def parameter_groups(model: nn.Module, backbone_lr_scale: float) -> list[dict[str, Any]]:
    """Return two groups: pretrained parameters at a scaled learning rate (AGW's recipe), new ones at the full rate.

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
    updates_per_epoch: int,
) -> tuple[Scheduler | None, int]:
    """Create timm's scheduler of that name, None for `none`, and return it with the number of epochs that it takes."""
    kwargs = scheduler_kwargs(config)
    if config.warmup_lr is None:
        kwargs['warmup_lr'] = 0.1 * config.lr
    return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
