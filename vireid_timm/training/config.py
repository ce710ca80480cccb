"""The settings of a training run: one dataclass, from which the command line, YAML files and `train()` all read.

Names and meanings are those of timm's `train.py` wherever it has them. The defaults are the paper's recipe for
SYSU-MM01 and RegDB (section 4.2) and, where the paper is silent, AGW's (arXiv:2001.04193).
"""

import argparse
import dataclasses
import difflib
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml
from timm.utils import ParseKwargs

from ..data.store import CACHES
from ..loss.mutual_learning import MUTUAL_LEARNING_MODES
from .task import DIST_BN

_BOUNDS = {'minimum': ('at least', operator.ge), 'above': ('above', operator.gt), 'maximum': ('at most', operator.le)}


def _setting(default: Any, group: str, text: str, **argument: Any) -> Any:
    """A dataclass field that carries its help text, what argparse needs beyond its type, and bounds of its values."""
    metadata = {'group': group, 'help': text, **argument}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Settings of `vireid_timm.train`; see `vireid train --help` for every one of them."""

    dataset: str = _setting('folder', 'data', 'reader: folder, csv, sysu_mm01, regdb, llcm or synthetic')
    data_dir: str = _setting('', 'data', 'root folder of the data (the file itself for csv)')
    dataset_kwargs: dict[str, Any] = _setting({}, 'data', 'options of the reader, e.g. trial=3 for regdb')
    val_share: float = _setting(0.1, 'data', 'share of the training identities held out to choose the best epoch')
    skip_broken: bool = _setting(False, 'data', 'leave out images that cannot be read instead of stopping')
    cache: str = _setting('auto', 'data', 'where decoded images are kept', choices=CACHES)
    identities_per_batch: int | None = _setting(None, 'data', 'P of a batch; 8 or all there are if unset', minimum=1)
    images_per_modality: int = _setting(4, 'data', 'K of a batch: images per identity and modality', minimum=1)
    workers: int | None = _setting(
        None, 'data', 'images decoded at a time; one per core, at most 8, if unset', minimum=0
    )

    model: str = _setting('vireid_dml_r50', 'model', 'name of the model, local-dir:FOLDER or hf-hub:OWNER/NAME')
    pretrained: bool = _setting(False, 'model', "start from the weights of the model's tag")
    model_kwargs: dict[str, Any] = _setting({}, 'model', 'arguments of the model, e.g. spatial_weights=static')
    input_size: list[int] | None = _setting(
        None, 'model', "channels, height and width; the model's default if unset", nargs=3, minimum=1
    )
    drop: float = _setting(0.0, 'model', 'dropout before the classifiers', minimum=0, maximum=1)
    grad_checkpointing: bool = _setting(False, 'model', 'recompute activations to save memory')
    freeze_bn: bool = _setting(
        False, 'model', 'batch norm keeps the statistics that were loaded: for fine-tuning on few images'
    )

    id_branches: list[str] | None = _setting(
        None, 'loss', 'branches with an identity loss; all if unset (L_id of table 3)', nargs='+'
    )
    mutual: str = _setting(
        'joint-to-both', 'loss', 'pairs that learn from each other (table 4)', choices=tuple(MUTUAL_LEARNING_MODES)
    )
    global_weight: float = _setting(
        0.6, 'loss', 'theta_1, the weight of joint-global mutual learning (eq. 9)', minimum=0
    )
    fusion_weight: float = _setting(
        1.8, 'loss', 'theta_2, the weight of joint-fusion mutual learning (eq. 10)', minimum=0
    )
    triplet_weight: float = _setting(
        1.0, 'loss', 'weight of the weighted regularised triplet loss (eq. 13: 1)', minimum=0
    )
    smoothing: float = _setting(0.0, 'loss', 'label smoothing of the identity losses', minimum=0, maximum=1)

    pad: int = _setting(10, 'augmentation', 'black border before the random crop, in pixels', minimum=0)
    hflip: float = _setting(0.5, 'augmentation', 'probability of the horizontal flip', minimum=0, maximum=1)
    channel_combination: bool = _setting(True, 'augmentation', 'random combination of channels on visible images')
    reprob: float = _setting(0.5, 'augmentation', 'probability of channel random erasing', minimum=0, maximum=1)
    erasing_fill: list[float] | None = _setting(
        None, 'augmentation', 'fixed fill of the erased channels, normalised; random if unset', nargs=3
    )

    opt: str = _setting('sgd', 'optimiser', "any of timm's optimisers but adahessian")
    lr: float = _setting(0.1, 'optimiser', 'learning rate of everything new', minimum=0)
    backbone_lr_scale: float | None = _setting(
        None, 'optimiser', 'factor on lr for what was pretrained; 0.1 with pretrained weights, else 1', minimum=0
    )
    momentum: float = _setting(0.9, 'optimiser', 'momentum', minimum=0, maximum=1)
    weight_decay: float = _setting(5e-4, 'optimiser', 'weight decay, on every parameter', minimum=0)
    opt_kwargs: dict[str, Any] = _setting({}, 'optimiser', 'further arguments of the optimiser')
    clip_grad: float | None = _setting(None, 'optimiser', 'clip gradients at this value', above=0)
    clip_mode: str = _setting('norm', 'optimiser', 'what is clipped', choices=('norm', 'value', 'agc'))
    grad_accum_steps: int = _setting(1, 'optimiser', 'batches per optimiser step', minimum=1)

    sched: str = _setting('multistep', 'schedule', "any of timm's schedulers but plateau, which timm is giving up")
    epochs: int = _setting(80, 'schedule', 'epochs to train', minimum=1)
    decay_milestones: list[int] = _setting(
        [21, 51], 'schedule', 'multistep: timm decays one epoch before each, here at 20 and 50', nargs='+', minimum=1
    )
    decay_rate: float = _setting(0.1, 'schedule', 'factor of each decay', minimum=0)
    decay_epochs: float | None = _setting(
        None, 'schedule', "step: epochs between decays; wsd, rsqrt: length of the decay; timm's if unset", minimum=0
    )
    warmup_epochs: int = _setting(9, 'schedule', 'epochs of linear warm-up', minimum=0)
    warmup_lr: float | None = _setting(None, 'schedule', 'where the warm-up starts; a tenth of lr if unset', minimum=0)
    min_lr: float = _setting(0.0, 'schedule', 'lower bound of cyclic schedules', minimum=0)
    cooldown_epochs: int = _setting(0, 'schedule', 'epochs at min_lr at the end', minimum=0)
    sched_on_updates: bool = _setting(False, 'schedule', 'advance the schedule after each step, not each epoch')

    device: str = _setting('cuda', 'device', 'falls back to the CPU, saying so')
    amp: bool | None = _setting(None, 'device', 'mixed precision; unset: where the device is fast at it')
    amp_dtype: str = _setting('bfloat16', 'device', 'type of mixed precision', choices=('bfloat16', 'float16'))
    channels_last: bool = _setting(True, 'device', 'memory format')
    torchcompile: bool = _setting(False, 'device', 'compile the network')

    gather_features: bool = _setting(
        False, 'scale', 'the triplet loss compares the images of all processes (torchrun), not those of each'
    )
    cached_triplet: bool = _setting(
        False, 'scale', 'the triplet loss compares the images of all batches of --grad-accum-steps'
    )
    sync_bn: bool = _setting(False, 'scale', 'batch norm over the batches of all processes')
    dist_bn: str = _setting(
        'reduce',
        'scale',
        'running statistics of several processes: their mean, or those of one',
        choices=DIST_BN,
    )

    model_ema: bool = _setting(False, 'averaging', 'keep, evaluate and save an average of the weights')
    model_ema_decay: float = _setting(0.9998, 'averaging', 'its decay per step', minimum=0, maximum=1)
    model_ema_warmup: bool = _setting(False, 'averaging', 'raise the decay from 0 at the start')

    seed: int = _setting(42, 'run', 'decides initial weights, batches and augmentation', minimum=0)
    val_interval: int = _setting(5, 'run', 'epochs between validations; the last is always validated', minimum=1)
    log_interval: int = _setting(50, 'run', 'steps between lines of progress', minimum=1)
    tensorboard: bool = _setting(False, 'run', 'also write curves for TensorBoard (needs the extra `tensorboard`)')
    checkpoint_interval: str = _setting(
        '30m',
        'run',
        'optimiser steps (500) or minutes (10m) between checkpoints within an epoch; there is one after every epoch',
        pattern=r'|[1-9]\d*|(?=.*[1-9])\d+(\.\d+)?m',
        example='500, 10m, or nothing for none',
    )
    output: str = _setting('output/train', 'run', 'where run folders go')
    experiment: str = _setting('', 'run', 'name of the run folder; time, model and data if unset')
    resume: str = _setting(
        '',
        'run',
        'run folder to continue, or its previous.pth; auto: that of --experiment, or a new run if it has none',
    )
    deterministic: bool = _setting(
        False, 'run', 'the same weights again on the same machine, where torch can; slower on a GPU'
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = 'configuration') -> 'TrainConfig':
        """Build from settings by name.

        Args:
            values: Setting -> value; dashes in names count as underscores.
            source: Where they come from, for errors.

        Raises:
            ValueError: A setting that does not exist, or a value of the wrong type.
        """
        return cls(**checked_settings(values, source))


SETTINGS = {setting.name: setting for setting in dataclasses.fields(TrainConfig)}


def checked_settings(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings with their names normalised and their types checked."""
    checked = {}
    for key, value in values.items():
        name = str(key).replace('-', '_')
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f'; did you mean {near[0]!r}?' if near else ''
            raise ValueError(f'{source}: there is no setting {key!r}{hint}')
        checked[name] = _checked_value(SETTINGS[name], value, source)
    return checked


