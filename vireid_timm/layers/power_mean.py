"""Power means: generalised-mean (GeM) pooling, and the weighted sum of powers that it is built from."""

from typing import Any, Optional

import torch
import torch.nn as nn
from timm.models import register_notrace_module

# As in AGW. Keeps the root's gradient finite where a channel is zero everywhere, without clamping the values.
POWER_EPS = 1e-12
POOL_TYPES = ('gem', 'avg', '')
_BLOCK = 2**18  # values per block: 1 MB in float32 fits a core's cache


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as float32, or unchanged if it is float64."""
    # In half precision small values vanish when cubed, and the root's gradient overflows.
    return x if x.dtype == torch.float64 else x.float()


def root(mean_power: torch.Tensor, power: float, eps: float = POWER_EPS) -> torch.Tensor:
    """Return the power mean, given the mean of the powers."""
    # This is `mean_power + eps`. The ONNX optimiser takes the sum with a number below 1e-8 for a no-op and removes it.
    return (eps - mean_power.neg()).pow(1.0 / power)


def _exact_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply batched matrices in their own dtype, even under autocast."""
    if a.device.type == 'meta':  # has no autocast
        return torch.bmm(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def _blocks(maps: torch.Tensor) -> list[slice]:
    """Split rows [B, ...] into blocks of about `_BLOCK` values on a CPU; elsewhere return a single block."""
    if maps.device.type != 'cpu' or torch.compiler.is_compiling():
        return [slice(0, maps.shape[0])]  # `len` would fix the number of rows of an exported program
    rows = max(1, _BLOCK * len(maps) // max(1, maps.numel()))
    return [slice(start, min(start + rows, len(maps))) for start in range(0, max(1, len(maps)), rows)]


class _PowerSum(torch.autograd.Function):
    """The autograd function behind `power_sum`.

    It saves its inputs for backward, but no powers. Its cost is memory traffic, so on a CPU it works on blocks of rows
    whose full-precision values stay in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weights: Optional[torch.Tensor],
        power: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(features, weights)
        ctx.power = power
        maps = features.flatten(2)
        dtype = torch.promote_types(maps.dtype, torch.float32)
        sums = maps.new_empty(maps.shape[:2], dtype=dtype)
        blocks = _blocks(maps)
        buffer = torch.empty_like(maps[blocks[0]], dtype=dtype)
        for block in blocks:
            powers = buffer[: block.stop - block.start].copy_(maps[block]).clamp_(min=0.0).pow_(power)
            if weights is None:
                sums[block] = powers.sum(dim=2)
            else:
                sums[block] = _exact_bmm(powers, weights[block].flatten(2).transpose(1, 2)).squeeze(2)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor], None]:
        features, weights = ctx.saved_tensors
        maps, scale = features.flatten(2), ctx.power * grad[:, :, None]
        grad_maps = torch.empty_like(maps)
        grad_weights = None if weights is None else torch.empty_like(weights.flatten(2))
        blocks = _blocks(maps)
        value_buffer, power_buffer = (torch.empty_like(maps[blocks[0]], dtype=grad.dtype) for _ in range(2))
        for block in blocks:
            rows = block.stop - block.start
            values, powers = value_buffer[:rows], power_buffer[:rows]
            torch.pow(values.copy_(maps[block]).clamp_(min=0.0), ctx.power - 1.0, out=powers)
            if weights is not None:
                grad_weights[block] = _exact_bmm(grad[block, None, :], values.mul_(powers))
                powers.mul_(weights[block].flatten(2))
            grad_maps[block] = powers.mul_(scale[block])
        return grad_maps.view_as(features), grad_weights if weights is None else grad_weights.view_as(weights), None


def power_sum(features: torch.Tensor, weights: Optional[torch.Tensor], power: float) -> torch.Tensor:
    """Sum weights * features ** power over all positions, in float32 or better.

    Args:
        features: Values >= 0 (negative ones count as 0), [B, C, H, W].
        weights: [B, 1, H, W] in the dtype of the result, or None for 1 everywhere.
        power: The exponent, at least 1.

    Returns:
        [B, C].
    """
    if torch.jit.is_tracing():  # it loses the autograd function, as does the ONNX exporter built on it
        powers = full_precision(features).clamp(min=0.0).pow(power)
        return (powers if weights is None else powers * weights).sum(dim=(2, 3))
    return _PowerSum.apply(features, weights, power)


@register_notrace_module
class GeneralizedMeanPool(nn.Module):
    """Generalised-mean (GeM) pooling, arXiv:1711.02512: the power mean over all positions, in float32 or better.

    Args:
        power: The exponent p. 1 is average pooling; large values approach max pooling.
        pool_type: timm's name of the pooling: `gem`, `avg` (the mean, also of negative values), or '' for no pooling.

    Raises:
        ValueError: The power is below 1, or the pool type is unknown.
    """

    def __init__(self, power: float = 3.0, pool_type: str = 'gem') -> None:
        super().__init__()
        if not power >= 1.0:
            raise ValueError(f'GeM needs a power of at least 1, got {power}')
        if pool_type not in POOL_TYPES:
            raise ValueError(f'unknown pooling {pool_type!r}; expected one of {POOL_TYPES}')
        self.power = 1.0 if pool_type == 'avg' else float(power)
        self.pool_type = pool_type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool [B, C, H, W] -> [B, C]; GeM takes negative values for 0. '' returns the map itself."""
        if self.pool_type == '':
            return x
        if self.pool_type == 'avg':
            return full_precision(x).mean(dim=(2, 3))
        return root(full_precision(x).clamp(min=0.0).pow(self.power).mean(dim=(2, 3)), self.power)

    def extra_repr(self) -> str:
        return f'power={self.power}, pool_type={self.pool_type!r}'
