"""Files that appear whole or not at all, and locks that end with the process that holds them."""

import errno
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STALE_AFTER = 6 * 3600  # seconds without a write after which a temporary file belongs to a process that was killed

_LEFTOVER = re.compile(r'\.(.+)\.[0-9a-f]{8}\.(part|old)')


def expanded_path(path: str) -> str:
    """Replace a leading ~, which no shell does after `=`, after `local-dir:`, or in a YAML file."""
    return re.sub('^(local-dir:)?(~[^/]*)', lambda found: (found[1] or '') + os.path.expanduser(found[2]), path)


@contextmanager
def whole_file(path: str | Path, previous: str | Path | None = None) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes its place when the block ends without an error.

    Args:
        path: The file.
        previous: Where the file goes that was there before, instead of being replaced. At every moment there is a
            whole file under one of the two names, if there was one.

    Raises:
        OSError: It cannot be written; the error names the file, and what was there before is as it was.
    """
    path = Path(path)
    temporary = _beside(path, 'part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync_file(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if not _is_nameless(error, temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; it replaces whatever was there when the block ends without an error.

    Of a process that is killed while it replaces one, `remove_leftovers` puts back what was there.

    Raises:
        OSError: It cannot be written; the error names the folder or a file in it, and what was there is as it was.
    """
    path = Path(path)
    temporary, old = _beside(path, 'part'), _beside(path, 'old')
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in temporary.rglob('*'):
            if written.is_file():
                _sync_file(written)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if not _is_nameless(error, temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path, alone: bool) -> None:
    """Remove what writers that were killed left in a folder, and put back what one of them was about to replace.

    Args:
        folder: Where they wrote.
        alone: Whether nobody else can be writing there; otherwise only what is old is removed.
    """
    leftovers = [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]
    for path in sorted(leftovers, key=last_written, reverse=True):
        name, kind = _LEFTOVER.fullmatch(path.name).groups()
        if kind == 'old' and not (folder / name).exists():
            path.replace(folder / name)
        elif alone or time.time() - last_written(path) > STALE_AFTER:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def last_written(path: Path) -> float:
    """When a file, or a folder or a file in it, was written last, in seconds since 1970; 0 if it is gone."""
    times = [0.0]
    with suppress(OSError):  # its writer may be done with it
        times.append(path.stat().st_mtime)
        for written in path.glob('*'):
            times.append(written.stat().st_mtime)
    return max(times)


def check_writable(path: str | Path, is_folder: bool = False) -> None:
    """Check that `whole_file` or `whole_folder` can write there, before the work that it is for; creates nothing.

    Args:
        path: The file, or the folder.
        is_folder: Whether it is a folder.

    Raises:
        OSError: It cannot; the error names the path.
    """
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        if path.is_dir() and not is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.{kind}')


def _is_nameless(error: OSError, temporary: Path) -> bool:
    """Whether an error does not say by a name that the user knows where it happened: a full disk never does."""
    return error.errno is not None and error.filename in (None, str(temporary))


def _sync_file(path: Path) -> None:
    with open(path, 'r+b') as written:  # Windows flushes what could be written to only
        os.fsync(written.fileno())


def _sync_folder(folder: Path) -> None:
    """Have the folder's new entries on the disk, where the system can: a file's own fsync does not cover its name."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
