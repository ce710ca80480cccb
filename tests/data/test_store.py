"""The image store against decoding one by one: every cache, several processes, killed ones, full disks."""

import copy
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_broken, write_images
from PIL import Image
from processes import start

from vireid_timm.constants import VISIBLE
from vireid_timm.data import store as store_module
from vireid_timm.data.check import add_copies
from vireid_timm.data.findings import Findings
from vireid_timm.data.images import ImageError, load_image, read_image
from vireid_timm.data.readers import create_dataset, synthetic_records
from vireid_timm.data.records import Records, class_map_of
from vireid_timm.data.store import CACHES, ImageStore, default_cache_dir, image_store, plan_store

SIZE = (24, 12)
CPU = torch.device('cpu')


def records_of(paths):
    return Records.from_rows([(str(path), 'anna', 0, VISIBLE, 'train') for path in paths])


def one_by_one(paths, size=SIZE):
    """Decode the images one at a time, [N, 3, H, W]."""
    return torch.stack([torch.tensor(load_image(str(path), size)).permute(2, 0, 1) for path in paths])


@pytest.fixture
def files(tmp_path):
    return write_images(tmp_path / 'images')


@pytest.mark.parametrize('cache', CACHES)
@pytest.mark.parametrize('workers', [0, 3])
def test_store_equals_decoding_one_by_one(tmp_path, files, cache, workers):
    paths = files * 11  # more than one unit of work, and not a multiple of it
    store = image_store(records_of(paths), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU, workers=workers)
    expected = one_by_one(files)
    assert len(store) == len(paths)
    assert store.size == SIZE
    assert np.array_equal(store.intact(), np.arange(len(paths)))
    assert torch.equal(store[:], expected.repeat(11, 1, 1, 1))
    mask = np.zeros(len(paths), dtype=bool)
    mask[[2, 5]] = True
    for rows in ([4, 0, 4, 98], np.array([1, -1]), slice(3, 6), mask, [], slice(5, 5)):
        images = store[rows]
        assert (images.dtype, images.device) == (torch.uint8, CPU)
        assert images.is_contiguous()
        assert torch.equal(images, expected[np.arange(len(paths))[rows] % len(files)])
    store[[4]].zero_()  # a copy: the store keeps its bytes
    assert torch.equal(store[[4]], expected[[4]])
    assert (tmp_path / 'cache').exists() == (cache in ('auto', 'disk', 'device'))
    if cache == 'device':
        assert torch.equal(store.held, store[:])
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
        assert torch.equal(again[[3, 0]], store[[9, 5]])
    assert torch.equal(part.select(np.array([2, 0]))[:], store[[0, 5]])
    assert len(store.select(np.array([], np.int64))[:]) == 0
    if cache == 'device':
        assert part.held is store.held
        assert torch.equal(part.take_held(np.array([3, 0])), store[[9, 5]])


@pytest.mark.parametrize('cache', CACHES)
def test_store_of_nothing(tmp_path, cache):
    store = image_store(records_of([]), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU)
    assert len(store) == 0
    assert store[:].shape == (0, 3, *SIZE)


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
    assert torch.equal(first[:], second[:])


def test_default_cache_dir(tmp_path, files, monkeypatch):
    monkeypatch.setenv('VIREID_CACHE', str(tmp_path / 'there'))
    image_store(records_of(files), SIZE)
    assert len(list((tmp_path / 'there').iterdir())) == 1
    monkeypatch.delenv('VIREID_CACHE')
    assert default_cache_dir() == Path.home() / '.cache' / 'vireid_timm'


def test_another_size_or_order_is_another_store(tmp_path, files):
    make = functools.partial(image_store, cache_dir=tmp_path / 'cache')
    assert torch.equal(make(records_of(files), SIZE)[:], one_by_one(files))
    assert torch.equal(make(records_of(files), (32, 8))[:], one_by_one(files, (32, 8)))
    assert torch.equal(make(records_of(files[::-1]), SIZE)[:], one_by_one(files[::-1]))
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
    assert torch.equal(after, one_by_one(files))
    assert not torch.equal(after[2], before[2])


