"""Reading images of every kind and in every state, and the store against decoding one by one."""

import copy
import dataclasses
import errno
import functools
import hashlib
import logging
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import threading
import time
import zlib
from collections import namedtuple
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import start

from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data import store as images
from vireid_timm.data.images import MAX_PIXELS, ImageError, load_image, read_image
from vireid_timm.data.readers import synthetic_records
from vireid_timm.data.records import Records
from vireid_timm.data.store import CACHES, ImageStore, default_cache_dir, image_store, plan_store
from vireid_timm.data.workers import default_workers, in_order
from vireid_timm.synthvi.render import image_address, render

SIZE = (24, 12)
CPU = torch.device('cpu')


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def records_of(paths):
    return Records.from_rows([(str(path), 'anna', 0, VISIBLE, 'train') for path in paths])


def naive_pixels(paths, size=SIZE):
    resized = [read_image(str(path)).resize((size[1], size[0]), Image.Resampling.BILINEAR) for path in paths]
    return np.stack([np.asarray(image) for image in resized])


@pytest.fixture
def files(tmp_path):
    """Images of several sizes, formats and modes, and two that are rendered."""
    folder = tmp_path / 'images'
    folder.mkdir()
    paths = []
    for number in range(7):
        path = folder / f'{number}.{("png", "jpg", "bmp")[number % 3]}'
        shape = (20 + 5 * number, 10 + 3 * number)
        Image.fromarray(noise(*shape, *((3,) if number % 2 else ()), seed=number)).save(path)
        paths.append(path)
    return [*paths, *(image_address(modality, 3, 1, 0, size=(32, 16)) for modality in (VISIBLE, INFRARED))]


