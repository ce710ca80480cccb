"""Retrieval metrics from a similarity matrix: CMC, mAP and mINP.

CMC and AP as in the SYSU-MM01 protocol (Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017),
INP as in AGW (arXiv:2001.04193, section 3.2). A rank is a count: that of an image of the right person is the number of
images at least as similar. So nothing is ever sorted but a query's few matches: every gallery image is told how
many of them are more similar, and from then on small integers are counted, for as many galleries as one likes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CHUNK_CELLS = 2**23  # cells of the similarity matrix looked at together: at most some 150 MB of working memory
# But never fewer queries, or a large gallery would be read anew for each of a few; more at a time are slower again.
CHUNK_ROWS = (64, 1280)
_BLOCK_CELLS = 2**16  # cells that stay in a core's cache while they are compared with one match after the other

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

    @classmethod
    def of_queries(cls, rank: np.ndarray, ap: np.ndarray, inp: np.ndarray, max_rank: int = 20) -> 'RankMetrics':
        """The means of per-query values, each [Q].

        Raises:
            ValueError: If no query is valid (rank > 0).
        """
        valid = rank > 0
        if not valid.any():
            raise ValueError(
                f'none of the {len(rank)} queries has an image of the same identity among the gallery images that '
                'it may see, so there is nothing to measure; check the identities and what is ignored'
            )
        cmc = (rank[valid][:, None] <= np.arange(1, max_rank + 1)).mean(axis=0)
        return cls(cmc, float(ap[valid].mean()), float(inp[valid].mean()), int(valid.sum()), valid, rank, ap, inp)

    @property
    def rank1(self) -> np.ndarray:
        """1 where the first answer is right, 0 where it is wrong, NaN for a query that is not valid, [Q]."""
        return np.where(self.valid, self.rank == 1, np.nan)


@dataclass(frozen=True, eq=False)
class Search:
    """One gallery to be ranked, made of columns of a similarity matrix.

    Attributes:
        columns: Which ones, identity by identity, so that the matches of a query are a stretch of them, [G] int64.
        identities: Whom they show, as integers from 0, [G] int64.
        first: Where each identity's stretch begins, and after all of them an empty one, [identities + 1].
        count: How long it is, [identities + 1].
        is_everything: Whether these are all columns of the matrix in their order.
        per_identity_cmc: As for `rank_metrics`.
    """

    columns: np.ndarray
    identities: np.ndarray
    first: np.ndarray
    count: np.ndarray
    is_everything: bool
    per_identity_cmc: bool

    def matches(self, query: np.ndarray) -> torch.Tensor:
        """Columns that show the person of each query, [Q] int64, filled up with -1, [Q, M] int64."""
        query = np.minimum(query, len(self.count) - 1)  # whoever comes later is nobody in the gallery
        count = self.count[query][:, None]
        place = np.arange(count.max(initial=0))
        columns = np.full((len(query), len(place)), -1)
        wanted = place < count
        columns[wanted] = self.columns[(self.first[query][:, None] + place)[wanted]]
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
    """Rank a gallery for every query and measure how early the right person comes.

    With r_j the rank of the j-th of a query's P matches, counted from 1 among the images that the query may see,
    AP = mean of j / r_j (no interpolation) and INP = P / r_P. Ties count against the model: a match ranks behind every
    equally similar image of somebody else. A query without a match is left out of every mean, and counted.

    Computes where the similarities are, on the CPU or an accelerator.

    Args:
        similarity: How alike query and gallery images are, higher is nearer, any float type, [Q, G].
        query_identities: Whom the queries show, str or int, [Q].
        gallery_identities: Whom the gallery images show, of the same kind, [G].
        ignore: What a query must not see, as match or as distractor, bool, [Q, G].
        per_identity_cmc: Count the CMC's ranks in distinct identities, each at its best image, as SYSU-MM01 and LLCM
            define it, rather than in images. AP and INP count images in either case.
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
    ignore = ignore if ignore is None or isinstance(ignore, torch.Tensor) else np.asarray(ignore)
    _check_shapes(similarity, ignore, (len(query), len(gallery)))
    device = similarity.device if isinstance(similarity, torch.Tensor) else torch.device('cpu')
    ranker = Ranker(gallery)
    search = ranker.search(np.arange(len(gallery)), per_identity_cmc)
    results = []
    for rows in chunks(len(query), len(gallery)):
        values = _tensor(similarity[rows], device)
        hidden = None if ignore is None else _tensor(ignore[rows], device)
        check_similarity(values, rows.start)
        results.append(ranker.rank(values, query[rows], hidden, [search])[0])
    rank, ap, inp = (torch.cat(column).cpu().numpy() for column in zip(*results, strict=True))
    return RankMetrics.of_queries(rank, ap, inp, max_rank)


