"""Re-ranking: two images are near if they share nearest neighbours.

k-reciprocal encoding (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding",
arXiv:1701.08398), and a variant for two modalities.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..constants import MODALITIES
from .features import as_tensor

CHUNK_CELLS = 2**22  # cells of an image-by-image table held at a time
UNIT = 2**30  # weights are whole multiples of 1 / UNIT, so that sums do not depend on their order, even on a GPU


class ReRanking:
    r"""Similarities that take into account whether two images share neighbours (arXiv:1701.08398).

    The method works on the images of one search, queries and gallery together, and uses no identities. So the result
    of a query depends on the other queries, and ignored gallery images still count as neighbours.

    N(p, k) is an image p and its k nearest others; among equally near images, gallery images come before queries, each
    in their order. R(p, k) are the members of N(p, k) whose own N(., k) contains p (section 3.2). Then:

    * R\*(p): R(p, k1), plus all of R(q, k1 / 2) for each member q with more than two thirds of R(q, k1 / 2) in
      R(p, k1). Half of an odd k1 is rounded to the even number.
    * Encoding of p (section 3.3): a weight exp(-d(p, g)) for every g of R\*(p), scaled to a sum of 1. d is the squared
      Euclidean distance, divided by the largest one from p to any image.
    * Local query expansion (section 3.4): each encoding is replaced by the mean of those of N(p, k2 - 1).
    * Jaccard distance of two encodings: 1 - sum of the smaller weights / sum of the larger weights.
    * Final distance (section 3.5): original_weight * d + (1 - original_weight) * Jaccard distance.

    This is the authors' code, with which published figures were measured. The paper's text differs: it says "at least
    two thirds", does not scale, and averages k2 encodings without saying that the image's own is one of them.

    With modalities, N(p, k) is p, its k nearest other visible *and* its k nearest other infrared images; the rest stays
    the same. It is for features that are nearer to their own modality: the paper's lists then rarely reach the other
    one, and the two modalities of a person share few neighbours. With a single modality this is the paper's method.

    Attributes:
        num_queries: Q.
        gallery_size: G.
    """

    def __init__(
        self,
        query: torch.Tensor | np.ndarray,
        gallery: torch.Tensor | np.ndarray,
        *,
        query_modality: Sequence[str] | np.ndarray | None = None,
        gallery_modality: Sequence[str] | np.ndarray | None = None,
        query_in_gallery: Sequence[int] | np.ndarray | None = None,
        k1: int = 20,
        k2: int = 6,
        original_weight: float = 0.3,
    ) -> None:
        """Find and encode the neighbours of every image.

        Computes on the device of the gallery, in float64 if any features are float64, otherwise in float32. Keeps the
        features, neighbour lists and encodings (tens to hundreds of numbers per image), and a bounded number of image
        pairs at a time.

        Args:
            query: L2-normalised features, [Q, D], or [D] for a single query.
            gallery: L2-normalised features, [G, D].
            query_modality: `visible` or `infrared` for each query, [Q]. Pass both modalities or neither.
            gallery_modality: The same for the gallery, [G].
            query_in_gallery: Gallery row of each query's own image, -1 if it is not there, [Q]; None if no image is
                both. An image that is both takes part once, not as its own neighbour.
            k1: Number of neighbours.
            k2: Number of encodings to average, the image's own included; 1 for no averaging.
            original_weight: Weight of the original distance, the paper's lambda.

        Raises:
            ValueError: Features do not match or are not L2-normalised, modalities or rows do not fit them, or a setting
                is out of range.
        """
        if k1 < 1 or k2 < 1:
            raise ValueError(f'k1 and k2 must be at least 1, got {k1} and {k2}')
        if not 0 <= original_weight <= 1:
            raise ValueError(f'original_weight must be between 0 and 1, got {original_weight}')
        gallery = as_tensor(gallery, 'gallery features')
        query = as_tensor(query, 'query features').to(gallery.device)
        query = query[None] if query.ndim == 1 else query
        _check_features(query, gallery)
        self.num_queries, self.gallery_size = len(query), len(gallery)
        # The images are the gallery, then the queries that are not in it.
        image_of_query = _checked_rows(query_in_gallery, self.num_queries, self.gallery_size)
        added = image_of_query < 0
        image_of_query[added] = self.gallery_size + np.arange(added.sum())
        self._image_of_query = torch.from_numpy(image_of_query).to(query.device)
        # Normalise again, so that rounding in a narrower dtype does not add a distance from an image to itself.
        self._features = F.normalize(torch.cat([gallery, query[torch.from_numpy(added).to(query.device)]]))
        modality = _modality_codes(query_modality, gallery_modality, self.num_queries, self.gallery_size)
        modality = np.concatenate([modality[self.num_queries :], modality[: self.num_queries][added]])
        modality = torch.from_numpy(modality).to(query.device)

        self._original_weight = original_weight
        lists, self._farthest = _neighbours(self._features, modality, max(k1, k2 - 1))
        wide, narrow = (_reciprocal(lists, modality, count) for count in (k1, round(k1 / 2)))
        self._encodings = _encode(self._features, self._farthest, wide, narrow)
        if k2 > 1:
            self._encodings = _average(self._encodings, lists[:-1, :, :k2].flatten(1))
        self._gallery_by_image = _transpose(self._encodings, self.gallery_size)

    def similarity(self, rows: slice) -> torch.Tensor:
        """Return minus the final distance between some queries and the gallery.

        Args:
            rows: The queries. This needs memory for several tables [q, G], so pass a part of many queries.

        Returns:
            [q, G], higher is nearer, on the device of the features.
        """
        images = self._image_of_query[rows]
        nearness = self._features[images] @ self._features[: self.gallery_size].T
        distance = (2 - 2 * nearness) / self._farthest[images, None]
        shared = _shared_weight(self._encodings, images, self._gallery_by_image, self.gallery_size)
        shared = shared.to(distance.dtype) / UNIT
        # Both encodings sum to 1, so their larger weights sum to 2 minus the shared weight.
        jaccard = 1 - shared / (2 - shared)
        return -(self._original_weight * distance + (1 - self._original_weight) * jaccard)


class _SparseRows(NamedTuple):
    """A sparse matrix in CSR form: row i has the entries `offsets[i]` to `offsets[i + 1]`."""

    offsets: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def entries(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return for every entry of the given rows its index in `rows`, its column and its value, each [entries]."""
        start, count = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        index = torch.repeat_interleave(count)
        entry = (start - count.cumsum(0) + count).index_select(0, index) + torch.arange(len(index), device=rows.device)
        return index, self.columns.index_select(0, entry), self.values.index_select(0, entry)


