"""The protocols of VI-ReID as data: modalities of query and gallery, sampling of images, and what a query ignores.

SYSU-MM01: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017, sampled as in AGW's code
(arXiv:2001.04193) or by the permutations of its owners. RegDB: Nguyen et al., "Person Recognition System Based on a
Combination of Body Images from Visible Light and Thermal Cameras", Sensors 2017, with its ten published splits.
LLCM: arXiv:2303.14481. HITSZ-VCM: Lin et al., "Learning Modal-Invariant and Temporal-Memory for Video-based
Visible-Infrared Person Re-Identification", CVPR 2022. BUPTCampus: arXiv:2311.15571. Mixed galleries: the rule of
Market-1501, Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
"""

import os
import random
from dataclasses import dataclass, replace

import numpy as np

from ..constants import DRAWS, INFRARED, MODALITIES, UNKNOWN_CAMERA, VISIBLE
from ..data.readers import PERMUTATION_FILE, PERMUTATION_VARIABLE
from ..data.records import Dataset, Records

IGNORE_NOTHING = 'nothing'
IGNORE_SAME_LOCATION = 'same location'
IGNORE_SAME_IDENTITY_AND_CAMERA = 'same identity and camera'
IGNORE_SAME_IDENTITY_MODALITY_AND_CAMERA = 'same identity, modality and camera'

# Cameras 2 (visible) and 3 (infrared) of SYSU-MM01 are in the same room.
SYSU_LOCATION_OF_CAMERA = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}
SYSU_NUM_CAMERAS = 6


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol: queries of some modalities search a gallery of the same or other modalities.

    Attributes:
        name: Name for `evaluate` and the command line.
        query_modalities: Modalities of the queries.
        gallery_modalities: Modalities of the gallery, which must hold images of each.
        num_trials: Number of trials to average.
        shots: Images that a trial samples per identity and camera; None to use every image.
        drawn: The sampled side, `gallery` or `query`; the other side is every image.
        draws: Supported ways to sample, some of `DRAWS`; unused if nothing is sampled.
        gallery_cameras: Cameras of the gallery; None for all.
        ignores: Gallery images that a query must not see, one of the IGNORE_ constants.
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
        """Who searches for whom, e.g. `infrared to visible`."""
        sides = (self.query_modalities, self.gallery_modalities)
        return ' to '.join('both' if len(modalities) > 1 else modalities[0] for modalities in sides)

    @property
    def crosses(self) -> bool:
        """Whether query and gallery are always of different modalities."""
        return not set(self.query_modalities) & set(self.gallery_modalities)


@dataclass(frozen=True, eq=False)
class Trial:
    """Queries and the gallery that they search. The row of a tracklet's first image stands for the tracklet.

    Attributes:
        query: Rows of the queries in `dataset.test`, [Q] int64.
        gallery: Rows of the gallery in `dataset.test`, [G] int64.
        ignore: Gallery images that each query must not see, neither as match nor as distractor, [Q, G] bool; None if
            there are none.
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


# Every image of one modality searches all images of the other.
BOTH_DIRECTIONS = (
    Protocol('visible-to-infrared', (VISIBLE,), (INFRARED,)),
    Protocol('infrared-to-visible', (INFRARED,), (VISIBLE,)),
)
# As in practice: day and night cameras fill one gallery, and a query may come from either.
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
        # What the released test script calls visible-to-infrared: the sampled infrared images are the queries, and
        # every visible image is in the gallery. Its figures cannot be compared with those of the paper.
        _llcm('visible-to-infrared-swapped', INFRARED, VISIBLE, drawn='query'),
    ),
    'hitsz_vcm': tuple(replace(protocol, ignores=IGNORE_SAME_IDENTITY_AND_CAMERA) for protocol in BOTH_DIRECTIONS),
    # Query and gallery are lists of their own, and the owners ignore nothing.
    'buptcampus': (*BOTH_DIRECTIONS, replace(MIXED, ignores=IGNORE_NOTHING)),
    **dict.fromkeys(('folder', 'csv', 'synthetic'), (*BOTH_DIRECTIONS, MIXED)),
}


def protocols_of(dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the protocols that a dataset's test images support, in the order of reports."""
    return tuple(
        protocol.name
        for protocol in _candidates(dataset)
        if len(_query_rows(dataset.test, protocol))
        and not _missing_modalities(dataset.test, _gallery_rows(dataset.test, protocol), protocol)
    )


