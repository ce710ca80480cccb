"""The index of a gallery on disk: features of its images, and what is known about each.

An index is a folder: `index.json` says which model made it, `images.sqlite` has one row per image, and
`features-<n>.f16` holds the features, L2-normalised in half precision, one after another. Features are written before
the SQLite transaction that makes their rows visible. A process that is killed leaves bytes that no row points to, and
the next writer overwrites them. Rows of removed images stay unused until they are many; then the features move to a
file with the next number, so searches of the old one keep working. `compressed-<n>`, where there is one, finds
candidates among those features; images added since are always compared.
"""

import json
import logging
import os
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ..data.listing import COLUMNS, ListedImage, normalized_time
from ..files import remove_leftovers, save_json, whole_file
from . import compressed

_logger = logging.getLogger(__name__)

ABOUT, IMAGES, LOCK = 'index.json', 'images.sqlite', '.lock'
FORMAT = 1  # raise it when older versions could not read an index
PATIENCE = 10.0  # seconds to wait for another writer
MOST_UNCOMPRESSED = 0.1  # share of images added since from which features are compressed again
MOST_UNUSED = 0.5  # share of unused rows from which the features are moved together

_FEATURES, _COMPRESSED = 'features-{}.f16', 'compressed-{}'  # their generation
_SCHEMA = """
CREATE TABLE images (
    row INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, camera NUMERIC, time TEXT COLLATE moment, identity TEXT,
    size INTEGER NOT NULL, mtime INTEGER NOT NULL
);
CREATE INDEX identities ON images (identity);
CREATE TABLE state (next_row INTEGER NOT NULL, generation INTEGER NOT NULL, pending INTEGER NOT NULL);
INSERT INTO state VALUES (0, 0, 0);
"""
# A path or a name may have bytes that are not UTF-8. SQLite keeps any bytes, but only from bytes.
_INSERT = 'INSERT OR REPLACE INTO images VALUES (?, CAST(? AS TEXT), ?, ?, CAST(? AS TEXT), ?, ?)'
# What an expression may call: functions that only compute.
_FUNCTIONS = frozenset(
    'abs coalesce count date datetime glob ifnull iif instr julianday length like lower ltrim max min nullif replace '
    'round rtrim strftime substr substring time trim typeof upper'.split()
)
_MANY = 500  # values in one SQL statement; SQLite has a limit


@dataclass(frozen=True)
class About:
    """Which model made an index, and how; the content of `index.json`.

    Attributes:
        model: Name or folder of the model; None if it was given in memory.
        weights: Fingerprint of its weights, see `weights_fingerprint`.
        architecture: Name of its architecture.
        modality: Modality of the images.
        size: Height and width that images are resized to.
        features: `after-bn` or `before-bn`.
        dimensions: Length D of a feature vector.
        mean: Subtracted from the channels of every image, whose values are from 0 to 1.
        std: What the channels are divided by then.
        folders_are_identities: Whether the name of an image's folder is its identity, see `list_images`.
        compress: Whether compressed features find candidates, see `compressed`.
        calibration: What turns similarities into probabilities, as the model has it; None if it has none.
        format: Version of the index format.
    """

    model: str | None
    weights: str
    architecture: str
    modality: str
    size: tuple[int, int]
    features: str
    dimensions: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folders_are_identities: bool = False
    compress: bool = False
    calibration: dict[str, Any] | None = None
    format: int = FORMAT

    @classmethod
    def load(cls, folder: Path) -> 'About':
        """Read it from an index.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: It is damaged, or of a newer version.
        """
        path = folder / ABOUT
        if not path.is_file():
            raise FileNotFoundError(
                f'there is no index in {folder}; make one with: vireid index GALLERY --modality visible --model NAME '
                f'--output {folder}'
            )
        try:
            values = json.loads(path.read_text(encoding='utf-8'))
            if values['format'] > FORMAT:
                raise ValueError(f'format {values["format"]} is of a newer version of vireid_timm')
            known = {field.name for field in fields(cls)}
            lists = {name: tuple(values[name]) for name in ('size', 'mean', 'std')}
            return cls(**{name: value for name, value in values.items() if name in known} | lists)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is damaged or not of this library ({error}); remove {folder}') from error

    def save(self, folder: Path) -> None:
        """Write it to an index, whole or not at all."""
        save_json(folder / ABOUT, asdict(self))

    def difference(self, other: 'About') -> str:
        """Return in words where features of another model or setting do not fit to those of this index, or ''."""
        names = ('weights', 'architecture', 'modality', 'size', 'features', 'dimensions', 'mean', 'std')
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        return ', '.join(f'{name} {getattr(self, name)}, not {getattr(other, name)}' for name in differing)


