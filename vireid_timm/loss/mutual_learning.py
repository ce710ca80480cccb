"""Deep mutual learning between the branches (paper, eq. 5, 6, 9 and 10).

Accepts any float dtype, computes in float32 (float64 stays float64) even under autocast, and returns scalars of that
dtype. Never synchronises with the device.
"""

from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers.power_mean import full_precision
from .identity import branch_logits

# Table 4 of the paper: the pairs of branches that learn from each other, and the weight of each pair.
MUTUAL_LEARNING_MODES = {
    'none': (),
    'global-to-fusion': (('global', 'fusion', 'fusion_weight'),),
    'joint-to-global': (('joint', 'global', 'global_weight'),),
    'joint-to-fusion': (('joint', 'fusion', 'fusion_weight'),),
    'joint-to-both': (('joint', 'global', 'global_weight'), ('joint', 'fusion', 'fusion_weight')),
}

# What gets no gradient. `partner`: in each direction of KL the prediction that is learned from, as in deep mutual
# learning (arXiv:1706.00384, eq. 3 and 6). `teacher`: the branch named first in a mode: it teaches and is not taught.
MUTUAL_CONSTANTS = ('none', 'partner', 'teacher')


def symmetric_kl(logits_p: torch.Tensor, logits_q: torch.Tensor, constant: str = 'none') -> torch.Tensor:
    """Return half the sum of both KL divergences between two predictions (eq. 5 and 6).

    Sums over the classes and takes the *mean* over the batch. The paper prints a sum over the N samples, but that
    contradicts its identity loss (eq. 7, a mean) and would tie the weights θ to the batch size.

    Args:
        logits_p: Logits of one branch, [N, C].
        logits_q: Logits of the other branch, [N, C].
        constant: What gets no gradient, one of `MUTUAL_CONSTANTS`; the value is always the same. `none`: both
            predictions follow both divergences. `partner`: q follows KL(p‖q) and p follows KL(q‖p). `teacher`: q
            follows both, and p neither.

    Returns:
        Scalar.

    Raises:
        ValueError: The shapes differ.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim != 2:
        raise ValueError(
            f'expected two predictions of the same shape [N, C], got {list(logits_p.shape)} and {list(logits_q.shape)}'
        )
    log_p = F.log_softmax(full_precision(logits_p), dim=1)
    log_q = F.log_softmax(full_precision(logits_q), dim=1)
    if constant == 'teacher':
        log_p = log_p.detach()
    difference = log_p.exp() - log_q.exp()
    if constant == 'partner':
        # Then d/dlog_q is q - p, the gradient of KL(p‖q) with p constant, and d/dlog_p that of KL(q‖p).
        difference = difference.detach()
    # KL(p‖q) + KL(q‖p) as one sum without negative terms, so the two directions lose no precision by cancellation.
    return 0.5 * (difference * (log_p - log_q)).sum(dim=1).mean()


class MutualLearningLoss(nn.Module):
    """Deep mutual learning between the branches: θ1·KL(joint, global) + θ2·KL(joint, fusion) (eq. 5, 6, 9, 10).

    Args:
        mode: A row of table 4: `none`, `global-to-fusion` (weight θ2), `joint-to-global` (θ1), `joint-to-fusion` (θ2)
            or `joint-to-both` (the paper's method).
        global_weight: θ1 of eq. 9.
        fusion_weight: θ2 of eq. 10.
        constant: Which branch of a pair gets no gradient, see `symmetric_kl`; the first is the one named first in the
            mode.

    Raises:
        ValueError: The mode or `constant` is unknown.
    """

    def __init__(
        self,
        mode: str = 'joint-to-both',
        global_weight: float = 0.6,
        fusion_weight: float = 1.8,
        constant: str = 'teacher',
    ) -> None:
        super().__init__()
        if constant not in MUTUAL_CONSTANTS:
            raise ValueError(f'unknown constant {constant!r}; expected one of {", ".join(MUTUAL_CONSTANTS)}')
        if mode not in MUTUAL_LEARNING_MODES:
            raise ValueError(
                f'unknown mutual-learning mode {mode!r}; expected one of {", ".join(MUTUAL_LEARNING_MODES)}'
            )
        self.mode = mode
        self.global_weight = global_weight
        self.fusion_weight = fusion_weight
        self.constant = constant

    def forward(self, logits: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of the mode's divergences.

        Args:
            logits: Branch name -> [N, C]; branches that the mode does not use are ignored.

        Returns:
            Scalar; 0 with mode `none`.

        Raises:
            ValueError: A branch that the mode uses has no logits.
        """
        terms = [
            getattr(self, weight)
            * symmetric_kl(branch_logits(logits, first), branch_logits(logits, second), self.constant)
            for first, second, weight in MUTUAL_LEARNING_MODES[self.mode]
        ]
        if terms:
            return torch.stack(terms).sum()
        device = next((values.device for values in logits.values()), None)
        return torch.zeros((), device=device)

    def extra_repr(self) -> str:
        return (
            f'mode={self.mode!r}, global_weight={self.global_weight}, fusion_weight={self.fusion_weight}, '
            f'constant={self.constant!r}'
        )
