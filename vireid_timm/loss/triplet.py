"""Weighted regularised triplet loss (paper, eq. 11 and 12, after AGW, arXiv:2001.04193).

Takes any float type, computes in float32 (float64 stays float64) whatever the autocast, and returns a scalar of that
type. Never waits for the device.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers.power_mean import full_precision

_ROWS = 64  # distances of as many rows at a time: on a GPU their gradient takes [rows, N, D] floats for a moment


class WeightedRegularizedTriplet(nn.Module):
    """Weighted regularised triplet loss (WRT; eq. 11 of the paper, after AGW, arXiv:2001.04193).

    Every image i of the batch, of either modality, is an anchor. With Euclidean distances d, positives P (same
    identity, i itself included as in AGW) and negatives N:

        loss = mean_i softplus(Σ_{j in P} w⁺_ij d_ij − Σ_{k in N} w⁻_ik d_ik)
        w⁺_i = softmax over P of d_i      w⁻_i = softmax over N of −d_i

    Eq. 12 of the paper prints these weights with slips (no exponential in the denominators, no sign for the
    negatives); this is the definition of AGW, from which the paper takes the loss.

    An anchor without negatives has nothing to compare with and contributes 0. That happens only where the whole batch
    shows one identity, and the loss is then 0 with zero gradients.
    """

    # Differs from AGW: each softmax is shifted by the maximum of its own entries. AGW shifts the negatives' by a
    # maximum that is always 0, so its 1e-6 in the denominator takes over from distances of about 16 on and the weights
    # no longer sum to 1 (at 20 they sum to 0.11: negatives look near when they are far).
    # Differs from AGW: distances are computed from differences, not from |a|² + |b|² − 2ab. An image's distance to
    # itself is exactly 0 (AGW: 1e-6 at least), and the square root's gradient there is 0.

    def forward(self, features: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
        """Compare every image with all others of the batch.

        Args:
            features: Features before the BN-neck, both modalities, [N, D] float of any type.
            identities: Identity of every row, [N] integers.

        Returns:
            Scalar.

        Raises:
            ValueError: The shapes do not fit.
        """
        if features.ndim != 2 or identities.shape != features.shape[:1] or len(features) == 0:
            raise ValueError(
                'features [N, D] and identities [N] of at least one image expected, '
                f'got {list(features.shape)} and {list(identities.shape)}'
            )
        features = full_precision(features)  # and no product of matrices below, which autocast would round
        rows_of_distances = [
            torch.cdist(rows, features, compute_mode='donot_use_mm_for_euclid_dist') for rows in features.split(_ROWS)
        ]
        distance = torch.cat(rows_of_distances)  # [N, N]
        positive = identities[:, None] == identities[None, :]
        has_negative = ~positive.all(dim=1)
        # A row without negatives would be a softmax over nothing (NaN, in its gradient too): it gets every entry
        # here and is taken out below.
        negative = ~positive | ~has_negative[:, None]
        positive_weight = distance.masked_fill(~positive, -torch.inf).softmax(dim=1)
        negative_weight = (-distance).masked_fill(~negative, -torch.inf).softmax(dim=1)
        furthest_positive = (positive_weight * distance).sum(dim=1)
        closest_negative = (negative_weight * distance).sum(dim=1)
        return (F.softplus(furthest_positive - closest_negative) * has_negative).mean()
