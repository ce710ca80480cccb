"""What the benchmarks have in common: a clock that waits for the device, and the two forms of a result."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import vireid_timm
from vireid_timm.files import save_json


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time of one call."""
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


def alternate(
    works: dict[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    uncounted: int = 1,
) -> dict[str, list[float]]:
    """Times of all, in turn, after some calls of each that do not count."""
    for work in works.values():
        for _ in range(uncounted):
            work()
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over the repeats: what was measured together is divided."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def commit() -> str:
    """The commit of this checkout, or nothing outside of git or without it."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--exclude=*']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ''


def facts(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware, as every result has them."""
    on_gpu = device.type == 'cuda'
    hardware = (
        torch.cuda.get_device_name(device) if on_gpu else f'{platform.machine()}, {torch.get_num_threads()} threads'
    )
    packages = {package.__name__: package.__version__ for package in (vireid_timm, torch, timm, np)}
    return {'versions': packages, 'commit': commit(), 'hardware': hardware}


def publish(result: dict[str, Any], table: str, device: torch.device, save: Path | None = None) -> None:
    """Print the table and, as the last line, the result with versions and hardware as one JSON object.

    Args:
        result: Of the benchmark.
        table: The same for people.
        device: Where it was measured.
        save: Where to write the JSON object, too.
    """
    result = {**result, **facts(device)}
    print(table)
    if save:
        save_json(save, result)
    print(json.dumps(result))