def chunks(num_queries: int, num_columns: int) -> list[slice]:
    """Rows of a similarity matrix that are looked at together, at least one chunk, if an empty one."""
    fewest, most = CHUNK_ROWS
    step = max(fewest, min(most, CHUNK_CELLS // max(1, num_columns)))
    return [slice(start, min(start + step, num_queries)) for start in range(0, max(1, num_queries), step)]


class Ranker:
    """Ranks galleries that share their columns of a similarity matrix, a chunk of queries at a time.

    Args:
        gallery: Identity of every column as an integer from 0, [N] int64.
    """

    def __init__(self, gallery: np.ndarray) -> None:
        self.gallery = gallery
        self.whole = self.search(np.arange(len(gallery)), False)

    def search(self, columns: np.ndarray, per_identity_cmc: bool) -> Search:
        """One gallery, made of some of the columns, [G] int64."""
        columns = columns[np.argsort(self.gallery[columns], kind='stable')]
        identities = self.gallery[columns]
        count = np.bincount(identities, minlength=self.gallery.max(initial=-1) + 2)
        is_everything = np.array_equal(columns, np.arange(len(self.gallery)))
        return Search(columns, identities, np.cumsum(count) - count, count, is_everything, per_identity_cmc)

    def rank(
        self,
        similarity: torch.Tensor,
        query: np.ndarray,
        ignore: torch.Tensor | None,
        searches: Sequence[Search],
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Answer some queries from each of the galleries.

        Args:
            similarity: [Q, N] float.
            query: Identity of every query, in the numbers of the gallery's, [Q] int64.
            ignore: What a query must not see, [Q, N] bool.
            searches: From which galleries.

        Returns:
            First rank (0 where there is no match), AP and INP (NaN where there is none), each [Q], for every gallery.
        """
        matches = self.whole.matches(query).to(similarity.device)
        if not matches.shape[1]:
            none = similarity.new_full((len(query),), torch.nan, dtype=torch.float64)
            return [(torch.zeros_like(none, dtype=torch.int64), none, none)] * len(searches)
        unseen = matches < 0
        columns = matches.clamp(min=0)
        if ignore is not None:
            unseen |= ignore.gather(1, columns)
        thresholds = similarity.gather(1, columns).masked_fill(unseen, -torch.inf).sort(dim=1).values
        behind = _behind(similarity, thresholds)
        num_matches = thresholds.shape[1]
        if ignore is not None:
            behind.masked_fill_(ignore, num_matches)
        own = [_own(behind, search.matches(query).to(behind.device), num_matches) for search in searches]
        # From here on a query's own person is no distractor. Filled-up places repeat the first match.
        behind.scatter_(1, torch.where(matches < 0, columns[:, :1], columns), num_matches)
        return [_answer(behind, places, num_matches, search) for places, search in zip(own, searches, strict=True)]


def _behind(similarity: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """How many of its query's matches are more similar than each image, [Q, N] integers.

    Args:
        similarity: [Q, N].
        thresholds: Those of the matches, in rising order, filled up with -inf, [Q, M].
    """
    num_matches = thresholds.shape[1]
    if not _on_cpu(similarity) or num_matches >= 255:
        return num_matches - torch.searchsorted(thresholds, similarity, right=True, out_int32=True)
    # With few matches it is faster to compare with one after the other, a block at a time, than to search among them.
    behind = torch.zeros(similarity.shape, dtype=torch.uint8)
    rows_at_once = max(1, _BLOCK_CELLS // max(1, similarity.shape[1]))
    for start in range(0, len(similarity), rows_at_once):
        rows = slice(start, start + rows_at_once)
        values, limits, count = similarity[rows].numpy(), thresholds[rows].numpy(), behind[rows].numpy()
        less = np.empty(values.shape, dtype=np.bool_)
        # Queries of one person mostly follow each other, so that what was filled up is the same in all of them.
        limits = limits[:, (limits > -np.inf).any(axis=0)]
        for limit in limits.T[..., None]:
            np.less(values, limit, out=less)
            count += less.view(np.uint8)
    return behind


def _own(behind: torch.Tensor, matches: torch.Tensor, num_matches: int) -> torch.Tensor:
    """How many of all matches are more similar than each that a gallery holds, in rising order, [Q, P >= 1] int64."""
    if not matches.shape[1]:
        return torch.full((len(behind), 1), num_matches, device=behind.device)
    own = behind.gather(1, matches.clamp(min=0)).long()
    return own.where(matches >= 0, num_matches).sort(dim=1).values


def _answer(
    behind: torch.Tensor,
    own: torch.Tensor,
    num_matches: int,
    search: Search,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First rank, AP and INP in one gallery, each [Q].

    Args:
        behind: How many of its query's matches are more similar than each image; all of them where the image is
            no distractor, [Q, N].
        own: The same of the matches in the gallery, in rising order, all of them where there is none, [Q, P] int64.
        num_matches: How many all of them are.
        search: The gallery.
    """
    valid = own[:, 0] < num_matches
    rank = own.new_zeros(len(own))
    ap, inp = (torch.full(rank.shape, torch.nan, dtype=torch.float64, device=own.device) for _ in range(2))
    if valid.any():
        rank[valid], ap[valid], inp[valid] = _answer_valid(
            _columns(behind, valid, search), own[valid], num_matches, search
        )
    return rank, ap, inp


def _answer_valid(
    behind: torch.Tensor,
    own: torch.Tensor,
    num_matches: int,
    search: Search,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for queries that have a match in the gallery, and from the columns of the gallery alone, [Q, G]."""
    counts = torch.zeros(len(behind), num_matches + 1, dtype=torch.int32, device=behind.device)
    counts.scatter_add_(1, behind.long(), counts.new_ones(1, 1).expand(behind.shape))
    ahead = counts.cumsum(1).gather(1, own)  # distractors at least as similar as each match
    place = torch.arange(1, own.shape[1] + 1, device=own.device)  # j, counting the matches from 1
    rank = place + ahead
    present = own < num_matches
    count = present.sum(dim=1)
    ap = torch.where(present, place / rank.double(), 0).sum(dim=1) / count
    inp = count / rank.gather(1, count[:, None] - 1).squeeze(1).double()
    first = 1 + _identities_ahead(behind, own[:, :1], num_matches, search) if search.per_identity_cmc else rank[:, 0]
    return first, ap, inp


def _columns(behind: torch.Tensor, rows: torch.Tensor, search: Search) -> torch.Tensor:
    """Those of the gallery, for some of the queries, [Q, G]."""
    if not search.is_everything and _on_cpu(behind):
        behind = torch.from_numpy(behind.numpy().take(search.columns, axis=1))
    elif not search.is_everything:
        behind = behind.index_select(1, torch.from_numpy(search.columns).to(behind.device))
    return behind if rows.all() else behind[rows]


def _identities_ahead(behind: torch.Tensor, best: torch.Tensor, num_matches: int, search: Search) -> torch.Tensor:
    """How many other identities have an image at least as similar as the query's own best one, [Q]."""
    if _on_cpu(behind):
        starts = search.first[search.count > 0]
        others = torch.from_numpy(np.minimum.reduceat(behind.numpy(), starts, axis=1))
    else:
        others = behind.new_full((len(behind), len(search.count)), num_matches)
        identities = torch.from_numpy(search.identities).to(behind.device)
        others.scatter_reduce_(1, identities.expand(behind.shape), behind, 'amin')
    return (others <= best.to(others.dtype)).sum(dim=1)


def _on_cpu(values: torch.Tensor) -> bool:
    """Whether to let NumPy do what it is several times as fast at."""
    return values.device.type == 'cpu'


def _tensor(values: FloatMatrix, device: torch.device) -> torch.Tensor:
    """As float32 or wider, which changes no order and no tie, or as bool."""
    if isinstance(values, np.ndarray):
        dtype = values.dtype if values.dtype == np.bool_ else np.dtype(f'f{min(8, values.dtype.itemsize)}')
        values = torch.from_numpy(np.require(values, dtype, ['C', 'W']))
    values = values.detach().to(device).contiguous()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _identity_codes(
    query_identities: np.ndarray | torch.Tensor,
    gallery_identities: np.ndarray | torch.Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """The same identities as integers from 0, which compare faster than names do, [Q] and [G]."""
    # By way of lists, an array of Python objects becomes one of names or numbers.
    query, gallery = (np.asarray(_array(values).tolist()) for values in (query_identities, gallery_identities))
    if query.ndim != 1 or gallery.ndim != 1:
        raise ValueError(
            'identities must be one-dimensional, one per image, got shapes '
            f'{list(query.shape)} for the queries and {list(gallery.shape)} for the gallery'
        )
    if (query.dtype.kind in 'US') != (gallery.dtype.kind in 'US') and len(query) and len(gallery):
        raise ValueError(
            f'query identities are {query.dtype} but gallery identities are {gallery.dtype}, so none could ever match; '
            'give both as names or both as numbers'
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
            f'similarity must be [queries, gallery] = {list(shape)} to fit the identities, got {list(similarity.shape)}'
        )
    floating = similarity.is_floating_point() if isinstance(similarity, torch.Tensor) else similarity.dtype.kind == 'f'
    if not floating:
        raise ValueError(f'similarity must be of a floating-point type, got {similarity.dtype}')
    if ignore is not None and (tuple(ignore.shape) != shape or ignore.dtype not in (np.bool_, torch.bool)):
        raise ValueError(
            f'ignore must be bool of shape {list(shape)} like similarity, got {ignore.dtype} {list(ignore.shape)}'
        )


def check_similarity(similarity: torch.Tensor, first_query: int) -> None:
    """Refuse NaN and infinite similarities, [Q, G], naming the first one."""
    if not similarity.numel() or torch.stack(similarity.aminmax()).isfinite().all():
        return
    row, column = (~similarity.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f'similarity of query {first_query + row} and gallery image {column} is {similarity[row, column]}; every '
        'similarity must be finite (say what a query must not see with `ignore`, not with an infinite value)'
    )
