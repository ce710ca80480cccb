"""Retrieval metrics from a similarity matrix: CMC, mAP and mINP, and how sure one can be of their means.

CMC and AP as in the SYSU-MM01 protocol (Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017),
INP as in AGW (arXiv:2001.04193, section 3.2). A rank is a count: that of a picture of the right person is the number of
pictures at least as similar, so that nothing but values is ever sorted.
"""

from dataclasses import dataclass

import numpy as np
import torch

CHUNK_CELLS = 2**22  # cells of the similarity matrix looked at together: about 100 MB of working memory

FloatMatrix = np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class RankMetrics:
    """What `rank_metrics` returns: means over the valid queries, and what they are means of.

    Attributes:
        cmc: Share of the valid queries that are answered within the first k, at [k - 1], [max_rank].
        mAP: Mean average precision.
        mINP: Mean inverse negative penalty.
        num_valid_queries: Queries with at least one match in the gallery; the others enter no mean.
        valid: Which queries those are, [Q] bool.
        rank: Rank of the first right answer as the CMC counts it, 0 for a query that is not valid, [Q].
        ap: Average precision of each query, NaN for one that is not valid, [Q].
        inp: Inverse negative penalty of each query, NaN for one that is not valid, [Q].
    """

    cmc: np.ndarray
    mAP: float
    mINP: float
    num_valid_queries: int
    valid: np.ndarray
    rank: np.ndarray
    ap: np.ndarray
    inp: np.ndarray

    @property
    def rank1(self) -> np.ndarray:
        """1 where the first answer is right, 0 where it is wrong, NaN for a query that is not valid, [Q]."""
        return np.where(self.valid, self.rank == 1, np.nan)


