"""Write SynthVI to disk, in the layouts of the public datasets and of custom folders.

The dataset reader of the same name reads what is written; `market` is read by `folder` with `names=market`. File names,
lists and camera numbers are those of the real dataset; at full size, so are the numbers of identities and images. This
lets you test a pipeline at its real scale before, or without, having the licensed images.
"""

import functools
import io
import json
import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..constants import FULL_SIZES, INFRARED, LAYOUT_NAMES, MODALITIES, SPECTRA, VISIBLE
from ..options import check_range
from ..synthvi.render import render
from .readers import PERMUTATION_FILE, PERMUTATION_VARIABLE, REGDB_TRIALS, SYSU_CAMERAS
from .video import BUPT_CAMERAS, BUPT_FOLDERS, VCM_FOLDERS, VCM_MODALITIES
from .workers import map_chunks

_logger = logging.getLogger(__name__)

ABOUT_FILE = 'synthvi.json'  # in every folder that is written here: its contents, and the sign that it is complete
JPEG_QUALITY = 95

_SYSU_IMAGES = {VISIBLE: 2, INFRARED: 4}  # per identity and camera: eight of each modality
_REGDB_IMAGES = 10  # per identity and modality, as in the real dataset
_LLCM_IMAGES = 2  # per identity, modality and camera
_LLCM_NO_INFRARED = 3  # the one camera without infrared images
_FOLDER_IMAGES = 6  # per identity and modality
_TRACKLET_IMAGES = 12  # or up to two more; HITSZ-VCM's owners leave out shorter tracklets
_FRAME_STEP = 5  # between the frame numbers of a tracklet's images
_PERMUTATION_TRIALS = 10
# Replaces SciPy's header text of a MATLAB file, which has the time and the platform.
_MATLAB_HEADER = b'MATLAB 5.0 MAT-file, written by vireid_timm'.ljust(116)

Cells = dict[tuple[int, int], int]  # (identity, camera) -> number of images


class PlannedImage(NamedTuple):
    """One image to render, and its path inside the root folder."""

    path: str
    modality: str
    identity: int
    camera: int
    image: int


@dataclass(frozen=True, eq=False)
class LayoutPlan:
    """The contents of a layout.

    Attributes:
        images: The images, in the order of writing.
        lists: Path inside the root folder -> text of a list of identities or images.
        identities: Number of identities to train on.
        test_identities: Number of further identities to test on.
    """

    images: list[PlannedImage]
    lists: dict[str, str]
    identities: int
    test_identities: int


def write_layout(
    root: str | os.PathLike,
    layout: str,
    *,
    identities: int | None = None,
    test_identities: int | None = None,
    seed: int = 0,
    spectrum: str | None = None,
    size: tuple[int, int] = (128, 64),
    full_size: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> LayoutPlan:
    """Render SynthVI into a folder. The folder appears when it is complete; the same arguments give the same files.

    Args:
        root: The folder to create. Nothing is done if it already has these contents.
        layout: `folder`, `market`, `sysu_mm01`, `regdb`, `llcm`, `hitsz_vcm` or `buptcampus`.
        identities: Number of identities to train on; see `plan_layout`.
        test_identities: Number of identities to test on; see `plan_layout`.
        seed: Seed of the people, their images and the cameras.
        spectrum: `near-infrared` or `thermal`; None for the layout's own: thermal for RegDB, else near-infrared.
        size: Height and width of the images.
        full_size: Use the real dataset's numbers of identities and images.
        workers: Number of workers that render; None for one per core, at most 8; 0 to render in the calling thread.
        progress: Show a progress bar, if the output is a terminal.

    Returns:
        What was written.

    Raises:
        ValueError: On invalid arguments, or if the folder has other contents.
        OSError: If writing fails. Nothing is left behind.
    """
    plan = plan_layout(layout, identities=identities, test_identities=test_identities, full_size=full_size)
    spectrum = spectrum or ('thermal' if layout == 'regdb' else 'near-infrared')
    if spectrum not in SPECTRA:
        raise ValueError(f'unknown spectrum {spectrum!r}; expected one of {", ".join(SPECTRA)}')
    target = Path(root).expanduser().absolute()
    about = {
        'layout': layout,
        'identities': plan.identities,
        'test_identities': plan.test_identities,
        'full_size': full_size,
        'seed': seed,
        'spectrum': spectrum,
        'size': list(size),
        'images': len(plan.images),
    }
    if _is_written(target, about):
        _logger.info(f'{target} already has these {len(plan.images):,} images')
        return plan
    partial = target.with_name(f'{target.name}.partial')
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f'{partial} was left by an interrupted run, or another run is writing it; '
            'if no run is, remove it and try again'
        ) from None
    try:
        _write_plan(plan, partial, seed, spectrum, tuple(size), workers, progress)
        if layout == 'sysu_mm01':
            write_permutations(plan, partial, seed)
        (partial / ABOUT_FILE).write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')
        if target.is_dir():
            target.rmdir()  # empty, as _is_written has checked
        os.rename(partial, target)
    except ChildProcessError:  # an OSError, but not about the disk
        raise
    except OSError as error:
        raise OSError(
            error.errno, f'cannot write {len(plan.images):,} images to {target} ({error.strerror})'
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return plan


def plan_layout(
    layout: str,
    *,
    identities: int | None = None,
    test_identities: int | None = None,
    full_size: bool = False,
) -> LayoutPlan:
    """Return what `write_layout` would write, without rendering anything.

    Args:
        layout: `folder`, `market`, `sysu_mm01`, `regdb`, `llcm`, `hitsz_vcm` or `buptcampus`.
        identities: Number of identities to train on.
        test_identities: Number of further identities to test on; None for a fifth of `identities`, at least 8. For
            RegDB, whose trials halve the identities, None means as many as `identities`.
        full_size: Use the real dataset's numbers instead, for `sysu_mm01`, `regdb` and `llcm`.

    Raises:
        ValueError: On invalid arguments.
    """
    if layout not in LAYOUT_NAMES:
        raise ValueError(f'unknown layout {layout!r}; expected one of {", ".join(LAYOUT_NAMES)}')
    if full_size:
        if layout not in FULL_SIZES:
            raise ValueError(
                f'layout {layout} has no full size (--full-size); choose {", ".join(FULL_SIZES)}, or give a number of '
                'identities'
            )
        if identities is not None or test_identities is not None:
            raise ValueError('full_size (--full-size) sets the numbers of identities; give one or the other')
        if layout == 'regdb':
            return _plan_regdb(206, 206)
        return _plan_full_sysu_mm01() if layout == 'sysu_mm01' else _plan_full_llcm()
    check_range('the number of identities', identities, 1)
    if test_identities is None:
        test_identities = identities if layout == 'regdb' else max(8, identities // 5)
    check_range('the number of test identities', test_identities, 1)
    planners = {
        'folder': _plan_folder,
        'market': _plan_market,
        'sysu_mm01': _plan_sysu_mm01,
        'regdb': _plan_regdb,
        'llcm': _plan_llcm,
        'hitsz_vcm': _plan_hitsz_vcm,
        'buptcampus': _plan_buptcampus,
    }
    return planners[layout](identities, test_identities)


def write_permutations(plan: LayoutPlan, folder: Path, seed: int) -> None:
    """Write the file that SYSU-MM01's owners sample galleries with, in their format: `exp/rand_perm_cam.mat`.

    It is a cell array of the cameras, each a cell array by identity number, each a matrix: row t orders the images of
    that identity and camera for trial t, counted from 1. Without images it is 10x0: the owners' code takes rows of it.
    Without SciPy, the file is skipped.

    Args:
        plan: A plan of layout `sysu_mm01`.
        folder: The layout's root folder.
        seed: Seed of the permutations.
    """
    try:
        from scipy.io import savemat
    except ImportError:
        _logger.info(
            f"Skipping {PERMUTATION_FILE}, which draw 'official' needs: to get it, install the extra `official` "
            '(pip install "vireid_timm[official]") and write to another folder'
        )
        return
    rng = random.Random(f'permutations {seed}')
    counts = Counter((image.camera, image.identity) for image in plan.images)
    last = max(identity for _, identity in counts)
    cameras = np.empty((len(SYSU_CAMERAS), 1), dtype=object)
    for place, (camera, _) in enumerate(SYSU_CAMERAS):
        cameras[place, 0] = np.empty((last, 1), dtype=object)
        for identity in range(1, last + 1):
            numbers = range(1, counts[camera, identity] + 1)
            orders = [rng.sample(numbers, len(numbers)) for _ in range(_PERMUTATION_TRIALS)]
            cameras[place, 0][identity - 1, 0] = np.asarray(orders, dtype=np.uint16)
    content = io.BytesIO()
    savemat(content, {PERMUTATION_VARIABLE: cameras}, do_compression=True)  # adds a checksum, as MATLAB does
    (folder / PERMUTATION_FILE).write_bytes(_MATLAB_HEADER + content.getvalue()[len(_MATLAB_HEADER) :])


def _is_written(target: Path, about: dict[str, object]) -> bool:
    """Return whether the folder already has these contents. It may be missing or empty; other contents raise."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise ValueError(f'{target} is a file; expected the name of a folder to create')
    if not any(target.iterdir()):
        return False
    try:
        held = json.loads((target / ABOUT_FILE).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise ValueError(f'{target} is not empty and was not written by this command; choose another folder') from None
    if held != about:
        differing = [
            f'{key} {held.get(key)!r} instead of {value!r}' for key, value in about.items() if held.get(key) != value
        ]
        raise ValueError(
            f'{target} has other SynthVI images ({", ".join(differing)}); remove it or choose another folder'
        )
    return True


def _write_plan(
    plan: LayoutPlan,
    folder: Path,
    seed: int,
    spectrum: str,
    size: tuple[int, int],
    workers: int | None,
    progress: bool,
) -> None:
    for inner in sorted({os.path.dirname(name) for name in (*plan.lists, *(p.path for p in plan.images))}):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    for name, text in plan.lists.items():
        (folder / name).write_text(text, encoding='utf-8')
    map_chunks(
        functools.partial(_write_chunk, folder=str(folder), seed=seed, spectrum=spectrum, size=size),
        plan.images,
        lambda start, result: None,
        rendered=len(plan.images),
        workers=workers,
        label='rendering images',
        progress=progress,
    )


def _write_chunk(
    images: list[PlannedImage],
    folder: str,
    seed: int,
    spectrum: str,
    size: tuple[int, int],
) -> None:
    for plan in images:
        pixels = render(plan.modality, plan.identity, plan.camera, plan.image, seed=seed, spectrum=spectrum, size=size)
        # Infrared has three channels too, as in the real files: other code relies on them.
        Image.fromarray(pixels).save(os.path.join(folder, plan.path), quality=JPEG_QUALITY)


def _plan_folder(identities: int, test_identities: int) -> LayoutPlan:
    """Plan custom folders; every second image of a test identity is a query, the others are the gallery."""
    cameras = {modality: [number for number, kind in SYSU_CAMERAS if kind == modality] for modality in MODALITIES}
    images = []
    for identity in range(identities + test_identities):
        for modality in MODALITIES:
            for image in range(_FOLDER_IMAGES):
                split = 'train' if identity < identities else ('gallery', 'query')[image % 2]
                camera = cameras[modality][(identity + image) % len(cameras[modality])]
                path = f'{split}/{modality}/{identity:05d}/c{camera}_{image:04d}.jpg'
                images.append(PlannedImage(path, modality, identity, camera, image))
    return LayoutPlan(images, {}, identities, test_identities)


def _plan_market(identities: int, test_identities: int) -> LayoutPlan:
    """Plan the custom folders with Market-1501's file names instead of a folder for each person."""
    plan = _plan_folder(identities, test_identities)
    images = []
    for image in plan.images:
        split, modality, _, _ = image.path.split('/')
        name = f'{image.identity + 1:04d}_c{image.camera}s1_{image.image:06d}_01.jpg'  # 0000 would be a distractor
        images.append(image._replace(path=f'{split}/{modality}/{name}', identity=image.identity + 1))
    return replace(plan, images=images)


def _plan_sysu_mm01(identities: int, test_identities: int) -> LayoutPlan:
    """Plan a small SYSU-MM01: every camera sees everyone; a quarter of the training identities is the val list."""
    numbers = range(1, identities + test_identities + 1)
    cells = {(identity, camera): _SYSU_IMAGES[modality] for identity in numbers for camera, modality in SYSU_CAMERAS}
    num_train = identities - identities // 4
    return _sysu_plan(cells, numbers[:num_train], numbers[num_train:identities], numbers[identities:])


def _plan_full_sysu_mm01() -> LayoutPlan:
    """Plan the real SYSU-MM01: who is seen by which camera, and how often, as its stored permutations tell.

    All cameras see identities up to 333; only 3, 4 and 5 see later ones. The indoor visible cameras 1 and 2 do not see
    40 of the test identities, which leaves 2,208 of the 3,803 queries with a match in the indoor search.
    """
    rng = random.Random('SYSU-MM01')
    test = [6, 333, *rng.sample(range(7, 333), 94)]
    early = [1, *rng.sample(sorted(set(range(2, 334)) - set(test)), 199)]
    late = [533, *rng.sample(range(334, 533), 95)]
    val = rng.sample(sorted(set(range(334, 534)) - set(late)), 99)
    rng.shuffle(test)
    indoor, outdoor = test[:56], test[56:]
    cells: Cells = {}
    # Camera, number of its images, their identities, and the fewest and most images of each.
    for camera, total, seen, least, most in (
        (1, 1374, indoor, 13, 42),
        (2, 1565, indoor, 18, 40),
        (3, 1088, indoor[2:], 20, 26),
        (3, 795, outdoor[1:], 20, 26),
        (4, 1918, indoor[:2] + indoor[3:] + outdoor[:1] + outdoor[2:], 20, 27),
        (5, 1918, indoor + outdoor[:2] + outdoor[3:], 20, 24),
        (6, 1920, test, 20, 20),
        (1, 4721, early[:194], 13, 42),
        (2, 5753, early[:195], 18, 40),
        (3, 5929, early[3:] + late, 20, 26),
        (4, 4821, early[:187] + late, 10, 27),
        (5, 4989, early[2:] + late, 10, 27),
        (6, 4000, early, 20, 20),
        (3, 1980, val, 20, 20),
        (4, 987, val, 6, 20),
        (5, 987, val, 6, 20),
    ):
        cells |= _spread(rng, total, [(identity, camera) for identity in seen], least, most)
    return _sysu_plan(cells, early + late, val, test)


def _sysu_plan(cells: Cells, train: Sequence[int], val: Sequence[int], test: Sequence[int]) -> LayoutPlan:
    modality_of = dict(SYSU_CAMERAS)
    images = [
        PlannedImage(f'cam{camera}/{identity:04d}/{image + 1:04d}.jpg', modality_of[camera], identity, camera, image)
        for (identity, camera), count in sorted(cells.items())
        for image in range(count)
    ]
    listed = {'train': train, 'val': val, 'test': test, 'available': [*train, *val, *test]}
    lists = {f'exp/{name}_id.txt': _number_line(numbers) for name, numbers in listed.items()}
    return LayoutPlan(images, lists, len(train) + len(val), len(test))


def _plan_regdb(identities: int, test_identities: int) -> LayoutPlan:
    """Plan RegDB, small or real (206 and 206). Each trial draws its training identities anew."""
    numbers = range(1, identities + test_identities + 1)
    folders = ((VISIBLE, 'visible', 'Visible', 1), (INFRARED, 'thermal', 'Thermal', 2))
    paths: dict[tuple[int, str], list[str]] = {}
    images = []
    for identity in numbers:
        for modality, word, folder, camera in folders:
            for image in range(_REGDB_IMAGES):
                path = f'{folder}/{identity}/synthvi_{word[0]}_{image:05d}_{identity}.bmp'
                paths.setdefault((identity, word), []).append(path)
                images.append(PlannedImage(path, modality, identity, camera, image))
    lists = {}
    for trial in REGDB_TRIALS:
        train = set(random.Random(f'RegDB trial {trial}').sample(numbers, identities))
        for split in ('train', 'test'):
            members = [identity for identity in numbers if (identity in train) == (split == 'train')]
            for _, word, _, _ in folders:
                lists[f'idx/{split}_{word}_{trial}.txt'] = _labelled_lines([paths[member, word] for member in members])
    return LayoutPlan(images, lists, identities, test_identities)


def _plan_llcm(identities: int, test_identities: int) -> LayoutPlan:
    """Plan a small LLCM: three of the nine cameras see each identity."""
    rng = random.Random('small LLCM')
    numbers = range(1, identities + test_identities + 1)
    visible = [(number, camera) for number in numbers for camera in sorted(rng.sample(range(1, 10), 3))]
    cells = {
        VISIBLE: dict.fromkeys(visible, _LLCM_IMAGES),
        INFRARED: dict.fromkeys([cell for cell in visible if cell[1] != _LLCM_NO_INFRARED], _LLCM_IMAGES),
    }
    return _llcm_plan(cells, numbers[:identities], numbers[identities:])


def _plan_full_llcm() -> LayoutPlan:
    """Plan the real LLCM's numbers of identities and images. Five random cameras see each identity."""
    rng = random.Random('LLCM')
    test = sorted([3, *rng.sample([*range(1, 3), *range(4, 1065)], 350)])
    train = sorted(set(range(1, 1065)) - set(test))
    cells: dict[str, Cells] = {VISIBLE: {}, INFRARED: {}}
    for numbers, num_visible, num_infrared in ((train, 16946, 13975), (test, 8680, 7166)):
        visible = [(number, camera) for number in numbers for camera in sorted(rng.sample(range(1, 10), 5))]
        infrared = [cell for cell in visible if cell[1] != _LLCM_NO_INFRARED]
        cells[VISIBLE] |= _spread(rng, num_visible, visible, 2, 20)
        cells[INFRARED] |= _spread(rng, num_infrared, infrared, 2, 20)
    return _llcm_plan(cells, train, test)


def _llcm_plan(cells: dict[str, Cells], train: Sequence[int], test: Sequence[int]) -> LayoutPlan:
    images, lists, tested = [], {'idx/test_id.txt': _number_line(test)}, set(test)
    for modality, word in ((VISIBLE, 'vis'), (INFRARED, 'nir')):
        paths: dict[int, list[str]] = {}
        for (identity, camera), count in sorted(cells[modality].items()):
            folder = f'test_{word}/cam{camera}/{identity:04d}' if identity in tested else f'{word}/{identity:04d}'
            for image in range(count):
                stamp = f's{180000 + 100 * camera}_f{1000 + image}'
                path = f'{folder}/{identity:04d}_c{camera:02d}_{stamp}_{word}.jpg'
                paths.setdefault(identity, []).append(path)
                images.append(PlannedImage(path, modality, identity, camera, image))
        for split, members in (('train', train), ('test', test)):
            lists[f'idx/{split}_{word}.txt'] = _labelled_lines([paths[identity] for identity in sorted(members)])
    return LayoutPlan(images, lists, len(train), len(test))


def _plan_hitsz_vcm(identities: int, test_identities: int) -> LayoutPlan:
    """Plan a small HITSZ-VCM: two visible and two infrared tracklets of each identity, one of each at one place."""
    rng = random.Random('small HITSZ-VCM')
    images, lists = [], {}
    for split, numbers in (
        ('train', range(1, identities + 1)),
        ('test', range(identities + 1, identities + test_identities + 1)),
    ):
        names, tracklets = [], []
        for identity in numbers:
            first, shared, last = rng.sample(range(1, 7), 3)
            for kind, camera in ((2, first), (2, shared), (1, shared), (1, last)):
                start = len(names) + 1
                for image in range(_tracklet_length(identity, camera)):
                    file = f'{_FRAME_STEP * image + 1}.jpg'
                    path = f'{split.capitalize()}/{identity:04d}/{VCM_FOLDERS[kind]}/D{camera}/{file}'
                    images.append(PlannedImage(path, VCM_MODALITIES[kind], identity, camera, image))
                    names.append(f'{identity:04d}M{kind}D{camera}T1F{file}')
                tracklets.append((kind, start, len(names), identity, camera))
        lists[f'info/{split}_name.txt'] = ''.join(f'{name}\n' for name in names)
        lists[f'info/track_{split}_info.txt'] = ''.join(' '.join(map(str, values)) + '\n' for values in tracklets)
    queries = [str(number) for number, (kind, *_) in enumerate(tracklets, 1) if VCM_MODALITIES[kind] == INFRARED]
    lists['info/query_IDX.txt'] = ' '.join(queries) + '\n'
    return LayoutPlan(images, lists, identities, test_identities)


def _plan_buptcampus(identities: int, test_identities: int) -> LayoutPlan:
    """Plan a small BUPTCampus: pairs of tracklets in two cameras; of test identities, one tracklet is the query."""
    rng = random.Random('small BUPTCampus')
    images, paths = [], {}
    lists: dict[str, list[str]] = {'train': [], 'query': [], 'gallery': []}
    for identity in range(1, identities + test_identities + 1):
        for place, camera in enumerate(rng.sample(range(1, len(BUPT_CAMERAS) + 1), 2)):
            name, modalities, split = BUPT_CAMERAS[camera - 1], MODALITIES, 'train'
            if identity > identities:
                modalities = (MODALITIES[identity % 2],) if place == 0 else MODALITIES
                split = 'gallery' if place else 'query'
            words = ['RGB/IR'] if split == 'train' else [BUPT_FOLDERS[modality] for modality in modalities]
            lists[split] += [f'{identity} {word} {name} 1\n' for word in words]
            for modality in modalities:
                word, files = BUPT_FOLDERS[modality], []
                for image in range(_tracklet_length(identity, camera)):
                    files.append(
                        f'{identity}/{word}/{name}/{identity}_{word}_{name}_1_{8000 + _FRAME_STEP * image}.jpg'
                    )
                    images.append(PlannedImage(f'DATA/{files[-1]}', modality, identity, camera, image))
                paths.setdefault(str(identity), {}).setdefault(word, {}).setdefault(name, {})['1'] = files
    texts = {f'{split}.txt': ''.join(lines) for split, lines in lists.items()}
    return LayoutPlan(images, {'data_paths.json': json.dumps(paths), **texts}, identities, test_identities)


def _tracklet_length(identity: int, camera: int) -> int:
    return _TRACKLET_IMAGES + (identity + camera) % 3


def _spread(rng: random.Random, total: int, cells: list[tuple[int, int]], least: int, most: int) -> Cells:
    """Distribute images at random over cells, `least` to `most` to each."""
    assert least * len(cells) <= total <= most * len(cells), f'{total} images do not fit into {len(cells)} cells'
    counts = dict.fromkeys(cells, least)
    for _ in range(total - least * len(cells)):
        cell = rng.choice(cells)
        while counts[cell] == most:
            cell = rng.choice(cells)
        counts[cell] += 1
    return counts


def _number_line(numbers: Sequence[int]) -> str:
    return ','.join(str(number) for number in sorted(numbers)) + '\n'


def _labelled_lines(paths_per_label: list[list[str]]) -> str:
    return ''.join(f'{path} {label}\n' for label, paths in enumerate(paths_per_label) for path in paths)
