"""Read datasets as record tables: the public ones as distributed, folders, CSV files, and SynthVI.

Every reader returns a `Dataset`: the records to train on, and every image that a protocol may need, once. Nothing is
decoded here. SYSU-MM01: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017. RegDB: Nguyen et
al., "Person Recognition System Based on a Combination of Body Images from Visible Light and Thermal Cameras", Sensors
2017. LLCM: arXiv:2303.14481. Market-1501's names: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV
2015. HITSZ-VCM and BUPTCampus: see `video`.
"""

import csv
import difflib
import inspect
import io
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..constants import INFRARED, MODALITIES, NAMES, SPLITS, UNKNOWN_CAMERA, VISIBLE
from ..options import MANY, check_kinds, check_range
from ..synthvi.render import camera_numbers, camera_order, image_address
from ..text import format_list
from .findings import Findings
from .records import Dataset, Records
from .scan import CAMERA_DIGITS, LAYOUTS, Scan, camera_number, check_lines, read_text, required, visible_entries
from .video import read_buptcampus, read_hitsz_vcm

_logger = logging.getLogger(__name__)

Row = tuple[str, str, int, str, str]  # path, identity, camera, modality, split

# Images of (training visible, training infrared, test visible, test infrared), as published; of video the tracklets.
PUBLISHED_COUNTS = {
    'sysu_mm01': (22258, 11909, 6775, 3803),
    'regdb': (2060, 2060, 2060, 2060),
    'llcm': (16946, 13975, 8680, 7166),
    'hitsz_vcm': (5460, 4291, 5099, 4584),  # without those that are too short
    'buptcampus': (3574, 3574, 2962, 2958),
}
SYSU_CAMERAS = ((1, VISIBLE), (2, VISIBLE), (3, INFRARED), (4, VISIBLE), (5, VISIBLE), (6, INFRARED))
# The owners' order of every identity's images in every camera; their evaluation takes the first ones.
PERMUTATION_FILE = 'exp/rand_perm_cam.mat'
PERMUTATION_VARIABLE = 'rand_perm_cam'
REGDB_TRIALS = range(1, 11)

CAMERA_PREFIX = re.compile(r'c(?:am)?(\d+)_', re.IGNORECASE)  # c3_0001.jpg, cam3_0001.jpg
_LLCM_CAMERA = re.compile(r'_c(\d+)_')  # 0001_c01_s185535_f7010_nir.jpg
_CAMERA_FOLDER = re.compile(r'cam(\d+)')
_MARKET_NAME = re.compile(r'(-1|\d+)_c(\d+)')  # 0001_c1s1_000151_01.jpg; -1 is junk, 0 a distractor
_FLOAT_CAMERA = re.compile(r'\d+\.0+')
NO_VALUE = ('nan', 'na', 'n/a', '<na>', 'none', 'null')


def create_dataset(name: str, root: str | os.PathLike | None = None, **options: object) -> Dataset:
    """Read the record tables of a dataset.

    Args:
        name: `sysu_mm01`, `regdb`, `llcm`, `hitsz_vcm`, `buptcampus`, `folder`, `csv` or `synthetic`.
        root: The dataset's folder; the CSV file for `csv`; None for `synthetic`.
        **options: The reader's options: `trial` (regdb); `frames` (hitsz_vcm, buptcampus); `test_share`, `seed`,
            `names` (folder); for `synthetic` see `read_synthetic`.

    Raises:
        ValueError: On an unknown name or option, or on invalid data; the message says where.
        FileNotFoundError: If a file or folder is missing; the message shows the expected layout.
    """
    if name not in READERS:
        raise ValueError(f'unknown dataset {name!r}{_hint(name, READERS)}; available: {", ".join(sorted(READERS))}')
    reader = READERS[name]
    accepted = {option: entry for option, entry in inspect.signature(reader).parameters.items() if option != 'root'}
    for option in options:
        if option not in accepted:
            raise ValueError(
                f'dataset {name!r} has no option {option!r}{_hint(option, accepted)}; '
                f'its options: {", ".join(accepted) or "none"}'
            )
    check_kinds(options, [reader], f'dataset {name!r}: option ')
    root = os.fspath(root or '')
    if name == 'synthetic':
        if root:
            raise ValueError(f'dataset {name!r} is rendered in memory and takes no root folder, got {root!r}')
        dataset = reader(**options)
    else:
        dataset = reader(_existing_root(name, root), **options)
    findings = Findings(dataset.findings)
    _check(dataset, findings)
    return replace(dataset, findings=findings)