def _neighbours(features: torch.Tensor, modality: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest images of each modality for every image, and its largest distance to any image, [N].

    The lists are [N + 1, modalities, count + 1]. Entry 0 is the image itself in its own modality; the others follow,
    nearest first. N means "none": it fills missing entries and row N, so that the neighbours of "none" are "none".
    """
    total = len(features)
    members = [(modality == code).nonzero()[:, 0] for code in range(int(modality.max()) + 1)]
    lists = torch.full((total + 1, len(members), count + 1), total, device=features.device)
    farthest = features.new_empty(total)
    for rows in _chunks(total, total, features.device):
        similarity = features[rows] @ features.T
        # Distances below this bound are rounding errors, and must not be scaled up to 1.
        farthest[rows] = (2 - 2 * similarity.amin(dim=1)).clamp(min=1e-5)
        similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        for code, member in enumerate(members):
            near = member[_most_similar(similarity[:, member], count)]
            near[near == rows[:, None]] = total  # the image itself is last, and listed only if there are too few others
            lists[rows, code, 1 : 1 + near.shape[1]] = near
        lists[rows, modality[rows], 0] = rows
    return lists, farthest


def _most_similar(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Return the columns of the `count` largest values, descending, ties by column, [rows, count or less]."""
    # topk breaks ties arbitrarily. Ties are rare, so only rows that have some are sorted completely. One more value
    # than needed shows whether the last one is tied.
    values, columns = similarity.topk(min(count + 1, similarity.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    by_value = similarity[tied].sort(dim=1, descending=True, stable=True).indices
    columns[tied] = by_value[:, : columns.shape[1]]
    return columns[:, :count]


def _reciprocal(lists: torch.Tensor, modality: torch.Tensor, count: int) -> torch.Tensor:
    """Return R(p, count) of every image, [N + 1, members]; members that are not reciprocal become N ("none")."""
    total = len(lists) - 1
    lists = lists[:, :, : count + 1]
    members = lists.flatten(1).clone()
    for rows in _chunks(total, members.shape[1] * (count + 1), lists.device):
        near = members[rows]
        theirs = lists[near, modality[rows, None]]  # [rows, members, count + 1]
        members[rows] = near.where((theirs == rows[:, None, None]).any(dim=2), total)
    return members


def _encode(features: torch.Tensor, farthest: torch.Tensor, wide: torch.Tensor, narrow: torch.Tensor) -> _SparseRows:
    """Return the encodings before local query expansion, [N, N]; `wide` is R(p, k1) and `narrow` R(p, k1 / 2)."""
    total = len(features)
    parts = []
    # Few images at a time have few neighbours, and only distances to these are computed.
    for rows in torch.arange(total, device=features.device).split(16):
        members = wide[rows]
        encoded = torch.zeros(len(rows), total + 1, dtype=torch.bool, device=features.device)
        encoded.scatter_(1, members, True)
        encoded[:, total] = False  # "none" is not a common neighbour
        theirs = narrow[members]  # [rows, members of R(p, k1), members of R(q, k1 / 2)]
        common = encoded.gather(1, theirs.flatten(1)).view_as(theirs).sum(dim=2)
        accepted = 3 * common > 2 * (theirs < total).sum(dim=2)
        encoded.scatter_(1, theirs.where(accepted[:, :, None], total).flatten(1), True)
        near = encoded[:, :total].any(dim=0).nonzero()[:, 0]
        encoded = encoded[:, near]
        # Scaled to a sum of 1, exp(-d) is the softmax of -d, which is that of 2 similarity / farthest.
        similarity = features[rows] @ features[near].T
        weight = (2 * similarity / farthest[rows, None]).masked_fill(~encoded, -torch.inf).softmax(dim=1)
        parts.append(_nonzero((UNIT * weight).round().long(), near))
    return _stack(parts)


def _average(encodings: _SparseRows, neighbours: torch.Tensor) -> _SparseRows:
    """Average the encodings of every image's neighbours, [N, N]; `neighbours` [N, count] may hold "none"."""
    total = len(neighbours)
    parts = []
    for rows in _chunks(total, total, neighbours.device):
        present = neighbours[rows] < total
        index, column, value = encodings.entries(neighbours[rows][present])
        row = present.nonzero()[:, 0].index_select(0, index)
        table = value.new_zeros(len(rows) * total).index_add_(0, row * total + column, value).view(-1, total)
        table = table.div(present.sum(dim=1, keepdim=True), rounding_mode='floor')
        parts.append(_nonzero(table, torch.arange(total, device=table.device)))
    return _stack(parts)


def _transpose(encodings: _SparseRows, count: int) -> _SparseRows:
    """Transpose the encodings of the first `count` images, [N, count]: which of them have an image as a neighbour."""
    images = torch.arange(count, device=encodings.offsets.device)
    image, column, value = encodings.entries(images)
    column, order = column.sort(stable=True)
    counts = torch.bincount(column, minlength=len(encodings.offsets) - 1)
    return _SparseRows(_offsets(counts), image[order], value[order])


def _shared_weight(encodings: _SparseRows, rows: torch.Tensor, transposed: _SparseRows, count: int) -> torch.Tensor:
    """Sum the smaller of two weights over all columns, for each row and gallery image, in UNITs, [rows, count]."""
    index, column, weight = encodings.entries(rows)
    first_cell = index * count
    shared = weight.new_zeros(len(rows) * count)
    longest = int(transposed.offsets.diff().max())
    # Blocks of a quarter of the bound keep their columns in the processor's cache.
    for block in torch.arange(len(index), device=rows.device).split(max(1, CHUNK_CELLS // 4 // longest)):
        entry, image, value = transposed.entries(column[block])
        entry = entry + block[0]
        value = torch.minimum(value, weight.index_select(0, entry))
        shared.index_add_(0, first_cell.index_select(0, entry) + image, value)
    return shared.view(-1, count)


def _chunks(total: int, cells: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the rows 0 to `total` in chunks that stay within `CHUNK_CELLS` if each row takes `cells` cells."""
    yield from torch.arange(total, device=device).split(max(1, CHUNK_CELLS // cells))


def _nonzero(table: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the number of entries in each row of a dense table, and their columns and values row by row."""
    row, column = table.nonzero(as_tuple=True)
    return torch.bincount(row, minlength=len(table)), columns[column], table[row, column]


def _stack(parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> _SparseRows:
    counts, columns, values = (torch.cat(part) for part in zip(*parts))
    return _SparseRows(_offsets(counts), columns, values)


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _check_features(query: torch.Tensor, gallery: torch.Tensor) -> None:
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1] or not len(query) or not len(gallery):
        raise ValueError(
            'query and gallery must be features [Q, D] and [G, D] of at least one image each, '
            f'got {list(query.shape)} and {list(gallery.shape)}'
        )
    for name, features in (('query', query), ('gallery', gallery)):
        length = features.float().norm(dim=1)
        wrong = ~((length - 1).abs() < 0.01)  # NaN is wrong too
        if wrong.any():
            row = int(wrong.int().argmax())
            raise ValueError(
                f're-ranking needs L2-normalised features, but those of {name} {row} have length '
                f'{float(length[row]):.4g}; apply torch.nn.functional.normalize'
            )


def _checked_rows(rows: Sequence[int] | np.ndarray | None, num_queries: int, gallery_size: int) -> np.ndarray:
    """Return a copy of `query_in_gallery`, all -1 if it is None, [Q]."""
    if rows is None:
        return np.full(num_queries, -1)
    rows = np.array(rows)
    if rows.shape != (num_queries,) or rows.dtype.kind not in 'iu':
        raise ValueError(
            f'query_in_gallery must hold one whole number for each of the {num_queries} queries, '
            f'got {rows.dtype} {list(rows.shape)}'
        )
    if rows.min() < -1 or rows.max() >= gallery_size:
        raise ValueError(
            f'query_in_gallery must be between -1 (not in the gallery) and {gallery_size - 1}, '
            f'got {rows.min()} to {rows.max()}'
        )
    return rows.astype(np.int64)


def _modality_codes(
    query_modality: Sequence[str] | np.ndarray | None,
    gallery_modality: Sequence[str] | np.ndarray | None,
    num_queries: int,
    gallery_size: int,
) -> np.ndarray:
    """Number the modalities of the queries and then of the gallery from 0, [Q + G]; all 0 without modalities."""
    if query_modality is None and gallery_modality is None:
        return np.zeros(num_queries + gallery_size, dtype=np.int64)
    if query_modality is None or gallery_modality is None:
        raise ValueError('pass both query_modality and gallery_modality, or neither for the plain k-reciprocal method')
    if len(query_modality) != num_queries or len(gallery_modality) != gallery_size:
        raise ValueError(
            f'modalities must be one per image, got {len(query_modality)} for {num_queries} queries and '
            f'{len(gallery_modality)} for {gallery_size} gallery images'
        )
    names, codes = np.unique(np.concatenate([query_modality, gallery_modality]), return_inverse=True)
    unknown = [name for name in names.tolist() if name not in MODALITIES]
    if unknown:
        raise ValueError(f'unknown modality {unknown[0]!r}; expected {" or ".join(MODALITIES)}')
    return codes.astype(np.int64)
