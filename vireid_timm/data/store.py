"""Reading images: one safe way to decode any file, and the store that decodes a whole table only once.

A store keeps every image of a record table as bytes of one size, so that an epoch costs a memory copy instead of a
decode. On disk it is keyed by what it was made from (path, byte size and modification time of every file, the address
of every rendered image, the image size): a changed file gives another key, so that stale bytes are never read. It
is written by one process at a time, for which others that need it wait, where the file system can lock files.
"""

import copy
import errno
import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import torch
from tqdm import tqdm

from ..constants import CACHES
from ..files import STALE_AFTER, last_written, lock
from ..synthvi.render import renderer_digest
from .images import ADDRESS_PREFIX, ImageError, load_image, read_image
from .records import Records
from .workers import default_workers, in_order

_logger = logging.getLogger(__name__)

_PIXELS, _ABOUT = 'pixels.bin', 'about.json'  # a store's files
_STORE_VERSION = 2  # raise it when the same file would give other bytes
CHUNK = 32  # images per unit of work: enough to hide its overhead, few enough for a smooth progress bar
PROCESSES_FROM = 4000  # rendered images that pay for starting processes (each imports the library anew)
_DEVICE_SHARE, _RAM_SHARE = 1 / 4, 1 / 2  # of the free memory, that images may take without being asked to


