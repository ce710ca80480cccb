"""The image store: all images of a record table, decoded once and kept as bytes of one size.

An epoch then costs a memory copy instead of a decode. On disk, a store's name is a hash of what it was made from: the
path, size and modification time of every file, the address of every rendered image, and the image size. If a file
changes, the name changes too, so stale bytes are never read. One process builds a store while others that need it wait
for its file lock.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout

from ..constants import CACHES
from ..files import STALE_AFTER, last_written
from ..synthvi.render import renderer_digest
from ..text import format_bytes, format_list
from .check import DIGEST_SIZE, add_copies, add_shared, equal_rows, file_digest
from .findings import Findings
from .images import ADDRESS_PREFIX, ImageError, load_image
from .records import Records
from .workers import CHUNK, in_order, map_chunks

_logger = logging.getLogger(__name__)

_PIXELS, _DIGESTS, _ABOUT = 'pixels.bin', 'digests.bin', 'about.json'  # the files of a store
_NO_DIGEST = bytes(DIGEST_SIZE)
_STORE_VERSION = 3  # raise it when the same image would give other bytes
_DEVICE_SHARE, _RAM_SHARE = 1 / 4, 1 / 2  # the most of the free memory that `auto` takes


class ImageStore:
    """Images of one size, indexed by the rows of their record table or of a part of it (`select`).

    Attributes:
        size: Height and width of every image.
        broken: Row -> why that image cannot be read. Empty unless broken images are skipped.
        held: All images of the table on a device, [N, 3, H, W] uint8, broken ones black; None without `hold`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        pixels: np.ndarray | Path | None,
        broken: dict[int, str],
        workers: int | None = 0,
    ) -> None:
        """Wrap decoded images, or decode them on access.

        Args:
            paths: Path or address of every image, [N].
            size: Height and width.
            pixels: The images [N, 3, H, W] uint8, a file that holds them, or None to decode on every access.
            broken: Row -> why that image cannot be read.
            workers: Threads that decode on access, as for `in_order`.

        Raises:
            OSError: If the file is missing or too short.
        """
        self.size = size
        self.broken = broken
        self.held: torch.Tensor | None = None
        self._paths = np.asarray(paths, dtype=np.str_)
        self._rows = np.arange(len(self._paths))
        self._workers = workers
        self._pixels = _MappedFile(pixels, (len(self._paths), 3, *size)) if isinstance(pixels, Path) else pixels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return the images of some rows: a slice, integer rows [B] or a mask [N].

        Returns:
            A new tensor on the CPU, [B, 3, H, W] uint8.

        Raises:
            ImageError: If one of the images is broken.
            OSError: If the store's file was truncated.
        """
        rows = np.arange(len(self))[rows]
        for row in rows if self.broken else ():
            if row in self.broken:
                raise ImageError(self.broken[row])
        return self._read(self._rows[rows])

    def select(self, rows: np.ndarray) -> 'ImageStore':
        """Return a store of some of the images. It shares their bytes with this one.

        Args:
            rows: Rows of this store that become rows 0..K-1 of the new one, [K].
        """
        part = copy.copy(self)
        part.held = self.held  # not copied by copy.copy, see __getstate__
        part._rows = self._rows[rows]
        part.broken = {place: self.broken[row] for place, row in enumerate(rows.tolist()) if row in self.broken}
        return part

    def intact(self) -> np.ndarray:
        """Return the rows that are not broken, sorted, [K]."""
        return np.setdiff1d(np.arange(len(self)), np.fromiter(self.broken, np.int64, len(self.broken)))

    def hold(self, device: torch.device) -> None:
        """Copy all images of the table to `held` on a device.

        Raises:
            OSError: If the store's file was truncated.
            torch.OutOfMemoryError: If they do not fit into the device's memory.
        """
        count = len(self._paths)
        held = torch.empty((count, 3, *self.size), dtype=torch.uint8, device=device)
        for start in range(0, count, CHUNK):
            held[start : start + CHUNK] = self._read(np.arange(start, min(start + CHUNK, count))).to(device)
        self.held = held

    def take_held(self, rows: np.ndarray) -> torch.Tensor:
        """Return the held images of integer rows [B], [B, 3, H, W] uint8, without waiting for the device."""
        index = torch.from_numpy(self._rows[rows]).to(self.held.device, non_blocking=True)
        return self.held.index_select(0, index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, 'held': None}  # another process has to hold its own

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        """Return the images of rows of the whole table as a new tensor [B, 3, H, W]."""
        if self._pixels is not None:
            return torch.from_numpy(self._pixels.take(rows, axis=0))
        images = np.empty((len(rows), 3, *self.size), np.uint8)
        load = partial(load_image, size=self.size)
        for i, image in enumerate(in_order(load, self._paths[rows].tolist(), workers=self._workers)):
            images[i] = image.transpose(2, 0, 1)
        return torch.from_numpy(images)


class _MappedFile:
    """Images [N, 3, H, W] in a memory-mapped file. A process that unpickles this maps the file again."""

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self._path = path
        try:
            with open(path, 'rb') as file:
                self._mapped = mmap.mmap(file.fileno(), math.prod(shape), access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise OSError(
                f'{path}: this image store is gone or was cut short ({error}); start again to rebuild it'
            ) from error
        self._images = np.frombuffer(self._mapped, np.uint8).reshape(shape)

    def take(self, rows: np.ndarray, axis: int) -> np.ndarray:
        """Copy rows along an axis, as `np.ndarray.take` does.

        Raises:
            OSError: If the file was truncated. Reading past its end would kill the whole process (SIGBUS).
        """
        found = self._mapped.size()  # the file's current size; a deleted file stays whole while it is mapped
        if found < self._images.nbytes:
            raise OSError(
                f'{self._path}: this image store has {found:,} of {self._images.nbytes:,} bytes, so something has '
                'changed it since it was opened; start again to rebuild it'
            )
        return self._images.take(rows, axis=axis)

    def __reduce__(self) -> tuple:
        return _MappedFile, (self._path, self._images.shape)


@dataclass(frozen=True)
class _Contents:
    """What became known while all images were decoded.

    Attributes:
        broken: Row -> why that image cannot be read.
        digests: Hash of every file, see `file_digest`; None of broken and rendered images. Empty if nothing was read.
    """

    broken: dict[int, str] = field(default_factory=dict)
    digests: list[bytes | None] = field(default_factory=list)


@dataclass(frozen=True)
class StorePlan:
    """What `image_store` would do.

    Attributes:
        cache: `disk`, `ram`, `device` or `off`; `auto` is resolved.
        num_bytes: Size of all images.
        folder: Folder of the store for `disk` and `device`, else None.
        found: Whether the store exists already.
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
    """Return what `image_store` would do with the same arguments, without decoding or writing anything.

    Raises:
        ValueError: On an unknown cache, `device` without a device, or too little memory for `device` or `ram`.
        OSError: If the disk cannot hold the store.
    """
    paths, num_bytes = records.path.tolist(), math.prod((len(records), 3, *size))
    folder = _store_folder(paths, size, cache, cache_dir)
    return _plan(cache, num_bytes, folder, _find(folder, paths, num_bytes) is not None, device)


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
    others: Records | None = None,
) -> ImageStore:
    """Decode every image of a table once and make all of them available as bytes.

    Args:
        records: The table. Row i of the store is row i of the table.
        size: Height and width of the stored images. The aspect ratio is not kept.
        cache: `disk` keeps the bytes in a memory-mapped file, for later runs too. `ram` keeps them in this process.
            `device` is `disk`, plus a copy of all images in the device's memory. `off` decodes on every access. `auto`
            is `device` on an accelerator with at least four times as much free memory, else `disk`; if the disk cannot
            hold the images, it is `ram`, provided that they take at most half of the free memory. If `torchrun` or
            SLURM started several processes on this machine, each counts on its share of the free memory.
        cache_dir: Folder of the disk cache; None for `$VIREID_CACHE` or `~/.cache/vireid_timm`.
        device: Device that may hold the images.
        skip_broken: Skip broken images and name them in a warning. Use only the rows of `ImageStore.intact` then.
        workers: Number of workers that decode; None for one per core, at most 8; 0 to decode in the calling thread.
        progress: Show a progress bar, if the output is a terminal.
        others: A table of images that are to be other ones, such as those to test on: equal files are named in a
            warning, unless `off` reads none in advance. Their files are read and hashed, but not decoded.

    Raises:
        ValueError: On an unknown cache, `device` without a device, too little memory for `device` or `ram`, or if none
            of the images can be read.
        ImageError: If an image is broken, unless `skip_broken` is set.
        OSError: If the store cannot be written. Nothing is left behind.
    """
    size = (int(size[0]), int(size[1]))
    paths, num_bytes = records.path.tolist(), math.prod((len(records), 3, *size))
    folder = _store_folder(paths, size, cache, cache_dir)
    decode = partial(_decode, paths, size, skip_broken=skip_broken, workers=workers, progress=progress)
    contents = _find(folder, paths, num_bytes)
    with ExitStack() as stack:
        if folder is not None and contents is None:
            locked = stack.enter_context(_build_lock(folder))
            contents = _find(folder, paths, num_bytes)  # another process may have built it while this one waited
        plan = _plan(cache, num_bytes, folder, contents is not None, device)
        if plan.folder is not None and contents is None:
            contents = _build(folder, paths, size, decode, locked)
    pixels = None if plan.folder is None else plan.folder / _PIXELS
    if plan.cache == 'ram':
        pixels = np.empty((len(paths), 3, *size), np.uint8)
        contents = decode(lambda start, chunk: np.copyto(pixels[start : start + len(chunk)], chunk))
    elif plan.cache == 'off' and skip_broken:
        contents = decode(lambda start, chunk: None)  # only to know which images are broken
    contents = contents or _Contents()
    _check_broken(contents.broken, len(paths), skip_broken)
    add_copies(Findings(), records, equal_rows(paths, contents.digests))
    if others is not None and any(contents.digests):
        add_shared(Findings(), records, contents.digests, others, workers)
    store = ImageStore(paths, size, pixels, contents.broken, workers)
    if plan.cache == 'device':
        store.hold(device)
    _log_plan(plan, len(paths), size, device)
    return store


