"""Triplet and other losses over several batches, without holding their activations (GradCache, arXiv:2101.06983).

The features of all batches are computed without gradients, and each loss over them with its gradient for each feature.
Then each batch is computed again with gradients, and its features receive what belongs to them. The batches are those
of one optimiser step, of all ranks, or both.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..distributed import gather, rank_and_world_size
from ..loss.by_name import FeatureLosses


class JoinedTriplet(NamedTuple):
    """The part of one batch in a loss over several batches.

    Attributes:
        value: The loss over all of them, a scalar.
        gradient: Its gradient with respect to the features of this batch, times the number of batches, since the
            batches' gradients are averaged afterwards; [2 B, D].
    """

    value: torch.Tensor
    gradient: torch.Tensor

    def loss(self, features: torch.Tensor) -> torch.Tensor:
        """Return the loss as a function of this batch's features, [2 B, D]."""
        return _KnownLoss.apply(features, *self)


class _KnownLoss(torch.autograd.Function):
    """A loss that was computed elsewhere, and its gradient, as a function of the features that it belongs to."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def join_triplets(
    losses: FeatureLosses,
    features: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    infrared: torch.Tensor,
    across_ranks: bool,
) -> list[dict[str, JoinedTriplet]]:
    """Compute the losses over several batches, and the part of each.

    Args:
        losses: The losses by name, with their weights.
        features: Features of each batch, [N, D] each, constants for each other.
        labels: Class labels of each batch, [N] each.
        infrared: Which rows of a batch are of infrared images, [N] bool; the same in every batch.
        across_ranks: Whether the batches of all ranks are joined. Collective then, with batches of one size.

    Returns:
        The part of each batch of this rank in each loss, by name.
    """
    rows, identities = torch.cat(list(features)).detach(), torch.cat(list(labels))
    count, own = len(features), slice(0, len(rows))
    if across_ranks:
        rank, world_size = rank_and_world_size()
        own = slice(rank * len(rows), (rank + 1) * len(rows))
        rows, identities, count = gather(rows).flatten(0, 1), gather(identities).flatten(), count * world_size
    joined = [{} for _ in features]
    with torch.enable_grad():
        rows.requires_grad_()
        for name, value in losses(rows, identities, infrared.repeat(count)).items():
            (gradient,) = torch.autograd.grad(value, rows)
            for parts, part in zip(joined, (gradient[own] * count).split(len(features[0])), strict=True):
                parts[name] = JoinedTriplet(value.detach(), part)
    return joined
