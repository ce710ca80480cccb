"""Batches of P identities × (K visible + K infrared images), as in the paper (section 4.2) and AGW."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..constants import INFRARED, MODALITIES, VISIBLE

_logger = logging.getLogger(__name__)

_DEFAULT_IDENTITIES_PER_BATCH = 8


class IdentityModalitySampler(Sampler[list[int]]):
    """Batch sampler over identities and modalities (paper, section 4.2: 8 identities × (4 visible + 4 infrared)).

    A batch is a list of 2·P·K row numbers: P·K visible images, then P·K infrared ones, K per identity, the
    identities in the same order in both halves. The identities of a batch are distinct. The images of one identity
    and modality are dealt like a deck of cards that is shuffled anew when it is used up, so that over an epoch no
    image comes up twice more often than another of its deck, and a batch holds the same image twice only where
    the deck has fewer than K.

    Batches depend on (seed, epoch) alone: `set_epoch(epoch, start_batch)` continues a run at any batch. An identity
    that is present in only one modality cannot be sampled; it is skipped and named in `skipped`.

    Of several processes that train together each has its own `rank` among `world_size`. All of them draw the same
    batch of world_size·P distinct identities, and each keeps its own P: joined in the order of the ranks, their batches
    are those of a single process with that many identities per batch.

    Attributes:
        identities_per_batch: P as resolved, of this process.
        batches_per_epoch: Length of a whole epoch, wherever iteration starts; the same in every process.
        skipped: Names of the identities with only one modality, sorted.
    """

    # Differs from AGW: images are dealt without replacement. AGW draws each with replacement, by which half of all
    # draws of 4 out of RegDB's 10 images hold a duplicate and an epoch leaves out more images than it must.
    # Differs from AGW: len() is the number of batches that iteration yields. AGW yields one more than its len().

    def __init__(
        self,
        identities: Sequence[int] | Sequence[str] | np.ndarray,
        modalities: Sequence[str] | np.ndarray,
        *,
        identities_per_batch: int | None = _DEFAULT_IDENTITIES_PER_BATCH,
        images_per_modality: int = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Group the rows and settle P; nothing is drawn yet.

        Args:
            identities: Label or name of every image, [N].
            modalities: `visible` or `infrared` for every image, [N].
            identities_per_batch: P; None takes 8, or as many as there are for every process if fewer.
            images_per_modality: K.
            seed: Together with the epoch it decides every draw.
            rank: Number of this process, from 0.
            world_size: How many processes train together.

        Raises:
            ValueError: Columns of unequal length, an unknown modality, P or K below 1, a rank outside the world, or
                fewer than world_size·P identities.
        """
        super().__init__()
        identities, modalities = np.asarray(identities), np.asarray(modalities)
        if identities.shape != modalities.shape or identities.ndim != 1:
            raise ValueError(
                f'one identity and one modality per image expected, got {identities.shape} and {modalities.shape}'
            )
        unknown = sorted(set(modalities.tolist()) - set(MODALITIES))
        if unknown:
            raise ValueError(f'unknown modality {unknown[0]!r}; expected one of {", ".join(MODALITIES)}')
        if images_per_modality < 1 or (identities_per_batch is not None and identities_per_batch < 1):
            raise ValueError(
                'at least one identity per batch and one image per modality expected, '
                f'got {identities_per_batch} and {images_per_modality}'
            )
        if not 0 <= rank < world_size:
            raise ValueError(f'a rank in 0..world_size - 1 expected, got {rank} of {world_size}')
        self.images_per_modality = images_per_modality
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
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
        needed = (wanted or 1) * self.world_size
        if available < needed:
            joined = f' ({wanted or 1} in each of {self.world_size} processes)' if self.world_size > 1 else ''
            raise ValueError(
                f'a batch needs {needed} identities with images of both modalities{joined}, but there are '
                f'{available}; ask for fewer identities per batch or add data'
            )
        if wanted is None:
            wanted = min(_DEFAULT_IDENTITIES_PER_BATCH, available // self.world_size)
            _logger.info('%d identities per batch (%d available)', wanted, available)
        return wanted

    def _epoch_length(self) -> int:
        """Batches per epoch as AGW counts them: as many as the larger modality fills, and one more."""
        sizes = [sum(len(rows[name]) for name in self._identities) for rows in self._rows.values()]
        return max(sizes) // (self.world_size * self.identities_per_batch * self.images_per_modality) + 1

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
        own = self.identities_per_batch * self.images_per_modality
        for batch in range(self.batches_per_epoch):
            chosen = random.choice(len(self._identities), self.world_size * self.identities_per_batch, replace=False)
            names = [self._identities[position] for position in chosen]
            # Dealt for other processes and for skipped batches too: what they took decides what is left.
            halves = [
                [row for name in names for row in decks[modality][name].deal(self.images_per_modality, random)]
                for modality in (VISIBLE, INFRARED)
            ]
            if batch >= self.start_batch:
                yield [row for half in halves for row in half[self.rank * own :][:own]]


def _rows_of(identities: np.ndarray, selected: np.ndarray) -> dict[int | str, list[int]]:
    """Identity -> its rows among the selected ones, ascending."""
    rows: dict[int | str, list[int]] = {}
    for row in np.flatnonzero(selected).tolist():
        rows.setdefault(identities[row].item(), []).append(row)
    return rows


class _Deck:
    """Images of one identity and modality in random order, reshuffled when used up."""

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
