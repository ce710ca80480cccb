"""Hetero-center losses: the visible and the infrared centre of an identity (arXiv:1910.09830, arXiv:2008.06223).

They accept any float dtype, compute in float32 (float64 stays float64) even under autocast, and return scalars of that
dtype. They never synchronise with the device.
"""

import torch
import torch.nn as nn

from .distance import centres, check_features, pairwise_distances


class HeteroCenter(nn.Module):
    """Hetero-center loss (arXiv:1910.09830): Σ over identities of |visible centre − infrared centre|².

    A centre is the mean of the batch's features of one identity and modality. An identity with images of one modality
    contributes 0. As in the paper this is a sum, so it grows with the number of identities in a batch; the paper's
    weight is 0.5.
    """

    def forward(self, features: torch.Tensor, identities: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
        """Compare the centres of both modalities.

        Args:
            features: Features before the BN-neck, any float dtype, [N, D].
            identities: Identity of every row, [N] integers.
            infrared: Whether a row is of an infrared image, [N] bool.

        Returns:
            Scalar, in squared units of the features.

        Raises:
            ValueError: The shapes do not match.
        """
        check_features(features, identities, infrared)
        same = identities[:, None] == identities[None, :]
        own_visible, own_infrared = same & ~infrared, same & infrared
        has_both = own_visible.any(dim=1) & own_infrared.any(dim=1)
        squared = (centres(features, own_visible) - centres(features, own_infrared)).square().sum(dim=1)
        return (squared * has_both / same.sum(dim=1)).sum()  # every image of an identity has the same two centres


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


def hinge(distance: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, margin: float) -> torch.Tensor:
    """Return max(0, margin + furthest positive − nearest negative) of each row, [N]; 0 without a negative.

    Args:
        distance: [N, N].
        positive: What is a positive of each row, [N, N] bool; a row without any has one at distance 0.
        negative: What is a negative of each row, [N, N] bool.
        margin: In units of the distance.
    """
    furthest = distance.masked_fill(~positive, 0).amax(dim=1)
    nearest = distance.masked_fill(~negative, torch.inf).amin(dim=1)
    return (margin + furthest - nearest).clamp_min(0)
