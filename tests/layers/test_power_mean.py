"""GeM and the power sum against loops and plain PyTorch."""

from itertools import product

import pytest
import torch
from maps import assert_all_close, random_map, with_gradients

from vireid_timm.layers import power_mean
from vireid_timm.layers.power_mean import POWER_EPS, GeneralizedMeanPool, power_sum

pytestmark = pytest.mark.usefixtures('one_thread')


def naive_gem(x: torch.Tensor, power: float) -> torch.Tensor:
    pooled = torch.zeros(x.shape[:2], dtype=torch.float64)
    for image, channel in product(range(x.shape[0]), range(x.shape[1])):
        values = [max(float(value), 0.0) ** power for value in x[image, channel].flatten()]
        pooled[image, channel] = (sum(values) / len(values) + POWER_EPS) ** (1 / power)
    return pooled


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


# The autograd function behind `power_sum`


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
def test_blocks_cover_all_rows_in_any_memory_format(monkeypatch, rows):
    monkeypatch.setattr(power_mean, '_BLOCK', 2 * 6 * 15 + 1)  # two rows each, the last block has one
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = (random_map(rows, 6, 5, 3) - 0.3).contiguous(memory_format=memory_format).requires_grad_()
        weights = random_map(rows, 1, 5, 3, seed=1).requires_grad_()
        expected = with_gradients(naive_power_sum(features, weights, 3.0), [features, weights])
        actual = with_gradients(power_sum(features, weights, 3.0), [features, weights])
        assert_all_close(actual, expected)
        assert actual[1].is_contiguous(memory_format=memory_format)
        one_map = weights[:1].detach().expand(rows, -1, -1, -1)  # like the static weights
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


def test_power_sum_saves_only_its_inputs():
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
