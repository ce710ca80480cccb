"""Ctrl-C and SIGTERM, sent by the kernel to this very process."""

import os
import signal
import threading
import time

import pytest

from vireid_timm.training import interrupt
from vireid_timm.training.interrupt import SIGNALS, Stopped, stop_signals


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python looks for signals between its own steps


@pytest.mark.parametrize(
    ('number', 'status', 'name'), [(signal.SIGINT, 130, 'Ctrl-C'), (signal.SIGTERM, 143, 'SIGTERM')]
)
def test_a_signal_stops_at_once_where_nothing_is_to_be_saved(number: int, status: int, name: str) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Stopped, match=f'stopped by {name}') as caught, stop_signals():
        _send(number)
    assert caught.value.status == status and isinstance(caught.value, KeyboardInterrupt)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_held_signal_is_seen_and_stops_at_the_end_of_the_block() -> None:
    seen = []
    with pytest.raises(Stopped), stop_signals() as stop:
        with stop.deferred():
            _send(signal.SIGTERM)
            seen.append(stop.signal)
        pytest.fail('the block should have ended here')
    assert seen == [signal.SIGTERM]


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(interrupt.time, 'monotonic', lambda: now)
    with stop_signals() as stop:
        with pytest.raises(Stopped), stop.deferred():
            _send(signal.SIGINT)
            now += 0.1
            _send(signal.SIGINT)  # what torchrun passes on of the same Ctrl-C
            now += 5.0
            _send(signal.SIGINT)
            pytest.fail('the second one should have ended this')


def test_other_threads_leave_the_signals_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = []

    def work() -> None:
        with stop_signals() as stop, stop.deferred():
            inside.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == before