def protocol_of(dataset: Dataset, name: str) -> Protocol:
    """Return a protocol of a dataset by its name.

    Raises:
        ValueError: The dataset has no such protocol.
    """
    protocols = {protocol.name: protocol for protocol in _candidates(dataset)}
    if name not in protocols:
        raise ValueError(f'{dataset.name} has no protocol {name!r}; available: {", ".join(protocols)}')
    return protocols[name]


def protocol_trials(dataset: Dataset, protocol: str, draw: str = 'seeded') -> list[Trial]:
    """Return the trials of a protocol.

    `draw='seeded'` samples for trial t exactly the images that the test code of AGW and its descendants samples (for
    LLCM: the code of DEEN). It walks through the identities by name and their cameras in ascending order, and takes one
    uniform choice from the sorted images of each, from a private generator seeded with t. That code has no multi-shot;
    ours samples the ten images without replacement in the same walk.

    `draw='official'` takes the images of the owners' evaluation of SYSU-MM01: for each identity and camera,
    `exp/rand_perm_cam.mat` holds permutations of the sorted images, counted from 1. Trial t takes the first one or ten
    entries of row t.

    Args:
        dataset: A dataset from `create_dataset`.
        protocol: One of `protocols_of(dataset)`.
        draw: How images are sampled, if any are: `seeded` or, for SYSU-MM01, `official`.

    Returns:
        One or more trials, as rows of `dataset.test`.

    Raises:
        ValueError: The protocol or the draw is unknown, there is no query, no gallery or no match, or the permutations
            do not fit the images.
        FileNotFoundError: The owners' permutations are missing; the message says where to get them.
    """
    keys = ignore_keys(dataset.test, protocol_of(dataset, protocol).ignores)
    return [
        Trial(query, gallery, None if keys is None else keys[query][:, None] == keys[gallery])
        for query, gallery in draw_trials(dataset, protocol, draw)
    ]


