"""Identity loss: cross entropy of each branch (paper, eq. 7 and 8).

Takes any float type, computes in float32 (float64 stays float64) whatever the autocast, and returns a scalar of that
type. Never waits for the device.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from ..layers.power_mean import full_precision


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
        branch: F.cross_entropy(full_precision(branch_logits(logits, branch)), labels, label_smoothing=label_smoothing)
        for branch in branches
    }


def branch_logits(logits: Mapping[str, torch.Tensor], branch: str) -> torch.Tensor:
    """The logits of one branch, [N, C].

    Raises:
        ValueError: There are none.
    """
    if branch not in logits:
        raise ValueError(f'the loss needs logits of the branch {branch!r}, but got only {", ".join(logits) or "none"}')
    return logits[branch]
