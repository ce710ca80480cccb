"""One optimiser step: losses and gradients of its batches, and the update."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.utils import dispatch_clip_grad

from ..data.loader import Batch, step_seed
from ..distributed import rank_and_world_size
from .joined_triplet import JoinedTriplet
from .run import Run
from .task import infrared_rows


def train_step(run: Run, group: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    """Run one optimiser step; does not wait for the device, except for the loss scaling of float16.

    Args:
        run: The run; its state is that before the step.
        group: The batches whose gradients are averaged for it.

    Returns:
        What the task returned for each batch, without gradients. The next step may overwrite it.

    Raises:
        ValueError: The device has too little memory, or the step cannot become a CUDA graph.
    """
    try:
        results = _learn_group(run, group)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f'a step of {sum(len(batch.rows) for batch in group)} images does not fit into the memory of '
            f'{run.device}; try fewer --identities-per-batch (with --grad-accum-steps), --grad-checkpointing, or a '
            'smaller --input-size'
        ) from error
    number = run.num_updates + 1
    run.task.update_ema(step=number)
    if run.scheduler is not None:
        run.scheduler.step_update(number)
    return results


def _learn_group(run: Run, group: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    results = []
    for batch, joined in zip(group, _joined_triplets(run, group), strict=True):
        is_last = batch is group[-1]
        work = partial(_learn, run, joined=joined, count=len(group), update=is_last)
        _seed(run, batch)
        with nullcontext() if is_last else run.task.no_sync():
            inputs = (*batch.inputs, batch.labels)
            results.append(work(*inputs) if run.graph is None else run.graph(work, *inputs))
    return results


def _learn(
    run: Run,
    visible: torch.Tensor,
    infrared: torch.Tensor,
    labels: torch.Tensor,
    joined: Mapping[str, JoinedTriplet] | None,
    count: int,
    update: bool,
) -> dict[str, torch.Tensor]:
    """Add the gradients of one batch of `count`, and update the weights after the last one.

    A CUDA graph records it: nothing here may read back from the device or depend on the step's number.
    """
    with _autocast(run):
        result = run.task((visible, infrared), labels, joined=joined)
    loss, clip, mode = result['loss'] / count, run.config.clip_grad, run.config.clip_mode
    parameters = run.task.get_clip_parameters() if clip is not None else None
    if run.scaler is not None:
        run.scaler(loss, run.optimizer, clip_grad=clip, clip_mode=mode, parameters=parameters, need_update=update)
    else:
        loss.backward()
        if update and clip is not None:
            dispatch_clip_grad(parameters, clip, mode=mode)
        if update:
            run.optimizer.step()
    if update:
        run.optimizer.zero_grad()
    return {name: value.detach() for name, value in result.items()}


def _joined_triplets(run: Run, group: Sequence[Batch]) -> list[Any]:
    """Return each batch's part in a triplet loss over all of them with --cached-triplet, else None for each."""
    if not run.config.cached_triplet:
        return [None] * len(group)
    features = []
    for batch in group:
        _seed(run, batch)  # dropout draws the same again when the gradients are computed
        with _autocast(run):
            features.append(run.task.cache_features(batch.inputs))
    return run.task.join_triplet(features, [batch.labels for batch in group], infrared_rows(*group[0].inputs))


def _seed(run: Run, batch: Batch) -> None:
    torch.manual_seed(step_seed(run.config.seed, run.state.epoch, batch.step, rank_and_world_size()[0]))


def _autocast(run: Run) -> torch.autocast:
    return torch.autocast(run.device.type, dtype=run.amp_dtype or torch.bfloat16, enabled=run.amp_dtype is not None)