def test_another_renderer_gives_another_key(tmp_path, monkeypatch):
    records = synthetic_records(range(2), split='test', size=(32, 16))
    plan = functools.partial(plan_store, records, (32, 16), cache='disk', cache_dir=tmp_path)
    before = plan().folder
    assert plan().folder == before
    monkeypatch.setattr(store_module, 'renderer_digest', lambda: 'of another version')
    assert plan().folder != before


@pytest.mark.parametrize('cache', CACHES)
def test_broken_images_are_an_error_or_skipped(tmp_path, files, cache, caplog):
    broken = [tmp_path / name for name in write_broken(tmp_path)]
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
        assert torch.equal(store[store.intact()], one_by_one(files))
        with pytest.raises(ImageError, match='missing.jpg.*no such file'):
            store[[0, 1 + broken.index(tmp_path / 'missing.jpg')]]
    if cache not in ('ram', 'off'):
        with pytest.raises(ImageError, match='truncated.jpg'):  # found in the cache, and still an error
            make()
    with pytest.raises(ValueError, match=f'none of the {len(broken)} images can be read'):
        image_store(records_of(broken), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU, skip_broken=True)


def test_off_finds_broken_images_on_access(tmp_path, files):
    store = image_store(records_of([*files, tmp_path / 'gone.png']), SIZE, cache='off')
    assert torch.equal(store[: len(files)], one_by_one(files))
    with pytest.raises(ImageError, match='gone.png'):
        store[[len(files)]]


def test_repaired_image_is_noticed_without_a_new_time(tmp_path, files):
    good = Path(files[1]).read_bytes()
    path = tmp_path / 'repaired.jpg'
    path.write_bytes(b'\0' * len(good))
    times = os.stat(path)
    make = functools.partial(image_store, records_of([*files, path]), SIZE, cache_dir=tmp_path, skip_broken=True)
    assert list(make().broken) == [len(files)]
    path.write_bytes(good)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not make().broken
    assert torch.equal(make()[[len(files)]], one_by_one([path]))


@pytest.mark.parametrize(
    'damage',
    [
        lambda folder: (folder / 'about.json').unlink(),
        lambda folder: (folder / 'about.json').write_text('{'),
        lambda folder: os.truncate(folder / 'pixels.bin', 100),
        lambda folder: (folder / 'pixels.bin').unlink(),
        lambda folder: (folder / 'digests.bin').unlink(),
        lambda folder: os.truncate(folder / 'digests.bin', 16),
    ],
)
def test_damaged_store_is_rebuilt(tmp_path, files, damage):
    make = functools.partial(image_store, records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    make()
    damage(next((tmp_path / 'cache').iterdir()))
    assert torch.equal(make()[:], one_by_one(files))


def test_writers_at_the_same_time(tmp_path, files, monkeypatch):
    records, cache_dir, results, decoded = records_of(files * 5), tmp_path / 'cache', {}, []
    start = threading.Barrier(6)

    def load(path, size):
        decoded.append(path)
        return load_image(path, size)

    def write(number):
        start.wait()
        results[number] = image_store(records, SIZE, cache_dir=cache_dir, workers=number % 3)[:]

    monkeypatch.setattr(store_module, 'load_image', load)
    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(pixels, one_by_one(files * 5)) for pixels in results.values())
    assert sorted(decoded) == sorted(records.path.tolist()), 'more than one thread decoded'
    assert [path.suffix for path in cache_dir.iterdir()] == ['']