def default_cache_dir() -> Path:
    """Return `$VIREID_CACHE`, or `~/.cache/vireid_timm`."""
    return Path(os.environ.get('VIREID_CACHE') or Path.home() / '.cache' / 'vireid_timm')


def _store_folder(
    paths: list[str], size: tuple[int, int], cache: str, cache_dir: str | os.PathLike | None
) -> Path | None:
    """Return the folder of this store on disk, or None if the cache uses none."""
    if cache not in CACHES:
        raise ValueError(f'unknown cache {cache!r}; expected one of {", ".join(CACHES)}')
    if cache in ('ram', 'off') or not paths:
        return None
    # Decoders, resizing and rendering differ in the last bit between versions: no result may depend on an older run.
    versions = (_STORE_VERSION, PIL.__version__, np.__version__)
    digest = hashlib.sha256(repr((versions, (int(size[0]), int(size[1])))).encode())
    if any(path.startswith(ADDRESS_PREFIX) for path in paths):
        digest.update(renderer_digest().encode())
    for path in paths:
        entry = (path,) if path.startswith(ADDRESS_PREFIX) else (os.path.abspath(path), *_file_stamp(path))
        digest.update(repr(entry).encode('utf-8', 'surrogatepass'))
    return Path(cache_dir or default_cache_dir()).expanduser() / f'images-{digest.hexdigest()[:24]}'


