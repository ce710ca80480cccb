"""Yes or no instead of ranks: verification of pairs, and open-set identification.

An answer is accepted if its similarity exceeds a threshold. FAR and TAR are the shares of accepted pairs of different
people and of the same person (ISO/IEC 19795-1). FPIR and FNIR follow NIST's evaluation of one-to-many search (Grother
et al., NISTIR 8271, section 3): FPIR is the share of searches for people who are not in the gallery that return anybody
above the threshold; FNIR is the share of searches for people who are in it that miss them, because their best image is
not above the threshold or not at rank 1. Every query searches once with the gallery, and once without the images of its
own person (leave-identity-out), so nobody has to be set aside.

A threshold is the lowest that keeps the rate of false acceptance, and ties count against the model. Only the most
similar pairs of different people decide about it, so only these are kept, for all galleries that share the
similarities.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .metrics import Ranker

FARS = {'tar_at_far_1e-2': 1e-2, 'tar_at_far_1e-3': 1e-3}
FPIRS = {'fnir_at_fpir_1e-2': 1e-2, 'fnir_at_fpir_1e-1': 1e-1}
DECISIONS = (*FARS, *FPIRS)
# Beyond this number of pairs only evenly spaced queries are used; their most similar pairs then take some 50 MB.
MOST_PAIRS = 2**26
FEW_PAIRS = 2**18  # of fewer pairs, all are kept
SHARES = (0.03, 0.25, 1.0)  # of the pairs to keep; the next if the thresholds of some gallery need more
SAMPLED_QUERIES = 32  # that the floor is estimated from


@dataclass(frozen=True, eq=False)
class PairList:
    """Some pairs of query and gallery image.

    Attributes:
        query: Index of each pair's query, [M] int64.
        column: Column of its gallery image, [M] int64.
        similarity: [M].
    """

    query: torch.Tensor
    column: torch.Tensor
    similarity: torch.Tensor

    def where(self, kept: torch.Tensor) -> 'PairList':
        """Return the pairs that a mask keeps, [M] bool."""
        kept = kept.nonzero()[:, 0]
        return PairList(self.query[kept], self.column[kept], self.similarity[kept])

    def highest(self, num_queries: int) -> torch.Tensor:
        """Return each query's highest similarity, -inf without a pair, [Q]."""
        none = self.similarity.new_full((num_queries,), -math.inf)
        return none.scatter_reduce(0, self.query, self.similarity, 'amax')

    @classmethod
    def joined(cls, parts: Sequence['PairList']) -> 'PairList':
        """Join lists."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ('query', 'column', 'similarity')))


class PairFinder:
    """Finds the pairs that matter in a similarity matrix, a chunk of queries at a time.

    These are all matches, and the most similar pairs of different people: at least as similar as a floor.
    """

    def __init__(
        self,
        ranker: Ranker,
        query_identities: np.ndarray,
        keys: tuple[torch.Tensor, torch.Tensor] | None,
        device: torch.device,
    ) -> None:
        """Describe the matrix.

        Args:
            ranker: Of its columns.
            query_identities: Identity of every query, as an integer like those of the columns, [Q] int64.
            keys: Of the queries, [Q] int64, and the columns, [N] int64: a query ignores the columns that have its own
                key. None if nothing is ignored.
            device: Where the similarities are.
        """
        self._ranker, self._query_identities, self._keys = ranker, query_identities, keys
        self._identities = [torch.from_numpy(codes).to(device) for codes in (query_identities, ranker.identities)]
        num_pairs = len(query_identities) * len(ranker.identities)
        self._few = num_pairs <= FEW_PAIRS
        self.step = max(1, -(-num_pairs // MOST_PAIRS))

    def floor(self, similarity: Callable[[np.ndarray], torch.Tensor], share: float) -> float:
        """Return a similarity that about this share of the pairs exceeds; -inf if all pairs are to be listed.

        Args:
            similarity: Returns the similarities [q, N] of some queries, given their indices [q].
            share: The share.
        """
        if share >= 1 or self._few:
            return -math.inf
        rows = np.unique(np.linspace(0, len(self._query_identities) - 1, SAMPLED_QUERIES).astype(np.int64))
        values = similarity(rows).flatten()
        return values.kthvalue(max(1, round((1 - share) * len(values)))).values.item()

    def find(self, similarity: torch.Tensor, first: int, floor: float) -> tuple[PairList, PairList]:
        """List the matches, and the other pairs down to the floor, in a chunk of queries from the first on, [q, N]."""
        skipped = -first % self.step
        similarity, first = similarity[skipped :: self.step], first + skipped
        rows = slice(first, first + self.step * len(similarity), self.step)
        own = self._ranker.whole.matches(self._query_identities[rows]).to(similarity.device)
        row, place = (own >= 0).nonzero(as_tuple=True)
        matches = self._listed(similarity, first, row, own[row, place])
        cells, width = (similarity >= floor).flatten().nonzero()[:, 0], similarity.shape[1]
        near = self._listed(similarity, first, cells // width, cells % width)
        return matches, near.where(self._identities[0][near.query] != self._identities[1][near.column])

    def _listed(self, similarity: torch.Tensor, first: int, row: torch.Tensor, column: torch.Tensor) -> PairList:
        pairs = PairList(first + self.step * row, column, similarity[row, column])
        if self._keys is None:
            return pairs
        return pairs.where(self._keys[0][pairs.query] != self._keys[1][pairs.column])

    def decide(
        self,
        matches: PairList,
        others: PairList,
        query: np.ndarray,
        columns: np.ndarray,
    ) -> dict[str, float | None] | None:
        """Return the metrics of one trial as fractions.

        Args:
            matches: All matches.
            others: The other pairs down to the floor.
            query: Indices of the trial's queries.
            columns: Columns of its gallery.

        Returns:
            The value of each of `DECISIONS`, None where there is no such pair or search; None altogether if a threshold
            is below the floor.
        """
        query = query[query % self.step == 0]
        masks = [
            torch.zeros(len(codes), dtype=torch.bool, device=codes.device).index_fill_(
                0, torch.from_numpy(chosen).to(codes.device), True
            )
            for codes, chosen in zip(self._identities, (query, columns), strict=True)
        ]
        matches, others = (pairs.where(masks[0][pairs.query] & masks[1][pairs.column]) for pairs in (matches, others))
        return _decisions(matches, others, self._count_others(query, columns), len(masks[0]))

    def _count_others(self, query: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Count the gallery images of other people that each query does not ignore, [q] int64."""
        codes = [(self._query_identities[query], self._ranker.identities[columns])]
        if self._keys is not None:
            keys = [side.cpu().numpy() for side in self._keys]
            codes.append((keys[0][query], keys[1][columns]))
        excluded = sum(_occurrences(*sides) for sides in codes)
        if len(codes) > 1:  # what is both counts once
            excluded = excluded - _occurrences(*(np.stack(sides, axis=1) for sides in zip(*codes)))
        return len(columns) - excluded


