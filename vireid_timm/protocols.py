"""The protocols of VI-ReID as data: who searches for whom, which pictures are drawn, and what a query must not see.

SYSU-MM01: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017, drawn as AGW's code does
(arXiv:2001.04193). RegDB: Nguyen et al., "Person Recognition System Based on a Combination of Body Images from Visible
Light and Thermal Cameras", Sensors 2017, with the ten splits that its users share. LLCM: arXiv:2303.14481.
"""

import random
from dataclasses import dataclass

import numpy as np

from .records import INFRARED, VISIBLE, Dataset, Records, other_modality

DRAWS = ('seeded',)
IGNORE_NOTHING = 'nothing'
IGNORE_SAME_LOCATION = 'same location'
IGNORE_SAME_IDENTITY_AND_CAMERA = 'same identity and camera'

# Cameras 2 (visible) and 3 (infrared) of SYSU-MM01 hang in the same room.
SYSU_LOCATION_OF_CAMERA = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}


@dataclass(frozen=True)
class Protocol:
    """One way of testing: pictures of `query_modality` search among pictures of the other modality.

    Attributes:
        name: As `evaluate` and the command line take it.
        query_modality: Modality of the queries.
        num_trials: Trials whose mean is reported.
        shots: Pictures that a trial draws per identity and camera; None where every picture takes part.
        drawn: Which side `shots` applies to, `gallery` or `query`; the other side is every picture.
        gallery_cameras: The only cameras that the gallery is taken from; None for all of them.
        ignores: Which gallery pictures a query must not see, one of the IGNORE_ constants.
        per_identity_cmc: Whether the CMC counts distinct identities rather than pictures.
    """

    name: str
    query_modality: str
    num_trials: int = 1
    shots: int | None = None
    drawn: str = 'gallery'
    gallery_cameras: tuple[int, ...] | None = None
    ignores: str = IGNORE_NOTHING
    per_identity_cmc: bool = False

    @property
    def direction(self) -> str:
        """Who searches for whom, in words."""
        return f'{self.query_modality} to {other_modality(self.query_modality)}'


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
        INFRARED,
        num_trials=10,
        shots=shots,
        gallery_cameras=cameras,
        ignores=IGNORE_SAME_LOCATION,
        per_identity_cmc=True,
    )


def _llcm(name: str, query_modality: str, drawn: str = 'gallery') -> Protocol:
    return Protocol(
        name,
        query_modality,
        num_trials=10,
        shots=1,
        drawn=drawn,
        ignores=IGNORE_SAME_IDENTITY_AND_CAMERA,
        per_identity_cmc=True,
    )


PROTOCOLS = {
    'sysu_mm01': (
        _sysu_mm01('all-single', (1, 2, 4, 5), 1),
        _sysu_mm01('all-multi', (1, 2, 4, 5), 10),
        _sysu_mm01('indoor-single', (1, 2), 1),
        _sysu_mm01('indoor-multi', (1, 2), 10),
    ),
    'llcm': (
        _llcm('visible-to-infrared', VISIBLE),
        _llcm('infrared-to-visible', INFRARED),
        # The released test script calls this its visible-to-infrared search: the drawn infrared pictures are the
        # queries, every visible picture is the gallery. Its figures do not compare with those of the paper.
        _llcm('visible-to-infrared-swapped', INFRARED, drawn='query'),
    ),
}
# RegDB (whose split is the reader's `trial`), folders, CSV files, SynthVI: every picture of one modality searches among
# every picture of the other.
BOTH_DIRECTIONS = (Protocol('visible-to-infrared', VISIBLE), Protocol('infrared-to-visible', INFRARED))


def protocols_of(dataset: Dataset) -> tuple[str, ...]:
    """Names of the protocols that a dataset's test pictures allow, in the order in which they are reported."""
    return tuple(
        protocol.name
        for protocol in PROTOCOLS.get(dataset.name, BOTH_DIRECTIONS)
        if len(_query_rows(dataset.test, protocol)) and len(_gallery_rows(dataset.test, protocol))
    )


def protocol_of(dataset: Dataset, name: str) -> Protocol:
    """What a protocol of a dataset consists of.

    Raises:
        ValueError: On a name that is none of the dataset's protocols.
    """
    protocols = {protocol.name: protocol for protocol in PROTOCOLS.get(dataset.name, BOTH_DIRECTIONS)}
    if name not in protocols:
        raise ValueError(f'{dataset.name} has no protocol {name!r}; available: {", ".join(protocols)}')
    return protocols[name]


