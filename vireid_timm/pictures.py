"""Reading pictures: one safe way to decode any file, and the store that decodes a whole table only once.

A store keeps every picture of a record table as bytes of one size, so that an epoch costs a memory copy instead of a
decode. On disk it is keyed by what it was made from (path, byte size and modification time of every file, the address
of every rendered picture, the picture size): a changed file gives another key, so that stale bytes are never read.
"""

import errno
import hashlib
import importlib.resources
import json
import logging
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from .records import Records
from .synthetic import render_address

_logger = logging.getLogger(__name__)

ADDRESS_PREFIX = 'synthvi:'
RENDERER_SOURCES = ('figure.py', 'pedestrian.py', 'scenery.py', 'sketch.py', 'synthetic.py')  # what decides their look
CACHES = ('disk', 'ram', 'off')
PICTURE_SUFFIXES = ('.bmp', '.gif', '.jp2', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
FORMATS = ('BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')  # plain pictures, none that runs a program
MAX_PIXELS = 64 * 1024 * 1024  # twice an 8K frame; a file that claims more is refused before it is decoded
STRETCH_PERCENTILES = (0.1, 99.9)

_STORE_VERSION = 1  # raise it when the same file would give other bytes
CHUNK = 32  # pictures per unit of work: enough to hide its overhead, few enough for a smooth progress bar
PROCESSES_FROM = 4000  # rendered pictures that pay for starting processes (each imports the library anew)
_STALE_AFTER = 6 * 3600  # seconds without a write after which a temporary folder belongs to a run that was killed

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture that cannot be used, made from a problem that names the file; the message adds what to do about it."""

    def __str__(self) -> str:
        return f'{self.args[0]}; replace or remove it, or go on without it: skip_broken=True (--skip-broken)'


def read_picture(path: str) -> Image.Image:
    """Read one picture as 8-bit RGB, whatever it was stored as.

    EXIF orientation is applied, transparent parts become black, of several frames the first is taken. A single channel
    of more than 8 bits (`I;16`, `I`, `F`, as thermal cameras write) is stretched linearly from the picture's own 0.1
    and 99.9 percentiles to 0..255: raw counts use a small, shifting part of their range, which full-range scaling
    would leave almost black.

    Args:
        path: A file, or the address of a rendered picture (`synthvi:...`).

    Raises:
        PictureError: If the file is missing, truncated, larger than `MAX_PIXELS`, or no picture.
    """
    if path.startswith(ADDRESS_PREFIX):
        return Image.fromarray(render_address(path))
    try:
        # Opened here, not by Pillow: it would map plain TIFFs into memory, and garbles those that are stored sideways.
        with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f'it has {width}x{height} pixels')
            picture.load()
            # Pillow turns TIFFs upright itself, and leaves all else to the caller.
            turn = None if picture.format == 'TIFF' else _UPRIGHT.get(picture.getexif().get(_ORIENTATION_TAG))
            upright = _to_rgb(picture)
            return upright if turn is None else upright.transpose(turn)
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise PictureError(f'{path}: this picture cannot be read ({_reason(error)})') from error


def load_picture(path: str, size: tuple[int, int]) -> np.ndarray:
    """Read one picture and squash it to a size.

    Args:
        path: A file, or the address of a rendered picture.
        size: Height and width; the aspect ratio is not kept, as usual for pedestrians.

    Returns:
        Bytes [H, W, 3], resized bilinearly with antialiasing.
    """
    height, width = size
    picture = read_picture(path)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f'{error}, more than the limit of {MAX_PIXELS:,} pixels'
    if isinstance(error, UnidentifiedImageError):
        return f'not one of the formats {", ".join(FORMATS)}'
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == 'F' or picture.mode.startswith('I'):
        return _stretch(np.asarray(picture))
    if picture.mode in ('RGBA', 'LA', 'PA') or 'transparency' in picture.info:
        # Dropping the alpha channel alone would show whatever colour lies under the transparent parts.
        picture = picture.convert('RGBA')
        black = Image.new('RGBA', picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture)
    return picture.convert('RGB')


def _stretch(values: np.ndarray) -> Image.Image:
    """Scale one channel [H, W] of any range to 8 bits, see `read_picture`."""
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError('it has no finite pixel value')
    low, high = np.percentile(finite, STRETCH_PERCENTILES)
    if high <= low:  # nearly constant: a few hot pixels are all there is to see
        low, high = finite.min(), finite.max()
    values = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    scaled = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.round(scaled).astype(np.uint8)).convert('RGB')


class PictureStore:
    """Pictures of one size, indexed by the rows of the table they were loaded for; made by `picture_store`.

    Attributes:
        size: Height and width of every picture.
        broken: Row -> what is wrong with that picture; empty unless broken pictures were to be skipped.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        pixels: np.ndarray | Path | None,
        broken: dict[int, str],
        workers: int = 0,
    ) -> None:
        """Wrap pictures that are decoded already, or that are decoded on access.

        Args:
            paths: What each row shows, [N].
            size: Height and width.
            pixels: The pictures [N, H, W, 3], a file that holds them, or None to decode on every access.
            broken: Row -> why that picture cannot be read.
            workers: Threads that decode, where pictures are decoded on access.
        """
        self.size = size
        self.broken = broken
        self._paths = np.asarray(paths, dtype=np.str_)
        self._workers = workers
        self._file = pixels if isinstance(pixels, Path) else None
        self._pixels = self._map() if self._file else pixels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures of the given rows: a slice, integer rows [B] or a mask [N].

        Returns:
            A new array of bytes [B, H, W, 3]; `torch.from_numpy(...).permute(0, 3, 1, 2)` is channels-last at no cost.

        Raises:
            PictureError: If one of them is broken.
        """
        rows = np.arange(len(self))[rows]
        for row in rows if self.broken else ():
            if row in self.broken:
                raise PictureError(self.broken[row])
        if self._pixels is not None:
            return np.take(self._pixels, rows, axis=0)
        load = partial(load_picture, size=self.size)
        pictures = list(in_order(load, self._paths[rows].tolist(), workers=self._workers))
        return np.stack(pictures) if pictures else np.empty((0, *self.size, 3), np.uint8)

    def intact(self) -> np.ndarray:
        """Rows that are not broken, sorted, [K]."""
        return np.setdiff1d(np.arange(len(self)), np.fromiter(self.broken, np.int64, len(self.broken)))

    def __getstate__(self) -> dict[str, object]:
        # A mapped file is opened again on the other side: worker processes share its pages instead of getting a copy.
        return {**self.__dict__, '_pixels': None if self._file else self._pixels}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self._file:
            self._pixels = self._map()

    def _map(self) -> np.ndarray:
        return np.asarray(np.memmap(self._file, np.uint8, 'r', shape=(len(self), *self.size, 3)))


def picture_store(
    records: Records,
    size: tuple[int, int],
    *,
    cache: str = 'disk',
    cache_dir: str | os.PathLike | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> PictureStore:
    """Make the pictures of a table available as bytes, decoding each of them only once.

    Args:
        records: The table; row i of the store is row i of the table.
        size: Height and width that every picture is squashed to.
        cache: `disk` keeps the bytes in a memory-mapped file for this and later runs, `ram` in this process,
            `off` decodes on every access.
        cache_dir: Where `disk` writes; None is `$VIREID_CACHE` or `~/.cache/vireid_timm`.
        skip_broken: Name broken pictures in one warning and go on; use the rows of `PictureStore.intact` only.
        workers: How many decode at a time; None is one per core, at most 8; 0 decodes in the calling thread.
        progress: Show a progress bar, if the output is a terminal.

    Raises:
        PictureError: If a picture is broken, unless `skip_broken`; if all of them are, in any case.
        OSError: If the store cannot be written; nothing is left behind.
    """
    if cache not in CACHES:
        raise ValueError(f'unknown cache {cache!r}; expected one of {", ".join(CACHES)}')
    size = (int(size[0]), int(size[1]))
    paths = records.path.tolist()
    workers = default_workers() if workers is None else workers
    decode = partial(_decode_all, paths, size, skip_broken=skip_broken, workers=workers, progress=progress)
    pixels: np.ndarray | Path | None = None
    broken: dict[int, str] = {}
    if cache == 'ram' or not paths:
        pixels, broken = _decode_to_ram(len(paths), size, decode)
    elif cache == 'disk':
        pixels, broken = _decode_to_disk(paths, size, decode, Path(cache_dir or default_cache_dir()))
    elif skip_broken:
        broken = decode(lambda chunk: None)  # decoded and dropped: what is broken has to be known beforehand
    _report_broken(broken, len(paths), skip_broken)
    return PictureStore(paths, size, pixels, broken, workers)


def default_cache_dir() -> Path:
    """`$VIREID_CACHE`, or `~/.cache/vireid_timm`."""
    return Path(os.environ.get('VIREID_CACHE') or Path.home() / '.cache' / 'vireid_timm')


def default_workers() -> int:
    """One worker per core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(8, cores)


