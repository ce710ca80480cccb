"""List the images of a gallery, or the queries of a search: a folder of any depth, or a CSV file."""

import os
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from .findings import Findings
from .images import image_suffixes
from .readers import CAMERA_PREFIX, NO_VALUE, csv_camera, csv_path, csv_rows
from .scan import Scan, camera_number, check_lines

COLUMNS = ('path', 'camera', 'time', 'identity')
CSV_FORM = """
  path,camera,time,identity
  images/a.jpg,3,2026-11-01T22:15:00,anna
(path: relative to the file's folder; all others optional; time: ISO 8601)"""

_MOMENT = re.compile(
    r'(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?', re.IGNORECASE
)


class ListedImage(NamedTuple):
    """An image file and what is known about it.

    Attributes:
        path: The file.
        camera: Number or name of the camera, None if unknown.
        time: When it was taken, as `normalized_time` returns it, None if unknown.
        identity: Name of the person, None if unknown.
        size: Size of the file in bytes, -1 if it is gone.
        mtime: When the file was changed last, in nanoseconds.
    """

    path: str
    camera: int | str | None = None
    time: str | None = None
    identity: str | None = None
    size: int = -1
    mtime: int = -1


def list_images(source: str | os.PathLike, *, folders_are_identities: bool = False) -> list[ListedImage]:
    """List the images of a folder, sorted, or of a CSV file, in its order. What is ignored is logged and counted.

    Args:
        source: A folder, whose images may lie at any depth; the camera is the number in a `c3_` or `cam3_` prefix of
            the file name. Or a CSV file with the columns `path` and, as far as known, `camera`, `time` and `identity`.
        folders_are_identities: In a folder, take the name of an image's own folder as its identity.

    Raises:
        FileNotFoundError: There is no such folder or file, or none of the files in the CSV file.
        ValueError: There is no image, or the CSV file is wrong; the message names its lines.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        images = list(_in_folder(source, folders_are_identities))
    elif not os.path.isfile(source):
        raise FileNotFoundError(f'there is no folder or CSV file {source}')
    elif source.lower().endswith(image_suffixes()):
        raise ValueError(f'{source} is an image; expected a folder of images or a CSV file')
    elif folders_are_identities:
        raise ValueError(f'{source} is a file: identities come from its column `identity`, not from folders')
    else:
        images = _in_csv(source)
    if not images:
        raise ValueError(f'{source} has no image')
    return images


def listed_image(
    path: str | os.PathLike,
    camera: int | str | None = None,
    time: str | None = None,
    identity: str | None = None,
) -> ListedImage:
    """Return an image file with the size and the time that it has now; see `ListedImage`."""
    path = os.path.abspath(path)
    try:
        status = os.stat(path)
    except OSError:
        return ListedImage(path, camera, time, identity)
    return ListedImage(path, camera, time, identity, status.st_size, status.st_mtime_ns)


def normalized_time(text: str) -> str:
    """Return an ISO 8601 date and time in the one form that is compared and stored: `2026-11-01T22:15:00`.

    A date alone is its midnight. A time with an offset becomes UTC and ends with `Z`; fractions of a second stay.

    Raises:
        ValueError: It is something else.
    """
    parts = _MOMENT.fullmatch(text.strip())
    try:
        if parts is None:
            raise ValueError
        date, minutes, seconds, fraction, offset = parts.groups(default='')
        if offset:
            digits = offset.upper().replace('Z', '+00').replace(':', '').ljust(5, '0')
            offset = f'{digits[:3]}:{digits[3:]}'
        moment = datetime.fromisoformat(f'{date}T{minutes or "00:00"}:{seconds or "00"}{offset}')
        moment = moment.replace(microsecond=int(fraction.ljust(6, '0')[:6]))
        if moment.tzinfo is None:
            return moment.isoformat()
        return moment.astimezone(timezone.utc).replace(tzinfo=None).isoformat() + 'Z'
    except (ValueError, OverflowError):
        raise ValueError(f'{text!r} is no ISO 8601 time such as 2026-11-01T22:15:00') from None


def _in_folder(folder: str, folders_are_identities: bool) -> Iterator[ListedImage]:
    with Scan() as scan:
        for entry in scan.tree(folder):
            prefix = CAMERA_PREFIX.match(entry.name)
            camera = camera_number(prefix[1], entry.path) if prefix else None
            identity = Path(entry.path).absolute().parent.name if folders_are_identities else None
            yield listed_image(entry.path, camera, None, identity)


def _in_csv(file_name: str) -> list[ListedImage]:
    findings = Findings()
    images: dict[str, ListedImage] = {}
    line_of: dict[str, int] = {}
    wrong, repeated, columns = [], [], {}
    for number, values, problem in csv_rows(file_name, ('path',), CSV_FORM):
        if not problem:
            columns = values
            try:
                image = _from_values(file_name, values)
            except ValueError as error:
                problem = str(error)
        if problem:
            wrong.append(f'line {number}: {problem}')
            continue
        first = images.setdefault(image.path, image)
        if first is image:
            line_of[image.path] = number
        elif first == image:
            repeated.append(image.path)
        else:
            where = f'lines {line_of[image.path]} and {number}'
            wrong.append(f'{where}: {image.path} is listed twice, with different cameras, times or identities')
    check_lines(file_name, wrong)
    unknown = [name or '(no name)' for name in columns if name not in COLUMNS]
    findings.add('unknown-column', f'columns of {file_name} are ignored (read are {", ".join(COLUMNS)})', unknown)
    findings.add('repeated-line', f'lines of {file_name} repeat an image and count once', repeated)
    missing = [path for path, image in images.items() if not os.path.isfile(path)]
    if missing and len(missing) == len(images):
        raise FileNotFoundError(f'none of the {len(images):,} files in {file_name} is there, e.g. {missing[0]}')
    findings.add('missing-file', f'files in {file_name} are not there and are left out', missing)
    for path in missing:
        del images[path]
    return list(images.values())


def _from_values(file_name: str, values: dict[str, str]) -> ListedImage:
    if not values['path']:
        raise ValueError('the path is empty')
    camera = csv_camera(values.get('camera', ''))
    time, identity = (_known(values.get(name, '')) for name in ('time', 'identity'))
    return listed_image(
        csv_path(file_name, values['path']),
        camera_number(camera, values['path']) if camera.isdecimal() else camera or None,
        None if time is None else normalized_time(time),
        identity,
    )


def _known(value: str) -> str | None:
    return None if value == '' or value.lower() in (*NO_VALUE, 'nat') else value
