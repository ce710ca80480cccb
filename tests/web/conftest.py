"""A running demo, and files to upload."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import start
from web_demo import Demo, serve


@pytest.fixture(scope='session')
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp('demo')
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    output, scratch = folder / 'output.txt', folder / 'scratch'
    scratch.mkdir()
    process = start(serve, port, output=output, environment={'TMPDIR': str(scratch)})
    demo, end = Demo(f'http://127.0.0.1:{port}', output), time.monotonic() + 120
    while f'The demo runs at {demo.address}' not in (output.read_text() if output.exists() else ''):
        assert process.is_alive() and time.monotonic() < end, output.read_text()
        time.sleep(0.05)
    yield demo
    process.terminate()
    process.join(30)
    assert process.exitcode == 143, output.read_text()
    assert not list(scratch.glob('vireid-*')), 'uploads and rendered images are left'


@pytest.fixture(scope='session')
def image_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a person in both modalities, and with files that are no images or too large ones."""
    import numpy as np
    from PIL import Image

    from vireid_timm.synthvi.render import render

    folder = tmp_path_factory.mktemp('image_files')
    for modality in ('visible', 'infrared'):
        Image.fromarray(render(modality, 3, 1, 0, seed=7)).save(folder / f'{modality}.png')
    (folder / 'text.jpg').write_text('I am no image')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / 'cut.jpg')
    (folder / 'cut.jpg').write_bytes((folder / 'cut.jpg').read_bytes()[:1500])
    Image.new('L', (6000, 6000)).save(folder / 'bomb.png')
    (folder / 'heavy.png').write_bytes((folder / 'visible.png').read_bytes() + bytes(21 * 2**20))
    return folder
