"""The protocols against the plain loops that define them, on made-up record tables."""

import random

import numpy as np
import pytest

from vireid_timm.protocols import protocol_of, protocol_trials, protocols_of
from vireid_timm.records import INFRARED, VISIBLE, Dataset, Records, other_modality

EMPTY = Records.from_rows([])
SYSU_MODALITY = {1: VISIBLE, 2: VISIBLE, 3: INFRARED, 4: VISIBLE, 5: VISIBLE, 6: INFRARED}


def sysu_listing():
    """(camera, identity) -> its files, sorted; uneven, with identities that some cameras never saw."""
    rng = random.Random(2017)
    listing = {}
    for number in rng.sample(range(1, 534), 17):
        for camera in SYSU_MODALITY:
            if rng.random() < 0.75:
                name = f'{number:04d}'
                files = rng.sample(range(1, 100), rng.randint(1, 30))
                listing[camera, name] = sorted(f'root/cam{camera}/{name}/{file:04d}.jpg' for file in files)
    return listing


def sysu_dataset(listing):
    rows = [
        (path, identity, camera, SYSU_MODALITY[camera], 'test')
        for (camera, identity), files in listing.items()
        for path in files
    ]
    random.Random(0).shuffle(rows)  # no protocol may depend on the order of the table
    return Dataset('sysu_mm01', 'root', EMPTY, Records.from_rows(rows))


def llcm_dataset():
    rng = random.Random(2023)
    rows = []
    for number in range(1, 12):
        for modality, folder in ((VISIBLE, 'vis'), (INFRARED, 'nir')):
            for camera in range(1, 10):
                if rng.random() < 0.5 and (folder, camera) != ('nir', 3):
                    for file in range(rng.randint(1, 6)):
                        path = f'root/test_{folder}/cam{camera}/{number:04d}/{number:04d}_c{camera:02d}_f{file}.jpg'
                        rows.append((path, f'{number:04d}', camera, modality, 'test'))
    rng.shuffle(rows)
    return Dataset('llcm', 'root', EMPTY, Records.from_rows(rows))


def two_way_dataset(name='folder', splits=('query', 'gallery', 'test'), modalities=(VISIBLE, INFRARED)):
    rows = [
        (f'{split}/{modality}/{person}/{number}.png', person, 0, modality, split)
        for split in splits
        for modality in modalities
        for person in ('anna', 'ben')
        for number in range(2)
    ]
    return Dataset(name, 'root', EMPTY, Records.from_rows(rows))


@pytest.fixture
def global_random_state():
    state = random.getstate()
    yield
    random.setstate(state)


def agw_gallery(listing, cameras, trial):
    """The draw as the field's scripts write it: seeding the global generator."""
    random.seed(trial)
    drawn = []
    for identity in sorted({identity for _, identity in listing}):
        for camera in cameras:
            if (camera, identity) in listing:
                drawn.append(random.choice(listing[camera, identity]))
    return drawn


@pytest.mark.parametrize('protocol, cameras', [('all-single', [1, 2, 4, 5]), ('indoor-single', [1, 2])])
def test_sysu_gallery_is_the_one_that_agw_draws(global_random_state, protocol, cameras):
    listing = sysu_listing()
    dataset = sysu_dataset(listing)
    trials = protocol_trials(dataset, protocol)
    assert len(trials) == 10
    for number, trial in enumerate(trials):
        assert dataset.test.path[trial.gallery].tolist() == agw_gallery(listing, cameras, number)
    assert len({tuple(trial.gallery.tolist()) for trial in trials}) > 1


@pytest.mark.parametrize('protocol, cameras', [('all-multi', {1, 2, 4, 5}), ('indoor-multi', {1, 2})])
def test_sysu_multi_shot_draws_ten_of_each(protocol, cameras):
    listing = sysu_listing()
    dataset = sysu_dataset(listing)
    trials = protocol_trials(dataset, protocol)
    again = protocol_trials(dataset, protocol)
    for trial, same in zip(trials, again, strict=True):
        paths = dataset.test.path[trial.gallery].tolist()
        assert len(set(paths)) == len(paths)
        for (camera, identity), files in listing.items():
            wanted = min(10, len(files)) if camera in cameras else 0
            assert len(set(paths) & set(files)) == wanted, (camera, identity)
        np.testing.assert_array_equal(trial.gallery, same.gallery)
    assert len({tuple(trial.gallery.tolist()) for trial in trials}) == 10


@pytest.mark.parametrize('protocol', ['all-single', 'all-multi', 'indoor-single', 'indoor-multi'])
def test_sysu_queries_and_the_same_location_rule(protocol):
    dataset = sysu_dataset(sysu_listing())
    cameras = dataset.test.camera
    for trial in protocol_trials(dataset, protocol):
        assert sorted(trial.query.tolist()) == [row for row, camera in enumerate(cameras) if camera in (3, 6)]
        for i, query in enumerate(trial.query):
            for j, gallery in enumerate(trial.gallery):
                assert trial.ignore[i, j] == (cameras[query] == 3 and cameras[gallery] == 2)
    assert protocol_of(dataset, protocol).per_identity_cmc


