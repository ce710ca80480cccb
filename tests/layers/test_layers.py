"""The parts of the network against slow, obvious versions: loops, and the paper's fused map built in full."""

from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from vireid_timm.layers import power_mean
from vireid_timm.layers.fusion import FusionBranch, SpatialWeights
from vireid_timm.layers.head import BatchNormNeck, BranchHead
from vireid_timm.layers.power_mean import POWER_EPS, GeneralizedMeanPool, power_sum, root
from vireid_timm.layers.stem import DualStem, Stem

WIDTHS = {1: 3, 2: 5, 3: 6, 4: 7}  # channels of layer1-4's maps
STEPS = {1: 1, 2: 2, 3: 4, 4: 4}  # positions of layer1's grid that one of theirs covers, last stride 1
SUBSETS = [layers for count in (1, 2, 3) for layers in combinations((1, 2, 3), count)]  # table 2 without the baseline
IMAGE_SIZES = [(64, 32), (101, 57), (33, 17), (16, 48), (7, 70)]
KINDS = ['asff', 'static']

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_map(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values >= 0, some of them zero, as behind a ReLU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu().to(dtype)


def grid_of(size: tuple[int, int], step: int) -> tuple[int, int]:
    return -(-size[0] // (4 * step)), -(-size[1] // (4 * step))


def fusion_branch(layers: tuple[int, ...], kind: str, grid: tuple[int, int], **options) -> FusionBranch:
    """A small branch in float64 whose every parameter and running statistic is random."""
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
    """ASFF as it is printed: everything is brought to the finest grid before the weights' convolutions see it."""
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


def naive_gem(x: torch.Tensor, power: float) -> torch.Tensor:
    pooled = torch.zeros(x.shape[:2], dtype=torch.float64)
    for image, channel in product(range(x.shape[0]), range(x.shape[1])):
        values = [max(float(value), 0.0) ** power for value in x[image, channel].flatten()]
        pooled[image, channel] = (sum(values) / len(values) + POWER_EPS) ** (1 / power)
    return pooled


def with_gradients(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The value, and the gradients of a random mixture of its entries."""
    mixture = torch.randn(value.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [value.detach(), *torch.autograd.grad((value * mixture).sum(), inputs)]


def assert_all_close(actual: list[torch.Tensor], expected: list[torch.Tensor], **tolerances: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def gem_of(powers: torch.Tensor) -> torch.Tensor:
    return root(powers.mean(dim=(2, 3)), 3.0)


# GeM


@pytest.mark.parametrize('power', [1, 1.5, 3.0, 6.5])
def test_gem_equals_the_loop(power):
    x = random_map(2, 3, 5, 4) - 0.2
    pooled = GeneralizedMeanPool(power)(x)
    torch.testing.assert_close(pooled, naive_gem(x, power))
    torch.testing.assert_close(GeneralizedMeanPool(power)(x.float()), pooled.float())


def test_gem_lies_between_mean_and_maximum():
    x = random_map(2, 8, 6, 3)
    torch.testing.assert_close(GeneralizedMeanPool(1.0)(x), x.mean(dim=(2, 3)))
    torch.testing.assert_close(GeneralizedMeanPool(7.0, 'avg')(x), x.mean(dim=(2, 3)))
    torch.testing.assert_close(GeneralizedMeanPool(500.0)(x), x.amax(dim=(2, 3)), rtol=0.01, atol=0.0)
    between = GeneralizedMeanPool(3.0)(x)
    assert (between >= x.mean(dim=(2, 3))).all()
    assert (between <= x.amax(dim=(2, 3))).all()


def test_no_pooling_returns_the_map_itself():
    x = random_map(1, 2, 3, 4, dtype=torch.float16)
    assert GeneralizedMeanPool(pool_type='')(x) is x


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1e-4, 1.0, 200.0])
def test_gem_is_exact_in_half_precision(dtype, scale):
    # In float16 the cubes of the smallest would vanish and those of the largest overflow.
    x = (random_map(2, 3, 6, 3) * scale).to(dtype).requires_grad_()
    pooled = GeneralizedMeanPool()(x)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), naive_gem(x.detach(), 3.0), rtol=1e-5, atol=0.0)
    exact = x.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    (expected,) = torch.autograd.grad(GeneralizedMeanPool()(exact).sum(), exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=0.01, atol=1e-6)


def test_gem_ignores_autocast():
    x = random_map(2, 3, 6, 3, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        pooled = GeneralizedMeanPool()(x)
    assert torch.equal(pooled, GeneralizedMeanPool()(x))


@pytest.mark.parametrize('power', [1.0, 2.5, 3.0])
def test_gem_of_nothing_is_nearly_zero_with_finite_gradients(power):
    x = torch.tensor([[0.0, -1.0], [0.0, -2.0]]).expand(1, 2, 2, 2).clone().requires_grad_()
    pooled = GeneralizedMeanPool(power)(x)
    torch.testing.assert_close(pooled, torch.full_like(pooled, POWER_EPS ** (1 / power)))
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize('power', [1.0, 2.5, 3.0])
def test_gem_gradients(power):
    x = (random_map(2, 2, 3, 2) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(GeneralizedMeanPool(power), x)


@pytest.mark.parametrize('power', [0.99, 0.0, -3.0, float('nan')])
def test_gem_refuses_a_power_below_one(power):
    with pytest.raises(ValueError, match=f'power of at least 1, got {power}'):
        GeneralizedMeanPool(power)


def test_gem_refuses_an_unknown_pooling():
    with pytest.raises(ValueError, match=r"unknown pooling 'max'; expected one of \('gem', 'avg', ''\)"):
        GeneralizedMeanPool(pool_type='max')


# The autograd function behind the shortcut


def naive_power_sum(features: torch.Tensor, weights: torch.Tensor | None, power: float) -> torch.Tensor:
    powers = features.clamp(min=0.0) ** power
    return (powers if weights is None else weights * powers).sum(dim=(2, 3))


@pytest.fixture(params=[1, 2**18], ids=['row by row', 'one block'])
def block(request, monkeypatch):
    """Blocks of one row and a half (so of one), or of everything."""
    monkeypatch.setattr(power_mean, '_BLOCK', request.param * 36)


@pytest.mark.parametrize('power', [1.0, 2.0, 3.0, 4.5])
@pytest.mark.parametrize('weighted', [True, False])
def test_power_sum_is_the_sum_with_its_gradients(power, weighted, block):
    features = (random_map(5, 3, 4, 2) + 0.1).requires_grad_()
    weights = random_map(5, 1, 4, 2, seed=1).requires_grad_() if weighted else None
    torch.testing.assert_close(power_sum(features, weights, power), naive_power_sum(features, weights, power))
    inputs = (features, weights) if weighted else (features,)
    assert torch.autograd.gradcheck(lambda f, w=None: power_sum(f, w, power), inputs)


@pytest.mark.parametrize('rows', [1, 4, 7])
def test_blocks_cover_all_rows_whatever_the_memory_format(monkeypatch, rows):
    monkeypatch.setattr(power_mean, '_BLOCK', 2 * 6 * 15 + 1)  # two rows each, the last block has one
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = (random_map(rows, 6, 5, 3) - 0.3).contiguous(memory_format=memory_format).requires_grad_()
        weights = random_map(rows, 1, 5, 3, seed=1).requires_grad_()
        expected = with_gradients(naive_power_sum(features, weights, 3.0), [features, weights])
        actual = with_gradients(power_sum(features, weights, 3.0), [features, weights])
        assert_all_close(actual, expected)
        assert actual[1].is_contiguous(memory_format=memory_format)
        one_map = weights[:1].detach().expand(rows, -1, -1, -1)  # as the static weights come
        torch.testing.assert_close(power_sum(features, one_map, 3.0), naive_power_sum(features, one_map, 3.0))


def test_power_sum_of_no_rows():
    assert power_sum(torch.zeros(0, 3, 4, 2), None, 3.0).shape == (0, 3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_power_sum_in_half_precision(dtype, block):
    features = (random_map(5, 3, 4, 2) * 60).to(dtype).requires_grad_()
    weights = random_map(5, 1, 4, 2, seed=1, dtype=torch.float32).requires_grad_()
    exact = [values.detach().double().requires_grad_() for values in (features, weights)]
    expected = with_gradients(naive_power_sum(*exact, 3.0) / 1e4, exact)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        total = power_sum(features, weights, 3.0)
    assert total.dtype == torch.float32
    actual = with_gradients(power_sum(features, weights, 3.0).double() / 1e4, [features, weights])
    assert [values.dtype for values in actual] == [torch.float64, dtype, torch.float32]
    torch.testing.assert_close(total.double() / 1e4, expected[0], rtol=1e-5, atol=1e-5)
    assert_all_close([values.double() for values in actual], expected, rtol=0.01, atol=1e-5)


def test_power_sum_keeps_its_inputs_alone():
    features = random_map(2, 3, 8, 4).requires_grad_()
    weights = random_map(2, 1, 8, 4, seed=1).requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        power_sum(features, weights, 3.0)
    assert sorted(kept) == sorted([features.data_ptr(), weights.data_ptr()])


def test_power_sum_compiles_into_one_graph():
    features = random_map(5, 3, 4, 2, dtype=torch.float32).requires_grad_()
    weights = random_map(5, 1, 4, 2, seed=1, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(power_sum, backend='aot_eager', fullgraph=True)
    actual = with_gradients(compiled(features, weights, 3.0), [features, weights])
    assert_all_close(actual, with_gradients(power_sum(features, weights, 3.0), [features, weights]))


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
    """Position by position: sums over layer4's cells of the paper's map, scaled so that their mean is the mean."""
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


# Stems


def dual_stem(**options) -> DualStem:
    def stem() -> Stem:
        return Stem(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, **options))

    return DualStem(stem(), stem(), options.get('in_chans', 3)).eval()


def test_stem_is_the_beginning_of_a_resnet():
    resnet = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, stem_width=32, stem_type='deep').eval()
    x = torch.randn(2, 3, 48, 33)
    expected = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(x))))
    assert torch.equal(Stem(resnet)(x), expected)


def test_dual_stem_stacks_visible_rows_first():
    stem = dual_stem()
    visible, infrared = torch.randn(3, 3, 32, 16), torch.randn(2, 3, 32, 16)
    both = stem(visible, infrared)
    assert torch.equal(both[:3], stem.visible(visible))
    assert torch.equal(both[3:], stem.infrared(infrared))
    assert torch.equal(stem(visible), both[:3])
    assert torch.equal(stem(infrared=infrared), both[3:])
    assert not torch.equal(stem(infrared=visible), stem(visible))


def test_dual_stem_says_what_it_was_given():
    stem = dual_stem(in_chans=1)
    good = torch.zeros(2, 1, 32, 16)
    with pytest.raises(ValueError, match=r'give visible=, infrared=, or both, each \[B, C, H, W\]'):
        stem()
    with pytest.raises(ValueError, match=r'visible images need shape \[B, 1, H, W\], got \[2, 3, 32, 16\]'):
        stem(torch.zeros(2, 3, 32, 16), good)
    with pytest.raises(ValueError, match=r'infrared images need shape \[B, 1, H, W\], got \[1, 32, 16\]'):
        stem(good, good[0])
    sizes = r'same height and width, got \[2, 1, 32, 16\] and \[2, 1, 31, 16\]'  # they meet again behind the stem
    with pytest.raises(ValueError, match=sizes):
        stem(good, good[:, :, 1:])


# Heads


def test_neck_is_batch_norm_without_a_bias():
    neck = BatchNormNeck(5)
    assert list(neck.state_dict()) == ['weight', 'running_mean', 'running_var', 'num_batches_tracked']
    assert [name for name, _ in neck.named_parameters()] == ['weight']
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
    expected = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt() * neck.weight
    torch.testing.assert_close(neck(x), expected)
    neck.eval()
    expected = (x - neck.running_mean) / (neck.running_var + 1e-5).sqrt() * neck.weight
    torch.testing.assert_close(neck(x), expected)


def test_head_is_neck_then_classifier_without_a_bias():
    head = BranchHead(5, 3).eval()
    assert [name for name, _ in head.named_parameters()] == ['neck.weight', 'fc.weight']
    x = torch.randn(4, 5)
    torch.testing.assert_close(head(x), head.neck(x) @ head.fc.weight.T)
    assert torch.equal(head(x, pre_logits=True), head.neck(x))


def test_head_without_classes_returns_the_features_behind_the_neck():
    head = BranchHead(5, 0).eval()
    x = torch.randn(4, 5)
    assert torch.equal(head(x), head.neck(x))


def test_head_drops_features_in_training_alone():
    head = BranchHead(64, 3, drop_rate=0.5)
    x = torch.randn(8, 64)
    dropped = head.drop(head.neck(x)) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert (head(x, pre_logits=True) != 0).all()
    head.eval()
    assert torch.equal(head(x), head(x))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_new_classifiers_take_after_the_neck(dtype):
    head = BranchHead(5, 3, dtype=dtype).eval()
    neck = head.neck.weight.clone()
    for count in (4, 0, 2):
        head.reset(count)
        assert not any(module.training for module in head.modules())
        assert head(torch.randn(6, 5)).shape == (6, count or 5)
        assert {parameter.dtype for parameter in head.parameters()} == {dtype}
    assert torch.equal(head.neck.weight, neck)
