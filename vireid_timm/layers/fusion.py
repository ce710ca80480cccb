"""The fusion branch (paper, section 3.2): earlier levels, weighted per position (ASFF, arXiv:1911.09516), then GeM.

GeM is a power mean, and power means compose: with nearest upsampling `up`, the mean over the fine grid of
(w * up(f)) ** p equals the mean over the coarse grid of f ** p times the mean of w ** p in each coarse cell. So the
paper's fused map (eq. 2: 768 channels at a quarter of the image's resolution) is never built.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import register_notrace_module

from .power_mean import full_precision, power_sum

SPATIAL_WEIGHTS = ('asff', 'static')


class SpatialWeights(nn.Module):
    """The weight maps alpha, beta, gamma of eq. 2: positive, and summing to one over the levels at every position.

    `asff` predicts them for each image by 1x1 convolutions (arXiv:1911.09516). These commute with nearest
    upsampling, so they run on each level's own grid. `static` is the other reading of the paper: one learned map per
    level, on layer1's grid at the default image size, interpolated for other sizes.
    """

    def __init__(
        self,
        kind: str,
        num_levels: int,
        channels: int,
        grid: tuple[int, int],
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.kind = kind
        self.squeeze = nn.ModuleList()
        self.score = nn.ModuleList()
        if kind == 'static':
            self.maps = nn.Parameter(torch.zeros(1, num_levels, grid[0], grid[1], **dd))
        else:
            self.register_parameter('maps', None)
            for level in range(num_levels):
                self.squeeze.append(ConvNormAct(channels, 16, 1, **dd))
                # One convolution over all levels, split by input level. Their sum needs a single bias.
                self.score.append(nn.Conv2d(16, num_levels, 1, bias=level == 0, **dd))

    def forward(self, levels: list[torch.Tensor], steps: list[int], size: list[int]) -> torch.Tensor:
        """Return weight maps on the finest grid: levels [B, C, h_l, w_l] -> [B or 1, L, H, W], float32 or better."""
        if self.maps is not None:
            scores = self.maps
            if list(scores.shape[2:]) != size:
                scores = F.interpolate(scores, size=size, mode='bilinear', align_corners=False)
            return full_precision(scores).softmax(dim=1)
        scores = torch.zeros(1, device=levels[0].device)
        for i, (squeeze, score) in enumerate(zip(self.squeeze, self.score)):
            scores = scores + _upsample(full_precision(score(squeeze(levels[i]))), steps[i], size)
        return scores.softmax(dim=1)


def _upsample(x: torch.Tensor, step: int, size: list[int]) -> torch.Tensor:
    """Upsample (nearest) by `step`, then crop to `size`: every fine position belongs to exactly one coarse cell."""
    if step == 1:
        return x
    return F.interpolate(x, scale_factor=float(step), mode='nearest')[:, :, : size[0], : size[1]]


def _cell_sum(x: torch.Tensor, step: int) -> torch.Tensor:
    """Sum each cell of step x step positions; border cells may be partial. [.., H, W] -> [.., h, w]."""
    if step == 1:
        return x
    # ONNX cannot express `divisor_override`, and exporters drop it. A step is a power of two, so scaling is exact.
    if x.shape[2] % step != 0 or x.shape[3] % step != 0:
        x = F.pad(x, [0, step - 1, 0, step - 1])  # the pooling ignores what does not fill a cell
    return F.avg_pool2d(x, step) * float(step * step)


@register_notrace_module
class FusionBranch(nn.Module):
    """Feature fusion (section 3.3, eq. 2) as mean powers, computed from the coarse maps and exact at every size.

    Args:
        in_channels: Channels of the fused layers.
        steps: Positions of layer1's grid that one position of each fused layer covers along an axis.
        out_step: The same for layer4; the mean powers are returned on its grid.
        channels: Width of each level after its 1x1 convolution.
        power: GeM's exponent p.
        spatial_weights: `asff` or `static`, see `SpatialWeights`.
        grid: Height and width of layer1's grid at the default image size, for `static`.
        plain: Build the paper's full fused map and pool it. Slower; for comparison.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        steps: Sequence[int],
        out_step: int,
        channels: int,
        power: float,
        spatial_weights: str,
        grid: tuple[int, int],
        plain: bool = False,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.steps = list(steps)
        self.out_step = out_step
        self.power = power
        self.plain = plain
        # With ReLU, because GeM needs values >= 0.
        self.reduce = nn.ModuleList([ConvNormAct(width, channels, 1, **dd) for width in in_channels])
        self.weights = SpatialWeights(spatial_weights, len(in_channels), channels, grid, **dd)
        self.num_features = channels * len(in_channels)

    def forward(self, levels: list[torch.Tensor], size: list[int]) -> torch.Tensor:
        """Return mean powers of the fused map on layer4's grid, [B, num_features, h, w]; GeM's is the mean of them."""
        reduced, weights = self._reduce(levels, size)
        powers = []
        for i, (x, step) in enumerate(zip(reduced, self.steps)):
            x = full_precision(x).pow(self.power)
            if self.plain:
                powers.append(_cell_sum(_upsample(x, step, size) * weights[:, i : i + 1], self.out_step))
            else:
                powers.append(_cell_sum(x * _cell_sum(weights[:, i : i + 1], step), self.out_step // step))
        sums = torch.cat(powers, dim=1)
        return sums * (sums.shape[2] * sums.shape[3] / (size[0] * size[1]))

    @torch.jit.ignore
    def mean_power(self, levels: list[torch.Tensor], size: list[int]) -> torch.Tensor:
        """Return the mean of `forward` over its grid, [B, num_features], without building the map."""
        if self.plain:
            return self.forward(levels, size).mean(dim=(2, 3))
        reduced, weights = self._reduce(levels, size)
        sums = []
        for i, (x, step) in enumerate(zip(reduced, self.steps)):
            cells = _cell_sum(weights[:, i : i + 1], step).expand(x.shape[0], -1, -1, -1)
            sums.append(power_sum(x, cells, self.power))
        return torch.cat(sums, dim=1) / (size[0] * size[1])

    def _reduce(self, levels: list[torch.Tensor], size: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the levels at their common width, and their weight maps to the power p."""
        reduced = []
        for i, reduce in enumerate(self.reduce):
            reduced.append(reduce(levels[i]))
        return reduced, self.weights(reduced, self.steps, size).pow(self.power)
