"""What `vireid train` would do with the same settings, measured on one step; nothing is trained or written."""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from ..constants import INFRARED, MODALITIES, UNKNOWN_CAMERA, VISIBLE
from ..data.records import Records
from ..data.store import StorePlan, plan_store
from ..data.workers import default_workers
from ..device import peak_memory, seeded_torch
from ..distributed import from_rank_zero, process_group, rank_and_world_size
from ..text import aligned, format_bytes, format_list
from .checkpoint import resolved_config, resume
from .config import TrainConfig
from .graph import WARM_UP
from .loop import epoch_batches, training_mode
from .run import Run, create_run, run_folder_of
from .step import train_step

NAMED = 10  # identities or images that a line names
TIMED_STEPS = 2


def dry_run(settings: Mapping[str, Any]) -> str:
    """Return what `vireid train --dry-run` prints; trains and writes nothing. Collective.

    The images of one optimiser step are decoded (with `skip_broken` all images, to find the broken ones), and the step
    is run a few times, so memory and time are measured.

    Args:
        settings: As for `train`.

    Returns:
        Settings, data, batches, store, memory and time, as text.

    Raises:
        ValueError: What `train` would raise.
    """
    config = resolved_config(settings)
    with process_group(config.device) as device:
        config, folder = from_rank_zero((config, run_folder_of(config)))
        with seeded_torch(config.seed, config.deterministic, device):
            run = create_run(dataclasses.replace(config, cache='off'), folder, device)
            if config.resume:
                resume(run)
            plan = plan_store(run.data.dataset.train, run.input_size[1:], cache=config.cache, device=run.device)
            measured = _measure(run)
            sections = (
                _settings(config),
                _resolved(run, plan),
                _data(run),
                _batches(run),
                _store(run, plan, measured),
                _cost(run, measured),
            )
            return '\n\n'.join('\n'.join(lines) for lines in sections)


@dataclasses.dataclass
class _Measured:
    """One optimiser step: seconds to read its images and to run it, and the peak memory in bytes."""

    reading: float
    images: int
    step: float
    peak: int | None


def _measure(run: Run) -> _Measured:
    count = run.config.grad_accum_steps
    run.data.sampler.set_epoch(run.state.epoch)
    rows = [row for batch in islice(run.data.sampler, count) for row in batch]
    start = time.perf_counter()
    run.data.store[rows]  # before anything else reads them, and the system caches them
    reading = time.perf_counter() - start
    with closing(epoch_batches(run)) as batches:
        group = list(islice(batches, count))
    if run.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(run.device)
    training_mode(run)
    for _ in range(1 if run.graph is None else WARM_UP + 1):
        train_step(run, group)  # compiles, allocates and tunes
    _synchronize(run.device)
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        train_step(run, group)
    _synchronize(run.device)
    step = (time.perf_counter() - start) / TIMED_STEPS
    return _Measured(reading, len(rows), step, peak_memory(run.device))


