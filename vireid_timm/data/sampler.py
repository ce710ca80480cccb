"""Sample batches of P identities × (K visible + K infrared images), as the paper (section 4.2) and AGW do."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..constants import INFRARED, MODALITIES, VISIBLE
from ..text import format_list

_logger = logging.getLogger(__name__)

_DEFAULT_IDENTITIES_PER_BATCH = 8


class IdentityModalitySampler(Sampler[list[int]]):
    """Batch sampler over identities and modalities (paper, section 4.2: 8 identities × (4 visible + 4 infrared)).

    A batch is a list of 2·P·K rows: P·K visible images, then P·K infrared ones, K per identity, with the identities in
    the same order in both halves. The identities of a batch are distinct. The images of one identity and modality form
    a deck of cards, which is dealt and reshuffled when it is used up. Over an epoch, no image is dealt twice more often
    than another one of its deck, and a batch repeats an image only if its deck has fewer than K.

    Batches depend only on (seed, epoch): `set_epoch(epoch, start_batch)` resumes a run at any batch. An identity with
    images of only one modality cannot be sampled; it is skipped and listed in `skipped`.

    With several ranks, all of them draw the same batch of world_size·P distinct identities, and each rank keeps its own
    P. Joined in the order of the ranks, their batches are those of a single process with world_size·P identities per
    batch.

    Attributes:
        identities_per_batch: P of this rank; resolved if it was None.
        batches_per_epoch: Length of a whole epoch, wherever iteration starts; the same on every rank.
        skipped: Names of the identities with only one modality, sorted.
    """

    # Differs from AGW: images are dealt without replacement. AGW draws with replacement, so that half of all draws of 4
    # out of RegDB's 10 images have a duplicate, and an epoch misses more images than necessary.
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
        """Group the rows by identity and modality, and resolve P.

        Args:
            identities: Label or name of every image, [N].
            modalities: `visible` or `infrared` for every image, [N].
            identities_per_batch: P; None for 8, or for as many as every rank can have if that is less.
            images_per_modality: K.
            seed: Decides every draw, together with the epoch.
            rank: Rank of this process.
            world_size: Number of ranks.

        Raises:
            ValueError: On columns of different lengths, an unknown modality, P or K below 1, a rank out of range, or
                fewer than world_size·P identities.
        """
        super().__init__()
        identities, modalities = np.asarray(identities), np.asarray(modalities)
        if identities.shape != modalities.shape or identities.ndim != 1:
            raise ValueError(
                f'expected one identity and one modality per image, got {identities.shape} and {modalities.shape}'
            )
        unknown = sorted(set(modalities.tolist()) - set(MODALITIES))
        if unknown:
            raise ValueError(f'unknown modality {unknown[0]!r}; expected one of {", ".join(MODALITIES)}')
        if images_per_modality < 1 or (identities_per_batch is not None and identities_per_batch < 1):
            raise ValueError(
                'expected at least one identity per batch and one image per modality, '
                f'got {identities_per_batch} and {images_per_modality}'
            )
        if not 0 <= rank < world_size:
            raise ValueError(f'expected a rank in 0..world_size - 1, got {rank} of {world_size}')
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
        """Return P, and log what the caller may not expect."""
        available = len(self._identities)
        if self.skipped:
            _logger.warning(
                f'{len(self.skipped)} of {len(self.skipped) + available} identities are present in only one modality '
                f'and skipped for batches: {format_list(self.skipped)}'
            )
        needed = (wanted or 1) * self.world_size
        if available < needed:
            each = f' ({wanted or 1} on each of {self.world_size} ranks)' if self.world_size > 1 else ''
            raise ValueError(
                f'a batch needs {needed} identities with images of both modalities{each}, but there are {available}; '
                'use fewer identities per batch or add data'
            )
        if wanted is None:
            wanted = min(_DEFAULT_IDENTITIES_PER_BATCH, available // self.world_size)
            _logger.info(f'{wanted} identities per batch ({available} available)')
        return wanted

    def _epoch_length(self) -> int:
        """Return the batches per epoch as AGW counts them: as many as the larger modality fills, plus one."""
        sizes = [sum(len(rows[name]) for name in self._identities) for rows in self._rows.values()]
        return max(sizes) // (self.world_size * self.identities_per_batch * self.images_per_modality) + 1

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: Epoch, from 0.
            start_batch: Number of batches of this epoch to leave out; the rest are the same as without it.

        Raises:
            ValueError: On a negative epoch or a start outside the epoch.
        """
        if epoch < 0 or not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(
                f'expected an epoch from 0 and a start in 0..{self.batches_per_epoch}, got {epoch} and {start_batch}'
            )
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Return the number of batches that iteration yields, from `start_batch` on."""
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
            # Also dealt for other ranks and for batches before start_batch: their cards decide which ones are left.
            halves = [
                [row for name in names for row in decks[modality][name].deal(self.images_per_modality, random)]
                for modality in (VISIBLE, INFRARED)
            ]
            if batch >= self.start_batch:
                yield [row for half in halves for row in half[self.rank * own :][:own]]


def _rows_of(identities: np.ndarray, selected: np.ndarray) -> dict[int | str, list[int]]:
    """Map every identity to its selected rows, ascending."""
    rows: dict[int | str, list[int]] = {}
    for row in np.flatnonzero(selected).tolist():
        rows.setdefault(identities[row].item(), []).append(row)
    return rows


class _Deck:
    """The images of one identity and modality in random order, reshuffled when used up."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self.left: list[int] = []

    def deal(self, count: int, random: np.random.Generator) -> list[int]:
        dealt: list[int] = []
        while len(dealt) < count:
            if not self.left:
                fresh = random.permutation(self.rows).tolist()
                # Cards already in hand go to the bottom (the front of the list: cards are taken from its end).
                self.left = [row for row in fresh if row in dealt] + [row for row in fresh if row not in dealt]
            dealt.append(self.left.pop())
        return dealt
