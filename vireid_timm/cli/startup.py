"""Ctrl-C while the `vireid` command is still importing torch and timm."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def interrupt_ends_command() -> Iterator[None]:
    """Let Ctrl-C end the `vireid` command at once and silently while the block imports; change nothing elsewhere.

    Catching `KeyboardInterrupt` is not enough: a library that it interrupts half imported raises errors of its own.
    """
    # Python sets argv[0] to -m while it imports the package of `python -m vireid_timm`, and then to its __main__.py.
    is_command = Path(sys.argv[0]).stem in ('vireid', '-m', '__main__')
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_command or not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
