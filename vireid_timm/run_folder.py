"""What a training run leaves behind: its folder, checkpoints, log, summary and curves."""

import csv
import errno
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from .files import lock, remove_leftovers, whole_file

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


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Make a state the run's `last` checkpoint and the one before it the `previous` one.

    Whenever the process dies, there is a whole checkpoint under one of the two names.

    Raises:
        OSError: It cannot be written, on a full disk for example; the checkpoint before it is intact.
    """
    with whole_file(folder / LAST, previous=folder / PREVIOUS) as temporary, open(temporary, 'wb') as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides what the disk said
                raise error.__context__ from error
            raise


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint of this library on the CPU.

    Args:
        path: A checkpoint, or a run's folder: its `last` one then, and where that is damaged, saying so, the
            `previous` one.

    Raises:
        ValueError: No such file, or none that is such a checkpoint and undamaged.
        OSError: It cannot be read just now, and may be whole.
    """
    return newest_checkpoint(Path(path))[1]


def newest_checkpoint(source: Path) -> tuple[Path, dict[str, Any]]:
    """The newest undamaged checkpoint of a run, and where it was; arguments and errors as for `load_checkpoint`."""
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
        raise ValueError(f'{"; ".join(problems)}; no whole checkpoint is left in {source}')
    raise ValueError(f'no checkpoint in {source}: a run writes the first one after an epoch or --checkpoint-interval')


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has written a checkpoint there, damaged or not."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def holds_run(folder: Path) -> bool:
    """Whether a run has trained there for an epoch, whatever has become of its checkpoints."""
    return has_checkpoint(folder) or (folder / BEST).exists() or (folder / SUMMARY).exists()


def folder_of(path: str | Path) -> Path:
    """The folder of a run that is given by that or by one of its checkpoints."""
    path = Path(path)
    return path.parent if path.name in (LAST, PREVIOUS) else path


def set_damaged_aside(used: Path) -> None:
    """Rename a damaged `last` checkpoint if a run goes on from the `previous` one, which it would push out next."""
    last = used.with_name(LAST)
    if used.name == PREVIOUS and last.exists():
        try:
            _read_checkpoint(last)
        except ValueError:
            last.replace(used.with_name(DAMAGED))


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f'no checkpoint {path}')
    try:
        _check_archive(path)
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        if _says_nothing_of_the_file(error):
            raise
        raise ValueError(f'{path} is damaged or not a checkpoint of this library: {error}') from error
    if not isinstance(state, dict) or not {'state_dict', 'epoch', 'arch'} <= set(state):
        raise ValueError(f'{path} is not a training checkpoint of this library')
    return state


def _says_nothing_of_the_file(error: Exception) -> bool:
    """Whether a file that could not be read may be whole: no permission, a network or memory that is gone."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)  # a damaged archive points to before its beginning
    return isinstance(error, MemoryError) or 'DefaultCPUAllocator' in str(error)


def _check_archive(path: Path) -> None:
    """What torch.load does not look at: the checksums, and whether each record is a file."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f'the checksum of {damaged} in it is wrong')
        folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
        if folders:  # torch would give back uninitialised memory
            raise ValueError(f'{folders[0]} in it is no record')


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Make a run's folder this process's own as long as the block runs, and keep its `train.log`.

    The log holds what this package logs, from INFO on. Half-written files of a process that was killed are removed.

    Raises:
        ValueError: Another process is training there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(folder / LOG, encoding='utf-8')
    try:
        locked = lock(handler.stream)
        if locked is False:
            raise ValueError(f'another process is training in {folder}; wait for it, or choose another --experiment')
        remove_leftovers(folder, alone=locked is True)
        with _logging_to(handler):
            yield
    finally:
        handler.close()


class _LogFile(logging.FileHandler):
    """A log that a full disk leaves incomplete, instead of a traceback for every line; checkpoints report the disk."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setFormatter(logging.Formatter('%(asctime)s %(message)s'))

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what could not be written before cannot be now
            self.stream = None


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    package = logging.getLogger(__package__)
    level = package.level
    package.addHandler(handler)
    if package.getEffectiveLevel() > logging.INFO:
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)


def save_config(folder: Path, settings: dict[str, Any]) -> None:
    """Write the resolved settings, usable as `--config`."""
    with whole_file(folder / CONFIG) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding='utf-8')


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write all epochs anew: timm's appending helper would keep rows of epochs that a resumed run repeats."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with whole_file(folder / SUMMARY) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, restval='')
        writer.writeheader()
        writer.writerows(rows)
