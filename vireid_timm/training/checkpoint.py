"""Checkpoints of a run: which one to resume, what they hold, when they are due, and writing and reading them."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model

from ..distributed import all_ranks, from_rank_zero, is_rank_zero, rank_and_world_size
from ..files import whole_file
from ..run_folder import (
    CONFIG,
    DAMAGED,
    LAST,
    PREVIOUS,
    folder_of,
    has_checkpoint,
    load_checkpoint,
    newest_checkpoint,
)
from .config import TrainConfig, checked_settings, load_yaml
from .run import Run, TrainState

_logger = logging.getLogger(__name__)

AUTO = 'auto'
AGAINST_NAN = 'Try a lower --lr, --clip-grad 10, or --no-amp'


def resolved_config(given: TrainConfig | Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run: those given, over those of the run that `resume` names, over the defaults.

    Args:
        given: Settings by name, or all of them.

    Returns:
        Settings whose `resume` is a run's folder with a checkpoint, a `previous` checkpoint in one, or empty.

    Raises:
        ValueError: A setting that cannot be, or nothing to resume.
    """
    given = checked_settings(asdict(given) if isinstance(given, TrainConfig) else given, 'configuration')
    output = given.get('output', TrainConfig.output)
    resumed = find_resumed(given.get('resume', ''), output, given.get('experiment', ''))
    if resumed is None:
        return _with_absolute_paths(TrainConfig.from_mapping({**given, 'resume': ''}))
    _check_place(folder_of(resumed), output, given.get('experiment', ''))
    settings = {**load_yaml(folder_of(resumed) / CONFIG), **given, 'resume': str(resumed)}
    return _with_absolute_paths(TrainConfig.from_mapping(settings))


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the settings with data and model where they are, so that the run can be resumed from any folder."""
    model, path = config.model, config.model.removeprefix('local-dir:')
    if path != model or (Path(path).exists() and not is_model(path.partition('.')[0])):
        model = model.removesuffix(path) + os.path.abspath(path)
    return replace(config, data_dir=config.data_dir and os.path.abspath(config.data_dir), model=model)


def _check_place(folder: Path, output: str, experiment: str) -> None:
    """Refuse another place than that of the run: it is resumed where it is, and its settings name that place."""
    folder, name = folder.resolve(), Path(experiment).parts
    for flag, value, fits in (
        ('--output', output, output == TrainConfig.output or Path(output).resolve() in folder.parents),
        ('--experiment', experiment, folder.parts[-len(name) :] == name),
    ):
        if value and not fits:
            raise ValueError(
                f'--resume continues the run in {folder}, not in {flag} {value}: leave that out, or start a new run '
                f'from its weights with --model {folder} --pretrained'
            )


def find_resumed(resume: str, output: str, experiment: str) -> Path | None:
    """Return what `--resume` names, None for a new run.

    | `resume` | resumes |
    |---|---|
    | nothing | a new run |
    | `auto` | the run called `experiment` from its newest checkpoint, or a new run if it has none |
    | a run's folder, or `last.pth` in it | that run from its newest undamaged checkpoint |
    | `previous.pth` in a run's folder | that run from this very checkpoint |

    Raises:
        ValueError: No such run or checkpoint.
    """
    if not resume:
        return None
    if resume == AUTO:
        if not experiment:
            raise ValueError('--resume auto resumes the run of that name: give --experiment, too')
        folder = Path(output) / experiment
        if has_checkpoint(folder):
            return folder
        _logger.info(f'No checkpoint in {folder}: a new run')
        return None
    folder = folder_of(resume)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f'--resume {resume}: no {CONFIG} there; give a run folder that `vireid train` wrote, or {LAST} or '
            f'{PREVIOUS} in it'
        )
    if not has_checkpoint(folder):
        raise ValueError(f'--resume {resume}: that run has no checkpoint yet; start it anew')
    if Path(resume).name != PREVIOUS:
        return folder
    if not Path(resume).is_file():
        raise ValueError(f'--resume {resume}: no such checkpoint; --resume {folder} takes the newest one')
    return Path(resume)


class CheckpointInterval:
    """When a checkpoint is due within an epoch: every N optimiser steps, or some minutes after the last one."""

    def __init__(self, text: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Start counting.

        Args:
            text: The setting: `500`, `10m`, or empty for none.
            clock: Seconds from an arbitrary origin.
        """
        in_minutes = text.endswith('m')
        self._seconds = 60 * float(text[:-1]) if in_minutes else None
        self._updates = int(text) if text and not in_minutes else None
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Count from now on: a checkpoint was written."""
        self._last = self._clock()

    def due(self, num_updates: int) -> bool:
        """Return whether a checkpoint is due after that many optimiser steps of the run."""
        if self._updates is not None:
            return num_updates % self._updates == 0
        return self._seconds is not None and self._clock() - self._last >= self._seconds


def save_checkpoint(run: Run, replace: bool = False) -> None:
    """Write the run's checkpoint; only rank 0 does.

    Args:
        run: The run.
        replace: Replace `last`, which holds the same weights, and keep `previous`.

    Raises:
        FloatingPointError: A weight is NaN or infinite; the last checkpoint stays.
        OSError: As `write_checkpoint`.
    """
    if not is_rank_zero():
        return
    check_weights(run)
    state = {
        'arch': run.config.model,
        'epoch': run.state.epoch,
        'state': asdict(run.state),
        'premises': _premises(run),
        'optimizer': run.optimizer.state_dict(),
        **run.task.get_checkpoint_state(),
        **(run.task.get_checkpoint_state(ema=True) if run.task.has_ema() else {}),
        **({run.scaler.state_dict_key: run.scaler.state_dict()} if run.scaler is not None else {}),
    }
    write_checkpoint(run.folder, state, replace)


def check_weights(run: Run) -> None:
    """Raise FloatingPointError if a weight is NaN or infinite: the loss can be finite and its gradient not."""
    if not torch.stack([value.isfinite().all() for value in run.model.state_dict().values()]).all():
        raise FloatingPointError(
            f'the weights became NaN or infinite in epoch {run.state.epoch} before step {run.state.step}; the last '
            f'checkpoint is from before. {AGAINST_NAN}'
        )


def write_checkpoint(folder: Path, state: dict[str, Any], replace: bool = False) -> None:
    """Write a state as `last`; the checkpoint before it becomes `previous`, or with `replace` is gone.

    Whenever the process dies, one of the two is whole.

    Raises:
        OSError: It cannot be written, for example on a full disk; the last checkpoint stays.
    """
    previous = None if replace else folder / PREVIOUS
    with whole_file(folder / LAST, previous=previous) as temporary, open(temporary, 'wb') as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides what the disk said
                raise error.__context__ from error
            raise


def _premises(run: Run) -> dict[str, Any]:
    """Return what has to be the same on resuming: a checkpoint names a place in a sequence of batches."""
    sampler, config = run.data.sampler, run.config
    return {
        'model': config.model,
        'model arguments': json.dumps(config.model_kwargs, sort_keys=True, default=str),
        'input size': list(run.input_size),
        'seed': config.seed,
        'number of ranks': rank_and_world_size()[1],
        'identities per batch': sampler.identities_per_batch,
        'images per modality': sampler.images_per_modality,
        'batches per optimiser step': config.grad_accum_steps,
        'optimiser': config.opt,
        'training identities': len(run.data.class_map),
        'training images (their digest)': run.data.digest,
    }


def resume(run: Run) -> Path:
    """Load a checkpoint into network, averages, optimiser, schedule and scaler. Collective; changes no file.

    It is the one that `resume` names, or the newest undamaged one of the folder.

    Returns:
        The checkpoint's path.

    Raises:
        ValueError: No undamaged checkpoint, or one that the settings or data do not fit.
    """
    path, checkpoint = all_ranks(lambda: newest_checkpoint(Path(run.config.resume)))
    first = from_rank_zero(checkpoint.get('state'))
    all_ranks(lambda: _load(run, checkpoint, first))
    state = run.state
    step = f', step {state.step} of {run.batches_per_epoch}' if state.step else ''
    _logger.info(f'Resuming {run.folder} from epoch {state.epoch}{step} ({path.name})')
    return path


def _load(run: Run, checkpoint: dict[str, Any], first: dict[str, Any] | None) -> None:
    """Load a checkpoint, if it is of the same place as rank 0's."""
    if checkpoint.get('state') != first:
        raise ValueError(
            f'rank {rank_and_world_size()[0]} finds another checkpoint in {run.folder} than rank 0: --output has to be '
            'on a file system that all machines share'
        )
    _check_premises(run, checkpoint.get('premises', {}))
    try:
        run.task.load_checkpoint_state(checkpoint['state_dict'], checkpoint.get('task_state'))
        if run.task.has_ema():
            if 'state_dict_ema' not in checkpoint:
                _logger.info('The run had no average of the weights: it starts from those of the checkpoint')
            run.task.load_checkpoint_state(checkpoint.get('state_dict_ema', checkpoint['state_dict']), ema=True)
        _load_optimizer(run.optimizer, checkpoint['optimizer'])
        if run.scaler is not None and run.scaler.state_dict_key in checkpoint:  # else loss scaling starts now
            run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
        run.state = TrainState(**checkpoint['state'])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'the checkpoint in {run.folder} does not fit the settings: {error}') from error
    if run.scheduler is not None:  # one of the two acts, depending on what the schedule counts
        run.scheduler.step(run.state.epoch)
        run.scheduler.step_update(run.num_updates)


def _check_premises(run: Run, before: Mapping[str, Any]) -> None:
    for name, now in _premises(run).items():
        if before.get(name, now) != now:  # a checkpoint of an earlier version may lack one
            raise ValueError(
                f'{run.folder} was started with another {name} ({before.get(name)}, now {now}), which its checkpoint '
                'depends on: give the same one, or start a new run'
            )


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the optimiser's state but keep today's settings: torch stores both together."""
    groups = []
    for then, now in zip(state['param_groups'], optimizer.param_groups, strict=True):
        settings = {name: value for name, value in now.items() if name != 'lookahead_step'}  # which is a count
        groups.append({**then, **settings, 'params': then['params']})
    optimizer.load_state_dict({**state, 'param_groups': groups})


def set_damaged_aside(used: Path) -> None:
    """Rename a damaged `last` checkpoint if a run resumes from `previous`, which the next one would replace."""
    last = used.with_name(LAST)
    if used.name == PREVIOUS and last.exists():
        try:
            load_checkpoint(last)
        except ValueError:
            last.replace(used.with_name(DAMAGED))