class ImageStore:
    """Images of one size, indexed by the rows of the table they were loaded for, or of a part (`select`) of it.

    Attributes:
        size: Height and width of every image.
        broken: Row -> what is wrong with that image; empty unless broken images were to be skipped.
        held: All images of the table on an accelerator, [N, 3, H, W] uint8, broken ones black; None if they are not.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        planes: np.ndarray | Path | None,
        broken: dict[int, str],
        workers: int = 0,
    ) -> None:
        """Wrap images that are decoded already, or that are decoded on access.

        Args:
            paths: What each row shows, [N].
            size: Height and width.
            planes: The images [N, 3, H, W], a file that holds them, or None to decode on every access.
            broken: Row -> why that image cannot be read.
            workers: Threads that decode, where images are decoded on access.

        Raises:
            OSError: The file is gone or too short.
        """
        self.size = size
        self.broken = broken
        self.held: torch.Tensor | None = None
        self._paths = np.asarray(paths, dtype=np.str_)
        self._rows = np.arange(len(self._paths))
        self._workers = workers
        self._file = _MappedFile(planes, (len(self._paths), 3, *size)) if isinstance(planes, Path) else None
        self._planes = None if self._file is not None else planes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Images of the given rows: a slice, integer rows [B] or a mask [N].

        Returns:
            A new array of bytes [B, H, W, 3]. Its memory holds plane after plane: as a tensor,
            `torch.from_numpy(...).permute(0, 3, 1, 2)` is contiguous at no cost.

        Raises:
            ImageError: If one of them is broken.
            OSError: If the file that holds them was cut short.
        """
        rows = np.arange(len(self))[rows]
        for row in rows if self.broken else ():
            if row in self.broken:
                raise ImageError(self.broken[row])
        return self._read(self._rows[rows]).transpose(0, 2, 3, 1)

    def select(self, rows: np.ndarray) -> 'ImageStore':
        """Some of the images, as a store of their own that shares the bytes.

        Args:
            rows: Which rows of this store become its rows 0..K-1, [K].
        """
        part = copy.copy(self)
        part.held = self.held  # which a copy leaves behind
        part._rows = self._rows[rows]
        part.broken = {place: self.broken[row] for place, row in enumerate(rows.tolist()) if row in self.broken}
        return part

    def intact(self) -> np.ndarray:
        """Rows that are not broken, sorted, [K]."""
        return np.setdiff1d(np.arange(len(self)), np.fromiter(self.broken, np.int64, len(self.broken)))

    def hold(self, device: torch.device) -> None:
        """Copy all images of the table to a device, into `held`.

        Raises:
            OSError: If the file that holds them was cut short.
            torch.OutOfMemoryError: If the device has no room for them.
        """
        count = len(self._paths)
        held = torch.empty((count, 3, *self.size), dtype=torch.uint8, device=device)
        for start in range(0, count, CHUNK):
            rows = np.arange(start, min(start + CHUNK, count))
            held[start : start + CHUNK] = torch.from_numpy(self._read(rows)).to(device)
        self.held = held

    def take_held(self, rows: np.ndarray) -> torch.Tensor:
        """Images of integer rows [B] where all of them are held, [B, 3, H, W]; nothing waits for the device."""
        index = torch.from_numpy(self._rows[rows]).to(self.held.device, non_blocking=True)
        return self.held.index_select(0, index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, 'held': None}  # another process holds its own, or none

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Images of these rows of the table, a new array [B, 3, H, W]."""
        planes = self._planes if self._file is None else self._file.planes()
        if planes is not None:
            return np.take(planes, rows, axis=0)
        load = partial(load_image, size=self.size)
        images = list(in_order(load, self._paths[rows].tolist(), workers=self._workers))
        return np.stack(images).transpose(0, 3, 1, 2) if images else np.empty((0, 3, *self.size), np.uint8)


class _MappedFile:
    """Images [N, 3, H, W] in a file; a process that it is sent to opens the file again and shares its pages."""

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self._path = path
        self._shape = shape
        self._open()

    def planes(self) -> np.ndarray:
        """The mapped images.

        Raises:
            OSError: If the file was cut short: reading beyond its end would end the whole process.
        """
        found = self._mapped.size()  # of the file as it is now; one that was removed stays whole while it is mapped
        if found < self._planes.nbytes:
            raise OSError(
                f'{self._path}: this image store has {found:,} of {self._planes.nbytes:,} bytes, because something '
                'changed it since it was opened; start again, and it is written anew'
            )
        return self._planes

    def __getstate__(self) -> tuple[Path, tuple[int, int, int, int]]:
        return self._path, self._shape

    def __setstate__(self, state: tuple[Path, tuple[int, int, int, int]]) -> None:
        self._path, self._shape = state
        self._open()

    def _open(self) -> None:
        try:
            with open(self._path, 'rb') as file:
                self._mapped = mmap.mmap(file.fileno(), math.prod(self._shape), access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise OSError(
                f'{self._path}: this image store is gone or was cut short ({error}); start again, and it is written '
                'anew'
            ) from error
        self._planes = np.frombuffer(self._mapped, np.uint8).reshape(self._shape)


@dataclass(frozen=True)
class StorePlan:
    """What `image_store` would do.

    Attributes:
        cache: `disk`, `ram`, `device` or `off`, whatever `auto` came to.
        num_bytes: Size of all images.
        folder: Where `disk` and `device` keep them; None for the others.
        found: Whether they are there already.
        reason: Why `auto` does not use the disk; empty if it does.
    """

    cache: str
    num_bytes: int
    folder: Path | None
    found: bool
    reason: str = ''


def plan_store(
    records: Records,
    size: tuple[int, int],
    *,
    cache: str = 'auto',
    cache_dir: str | os.PathLike | None = None,
    device: torch.device | None = None,
) -> StorePlan:
    """What `image_store` would do with the same arguments; nothing is decoded and nothing is written.

    Args:
        records: The table.
        size: Height and width that every image is squashed to.
        cache: One of `CACHES`.
        cache_dir: Where the disk cache is; None is `$VIREID_CACHE` or `~/.cache/vireid_timm`.
        device: That images may be held on.

    Raises:
        ValueError: An unknown cache; `device` without a device; or too little memory for `device` or `ram`.
        OSError: The disk cannot hold the store.
    """
    paths = records.path.tolist()
    folder = _store_folder(paths, size, cache, cache_dir)
    found = folder is not None and _stored(folder, paths, _num_bytes(paths, size)) is not None
    return _plan(cache, _num_bytes(paths, size), folder, found, device)


def image_store(
    records: Records,
    size: tuple[int, int],
    *,
    cache: str = 'auto',
    cache_dir: str | os.PathLike | None = None,
    device: torch.device | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> ImageStore:
    """Make the images of a table available as bytes, decoding each of them only once.

    Args:
        records: The table; row i of the store is row i of the table.
        size: Height and width that every image is squashed to.
        cache: `disk` keeps the bytes in a memory-mapped file for this and later runs, `ram` in this process; `device`
            is `disk` and a copy of all of them in the memory of the device; `off` decodes on every access. `auto` is
            `device` on an accelerator whose free memory is at least four times as large, else `disk`; where the disk
            cannot hold them it is `ram`, if they take at most half of the free memory. Of several processes on this
            machine, which `torchrun` or SLURM started, each counts on its share of the free memory.
        cache_dir: Where the disk cache is; None is `$VIREID_CACHE` or `~/.cache/vireid_timm`.
        device: That images may be held on; None for none.
        skip_broken: Name broken images in one warning and go on; use the rows of `ImageStore.intact` only.
        workers: How many decode at a time; None is one per core, at most 8; 0 decodes in the calling thread.
        progress: Show a progress bar, if the output is a terminal.

    Raises:
        ValueError: An unknown cache; `device` without a device; or too little memory for `device` or `ram`.
        ImageError: If an image is broken, unless `skip_broken`; if all of them are, in any case.
        OSError: If the store cannot be written; nothing is left behind.
    """
    size = (int(size[0]), int(size[1]))
    paths = records.path.tolist()
    workers = default_workers() if workers is None else workers
    decode = partial(_decode_all, paths, size, skip_broken=skip_broken, workers=workers, progress=progress)
    folder = _store_folder(paths, size, cache, cache_dir)
    planes: np.ndarray | Path | None = None
    broken: dict[int, str] = {}
    if folder is None:
        plan = _plan(cache, _num_bytes(paths, size), None, False, device)
    else:
        plan, broken = _find_or_write(folder, paths, size, decode, cache, device, skip_broken)
        planes = None if plan.folder is None else plan.folder / _PIXELS
    if plan.cache == 'ram':
        planes, broken = _decode_to_ram(len(paths), size, decode)
    elif plan.cache == 'off' and skip_broken:
        broken = decode(lambda chunk: None)  # decoded and dropped: what is broken has to be known beforehand
    _report_broken(broken, len(paths), skip_broken)
    store = ImageStore(paths, size, planes, broken, workers)
    if plan.cache == 'device':
        store.hold(device)
    _report_plan(plan, len(paths), size, device)
    return store


def default_cache_dir() -> Path:
    """`$VIREID_CACHE`, or `~/.cache/vireid_timm`."""
    return Path(os.environ.get('VIREID_CACHE') or Path.home() / '.cache' / 'vireid_timm')


def _decode_chunk(paths: list[str], size: tuple[int, int]) -> tuple[np.ndarray, dict[int, str]]:
    """Images [B, 3, H, W] of one unit of work, black where broken, and offset -> why."""
    planes = np.zeros((len(paths), 3, *size), np.uint8)
    broken = {}
    for offset, path in enumerate(paths):
        try:
            planes[offset] = load_image(path, size).transpose(2, 0, 1)
        except ImageError as error:
            broken[offset] = error.args[0]
    return planes, broken


def _decode_all(
    paths: list[str],
    size: tuple[int, int],
    write: Callable[[np.ndarray], object],
    *,
    skip_broken: bool,
    workers: int,
    progress: bool,
) -> dict[int, str]:
    """Decode every image, hand them to `write` in order, and return row -> why for the broken ones."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    rendered = sum(path.startswith(ADDRESS_PREFIX) for path in paths)
    results = in_order(partial(_decode_chunk, size=size), chunks, workers=workers, processes=rendered >= PROCESSES_FROM)
    broken = {}
    bar = tqdm(total=len(paths), desc='reading images', unit='img', disable=None if progress else True)
    with bar, closing(results):
        for index, (planes, errors) in enumerate(results):
            if errors and not skip_broken:
                raise ImageError(next(iter(errors.values())))
            broken.update({index * CHUNK + offset: reason for offset, reason in errors.items()})
            write(planes)
            bar.update(len(planes))
    return broken


