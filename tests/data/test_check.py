"""`vireid data`: what a dataset holds, and what is odd about it."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from vireid_timm.cli.main import main
from vireid_timm.data.check import check_dataset
from vireid_timm.data.readers import create_dataset

SPLITS = ('train', 'query', 'gallery')


def write(path, *, size=(16, 8), low=60, high=200, pixels=None):
    """Write noise that no other file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(path).encode()))
    Image.fromarray(rng.integers(low, high, (*size, 3), np.uint8) if pixels is None else pixels).save(path)


@pytest.fixture
def root(tmp_path):
    """A folder with nothing odd: people 0 to 3 to train on, 4 and 5 as query and gallery, two images each."""
    for split in SPLITS:
        for person in range(4) if split == 'train' else (4, 5):
            for modality, camera in (('visible', 1), ('infrared', 3)):
                for number in range(2):
                    write(tmp_path / 'mine' / split / modality / str(person) / f'c{camera}_{number}.png')
    return tmp_path / 'mine'


def person(root, split='train', modality='visible', name='0'):
    return root / split / modality / name


def test_a_sound_folder(root, capsys):
    write(person(root) / 'x.png', size=(40, 12))
    assert main(['data', str(root)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f'folder {root}'
    assert [line.split() for line in lines[2:6]] == [
        ['people', 'visible', 'infrared'],
        ['train', '4', '9', '8'],
        ['query', '2', '4', '4'],
        ['gallery', '2', '4', '4'],
    ]
    assert lines[7:] == [
        'visible: height and width 16x8 to 40x12, median 16x8; images by camera unknown: 1, 1: 16',
        'infrared: height and width 16x8 to 16x8, median 16x8; images by camera 3: 16',
        '',
        'Nothing odd.',
    ]
    assert not err


def copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def break_file(path):
    path.write_bytes(path.read_bytes()[:60])


def rename(root, old, new, modality='*'):
    for folder in list(root.glob(f'*/{modality}/{old}')):
        folder.rename(folder.with_name(new))


# What to do to a sound folder, the finding, its count, and whether it makes results meaningless.
ODD = {
    'folder': (lambda root: write(root / 'test/visible/0/x.png'), 'unknown-folder', 1, False),
    'modality': (lambda root: write(root / 'train/thermal/0/x.png'), 'unknown-folder', 1, False),
    'sub-folder': (lambda root: write(person(root) / 'monday/x.png'), 'nested-folder', 1, False),
    'suffix': (lambda root: (person(root) / 'x.HEIC').write_bytes(b''), 'unread-suffix', 1, False),
    'stray': (lambda root: write(root / 'train/x.png'), 'stray-image', 1, False),
    'empty': (lambda root: (root / 'train/visible/9').mkdir(), 'empty-folder', 1, False),
    'broken': (lambda root: break_file(person(root) / 'c1_0.png'), 'broken-image', 1, True),
    'copied within train': (
        lambda root: copy(person(root) / 'c1_0.png', person(root) / 'c1_7.png'),
        'copy',
        1,
        False,
    ),
    'copied to the gallery': (
        lambda root: copy(person(root, 'query', name='4') / 'c1_0.png', person(root, 'gallery', name='4') / 'c1_7.png'),
        'query-gallery-copy',
        1,
        True,
    ),
    'copied to the other modality': (
        lambda root: [
            copy(path, root / 'query/infrared/4' / path.name) for path in person(root, 'query', name='4').iterdir()
        ],
        'modality-copy',
        2,
        True,
    ),
    'copied to another person': (
        lambda root: copy(person(root) / 'c1_0.png', person(root, name='1') / 'c1_7.png'),
        'identity-copy',
        1,
        True,
    ),
    'trained and tested': (lambda root: rename(root, '4', '0'), 'train-test-identity', 1, True),
    'black': (lambda root: write(person(root) / 'x.png', low=0, high=4), 'dark-image', 1, False),
    'of one tone': (
        lambda root: write(person(root) / 'x.png', pixels=np.full((16, 8, 3), 90, np.uint8)),
        'dark-image',
        1,
        False,
    ),
    'mostly black': (
        lambda root: [write(path, low=0, high=4) for path in list(root.glob('*/infrared/*/*.png'))],
        'dark-image',
        16,
        True,
    ),
    'lying': (lambda root: write(person(root) / 'x.png', size=(8, 16)), 'lying-image', 1, False),
    'one modality': (lambda root: shutil.rmtree(person(root, modality='infrared')), 'one-modality', 1, False),
    'leading zero': (lambda root: rename(root, '1', '00', 'visible'), 'similar-identity', 1, False),
}


@pytest.mark.parametrize('name', ODD)
def test_odd_folders(root, name, capsys):
    change, kind, count, is_serious = ODD[name]
    change(root)
    assert main(['data', str(root), '--json']) == int(is_serious)
    out, err = capsys.readouterr()
    (finding,) = [finding for finding in json.loads(out)['findings'] if finding['kind'] == kind]
    assert (finding['count'], finding['is_serious']) == (count, is_serious)
    assert finding['message'].startswith(f'{count} ')
    assert all(example in finding['message'] for example in finding['examples'])
    assert bool(err) == is_serious
    if is_serious:
        assert f'results on this data would be meaningless: {kind}' in err
    main(['data', str(root)])
    marked = f'{"!" if is_serious else "-"} {finding["message"]}'
    assert marked in capsys.readouterr().out.splitlines()


def test_nobody_in_both_modalities(root, capsys):
    for number in range(4):
        person(root, name=str(number)).rename(person(root, name=f'visible {number}'))
    assert main(['data', str(root)]) == 1
    assert '! 8 training identities have images of one modality only: 0, 1, 2, 3, visible 0 and 3 more' in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    'names, groups',
    [
        (('1', '01', '001'), ['001 = 01 = 1']),
        (('1', '10', '100'), []),
        (('p1', 'p01', 'P 1'), ['P 1 = p01 = p1']),
        (('Anna', 'anna', 'anna2'), ['Anna = anna']),
        (('0', '00', '000a'), ['0 = 00']),
    ],
)
def test_names_that_may_be_one_person(tmp_path, names, groups):
    for name in names:
        for modality in ('visible', 'infrared'):
            write(tmp_path / 'train' / modality / name / 'x.png')
    findings = check_dataset(create_dataset('folder', tmp_path, test_share=0), workers=0, progress=False).findings
    assert [finding.examples for finding in findings if finding.kind == 'similar-identity'] == [groups][: len(groups)]


def test_an_image_in_training_and_test_under_another_name(root):
    copy(person(root) / 'c1_0.png', person(root, 'gallery', name='5') / 'c1_7.png')
    (finding,) = check_dataset(create_dataset('folder', root), progress=False).findings
    assert (finding.kind, finding.is_serious) == ('identity-copy', True)
    rename(root, '5', '0')
    kinds = {finding.kind for finding in check_dataset(create_dataset('folder', root), progress=False).findings}
    assert kinds == {'train-test-identity', 'train-test-copy'}


def test_csv_and_real_layouts(tmp_path, root, capsys):
    rows = [
        (os.path.relpath(path, root), path.parts[-2], path.name[1], path.parts[-3], path.parts[-4])
        for path in sorted(root.glob('*/*/*/*.png'))
    ]
    lines = [','.join(row) for row in [('path', 'identity', 'camera', 'modality', 'split'), *rows, rows[0]]]
    (root / 'table.csv').write_text('\n'.join(lines))
    assert main(['data', str(root / 'table.csv')]) == 0
    assert '- 1 lines of ' in capsys.readouterr().out
    assert main(['synth', str(tmp_path / 'r'), '--layout', 'regdb', '--identities', '2', '--size', '32', '16']) == 0
    capsys.readouterr()
    assert main(['data', str(tmp_path / 'r'), '--dataset', 'regdb', '--dataset-kwargs', 'trial=2', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['images']['train'] == {'visible': 20, 'infrared': 20}


def test_errors_come_after_what_explains_them(root, tmp_path, capsys):
    (root / 'train/infrared').rename(root / 'train/thermal')
    assert main(['data', str(root)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert f'{root}/train/thermal' in err.splitlines()[0]
    assert f'there is no {root}/train/infrared' in err.splitlines()[1]
    for arguments, message in (
        ([str(tmp_path / 'gone')], 'there is no folder'),
        ([str(root), '--dataset', 'synthetic'], 'takes no root folder'),
        ([str(root), '--dataset', 'market'], 'unknown dataset'),
        ([str(root), '--dataset-kwargs', 'trial=1'], 'no option'),
    ):
        assert main(['data', *arguments]) == 1
        assert message in capsys.readouterr().err