def _file_stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _plan(cache: str, num_bytes: int, folder: Path | None, found: bool, device: torch.device | None) -> StorePlan:
    """Decide where the images are kept: resolve `auto`, and refuse what does not fit."""
    if cache in ('device', 'ram'):
        _check_memory(num_bytes, cache, device)
    if folder is None:
        return StorePlan('off' if cache == 'off' else 'ram', num_bytes, None, False)
    problem = None if found else disk_problem(folder.parent, num_bytes)
    if problem is not None:
        if cache != 'auto' or num_bytes > _RAM_SHARE * _memory_share():
            raise _write_error(problem, folder, num_bytes)
        return StorePlan('ram', num_bytes, None, False, problem.strerror)
    if cache == 'auto':
        cache = 'device' if num_bytes <= _DEVICE_SHARE * _free_device_memory(device) else 'disk'
    return StorePlan(cache, num_bytes, folder, found)


def _check_memory(num_bytes: int, cache: str, device: torch.device | None) -> None:
    if cache == 'device' and device is None:
        raise ValueError("cache='device' needs the device that holds the images; pass device=..., or use cache='disk'")
    in_memory = cache == 'ram' or device.type == 'cpu'
    free = _memory_share() if in_memory else _free_device_memory(device)
    if free and num_bytes > free:  # 0 if unknown
        each = f' for each of {_local_processes()} processes' if in_memory and _local_processes() > 1 else ''
        raise ValueError(
            f'{"this machine" if cache == "ram" else device} has {format_bytes(free)} of free memory{each}, too '
            f'little for images of {format_bytes(num_bytes)}; use cache="disk" (--cache)'
        )