def _checked_value(setting: dataclasses.Field, value: Any, source: str) -> Any:
    kind, optional = _kind(setting)
    where, metadata = f'{source}: {setting.name}', setting.metadata
    if value is None:
        if not optional:
            raise ValueError(f'{where} needs a value')
        return None
    if get_origin(kind) is list:
        (element,), count = get_args(kind), metadata['nargs']
        if not isinstance(value, (list, tuple)) or (count != '+' and len(value) != count):
            number = 'a list of' if count == '+' else f'a list of {count}'
            raise ValueError(f'{where} must be {number} {element.__name__} values, got {value!r}')
        return [_checked_single(entry, element, metadata, where) for entry in value]
    return _checked_single(value, kind, metadata, where)


def _kind(setting: dataclasses.Field) -> tuple[Any, bool]:
    """The type of a setting's values, and whether it may be unset."""
    kinds = get_args(setting.type) if isinstance(setting.type, UnionType) else (setting.type,)
    return kinds[0], NoneType in kinds


def _checked_single(value: Any, kind: Any, metadata: Mapping[str, Any], where: str) -> Any:
    kind = get_origin(kind) or kind
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = _as_float(value)  # YAML reads 5e-4 as text
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # YAML reads 500 as a number
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f'{where} must be of type {kind.__name__}, got {value!r}')
    for bound, (text, holds) in _BOUNDS.items():
        if bound in metadata and not holds(value, metadata[bound]):
            raise ValueError(f'{where} must be {text} {metadata[bound]}, got {value}')
    if 'pattern' in metadata and not re.fullmatch(metadata['pattern'], value):
        raise ValueError(f'{where} must be {metadata["example"]}, got {value!r}')
    if 'choices' in metadata and value not in metadata['choices']:
        raise ValueError(f'{where} must be one of {", ".join(metadata["choices"])}, got {value!r}')
    return value


