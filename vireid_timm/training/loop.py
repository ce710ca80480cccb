"""The training loop: a thin one over timm's task, optimisers, schedulers, scaler and averaging.

`train` sets a run up or resumes it, `_fit` goes through the epochs; a step is in `step.py`.
"""

import csv
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image
from torch import nn

from ..constants import MODALITIES, RETRIEVALS
from ..data.augment import Augment
from ..data.loader import Batch, load_batches
from ..device import seeded_torch
from ..distributed import (
    all_ranks,
    any_rank,
    from_rank_zero,
    gather,
    is_lost_rank,
    is_rank_zero,
    known_to_all,
    process_group,
    rank_and_world_size,
)
from ..evaluation.evaluate import calibrate, evaluate, plain_options
from ..evaluation.report import FEW_PEOPLE, Report
from ..figures.curves import plot_curves
from ..files import save_json, whole_file, whole_folder
from ..hub.folder import (
    load_model,
    model_calibration,
    read_config,
    save_calibration,
    save_model_config,
    save_model_folder,
)
from ..run_folder import BEST, CLASS_MAP, CONFIG, MODEL_CONFIG, SUMMARY, has_checkpoint, open_run_folder
from .checkpoint import (
    AGAINST_NAN,
    CheckpointInterval,
    check_weights,
    resolved_config,
    resume,
    save_checkpoint,
    set_damaged_aside,
)
from .config import TrainConfig
from .interrupt import Stopped, StopRequest, stop_signals
from .progress import TENSORBOARD, NonFiniteLoss, Progress
from .run import Run, create_run, frozen_norms, model_args, refuse_existing_run, run_folder_of
from .step import train_step

_logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What `train` returns.

    Attributes:
        folder: The run's folder.
        best: The Hub-ready folder of the best epoch's model; of the last epoch's without validation.
        best_epoch: That epoch, from 0.
        best_mAP: Its mAP on the validation identities, mean over both directions; None without validation.
        summary: One row per epoch, as in `summary.csv`.
    """

    folder: Path
    best: Path
    best_epoch: int
    best_mAP: float | None
    summary: list[dict[str, Any]]


def train(config: TrainConfig | Mapping[str, Any]) -> TrainResult:
    """Train a network; what `vireid train` does.

    Ranks that `torchrun` started train together, each with its own part of every batch. In the main thread Ctrl-C and
    SIGTERM end the training after the current step and a checkpoint.

    Args:
        config: A `TrainConfig`, or settings by name over its defaults. With `resume` given as a setting, those of the
            resumed run are the defaults.

    Returns:
        Where the run's folder and best model are, and how it went; the same on every rank.

    Raises:
        ValueError: A setting or data that cannot work; the message says which and what to do.
        OSError: Something cannot be written or read; the last checkpoint is intact.
        FloatingPointError: The loss became NaN or infinite; the last checkpoint is from before.
        Stopped: Ctrl-C or SIGTERM, a KeyboardInterrupt; the message says how to resume.
    """
    config = resolved_config(config)
    with process_group(config.device) as device:
        config, folder = from_rank_zero((config, run_folder_of(config)))
        with seeded_torch(config.seed, config.deterministic, device), stop_signals() as stop:
            try:
                run = create_run(config, folder, device)
                with ExitStack() as stack:
                    all_ranks(lambda: stack.enter_context(_open_folder(run)) if is_rank_zero() else None)
                    if config.resume:
                        checkpoint = resume(run)
                        if is_rank_zero():
                            set_damaged_aside(checkpoint)
                    try:
                        return _fit(run, stop)
                    except NonFiniteLoss as error:
                        raise _diverged(run, error) from None
            except Stopped as stopped:
                stopped.outcome = _how_to_resume(folder)
                raise
            except RuntimeError as error:  # another rank has stopped already
                if stop.signal is None or not is_lost_rank(error):
                    raise
                raise Stopped(stop.signal, _how_to_resume(folder)) from None


@contextmanager
def _open_folder(run: Run) -> Iterator[None]:
    """Open the run's folder; a new run must find no other one there."""
    with open_run_folder(run.folder):
        refuse_existing_run(run.config, run.folder)  # again: one may have come since the settings were checked
        yield


def _how_to_resume(folder: Path) -> str:
    if not has_checkpoint(folder):
        return 'no checkpoint was saved yet'
    command = 'vireid' if rank_and_world_size()[1] == 1 else 'torchrun ... -m vireid_timm'
    return f'resume with: {command} train --resume {shlex.quote(str(folder))}'


