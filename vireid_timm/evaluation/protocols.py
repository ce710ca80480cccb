"""The protocols of VI-ReID as data: who searches for whom, which images are drawn, and what a query must not see.

SYSU-MM01: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017, drawn as AGW's code does
(arXiv:2001.04193), or from the permutations of its owners. RegDB: Nguyen et al., "Person Recognition System Based on a
Combination of Body Images from Visible Light and Thermal Cameras", Sensors 2017, with the ten splits that its users
share. LLCM: arXiv:2303.14481. Mixed galleries: the rule of Market-1501, Zheng et al., "Scalable Person
Re-identification: A Benchmark", ICCV 2015.
"""

import os
import random
from dataclasses import dataclass

import numpy as np

from ..constants import DRAWS, INFRARED, MODALITIES, UNKNOWN_CAMERA, VISIBLE
from ..data.readers import PERMUTATION_FILE, PERMUTATION_VARIABLE
from ..data.records import Dataset, Records

IGNORE_NOTHING = 'nothing'
IGNORE_SAME_LOCATION = 'same location'
IGNORE_SAME_IDENTITY_AND_CAMERA = 'same identity and camera'
IGNORE_SAME_IDENTITY_MODALITY_AND_CAMERA = 'same identity, modality and camera'

# Cameras 2 (visible) and 3 (infrared) of SYSU-MM01 hang in the same room.
SYSU_LOCATION_OF_CAMERA = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}
SYSU_NUM_CAMERAS = 6
# Where the owners' permutations lie inside the root folder, and what they are called inside that file.


@dataclass(frozen=True)
class Protocol:
    """One way of testing: images of some modalities search among images of the same or other ones.

    Attributes:
        name: As `evaluate` and the command line take it.
        query_modalities: Modalities of the queries.
        gallery_modalities: Modalities of the gallery, which holds images of each of them.
        num_trials: Trials whose mean is reported.
        shots: Images that a trial draws per identity and camera; None where every image takes part.
        drawn: Which side `shots` applies to, `gallery` or `query`; the other side is every image.
        draws: How they can be drawn, some of `DRAWS`; without meaning where nothing is drawn.
        gallery_cameras: The only cameras that the gallery is taken from; None for all of them.
        ignores: Which gallery images a query must not see, one of the IGNORE_ constants.
        per_identity_cmc: Whether the CMC counts distinct identities rather than images.
    """

    name: str
    query_modalities: tuple[str, ...]
    gallery_modalities: tuple[str, ...]
    num_trials: int = 1
    shots: int | None = None
    drawn: str = 'gallery'
    draws: tuple[str, ...] = ('seeded',)
    gallery_cameras: tuple[int, ...] | None = None
    ignores: str = IGNORE_NOTHING
    per_identity_cmc: bool = False

    @property
    def direction(self) -> str:
        """Who searches for whom, in words."""
        sides = (self.query_modalities, self.gallery_modalities)
        return ' to '.join('both' if len(modalities) > 1 else modalities[0] for modalities in sides)


@dataclass(frozen=True, eq=False)
class Trial:
    """One search to be ranked.

    Attributes:
        query: Rows of `dataset.test` that search, [Q] int64.
        gallery: Rows of `dataset.test` that are searched, [G] int64.
        ignore: What each query must not see, neither as match nor as distractor, [Q, G] bool; None for nothing.
    """

    query: np.ndarray
    gallery: np.ndarray
    ignore: np.ndarray | None = None


def _sysu_mm01(name: str, cameras: tuple[int, ...], shots: int) -> Protocol:
    return Protocol(
        name,
        (INFRARED,),
        (VISIBLE,),
        num_trials=10,
        shots=shots,
        draws=DRAWS,
        gallery_cameras=cameras,
        ignores=IGNORE_SAME_LOCATION,
        per_identity_cmc=True,
    )


def _llcm(name: str, query_modality: str, gallery_modality: str, drawn: str = 'gallery') -> Protocol:
    return Protocol(
        name,
        (query_modality,),
        (gallery_modality,),
        num_trials=10,
        shots=1,
        drawn=drawn,
        ignores=IGNORE_SAME_IDENTITY_AND_CAMERA,
        per_identity_cmc=True,
    )