def in_order(
    function: Callable,
    items: Sequence,
    *,
    workers: int,
    processes: bool = False,
) -> Iterator:
    """Apply a function to every item in parallel and yield the results in order, only a few of them ahead of time.

    Args:
        function: What to apply; with `processes` it must be picklable.
        items: Its arguments.
        workers: How many at a time; 0 and 1 work in the calling thread.
        processes: Use processes rather than threads, for work that holds Python's lock (rendering does, decoding not).

    Raises:
        ChildProcessError: If a worker process dies or cannot start.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, get_context('spawn')) if processes else ThreadPoolExecutor(workers)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            'a worker process died or could not start; if a script of yours makes this call, put it under '
            '`if __name__ == "__main__":`, or pass workers=0 (--workers 0)'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode_chunk(paths: list[str], size: tuple[int, int]) -> tuple[np.ndarray, dict[int, str]]:
    """Pictures [B, H, W, 3] of one unit of work, black where broken, and offset -> why."""
    pixels = np.zeros((len(paths), *size, 3), np.uint8)
    broken = {}
    for offset, path in enumerate(paths):
        try:
            pixels[offset] = load_picture(path, size)
        except PictureError as error:
            broken[offset] = error.args[0]
    return pixels, broken


def _decode_all(
    paths: list[str],
    size: tuple[int, int],
    write: Callable[[np.ndarray], object],
    *,
    skip_broken: bool,
    workers: int,
    progress: bool,
) -> dict[int, str]:
    """Decode every picture, hand them to `write` in order, and return row -> why for the broken ones."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    rendered = sum(path.startswith(ADDRESS_PREFIX) for path in paths)
    results = in_order(partial(_decode_chunk, size=size), chunks, workers=workers, processes=rendered >= PROCESSES_FROM)
    broken = {}
    bar = tqdm(total=len(paths), desc='reading pictures', unit='pic', disable=None if progress else True)
    with bar, closing(results):
        for index, (pixels, errors) in enumerate(results):
            if errors and not skip_broken:
                raise PictureError(next(iter(errors.values())))
            broken.update({index * CHUNK + offset: reason for offset, reason in errors.items()})
            write(pixels)
            bar.update(len(pixels))
    return broken


