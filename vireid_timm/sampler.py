"""Batches of P identities × (K visible + K infrared pictures), as in the paper (section 4.2) and AGW."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .records import INFRARED, MODALITIES, VISIBLE

_logger = logging.getLogger(__name__)

_DEFAULT_IDENTITIES_PER_BATCH = 8


class IdentityModalitySampler(Sampler[list[int]]):
    """Batch sampler over identities and modalities (paper, section 4.2: 8 identities × (4 visible + 4 infrared)).

    A batch is a list of 2·P·K row numbers: P·K visible pictures, then P·K infrared ones, K per identity, the
    identities in the same order in both halves. The identities of a batch are distinct. The pictures of one identity
    and modality are dealt like a deck of cards that is shuffled anew when it is used up, so that over an epoch no
    picture comes up twice more often than another of its deck, and a batch holds the same picture twice only where
    the deck has fewer than K.

    Batches depend on (seed, epoch) alone: `set_epoch(epoch, start_batch)` continues a run at any batch. An identity
    that is present in only one modality cannot be sampled; it is skipped and named in `skipped`.

    Attributes:
        identities_per_batch: P as resolved.
        batches_per_epoch: Length of a whole epoch, wherever iteration starts.
        skipped: Names of the identities with only one modality, sorted.
    """

    # Differs from AGW: pictures are dealt without replacement. AGW draws each with replacement, by which half of all
    # draws of 4 out of RegDB's 10 pictures hold a duplicate and an epoch leaves out more pictures than it must.
    # Differs from AGW: len() is the number of batches that iteration yields. AGW yields one more than its len().

    def __init__(
        self,
        identities: Sequence[int] | Sequence[str] | np.ndarray,
        modalities: Sequence[str] | np.ndarray,
        *,
        identities_per_batch: int | None = _DEFAULT_IDENTITIES_PER_BATCH,
        pictures_per_modality: int = 4,
        seed: int = 0,
    ) -> None:
        """Group the rows and settle P; nothing is drawn yet.

        Args:
            identities: Label or name of every picture, [N].
            modalities: `visible` or `infrared` for every picture, [N].
            identities_per_batch: P; None takes 8, or all there are if fewer.
            pictures_per_modality: K.
            seed: Together with the epoch it decides every draw.

        Raises:
            ValueError: Columns of unequal length, an unknown modality, P or K below 1, or fewer than P identities.
        """
        super().__init__()
        identities, modalities = np.asarray(identities), np.asarray(modalities)
        if identities.shape != modalities.shape or identities.ndim != 1:
            raise ValueError(
                f'one identity and one modality per picture expected, got {identities.shape} and {modalities.shape}'
            )
        unknown = sorted(set(modalities.tolist()) - set(MODALITIES))
        if unknown:
            raise ValueError(f'unknown modality {unknown[0]!r}; expected one of {", ".join(MODALITIES)}')
        if pictures_per_modality < 1 or (identities_per_batch is not None and identities_per_batch < 1):
            raise ValueError(
                'at least one identity per batch and one picture per modality expected, '
                f'got {identities_per_batch} and {pictures_per_modality}'
            )
        self.pictures_per_modality = pictures_per_modality
        self.seed = seed
        self._rows = {modality: _rows_of(identities, modalities == modality) for modality in MODALITIES}
        both = self._rows[VISIBLE].keys() & self._rows[INFRARED].keys()
        either = self._rows[VISIBLE].keys() | self._rows[INFRARED].keys()
        self._identities = sorted(both)
        self.skipped = sorted(str(name) for name in either - both)
        self.identities_per_batch = self._resolve_identities_per_batch(identities_per_batch)
        self.batches_per_epoch = self._epoch_length()
        self.set_epoch(0)

    def _resolve_identities_per_batch(self, wanted: int | None) -> int:
        """P, with everything said aloud that the caller did not ask for."""
        available = len(self._identities)
        if self.skipped:
            _logger.warning(
                '%d of %d identities are present in only one modality and skipped for batches: %s%s',
                len(self.skipped),
                len(self.skipped) + available,
                ', '.join(self.skipped[:10]),
                ', ...' if len(self.skipped) > 10 else '',
            )
        if available == 0 or (wanted is not None and wanted > available):
            raise ValueError(
                f'a batch needs {wanted or 1} identities with pictures of both modalities, but there are {available}; '
                'ask for fewer identities per batch or add data'
            )
        if wanted is None:
            wanted = min(_DEFAULT_IDENTITIES_PER_BATCH, available)
            _logger.info('%d identities per batch (%d available)', wanted, available)
        return wanted

    def _epoch_length(self) -> int:
        """Batches per epoch as AGW counts them: as many as the larger modality fills, and one more."""
        sizes = [sum(len(rows[name]) for name in self._identities) for rows in self._rows.values()]
        return max(sizes) // (self.identities_per_batch * self.pictures_per_modality) + 1

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: From 0.
            start_batch: Batches of this epoch that are already done; iteration yields the same ones that follow.

        Raises:
            ValueError: A negative epoch, or a start outside the epoch.
        """
        if epoch < 0 or not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(
                f'an epoch from 0 and a start in 0..{self.batches_per_epoch} expected, got {epoch} and {start_batch}'
            )
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches that iteration yields: `batches_per_epoch` less those before `start_batch`."""
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        decks = {
            modality: {name: _Deck(rows) for name, rows in self._rows[modality].items()} for modality in MODALITIES
        }
        for batch in range(self.batches_per_epoch):
            chosen = random.choice(len(self._identities), self.identities_per_batch, replace=False)
            names = [self._identities[position] for position in chosen]
            # Dealt for the skipped batches too: what they took decides what is left.
            rows = [
                row
                for modality in (VISIBLE, INFRARED)
                for name in names
                for row in decks[modality][name].deal(self.pictures_per_modality, random)
            ]
            if batch >= self.start_batch:
                yield rows


def _rows_of(identities: np.ndarray, selected: np.ndarray) -> dict[int | str, list[int]]:
    """Identity -> its rows among the selected ones, ascending."""
    rows: dict[int | str, list[int]] = {}
    for row in np.flatnonzero(selected).tolist():
        rows.setdefault(identities[row].item(), []).append(row)
    return rows


class _Deck:
    """Pictures of one identity and modality in random order, reshuffled when used up."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self.left: list[int] = []

    def deal(self, count: int, random: np.random.Generator) -> list[int]:
        dealt: list[int] = []
        while len(dealt) < count:
            if not self.left:
                fresh = random.permutation(self.rows).tolist()
                # Those already in hand go to the bottom (the front: cards are taken from the end).
                self.left = [row for row in fresh if row in dealt] + [row for row in fresh if row not in dealt]
            dealt.append(self.left.pop())
        return dealt
