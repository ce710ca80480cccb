"""The readers of tracklets, on rendered and on hand-made trees, compared with a slow reading of the same files."""

import json
import logging
import math
import re
import shutil

import numpy as np
import pytest

from vireid_timm.cli.main import main
from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data.layouts import write_layout
from vireid_timm.data.readers import create_dataset
from vireid_timm.data.records import Records
from vireid_timm.data.video import evenly_spaced, first_of_parts


@pytest.fixture(scope='module')
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp('video')
    for layout in ('hitsz_vcm', 'buptcampus'):
        write_layout(folder / layout, layout, identities=2, test_identities=2, size=(32, 16), workers=0)
    return folder


def copy_of(root, target):
    """Copy the lists, to be spoiled, and link to the folders of images."""
    shutil.copytree(root, target, ignore=lambda folder, names: {'Train', 'Test', 'DATA'} & set(names))
    for name in {'Train', 'Test', 'DATA'} & {path.name for path in root.iterdir()}:
        (target / name).symlink_to(root / name)
    return target


def tracklets_of(records):
    """Number -> identity, camera, modality, split, and paths."""
    found = {}
    for row in range(len(records)):
        facts = tuple(getattr(records, name)[row] for name in ('identity', 'camera', 'modality', 'split'))
        known, paths = found.setdefault(int(records.tracklet[row]), (facts, []))
        assert known == facts
        paths.append(str(records.path[row]))
    return found


def warnings_in(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and 'published' not in record.getMessage()
    ]


