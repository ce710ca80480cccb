"""Before anything imports the Hub client or this package: no network, and no file outside a scratch folder."""

import os
import socket
import tempfile
from collections.abc import Iterator

import pytest

_scratch = tempfile.TemporaryDirectory(prefix='vireid-tests-')
with socket.socket() as _socket:
    _socket.bind(('127.0.0.1', 0))
    _port = _socket.getsockname()[1]
os.environ.update(
    HF_HUB_OFFLINE='1',
    # The Hub client reads this once, when it is imported. Only the tests against a loopback Hub start one there.
    HF_ENDPOINT=f'http://127.0.0.1:{_port}',
    HF_HUB_DISABLE_XET='1',
    HF_HUB_DISABLE_TELEMETRY='1',
    HF_HOME=os.path.join(_scratch.name, 'huggingface'),
    VIREID_CACHE=os.path.join(_scratch.name, 'vireid'),
    MPLBACKEND='agg',
)


def pytest_unconfigure() -> None:
    _scratch.cleanup()


@pytest.fixture(scope='module')
def one_thread() -> Iterator[None]:
    """Small maps gain nothing from threads, which wait for each other where the machine is busy."""
    import torch  # not before the settings above

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
