"""Read datasets as record tables: SYSU-MM01, RegDB and LLCM as distributed, folders, CSV files, and SynthVI.

Every reader returns a `Dataset`: the records to train on, and every image that a protocol may need, once. Nothing is
decoded here. SYSU-MM01: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017. RegDB: Nguyen et
al., "Person Recognition System Based on a Combination of Body Images from Visible Light and Thermal Cameras", Sensors
2017. LLCM: arXiv:2303.14481.
"""

import csv
import difflib
import inspect
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np

from ..constants import INFRARED, MODALITIES, SPLITS, UNKNOWN_CAMERA, VISIBLE
from ..synthvi.render import camera_numbers, camera_order, image_address
from ..text import format_list
from .images import IMAGE_SUFFIXES
from .records import Dataset, Records

_logger = logging.getLogger(__name__)

Row = tuple[str, str, int, str, str]  # path, identity, camera, modality, split

LAYOUTS = {
    'sysu_mm01': """
  cam1/ ... cam6/<identity, 4 digits>/<image>.jpg     (visible: 1, 2, 4, 5; infrared: 3, 6)
  exp/train_id.txt  exp/val_id.txt  exp/test_id.txt     (one line of comma-separated numbers each)""",
    'regdb': """
  Visible/<identity>/<image>.bmp
  Thermal/<identity>/<image>.bmp
  idx/{train,test}_{visible,thermal}_<trial>.txt        (a line per image: path, space, label)""",
    'llcm': """
  vis/<identity>/<image>.jpg  nir/<identity>/<image>.jpg                       (training)
  test_vis/cam<n>/<identity>/<image>.jpg  test_nir/cam<n>/<identity>/<image>.jpg
  idx/train_vis.txt  idx/train_nir.txt                  (a line per image: path, space, label)
  idx/test_id.txt                                       (one line of comma-separated numbers)""",
    'folder': """
  train/visible/<person>/<image>  train/infrared/<person>/<image>
  query/<modality>/<person>/<image>  gallery/<modality>/<person>/<image>       (both or neither)""",
    'csv': """
  path,identity,camera,modality,split
  images/a.jpg,anna,3,visible,train
(path: relative to the file's folder; camera: may be empty; split: train, query, gallery, or test for both)""",
}
# Images of (training visible, training infrared, test visible, test infrared), as published.
PUBLISHED_COUNTS = {
    'sysu_mm01': (22258, 11909, 6775, 3803),
    'regdb': (2060, 2060, 2060, 2060),
    'llcm': (16946, 13975, 8680, 7166),
}
SYSU_CAMERAS = ((1, VISIBLE), (2, VISIBLE), (3, INFRARED), (4, VISIBLE), (5, VISIBLE), (6, INFRARED))
# The owners' order of every identity's images in every camera; their evaluation takes the first ones.
PERMUTATION_FILE = 'exp/rand_perm_cam.mat'
PERMUTATION_VARIABLE = 'rand_perm_cam'
REGDB_TRIALS = range(1, 11)

_CAMERA_PREFIX = re.compile(r'c(?:am)?(\d+)_', re.IGNORECASE)  # c3_0001.jpg, cam3_0001.jpg
_LLCM_CAMERA = re.compile(r'_c(\d+)_')  # 0001_c01_s185535_f7010_nir.jpg
_CAMERA_FOLDER = re.compile(r'cam(\d+)')


def create_dataset(name: str, root: str | os.PathLike | None = None, **options: object) -> Dataset:
    """Read the record tables of a dataset.

    Args:
        name: `sysu_mm01`, `regdb`, `llcm`, `folder`, `csv` or `synthetic`.
        root: The dataset's folder; the CSV file for `csv`; None for `synthetic`.
        **options: The reader's options: `trial` (regdb); `test_share`, `seed` (folder); for `synthetic` see
            `read_synthetic`.

    Raises:
        ValueError: On an unknown name or option, or on invalid data; the message says where.
        FileNotFoundError: If a file or folder is missing; the message shows the expected layout.
    """
    if name not in READERS:
        raise ValueError(f'unknown dataset {name!r}{_hint(name, READERS)}; available: {", ".join(sorted(READERS))}')
    reader = READERS[name]
    accepted = {option: entry for option, entry in inspect.signature(reader).parameters.items() if option != 'root'}
    for option, value in options.items():
        if option not in accepted:
            raise ValueError(
                f'dataset {name!r} has no option {option!r}{_hint(option, accepted)}; '
                f'its options: {", ".join(accepted) or "none"}'
            )
        if not _is_of_kind(value, accepted[option].annotation):
            kind = {int: 'a whole number', float: 'a number', str: 'a word'}.get(accepted[option].annotation)
            raise ValueError(
                f'dataset {name!r}: option {option!r} must be {kind or "two whole numbers, such as (128, 64)"}, '
                f'got {value!r}'
            )
    root = os.fspath(root or '')
    if name == 'synthetic':
        if root:
            raise ValueError(f'dataset {name!r} is rendered in memory and takes no root folder, got {root!r}')
        dataset = reader(**options)
    else:
        dataset = reader(_existing_root(name, root), **options)
    _check(dataset)
    return dataset


