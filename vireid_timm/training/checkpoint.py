"""Checkpoints of a run: what they hold, when they are due, and how a run goes on from one."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data.records import Records
from ..distributed import on_primary, process, together
from ..run_folder import CONFIG, LAST, PREVIOUS, folder_of, has_checkpoint, newest_checkpoint, save_checkpoint
from .config import TrainConfig, checked_settings, load_yaml
from .run import Progress, Run

_logger = logging.getLogger(__name__)

AUTO = 'auto'
AGAINST_NAN = 'Try a lower --lr, --clip-grad 10, or --no-amp'


def resolved_config(given: TrainConfig | Mapping[str, Any]) -> TrainConfig:
    """The settings of a run: those given, over those of the run that `resume` names, over the defaults.

    Args:
        given: Settings by name, or all of them. `resume` names a run's folder or a checkpoint in it, or is `auto` for
            the folder of `experiment` if it has a checkpoint.

    Returns:
        Settings whose `resume` is a folder with a checkpoint, its `previous` checkpoint, or empty.

    Raises:
        ValueError: A setting that cannot be, or nothing to resume.
    """
    given = checked_settings(asdict(given) if isinstance(given, TrainConfig) else given, 'configuration')
    output = given.get('output', TrainConfig.output)
    resumed = _resumed(given.get('resume', ''), output, given.get('experiment', ''))
    if resumed is None:
        return TrainConfig.from_mapping({**given, 'resume': ''})
    return TrainConfig.from_mapping({**load_yaml(folder_of(resumed) / CONFIG), **given, 'resume': str(resumed)})


def _resumed(resume: str, output: str, experiment: str) -> Path | None:
    """The folder of the run to continue, or the checkpoint in it to go back to; None for a new run."""
    if not resume:
        return None
    if resume == AUTO:
        if not experiment:
            raise ValueError('--resume auto continues the run of that name: give --experiment, too')
        folder = Path(output) / experiment
        if not has_checkpoint(folder):
            _logger.info(f'No checkpoint in {folder}: a new run')
            return None
        return folder
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
        raise ValueError(f'--resume {resume}: there is no such checkpoint; the newest one is that of --resume {folder}')
    return Path(resume)


class CheckpointInterval:
    """When a checkpoint is due within an epoch: every N optimiser steps, or some minutes after the last one."""

    def __init__(self, text: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Start counting.

        Args:
            text: The setting: `500`, `10m`, or nothing for none.
            clock: Seconds from an arbitrary origin.
        """
        in_minutes = text.endswith('m')
        self._seconds = 60 * float(text[:-1]) if in_minutes else None
        self._updates = int(text) if text and not in_minutes else None
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """A checkpoint was written."""
        self._last = self._clock()

    def due(self, num_updates: int) -> bool:
        """Whether one is due after so many optimiser steps of the run."""
        if self._updates is not None:
            return num_updates % self._updates == 0
        return self._seconds is not None and self._clock() - self._last >= self._seconds


def save(run: Run) -> None:
    """Write the run's checkpoint: one process does, all wait.

    Raises:
        FloatingPointError: A weight is NaN or infinite; the last checkpoint stays.
        OSError: It cannot be written; the last checkpoint is intact.
    """
    on_primary(lambda: _save(run))


def _save(run: Run) -> None:
    state = {
        'arch': run.config.model,
        'class_map': run.data.class_map,
        'epoch': run.progress.epoch,
        'progress': asdict(run.progress),
        'premises': _premises(run),
        'images': _fingerprint(run.data.records),
        'optimizer': run.optimizer.state_dict(),
        **run.task.get_checkpoint_state(),
        **(run.task.get_checkpoint_state(ema=True) if run.task.has_ema() else {}),
        **({run.scaler.state_dict_key: run.scaler.state_dict()} if run.scaler is not None else {}),
    }
    finite = torch.stack([value.isfinite().all() for value in state['state_dict'].values()])
    if not finite.all():  # of a finite loss whose gradient was not
        raise FloatingPointError(
            f'the weights became NaN or infinite in epoch {run.progress.epoch} before step {run.progress.step}; '
            f'what was saved is from before. {AGAINST_NAN}'
        )
    save_checkpoint(run.folder, state)


