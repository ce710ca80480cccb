"""Search a gallery by features."""

import torch


def nearest(query_features: torch.Tensor, gallery_features: torch.Tensor, count: int) -> torch.Tensor:
    """Return the rows of the `count` most similar gallery images for each query, best first.

    Args:
        query_features: L2-normalised, [Q, D].
        gallery_features: L2-normalised, [G, D].
        count: Number of images; a smaller gallery returns all of them.

    Returns:
        [Q, min(count, G)] int64.
    """
    return (query_features @ gallery_features.T).topk(min(count, len(gallery_features)), dim=1).indices