def png_that_claims(width, height):
    """A PNG file whose header promises an image, with nothing behind it."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


@pytest.mark.parametrize(
    'mode, suffix',
    [
        ('1', '.png'),
        ('L', '.png'),
        ('L', '.jpg'),
        ('P', '.gif'),
        ('RGB', '.bmp'),
        ('RGB', '.webp'),
        ('CMYK', '.jpg'),
        ('CMYK', '.tif'),
        ('YCbCr', '.jpg'),
    ],
)
def test_every_mode_becomes_three_channels(tmp_path, mode, suffix):
    path = tmp_path / f'image{suffix}'
    Image.fromarray(noise(16, 8, 3)).convert(mode).save(path)
    image = read_image(str(path))
    with Image.open(path) as expected:
        assert (image.mode, image.size) == ('RGB', (8, 16))
        assert np.array_equal(np.asarray(image), np.asarray(expected.convert('RGB')))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'L', 'RGB'])
def test_transparent_parts_become_black(tmp_path, mode):
    path = tmp_path / 'image.png'
    pixels = noise(16, 8, 4)
    pixels[:8, :, 3], pixels[8:, :, 3] = 0, 255
    if mode in ('RGBA', 'LA'):
        Image.fromarray(pixels).convert(mode).save(path)
    elif mode == 'P':
        indices = Image.fromarray(np.repeat(np.uint8([[5], [6]]), 8, axis=0).repeat(8, axis=1), 'L').convert('P')
        indices.putpalette([number for colour in range(256) for number in (255 - colour, 2, 3)])
        indices.save(path, transparency=5)
    else:  # one colour that stands for transparency
        opaque = Image.new(mode, (8, 16), 'white')
        opaque.paste('gray', (0, 0, 8, 8))
        opaque.save(path, transparency=128 if mode == 'L' else (128, 128, 128))
    image = np.asarray(read_image(str(path)))
    assert (image[:8] == 0).all()
    assert image[8:].any()
    if mode == 'RGBA':
        assert np.array_equal(image[8:], pixels[8:, :, :3])


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
@pytest.mark.parametrize(
    'orientation, upright',
    [
        (1, lambda pixels: pixels),
        (2, lambda pixels: pixels[:, ::-1]),
        (3, lambda pixels: pixels[::-1, ::-1]),
        (4, lambda pixels: pixels[::-1]),
        (5, lambda pixels: pixels.swapaxes(0, 1)),
        (6, lambda pixels: pixels[::-1].swapaxes(0, 1)),
        (7, lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda pixels: pixels[:, ::-1].swapaxes(0, 1)),
        (77, lambda pixels: pixels),
    ],
)
@pytest.mark.parametrize('deep', [False, True])
def test_orientation_is_honoured(tmp_path, suffix, orientation, upright, deep):
    path = tmp_path / f'image{suffix}'
    pixels = np.arange(20 * 12, dtype=np.uint16).reshape(20, 12) * 200 if deep else noise(20, 12, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, **({'exif': exif} if suffix == '.png' else {'tiffinfo': {0x0112: orientation}}))
    plain = tmp_path / 'plain.png'
    Image.fromarray(pixels).save(plain)
    assert np.array_equal(np.asarray(read_image(str(path))), upright(np.asarray(read_image(str(plain)))))


def naive_stretch(values):
    """Every value on its own; the percentiles by sorting."""
    finite = sorted(value for value in values.ravel().tolist() if math.isfinite(value))

    def percentile(percent):
        position = percent / 100 * (len(finite) - 1)
        below = int(position)
        above = min(below + 1, len(finite) - 1)
        return finite[below] + (position - below) * (finite[above] - finite[below])

    low, high = percentile(0.1), percentile(99.9)
    if low == high:
        low, high = finite[0], finite[-1]
    pixels = np.zeros(values.shape, np.uint8)
    for place, value in np.ndenumerate(values):
        share = 0.0 if low == high or math.isnan(value) else (value - low) / (high - low)
        pixels[place] = round(255 * min(max(share, 0.0), 1.0))
    return pixels


def deep_images():
    rng = np.random.default_rng(1)
    counts = rng.normal(7800, 60, (60, 40)).astype(np.uint16)  # a thermal camera's raw counts
    hot = np.full((60, 40), 4000, np.uint16)
    hot[5, 5] = 4100
    gaps = rng.normal(295.0, 3.0, (60, 40)).astype(np.float32)  # kelvin, with pixels that failed
    gaps[3, :7], gaps[4, 0], gaps[5, 0] = np.nan, np.inf, -np.inf
    return {
        'counts': (counts, '.png'),
        'counts in tiff': (counts, '.tif'),
        'hot pixel': (hot, '.png'),
        'constant': (np.full((60, 40), 123, np.uint16), '.png'),
        'full range': (counts * 8, '.pgm'),
        'float': (gaps, '.tif'),
        'int': (counts.astype(np.int32) - 9000, '.tif'),
        'tiny': (np.array([[700, 900]], np.uint16), '.png'),
    }


@pytest.mark.parametrize('name', deep_images())
def test_deep_images_are_stretched(tmp_path, name):
    values, suffix = deep_images()[name]
    path = tmp_path / f'image{suffix}'
    if suffix == '.pgm':
        path.write_bytes(b'P5 %d %d 65535\n' % values.shape[::-1] + values.astype('>u2').tobytes())
    else:
        Image.fromarray(values).save(path)
    pixels = np.asarray(read_image(str(path)))
    assert pixels.shape == (*values.shape, 3)
    assert (pixels == pixels[..., :1]).all()
    # A value that lies between two bytes may fall to either.
    assert np.abs(pixels[..., 0].astype(int) - naive_stretch(values)).max() <= 1
    assert pixels.min() == 0
    assert pixels.max() == (0 if name == 'constant' else 255)


def test_stretch_ignores_scale_and_offset(tmp_path):
    values = deep_images()['counts'][0]
    Image.fromarray(values).save(tmp_path / 'a.png')
    Image.fromarray(values * 5 + 1000).save(tmp_path / 'b.png')
    a, b = (np.asarray(read_image(str(tmp_path / name))) for name in ('a.png', 'b.png'))
    assert np.array_equal(a, b)


def test_eight_bits_are_not_stretched(tmp_path):
    pixels = np.full((8, 8), 50, np.uint8)
    pixels[0, 0] = 60
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    assert np.array_equal(np.asarray(read_image(str(tmp_path / 'a.png')))[..., 0], pixels)


@pytest.mark.parametrize('suffix', ['.gif', '.tif', '.png'])
def test_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new('RGB', (8, 16), colour) for colour in ('red', 'lime')]
    frames[0].save(tmp_path / f'a{suffix}', save_all=True, append_images=frames[1:])
    assert (np.asarray(read_image(str(tmp_path / f'a{suffix}'))) == (255, 0, 0)).all()


def broken_files(folder):
    """Name -> (file, part of the error message)."""
    Image.fromarray(noise(64, 32, 3)).save(folder / 'good.jpg')
    Image.fromarray(noise(64, 32, 3)).save(folder / 'good.png')
    jpeg, png = (folder / 'good.jpg').read_bytes(), (folder / 'good.png').read_bytes()
    (folder / 'folder.jpg').mkdir()
    contents = {
        'truncated.jpg': (jpeg[: len(jpeg) // 2], 'truncated'),
        'header.jpg': (jpeg[:20], None),
        'truncated.png': (png[: len(png) // 2], 'truncated'),
        'bits.png': (png[:200] + b'\0' * 50 + png[250:], None),
        'empty.jpg': (b'', 'not one of the formats'),
        'text.jpg': (b'<html>404</html>', 'not one of the formats'),
        'script.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 16\n', 'not one of the formats'),
        'large.png': (png_that_claims(9000, 9000), f'9000x9000 pixels, more than the limit of {MAX_PIXELS:,}'),
        'larger.png': (png_that_claims(12000, 12000), f'more than the limit of {MAX_PIXELS:,}'),
        'bomb.png': (png_that_claims(65535, 65535), f'more than the limit of {MAX_PIXELS:,}'),
        'nan.tif': (None, 'no finite pixel value'),
    }
    for name, (content, _) in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / 'nan.tif')
    return {
        **{name: message for name, (_, message) in contents.items()},
        'missing.jpg': 'no such file',
        'folder.jpg': 'directory',
    }


def test_broken_images_are_named(tmp_path):
    for name, message in broken_files(tmp_path).items():
        path = str(tmp_path / name)
        with pytest.raises(ImageError, match=message) as caught:
            read_image(path)
        text = str(caught.value)
        assert text.startswith(f'{path}: this image cannot be read ('), text
        assert '--skip-broken' in text
        assert str(copy.copy(caught.value)) == text  # made again from its arguments, as between processes


def test_malformed_address_is_not_taken_for_a_broken_image():
    with pytest.raises(ValueError, match='synthvi:nonsense') as caught:
        read_image('synthvi:nonsense')
    assert not isinstance(caught.value, ImageError)


def test_load_image(files):
    for path in files:
        assert np.array_equal(load_image(str(path), SIZE), naive_pixels([path])[0])
    assert np.array_equal(load_image(files[-1], (32, 16)), render(INFRARED, 3, 1, 0, size=(32, 16)))


@pytest.mark.parametrize('cache', CACHES)
@pytest.mark.parametrize('workers', [0, 3])
def test_store_equals_decoding_one_by_one(tmp_path, files, cache, workers):
    paths = files * 11  # more than one unit of work, and not a multiple of it
    store = image_store(records_of(paths), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU, workers=workers)
    expected = naive_pixels(files)
    assert len(store) == len(paths)
    assert store.size == SIZE
    assert np.array_equal(store.intact(), np.arange(len(paths)))
    assert np.array_equal(store[:], np.concatenate([expected] * 11))
    mask = np.zeros(len(paths), dtype=bool)
    mask[[2, 5]] = True
    for rows in ([4, 0, 4, 98], np.array([1, -1]), slice(3, 6), mask, [], slice(5, 5)):
        pixels = store[rows]
        assert pixels.dtype == np.uint8
        assert pixels.shape == (len(np.arange(len(paths))[rows]), *SIZE, 3)
        assert np.array_equal(pixels, expected[np.arange(len(paths))[rows] % len(files)])
        assert torch.from_numpy(pixels).permute(0, 3, 1, 2).is_contiguous() or cache == 'off'
    pixels = store[[4]]
    pixels[...] = 0  # a copy: nobody else sees this
    assert np.array_equal(store[[4]], expected[[4]])
    assert (tmp_path / 'cache').exists() == (cache in ('auto', 'disk', 'device'))
    if cache == 'device':
        assert np.array_equal(store.held.permute(0, 2, 3, 1).numpy(), store[:])
    else:
        assert store.held is None


@pytest.mark.parametrize('cache', CACHES)
def test_a_part_of_a_store_shares_its_bytes(tmp_path, files, cache):
    (tmp_path / 'broken.png').write_bytes(b'no image')
    paths = [*files[:3], tmp_path / 'broken.png', *files[3:]]
    store = image_store(
        records_of(paths), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU, skip_broken=True
    )
    rows = np.array([5, 3, 0, 9])
    part = store.select(rows)
    assert len(part) == 4 and part.size == SIZE
    assert list(part.broken) == [1] and part.intact().tolist() == [0, 2, 3]
    with pytest.raises(ImageError, match='broken.png'):
        part[:]
    for again in (part, copy.deepcopy(part)):
        assert np.array_equal(again[[3, 0]], store[[9, 5]])
    assert np.array_equal(part.select(np.array([2, 0]))[:], store[[0, 5]])
    assert len(store.select(np.array([], np.int64))[:]) == 0
    if cache == 'device':
        assert part.held is store.held
        assert np.array_equal(part.take_held(np.array([3, 0])).permute(0, 2, 3, 1).numpy(), store[[9, 5]])


@pytest.mark.parametrize('cache', CACHES)
def test_store_of_nothing(tmp_path, cache):
    store = image_store(records_of([]), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU)
    assert len(store) == 0
    assert store[:].shape == (0, *SIZE, 3)


def test_store_is_written_once_and_announced(tmp_path, files, caplog):
    caplog.set_level(logging.INFO)
    first = image_store(records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    (folder,) = (tmp_path / 'cache').iterdir()
    assert f'Storing {len(files)} images of 24x12 once: 0.0 MB in {folder}' in caplog.text
    stamp = os.stat(folder / 'pixels.bin')
    assert stamp.st_size == len(files) * 24 * 12 * 3
    caplog.clear()
    second = image_store(records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    assert caplog.messages == [f'{len(files)} images of 24x12 (0.0 MB) are read from {folder}']
    assert [entry.name for entry in (tmp_path / 'cache').iterdir()] == [folder.name]
    assert os.stat(folder / 'pixels.bin').st_mtime_ns == stamp.st_mtime_ns
    assert np.array_equal(first[:], second[:])


def test_default_cache_dir(tmp_path, files, monkeypatch):
    monkeypatch.setenv('VIREID_CACHE', str(tmp_path / 'there'))
    image_store(records_of(files), SIZE)
    assert len(list((tmp_path / 'there').iterdir())) == 1
    monkeypatch.delenv('VIREID_CACHE')
    assert default_cache_dir() == Path.home() / '.cache' / 'vireid_timm'
    assert 1 <= default_workers() <= 8


def test_another_size_or_order_is_another_store(tmp_path, files):
    make = functools.partial(image_store, cache_dir=tmp_path / 'cache')
    assert np.array_equal(make(records_of(files), SIZE)[:], naive_pixels(files))
    assert np.array_equal(make(records_of(files), (32, 8))[:], naive_pixels(files, (32, 8)))
    assert np.array_equal(make(records_of(files[::-1]), SIZE)[:], naive_pixels(files[::-1]))
    assert len(list((tmp_path / 'cache').iterdir())) == 3


def test_stale_bytes_are_never_used(tmp_path, files):
    make = functools.partial(image_store, records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    before = make()[:]
    changed, times = files[2], os.stat(files[2])
    pixels = np.asarray(read_image(str(changed)))
    Image.fromarray(255 - pixels).convert('L').save(changed)
    assert os.stat(changed).st_size == times.st_size  # a bitmap: only the time tells
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    after = make()[:]
    assert np.array_equal(after, naive_pixels(files))
    assert not np.array_equal(after[2], before[2])


def test_another_renderer_gives_another_key(tmp_path, monkeypatch):
    records = synthetic_records(range(2), split='test', size=(32, 16))
    plan = functools.partial(plan_store, records, (32, 16), cache='disk', cache_dir=tmp_path)
    before = plan().folder
    assert plan().folder == before
    monkeypatch.setattr(images, 'renderer_digest', lambda: 'of another version')
    assert plan().folder != before


@pytest.mark.parametrize('cache', CACHES)
def test_broken_images_are_an_error_or_skipped(tmp_path, files, cache, caplog):
    broken = [tmp_path / name for name in broken_files(tmp_path)]
    paths = [files[0], *broken, *files[1:]]
    make = functools.partial(
        image_store, records_of(paths), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU
    )
    if cache != 'off':
        with pytest.raises(ImageError, match='truncated.jpg'):
            make()
        assert not list((tmp_path / 'cache').glob('*'))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        store = make(skip_broken=True)
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert f'{len(broken)} of {len(paths)} images are broken and skipped: {broken[0]}' in record.getMessage()
        assert f' and {len(broken) - 5} more' in record.getMessage()
        assert sorted(store.broken) == list(range(1, 1 + len(broken)))
        assert store.intact().tolist() == [0, *range(1 + len(broken), len(paths))]
        assert np.array_equal(store[store.intact()], naive_pixels(files))
        with pytest.raises(ImageError, match='missing.jpg.*no such file'):
            store[[0, 1 + broken.index(tmp_path / 'missing.jpg')]]
    if cache not in ('ram', 'off'):
        with pytest.raises(ImageError, match='truncated.jpg'):  # found in the cache, and still an error
            make()
    with pytest.raises(ValueError, match=f'none of the {len(broken)} images can be read'):
        image_store(records_of(broken), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU, skip_broken=True)


def test_off_finds_broken_images_on_access(tmp_path, files):
    store = image_store(records_of([*files, tmp_path / 'gone.png']), SIZE, cache='off')
    assert np.array_equal(store[: len(files)], naive_pixels(files))
    with pytest.raises(ImageError, match='gone.png'):
        store[[len(files)]]


def test_mended_image_is_noticed_without_a_new_time(tmp_path, files):
    good = Path(files[1]).read_bytes()
    path = tmp_path / 'mended.jpg'
    path.write_bytes(b'\0' * len(good))
    times = os.stat(path)
    make = functools.partial(image_store, records_of([*files, path]), SIZE, cache_dir=tmp_path, skip_broken=True)
    assert list(make().broken) == [len(files)]
    path.write_bytes(good)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not make().broken
    assert np.array_equal(make()[[len(files)]], naive_pixels([path]))


@pytest.mark.parametrize(
    'damage',
    [
        lambda folder: (folder / 'about.json').unlink(),
        lambda folder: (folder / 'about.json').write_text('{'),
        lambda folder: os.truncate(folder / 'pixels.bin', 100),
        lambda folder: (folder / 'pixels.bin').unlink(),
    ],
)
def test_damaged_store_is_written_anew(tmp_path, files, damage):
    make = functools.partial(image_store, records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    make()
    damage(next((tmp_path / 'cache').iterdir()))
    assert np.array_equal(make()[:], naive_pixels(files))


def test_writers_at_the_same_time(tmp_path, files, monkeypatch):
    records, cache_dir, results, decoded = records_of(files * 5), tmp_path / 'cache', {}, []
    start = threading.Barrier(6)
    monkeypatch.setattr(images, 'load_image', lambda path, size: (decoded.append(path), load_image(path, size))[1])

    def write(number):
        start.wait()
        results[number] = image_store(records, SIZE, cache_dir=cache_dir, workers=number % 3)[:]

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(np.array_equal(pixels, naive_pixels(files * 5)) for pixels in results.values())
    assert sorted(decoded) == sorted(records.path.tolist()), 'more than one of them decoded'
    assert [path.suffix for path in cache_dir.iterdir()] == ['']


def test_those_who_wait_learn_what_is_broken_from_the_one_who_tried(tmp_path, files, monkeypatch):
    paths, decoded, problems = [*files, tmp_path / 'gone.png'], [], []
    start = threading.Barrier(4)

    def load(path, size):
        decoded.append(path)
        time.sleep(0.03)
        return load_image(path, size)

    def write():
        start.wait()
        with pytest.raises(ImageError, match='gone.png.*no such file') as caught:
            image_store(records_of(paths), SIZE, cache_dir=tmp_path / 'cache', workers=0)
        problems.append(str(caught.value))

    monkeypatch.setattr(images, 'load_image', load)
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(problems) == 4
    assert len(set(problems)) == 1
    assert len(decoded) == len(paths), 'only one of them decoded'
    store = image_store(records_of(paths), SIZE, cache_dir=tmp_path / 'cache', skip_broken=True)
    assert list(store.broken) == [len(files)]


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that knows no locks."""
    fcntl = pytest.importorskip('fcntl')

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', refuse)


