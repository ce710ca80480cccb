"""Losses on features by name and weight, also those of pytorch-metric-learning."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from ..layers.power_mean import full_precision
from .cross_modality_triplet import CrossModalityTriplet
from .hetero_center import HeteroCenter
from .hetero_center_triplet import HeteroCenterTriplet
from .prototype import PrototypeContrast
from .triplet import WeightedRegularizedTriplet

# `docs/losses_and_augmentations.md` describes them.
LOSSES = {
    'triplet': WeightedRegularizedTriplet,
    'hetero_center': HeteroCenter,
    'hetero_center_triplet': HeteroCenterTriplet,
    'cross_modality_triplet': CrossModalityTriplet,
    'prototype': PrototypeContrast,
}
PAPER_LOSSES = {'triplet': 1.0}  # eq. 13
_LIBRARY = 'pml.'  # prefix of the losses of pytorch-metric-learning


class FeatureLosses(nn.Module):
    """Losses that compare the features of a batch with each other, by name, each times its weight."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Create the losses.

        Args:
            weights: Name from `LOSSES`, except `prototype`, or `pml.NAME` -> weight; those of weight 0 are left out.

        Raises:
            ValueError: As `check_losses`.
        """
        super().__init__()
        check_losses(weights)
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.losses = nn.ModuleList(
            _library_loss(name) if is_library_loss(name) else LOSSES[name]() for name in self.weights
        )

    def forward(
        self, features: torch.Tensor, identities: torch.Tensor, infrared: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the weighted losses by name, scalars.

        Args:
            features: Features before the BN-neck, any float dtype, [N, D].
            identities: Identity of every row, [N] integers.
            infrared: Whether a row is of an infrared image, [N] bool.
        """
        terms = {}
        for (name, weight), loss in zip(self.weights.items(), self.losses, strict=True):
            if is_library_loss(name):
                with torch.autocast(features.device.type, enabled=False):
                    value = loss(full_precision(features), identities)
            elif name == 'triplet':  # takes all images alike
                value = loss(features, identities)
            else:
                value = loss(features, identities, infrared)
            terms[name] = weight * value
        return terms


def check_losses(weights: Mapping[str, Any]) -> None:
    """Check names and weights.

    Raises:
        ValueError: An unknown name, a weight that is no number of at least 0, or a loss of pytorch-metric-learning that
            does not exist, cannot be used by name alone, or is not installed.
    """
    for name, weight in weights.items():
        if name not in LOSSES and not is_library_loss(name):
            raise ValueError(
                f'unknown loss {name!r}; expected some of {", ".join(LOSSES)}, or pml.NAME of pytorch-metric-learning, '
                'e.g. pml.CircleLoss'
            )
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < math.inf:
            raise ValueError(f'the weight of the loss {name!r} must be a number of at least 0, got {weight!r}')
        if is_library_loss(name):
            _library_loss(name)


def is_library_loss(name: str) -> bool:
    """Return whether a name is that of a loss of pytorch-metric-learning."""
    return name.startswith(_LIBRARY)


def _library_loss(name: str) -> nn.Module:
    """Create a loss of pytorch-metric-learning with its default arguments."""
    try:
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise ValueError(
            f'the loss {name!r} needs pytorch-metric-learning: pip install "vireid_timm[losses]" ({error})'
        ) from error
    own = name.removeprefix(_LIBRARY)
    kind = getattr(losses, own, None)
    if not isinstance(kind, type):
        raise ValueError(f'pytorch-metric-learning has no loss {own!r}; its names are those of its documentation')
    try:
        loss = kind()
        value = loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    except Exception as error:  # what it misses decides the type
        raise ValueError(
            f'the loss {name!r} cannot be computed from features and identities alone ({type(error).__name__}: {error})'
        ) from error
    if not isinstance(value, torch.Tensor) or value.ndim or next(loss.parameters(), None) is not None:
        raise ValueError(f'the loss {name!r} is not one number without weights of its own: choose another')
    return loss