def _fit(run: Run, stop: StopRequest) -> TrainResult:
    """Train: for each epoch, for each batch: step, log, checkpoint; then validate and keep the best model."""
    config, state, folder = run.config, run.state, run.folder
    _settle_last_epoch(run)
    if is_rank_zero():
        _write_settings(run)
    _log_start(run)
    interval = CheckpointInterval(config.checkpoint_interval)
    with closing(create_progress(run)) as progress, stop.deferred():
        while state.epoch < run.num_epochs:
            is_due = run.is_last_epoch or (state.epoch + 1) % config.val_interval == 0
            is_validated = run.data.validation is not None and is_due
            if state.row is None:  # else it was resumed after its batches
                start_epoch(run, progress)
                for group in batch_groups(run):
                    for batch, result in zip(group, train_step(run, group), strict=True):
                        progress.add(result, batch.labels)
                    state.step = progress.step
                    progress.log_if_due(learning_rates(run))
                    if state.step < run.batches_per_epoch:
                        save_if_due(run, progress, interval, stop)
                run.task.share_running_statistics(config.dist_bn)
                state.row = {'epoch': state.epoch, **progress.end_epoch(learning_rates(run))}
                # Also before the first results are written: a folder with results but no checkpoint is refused.
                if is_validated or state.epoch == 0:
                    save_checkpoint(run)
            report = None
            if is_validated:
                with stop.immediate():
                    report = _validate(run)
            _end_epoch(run, report, progress)
            interval.restart()
            stop.check()
    if is_rank_zero():
        plot_curves(folder, state.summary)
    with stop.immediate():
        _finish_best(run)
    best = state.best
    _logger.info(f'Done: {folder} (best model in {folder / BEST}, from epoch {best["epoch"]})')
    return TrainResult(folder, folder / BEST, best['epoch'], best.get('eval_mAP'), state.summary)


def _settle_last_epoch(run: Run) -> None:
    """Let a run that is resumed with fewer epochs finish its current epoch, then validate it or keep its model."""
    state = run.state
    begun = state.epoch + (state.step > 0 or state.row is not None)
    if begun > run.num_epochs:
        _logger.info(f'{begun} epochs have begun already: the run ends with these, not with {run.num_epochs}')
        run.num_epochs = begun
    if state.epoch == run.num_epochs and not from_rank_zero(_is_kept(run)):
        state.row = state.summary.pop()  # back to where its batches are done


def _is_kept(run: Run) -> bool:
    """Return whether the last epoch was validated, or without validation whether `best` holds its model."""
    last = run.state.summary[-1]
    if run.data.validation is not None:
        return 'eval_mAP' in last
    try:
        return read_config(run.folder / BEST)['vireid']['epoch'] == last['epoch']
    except (ValueError, KeyError):
        return False


def _write_settings(run: Run) -> None:
    with whole_file(run.folder / CONFIG) as temporary:  # usable as --config
        settings = {**asdict(run.config), 'resume': ''}
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding='utf-8')
    save_json(run.folder / CLASS_MAP, run.data.class_map)
    _write_model_config(run)


def _write_model_config(run: Run) -> None:
    save_model_config(
        run.eval_model, run.folder / MODEL_CONFIG, model_args=model_args(run.config), input_size=run.input_size
    )


def _log_start(run: Run) -> None:
    config, data = run.config, run.data
    held_out = len(data.validation.test.identities()) if data.validation is not None else 0
    world_size = rank_and_world_size()[1]
    _logger.info(
        f'{config.model}, {run.num_parameters / 1e6:.2f} M parameters, images {run.input_size[1]}x{run.input_size[2]}, '
        f'on {run.device} in {run.precision}{", steps as a CUDA graph" if run.graph else ""}'
        f'{f", {world_size} ranks" if world_size > 1 else ""}'
    )
    _logger.info(
        f'{len(data.records):,} images of {len(data.class_map):,} identities to train on, {held_out} identities held '
        f'out for validation; {run.batches_per_epoch} batches of {data.sampler.identities_per_batch} identities x '
        f'({config.images_per_modality} visible + {config.images_per_modality} infrared) per epoch'
        f'{" on each rank" if world_size > 1 else ""}'
    )
    _logger.info(f'Everything goes to {run.folder}')
    if run.state.epoch >= run.num_epochs:
        _logger.info(f'All {run.num_epochs} epochs are done already; to continue, give more --epochs')


def create_progress(run: Run) -> Progress:
    """Return the progress of a run that starts or resumes."""
    config, sampler = run.config, run.data.sampler
    return Progress(
        num_epochs=run.num_epochs,
        steps_per_epoch=run.batches_per_epoch,
        images_per_step=2 * sampler.identities_per_batch * sampler.images_per_modality * sampler.world_size,
        device=run.device,
        log_interval=config.log_interval,
        tensorboard=run.folder / TENSORBOARD if config.tensorboard and is_rank_zero() else None,
        steps_done=run.state.epoch * run.batches_per_epoch + run.state.step,
    )


