"""Image files for tests: good ones of several formats, and broken ones."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data.images import MAX_PIXELS
from vireid_timm.synthvi.render import image_address


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random pixels, uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path) -> list[Path | str]:
    """Write images of several sizes, formats and modes; return their paths and the addresses of two rendered ones."""
    folder.mkdir()
    paths = []
    for number in range(7):
        path = folder / f'{number}.{("png", "jpg", "bmp")[number % 3]}'
        shape = (20 + 5 * number, 10 + 3 * number)
        Image.fromarray(noise(*shape, *((3,) if number % 2 else ()), seed=number)).save(path)
        paths.append(path)
    return [*paths, *(image_address(modality, 3, 1, 0, size=(32, 16)) for modality in (VISIBLE, INFRARED))]


def write_broken(folder: Path) -> dict[str, str | None]:
    """Write files that cannot be read as images. Return name -> part of the error message, if it is always the same."""
    Image.fromarray(noise(64, 32, 3)).save(folder / 'good.jpg')
    Image.fromarray(noise(64, 32, 3)).save(folder / 'good.png')
    jpeg, png = (folder / 'good.jpg').read_bytes(), (folder / 'good.png').read_bytes()
    (folder / 'folder.jpg').mkdir()
    contents = {
        'truncated.jpg': (jpeg[: len(jpeg) // 2], 'truncated'),
        'header.jpg': (jpeg[:20], None),
        'truncated.png': (png[: len(png) // 2], 'truncated'),
        'bits.png': (png[:200] + b'\0' * 50 + png[250:], None),
        'empty.jpg': (b'', 'not one of the formats'),
        'text.jpg': (b'<html>404</html>', 'not one of the formats'),
        'script.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 16\n', 'not one of the formats'),
        'large.png': (_png_header(9000, 9000), f'9000x9000 pixels, more than the limit of {MAX_PIXELS:,}'),
        'larger.png': (_png_header(12000, 12000), f'more than the limit of {MAX_PIXELS:,}'),
        'bomb.png': (_png_header(65535, 65535), f'more than the limit of {MAX_PIXELS:,}'),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / 'nan.tif')
    messages = {name: message for name, (_, message) in contents.items()}
    return messages | {'nan.tif': 'no finite pixel value', 'missing.jpg': 'no such file', 'folder.jpg': 'directory'}


def _png_header(width: int, height: int) -> bytes:
    """Return a PNG file whose header claims a size, without any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