def draw_trials(dataset: Dataset, protocol: str, draw: str = 'seeded') -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows of every trial without the mask of ignored images, which is large; see `ignore_keys`.

    Args:
        dataset: A dataset from `create_dataset`.
        protocol: One of `protocols_of(dataset)`.
        draw: See `protocol_trials`.

    Returns:
        For each trial the rows of the queries, [Q] int64, and of the gallery, [G] int64.

    Raises:
        ValueError, FileNotFoundError: See `protocol_trials`.
    """
    if draw not in DRAWS:
        raise ValueError(f'unknown draw {draw!r}; available: {", ".join(DRAWS)}')
    rule = protocol_of(dataset, protocol)
    query, gallery = _query_rows(dataset.test, rule), _gallery_rows(dataset.test, rule)
    _check_sides(dataset, rule, query, gallery)
    if rule.shots is None:
        return [(query, gallery)] * rule.num_trials
    if draw not in rule.draws:
        raise ValueError(
            f'protocol {rule.name} of {dataset.name} has no draw {draw!r}; available: {", ".join(rule.draws)}'
        )
    cells = _cells(dataset.test, query if rule.drawn == 'query' else gallery)
    drawn = _official_draws(dataset, rule, cells) if draw == 'official' else _seeded_draws(rule, cells)
    return [(rows, gallery) if rule.drawn == 'query' else (query, rows) for rows in drawn]


def ignore_keys(records: Records, rule: str) -> np.ndarray | None:
    """Return one key per image: a query ignores the gallery images that have its own key.

    Args:
        records: The table, [N].
        rule: One of the IGNORE_ constants.

    Returns:
        The keys, [N] int64; None if nothing is ignored.
    """
    if rule == IGNORE_SAME_LOCATION:
        # Differs from Market-1501's rule: images of all identities are ignored, not only of the query's.
        cameras, index = np.unique(records.camera, return_inverse=True)
        locations = [SYSU_LOCATION_OF_CAMERA.get(camera, camera) for camera in cameras.tolist()]
        return np.asarray(locations, dtype=np.int64)[index]
    if rule == IGNORE_SAME_IDENTITY_AND_CAMERA:
        return _codes(records.identity, records.camera)
    if rule == IGNORE_SAME_IDENTITY_MODALITY_AND_CAMERA:
        keys = _codes(records.identity, records.modality, records.camera)
        # Images of unknown cameras cannot be compared; such an image ignores only itself.
        unknown = np.flatnonzero(records.camera == UNKNOWN_CAMERA)
        keys[unknown] = len(records) + unknown
        return keys
    return None


def _candidates(dataset: Dataset) -> tuple[Protocol, ...]:
    return PROTOCOLS.get(dataset.name, BOTH_DIRECTIONS)  # RegDB's splits are an option of its reader, `trial`


def _query_rows(records: Records, protocol: Protocol) -> np.ndarray:
    wanted = np.isin(records.modality, protocol.query_modalities) & np.isin(records.split, ('query', 'test'))
    return _first_rows(records, wanted)


def _gallery_rows(records: Records, protocol: Protocol) -> np.ndarray:
    wanted = np.isin(records.modality, protocol.gallery_modalities) & np.isin(records.split, ('gallery', 'test'))
    if protocol.gallery_cameras is not None:
        wanted &= np.isin(records.camera, protocol.gallery_cameras)
    return _first_rows(records, wanted)


def _first_rows(records: Records, wanted: np.ndarray) -> np.ndarray:
    """Return the wanted rows, of a tracklet only the first."""
    return np.flatnonzero(wanted & (records.first_rows() == np.arange(len(records))))


def _missing_modalities(records: Records, gallery: np.ndarray, protocol: Protocol) -> list[str]:
    """Return the modalities that the gallery should have but does not."""
    present = set(records.modality[gallery].tolist())
    return [modality for modality in protocol.gallery_modalities if modality not in present]


def _check_sides(dataset: Dataset, protocol: Protocol, query: np.ndarray, gallery: np.ndarray) -> None:
    title = f'protocol {protocol.name} of {dataset.name}' + (f' in {dataset.root}' if dataset.root else '')
    queries, searched = (' or '.join(side) for side in (protocol.query_modalities, protocol.gallery_modalities))
    lacking = '' if len(query) else f'{queries} query images'
    for modality in _missing_modalities(dataset.test, gallery, protocol):
        cameras = '' if protocol.gallery_cameras is None else f' of cameras {protocol.gallery_cameras}'
        lacking = lacking or f'{modality} gallery images{cameras}'
    if lacking:
        available = ', '.join(protocols_of(dataset)) or 'none'
        raise ValueError(f'{title} needs {lacking}, but there are none; protocols that this data allows: {available}')
    if not _any_match(dataset.test, protocol.ignores, query, gallery):
        raise ValueError(
            f'{title}: none of the {len(query)} {queries} query images has a match among the {len(gallery)} {searched} '
            f'gallery images (ignored: {protocol.ignores}); check that a person has the same name everywhere'
        )


def _any_match(records: Records, rule: str, query: np.ndarray, gallery: np.ndarray) -> bool:
    """Return whether any query has a gallery image of its identity that it does not ignore."""
    identities, keys = _codes(records.identity), ignore_keys(records, rule)
    matches = np.bincount(identities[gallery], minlength=len(records))[identities[query]]
    if keys is not None:
        both = _codes(identities, keys)
        matches -= np.bincount(both[gallery], minlength=len(records))[both[query]]
    return bool(matches.any())


def _codes(*columns: np.ndarray) -> np.ndarray:
    """Return one number below N per row, [N] int64, equal if the rows agree in every column."""
    codes = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, index = np.unique(column, return_inverse=True)
        _, codes = np.unique(codes * len(values) + index, return_inverse=True)
    return codes.astype(np.int64, copy=False)


def _cells(records: Records, rows: np.ndarray) -> dict[tuple[str, int], list[int]]:
    """Group the rows by identity and camera, in the order of the walk; the rows of a cell are sorted by path."""
    columns = (records.identity[rows], records.camera[rows], records.path[rows], rows)
    cells: dict[tuple[str, int], list[int]] = {}
    for identity, camera, _, row in sorted(zip(*(column.tolist() for column in columns), strict=True)):
        cells.setdefault((identity, camera), []).append(row)
    return cells


def _seeded_draws(protocol: Protocol, cells: dict[tuple[str, int], list[int]]) -> list[np.ndarray]:
    """Sample `shots` rows of every cell for each trial, or all rows if there are fewer, in the order of the walk."""
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
    """Take the first `shots` rows of every cell under the owners' permutation for each trial, in walk order."""
    path = os.path.join(dataset.root, *PERMUTATION_FILE.split('/'))
    cameras = _read_permutations(path)
    draws = []
    # All pairs of identity and camera, not only the cells: the file also shows whether a folder is missing.
    for identity in dataset.test.identities():
        for camera in protocol.gallery_cameras:
            rows = np.asarray(cells.get((identity, camera), []), dtype=np.int64)
            of_camera, number = cameras[camera - 1], int(identity)
            stored = of_camera[number - 1] if 0 < number <= len(of_camera) else np.empty((0, 0))
            where = f'{path}, camera {camera}, identity {identity}'
            draws.append(rows[_checked_orders(stored, len(rows), protocol.num_trials, where)[:, : protocol.shots]])
    return list(np.concatenate(draws, axis=1))