def _premises(run: Run) -> dict[str, Any]:
    """What has to be the same for a checkpoint to mean the same: it names a place in a sequence of batches."""
    sampler, config = run.data.sampler, run.config
    return {
        'seed': config.seed,
        'number of processes': process()[1],
        'identities per batch': sampler.identities_per_batch,
        'images per modality': sampler.images_per_modality,
        'batches per optimiser step': config.grad_accum_steps,
        'optimiser': config.opt,
    }


def _fingerprint(records: Records) -> str:
    """Of what the images are, wherever they lie: 12 digits."""
    names = [Path(path).name for path in records.path.tolist()]
    digest = hashlib.sha256()
    for column in (names, records.identity.tolist(), records.modality.tolist()):
        digest.update('\n'.join(column).encode())
    return digest.hexdigest()[:12]


def resume(run: Run) -> Path:
    """Put a checkpoint's state into network, averages, optimiser, schedule and scaler.

    It is the one that `resume` names, or the newest whole one of the folder.

    Returns:
        The checkpoint; nothing on disk is changed.

    Raises:
        ValueError: No whole checkpoint, or one that the settings or data do not fit.
    """
    path, checkpoint = together(lambda: newest_checkpoint(Path(run.config.resume)))
    place = on_primary(lambda: _place(checkpoint))
    together(lambda: _put_in(run, checkpoint, place))
    progress = run.progress
    step = f', step {progress.step} of {run.batches_per_epoch}' if progress.step else ''
    _logger.info(f'Continuing {run.folder} from epoch {progress.epoch}{step} ({path.name})')
    return path


def _place(checkpoint: dict[str, Any]) -> tuple[Any, Any]:
    return checkpoint['epoch'], checkpoint.get('progress', {}).get('step')


def _put_in(run: Run, checkpoint: dict[str, Any], place: tuple[Any, Any]) -> None:
    if _place(checkpoint) != place:
        raise ValueError(
            f'process {process()[0]} finds another checkpoint in {run.folder} than process 0 does: '
            '--output has to be on a file system that all machines share'
        )
    _check_premises(run, checkpoint)
    try:
        run.task.load_checkpoint_state(checkpoint['state_dict'])
        if run.task.has_ema():
            if 'state_dict_ema' not in checkpoint:
                _logger.info('The run had no average of the weights: it begins with those of the checkpoint')
            run.task.load_checkpoint_state(checkpoint.get('state_dict_ema', checkpoint['state_dict']), ema=True)
        _load_optimizer(run.optimizer, checkpoint['optimizer'])
        if run.scaler is not None and run.scaler.state_dict_key in checkpoint:  # else loss scaling begins now
            run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
        run.progress = Progress(**checkpoint['progress'])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'the checkpoint in {run.folder} does not fit the settings: {error}') from error
    if run.scheduler is not None:  # one of the two acts, by what the schedule counts
        run.scheduler.step(run.progress.epoch)
        run.scheduler.step_update(run.num_updates)


def _check_premises(run: Run, checkpoint: dict[str, Any]) -> None:
    if checkpoint['arch'] != run.config.model:
        raise ValueError(f'{run.folder} holds a run of {checkpoint["arch"]}, which cannot go on as {run.config.model}')
    before = checkpoint.get('premises', {})
    for name, now in _premises(run).items():
        if before.get(name) != now:
            raise ValueError(
                f'{run.folder} was started with another {name} ({before.get(name)}, now {now}), which decides what its '
                'checkpoint means: give the same one, or start a new run'
            )
    for what, same in (
        ('identities', checkpoint['class_map'] == run.data.class_map),
        ('images', checkpoint.get('images') == _fingerprint(run.data.records)),
    ):
        if not same:
            raise ValueError(f'the training {what} are not those that {run.folder} was started with')


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The checkpoint's state, but today's settings: torch keeps both in one."""
    groups = []
    for then, now in zip(state['param_groups'], optimizer.param_groups, strict=True):
        settings = {name: value for name, value in now.items() if name != 'lookahead_step'}  # which is a count
        groups.append({**then, **settings, 'params': then['params']})
    optimizer.load_state_dict({**state, 'param_groups': groups})
