"""Yes or no instead of ranks: verification of pairs, and open-set identification.

An answer is accepted if its similarity exceeds a threshold. FAR and TAR are the shares of accepted pairs of different
people and of the same person (ISO/IEC 19795-1 calls them FMR and 1 - FNMR). FPIR and FNIR follow NIST's evaluation of
one-to-many search (Grother et al., NISTIR 8271): FPIR is the share of searches for people who are not in the gallery
that return anybody above the threshold; FNIR is the share of searches for people who are in it that miss them, because
their best image is not above the threshold or not at rank 1. Every query searches once with the gallery, and once
without the images of its own person (leave-identity-out), so nobody has to be set aside.

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
SHARES = (0.02, 0.2, 1.0)  # of the pairs to keep; the next if the thresholds of some gallery need more
SAMPLED_QUERIES = 32  # that the floor is estimated from


# Index of the query, [M] int64, column of the gallery image, [M] int64, and similarity, [M].
Listed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class PairTable:
    """Some pairs of query and gallery image, those of one gallery image after those of the other.

    Attributes:
        query: Index of each pair's query, [M] int64.
        similarity: [M].
        offsets: Index of the first pair of each column, and at the end M, [N + 1] int64.
    """

    query: torch.Tensor
    similarity: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[Listed], num_columns: int) -> 'PairTable':
        """Make a table of lists."""
        query, column, similarity = (torch.cat(values) for values in zip(*parts, strict=True))
        column, order = column.sort()
        offsets = torch.searchsorted(column, torch.arange(num_columns + 1, device=column.device))
        return cls(query[order], similarity[order], offsets)

    def among(self, columns: torch.Tensor, queries: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return query and similarity of the pairs of some columns, [G] int64, and some queries, [Q] bool or None."""
        start, count = self.offsets[columns], self.offsets[columns + 1] - self.offsets[columns]
        pairs = torch.repeat_interleave(start - count.cumsum(0) + count, count)
        pairs += torch.arange(len(pairs), device=pairs.device)
        query, similarity = self.query[pairs], self.similarity[pairs]
        if queries is None:
            return query, similarity
        kept = queries[query]
        return query[kept], similarity[kept]


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
        self._ranker, self._query_identities, self._keys, self._device = ranker, query_identities, keys, device
        self._identities = [torch.from_numpy(codes).to(device) for codes in (query_identities, ranker.identities)]
        self._codes = self._exclusion_codes()
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

    def find(self, similarity: torch.Tensor, first: int, floor: float) -> tuple[Listed, Listed]:
        """List the matches, and the other pairs down to the floor, in a chunk of queries from the first on, [q, N]."""
        skipped = -first % self.step
        similarity, first = similarity[skipped :: self.step], first + skipped
        rows = slice(first, first + self.step * len(similarity), self.step)
        own = self._ranker.whole.matches(self._query_identities[rows]).to(self._device)
        row, place = (own >= 0).nonzero(as_tuple=True)
        matches = self._listed(similarity, first, row, own[row, place], True)
        cells, width = (similarity >= floor).flatten().nonzero()[:, 0], similarity.shape[1]
        return matches, self._listed(similarity, first, cells // width, cells % width, False)

    def _listed(
        self,
        similarity: torch.Tensor,
        first: int,
        row: torch.Tensor,
        column: torch.Tensor,
        is_match: bool,
    ) -> Listed:
        query = first + self.step * row
        kept = (self._identities[0][query] == self._identities[1][column]) == is_match
        if self._keys is not None:
            kept &= self._keys[0][query] != self._keys[1][column]
        row, column = row[kept], column[kept]
        return query[kept], column, similarity[row, column]

    def decide(
        self,
        found: Sequence[tuple[Listed, Listed]],
        trials: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> list[dict[str, float | None] | None]:
        """Return the metrics of trials as fractions.

        Args:
            found: What `find` returned for every chunk.
            trials: Indices of each trial's queries, and the columns of its gallery.

        Returns:
            For each trial the value of each of `DECISIONS`, None where there is no such pair or search; None altogether
            if a threshold is below the floor.
        """
        num_queries, num_columns = map(len, self._identities)
        tables = [PairTable.of(parts, num_columns) for parts in zip(*found, strict=True)]
        results = []
        for query, columns in trials:
            query = query[query % self.step == 0]
            chosen = None
            if len(query) < -(-num_queries // self.step):
                chosen = torch.zeros(num_queries, dtype=torch.bool, device=self._device)
                chosen[torch.from_numpy(query).to(self._device)] = True
            gallery = torch.from_numpy(columns).to(self._device)
            matches, others = (table.among(gallery, chosen) for table in tables)
            results.append(_decisions(matches, others, self._count_others(query, columns), num_queries))
        return results

    def _exclusion_codes(self) -> list[tuple[np.ndarray, int]]:
        """Return codes of queries and then columns, and a sign: a query excludes as many images as have its code."""
        identities = np.concatenate([self._query_identities, self._ranker.identities])
        if self._keys is None:
            return [(identities, 1)]
        _, keys = np.unique(np.concatenate([side.cpu().numpy() for side in self._keys]), return_inverse=True)
        _, both = np.unique(keys * (identities.max() + 1) + identities, return_inverse=True)
        return [(identities, 1), (keys, 1), (both, -1)]  # what is excluded twice counts once

    def _count_others(self, query: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Count the gallery images of other people that each query does not ignore, [q] int64."""
        count = np.full(len(query), len(columns))
        for codes, sign in self._codes:
            of_columns = codes[len(self._query_identities) :][columns]
            count -= sign * np.bincount(of_columns, minlength=codes.max() + 1)[codes[query]]
        return count


def _decisions(
    matches: tuple[torch.Tensor, torch.Tensor],
    others: tuple[torch.Tensor, torch.Tensor],
    num_others: np.ndarray,
    num_queries: int,
) -> dict[str, float | None] | None:
    """Return the metrics of one trial, given query and similarity of its pairs."""
    best, nearest = (_highest(*pairs, num_queries) for pairs in (matches, others))
    mated = best > -math.inf
    best, rivals = best[mated], nearest[mated]
    values = {
        **dict.fromkeys(FARS, (others[1], int(num_others.sum()))),
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
            found[name] = (matches[1] > threshold).double().mean().item()
        else:
            found[name] = 1 - ((best > threshold) & (best > rivals)).double().mean().item()
    return found


def _highest(query: torch.Tensor, similarity: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Return each query's highest similarity, -inf without a pair, [Q]."""
    none = similarity.new_full((num_queries,), -math.inf)
    return none.scatter_reduce(0, query, similarity, 'amax')


def exceeded_by(values: torch.Tensor, rate: float, total: int) -> float | None:
    """Return the lowest threshold that at most this share of some values exceeds; None if it is below those given.

    Args:
        values: The highest of the values, all above those that are not given, [M].
        rate: The share, less than 1.
        total: Number of values, with those that are not given; at least 1.
    """
    count = math.floor(rate * total + 1e-9)  # 0.29 * 100 is a little less than 29
    return values.kthvalue(len(values) - count).values.item() if count < len(values) else None
