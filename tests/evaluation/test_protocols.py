"""The protocols against the plain loops that define them, on made-up record tables."""

import random
import sys

import numpy as np
import pytest
from scipy.io import savemat

from vireid_timm.constants import INFRARED, MODALITIES, VISIBLE
from vireid_timm.data.records import Dataset, Records
from vireid_timm.evaluation.protocols import draw_trials, ignore_keys, protocol_of, protocol_trials, protocols_of

EMPTY = Records.from_rows([])
OTHER = {VISIBLE: INFRARED, INFRARED: VISIBLE}
SYSU_MODALITY = {1: VISIBLE, 2: VISIBLE, 3: INFRARED, 4: VISIBLE, 5: VISIBLE, 6: INFRARED}


def sysu_listing():
    """(camera, identity) -> sorted files; uneven, and some identities are missing in some cameras."""
    rng = random.Random(2017)
    listing = {}
    for number in rng.sample(range(1, 534), 17):
        for camera in SYSU_MODALITY:
            if rng.random() < 0.75:
                name = f'{number:04d}'
                files = rng.sample(range(1, 100), rng.randint(1, 30))
                listing[camera, name] = sorted(f'root/cam{camera}/{name}/{file:04d}.jpg' for file in files)
    return listing


def sysu_dataset(listing, root='root'):
    rows = [
        (path, identity, camera, SYSU_MODALITY[camera], 'test')
        for (camera, identity), files in listing.items()
        for path in files
    ]
    random.Random(0).shuffle(rows)  # no protocol may depend on the order of the table
    return Dataset('sysu_mm01', str(root), EMPTY, Records.from_rows(rows))


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


def joined(first, second):
    columns = ('path', 'identity', 'camera', 'modality', 'split')
    return Records(*(np.concatenate([getattr(first, name), getattr(second, name)]) for name in columns))


@pytest.fixture
def global_random_state():
    state = random.getstate()
    yield
    random.setstate(state)


def agw_gallery(listing, cameras, trial):
    """Sample as the field's scripts do, by seeding the global generator."""
    random.seed(trial)
    drawn = []
    for identity in sorted({identity for _, identity in listing}):
        for camera in cameras:
            if (camera, identity) in listing:
                drawn.append(random.choice(listing[camera, identity]))
    return drawn


@pytest.mark.parametrize('protocol, cameras', [('all-single', [1, 2, 4, 5]), ('indoor-single', [1, 2])])
def test_sysu_gallery_is_the_one_of_agw(global_random_state, protocol, cameras):
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
    'protocol, drawn_modality, drawn',
    [
        ('visible-to-infrared', INFRARED, 'gallery'),
        ('infrared-to-visible', VISIBLE, 'gallery'),
        ('visible-to-infrared-swapped', INFRARED, 'query'),
    ],
)
def test_llcm(global_random_state, protocol, drawn_modality, drawn):
    dataset = llcm_dataset()
    test = dataset.test
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
    mixed = ('mixed',) if name in ('folder', 'csv', 'synthetic') else ()
    assert protocols_of(dataset) == ('visible-to-infrared', 'infrared-to-visible', *mixed)
    for protocol, modality in (('visible-to-infrared', VISIBLE), ('infrared-to-visible', INFRARED)):
        (trial,) = protocol_trials(dataset, protocol)
        records = dataset.test
        searching = [i for i in range(len(records)) if records.modality[i] == modality]
        searched = [i for i in range(len(records)) if records.modality[i] != modality]
        assert trial.query.tolist() == [i for i in searching if records.split[i] != 'gallery']
        assert trial.gallery.tolist() == [i for i in searched if records.split[i] != 'query']
        assert trial.ignore is None
        rule = protocol_of(dataset, protocol)
        assert not rule.per_identity_cmc
        assert rule.direction == protocol.replace('-', ' ')


def test_global_random_state_is_not_changed(global_random_state):
    for dataset in (sysu_dataset(sysu_listing()), llcm_dataset(), two_way_dataset()):
        random.seed('the caller')
        state = random.getstate()
        for protocol in protocols_of(dataset):
            protocol_trials(dataset, protocol)
        assert random.getstate() == state


