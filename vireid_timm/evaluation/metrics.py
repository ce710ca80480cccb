"""Retrieval metrics from a similarity matrix: CMC, mAP and mINP.

CMC and AP follow the SYSU-MM01 protocol (Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017),
INP follows AGW (arXiv:2001.04193, section 3.2). The rank of a match is the number of images that are at least as
similar, so only the few matches of a query are sorted: for every gallery image we count how many matches are more
similar, and from then on work with these small integers, for any number of galleries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CHUNK_CELLS = 2**23  # cells of the similarity matrix ranked at a time: about 150 MB of working memory at most
# Fewest and most queries per chunk. With fewer, a large gallery is read again for every few of them; more are slower.
CHUNK_ROWS = (64, 1280)
_BLOCK_CELLS = 2**16  # cells that stay in a core's cache while they are compared with one match after the other

FloatMatrix = np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class RankMetrics:
    """Means over the valid queries, and the values of each query.

    Attributes:
        cmc: Share of the valid queries with a match among the first k, at index k - 1, [max_rank].
        mAP: Mean average precision.
        mINP: Mean inverse negative penalty.
        num_valid_queries: Queries with at least one match in the gallery; the others are in no mean.
        valid: Whether each query is valid, [Q] bool.
        rank: Rank of the first match as the CMC counts it, 0 for an invalid query, [Q].
        ap: Average precision of each query, NaN for an invalid one, [Q].
        inp: Inverse negative penalty of each query, NaN for an invalid one, [Q].
    """

    cmc: np.ndarray
    mAP: float
    mINP: float
    num_valid_queries: int
    valid: np.ndarray
    rank: np.ndarray
    ap: np.ndarray
    inp: np.ndarray

    @classmethod
    def of_queries(cls, rank: np.ndarray, ap: np.ndarray, inp: np.ndarray, max_rank: int = 20) -> 'RankMetrics':
        """Average per-query values, each [Q].

        Raises:
            ValueError: No query is valid (rank > 0).
        """
        valid = rank > 0
        if not valid.any():
            raise ValueError(
                f'none of the {len(rank)} queries has a gallery image of its identity that is not ignored, so there is '
                'nothing to measure; check the identities and `ignore`'
            )
        cmc = (rank[valid][:, None] <= np.arange(1, max_rank + 1)).mean(axis=0)
        return cls(cmc, float(ap[valid].mean()), float(inp[valid].mean()), int(valid.sum()), valid, rank, ap, inp)

    @property
    def rank1(self) -> np.ndarray:
        """1 if the first answer is right, 0 if it is wrong, NaN for an invalid query, [Q]."""
        return np.where(self.valid, self.rank == 1, np.nan)


@dataclass(frozen=True, eq=False)
class Gallery:
    """A gallery to rank, made of columns of a similarity matrix.

    Attributes:
        columns: The columns, sorted by identity, so that the matches of a query are consecutive, [G] int64.
        identities: Their identities as integers from 0, [G] int64.
        first: Index of each identity's first column; the last entry belongs to no identity, [identities + 1].
        count: Number of its columns, [identities + 1].
        is_whole: Whether these are all columns of the matrix in their order.
        per_identity_cmc: As for `rank_metrics`.
    """

    columns: np.ndarray
    identities: np.ndarray
    first: np.ndarray
    count: np.ndarray
    is_whole: bool
    per_identity_cmc: bool

    def matches(self, query: np.ndarray) -> torch.Tensor:
        """Return the columns that show the identity of each query [Q], padded with -1, [Q, M] int64."""
        query = np.minimum(query, len(self.count) - 1)  # larger codes are not in the gallery
        count = self.count[query][:, None]
        offset = np.arange(count.max(initial=0))
        columns = np.full((len(query), len(offset)), -1)
        present = offset < count
        columns[present] = self.columns[(self.first[query][:, None] + offset)[present]]
        return torch.from_numpy(columns)


def rank_metrics(
    similarity: FloatMatrix,
    query_identities: np.ndarray | torch.Tensor,
    gallery_identities: np.ndarray | torch.Tensor,
    *,
    ignore: np.ndarray | torch.Tensor | None = None,
    per_identity_cmc: bool = False,
    max_rank: int = 20,
) -> RankMetrics:
    """Rank a gallery for every query and measure how early its matches come.

    Let r_j be the rank of the j-th of a query's P matches, counted from 1 among the images that are not ignored. Then
    AP = mean of j / r_j (no interpolation) and INP = P / r_P. Ties count against the model: a match ranks behind every
    equally similar image of another identity. Queries without a match are excluded from all means, and counted.

    Computes on the device of the similarities.

    Args:
        similarity: Similarity of query and gallery images, higher is nearer, any float dtype, [Q, G].
        query_identities: Identities of the queries, str or int, [Q].
        gallery_identities: Identities of the gallery images, of the same type, [G].
        ignore: Gallery images that a query must not see, neither as match nor as distractor, bool, [Q, G].
        per_identity_cmc: Count the CMC's ranks in distinct identities, each at its best image, as SYSU-MM01 and LLCM
            define it, rather than in images. AP and INP always count images.
        max_rank: Length of the CMC; beyond the size of the gallery it stays at its last value.

    Returns:
        The metrics, and the per-query values that they average.

    Raises:
        ValueError: Shapes do not match, a similarity is NaN or infinite, or no query is valid.
    """
    if max_rank < 1:
        raise ValueError(f'max_rank must be at least 1, got {max_rank}')
    query, gallery = _identity_codes(query_identities, gallery_identities)
    similarity = similarity if isinstance(similarity, torch.Tensor) else np.asarray(similarity)
    ignore = ignore if ignore is None or isinstance(ignore, torch.Tensor) else np.asarray(ignore)
    _check_shapes(similarity, ignore, (len(query), len(gallery)))
    device = similarity.device if isinstance(similarity, torch.Tensor) else torch.device('cpu')
    ranker = Ranker(gallery)
    galleries = [ranker.gallery(np.arange(len(gallery)), per_identity_cmc)]
    results = []
    for rows in chunks(len(query), len(gallery)):
        values = _as_tensor(similarity[rows], device)
        ignored = None if ignore is None else _as_tensor(ignore[rows], device)
        check_similarity(values, rows.start)
        results.append(ranker.rank(values, query[rows], ignored, galleries)[0])
    rank, ap, inp = (torch.cat(column).cpu().numpy() for column in zip(*results, strict=True))
    return RankMetrics.of_queries(rank, ap, inp, max_rank)


def chunks(num_queries: int, num_columns: int) -> list[slice]:
    """Split the rows of a similarity matrix into chunks to rank at a time: at least one, which may be empty."""
    fewest, most = CHUNK_ROWS
    step = max(fewest, min(most, CHUNK_CELLS // max(1, num_columns)))
    return [slice(start, min(start + step, num_queries)) for start in range(0, max(1, num_queries), step)]


class Ranker:
    """Ranks galleries that share the columns of a similarity matrix, a chunk of queries at a time.

    Args:
        identities: Identity of every column as an integer from 0, [N] int64.
    """

    def __init__(self, identities: np.ndarray) -> None:
        self.identities = identities
        self.whole = self.gallery(np.arange(len(identities)), False)

    def gallery(self, columns: np.ndarray, per_identity_cmc: bool) -> Gallery:
        """Make a gallery of some of the columns, [G] int64."""
        columns = columns[np.argsort(self.identities[columns], kind='stable')]
        identities = self.identities[columns]
        count = np.bincount(identities, minlength=self.identities.max(initial=-1) + 2)
        is_whole = np.array_equal(columns, np.arange(len(self.identities)))
        return Gallery(columns, identities, np.cumsum(count) - count, count, is_whole, per_identity_cmc)

    def rank(
        self,
        similarity: torch.Tensor,
        query: np.ndarray,
        ignore: torch.Tensor | None,
        galleries: Sequence[Gallery],
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rank each of the galleries for some queries.

        Args:
            similarity: [Q, N] float.
            query: Identity of every query, as an integer like those of the columns, [Q] int64.
            ignore: Columns that a query must not see, [Q, N] bool.
            galleries: The galleries.

        Returns:
            First rank (0 without a match), AP and INP (NaN without a match), each [Q], for every gallery.
        """
        matches = self.whole.matches(query).to(similarity.device)
        if not matches.shape[1]:
            none = similarity.new_full((len(query),), torch.nan, dtype=torch.float64)
            return [(torch.zeros_like(none, dtype=torch.int64), none, none)] * len(galleries)
        absent = matches < 0
        columns = matches.clamp(min=0)
        if ignore is not None:
            absent |= ignore.gather(1, columns)
        thresholds = similarity.gather(1, columns).masked_fill(absent, -torch.inf).sort(dim=1).values
        ahead = _matches_ahead(similarity, thresholds)
        num_matches = thresholds.shape[1]
        if ignore is not None:
            ahead.masked_fill_(ignore, num_matches)
        own = [_own_matches(ahead, gallery.matches(query).to(ahead.device), num_matches) for gallery in galleries]
        # From here on the query's own identity is not a distractor. Padding repeats the first match.
        ahead.scatter_(1, torch.where(matches < 0, columns[:, :1], columns), num_matches)
        return [
            _rank(ahead, positions, num_matches, gallery) for positions, gallery in zip(own, galleries, strict=True)
        ]