def test_a_broken_image_is_an_error_in_every_process_that_waited(tmp_path, files):
    paths, problems = [*files, tmp_path / 'gone.png'], []
    start = threading.Barrier(4)

    def write():
        start.wait()
        with pytest.raises(ImageError, match='gone.png.*no such file') as caught:
            image_store(records_of(paths), SIZE, cache_dir=tmp_path / 'cache', workers=0)
        problems.append(str(caught.value))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(problems) == 4
    assert len(set(problems)) == 1
    assert not list((tmp_path / 'cache').iterdir())


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS])
def no_locks(monkeypatch, request):
    """A file system without locks: a network one without a lock server (ENOLCK), or one that has none (ENOSYS)."""
    fcntl = pytest.importorskip('fcntl')

    def refuse(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, 'flock', refuse)


def test_without_locks_each_builds_its_own_and_one_is_kept(tmp_path, files, monkeypatch, no_locks):
    records, cache_dir, results = records_of(files), tmp_path / 'cache', {}
    decoding = {name: threading.Event() for name in ('first', 'second')}

    def load(path, size):
        name = threading.current_thread().name
        decoding[name].set()
        if name == 'first':
            assert decoding['second'].wait(30)
        else:  # finishes after the first one has published its store
            threads['first'].join()
        return load_image(path, size)

    def write():
        store = image_store(records, SIZE, cache_dir=cache_dir, workers=0)
        results[threading.current_thread().name] = store[:]
        (folder,) = (path for path in cache_dir.iterdir() if path.suffix != '.tmp')
        published.append(os.stat(folder / 'pixels.bin').st_ino)

    monkeypatch.setattr(store_module, 'load_image', load)
    threads, published = {name: threading.Thread(target=write, name=name) for name in decoding}, []
    threads['first'].start()
    assert decoding['first'].wait(30)
    threads['second'].start()
    for thread in threads.values():
        thread.join()
    assert sorted(results) == ['first', 'second']
    assert all(torch.equal(pixels, one_by_one(files)) for pixels in results.values())
    assert len(set(published)) == 1, 'a store that others may be reading must not be replaced'
    assert [path.suffix for path in cache_dir.iterdir()] == ['']


def test_without_locks_a_damaged_store_is_rebuilt(tmp_path, files, no_locks):
    make = functools.partial(image_store, records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    make()
    os.truncate(next((tmp_path / 'cache').glob('*/pixels.bin')), 100)
    assert torch.equal(make()[:], one_by_one(files))
    assert [path.suffix for path in (tmp_path / 'cache').iterdir()] == ['']


def build(connection, cache_dir, paths, end):
    """Build a store slowly in another process, when told to; kill it before or after (`end`) it publishes the store."""
    load, rename, decoded = store_module.load_image, os.rename, []

    def slowly(path, size):
        decoded.append(path)
        time.sleep(0.01)
        return load(path, size)

    def fatally(source, target):
        if end == 'after':
            rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    store_module.load_image = slowly
    if end:
        os.rename = fatally
    connection.send('ready')
    connection.recv()
    store = image_store(records_of(paths), SIZE, cache='disk', cache_dir=cache_dir, workers=0)
    connection.send((len(decoded), hashlib.sha256(store[:].numpy().tobytes()).hexdigest()))


@contextmanager
def builder(cache_dir, paths, end=''):
    """Start a process that is about to build a store; yield it and the connection to it."""
    ours, theirs = Pipe()
    process = start(build, theirs, cache_dir, paths, end, output=paths[0].with_name('output.txt'), environment={})
    theirs.close()  # only the process has the other end now, so its death closes the connection
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
    digest = hashlib.sha256(one_by_one(paths).numpy().tobytes()).hexdigest()
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
            waiting.join(60)  # the lock ended with its holder
    left = sorted(path.suffix for path in (tmp_path / 'cache').iterdir())
    assert left == {'before': ['.lock', '.tmp'], 'after': ['', '.lock']}.get(moment, [''])
    results.append(make())
    assert all(torch.equal(store[:], one_by_one(paths)) for store in results)
    assert not list((tmp_path / 'cache').glob('*.tmp'))
    assert ('Storing' in caplog.text) == (moment != 'after'), 'a published store is found'


def test_store_that_is_truncated_while_in_use(tmp_path, files):
    cache_dir = tmp_path / 'cache'
    make = functools.partial(image_store, records_of(files * 9), (64, 32), cache_dir=cache_dir)
    store = make()
    (file,) = cache_dir.glob('*/pixels.bin')
    os.truncate(file, 5000)  # reading past the end would be a bus error, which kills the process
    for read in (lambda: store[[0]], lambda: store[:], lambda: store.hold(CPU)):
        with pytest.raises(OSError, match=f'{file}: .* has 5,000 of 497,664 bytes.*start again'):
            read()
    with pytest.raises(OSError, match='cut short.*start again'):
        copy.deepcopy(store)
    assert torch.equal(make()[:], one_by_one(files * 9, (64, 32))), 'the next run rebuilds it'


def test_store_that_is_deleted_while_in_use(tmp_path, files):
    store = image_store(records_of(files), SIZE, cache_dir=tmp_path / 'cache')
    (folder,) = (tmp_path / 'cache').iterdir()
    shutil.rmtree(folder)
    assert torch.equal(store[:], one_by_one(files))
    with pytest.raises(OSError, match=f'{folder}/pixels.bin: .* is gone'):
        copy.deepcopy(store)


DiskUsage = namedtuple('DiskUsage', 'total used free')


@pytest.fixture
def machine(monkeypatch):
    """Set the free bytes of disk, memory and accelerator."""

    def set_free(disk, ram, device):
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: DiskUsage(2 * disk, disk, disk))
        monkeypatch.setattr(store_module, '_free_memory', lambda: ram)
        monkeypatch.setattr(store_module, '_free_device_memory', lambda device: free_on_device)
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
def test_plan_follows_the_free_space(tmp_path, files, machine, cache, disk, ram, device, expected):
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
    assert torch.equal(store[:], one_by_one(files))
    assert not list((tmp_path / 'cache').iterdir())
    assert 'from memory, because the disk cannot hold them (No space left on device: 0.0 MB free)' in caplog.text


