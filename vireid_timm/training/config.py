"""Settings of a training run: one dataclass behind the command line, YAML files and `train()`.

Names and meanings are those of timm's `train.py` wherever it has them. The defaults are the paper's recipe for
SYSU-MM01 and RegDB (section 4.2) and, where the paper is silent, AGW's (arXiv:2001.04193).
"""

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

from ..constants import AUGMENTATIONS, CACHES, DATASETS, DIST_BN, PAPER_AUGMENTATIONS
from ..files import expanded_path
from ..loss.by_name import LOSSES, PAPER_LOSSES, check_losses
from ..loss.mutual_learning import MUTUAL_CONSTANTS, MUTUAL_LEARNING_MODES
from ..options import LARGEST_SEED, MANY, MAX_SIDE, MAX_WORKERS, check_kind, parse_augmentations

MODEL_HELP = "registered name with or without tag, hf-hub:OWNER/NAME, local-dir:FOLDER, or a run's or Hub-ready folder"
RECIPES = Path(__file__).parents[1] / 'recipes'
_BOUNDS = {'minimum': ('at least', operator.ge), 'above': ('above', operator.gt), 'maximum': ('at most', operator.le)}


def _setting(default: Any, group: str, text: str, **metadata: Any) -> Any:
    """Return a dataclass field with its help text and bounds.

    Args:
        default: Of the setting.
        group: Heading in the help.
        text: What the help says.
        **metadata: `everyday` (shown by `vireid train --help`, not only by `--help-all`), `unset` (what applies if the
            default is empty), `nargs` and `choices` as in argparse, `minimum`, `above`, `maximum` (of whole numbers
            `MANY` by default),
            `pattern` with `example`, `is_path` (a leading ~ is expanded), and `check`, which raises ValueError.
    """
    metadata = {'group': group, 'help': text, **metadata}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Settings of `vireid_timm.train`; `vireid train --help-all` describes each."""

    dataset: str = _setting('folder', 'data', f'reader: {", ".join(DATASETS)}', everyday=True)
    data_dir: str = _setting('', 'data', 'root folder; the file itself for csv', everyday=True, is_path=True)
    dataset_kwargs: dict[str, Any] = _setting({}, 'data', "reader's options, e.g. trial=3 for regdb")
    val_share: float = _setting(
        0.1, 'data', 'share of identities held out to choose the best epoch; 0 keeps the last', everyday=True
    )
    skip_broken: bool = _setting(False, 'data', 'skip unreadable images instead of stopping')
    cache: str = _setting('auto', 'data', 'where to keep decoded images', choices=CACHES)
    identities_per_batch: int | None = _setting(
        None, 'data', 'identities per batch (P)', everyday=True, unset='8, or all if fewer', minimum=1
    )
    images_per_modality: int = _setting(
        4, 'data', 'images per identity and modality in a batch (K)', minimum=1, maximum=1000
    )
    workers: int | None = _setting(
        None, 'data', 'images decoded at once', unset='one per core, at most 8', minimum=0, maximum=MAX_WORKERS
    )

    model: str = _setting('vireid_dml_r50', 'model', MODEL_HELP, everyday=True, is_path=True)
    pretrained: bool = _setting(False, 'model', "start from the model's weights", everyday=True)
    pretrained_path: str = _setting(
        '', 'model', "file with the weights that --pretrained loads: the model's or its backbone's", is_path=True
    )
    model_kwargs: dict[str, Any] = _setting({}, 'model', "model's arguments, e.g. spatial_weights=static")
    input_size: list[int] | None = _setting(
        None,
        'model',
        'channels, height, width',
        everyday=True,
        unset="the model's",
        nargs=3,
        minimum=1,
        maximum=MAX_SIDE,
    )
    drop: float = _setting(0.0, 'model', 'dropout rate before the classifiers', minimum=0, maximum=1)
    grad_checkpointing: bool = _setting(False, 'model', 'recompute activations to save memory')
    freeze_bn: bool = _setting(False, 'model', 'keep the loaded batch-norm statistics; for few identities')

    id_branches: list[str] | None = _setting(
        None, 'loss', 'branches with an identity loss (L_id of table 3)', unset='all', nargs='+'
    )
    mutual: str = _setting(
        'joint-to-both', 'loss', 'branches that learn from each other (table 4)', choices=tuple(MUTUAL_LEARNING_MODES)
    )
    global_weight: float = _setting(0.6, 'loss', 'theta_1, weight of joint-global mutual learning (eq. 9)', minimum=0)
    fusion_weight: float = _setting(1.8, 'loss', 'theta_2, weight of joint-fusion mutual learning (eq. 10)', minimum=0)
    mutual_constant: str = _setting(
        'teacher',
        'loss',
        'no gradient into: none of a pair; in each direction the partner; the teacher, named first in --mutual',
        choices=MUTUAL_CONSTANTS,
    )
    loss: dict[str, Any] = _setting(
        PAPER_LOSSES,
        'loss',
        f'losses on features with their weights (eq. 13): {", ".join(LOSSES)}, pml.NAME of pytorch-metric-learning',
        check=check_losses,
    )
    smoothing: float = _setting(0.0, 'loss', 'label smoothing of the identity losses', minimum=0, maximum=1)

    pad: int = _setting(
        10, 'augmentation', 'black border before the random crop, in pixels', minimum=0, maximum=MAX_SIDE
    )
    hflip: float = _setting(0.5, 'augmentation', 'probability of a horizontal flip', minimum=0, maximum=1)
    augment: list[str] = _setting(
        list(PAPER_AUGMENTATIONS),
        'augmentation',
        f'any of {", ".join(AUGMENTATIONS)}, alone or as name=probability; no name for none',
        nargs='*',
        check=parse_augmentations,
    )
    cre_fill: list[float] | None = _setting(
        None, 'augmentation', 'fixed fill per channel that cre erases, after normalisation', unset='random', nargs=3
    )

    opt: str = _setting('sgd', 'optimiser', 'timm optimiser, any but adahessian')
    lr: float = _setting(0.1, 'optimiser', 'learning rate of new layers', everyday=True, minimum=0)
    backbone_lr_scale: float | None = _setting(
        None, 'optimiser', 'factor on lr for pretrained layers', unset='0.1 with --pretrained, else 1', minimum=0
    )
    momentum: float = _setting(0.9, 'optimiser', 'momentum', minimum=0, maximum=1)
    weight_decay: float = _setting(5e-4, 'optimiser', 'weight decay of every parameter', minimum=0)
    opt_kwargs: dict[str, Any] = _setting({}, 'optimiser', 'further arguments of the optimiser')
    clip_grad: float | None = _setting(None, 'optimiser', 'clip gradients to this value', unset='no clipping', above=0)
    clip_mode: str = _setting('norm', 'optimiser', 'how to clip gradients', choices=('norm', 'value', 'agc'))
    grad_accum_steps: int = _setting(1, 'optimiser', 'batches per optimiser step', minimum=1, maximum=1000)

    sched: str = _setting('multistep', 'schedule', 'timm scheduler, any but plateau')
    epochs: int = _setting(80, 'schedule', 'epochs to train', everyday=True, minimum=1)
    decay_milestones: list[int] = _setting(
        [21, 51], 'schedule', 'multistep: timm decays one epoch before each, here at 20 and 50', nargs='+', minimum=1
    )
    decay_rate: float = _setting(0.1, 'schedule', 'factor of each decay', minimum=0)
    decay_epochs: float | None = _setting(
        None, 'schedule', 'step: epochs between decays; wsd, rsqrt: length of the decay', unset="timm's", minimum=0
    )
    warmup_epochs: int = _setting(9, 'schedule', 'epochs of linear warm-up', everyday=True, minimum=0)
    warmup_lr: float | None = _setting(
        None, 'schedule', 'learning rate at the start of warm-up', unset='a tenth of --lr', minimum=0
    )
    min_lr: float = _setting(0.0, 'schedule', 'lowest learning rate of cyclic schedules', minimum=0)
    cooldown_epochs: int = _setting(0, 'schedule', 'final epochs at --min-lr', minimum=0)
    sched_on_updates: bool = _setting(False, 'schedule', 'update the learning rate every step, not every epoch')

    device: str = _setting('cuda', 'device', 'device; falls back to the CPU where there is no GPU', everyday=True)
    amp: bool | None = _setting(None, 'device', 'mixed precision', unset='on where bfloat16 is fast')
    amp_dtype: str = _setting('bfloat16', 'device', 'type of mixed precision', choices=('bfloat16', 'float16'))
    channels_last: bool = _setting(True, 'device', 'channels-last memory format')
    torchcompile: bool = _setting(False, 'device', 'compile the network')
    cuda_graphs: bool = _setting(True, 'device', 'repeat the step as one CUDA graph, where GPU and settings allow it')

    gather_features: bool = _setting(False, 'scale', 'compute the losses of --loss over the batches of all ranks')
    cached_triplet: bool = _setting(
        False, 'scale', 'compute the losses of --loss over all batches of --grad-accum-steps'
    )
    sync_bn: bool = _setting(False, 'scale', 'synchronise batch norm across ranks')
    dist_bn: str = _setting('reduce', 'scale', 'batch-norm statistics: mean over ranks, or of rank 0', choices=DIST_BN)

    model_ema: bool = _setting(False, 'averaging', 'keep, evaluate and save a moving average of the weights')
    model_ema_decay: float = _setting(0.9998, 'averaging', 'decay of the average per step', minimum=0, maximum=1)
    model_ema_warmup: bool = _setting(False, 'averaging', 'raise the decay from 0 at the start')

    seed: int = _setting(
        42, 'run', 'seed of initial weights, batches and augmentation', minimum=0, maximum=LARGEST_SEED
    )
    val_interval: int = _setting(5, 'run', 'epochs between validations; the last epoch is always validated', minimum=1)
    log_interval: int = _setting(50, 'run', 'steps between progress lines', minimum=1)
    tensorboard: bool = _setting(False, 'run', 'write TensorBoard curves, too; needs the extra `tensorboard`')
    checkpoint_interval: str = _setting(
        '30m',
        'run',
        "steps (500) or minutes (10m) between checkpoints within an epoch; '' for none",
        pattern=r'|[1-9]\d*|(?=.*[1-9])\d+(\.\d+)?m',
        example='500, 10m, or nothing for none',
    )
    output: str = _setting('output/train', 'run', 'folder of the run folders', is_path=True)
    experiment: str = _setting('', 'run', 'name of the run folder', everyday=True, unset='time, model and dataset')
    resume: str = _setting(
        '',
        'run',
        'run folder to resume, or its previous.pth; auto: that of --experiment, or a new run',
        everyday=True,
        is_path=True,
    )
    deterministic: bool = _setting(False, 'run', 'reproduce the weights exactly, where torch can; slower on a GPU')

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = 'configuration') -> 'TrainConfig':
        """Build from settings by name.

        Args:
            values: Setting -> value; dashes in names count as underscores.
            source: Where they come from, for errors.

        Raises:
            ValueError: An unknown setting, or a value of the wrong type or out of bounds.
        """
        return cls(**checked_settings(values, source))


SETTINGS = {setting.name: setting for setting in dataclasses.fields(TrainConfig)}


def checked_settings(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the settings with normalised names and checked values."""
    checked = {}
    for key, value in values.items():
        name = str(key).replace('-', '_')
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f'; did you mean {near[0]!r}?' if near else ''
            raise ValueError(f'{source}: there is no setting {key!r}{hint}')
        checked[name] = _checked_value(SETTINGS[name], value, source)
    return checked


