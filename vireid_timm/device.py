"""Which device computes, in which precision and how reproducibly, and how much memory it takes."""

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt (malloc.h)


def named_device(name: torch.device | str) -> torch.device:
    """Return the device of that name, whether or not this machine has it.

    Raises:
        ValueError: Not the name of a device.
    """
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'unknown device {name!r}; expected cuda, cuda:1, mps, cpu, ...') from error


def resolve_device(name: str = 'cuda') -> torch.device:
    """Return the device of that name; where there is no GPU, log that and return the CPU.

    Raises:
        ValueError: Not the name of a device, or a device that torch cannot compute on here.
    """
    device = named_device(name)
    is_missing = (device.type == 'cuda' and not torch.cuda.is_available()) or (
        device.type == 'mps' and not torch.backends.mps.is_available()
    )
    if is_missing:
        _logger.info(f'No {name} device here: using the CPU')
        return torch.device('cpu')
    try:
        if device.type == 'cuda':  # by its number: a tensor would reserve memory, which `seeded_torch` warns about
            torch.cuda.get_device_properties(device)
        else:
            torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        reason = str(error).partition('\n')[0]
        raise ValueError(f'torch cannot compute on {name} here: {reason}') from error
    return device


def autocast_dtype(device: torch.device, amp: bool | None, amp_dtype: str = 'bfloat16') -> torch.dtype | None:
    """Return the type that autocast computes in, or None for full precision.

    Args:
        device: Where to compute.
        amp: Whether to use mixed precision; None uses it where the device is fast at bfloat16.
        amp_dtype: `bfloat16` or `float16`.
    """
    if amp is None:
        amp = _is_fast_at_bfloat16(device)
    return getattr(torch, amp_dtype) if amp else None


def _is_fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    # Without these instructions a CPU emulates bfloat16 and is slower than in float32.
    checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return device.type == 'cpu' and any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def keep_memory() -> None:
    """Let glibc's allocator keep freed memory, for a process that computes on the CPU; does nothing elsewhere.

    By default every large tensor gets fresh pages from the kernel and gives them back. A training step makes and frees
    thousands of them, always of the same sizes (docs/performance.md has figures).
    """
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never trim


def peak_memory(device: torch.device) -> int | None:
    """Return this process's peak memory in bytes: the GPU's for a GPU, else the machine's; None where unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


@contextmanager
def seeded_torch(seed: int, deterministic: bool, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators and set its global switches; restore both at the end."""
    cudnn, kernels, name = torch.backends.cudnn, torch.utils.deterministic, 'CUBLAS_WORKSPACE_CONFIG'
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fill, workspace = cudnn.benchmark, kernels.fill_uninitialized_memory, os.environ.get(name)
    if deterministic:
        if device.type == 'cuda' and workspace is None:
            # cuBLAS reads it with the first matrix product. Memory is reserved for that, but not for joining ranks.
            if any(map(torch.cuda.memory_reserved, range(torch.cuda.device_count()))):
                _logger.warning(f'A GPU was used before: for the same weights again set {name}=:4096:8 before Python')
            os.environ[name] = ':4096:8'
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch names in a warning what it cannot do
        kernels.fill_uninitialized_memory = False  # nothing reads such memory, and filling it takes time
    cudnn.benchmark = device.type == 'cuda' and not torch.are_deterministic_algorithms_enabled()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == 'cuda' else []):
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        cudnn.benchmark, kernels.fill_uninitialized_memory = benchmark, fill
        if workspace is None:
            os.environ.pop(name, None)
