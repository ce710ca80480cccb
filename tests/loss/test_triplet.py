"""The triplet loss against a loop over anchors in float64, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from losses import assert_compiles, random_features, value_and_gradient

from vireid_timm.loss.triplet import WeightedRegularizedTriplet

GROUPS = {
    'paper': [name for _ in range(2) for name in range(8) for _ in range(4)],
    'uneven': [3, 3, 3, 3, 3, 7, 7, 1],
    'one image per identity': [0, 1, 2, 3, 4],
    'one against many': [5, 5, 5, 5, 5, 5, 9],
    'negative and large labels': [-1, 2**40, -1, 2**40],
    'several blocks of rows': [name % 12 for name in range(70)],
}


def naive_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    squared = ((a - b) ** 2).sum()
    return squared.sqrt() if squared > 0 else squared * 0


def naive_triplet(features: torch.Tensor, identities: list[int]) -> torch.Tensor:
    """The definition, anchor by anchor, in float64."""
    terms = []
    for anchor, name in zip(features, identities, strict=True):
        positive = [naive_distance(anchor, f) for f, other in zip(features, identities, strict=True) if other == name]
        negative = [naive_distance(anchor, f) for f, other in zip(features, identities, strict=True) if other != name]
        if not negative:
            terms.append((features * 0).sum())
            continue
        positive, negative = torch.stack(positive), torch.stack(negative)
        positive_weight = torch.exp(positive - positive.max().detach())
        negative_weight = torch.exp(-negative + negative.min().detach())
        difference = (positive_weight / positive_weight.sum() * positive).sum()
        difference = difference - (negative_weight / negative_weight.sum() * negative).sum()
        terms.append(torch.logaddexp(difference, torch.zeros_like(difference)))
    return torch.stack(terms).mean()


@pytest.mark.parametrize('scale', [1e-3, 1.0, 5.0, 1e3])
@pytest.mark.parametrize('group', GROUPS)
def test_triplet_equals_the_loop_forward_and_backward(group: str, scale: float) -> None:
    identities = GROUPS[group]
    features = random_features(len(identities), dtype=torch.float64) * scale
    loss, gradient = value_and_gradient(
        lambda values: WeightedRegularizedTriplet()(values, torch.tensor(identities)), features
    )
    expected, expected_gradient = value_and_gradient(lambda values: naive_triplet(values, identities), features)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=3e-9)  # softplus is linear beyond 20: 2e-9
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-8)
    single, single_gradient = value_and_gradient(
        lambda values: WeightedRegularizedTriplet()(values, torch.tensor(identities)), features.float()
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single_gradient.double(), expected_gradient, rtol=1e-2, atol=2e-4 * gradient.abs().max())


@pytest.mark.parametrize('distance', [10.0, 20.0, 100.0, 1e4])
def test_triplet_weights_stay_exact_at_large_distances(distance: float) -> None:
    """Three pairs, every image of one pair equally far from every image of the others."""
    features = torch.zeros(6, 5)
    features[:2, 0] = distance / math.sqrt(2)
    features[2:4, 1] = distance / math.sqrt(2)
    features[4:, 2] = distance / math.sqrt(2)
    identities = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = WeightedRegularizedTriplet()(features, identities)  # positives at 0, negatives at the distance
    torch.testing.assert_close(loss, F.softplus(torch.tensor(-distance)), rtol=1e-3, atol=0.0)
    # Furthest positives at the distance, nearest negative at 0; what the softmax leaves to the others is e^-distance.
    swapped = WeightedRegularizedTriplet()(features, torch.tensor([0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(swapped, torch.tensor(distance), rtol=2e-4, atol=0.0)


def test_triplet_distances_survive_a_large_common_offset() -> None:
    """Features after ReLU and pooling share a large mean; |a|² + |b|² − 2ab would lose the differences in it."""
    identities = GROUPS['uneven']
    features = (random_features(len(identities)) * 0.01 + 64).float()
    loss, gradient = value_and_gradient(
        lambda values: WeightedRegularizedTriplet()(values, torch.tensor(identities)), features
    )
    expected, expected_gradient = value_and_gradient(lambda v: naive_triplet(v, identities), features.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def test_identical_features_give_a_finite_loss_and_gradient() -> None:
    identities = GROUPS['paper']
    features = torch.ones(len(identities), 16)
    loss, gradient = value_and_gradient(lambda v: WeightedRegularizedTriplet()(v, torch.tensor(identities)), features)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_some_identical_features_among_others() -> None:
    """The same image twice in a batch (a small identity), and two people with the same features."""
    features = random_features(8, dtype=torch.float64)
    features[1] = features[0]
    features[7] = features[0]
    identities = GROUPS['uneven']
    loss, gradient = value_and_gradient(lambda v: WeightedRegularizedTriplet()(v, torch.tensor(identities)), features)
    expected, expected_gradient = value_and_gradient(lambda v: naive_triplet(v, identities), features)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize('count', [1, 2, 6])
def test_a_single_identity_gives_zero_loss_and_zero_gradient(count: int) -> None:
    loss, gradient = value_and_gradient(
        lambda values: WeightedRegularizedTriplet()(values, torch.zeros(count, dtype=torch.long)),
        random_features(count),
    )
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1.0, 1e3])
def test_half_precision_features_are_computed_in_float32(dtype: torch.dtype, scale: float) -> None:
    identities = GROUPS['paper']
    features = (random_features(len(identities)) * scale).to(dtype)
    loss, gradient = value_and_gradient(lambda v: WeightedRegularizedTriplet()(v, torch.tensor(identities)), features)
    expected = naive_triplet(features.double(), identities)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(WeightedRegularizedTriplet()(features, torch.tensor(identities)), loss)


def test_triplet_does_not_depend_on_the_order_of_the_batch() -> None:
    identities = torch.tensor(GROUPS['paper'])
    features = random_features(len(identities), dtype=torch.float64)
    order = torch.randperm(len(identities), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        WeightedRegularizedTriplet()(features[order], identities[order]),
        WeightedRegularizedTriplet()(features, identities),
    )


@pytest.mark.parametrize(('features', 'identities'), [((4, 3), (5,)), ((4,), (4,)), ((0, 3), (0,)), ((4, 3), (4, 1))])
def test_wrong_shapes_are_named(features: tuple[int, ...], identities: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'features \[N, D\] and identities \[N\]'):
        WeightedRegularizedTriplet()(torch.zeros(features), torch.zeros(identities, dtype=torch.long))


def test_triplet_compiles_into_one_graph() -> None:
    assert_compiles(WeightedRegularizedTriplet(), random_features(64), torch.tensor(GROUPS['paper']))
