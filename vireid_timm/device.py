"""Which device computes, in which precision, and how much memory it has and takes."""

import ctypes
import logging
import sys

import torch

_logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt (malloc.h)


def named_device(name: torch.device | str) -> torch.device:
    """The device of that name, whether or not this machine has it.

    Raises:
        ValueError: A name that is no device.
    """
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'unknown device {name!r}; expected cuda, cuda:1, mps, cpu, ...') from error


def resolve_device(name: str = 'cuda') -> torch.device:
    """The device of that name, or the CPU, saying so, where there is no such accelerator.

    Raises:
        ValueError: A name that is no device.
    """
    device = named_device(name)
    missing = (device.type == 'cuda' and not torch.cuda.is_available()) or (
        device.type == 'mps' and not torch.backends.mps.is_available()
    )
    if missing:
        _logger.info(f'No {name} device here: computing on the CPU')
        return torch.device('cpu')
    return device


def autocast_dtype(device: torch.device, amp: bool | None, amp_dtype: str = 'bfloat16') -> torch.dtype | None:
    """The type that autocast computes in, or None for full precision.

    Args:
        device: Where.
        amp: Whether; None decides for mixed precision where the device is fast at bfloat16.
        amp_dtype: `bfloat16` or `float16`.
    """
    if amp is None:
        amp = _fast_at_bfloat16(device)
    return getattr(torch, amp_dtype) if amp else None


def keep_memory() -> None:
    """Let glibc's allocator keep what is freed, for a process of one's own that computes on the CPU; a no-op elsewhere.

    By default every large tensor gets fresh pages from the kernel and gives them back. A training step makes and frees
    thousands of them, of the same sizes every time (docs/performance.md has figures).
    """
    try:
        allocator = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    allocator(_M_MMAP_MAX, 0)
    allocator(_M_TRIM_THRESHOLD, -1)  # never


def _fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    # Without these instructions a CPU imitates bfloat16 and is slower than in float32.
    checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return device.type == 'cpu' and any(getattr(torch.cpu, check, lambda: False)() for check in checks)


_logger = logging.getLogger(__name__)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has needed at most: of the GPU's memory, else of the machine's; None where unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak
