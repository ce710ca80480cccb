"""Data sets as record tables: SYSU-MM01, RegDB and LLCM as their owners distribute them, folders, CSV files, SynthVI.

Every reader returns a `Dataset`: what may be learned from, and every image that a protocol may need, once. Nothing is
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

from ..constants import INFRARED, MODALITIES, SPLITS, UNKNOWN_CAMERA, VISIBLE
from ..synthvi.render import camera_numbers, camera_order, image_address
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
# Images of (training visible, training infrared, test visible, test infrared), as the owners and their users count.
PUBLISHED_COUNTS = {
    'sysu_mm01': (22258, 11909, 6775, 3803),
    'regdb': (2060, 2060, 2060, 2060),
    'llcm': (16946, 13975, 8680, 7166),
}
SYSU_CAMERAS = ((1, VISIBLE), (2, VISIBLE), (3, INFRARED), (4, VISIBLE), (5, VISIBLE), (6, INFRARED))
# The owners' order of every identity's images in every camera, from which their evaluation takes the first ones.
PERMUTATION_FILE = 'exp/rand_perm_cam.mat'
PERMUTATION_VARIABLE = 'rand_perm_cam'
REGDB_TRIALS = range(1, 11)

_CAMERA_PREFIX = re.compile(r'c(?:am)?(\d+)_', re.IGNORECASE)  # c3_0001.jpg, cam3_0001.jpg
_LLCM_CAMERA = re.compile(r'_c(\d+)_')  # 0001_c01_s185535_f7010_nir.jpg
_CAMERA_FOLDER = re.compile(r'cam(\d+)')


def create_dataset(name: str, root: str | os.PathLike | None = None, **options: object) -> Dataset:
    """Read a data set's record tables.

    Args:
        name: `sysu_mm01`, `regdb`, `llcm`, `folder`, `csv` or `synthetic`.
        root: Its folder; for `csv` the CSV file; nothing for `synthetic`.
        **options: The reader's own: `trial` (regdb); `test_share`, `seed` (folder); for `synthetic` see
            `read_synthetic`.

    Raises:
        ValueError: On an unknown name or option, or on data that make no sense; the message says where.
        FileNotFoundError: If a file or folder is missing; the message shows the layout that is expected.
    """
    if name not in READERS:
        raise ValueError(f'unknown dataset {name!r}{_hint(name, READERS)}; available: {", ".join(sorted(READERS))}')
    reader = READERS[name]
    accepted = [option for option in inspect.signature(reader).parameters if option != 'root']
    for option in options:
        if option not in accepted:
            raise ValueError(
                f'dataset {name!r} has no option {option!r}{_hint(option, accepted)}; '
                f'its options: {", ".join(accepted) or "none"}'
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


def split_identities(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Hold a share of the identities out, as a whole.

    Only identities with images of both modalities can be held out: the others cannot be searched for across them.

    Args:
        records: The table to divide.
        share: Share of the identities with both modalities, at least two of them; 0 holds nobody out.
        seed: Which identities these are.

    Returns:
        The records that are kept as they are, and those held out, whose split is `test`.
    """
    if not 0 <= share < 1:
        raise ValueError(f'the share of identities to hold out must be at least 0 and less than 1, got {share}')
    candidates = sorted(_identities_of(records, VISIBLE) & _identities_of(records, INFRARED))
    count = max(2, round(share * len(candidates))) if share > 0 else 0
    if share > 0 and len(candidates) < count + 2:
        raise ValueError(
            f'cannot hold out {share:g} of the {len(candidates)} identities that have images of both modalities: '
            f'at least two are needed to search for, and two to learn from; '
            f'a share of 0 (--val-share 0, test_share=0) holds out nobody'
        )
    chosen = set(random.Random(seed).sample(candidates, count))
    held_out = [name in chosen for name in records.identity.tolist()]
    kept_rows = [row for row, out in enumerate(held_out) if not out]
    out_rows = [row for row, out in enumerate(held_out) if out]
    return records[kept_rows], _with_split(records[out_rows], 'test')