def test_protocols_that_the_images_do_not_allow_are_not_listed():
    one_way = two_way_dataset(splits=('query',), modalities=(INFRARED,)).test
    gallery = two_way_dataset(splits=('gallery',), modalities=(VISIBLE,)).test
    dataset = Dataset('folder', 'root', EMPTY, joined(one_way, gallery))
    assert protocols_of(dataset) == ('infrared-to-visible',)
    with pytest.raises(ValueError, match='needs visible query images, but there are none.*infrared-to-visible'):
        protocol_trials(dataset, 'visible-to-infrared')
    with pytest.raises(ValueError, match='needs infrared gallery images, but there are none.*infrared-to-visible$'):
        protocol_trials(dataset, 'mixed')
    both = two_way_dataset(splits=('gallery',)).test
    assert protocols_of(Dataset('folder', 'root', EMPTY, joined(one_way, both))) == ('infrared-to-visible', 'mixed')
    no_query = Dataset('folder', 'root', EMPTY, both)
    assert protocols_of(no_query) == ()
    with pytest.raises(ValueError, match='needs visible or infrared query images, but there are none.*: none$'):
        protocol_trials(no_query, 'mixed')
    assert protocols_of(Dataset('folder', 'root', EMPTY, EMPTY)) == ()


def test_sysu_without_indoor_gallery():
    listing = {cell: files for cell, files in sysu_listing().items() if cell[0] not in (1, 2)}
    dataset = sysu_dataset(listing)
    assert protocols_of(dataset) == ('all-single', 'all-multi')
    with pytest.raises(ValueError, match=r'visible gallery images of cameras \(1, 2\), but there are none.*all-multi'):
        protocol_trials(dataset, 'indoor-single')


def random_records(seed):
    """Few identities and cameras, so that all combinations occur; camera 0 means unknown."""
    rng = random.Random(seed)
    rows = [
        (
            f'{number}.png',
            rng.choice(('anna', 'ben', 'cleo')),
            rng.randrange(4),
            rng.choice(MODALITIES),
            rng.choice(('query', 'gallery', 'test')),
        )
        for number in range(40)
    ]
    return Records.from_rows(rows)


@pytest.mark.parametrize('name', ['folder', 'csv', 'synthetic'])
def test_mixed(name):
    for seed in range(5):
        records = random_records(seed)
        dataset = Dataset(name, 'root', EMPTY, records)
        (trial,) = protocol_trials(dataset, 'mixed')
        assert trial.query.tolist() == [row for row in range(40) if records.split[row] != 'gallery']
        assert trial.gallery.tolist() == [row for row in range(40) if records.split[row] != 'query']
        for i, query in enumerate(trial.query):
            for j, gallery in enumerate(trial.gallery):
                one, other = records[[query, gallery]], records[[gallery, query]]
                same = all(
                    (getattr(one, column) == getattr(other, column)).all()
                    for column in ('identity', 'modality', 'camera')
                )
                known = records.camera[query] != 0
                assert trial.ignore[i, j] == (query == gallery or (same and known)), (query, gallery)
    rule = protocol_of(dataset, 'mixed')
    assert (rule.direction, rule.per_identity_cmc) == ('both to both', False)


def test_mixed_where_everybody_was_seen_once():
    rows = [('a.png', 'anna', 0, VISIBLE, 'test'), ('b.png', 'ben', 1, INFRARED, 'test')]
    dataset = Dataset('csv', 'root', EMPTY, Records.from_rows(rows))
    with pytest.raises(ValueError, match='2 visible or infrared query.*same identity, modality and camera'):
        protocol_trials(dataset, 'mixed')
    again = Records.from_rows([*rows, ('c.png', 'anna', 0, VISIBLE, 'test')])
    (trial,) = protocol_trials(Dataset('csv', 'root', EMPTY, again), 'mixed')
    np.testing.assert_array_equal(trial.ignore, np.eye(3, dtype=bool))


