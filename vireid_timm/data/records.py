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
    """

    path: np.ndarray
    identity: np.ndarray
    camera: np.ndarray
    modality: np.ndarray
    split: np.ndarray

    def __post_init__(self) -> None:
        for name in ('path', 'identity', 'modality', 'split'):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.str_))
        object.__setattr__(self, 'camera', np.asarray(self.camera, dtype=np.int64))
        lengths = {name: len(getattr(self, name)) for name in ('path', 'identity', 'camera', 'modality', 'split')}
        if len(set(lengths.values())) > 1:
            raise ValueError(f'every column of a record table needs one value per image, got lengths {lengths}')
        for name, allowed in (('modality', MODALITIES), ('split', SPLITS)):
            unknown = sorted(set(getattr(self, name).tolist()) - set(allowed))
            if unknown:
                raise ValueError(f'unknown {name} {unknown[0]!r}; expected one of {", ".join(allowed)}')

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[str, str, int, str, str]]) -> 'Records':
        """Build a table from rows of (path, identity, camera, modality, split)."""
        columns = zip(*rows, strict=True) if rows else ([], [], [], [], [])
        return cls(*(list(column) for column in columns))

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows: np.ndarray | slice | Sequence[int]) -> 'Records':
        """Return the table of some rows: a slice, integer rows or a boolean mask [N]."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            rows = rows if rows.dtype == bool else rows.astype(np.int64)
        return Records(self.path[rows], self.identity[rows], self.camera[rows], self.modality[rows], self.split[rows])

    def identities(self) -> list[str]:
        """Return every identity's name once, sorted."""
        return sorted(set(self.identity.tolist()))


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