@pytest.mark.parametrize(
    'protocol, queries, drawn',
    [
        ('visible-to-infrared', VISIBLE, 'gallery'),
        ('infrared-to-visible', INFRARED, 'gallery'),
        ('visible-to-infrared-swapped', INFRARED, 'query'),
    ],
)
def test_llcm(global_random_state, protocol, queries, drawn):
    dataset = llcm_dataset()
    test = dataset.test
    drawn_modality = queries if drawn == 'query' else other_modality(queries)
    listing = {}
    for path, identity, camera, modality in zip(test.path, test.identity, test.camera, test.modality, strict=True):
        if modality == drawn_modality:
            listing.setdefault((int(camera), str(identity)), []).append(str(path))
    listing = {cell: sorted(paths) for cell, paths in listing.items()}
    trials = protocol_trials(dataset, protocol)
    assert len(trials) == 10
    for number, trial in enumerate(trials):
        some, everything = (trial.query, trial.gallery) if drawn == 'query' else (trial.gallery, trial.query)
        assert test.path[some].tolist() == agw_gallery(listing, range(1, 10), number)
        assert sorted(everything.tolist()) == np.flatnonzero(test.modality != drawn_modality).tolist()
        for i, query in enumerate(trial.query):
            for j, gallery in enumerate(trial.gallery):
                same_person = test.identity[query] == test.identity[gallery]
                assert trial.ignore[i, j] == (same_person and test.camera[query] == test.camera[gallery])
    assert protocol_of(dataset, protocol).per_identity_cmc


@pytest.mark.parametrize('name', ['regdb', 'folder', 'csv', 'synthetic', 'my own data'])
def test_both_directions(name):
    dataset = two_way_dataset(name)
    assert protocols_of(dataset) == ('visible-to-infrared', 'infrared-to-visible')
    for protocol, modality in zip(protocols_of(dataset), (VISIBLE, INFRARED), strict=True):
        (trial,) = protocol_trials(dataset, protocol)
        records = dataset.test
        searching = [i for i in range(len(records)) if records.modality[i] == modality]
        searched = [i for i in range(len(records)) if records.modality[i] != modality]
        assert trial.query.tolist() == [i for i in searching if records.split[i] != 'gallery']
        assert trial.gallery.tolist() == [i for i in searched if records.split[i] != 'query']
        assert trial.ignore is None
        rule = protocol_of(dataset, protocol)
        assert not rule.per_identity_cmc
        assert rule.direction == f'{modality} to {other_modality(modality)}'


def test_global_random_state_is_left_alone(global_random_state):
    for dataset in (sysu_dataset(sysu_listing()), llcm_dataset(), two_way_dataset()):
        random.seed('the caller')
        state = random.getstate()
        for protocol in protocols_of(dataset):
            protocol_trials(dataset, protocol)
        assert random.getstate() == state


def test_protocols_that_the_pictures_do_not_allow_are_not_listed():
    one_way = two_way_dataset(splits=('query',), modalities=(INFRARED,)).test
    gallery = two_way_dataset(splits=('gallery',), modalities=(VISIBLE,)).test
    columns = ('path', 'identity', 'camera', 'modality', 'split')
    joined = Records(*(np.concatenate([getattr(one_way, name), getattr(gallery, name)]) for name in columns))
    dataset = Dataset('folder', 'root', EMPTY, joined)
    assert protocols_of(dataset) == ('infrared-to-visible',)
    with pytest.raises(ValueError, match='searches with visible pictures, but there are none.*infrared-to-visible'):
        protocol_trials(dataset, 'visible-to-infrared')
    assert protocols_of(Dataset('folder', 'root', EMPTY, EMPTY)) == ()


def test_sysu_without_indoor_gallery():
    listing = {cell: files for cell, files in sysu_listing().items() if cell[0] not in (1, 2)}
    dataset = sysu_dataset(listing)
    assert protocols_of(dataset) == ('all-single', 'all-multi')
    with pytest.raises(ValueError, match=r'visible pictures of cameras \(1, 2\), but there are none.*all-multi'):
        protocol_trials(dataset, 'indoor-single')


@pytest.mark.parametrize(
    'protocol, draw, message',
    [
        ('all-single', 'seeded', 'folder has no protocol.*visible-to-infrared, infrared-to-visible'),
        ('visible-to-infrared', 'lucky', "unknown draw 'lucky'; available: seeded"),
    ],
)
def test_unknown_names_list_what_exists(protocol, draw, message):
    with pytest.raises(ValueError, match=message):
        protocol_trials(two_way_dataset(), protocol, draw=draw)


def test_nothing_to_find_is_an_error():
    rows = [('a.png', 'anna', 0, VISIBLE, 'test'), ('b.png', 'ben', 0, INFRARED, 'test')]
    dataset = Dataset('folder', 'root', EMPTY, Records.from_rows(rows))
    with pytest.raises(ValueError, match='nothing can be found.*same name'):
        protocol_trials(dataset, 'visible-to-infrared')
