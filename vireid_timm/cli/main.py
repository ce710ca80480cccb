"""The `vireid` command: finds the module of a command, runs it, and turns errors into one line."""

import argparse
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..device import keep_memory
from ..distributed import is_lost_rank, is_rank_zero, is_reported_here
from ..training.interrupt import Stopped
from ..version import __version__
from .parser import Parser

# Each is a module of this package, which is imported when its command is called.
COMMANDS = {
    'data': 'check images before you use them',
    'train': 'train or fine-tune a model',
    'eval': 'evaluate a model, or compare two reports',
    'hub': 'save, push, check and convert models',
    'synth': 'write rendered images to disk',
    'demo': 'see it work in four minutes',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `vireid`; None takes it from `sys.argv`.

    Returns:
        Exit status: 0, 1 after an error that the user can fix, 130 after Ctrl-C, 143 after SIGTERM during training.
    """
    try:
        args = _parse(list(sys.argv[1:] if arguments is None else arguments))
        keep_memory()
        with _log_on_stderr():
            args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if is_reported_here(error):
            print(f'vireid: error: {error}', file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        if is_rank_zero():
            print('vireid: error: another rank is gone; its own message says why', file=sys.stderr)
        return 1
    except Stopped as stopped:
        if is_reported_here(stopped):
            print(f'vireid: {stopped}', file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print('vireid: stopped', file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; of the commands, only the one that is called gets its flags."""
    parser = Parser(
        prog='vireid',
        usage='%(prog)s COMMAND [flags]',
        description='Visible-infrared person re-identification.',
        epilog='`vireid COMMAND --help` describes a command.',
    )
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(required=True, prog=parser.prog, title='commands', metavar='COMMAND')
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if arguments[:1] == [name]:
            importlib.import_module(f'.{name}', __package__).add_arguments(command)
    return parser.parse_args(arguments)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show what the package logs; of several ranks, only rank 0 does."""
    logger = logging.getLogger('vireid_timm')
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(message)s'))
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO if is_rank_zero() else logging.ERROR
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level = level