def test_without_locks_each_writes_its_own_and_one_is_kept(tmp_path, files, monkeypatch, no_locks):
    records, cache_dir, results = records_of(files), tmp_path / 'cache', {}
    decoding = {name: threading.Event() for name in ('first', 'second')}

    def load(path, size):
        name = threading.current_thread().name
        decoding[name].set()
        if name == 'first':
            assert decoding['second'].wait(30)
        else:  # is done when the first one has published its store
            threads['first'].join()
        return load_image(path, size)

    def write():
        store = image_store(records, SIZE, cache_dir=cache_dir, workers=0)
        results[threading.current_thread().name] = store[:]
        (folder,) = (path for path in cache_dir.iterdir() if path.suffix != '.tmp')
        published.append(os.stat(folder / 'pixels.bin').st_ino)

    monkeypatch.setattr(images, 'load_image', load)
    threads, published = {name: threading.Thread(target=write, name=name) for name in decoding}, []
    threads['first'].start()
    assert decoding['first'].wait(30)
    threads['second'].start()
    for thread in threads.values():
        thread.join()
    assert sorted(results) == ['first', 'second']
    assert all(np.array_equal(pixels, naive_pixels(files)) for pixels in results.values())
    assert len(set(published)) == 1, 'what others may be reading already is not replaced'
    assert [path.suffix for path in cache_dir.iterdir()] == ['']