# Every image of one modality searches among every image of the other.
BOTH_DIRECTIONS = (
    Protocol('visible-to-infrared', (VISIBLE,), (INFRARED,)),
    Protocol('infrared-to-visible', (INFRARED,), (VISIBLE,)),
)
# Cameras by day and by night fill one gallery, and a query may come from either: what an installation has in practice.
MIXED = Protocol('mixed', MODALITIES, MODALITIES, ignores=IGNORE_SAME_IDENTITY_MODALITY_AND_CAMERA)
PROTOCOLS = {
    'sysu_mm01': (
        _sysu_mm01('all-single', (1, 2, 4, 5), 1),
        _sysu_mm01('all-multi', (1, 2, 4, 5), 10),
        _sysu_mm01('indoor-single', (1, 2), 1),
        _sysu_mm01('indoor-multi', (1, 2), 10),
    ),
    'llcm': (
        _llcm('visible-to-infrared', VISIBLE, INFRARED),
        _llcm('infrared-to-visible', INFRARED, VISIBLE),
        # The released test script calls this its visible-to-infrared search: the drawn infrared images are the
        # queries, every visible image is the gallery. Its figures do not compare with those of the paper.
        _llcm('visible-to-infrared-swapped', INFRARED, VISIBLE, drawn='query'),
    ),
    **dict.fromkeys(('folder', 'csv', 'synthetic'), (*BOTH_DIRECTIONS, MIXED)),
}


def protocols_of(dataset: Dataset) -> tuple[str, ...]:
    """Names of the protocols that a dataset's test images allow, in the order in which they are reported."""
    return tuple(
        protocol.name
        for protocol in _candidates(dataset)
        if len(_query_rows(dataset.test, protocol))
        and not _missing_modalities(dataset.test, _gallery_rows(dataset.test, protocol), protocol)
    )


def protocol_of(dataset: Dataset, name: str) -> Protocol:
    """What a protocol of a dataset consists of.

    Raises:
        ValueError: On a name that is none of the dataset's protocols.
    """
    protocols = {protocol.name: protocol for protocol in _candidates(dataset)}
    if name not in protocols:
        raise ValueError(f'{dataset.name} has no protocol {name!r}; available: {", ".join(protocols)}')
    return protocols[name]


def protocol_trials(dataset: Dataset, protocol: str, draw: str = 'seeded') -> list[Trial]:
    """The trials of a protocol.

    `draw='seeded'` takes, for trial t, the images that the test code of AGW and its descendants takes (on LLCM: that
    of DEEN), bit for bit: identities in the order of their names, cameras in rising order within each, one uniform
    choice from the sorted images of each, from a generator seeded with t. It is a private one: the caller's `random`
    state stays as it is. That code has no multi-shot; ours draws the ten images without replacement by the same walk.

    `draw='official'` takes the images that the owners' evaluation of SYSU-MM01 takes: row t of the permutation that
    `exp/rand_perm_cam.mat` holds for an identity and a camera, its first one or ten entries, which count the sorted
    images from 1.

    Args:
        dataset: As `create_dataset` returns it.
        protocol: One of `protocols_of(dataset)`.
        draw: How images are drawn, where any are: `seeded` or, for SYSU-MM01, `official`.

    Returns:
        One trial or more, in terms of the rows of `dataset.test`.

    Raises:
        ValueError: On an unknown protocol or draw, when there is no query, no gallery or nothing to be found, or on
            permutations that do not fit the images.
        FileNotFoundError: If the owners' permutations are not there; the message says where they come from.
    """
    keys = ignore_keys(dataset.test, protocol_of(dataset, protocol).ignores)
    return [
        Trial(query, gallery, None if keys is None else keys[query][:, None] == keys[gallery])
        for query, gallery in draw_trials(dataset, protocol, draw)
    ]


