"""Deep mutual learning between the branches (paper, eq. 5, 6, 9 and 10).

Takes any float type, computes in float32 (float64 stays float64) whatever the autocast, and returns a scalar of that
type. Never waits for the device.
"""

from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers.power_mean import full_precision
from .identity import branch_logits

# Table 4 of the paper: which pairs of branches learn from each other, and which of the two weights a pair has.
MUTUAL_LEARNING_MODES = {
    'none': (),
    'global-to-fusion': (('global', 'fusion', 'fusion_weight'),),
    'joint-to-global': (('joint', 'global', 'global_weight'),),
    'joint-to-fusion': (('joint', 'fusion', 'fusion_weight'),),
    'joint-to-both': (('joint', 'global', 'global_weight'), ('joint', 'fusion', 'fusion_weight')),
}


def symmetric_kl(logits_p: torch.Tensor, logits_q: torch.Tensor) -> torch.Tensor:
    """Half the sum of both KL divergences between two predictions (eq. 5 and 6), gradients into both.

    The sum runs over the classes and the *mean* over the batch: the paper prints a sum over the N samples, which its
    identity loss (eq. 7, a mean) contradicts and which would tie the weights θ to the batch size.

    Args:
        logits_p: Logits of one branch, [N, C].
        logits_q: Logits of the other branch, [N, C].

    Returns:
        Scalar.

    Raises:
        ValueError: The shapes differ.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim != 2:
        raise ValueError(
            f'two predictions of the same [N, C] shape expected, got {list(logits_p.shape)} and {list(logits_q.shape)}'
        )
    log_p = F.log_softmax(full_precision(logits_p), dim=1)
    log_q = F.log_softmax(full_precision(logits_q), dim=1)
    # KL(p‖q) + KL(q‖p) in one sum, of which no term is negative: nothing cancels between the two directions.
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1).mean()


class MutualLearningLoss(nn.Module):
    """Deep mutual learning between the branches: θ1·KL(joint, global) + θ2·KL(joint, fusion) (eq. 5, 6, 9, 10).

    `mode` selects a row of table 4: `none`, `global-to-fusion` (weight θ2), `joint-to-global` (θ1), `joint-to-fusion`
    (θ2) or `joint-to-both` (the paper's method). Despite the names every pair learns from each other.
    """

    def __init__(self, mode: str = 'joint-to-both', global_weight: float = 0.6, fusion_weight: float = 1.8) -> None:
        """Choose a row of table 4 and its weights.

        Args:
            mode: One of `MUTUAL_LEARNING_MODES`.
            global_weight: θ1 of eq. 9.
            fusion_weight: θ2 of eq. 10.

        Raises:
            ValueError: Unknown mode.
        """
        super().__init__()
        if mode not in MUTUAL_LEARNING_MODES:
            raise ValueError(
                f'unknown mutual-learning mode {mode!r}; expected one of {", ".join(MUTUAL_LEARNING_MODES)}'
            )
        self.mode = mode
        self.global_weight = global_weight
        self.fusion_weight = fusion_weight

    def forward(self, logits: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum up the divergences that the mode asks for.

        Args:
            logits: Branch name -> [N, C]; branches that the mode does not name are ignored.

        Returns:
            The weighted sum, a scalar; 0 with mode `none`.

        Raises:
            ValueError: A branch that the mode needs has no logits.
        """
        terms = [
            getattr(self, weight) * symmetric_kl(branch_logits(logits, first), branch_logits(logits, second))
            for first, second, weight in MUTUAL_LEARNING_MODES[self.mode]
        ]
        if terms:
            return torch.stack(terms).sum()
        device = next((values.device for values in logits.values()), None)
        return torch.zeros((), device=device)

    def extra_repr(self) -> str:
        return f'mode={self.mode!r}, global_weight={self.global_weight}, fusion_weight={self.fusion_weight}'