def test_plan_finds_an_existing_store(tmp_path, files, machine):
    make = functools.partial(plan_store, records_of(files), SIZE, cache_dir=tmp_path)
    before = make()
    image_store(records_of(files), SIZE, cache_dir=tmp_path)
    machine(0, 0, 0)  # a store that exists needs no space
    assert make() == dataclasses.replace(before, found=True)
    assert list(tmp_path.glob('images-*')) == [before.folder]
    os.truncate(before.folder / 'pixels.bin', 10)
    with pytest.raises(OSError, match='No space left on device'):
        make()
    assert before.folder.is_dir(), 'a plan changes nothing'


def test_free_memory_is_known_on_linux():
    assert 0 < store_module._free_memory() < 2**50


def test_held_images_need_a_device_with_room(tmp_path, files):
    with pytest.raises(ValueError, match="cache='device' needs the device"):
        image_store(records_of(files), SIZE, cache='device', cache_dir=tmp_path)
    with pytest.raises(ValueError, match='cpu has .* of free memory, too little for images of 2700000.00 GB'):
        image_store(records_of(files), (10**7, 10**7), cache='device', cache_dir=tmp_path, device=CPU)
    assert not list(tmp_path.glob('images-*'))


def test_full_disk_leaves_nothing_behind(tmp_path, files):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # writing fails then, as on a full disk
        with pytest.raises(OSError, match='cannot write an image store of 0.2 MB to .*VIREID_CACHE') as caught:
            image_store(records_of(files * 20), SIZE, cache_dir=tmp_path / 'cache')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path / 'cache').iterdir())


def test_store_larger_than_the_disk_is_rejected_at_once(tmp_path, files):
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        image_store(records_of(files), (10**7, 10**7), cache='disk', cache_dir=tmp_path / 'cache')
    assert not list((tmp_path / 'cache').iterdir())