@pytest.mark.parametrize('name', ['sysu_mm01', 'regdb', 'llcm', 'validation'])
def test_other_data_have_no_mixed_protocol(name):
    dataset = Dataset(name, 'root', EMPTY, two_way_dataset().test)
    assert 'mixed' not in protocols_of(dataset)
    with pytest.raises(ValueError, match=f"{name} has no protocol 'mixed'"):
        protocol_trials(dataset, 'mixed')


def test_rows_and_keys_make_up_the_trials():
    for dataset in (sysu_dataset(sysu_listing()), llcm_dataset(), Dataset('folder', '', EMPTY, random_records(0))):
        for protocol in protocols_of(dataset):
            rule = protocol_of(dataset, protocol)
            rows, keys = draw_trials(dataset, protocol), ignore_keys(dataset.test, rule.ignores)
            assert len(rows) == rule.num_trials
            for (query, gallery), trial in zip(rows, protocol_trials(dataset, protocol), strict=True):
                assert query.dtype == gallery.dtype == np.int64
                np.testing.assert_array_equal(query, trial.query)
                np.testing.assert_array_equal(gallery, trial.gallery)
                assert (keys is None) == (trial.ignore is None)
                if keys is not None:
                    assert (keys.dtype, keys.shape) == (np.int64, (len(dataset.test),))
                    np.testing.assert_array_equal(trial.ignore, keys[query][:, None] == keys[gallery])


@pytest.mark.parametrize('rule', ['same location', 'same identity and camera', 'same identity, modality and camera'])
def test_keys_of_no_image(rule):
    assert ignore_keys(EMPTY, rule).shape == (0,)


@pytest.mark.parametrize(
    'protocol, draw, message',
    [
        ('all-single', 'seeded', 'folder has no protocol.*visible-to-infrared, infrared-to-visible'),
        ('visible-to-infrared', 'lucky', "unknown draw 'lucky'; available: seeded, official"),
    ],
)
def test_unknown_names_list_what_exists(protocol, draw, message):
    with pytest.raises(ValueError, match=message):
        protocol_trials(two_way_dataset(), protocol, draw=draw)


def test_nothing_to_find_is_an_error():
    rows = [('a.png', 'anna', 0, VISIBLE, 'test'), ('b.png', 'ben', 0, INFRARED, 'test')]
    dataset = Dataset('folder', 'root', EMPTY, Records.from_rows(rows))
    with pytest.raises(ValueError, match='none of the 1 visible query.*1 infrared gallery.*same name'):
        protocol_trials(dataset, 'visible-to-infrared')


def test_nothing_to_find_because_all_matches_are_ignored():
    rows = [
        *(('a.png', '0001', 3, INFRARED, 'test'), ('b.png', '0001', 2, VISIBLE, 'test')),
        ('c.png', '0002', 1, VISIBLE, 'test'),
    ]
    dataset = Dataset('sysu_mm01', 'root', EMPTY, Records.from_rows(rows))
    with pytest.raises(ValueError, match='none of the 1 infrared query.*ignored: same location'):
        protocol_trials(dataset, 'all-single')


def owners_orders(listing, num_trials=10):
    """(camera, identity) -> an order of its images for each trial, counted from 1."""
    rng = random.Random(1)
    return {
        cell: [rng.sample(range(1, len(files) + 1), len(files)) for _ in range(num_trials)]
        for cell, files in listing.items()
    }


def write_orders(root, orders, dtype=np.uint8, shape=(-1, 1), variable='rand_perm_cam'):
    """Write nested cells like the owners' file: cameras, identities, and a matrix each, empty without images."""
    cameras = np.empty(6, dtype=object)
    for camera in range(1, 7):
        numbers = {int(identity): matrix for (seen_by, identity), matrix in orders.items() if seen_by == camera}
        cameras[camera - 1] = np.empty(max(numbers, default=0), dtype=object)
        for number in range(1, len(cameras[camera - 1]) + 1):
            matrix = numbers.get(number, np.empty((0, 0)))
            cameras[camera - 1][number - 1] = np.asarray(matrix, dtype=dtype)
        cameras[camera - 1] = cameras[camera - 1].reshape(shape)
    (root / 'exp').mkdir(exist_ok=True)
    savemat(root / 'exp' / 'rand_perm_cam.mat', {variable: cameras.reshape(shape)})


