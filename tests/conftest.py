"""Before anything imports the Hub client or this package: no network, and no file outside a scratch folder."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_server import HubServer

if 'PYTEST_XDIST_WORKER' in os.environ:  # two processes on two cores: threads would only wait for each other
    os.environ.setdefault('OMP_NUM_THREADS', '1')
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


@pytest.fixture(scope='session')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as a Hub-ready folder, to be left as it is."""
    import timm
    import torch

    from vireid_timm.hub.folder import save_model_folder

    folder = tmp_path_factory.mktemp('hub') / 'model'
    channels = dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 24, 32))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('vireid_dml_r10t', img_size=(64, 32), num_classes=5, resnet_args=channels)
    save_model_folder(model, folder, input_size=(3, 64, 32), facts={'dataset': 'synthetic'})
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / 'copy'))


@pytest.fixture(scope='module')
def server() -> Iterator['HubServer']:
    """A Hub where HF_ENDPOINT points."""
    from hub_server import HubServer

    with HubServer(_port) as server:
        yield server


def _close_connections() -> None:
    """The client keeps its connections, and up to 0.x with them whether it is offline; the name changed with 1.0."""
    from huggingface_hub import utils

    (utils.close_session if hasattr(utils, 'close_session') else utils.reset_sessions)()


@pytest.fixture
def hub(server: 'HubServer', tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator['HubServer']:
    """An empty Hub, which this process's client takes for the real one and of which it has nothing in its cache."""
    from hub_server import WRITER
    from huggingface_hub import constants

    server.reset()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_TOKEN', WRITER)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    # The client waits a second before it tries again, then two, then four.
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    _close_connections()
    yield server
    _close_connections()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Names that are not UTF-8 are in some logs, and cannot be sent from one test process to another."""
    report = yield
    report.sections = [(name, text.encode('utf-8', 'backslashreplace').decode()) for name, text in report.sections]
    return report