def test_cache_dir_that_cannot_be_created(tmp_path, files):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='VIREID_CACHE'):
        image_store(records_of(files), SIZE, cache='disk', cache_dir=tmp_path / 'file')
    image_store(records_of(files), SIZE, cache_dir=tmp_path / 'file')  # `auto` keeps the images in memory


def test_leftovers_of_killed_runs_are_removed(tmp_path, files):
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
    # Another process may be building the other store; nobody else can be building this one.
    assert {path.name for path in cache_dir.glob('images-*')} == {folder.name, 'images-new.2.tmp'}


def test_unknown_cache(files):
    with pytest.raises(ValueError, match="unknown cache 'disc'; expected one of auto, disk, ram, device, off"):
        image_store(records_of(files), SIZE, cache='disc')


@pytest.mark.parametrize('cache', CACHES)
def test_store_is_pickled_without_its_file(tmp_path, files, cache):
    store = image_store(records_of(files), SIZE, cache=cache, cache_dir=tmp_path / 'cache', device=CPU)
    again = copy.deepcopy(store)  # uses the same methods as pickling
    assert isinstance(again, ImageStore)
    assert torch.equal(again[:], store[:])
    assert (len(pickle.dumps(store)) > store[:].nbytes) == (cache == 'ram')  # the other process opens the file