@pytest.mark.parametrize('dtype, shape', [(np.uint8, (-1, 1)), (np.float64, (1, -1))])
@pytest.mark.parametrize('protocol', ['all-single', 'all-multi', 'indoor-single', 'indoor-multi'])
def test_official_gallery_follows_the_owners_file(tmp_path, protocol, dtype, shape):
    listing = sysu_listing()
    orders = owners_orders(listing, num_trials=12)  # more rows than trials are fine
    write_orders(tmp_path, orders, dtype, shape)
    dataset = sysu_dataset(listing, tmp_path)
    trials = protocol_trials(dataset, protocol, draw='official')
    assert len(trials) == 10
    cameras = (1, 2, 4, 5) if protocol.startswith('all') else (1, 2)
    for number, trial in enumerate(trials):
        expected = []
        for identity in sorted({identity for _, identity in listing}):
            for camera in cameras:
                for place in orders.get((camera, identity), [[]] * 10)[number][: 10 if 'multi' in protocol else 1]:
                    expected.append(listing[camera, identity][place - 1])
        assert dataset.test.path[trial.gallery].tolist() == expected
        seeded = protocol_trials(dataset, protocol)[number]
        np.testing.assert_array_equal(trial.query, seeded.query)
        assert len(trial.gallery) == len(seeded.gallery)
        assert set(trial.gallery.tolist()) != set(seeded.gallery.tolist())
        locations = np.where(dataset.test.camera == 3, 2, dataset.test.camera)
        np.testing.assert_array_equal(trial.ignore, locations[trial.query][:, None] == locations[trial.gallery])


def without(orders, unwanted):
    return {cell: matrix for cell, matrix in orders.items() if not unwanted(*cell)}


@pytest.mark.parametrize(
    'change_listing, change_orders, message',
    [
        (lambda files: files[:-1], lambda orders, cell: orders, 'file permutes {n} images, .* holds {less};'),
        (lambda files: [], lambda orders, cell: orders, 'file permutes {n} images, .* holds 0;'),
        (
            lambda files: files,
            lambda orders, cell: without(orders, lambda camera, identity: identity >= cell[1]),
            'file permutes 0 images, .* holds {n};',
        ),
        (
            lambda files: files,
            lambda orders, cell: without(orders, lambda camera, identity: camera == 1),
            'file permutes 0 images, .* holds {n};',
        ),
        (
            lambda files: files,
            lambda orders, cell: orders | {cell: orders[cell][:9]},
            'expected a row for each of 10 trials, got 9',
        ),
    ],
)
def test_official_file_that_does_not_fit_the_images(tmp_path, change_listing, change_orders, message):
    listing = sysu_listing()
    cell = min((cell for cell in listing if cell[0] == 1), key=lambda cell: cell[1])
    numbers = {'n': len(listing[cell]), 'less': len(listing[cell]) - 1}
    write_orders(tmp_path, change_orders(owners_orders(listing), cell))
    listing[cell] = change_listing(listing[cell])
    where = rf'rand_perm_cam\.mat, camera 1, identity {cell[1]}: '
    with pytest.raises(ValueError, match=where + '.*' + message.format(**numbers)):
        protocol_trials(sysu_dataset(listing, tmp_path), 'indoor-single', draw='official')


@pytest.mark.parametrize('other', [lambda row: row[1], lambda row: 0, lambda row: row[0] + 0.5, lambda row: np.nan])
def test_official_file_with_a_row_that_is_no_permutation(tmp_path, other):
    listing = sysu_listing()
    orders = owners_orders(listing)
    cell = max(cell for cell in orders if cell[0] == 2 and len(listing[cell]) > 1)
    orders[cell][3][0] = other(orders[cell][3])
    write_orders(tmp_path, orders, dtype=np.float64)
    expected = f'camera 2, identity {cell[1]}: row 4 is not a permutation of 1 to {len(listing[cell])}'
    with pytest.raises(ValueError, match=expected):
        protocol_trials(sysu_dataset(listing, tmp_path), 'indoor-multi', draw='official')


