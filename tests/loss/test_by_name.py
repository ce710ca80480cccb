"""Losses by name: their weights, those of pytorch-metric-learning, and what is refused."""

import sys

import pytest
import torch
from losses import random_features

from vireid_timm.loss.by_name import LOSSES, PAPER_LOSSES, FeatureLosses, check_losses
from vireid_timm.loss.cross_modality_triplet import CrossModalityTriplet
from vireid_timm.loss.hetero_center import HeteroCenter
from vireid_timm.loss.hetero_center_triplet import HeteroCenterTriplet
from vireid_timm.loss.triplet import WeightedRegularizedTriplet

NAMES, INFRARED = torch.tensor([0, 0, 1, 2, 0, 1, 2, 2]), torch.tensor([False] * 4 + [True] * 4)


def test_every_loss_has_its_weight() -> None:
    features = random_features(8)
    weights = {'triplet': 2, 'hetero_center': 0.5, 'hetero_center_triplet': 1.0, 'cross_modality_triplet': 3.0}
    losses = FeatureLosses({**weights, 'triplet': 2})
    terms = losses(features, NAMES, INFRARED)
    expected = {
        'triplet': 2 * WeightedRegularizedTriplet()(features, NAMES),
        'hetero_center': 0.5 * HeteroCenter()(features, NAMES, INFRARED),
        'hetero_center_triplet': HeteroCenterTriplet()(features, NAMES, INFRARED),
        'cross_modality_triplet': 3 * CrossModalityTriplet()(features, NAMES, INFRARED),
    }
    torch.testing.assert_close(terms, expected)
    assert set(weights) | {'prototype'} == set(LOSSES) and set(PAPER_LOSSES) <= set(LOSSES)
    assert FeatureLosses({'triplet': 0})(features, NAMES, INFRARED) == {}


@pytest.mark.parametrize('name', ['CircleLoss', 'SupConLoss', 'MultiSimilarityLoss'])
def test_losses_of_the_library_run_in_full_precision(name: str) -> None:
    library = pytest.importorskip('pytorch_metric_learning.losses')
    features = random_features(8)
    losses = FeatureLosses({f'pml.{name}': 0.25})
    expected = 0.25 * getattr(library, name)()(features, NAMES)
    torch.testing.assert_close(losses(features, NAMES, INFRARED), {f'pml.{name}': expected})
    with torch.autocast('cpu', dtype=torch.bfloat16):
        (value,) = losses(features.bfloat16(), NAMES, INFRARED).values()
    torch.testing.assert_close(value, 0.25 * getattr(library, name)()(features.bfloat16().float(), NAMES))


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        ({'triplets': 1}, "unknown loss 'triplets'; expected some of triplet, hetero_center, .* or pml.NAME"),
        ({'triplet': -1}, "weight of the loss 'triplet' must be a number of at least 0, got -1"),
        ({'triplet': True}, 'got True'),
        ({'triplet': 'one'}, "got 'one'"),
        ({'triplet': float('inf')}, 'got inf'),
        ({'triplet': float('nan')}, 'got nan'),
        ({'pml.RoundLoss': 1}, "pytorch-metric-learning has no loss 'RoundLoss'"),
        ({'pml.ArcFaceLoss': 1}, "'pml.ArcFaceLoss' cannot be computed from features and identities alone"),
        ({'pml.base_metric_loss_function': 1}, 'has no loss'),
    ],
)
def test_what_cannot_be_is_one_line(weights: dict, message: str) -> None:
    pytest.importorskip('pytorch_metric_learning.losses')
    with pytest.raises(ValueError, match=message) as caught:
        check_losses(weights)
    assert '\n' not in str(caught.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning', None)
    with pytest.raises(ValueError, match=r'pip install "vireid_timm\[losses\]"'):
        check_losses({'pml.CircleLoss': 1})
    check_losses({'triplet': 1})
