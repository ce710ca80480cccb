"""Identity loss: cross entropy of each branch (paper, eq. 7 and 8).

Accepts any float dtype, computes in float32 (float64 stays float64) even under autocast, and returns scalars of that
dtype. Never synchronises with the device.
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
    """Return the identity cross entropy of each branch (eq. 7 and 8), averaged over the batch.

    Args:
        logits: Branch name -> [N, C].
        labels: Class labels, [N] long.
        label_smoothing: Share of the target that is spread over all classes. The default is 0, because the paper's
            'LSR' is the mutual-learning term (eq. 9 and 10).
        branches: The branches that get an identity loss (L_id of table 3); None for all of `logits`.

    Returns:
        Branch name -> scalar, in the order of `branches`.

    Raises:
        ValueError: A branch has no logits.
    """
    return {
        branch: F.cross_entropy(full_precision(branch_logits(logits, branch)), labels, label_smoothing=label_smoothing)
        for branch in (logits if branches is None else branches)
    }


def branch_logits(logits: Mapping[str, torch.Tensor], branch: str) -> torch.Tensor:
    """Return the logits of one branch, [N, C].

    Raises:
        ValueError: The branch has no logits.
    """
    if branch not in logits:
        raise ValueError(f'the loss needs logits of the branch {branch!r}, got only {", ".join(logits) or "none"}')
    return logits[branch]