@pytest.mark.parametrize(
    'variable, message',
    [
        ({'perm': np.arange(6)}, 'expected the variable rand_perm_cam'),
        ({'rand_perm_cam': np.arange(6)}, 'expected the variable rand_perm_cam, a cell array of 6 cameras'),
        ({'rand_perm_cam': np.array([*'abcde', np.arange(6)], dtype=object)}, 'cell array of identities each'),
        (
            {'rand_perm_cam': np.array([np.ones(n, dtype=object) for n in range(1, 6)], dtype=object)},
            '6 cameras',
        ),
    ],
)
def test_official_file_of_another_kind(tmp_path, variable, message):
    (tmp_path / 'exp').mkdir()
    savemat(tmp_path / 'exp' / 'rand_perm_cam.mat', variable)
    with pytest.raises(ValueError, match=r'rand_perm_cam\.mat: .*' + message):
        protocol_trials(sysu_dataset(sysu_listing(), tmp_path), 'all-single', draw='official')


@pytest.mark.parametrize('dtype', [np.str_, np.complex128, object])
def test_official_file_of_other_values(tmp_path, dtype):
    listing = sysu_listing()
    write_orders(tmp_path, owners_orders(listing) if dtype != np.str_ else dict.fromkeys(listing, 'word'), dtype)
    with pytest.raises(ValueError, match='camera 1, identity .*: expected a matrix of whole numbers, a row per trial'):
        protocol_trials(sysu_dataset(listing, tmp_path), 'all-single', draw='official')


def test_official_file_with_an_identity_whose_folders_are_missing(tmp_path):
    listing = sysu_listing()
    orders = owners_orders(listing)
    write_orders(tmp_path, orders)
    identity = min(identity for camera, identity in listing if camera == 1)
    left = without(listing, lambda camera, name: name == identity and camera in (1, 2))
    assert identity in {name for _, name in left}, 'other cameras have this person'
    with pytest.raises(ValueError, match=f'camera 1, identity {identity}: .* but the folder holds 0;'):
        protocol_trials(sysu_dataset(left, tmp_path), 'indoor-single', draw='official')


@pytest.mark.parametrize('keep', [0, 100, 5000])
@pytest.mark.parametrize('text', [b'', b'404: not found\n' * 100])
def test_official_file_that_cannot_be_read(tmp_path, keep, text):
    listing = sysu_listing()
    write_orders(tmp_path, owners_orders(listing))
    path = tmp_path / 'exp' / 'rand_perm_cam.mat'
    path.write_bytes(path.read_bytes()[:keep] + text)
    with pytest.raises(ValueError, match=r'rand_perm_cam\.mat is not a readable MATLAB file of version 5 .*again'):
        protocol_trials(sysu_dataset(listing, tmp_path), 'all-single', draw='official')


def test_official_file_that_is_not_there(tmp_path):
    dataset = sysu_dataset(sysu_listing(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'exp.rand_perm_cam\.mat.*owners \(folder data_split\).*exp;'):
        protocol_trials(dataset, 'all-single', draw='official')


def test_official_draw_without_scipy(tmp_path, monkeypatch):
    listing = sysu_listing()
    write_orders(tmp_path, owners_orders(listing))
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    with pytest.raises(ValueError, match=r"pip install 'vireid_timm\[official\]'"):
        protocol_trials(sysu_dataset(listing, tmp_path), 'all-single', draw='official')


def test_official_draw_where_the_owners_have_none():
    dataset = llcm_dataset()
    for protocol in protocols_of(dataset):
        with pytest.raises(ValueError, match=f"{protocol} of llcm has no draw 'official'; available: seeded"):
            protocol_trials(dataset, protocol, draw='official')
    for name in ('folder', 'regdb'):  # nothing is sampled, so any valid draw is accepted
        (trial,) = protocol_trials(two_way_dataset(name), 'visible-to-infrared', draw='official')
        (seeded,) = protocol_trials(two_way_dataset(name), 'visible-to-infrared')
        np.testing.assert_array_equal(trial.gallery, seeded.gallery)
