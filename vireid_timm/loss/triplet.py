"""Weighted regularised triplet loss (paper, eq. 11 and 12, after AGW, arXiv:2001.04193).

Accepts any float dtype, computes in float32 (float64 stays float64) even under autocast, and returns scalars of that
dtype. Never synchronises with the device.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .distance import check_features, pairwise_distances


class WeightedRegularizedTriplet(nn.Module):
    """Weighted regularised triplet loss (WRT; eq. 11 of the paper, after AGW, arXiv:2001.04193).

    Every image i of the batch, of either modality, is an anchor. With Euclidean distances d, positives P (same
    identity, i itself included as in AGW) and negatives N:

        loss = mean_i softplus(Σ_{j in P} w⁺_ij d_ij − Σ_{k in N} w⁻_ik d_ik)
        w⁺_i = softmax over P of d_i      w⁻_i = softmax over N of −d_i

    Eq. 12 of the paper misprints these weights (no exponential in the denominators, no sign for the negatives). This
    is AGW's definition, from which the paper takes the loss.

    An anchor without negatives contributes 0. That happens only if the whole batch shows one identity; the loss and
    its gradients are then 0.
    """

    # Differs from AGW: each softmax is shifted by the maximum of its own entries. AGW shifts the negatives by a
    # maximum that is always 0, so beyond distances of about 16 its 1e-6 in the denominator dominates and the weights no
    # longer sum to 1 (at 20 they sum to 0.11, so far negatives look near).
    # Differs from AGW: distances are computed from differences, not from |a|² + |b|² − 2ab, so that of an image to
    # itself is exactly 0 (AGW: at least 1e-6).

    def forward(self, features: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
        """Compare every image with all others in the batch.

        Args:
            features: Features before the BN-neck, of both modalities, any float dtype, [N, D].
            identities: Identity of every row, [N] integers.

        Returns:
            Scalar.

        Raises:
            ValueError: The shapes do not match.
        """
        check_features(features, identities)
        distance = pairwise_distances(features)  # [N, N]
        positive = identities[:, None] == identities[None, :]
        has_negative = ~positive.all(dim=1)
        # A softmax over no negatives is NaN, in its gradient too. Such a row keeps every entry here and is masked out
        # below.
        negative = ~positive | ~has_negative[:, None]
        positive_weight = distance.masked_fill(~positive, -torch.inf).softmax(dim=1)
        negative_weight = (-distance).masked_fill(~negative, -torch.inf).softmax(dim=1)
        furthest_positive = (positive_weight * distance).sum(dim=1)
        closest_negative = (negative_weight * distance).sum(dim=1)
        return (F.softplus(furthest_positive - closest_negative) * has_negative).mean()
