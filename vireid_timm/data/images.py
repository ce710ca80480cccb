"""Decode any image file, or render a SynthVI address, as 8-bit RGB."""

import functools
import re
import sys
from contextlib import suppress
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..synthvi.render import render_address

ADDRESS_PREFIX = 'synthvi:'
# Not EPS: Pillow runs Ghostscript on it. AVIF comes with Pillow 11.3, HEIF with the package pillow-heif.
FORMATS = ('BMP', 'DIB', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP', 'AVIF', 'HEIF')
MAX_PIXELS = 64 * 1024 * 1024  # twice an 8K frame; a file that claims more is rejected before it is decoded
STRETCH_PERCENTILES = (0.1, 99.9)

_DEEP_PACKING = re.compile('(LA|RGB|RGBA|RGBX);16([BLN])')
_CODESTREAM = b'\xff\x4f\xff\x51'  # where JPEG 2000's begins
_DARK = 1 << 12  # 16-bit values below this have an upper byte below 16
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image cannot be read. Its argument names the file and the problem; the message adds the fix."""

    def __str__(self) -> str:
        return f'{self.args[0]}; replace or remove it, or skip broken images with skip_broken=True (--skip-broken)'


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this installation reads."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.registered_extensions().values())


def image_suffixes() -> tuple[str, ...]:
    """Return the lower-case suffixes of the files that this installation reads, sorted."""
    formats = (*readable_formats(), 'MPO')  # a JPEG of several frames, which Pillow's JPEG reader opens
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in formats))


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one image as 8-bit RGB, whatever its format.

    EXIF orientation is applied, transparent parts become black, and only the first of several frames is read. A single
    channel of more than 8 bits (`I;16`, `I`, `F`, as thermal cameras write) is stretched linearly from the image's own
    0.1 and 99.9 percentiles to 0..255. Raw counts use a small part of their range, and that part moves with the
    camera's temperature: scaling the full range would leave the image almost black. The same holds for 16-bit grey with
    transparency, for 16-bit colour whose three channels are equal, and, with all channels scaled alike, for 16-bit
    colour that uses at most 12 of its bits. Other 16-bit colour keeps its upper 8 bits. Of JPEG 2000's colour Pillow
    has only these: where they are nearly black the file is refused.

    Args:
        path: A file, or the address of a rendered image (`synthvi:...`).
        max_pixels: Pixels of the largest file that is decoded.

    Raises:
        ImageError: If the file is missing, truncated, not an image, or too large.
    """
    if path.startswith(ADDRESS_PREFIX):
        return Image.fromarray(render_address(path))
    try:
        # Not by path: Pillow would map plain TIFFs into memory, and garbles mapped ones that need a rotation.
        with open(path, 'rb') as file, Image.open(file, formats=readable_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f'it has {width}x{height} pixels, more than the limit of {max_pixels:,} pixels')
            if not width or not height:
                raise ValueError(f'it is empty: {width}x{height} pixels')
            tile = image.tile[0] if image.tile else None
            image.load()
            # Pillow rotates TIFFs itself, and leaves other formats to the caller.
            turn = None if image.format == 'TIFF' else _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG))
            values = _deep_values(image, tile, file) if tile else None
            upright = _to_rgb(image) if values is None else _stretch(values)
            return upright if turn is None else upright.transpose(turn)
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ImageError(f'{path}: this image cannot be read ({_reason(error)})') from error


