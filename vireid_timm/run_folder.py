"""A training run's folder: the names in it, its log and lock, and reading its checkpoints."""

import errno
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .files import remove_leftovers

_logger = logging.getLogger(__name__)

LAST = 'last.pth'
PREVIOUS = 'previous.pth'
DAMAGED = 'damaged.pth'
BEST = 'best'
SUMMARY = 'summary.csv'
CONFIG = 'args.yaml'
MODEL_CONFIG = 'config.json'
CLASS_MAP = 'class_map.json'
LOG = 'train.log'
LOCK = '.lock'


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has written a checkpoint there, damaged or not."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def holds_run(folder: Path) -> bool:
    """Return whether a run has finished an epoch there, even if its checkpoints are gone."""
    return has_checkpoint(folder) or (folder / BEST).exists() or (folder / SUMMARY).exists()


def folder_of(path: str | Path) -> Path:
    """Return the run's folder, given that folder or a checkpoint in it."""
    path = Path(path)
    return path.parent if path.name in (LAST, PREVIOUS) else path


@contextmanager
def open_run_folder(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process, and append what this package logs, from INFO on, to its `train.log`.

    Removes half-written files that a killed process left. The log also gets the error that ends the block.

    Raises:
        ValueError: Another process is training there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f'another process is training in {folder}; wait for it, or choose another --experiment'
        ) from error
    except (NotImplementedError, OSError):  # a file system without locks: go on without
        pass
    try:
        remove_leftovers(folder, alone=lock.is_locked)
        with _logging_to(folder / LOG):
            yield
    finally:
        lock.release()


class _LogFile(logging.FileHandler):
    """A log file that ignores write errors, e.g. on a full disk: checkpoints report those."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what could not be written before cannot be written now
            self.stream = None


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = _LogFile(path, encoding='utf-8', errors='backslashreplace')
    package = logging.getLogger(__package__)
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    level = package.level
    package.addHandler(handler)
    if package.getEffectiveLevel() > logging.INFO:
        package.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:  # for the file alone: the command line prints it, too
        message = f'{type(error).__name__}: {error}'
        handler.handle(package.makeRecord(package.name, logging.ERROR, __file__, 0, message, (), None))
        raise
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a training checkpoint onto the CPU.

    Args:
        path: A checkpoint, or a run's folder: its `last` one then, or the `previous` one if that is damaged.

    Raises:
        ValueError: No such file, or not an undamaged checkpoint of this library.
        OSError: It cannot be read just now, and may be whole.
    """
    return newest_checkpoint(Path(path))[1]


def newest_checkpoint(source: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path and the content of a run's newest undamaged checkpoint; see `load_checkpoint`."""
    if not source.is_dir():
        return source, _read_checkpoint(source)
    problems = []
    for path in (source / LAST, source / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state = _read_checkpoint(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            _logger.warning(f'{problems[0]}; using {path.name}, the one before it')
        return path, state
    if problems:
        raise ValueError(f'{"; ".join(problems)}; {source} has no undamaged checkpoint left')
    raise ValueError(f'no checkpoint in {source}: a run writes the first one after an epoch or --checkpoint-interval')


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f'no checkpoint {path}')
    try:
        _check_archive(path)
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        if _may_be_whole(error):
            raise
        raise ValueError(f'{path} is damaged or not a checkpoint of this library: {error}') from error
    if not isinstance(state, dict) or not {'state_dict', 'epoch', 'arch'} <= set(state):
        raise ValueError(f'{path} is not a training checkpoint of this library')
    return state


def _may_be_whole(error: Exception) -> bool:
    """Return whether reading failed for a reason outside the file: permissions, a lost network, too little memory."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)  # EINVAL: a damaged archive points to before its beginning
    return isinstance(error, MemoryError) or 'DefaultCPUAllocator' in str(error)


def _check_archive(path: Path) -> None:
    """Check what torch.load does not: the checksums, and that each record is a file."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f'the checksum of {damaged} in it is wrong')
        folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
        if folders:  # torch would return uninitialised memory for it
            raise ValueError(f'{folders[0]} in it is not a record')
