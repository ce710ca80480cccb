"""List folders and read text files for the readers, with errors that show the expected layout.

What is ignored on the way is counted and named, see `Scan`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from ..text import format_list
from .findings import Findings
from .images import image_suffixes

LAYOUTS = {
    'sysu_mm01': """
  cam1/ ... cam6/<identity, 4 digits>/<image>.jpg     (visible: 1, 2, 4, 5; infrared: 3, 6)
  exp/train_id.txt  exp/val_id.txt  exp/test_id.txt     (one line of comma-separated numbers each)""",
    'regdb': """
  Visible/<identity>/<image>.bmp
  Thermal/<identity>/<image>.bmp
  idx/{train,test}_{visible,thermal}_<trial>.txt        (a line per image: path, space, label)""",
    'llcm': """
  vis/<identity>/<image>.jpg  nir/<identity>/<image>.jpg                       (training)
  test_vis/cam<n>/<identity>/<image>.jpg  test_nir/cam<n>/<identity>/<image>.jpg
  idx/train_vis.txt  idx/train_nir.txt                  (a line per image: path, space, label)
  idx/test_id.txt                                       (one line of comma-separated numbers)""",
    'folder': """
  train/visible/<person>/<image>  train/infrared/<person>/<image>
  query/<modality>/<person>/<image>  gallery/<modality>/<person>/<image>       (both or neither)
(with names=market no folder of a person, but images such as 0001_c1s1_000151_01.jpg)""",
    'hitsz_vcm': """
  Train/<identity, 4 digits>/{rgb,ir}/D<camera>/<image>.jpg  Test/...     (or all identities directly in the folder)
  info/train_name.txt  info/test_name.txt   (a line per image, such as 0001M1D2T3F4.jpg: identity, modality 1 infrared
                                            or 2 visible, camera, tracklet, file name)
  info/track_train_info.txt  info/track_test_info.txt   (a line per tracklet: modality, first and last line of its
                                            images in the list of names, identity, camera)
  info/query_IDX.txt                        (lines of track_test_info.txt that are queries: the infrared ones)""",
    'buptcampus': """
  DATA/<identity>/{RGB,IR}/<camera>/<image>.jpg
  data_paths.json                     (identity, then modality, camera, tracklet: its images, as paths in DATA)
  train.txt  query.txt  gallery.txt   (a line per tracklet: identity, RGB, IR or RGB/IR for both, camera, tracklet)""",
    'csv': """
  path,identity,camera,modality,split
  images/a.jpg,anna,3,visible,train
(path: relative to the file's folder; camera: optional; split: train, query, gallery, or test for both)""",
}

CAMERA_DIGITS = 18  # what fits into 64 bits
_LITTER = ('thumbs.db', 'desktop.ini')  # Windows leaves them in every folder of images


def read_text(file_name: str) -> str:
    """Return the text of a file, without a byte order mark."""
    with open(file_name, 'rb') as file:
        content = file.read()
    try:
        text, wrong = content.decode('utf-8-sig'), content.find(b'\0')  # UTF-16 without a mark has zeros
    except UnicodeDecodeError as error:
        text, wrong = '', error.start
    if wrong >= 0:
        line = content.count(b'\n', 0, wrong) + 1
        raise ValueError(f'{file_name}, line {line}: this is not UTF-8 text; save the file as UTF-8')
    return text


def check_lines(file_name: str, wrong: Sequence[str], hint: str = '') -> None:
    """Raise an error that names the first wrong lines (`line 3: ...`) and counts them all, if there are any."""
    if wrong:
        where = f'{file_name}, ' if len(wrong) == 1 else f'{file_name} has {len(wrong):,} wrong lines: '
        missing = all(': there is no file ' in line for line in wrong)
        raise (FileNotFoundError if missing else ValueError)(where + format_list(wrong, separator='; ') + hint)


def camera_number(digits: str, where: str) -> int:
    """Return the number of a camera; `where` names the file if it has too many digits."""
    if len(digits) > CAMERA_DIGITS:
        raise ValueError(f'{where}: the camera number {digits} has more than {CAMERA_DIGITS} digits; rename it')
    return int(digits)