def test_without_locks_a_damaged_store_is_written_anew(tmp_path, files, no_locks):
    make = functools.partial(image_store, records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    make()
    os.truncate(next((tmp_path / 'cache').glob('*/pixels.bin')), 100)
    assert np.array_equal(make()[:], naive_pixels(files))
    assert [path.suffix for path in (tmp_path / 'cache').iterdir()] == ['']


def build(connection, cache_dir, paths, end):
    """Make a store in a process of its own, slowly, when told to; `end` it before or after it publishes the store."""
    load, rename, decoded = images.load_image, os.rename, []

    def slowly(path, size):
        decoded.append(path)
        time.sleep(0.01)
        return load(path, size)

    def fatally(source, target):
        if end == 'after':
            rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    images.load_image = slowly
    if end:
        os.rename = fatally
    connection.send('ready')
    connection.recv()
    store = image_store(records_of(paths), SIZE, cache='disk', cache_dir=cache_dir, workers=0)
    connection.send((len(decoded), hashlib.sha256(store[:].tobytes()).hexdigest()))


@contextmanager
def builder(cache_dir, paths, end=''):
    """A process that is about to make a store, and the connection to it."""
    ours, theirs = Pipe()
    process = start(build, theirs, cache_dir, paths, end, output=paths[0].with_name('output.txt'), environment={})
    theirs.close()  # now the other end is the process's alone: that it died ends the connection
    with ours:
        try:
            assert ours.recv() == 'ready'
            yield process, ours
        finally:
            process.kill()
            process.join()


def test_one_of_two_processes_decodes_for_both(tmp_path, files):
    paths = files[:7] * 6
    with builder(tmp_path, paths) as (_, first), builder(tmp_path, paths) as (_, second):
        for connection in (first, second):
            connection.send('go')
        answers = [connection.recv() for connection in (first, second) if connection.poll(60)]
    digest = hashlib.sha256(naive_pixels(paths).tobytes()).hexdigest()
    assert sorted(answers) == [(0, digest), (len(paths), digest)]
    assert [path.suffix for path in tmp_path.glob('images-*')] == ['']


@pytest.mark.parametrize('moment', ['decoding', 'decoding later', 'before', 'after'])
def test_killed_builder_leaves_nothing_that_matters(tmp_path, files, moment, caplog):
    caplog.set_level(logging.INFO)
    paths, results = files[:7] * 6, []
    make = functools.partial(image_store, records_of(paths), SIZE, cache='disk', cache_dir=tmp_path / 'cache')
    end = moment if moment in ('before', 'after') else ''
    with builder(tmp_path / 'cache', paths, end) as (process, connection):
        connection.send('go')
        if end:
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        else:
            deadline = time.monotonic() + 60
            while not list((tmp_path / 'cache').glob('*.tmp')) and time.monotonic() < deadline:
                time.sleep(0.001)
            waiting = threading.Thread(target=lambda: results.append(make()))
            waiting.start()
            while 'Waiting for another process' not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.1) if moment == 'decoding' else 0.1 + random.uniform(0, 0.1))
            process.kill()
            process.join(60)
            waiting.join(60)  # the lock went with its holder
    left = sorted(path.suffix for path in (tmp_path / 'cache').iterdir())
    assert left == {'before': ['.lock', '.tmp'], 'after': ['', '.lock']}.get(moment, [''])
    results.append(make())
    assert all(np.array_equal(store[:], naive_pixels(paths)) for store in results)
    assert not list((tmp_path / 'cache').glob('*.tmp'))
    assert ('Storing' in caplog.text) == (moment != 'after'), 'only a store that was published is found'


