"""What `vireid train` would do with the same settings: measured on one step, with nothing trained and nothing kept."""

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from .batches import Batch, batches
from .checkpoints import resolved_config, resume
from .config import TrainConfig
from .datasets import split_identities
from .device import end_distributed, init_distributed, process
from .factory import Run, set_up
from .loop import train_step, training_mode
from .pictures import StorePlan, plan_store
from .records import INFRARED, MODALITIES, UNKNOWN_CAMERA, VISIBLE, Records
from .report import aligned
from .tracking import peak_memory
from .train import lent

NAMED = 10  # identities or pictures that a line names
TIMED_STEPS = 2


def dry_run(settings: Mapping[str, Any]) -> str:
    """What `vireid train --dry-run` prints; nothing is trained, and nothing is written.

    The pictures of one optimiser step are decoded (with `skip_broken` all of them, to know which are broken) and
    stepped on a few times, so that what is said of memory and time is measured. Under `torchrun` all processes take
    part.

    Args:
        settings: As for `train`.

    Returns:
        Settings, data, batches, memory and time, as text.

    Raises:
        ValueError: What `train` would raise.
    """
    config = resolved_config(settings)
    joined = process()[1] > 1
    device = init_distributed(config.device)
    try:
        with lent(config, device):
            run = set_up(dataclasses.replace(config, cache='off'), device)
            if config.resume:
                resume(run)
            plans = _plans(run, config.cache)
            measured = _measure(run)
            found = (_settings(config), _data(run), _batches(run), _stores(run, plans, measured))
            return '\n\n'.join('\n'.join(lines) for lines in (*found, _memory(run, measured), _time(run, measured)))
    finally:
        if not joined:
            end_distributed()


@dataclasses.dataclass
class _Measured:
    """One optimiser step: seconds for reading its pictures and for itself, and bytes at its peak."""

    reading: float
    pictures: int
    step: float
    peak: int | None


def _measure(run: Run) -> _Measured:
    epoch, config = min(run.progress.epoch, run.num_epochs - 1), run.config
    drawn = batches(run.data, run.augments, run.device, epoch=epoch, seed=config.seed)
    with closing(drawn):
        group: list[Batch] = list(islice(drawn, config.grad_accum_steps))
    rows = [row for batch in group for row in batch.rows]
    start = time.perf_counter()
    run.data.store[run.data.store.intact()[rows]]
    reading = time.perf_counter() - start
    if run.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(run.device)
    training_mode(run)
    try:
        train_step(run, group)  # what is compiled, allocated and tuned in it is not part of the others
        _wait_for(run.device)
        start = time.perf_counter()
        for _ in range(TIMED_STEPS):
            train_step(run, group)
        _wait_for(run.device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f'a step of {len(rows)} pictures does not fit into the memory of {run.device}; try fewer '
            '--identities-per-batch (with --grad-accum-steps), --grad-checkpointing, or a smaller --input-size'
        ) from error
    step = (time.perf_counter() - start) / TIMED_STEPS
    return _Measured(reading, len(rows), step, peak_memory(run.device))


