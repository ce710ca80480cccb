"""Checks of images and of what their table says about them: `vireid data`, and files that occur twice."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from ..constants import MODALITIES, SPLITS, UNKNOWN_CAMERA
from ..text import aligned
from .findings import Finding, Findings
from .images import ADDRESS_PREFIX, ImageError, read_image
from .records import Dataset, Records
from .workers import in_order, map_chunks

_DARK_MEAN, _FLAT_DEVIATION = 8, 2  # of 255; an image below either shows nobody
_REDUCED = 64  # the shorter side on which brightness and contrast are measured
_ZEROS = re.compile(r'(?<!\d)0+(?=\d)|\s+')  # leading zeros of a number, and spaces
_COLUMNS = ('path', 'identity', 'camera', 'modality', 'split')
DIGEST_SIZE = 16  # bytes

# In order of severity: kind, what is said about it.
_COPY_KINDS = {
    'modality-copy': 'images are both visible and infrared, which inflates the result',
    'identity-copy': 'images show several identities',
    'train-test-copy': 'images are both in the training and the test set, which inflates the result',
    'query-gallery-copy': 'images are both a query and in the gallery, which inflates the result',
    'copy': 'images are copies of another of the same identity and modality',
}


def file_digest(path: str) -> bytes:
    """Return a hash of a file's bytes."""
    with open(path, 'rb') as file:
        return hashlib.blake2b(file.read(), digest_size=DIGEST_SIZE).digest()


def equal_rows(paths: Sequence[str], digests: Sequence[bytes | None]) -> list[list[int]]:
    """Return the rows of files that have equal bytes, one list of at least two rows for each content.

    Args:
        paths: Path of every image, [N]. Only the first row of a path counts.
        digests: Hash of every file, None if there is none, [N]; none at all if nothing was read.
    """
    rows_of: dict[bytes, dict[str, int]] = {}
    for row, (path, digest) in enumerate(zip(paths, digests)):
        if digest is not None:
            rows_of.setdefault(digest, {}).setdefault(path, row)
    return [list(rows.values()) for rows in rows_of.values() if len(rows) > 1]


def add_copies(findings: Findings, records: Records, copies: Sequence[Sequence[int]]) -> None:
    """Add which files have equal bytes, each content once, as its most severe kind.

    Args:
        findings: Where to add.
        records: The table.
        copies: Rows of equal files, as `equal_rows` returns them.
    """
    found: dict[str, list[str]] = {kind: [] for kind in _COPY_KINDS}
    for rows in copies:
        found[_copy_kind(records, rows)].append(' = '.join(records.path[list(rows[:2])].tolist()))
    for kind, what in _COPY_KINDS.items():
        findings.add(kind, what, found[kind], is_serious=kind != 'copy')


def add_shared(
    findings: Findings, train: Records, digests: Sequence[bytes | None], test: Records, workers: int | None
) -> None:
    """Add which test images have the bytes of a training image.

    Args:
        findings: Where to add.
        train: The training images.
        digests: Hash of each of their files.
        test: The test images, whose files are read here.
        workers: Files read at once, as for `in_order`.
    """
    path_of = {digest: path for path, digest in zip(train.path.tolist(), digests) if digest is not None}
    paths = [path for path in test.path.tolist() if not path.startswith(ADDRESS_PREFIX)]
    found = zip(paths, in_order(_digest_or_none, paths, workers=workers))
    shared = [f'{path_of[digest]} = {path}' for path, digest in found if digest in path_of]
    findings.add('train-test-copy', _COPY_KINDS['train-test-copy'], shared, is_serious=True)


def _digest_or_none(path: str) -> bytes | None:
    try:
        return file_digest(path)
    except OSError:  # reported by what needs the image
        return None


def _copy_kind(records: Records, rows: Sequence[int]) -> str:
    identities, modalities, splits, cameras = (
        set(column[list(rows)].tolist())
        for column in (records.identity, records.modality, records.split, records.camera)
    )
    if len(modalities) > 1:
        return 'modality-copy'
    if len(identities) > 1:
        return 'identity-copy'
    if 'train' in splits and len(splits) > 1:
        return 'train-test-copy'
    # Protocols ignore a gallery image of the query's camera, so in a held-out share such a copy does no harm.
    one_camera = len(cameras) == 1 and UNKNOWN_CAMERA not in cameras
    harmless = splits == {'test'} and one_camera or len(splits) == 1 and 'test' not in splits
    return 'copy' if harmless else 'query-gallery-copy'


@dataclass(frozen=True)
class DataSummary:
    """What a dataset holds, and what is odd about it.

    Attributes:
        dataset: The reader's name.
        root: The folder or file.
        people: Split -> number of identities.
        images: Split -> modality -> number of images.
        tracklets: Split -> modality -> number of tracklets; empty if the images are single ones.
        cameras: Modality -> camera number, 0 if unknown -> number of images.
        sizes: Modality -> smallest, median and largest height and width of its images, [3][2].
        findings: What is odd: the reader's findings, then those about the images.
    """

    dataset: str
    root: str
    people: dict[str, int]
    images: dict[str, dict[str, int]]
    tracklets: dict[str, dict[str, int]]
    cameras: dict[str, dict[int, int]]
    sizes: dict[str, list[list[int]]]
    findings: list[Finding]

    def __str__(self) -> str:
        rows = [['', 'people', *MODALITIES]]
        rows += [
            [split, f'{self.people[split]:,}', *(f'{count:,}' for count in counts.values())]
            for split, counts in self.images.items()
        ]
        if self.tracklets:
            rows[0] += [f'{modality} tracklets' for modality in MODALITIES]
            for row in rows[1:]:
                row += [f'{count:,}' for count in self.tracklets[row[0]].values()]
        lines = [f'{self.dataset} {self.root}', '', *aligned(rows), '']
        for modality in self.sizes:
            cameras = ', '.join(f'{camera or "unknown"}: {count:,}' for camera, count in self.cameras[modality].items())
            smallest, median, largest = (f'{height}x{width}' for height, width in self.sizes[modality])
            lines.append(
                f'{modality}: height and width {smallest} to {largest}, median {median}; images by camera {cameras}'
            )
        lines += ['', 'Nothing odd.' if not self.findings else 'Odd (! makes results meaningless):']
        return '\n'.join(
            [*lines, *(f'{"!" if finding.is_serious else "-"} {finding.message}' for finding in self.findings)]
        )

    def to_json(self) -> str:
        """Return all of it as JSON, in ASCII."""
        return json.dumps(asdict(self), indent=1)


