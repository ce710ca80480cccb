"""The parts of the networks: stems per modality, GeM, fusion branch, non-local block, BN-neck and classifier.

GeM is a power mean, and power means compose: with nearest upsampling `up`, the mean over the fine grid of
(w * up(f)) ** p equals the mean over the coarse grid of f ** p times the mean of w ** p in each coarse cell. So the
fused map of the paper (eq. 2: 768 channels at a quarter of the picture's resolution) never has to be built.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct, get_device_dtype
from timm.models import register_notrace_module
from timm.models.resnet import ResNet

# As AGW: keeps the root's gradient finite where a channel is zero everywhere, without clamping the values themselves.
POWER_EPS = 1e-12
SPATIAL_WEIGHTS = ('asff', 'static')
POOL_TYPES = ('gem', 'avg', '')
_BLOCK = 2**18  # values, 1 MB in float32: what a core's cache holds


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """float32, or float64 as it is: what power means run in."""
    # In half precision small values vanish when cubed and the root's gradient overflows.
    return x if x.dtype == torch.float64 else x.float()


def root(mean_power: torch.Tensor, power: float, eps: float = POWER_EPS) -> torch.Tensor:
    """From the mean of powers to the power mean."""
    return (mean_power + eps).pow(1.0 / power)


def _exact_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched matrix product in its operands' precision, whatever the autocast (the meta device knows none)."""
    if a.device.type == 'meta':
        return torch.bmm(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def _blocks(maps: torch.Tensor) -> list[slice]:
    """Rows [B, ...] in blocks of about `_BLOCK` values on a CPU, all at once elsewhere."""
    if maps.device.type != 'cpu' or torch.compiler.is_compiling():
        return [slice(0, len(maps))]
    rows = max(1, _BLOCK * len(maps) // max(1, maps.numel()))
    return [slice(start, min(start + rows, len(maps))) for start in range(0, max(1, len(maps)), rows)]


class _PowerSum(torch.autograd.Function):
    """Sum over positions of weights * features ** power, see `power_sum`.

    It keeps its inputs for backward and no power of them. All of it is memory traffic: on a CPU it therefore goes
    through the rows in blocks whose full-precision values stay in the cache.
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
        kind = torch.promote_types(maps.dtype, torch.float32)
        sums = maps.new_empty(maps.shape[:2], dtype=kind)
        blocks = _blocks(maps)
        buffer = torch.empty_like(maps[blocks[0]], dtype=kind)
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
        first, second = (torch.empty_like(maps[blocks[0]], dtype=grad.dtype) for _ in range(2))
        for block in blocks:
            values, powers = first[: block.stop - block.start], second[: block.stop - block.start]
            torch.pow(values.copy_(maps[block]).clamp_(min=0.0), ctx.power - 1.0, out=powers)
            if weights is not None:
                grad_weights[block] = _exact_bmm(grad[block, None, :], values.mul_(powers))
                powers.mul_(weights[block].flatten(2))
            grad_maps[block] = powers.mul_(scale[block])
        return grad_maps.view_as(features), grad_weights if weights is None else grad_weights.view_as(weights), None


def power_sum(features: torch.Tensor, weights: Optional[torch.Tensor], power: float) -> torch.Tensor:
    """Sum over positions of weights * features ** power in float32 or better.

    Args:
        features: Values >= 0 (negative ones count as 0), [B, C, H, W].
        weights: [B, 1, H, W] of the result's type, or None for 1 everywhere.
        power: The exponent, at least 1.

    Returns:
        [B, C].
    """
    return _PowerSum.apply(features, weights, power)


@register_notrace_module
class GeneralizedMeanPool(nn.Module):
    """Generalised mean (GeM) pooling, arXiv:1711.02512: the power mean over all positions, in float32 or better.

    Args:
        power: The exponent p; 1 is average pooling, and the maximum is approached as p grows.
        pool_type: How timm names the pooling: `gem`, `avg` (p = 1 whatever `power`), or '' for no pooling.

    Raises:
        ValueError: Power below 1, or an unknown pool type.
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
        """Pool a map of values >= 0 (negative ones count as 0): [B, C, H, W] -> [B, C], or the map itself for ''."""
        if self.pool_type == '':
            return x
        return root(full_precision(x).clamp(min=0.0).pow(self.power).mean(dim=(2, 3)), self.power)

    def extra_repr(self) -> str:
        return f'power={self.power}, pool_type={self.pool_type!r}'


class Stem(nn.Module):
    """The modality-specific part (layer0 of the paper): conv1, bn1, act1 and maxpool of a timm ResNet."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        self.conv1 = resnet.conv1
        self.bn1 = resnet.bn1
        self.act1 = resnet.act1
        self.maxpool = resnet.maxpool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))


@register_notrace_module
class DualStem(nn.Module):
    """One stem per modality; the outputs are stacked, visible rows first."""

    def __init__(self, visible: Stem, infrared: Stem, in_chans: int) -> None:
        super().__init__()
        self.visible = visible
        self.infrared = infrared
        self.in_chans = in_chans

    def forward(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        maps = []
        if visible is not None:
            self._check(visible, 'visible')
            maps.append(self.visible(visible))
        if infrared is not None:
            self._check(infrared, 'infrared')
            maps.append(self.infrared(infrared))
        if len(maps) == 0:
            raise ValueError('no pictures: give visible=, infrared=, or both, each [B, C, H, W]')
        if len(maps) == 1:
            return maps[0]
        if visible is not None and infrared is not None and visible.shape[2:] != infrared.shape[2:]:
            raise ValueError(
                f'visible and infrared pictures need the same height and width, got {list(visible.shape)} and '
                f'{list(infrared.shape)}'
            )
        return torch.cat(maps)

    def _check(self, pictures: torch.Tensor, modality: str) -> None:
        if pictures.dim() != 4 or pictures.shape[1] != self.in_chans:
            raise ValueError(f'{modality} pictures need shape [B, {self.in_chans}, H, W], got {list(pictures.shape)}')


class SpatialWeights(nn.Module):
    """The weight maps alpha, beta, gamma of eq. 2: positive and summing to one over the levels at every position.

    `asff` predicts them for each picture by 1x1 convolutions (arXiv:1911.09516). These commute with nearest
    upsampling, so they run on each level's own grid. `static` is the paper's other reading: one learned map per level,
    on the grid of layer1 at the default picture size and interpolated to others.
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
                # One convolution over all levels, split by input level: a single bias serves the sum.
                self.score.append(nn.Conv2d(16, num_levels, 1, bias=level == 0, **dd))

    def forward(self, levels: list[torch.Tensor], steps: list[int], size: list[int]) -> torch.Tensor:
        """Weight maps on the finest grid: levels [B, C, h_l, w_l] -> [B or 1, L, H, W], float32 or better."""
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
    """Nearest upsampling by `step`, cropped to `size`: every fine position belongs to exactly one coarse cell."""
    if step == 1:
        return x
    return F.interpolate(x, scale_factor=float(step), mode='nearest')[:, :, : size[0], : size[1]]


def _cell_sum(x: torch.Tensor, step: int) -> torch.Tensor:
    """Sum over each cell of step x step positions; cells at the border may be partial. [.., H, W] -> [.., h, w]."""
    if step == 1:
        return x
    return F.avg_pool2d(x, step, ceil_mode=True, divisor_override=1)


@register_notrace_module
class FusionBranch(nn.Module):
    """Feature fusion (section 3.3, eq. 2) in terms of mean powers, from the coarse maps, exact at every size.

    Args:
        in_channels: Channels of the fused layers.
        steps: How many positions of layer1's grid one position of each fused layer covers along an axis.
        out_step: The same for layer4, whose grid the mean powers are given on.
        channels: Width of each level after its 1x1 convolution.
        power: GeM's exponent p.
        spatial_weights: `asff` or `static`, see `SpatialWeights`.
        grid: Height and width of layer1's grid at the default picture size, for `static`.
        plain: Build the paper's full fused map and pool that: slower, for comparison.
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
        # ReLU, since GeM needs values >= 0.
        self.reduce = nn.ModuleList([ConvNormAct(width, channels, 1, **dd) for width in in_channels])
        self.weights = SpatialWeights(spatial_weights, len(in_channels), channels, grid, **dd)
        self.num_features = channels * len(in_channels)

    def forward(self, levels: list[torch.Tensor], size: list[int]) -> torch.Tensor:
        """Mean powers of the fused map on layer4's grid: their mean is GeM's mean power, [B, num_features, h, w]."""
        reduced = self._reduce(levels)
        weights = self.weights(reduced, self.steps, size).pow(self.power)
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
        """The mean of `forward` over its grid, without building it: [B, num_features]."""
        if self.plain:
            return self.forward(levels, size).mean(dim=(2, 3))
        reduced = self._reduce(levels)
        weights = self.weights(reduced, self.steps, size).pow(self.power)
        sums = []
        for i, (x, step) in enumerate(zip(reduced, self.steps)):
            cells = _cell_sum(weights[:, i : i + 1], step).expand(x.shape[0], -1, -1, -1)
            sums.append(power_sum(x, cells, self.power))
        return torch.cat(sums, dim=1) / (size[0] * size[1])

    def _reduce(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        reduced = []
        for i, reduce in enumerate(self.reduce):
            reduced.append(reduce(levels[i]))
        return reduced


class NonLocalBlock(nn.Module):
    """Non-local block (arXiv:1711.07971) in AGW's form (arXiv:2001.04193): dot products divided by their number.

    Every position gets a sum over all positions, and adds it to its own value. The last normalisation starts at zero,
    so that the block adds nothing at first.

    Args:
        channels: Channels of the map.
        width: Inner channels.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.theta = nn.Conv2d(channels, width, 1, **dd)
        self.phi = nn.Conv2d(channels, width, 1, **dd)
        self.g = nn.Conv2d(channels, width, 1, **dd)
        self.out = nn.Conv2d(width, channels, 1, **dd)
        self.norm = nn.BatchNorm2d(channels, **dd)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        theta = self.theta(x)
        # Without a softmax (theta phi) g = theta (phi g): the affinity of all pairs of positions is never built.
        # Divided before it is summed over, so that half precision does not overflow.
        phi = self.phi(x).flatten(2) / (x.shape[2] * x.shape[3])
        context = torch.bmm(self.g(x).flatten(2), phi.transpose(1, 2))
        sums = torch.bmm(context, theta.flatten(2)).view_as(theta)
        return x + self.norm(self.out(sums))


@register_notrace_module  # its check of the input's dimensions cannot be traced
class BatchNormNeck(nn.BatchNorm1d):
    """BN-neck (arXiv:1903.07071): a batch normalisation that has no bias at all, rather than a frozen one."""

    def __init__(
        self,
        num_features: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(num_features, device=device, dtype=dtype)
        self.register_parameter('bias', None)
        nn.init.normal_(self.weight, 1.0, 0.01)


class BranchHead(nn.Module):
    """BN-neck -> bias-free classifier of one branch. The classifier is an identity when `num_classes` is 0."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        drop_rate: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.neck = BatchNormNeck(num_features, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        if num_classes > 0:
            fc = nn.Linear(self.num_features, num_classes, bias=False, **get_device_dtype(self.neck))
            nn.init.normal_(fc.weight, 0.0, 0.001)
            self.fc = fc.train(self.training)
        else:
            self.fc = nn.Identity().train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.neck(x.to(self.neck.weight.dtype))
        return x if pre_logits else self.fc(self.drop(x))
