"""SynthVI's layouts on disk, read back by the readers of the datasets that they follow."""

import itertools
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from vireid_timm.constants import FULL_SIZES, INFRARED, VISIBLE
from vireid_timm.data.images import read_image
from vireid_timm.data.layouts import ABOUT_FILE, LAYOUT_NAMES, plan_layout, write_layout, write_permutations
from vireid_timm.data.readers import PUBLISHED_COUNTS, create_dataset
from vireid_timm.data.records import Dataset, Records
from vireid_timm.evaluation.protocols import draw_trials, protocol_trials, protocols_of
from vireid_timm.synthvi.render import render

SIZE = (32, 16)
# How a layout is read, with all its images.
READ = {
    'market': ('folder', {'names': 'market'}),
    'hitsz_vcm': ('hitsz_vcm', {'frames': 0}),
    'buptcampus': ('buptcampus', {'frames': 0}),
}


def read(layout, root):
    name, options = READ.get(layout, (layout, {}))
    return create_dataset(name, root, **options)


def tables(dataset):
    return (dataset.train, dataset.test)


def counts_of(dataset):
    return tuple(
        int((records.modality == modality).sum()) for records in tables(dataset) for modality in (VISIBLE, INFRARED)
    )


def files_in(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob('*')) if path.is_file()}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Layout -> (root, plan)."""
    folder = tmp_path_factory.mktemp('synth')
    return {
        layout: (
            folder / layout,
            write_layout(folder / layout, layout, identities=5, test_identities=4, seed=3, size=SIZE, workers=0),
        )
        for layout in LAYOUT_NAMES
    }


@pytest.mark.parametrize('layout', LAYOUT_NAMES)
def test_every_image_comes_back(written, layout):
    root, plan = written[layout]
    dataset = read(layout, root)
    planned = {str(root / image.path): image for image in plan.images}
    paths = [path for records in tables(dataset) for path in records.path.tolist()]
    assert sorted(paths) == sorted(planned)
    assert len({image[1:] for image in plan.images}) == len(plan.images), 'no two files show the same image'
    for records in tables(dataset):
        for path, identity, camera, modality in zip(
            records.path.tolist(),
            records.identity.tolist(),
            records.camera.tolist(),
            records.modality.tolist(),
            strict=True,
        ):
            image = planned[path]
            assert (int(identity), camera, modality) == (image.identity, image.camera, image.modality)
            with Image.open(path) as opened:
                assert opened.mode == 'RGB'
                assert (np.ptp(np.asarray(opened), axis=2) == 0).all() == (modality == INFRARED)
            expected = render(
                image.modality,
                image.identity,
                image.camera,
                image.image,
                seed=3,
                spectrum='thermal' if layout == 'regdb' else 'near-infrared',
                size=SIZE,
            )
            difference = np.abs(np.asarray(read_image(path)).astype(int) - expected)
            assert difference.mean() <= (0 if path.endswith('.bmp') else 8), 'JPEG may lose a little'


@pytest.mark.parametrize('layout', LAYOUT_NAMES)
def test_identities_are_as_asked_and_protocols_work(written, layout):
    root, plan = written[layout]
    dataset = read(layout, root)
    assert [len(records.identities()) for records in tables(dataset)] == [5, 4]
    assert (plan.identities, plan.test_identities) == (5, 4)
    assert not set(dataset.train.identities()) & set(dataset.test.identities())
    for records, modality in itertools.product(tables(dataset), (VISIBLE, INFRARED)):
        of_modality = records[records.modality == modality]
        assert of_modality.identities() == records.identities()
        assert min(np.unique(of_modality.identity, return_counts=True)[1]) >= (
            3 if layout in ('folder', 'market') else 4
        )
    for protocol in protocols_of(dataset):
        for trial in protocol_trials(dataset, protocol):
            same = dataset.test.identity[trial.query][:, None] == dataset.test.identity[trial.gallery]
            visible_to = same if trial.ignore is None else same & ~trial.ignore
            assert visible_to.any(axis=1).all(), f'{protocol}: a query without a match'


def test_sysu_mm01_follows_the_owners(written):
    root, _ = written['sysu_mm01']
    assert {name: (root / f'exp/{name}_id.txt').read_text() for name in ('train', 'val', 'test', 'available')} == {
        'train': '1,2,3,4\n',
        'val': '5\n',
        'test': '6,7,8,9\n',
        'available': '1,2,3,4,5,6,7,8,9\n',
    }
    assert sorted(os.listdir(root)) == ['cam1', 'cam2', 'cam3', 'cam4', 'cam5', 'cam6', 'exp', ABOUT_FILE]
    assert sorted(os.listdir(root / 'cam3' / '0009')) == ['0001.jpg', '0002.jpg', '0003.jpg', '0004.jpg']


def owners_orders(root):
    """Map (camera, identity) to the rows of its matrix in the owners' file, as lists."""
    cameras = loadmat(root / 'exp' / 'rand_perm_cam.mat')['rand_perm_cam']
    assert cameras.shape == (6, 1)
    orders = {}
    for camera in range(1, 7):
        identities = cameras[camera - 1, 0]
        assert identities.shape == (cameras[0, 0].size, 1)
        for identity in range(1, len(identities) + 1):
            matrix = identities[identity - 1, 0]
            assert matrix.shape[0] == 10, 'a row for each trial, also if there are no images'
            if matrix.size:
                orders[camera, identity] = matrix.tolist()
    return orders


