"""Which device computes, and in which precision."""

import logging

import torch

_logger = logging.getLogger(__name__)


def resolve_device(name: str = 'cuda') -> torch.device:
    """The device of that name, or the CPU, saying so, where there is no such accelerator.

    Raises:
        ValueError: A name that is no device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'unknown device {name!r}; expected cuda, cuda:1, mps, cpu, ...') from error
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


def _fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    # Without these instructions a CPU imitates bfloat16 and is slower than in float32.
    checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return device.type == 'cpu' and any(getattr(torch.cpu, check, lambda: False)() for check in checks)