def _decode_to_ram(
    count: int,
    size: tuple[int, int],
    decode: Callable[..., dict[int, str]],
) -> tuple[np.ndarray, dict[int, str]]:
    planes = np.empty((count, 3, *size), np.uint8)
    position = 0

    def write(chunk: np.ndarray) -> None:
        nonlocal position
        planes[position : position + len(chunk)] = chunk
        position += len(chunk)

    return planes, decode(write)


def _store_folder(
    paths: list[str], size: tuple[int, int], cache: str, cache_dir: str | os.PathLike | None
) -> Path | None:
    """The folder that would hold this store, if that cache has one."""
    if cache not in CACHES:
        raise ValueError(f'unknown cache {cache!r}; expected one of {", ".join(CACHES)}')
    if cache in ('ram', 'off') or not paths:
        return None
    return Path(cache_dir or default_cache_dir()).expanduser() / f'images-{_content_key(paths, size)}'


def _num_bytes(paths: list[str], size: tuple[int, int]) -> int:
    return len(paths) * size[0] * size[1] * 3


def _plan(cache: str, num_bytes: int, folder: Path | None, found: bool, device: torch.device | None) -> StorePlan:
    """Settle what `auto` is, and refuse what cannot be."""
    if cache in ('device', 'ram'):
        _check_room(num_bytes, cache, device)
    if folder is None:
        return StorePlan('off' if cache == 'off' else 'ram', num_bytes, None, False)
    problem = None if found else _disk_problem(folder.parent, num_bytes)
    if problem is not None:
        if cache != 'auto' or num_bytes > _RAM_SHARE * _memory_share():
            raise _unwritable(problem, folder, num_bytes)
        return StorePlan('ram', num_bytes, None, False, problem.strerror)
    if cache == 'auto':
        cache = 'device' if num_bytes <= _DEVICE_SHARE * _free_device_memory(device) else 'disk'
    return StorePlan(cache, num_bytes, folder, found)