def test_sysu_mm01_has_the_owners_permutations(written):
    root, plan = written['sysu_mm01']
    listing = {}
    for image in plan.images:
        listing.setdefault((image.camera, image.identity), []).append(str(root / image.path))
    orders = owners_orders(root)
    assert orders.keys() == listing.keys()
    for cell, matrix in orders.items():
        assert len(matrix) == 10
        assert all(sorted(row) == list(range(1, len(listing[cell]) + 1)) for row in matrix)
    assert len({str(matrix) for matrix in orders.values()}) > len(orders) / 2

    dataset = create_dataset('sysu_mm01', root)
    for protocol, cameras, shots in (
        ('all-single', (1, 2, 4, 5), 1),
        ('all-multi', (1, 2, 4, 5), 10),
        ('indoor-single', (1, 2), 1),
        ('indoor-multi', (1, 2), 10),
    ):
        trials = protocol_trials(dataset, protocol, draw='official')
        for number, trial in enumerate(trials):
            expected = [
                sorted(listing[camera, identity])[place - 1]
                for identity in range(6, 10)
                for camera in cameras
                for place in orders[camera, identity][number][:shots]
            ]
            assert dataset.test.path[trial.gallery].tolist() == expected
        if shots == 1:
            seeded = protocol_trials(dataset, protocol)
            assert [t.gallery.tolist() for t in trials] != [t.gallery.tolist() for t in seeded]


def test_permutations_follow_the_seed(tmp_path, written):
    root, plan = written['sysu_mm01']
    contents = {}
    for seed in (3, 4):
        (tmp_path / f'{seed}' / 'exp').mkdir(parents=True)
        write_permutations(plan, tmp_path / f'{seed}', seed)
        contents[seed] = (tmp_path / f'{seed}' / 'exp' / 'rand_perm_cam.mat').read_bytes()
    assert contents[3] == (root / 'exp' / 'rand_perm_cam.mat').read_bytes()
    assert contents[3].startswith(b'MATLAB 5.0 MAT-file, written by vireid_timm   ')  # neither time nor platform
    assert contents[3][:128] == contents[4][:128]
    assert owners_orders(tmp_path / '3') != owners_orders(tmp_path / '4')


def test_without_scipy_there_are_no_permutations(tmp_path, monkeypatch, caplog, written):
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    with caplog.at_level(logging.INFO, logger='vireid_timm.data.layouts'):
        write_layout(tmp_path / 'data', 'sysu_mm01', identities=5, test_identities=4, seed=3, size=SIZE, workers=0)
    (record,) = caplog.records
    assert 'exp/rand_perm_cam.mat' in record.message
    assert 'pip install "vireid_timm[official]"' in record.message
    expected = files_in(written['sysu_mm01'][0])
    del expected[os.path.join('exp', 'rand_perm_cam.mat')]
    assert files_in(tmp_path / 'data') == expected


def test_regdb_trials_divide_the_identities_anew(written):
    root, _ = written['regdb']
    divisions = set()
    for trial in range(1, 11):
        dataset = create_dataset('regdb', root, trial=trial)
        train, test = (records.identities() for records in tables(dataset))
        assert sorted(train + test, key=int) == [str(number) for number in range(1, 10)]
        assert counts_of(dataset) == (50, 50, 40, 40)
        divisions.add(tuple(train))
    assert len(divisions) > 5
    line = (root / 'idx/train_visible_1.txt').read_text().splitlines()[10]
    first, second = create_dataset('regdb', root).train.path.tolist()[10], '1'  # labels count from 0
    assert line == f'{os.path.relpath(first, root)} {second}'


