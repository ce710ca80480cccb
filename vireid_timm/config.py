"""The settings of a training run: one dataclass, from which the command line, YAML files and `train()` all read.

Names and meanings are those of timm's `train.py` wherever it has them. The defaults are the paper's recipe for
SYSU-MM01 and RegDB (section 4.2) and, where the paper is silent, AGW's (arXiv:2001.04193).
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from .losses import MUTUAL_LEARNING_MODES
from .pictures import CACHES
from .task import DIST_BN


def _setting(default: Any, group: str, text: str, **argument: Any) -> Any:
    """A dataclass field that carries its help text and what argparse needs beyond the default's type."""
    metadata = {'group': group, 'help': text, **argument}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Settings of `vireid_timm.train`; see `vireid train --help` for every one of them."""

    dataset: str = _setting('folder', 'data', 'reader: folder, csv, sysu_mm01, regdb, llcm or synthetic')
    data_dir: str = _setting('', 'data', 'root folder of the data (the file itself for csv)')
    dataset_kwargs: dict = _setting({}, 'data', 'options of the reader, e.g. trial=3 for regdb')
    val_share: float = _setting(0.1, 'data', 'share of the training identities held out to choose the best epoch')
    skip_broken: bool = _setting(False, 'data', 'leave out pictures that cannot be read instead of stopping')
    cache: str = _setting('auto', 'data', 'where decoded pictures are kept', choices=CACHES)
    identities_per_batch: int | None = _setting(None, 'data', 'P of a batch; 8 or all there are if unset', type=int)
    pictures_per_modality: int = _setting(4, 'data', 'K of a batch: pictures per identity and modality', minimum=1)
    workers: int | None = _setting(None, 'data', 'pictures decoded at a time; one per core if unset', type=int)

    model: str = _setting('vireid_dml_r50', 'model', 'name of the model, local-dir:FOLDER or hf-hub:OWNER/NAME')
    pretrained: bool = _setting(False, 'model', "start from the weights of the model's tag")
    model_kwargs: dict = _setting({}, 'model', 'arguments of the model, e.g. spatial_weights=static')
    input_size: list | None = _setting(
        None, 'model', "channels, height and width; the model's default if unset", type=int, nargs=3
    )
    drop: float = _setting(0.0, 'model', 'dropout before the classifiers')
    grad_checkpointing: bool = _setting(False, 'model', 'recompute activations to save memory')
    freeze_bn: bool = _setting(
        False, 'model', 'batch norm keeps the statistics that were loaded: for fine-tuning on few pictures'
    )

    id_branches: list | None = _setting(
        None, 'loss', 'branches with an identity loss; all if unset (L_id of table 3)', type=str, nargs='+'
    )
    mutual: str = _setting(
        'joint-to-both', 'loss', 'pairs that learn from each other (table 4)', choices=tuple(MUTUAL_LEARNING_MODES)
    )
    global_weight: float = _setting(0.6, 'loss', 'theta_1, the weight of joint-global mutual learning (eq. 9)')
    fusion_weight: float = _setting(1.8, 'loss', 'theta_2, the weight of joint-fusion mutual learning (eq. 10)')
    triplet_weight: float = _setting(1.0, 'loss', 'weight of the weighted regularised triplet loss (eq. 13: 1)')
    smoothing: float = _setting(0.0, 'loss', 'label smoothing of the identity losses')

    pad: int = _setting(10, 'augmentation', 'black border before the random crop, in pixels')
    hflip: float = _setting(0.5, 'augmentation', 'probability of the horizontal flip')
    channel_combination: bool = _setting(True, 'augmentation', 'random combination of channels on visible pictures')
    reprob: float = _setting(0.5, 'augmentation', 'probability of channel random erasing')
    erasing_fill: list | None = _setting(
        None, 'augmentation', 'fixed fill of the erased channels, normalised; random if unset', type=float, nargs=3
    )

    opt: str = _setting('sgd', 'optimiser', "any of timm's optimisers")
    lr: float = _setting(0.1, 'optimiser', 'learning rate of everything new')
    backbone_lr_scale: float | None = _setting(
        None, 'optimiser', 'factor on lr for what was pretrained; 0.1 with pretrained weights, else 1', type=float
    )
    momentum: float = _setting(0.9, 'optimiser', 'momentum')
    weight_decay: float = _setting(5e-4, 'optimiser', 'weight decay, on every parameter')
    opt_kwargs: dict = _setting({}, 'optimiser', 'further arguments of the optimiser')
    clip_grad: float | None = _setting(None, 'optimiser', 'clip gradients at this value', type=float)
    clip_mode: str = _setting('norm', 'optimiser', 'what is clipped', choices=('norm', 'value', 'agc'))
    grad_accum_steps: int = _setting(1, 'optimiser', 'batches per optimiser step', minimum=1)

    sched: str = _setting('multistep', 'schedule', "any of timm's schedulers but plateau, which timm is giving up")
    epochs: int = _setting(80, 'schedule', 'epochs to train', minimum=1)
    decay_milestones: list = _setting(
        [21, 51], 'schedule', 'multistep: timm decays one epoch before each, here at 20 and 50', type=int, nargs='+'
    )
    decay_rate: float = _setting(0.1, 'schedule', 'factor of each decay')
    decay_epochs: float | None = _setting(
        None, 'schedule', "step: epochs between decays; wsd, rsqrt: length of the decay; timm's if unset", type=float
    )
    warmup_epochs: int = _setting(9, 'schedule', 'epochs of linear warm-up')
    warmup_lr: float | None = _setting(None, 'schedule', 'where the warm-up starts; a tenth of lr if unset', type=float)
    min_lr: float = _setting(0.0, 'schedule', 'lower bound of cyclic schedules')
    cooldown_epochs: int = _setting(0, 'schedule', 'epochs at min_lr at the end')
    sched_on_updates: bool = _setting(False, 'schedule', 'advance the schedule after each step, not each epoch')

    device: str = _setting('cuda', 'device', 'falls back to the CPU, saying so')
    amp: bool | None = _setting(None, 'device', 'mixed precision; unset: where the device is fast at it')
    amp_dtype: str = _setting('bfloat16', 'device', 'type of mixed precision', choices=('bfloat16', 'float16'))
    channels_last: bool = _setting(True, 'device', 'memory format')
    torchcompile: bool = _setting(False, 'device', 'compile the network')

    gather_features: bool = _setting(
        False, 'scale', 'the triplet loss compares the pictures of all processes (torchrun), not those of each'
    )
    cached_triplet: bool = _setting(
        False, 'scale', 'the triplet loss compares the pictures of all batches of --grad-accum-steps'
    )
    sync_bn: bool = _setting(False, 'scale', 'batch norm over the batches of all processes')
    dist_bn: str = _setting(
        'reduce',
        'scale',
        'running statistics of several processes: their mean, or those of one',
        choices=DIST_BN,
    )

    model_ema: bool = _setting(False, 'averaging', 'keep, evaluate and save an average of the weights')
    model_ema_decay: float = _setting(0.9998, 'averaging', 'its decay per step')
    model_ema_warmup: bool = _setting(False, 'averaging', 'raise the decay from 0 at the start')

    seed: int = _setting(42, 'run', 'decides initial weights, batches and augmentation')
    val_interval: int = _setting(5, 'run', 'epochs between validations; the last is always validated', minimum=1)
    log_interval: int = _setting(50, 'run', 'steps between lines of progress', minimum=1)
    tensorboard: bool = _setting(False, 'run', 'also write curves for TensorBoard (needs the extra `tensorboard`)')
    checkpoint_interval: str = _setting(
        '30m',
        'run',
        'optimiser steps (500) or minutes (10m) between checkpoints within an epoch; there is one after every epoch',
        pattern=r'|[1-9]\d*|\d+(\.\d+)?m',
        example='500, 10m, or nothing for none',
    )
    output: str = _setting('output/train', 'run', 'where run folders go')
    experiment: str = _setting('', 'run', 'name of the run folder; time, model and data if unset')
    resume: str = _setting('', 'run', 'run folder to continue; auto: that of --experiment, or a new run if it has none')
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
    kinds = [kind.strip() for kind in str(getattr(setting.type, '__name__', setting.type)).split('|')]
    if value is None and 'None' not in kinds and 'None' not in str(setting.type):
        raise ValueError(f'{source}: {setting.name} needs a value')
    if value is None:
        return None
    expected = next(kind for kind in (bool, int, float, str, list, dict) if kind.__name__ in str(setting.type))
    if expected is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = _as_float(value)  # YAML reads 5e-4 as text
    if expected is list and isinstance(value, tuple):
        value = list(value)
    if expected is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # YAML reads 500 as a number
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f'{source}: {setting.name} must be of type {expected.__name__}, got {value!r}')
    minimum = setting.metadata.get('minimum')
    if minimum is not None and value < minimum:
        raise ValueError(f'{source}: {setting.name} must be at least {minimum}, got {value}')
    pattern = setting.metadata.get('pattern')
    if pattern and not re.fullmatch(pattern, value):
        raise ValueError(f'{source}: {setting.name} must be {setting.metadata["example"]}, got {value!r}')
    choices = setting.metadata.get('choices')
    if choices and value not in choices:
        raise ValueError(f'{source}: {setting.name} must be one of {", ".join(choices)}, got {value!r}')
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
        metadata = dict(setting.metadata)
        name, text = metadata.pop('group'), metadata.pop('help')
        for check in ('minimum', 'pattern', 'example'):
            metadata.pop(check, None)
        group = groups.setdefault(name, parser.add_argument_group(name))
        default = setting.default if setting.default is not dataclasses.MISSING else setting.default_factory()
        argument = {'default': argparse.SUPPRESS, 'dest': setting.name, 'help': f'{text} (default: {default})'}
        if 'bool' in str(setting.type):
            argument['action'] = argparse.BooleanOptionalAction
        elif isinstance(default, dict):
            argument.update(nargs='*', action=ParseKwargs, metavar='KEY=VALUE')
        else:
            argument.update({'type': type(default), **metadata})
        group.add_argument(f'--{setting.name.replace("_", "-")}', **argument)
