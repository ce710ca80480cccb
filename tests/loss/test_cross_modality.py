"""Hetero-center losses and cross-modality triplets against loops in float64, forward and backward."""

import pytest
import torch
from losses import assert_compiles, random_features, value_and_gradient

from vireid_timm.loss.cross_modality_triplet import CrossModalityTriplet
from vireid_timm.loss.hetero_center import HeteroCenter
from vireid_timm.loss.hetero_center_triplet import HeteroCenterTriplet

# Identities of the visible images, and of the infrared ones.
GROUPS = {
    'paper': ([name for name in range(8) for _ in range(4)],) * 2,
    'three ways': ([*range(6), *range(6)], [*range(6)]),
    'uneven': ([3, 3, 3, 7, 7, 1], [7, 3, 1, 1]),
    'one modality only': ([0, 0, 1, 2], [1, 1, 2, 5]),
    'a single pair': ([4, 4], [4]),
    'no pair': ([0, 0, 1], [2, 3]),
    'visible alone': ([0, 0, 1], []),
    'one image': ([0], []),
    'negative and large labels': ([-1, 2**40], [-1, 2**40]),
    'several blocks of rows': ([name % 7 for name in range(50)], [name % 9 for name in range(40)]),
}
LOSSES = {'center': HeteroCenter, 'center triplet': HeteroCenterTriplet, 'triplet': CrossModalityTriplet}


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    squared = ((a - b) ** 2).sum()
    return squared.sqrt() if squared > 0 else squared * 0


def centres_of(features: torch.Tensor, names: list[int], infrared: list[bool]) -> dict[tuple[int, bool], torch.Tensor]:
    keys = list(zip(names, infrared, strict=True))
    return {
        key: torch.stack([f for f, other in zip(features, keys, strict=True) if other == key]).mean(0) for key in keys
    }


def naive_center(features: torch.Tensor, names: list[int], infrared: list[bool]) -> torch.Tensor:
    centres = centres_of(features, names, infrared)
    pairs = [name for name in set(names) if (name, True) in centres and (name, False) in centres]
    return (features * 0).sum() + sum(((centres[name, True] - centres[name, False]) ** 2).sum() for name in pairs)


def naive_center_triplet(features: torch.Tensor, names: list[int], infrared: list[bool]) -> torch.Tensor:
    centres = centres_of(features, names, infrared)
    terms = []
    for (name, modality), centre in centres.items():
        positive = centres.get((name, not modality))
        negatives = [distance(centre, other) for (other_name, _), other in centres.items() if other_name != name]
        if positive is not None and negatives:
            terms.append((0.3 + distance(centre, positive) - torch.stack(negatives).min()).clamp_min(0))
    return (features * 0).sum() + (torch.stack(terms).mean() if terms else 0)


def naive_triplet(features: torch.Tensor, names: list[int], infrared: list[bool]) -> torch.Tensor:
    rows = list(zip(features, names, infrared, strict=True))
    terms = []
    for anchor, name, modality in rows:
        others = [(distance(anchor, f), other) for f, other, kind in rows if kind != modality]
        positives = [value for value, other in others if other == name]
        negatives = [value for value, other in others if other != name]
        if positives and negatives:
            terms.append((0.3 + torch.stack(positives).max() - torch.stack(negatives).min()).clamp_min(0))
    return (features * 0).sum() + (torch.stack(terms).mean() if terms else 0)


NAIVE = {'center': naive_center, 'center triplet': naive_center_triplet, 'triplet': naive_triplet}


def rows_of(group: str) -> tuple[list[int], list[bool]]:
    visible, infrared = GROUPS[group]
    return [*visible, *infrared], [False] * len(visible) + [True] * len(infrared)


@pytest.mark.parametrize('scale', [1e-3, 0.05, 1.0, 1e3])
@pytest.mark.parametrize('group', GROUPS)
@pytest.mark.parametrize('name', LOSSES)
def test_the_loss_is_that_of_the_loop_forward_and_backward(name: str, group: str, scale: float) -> None:
    names, infrared = rows_of(group)
    arguments = torch.tensor(names), torch.tensor(infrared)
    features = random_features(len(names), dtype=torch.float64) * scale
    loss, gradient = value_and_gradient(lambda values: LOSSES[name]()(values, *arguments), features)
    expected, expected_gradient = value_and_gradient(lambda values: NAIVE[name](values, names, infrared), features)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-10)
    single, single_gradient = value_and_gradient(lambda values: LOSSES[name]()(values, *arguments), features.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(single_gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize('name', LOSSES)
def test_the_order_of_the_rows_does_not_matter(name: str) -> None:
    names, infrared = map(torch.tensor, rows_of('uneven'))
    features = random_features(len(names), dtype=torch.float64) * 0.1
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        LOSSES[name]()(features[order], names[order], infrared[order]), LOSSES[name]()(features, names, infrared)
    )


@pytest.mark.parametrize('name', LOSSES)
def test_equal_features_give_a_finite_loss_and_no_gradient(name: str) -> None:
    names, infrared = map(torch.tensor, rows_of('paper'))
    loss, gradient = value_and_gradient(lambda v: LOSSES[name]()(v, names, infrared), torch.ones(len(names), 16))
    torch.testing.assert_close(loss, torch.tensor(0.0 if name == 'center' else 0.3))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize('name', LOSSES)
def test_ties_and_zero_distances_among_others(name: str) -> None:
    """Two negatives at the same distance, and an image that equals its positive: the gradient is a subgradient."""
    names, infrared = [0, 1, 2, 0, 1, 2], [False] * 3 + [True] * 3
    features = torch.zeros(6, 2, dtype=torch.float64)
    features[1, 0] = features[4, 0] = 0.1
    features[2, 0] = features[5, 0] = -0.1
    arguments = torch.tensor(names), torch.tensor(infrared)
    loss, gradient = value_and_gradient(lambda v: LOSSES[name]()(v, *arguments), features)
    torch.testing.assert_close(loss, NAIVE[name](features, names, infrared))
    torch.testing.assert_close(gradient.sum(0), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    names, infrared = rows_of('paper')
    features = (random_features(len(names)) * 0.1).to(dtype)
    arguments = torch.tensor(names), torch.tensor(infrared)
    loss, gradient = value_and_gradient(lambda values: LOSSES[name]()(values, *arguments), features)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype and gradient.isfinite().all()
    torch.testing.assert_close(loss.double(), NAIVE[name](features.double(), names, infrared), rtol=1e-4, atol=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name]()(features, *arguments), loss)


@pytest.mark.parametrize('name', LOSSES)
def test_one_graph_that_waits_for_nothing(name: str) -> None:
    names, infrared = map(torch.tensor, rows_of('paper'))
    assert_compiles(LOSSES[name](), random_features(64), names, infrared)


@pytest.mark.parametrize('name', LOSSES)
def test_wrong_shapes_are_named(name: str) -> None:
    names, infrared = torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r'features \[N, D\] and identities \[N\]'):
        LOSSES[name]()(torch.zeros(3, 2), names, infrared)
    with pytest.raises(ValueError, match=r'infrared \[N\] bool for features \[4, 2\], got \[3\]'):
        LOSSES[name]()(torch.zeros(4, 2), names, infrared[:3])
    with pytest.raises(ValueError, match=r'got \[4\] torch.int64'):
        LOSSES[name]()(torch.zeros(4, 2), names, names)