def kind_of(setting: dataclasses.Field) -> tuple[Any, bool]:
    """Return the type of a setting's values, and whether it may be unset."""
    kinds = get_args(setting.type) if isinstance(setting.type, UnionType) else (setting.type,)
    return kinds[0], NoneType in kinds


def _checked_value(setting: dataclasses.Field, value: Any, source: str) -> Any:
    kind, optional = kind_of(setting)
    where, metadata = f'{source}: {setting.name}', setting.metadata
    if value is None:
        if not optional:
            raise ValueError(f'{where} needs a value')
        return None
    if get_origin(kind) is not list:
        checked = _checked_single(value, kind, metadata, where)
    else:
        check_kind(where, value, list)
        if metadata['nargs'] not in ('+', '*', len(value)):
            raise ValueError(f'{where} must be {metadata["nargs"]} values, got {value!r}')
        checked = [_checked_single(entry, get_args(kind)[0], metadata, where) for entry in value]
    if 'check' in metadata:
        try:
            metadata['check'](checked)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None
    return checked


def _checked_single(value: Any, kind: Any, metadata: Mapping[str, Any], where: str) -> Any:
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = _as_float(value)  # YAML reads 5e-4 as text
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # YAML reads 500 as a number
    check_kind(where, value, kind)
    if kind is float and not math.isfinite(value):
        raise ValueError(f'{where} must be a finite number, got {value}')
    metadata = {**({'maximum': MANY} if kind is int else {}), **metadata}
    for bound, (text, holds) in _BOUNDS.items():
        if bound in metadata and not holds(value, metadata[bound]):
            raise ValueError(f'{where} must be {text} {metadata[bound]}, got {value}')
    if 'pattern' in metadata and not re.fullmatch(metadata['pattern'], value):
        raise ValueError(f'{where} must be {metadata["example"]}, got {value!r}')
    if 'choices' in metadata and value not in metadata['choices']:
        raise ValueError(f'{where} must be one of {", ".join(metadata["choices"])}, got {value!r}')
    return expanded_path(value) if metadata.get('is_path') else value


def _as_float(value: int | str) -> float | int | str:
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return value


def recipe_names() -> list[str]:
    """List the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def find_config(name: str | Path) -> Path:
    """Return the file of a recipe in the package, given by its name, or any other file, given by its path.

    Raises:
        ValueError: Neither; the error lists the recipes.
    """
    path, recipes = Path(expanded_path(str(name))), recipe_names()
    if str(name) in recipes:
        return RECIPES / f'{name}.yaml'
    if not path.suffix and not path.exists():
        raise ValueError(f'{name} is neither a recipe nor a file; the recipes are {", ".join(recipes)}')
    return path


def load_yaml(name: str | Path) -> dict[str, Any]:
    """Load and check the settings of a recipe or a YAML file.

    Args:
        name: A recipe in the package, by name, or a path.

    Raises:
        ValueError: Not a readable mapping, an unknown setting, or a value of the wrong type.
    """
    path = find_config(name)
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f'cannot read the configuration {path}: {error}') from error
    if not isinstance(values, dict):
        raise ValueError(f'{path}: expected `setting: value` lines')
    return checked_settings(values, str(path))
