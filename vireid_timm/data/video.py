"""Read datasets of tracklets, the images that one camera took of one person in a row.

HITSZ-VCM: Lin et al., "Learning Modal-Invariant and Temporal-Memory for Video-based Visible-Infrared Person
Re-Identification", CVPR 2022. BUPTCampus: Du et al., "Video-based Visible-Infrared Person Re-Identification with
Auxiliary Samples", arXiv:2311.15571.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence

from ..constants import INFRARED, MODALITIES, VISIBLE
from ..options import check_range
from .records import Dataset, Records
from .scan import LAYOUTS, Scan, check_lines, read_text, required

TrackletRow = tuple[str, str, int, str, str, int]  # path, identity, camera, modality, split, tracklet

VCM_SHORTEST = 12  # images; the owners leave out shorter tracklets, in training and testing
VCM_MODALITIES = {1: INFRARED, 2: VISIBLE}
VCM_FOLDERS = {1: 'ir', 2: 'rgb'}
_VCM_NAME = re.compile(r'(\d+)M([12])D(\d+)T\d+F(.+)')  # 0001M1D2T3F4.jpg
_MOST_DIGITS = 9

BUPT_CAMERAS = ('LS3', 'G25', 'CQ1', 'W4', 'TSG1', 'TSG2')  # in the owners' order
BUPT_FOLDERS = {VISIBLE: 'RGB', INFRARED: 'IR'}
_BUPT_MODALITIES = {'RGB': (VISIBLE,), 'IR': (INFRARED,), 'RGB/IR': MODALITIES}


def read_hitsz_vcm(root: str, *, frames: int = 6) -> Dataset:
    """Read HITSZ-VCM: tracklets of 500 identities to train on, and of 427 to test on.

    Tracklets of fewer than 12 images are left out, as in the owners' code.

    Args:
        root: The folder.
        frames: Images taken of each tracklet, those of the owners' test: the first of each of so many parts of equal
            length, and the last one where such a part would start behind the end; 0 for all.
    """
    check_range('frames', frames)
    with Scan() as scan:
        tables = [Records.from_rows(_vcm_rows(scan, root, split, frames)) for split in ('train', 'test')]
        _check_vcm_queries(scan, root)
    return Dataset('hitsz_vcm', root, *tables, {'frames': frames}, scan.findings)


def read_buptcampus(root: str, *, frames: int = 10) -> Dataset:
    """Read BUPTCampus: tracklets of 1,074 identities to train on, and of 1,076 to test on.

    Cameras are numbered LS3=1, G25=2, CQ1=3, W4=4, TSG1=5, TSG2=6. The auxiliary training set, whose identities were
    seen by one camera each, is not read.

    Args:
        root: The folder.
        frames: Images taken of each tracklet, those of the owners' test: evenly spaced from the first; 0 for all.
    """
    check_range('frames', frames)
    paths = _read_bupt_paths(root)
    rows: dict[str, list[TrackletRow]] = {'train': [], 'test': []}
    with Scan() as scan:
        for split in ('train', 'query', 'gallery'):
            table = rows['train' if split == 'train' else 'test']
            table += _bupt_rows(scan, root, split, paths, frames, table[-1][-1] + 1 if table else 1)
        shared = {path for path, *_, split, _ in rows['test'] if split == 'query'}
        shared &= {path for path, *_, split, _ in rows['test'] if split == 'gallery'}
        what = 'images are of a query and of the gallery, which inflates the mixed protocol'
        scan.findings.add('query-gallery-copy', what, sorted(shared))
    tables = [Records.from_rows(table) for table in rows.values()]
    return Dataset('buptcampus', root, *tables, {'frames': frames}, scan.findings)


def first_of_parts(length: int, frames: int) -> list[int]:
    """Return which images of a tracklet HITSZ-VCM's owners test on, each once; 0 frames are all of them."""
    if not 0 < frames < length:
        return list(range(length))
    step = -(-length // frames)
    return sorted({min(part * step, length - 1) for part in range(frames)})


def evenly_spaced(length: int, frames: int) -> list[int]:
    """Return which images of a tracklet BUPTCampus's owners test on, each once; 0 frames are all of them."""
    return [part * length // frames for part in range(frames)] if 0 < frames < length else list(range(length))


def _vcm_rows(scan: Scan, root: str, split: str, frames: int) -> list[TrackletRow]:
    """Return rows of the tracklets of `track_<split>_info.txt`, which are numbered by its lines."""
    names = read_text(required('hitsz_vcm', root, f'info/{split}_name.txt')).splitlines()
    list_name = required('hitsz_vcm', root, f'info/track_{split}_info.txt')
    folder = os.path.join(root, split.capitalize())
    folder = folder if os.path.isdir(folder) else root
    rows: list[TrackletRow] = []
    wrong = []
    for number, words in _lines(list_name):
        try:
            kind, identity, camera, images = _vcm_tracklet(names, words)
            if len(images) < VCM_SHORTEST:
                what = f'{split} tracklets have fewer than {VCM_SHORTEST} images and are left out, as by the owners'
                scan.note('short-tracklet', what, f'line {number}')
                continue
            if any((int(image[1]), int(image[2]), int(image[3])) != (identity, kind, camera) for image in images):
                what = f'{split} tracklets have images named after another person, modality or camera, and keep them'
                scan.note('mixed-tracklet', what, f'line {number}')
            paths = [
                os.path.join(folder, image[1], VCM_FOLDERS[int(image[2])], f'D{image[3]}', image[4])
                for image in (images[place] for place in first_of_parts(len(images), frames))
            ]
            _check_there(paths)
        except ValueError as error:
            wrong.append(f'line {number}: {error}')
            continue
        rows += [(path, f'{identity:04d}', camera, VCM_MODALITIES[kind], split, number) for path in paths]
    check_lines(list_name, wrong, f"; dataset 'hitsz_vcm' expects in {root}:{LAYOUTS['hitsz_vcm']}")
    return rows


def _vcm_tracklet(names: Sequence[str], words: Sequence[str]) -> tuple[int, int, int, list[re.Match]]:
    """Return kind of modality, identity, camera and image names of one tracklet, as a line of the list gives them."""
    are_numbers = all(word.isdecimal() and len(word) <= _MOST_DIGITS for word in words)
    kind, first, last, identity, camera = map(int, words) if are_numbers and len(words) == 5 else (0, 0, 0, 0, 0)
    if kind not in VCM_MODALITIES or not 1 <= first <= last <= len(names):
        raise ValueError(
            f'expected `<1 or 2> <first> <last> <identity> <camera>` with images 1 to {len(names)}, '
            f'got {" ".join(words)!r}'
        )
    images = [_VCM_NAME.fullmatch(name.strip()) for name in names[first - 1 : last]]
    if None in images:
        name = names[first - 1 + images.index(None)]
        raise ValueError(f'the image {name!r} is not named like 0001M1D2T3F4.jpg')
    return kind, identity, camera, images


def _check_vcm_queries(scan: Scan, root: str) -> None:
    """Note where the owners' list of queries differs from the infrared test tracklets, which are the queries here."""
    list_name = required('hitsz_vcm', root, 'info/query_IDX.txt')
    listed = set(read_text(list_name).split())
    tracklets = _lines(os.path.join(root, 'info', 'track_test_info.txt'))
    infrared = {str(number) for number, (kind, *_) in tracklets if VCM_MODALITIES[int(kind)] == INFRARED}
    for number in sorted(listed ^ infrared):
        what = f'test tracklets are infrared but not in {list_name}, or the reverse; their modality decides'
        scan.note('query-list', what, f'line {number}')


def _read_bupt_paths(root: str) -> object:
    path = required('buptcampus', root, 'data_paths.json')
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is no JSON file ({error}); unpack it again') from None


def _bupt_rows(scan: Scan, root: str, split: str, paths: object, frames: int, first: int) -> list[TrackletRow]:
    """Return rows of the tracklets of `<split>.txt`, which are numbered from `first`."""
    list_name = required('buptcampus', root, f'{split}.txt')
    rows: list[TrackletRow] = []
    wrong = []
    known: set[tuple[str, ...]] = set()
    for number, words in _lines(list_name):
        try:
            for modality, *address in _bupt_tracklets(words):
                if tuple(address) in known:
                    what = f'tracklets of {list_name} are repeated and count once'
                    scan.note('repeated-line', what, ' '.join(address))
                    continue
                images = _list_at(paths, address)
                files = [
                    os.path.join(root, 'DATA', *images[place].split('/'))
                    for place in evenly_spaced(len(images), frames)
                ]
                _check_there(files)
                identity, _, camera, _ = address
                camera = BUPT_CAMERAS.index(camera) + 1
                rows += [(path, identity, camera, modality, split, first + len(known)) for path in files]
                known.add(tuple(address))
        except ValueError as error:
            wrong.append(f'line {number}: {error}')
    check_lines(list_name, wrong, f"; dataset 'buptcampus' expects in {root}:{LAYOUTS['buptcampus']}")
    return rows


def _bupt_tracklets(words: Sequence[str]) -> list[tuple[str, str, str, str, str]]:
    """Return modality, identity, folder of the modality, camera and tracklet, twice for a line about both."""
    if len(words) != 4 or words[1] not in _BUPT_MODALITIES or words[2] not in BUPT_CAMERAS:
        raise ValueError(
            f'expected `<identity> <RGB, IR or RGB/IR> <camera, {", ".join(BUPT_CAMERAS)}> <tracklet>`, '
            f'got {" ".join(words)!r}'
        )
    identity, modalities, camera, tracklet = words
    return [(name, identity, BUPT_FOLDERS[name], camera, tracklet) for name in _BUPT_MODALITIES[modalities]]


def _list_at(tree: object, address: Sequence[str]) -> list[str]:
    """Return the paths at an address of `data_paths.json`."""
    for name in address:
        tree = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(tree, list) or not tree or not all(isinstance(path, str) for path in tree):
        raise ValueError(f'data_paths.json has no list of images at {" ".join(address)}')
    return tree


def _lines(file_name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the words of each line that has any."""
    for number, line in enumerate(read_text(file_name).splitlines(), 1):
        if line.strip():
            yield number, line.split()


def _check_there(paths: Sequence[str]) -> None:
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f'there is no file {missing[0]}')
