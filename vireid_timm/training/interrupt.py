"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..distributed import any_rank, known_to_all

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun forwards a Ctrl-C that the terminal has sent to every rank already: a signal this soon is the same request.
_SAME_REQUEST = 1.0  # seconds


class Stopped(KeyboardInterrupt):
    """Training stopped because a signal asked for it.

    Attributes:
        signal: The signal's number.
        status: The shell's exit status for it: 130 after Ctrl-C, 143 after SIGTERM.
        outcome: What was saved, and how to resume.
    """

    def __init__(self, number: int, outcome: str = '') -> None:
        super().__init__()
        self.signal = number
        self.status = 128 + number
        self.outcome = outcome

    def __str__(self) -> str:
        by = 'Ctrl-C' if self.signal == signal.SIGINT else signal.Signals(self.signal).name
        return f'stopped by {by}{self.outcome and ": "}{self.outcome}'


class StopRequest:
    """What signals have asked for so far.

    Attributes:
        signal: Number of the first signal; None before there was one.
        at_once: Whether a signal raises `Stopped` right away, because there is nothing to save. Otherwise `check` does.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = True
        self._since = 0.0

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal; a second one always stops at once."""
        again = self.signal is not None and time.monotonic() - self._since > _SAME_REQUEST
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        if self.at_once or again:
            raise Stopped(self.signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait for a `check`, the last one at the end of the block. Collective."""
        self.at_once = False
        yield
        self.check()
        self.at_once = True
        if self.signal is not None:  # it came after the check
            raise Stopped(self.signal)

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within `deferred`: let signals stop at once within the block, where nothing can be lost. Collective."""
        self.check()
        self.at_once = True
        if self.signal is not None:
            raise Stopped(self.signal)
        yield
        self.at_once = False

    def check(self) -> None:
        """Raise `Stopped` on every rank if a signal asked any of them to stop. Collective."""
        if any_rank(self.signal is not None):
            raise known_to_all(Stopped(self.signal or signal.SIGTERM))


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into requests within the block. Outside the main thread signals are left alone."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
