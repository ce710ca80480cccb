"""The `vireid` command: finds the module of a command, runs it, and turns errors into one line."""

import argparse
import importlib
import io
import logging
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import TextIO

from .startup import interrupt_ends_command

with interrupt_ends_command():
    import torch

    from ..device import keep_memory
    from ..distributed import is_local_rank_zero, is_lost_rank, is_rank_zero, is_reported_here
    from ..training.interrupt import Stopped
    from ..version import __version__
    from .parser import Parser

# Each is a module of this package, which is imported when its command is called.
COMMANDS = {
    'data': 'check images before you use them',
    'train': 'train or fine-tune a model',
    'eval': 'evaluate a model, or compare two reports',
    'index': 'index a gallery of images',
    'search': 'search an index',
    'explain': 'show what a model looks at',
    'plot': 'draw curves of runs, CMC of reports, and features',
    'calibrate': 'learn what similarities mean as probabilities',
    'hub': 'save, push, check and convert models',
    'export': 'write a model as ONNX files or torch programs',
    'synth': 'write rendered images to disk',
    'demo': 'see it work in two minutes',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `vireid`; None takes it from `sys.argv`.

    Returns:
        Exit status: 0, 1 after an error, 130 after Ctrl-C, 141 if the reader of the output is gone, 143 after SIGTERM
        during training.
    """
    try:
        with _output():
            args = _parse(list(sys.argv[1:] if arguments is None else arguments))
            keep_memory()
            with _log_on_stderr():
                args.run(args)
    except BrokenPipeError:  # as of `| head -1`, which has what it wants
        return 141
    except Stopped as stopped:
        if is_reported_here(stopped):
            print(f'vireid: {stopped}', file=sys.stderr)
        return stopped.status
    except (KeyboardInterrupt, Exception) as error:
        if _is_interrupt(error):
            if is_reported_here(error):
                print('vireid: stopped', file=sys.stderr)
            return 130
        if is_lost_rank(error):
            if is_rank_zero():
                print('vireid: error: another rank is gone; its own message says why', file=sys.stderr)
        elif is_reported_here(error):
            print(f'vireid: error: {_described(error)}', file=sys.stderr)
        return 1
    return 0


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is behind an error: a library interrupted half imported raises one of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _described(error: Exception) -> str:
    """Return the message of a user's mistake; of anything else the type, and the file that holds the traceback."""
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return ' '.join(f'there is too little memory; compute fewer images at once. {error}'.split())
    try:
        with tempfile.NamedTemporaryFile(prefix='vireid-', suffix='.txt', delete=False) as file:
            file.write(''.join(traceback.format_exception(error)).encode('utf-8', 'backslashreplace'))
        where = f'in {file.name}'
    except OSError:  # a full disk, for example
        traceback.print_exception(error)
        where = 'above'
    what = ' '.join(f'{type(error).__name__}: {error}'.split())
    return f'{what}. This is a fault of vireid_timm. Please report it, with the traceback {where}'


@contextmanager
def _output() -> Iterator[None]:
    """Escape what the terminal cannot encode, and flush while a closed pipe can still be dealt with."""
    is_file = isinstance(sys.stdout, io.TextIOWrapper)  # a notebook has another kind
    if is_file:
        errors = sys.stdout.errors
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]:
            raise ConnectionError(f'a connection broke: {error}') from error
        raise
    finally:
        if is_file:
            sys.stdout.reconfigure(errors=errors)


def _is_closed(stream: TextIO) -> bool:
    """Return whether nobody reads a stream any more; what is still written to it is dropped then."""
    try:
        number, poll = stream.fileno(), select.poll()
    except (AttributeError, OSError):  # Windows, or not a file
        return False
    poll.register(number, 0)  # for errors only
    if poll.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # Python flushes once more at exit
        return True
    return False


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
    # Every rank finds the same mistake.
    with nullcontext() if is_local_rank_zero() else redirect_stderr(io.StringIO()):
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
