"""One safe way to decode any image file, or to render a SynthVI address, as 8-bit RGB."""

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..synthvi.render import render_address

ADDRESS_PREFIX = 'synthvi:'
IMAGE_SUFFIXES = ('.bmp', '.gif', '.jp2', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
FORMATS = ('BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')  # plain images, none that runs a program
MAX_PIXELS = 64 * 1024 * 1024  # twice an 8K frame; a file that claims more is refused before it is decoded
STRETCH_PERCENTILES = (0.1, 99.9)

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
    """An image that cannot be used, made from a problem that names the file; the message adds what to do about it."""

    def __str__(self) -> str:
        return f'{self.args[0]}; replace or remove it, or go on without it: skip_broken=True (--skip-broken)'


def read_image(path: str) -> Image.Image:
    """Read one image as 8-bit RGB, whatever it was stored as.

    EXIF orientation is applied, transparent parts become black, of several frames the first is taken. A single channel
    of more than 8 bits (`I;16`, `I`, `F`, as thermal cameras write) is stretched linearly from the image's own 0.1
    and 99.9 percentiles to 0..255: raw counts use a small, shifting part of their range, which full-range scaling
    would leave almost black.

    Args:
        path: A file, or the address of a rendered image (`synthvi:...`).

    Raises:
        ImageError: If the file is missing, truncated, larger than `MAX_PIXELS`, or no image.
    """
    if path.startswith(ADDRESS_PREFIX):
        return Image.fromarray(render_address(path))
    try:
        # Opened here, not by Pillow: it would map plain TIFFs into memory, and garbles those that are stored sideways.
        with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f'it has {width}x{height} pixels')
            image.load()
            # Pillow turns TIFFs upright itself, and leaves all else to the caller.
            turn = None if image.format == 'TIFF' else _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG))
            upright = _to_rgb(image)
            return upright if turn is None else upright.transpose(turn)
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ImageError(f'{path}: this image cannot be read ({_reason(error)})') from error


def load_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """Read one image and squash it to a size.

    Args:
        path: A file, or the address of a rendered image.
        size: Height and width; the aspect ratio is not kept, as usual for pedestrians.

    Returns:
        Bytes [H, W, 3], resized bilinearly with antialiasing.
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
        return f'not one of the formats {", ".join(FORMATS)}'
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == 'F' or image.mode.startswith('I'):
        return _stretch(np.asarray(image))
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        # Dropping the alpha channel alone would show whatever colour lies under the transparent parts.
        image = image.convert('RGBA')
        black = Image.new('RGBA', image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert('RGB')


def _stretch(values: np.ndarray) -> Image.Image:
    """Scale one channel [H, W] of any range to 8 bits, see `read_image`."""
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError('it has no finite pixel value')
    low, high = np.percentile(finite, STRETCH_PERCENTILES)
    if high <= low:  # nearly constant: a few hot pixels are all there is to see
        low, high = finite.min(), finite.max()
    values = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    scaled = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.round(scaled).astype(np.uint8)).convert('RGB')
