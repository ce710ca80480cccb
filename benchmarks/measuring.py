"""What the benchmarks have in common: a clock that waits for the device, and the two forms of a result."""

import json
import platform
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


def publish(result: dict[str, Any], table: str, device: torch.device, save: Path | None = None) -> None:
    """Print the table and, as the last line, the result with versions and hardware as one JSON object.

    Args:
        result: Of the benchmark.
        table: The same for people.
        device: Where it was measured.
        save: Where to write the JSON object, too.
    """
    on_gpu = device.type == 'cuda'
    hardware = (
        torch.cuda.get_device_name(device) if on_gpu else f'{platform.machine()}, {torch.get_num_threads()} threads'
    )
    packages = {package.__name__: package.__version__ for package in (vireid_timm, torch, timm, np)}
    result = {**result, 'versions': packages, 'hardware': hardware}
    print(table)
    if save:
        save_json(save, result)
    print(json.dumps(result))