def test_store_that_is_cut_short_while_it_is_used(tmp_path, files):
    cache_dir = tmp_path / 'cache'
    make = functools.partial(image_store, records_of(files * 9), (64, 32), cache_dir=cache_dir)
    store = make()
    (file,) = cache_dir.glob('*/pixels.bin')
    os.truncate(file, 5000)  # reading beyond would be a bus error, which ends the process
    for read in (lambda: store[[0]], lambda: store[:], lambda: store.hold(CPU)):
        with pytest.raises(OSError, match=f'{file}: .* has 5,000 of 497,664 bytes.*start again'):
            read()
    with pytest.raises(OSError, match='cut short.*start again'):
        copy.deepcopy(store)
    assert np.array_equal(make()[:], naive_pixels(files * 9, (64, 32))), 'the next run writes it anew'


def test_store_that_is_removed_while_it_is_used(tmp_path, files):
    store = image_store(records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    (folder,) = (tmp_path / 'cache').iterdir()
    shutil.rmtree(folder)
    assert np.array_equal(store[:], naive_pixels(files))
    with pytest.raises(OSError, match=f'{folder}/pixels.bin: .* is gone'):
        copy.deepcopy(store)


DiskUsage = namedtuple('DiskUsage', 'total used free')


@pytest.fixture
def machine(monkeypatch):
    """Sets the free bytes of disk, memory and accelerator."""

    def set_free(disk, ram, device):
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: DiskUsage(2 * disk, disk, disk))
        monkeypatch.setattr(images, '_free_memory', lambda: ram)
        monkeypatch.setattr(images, '_free_device_memory', lambda device: free_on_device)
        free_on_device = device

    return set_free


