"""The training loop: a thin one over timm's task, optimisers, schedulers, scaler and averaging.

The host waits for the device only where something is reported or saved, and for the loss scaling of float16.
"""

import logging
from collections.abc import Sequence
from contextlib import closing, nullcontext
from itertools import islice
from typing import Any

import torch
from timm.utils import dispatch_clip_grad

from ..distributed import any_process, mean_over_processes, process, together
from .batches import Batch, batches, step_seed
from .checkpoint import AGAINST_NAN, CheckpointInterval, save
from .diverged import save_batch
from .interrupt import StopRequest
from .meter import Meter, NonFiniteLoss
from .progress import Tracker
from .run import Run, frozen_norms

_logger = logging.getLogger(__name__)


def train_one_epoch(
    run: Run,
    tracker: Tracker,
    interval: CheckpointInterval,
    stop: StopRequest,
) -> dict[str, float]:
    """The rest of the current epoch: all of it, unless the run was resumed in the middle.

    Args:
        run: The run; its progress follows.
        tracker: Reports what was read back.
        interval: When to save.
        stop: Looked at after every optimiser step.

    Returns:
        Means of loss, its terms and accuracy, prefixed `train_`, the images per second and the learning rate.

    Raises:
        FloatingPointError: A loss or weight that is not finite.
        Stopped: On request, after saving.
    """
    config, task, progress = run.config, run.task, run.progress
    training_mode(run)
    if run.scheduler is not None:
        run.scheduler.step(progress.epoch)
    run.optimizer.zero_grad()
    meter = Meter(progress.step, progress.sums)
    tracker.start(progress.step)
    drawn = batches(
        run.data, run.augments, run.device, epoch=progress.epoch, first_step=progress.step, seed=config.seed
    )
    try:
        with closing(drawn):
            while group := together(lambda: list(islice(drawn, config.grad_accum_steps))):
                for batch, result in zip(group, train_step(run, group), strict=True):
                    meter.add(result, batch.labels)
                progress.step += len(group)
                if tracker.due(progress.step):
                    meter.read()
                    tracker.interval(progress.epoch, progress.step, meter.recent(), _rates(run.optimizer))
                if progress.step < run.batches_per_epoch:
                    _save_if_wanted(run, meter, interval, stop)
        meter.read()
    except NonFiniteLoss as error:
        step, culprits = error.step, _those_with(error.own)
        together(lambda: _fail(run, step, culprits))
    task.share_running_statistics(config.dist_bn)
    speed = tracker.epoch_done(progress.epoch, meter.means(), _rates(run.optimizer))
    return {
        **{f'train_{name}': value for name, value in meter.means().items()},
        'train_images_per_second': speed,
        'lr': max(_rates(run.optimizer).values()),
    }


def training_mode(run: Run) -> None:
    """Network and losses in training mode, except for batch norm that --freeze-bn holds."""
    run.task.train()
    for norm in frozen_norms(run.config, run.model):
        norm.eval()


def train_step(run: Run, group: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    """One optimiser step; the device is not waited for.

    Args:
        run: The run; its progress is that before the step.
        group: The batches whose gradients are averaged for it.

    Returns:
        What the task returned for each of them, without gradients.

    Raises:
        ValueError: The device has too little memory.
    """
    try:
        return _train_step(run, group)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f'a step of {sum(len(batch.rows) for batch in group)} images does not fit into the memory of '
            f'{run.device}; try fewer --identities-per-batch (with --grad-accum-steps), --grad-checkpointing, or a '
            'smaller --input-size'
        ) from error


def _train_step(run: Run, group: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    task = run.task
    results = []
    for batch, joined in zip(group, _joined_triplet(run, group), strict=True):
        last = batch is group[-1]
        with nullcontext() if last else task.no_sync():
            _seed(run, batch)
            with _autocast(run):
                result = task(batch.inputs, batch.labels, joined=joined)
            _backward(run, result['loss'] / len(group), last)
        results.append({name: value.detach() for name, value in result.items()})
    run.optimizer.zero_grad()
    number = run.num_updates + 1
    task.update_ema(step=number)
    if run.scheduler is not None:
        run.scheduler.step_update(number)
    return results


def _joined_triplet(run: Run, group: Sequence[Batch]) -> list[Any]:
    """With --cached-triplet each batch's part in a triplet loss over all of them, else None for each."""
    if not run.config.cached_triplet:
        return [None] * len(group)
    features = []
    for batch in group:
        _seed(run, batch)  # dropout draws the same again when the gradients are computed
        with _autocast(run):
            features.append(run.task.cache_features(batch.inputs))
    return run.task.join_triplet(features, [batch.labels for batch in group])


def _seed(run: Run, batch: Batch) -> None:
    torch.manual_seed(step_seed(run.config.seed, run.progress.epoch, batch.step, process()[0]))


def _autocast(run: Run) -> torch.autocast:
    return torch.autocast(run.device.type, dtype=run.dtype or torch.bfloat16, enabled=run.dtype is not None)


def _backward(run: Run, loss: torch.Tensor, update: bool) -> None:
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


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    pretrained, new = (group['lr'] for group in optimizer.param_groups)
    return {'new': new, 'pretrained': pretrained}


def _save_if_wanted(run: Run, meter: Meter, interval: CheckpointInterval, stop: StopRequest) -> None:
    """A checkpoint if one is due or the run is to stop; in all processes if in one."""
    if not any_process(stop.signal is not None or interval.due(run.num_updates)):
        return
    meter.read()  # raises if a loss was not finite: nothing from after that is saved
    run.progress.sums = dict(meter.sums)
    save(run)
    interval.restart()
    _logger.info(f'Saved epoch {run.progress.epoch}, step {run.progress.step} of {run.batches_per_epoch}')
    stop.check()


def _those_with(flag: bool) -> list[int]:
    """Numbers of the processes for which it is so; of all of them if for none."""
    number, count = process()
    flags = torch.zeros(count)
    flags[number] = flag
    return mean_over_processes(flags).nonzero().flatten().tolist() or list(range(count))


def _fail(run: Run, step: int, culprits: list[int]) -> None:
    """End a training whose loss is not finite, with what helps to find out why."""
    epoch, (number, count) = run.progress.epoch, process()
    where = f', in process {", ".join(map(str, culprits))} of {count}' if count > 1 else ''
    images = f'Its images are in {run.folder / f"nan-epoch{epoch}-step{step}"}{"-process*" if count > 1 else ""}'
    if number in culprits:
        try:
            save_batch(run, epoch, step)
        except (OSError, ValueError) as error:
            images = f'Its images could not be saved ({error})'
    raise FloatingPointError(
        f'the loss became NaN or infinite in epoch {epoch} at step {step}{where}; what was saved is from before. '
        f'{images}. {AGAINST_NAN}'
    )
