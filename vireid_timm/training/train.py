"""Training runs from start to end: set up or resume, epochs, validation, the best model, the last word."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..distributed import (
    end_distributed,
    has_lost_contact,
    init_distributed,
    is_announced,
    is_primary,
    on_primary,
    process,
    together,
)
from ..evaluation.evaluate import evaluate
from ..evaluation.report import Report
from ..figures.curves import plot_curves
from ..files import save_json
from ..hub.folder import save_model_config, save_model_folder
from ..run_folder import (
    BEST,
    CLASS_MAP,
    MODEL_CONFIG,
    folder_of,
    has_checkpoint,
    run_folder,
    save_config,
    set_damaged_aside,
    write_summary,
)
from .checkpoint import CheckpointInterval, resolved_config, resume, save
from .config import TrainConfig
from .interrupt import Stopped, StopRequest, stop_signals
from .loop import train_one_epoch
from .progress import TENSORBOARD, Tracker
from .run import Run, model_args, set_up

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

    Processes that `torchrun` started train together, each with its own part of every batch. In the main thread Ctrl-C
    and SIGTERM end the training after the current step and a checkpoint.

    Args:
        config: A `TrainConfig`, or settings by name over its defaults. With `resume` given as a setting, those of the
            resumed run are the defaults.

    Returns:
        Where the run's folder and best model are, and how it went; the same in every process.

    Raises:
        ValueError: A setting or data that cannot work; the text says which and what to do.
        OSError: Something cannot be written or read; the last checkpoint is intact.
        FloatingPointError: The loss became NaN or infinite; the last checkpoint is from before.
        Stopped: Ctrl-C or SIGTERM, a KeyboardInterrupt; the text says how to go on.
    """
    config = resolved_config(config)
    joined = process()[1] > 1
    device = init_distributed(config.device)
    try:
        config = on_primary(lambda: config)
        with lent(config, device), stop_signals() as stop:
            return _train(config, device, stop)
    finally:
        if not joined:
            end_distributed()


@contextmanager
def lent(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """torch's global generators, seeded, and its global switches, set; both are as before at the end."""
    cudnn, kernels, name = torch.backends.cudnn, torch.utils.deterministic, 'CUBLAS_WORKSPACE_CONFIG'
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fill, workspace = cudnn.benchmark, kernels.fill_uninitialized_memory, os.environ.get(name)
    if config.deterministic:
        if device.type == 'cuda' and workspace is None:
            # Read with the first matrix product, for which memory is reserved; joining other processes needs none.
            if any(map(torch.cuda.memory_reserved, range(torch.cuda.device_count()))):
                _logger.warning(f'A GPU was used before: for the same weights again set {name}=:4096:8 before Python')
            os.environ[name] = ':4096:8'
        torch.use_deterministic_algorithms(True, warn_only=True)  # what torch cannot do it names in a warning
        kernels.fill_uninitialized_memory = False  # nothing reads such memory, and filling it takes time
    cudnn.benchmark = device.type == 'cuda' and not torch.are_deterministic_algorithms_enabled()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == 'cuda' else []):
            torch.manual_seed(config.seed)
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        cudnn.benchmark, kernels.fill_uninitialized_memory = benchmark, fill
        if workspace is None:
            os.environ.pop(name, None)


def _train(config: TrainConfig, device: torch.device, stop: StopRequest) -> TrainResult:
    folder = folder_of(config.resume) if config.resume else None
    try:
        run = set_up(config, device)
        folder = run.folder
        with ExitStack() as stack:
            together(lambda: stack.enter_context(run_folder(folder)) if is_primary() else None)
            if config.resume:
                checkpoint = resume(run)
                on_primary(lambda: set_damaged_aside(checkpoint))
            return _fit(run, stop)
    except Stopped as stopped:
        if not is_primary() and not is_announced(stopped):  # the others will only find this process gone
            _logger.error(f'process {process()[0]}: {stopped}')
        raise Stopped(stopped.signal, _way_on(folder)) from None
    except RuntimeError as error:  # another process has stopped already where it was to stop at once
        if stop.signal is None or not has_lost_contact(error):
            raise
        raise Stopped(stop.signal, _way_on(folder)) from None


def _way_on(folder: Path | None) -> str:
    if folder is None or not has_checkpoint(folder):
        return 'nothing was trained yet'
    command = 'vireid' if process()[1] == 1 else 'torchrun ... -m vireid_timm'
    return f'go on with: {command} train --resume {folder}'


def _fit(run: Run, stop: StopRequest) -> TrainResult:
    config, folder, progress = run.config, run.folder, run.progress
    on_primary(lambda: _write_start(run))
    _end_as_begun(run)
    _log_start(run)
    interval = CheckpointInterval(config.checkpoint_interval)
    with closing(_tracker(run)) as tracker:
        while progress.epoch < run.num_epochs:
            validated = _is_validated(run)
            with stop.held():
                if progress.row is None:
                    progress.row = {'epoch': progress.epoch, **train_one_epoch(run, tracker, interval, stop)}
                    # Before the first results are written, too: a folder with results but no checkpoint is refused.
                    if validated or progress.epoch == 0:
                        save(run)
                if not validated:
                    _finish_epoch(run, None)
            if validated:
                report = _validate(run, tracker)
                with stop.held():
                    _finish_epoch(run, report)
            interval.restart()
    on_primary(lambda: plot_curves(folder, progress.summary))
    _logger.info(f'Done: {folder} (best model in {folder / BEST}, from epoch {progress.best_epoch})')
    return TrainResult(folder, folder / BEST, progress.best_epoch, progress.best_mAP, progress.summary)