def split_identities(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Hold out a share of the identities, with all their images.

    Only identities with images of both modalities can be held out: the others cannot be searched across modalities.

    Args:
        records: The table to split.
        share: Share of the identities with both modalities, at least two of them; 0 for none.
        seed: Decides which identities are held out.

    Returns:
        The other records, unchanged, and those held out, with split `test`.
    """
    if not 0 <= share < 1:
        raise ValueError(f'the share of identities to hold out must be at least 0 and less than 1, got {share}')
    candidates = sorted(_identities_of(records, VISIBLE) & _identities_of(records, INFRARED))
    count = max(2, round(share * len(candidates))) if share > 0 else 0
    if share > 0 and len(candidates) < count + 2:
        raise ValueError(
            f'cannot hold out {share:g} of the {len(candidates)} identities with images of both modalities: at least '
            'two must be held out and two must remain; add data, or hold out none with a share of 0 (--val-share 0, '
            'test_share=0)'
        )
    chosen = set(random.Random(seed).sample(candidates, count))
    is_held_out = np.array([name in chosen for name in records.identity.tolist()], dtype=bool)
    held_out = records[is_held_out]
    return records[~is_held_out], replace(held_out, split=['test'] * len(held_out))


def read_sysu_mm01(root: str) -> Dataset:
    """Read SYSU-MM01: 395 identities to train on (its training and validation lists), 96 to test on.

    The test table has every image of the test identities in all six cameras.
    """
    lists = {name: _read_numbers('sysu_mm01', root, f'exp/{name}_id.txt') for name in ('train', 'val', 'test')}
    train = lists['train'] + lists['val']
    both = sorted(set(train) & set(lists['test']))
    if both:
        raise ValueError(f'{root}: identity {both[0]} is listed for training and for testing; check exp/*_id.txt')
    cells = [(camera, modality, required('sysu_mm01', root, f'cam{camera}')) for camera, modality in SYSU_CAMERAS]
    with Scan() as scan:
        tables = [_camera_folders(scan, cells, *part) for part in ((train, 'train'), (lists['test'], 'test'))]
    return Dataset('sysu_mm01', root, *tables, findings=scan.findings)


def read_regdb(root: str, *, trial: int = 1) -> Dataset:
    """Read RegDB: 206 of the 412 identities to train on, the others to test on, split anew in each of ten trials.

    The camera is 1 for visible images and 2 for infrared ones. Published results are the mean of ten trainings, one per
    trial.
    """
    if trial not in REGDB_TRIALS:
        raise ValueError(f'RegDB has trials {REGDB_TRIALS[0]} to {REGDB_TRIALS[-1]}, got {trial!r}')
    tables, findings = {}, Findings()
    for split in ('train', 'test'):
        rows: list[Row] = []
        for modality, folder, camera in ((VISIBLE, 'visible', 1), (INFRARED, 'thermal', 2)):
            for path, inner in _read_image_list('regdb', root, f'idx/{split}_{folder}_{trial}.txt', findings):
                rows.append((path, inner.split('/')[-2], camera, modality, split))
        tables[split] = Records.from_rows(rows)
    return Dataset('regdb', root, tables['train'], tables['test'], {'trial': trial}, findings)


def read_llcm(root: str) -> Dataset:
    """Read LLCM: 713 identities to train on, 351 to test on. Cameras of one number share a site in both modalities."""
    rows: list[Row] = []
    cells = []
    with Scan() as scan:
        for modality, name in ((VISIBLE, 'vis'), (INFRARED, 'nir')):
            for path, inner in _read_image_list('llcm', root, f'idx/train_{name}.txt', scan.findings):
                found = _LLCM_CAMERA.search(inner.split('/')[-1])
                camera = camera_number(found[1], path) if found else UNKNOWN_CAMERA
                rows.append((path, inner.split('/')[-2], camera, modality, 'train'))
        for modality, name in ((VISIBLE, 'test_vis'), (INFRARED, 'test_nir')):
            # The number comes from this folder's own name: "cam" may occur anywhere in the path above it.
            folder = required('llcm', root, name)
            for camera in scan.folders(folder, _CAMERA_FOLDER, 'cam<number>'):
                path = os.path.join(folder, camera)
                cells.append((camera_number(camera[3:], path), modality, path))
        cells.sort()
        test = _camera_folders(scan, cells, _read_numbers('llcm', root, 'idx/test_id.txt'), 'test')
    return Dataset('llcm', root, Records.from_rows(rows), test, findings=scan.findings)


def read_folder(root: str, *, test_share: float = 0.2, seed: int = 0, names: str = 'folders') -> Dataset:
    """Read custom images in folders, see `LAYOUTS['folder']`.

    The camera is the number in a `c3_` or `cam3_` prefix of the file name, else 0 (unknown). Without `query` and
    `gallery` folders, a share of the identities is held out of `train` for testing. With them, `train` may be missing.

    With Market-1501's names there are no folders of people: `0001_c1s1_000151_01.jpg` shows identity 0001 in camera 1.
    As there, identity -1 is junk, which is left out, and 0 is nobody in particular: a distractor in galleries, left out
    elsewhere.

    Args:
        root: The folder.
        test_share: Share of the identities to hold out, 0 for none; ignored if there is a gallery.
        seed: Decides which identities are held out.
        names: What tells who an image shows: `folders`, or `market` for Market-1501's file names.
    """
    if names not in NAMES:
        raise ValueError(f'unknown names {names!r}; expected one of {", ".join(NAMES)}')
    read = _person_folders if names == 'folders' else _market_files
    options = {} if names == 'folders' else {'names': names}
    with Scan() as scan:
        present = scan.folders(root, re.compile('train|query|gallery'), 'train, query or gallery')
        if ('query' in present) != ('gallery' in present):
            there, missing = ('query', 'gallery') if 'query' in present else ('gallery', 'query')
            raise ValueError(
                f'{root} has a folder {there} but no {missing}; expected both or neither:{LAYOUTS["folder"]}'
            )
        train = Records.from_rows(read(scan, root, 'train') if 'train' in present else [])
        for modality in MODALITIES if 'train' in present or 'query' not in present else ():
            required('folder', root, f'train/{modality}')
        test = []
        for split in ('query', 'gallery') if 'query' in present else ():
            rows = read(scan, root, split)
            if not rows:
                raise ValueError(f'{os.path.join(root, split)} has no image; expected:{LAYOUTS["folder"]}')
            test += rows
    if test:
        return Dataset('folder', root, train, Records.from_rows(test), options, scan.findings)
    train, held_out = split_identities(train, test_share, seed)
    return Dataset('folder', root, train, held_out, {'test_share': test_share, 'seed': seed} | options, scan.findings)


def read_csv(root: str) -> Dataset:
    """Read custom images listed in a CSV file, see `LAYOUTS['csv']`.

    Cameras that are not numbers are numbered in the order of their names. An image that is listed both as query and as
    gallery becomes one record of split `test`.
    """
    findings = Findings()
    rows = _number_cameras(root, _merge_repeated(root, _read_csv_lines(root), findings))
    splits = {row.split for row in rows}
    if ('query' in splits) != ('gallery' in splits) and 'test' not in splits:
        there, missing = ('query', 'gallery') if 'query' in splits else ('gallery', 'query')
        raise ValueError(f'{root} lists {there} images but no {missing} images; expected both, or neither')
    tables = [
        Records.from_rows(
            [
                (row.path, row.identity, int(row.camera), row.modality, row.split)
                for row in rows
                if (row.split == 'train') == training
            ]
        )
        for training in (True, False)
    ]
    return Dataset('csv', root, *tables, findings=findings)


def read_synthetic(
    *,
    identities: int = 3000,
    test_identities: int = 200,
    seed: int = 0,
    spectrum: str = 'near-infrared',
    size: tuple[int, int] = (128, 64),
    images_per_modality: int = 6,
    visible_cameras: int = 4,
    infrared_cameras: int = 2,
    first_camera: int = 1,
    first_identity: int = 0,
) -> Dataset:
    """Return SynthVI; an image is rendered when it is read.

    Args:
        identities: Number of identities to train on.
        test_identities: Number of identities to test on, numbered after those.
        seed: Seed of the people, their images and the cameras.
        spectrum: Spectrum of the infrared cameras, `near-infrared` or `thermal`.
        size: Height and width of the images.
        images_per_modality: Images of each identity in each modality.
        visible_cameras: Number of visible cameras.
        infrared_cameras: Number of infrared cameras.
        first_camera: Number of the first camera; another range gives unseen backgrounds, viewpoints and light.
        first_identity: Number of the first identity; another range gives unseen people.
    """
    for name, value in (
        ('identities', identities),
        ('test_identities', test_identities),
        ('first_identity', first_identity),
    ):
        check_range(name, value)
    options = {
        'seed': seed,
        'spectrum': spectrum,
        'size': tuple(size),
        'images_per_modality': images_per_modality,
        'visible_cameras': visible_cameras,
        'infrared_cameras': infrared_cameras,
        'first_camera': first_camera,
    }
    first_test = first_identity + identities
    train = synthetic_records(range(first_identity, first_test), split='train', **options)
    test = synthetic_records(range(first_test, first_test + test_identities), split='test', **options)
    counts = {'identities': identities, 'test_identities': test_identities, 'first_identity': first_identity}
    return Dataset('synthetic', '', train, test, counts | options)


READERS: dict[str, Callable[..., Dataset]] = {
    'buptcampus': read_buptcampus,
    'csv': read_csv,
    'folder': read_folder,
    'hitsz_vcm': read_hitsz_vcm,
    'llcm': read_llcm,
    'regdb': read_regdb,
    'synthetic': read_synthetic,
    'sysu_mm01': read_sysu_mm01,
}


@dataclass(frozen=True)
class _Line:
    """One line of a CSV file."""

    number: int
    path: str
    identity: str
    camera: str
    modality: str
    split: str


def csv_rows(file_name: str, required: Sequence[str], expected: str) -> Iterator[tuple[int, dict[str, str], str]]:
    """Yield the number of each line of a CSV file, its values by lower-case column name, and what is wrong with it.

    Separators are commas, semicolons or tabs. The values of a wrong line are empty.

    Args:
        file_name: The file, in UTF-8 with or without a byte order mark.
        required: Columns that the first line must have.
        expected: The expected form, for the message.

    Raises:
        ValueError: The first line lacks a column, or the file is not UTF-8 text.
    """
    text = read_text(file_name)
    delimiter = max(',;\t', key=text.partition('\n')[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=''), delimiter=delimiter, skipinitialspace=True)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    missing = [name for name in required if name not in reader.fieldnames]
    if missing:
        raise ValueError(f'{file_name}: the first line lacks {", ".join(missing)}; expected:{expected}')
    first = 2
    try:
        for row in reader:
            # A quote that is not closed takes the lines up to the next quote into one value.
            if any('\n' in value or '\r' in value for value in row.values() if isinstance(value, str)):
                yield first, {}, 'a value has several lines; is a quote not closed?'
            elif None in row or None in row.values():
                yield reader.line_num, {}, f'expected {len(reader.fieldnames)} values, as in the first line'
            else:
                yield reader.line_num, {name: value.strip() for name, value in row.items()}, ''
            first = reader.line_num + 1
    except csv.Error as error:
        yield first, {}, f'a quote is not closed ({error})'


def _read_csv_lines(file_name: str) -> list[_Line]:
    lines: list[_Line] = []
    wrong = []
    for number, values, problem in csv_rows(file_name, ('path', 'identity', 'modality', 'split'), LAYOUTS['csv']):
        if values:
            line = _csv_line(file_name, number, values)
            problem = _problem_of(line)
            lines.append(line)
        if problem:
            wrong.append(f'line {number}: {problem}')
    check_lines(file_name, wrong)
    return lines


def _csv_line(file_name: str, number: int, values: dict[str, str]) -> _Line:
    path, camera = csv_path(file_name, values['path']), csv_camera(values.get('camera', ''))
    return _Line(number, path, values['identity'], camera, values['modality'].lower(), values['split'].lower())


def csv_path(file_name: str, value: str) -> str:
    """Return the path that a CSV file gives; a relative one starts at the file's folder."""
    path = os.path.join(os.path.dirname(file_name), value)
    if '\\' in path and not os.path.exists(path):  # written on Windows
        path = os.path.join(os.path.dirname(file_name), value.replace('\\', '/'))
    return path


def csv_camera(value: str) -> str:
    """Return the number or name of a camera as a CSV file gives it; empty if it is missing."""
    if value.lower() in NO_VALUE:
        return ''
    if _FLOAT_CAMERA.fullmatch(value):  # pandas writes whole numbers like this if some are missing
        return value.partition('.')[0]
    return value


def _problem_of(line: _Line) -> str | None:
    for column, value, allowed in (('modality', line.modality, MODALITIES), ('split', line.split, SPLITS)):
        if value not in allowed:
            return f'unknown {column} {value!r}; expected one of {", ".join(allowed)}'
    if line.identity in ('', 'nan', 'NaN'):
        return f'the identity is {"empty" if not line.identity else f"missing ({line.identity})"}'
    return None if os.path.isfile(line.path) else f'there is no file {line.path}'


def _merge_repeated(file_name: str, lines: list[_Line], findings: Findings) -> list[_Line]:
    """Reduce to one line per image: query and gallery become test, duplicates are dropped, contradictions raise."""
    merged: dict[str, _Line] = {}
    dropped, wrong = [], []
    for line in lines:
        path = os.path.realpath(line.path)
        first = merged.setdefault(path, line)
        if first is line:
            continue
        where = f'lines {first.number} and {line.number}: {line.path} is listed twice'
        if (first.identity, first.camera, first.modality) != (line.identity, line.camera, line.modality):
            wrong.append(f'{where}, with different identities, cameras or modalities')
        elif (first.split == 'train') != (line.split == 'train'):
            wrong.append(f'{where}, for training and for testing')
        elif first.split == line.split:
            dropped.append(line.path)
        else:
            merged[path] = replace(first, split='test')
    check_lines(file_name, wrong)
    findings.add('repeated-line', f'lines of {file_name} repeat an image and count once', dropped)
    return list(merged.values())


def _number_cameras(file_name: str, lines: list[_Line]) -> list[_Line]:
    names = sorted({line.camera for line in lines} - {''})
    if all(name.isdecimal() and len(name) <= CAMERA_DIGITS for name in names):
        return [replace(line, camera=line.camera or str(UNKNOWN_CAMERA)) for line in lines]
    numbers = {name: str(number) for number, name in enumerate(names, 1)} | {'': str(UNKNOWN_CAMERA)}
    _logger.info(f'{file_name}: cameras are numbered {", ".join(f"{name}={numbers[name]}" for name in names)}')
    return [replace(line, camera=numbers[line.camera]) for line in lines]


def _existing_root(name: str, root: str) -> str:
    what = 'file' if name == 'csv' else 'folder'
    if not root:
        raise ValueError(f'dataset {name!r} needs the {what} to read: root (--data-dir); expected:{LAYOUTS[name]}')
    if not (os.path.isfile(root) if name == 'csv' else os.path.isdir(root)):
        raise FileNotFoundError(f'there is no {what} {root}; dataset {name!r} expects:{LAYOUTS[name]}')
    return root


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f' (did you mean {close[0]!r}?)' if close else ''


def _read_numbers(name: str, root: str, inner: str) -> list[int]:
    """Return the comma-separated numbers in a file."""
    path = required(name, root, inner)
    words = read_text(path).replace(',', ' ').split()
    wrong = [repr(word) for word in words if not word.isdecimal()]
    if wrong:
        raise ValueError(f'{path}: expected one line of comma-separated numbers, got {format_list(wrong)}')
    return [int(word) for word in words]


def _read_image_list(name: str, root: str, inner: str, findings: Findings) -> list[tuple[str, str]]:
    """Return (path, path inside `root`) of every line `path label` of a file. The listed files must exist."""
    list_name = required(name, root, inner)
    images: dict[str, str] = {}
    wrong, repeated = [], []
    for number, line in enumerate(io.StringIO(read_text(list_name), newline=None), 1):
        words = line.rsplit(maxsplit=1)
        if not words:
            continue
        relative = words[0].strip().replace('\\', '/')
        path = os.path.join(root, *relative.split('/'))
        if len(words) != 2 or not words[1].isdecimal() or '/' not in relative:
            wrong.append(f'line {number}: expected `<folder>/<identity>/<image> <label>`, got {line.strip()!r}')
        elif path in images:
            repeated.append(relative)
        elif not os.path.isfile(path):
            wrong.append(f'line {number}: there is no file {path}')
        else:
            images[path] = relative
    check_lines(list_name, wrong, f'; dataset {name!r} expects in {root}:{LAYOUTS[name]}')
    findings.add('repeated-line', f'lines of {list_name} repeat an image and count once', repeated)
    return list(images.items())


def _camera_folders(
    scan: Scan, cells: Sequence[tuple[int, str, str]], identities: Iterable[int], split: str
) -> Records:
    """Return records of `<camera folder>/<identity, 4 digits>/<image>`, by identity, then camera, then file name.

    Args:
        scan: Lists the folders.
        cells: Number, modality and folder of every camera.
        identities: Numbers of the identities.
        split: Split of every record.
    """
    rows: list[Row] = []
    for name in sorted({f'{number:04d}' for number in identities}):
        before = len(rows)
        for camera, modality, camera_folder in cells:
            folder = os.path.join(camera_folder, name)
            if os.path.isdir(folder):  # not every camera has seen everyone
                rows += [(os.path.join(folder, image), name, camera, modality, split) for image in scan.images(folder)]
        if len(rows) == before:
            scan.note('unseen-identity', f'of the listed {split} identities have no image', name)
    return Records.from_rows(rows)


def _person_folders(scan: Scan, root: str, split: str) -> list[Row]:
    """Return rows of `<split>/<modality>/<person>/<image>`, visible ones first."""
    rows: list[Row] = []
    for modality, modality_folder in _modality_folders(scan, root, split):
        for person in scan.folders(modality_folder):
            folder = os.path.join(modality_folder, person)
            for image in scan.images(folder):
                path, prefix = os.path.join(folder, image), CAMERA_PREFIX.match(image)
                camera = camera_number(prefix[1], path) if prefix else UNKNOWN_CAMERA
                rows.append((path, person, camera, modality, split))
    return rows


def _modality_folders(scan: Scan, root: str, split: str) -> list[tuple[str, str]]:
    """Return the modalities in `<split>/` and their folders, visible first."""
    folder = os.path.join(root, split)
    present = scan.folders(folder, re.compile('|'.join(MODALITIES)), ' or '.join(MODALITIES))
    return [(modality, os.path.join(folder, modality)) for modality in MODALITIES if modality in present]


def _market_files(scan: Scan, root: str, split: str) -> list[Row]:
    """Return rows of `<split>/<modality>/<identity>_c<camera>...`, visible ones first, without junk."""
    rows: list[Row] = []
    for modality, folder in _modality_folders(scan, root, split):
        inner = [entry.name for entry in visible_entries(folder) if entry.is_dir()]
        if inner:
            raise ValueError(
                f'{folder} has folders ({format_list(inner)}), but names=market takes the person from the name of an '
                'image; leave names=market out if each person has a folder, or move the images up'
            )
        images = scan.images(folder)
        wrong = [image for image in images if not _MARKET_NAME.match(image)]
        if wrong:
            raise ValueError(
                f'{folder}: names=market expects names such as 0001_c1s1_000151_01.jpg (identity, camera), but '
                f'{len(wrong):,} are not: {format_list(wrong)}'
            )
        for image in images:
            path, (identity, camera) = os.path.join(folder, image), _MARKET_NAME.match(image).groups()
            if int(identity) < 0:
                scan.note('junk-image', 'images are junk (identity -1) and are left out', path)
            elif int(identity) == 0 and split != 'gallery':
                scan.note(
                    'distractor',
                    'images show nobody in particular (identity 0) and are left out',
                    path,
                )
            else:
                rows.append((path, identity, camera_number(camera, path), modality, split))
    return rows


def _identities_of(records: Records, modality: str) -> set[str]:
    return set(records.identity[records.modality == modality].tolist())


def _check(dataset: Dataset, findings: Findings) -> None:
    """Add oddities of a dataset's tables, and raise if it has no image."""
    train, test = dataset.train, dataset.test
    where = dataset.root or dataset.name
    if not len(train) and not len(test):
        expected = f'; expected:{LAYOUTS[dataset.name]}' if dataset.name in LAYOUTS else ''
        raise ValueError(f'{where} has no image{expected}')
    shared = set(train.identity.tolist()) & set(test.identity.tolist())
    what = 'identities are in both the training and the test set, which inflates the result'
    findings.add('train-test-identity', what, sorted(shared), is_serious=True)
    published = PUBLISHED_COUNTS.get(dataset.name)
    parts = [table[table.modality == modality] for table in (train, test) for modality in (VISIBLE, INFRARED)]
    counts = tuple(part.num_tracklets() or len(part) for part in parts)
    if published is not None and counts != published:
        names = ('training visible', 'training infrared', 'test visible', 'test infrared')
        differing = [
            f'{name} {count:,} (published {expected:,})'
            for name, count, expected in zip(names, counts, published, strict=True)
            if count != expected
        ]
        what = 'image' if train.tracklet is None else 'tracklet'
        _logger.warning(f'{where}: {what} counts differ from the published {dataset.name}: {", ".join(differing)}')


def synthetic_records(
    identities: Sequence[int],
    *,
    split: str,
    seed: int = 0,
    spectrum: str = 'near-infrared',
    size: tuple[int, int] = (128, 64),
    images_per_modality: int = 6,
    visible_cameras: int = 4,
    infrared_cameras: int = 2,
    first_camera: int = 1,
) -> Records:
    """Return a record table of rendered images. Nothing is rendered yet: `path` holds addresses.

    Every identity has `images_per_modality` images in each modality. They are numbered from 0 and dealt evenly to the
    modality's cameras, in a different order for every identity: with fewer images than cameras, identities differ in
    the cameras that see them.

    Args:
        identities: Numbers of the identities, e.g. `range(100)`. Their names are the numbers with five digits.
        split: Split of all records: `train`, `query`, `gallery` or `test`.
        seed: See `render`.
        spectrum: See `render`.
        size: See `render`.
        images_per_modality: Images of each identity in each modality.
        visible_cameras: Number of visible cameras.
        infrared_cameras: Number of infrared cameras.
        first_camera: Shifts all camera numbers (see `camera_numbers`), for unseen cameras.

    Raises:
        ValueError: If a number is out of range, or an identity occurs twice.
    """
    counts = {
        'images_per_modality': images_per_modality,
        'visible_cameras': visible_cameras,
        'infrared_cameras': infrared_cameras,
        'first_camera': first_camera,
    }
    for name, count in counts.items():
        check_range(name, count, 1)
    check_range('the number of images', 2 * len(identities) * images_per_modality, maximum=10 * MANY)
    if len(set(identities)) < len(identities):
        raise ValueError('an identity occurs twice; pass every number once')
    cameras = camera_numbers(visible_cameras, infrared_cameras, first_camera)
    rows = []
    for identity in identities:
        for modality, numbers in zip(MODALITIES, cameras, strict=True):
            order = camera_order(seed, identity, modality, len(numbers))
            for image in range(images_per_modality):
                camera = numbers[order[image % len(numbers)]]
                address = image_address(modality, identity, camera, image, seed=seed, spectrum=spectrum, size=size)
                rows.append((address, f'{identity:05d}', camera, modality, split))
    return Records.from_rows(rows)