def edit(path, pattern, text):
    content, count = re.subn(pattern, text, path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(content)


@pytest.mark.parametrize('frames', [0, 1, 5, 6, 100])
def test_hitsz_vcm_is_what_its_lists_say(trees, frames):
    root = trees / 'hitsz_vcm'
    dataset = create_dataset('hitsz_vcm', root, frames=frames)
    assert dataset.options == {'frames': frames} and not dataset.findings
    for split, records in (('train', dataset.train), ('test', dataset.test)):
        names = (root / f'info/{split}_name.txt').read_text().split()
        expected = {}
        for number, line in enumerate((root / f'info/track_{split}_info.txt').read_text().splitlines(), 1):
            kind, first, last, identity, camera = map(int, line.split())
            paths = []
            for name in names[first - 1 : last]:
                word = 'ir' if name[5] == '1' else 'rgb'
                place = name[name.index('D') : name.index('T')]
                paths.append(f'{root}/{split.capitalize()}/{name[:4]}/{word}/{place}/{name[name.index("F") + 1 :]}')
            if frames:
                step = math.ceil(len(paths) / frames)
                padded = paths + [paths[-1]] * (step * frames)
                paths = list(dict.fromkeys(padded[part * step] for part in range(frames)))
            facts = (f'{identity:04d}', camera, INFRARED if kind == 1 else VISIBLE, split)
            expected[number] = (facts, paths)
        assert tracklets_of(records) == expected


@pytest.mark.parametrize('frames', [0, 1, 7, 10, 100])
def test_buptcampus_is_what_its_lists_say(trees, frames):
    root = trees / 'buptcampus'
    dataset = create_dataset('buptcampus', root, frames=frames)
    assert dataset.options == {'frames': frames} and not dataset.findings
    paths_of = json.loads((root / 'data_paths.json').read_text())
    numbers = {'LS3': 1, 'G25': 2, 'CQ1': 3, 'W4': 4, 'TSG1': 5, 'TSG2': 6}
    for splits, records in ((('train',), dataset.train), (('query', 'gallery'), dataset.test)):
        expected = []
        for split in splits:
            for line in (root / f'{split}.txt').read_text().splitlines():
                identity, words, camera, tracklet = line.split(' ')
                for word in sorted(words.split('/'), reverse=True):
                    paths = [f'{root}/DATA/{path}' for path in paths_of[identity][word][camera][tracklet]]
                    if frames:
                        taken = np.linspace(0, len(paths), frames, endpoint=False, dtype=int)
                        paths = list(dict.fromkeys(paths[place] for place in taken))
                    modality = {'RGB': VISIBLE, 'IR': INFRARED}[word]
                    expected.append(((identity, numbers[camera], modality, split), paths))
        assert tracklets_of(records) == dict(enumerate(expected, 1))


def test_images_are_taken_as_by_the_owners():
    for length in range(1, 90):
        assert evenly_spaced(length, 0) == first_of_parts(length, 0) == list(range(length))
        for frames in (1, 2, 6, 10, 12):
            spaced = np.linspace(0, length, frames, endpoint=False, dtype=int).tolist()
            assert evenly_spaced(length, frames) == sorted(set(spaced))
            step = math.ceil(length / frames)
            padded = [*range(length), *[length - 1] * (step * frames - length)]
            assert first_of_parts(length, frames) == sorted(set(padded[::step]))
    assert first_of_parts(13, 6) == [0, 3, 6, 9, 12]


def test_hitsz_vcm_counts_what_is_odd(trees, tmp_path, caplog):
    root = copy_of(trees / 'hitsz_vcm', tmp_path / 'data')
    edit(root / 'info/track_test_info.txt', r'^2 1 \d+ ', '2 1 11 ')
    names = (root / 'info/test_name.txt').read_text().split()
    start = int((root / 'info/track_test_info.txt').read_text().splitlines()[-1].split()[1])
    names[start] = names[start].replace('0004M', '0003M')  # the second image, which is not among the six
    (root / 'info/test_name.txt').write_text('\n'.join(names))
    edit(root / 'info/query_IDX.txt', r'^3 ', '1 ')
    dataset = create_dataset('hitsz_vcm', root)
    assert dataset.test.num_tracklets() == 2 * 4 - 1
    assert [(finding.kind, finding.count, finding.examples) for finding in dataset.findings] == [
        ('short-tracklet', 1, ['line 1']),
        ('mixed-tracklet', 1, ['line 8']),
        ('query-list', 2, ['line 1', 'line 3']),
    ]
    assert len(warnings_in(caplog)) == 3


def test_hitsz_vcm_may_have_all_identities_in_one_folder(trees, tmp_path):
    root = copy_of(trees / 'hitsz_vcm', tmp_path / 'data')
    expected = create_dataset('hitsz_vcm', root)
    for split in ('Train', 'Test'):
        for person in list((root / split).iterdir()):
            (root / person.name).symlink_to(person.resolve())
        (root / split).unlink()
    dataset = create_dataset('hitsz_vcm', root)
    for table, other in ((dataset.train, expected.train), (dataset.test, expected.test)):
        paths = [path.replace('/Train/', '/').replace('/Test/', '/') for path in other.path.tolist()]
        assert table.path.tolist() == paths and table.tracklet.tolist() == other.tracklet.tolist()


def test_buptcampus_counts_what_is_odd(trees, tmp_path, caplog):
    root = copy_of(trees / 'buptcampus', tmp_path / 'data')
    for name, other in (('train', 'train'), ('gallery', 'query')):
        first = (root / f'{other}.txt').read_text().splitlines()[0]
        with open(root / f'{name}.txt', 'a') as file:
            file.write(f'\n{first}\n')
    dataset = create_dataset('buptcampus', root, frames=1)
    messages = warnings_in(caplog)
    assert len(messages) == 2 and dataset.train.num_tracklets() == 2 * 4
    assert messages[1].startswith(f'2 tracklets of {root}/train.txt are repeated and count once: 1 RGB')
    assert messages[0].startswith('1 images are of a query and of the gallery')


MISTAKES = {
    'no list': (
        'hitsz_vcm',
        lambda root: (root / 'info/query_IDX.txt').unlink(),
        'there is no .*query_IDX.txt; .*info/',
    ),
    'no names': ('hitsz_vcm', lambda root: (root / 'info/train_name.txt').unlink(), 'there is no .*train_name.txt'),
    'four numbers': (
        'hitsz_vcm',
        lambda root: edit(root / 'info/track_train_info.txt', r'^2 1 \d+', '2 1'),
        "track_train_info.txt, line 1: expected `<1 or 2> .*got '2 1 1 ",
    ),
    'a word': ('hitsz_vcm', lambda root: edit(root / 'info/track_test_info.txt', r'^2', 'rgb'), 'line 1: expected'),
    'beyond the names': (
        'hitsz_vcm',
        lambda root: edit(root / 'info/track_test_info.txt', r'^2 1 \d+', '2 1 99999'),
        'with images 1 to 1',
    ),
    'another name': (
        'hitsz_vcm',
        lambda root: edit(root / 'info/train_name.txt', r'^.*$', '0001_c1.jpg'),
        "line 1: the image '0001_c1.jpg' is not named like 0001M1D2T3F4.jpg",
    ),
    'no image': (
        'hitsz_vcm',
        lambda root: edit(root / 'info/train_name.txt', r'F1\.jpg', 'F2.jpg'),
        'track_train_info.txt, line 1: there is no file .*/rgb/D[0-9]/2.jpg; .*info/',
    ),
    'no json': ('buptcampus', lambda root: (root / 'data_paths.json').unlink(), 'there is no .*data_paths.json'),
    'broken json': ('buptcampus', lambda root: (root / 'data_paths.json').write_text('{"1":'), 'is no JSON file'),
    'a list for json': (
        'buptcampus',
        lambda root: (root / 'data_paths.json').write_text('[]'),
        'no list of images at 1 ',
    ),
    'no query list': (
        'buptcampus',
        lambda root: (root / 'query.txt').unlink(),
        'there is no .*query.txt; .*gallery.txt',
    ),
    'no such tracklet': (
        'buptcampus',
        lambda root: edit(root / 'gallery.txt', r' 1$', ' 7'),
        'gallery.txt, line 1: data_paths.json has no list of images at .* 7;',
    ),
    'a camera': (
        'buptcampus',
        lambda root: edit(root / 'train.txt', r'RGB/IR \w+', 'RGB/IR X1'),
        'LS3, .*1 RGB/IR X1 1',
    ),
    'a missing file': (
        'buptcampus',
        lambda root: edit(root / 'data_paths.json', r'_8000\.jpg', '_8001.jpg'),
        'train.txt, line 1: there is no file .*_8001.jpg',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_error(mistake, trees, tmp_path, capsys):
    layout, spoil, message = MISTAKES[mistake]
    root = copy_of(trees / layout, tmp_path / 'data')
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError), match=f'(?s){message}'):
        create_dataset(layout, root)
    assert main(['data', str(root), '--dataset', layout]) == 1
    assert 'Traceback' not in capsys.readouterr().err


def test_unknown_numbers_of_frames(trees):
    for value, message in ((-1, 'at least 0'), (1.5, 'frames'), ('many', 'frames')):
        with pytest.raises(ValueError, match=message):
            create_dataset('buptcampus', trees / 'buptcampus', frames=value)


def test_vireid_data_counts_tracklets(trees, capsys):
    command = ['data', str(trees / 'buptcampus'), '--dataset', 'buptcampus', '--json', '--workers', '0']
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['tracklets'] == {
        'train': {VISIBLE: 4, INFRARED: 4},
        'query': {VISIBLE: 1, INFRARED: 1},
        'gallery': {VISIBLE: 2, INFRARED: 2},
    }
    assert found['images']['query'] == {VISIBLE: 10, INFRARED: 10}
    assert main(command[:-3]) == 0
    assert 'visible tracklets' in capsys.readouterr().out


def test_tables_of_tracklets():
    rows = [
        (name, 'anna', 1, VISIBLE, 'test', number) for name, number in zip('abcdef', (7, 5, 7, 5, 9, 7), strict=True)
    ]
    records = Records.from_rows(rows)
    assert records.first_rows().tolist() == [0, 1, 0, 1, 4, 0] and records.num_tracklets() == 3
    part = records[[5, 3, 2]]
    assert part.tracklet.tolist() == [7, 5, 7] and part.first_rows().tolist() == [0, 1, 0]
    single = Records.from_rows([row[:5] for row in rows])
    assert single.tracklet is None and single.num_tracklets() == 0 and single.first_rows().tolist() == [*range(6)]
    with pytest.raises(ValueError, match='one value per image'):
        Records(records.path, records.identity, records.camera, records.modality, records.split, [1])