def _as_float(value: int | str) -> float | int | str:
    try:
        return float(value)
    except ValueError:
        return value


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file, checked.

    Raises:
        ValueError: Not a readable mapping, or a setting that does not exist or has the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f'cannot read the configuration {path}: {error}') from error
    if not isinstance(values, dict):
        raise ValueError(f'{path}: expected `setting: value` lines')
    return checked_settings(values, str(path))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting; those not given are absent from the parsed namespace."""
    groups = {}
    for setting in SETTINGS.values():
        metadata, (kind, _) = setting.metadata, _kind(setting)
        title = metadata['group']
        group = groups.setdefault(title, parser.add_argument_group(title))
        default = setting.default if setting.default is not dataclasses.MISSING else setting.default_factory()
        argument = {'default': argparse.SUPPRESS, 'dest': setting.name}
        argument['help'] = f'{metadata["help"]} (default: {default})'
        if kind is bool:
            argument['action'] = argparse.BooleanOptionalAction
        elif get_origin(kind) is dict:
            argument.update(nargs='*', action=ParseKwargs, metavar='KEY=VALUE')
        else:
            argument['type'] = get_args(kind)[0] if get_origin(kind) is list else kind
            argument.update({name: metadata[name] for name in ('nargs', 'choices') if name in metadata})
        group.add_argument(f'--{setting.name.replace("_", "-")}', **argument)