def _synchronize(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.get_device_module(device).synchronize()


def _settings(config: TrainConfig) -> list[str]:
    defaults = dataclasses.asdict(TrainConfig())
    rows = [(name, value) for name, value in dataclasses.asdict(config).items() if value != defaults[name]]
    return ['Settings that are not the defaults (`vireid train --help-all` lists those):', *_table(rows)]


def _resolved(run: Run, plan: StorePlan) -> list[str]:
    """Return what unset settings, and those that depend on the machine, came to."""
    config = run.config
    rows = [('learning rate', _rates(run, config.lr))]
    if run.scheduler is not None and config.warmup_epochs:
        rows.append(('warm-up', f'{config.warmup_epochs} epochs from {_rates(run, run.scheduler.warmup_lr_init)}'))
    rows += [
        ('input size', run.input_size),
        ('device', f'{run.device}, computing in {run.precision}'),
        ('cache', plan.cache),
        ('workers', default_workers() if config.workers is None else config.workers),
    ]
    return ['What these and the defaults come to here', *_table(rows)]


def _table(rows: Iterable[tuple[str, Any]]) -> list[str]:
    return aligned([[f'  {name}', _value(value)] for name, value in rows], left=(0, 1))


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ' '.join(f'{name}={_value(entry)}' for name, entry in value.items())
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _rates(run: Run, lr: float) -> str:
    """Return the learning rates of both parameter groups, which timm's schedulers scale."""
    scales = [1.0 if run.scheduler is None else group['lr_scale'] for group in run.optimizer.param_groups]
    pretrained, new = (f'{scale * lr:g}' for scale in scales)
    return new if pretrained == new else f'{new}, of what was pretrained {pretrained}'


def _data(run: Run) -> list[str]:
    data = run.data
    options = f' ({_value(data.dataset.options).replace(" ", ", ")})' if data.dataset.options else ''
    used = data.records[(data.labels >= 0).numpy()]
    held_out = data.validation.test if data.validation is not None else used[:0]
    rows = [['', 'identities', VISIBLE, INFRARED]]
    for name, records in (('  to train on', used), ('  held out for validation', held_out)):
        counts = (len(records.identities()), *((records.modality == modality).sum() for modality in MODALITIES))
        rows.append([name, *(f'{count:,}' for count in counts)])
    lines = [f'Data: {data.dataset.name}{options}', *aligned(rows)]
    lines += [f'  {modality} by camera: {_by_camera(used, modality)}' for modality in MODALITIES]
    if len(held_out):
        lines.append(f'  held out: {format_list(held_out.identities(), NAMED)}')
    else:
        lines.append("  nobody is held out: the last epoch's model is kept")
    if data.sampler.skipped:
        lines.append(f'  skipped, with images of one modality only: {format_list(data.sampler.skipped, NAMED)}')
    if data.broken:
        lines.append(f'  skipped, {len(data.broken)} that cannot be read: {format_list(data.broken, NAMED)}')
    return lines


def _by_camera(records: Records, modality: str) -> str:
    count = Counter(records.camera[records.modality == modality].tolist())
    names = {camera: 'unknown' if camera == UNKNOWN_CAMERA else camera for camera in sorted(count)}
    return ', '.join(f'{name}: {count[camera]:,}' for camera, name in names.items())


def _batches(run: Run) -> list[str]:
    sampler, accumulated, ranks = run.data.sampler, run.config.grad_accum_steps, rank_and_world_size()[1]
    people, each, steps = sampler.identities_per_batch, sampler.images_per_modality, run.batches_per_epoch
    count = 2 * people * each
    line = f'  {people} identities x ({each} visible + {each} infrared) = {count} images per batch'
    if run.augments[VISIBLE].copies > 1:
        line += ', the visible ones twice'
    if ranks > 1:
        line += f', {ranks} ranks: {ranks * count}'
    if accumulated > 1:
        line += f', {accumulated} batches accumulated: {accumulated * ranks * count} per optimiser step'
    lines = [
        'Batches',
        line,
        f'  {steps:,} per epoch, {run.num_epochs:,} epochs: {steps * run.num_epochs:,} batches, '
        f'{run.updates_per_epoch * run.num_epochs:,} optimiser steps',
    ]
    done = run.state.epoch * steps + run.state.step
    return [*lines, f'  {done:,} batches are done; it resumes in epoch {run.state.epoch}'] if done else lines


def _store(run: Run, plan: StorePlan, measured: _Measured) -> list[str]:
    height, width = run.data.store.size
    count = len(run.data.dataset.train)
    on_disk = f'{"found in" if plan.found else "would be written to"} {plan.folder}'
    where = {
        'disk': on_disk,
        'device': f'{on_disk}, and held on {run.device}',
        'ram': f'would be held in memory{f" ({plan.reason})" if plan.reason else ""}',
        'off': 'decoded whenever they are needed',
    }[plan.cache]
    lines = [f'Decoded images of {height}x{width}', f'  {count:,}, {format_bytes(plan.num_bytes)}, {where}']
    if not plan.found:
        speed = measured.images / measured.reading
        lines.append(f'  read here at {speed:,.0f} images/s: {tqdm.format_interval(count / speed)} for {count:,}')
    return lines


def _cost(run: Run, measured: _Measured) -> list[str]:
    updates = run.updates_per_epoch * run.num_epochs - run.num_updates
    speed = measured.images * rank_and_world_size()[1] / measured.step
    memory = [] if measured.peak is None else [f'{format_bytes(measured.peak)} at the peak of a step']
    if run.device.type == 'cuda':
        memory.append(f'{format_bytes(torch.cuda.get_device_properties(run.device).total_memory)} available')
    return [
        f'Cost on {run.device}, computing in {run.precision}',
        f'  {run.num_parameters / 1e6:.2f} M parameters; memory: {", ".join(memory) or "unknown"}',
        f'  {1000 * measured.step:,.1f} ms per optimiser step, {speed:,.1f} images/s',
        f'  {tqdm.format_interval(updates * measured.step)} for {updates:,} steps, without decoding and validation',
        '',
        f'Everything would go to {run.folder}. Nothing was trained, nothing was written.',
    ]
