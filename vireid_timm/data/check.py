"""Checks of images and of what their table says about them: files that occur twice."""

import hashlib
from collections.abc import Sequence

from ..constants import UNKNOWN_CAMERA
from .findings import Findings
from .records import Records

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
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def equal_rows(paths: Sequence[str], digests: Sequence[bytes | None]) -> list[list[int]]:
    """Return the rows of files that have equal bytes, one list of at least two rows for each content.

    Args:
        paths: Path of every image, [N]. Only the first row of a path counts.
        digests: Hash of every file, None if there is none, [N].
    """
    rows_of: dict[bytes, dict[str, int]] = {}
    for row, (path, digest) in enumerate(zip(paths, digests, strict=True)):
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