def disk_problem(folder: Path, num_bytes: int) -> OSError | None:
    """Return why a folder, which need not be there yet, cannot take that many bytes, or None if it can."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return OSError(errno.ENOTDIR, f'{existing} is not a folder')
    if not os.access(existing, os.W_OK):
        return OSError(errno.EACCES, f'{existing} is not writable')
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        return OSError(errno.ENOSPC, f'{os.strerror(errno.ENOSPC)}: {format_bytes(free)} free')
    return None


def _memory_share() -> int:
    """Return this process's share of the free memory in bytes, 0 if unknown."""
    return _free_memory() // _local_processes()


def _local_processes() -> int:
    """Return how many processes torchrun, or else SLURM (`2(x3),1`: on the first machine), started on this machine."""
    count = os.environ.get('LOCAL_WORLD_SIZE') or os.environ.get('SLURM_STEP_TASKS_PER_NODE') or '1'
    return int(count.partition('(')[0].partition(',')[0])


def _free_memory() -> int:
    """Return the machine's or container's free memory in bytes, 0 if unknown."""
    try:
        with open('/proc/meminfo') as file:
            free = next(1024 * int(line.split()[1]) for line in file if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return 0
    with suppress(OSError, ValueError):  # a container's own limit; `max` if it has none
        limit, used = (int(Path('/sys/fs/cgroup', name).read_text()) for name in ('memory.max', 'memory.current'))
        free = min(free, limit - used)
    return max(free, 0)


def _free_device_memory(device: torch.device | None) -> int:
    """Return the free bytes of an accelerator with its own memory, else 0."""
    if device is None or device.type == 'cpu':
        return 0
    memory_info = getattr(torch.get_device_module(device), 'mem_get_info', None)
    return memory_info(device)[0] if memory_info else 0


def _decode(
    paths: list[str],
    size: tuple[int, int],
    write: Callable[[int, np.ndarray], object],
    *,
    skip_broken: bool,
    workers: int | None,
    progress: bool,
) -> _Contents:
    """Decode all images, pass the first row and the images [B, 3, H, W] of every chunk to `write` in order."""
    broken: dict[int, str] = {}
    digests: list[bytes | None] = []

    def use(start: int, result: tuple[np.ndarray, dict[int, str], list[bytes | None]]) -> None:
        images, problems, found = result
        digests.extend(found)
        if problems and not skip_broken:
            raise ImageError(next(iter(problems.values())))
        broken.update({start + offset: problem for offset, problem in problems.items()})
        write(start, images)

    rendered = sum(path.startswith(ADDRESS_PREFIX) for path in paths)
    decode = partial(_decode_chunk, size=size)
    map_chunks(decode, paths, use, rendered=rendered, workers=workers, label='reading images', progress=progress)
    return _Contents(broken, digests)


def _decode_chunk(paths: list[str], size: tuple[int, int]) -> tuple[np.ndarray, dict[int, str], list[bytes | None]]:
    """Return the images [B, 3, H, W], broken ones black, offset -> why for these, and the hashes of intact files."""
    images = np.zeros((len(paths), 3, *size), np.uint8)
    broken = {}
    digests: list[bytes | None] = [None] * len(paths)
    for offset, path in enumerate(paths):
        try:
            images[offset] = load_image(path, size).transpose(2, 0, 1)
            digests[offset] = None if path.startswith(ADDRESS_PREFIX) else file_digest(path)
        except ImageError as error:
            broken[offset] = error.args[0]
    return images, broken, digests


@contextmanager
def _build_lock(folder: Path) -> Iterator[bool]:
    """Lock a store for building; wait for another process that builds it.

    Yields:
        Whether it is locked. Without working locks, several processes may build the same store.
    """
    path = folder.with_name(f'{folder.name}.lock')
    # No soft lock: on another machine it would outlive a killed process.
    lock = FileLock(path, fallback_to_soft=False)
    with suppress(OSError):  # no locks on this file system, or the folder is not writable
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _logger.info(f'Waiting for another process that is storing the same images in {folder}')
            lock.acquire()
    try:
        yield lock.is_locked
    finally:
        with suppress(OSError):
            path.unlink()  # before the release; filelock takes no lock on a deleted file
        lock.release()


def _build(
    folder: Path, paths: list[str], size: tuple[int, int], decode: Callable[..., _Contents], locked: bool
) -> _Contents:
    """Decode into a temporary folder, and rename it to the store's folder when it is complete."""
    num_bytes = math.prod((len(paths), 3, *size))
    temporary = folder.with_name(f'{folder.name}.{uuid.uuid4().hex}.tmp')
    try:
        _remove_leftovers(folder, locked)
        shutil.rmtree(folder, ignore_errors=True)  # incomplete or outdated
        _logger.info(
            f'Storing {len(paths):,} images of {size[0]}x{size[1]} once: {format_bytes(num_bytes)} in {folder}'
        )
        temporary.mkdir(parents=True)
        # Written with write() and mapped afterwards: on a full disk, writing to a mapping would kill the process.
        with open(temporary / _PIXELS, 'wb') as file:
            contents = decode(lambda start, chunk: file.write(chunk))
            file.flush()
            os.fsync(file.fileno())
        (temporary / _DIGESTS).write_bytes(b''.join(digest or _NO_DIGEST for digest in contents.digests))
        about = {'images': len(paths), 'size': size, 'first': paths[0], 'broken': contents.broken}
        (temporary / _ABOUT).write_text(json.dumps(about, indent=1), encoding='utf-8')
        try:
            os.rename(temporary, folder)
        except OSError:
            if _find(folder, paths, num_bytes) is None:  # else another process was faster, without locks
                raise
    except ChildProcessError:  # an OSError, but not about the disk
        raise
    except OSError as error:
        raise _write_error(error, folder, num_bytes) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return contents


def _write_error(error: OSError, folder: Path, num_bytes: int) -> OSError:
    return OSError(
        error.errno,
        f'cannot write an image store of {format_bytes(num_bytes)} to {folder.parent} ({error.strerror}); choose '
        'another folder with the environment variable VIREID_CACHE, or use cache="ram" or "off" (--cache)',
    )


def _remove_leftovers(folder: Path, locked: bool) -> None:
    """Remove temporary folders of killed processes: those of this store if it is locked, of other stores if old."""
    for temporary in folder.parent.glob('images-*.tmp'):
        own = locked and temporary.name.startswith(f'{folder.name}.')
        if own or time.time() - last_written(temporary) > STALE_AFTER:
            shutil.rmtree(temporary, ignore_errors=True)


def _find(folder: Path | None, paths: list[str], num_bytes: int) -> _Contents | None:
    """Return what is known about a complete and valid store, or None if there is none."""
    if folder is None:
        return None
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding='utf-8'))
        broken = {int(row): problem for row, problem in about['broken'].items()}
        written = (folder / _DIGESTS).read_bytes()
        complete = (folder / _PIXELS).stat().st_size == num_bytes and len(written) == DIGEST_SIZE * len(paths)
    except (OSError, ValueError, KeyError):
        return None
    # A file can become readable without a new size or time, for example by its permissions.
    still_broken = _decode_chunk([paths[row] for row in broken], (1, 1))[1]
    if not complete or len(still_broken) != len(broken):
        return None
    digests = (written[start : start + DIGEST_SIZE] for start in range(0, len(written), DIGEST_SIZE))
    return _Contents(broken, [None if digest == _NO_DIGEST else digest for digest in digests])


def _check_broken(broken: dict[int, str], count: int, skip_broken: bool) -> None:
    if not broken:
        return
    problems = list(broken.values())
    if not skip_broken:
        raise ImageError(problems[0])
    if len(broken) == count:
        raise ValueError(f'none of the {count} images can be read; the first: {problems[0]}')
    _logger.warning(f'{len(broken)} of {count} images are broken and skipped: {format_list(problems)}')


def _log_plan(plan: StorePlan, count: int, size: tuple[int, int], device: torch.device | None) -> None:
    if plan.cache == 'off':
        return
    more = f' and held by {device}' if plan.cache == 'device' else ''
    more += f', because the disk cannot hold them ({plan.reason})' if plan.reason else ''
    images = f'{count:,} images of {size[0]}x{size[1]} ({format_bytes(plan.num_bytes)})'
    _logger.info(f'{images} are read from {plan.folder or "memory"}{more}')