def start_epoch(run: Run, progress: Progress) -> None:
    """Prepare network, schedule and progress for the current epoch, or the rest of it."""
    training_mode(run)
    if run.scheduler is not None:
        run.scheduler.step(run.state.epoch)
    run.optimizer.zero_grad()
    progress.start_epoch(run.state.epoch, run.state.step, run.state.sums)


def training_mode(run: Run) -> None:
    """Set network and losses to training mode, except for batch norm that --freeze-bn holds."""
    run.task.train()
    for norm in frozen_norms(run.config, run.model):
        norm.eval()


def epoch_batches(run: Run, first_step: int = 0) -> Iterator[Batch]:
    """Yield this rank's augmented batches of the current epoch; close the iterator to end its threads."""
    data, config = run.data, run.config
    return load_batches(
        data.store,
        data.labels,
        data.sampler,
        run.augments,
        run.device,
        epoch=run.state.epoch,
        first_step=first_step,
        seed=config.seed,
    )


def batch_groups(run: Run) -> Iterator[list[Batch]]:
    """Yield the rest of the epoch's batches, those of one optimiser step together."""
    with closing(epoch_batches(run, run.state.step)) as batches:
        while group := list(islice(batches, run.config.grad_accum_steps)):
            yield group


def learning_rates(run: Run) -> dict[str, float]:
    """Return the current learning rates: `new` of what was initialised, `pretrained` of what was loaded."""
    pretrained, new = (group['lr'] for group in run.optimizer.param_groups)
    return {'new': new, 'pretrained': pretrained}


def save_if_due(run: Run, progress: Progress, interval: CheckpointInterval, stop: StopRequest) -> None:
    """Save a checkpoint within an epoch if one is due or the run is to stop, on all ranks if on any."""
    if not any_rank(stop.signal is not None or interval.due(run.num_updates)):
        return
    progress.read()  # raises if a loss was not finite: nothing from after that is saved
    run.state.sums = dict(progress.sums)
    save_checkpoint(run)
    interval.restart()
    _logger.info(f'Saved epoch {run.state.epoch}, step {run.state.step} of {run.batches_per_epoch}')
    stop.check()


def _validate(run: Run) -> Report:
    data = run.data
    return evaluate(
        run.eval_model,
        data.validation,
        device=run.device,
        size=run.input_size[1:],
        amp_dtype=run.amp_dtype,
        store=data.validation_store,
    )


def _finish_best(run: Run) -> None:
    """Choose on the validation identities what the best model retrieves with, and calibrate it, once. Collective."""
    data, folder = run.data, run.folder / BEST
    if data.validation is None or from_rank_zero(is_rank_zero() and model_calibration(folder) is not None):
        return
    model = from_rank_zero(load_model(folder) if is_rank_zero() else None)
    if 'retrieval' not in run.config.model_kwargs and len(data.validation.test.identities()) >= FEW_PEOPLE:
        _choose_retrieval(run, model)
    try:
        calibration = calibrate(
            model, data.validation, device=run.device, size=run.input_size[1:], store=data.validation_store
        )
    except ValueError as error:
        _logger.info(f'No calibration from similarities to probabilities: {error}')
        return
    source = {'dataset': data.dataset.name, 'options': plain_options(data.dataset), 'split': 'validation'}
    if is_rank_zero():
        save_calibration(replace(calibration, fitted_on={**calibration.fitted_on, **source}), folder)


def _choose_retrieval(run: Run, model: nn.Module) -> None:
    """Let the best model retrieve before or after BN, whichever finds the validation identities better."""
    options = dict(device=run.device, size=run.input_size[1:], store=run.data.validation_store)
    report = evaluate(model, run.data.validation, **options)
    own, (other,) = model.retrieval, set(RETRIEVALS) - {model.retrieval}
    scores, others = {own: _scores(report)}, [result.other_features for result in report.protocols.values()]
    if all(others):  # there are none if they are not finite
        scores[other] = _means(others)
    best = from_rank_zero(max(scores, key=lambda kind: scores[kind]['mAP']))  # its own if they are equal
    measured = ', '.join(f'{100 * scores[kind]["mAP"]:.1f} % {kind}' for kind in RETRIEVALS if kind in scores)
    _logger.info(f'Validation mAP of the best model: {measured}; it retrieves {best}')
    if best == own:
        return
    model.retrieval = run.eval_model.retrieval = run.model.retrieval = best
    report = evaluate(model, run.data.validation, **options)
    if is_rank_zero():
        complete = timm.create_model(f'local-dir:{run.folder / BEST}', pretrained=True)  # with its classifiers
        complete.retrieval = best
        _save_model(run, complete, {**read_config(run.folder / BEST)['vireid'], 'validation': scores[best]}, report)
        _write_model_config(run)


