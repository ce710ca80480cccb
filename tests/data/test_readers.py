"""The dataset readers on small folders in the real layouts, compared with what was written there."""

import logging
import os
import random

import pytest
from PIL import Image

from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data.readers import LAYOUTS, READERS, create_dataset, split_identities, synthetic_records
from vireid_timm.data.records import Records
from vireid_timm.synthvi.render import camera_numbers, render_address

SYSU_MODALITY = {1: VISIBLE, 2: VISIBLE, 3: INFRARED, 4: VISIBLE, 5: VISIBLE, 6: INFRARED}


def put(root, *names):
    """Write a tiny image under every name; readers do not decode it."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (2, 4)).save(root / name)


def text(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)


def rows_of(records):
    return list(
        zip(
            records.path.tolist(),
            records.identity.tolist(),
            records.camera.tolist(),
            records.modality.tolist(),
            records.split.tolist(),
            strict=True,
        )
    )


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture
def sysu(tmp_path):
    """(root, identity -> camera -> files): uneven, with cameras that have not seen some identities."""
    rng = random.Random(4)
    listing = {}
    for identity in (1, 7, 12, 333, 530):
        cameras = rng.sample(sorted(SYSU_MODALITY), rng.randint(4, 6))
        listing[identity] = {camera: sorted(rng.sample(range(1, 99), rng.randint(1, 4))) for camera in cameras}
        for camera, files in listing[identity].items():
            put(tmp_path, *(f'cam{camera}/{identity:04d}/{file:04d}.jpg' for file in files))
    text(tmp_path, 'exp/train_id.txt', '530,7\n')
    text(tmp_path, 'exp/val_id.txt', '1')
    text(tmp_path, 'exp/test_id.txt', '12, 333\n')
    return tmp_path, listing


def naive_sysu(root, listing, identities, split):
    return [
        (f'{root}/cam{camera}/{identity:04d}/{file:04d}.jpg', f'{identity:04d}', camera, SYSU_MODALITY[camera], split)
        for identity in sorted(identities)
        for camera in sorted(listing[identity])
        for file in listing[identity][camera]
    ]


def test_sysu_mm01(sysu):
    root, listing = sysu
    for stray in ('cam1/Thumbs.db', 'cam3/0007/Thumbs.db', 'cam3/0007/._0001.jpg', 'cam3/0007/notes.txt', 'readme.pdf'):
        text(root, stray, 'stray')
    put(root, 'cam1/0002/0001.jpg')  # an identity that no list has
    dataset = create_dataset('sysu_mm01', root)
    assert rows_of(dataset.train) == naive_sysu(root, listing, (1, 7, 530), 'train')
    assert rows_of(dataset.test) == naive_sysu(root, listing, (12, 333), 'test')
    assert (dataset.name, dataset.root, dataset.options) == ('sysu_mm01', str(root), {})


def test_sysu_mm01_warns_about_oddities(sysu, caplog):
    root, listing = sysu
    text(root, 'exp/test_id.txt', '12,333,44')
    (root / 'cam1/0044').mkdir(parents=True)
    counts = {
        modality: sum(
            len(files)
            for identity in (1, 7, 530)
            for camera, files in listing[identity].items()
            if SYSU_MODALITY[camera] == modality
        )
        for modality in (VISIBLE, INFRARED)
    }
    create_dataset('sysu_mm01', root)
    empty, unseen, differing = warnings_in(caplog)
    assert empty == f'1 folders have no image: {root}/cam1/0044'
    assert unseen == '1 of the listed test identities have no image: 0044'
    assert (
        f'{root}: image counts differ from the published sysu_mm01: training visible {counts[VISIBLE]} '
        f'(published 22,258), training infrared {counts[INFRARED]} (published 11,909)'
    ) in differing


@pytest.mark.parametrize('name', ['exp/train_id.txt', 'exp/val_id.txt', 'exp/test_id.txt', 'cam5'])
def test_sysu_mm01_without_a_part_shows_the_layout(sysu, name):
    root, _ = sysu
    os.rename(root / name, root / 'elsewhere')
    with pytest.raises(FileNotFoundError) as caught:
        create_dataset('sysu_mm01', root)
    assert f'there is no {root}/{name}' in str(caught.value)
    assert LAYOUTS['sysu_mm01'] in str(caught.value)


def test_sysu_mm01_lists_are_checked(sysu):
    root, _ = sysu
    text(root, 'exp/test_id.txt', '12,333,7')
    with pytest.raises(ValueError, match='identity 7 is listed for training and for testing'):
        create_dataset('sysu_mm01', root)
    text(root, 'exp/val_id.txt', '1;2')
    with pytest.raises(ValueError, match="exp/val_id.txt: expected one line of comma-separated numbers, got '1;2'"):
        create_dataset('sysu_mm01', root)


@pytest.fixture
def regdb(tmp_path):
    """(root, identity -> modality -> files); trial 1 trains on 1 and 3, trial 10 on 20."""
    files = {}
    for identity in (1, 3, 20):
        files[identity] = {
            VISIBLE: [f'Visible/{identity}/a male_v_{number}_{identity}.bmp' for number in range(identity % 3 + 1)],
            INFRARED: [f'Thermal/{identity}/male_t_{number}_{identity}.bmp' for number in range(2)],
        }
        put(tmp_path, *files[identity][VISIBLE], *files[identity][INFRARED])
    for trial, train in ((1, (1, 3)), (10, (20,))):
        for split, members in (('train', train), ('test', [number for number in files if number not in train])):
            for word, modality in (('visible', VISIBLE), ('thermal', INFRARED)):
                lines = [f'{file} {label}' for label, member in enumerate(members) for file in files[member][modality]]
                text(tmp_path, f'idx/{split}_{word}_{trial}.txt', '\r\n'.join(lines) + '\n\n')
    return tmp_path, files


@pytest.mark.parametrize('trial, train', [(1, (1, 3)), (10, (20,))])
def test_regdb(regdb, trial, train):
    root, files = regdb
    dataset = create_dataset('regdb', root, trial=trial)
    assert dataset.options == {'trial': trial}
    for split, records in (('train', dataset.train), ('test', dataset.test)):
        assert rows_of(records) == [
            (f'{root}/{file}', str(identity), camera, modality, split)
            for modality, camera in ((VISIBLE, 1), (INFRARED, 2))
            for identity in files
            if (identity in train) == (split == 'train')
            for file in files[identity][modality]
        ]


def test_regdb_errors(regdb):
    root, files = regdb
    with pytest.raises(ValueError, match="option 'trial' must be a whole number, got '1'"):
        create_dataset('regdb', root, trial='1')
    for trial in (0, 11):
        with pytest.raises(ValueError, match=f'RegDB has trials 1 to 10, got {trial!r}'):
            create_dataset('regdb', root, trial=trial)
    with pytest.raises(FileNotFoundError, match=r'there is no .*train_visible_2\.txt'):
        create_dataset('regdb', root, trial=2)
    gone = files[3][VISIBLE][0]
    (root / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f'train_visible_1.txt, line 3: there is no file {root}/{gone}'):
        create_dataset('regdb', root)
    text(root, 'idx/train_visible_1.txt', f'{files[1][VISIBLE][0]} 0\nVisible/1/b.bmp\n')
    with pytest.raises(ValueError, match='train_visible_1.txt, line 2: expected .*<label>'):
        create_dataset('regdb', root)


def test_llcm_below_a_folder_that_is_called_cam(tmp_path, caplog):
    root = tmp_path / 'camille' / 'cam7'
    listing = {
        'train': {
            VISIBLE: ['vis/0001/0001_c01_s185535_f7010_vis.jpg', 'vis/0004/0004_c03_s185535_f7010_vis.jpg'],
            INFRARED: ['nir/0001/0001_c09_s185535_f7010_nir.jpg', 'nir/0004/nameless_nir.jpg'],
        },
        'test': {
            VISIBLE: ['test_vis/cam3/0003/0003_c03_s1_f1_vis.jpg', 'test_vis/cam9/0003/0003_c09_s1_f2_vis.jpg'],
            INFRARED: ['test_nir/cam1/0003/0003_c01_s1_f1_nir.jpg', 'test_nir/cam1/0010/0010_c01_s1_f1_nir.jpg'],
        },
    }
    put(root, *(name for split in listing.values() for names in split.values() for name in names))
    put(root, 'test_vis/cam1/0011/0011_c01_s1_f1_vis.jpg')  # in no list
    (root / 'test_nir/cam3').mkdir()  # as in the real data
    (root / 'test_nir/.cache').mkdir()
    for word, modality in (('vis', VISIBLE), ('nir', INFRARED)):
        text(
            root,
            f'idx/train_{word}.txt',
            ''.join(f'{name} {label}\n' for label, name in enumerate(listing['train'][modality])),
        )
    text(root, 'idx/test_id.txt', '3,10')
    dataset = create_dataset('llcm', root)
    assert rows_of(dataset.train) == [
        (f'{root}/{name}', identity, camera, modality, 'train')
        for modality, identity, camera, name in [
            (VISIBLE, '0001', 1, listing['train'][VISIBLE][0]),
            (VISIBLE, '0004', 3, listing['train'][VISIBLE][1]),
            (INFRARED, '0001', 9, listing['train'][INFRARED][0]),
            (INFRARED, '0004', 0, listing['train'][INFRARED][1]),
        ]
    ]
    assert rows_of(dataset.test) == [
        (f'{root}/{name}', identity, camera, modality, 'test')
        for modality, identity, camera, name in [
            (INFRARED, '0003', 1, listing['test'][INFRARED][0]),
            (VISIBLE, '0003', 3, listing['test'][VISIBLE][0]),
            (VISIBLE, '0003', 9, listing['test'][VISIBLE][1]),
            (INFRARED, '0010', 1, listing['test'][INFRARED][1]),
        ]
    ]
    assert len(warnings_in(caplog)) == 1  # only about counts
    for name in ('test_vis', 'idx/test_id.txt', 'idx/train_nir.txt'):
        os.rename(root / name, root / 'away')
        with pytest.raises(FileNotFoundError, match=f'there is no {root}/{name}; dataset .llcm. expects'):
            create_dataset('llcm', root)
        os.rename(root / 'away', root / name)


def put_people(root, split, visible, infrared):
    names = [
        f'{split}/{modality}/{person}/c{number + 1}_{number}.jpg'
        for modality, people in ((VISIBLE, visible), (INFRARED, infrared))
        for person in people
        for number in range(2)
    ]
    put(root, *names)
    return [
        (f'{root}/{name}', name.split('/')[2], int(name.split('/')[3][1]), name.split('/')[1], split) for name in names
    ]


def test_folder_with_query_and_gallery(tmp_path):
    expected = {
        split: put_people(tmp_path, split, visible, infrared)
        for split, visible, infrared in (
            ('train', ['anna', 'ben'], ['anna', 'ben']),
            ('query', [], ['carl']),
            ('gallery', ['carl', 'dora'], []),
        )
    }
    dataset = create_dataset('folder', tmp_path)
    assert rows_of(dataset.train) == expected['train']
    assert rows_of(dataset.test) == expected['query'] + expected['gallery']
    assert dataset.options == {}


@pytest.mark.parametrize(
    'file, camera',
    [
        ('c3_x.jpg', 3),
        ('cam12_x.PNG', 12),
        ('C007_x.tiff', 7),
        ('c_x.jpg', 0),
        ('x_c3_.bmp', 0),
        ('c3.jpg', 0),
        ('cats3_x.webp', 0),
    ],
)
def test_folder_reads_the_camera_from_the_name(tmp_path, file, camera):
    for modality in (VISIBLE, INFRARED):
        put(tmp_path, *(f'train/{modality}/{person}/{file}' for person in 'abcd'))
    dataset = create_dataset('folder', tmp_path, test_share=0)
    assert dataset.train.camera.tolist() == [camera] * 8
    assert len(dataset.test) == 0


def test_folder_without_gallery_holds_identities_out(tmp_path):
    people = [f'person {number}' for number in range(10, 30)]
    rows = put_people(tmp_path, 'train', people, people)
    dataset = create_dataset('folder', tmp_path, test_share=0.3, seed=5)
    held_out = set(dataset.test.identity.tolist())
    assert len(held_out) == 6
    assert rows_of(dataset.train) == [row for row in rows if row[1] not in held_out]
    assert rows_of(dataset.test) == [(*row[:4], 'test') for row in rows if row[1] in held_out]
    assert dataset.options == {'test_share': 0.3, 'seed': 5}
    assert set(create_dataset('folder', tmp_path, test_share=0.3, seed=6).test.identity.tolist()) != held_out


def test_folder_for_testing_only(tmp_path):
    rows = put_people(tmp_path, 'query', [], ['a', 'b']) + put_people(tmp_path, 'gallery', ['a', 'b'], [])
    dataset = create_dataset('folder', tmp_path)
    assert len(dataset.train) == 0
    assert rows_of(dataset.test) == rows


def test_folder_warns_about_oddities(tmp_path, caplog):
    put_people(tmp_path, 'train', 'abcdef', 'abcdx')
    (tmp_path / 'train/visible/nobody').mkdir()
    text(tmp_path, 'train/infrared/nobody/Thumbs.db', '')
    put_people(tmp_path, 'query', 'a', [])
    put_people(tmp_path, 'gallery', [], 'a')
    create_dataset('folder', tmp_path)
    assert warnings_in(caplog) == [
        f'2 folders have no image: {tmp_path}/train/visible/nobody, {tmp_path}/train/infrared/nobody',
        '1 identities are in both the training and the test set, which inflates the result: a',
    ]


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no .*train/visible; dataset .folder. expects'):
        create_dataset('folder', tmp_path)
    put_people(tmp_path, 'train', 'ab', [])
    with pytest.raises(FileNotFoundError, match='there is no .*train/infrared'):
        create_dataset('folder', tmp_path)
    put_people(tmp_path, 'train', [], 'abc')
    with pytest.raises(ValueError, match='cannot hold out 0.2 of the 2 identities .* a share of 0 '):
        create_dataset('folder', tmp_path)
    (tmp_path / 'query').mkdir()
    with pytest.raises(ValueError, match='has a folder query but no gallery'):
        create_dataset('folder', tmp_path)
    put_people(tmp_path, 'gallery', 'a', [])
    with pytest.raises(ValueError, match='query has no image'):
        create_dataset('folder', tmp_path)


def test_folder_without_any_image(tmp_path):
    for modality in (VISIBLE, INFRARED):
        (tmp_path / 'train' / modality).mkdir(parents=True)
    with pytest.raises(ValueError, match=f'{tmp_path} has no image; expected:'):
        create_dataset('folder', tmp_path, test_share=0)


def put_market(root, split, modality, *names):
    put(root, *(f'{split}/{modality}/{name}' for name in names))


def test_market_names(tmp_path, caplog):
    people = ['0002_c1s1_000151_01.jpg', '0002_c11s3_7.png', '0007_c2s1_000151_00.jpg', '1501_c6.jpg']
    for split in ('train', 'query', 'gallery'):
        for modality in (VISIBLE, INFRARED):
            number = 'train query gallery'.split().index(split) * 2000
            names = [f'{int(name[:4]) + number:04d}{name[4:]}' for name in people]
            put_market(tmp_path, split, modality, *names, '-1_c1s1_000401_03.jpg', '0000_c3s1_1.jpg', '00_c3s1_1.jpg')
    dataset = create_dataset('folder', tmp_path, names='market')
    for split, table in (('train', dataset.train), ('query', dataset.test), ('gallery', dataset.test)):
        expected = []
        for modality in (VISIBLE, INFRARED):
            for path in sorted((tmp_path / split / modality).iterdir()):
                identity, rest = path.name.split('_c')
                if int(identity) > 0 or int(identity) == 0 and split == 'gallery':
                    camera = {'1': 11 if rest.startswith('11') else 1}.get(rest[0], int(rest[0]))
                    expected.append((str(path), identity, camera, modality, split))
        assert rows_of(table[table.split == split]) == expected
    assert dataset.options == {'names': 'market'}
    assert [(finding.kind, finding.count) for finding in dataset.findings] == [('junk-image', 6), ('distractor', 8)]
    assert [message.partition(':')[0] for message in warnings_in(caplog)] == [
        '6 images are junk (identity -1) and are left out',
        '8 images show nobody in particular (identity 0) and are left out',
    ]


def test_market_names_may_hold_people_out(tmp_path):
    for modality in (VISIBLE, INFRARED):
        put_market(
            tmp_path, 'train', modality, *(f'{person:04d}_c1s1_{n}.jpg' for person in range(6) for n in range(2))
        )
    dataset = create_dataset('folder', tmp_path, names='market', test_share=0.4, seed=3)
    assert dataset.options == {'test_share': 0.4, 'seed': 3, 'names': 'market'}
    assert len(dataset.test.identities()) == 2
    assert sorted(dataset.train.identities() + dataset.test.identities()) == [f'{n:04d}' for n in range(1, 6)]


def test_market_names_are_never_guessed(tmp_path, caplog):
    for modality in (VISIBLE, INFRARED):
        put_market(tmp_path, 'train', modality, '0001_c1s1_1.jpg', '0002_c1s1_1.jpg')
    with pytest.raises(ValueError, match='has no image; expected:(?s:.*)names=market'):
        create_dataset('folder', tmp_path, test_share=0)
    assert '4 images are not in the folder of a person' in caplog.text
    with pytest.raises(ValueError, match="unknown names 'markt'; expected one of folders, market"):
        create_dataset('folder', tmp_path, names='markt')
    put_market(tmp_path, 'train', VISIBLE, 'anna.jpg', 'c3_1.jpg')
    with pytest.raises(ValueError, match='names such as 0001_c1s1_000151_01.jpg .*, but 2 are not: anna.jpg, c3_1.jpg'):
        create_dataset('folder', tmp_path, names='market')
    put_market(tmp_path, 'train', VISIBLE, 'ben/0001_c1s1_1.jpg')
    with pytest.raises(ValueError, match=r'has folders \(ben\), but names=market'):
        create_dataset('folder', tmp_path, names='market')


def write_csv(root, *lines, header='path,identity,camera,modality,split'):
    text(root, 'table.csv', '\n'.join([header, *lines, '']))
    return root / 'table.csv'


def test_csv(tmp_path, caplog):
    put(tmp_path, 'a.jpg', 'b.jpg', 'deep/c, d.jpg', 'e.jpg', 'f.jpg')
    table = write_csv(
        tmp_path,
        'a.jpg,anna,3,visible,train,hat',
        f'{tmp_path}/b.jpg,anna,,infrared,train,',
        '"deep/c, d.jpg",007, 2,visible,gallery,',
        'e.jpg,007,2,infrared,query,',
        '',
        'f.jpg,ben,1,infrared,test,',
        './e.jpg,007,2,infrared,gallery,',
        'e.jpg,007,2,infrared,query,',
        'a.jpg,anna,3,visible,train,again',
        header='\ufeffpath,identity,camera,modality,split,remark',
    )
    dataset = create_dataset('csv', str(table))
    assert rows_of(dataset.train) == [
        (f'{tmp_path}/a.jpg', 'anna', 3, VISIBLE, 'train'),
        (f'{tmp_path}/b.jpg', 'anna', 0, INFRARED, 'train'),
    ]
    assert rows_of(dataset.test) == [
        (f'{tmp_path}/deep/c, d.jpg', '007', 2, VISIBLE, 'gallery'),
        (f'{tmp_path}/e.jpg', '007', 2, INFRARED, 'test'),
        (f'{tmp_path}/f.jpg', 'ben', 1, INFRARED, 'test'),
    ]
    assert warnings_in(caplog) == [f'1 lines of {table} repeat an image and count once: {tmp_path}/a.jpg']


def test_csv_next_to_its_images(tmp_path, monkeypatch):
    put(tmp_path, 'a.jpg')
    write_csv(tmp_path, 'a.jpg,anna,1,visible,test')
    monkeypatch.chdir(tmp_path)
    assert rows_of(create_dataset('csv', 'table.csv').test) == [('a.jpg', 'anna', 1, VISIBLE, 'test')]


def test_csv_numbers_cameras_that_have_names(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    put(tmp_path, *(f'{number}.jpg' for number in range(4)))
    table = write_csv(
        tmp_path,
        *(f'{number}.jpg,anna,{camera},visible,train' for number, camera in enumerate(('yard', '', 'door', '7'))),
    )
    assert create_dataset('csv', table).train.camera.tolist() == [3, 0, 2, 1]
    assert f'{table}: cameras are numbered 7=1, door=2, yard=3' in caplog.text


@pytest.mark.parametrize(
    'lines, message',
    [
        (['a.jpg,anna,1,visible,train', 'gone.jpg,anna,1,visible,train'], 'line 3: there is no file .*gone.jpg'),
        (['a.jpg,anna,1,thermal,train'], "line 2: unknown modality 'thermal'; expected one of visible, infrared"),
        (['a.jpg,anna,1,visible,val'], "line 2: unknown split 'val'; expected one of train, query, gallery, test"),
        (['a.jpg,,1,visible,train'], 'line 2: the identity is empty'),
        (['a.jpg,anna,1,visible'], 'line 2: expected 5 values'),
        (['a.jpg,anna,1,visible,train,x'], 'line 2: expected 5 values'),
        (['a.jpg,anna,1,visible,query'], 'lists query images but no gallery'),
        (['a.jpg,anna,1,visible,gallery'], 'lists gallery images but no query'),
        (['a.jpg,anna,1,visible,train', 'a.jpg,anna,1,visible,test'], 'lines 2 and 3: .*for training and for testing'),
        (['a.jpg,anna,1,visible,test', 'a.jpg,anna,2,visible,test'], 'lines 2 and 3: .*different identities, cameras'),
        ([], 'has no image'),
    ],
)
def test_csv_errors(tmp_path, lines, message):
    put(tmp_path, 'a.jpg')
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        create_dataset('csv', write_csv(tmp_path, *lines))
    assert 'table.csv' in str(caught.value)


def test_csv_without_a_column(tmp_path):
    table = write_csv(tmp_path, 'a.jpg,anna,visible', header='path,identity,modality')
    with pytest.raises(ValueError, match='the first line lacks split; expected:'):
        create_dataset('csv', table)
    table.write_text('')
    with pytest.raises(ValueError, match='lacks path, identity'):
        create_dataset('csv', table)


def test_synthetic():
    dataset = create_dataset(
        'synthetic',
        identities=5,
        test_identities=3,
        seed=2,
        spectrum='thermal',
        size=[64, 32],
        images_per_modality=2,
        visible_cameras=3,
        infrared_cameras=2,
        first_camera=11,
        first_identity=40,
    )
    settings = {
        'seed': 2,
        'spectrum': 'thermal',
        'size': (64, 32),
        'images_per_modality': 2,
        'visible_cameras': 3,
        'infrared_cameras': 2,
        'first_camera': 11,
    }
    assert rows_of(dataset.train) == rows_of(synthetic_records(range(40, 45), split='train', **settings))
    assert rows_of(dataset.test) == rows_of(synthetic_records(range(45, 48), split='test', **settings))
    assert len(dataset.train) == 5 * 2 * 2
    assert set(dataset.train.camera.tolist()) <= {number for kind in camera_numbers(3, 2, 11) for number in kind}
    assert dataset.options == settings | {'identities': 5, 'test_identities': 3, 'first_identity': 40}
    assert (dataset.name, dataset.root) == ('synthetic', '')
    assert render_address(dataset.test.path[0]).shape == (64, 32, 3)


def test_synthetic_errors():
    with pytest.raises(ValueError, match='identities must be at least 0, got -1'):
        create_dataset('synthetic', identities=-1)
    with pytest.raises(ValueError, match="takes no root folder, got '/somewhere'"):
        create_dataset('synthetic', '/somewhere')
    with pytest.raises(ValueError, match='synthetic has no image'):
        create_dataset('synthetic', identities=0, test_identities=0)


def test_unknown_names(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown dataset 'sysu' \(did you mean 'sysu_mm01'\?\); available: buptcampus, csv, fo"
    ):
        create_dataset('sysu', tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'market1501'; available"):
        create_dataset('market1501', tmp_path)
    with pytest.raises(ValueError, match=r"'regdb' has no option 'trail' \(did you mean 'trial'\?\); its options: tri"):
        create_dataset('regdb', tmp_path, trail=2)
    with pytest.raises(ValueError, match="'llcm' has no option 'seed'; its options: none"):
        create_dataset('llcm', tmp_path, seed=2)


@pytest.mark.parametrize('name', sorted(set(READERS) - {'synthetic'}))
def test_missing_root_shows_the_layout(tmp_path, name):
    for root, error in ((None, ValueError), ('', ValueError), (tmp_path / 'gone', FileNotFoundError)):
        with pytest.raises(error) as caught:
            create_dataset(name, root)
        assert LAYOUTS[name] in str(caught.value)


def records_of(visible, infrared):
    return Records.from_rows(
        [
            (f'{modality} {name} {number}', name, 1, modality, 'train')
            for number in range(2)
            for modality, names in ((VISIBLE, visible), (INFRARED, infrared))
            for name in names
        ]
    )


@pytest.mark.parametrize('share, count', [(0, 0), (0.01, 2), (0.2, 2), (0.5, 5), (0.8, 8)])
def test_split_identities(share, count):
    records = records_of('abcdefghijxy', 'abcdefghijz')
    state = random.getstate()
    kept, held_out = split_identities(records, share, 3)
    assert random.getstate() == state
    names = set(held_out.identity.tolist())
    assert len(names) == count
    assert names <= set('abcdefghij')
    assert rows_of(kept) == [row for row in rows_of(records) if row[1] not in names]
    assert rows_of(held_out) == [(*row[:4], 'test') for row in rows_of(records) if row[1] in names]
    shuffled = records[random.Random(1).sample(range(len(records)), len(records))]
    assert set(split_identities(shuffled, share, 3)[1].identity.tolist()) == names


def test_every_identity_may_be_held_out():
    records = records_of('abcdef', 'abcdef')
    chosen = {name for seed in range(30) for name in split_identities(records, 0.4, seed)[1].identity.tolist()}
    assert chosen == set('abcdef')


@pytest.mark.parametrize('share', [-0.1, 1, 1.5])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match=f'at least 0 and less than 1, got {share}'):
        split_identities(records_of('abcd', 'abcd'), share, 0)


@pytest.mark.parametrize(
    'visible, infrared, share', [('abc', 'abc', 0.1), ('abcdef', 'abc', 0.1), ('', '', 0.5), ('abcdef', 'abcdef', 0.9)]
)
def test_too_few_identities_to_hold_out(visible, infrared, share):
    with pytest.raises(ValueError, match='cannot hold out .* of the . identities'):
        split_identities(records_of(visible, infrared), share, 0)
    assert len(split_identities(records_of(visible, infrared), 0, 0)[1]) == 0


UNREAD = 'files are ignored for their suffix'


def kinds_of(dataset):
    return {finding.kind: finding.count for finding in dataset.findings}


def test_folder_counts_what_it_ignores(tmp_path, caplog):
    put_people(tmp_path, 'train', 'abcdef', 'abcdef')
    put(
        tmp_path,
        *(f'{split}/visible/a/0.jpg' for split in ('test', 'val', '.hidden')),
        *(f'train/{modality}/a/0.jpg' for modality in ('thermal', 'ir', 'Infrared')),
        'train/visible/a/monday/1.jpg',
        'train/infrared/b/monday/.hidden/1.jpg',
        *('0.jpg', 'train/0.JPG', 'train/visible/0.png', 'test/0.jpg'),
    )
    for name in ('a/0.heic', 'a/1.HEIC', 'b/notes.txt', 'b/noname', 'b/Thumbs.db', 'b/.DS_Store'):
        text(tmp_path, f'train/infrared/{name}', '')
    dataset = create_dataset('folder', tmp_path)
    assert len(dataset.train) + len(dataset.test) == 24
    assert [finding.message for finding in dataset.findings] == warnings_in(caplog)
    counted = [(finding.kind, finding.count) for finding in dataset.findings]
    assert sorted(counted) == [
        ('nested-folder', 2),
        ('stray-image', 3),
        ('unknown-folder', 2),
        ('unknown-folder', 3),
        ('unread-suffix', 4),
    ]
    said = ' | '.join(warnings_in(caplog))
    assert (
        '2 folders are ignored because they are not named train, query or gallery: '
        f'{tmp_path}/test, {tmp_path}/val' in said
    )
    assert (
        '3 folders are ignored because they are not named visible or infrared: '
        f'{tmp_path}/train/Infrared, {tmp_path}/train/ir, {tmp_path}/train/thermal' in said
    )
    assert f'2 folders inside the folder of a person are ignored: {tmp_path}/train/visible/a/monday, ' in said
    assert f'4 {UNREAD} (.heic: 2, ' in said
    assert 'none: 1' in said
    assert 'read are .apng ' in said
    assert 'pip install pillow-heif' in said


def test_folder_reports_what_it_ignored_before_an_error(tmp_path, caplog):
    put(tmp_path, 'train/visible/a/0.jpg', 'train/thermal/a/0.jpg', 'query/rgb/a/0.jpg', 'gallery/visible/a/0.jpg')
    with pytest.raises(FileNotFoundError, match='train/infrared'):
        create_dataset('folder', tmp_path)
    os.rename(tmp_path / 'train', tmp_path / 'test')
    with pytest.raises(ValueError, match='query has no image'):
        create_dataset('folder', tmp_path)
    assert f'{tmp_path}/query/rgb' in caplog.text
    assert f'{tmp_path}/test' in caplog.text


@pytest.mark.parametrize('suffix', ['jfif', 'JFIF', 'jpe', 'JpG', 'dib', 'pbm', 'apng', 'j2k', 'mpo'])
def test_every_suffix_of_a_format_is_read(tmp_path, suffix):
    put_people(tmp_path, 'train', 'abcd', 'abcd')
    text(tmp_path, f'train/visible/a/x.{suffix}', '')
    dataset = create_dataset('folder', tmp_path, test_share=0)
    assert f'{tmp_path}/train/visible/a/x.{suffix}' in dataset.train.path
    assert not dataset.findings


@pytest.mark.parametrize('suffix', ['eps', 'heic', 'heif', 'mp4', 'jpg~', 'pdf'])
def test_other_suffixes_are_counted(tmp_path, sysu, suffix):
    root, listing = sysu
    camera = next(iter(listing[7]))
    text(root, f'cam{camera}/0007/x.{suffix}', '')
    assert kinds_of(create_dataset('sysu_mm01', root))['unread-suffix'] == 1


def test_a_dangling_link_is_kept_and_a_pipe_is_not(tmp_path):
    put_people(tmp_path, 'train', 'abcd', 'abcd')
    (tmp_path / 'train/visible/a/link.jpg').symlink_to('gone.jpg')
    os.mkfifo(tmp_path / 'train/visible/a/pipe.jpg')
    dataset = create_dataset('folder', tmp_path, test_share=0)
    assert f'{tmp_path}/train/visible/a/link.jpg' in dataset.train.path
    assert kinds_of(dataset) == {'unread-suffix': 1}


@pytest.mark.parametrize('name', ['CAM1', 'camera1', 'cam', 'cam1b'])
def test_llcm_names_other_camera_folders(tmp_path, name, caplog):
    put(tmp_path, 'vis/0001/0001_c01_.jpg', 'nir/0001/0001_c01_.jpg')
    put(tmp_path, 'test_vis/cam3/0003/a.jpg', 'test_nir/cam1/0003/a.jpg', f'test_nir/{name}/0003/a.jpg')
    for word in ('vis', 'nir'):
        text(tmp_path, f'idx/train_{word}.txt', f'{word}/0001/0001_c01_.jpg 0\n')
    text(tmp_path, 'idx/test_id.txt', '3')
    assert len(create_dataset('llcm', tmp_path).test) == 2
    assert f'1 folders are ignored because they are not named cam<number>: {tmp_path}/test_nir/{name}' in caplog.text


ROWS = [
    ('images/a.jpg', 'anna', '1', 'visible', 'train'),
    ('images/b.jpg', 'José', '2', 'infrared', 'train'),
    ('images/c.jpg', 'carl', '10', 'infrared', 'query'),
    ('images/d.jpg', 'carl', '', 'visible', 'gallery'),
]
HEADER = ('path', 'identity', 'camera', 'modality', 'split')


def csv_text(separator=',', header=HEADER, change=lambda row: row):
    return ''.join(separator.join(row) + '\n' for row in (header, *map(change, ROWS)))


def with_camera(change):
    return csv_text(change=lambda row: (*row[:2], change(row[2]), *row[3:]))


CSV_FORMS = {
    'tab': csv_text('\t'),
    'semicolon': csv_text(';'),
    'spaces': csv_text(' , '),
    'old line ends': csv_text().replace('\n', '\r'),
    'windows line ends': csv_text().replace('\n', '\r\n'),
    'byte order mark': '\ufeff' + csv_text(';'),
    'header': csv_text(header=(' Path', 'IDENTITY', 'Camera ', 'Modality', ' Split ')),
    'values': csv_text(change=lambda row: (*row[:3], row[3].upper(), row[4].title())),
    'floats': with_camera(lambda camera: f'{camera}.0' if camera else 'nan'),
    'pandas': with_camera(lambda camera: camera or '<NA>'),
    'backslashes': csv_text(change=lambda row: (row[0].replace('/', '\\'), *row[1:])),
    'quotes': csv_text('","').replace('\n', '"\n"').join('""').removesuffix('""'),
}


@pytest.mark.parametrize('form', CSV_FORMS)
def test_csv_of_every_tool(tmp_path, form, caplog):
    put(tmp_path, *(row[0] for row in ROWS))
    (tmp_path / 'table.csv').write_bytes(CSV_FORMS[form].encode())
    dataset = create_dataset('csv', tmp_path / 'table.csv')
    rows = [(f'{tmp_path}/{row[0]}', row[1], int(row[2] or 0), *row[3:]) for row in ROWS]
    assert rows_of(dataset.train) + rows_of(dataset.test) == rows
    assert not warnings_in(caplog)


@pytest.mark.parametrize('missing', ['nan', 'NaN', 'None', 'null', 'NA', 'n/a', '', None])
def test_csv_without_cameras(tmp_path, missing):
    put(tmp_path, *(row[0] for row in ROWS))
    content = with_camera(lambda camera: missing or '')
    if missing is None:
        content = csv_text(header=(*HEADER[:2], *HEADER[3:]), change=lambda row: (*row[:2], *row[3:]))
    text(tmp_path, 'table.csv', content)
    dataset = create_dataset('csv', tmp_path / 'table.csv')
    assert dataset.train.camera.tolist() + dataset.test.camera.tolist() == [0, 0, 0, 0]


def test_csv_takes_serial_numbers_as_names(tmp_path):
    put(tmp_path, *(row[0] for row in ROWS))
    text(tmp_path, 'table.csv', with_camera(lambda camera: f'8949022000007452153{camera or 0}'))
    dataset = create_dataset('csv', tmp_path / 'table.csv')
    assert dataset.train.camera.tolist() + dataset.test.camera.tolist() == [2, 4, 3, 1]


@pytest.mark.parametrize(
    'lines, message',
    [
        (['"a.jpg,anna,1,visible,train', 'a.jpg,anna,1,visible,train'], 'table.csv, line 2: a value has several lines'),
        (['a.jpg,"anna,1,visible,train', *['a.jpg,anna,1,visible,train'] * 6000], 'line 2: a quote is not closed'),
        (['a.jpg,nan,1,visible,train'], r'line 2: the identity is missing \(nan\)'),
        (['a.jpg,,1,visible,train'] * 8, 'has 8 wrong lines: line 2: .*; line 3: .* and 3 more'),
        (['a.jpg,,1,visible,train', 'a.jpg,x,1,visible', 'x.jpg,x,1,visible,train'], 'has 3 wrong lines: .*; line 4: '),
        (
            ['a.jpg,a,1,visible,train', *['a.jpg,b,1,visible,train'] * 2],
            'has 2 wrong lines: lines 2 and 3: .*; lines 2',
        ),
    ],
)
def test_csv_counts_wrong_lines(tmp_path, lines, message):
    put(tmp_path, 'a.jpg')
    with pytest.raises(ValueError, match=message):
        create_dataset('csv', write_csv(tmp_path, *lines))


def test_csv_knows_an_image_by_any_path(tmp_path, monkeypatch):
    put(tmp_path, 'a.jpg')
    (tmp_path / 'link').symlink_to(tmp_path)
    (tmp_path / 'link.jpg').symlink_to('a.jpg')
    monkeypatch.chdir(tmp_path)
    names = ['a.jpg', f'{tmp_path}/a.jpg', 'link/a.jpg', 'link.jpg', '../' + tmp_path.name + '/a.jpg']
    table = write_csv(tmp_path, *(f'{name},anna,1,visible,test' for name in names))
    dataset = create_dataset('csv', 'table.csv')
    assert dataset.test.path.tolist() == ['a.jpg']
    assert [(finding.kind, finding.count) for finding in dataset.findings] == [('repeated-line', 4)]
    write_csv(tmp_path, 'a.jpg,anna,1,visible,train', f'{tmp_path}/a.jpg,anna,1,visible,test')
    with pytest.raises(ValueError, match='for training and for testing'):
        create_dataset('csv', table)


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-32', 'latin-1', 'gbk'])
@pytest.mark.parametrize('name', ['csv', 'sysu_mm01', 'regdb'])
def test_other_encodings_name_the_file(sysu, regdb, encoding, name):
    root = sysu[0]
    file = {'csv': 'table.csv', 'sysu_mm01': 'exp/val_id.txt', 'regdb': 'idx/test_visible_1.txt'}[name]
    (root / file).write_bytes('path,1\n张,2'.encode(encoding, 'replace').replace(b'?', b'\xe9'))
    with pytest.raises(ValueError, match=rf'{root}/{file}, line \d: this is not UTF-8 text; save the file as UTF-8'):
        create_dataset(name, root / file if name == 'csv' else root)


def test_lists_may_have_a_byte_order_mark(sysu, regdb):
    root = sysu[0]
    before = {name: create_dataset(name, root) for name in ('sysu_mm01', 'regdb')}
    for file in (root / 'exp').iterdir():
        file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes())
    for file in (root / 'idx').iterdir():
        file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes().replace(b'/', b'\\'))
    for name, dataset in before.items():
        again = create_dataset(name, root)
        assert rows_of(again.train) + rows_of(again.test) == rows_of(dataset.train) + rows_of(dataset.test)


def test_a_line_twice_in_a_list_counts_once(regdb, caplog):
    root, _ = regdb
    before = rows_of(create_dataset('regdb', root).test)
    file = root / 'idx/test_visible_1.txt'
    file.write_bytes(file.read_bytes() * 2)
    dataset = create_dataset('regdb', root)
    assert rows_of(dataset.test) == before
    assert f'3 lines of {file} repeat an image and count once: Visible/20/' in caplog.text
    assert kinds_of(dataset) == {'repeated-line': 3}


def test_lists_count_wrong_lines(regdb):
    root, files = regdb
    for name in files[1][VISIBLE]:
        (root / name).unlink()
    text(root, 'idx/train_thermal_1.txt', 'nonsense\n' * 7)
    with pytest.raises(FileNotFoundError, match='train_visible_1.txt has 2 wrong lines: line 1: there is no file'):
        create_dataset('regdb', root)
    text(root, 'idx/train_visible_1.txt', '')
    with pytest.raises(ValueError, match='train_thermal_1.txt has 7 wrong lines: line 1: expected .* and 2 more'):
        create_dataset('regdb', root)


@pytest.mark.parametrize(
    'file', ['train/visible/a/c12345678901234567890_x.jpg', 'train/infrared/a/CAM1234567890123456789_.png']
)
def test_overlong_camera_numbers_name_the_file(tmp_path, file):
    put_people(tmp_path, 'train', 'abcd', 'abcd')
    put(tmp_path, file)
    with pytest.raises(ValueError, match=f'{file}: the camera number 1234567890123456789.? has more than 18 digits'):
        create_dataset('folder', tmp_path)
