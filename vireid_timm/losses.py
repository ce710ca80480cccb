"""The losses of the paper (eq. 4-13): identity cross entropy, mutual learning, weighted regularised triplet.

Every loss takes any float type, computes in float32 (float64 stays float64) whatever the autocast, and returns a scalar
of that computing type. None of them waits for the device.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layers import full_precision

# Table 4 of the paper: which pairs of branches learn from each other, and which of the two weights a pair has.
MUTUAL_LEARNING_MODES = {
    'none': (),
    'global-to-fusion': (('global', 'fusion', 'fusion_weight'),),
    'joint-to-global': (('joint', 'global', 'global_weight'),),
    'joint-to-fusion': (('joint', 'fusion', 'fusion_weight'),),
    'joint-to-both': (('joint', 'global', 'global_weight'), ('joint', 'fusion', 'fusion_weight')),
}

_ROWS = 64  # distances of as many rows at a time: on a GPU their gradient takes [rows, N, D] floats for a moment


def identity_losses(
    logits: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    branches: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Identity cross entropy of each branch (eq. 7 and 8), mean over the batch.

    Args:
        logits: Branch name -> [N, C].
        labels: Class labels, [N] long.
        label_smoothing: Share of the target that is spread over all classes. The paper's 'LSR' is not this but the
            mutual-learning term (eq. 9 and 10), so the default is 0.
        branches: The branches that have an identity loss (L_id of table 3); all of `logits` when None.

    Returns:
        Branch name -> scalar, in the order of `branches`.

    Raises:
        ValueError: A branch has no logits.
    """
    branches = list(logits) if branches is None else list(branches)
    return {
        branch: F.cross_entropy(full_precision(_branch(logits, branch)), labels, label_smoothing=label_smoothing)
        for branch in branches
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
            getattr(self, weight) * symmetric_kl(_branch(logits, first), _branch(logits, second))
            for first, second, weight in MUTUAL_LEARNING_MODES[self.mode]
        ]
        if terms:
            return torch.stack(terms).sum()
        device = next((values.device for values in logits.values()), None)
        return torch.zeros((), device=device)

    def extra_repr(self) -> str:
        return f'mode={self.mode!r}, global_weight={self.global_weight}, fusion_weight={self.fusion_weight}'


def _branch(logits: Mapping[str, torch.Tensor], branch: str) -> torch.Tensor:
    if branch not in logits:
        raise ValueError(f'the loss needs logits of the branch {branch!r}, but got only {", ".join(logits) or "none"}')
    return logits[branch]


class WeightedRegularizedTriplet(nn.Module):
    """Weighted regularised triplet loss (WRT; eq. 11 of the paper, after AGW, arXiv:2001.04193).

    Every picture i of the batch, of either modality, is an anchor. With Euclidean distances d, positives P (same
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
    # Differs from AGW: distances are computed from differences, not from |a|² + |b|² − 2ab. A picture's distance to
    # itself is exactly 0 (AGW: 1e-6 at least), and the square root's gradient there is 0.

    def forward(self, features: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
        """Compare every picture with all others of the batch.

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
                'features [N, D] and identities [N] of at least one picture expected, '
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