def rank_metrics(
    similarity: FloatMatrix,
    query_identities: np.ndarray | torch.Tensor,
    gallery_identities: np.ndarray | torch.Tensor,
    *,
    ignore: np.ndarray | torch.Tensor | None = None,
    per_identity_cmc: bool = False,
    max_rank: int = 20,
) -> RankMetrics:
    """Rank a gallery for every query and measure how early the right person comes.

    With r_j the rank of the j-th of a query's P matches, counted from 1 among the pictures that the query may see,
    AP = mean of j / r_j (no interpolation) and INP = P / r_P. Ties count against the model: a match ranks behind every
    equally similar picture of somebody else. A query without a match is left out of every mean, and counted.

    Args:
        similarity: How alike query and gallery pictures are, higher is nearer, any float type, [Q, G].
        query_identities: Whom the queries show, str or int, [Q].
        gallery_identities: Whom the gallery pictures show, of the same kind, [G].
        ignore: What a query must not see, as match or as distractor, bool, [Q, G].
        per_identity_cmc: Count the CMC's ranks in distinct identities, each at its best picture, as SYSU-MM01 and LLCM
            define it, rather than in pictures. AP and INP count pictures in either case.
        max_rank: Length of the CMC; in a gallery that is smaller it stays at its last value.

    Returns:
        The metrics, and the per-query values that they average.

    Raises:
        ValueError: On shapes that do not fit together, NaN or infinite similarities, or without any valid query.
    """
    if max_rank < 1:
        raise ValueError(f'max_rank must be at least 1, got {max_rank}')
    query, gallery = _identity_codes(query_identities, gallery_identities)
    similarity = similarity if isinstance(similarity, torch.Tensor) else np.asarray(similarity)
    ignore = None if ignore is None else _array(ignore)
    _check_shapes(similarity, ignore, (len(query), len(gallery)))
    step = max(1, CHUNK_CELLS // max(1, len(gallery)))
    chunks = []
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        values = _float_array(similarity[rows])
        _check_finite(values, start)
        hidden = None if ignore is None else ignore[rows]
        chunks.append(_rank_chunk(values, query[rows], gallery, hidden, per_identity_cmc))
    rank, ap, inp = (np.concatenate(column) for column in zip(*chunks, strict=True)) if chunks else (np.empty(0),) * 3
    valid = rank > 0
    if not valid.any():
        raise ValueError(
            f'none of the {len(query)} queries has a picture of the same identity among the {len(gallery)} gallery '
            'pictures that it may see, so there is nothing to measure; check the identities and what is ignored'
        )
    cmc = (rank[valid][:, None] <= np.arange(1, max_rank + 1)).mean(axis=0)
    return RankMetrics(cmc, float(ap[valid].mean()), float(inp[valid].mean()), int(valid.sum()), valid, rank, ap, inp)


def bootstrap_interval(
    values: np.ndarray,
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron, "Bootstrap Methods", 1979).

    Args:
        values: One value per query, e.g. the AP of the valid ones, [Q].
        level: Probability that the interval is meant to hold.
        samples: How many times the queries are drawn anew, with replacement.
        seed: Of the private generator that draws them.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: Without values, on NaN or infinite ones, or on an impossible level or number of samples.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f'values must be one finite number per query, at least one, got shape {list(values.shape)}; '
            'leave out queries that are not valid'
        )
    if not 0 < level < 1 or samples < 1:
        raise ValueError(f'level must lie between 0 and 1 and samples be at least 1, got {level} and {samples}')
    generator = np.random.default_rng(seed)
    # One sample at a time: all of them together would take samples * Q integers of memory.
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(samples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _rank_chunk(
    similarity: np.ndarray,
    query: np.ndarray,
    gallery: np.ndarray,
    ignore: np.ndarray | None,
    per_identity_cmc: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First rank, AP and INP of some queries (0, NaN, NaN where there is no match), each [Q]."""
    match = query[:, None] == gallery
    if ignore is not None:
        match &= ~ignore
    rank, ap, inp = np.zeros(len(query), dtype=np.int64), np.full(len(query), np.nan), np.full(len(query), np.nan)
    valid = match.any(axis=1)
    if not valid.any():
        return rank, ap, inp

    match, others = match[valid], similarity[valid]  # boolean rows: copies
    rows, columns = match.nonzero()
    matches = others[rows, columns]
    matches = matches[np.lexsort((-matches, rows))]  # query by query, the most similar first
    count = match.sum(axis=1)
    first = np.cumsum(count) - count
    others[match if ignore is None else match | ignore[valid]] = -np.inf
    if per_identity_cmc:
        rank[valid] = 1 + _identities_ahead(others, gallery, matches[first])
    others.sort(axis=1)
    ahead = [
        others.shape[1] - row.searchsorted(matches[start : start + length])
        for row, start, length in zip(others, first, count, strict=True)
    ]
    place = np.arange(len(rows)) - first[rows] + 1  # j, counting each query's matches from 1
    ranks = place + np.concatenate(ahead)
    if not per_identity_cmc:
        rank[valid] = ranks[first]
    ap[valid] = np.bincount(rows, weights=place / ranks) / count
    inp[valid] = count / ranks[first + count - 1]
    return rank, ap, inp


def _identities_ahead(others: np.ndarray, gallery: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many other identities have a picture at least as similar as the query's own best one, [Q]."""
    order = np.argsort(gallery, kind='stable')
    starts = np.flatnonzero(np.diff(gallery[order], prepend=-1))
    best = np.maximum.reduceat(others[:, order], starts, axis=1)  # [Q, identities]
    return (best >= own[:, None]).sum(axis=1)


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _float_array(values: FloatMatrix) -> np.ndarray:
    """As float32 or wider: NumPy has no bfloat16, sorts float16 slowly, and widening changes no order and no tie."""
    if isinstance(values, torch.Tensor):
        return _array(values if values.dtype == torch.float64 else values.float())
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _identity_codes(
    query_identities: np.ndarray | torch.Tensor,
    gallery_identities: np.ndarray | torch.Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """The same identities as integers from 0, which compare faster than names do, [Q] and [G]."""
    # By way of lists, an array of Python objects becomes one of names or numbers.
    query, gallery = (np.asarray(_array(values).tolist()) for values in (query_identities, gallery_identities))
    if query.ndim != 1 or gallery.ndim != 1:
        raise ValueError(
            'identities must be one-dimensional, one per picture, got shapes '
            f'{list(query.shape)} for the queries and {list(gallery.shape)} for the gallery'
        )
    if (query.dtype.kind in 'US') != (gallery.dtype.kind in 'US') and len(query) and len(gallery):
        raise ValueError(
            f'query identities are {query.dtype} but gallery identities are {gallery.dtype}, so none could ever match; '
            'give both as names or both as numbers'
        )
    _, codes = np.unique(np.concatenate([query, gallery]), return_inverse=True)
    return codes[: len(query)], codes[len(query) :]


def _check_shapes(similarity: FloatMatrix, ignore: np.ndarray | None, shape: tuple[int, int]) -> None:
    if tuple(similarity.shape) != shape:
        raise ValueError(
            f'similarity must be [queries, gallery] = {list(shape)} to fit the identities, got {list(similarity.shape)}'
        )
    floating = similarity.is_floating_point() if isinstance(similarity, torch.Tensor) else similarity.dtype.kind == 'f'
    if not floating:
        raise ValueError(f'similarity must be of a floating-point type, got {similarity.dtype}')
    if ignore is not None and (ignore.shape != shape or ignore.dtype != np.bool_):
        raise ValueError(
            f'ignore must be bool of shape {list(shape)} like similarity, got {ignore.dtype} {list(ignore.shape)}'
        )


def _check_finite(similarity: np.ndarray, start: int) -> None:
    if not np.isfinite(similarity).all():
        row, column = np.argwhere(~np.isfinite(similarity))[0]
        raise ValueError(
            f'similarity of query {start + row} and gallery picture {column} is {similarity[row, column]}; every '
            'similarity must be finite (say what a query must not see with `ignore`, not with an infinite value)'
        )