def test_llcm_follows_the_owners(written):
    root, plan = written['llcm']
    infrared = [image for image in plan.images if image.modality == INFRARED]
    assert all(image.camera != 3 for image in infrared)
    assert {
        len(line.split(' '))
        for name in ('train_vis', 'train_nir', 'test_vis', 'test_nir')
        for line in (root / f'idx/{name}.txt').read_text().splitlines()
    } == {2}
    assert (root / 'idx/test_id.txt').read_text() == '6,7,8,9\n'


def test_same_arguments_same_files(tmp_path, written):
    for layout in LAYOUT_NAMES:
        again = tmp_path / layout
        write_layout(again, layout, identities=5, test_identities=4, seed=3, size=SIZE, workers=3)
        assert files_in(again) == files_in(written[layout][0])
    other = tmp_path / 'other'
    write_layout(other, 'folder', identities=5, test_identities=4, seed=4, size=SIZE)
    assert all(other_bytes != files_in(again.parent / 'folder')[name] for name, other_bytes in files_in(other).items())


def test_spectrum_is_chosen_or_the_layouts_own(tmp_path):
    for number, (layout, spectrum, expected) in enumerate(
        (
            ('regdb', None, 'thermal'),
            ('regdb', 'near-infrared', 'near-infrared'),
            ('folder', 'thermal', 'thermal'),
            ('folder', None, 'near-infrared'),
        )
    ):
        root = tmp_path / str(number)
        plan = write_layout(root, layout, identities=1, test_identities=1, spectrum=spectrum, size=SIZE)
        assert json.loads((root / ABOUT_FILE).read_text())['spectrum'] == expected
        image = next(image for image in plan.images if image.modality == INFRARED)
        pixels = render(INFRARED, image.identity, image.camera, image.image, spectrum=expected, size=SIZE)
        assert np.abs(np.asarray(read_image(str(root / image.path))).astype(int) - pixels).mean() < 8


