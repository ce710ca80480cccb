"""The one table that everything downstream sees: which image shows whom, where, and in which spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..constants import INFRARED, MODALITIES, SPLITS, VISIBLE


def other_modality(modality: str) -> str:
    """The modality that is searched from, or with, `modality`."""
    return INFRARED if modality == VISIBLE else VISIBLE


@dataclass(frozen=True, eq=False)
class Records:
    """A table of images; row i of every column belongs to image i.

    Attributes:
        path: What `read_image` opens: a file path or a `synthvi:` address, [N] str.
        identity: The data's own name of the person, [N] str.
        camera: Camera number, 0 where it is not known, [N] int64.
        modality: `visible` or `infrared`, [N] str.
        split: `train`, `query`, `gallery`, or `test` (query and gallery both), [N] str.
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
        """Build a table from (path, identity, camera, modality, split) rows; no rows give an empty table."""
        columns = zip(*rows, strict=True) if rows else ([], [], [], [], [])
        return cls(*(list(column) for column in columns))

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows: np.ndarray | slice | Sequence[int]) -> 'Records':
        """The table of the given rows: a slice, integer rows or a boolean mask [N]."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            rows = rows if rows.dtype == bool else rows.astype(np.int64)
        return Records(self.path[rows], self.identity[rows], self.camera[rows], self.modality[rows], self.split[rows])

    def identities(self) -> list[str]:
        """Every identity's name once, sorted."""
        return sorted(set(self.identity.tolist()))

    def labels(self, class_map: dict[str, int]) -> np.ndarray:
        """Class label of every image under `class_map` (see `class_map_of`), [N] int64."""
        return np.asarray([class_map[name] for name in self.identity.tolist()], dtype=np.int64)


def class_map_of(records: Records) -> dict[str, int]:
    """Identity name -> class label 0..C-1 in sorted order of the names, so that no run depends on a hash order."""
    return {name: label for label, name in enumerate(records.identities())}


@dataclass(frozen=True, eq=False)
class Dataset:
    """What `create_dataset` returns.

    Attributes:
        name: The reader's name, e.g. `sysu_mm01`.
        root: Where the images lie; empty for images that are rendered in memory.
        train: Records to learn from.
        test: Every image that any protocol may need, once.
        options: The reader's options as resolved (RegDB's trial, SynthVI's seed, ...), for reports.
    """

    name: str
    root: str
    train: Records
    test: Records
    options: dict[str, object] = field(default_factory=dict)