def _is_of_kind(value: object, kind: type) -> bool:
    """Return whether an option's value is of the type that its reader declares."""
    if kind == tuple[int, int]:
        return isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_of_kind(one, int) for one in value)
    number = {int: Integral, float: Real}.get(kind)
    return isinstance(value, number or kind) and not isinstance(value, bool)


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
    cells = [(camera, modality, _required('sysu_mm01', root, f'cam{camera}')) for camera, modality in SYSU_CAMERAS]
    return Dataset(
        'sysu_mm01', root, _camera_folders(cells, train, 'train'), _camera_folders(cells, lists['test'], 'test')
    )


def read_regdb(root: str, *, trial: int = 1) -> Dataset:
    """Read RegDB: 206 of the 412 identities to train on, the others to test on, split anew in each of ten trials.

    The camera is 1 for visible images and 2 for infrared ones. Published results are the mean of ten trainings, one per
    trial.
    """
    if trial not in REGDB_TRIALS:
        raise ValueError(f'RegDB has trials {REGDB_TRIALS[0]} to {REGDB_TRIALS[-1]}, got {trial!r}')
    tables = {}
    for split in ('train', 'test'):
        rows: list[Row] = []
        for modality, folder, camera in ((VISIBLE, 'visible', 1), (INFRARED, 'thermal', 2)):
            for path, inner in _read_image_list('regdb', root, f'idx/{split}_{folder}_{trial}.txt'):
                rows.append((path, inner.split('/')[-2], camera, modality, split))
        tables[split] = Records.from_rows(rows)
    return Dataset('regdb', root, tables['train'], tables['test'], {'trial': trial})


def read_llcm(root: str) -> Dataset:
    """Read LLCM: 713 identities to train on, 351 to test on. Cameras of one number share a site in both modalities."""
    rows: list[Row] = []
    for modality, name in ((VISIBLE, 'vis'), (INFRARED, 'nir')):
        for path, inner in _read_image_list('llcm', root, f'idx/train_{name}.txt'):
            camera = _LLCM_CAMERA.search(inner.split('/')[-1])
            rows.append((path, inner.split('/')[-2], int(camera[1]) if camera else UNKNOWN_CAMERA, modality, 'train'))
    cells = []
    for modality, name in ((VISIBLE, 'test_vis'), (INFRARED, 'test_nir')):
        # The number comes from this folder's own name: "cam" may occur anywhere in the path above it.
        folder = _required('llcm', root, name)
        numbers = [_CAMERA_FOLDER.fullmatch(camera) for camera in _folders(folder)]
        cells += [(int(number[1]), modality, os.path.join(folder, number[0])) for number in numbers if number]
    cells.sort()
    test = _camera_folders(cells, _read_numbers('llcm', root, 'idx/test_id.txt'), 'test')
    return Dataset('llcm', root, Records.from_rows(rows), test)