def _check_room(num_bytes: int, cache: str, device: torch.device | None) -> None:
    if cache == 'device' and device is None:
        raise ValueError("cache='device' needs the device that is to hold the images; give it, or use cache='disk'")
    in_memory = cache == 'ram' or device.type == 'cpu'
    free = _memory_share() if in_memory else _free_device_memory(device)
    if free and num_bytes > free:  # 0 where it cannot be known
        each = f' for each of {_processes_here()} processes' if in_memory and _processes_here() > 1 else ''
        raise ValueError(
            f'{"this machine" if cache == "ram" else device} has {_amount(free)} of free memory{each}, too little for '
            f'images of {_amount(num_bytes)}; use cache="disk" (--cache)'
        )


def _disk_problem(cache_dir: Path, num_bytes: int) -> OSError | None:
    """Why a disk cannot hold a store of this size; None if it can."""
    existing = next(folder for folder in (cache_dir.absolute(), *cache_dir.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return OSError(errno.EACCES, f'{existing} cannot be written to')
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        return OSError(errno.ENOSPC, f'{os.strerror(errno.ENOSPC)}: {_amount(free)} are free')
    return None


def _memory_share() -> int:
    """Bytes that this process may still take if all processes here take as much; 0 where the system does not say."""
    return _free_memory() // _processes_here()


def _processes_here() -> int:
    """How many processes torchrun, or else SLURM (`2(x3),1`: of the first machine), started on this machine."""
    count = os.environ.get('LOCAL_WORLD_SIZE') or os.environ.get('SLURM_STEP_TASKS_PER_NODE') or '1'
    return int(count.partition('(')[0].partition(',')[0])


def _free_memory() -> int:
    """Bytes that processes here may still take, 0 where the system does not say."""
    try:
        with open('/proc/meminfo') as file:
            free = next(1024 * int(line.split()[1]) for line in file if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return 0
    with suppress(OSError, ValueError):  # a container's own limit; the text `max` where it has none
        limit, used = (int(Path('/sys/fs/cgroup', name).read_text()) for name in ('memory.max', 'memory.current'))
        free = min(free, limit - used)
    return max(free, 0)


def _free_device_memory(device: torch.device | None) -> int:
    """Free bytes on an accelerator with memory of its own, else 0."""
    if device is None or device.type == 'cpu':
        return 0
    memory_info = getattr(torch.get_device_module(device), 'mem_get_info', None)
    return memory_info(device)[0] if memory_info else 0


def _amount(num_bytes: int) -> str:
    return f'{num_bytes / 1e9:.2f} GB' if num_bytes >= 1e8 else f'{num_bytes / 1e6:.1f} MB'


def _find_or_write(
    folder: Path,
    paths: list[str],
    size: tuple[int, int],
    decode: Callable[..., dict[int, str]],
    cache: str,
    device: torch.device | None,
    skip_broken: bool,
) -> tuple[StorePlan, dict[int, str]]:
    """The plan, carried out as far as it concerns the disk, and the broken rows of a store that is there."""
    num_bytes = _num_bytes(paths, size)
    broken = _stored(folder, paths, num_bytes)
    if broken is not None:
        return _plan(cache, num_bytes, folder, True, device), broken
    with _sole_writer(folder, skip_broken) as alone:
        broken = _stored(folder, paths, num_bytes)  # another process may have written it in the meantime
        plan = _plan(cache, num_bytes, folder, broken is not None, device)
        if plan.folder is not None and broken is None:
            broken = _write_store(folder, paths, size, decode, alone)
    return plan, broken or {}


@contextmanager
def _sole_writer(folder: Path, skip_broken: bool) -> Iterator[bool]:
    """Keep other processes from writing this store, after waiting for one that does.

    Yields:
        Whether that is so: where the file system has no locks, several may write the same store.

    Raises:
        ImageError: If that one ended because of a broken image, unless such images are to be skipped.
    """
    path = folder.with_name(f'{folder.name}.lock')
    with ExitStack() as stack:
        file = _locked(path, folder, skip_broken)
        if file is not None:
            stack.enter_context(file)
            stack.callback(path.unlink, missing_ok=True)  # first this, then the lock ends
        try:
            yield file is not None
        except ImageError as error:
            if file is not None:  # those who wait need not find out for themselves, one after the other
                file.write(json.dumps(error.args[0]))
                file.flush()
            raise


def _locked(path: Path, folder: Path, skip_broken: bool) -> IO[str] | None:
    """The lock file, open and locked; None where there are no locks, or no file can be made: nor can a store then."""
    while True:
        with ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, 'a+', encoding='utf-8'))
            except OSError:
                return None
            locked = lock(file)
            if locked is False:
                _logger.info(f'Waiting for another process, which is storing the same images in {folder}')
                locked = lock(file, wait=True)
            if locked is None:
                stack.close()
                with suppress(OSError):  # others may have removed it, or have it open, which Windows minds
                    path.unlink()
                return None
            # Whoever had the lock removed the file: by now there may be another one, and only that counts.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    stack.pop_all()
                    return file
            file.seek(0)
            problem = file.read()
            if problem and not skip_broken:
                raise ImageError(json.loads(problem))


def _write_store(
    folder: Path,
    paths: list[str],
    size: tuple[int, int],
    decode: Callable[..., dict[int, str]],
    alone: bool,
) -> dict[int, str]:
    """Decode into the store's folder, which appears under its final name only when it is complete; the broken rows."""
    num_bytes = _num_bytes(paths, size)
    temporary = folder.with_name(f'{folder.name}.{uuid.uuid4().hex}.tmp')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder, alone)
        _logger.info(f'Storing {len(paths):,} images of {size[0]}x{size[1]} once: {_amount(num_bytes)} in {folder}')
        temporary.mkdir()
        # Written with write() and mapped afterwards: a full disk is then an error, not the end of the process.
        with open(temporary / _PIXELS, 'wb') as file:
            broken = decode(file.write)
            file.flush()
            os.fsync(file.fileno())
        about = {'images': len(paths), 'size': size, 'first': paths[0], 'broken': broken}
        (temporary / _ABOUT).write_text(json.dumps(about, indent=1), encoding='utf-8')
        if _stored(folder, paths, num_bytes) is None:  # without locks another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)  # incomplete, or no longer true
            _publish(temporary, folder)
    except ChildProcessError:  # an OSError that is not about the disk
        raise
    except OSError as error:
        raise _unwritable(error, folder, num_bytes) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return broken