def _end_as_begun(run: Run) -> None:
    """Let a run that is to have fewer epochs than before end like any other: with a whole epoch, validated or kept."""
    progress = run.progress
    begun = progress.epoch + (progress.step > 0 or progress.row is not None)
    if begun > run.num_epochs:
        _logger.info(f'{begun} epochs have begun already: the run ends with these, not with {run.num_epochs}')
        run.num_epochs = begun
    if progress.epoch < run.num_epochs:
        return
    last = progress.summary[-1]
    ended = progress.best_epoch == last['epoch'] if run.data.validation is None else 'eval_mAP' in last
    if not ended:  # back to where its batches are done
        progress.row = progress.summary.pop()
        progress.epoch -= 1


def _write_start(run: Run) -> None:
    save_config(run.folder, {**asdict(run.config), 'resume': ''})
    save_json(run.folder / CLASS_MAP, run.data.class_map)
    save_model_config(run.eval_model, run.folder / MODEL_CONFIG, model_args=model_args(run.config), input_size=run.size)


def _log_start(run: Run) -> None:
    config, data = run.config, run.data
    held_out = len(data.validation.test.identities()) if data.validation is not None else 0
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    precision = str(run.dtype or torch.float32).removeprefix('torch.')
    processes = process()[1]
    _logger.info(
        f'{config.model}, {parameters / 1e6:.2f} M parameters, images {run.size[1]}x{run.size[2]}, '
        f'on {run.device} in {precision}{f", {processes} processes" if processes > 1 else ""}'
    )
    _logger.info(
        f'{len(data.records):,} images of {len(data.class_map):,} identities to train on, {held_out} held out for '
        f'validation; {run.batches_per_epoch} batches of {data.sampler.identities_per_batch} identities x '
        f'({config.images_per_modality} visible + {config.images_per_modality} infrared) per epoch'
        f'{" in each process" if processes > 1 else ""}'
    )
    _logger.info(f'Everything goes to {run.folder}')
    if run.progress.epoch >= run.num_epochs:
        _logger.info(f'All {run.num_epochs} epochs are done already; give more --epochs to go on')


def _tracker(run: Run) -> Tracker:
    config, sampler = run.config, run.data.sampler
    return Tracker(
        num_epochs=run.num_epochs,
        steps_per_epoch=run.batches_per_epoch,
        images_per_step=2 * sampler.identities_per_batch * sampler.images_per_modality * process()[1],
        device=run.device,
        log_interval=config.log_interval,
        tensorboard=run.folder / TENSORBOARD if config.tensorboard and is_primary() else None,
        steps_done=run.progress.epoch * run.batches_per_epoch + run.progress.step,
    )


def _is_validated(run: Run) -> bool:
    """Whether the current epoch ends with a validation."""
    done = run.progress.epoch + 1
    return run.data.validation is not None and (done == run.num_epochs or done % run.config.val_interval == 0)


def _validate(run: Run, tracker: Tracker) -> Report:
    report = evaluate(
        run.eval_model,
        run.data.validation,
        device=run.device,
        size=run.size[1:],
        amp_dtype=run.dtype,
        store=run.data.validation_store,
    )
    scores = _scores(report)
    _logger.info(f'validation: {", ".join(f"{name} {100 * value:.2f} %" for name, value in scores.items())}')
    tracker.validated(run.progress.epoch, scores)
    return report


def _scores(report: Report) -> dict[str, float]:
    """Means over the protocols, which are the two directions."""
    results = report.protocols.values()
    return {
        metric: sum(result.mean[metric] for result in results) / len(results) for metric in ('rank1', 'mAP', 'mINP')
    }


def _finish_epoch(run: Run, report: Report | None) -> None:
    """Keep the model if it is the best, then count the epoch as done."""
    progress = run.progress
    scores = {} if report is None else on_primary(lambda: _scores(report))  # other hardware may differ in a last bit
    if _is_best(run, scores):
        progress.best_epoch, progress.best_mAP = progress.epoch, scores.get('mAP')
        on_primary(lambda: _save_best(run, scores, report))
    progress.summary.append({**progress.row, **{f'eval_{name}': value for name, value in scores.items()}})
    progress.epoch, progress.step, progress.sums, progress.row = progress.epoch + 1, 0, {}, None
    on_primary(lambda: write_summary(run.folder, progress.summary))
    save(run)


def _is_best(run: Run, scores: Mapping[str, float]) -> bool:
    """Whether to keep this epoch's model: by its validation, or without one because it is the last."""
    if run.data.validation is None:
        return run.progress.epoch + 1 == run.num_epochs
    return bool(scores) and (run.progress.best_mAP is None or scores['mAP'] > run.progress.best_mAP)


def _save_best(run: Run, scores: Mapping[str, float], report: Report | None) -> None:
    facts = {
        'dataset': run.data.dataset.name,
        'dataset_options': run.data.dataset.options,
        'identities': len(run.data.class_map),
        'epoch': run.progress.epoch,
        'validation': dict(scores),
        'num_features': run.eval_model.num_features,
        'training': asdict(run.config),
    }
    save_model_folder(
        run.eval_model,
        run.folder / BEST,
        facts=json.loads(json.dumps(facts, default=str)),  # data roots may be paths
        model_args=model_args(run.config),
        table='' if report is None else f'On held-out training identities (validation):\n\n{report}',
        input_size=run.size,
    )
