"""The fusion branch against the paper's fused map, built in full."""

from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from maps import assert_all_close, random_map, with_gradients
from torch import nn

from vireid_timm.layers.fusion import FusionBranch, SpatialWeights
from vireid_timm.layers.power_mean import root

WIDTHS = {1: 3, 2: 5, 3: 6, 4: 7}  # channels of layer1-4's maps
STEPS = {1: 1, 2: 2, 3: 4, 4: 4}  # positions of layer1's grid per position, with last stride 1
SUBSETS = [layers for count in (1, 2, 3) for layers in combinations((1, 2, 3), count)]  # table 2 without the baseline
IMAGE_SIZES = [(64, 32), (101, 57), (33, 17), (16, 48), (7, 70)]
KINDS = ['asff', 'static']

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def grid_of(size: tuple[int, int], step: int) -> tuple[int, int]:
    return -(-size[0] // (4 * step)), -(-size[1] // (4 * step))


def fusion_branch(layers: tuple[int, ...], kind: str, grid: tuple[int, int], **options) -> FusionBranch:
    """A small branch in float64 with random parameters and running statistics."""
    settings = dict(out_step=4, channels=4, power=3.0, spatial_weights=kind, grid=grid, dtype=torch.float64)
    branch = FusionBranch([WIDTHS[i] for i in layers], [STEPS[i] for i in layers], **dict(settings, **options))
    generator = torch.Generator().manual_seed(3)
    for name, tensor in sorted(branch.state_dict().items()):
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
            if name.endswith('running_var'):
                tensor.abs_().add_(0.5)
    return branch


def level_maps(layers: tuple[int, ...], size: tuple[int, int], count: int = 2) -> list[torch.Tensor]:
    return [random_map(count, WIDTHS[i], *grid_of(size, STEPS[i]), seed=i).requires_grad_() for i in layers]


def nearest_upsampling(x: torch.Tensor, step: int, grid: tuple[int, int]) -> torch.Tensor:
    return x[:, :, torch.arange(grid[0]) // step][:, :, :, torch.arange(grid[1]) // step]


def convolution_norm_relu(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = F.conv2d(x, layer.conv.weight)
    training = layer.training
    statistics = (None, None) if training else (layer.bn.running_mean, layer.bn.running_var)
    return F.batch_norm(x, *statistics, layer.bn.weight, layer.bn.bias, training=training, eps=layer.bn.eps).relu()


def paper_weights(weights: SpatialWeights, reduced: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """ASFF as printed: upsample everything to the finest grid, then apply the convolutions that predict the weights."""
    if weights.kind == 'static':
        return F.interpolate(weights.maps, size=grid, mode='bilinear', align_corners=False).softmax(dim=1)
    squeezed = [convolution_norm_relu(layer, x) for layer, x in zip(weights.squeeze, reduced)]
    kernel = torch.cat([score.weight for score in weights.score], dim=1)
    return F.conv2d(torch.cat(squeezed, dim=1), kernel, weights.score[0].bias).softmax(dim=1)


def paper_fused_map(branch: FusionBranch, levels: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """Eq. 2: reduce to 256 channels, upsample x2 and x4, weigh point by point, concatenate."""
    reduced = [convolution_norm_relu(layer, x) for layer, x in zip(branch.reduce, levels)]
    reduced = [nearest_upsampling(x, step, grid) for x, step in zip(reduced, branch.steps)]
    weights = paper_weights(branch.weights, reduced, grid)
    return torch.cat([weights[:, i : i + 1] * x for i, x in enumerate(reduced)], dim=1)


def gem_of(powers: torch.Tensor) -> torch.Tensor:
    return root(powers.mean(dim=(2, 3)), 3.0)


# The spatial weights


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layers', SUBSETS)
def test_spatial_weights_sum_to_one(layers, kind):
    for size in IMAGE_SIZES:
        branch = fusion_branch(layers, kind, grid=(16, 8)).eval()
        grid = grid_of(size, 1)
        reduced = [layer(x) for layer, x in zip(branch.reduce, level_maps(layers, size))]
        weights = branch.weights(reduced, branch.steps, list(grid))
        assert weights.shape == (2 if kind == 'asff' else 1, len(layers), *grid)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones_like(weights[:, 0]))
        expected = paper_weights(
            branch.weights, [nearest_upsampling(x, s, grid) for x, s in zip(reduced, branch.steps)], grid
        )
        torch.testing.assert_close(weights, expected)


def test_fresh_static_weights_are_equal():
    weights = SpatialWeights('static', 3, 4, grid=(5, 2))
    assert list(weights.state_dict()) == ['maps']
    torch.testing.assert_close(weights([], [1, 2, 4], [7, 3]), torch.full((1, 3, 7, 3), 1 / 3))


def test_predicted_weights_depend_on_the_image():
    branch = fusion_branch((1, 2, 3), 'asff', grid=(16, 8)).eval()
    reduced = [layer(x) for layer, x in zip(branch.reduce, level_maps((1, 2, 3), (64, 32)))]
    weights = branch.weights(reduced, branch.steps, [16, 8])
    assert not torch.allclose(weights[0], weights[1])
    alone = branch.weights([x[1:] for x in reduced], branch.steps, [16, 8])
    torch.testing.assert_close(alone, weights[1:])


# The fusion branch


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'training'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layers', [*SUBSETS, (2, 4)])
def test_fusion_equals_the_paper_forward_and_backward(layers, kind, training):
    # Where images are no multiple of 16, batch statistics are those of the coarse maps: border cells count in full.
    sizes = [(64, 32), (16, 48)] if training and kind == 'asff' else IMAGE_SIZES
    for size in sizes:
        branch = fusion_branch(layers, kind, grid=(16, 8)).train(training)
        levels = level_maps(layers, size)
        parameters = [*levels, *branch.parameters()]
        grid = grid_of(size, 1)
        expected = with_gradients(gem_of(paper_fused_map(branch, levels, grid) ** 3), parameters)
        for plain in (False, True):
            branch.plain = plain
            direct = with_gradients(root(branch.mean_power(levels, list(grid)), 3.0), parameters)
            assert_all_close(direct, expected, rtol=1e-6, atol=1e-9)
            through_map = with_gradients(gem_of(branch(levels, list(grid))), parameters)
            assert_all_close(through_map, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('out_step', [4, 8])
@pytest.mark.parametrize('size', IMAGE_SIZES)
def test_fused_map_holds_the_mean_power_of_its_cells(size, out_step):
    """Sums of the paper's map over each of layer4's cells, scaled so that their mean is the map's mean."""
    branch = fusion_branch((1, 2, 3), 'asff', grid=(16, 8), out_step=out_step).eval()
    levels, grid = level_maps((1, 2, 3), size), grid_of(size, 1)
    cubes = paper_fused_map(branch, levels, grid) ** 3
    height, width = grid_of(size, out_step)
    expected = torch.zeros(2, branch.num_features, height, width, dtype=torch.float64)
    for row, column in product(range(grid[0]), range(grid[1])):
        expected[:, :, row // out_step, column // out_step] += cubes[:, :, row, column]
    expected *= height * width / (grid[0] * grid[1])
    for plain in (False, True):
        branch.plain = plain
        torch.testing.assert_close(branch(levels, list(grid)), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize('power', [1.0, 2.5])
def test_fusion_with_another_power(power):
    branch = fusion_branch((1, 3), 'asff', grid=(16, 8), power=power).eval()
    levels = level_maps((1, 3), (64, 32))
    expected = (paper_fused_map(branch, levels, (16, 8)) ** power).mean(dim=(2, 3))
    torch.testing.assert_close(branch.mean_power(levels, [16, 8]), expected)
    torch.testing.assert_close(branch(levels, [16, 8]).mean(dim=(2, 3)), expected)


@pytest.mark.parametrize('plain', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_fusion_pools_in_float32_in_half_precision(dtype, plain):
    branch = fusion_branch((1, 2, 3), 'asff', grid=(16, 8), plain=plain).eval()
    levels = [x.detach() for x in level_maps((1, 2, 3), (64, 32))]
    expected = root(branch.mean_power(levels, [16, 8]), 3.0)
    branch.to(dtype)
    pooled = root(branch.mean_power([x.to(dtype) for x in levels], [16, 8]), 3.0)
    assert pooled.dtype == torch.float32
    assert ((pooled - expected).abs() <= 0.05 * expected.max()).all()
    through_map = branch([x.to(dtype) for x in levels], [16, 8])
    assert through_map.dtype == torch.float32
    torch.testing.assert_close(root(through_map.mean(dim=(2, 3)), 3.0), pooled, rtol=1e-4, atol=1e-5)


def test_fusion_accepts_channels_last():
    branch = fusion_branch((1, 2, 3), 'asff', grid=(16, 8)).eval()
    levels = level_maps((1, 2, 3), (64, 32))
    parameters = [*levels, *branch.parameters()]
    expected = with_gradients(branch.mean_power(levels, [16, 8]), parameters)
    branch.to(memory_format=torch.channels_last)
    last = [x.to(memory_format=torch.channels_last) for x in levels]
    assert_all_close(with_gradients(branch.mean_power(last, [16, 8]), parameters), expected)
