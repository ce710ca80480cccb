"""Hetero-center triplet loss: triplets of the centres of identities in both modalities (arXiv:2008.06223).

Accepts any float dtype, computes in float32 (float64 stays float64) even under autocast, and returns scalars of that
dtype. Never synchronises with the device.
"""

import torch
import torch.nn as nn

from .distance import centres, check_features, hinge, pairwise_distances


class HeteroCenterTriplet(nn.Module):
    """Hetero-center triplet loss (arXiv:2008.06223): triplets of centres instead of images.

    Every centre, that is the mean of the batch's features of one identity and modality, is an anchor. Its positive is
    the identity's centre in the other modality, its negative the nearest centre of another identity in either modality:

        loss = mean over centres of max(0, margin + d(centre, positive) − d(centre, negative))

    A centre without a positive (an identity with images of one modality) or without a negative (one identity in all)
    is no anchor; it still is a negative of others. The mean and the margin of 0.3 are those of the authors' code, whose
    weight is 2.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, features: torch.Tensor, identities: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
        """Compare all centres.

        Args:
            features: Features before the BN-neck, any float dtype, [N, D].
            identities: Identity of every row, [N] integers.
            infrared: Whether a row is of an infrared image, [N] bool.

        Returns:
            Scalar, in units of the features.

        Raises:
            ValueError: The shapes do not match.
        """
        check_features(features, identities, infrared)
        same = identities[:, None] == identities[None, :]
        same_modality = infrared[:, None] == infrared[None, :]
        group = same & same_modality
        distance = pairwise_distances(centres(features, group))  # each centre once for every image of its group
        losses = hinge(distance, same & ~same_modality, ~same, self.margin)
        is_anchor = (same & ~same_modality).any(dim=1) & ~same.all(dim=1)
        share = is_anchor / group.sum(dim=1).to(losses.dtype)  # a sum over images counts every anchor once
        return (losses * share).sum() / share.sum().clamp_min(1)

    def extra_repr(self) -> str:
        return f'margin={self.margin}'