def check_dataset(dataset: Dataset, *, workers: int | None = None, progress: bool = True) -> DataSummary:
    """Read every image of a dataset, and find what is odd about the images and their labels.

    Args:
        dataset: A dataset of files, from `create_dataset`.
        workers: Images decoded at once; None for one per core, at most 8; 0 to decode in the calling thread.
        progress: Show a progress bar, if the output is a terminal.
    """
    records = Records(
        *(np.concatenate([getattr(dataset.train, name), getattr(dataset.test, name)]) for name in _COLUMNS)
    )
    seen: list[_Seen] = []
    map_chunks(
        _inspect_chunk,
        records.path.tolist(),
        lambda start, found: seen.extend(found),
        rendered=0,
        workers=workers,
        label='checking images',
        progress=progress,
    )
    findings = Findings(dataset.findings)
    _add_labels(findings, dataset)
    _add_images(findings, records, seen)
    add_copies(findings, records, equal_rows(records.path.tolist(), [image.digest for image in seen]))
    splits = [split for split in SPLITS if (records.split == split).any()]
    sizes, cameras = {}, {}
    for modality in MODALITIES:
        rows = np.flatnonzero(records.modality == modality).tolist()
        intact = np.array([seen[row].size for row in rows if not seen[row].problem])
        if len(intact):
            sizes[modality] = [f(intact, axis=0).astype(int).tolist() for f in (np.min, np.median, np.max)]
        cameras[modality] = dict(sorted(Counter(records.camera[rows].tolist()).items()))
    return DataSummary(
        dataset.name,
        dataset.root,
        {split: len(records[records.split == split].identities()) for split in splits},
        {
            split: {name: int(((records.split == split) & (records.modality == name)).sum()) for name in MODALITIES}
            for split in splits
        },
        _tracklets(dataset),
        cameras,
        sizes,
        findings,
    )


def _tracklets(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Return split -> modality -> number of tracklets, empty if the images are single ones."""
    return {
        split: {
            modality: table[(table.split == split) & (table.modality == modality)].num_tracklets()
            for modality in MODALITIES
        }
        for table in (dataset.train, dataset.test)
        if table.tracklet is not None
        for split in SPLITS
        if (table.split == split).any()
    }


class _Seen(NamedTuple):
    """What one image looks like: height and width, brightness and contrast in 0..255."""

    size: tuple[int, int]
    mean: float
    deviation: float
    digest: bytes | None
    problem: str


def _inspect_chunk(paths: list[str]) -> list[_Seen]:
    seen = []
    for path in paths:
        try:
            image = read_image(path)
            pixels = np.asarray(image.reduce(max(1, min(image.size) // _REDUCED)))
            seen.append(_Seen(image.size[::-1], float(pixels.mean()), float(pixels.std()), file_digest(path), ''))
        except ImageError as error:
            seen.append(_Seen((0, 0), 0.0, 0.0, None, error.args[0]))
    return seen


def _add_images(findings: Findings, records: Records, seen: Sequence[_Seen]) -> None:
    findings.add(
        'broken-image', 'images cannot be read', [image.problem for image in seen if image.problem], is_serious=True
    )
    for modality in MODALITIES:
        rows = [row for row in np.flatnonzero(records.modality == modality).tolist() if not seen[row].problem]
        flat = [row for row in rows if seen[row].mean < _DARK_MEAN or seen[row].deviation < _FLAT_DEVIATION]
        lying = [row for row in rows if seen[row].size[1] > seen[row].size[0]]
        for kind, what, odd in (
            ('dark-image', f'{modality} images are nearly black or of one tone', flat),
            ('lying-image', f'{modality} images are wider than high, but people should stand upright', lying),
        ):
            findings.add(kind, what, records.path[odd].tolist(), is_serious=2 * len(odd) > len(rows))


def _add_labels(findings: Findings, dataset: Dataset) -> None:
    for table, name in ((dataset.train, 'training'), (dataset.test, 'test')):
        visible, infrared = (set(table.identity[table.modality == modality].tolist()) for modality in MODALITIES)
        findings.add(
            'one-modality',
            f'{name} identities have images of one modality only',
            sorted(visible ^ infrared),
            is_serious=not visible & infrared,
        )
    alike: dict[str, set[str]] = {}
    for name in dataset.train.identities() + dataset.test.identities():
        alike.setdefault(_ZEROS.sub('', name.casefold().strip()), set()).add(name)
    names = [' = '.join(sorted(group)) for group in alike.values() if len(group) > 1]
    findings.add(
        'similar-identity', 'groups of identities differ only in zeros, case or spaces, and may be one person', names
    )
