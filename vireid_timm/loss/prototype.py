"""Prototype contrast: features against running centres of all identities (after arXiv:2103.11568).

Accepts any float dtype, computes in float32 (float64 stays float64) even under autocast, and returns scalars of that
dtype. Never synchronises with the device.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers.power_mean import full_precision
from .distance import centres, check_features


class PrototypeContrast(nn.Module):
    """Contrast with one prototype per identity, shared by both modalities (after cluster contrast, arXiv:2103.11568).

    With L2-normalised features f and prototypes c, of identities where cluster contrast has clusters:

        loss = mean_i −log( exp(f_i·c_y / τ) / Σ_k exp(f_i·c_k / τ) )

    After the loss, `update` moves the prototype of each identity in the batch towards the mean of its features. An
    identity without a prototype yet is left out, as an image's own and as another's.
    """

    # Differs from cluster contrast: a prototype moves once per batch, by the mean of its identity over both modalities,
    # not once per image, which would depend on their order. Temperature 0.03 (there 0.05) and momentum are our choice.

    def __init__(self, num_classes: int, num_features: int, temperature: float = 0.03, momentum: float = 0.5) -> None:
        """Start without prototypes.

        Args:
            num_classes: Number of identities, C.
            num_features: Length of a feature, D.
            temperature: τ.
            momentum: Share of the old prototype in the new one.
        """
        super().__init__()
        self.temperature = temperature
        self.momentum = momentum
        self.register_buffer('prototypes', torch.zeros(num_classes, num_features))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compare every image with all prototypes, which are constants.

        Args:
            features: Features before the BN-neck, of both modalities, any float dtype, [N, D].
            labels: Class label of every row, [N] integers in 0..C−1.

        Returns:
            Scalar; 0 if no identity has a prototype yet.

        Raises:
            ValueError: The shapes do not match.
        """
        check_features(features, labels)
        unit = F.normalize(full_precision(features))
        with torch.autocast(features.device.type, enabled=False):
            logits = unit @ self.prototypes.to(unit.dtype, copy=True).T / self.temperature
        known = self.prototypes.any(dim=1)
        counted = known[labels]
        # Rows that do not count keep all entries: a softmax without its own is infinite.
        logits = logits.masked_fill(~known & counted[:, None], -torch.inf)
        return (F.cross_entropy(logits, labels, reduction='none') * counted).sum() / counted.sum().clamp_min(1)

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Move the prototypes of the identities in a batch; the same batch gives the same prototypes on every rank.

        Args:
            features: As for the loss; of all ranks, in the same order on each.
            labels: Their class labels.
        """
        unit = F.normalize(full_precision(features))
        members = torch.arange(len(self.prototypes), device=labels.device)[:, None] == labels  # [C, N]
        means = centres(unit, members)
        moved = torch.lerp(means, self.prototypes.to(means.dtype), self.momentum)
        moved = F.normalize(torch.where(self.prototypes.any(dim=1, keepdim=True), moved, means))
        self.prototypes.copy_(torch.where(members.any(dim=1, keepdim=True), moved, self.prototypes))

    def extra_repr(self) -> str:
        classes, features = self.prototypes.shape
        return f'{classes}, {features}, temperature={self.temperature}, momentum={self.momentum}'