class View(NamedTuple):
    """What is in an index at one moment.

    Attributes:
        features: [N, D] float16, mapped from the file; some rows may be unused.
        rows: The rows of the images, ascending, [R] int64.
        generation: Number of the file; rows of another one are others.
    """

    features: np.ndarray
    rows: np.ndarray
    generation: int


class Changed(Exception):
    """An index has changed since a view of it was taken; take another."""


class Index:
    """An index on disk. Threads may share it; other processes see what has been committed.

    The first change locks the index for other writers, until `commit` or `close`.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """Open an index.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: It is damaged.
        """
        self.folder = Path(folder)
        self.about = About.load(self.folder)
        self._guard = threading.RLock()
        self._file_lock = _lock(self.folder)
        self._is_held = False
        self._candidates: tuple[int, compressed.Compressed] | None = None
        self._seen: tuple[tuple[int, int], View] | None = None
        self._wrong_times: set[str] = set()
        self._database = self._connect()

    @classmethod
    def create(cls, folder: str | os.PathLike, about: About) -> 'Index':
        """Make an empty index. The folder may exist, if nothing else is in it.

        Raises:
            FileExistsError: The folder holds an index already.
            ValueError: It holds other files, or another process is making an index there.
            OSError: It cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(_lock(folder), folder):
            if (folder / ABOUT).exists():
                raise FileExistsError(f'{folder} already holds an index')
            own = {IMAGES, f'{IMAGES}-journal', LOCK, _FEATURES.format(0)}
            others = sorted(path.name for path in folder.iterdir() if path.name not in own and path.name[0] != '.')
            if others:
                raise ValueError(f'{folder} holds other files ({", ".join(others[:3])}); give a folder for the index')
            for name in own - {LOCK}:  # left by a process that was killed
                (folder / name).unlink(missing_ok=True)
            (folder / _FEATURES.format(0)).touch()
            with _database_errors(folder), closing(sqlite3.connect(folder / IMAGES)) as database:
                _prepare(database, _compare_times)
                database.executescript(_SCHEMA)
            about.save(folder)  # last: now it is an index
        return cls(folder)

    def __len__(self) -> int:
        return self._query('SELECT count(*) FROM images')[0][0]

    @property
    def pending(self) -> int:
        """Number of images that an interrupted or running update still has to add."""
        return self._query('SELECT pending FROM state')[0][0]

    def close(self) -> None:
        """Discard what was not committed, and let other writers in."""
        with self._guard, suppress(sqlite3.ProgrammingError):  # closed already
            self._discard()
            self._database.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            self.close()

    def hold(self) -> None:
        """Keep other writers out until `close`, also between commits.

        Raises:
            ValueError: Another process is writing the index.
        """
        with self._guard:
            self._begin()
            self._is_held = True

    def describe(self, about: About) -> None:
        """Note a new place or calibration of the same model; call `hold` first."""
        if about != self.about:
            about.save(self.folder)
            self.about = about

    def append(self, images: Sequence[ListedImage], features: np.ndarray) -> None:
        """Add images with their features [N, D]; an image whose path is there replaces the old one."""
        with self._guard:
            self._begin()
            next_row, generation, _ = self._state()
            data = np.ascontiguousarray(features, dtype=np.float16)
            assert data.shape == (len(images), self.about.dimensions), f'{data.shape} features of {len(images)} images'
            with open(self.folder / _FEATURES.format(generation), 'r+b') as file:
                file.seek(next_row * data.shape[1] * data.itemsize)
                file.write(data.tobytes())
            rows = (
                (next_row + number, _bytes(image.path), image.camera, image.time, _bytes(image.identity), *image[4:])
                for number, image in enumerate(images)
            )
            self._change(_INSERT, rows)
            self._query('UPDATE state SET next_row = ?', next_row + len(images))

    def compress(self) -> None:
        """Compress the features for candidates, unless that is done but for a few; call `hold` and `commit` first."""
        next_row, generation, _ = self._state()
        folder = self.folder / _COMPRESSED.format(generation)
        covered = compressed.open(folder).count if folder.exists() else 0
        if next_row and covered < (1 - MOST_UNCOMPRESSED) * next_row:
            _logger.info(f'Compressing the features of {len(self):,} images')
            compressed.build(self.view().features, folder)

    def decompress(self) -> None:
        """Remove the compressed features; call `hold` first."""
        for folder in self.folder.glob(_COMPRESSED.format('*')):
            shutil.rmtree(folder, ignore_errors=True)

    def candidates(self, view: View) -> compressed.Compressed | None:
        """Return what finds candidates among the rows of a view, or among as many as it covers; None if nothing does.

        Raises:
            ValueError: FAISS is not installed.
        """
        folder = self.folder / _COMPRESSED.format(view.generation)
        with self._guard, suppress(FileNotFoundError):
            number = folder.stat().st_ino  # another one when they were compressed again
            if self._candidates is None or self._candidates[0] != number:
                self._candidates = (number, compressed.open(folder))
            return self._candidates[1]
        return None

    def remove(self, paths: Iterable[str]) -> int:
        """Remove images by their paths; return how many of them there were."""
        with self._guard:
            self._begin()
            return self._change('DELETE FROM images WHERE path = CAST(? AS TEXT)', ((_bytes(path),) for path in paths))

    def expect(self, count: int) -> None:
        """Note how many images an update still has to add."""
        with self._guard:
            self._begin()
            self._query('UPDATE state SET pending = ?', count)

    def commit(self) -> None:
        """Make all changes durable and visible to other processes, at once.

        Raises:
            OSError: They cannot be written; nothing has changed then.
        """
        with self._guard:
            if not self._is_writing():
                return
            try:
                self._move_together()
                with open(self._features_file(), 'r+b') as file:
                    os.fsync(file.fileno())
                self._query('COMMIT')
            except BaseException:
                self._discard()
                raise
            self._remove_all_but(self._state()[1])
            if not self._is_held:
                self._file_lock.release()

    def difference(self, listed: Sequence[ListedImage]) -> tuple[list[ListedImage], dict[str, int]]:
        """Drop what is not listed, correct cameras, times and identities, and return what has to be added.

        Returns:
            Listed images that are new, then those whose files have changed; and counts: `new`, `changed`, `relabelled`,
            `dropped`, `unchanged`.

        Raises:
            ValueError: None of the images in the index is listed: it is probably of another gallery.
        """
        with self._guard:
            self._begin()
            self._query('CREATE TEMP TABLE listed (path TEXT PRIMARY KEY, camera NUMERIC, time, identity, size, mtime)')
            try:
                insert = 'INSERT INTO listed VALUES (CAST(? AS TEXT), ?, ?, CAST(? AS TEXT), ?, ?)'
                rows = ((_bytes(one.path), one.camera, one.time, _bytes(one.identity), *one[4:]) for one in listed)
                self._change(insert, rows)
                return self._difference(len(listed))
            finally:
                self._query('DROP TABLE listed')

    def _difference(self, total: int) -> tuple[list[ListedImage], dict[str, int]]:
        present = 'FROM images JOIN listed USING (path) WHERE '
        same = 'images.size = listed.size AND images.mtime = listed.mtime'
        before = len(self)
        kept = self._query(f'SELECT count(*) {present} 1')[0][0]
        if before and not kept:
            raise ValueError(
                f'none of the {before:,} images in {self.folder} is in the gallery given; remove {self.folder}, or '
                'give another --output'
            )
        self._query('DELETE FROM images WHERE path NOT IN (SELECT path FROM listed)')
        unequal = ' OR '.join(f'images.{name} IS NOT listed.{name}' for name in COLUMNS[1:])
        labels = ', '.join(COLUMNS[1:])
        relabelled = self._query(f'SELECT count(*) {present} {same} AND ({unequal})')[0][0]
        self._query(
            f'UPDATE images SET ({labels}) = (SELECT {labels} FROM listed WHERE listed.path = images.path)'
            f' WHERE path IN (SELECT path {present} {unequal})'
        )
        todo = self._query(
            'SELECT path, listed.camera, listed.time, listed.identity, listed.size, listed.mtime FROM listed'
            f' LEFT JOIN images USING (path) WHERE images.row IS NULL OR NOT ({same})'
            ' ORDER BY images.row IS NOT NULL, listed.rowid'
        )
        changed = kept - self._query(f'SELECT count(*) {present} {same}')[0][0]
        counts = {'new': total - kept, 'changed': changed, 'relabelled': relabelled}
        counts |= {'dropped': before - kept, 'unchanged': kept - changed - relabelled}
        return [ListedImage(*values) for values in todo], counts

    def view(self, where: str | None = None) -> View:
        """Return what is in the index now, or what an SQL expression over path, camera, time and identity selects.

        Raises:
            ValueError: The expression is wrong or asks for more than those columns; or the index is damaged.
        """
        with self._guard, self._reading():
            moment = (self._query('PRAGMA data_version')[0][0], self._database.total_changes)
            if self._seen is None or self._seen[0] != moment:
                self._seen = (moment, self._current_view())
            view = self._seen[1]
            if where is None:
                return view
            rows = [row for (row,) in self._selected('row', where)]
            return view._replace(rows=np.array(sorted(rows), np.int64))

    def images(self, view: View, rows: np.ndarray) -> dict[int, tuple]:
        """Return path, camera, time and identity of some rows of a view.

        Raises:
            Changed: One of them is no longer there.
        """
        wanted = sorted(set(rows.ravel().tolist()))
        found = {}
        with self._guard, self._reading():
            if self._state()[1] != view.generation:
                raise Changed
            for start in range(0, len(wanted), _MANY):
                part = wanted[start : start + _MANY]
                statement = f'SELECT row, {", ".join(COLUMNS)} FROM images WHERE row IN ({", ".join("?" * len(part))})'
                found |= {row: tuple(values) for row, *values in self._query(statement, *part)}
        if len(found) < len(wanted):
            raise Changed
        return found

    def rows_like(self, images: Sequence[tuple]) -> np.ndarray:
        """Return the rows of all images of the same identities, and of the given images [path, ..., identity]."""
        rows: set[int] = set()
        for column, place in (('path', 0), ('identity', 3)):
            values = sorted({_bytes(image[place]) for image in images if image[place] is not None})
            for start in range(0, len(values), _MANY):
                part = values[start : start + _MANY]
                marks = ', '.join(['CAST(? AS TEXT)'] * len(part))
                rows.update(row for (row,) in self._query(f'SELECT row FROM images WHERE {column} IN ({marks})', *part))
        return np.array(sorted(rows), np.int64)

    def images_per_person(self, where: str | None = None) -> float | None:
        """Return the mean number of images of an identity; None if there is none, or an image without identity."""
        columns = 'count(*), count(identity), count(DISTINCT identity)'
        with self._guard:
            statement = f'SELECT {columns} FROM images'
            ((images, known, people),) = self._query(statement) if where is None else self._selected(columns, where)
        return images / people if images and known == images else None

    def unknown(self, column: str) -> int:
        """Return how many images have no camera, time or identity."""
        return self._query(f'SELECT count(*) FROM images WHERE {column} IS NULL')[0][0]

    def _current_view(self) -> View:
        next_row, generation, _ = self._state()
        path, width = self.folder / _FEATURES.format(generation), self.about.dimensions
        needed, found = 2 * next_row * width, path.stat().st_size if path.exists() else 0
        if found < needed:
            raise ValueError(f'{path} has {found:,} of {needed:,} bytes; the index is damaged: remove {self.folder}')
        # Copy on write, since torch warns about memory that cannot be written to.
        features = np.memmap(path, np.float16, 'c', shape=(next_row, width)) if next_row else np.empty((0, width), 'f2')
        count = len(self)
        if count == next_row:
            return View(features, np.arange(count), generation)
        rows = self._execute('SELECT row FROM images ORDER BY row')
        return View(features, np.fromiter((row for (row,) in rows), np.int64, count), generation)

    def _selected(self, columns: str, where: str) -> list[tuple]:
        """Return some columns of the images that an expression selects."""
        used: Counter[str] = Counter()

        def allow(action: int, first: str | None, second: str | None, *_: object) -> int:
            is_ours = action == sqlite3.SQLITE_SELECT or (action, first) == (sqlite3.SQLITE_READ, 'images')
            is_function = action == sqlite3.SQLITE_FUNCTION and (second or '').lower() in _FUNCTIONS
            name = 'SELECT' if action == sqlite3.SQLITE_SELECT else second
            used[name] += 1
            # One SELECT, which reads `row` once, and both are ours: no union, no sub-query.
            is_once = name not in ('SELECT', 'row') or used[name] == 1
            is_column = action != sqlite3.SQLITE_READ or name in (*COLUMNS, 'row', '')  # '' where it reads none
            return sqlite3.SQLITE_OK if (is_ours or is_function) and is_column and is_once else sqlite3.SQLITE_DENY

        self._wrong_times.clear()
        self._database.set_authorizer(allow)
        try:
            # On lines of its own: a comment at its end must not hide ours.
            found = self._database.execute(f'SELECT {columns} FROM images WHERE (\n{where}\n)').fetchall()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ValueError(
                f'cannot search where {where!r} ({error}); expected an SQL expression over {", ".join(COLUMNS)}, such '
                "as: camera != 3 and time > '2026-11-01T22:00'"
            ) from error
        finally:
            self._database.set_authorizer(_allow_all)
        if self._wrong_times:
            raise ValueError(
                f'cannot search where {where!r}: times are compared with {min(self._wrong_times)!r}; expected ISO '
                '8601, with an offset (or Z, for UTC) if the times of the gallery have one'
            )
        return found

    def _connect(self) -> sqlite3.Connection:
        path = self.folder / IMAGES
        if not path.is_file():
            raise ValueError(f'{path} is missing; the index is damaged: remove {self.folder}')
        address = f'{path.absolute().as_uri()}?mode=rw'
        with _database_errors(self.folder), ExitStack() as opened:
            database = sqlite3.connect(address, timeout=60, isolation_level=None, check_same_thread=False, uri=True)
            opened.callback(database.close)
            _prepare(database, self._compare)
            database.execute('SELECT * FROM state').fetchone()
            opened.pop_all()
            return database

    def _compare(self, first: str, second: str) -> int:
        for text in (first, second):
            if _moment(text) is None:
                self._wrong_times.add(text)
        has_offset = [(_moment(text) or '').endswith('Z') for text in (first, second)]
        if has_offset[0] != has_offset[1]:
            self._wrong_times.add(second if _moment(first) == first else first)
        return _compare_times(first, second)

    def _begin(self) -> None:
        """Begin a transaction, unless one is open; the first one locks the index."""
        if self._is_writing():
            return
        if not self._file_lock.is_locked:
            _acquire(self._file_lock, self.folder)
            remove_leftovers(self.folder, alone=True)
        self._query('BEGIN IMMEDIATE')
        self._remove_all_but(self._state()[1])

    def _is_writing(self) -> bool:
        with _database_errors(self.folder):
            return self._database.in_transaction

    def _remove_all_but(self, generation: int) -> None:
        """Remove features of other generations, which nobody but a search that began earlier reads."""
        for pattern in (_FEATURES, _COMPRESSED):
            for path in self.folder.glob(pattern.format('*')):
                if path.name != pattern.format(generation):
                    with suppress(OSError):  # Windows keeps files that somebody reads; the next writer removes them
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _discard(self) -> None:
        if self._database.in_transaction:
            with suppress(sqlite3.Error):
                self._database.execute('ROLLBACK')
            self._seen = None
        self._is_held = False
        self._file_lock.release(force=True)

    def _move_together(self) -> None:
        """Write the used features to the file of the next generation if too many are unused."""
        next_row, generation, _ = self._state()
        view = self.view()
        if len(view.rows) >= (1 - MOST_UNUSED) * next_row:
            return
        with whole_file(self.folder / _FEATURES.format(generation + 1)) as temporary, open(temporary, 'wb') as file:
            for start in range(0, len(view.rows), _MANY):
                file.write(view.features[view.rows[start : start + _MANY]].tobytes())
        numbers = ((number, row) for number, row in enumerate(view.rows.tolist()))
        self._change('UPDATE images SET row = ? WHERE row = ?', numbers)  # downwards, so each is free by then
        self._query('UPDATE state SET next_row = ?, generation = ?', len(view.rows), generation + 1)

    def _features_file(self) -> Path:
        return self.folder / _FEATURES.format(self._state()[1])

    def _state(self) -> tuple[int, int, int]:
        return self._query('SELECT next_row, generation, pending FROM state')[0]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Let all that is read in the block be of one moment."""
        if self._is_writing():
            yield
            return
        self._query('BEGIN')
        try:
            self._state()  # only now does SQLite keep the moment
            yield
        finally:
            self._query('COMMIT')

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        with _database_errors(self.folder):
            return self._database.execute(statement, values)

    def _query(self, statement: str, *values: object) -> list[tuple]:
        with self._guard, _database_errors(self.folder):
            return self._database.execute(statement, values).fetchall()

    def _change(self, statement: str, rows: Iterable[tuple]) -> int:
        """Run a statement for every row of values; return how many rows of the table it has changed."""
        with _database_errors(self.folder):
            return self._database.executemany(statement, rows).rowcount


def _lock(folder: Path) -> FileLock:
    # Not per thread: one thread may add images and another one save them.
    return FileLock(folder / LOCK, timeout=PATIENCE, thread_local=False, fallback_to_soft=False)


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f'another process is writing the index {folder}; wait for it') from error
    except NotImplementedError:  # a file system without locks: SQLite's own have to do
        pass


@contextmanager
def _locked(lock: FileLock, folder: Path) -> Iterator[None]:
    _acquire(lock, folder)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _database_errors(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into those of this library."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise ValueError(f'the index {folder} cannot be used ({error}); was it closed?') from error
    except sqlite3.OperationalError as error:  # locked, full, read-only
        raise OSError(f'cannot use the index {folder}: {error}') from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f'the index {folder} is damaged ({error}); remove it and index the gallery again') from error


def _prepare(database: sqlite3.Connection, compare: Any) -> None:
    database.text_factory = _text
    database.create_collation('moment', compare)
    # Otherwise a large transaction locks out readers before its end.
    database.execute('PRAGMA cache_spill = OFF')


def _allow_all(*_: object) -> int:
    return sqlite3.SQLITE_OK  # Python 3.10 cannot remove an authorizer


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode('utf-8', 'surrogateescape')


def _text(content: bytes) -> str:
    return content.decode('utf-8', 'surrogateescape')


@lru_cache(maxsize=1024)
def _moment(text: str) -> str | None:
    """Return a time in its one form, or None if it is none."""
    try:
        return normalized_time(text)
    except ValueError:
        return None


def _compare_times(first: str, second: str) -> int:
    first, second = ((_moment(text) or text).rstrip('Z') for text in (first, second))
    return (first > second) - (first < second)