@pytest.mark.parametrize(
    ('cache', 'disk', 'ram', 'device', 'expected'),
    [
        ('auto', 1.0, 0.0, 0.0, 'disk'),
        ('auto', 1.0, 0.0, 3.9, 'disk'),
        ('auto', 1.0, 0.0, 4.0, 'device'),
        ('auto', 0.9, 2.0, 9.0, 'ram'),
        ('auto', 0.9, 1.9, 9.0, OSError),
        ('disk', 1.0, 9.0, 9.0, 'disk'),
        ('disk', 0.9, 9.0, 9.0, OSError),
        ('device', 1.0, 1.0, 0.0, 'device'),
        ('device', 1.0, 0.9, 0.0, ValueError),
        ('device', 0.9, 9.0, 9.0, OSError),
        ('ram', 0.0, 0.0, 9.0, 'ram'),
        ('ram', 9.0, 1.0, 9.0, 'ram'),
        ('ram', 9.0, 0.9, 9.0, ValueError),
        ('off', 0.0, 0.0, 9.0, 'off'),
    ],
)
def test_plan_by_what_is_free(tmp_path, files, machine, cache, disk, ram, device, expected):
    num_bytes = len(files) * 24 * 12 * 3
    machine(*(int(share * num_bytes) + (share % 1 != 0) for share in (disk, ram, device)))
    make = functools.partial(
        plan_store, records_of(files), SIZE, cache=cache, cache_dir=tmp_path / 'a' / 'b', device=CPU
    )
    if not isinstance(expected, str):
        with pytest.raises(expected, match='--cache'):
            make()
    else:
        plan = make()
        assert (plan.cache, plan.num_bytes, plan.found) == (expected, num_bytes, False)
        assert (plan.folder is not None) == (expected in ('disk', 'device'))
        assert bool(plan.reason) == (cache == 'auto' and expected == 'ram')
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize(
    'environment',
    [{'LOCAL_WORLD_SIZE': '3', 'SLURM_STEP_TASKS_PER_NODE': '1'}, {'SLURM_STEP_TASKS_PER_NODE': '3(x2),1'}],
)
@pytest.mark.parametrize(
    ('cache', 'ram', 'expected'),
    [('ram', 3.0, 'ram'), ('ram', 2.9, ValueError), ('auto', 6.0, 'ram'), ('auto', 5.9, OSError)],
)
def test_processes_of_a_machine_share_its_memory(
    tmp_path, files, machine, monkeypatch, environment, cache, ram, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    machine(0, int(ram * len(files) * 24 * 12 * 3), 0)
    make = functools.partial(plan_store, records_of(files), SIZE, cache=cache, cache_dir=tmp_path)
    if isinstance(expected, str):
        assert make().cache == expected
    else:
        with pytest.raises(expected, match='for each of 3 processes' if cache == 'ram' else '--cache'):
            make()


def test_auto_keeps_in_memory_what_the_disk_cannot_hold(tmp_path, files, machine, caplog):
    caplog.set_level(logging.INFO)
    machine(100, 10**9, 0)
    store = image_store(records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    assert np.array_equal(store[:], naive_pixels(files))
    assert not list((tmp_path / 'cache').iterdir())
    assert 'read from memory, since the disk cannot hold them (No space left on device: 0.0 MB are free)' in caplog.text


def test_plan_finds_what_is_there(tmp_path, files, machine):
    make = functools.partial(plan_store, records_of(files), SIZE, cache_dir=tmp_path)
    before = make()
    image_store(records_of(files), SIZE, cache_dir=tmp_path)
    machine(0, 0, 0)  # needs no more room
    assert make() == dataclasses.replace(before, found=True)
    assert list(tmp_path.glob('images-*')) == [before.folder]
    os.truncate(before.folder / 'pixels.bin', 10)
    with pytest.raises(OSError, match='No space left on device'):
        make()
    assert before.folder.is_dir(), 'a plan touches nothing'


def test_free_memory_is_known_on_linux():
    assert 0 < images._free_memory() < 2**50


def test_held_images_need_a_device_with_room(tmp_path, files):
    with pytest.raises(ValueError, match="cache='device' needs the device"):
        image_store(records_of(files), SIZE, cache='device', cache_dir=tmp_path)
    with pytest.raises(ValueError, match='cpu has .* of free memory, too little for images of 2700000.00 GB'):
        image_store(records_of(files), (10**7, 10**7), cache='device', cache_dir=tmp_path, device=CPU)
    assert not list(tmp_path.glob('images-*'))


def test_full_disk_leaves_nothing_behind(tmp_path, files):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # refuses to write on, as a full disk does
        with pytest.raises(OSError, match='cannot write an image store of 0.2 MB to .*VIREID_CACHE') as caught:
            image_store(records_of(files * 20), SIZE, cache_dir=tmp_path / 'cache')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path / 'cache').iterdir())