def draw_trials(dataset: Dataset, protocol: str, draw: str = 'seeded') -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows of every trial, without the mask of what is ignored, which is large; see `ignore_keys` for that.

    Args:
        dataset: As `create_dataset` returns it.
        protocol: One of `protocols_of(dataset)`.
        draw: See `protocol_trials`.

    Returns:
        Rows of the queries, [Q] int64, and of the gallery, [G] int64, per trial.

    Raises:
        ValueError, FileNotFoundError: As `protocol_trials` does.
    """
    if draw not in DRAWS:
        raise ValueError(f'unknown draw {draw!r}; available: {", ".join(DRAWS)}')
    rule = protocol_of(dataset, protocol)
    query, gallery = _query_rows(dataset.test, rule), _gallery_rows(dataset.test, rule)
    _check_sides(dataset, rule, query, gallery)
    if rule.shots is None:
        return [(query, gallery)] * rule.num_trials
    if draw not in rule.draws:
        of = f'protocol {rule.name} of {dataset.name}'
        raise ValueError(f'{of} has no draw {draw!r}; available: {", ".join(rule.draws)}')
    cells = _cells(dataset.test, query if rule.drawn == 'query' else gallery)
    drawn = _official_draws(dataset, rule, cells) if draw == 'official' else _seeded_draws(rule, cells)
    return [(rows, gallery) if rule.drawn == 'query' else (query, rows) for rows in drawn]


def ignore_keys(records: Records, rule: str) -> np.ndarray | None:
    """What a query must not see, as one key per image: the gallery images whose key is its own.

    Args:
        records: The table, [N].
        rule: One of the IGNORE_ constants.

    Returns:
        The keys, [N] int64; None where nothing is ignored.
    """
    if rule == IGNORE_SAME_LOCATION:
        # Differs from Market-1501's rule: the images of everybody are ignored, not those of the query's person only.
        cameras, places = np.unique(records.camera, return_inverse=True)
        locations = [SYSU_LOCATION_OF_CAMERA.get(camera, camera) for camera in cameras.tolist()]
        return np.asarray(locations, dtype=np.int64)[places]
    if rule == IGNORE_SAME_IDENTITY_AND_CAMERA:
        return _codes(records.identity, records.camera)
    if rule == IGNORE_SAME_IDENTITY_MODALITY_AND_CAMERA:
        keys = _codes(records.identity, records.modality, records.camera)
        # Of a camera that is not known nothing can be said, but that an image is not an answer to itself.
        unknown = np.flatnonzero(records.camera == UNKNOWN_CAMERA)
        keys[unknown] = len(records) + unknown
        return keys
    return None


def _candidates(dataset: Dataset) -> tuple[Protocol, ...]:
    return PROTOCOLS.get(dataset.name, BOTH_DIRECTIONS)  # RegDB's split is the reader's `trial`


def _query_rows(records: Records, protocol: Protocol) -> np.ndarray:
    wanted = np.isin(records.modality, protocol.query_modalities) & np.isin(records.split, ('query', 'test'))
    return np.flatnonzero(wanted)


def _gallery_rows(records: Records, protocol: Protocol) -> np.ndarray:
    wanted = np.isin(records.modality, protocol.gallery_modalities) & np.isin(records.split, ('gallery', 'test'))
    if protocol.gallery_cameras is not None:
        wanted &= np.isin(records.camera, protocol.gallery_cameras)
    return np.flatnonzero(wanted)


def _missing_modalities(records: Records, gallery: np.ndarray, protocol: Protocol) -> list[str]:
    """What the gallery should have and has not."""
    present = set(records.modality[gallery].tolist())
    return [modality for modality in protocol.gallery_modalities if modality not in present]


def _check_sides(dataset: Dataset, protocol: Protocol, query: np.ndarray, gallery: np.ndarray) -> None:
    of = f'protocol {protocol.name} of {dataset.name}' + (f' in {dataset.root}' if dataset.root else '')
    searching, searched = (' or '.join(side) for side in (protocol.query_modalities, protocol.gallery_modalities))
    lacking = '' if len(query) else f'with {searching} images'
    for modality in _missing_modalities(dataset.test, gallery, protocol):
        cameras = '' if protocol.gallery_cameras is None else f' of cameras {protocol.gallery_cameras}'
        lacking = lacking or f'among {modality} images{cameras}'
    if lacking:
        available = ', '.join(protocols_of(dataset)) or 'none'
        raise ValueError(f'{of} searches {lacking}, but there are none; protocols that this data allows: {available}')
    if not _any_match(dataset.test, protocol.ignores, query, gallery):
        raise ValueError(
            f'{of}: none of the {len(query)} {searching} query images shows somebody whom it may see among the '
            f'{len(gallery)} {searched} gallery images (ignored: {protocol.ignores}), so nothing can be found; check '
            'that a person has the same name everywhere'
        )


def _any_match(records: Records, rule: str, query: np.ndarray, gallery: np.ndarray) -> bool:
    """Whether any query has a gallery image of its identity that it may see."""
    identities, keys = _codes(records.identity), ignore_keys(records, rule)
    matches = np.bincount(identities[gallery], minlength=len(records))[identities[query]]
    if keys is not None:
        both = _codes(identities, keys)
        matches -= np.bincount(both[gallery], minlength=len(records))[both[query]]
    return bool(matches.any())


def _codes(*columns: np.ndarray) -> np.ndarray:
    """One number below N per row, [N] int64, the same where the rows agree in every column."""
    codes = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, places = np.unique(column, return_inverse=True)
        _, codes = np.unique(codes * len(values) + places, return_inverse=True)
    return codes.astype(np.int64, copy=False)


def _cells(records: Records, rows: np.ndarray) -> dict[tuple[str, int], list[int]]:
    """The rows by identity and camera, in this order, which is that of the walk; in each, the order of their paths."""
    columns = (records.identity[rows], records.camera[rows], records.path[rows], rows)
    cells: dict[tuple[str, int], list[int]] = {}
    for identity, camera, _, row in sorted(zip(*(column.tolist() for column in columns), strict=True)):
        cells.setdefault((identity, camera), []).append(row)
    return cells


def _seeded_draws(protocol: Protocol, cells: dict[tuple[str, int], list[int]]) -> list[np.ndarray]:
    """`shots` rows of every cell and trial, all where there are fewer, in the order of the walk."""
    draws = []
    for trial in range(protocol.num_trials):
        rng = random.Random(trial)
        if protocol.shots == 1:
            drawn = [rng.choice(cell) for cell in cells.values()]
        else:
            drawn = [row for cell in cells.values() for row in rng.sample(cell, min(protocol.shots, len(cell)))]
        draws.append(np.asarray(drawn, dtype=np.int64))
    return draws


def _official_draws(
    dataset: Dataset,
    protocol: Protocol,
    cells: dict[tuple[str, int], list[int]],
) -> list[np.ndarray]:
    """The first `shots` rows of every cell under the owners' permutation for each trial, in the order of the walk."""
    path = os.path.join(dataset.root, *PERMUTATION_FILE.split('/'))
    cameras = _read_permutations(path)
    draws = []
    # Every identity and camera, not the cells alone: the file also tells that a folder is missing.
    for identity in dataset.test.identities():
        for camera in protocol.gallery_cameras:
            rows = np.asarray(cells.get((identity, camera), []), dtype=np.int64)
            of_camera, number = cameras[camera - 1], int(identity)
            stored = of_camera[number - 1] if 0 < number <= len(of_camera) else np.empty((0, 0))
            where = f'{path}, camera {camera}, identity {identity}'
            draws.append(rows[_checked_orders(stored, len(rows), protocol.num_trials, where)[:, : protocol.shots]])
    return list(np.concatenate(draws, axis=1))