def _checked_orders(stored: np.ndarray, count: int, num_trials: int, where: str) -> np.ndarray:
    """Return the permutations of one identity and camera, counted from 0, [num_trials, count] int64."""
    if stored.ndim != 2 or stored.dtype.kind not in 'uif':
        raise ValueError(f'{where}: expected a matrix of whole numbers, a row per trial')
    stored_count = stored.shape[1] if stored.size else 0
    if stored_count != count:
        raise ValueError(
            f'{where}: the file permutes {stored_count} images, but the folder holds {count}; complete the images as '
            'the owners distribute them, or use the file that belongs to them'
        )
    if count and len(stored) < num_trials:
        raise ValueError(f'{where}: expected a row for each of {num_trials} trials, got {len(stored)}')
    orders = stored[:num_trials].reshape(num_trials, -1) if count else np.empty((num_trials, 0))
    wrong = (np.sort(orders, axis=1) != np.arange(1, count + 1)).any(axis=1)
    if wrong.any():
        raise ValueError(f'{where}: row {int(wrong.argmax()) + 1} is not a permutation of 1 to {count}')
    return orders.astype(np.int64) - 1


def _read_permutations(path: str) -> list[list[np.ndarray]]:
    """Read the owners' file without checking its entries; index by camera number - 1, then identity number - 1."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"draw 'official' (--draw official) needs {path}, which does not exist; it comes with the evaluation code "
            f"of SYSU-MM01's owners (folder data_split), not with the images: put it into {os.path.dirname(path)}; "
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
    except Exception as error:  # loadmat can raise nearly anything on a damaged file
        raise ValueError(f'{path} is not a readable MATLAB file of version 5 ({error}); download it again') from error
    if not _is_cell(cells) or cells.size != SYSU_NUM_CAMERAS or not all(_is_cell(inner) for inner in cells.flat):
        raise ValueError(
            f'{path}: expected the variable {PERMUTATION_VARIABLE}, a cell array of {SYSU_NUM_CAMERAS} cameras with a '
            'cell array of identities each; download it again'
        )
    return [list(inner.flat) for inner in cells.flat]


def _is_cell(value: object) -> bool:
    """Return whether a value read by SciPy is a MATLAB cell array."""
    return isinstance(value, np.ndarray) and value.dtype == object
