"""Before anything imports the Hub client or this package: no network, and no file outside a scratch folder."""

import os
import tempfile

_scratch = tempfile.TemporaryDirectory(prefix='vireid-tests-')
os.environ.update(
    HF_HUB_OFFLINE='1',
    HF_HOME=os.path.join(_scratch.name, 'huggingface'),
    VIREID_CACHE=os.path.join(_scratch.name, 'vireid'),
    MPLBACKEND='agg',
)


def pytest_unconfigure() -> None:
    _scratch.cleanup()
