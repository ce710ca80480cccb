"""Block connections to other machines, from any code in the process."""

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_logger = logging.getLogger(__name__)

_OWN_ADDRESSES = {None, '', '127.0.0.1', '0.0.0.0', 'localhost', '::1'}
_allowed: set[str | None] = set()  # hosts; empty while all are


@contextmanager
def offline(host: str) -> Iterator[None]:
    """Refuse every connection from this process to another machine within the block, and log it.

    Settings switch off Gradio's telemetry and its search for updates. But no setting keeps a visitor from naming a web
    address in place of an upload, which Gradio would fetch.

    Args:
        host: An address of this machine that is listened at.
    """
    _watch_connections()
    _allowed.update(_OWN_ADDRESSES, {host})
    try:
        yield
    finally:
        _allowed.clear()


@functools.cache  # an audit hook stays until the process ends
def _watch_connections() -> None:
    sys.addaudithook(_check)


def _check(event: str, arguments: tuple) -> None:
    """Raise OSError if Python is about to look up or to connect to another machine (PEP 578)."""
    if not _allowed or event not in ('socket.getaddrinfo', 'socket.connect'):
        return
    host = arguments[0] if event == 'socket.getaddrinfo' else arguments[1]
    if event == 'socket.connect':
        if not isinstance(host, tuple):  # a file, on Unix
            return
        host = host[0]
    host = host.decode() if isinstance(host, bytes) else host
    if host not in _allowed:
        _logger.warning(f'Refused a connection to {host}')
        raise PermissionError(f'a connection to {host}, which the demo does not make')
