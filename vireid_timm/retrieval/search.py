"""Search a gallery by features: exact, in blocks, so that a gallery may be larger than the memory."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..evaluation.features import as_tensor, check_finite

_BLOCK = 1 << 24  # numbers of the gallery, or similarities, that are computed with at once


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
    """Return the `count` most similar gallery images for each query, best first; of equal ones the lower row is first.

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
    queries = query.view(-1, gallery.shape[1])
    for name, features in (('query', queries), ('gallery', gallery)):
        check_finite(features, [f'{name} {i}' for i in range(len(features))])
    found = exact_search(queries.to(torch.promote_types(query.dtype, gallery.dtype)), gallery, count)
    return found if query.ndim == 2 else Found(found.rows[0], found.similarity[0])


def exact_search(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    count: int,
    rows: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
) -> Found:
    """Return the `count` most similar gallery images for each query, best first; of equal ones the lower row is first.

    The gallery is read once, block by block.

    Args:
        queries: Features [Q, D]; their type and device are computed in.
        gallery: Features [G, D] of any floating-point type on any device, such as a memory-mapped file.
        count: Number of images K; fewer if the gallery has fewer.
        rows: Rows of the gallery to search, ascending [R] int64; None for all.
        mean: Subtracted from every gallery image [D], which is then normalised again; None to leave it out.

    Returns:
        Rows and similarities [Q, K] on the device of the queries.
    """
    best = Found(queries.new_empty(len(queries), 0, dtype=torch.int64), queries.new_empty(len(queries), 0))
    for numbers, block in _blocks(gallery, rows):
        block = block.to(queries.device, queries.dtype)
        if mean is not None:
            block = F.normalize(block - mean)
        found = _search_block(queries, block, count)
        best = merged(best, Found(numbers.to(queries.device)[found.rows], found.similarity), count)
    return best


def rescored(queries: torch.Tensor, gallery: torch.Tensor, candidates: torch.Tensor, count: int) -> Found:
    """Return the most similar of each query's own candidates, best first; of equal ones the lower row is first.

    Args:
        queries: Features [Q, D]; their type and device are computed in.
        gallery: Features [G, D] of any floating-point type on the CPU, such as a memory-mapped file.
        candidates: Rows of the gallery [Q, K] int64 in any order, -1 for none.
        count: Number of images wanted; at most K.

    Returns:
        Rows and similarities [Q, count] on the device of the queries; -1 and -inf where there is no candidate.
    """
    candidates = candidates.sort(dim=1).values.cpu()  # ascending, as they lie on the disk
    similarity = queries.new_empty(candidates.shape)
    step = max(1, _BLOCK // max(candidates.shape[1] * gallery.shape[1], 1))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        images = gallery[candidates[part].clamp(min=0)].to(queries.device, queries.dtype)
        similarity[part] = torch.bmm(images, queries[part, :, None])[:, :, 0]
    candidates = candidates.to(queries.device)
    similarity[candidates < 0] = -torch.inf
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return Found(candidates.gather(1, order)[:, :count], similarity[:, :count])


def mean_features(gallery: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean [D] of some rows [R] of a gallery's features [G, D], which is read block by block."""
    total = torch.zeros(gallery.shape[1], dtype=torch.float64)
    for _, block in _blocks(gallery, rows):
        total += block.float().sum(dim=0)
    return (total / max(len(rows), 1)).float()


def _blocks(gallery: torch.Tensor, rows: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the rows [B] and the features [B, D] of a gallery part by part; rows as for `exact_search`."""
    rows = torch.arange(len(gallery)) if rows is None else rows
    for part in rows.split(max(1, _BLOCK // max(gallery.shape[1], 1))) if len(rows) else ():
        first, last = int(part[0]), int(part[-1])
        # A range needs no copy.
        yield part, gallery[first : last + 1] if last - first + 1 == len(part) else gallery[part]


def _search_block(queries: torch.Tensor, block: torch.Tensor, count: int) -> Found:
    """Search gallery features [B, D] that are on the queries' device; rows are those of the block."""
    step = max(1, _BLOCK // len(block))
    parts = [_largest(queries[i : i + step] @ block.T, count) for i in range(0, max(len(queries), 1), step)]
    return Found(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _largest(similarity: torch.Tensor, count: int) -> Found:
    """Return the columns of the `count` largest values of each row [Q, B], best first, equal ones by their column."""
    count = min(count, similarity.shape[1])
    values, columns = similarity.topk(count)
    # Of equal values, topk takes any. Where more of them reach the last place than there is room for, sort.
    is_tied = (similarity >= values[:, -1:]).sum(dim=1) > count
    if is_tied.any():
        ordered = similarity[is_tied].sort(dim=1, descending=True, stable=True)
        values[is_tied], columns[is_tied] = ordered.values[:, :count], ordered.indices[:, :count]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Found(columns.gather(1, order), values)


def merged(first: Found, second: Found, count: int) -> Found:
    """Return the best of two results of the same queries; all rows of the second one are higher."""
    rows, similarity = (torch.cat(parts, dim=1) for parts in zip(first, second, strict=True))
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return Found(rows.gather(1, order)[:, :count], similarity[:, :count])