def _scores(report: Report) -> dict[str, float]:
    """Return the means over the protocols, which are the two directions."""
    return _means([result.mean for result in report.protocols.values()])


def _means(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: sum(result[metric] for result in results) / len(results) for metric in ('rank1', 'mAP', 'mINP')}


def _end_epoch(run: Run, report: Report | None, progress: Progress) -> None:
    """Count the epoch as done, keep its model if it is the best so far, and write the table and a checkpoint."""
    state, is_last = run.state, run.is_last_epoch
    if is_rank_zero():
        check_weights(run)  # before `best` is written
    # Rank 0's: on other hardware a last bit may differ, and all ranks have to decide the same.
    scores = {} if report is None else from_rank_zero(_scores(report))
    if scores:
        progress.log_validation(scores)
    row = {**state.row, **{f'eval_{name}': value for name, value in scores.items()}}
    state.summary.append(row)
    state.step, state.sums, state.row = 0, {}, None
    if is_rank_zero():
        if state.best is row and (scores or is_last):
            _save_best(run, scores, report)
        _write_summary(run)
    # Weights that `last` holds already take its place: `previous` stays a step back.
    save_checkpoint(run, replace=report is not None or state.epoch == 1)


def _save_best(run: Run, scores: Mapping[str, float], report: Report | None) -> None:
    facts = {
        'dataset': run.data.dataset.name,
        'dataset_options': run.data.dataset.options,
        'identities': len(run.data.class_map),
        'epoch': run.state.summary[-1]['epoch'],
        'validation': dict(scores),
        'num_features': run.eval_model.head_hidden_size,
        'training': asdict(run.config),
    }
    _save_model(run, run.eval_model, json.loads(json.dumps(facts, default=str)), report)  # data roots may be paths


def _save_model(run: Run, model: nn.Module, facts: dict[str, Any], report: Report | None) -> None:
    save_model_folder(
        model,
        run.folder / BEST,
        facts=facts,
        model_args=model_args(run.config),
        table='' if report is None else f'On held-out training identities (validation):\n\n{report}',
        input_size=run.input_size,
    )


def _write_summary(run: Run) -> None:
    """Write all epochs anew: timm's `update_summary` appends, and would keep epochs that a resumed run repeats."""
    rows = run.state.summary
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with whole_file(run.folder / SUMMARY) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, restval='')
        writer.writeheader()
        writer.writerows(rows)


def _diverged(run: Run, error: NonFiniteLoss) -> FloatingPointError:
    """Return the error that ends a run whose loss is not finite, and save the images of the batch. Collective."""
    rank, world_size = rank_and_world_size()
    flags = gather(torch.tensor(error.own, device=run.device))
    culprits = flags.nonzero().flatten().tolist() or list(range(world_size))
    where = f', on rank {", ".join(map(str, culprits))} of {world_size}' if world_size > 1 else ''
    folder = run.folder / f'nan-epoch{run.state.epoch}-step{error.step}'
    images = f'Its images are in {folder}{"-rank*" if world_size > 1 else ""}'
    if rank in culprits:
        try:
            _save_batch(run, error.step, Path(f'{folder}-rank{rank}') if world_size > 1 else folder)
        except Exception as problem:  # whatever it is, the loss is the news
            images = f'Its images could not be saved ({problem})'
    return known_to_all(
        FloatingPointError(
            f'the loss became NaN or infinite in epoch {run.state.epoch} at step {error.step}{where}; the last '
            f'checkpoint is from before. {images}. {AGAINST_NAN}'
        )
    )


def _save_batch(run: Run, step: int, folder: Path) -> None:
    """Make a batch of this epoch again and save it: the augmented images, and in `batch.json` what each one is."""
    with closing(epoch_batches(run, step)) as batches:
        batch = next(batches)
    records = run.data.records
    with whole_folder(folder) as temporary:
        about = []
        for modality, images in zip(MODALITIES, batch.inputs, strict=True):
            for image in _denormalized(images, run.augments[modality]):
                number, name = len(about), f'{len(about):03d}-{modality}.png'
                Image.fromarray(image.numpy()).save(temporary / name)
                identity, path = (str(column[batch.rows[number]]) for column in (records.identity, records.path))
                label = batch.labels[number].item()
                about.append(dict(file=name, identity=identity, path=path, modality=modality, label=label))
        save_json(temporary / 'batch.json', about)


def _denormalized(images: torch.Tensor, augment: Augment) -> torch.Tensor:
    """Network input [B, 3, H, W] as bytes [B, H, W, 3] on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.mean, augment.std))
    values = images.cpu().float() * std + mean
    return values.nan_to_num(0).mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