def _decode_to_ram(
    count: int,
    size: tuple[int, int],
    decode: Callable[..., dict[int, str]],
) -> tuple[np.ndarray, dict[int, str]]:
    pixels = np.empty((count, *size, 3), np.uint8)
    position = 0

    def write(chunk: np.ndarray) -> None:
        nonlocal position
        pixels[position : position + len(chunk)] = chunk
        position += len(chunk)

    return pixels, decode(write)


def _decode_to_disk(
    paths: list[str],
    size: tuple[int, int],
    decode: Callable[..., dict[int, str]],
    cache_dir: Path,
) -> tuple[Path, dict[int, str]]:
    """Find or write the store's folder; it appears under its final name only when it is complete."""
    folder = cache_dir.expanduser() / f'pictures-{_content_key(paths, size)}'
    pixels_file = folder / 'pixels.bin'
    num_bytes = len(paths) * size[0] * size[1] * 3
    broken = _find_store(folder, paths, num_bytes)
    if broken is not None:
        return pixels_file, broken
    temporary = folder.with_name(f'{folder.name}.{uuid.uuid4().hex}.tmp')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        _logger.info(
            f'Storing {len(paths):,} pictures of {size[0]}x{size[1]} once: {num_bytes / 1e9:.2f} GB in {folder}'
        )
        if num_bytes > shutil.disk_usage(folder.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.mkdir()
        # Written with write() and mapped afterwards: a full disk is then an error, not the end of the process.
        with open(temporary / pixels_file.name, 'wb') as file:
            broken = decode(file.write)
            file.flush()
            os.fsync(file.fileno())
        about = {'pictures': len(paths), 'size': size, 'first': paths[0], 'broken': broken}
        (temporary / 'about.json').write_text(json.dumps(about, indent=1), encoding='utf-8')
        _publish(temporary, folder)
    except ChildProcessError:  # an OSError that is not about the disk
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f'cannot write a picture store of {num_bytes / 1e9:.2f} GB to {folder.parent} ({error.strerror}); choose '
            f'another folder with the environment variable VIREID_CACHE, or cache="ram" or "off" (--cache)',
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return pixels_file, broken


def _content_key(paths: list[str], size: tuple[int, int]) -> str:
    # Decoders, resizing and rendering differ in the last bit between versions: no result may depend on an older run.
    versions = (_STORE_VERSION, PIL.__version__, np.__version__)
    digest = hashlib.sha256(repr((versions, size)).encode())
    if any(path.startswith(ADDRESS_PREFIX) for path in paths):
        for name in RENDERER_SOURCES:  # an address does not say which version of the renderer it meant
            digest.update(importlib.resources.files(__package__).joinpath(name).read_bytes())
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


def _find_store(folder: Path, paths: list[str], num_bytes: int) -> dict[int, str] | None:
    """Broken rows of a store that is complete and still true, else None."""
    if not folder.is_dir():
        return None
    try:
        about = json.loads((folder / 'about.json').read_text(encoding='utf-8'))
        broken = {int(row): problem for row, problem in about['broken'].items()}
        complete = (folder / 'pixels.bin').stat().st_size == num_bytes
    except (FileNotFoundError, ValueError, KeyError):
        broken, complete = {}, False
    # A picture may have been unreadable for a reason that leaves no trace in its size and time (its permissions).
    if complete and not any(_is_readable(paths[row]) for row in broken):
        return broken
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _is_readable(path: str) -> bool:
    try:
        read_picture(path)
    except PictureError:
        return False
    return True


def _publish(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another run wrote the same store in the meantime, and either will do
            raise


def _remove_stale(cache_dir: Path) -> None:
    """Remove what killed runs left behind."""
    for temporary in sorted(cache_dir.glob('pictures-*.tmp')):
        newest = max(_file_stamp(temporary)[1], _file_stamp(temporary / 'pixels.bin')[1])
        if time.time() - newest / 1e9 > _STALE_AFTER:
            shutil.rmtree(temporary, ignore_errors=True)


def _report_broken(broken: dict[int, str], count: int, skip_broken: bool) -> None:
    if not broken:
        return
    problems = list(broken.values())
    if not skip_broken:
        raise PictureError(problems[0])
    if len(broken) == count:
        raise ValueError(f'none of the {count} pictures can be read; the first: {problems[0]}')
    more = f' and {len(problems) - 5} more' if len(problems) > 5 else ''
    _logger.warning(f'{len(broken)} of {count} pictures are broken and skipped: {"; ".join(problems[:5])}{more}')