def write_noise(folder, names):
    """Write one image per name; names that end in the same digit get the same bytes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        seed = int(Path(name).stem[-1])
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 4, 3), np.uint8)).save(folder / name)


COPIES = {
    'modality-copy': [('a', 1, 'visible', 'query'), ('a', 3, 'infrared', 'gallery')],
    'identity-copy': [('a', 1, 'visible', 'train'), ('b', 1, 'visible', 'train')],
    'train-test-copy': [('a', 1, 'visible', 'train'), ('a', 1, 'visible', 'test')],
    'query-gallery-copy': [('a', 1, 'visible', 'query'), ('a', 1, 'visible', 'gallery')],
    'query-gallery-copy ': [('a', 0, 'visible', 'test'), ('a', 0, 'visible', 'test')],
    'query-gallery-copy  ': [('a', 1, 'visible', 'test'), ('a', 2, 'visible', 'gallery')],
    'copy': [('a', 1, 'visible', 'train'), ('a', 2, 'visible', 'train')],
    'copy ': [('a', 1, 'visible', 'test'), ('a', 1, 'visible', 'test')],
}


@pytest.mark.parametrize('kind', COPIES)
@pytest.mark.parametrize('cache', ['disk', 'ram'])
def test_copies_are_named_once_for_each_kind(tmp_path, cache, kind, caplog):
    names = ['x1.png', 'other2.png', 'y1.png', 'z1.png', 'u3.png', 'v3.png']
    write_noise(tmp_path, names)
    first, second = COPIES[kind]
    labels = [first, first, second, first, first, second]
    rows = [(str(tmp_path / name), *label) for name, label in zip(names, labels)]
    for _ in range(2):  # the second time the store is found, if it is on disk
        caplog.clear()
        image_store(Records.from_rows(rows), SIZE, cache=cache, cache_dir=tmp_path / 'cache')
        (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert said.startswith('2 images ')
        assert said.endswith(f': {tmp_path}/x1.png = {tmp_path}/y1.png, {tmp_path}/u3.png = {tmp_path}/v3.png')
    findings = Findings()
    add_copies(findings, Records.from_rows(rows), [[0, 2, 3]])
    (finding,) = findings
    assert (finding.kind, finding.count, finding.is_serious) == (kind.strip(), 1, 'copy' != kind.strip())


@pytest.mark.parametrize('cache', ['disk', 'ram', 'off'])
def test_images_both_to_train_and_to_test_on(tmp_path, cache, caplog):
    write_noise(
        tmp_path, ['train1.png', 'train2.png', 'train3.png', 'test2.png', 'test3.png', 'test4.png', 'test5.png']
    )
    os.unlink(tmp_path / 'test4.png')  # evaluation will name it
    os.link(tmp_path / 'train2.png', tmp_path / 'test6.png')
    train, test = (
        Records.from_rows([(str(path), split, 1, 'visible', split) for path in paths])
        for split, paths in (
            ('train', [*sorted(tmp_path.glob('train*')), *synthetic_records([0], split='train').path]),
            ('test', [*sorted(tmp_path.glob('test*')), tmp_path / 'test4.png']),
        )
    )
    for _ in range(2):  # the second time the store is found, if it is on disk
        caplog.clear()
        image_store(train, SIZE, cache=cache, cache_dir=tmp_path / 'cache', others=test)
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        if cache == 'off':
            assert not said
            continue
        pairs = ', '.join(
            f'{tmp_path}/train{first}.png = {tmp_path}/test{second}.png' for first, second in ((2, 2), (3, 3), (2, 6))
        )
        assert said == [f'3 images are both in the training and the test set, which inflates the result: {pairs}']


def test_one_path_or_address_twice_is_no_copy(tmp_path, caplog):
    write_noise(tmp_path, ['x1.png'])
    address = synthetic_records([0], split='train', size=(32, 16)).path[0]
    rows = [(path, 'a', 1, 'visible', 'train') for path in [str(tmp_path / 'x1.png'), str(address)] * 2]
    image_store(Records.from_rows(rows), SIZE, cache='ram')
    assert not caplog.records


@pytest.mark.parametrize('cache', ['disk', 'ram', 'off'])
def test_names_that_are_not_utf8(tmp_path, cache, caplog):
    """Names from another system's archive are read, stored, found again, and named when something is wrong."""
    root = os.fsencode(tmp_path)
    for split, modality in (('train', 'visible'), ('train', 'infrared'), ('query', 'visible'), ('gallery', 'infrared')):
        for seed, person in enumerate((b'\xd5\xc5', b'Jos\xe9', 'José'.encode())):
            folder = os.path.join(root, split.encode(), modality.encode(), person)
            os.makedirs(folder)
            pixels = np.random.default_rng([seed, len(split), len(modality)]).integers(0, 256, (8, 4, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'plain.png')
            os.rename(tmp_path / 'plain.png', os.path.join(folder, b'\xb5\xda.png'))
    with open(os.path.join(root, b'train/visible/\xd5\xc5/\xd5.jpg'), 'wb') as broken:
        broken.write(b'no image')
    dataset = create_dataset('folder', tmp_path)
    people = sorted(['José', 'Jos\udce9', '\udcd5\udcc5'])
    assert dataset.train.identities() == dataset.test.identities() == people
    assert list(class_map_of(dataset.train)) == people
    for _ in range(2):
        caplog.clear()
        store = image_store(dataset.train, SIZE, cache=cache, cache_dir=tmp_path / 'cache', skip_broken=True)
        assert [problem.count('\udcd5.jpg') for problem in store.broken.values()] == [1]
        assert '1 of 7 images are broken' in caplog.text
        intact = store.intact()
        paths = dataset.train.path[intact].tolist()
        assert torch.equal(store[intact], one_by_one(paths))


def test_names_that_are_not_utf8_in_findings(tmp_path):
    for folder in (b'train/visible/\xd5\xc5/\xd5\xc5', b'train/infrared/\xd5\xc5', b'\xd5\xc5', b'train/\xd5\xc5'):
        os.makedirs(os.path.join(os.fsencode(tmp_path), folder))
    findings = create_dataset('folder', write_pairs(tmp_path), test_share=0).findings
    assert {finding.kind for finding in findings} == {'unknown-folder', 'nested-folder', 'empty-folder'}
    assert json.loads(json.dumps([finding.message for finding in findings])) == [f.message for f in findings]


def write_pairs(root):
    """Write one image of a person in each modality into a folder's training part."""
    for modality in ('visible', 'infrared'):
        write_noise(root, [f'train/{modality}/a/{len(modality) % 7}.png'])
    return root