def test_store_larger_than_the_disk_is_refused_at_once(tmp_path, files):
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        image_store(records_of(files), (10**7, 10**7), cache='disk', cache_dir=tmp_path / 'cache')
    assert not list((tmp_path / 'cache').iterdir())


def test_cache_dir_that_cannot_be(tmp_path, files):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='VIREID_CACHE'):
        image_store(records_of(files), SIZE, cache_dir=tmp_path / 'file')


def test_what_killed_runs_left_is_removed(tmp_path, files):
    cache_dir = tmp_path / 'cache'
    image_store(records_of(files), SIZE, cache_dir=cache_dir)
    (folder,) = cache_dir.iterdir()
    shutil.rmtree(folder)
    leftovers = (('images-old.1.tmp', 7 * 3600), ('images-new.2.tmp', 60), (f'{folder.name}.3.tmp', 0))
    for name, age in leftovers:
        (cache_dir / name).mkdir()
        (cache_dir / name / 'pixels.bin').write_bytes(b'1')
        for path in (cache_dir / name / 'pixels.bin', cache_dir / name):
            os.utime(path, (time.time() - age,) * 2)
    image_store(records_of(files), SIZE, cache_dir=cache_dir)
    # Another store's may be in use; of this one there is no other writer.
    assert {path.name for path in cache_dir.glob('images-*')} == {folder.name, 'images-new.2.tmp'}