def read_folder(root: str, *, test_share: float = 0.2, seed: int = 0) -> Dataset:
    """Read custom images in folders, see `LAYOUTS['folder']`.

    The camera is the number in a `c3_` or `cam3_` prefix of the file name, else 0 (unknown). Without `query` and
    `gallery` folders, a share of the identities is held out of `train` for testing. With them, `train` may be missing.

    Args:
        root: The folder.
        test_share: Share of the identities to hold out, 0 for none; ignored if there is a gallery.
        seed: Decides which identities are held out.
    """
    present = {split: os.path.isdir(os.path.join(root, split)) for split in ('train', 'query', 'gallery')}
    if present['query'] != present['gallery']:
        there, missing = ('query', 'gallery') if present['query'] else ('gallery', 'query')
        raise ValueError(f'{root} has a folder {there} but no {missing}; expected both or neither:{LAYOUTS["folder"]}')
    train = Records.from_rows([])
    if present['train'] or not present['query']:
        for modality in MODALITIES:
            _required('folder', root, f'train/{modality}')
        train = Records.from_rows(_person_folders(root, 'train'))
    if not present['query']:
        train, test = split_identities(train, test_share, seed)
        return Dataset('folder', root, train, test, {'test_share': test_share, 'seed': seed})
    test = []
    for split in ('query', 'gallery'):
        rows = _person_folders(root, split)
        if not rows:
            raise ValueError(f'{os.path.join(root, split)} has no image; expected:{LAYOUTS["folder"]}')
        test += rows
    return Dataset('folder', root, train, Records.from_rows(test))


def read_csv(root: str) -> Dataset:
    """Read custom images listed in a CSV file, see `LAYOUTS['csv']`.

    Cameras that are not numbers are numbered in the order of their names. An image that is listed both as query and as
    gallery becomes one record of split `test`.
    """
    rows = _number_cameras(root, _merge_repeated(root, _read_csv_lines(root)))
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
    return Dataset('csv', root, *tables)


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
        if value < 0:
            raise ValueError(f'{name} must not be negative, got {value}')
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
    'csv': read_csv,
    'folder': read_folder,
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


def _read_csv_lines(file_name: str) -> list[_Line]:
    columns = ('path', 'identity', 'camera', 'modality', 'split')
    base, lines = os.path.dirname(file_name), []
    with open(file_name, newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f'{file_name}: the first line lacks {", ".join(missing)}; expected:{LAYOUTS["csv"]}')
        for row in reader:
            where = f'{file_name}, line {reader.line_num}'
            if None in row or None in row.values():
                raise ValueError(f'{where}: expected {len(reader.fieldnames)} values, as in the first line')
            values = {column: row[column].strip() for column in columns}
            line = _Line(reader.line_num, **values | {'path': os.path.join(base, values['path'])})
            for column, allowed in (('modality', MODALITIES), ('split', SPLITS)):
                if values[column] not in allowed:
                    raise ValueError(
                        f'{where}: unknown {column} {values[column]!r}; expected one of {", ".join(allowed)}'
                    )
            if not line.identity:
                raise ValueError(f'{where}: the identity is empty')
            if not os.path.isfile(line.path):
                raise FileNotFoundError(f'{where}: there is no file {line.path}')
            lines.append(line)
    return lines


def _merge_repeated(file_name: str, lines: list[_Line]) -> list[_Line]:
    """Reduce to one line per image: query and gallery become test, duplicates are dropped, contradictions raise."""
    merged: dict[str, _Line] = {}
    dropped = 0
    for line in lines:
        path = os.path.normpath(line.path)
        first = merged.setdefault(path, line)
        if first is line:
            continue
        where = f'{file_name}, lines {first.number} and {line.number}: {line.path} is listed twice'
        if (first.identity, first.camera, first.modality) != (line.identity, line.camera, line.modality):
            raise ValueError(f'{where}, with different identities, cameras or modalities')
        if (first.split == 'train') != (line.split == 'train'):
            raise ValueError(f'{where}, for training and for testing')
        if first.split == line.split:
            dropped += 1
        else:
            merged[path] = replace(first, split='test')
    if dropped:
        _logger.warning(f'{file_name}: dropped {dropped} duplicate lines')
    return list(merged.values())


def _number_cameras(file_name: str, lines: list[_Line]) -> list[_Line]:
    names = sorted({line.camera for line in lines} - {''})
    if all(name.isdecimal() for name in names):
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


def _required(name: str, root: str, inner: str) -> str:
    path = os.path.join(root, *inner.split('/'))
    if not os.path.exists(path):
        raise FileNotFoundError(f'there is no {path}; dataset {name!r} expects in {root}:{LAYOUTS[name]}')
    return path


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f' (did you mean {close[0]!r}?)' if close else ''


def _folders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))


