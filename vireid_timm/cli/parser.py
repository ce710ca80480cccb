"""The command line's argument parser, and the flags that several commands share."""

import argparse
import difflib
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from timm.utils import ParseKwargs

from ..constants import CACHES
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
            if not key.isidentifier() or not equals:
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {value!r}')
            try:
                super().__call__(parser, namespace, [value])
            except (TypeError, MemoryError, RecursionError) as error:  # a literal that cannot be, such as {[]: 1}
                raise argparse.ArgumentError(self, f'cannot read the value of {value!r}: {error}') from error
        super().__call__(parser, namespace, values)


def add_switch(group: Any, flag: str, text: str, **argument: Any) -> None:
    """Add `--flag` and `--no-flag`, with their help text exactly as given: old argparse adds a default to it."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, **argument).help = text


def add_data_flags(group: Any) -> None:
    """Add where the data is, and the options of its reader."""
    text = 'root folder; the file itself for csv (default: none)'
    group.add_argument('--data-dir', type=expanded_path, default='', metavar='PATH', help=text)
    text = "reader's options, e.g. trial=3 for regdb (default: none)"
    group.add_argument('--dataset-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help=text)


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