def test_unknown_cache(files):
    with pytest.raises(ValueError, match="unknown cache 'disc'; expected one of auto, disk, ram, device, off"):
        image_store(records_of(files), SIZE, cache='disc')


@pytest.mark.parametrize('cache', CACHES)
def test_store_travels_to_another_process(tmp_path, files, cache):
    store = image_store(records_of(files), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU)
    again = copy.deepcopy(store)  # by the same methods as pickling
    assert isinstance(again, ImageStore)
    assert np.array_equal(again[:], store[:])
    assert (len(pickle.dumps(store)) > store[:].nbytes) == (cache == 'ram')  # a file is opened there, not sent


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_in_order(workers):
    started = []

    def slow_start(number):
        started.append(number)
        time.sleep(0.001 * (number % 3 == 0))
        return number * number

    results = in_order(slow_start, range(50), workers=workers)
    assert next(results) == 0
    assert len(started) <= 2 * max(workers, 1) + 1 + workers  # only a few ahead of what is asked for
    assert list(results) == [number * number for number in range(1, 50)]


def test_in_order_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda number: 1 // number, [1, 0, 1], workers=2))


def test_in_order_with_processes():
    assert list(in_order(math.sqrt, [4.0, 9.0, 16.0], workers=2, processes=True)) == [2.0, 3.0, 4.0]
    assert pickle.dumps(functools.partial(images._decode_chunk, size=SIZE)), 'a process can be asked to do it'


def test_death_of_a_worker_is_reported():
    with pytest.raises(ChildProcessError, match='worker process died.*--workers 0'):
        list(in_order(os._exit, [1, 1], workers=2, processes=True))