def _images(folder: str) -> list[str]:
    """Return the names of the images in a folder, sorted. Hidden files and non-images are ignored."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    return sorted(name for name in names if not name.startswith('.') and name.lower().endswith(IMAGE_SUFFIXES))


def _read_numbers(name: str, root: str, inner: str) -> list[int]:
    """Return the comma-separated numbers in a file."""
    path = _required(name, root, inner)
    with open(path, encoding='utf-8') as file:
        words = file.read().replace(',', ' ').split()
    for word in words:
        if not word.isdecimal():
            raise ValueError(f'{path}: expected one line of comma-separated numbers, got {word!r}')
    return [int(word) for word in words]


def _read_image_list(name: str, root: str, inner: str) -> list[tuple[str, str]]:
    """Return (path, path inside `root`) of every line `path label` of a file. The listed files must exist."""
    list_name = _required(name, root, inner)
    images = []
    with open(list_name, encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            words = line.rsplit(maxsplit=1)
            relative = words[0].strip().replace('\\', '/')
            if len(words) != 2 or not words[1].isdecimal() or '/' not in relative:
                raise ValueError(
                    f'{list_name}, line {number}: expected `<folder>/<identity>/<image> <label>`, got {line.strip()!r}'
                )
            path = os.path.join(root, *relative.split('/'))
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f'{list_name}, line {number}: there is no file {path}; '
                    f'dataset {name!r} expects in {root}:{LAYOUTS[name]}'
                )
            images.append((path, relative))
    return images


def _camera_folders(cells: Sequence[tuple[int, str, str]], identities: Iterable[int], split: str) -> Records:
    """Return records of `<camera folder>/<identity, 4 digits>/<image>`, by identity, then camera, then file name.

    Args:
        cells: Number, modality and folder of every camera.
        identities: Numbers of the identities.
        split: Split of every record.
    """
    rows: list[Row] = []
    empty, unseen = [], []
    for name in sorted({f'{number:04d}' for number in identities}):
        before = len(rows)
        for camera, modality, camera_folder in cells:
            folder = os.path.join(camera_folder, name)
            if not os.path.isdir(folder):  # not every camera has seen everyone
                continue
            images = _images(folder)
            rows += [(os.path.join(folder, image), name, camera, modality, split) for image in images]
            if not images:
                empty.append(folder)
        if len(rows) == before:
            unseen.append(name)
    _warn_counted(empty, 'folders have no image')
    _warn_counted(unseen, f'of the listed {split} identities have no image')
    return Records.from_rows(rows)


def _person_folders(root: str, split: str) -> list[Row]:
    """Return rows of `<split>/<modality>/<person>/<image>`."""
    rows: list[Row] = []
    empty = []
    for modality in MODALITIES:
        modality_folder = os.path.join(root, split, modality)
        for person in _folders(modality_folder) if os.path.isdir(modality_folder) else ():
            folder = os.path.join(modality_folder, person)
            images = _images(folder)
            for image in images:
                prefix = _CAMERA_PREFIX.match(image)
                camera = int(prefix[1]) if prefix else UNKNOWN_CAMERA
                rows.append((os.path.join(folder, image), person, camera, modality, split))
            if not images:
                empty.append(folder)
    _warn_counted(empty, 'folders have no image')
    return rows


def _identities_of(records: Records, modality: str) -> set[str]:
    return set(records.identity[records.modality == modality].tolist())


def _check(dataset: Dataset) -> None:
    """Warn about oddities of a dataset, and raise if it has no image."""
    train, test = dataset.train, dataset.test
    where = dataset.root or dataset.name
    if not len(train) and not len(test):
        expected = f'; expected:{LAYOUTS[dataset.name]}' if dataset.name in LAYOUTS else ''
        raise ValueError(f'{where} has no image{expected}')
    shared = set(train.identity.tolist()) & set(test.identity.tolist())
    _warn_counted(sorted(shared), 'identities are in both the training and the test set, which inflates the result')
    published = PUBLISHED_COUNTS.get(dataset.name)
    counts = tuple(
        int((table.modality == modality).sum()) for table in (train, test) for modality in (VISIBLE, INFRARED)
    )
    if published is not None and counts != published:
        names = ('training visible', 'training infrared', 'test visible', 'test infrared')
        differing = [
            f'{name} {count:,} (published {expected:,})'
            for name, count, expected in zip(names, counts, published, strict=True)
            if count != expected
        ]
        _logger.warning(f'{where}: image counts differ from the published {dataset.name}: {", ".join(differing)}')


def _warn_counted(names: Sequence[str], what: str) -> None:
    if names:
        _logger.warning(f'{len(names)} {what}: {format_list(names)}')


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
        if count < 1:
            raise ValueError(f'{name} must be at least 1, got {count}')
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