def _wait_for(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.get_device_module(device).synchronize()


def _settings(config: TrainConfig) -> list[str]:
    defaults = dataclasses.asdict(TrainConfig())
    given = {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
    rows = [[f'  {name}', _value(value)] for name, value in given.items()]
    return ['Settings that are not the defaults (`vireid train --help` has those):', *aligned(rows, left=(0, 1))]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ' '.join(f'{name}={_value(entry)}' for name, entry in value.items())
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _data(run: Run) -> list[str]:
    data = run.data
    named = ', '.join(f'{name}={_value(value)}' for name, value in data.dataset.options.items())
    used = data.records[(data.labels >= 0).numpy()]
    held_out = data.validation.test if data.validation is not None else used[:0]
    rows = [['', 'identities', VISIBLE, INFRARED]]
    rows += [_counts('  to train on', used), _counts('  held out for validation', held_out)]
    lines = [f'Data: {data.dataset.name}{f" ({named})" if named else ""}', *aligned(rows)]
    lines += [f'  {modality} by camera: {_by_camera(used, modality)}' for modality in MODALITIES]
    lines += [
        f'  held out: {_some(held_out.identities())}'
        if len(held_out)
        else '  nobody is held out: the model of the last epoch is kept'
    ]
    if data.sampler.skipped:
        lines += [f'  left out, with pictures of one modality only: {_some(data.sampler.skipped)}']
    if data.store.broken:
        lines += [
            f'  left out, {len(data.store.broken)} that cannot be read: {_some(list(data.store.broken.values()))}'
        ]
    return lines


def _counts(name: str, records: Records) -> list[str]:
    counts = (len(records.identities()), *((records.modality == modality).sum() for modality in MODALITIES))
    return [name, *(f'{count:,}' for count in counts)]


def _by_camera(records: Records, modality: str) -> str:
    count = Counter(records.camera[records.modality == modality].tolist())
    cameras = {'unknown' if camera == UNKNOWN_CAMERA else f'{camera}': count[camera] for camera in sorted(count)}
    return ', '.join(f'{camera}: {pictures:,}' for camera, pictures in cameras.items())


def _some(names: list[str]) -> str:
    more = f', and {len(names) - NAMED} more' if len(names) > NAMED else ''
    return f'{", ".join(names[:NAMED])}{more}'


def _batches(run: Run) -> list[str]:
    sampler, config = run.data.sampler, run.config
    people, each, accumulated = sampler.identities_per_batch, sampler.pictures_per_modality, config.grad_accum_steps
    count = 2 * people * each
    line = f'  {people} identities x ({each} visible + {each} infrared) = {count} pictures per batch'
    ranks = process()[1]
    if ranks > 1:
        line += f', {ranks} processes: {ranks * count}'
    if accumulated > 1:
        line += f', {accumulated} batches accumulated: {accumulated * ranks * count} per optimiser step'
    steps = run.batches_per_epoch
    lines = [
        'Batches',
        line,
        f'  {steps:,} per epoch, {run.num_epochs:,} epochs: {steps * run.num_epochs:,} batches, '
        f'{run.updates_per_epoch * run.num_epochs:,} optimiser steps',
    ]
    done = _batches_done(run)
    return [*lines, f'  {done:,} batches are done; it goes on in epoch {run.progress.epoch}'] if done else lines


def _batches_done(run: Run) -> int:
    return run.progress.epoch * run.batches_per_epoch + run.progress.step


def _plans(run: Run, cache: str) -> dict[str, tuple[int, StorePlan]]:
    """What is stored -> how many pictures, and how. Held-out pictures are stored as `evaluate` does it."""
    data, size = run.data, run.data.store.size
    train, _ = split_identities(data.dataset.train, run.config.val_share, run.config.seed)
    plans = {'to train on': (len(train), plan_store(train, size, cache=cache, device=run.device))}
    if data.validation is not None:
        held_out = data.validation.test
        plan = plan_store(held_out, size, cache='disk' if cache == 'device' else cache)
        plans['held out'] = (len(held_out), plan)
    return plans


def _stores(run: Run, plans: Mapping[str, tuple[int, StorePlan]], measured: _Measured) -> list[str]:
    height, width = run.data.store.size
    lines, left = [f'Decoded pictures of {height}x{width}'], 0
    for name, (count, plan) in plans.items():
        where = {
            'disk': f'{"found in" if plan.found else "would be written to"} {plan.folder}',
            'device': f'{"found in" if plan.found else "would be written to"} {plan.folder}, and held on {run.device}',
            'ram': f'would be held in memory{f" ({plan.reason})" if plan.reason else ""}',
            'off': 'decoded whenever they are needed',
        }[plan.cache]
        lines.append(f'  {name}: {count:,}, {_bytes(plan.num_bytes)}, {where}')
        left += 0 if plan.found else count
    if left:
        speed = measured.pictures / measured.reading
        once = tqdm.format_interval(left / speed)
        lines.append(f'  read here at {speed:,.0f} pictures/s: {once} for {left:,}')
    return lines


def _memory(run: Run, measured: _Measured) -> list[str]:
    parameters = list(run.task.trainable_module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    state = [value for values in run.optimizer.state.values() for value in values.values()]
    precision = str(run.dtype or torch.float32).removeprefix('torch.')
    rows = [
        ['  parameters', f'{sum(p.numel() for p in parameters) / 1e6:.2f} M', _bytes(_size(parameters))],
        ['  gradients', '', _bytes(_size(trained))],
        ['  optimiser', run.config.opt, _bytes(_size(state))],
    ]
    if run.task.has_ema():
        rows += [['  average of the weights', '', _bytes(_size(run.task.get_trainable_module(ema=True).parameters()))]]
    if measured.peak is not None:
        rows += [['  at most in a step, all in all', '', _bytes(measured.peak)]]
    if run.device.type == 'cuda':
        rows += [['  there is', '', _bytes(torch.cuda.get_device_properties(run.device).total_memory)]]
    of = f'of {run.device}' if run.device.type == 'cuda' else 'of this process'
    return [f'Memory {of}, computing in {precision}', *aligned(rows, left=(0, 1))]


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def _time(run: Run, measured: _Measured) -> list[str]:
    updates = run.updates_per_epoch * run.num_epochs - run.num_updates
    speed = measured.pictures * process()[1] / measured.step
    return [
        f'Time on {run.device}',
        f'  {1000 * measured.step:,.1f} ms per optimiser step, {speed:,.1f} images/s',
        f'  {tqdm.format_interval(updates * measured.step)} for {updates:,} steps, without decoding and validation',
        '',
        f'Everything would go to {run.folder}. Nothing was trained, nothing was written.',
    ]


def _bytes(count: int) -> str:
    return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.2f} MB'