def _unwritable(error: OSError, folder: Path, num_bytes: int) -> OSError:
    return OSError(
        error.errno,
        f'cannot write an image store of {_amount(num_bytes)} to {folder.parent} ({error.strerror}); choose '
        f'another folder with the environment variable VIREID_CACHE, or cache="ram" or "off" (--cache)',
    )


def _content_key(paths: list[str], size: tuple[int, int]) -> str:
    # Decoders, resizing and rendering differ in the last bit between versions: no result may depend on an older run.
    versions = (_STORE_VERSION, PIL.__version__, np.__version__)
    digest = hashlib.sha256(repr((versions, size)).encode())
    if any(path.startswith(ADDRESS_PREFIX) for path in paths):
        digest.update(renderer_digest().encode())
    for path in paths:
        entry: tuple = (path,)
        if not path.startswith(ADDRESS_PREFIX):
            entry = (os.path.abspath(path), *_file_stamp(path))
        digest.update(repr(entry).encode('utf-8', 'surrogatepass'))
    return digest.hexdigest()[:24]


def _file_stamp(path: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _stored(folder: Path, paths: list[str], num_bytes: int) -> dict[int, str] | None:
    """Broken rows of a store that is complete and still true, else None."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding='utf-8'))
        broken = {int(row): problem for row, problem in about['broken'].items()}
        complete = (folder / _PIXELS).stat().st_size == num_bytes
    except (OSError, ValueError, KeyError):
        return None
    # An image may have been unreadable for a reason that leaves no trace in its size and time (its permissions).
    return broken if complete and not any(_is_readable(paths[row]) for row in broken) else None


def _is_readable(path: str) -> bool:
    try:
        read_image(path)
    except ImageError:
        return False
    return True


def _publish(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        # Another process may have published the same store in this very moment, and either will do.
        if not folder.is_dir():
            raise


def _remove_leftovers(folder: Path, alone: bool) -> None:
    """Remove what killed writers left behind: of this store if nobody else can be writing it, and what is old."""
    for temporary in sorted(folder.parent.glob('images-*.tmp')):
        stale = time.time() - last_written(temporary) > STALE_AFTER
        if stale or (alone and temporary.name.startswith(f'{folder.name}.')):
            shutil.rmtree(temporary, ignore_errors=True)


def _report_broken(broken: dict[int, str], count: int, skip_broken: bool) -> None:
    if not broken:
        return
    problems = list(broken.values())
    if not skip_broken:
        raise ImageError(problems[0])
    if len(broken) == count:
        raise ValueError(f'none of the {count} images can be read; the first: {problems[0]}')
    more = f' and {len(problems) - 5} more' if len(problems) > 5 else ''
    _logger.warning(f'{len(broken)} of {count} images are broken and skipped: {"; ".join(problems[:5])}{more}')


def _report_plan(plan: StorePlan, count: int, size: tuple[int, int], device: torch.device | None) -> None:
    """Say which cache was chosen, unless it is none."""
    if plan.cache == 'off':
        return
    where = {
        'disk': f'from {plan.folder}',
        'device': f'from {plan.folder} and held by {device}',
        'ram': 'from memory' + (f', since the disk cannot hold them ({plan.reason})' if plan.reason else ''),
    }[plan.cache]
    _logger.info(f'{count:,} images of {size[0]}x{size[1]} ({_amount(plan.num_bytes)}) are read {where}')
