"""Record tables: which image shows which identity, from which camera, and in which modality."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..constants import MODALITIES, SPLITS
from .findings import Finding


@dataclass(frozen=True, eq=False)
class Records:
    """A table of images. Row i of every column describes image i.

    Attributes:
        path: File path or `synthvi:` address, as `read_image` takes it, [N] str.
        identity: The dataset's own name of the person, [N] str.
        camera: Camera number, 0 if unknown, [N] int64.
        modality: `visible` or `infrared`, [N] str.
        split: `train`, `query`, `gallery`, or `test` (both query and gallery), [N] str.
        tracklet: Number of the tracklet that the image is part of, [N] int64; None if the images are single ones. The
            images of a tracklet agree in identity, camera, modality and split. To train, they are ordinary images; in
            a trial their mean feature is one query or one gallery entry.
    """

    path: np.ndarray
    identity: np.ndarray
    camera: np.ndarray
    modality: np.ndarray
    split: np.ndarray
    tracklet: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ('path', 'identity', 'modality', 'split'):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.str_))
        object.__setattr__(self, 'camera', np.asarray(self.camera, dtype=np.int64))
        lengths = {name: len(getattr(self, name)) for name in ('path', 'identity', 'camera', 'modality', 'split')}
        if self.tracklet is not None:
            object.__setattr__(self, 'tracklet', np.asarray(self.tracklet, dtype=np.int64))
            lengths['tracklet'] = len(self.tracklet)
        if len(set(lengths.values())) > 1:
            raise ValueError(f'every column of a record table needs one value per image, got lengths {lengths}')
        for name, allowed in (('modality', MODALITIES), ('split', SPLITS)):
            unknown = sorted(set(getattr(self, name).tolist()) - set(allowed))
            if unknown:
                raise ValueError(f'unknown {name} {unknown[0]!r}; expected one of {", ".join(allowed)}')

    @classmethod
    def from_rows(
        cls, rows: Sequence[tuple[str, str, int, str, str] | tuple[str, str, int, str, str, int]]
    ) -> 'Records':
        """Build a table from rows of (path, identity, camera, modality, split), or with the tracklet as sixth value."""
        columns = zip(*rows, strict=True) if rows else ([], [], [], [], [])
        return cls(*(list(column) for column in columns))

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows: np.ndarray | slice | Sequence[int]) -> 'Records':
        """Return the table of some rows: a slice, integer rows or a boolean mask [N]."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            rows = rows if rows.dtype == bool else rows.astype(np.int64)
        columns = (self.path, self.identity, self.camera, self.modality, self.split)
        tracklet = None if self.tracklet is None else self.tracklet[rows]
        return Records(*(column[rows] for column in columns), tracklet)

    def identities(self) -> list[str]:
        """Return every identity's name once, sorted."""
        return sorted(set(self.identity.tolist()))

    def first_rows(self) -> np.ndarray:
        """Return the row of the first image of each image's tracklet, [N] int64; a single image is its own first."""
        if self.tracklet is None:
            return np.arange(len(self))
        _, first, index = np.unique(self.tracklet, return_index=True, return_inverse=True)
        return first[index]

    def num_tracklets(self) -> int:
        """Return how many tracklets there are, 0 if the images are single ones."""
        return 0 if self.tracklet is None else len(np.unique(self.tracklet))


def class_map_of(records: Records) -> dict[str, int]:
    """Map identity names, in sorted order, to class labels 0..C-1."""
    return {name: label for label, name in enumerate(records.identities())}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset's record tables.

    Attributes:
        name: The reader's name, e.g. `sysu_mm01`.
        root: Folder of the images; empty if they are rendered in memory.
        train: Records to train on.
        test: Every image that any protocol may need, once.
        options: The reader's resolved options (RegDB's trial, SynthVI's seed, ...), for reports.
        findings: What the reader found odd or ignored, and warned about.
    """

    name: str
    root: str
    train: Records
    test: Records
    options: dict[str, object] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