def _checked_orders(stored: np.ndarray, count: int, num_trials: int, where: str) -> np.ndarray:
    """The permutations of one identity and camera, counted from 0, [num_trials, count] int64."""
    if stored.ndim != 2 or stored.dtype.kind not in 'uif':
        raise ValueError(f'{where}: expected a matrix of whole numbers, a row per trial')
    stored_count = stored.shape[1] if stored.size else 0
    if stored_count != count:
        raise ValueError(
            f'{where}: the file permutes {stored_count} images, but the folder holds {count}; complete the images '
            'as their owners distribute them, or take the file that belongs to them'
        )
    if count and len(stored) < num_trials:
        raise ValueError(f'{where}: expected a row for each of {num_trials} trials, got {len(stored)}')
    orders = stored[:num_trials].reshape(num_trials, -1) if count else np.empty((num_trials, 0))
    wrong = (np.sort(orders, axis=1) != np.arange(1, count + 1)).any(axis=1)
    if wrong.any():
        raise ValueError(f'{where}: row {int(wrong.argmax()) + 1} is not a permutation of 1 to {count}')
    return orders.astype(np.int64) - 1


def _read_permutations(path: str) -> list[list[np.ndarray]]:
    """Camera number - 1 -> identity number - 1 -> what the owners' file holds for them, not checked yet."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"there is no {path}, which draw 'official' (--draw official) needs; it comes with the evaluation code of "
            f"SYSU-MM01's owners (folder data_split), not with the images: put it into {os.path.dirname(path)}; "
            '`vireid synth` writes one for its own images if SciPy is installed'
        )
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(
            f"{path} is a MATLAB file; to read it for draw 'official' (--draw official), install the extra `official` "
            "(pip install 'vireid_timm[official]')"
        ) from None
    try:
        cells = loadmat(path, variable_names=[PERMUTATION_VARIABLE]).get(PERMUTATION_VARIABLE)
    except Exception as error:  # loadmat raises nearly anything on a damaged file
        raise ValueError(f'{path} cannot be read as a MATLAB file of version 5 ({error}); fetch it again') from error
    if not _is_cell(cells) or cells.size != SYSU_NUM_CAMERAS or not all(_is_cell(inner) for inner in cells.flat):
        raise ValueError(
            f'{path}: expected the variable {PERMUTATION_VARIABLE}, a cell array of {SYSU_NUM_CAMERAS} cameras with a '
            'cell array of identities each; fetch it again'
        )
    return [list(inner.flat) for inner in cells.flat]


def _is_cell(value: object) -> bool:
    """Whether a value that SciPy read is a cell array of MATLAB's."""
    return isinstance(value, np.ndarray) and value.dtype == object