def read_sysu_mm01(root: str) -> Dataset:
    """SYSU-MM01: learned from on its 395 training and validation identities, tested on the other 96.

    The test table holds every image of the test identities in all six cameras.
    """
    lists = {name: _read_numbers('sysu_mm01', root, f'exp/{name}_id.txt') for name in ('train', 'val', 'test')}
    learned = lists['train'] + lists['val']
    both = sorted(set(learned) & set(lists['test']))
    if both:
        raise ValueError(f'{root}: identity {both[0]} is listed for training and for testing; check exp/*_id.txt')
    cells = [(camera, modality, _required('sysu_mm01', root, f'cam{camera}')) for camera, modality in SYSU_CAMERAS]
    return Dataset(
        'sysu_mm01', root, _camera_folders(cells, learned, 'train'), _camera_folders(cells, lists['test'], 'test')
    )


def read_regdb(root: str, *, trial: int = 1) -> Dataset:
    """RegDB: 206 of its 412 identities are learned from, the others tested; each of the ten trials divides them anew.

    The camera of every visible image is 1, that of every infrared one 2. A published figure is the mean of ten
    trainings, one per trial.
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
    """LLCM: 713 identities to learn from, 351 to test on; visible and infrared cameras of one number share a site."""
    rows: list[Row] = []
    for modality, name in ((VISIBLE, 'vis'), (INFRARED, 'nir')):
        for path, inner in _read_image_list('llcm', root, f'idx/train_{name}.txt'):
            camera = _LLCM_CAMERA.search(inner.split('/')[-1])
            rows.append((path, inner.split('/')[-2], int(camera[1]) if camera else UNKNOWN_CAMERA, modality, 'train'))
    cells = []
    for modality, name in ((VISIBLE, 'test_vis'), (INFRARED, 'test_nir')):
        # The number is read from this folder's own name: "cam" may occur anywhere in the path above it.
        folder = _required('llcm', root, name)
        numbers = [_CAMERA_FOLDER.fullmatch(camera) for camera in _folders(folder)]
        cells += [(int(number[1]), modality, os.path.join(folder, number[0])) for number in numbers if number]
    cells.sort()
    test = _camera_folders(cells, _read_numbers('llcm', root, 'idx/test_id.txt'), 'test')
    return Dataset('llcm', root, Records.from_rows(rows), test)


def read_folder(root: str, *, test_share: float = 0.2, seed: int = 0) -> Dataset:
    """Own images in folders, see `LAYOUTS['folder']`.

    The camera is the number of a `c3_` or `cam3_` prefix of the file name, else 0 (unknown). Without `query` and
    `gallery` folders, a share of the identities is held out of `train` and tested on; with them, `train` may be missing
    (for testing only).

    Args:
        root: The folder.
        test_share: Share of the identities that is held out, 0 for none; without meaning if there is a gallery.
        seed: Which identities these are.
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
            raise ValueError(f'{os.path.join(root, split)} holds no image; expected:{LAYOUTS["folder"]}')
        test += rows
    return Dataset('folder', root, train, Records.from_rows(test))