def required(name: str, root: str, inner: str) -> str:
    """Return the path of a file or folder that a dataset must have; without it, the error shows the layout."""
    path = os.path.join(root, *inner.split('/'))
    if not os.path.exists(path):
        raise FileNotFoundError(f'there is no {path}; dataset {name!r} expects in {root}:{LAYOUTS[name]}')
    return path


class Scan:
    """Lists folders and images. At the end of its `with` block it reports what it ignored, also after an error.

    Hidden files and folders are ignored silently.
    """

    def __init__(self) -> None:
        self.findings = Findings()
        self._suffixes = image_suffixes()
        self._noted: dict[tuple[str, str], list[str]] = {}
        self._unread: list[str] = []

    def __enter__(self) -> 'Scan':
        return self

    def __exit__(self, *error: object) -> None:
        for (kind, what), names in self._noted.items():
            self.findings.add(kind, what, names)
        counts = Counter(os.path.splitext(path)[1].lower() or 'none' for path in self._unread)
        listed = ', '.join(f'{suffix}: {count:,}' for suffix, count in counts.most_common())
        heic = '; to read .heic, run `pip install pillow-heif`' if counts.keys() & {'.heic', '.heif'} else ''
        what = f'files are ignored for their suffix ({listed}; read are {" ".join(self._suffixes)}{heic})'
        self.findings.add('unread-suffix', what, sorted(self._unread))

    def note(self, kind: str, what: str, name: str) -> None:
        """Add a name to a finding."""
        self._noted.setdefault((kind, what), []).append(name)

    def folders(self, folder: str, expected: re.Pattern | None = None, description: str = '') -> list[str]:
        """Return the names of the sub-folders, sorted.

        Args:
            folder: The folder.
            expected: Names to return; None for all.
            description: The same for people.
        """
        names = []
        for entry in visible_entries(folder):
            if entry.is_dir():
                names.append(entry.name)
            elif entry.name.lower().endswith(self._suffixes):
                self.note('stray-image', 'images are not in the folder of a person and are ignored', entry.path)
        for name in names if expected else ():
            if not expected.fullmatch(name):
                what = f'folders are ignored because they are not named {description}'
                self.note('unknown-folder', what, os.path.join(folder, name))
        return [name for name in names if expected is None or expected.fullmatch(name)]

    def tree(self, folder: str, within: tuple[str, ...] = ()) -> Iterator[os.DirEntry]:
        """Yield the images in a folder and in all folders below it, by name.

        Args:
            folder: The folder.
            within: Real paths of the folders that it was reached through: links may form a circle.
        """
        within = (*within, os.path.realpath(folder))
        for entry in visible_entries(folder):
            if not entry.is_dir():
                if entry.name.lower().endswith(self._suffixes) and (entry.is_file() or entry.is_symlink()):
                    yield entry
                else:
                    self._unread.append(entry.path)
            elif os.path.realpath(entry.path) in within:
                self.note('circular-link', 'links lead back to a folder above them and are not followed', entry.path)
            elif not os.access(entry.path, os.R_OK | os.X_OK):
                self.note('closed-folder', 'folders cannot be read and are left out', entry.path)
            else:
                yield from self.tree(entry.path, within)

    def images(self, folder: str) -> list[str]:
        """Return the names of a person's images, sorted. A dangling link counts: reading it names the file."""
        names = []
        for entry in visible_entries(folder):
            if entry.is_dir():
                self.note('nested-folder', 'folders inside the folder of a person are ignored', entry.path)
            elif entry.name.lower().endswith(self._suffixes) and (entry.is_file() or entry.is_symlink()):
                names.append(entry.name)
            else:
                self._unread.append(entry.path)
        if not names:
            self.note('empty-folder', 'folders have no image', folder)
        return names


def visible_entries(folder: str) -> list[os.DirEntry]:
    """Return what is in a folder, by name, without hidden files and the system's own."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith('.') and entry.name.lower() not in _LITTER]
    return sorted(shown, key=lambda entry: entry.name)