def _matches_ahead(similarity: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Count for each image how many of the query's matches are more similar, [Q, N] integers.

    Args:
        similarity: [Q, N].
        thresholds: Similarities of the matches, ascending, padded with -inf, [Q, M].
    """
    num_matches = thresholds.shape[1]
    if not _on_cpu(similarity) or num_matches >= 255:
        return num_matches - torch.searchsorted(thresholds, similarity, right=True, out_int32=True)
    # With few matches it is faster to compare a block with one match after the other than to search among them.
    ahead = torch.zeros(similarity.shape, dtype=torch.uint8)
    block = max(1, _BLOCK_CELLS // max(1, similarity.shape[1]))
    for start in range(0, len(similarity), block):
        rows = slice(start, start + block)
        values, limits, count = similarity[rows].numpy(), thresholds[rows].numpy(), ahead[rows].numpy()
        less = np.empty(values.shape, dtype=np.bool_)
        # Queries of one identity are mostly adjacent, so their padding is mostly the same and can be skipped.
        limits = limits[:, (limits > -np.inf).any(axis=0)]
        for limit in limits.T[..., None]:
            np.less(values, limit, out=less)
            count += less.view(np.uint8)
    return ahead


def _own_matches(ahead: torch.Tensor, matches: torch.Tensor, num_matches: int) -> torch.Tensor:
    """Return `ahead` of the matches in one gallery, ascending, `num_matches` if absent, [Q, P >= 1] int64."""
    if not matches.shape[1]:
        return torch.full((len(ahead), 1), num_matches, device=ahead.device)
    own = ahead.gather(1, matches.clamp(min=0)).long()
    return own.where(matches >= 0, num_matches).sort(dim=1).values


def _rank(
    ahead: torch.Tensor,
    own: torch.Tensor,
    num_matches: int,
    gallery: Gallery,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return first rank, AP and INP in one gallery, each [Q].

    Args:
        ahead: Number of the query's matches that are more similar than each image, [Q, N]; `num_matches` if the image
            is not a distractor.
        own: The same for the matches in the gallery, see `_own_matches`, [Q, P].
        num_matches: Number of matches in all columns.
        gallery: The gallery.
    """
    valid = own[:, 0] < num_matches
    rank = own.new_zeros(len(own))
    ap, inp = (torch.full(rank.shape, torch.nan, dtype=torch.float64, device=own.device) for _ in range(2))
    if valid.any():
        distractors = _gallery_columns(ahead, valid, gallery)
        rank[valid], ap[valid], inp[valid] = _rank_valid(distractors, own[valid], num_matches, gallery)
    return rank, ap, inp


def _rank_valid(
    ahead: torch.Tensor,
    own: torch.Tensor,
    num_matches: int,
    gallery: Gallery,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do the same for queries that have a match, given only the columns of the gallery, [Q, G]."""
    counts = torch.zeros(len(ahead), num_matches + 1, dtype=torch.int32, device=ahead.device)
    counts.scatter_add_(1, ahead.long(), counts.new_ones(1, 1).expand(ahead.shape))
    distractors = counts.cumsum(1).gather(1, own)  # number that is at least as similar as each match
    j = torch.arange(1, own.shape[1] + 1, device=own.device)  # counts the matches
    rank = j + distractors
    present = own < num_matches
    count = present.sum(dim=1)
    ap = torch.where(present, j / rank.double(), 0).sum(dim=1) / count
    inp = count / rank.gather(1, count[:, None] - 1).squeeze(1).double()
    first = 1 + _identities_ahead(ahead, own[:, :1], num_matches, gallery) if gallery.per_identity_cmc else rank[:, 0]
    return first, ap, inp


def _gallery_columns(ahead: torch.Tensor, rows: torch.Tensor, gallery: Gallery) -> torch.Tensor:
    """Select the columns of the gallery and some of the queries, [Q, G]."""
    if not gallery.is_whole and _on_cpu(ahead):
        ahead = torch.from_numpy(ahead.numpy().take(gallery.columns, axis=1))
    elif not gallery.is_whole:
        ahead = ahead.index_select(1, torch.from_numpy(gallery.columns).to(ahead.device))
    return ahead if rows.all() else ahead[rows]


def _identities_ahead(ahead: torch.Tensor, best: torch.Tensor, num_matches: int, gallery: Gallery) -> torch.Tensor:
    """Count the other identities with an image at least as similar as the query's best match, [Q]."""
    if _on_cpu(ahead):
        starts = gallery.first[gallery.count > 0]
        others = torch.from_numpy(np.minimum.reduceat(ahead.numpy(), starts, axis=1))
    else:
        others = ahead.new_full((len(ahead), len(gallery.count)), num_matches)
        identities = torch.from_numpy(gallery.identities).to(ahead.device)
        others.scatter_reduce_(1, identities.expand(ahead.shape), ahead, 'amin')
    return (others <= best.to(others.dtype)).sum(dim=1)


def _on_cpu(values: torch.Tensor) -> bool:
    """Return whether NumPy can do the work, which is several times as fast there."""
    return values.device.type == 'cpu'


def _as_tensor(values: FloatMatrix, device: torch.device) -> torch.Tensor:
    """Convert to float32 or wider, which changes no order and no tie, or to bool."""
    if isinstance(values, np.ndarray):
        dtype = values.dtype if values.dtype == np.bool_ else np.dtype(f'f{min(8, values.dtype.itemsize)}')
        values = torch.from_numpy(np.require(values, dtype, ['C', 'W']))
    values = values.detach().to(device).contiguous()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _identity_codes(
    query_identities: np.ndarray | torch.Tensor,
    gallery_identities: np.ndarray | torch.Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Number the identities from 0, because integers compare faster than names, [Q] and [G]."""
    # `tolist` turns arrays of Python objects, and tensors, into names or numbers.
    query, gallery = (
        np.asarray(values.tolist() if hasattr(values, 'tolist') else values)
        for values in (query_identities, gallery_identities)
    )
    if query.ndim != 1 or gallery.ndim != 1:
        raise ValueError(
            'identities must be one-dimensional, one per image, got shapes '
            f'{list(query.shape)} for the queries and {list(gallery.shape)} for the gallery'
        )
    if (query.dtype.kind in 'US') != (gallery.dtype.kind in 'US') and len(query) and len(gallery):
        raise ValueError(
            f'query identities are {query.dtype} but gallery identities are {gallery.dtype}, so nothing can match; '
            'pass both as names or both as numbers'
        )
    _, codes = np.unique(np.concatenate([query, gallery]), return_inverse=True)
    return codes[: len(query)], codes[len(query) :]


def _check_shapes(
    similarity: FloatMatrix,
    ignore: np.ndarray | torch.Tensor | None,
    shape: tuple[int, int],
) -> None:
    if tuple(similarity.shape) != shape:
        raise ValueError(
            f'similarity must be [queries, gallery] = {list(shape)} like the identities, got {list(similarity.shape)}'
        )
    floating = similarity.is_floating_point() if isinstance(similarity, torch.Tensor) else similarity.dtype.kind == 'f'
    if not floating:
        raise ValueError(f'similarity must have a floating-point dtype, got {similarity.dtype}')
    if ignore is not None and (tuple(ignore.shape) != shape or ignore.dtype not in (np.bool_, torch.bool)):
        raise ValueError(
            f'ignore must be bool of shape {list(shape)} like similarity, got {ignore.dtype} {list(ignore.shape)}'
        )


def check_similarity(similarity: torch.Tensor, first_query: int) -> None:
    """Raise a `ValueError` that names the first NaN or infinite similarity, [Q, G]."""
    if not similarity.numel() or torch.stack(similarity.aminmax()).isfinite().all():
        return
    row, column = (~similarity.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f'similarity of query {first_query + row} and gallery image {column} is {similarity[row, column]}; every '
        'similarity must be finite (to exclude an image, use `ignore`, not an infinite value)'
    )