def read_csv(root: str) -> Dataset:
    """Own images in one CSV file, see `LAYOUTS['csv']`.

    Cameras that are not numbers are numbered in the order of their names. An image that is listed as query and as
    gallery is one record of split `test`.
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
    """SynthVI, rendered when an image is read.

    Args:
        identities: How many to learn from.
        test_identities: How many to test on, numbered after those.
        seed: Of the people, their images and the cameras.
        spectrum: Of the infrared cameras, `near-infrared` or `thermal`.
        size: Height and width of an image.
        images_per_modality: Per identity.
        visible_cameras: How many.
        infrared_cameras: How many.
        first_camera: Number of the first camera; others give unseen backgrounds, viewpoints and light.
        first_identity: Number of the first identity; others give unseen people.
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
    first_tested = first_identity + identities
    train = synthetic_records(range(first_identity, first_tested), split='train', **options)
    test = synthetic_records(range(first_tested, first_tested + test_identities), split='test', **options)
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
            raise ValueError(f'{file_name}: the first line names no {", ".join(missing)}; expected:{LAYOUTS["csv"]}')
        for row in reader:
            where = f'{file_name}, line {reader.line_num}'
            if None in row or None in row.values():
                raise ValueError(f'{where}: expected {len(reader.fieldnames)} values as in the first line')
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
    """One line per image: query and gallery make test, repetitions are dropped, contradictions are errors."""
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
        _logger.warning(f'{file_name}: {dropped} repeated lines are dropped')
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
        raise ValueError(f'dataset {name!r} needs its {what}: root (--data-dir); expected:{LAYOUTS[name]}')
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
    """Names of the images in a folder, sorted; Thumbs.db, .DS_Store and their like are passed over."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    return sorted(name for name in names if not name.startswith('.') and name.lower().endswith(IMAGE_SUFFIXES))


def _read_numbers(name: str, root: str, inner: str) -> list[int]:
    """The comma-separated numbers of a file."""
    path = _required(name, root, inner)
    with open(path, encoding='utf-8') as file:
        words = file.read().replace(',', ' ').split()
    for word in words:
        if not word.isdecimal():
            raise ValueError(f'{path}: expected one line of comma-separated numbers, got {word!r}')
    return [int(word) for word in words]


def _read_image_list(name: str, root: str, inner: str) -> list[tuple[str, str]]:
    """(path, path inside `root`) of every line `path label` of a file; the files must exist."""
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
    """Records of `<camera folder>/<identity, 4 digits>/<image>`, by identity, then camera, then file name.

    Args:
        cells: Camera number, modality and folder of every camera.
        identities: Numbers of the identities to take.
        split: Split of every record.
    """
    rows: list[Row] = []
    empty, unseen = [], []
    for name in sorted({f'{number:04d}' for number in identities}):
        before = len(rows)
        for camera, modality, camera_folder in cells:
            folder = os.path.join(camera_folder, name)
            if not os.path.isdir(folder):  # not everybody passes every camera
                continue
            images = _images(folder)
            rows += [(os.path.join(folder, image), name, camera, modality, split) for image in images]
            if not images:
                empty.append(folder)
        if len(rows) == before:
            unseen.append(name)
    _warn_counted(empty, 'folders hold no image')
    _warn_counted(unseen, f'of the listed {split} identities have no image')
    return Records.from_rows(rows)


def _person_folders(root: str, split: str) -> list[Row]:
    """Rows of `<split>/<modality>/<person>/<image>`."""
    rows: list[Row] = []
    empty = []
    for modality in MODALITIES:
        modality_folder = os.path.join(root, split, modality)
        for person in _folders(modality_folder) if os.path.isdir(modality_folder) else ():
            folder = os.path.join(modality_folder, person)
            images = _images(folder)
            for image in images:
                camera = _CAMERA_PREFIX.match(image)
                rows.append(
                    (
                        os.path.join(folder, image),
                        person,
                        int(camera[1]) if camera else UNKNOWN_CAMERA,
                        modality,
                        split,
                    )
                )
            if not images:
                empty.append(folder)
    _warn_counted(empty, 'folders hold no image')
    return rows


def _with_split(records: Records, split: str) -> Records:
    return replace(records, split=[split] * len(records))


def _identities_of(records: Records, modality: str) -> set[str]:
    return set(records.identity[records.modality == modality].tolist())


def _check(dataset: Dataset) -> None:
    """Say aloud what is odd about a data set; without any image it is an error."""
    train, test = dataset.train, dataset.test
    where = dataset.root or dataset.name
    if not len(train) and not len(test):
        expected = f'; expected:{LAYOUTS[dataset.name]}' if dataset.name in LAYOUTS else ''
        raise ValueError(f'{where} holds no image{expected}')
    single = _identities_of(train, VISIBLE) ^ _identities_of(train, INFRARED)
    _warn_counted(sorted(single), 'training identities have images of one modality only and are skipped for batches')
    shared = set(train.identity.tolist()) & set(test.identity.tolist())
    _warn_counted(sorted(shared), 'identities are both learned from and tested on, which flatters the result')
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
        more = f' and {len(names) - 5} more' if len(names) > 5 else ''
        _logger.warning(f'{len(names)} {what}: {", ".join(names[:5])}{more}')


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
    """A record table of rendered images; nothing is rendered yet, `path` holds addresses.

    Every identity has `images_per_modality` images in each modality, numbered from 0 and dealt evenly to the
    modality's cameras in an order of the identity's own, so that with fewer images than cameras not everybody is
    seen by the same ones.

    Args:
        identities: Numbers of the identities, for example `range(100)`. Their names are these, with five digits.
        split: `train`, `query`, `gallery` or `test`, the same for all.
        seed: See `render`.
        spectrum: See `render`.
        size: See `render`.
        images_per_modality: Images of each identity in each modality.
        visible_cameras: How many visible cameras there are.
        infrared_cameras: How many infrared cameras there are.
        first_camera: Shifts all camera numbers (see `camera_numbers`), for cameras that nobody has seen.

    Raises:
        ValueError: If a number is out of range or an identity is given twice.
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
        raise ValueError('an identity is given twice; every number may occur once')
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