def load_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """Read one image and resize it, bilinearly with antialiasing.

    Args:
        path: A file, or the address of a rendered image.
        size: Height and width. The aspect ratio is not kept, as is usual in person re-ID.

    Returns:
        The image, [H, W, 3] uint8.
    """
    height, width = size
    image = read_image(path)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f'{error}, more than the limit of {MAX_PIXELS:,} pixels'
    if isinstance(error, UnidentifiedImageError):
        return f'not one of the formats {", ".join(readable_formats())}'
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def _deep_values(image: Image.Image, tile: tuple, file: BinaryIO) -> np.ndarray | None:
    """Return the values of a 16-bit image of several channels that is grey or nearly black in 8 bits, else None.

    Args:
        image: The decoded image. Pillow keeps the upper byte of every value.
        tile: How its pixels are packed, as Pillow has it.
        file: Its file, to decode the lower bytes too.

    Returns:
        One channel [H, W] or three [H, W, 3], float64; NaN where the image is transparent.

    Raises:
        ValueError: It is nearly black in 8 bits, and nothing here decodes the lower bytes.
    """
    arguments = tile[3]
    packing = _DEEP_PACKING.fullmatch(str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments))
    if packing is not None:
        values = _packed_values(image, packing, file)
    elif tile[0] in ('ppm', 'ppm_plain') and image.mode == 'RGB' and arguments[-1] > 255:
        file.seek(tile[2])
        count = 3 * image.width * image.height
        if tile[0] == 'ppm':
            numbers = np.frombuffer(file.read(), '>u2', count)
        else:
            numbers = np.array(file.read().split()[:count], np.float64)
        values = numbers.reshape(image.height, image.width, 3) * (65535 / arguments[-1])
    else:
        _check_jpeg2000(image, file)
        return None
    if np.isnan(values).all():
        return None
    if values.shape[2] == 1 or (np.ptp(values, axis=2)[np.isfinite(values[..., 0])] == 0).all():
        return values[..., 0]
    return values if np.nanpercentile(values, STRETCH_PERCENTILES[1]) < _DARK else None


def _check_jpeg2000(image: Image.Image, file: BinaryIO) -> None:
    """Refuse a JPEG 2000 file of more than 8 bits that is nearly black in the upper 8, which Pillow keeps."""
    if image.format != 'JPEG2000' or len(image.getbands()) == 1:
        return
    file.seek(0)
    header = file.read(1 << 16).partition(_CODESTREAM)[2]
    bits = (header[38] & 0x7F) + 1 if len(header) > 38 else 8
    if bits > 8 and np.percentile(np.asarray(image)[..., :3], STRETCH_PERCENTILES[1]) < _DARK >> 8:
        raise ValueError(
            f'of its {bits} bits per channel only the upper 8 can be read, and these are nearly black; convert it to '
            'PNG or TIFF'
        )


def _packed_values(image: Image.Image, packing: re.Match, file: BinaryIO) -> np.ndarray:
    """Return the values [H, W, C] of a 16-bit PNG or TIFF, NaN where it is transparent."""
    channels, order = packing.groups()
    upper = np.asarray(image)
    opposite = {'B': 'L', 'L': 'B', 'N': 'B' if sys.byteorder == 'little' else 'L'}[order]
    # Read with the opposite byte order, the lower byte is the one that is kept. Read as four channels of 8 bits, the
    # bytes of grey and alpha are grey's upper and lower one, then alpha's.
    other = 'RGBA' if channels == 'LA' else f'{channels};16{opposite}'
    file.seek(0)
    with Image.open(file, formats=readable_formats()) as again:
        again.tile = [
            (*tile[:3], (other, *tile[3][1:]) if isinstance(tile[3], tuple) else other) for tile in again.tile
        ]
        lower = np.asarray(again)
    lower = lower[..., [1, 1, 1]] if channels == 'LA' else lower[..., :3]
    values = 256.0 * upper[..., :3] + lower
    if image.mode == 'RGBA':
        values[upper[..., 3] == 0] = np.nan
    return values[..., :1] if channels == 'LA' else values


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == 'F' or image.mode.startswith('I'):
        return _stretch(np.asarray(image))
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        # Dropping the alpha channel would show whatever colour is stored in the transparent parts.
        image = image.convert('RGBA')
        black = Image.new('RGBA', image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert('RGB')


def _stretch(values: np.ndarray) -> Image.Image:
    """Scale values [H, W] or [H, W, 3] of any range to 8 bits, as described in `read_image`."""
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError('it has no finite pixel value')
    low, high = np.percentile(finite, STRETCH_PERCENTILES)
    if high <= low:  # nearly constant: only a few hot pixels differ
        low, high = finite.min(), finite.max()
    values = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    scaled = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.round(scaled).astype(np.uint8)).convert('RGB')