def _occurrences(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Count how often the code of each query, [Q] or [Q, C] integers, occurs in the gallery, [Q]."""
    _, codes = np.unique(np.concatenate([query, gallery]), axis=0, return_inverse=True)
    codes = codes.reshape(-1)
    return np.bincount(codes[len(query) :], minlength=codes.max() + 1)[codes[: len(query)]]


def _decisions(
    matches: PairList,
    others: PairList,
    num_others: np.ndarray,
    num_queries: int,
) -> dict[str, float | None] | None:
    best, nearest = (pairs.highest(num_queries) for pairs in (matches, others))
    mated = best > -math.inf
    best, rivals = best[mated], nearest[mated]
    values = {
        **dict.fromkeys(FARS, (others.similarity, int(num_others.sum()))),
        **dict.fromkeys(FPIRS, (nearest[nearest > -math.inf], int((num_others > 0).sum()))),
    }
    found: dict[str, float | None] = dict.fromkeys(DECISIONS)
    for name, rate in (FARS | FPIRS).items():
        of_others, total = values[name]
        if not total or not len(best):
            continue
        threshold = exceeded_by(of_others, rate, total)
        if threshold is None:
            return None
        if name in FARS:
            found[name] = (matches.similarity > threshold).double().mean().item()
        else:
            found[name] = 1 - ((best > threshold) & (best > rivals)).double().mean().item()
    return found


def exceeded_by(values: torch.Tensor, rate: float, total: int) -> float | None:
    """Return the lowest threshold that at most this share of some values exceeds; None if it is below those given.

    Args:
        values: The highest of the values, all above those that are not given, [M].
        rate: The share, less than 1.
        total: Number of values, with those that are not given; at least 1.
    """
    count = math.floor(rate * total + 1e-9)  # 0.29 * 100 is a little less than 29
    return values.kthvalue(len(values) - count).values.item() if count < len(values) else None
