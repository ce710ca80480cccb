"""Ctrl-C and SIGTERM: finish the step, save, stop."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..distributed import any_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes a Ctrl-C on to processes that the terminal has told already: this soon it is no second one.
_SAME_STOP = 1.0  # seconds


class Stopped(KeyboardInterrupt):
    """Training was told to stop and did so.

    Attributes:
        signal: The signal's number.
        status: The exit status that says so by the shells' convention, 130 after Ctrl-C and 143 after SIGTERM.
    """

    def __init__(self, number: int, outcome: str = '') -> None:
        """Say what became of the run.

        Args:
            number: Of the signal.
            outcome: What was saved, and how to go on.
        """
        self.signal = number
        self.status = 128 + number
        by = 'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f'stopped by {by}{": " + outcome if outcome else ""}')


class StopRequest:
    """What the signals have asked for so far.

    Attributes:
        signal: The first signal's number; None as long as there was none.
        at_once: Whether a signal raises `Stopped` where it finds the program, because there is nothing to save;
            otherwise it waits to be looked at.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = True
        self._since = 0.0

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """What a signal does; a second one stops at once whatever is being done."""
        again = self.signal is not None and time.monotonic() - self._since > _SAME_STOP
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        if self.at_once or again:
            raise Stopped(self.signal)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait within the block. One that has waited, in any process, stops all of them at its end."""
        self.at_once = False
        yield
        self.check()
        self.at_once = True
        if self.signal is not None:  # since the check
            raise Stopped(self.signal)

    def check(self) -> None:
        """Stop if any process was told to; all of them have to ask.

        Raises:
            Stopped: In every process.
        """
        if any_process(self.signal is not None):
            stopped = Stopped(self.signal or signal.SIGTERM)
            stopped.announced = True
            raise stopped


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Take Ctrl-C and SIGTERM as requests as long as the block runs; outside the main thread they are left alone."""
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
