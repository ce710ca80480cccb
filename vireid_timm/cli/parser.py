"""The command line's argument parser, and the flags that several commands share."""

import argparse
import difflib
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from timm.utils import ParseKwargs

from ..constants import CACHES, CROPS, DATASETS, FEATURES
from ..files import expanded_path


class _HelpFormatter(argparse.HelpFormatter):
    """Break lines at spaces only, not within `--grad-accum-steps`."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """`argparse` without abbreviations; it answers a mistyped flag in one line that names the nearest one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Check the flags first: argparse would complain about missing arguments before it comes to unknown flags."""
        own = takewhile(lambda word: word.startswith('-'), args) if self._subparsers else args
        for word in takewhile(lambda word: word != '--', own):
            flag = word.partition('=')[0]
            known = self._option_string_actions
            if flag.startswith('--') and flag not in known:
                near = [name for name in known if name.startswith(flag)] or difflib.get_close_matches(flag, known)
                hint = f'did you mean {near[0]}?' if near else f'see `{self.prog} --help`'
                self.exit(2, f'{self.prog}: error: there is no flag {flag}; {hint}\n')
        return super().parse_known_args(args, namespace)


class KeyValues(ParseKwargs):
    """timm's `KEY=VALUE ...`; anything else is an error that names the flag and the value."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: list[str], *option: Any) -> None:
        """Store the values as a dict; Python literals are evaluated, and everything else is text."""
        for value in values:
            key, equals, _ = value.partition('=')
            if not equals or not all(part.isidentifier() for part in key.split('.')):
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {value!r}')
            try:
                super().__call__(parser, namespace, [value])
            except (TypeError, MemoryError, RecursionError) as error:  # a literal that cannot be, such as {[]: 1}
                raise argparse.ArgumentError(self, f'cannot read the value of {value!r}: {error}') from error
        super().__call__(parser, namespace, values)


def add_switch(group: Any, flag: str, text: str, **argument: Any) -> None:
    """Add `--flag` and `--no-flag`, with their help text exactly as given: old argparse adds a default to it."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, **argument).help = text


def add_dataset_flag(group: Any) -> None:
    """Add which reader reads the data."""
    text = f'reader: {", ".join(DATASETS)} (default: folder)'
    group.add_argument('--dataset', default='folder', metavar='NAME', help=text)


def add_data_flags(group: Any) -> None:
    """Add where the data is, and the options of its reader."""
    text = 'root folder; the file itself for csv (default: none)'
    group.add_argument('--data-dir', type=expanded_path, default='', metavar='PATH', help=text)
    text = "reader's options, e.g. trial=3 for regdb (default: none)"
    group.add_argument('--dataset-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help=text)


def add_feature_flags(group: Any) -> None:
    """Add what decides the features of an image."""
    text = 'compare features after or before the BN-neck (default: as the model returns them)'
    group.add_argument('--features', choices=FEATURES, default='auto', help=text)
    text = 'average over each image and its mirror image (default: off)'
    group.add_argument('--flip-test', action='store_true', help=text)
    text = '5: average over the image and shifts into its corners (default: 1)'
    group.add_argument('--crops', type=int, choices=CROPS, default=1, help=text)
    text = "subtract each modality's mean feature over the test images (default: off)"
    group.add_argument('--centre', action='store_true', help=text)
    text = "channels, height, width (default: the model's)"
    group.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help=text)


def check_input_size(size: Sequence[int] | None) -> None:
    """Refuse a value of --input-size that is not 3 channels, height and width.

    Raises:
        ValueError: It is something else.
    """
    if size and (size[0] != 3 or min(size) < 1):
        raise ValueError(
            f'--input-size {" ".join(map(str, size))}: expected channels, height and width in this order, and images '
            'have 3 channels, e.g. --input-size 3 288 144'
        )


def add_batch_size_flag(group: Any) -> None:
    """Add how many images are computed at once."""
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='batch size (default: 128)')


def add_device_flag(group: Any) -> None:
    """Add where to compute."""
    text = 'device; falls back to the CPU where there is no GPU (default: cuda)'
    group.add_argument('--device', default='cuda', metavar='NAME', help=text)


def add_decoding_flags(group: Any) -> None:
    """Add how test images are decoded."""
    text = 'skip unreadable images instead of stopping (default: off)'
    group.add_argument('--skip-broken', action='store_true', help=text)
    group.add_argument('--cache', choices=CACHES, default='auto', help='where to keep decoded images (default: auto)')
    text = 'images decoded at once (default: one per core, at most 8)'
    group.add_argument('--workers', type=int, metavar='N', help=text)