def protocol_trials(dataset: Dataset, protocol: str, draw: str = 'seeded') -> list[Trial]:
    """The trials of a protocol.

    `draw='seeded'` takes, for trial t, the pictures that the test code of AGW and its descendants takes (on LLCM: that
    of DEEN), bit for bit: identities in the order of their names, cameras in rising order within each, one uniform
    choice from the sorted pictures of each, from a generator seeded with t. It is a private one: the caller's `random`
    state stays as it is. That code has no multi-shot; ours draws the ten pictures without replacement by the same walk.

    Args:
        dataset: As `create_dataset` returns it.
        protocol: One of `protocols_of(dataset)`.
        draw: How pictures are drawn, where any are: `seeded`.

    Returns:
        One trial or more, in terms of the rows of `dataset.test`.

    Raises:
        ValueError: On an unknown protocol or draw, or when there is no query, no gallery or nothing to be found.
    """
    if draw not in DRAWS:
        raise ValueError(f'unknown draw {draw!r}; available: {", ".join(DRAWS)}')
    rule = protocol_of(dataset, protocol)
    records = dataset.test
    query, gallery = _query_rows(records, rule), _gallery_rows(records, rule)
    _check_sides(dataset, rule, query, gallery)
    # Integers compare and hash faster than names do.
    _, identities = np.unique(records.identity, return_inverse=True)
    trials = []
    for trial in range(rule.num_trials):
        rng = random.Random(trial)
        trial_query, trial_gallery = query, gallery
        if rule.shots is not None and rule.drawn == 'query':
            trial_query = _draw(records, query, rule.shots, rng)
        elif rule.shots is not None:
            trial_gallery = _draw(records, gallery, rule.shots, rng)
        ignore = _ignored(rule.ignores, identities, records.camera, trial_query, trial_gallery)
        trials.append(Trial(trial_query, trial_gallery, ignore))
    return trials


def _query_rows(records: Records, protocol: Protocol) -> np.ndarray:
    wanted = (records.modality == protocol.query_modality) & np.isin(records.split, ('query', 'test'))
    return np.flatnonzero(wanted)


def _gallery_rows(records: Records, protocol: Protocol) -> np.ndarray:
    modality = other_modality(protocol.query_modality)
    wanted = (records.modality == modality) & np.isin(records.split, ('gallery', 'test'))
    if protocol.gallery_cameras is not None:
        wanted &= np.isin(records.camera, protocol.gallery_cameras)
    return np.flatnonzero(wanted)


def _check_sides(dataset: Dataset, protocol: Protocol, query: np.ndarray, gallery: np.ndarray) -> None:
    of = f'protocol {protocol.name} of {dataset.name}' + (f' in {dataset.root}' if dataset.root else '')
    available = f'protocols that this data allows: {", ".join(protocols_of(dataset)) or "none"}'
    modality = other_modality(protocol.query_modality)
    if not len(query):
        raise ValueError(f'{of} searches with {protocol.query_modality} pictures, but there are none; {available}')
    if not len(gallery):
        cameras = '' if protocol.gallery_cameras is None else f' of cameras {protocol.gallery_cameras}'
        raise ValueError(f'{of} searches among {modality} pictures{cameras}, but there are none; {available}')
    if not np.isin(dataset.test.identity[query], dataset.test.identity[gallery]).any():
        raise ValueError(
            f'{of}: none of the identities of the {len(query)} {protocol.query_modality} query pictures occurs among '
            f'the {len(gallery)} {modality} gallery pictures, so nothing can be found; check that a person has the '
            'same name in both'
        )


def _draw(records: Records, rows: np.ndarray, shots: int, rng: random.Random) -> np.ndarray:
    """`shots` of the rows of every identity and camera, all where there are fewer, in the order of the walk."""
    cells: dict[tuple[str, int], list[int]] = {}
    for row in sorted(rows.tolist(), key=records.path.__getitem__):
        cells.setdefault((str(records.identity[row]), int(records.camera[row])), []).append(row)
    drawn = []
    for cell in sorted(cells):
        if shots == 1:
            drawn.append(rng.choice(cells[cell]))
        else:
            drawn.extend(rng.sample(cells[cell], min(shots, len(cells[cell]))))
    return np.asarray(drawn, dtype=np.int64)


def _ignored(
    rule: str,
    identities: np.ndarray,
    cameras: np.ndarray,
    query: np.ndarray,
    gallery: np.ndarray,
) -> np.ndarray | None:
    """What each query must not see, [Q, G] bool, or None."""
    if rule == IGNORE_SAME_LOCATION:
        # Differs from Market-1501's rule: the pictures of everybody are ignored, not those of the query's person only.
        locations = np.asarray([SYSU_LOCATION_OF_CAMERA.get(camera, camera) for camera in cameras.tolist()])
        return locations[query][:, None] == locations[gallery]
    if rule == IGNORE_SAME_IDENTITY_AND_CAMERA:
        same_camera = cameras[query][:, None] == cameras[gallery]
        return same_camera & (identities[query][:, None] == identities[gallery])
    return None