def test_written_folder_is_left_as_it_is(tmp_path):
    root = tmp_path / 'deep' / 'data'
    root.mkdir(parents=True)  # an empty folder is fine
    write_layout(root, 'folder', identities=2, test_identities=1, size=SIZE)
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    write_layout(str(root), 'folder', identities=2, test_identities=1, size=list(SIZE))
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before
    with pytest.raises(ValueError, match=r'other SynthVI images \(seed 0 instead of 1\)'):
        write_layout(root, 'folder', identities=2, test_identities=1, size=SIZE, seed=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before
    assert os.listdir(root.parent) == ['data']


def test_folders_with_other_contents_are_rejected(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('words')
    (tmp_path / 'file').write_text('words')
    for name, message in (('mine', 'not empty and was not written by this command'), ('file', 'is a file')):
        with pytest.raises(ValueError, match=message):
            write_layout(tmp_path / name, 'folder', identities=1)
    assert set(files_in(tmp_path)) == {'mine/thesis.txt', 'file'}


def test_interrupted_run_is_noticed(tmp_path):
    with pytest.raises(ValueError, match='an image needs'):
        write_layout(tmp_path / 'data', 'folder', identities=2, size=(4, 2))
    assert not list(tmp_path.iterdir()), 'an error leaves nothing behind'
    (tmp_path / 'data.partial').mkdir()  # left by a killed run
    with pytest.raises(ValueError, match='data.partial was left by an interrupted run'):
        write_layout(tmp_path / 'data', 'folder', identities=2, size=SIZE)
    assert os.listdir(tmp_path) == ['data.partial']


def test_folder_that_cannot_be_created(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='file'):
        write_layout(tmp_path / 'file' / 'data', 'folder', identities=1, size=SIZE)


@pytest.mark.parametrize(
    'layout, options, message',
    [
        ('market1501', {'identities': 1}, 'unknown layout .*folder, market, sysu_mm01, regdb, llcm'),
        ('sysu_mm01', {}, 'number of identities must be a whole number, got None'),
        ('sysu_mm01', {'identities': 0}, 'number of identities must be at least 1, got 0'),
        ('llcm', {'identities': 2, 'test_identities': 0}, 'number of test identities must be at least 1, got 0'),
        ('folder', {'full_size': True}, 'layout folder has no full size'),
        ('hitsz_vcm', {'full_size': True}, 'has no full size .*; choose sysu_mm01, regdb, llcm'),
        ('regdb', {'full_size': True, 'identities': 4}, 'sets the numbers of identities'),
    ],
)
def test_arguments_are_checked(layout, options, message):
    with pytest.raises(ValueError, match=message):
        plan_layout(layout, **options)


def test_unknown_spectrum(tmp_path):
    with pytest.raises(ValueError, match="unknown spectrum 'x-ray'"):
        write_layout(tmp_path / 'data', 'folder', identities=1, spectrum='x-ray')


@pytest.mark.parametrize(
    'layout, identities, expected', [('folder', 10, 8), ('sysu_mm01', 100, 20), ('llcm', 3, 8), ('regdb', 30, 30)]
)
def test_default_number_of_test_identities(layout, identities, expected):
    assert plan_layout(layout, identities=identities).test_identities == expected


@pytest.fixture(scope='module')
def full():
    """Layout -> (plan, dataset as its reader would return it), at full size and without any file."""
    datasets = {}
    for layout in FULL_SIZES:
        plan = plan_layout(layout, full_size=True)
        if layout == 'regdb':
            tested = {line.split('/')[1] for line in plan.lists['idx/test_visible_1.txt'].splitlines()}
        else:
            tested = set(plan.lists['exp/test_id.txt' if layout == 'sysu_mm01' else 'idx/test_id.txt'][:-1].split(','))
        rows = {True: [], False: []}
        for image in plan.images:
            is_test = str(image.identity) in tested
            rows[is_test].append(
                (
                    image.path,
                    f'{image.identity:04d}',
                    image.camera,
                    image.modality,
                    'test' if is_test else 'train',
                )
            )
        datasets[layout] = plan, Dataset(layout, '', Records.from_rows(rows[False]), Records.from_rows(rows[True]))
    return datasets


@pytest.mark.parametrize('layout', FULL_SIZES)
def test_full_size_has_the_published_counts(full, layout):
    plan, dataset = full[layout]
    assert counts_of(dataset) == PUBLISHED_COUNTS[layout]
    expected = {'sysu_mm01': (395, 96), 'regdb': (206, 206), 'llcm': (713, 351)}[layout]
    assert tuple(len(records.identities()) for records in tables(dataset)) == expected
    assert (plan.identities, plan.test_identities) == expected
    for records, modality in itertools.product(tables(dataset), (VISIBLE, INFRARED)):
        assert records[records.modality == modality].identities() == records.identities()
    assert len({image.path for image in plan.images}) == len({image[1:] for image in plan.images})
    assert len({image.path for image in plan.images}) == len(plan.images)


def test_full_size_gives_the_reader_no_warning(tmp_path, caplog):
    plan = plan_layout('regdb', full_size=True)  # the smallest; readers do not open images
    contents = {image.path: '' for image in plan.images} | plan.lists
    for folder in {os.path.dirname(name) for name in contents}:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    assert counts_of(create_dataset('regdb', tmp_path, trial=7)) == PUBLISHED_COUNTS['regdb']
    assert not caplog.records


def test_full_size_sysu_mm01_is_the_real_one_in_every_number(full):
    plan, dataset = full['sysu_mm01']
    lists = {
        name: {int(number) for number in plan.lists[f'exp/{name}_id.txt'].split(',')}
        for name in ('train', 'val', 'test', 'available')
    }
    assert {name: (len(numbers), min(numbers), max(numbers)) for name, numbers in lists.items() if name != 'val'} == {
        'train': (296, 1, 533),
        'test': (96, 6, 333),
        'available': (491, 1, 533),
    }
    assert len(lists['val']) == 99
    val = np.isin(dataset.train.identity.astype(int), sorted(lists['val']))
    assert [int((val & (dataset.train.modality == modality)).sum()) for modality in (VISIBLE, INFRARED)] == [1974, 1980]

    # Camera: images, identities, fewest and most images per identity of the test set; then of the training set.
    for camera, expected, expected_train in (
        (1, (1374, 56, 13, 42), (4721, 194)),
        (2, (1565, 56, 18, 40), (5753, 195)),
        (3, (1883, 93, 20, 26), (5929, 293)),
        (4, (1918, 94, 20, 27), (4821, 283)),
        (5, (1918, 95, 20, 24), (4989, 294)),
        (6, (1920, 96, 20, 20), (4000, 200)),
    ):
        counts = np.unique(dataset.test.identity[dataset.test.camera == camera], return_counts=True)[1]
        total, seen, least, most = expected
        assert (counts.sum(), len(counts)) == (total, seen)
        assert least <= counts.min() <= counts.max() <= most
        train = dataset.train[(dataset.train.camera == camera) & ~val]
        assert (len(train), len(train.identities())) == expected_train
        numbers = dataset.train.identity[dataset.train.camera == camera].astype(int)
        assert camera in (3, 4, 5) or numbers.max() <= 333
    cameras = {
        name: set(dataset.test.camera[dataset.test.identity == name].tolist()) for name in dataset.test.identities()
    }
    assert sum(seen == {1, 2, 3, 4, 5, 6} for seen in cameras.values()) == 53
    assert sum(seen == {3, 4, 5, 6} for seen in cameras.values()) == 37
    assert sum(not seen & {1, 2} for seen in cameras.values()) == 40


@pytest.fixture(scope='module')
def full_tree(tmp_path_factory):
    """The full-size SYSU-MM01 on disk. Readers only list files, so folders with equal file names are links to one."""
    folder = tmp_path_factory.mktemp('full')
    root = folder / 'sysu_mm01'
    plan = plan_layout('sysu_mm01', full_size=True)
    names_in = {}
    for image in plan.images:
        inner, name = os.path.split(image.path)
        names_in.setdefault(inner, []).append(name)
    for inner, names in names_in.items():
        shared = folder / f'{names[0]} to {names[-1]}'
        if not shared.exists():
            shared.mkdir()
            for name in names:
                (shared / name).touch()
        (root / inner).parent.mkdir(parents=True, exist_ok=True)
        (root / inner).symlink_to(shared, target_is_directory=True)
    (root / 'exp').mkdir()
    for name, text in plan.lists.items():
        (root / name).write_text(text)
    write_permutations(plan, root, seed=0)
    return root


def test_cells_without_images_have_a_row_for_each_trial(full_tree):
    cameras = loadmat(full_tree / 'exp' / 'rand_perm_cam.mat')['rand_perm_cam']
    shapes = [matrix.shape for camera in cameras.flat for matrix in camera.flat]
    assert len(shapes) == 6 * 533
    assert {rows for rows, _ in shapes} == {10}
    assert (10, 0) in shapes


def test_full_size_sysu_mm01_on_disk(full, full_tree, caplog):
    dataset = create_dataset('sysu_mm01', full_tree)
    assert not caplog.records
    assert counts_of(dataset) == (22258, 11909, 6775, 3803)
    assert protocols_of(dataset) == ('all-single', 'all-multi', 'indoor-single', 'indoor-multi')
    for read, planned in zip(tables(dataset), tables(full['sysu_mm01'][1]), strict=True):
        assert set(read.path.tolist()) == {str(full_tree / path) for path in planned.path.tolist()}


@pytest.mark.parametrize('draw', ['seeded', 'official'])
@pytest.mark.parametrize(
    'protocol, gallery, valid, seen_by_camera_3',
    [
        ('all-single', 301, 3803, 245),
        ('all-multi', 3010, 3803, 2450),
        ('indoor-single', 112, 2208, 56),
        ('indoor-multi', 1120, 2208, 560),
    ],
)
def test_full_size_sysu_mm01_has_the_published_galleries(full_tree, protocol, gallery, valid, seen_by_camera_3, draw):
    dataset = create_dataset('sysu_mm01', full_tree)
    trials = draw_trials(dataset, protocol, draw)
    assert {(len(searching), len(searched)) for searching, searched in trials} == {(3803, gallery)}
    assert len({tuple(searched.tolist()) for _, searched in trials}) == 10
    trial = protocol_trials(dataset, protocol, draw)[0]
    same = dataset.test.identity[trial.query][:, None] == dataset.test.identity[trial.gallery]
    assert int((same & ~trial.ignore).any(axis=1).sum()) == valid
    of_camera_3 = ~trial.ignore[dataset.test.camera[trial.query] == 3]
    assert set(of_camera_3.sum(axis=1).tolist()) == {seen_by_camera_3}


def test_full_size_llcm_cameras(full):
    _, dataset = full['llcm']
    for records in tables(dataset):
        assert sorted(set(records.camera[records.modality == VISIBLE].tolist())) == list(range(1, 10))
        assert sorted(set(records.camera[records.modality == INFRARED].tolist())) == [1, 2, 4, 5, 6, 7, 8, 9]
