"""Cross-modality triplet loss: the hardest images of the other modality (HPILN, IET Image Processing 2020).

Accepts any float dtype, computes in float32 (float64 stays float64) even under autocast, and returns scalars of that
dtype. Never synchronises with the device.
"""

import torch
import torch.nn as nn

from .distance import check_features, hinge, pairwise_distances


class CrossModalityTriplet(nn.Module):
    """Hard cross-modality triplet loss (of HPILN, IET Image Processing 2020; mining as in arXiv:1703.07737).

    Every image is an anchor. Its positive is the furthest image of its identity in the *other* modality, its negative
    the nearest image of another identity in the other modality, all by Euclidean distance d:

        loss = mean over anchors of max(0, margin + d(anchor, positive) − d(anchor, negative))

    An image without either is no anchor. The plain hardest triplet may take all three images from one modality.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, features: torch.Tensor, identities: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
        """Compare every image with those of the other modality.

        Args:
            features: Features before the BN-neck, any float dtype, [N, D].
            identities: Identity of every row, [N] integers.
            infrared: Whether a row is of an infrared image, [N] bool.

        Returns:
            Scalar, in units of the features; 0 if no image is an anchor.

        Raises:
            ValueError: The shapes do not match.
        """
        check_features(features, identities, infrared)
        same = identities[:, None] == identities[None, :]
        other_modality = infrared[:, None] != infrared[None, :]
        positive, negative = same & other_modality, ~same & other_modality
        is_anchor = positive.any(dim=1) & negative.any(dim=1)
        losses = hinge(pairwise_distances(features), positive, negative, self.margin)
        return (losses * is_anchor).sum() / is_anchor.sum().clamp_min(1)

    def extra_repr(self) -> str:
        return f'margin={self.margin}'
