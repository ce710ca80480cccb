"""Search a gallery by features."""

from typing import NamedTuple

import numpy as np
import torch

from ..evaluation.features import as_tensor, check_finite


class Found(NamedTuple):
    """What a search found, best first.

    Attributes:
        rows: Rows of the gallery, [Q, K] int64; [K] for a single query.
        similarity: Inner product of each with the query, of the same shape.
    """

    rows: torch.Tensor
    similarity: torch.Tensor


def nearest(
    query_features: torch.Tensor | np.ndarray, gallery_features: torch.Tensor | np.ndarray, count: int
) -> Found:
    """Return the `count` most similar gallery images for each query, best first.

    Computes on the device of the gallery, in float64 if any features are float64, otherwise in float32.

    Args:
        query_features: L2-normalised, [Q, D], or [D] for a single query.
        gallery_features: L2-normalised, [G, D].
        count: Number of images K; a smaller gallery returns all of them.

    Raises:
        ValueError: The features do not match or are not finite, or `count` is below 1.
    """
    gallery = as_tensor(gallery_features, 'gallery features')
    query = as_tensor(query_features, 'query features').to(gallery.device)
    if query.ndim not in (1, 2) or gallery.ndim != 2 or query.shape[-1] != gallery.shape[1]:
        raise ValueError(
            'query and gallery must be features [Q, D] (or [D] for one query) and [G, D], got '
            f'{list(query.shape)} and {list(gallery.shape)}'
        )
    if count < 1:
        raise ValueError(f'count must be at least 1, got {count}')
    for name, features in (('query', query.view(-1, gallery.shape[1])), ('gallery', gallery)):
        check_finite(features, [f'{name} {i}' for i in range(len(features))])
    dtype = torch.promote_types(query.dtype, gallery.dtype)
    similarity = query.to(dtype) @ gallery.to(dtype).T
    values, rows = similarity.topk(min(count, len(gallery)), dim=-1)
    return Found(rows, values)
