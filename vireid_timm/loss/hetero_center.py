"""Hetero-center loss: the visible and the infrared centre of an identity (arXiv:1910.09830).

Accepts any float dtype, computes in float32 (float64 stays float64) even under autocast, and returns scalars of that
dtype. Never synchronises with the device.
"""

import torch
import torch.nn as nn

from .distance import centres, check_features


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
