"""What losses on features share: Euclidean distances, centres, and the margin between them, exact under autocast."""

import torch

from ..layers.power_mean import full_precision

_ROWS = 64  # rows of distances computed at a time: on a GPU their gradient needs [rows, N, D] floats


def pairwise_distances(features: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distance of each row to each, [N, D] -> [N, N], in float32 (float64 stays float64).

    They are computed from differences, not from |a|² + |b|² − 2ab: the distance of a row to itself is exactly 0, and
    the gradient of the square root there is 0.
    """
    features = full_precision(features)  # there is no matrix product below for autocast to round
    return torch.cat(
        [torch.cdist(rows, features, compute_mode='donot_use_mm_for_euclid_dist') for rows in features.split(_ROWS)]
    )


def check_features(features: torch.Tensor, identities: torch.Tensor, infrared: torch.Tensor | None = None) -> None:
    """Raise ValueError unless there are features [N, D], identities [N] and, if given, modalities [N] of N >= 1."""
    count = features.shape[:1]
    if features.ndim != 2 or identities.shape != count or len(features) == 0:
        raise ValueError(
            'expected features [N, D] and identities [N] of at least one image, '
            f'got {list(features.shape)} and {list(identities.shape)}'
        )
    if infrared is not None and (infrared.shape != count or infrared.dtype != torch.bool):
        raise ValueError(
            f'expected infrared [N] bool for features {list(features.shape)}, got {list(infrared.shape)} '
            f'{infrared.dtype}'
        )


def centres(features: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Return the mean of each row's group, computed in float32 (float64 stays float64) even under autocast.

    Args:
        features: [N, D].
        members: Whether row j belongs to the group of row i, [M, N] bool.

    Returns:
        [M, D]; 0 for an empty group.
    """
    features = full_precision(features)
    members = members.to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        return members / members.sum(dim=1, keepdim=True).clamp_min(1) @ features


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
