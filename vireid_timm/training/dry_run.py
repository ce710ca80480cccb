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

from ..constants import INFRARED, MODALITIES, UNKNOWN_CAMERA, VISIBLE
from ..data.records import Records
from ..data.store import StorePlan, plan_store
from ..data.workers import default_workers
from ..device import peak_memory
from ..distributed import end_distributed, init_distributed, process
from ..text import aligned
from .batches import Batch, batches
from .checkpoint import resolved_config, resume
from .config import TrainConfig
from .loop import train_step, training_mode
from .run import Run, set_up
from .train import lent

NAMED = 10  # identities or images that a line names
TIMED_STEPS = 2


def dry_run(settings: Mapping[str, Any]) -> str:
    """What `vireid train --dry-run` prints; nothing is trained, and nothing is written.

    The images of one optimiser step are decoded (with `skip_broken` all of them, to know which are broken) and
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
            plan = plan_store(run.data.dataset.train, run.size[1:], cache=config.cache, device=run.device)
            measured = _measure(run)
            parts = (
                _settings(config),
                _resolved(run, plan),
                _data(run),
                _batches(run),
                _store(run, plan, measured),
                _memory(run, measured),
                _time(run, measured),
            )
            return '\n\n'.join('\n'.join(lines) for lines in parts)
    finally:
        if not joined:
            end_distributed()


@dataclasses.dataclass
class _Measured:
    """One optimiser step: seconds for reading its images and for itself, and bytes at its peak."""

    reading: float
    images: int
    step: float
    peak: int | None


def _measure(run: Run) -> _Measured:
    epoch, config = min(run.progress.epoch, run.num_epochs - 1), run.config
    run.data.sampler.set_epoch(epoch)
    rows = [row for batch in islice(run.data.sampler, config.grad_accum_steps) for row in batch]
    start = time.perf_counter()
    run.data.store[run.data.store.intact()[rows]]  # before anything else reads them, and the system keeps them
    reading = time.perf_counter() - start
    drawn = batches(run.data, run.augments, run.device, epoch=epoch, seed=config.seed)
    with closing(drawn):
        group: list[Batch] = list(islice(drawn, config.grad_accum_steps))
    if run.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(run.device)
    training_mode(run)
    train_step(run, group)  # what is compiled, allocated and tuned in it is not part of the others
    _wait_for(run.device)
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        train_step(run, group)
    _wait_for(run.device)
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


def _resolved(run: Run, plan: StorePlan) -> list[str]:
    """What the settings came to that are unset by default, or depend on the machine."""
    config = run.config
    rows = [['  learning rate', _rates(run, config.lr)]]
    if run.scheduler is not None and config.warmup_epochs:
        rows += [['  warm-up', f'{config.warmup_epochs} epochs from {_rates(run, run.scheduler.warmup_lr_init)}']]
    rows += [
        ['  input size', _value(run.size)],
        ['  device', f'{run.device}, computing in {_precision(run)}'],
        ['  cache', plan.cache],
        ['  workers', _value(default_workers() if config.workers is None else config.workers)],
    ]
    return ['What these and the defaults come to here', *aligned(rows, left=(0, 1))]


def _rates(run: Run, lr: float) -> str:
    """The learning rates of both parameter groups; it is timm's schedulers that scale them."""
    scales = [1.0 if run.scheduler is None else group['lr_scale'] for group in run.optimizer.param_groups]
    pretrained, new = (f'{scale * lr:g}' for scale in scales)
    return new if pretrained == new else f'{new}, of what was pretrained {pretrained}'


def _precision(run: Run) -> str:
    return str(run.dtype or torch.float32).removeprefix('torch.')


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
        lines += [f'  left out, with images of one modality only: {_some(data.sampler.skipped)}']
    broken = [*data.store.broken.values(), *data.validation_store.broken.values()]
    if broken:
        lines += [f'  left out, {len(broken)} that cannot be read: {_some(broken)}']
    return lines


def _counts(name: str, records: Records) -> list[str]:
    counts = (len(records.identities()), *((records.modality == modality).sum() for modality in MODALITIES))
    return [name, *(f'{count:,}' for count in counts)]


def _by_camera(records: Records, modality: str) -> str:
    count = Counter(records.camera[records.modality == modality].tolist())
    cameras = {'unknown' if camera == UNKNOWN_CAMERA else f'{camera}': count[camera] for camera in sorted(count)}
    return ', '.join(f'{camera}: {images:,}' for camera, images in cameras.items())


def _some(names: list[str]) -> str:
    more = f', and {len(names) - NAMED} more' if len(names) > NAMED else ''
    return f'{", ".join(names[:NAMED])}{more}'


def _batches(run: Run) -> list[str]:
    sampler, config = run.data.sampler, run.config
    people, each, accumulated = sampler.identities_per_batch, sampler.images_per_modality, config.grad_accum_steps
    count = 2 * people * each
    line = f'  {people} identities x ({each} visible + {each} infrared) = {count} images per batch'
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


def _store(run: Run, plan: StorePlan, measured: _Measured) -> list[str]:
    height, width = run.data.store.size
    count = len(run.data.dataset.train)
    where = {
        'disk': f'{"found in" if plan.found else "would be written to"} {plan.folder}',
        'device': f'{"found in" if plan.found else "would be written to"} {plan.folder}, and held on {run.device}',
        'ram': f'would be held in memory{f" ({plan.reason})" if plan.reason else ""}',
        'off': 'decoded whenever they are needed',
    }[plan.cache]
    lines = [f'Decoded images of {height}x{width}', f'  {count:,}, {_bytes(plan.num_bytes)}, {where}']
    if not plan.found:
        speed = measured.images / measured.reading
        lines.append(f'  read here at {speed:,.0f} images/s: {tqdm.format_interval(count / speed)} for {count:,}')
    return lines


def _memory(run: Run, measured: _Measured) -> list[str]:
    parameters = list(run.task.trainable_module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    state = [value for values in run.optimizer.state.values() for value in values.values()]
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
    return [f'Memory {of}, computing in {_precision(run)}', *aligned(rows, left=(0, 1))]


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def _time(run: Run, measured: _Measured) -> list[str]:
    updates = run.updates_per_epoch * run.num_epochs - run.num_updates
    speed = measured.images * process()[1] / measured.step
    return [
        f'Time on {run.device}',
        f'  {1000 * measured.step:,.1f} ms per optimiser step, {speed:,.1f} images/s',
        f'  {tqdm.format_interval(updates * measured.step)} for {updates:,} steps, without decoding and validation',
        '',
        f'Everything would go to {run.folder}. Nothing was trained, nothing was written.',
    ]


def _bytes(count: int) -> str:
    return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.2f} MB'
