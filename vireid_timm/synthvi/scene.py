"""SynthVI's scenes: the place that a camera looks at."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .person import uniform

SCENE = (380, 420)  # height and width of a scene in pixels; an image shows about 256 x 128 of them
WALLS = ('plain', 'bricks', 'panels', 'planks', 'windows', 'foliage', 'columns')
FLOORS = ('plain', 'tiles', 'stripes', 'path')


class _Palette:
    """Draws colours as seen in one spectrum; infrared ones are grey."""

    def __init__(self, rng: np.random.Generator, spectrum: str) -> None:
        self.rng = rng
        self.spectrum = spectrum

    def tone(self, low: float = 0.15, high: float = 0.85) -> np.ndarray:
        """Draw a colour whose brightness lies between `low` and `high`, [3] in 0..255."""
        hue, saturation, value = (float(number) for number in self.rng.random(3))
        if self.spectrum == 'visible':
            return 255 * np.array(colorsys.hsv_to_rgb(hue, 0.35 * saturation, low + (high - low) * value))
        if self.spectrum == 'thermal':  # stone and air are cool and nearly uniform
            return np.full(3, 255 * (0.10 + 0.25 * (low + (high - low) * value)))
        return np.full(3, 255 * (low + (high - low) * value))


def draw_scene(rng: np.random.Generator, spectrum: str) -> Image.Image:
    """Draw a scene.

    Args:
        rng: The only source of randomness.
        spectrum: `visible`, `near-infrared` or `thermal`.

    Returns:
        An RGB image of size `SCENE`, grey unless `visible`.
    """
    palette = _Palette(rng, spectrum)
    height, width = SCENE
    horizon = int(uniform(rng, 0.40, 0.72) * height)
    image = Image.new('RGB', (width, height))
    pen = ImageDraw.Draw(image)
    _wall(pen, rng, palette, horizon)
    _floor(pen, rng, palette, horizon)
    for _ in range(int(rng.integers(3, 9))):
        _object(pen, rng, palette, horizon)
    image = image.filter(ImageFilter.GaussianBlur(1.2))
    shade = _smooth_noise(rng, 7, 0.16) + _smooth_noise(rng, 60, 0.05)
    pixels = np.asarray(image, np.float64) * (1 + shade[..., None])
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _smooth_noise(rng: np.random.Generator, cells: int, strength: float) -> np.ndarray:
    """Draw smooth random brightness around 0 with about `cells` blots across, of shape `SCENE`."""
    grid = Image.fromarray((255 * rng.random((cells, cells))).astype(np.uint8))
    return strength * (np.asarray(grid.resize(SCENE[::-1], Image.Resampling.BICUBIC), np.float64) / 127.5 - 1)


def _tint(tone: np.ndarray, factor: float = 1.0) -> tuple[int, int, int]:
    return tuple(int(value) for value in np.clip(tone * factor, 0, 255))


def _wall(pen: ImageDraw.ImageDraw, rng: np.random.Generator, palette: _Palette, horizon: int) -> None:
    width = SCENE[1]
    base, second = palette.tone(), palette.tone()
    kind, step = WALLS[int(rng.integers(len(WALLS)))], int(rng.integers(14, 70))
    pen.rectangle([0, 0, width, horizon], fill=_tint(base))
    if kind == 'bricks':
        tall = max(6, step // 3)
        for row, y in enumerate(range(0, horizon, tall)):
            for x in range(-step, width, max(12, step // 2) * 2):
                left = x + (row % 2) * max(12, step // 2)
                pen.rectangle(
                    [left, y, left + max(12, step // 2) * 2 - 2, y + tall - 2],
                    fill=_tint(base, uniform(rng, 0.8, 1.05)),
                    outline=_tint(base, 0.7),
                )
    elif kind == 'foliage':
        for _ in range(220):
            x, y, r = uniform(rng, 0, width), uniform(rng, 0, horizon), uniform(rng, 5, 22)
            pen.ellipse([x - r, y - r, x + r, y + r], fill=_tint(base, uniform(rng, 0.55, 1.25)))
    elif kind != 'plain':
        for x in range(int(rng.integers(step)) - step, width, step):
            if kind == 'windows':
                pen.rectangle(
                    [x, horizon * 0.15, x + step * 0.7, horizon * 0.7],
                    fill=_tint(second),
                    outline=_tint(base, 0.6),
                    width=2,
                )
            elif kind == 'columns':
                pen.rectangle([x, 0, x + step * 0.35, horizon], fill=_tint(second, uniform(rng, 0.9, 1.1)))
            else:
                pen.rectangle(
                    [x, 0, x + step - 2, horizon], outline=_tint(base, 0.7), fill=_tint(base, uniform(rng, 0.85, 1.1))
                )
                if kind == 'panels':
                    pen.line([x, horizon * 0.5, x + step, horizon * 0.5], fill=_tint(base, 0.7), width=2)
    pen.rectangle([0, horizon - int(rng.integers(2, 12)), width, horizon], fill=_tint(second, 0.8))


def _floor(pen: ImageDraw.ImageDraw, rng: np.random.Generator, palette: _Palette, horizon: int) -> None:
    height, width = SCENE
    base = palette.tone()
    for y in range(horizon, height, 4):
        pen.rectangle([0, y, width, y + 4], fill=_tint(base, 0.75 + 0.35 * (y - horizon) / (height - horizon)))
    kind, vanishing = FLOORS[int(rng.integers(len(FLOORS)))], uniform(rng, 0, width)
    if kind == 'path':
        pen.polygon(
            [
                (vanishing - 20, horizon),
                (vanishing + 20, horizon),
                (vanishing + 220, height),
                (vanishing - 220, height),
            ],
            fill=_tint(palette.tone()),
        )
    if kind in ('tiles', 'stripes'):
        for x in range(-4 * width, 5 * width, int(rng.integers(60, 160))):
            pen.line([vanishing + (x - vanishing) * 0.15, horizon, x, height], fill=_tint(base, 0.65), width=2)
    if kind == 'tiles':
        y, step = float(horizon), 5.0
        while y < height:
            pen.line([0, y, width, y], fill=_tint(base, 0.65), width=2)
            y, step = y + step, step * 1.35


def _object(pen: ImageDraw.ImageDraw, rng: np.random.Generator, palette: _Palette, horizon: int) -> None:
    """Draw a door, a poster, a pole, a box, a bush or a lamp."""
    height, width = SCENE
    kind, tone = int(rng.integers(6)), palette.tone(0.1, 0.95)
    x, wide, tall = uniform(rng, 0, width), uniform(rng, 14, 60), uniform(rng, 30, 110)
    if kind == 0:
        pen.rectangle([x, horizon - 1.6 * tall, x + wide, horizon], fill=_tint(tone), outline=_tint(tone, 0.6), width=3)
    elif kind == 1:
        y = uniform(rng, 0, horizon - 20)
        pen.rectangle([x, y, x + wide, y + 0.6 * tall], fill=_tint(tone), outline=_tint(tone, 0.7))
        pen.rectangle([x + wide * 0.2, y + tall * 0.1, x + wide * 0.8, y + tall * 0.3], fill=_tint(palette.tone()))
    elif kind == 2:
        pen.rectangle([x, 0, x + 0.2 * wide, horizon + 0.4 * tall], fill=_tint(tone))
    elif kind == 3:
        y = horizon + uniform(rng, -10, 60)
        pen.rectangle([x, y - 0.5 * tall, x + wide, y], fill=_tint(tone))
        pen.polygon(
            [
                (x, y - 0.5 * tall),
                (x + wide, y - 0.5 * tall),
                (x + wide * 1.2, y - 0.6 * tall),
                (x + wide * 0.2, y - 0.6 * tall),
            ],
            fill=_tint(tone, 1.25),
        )
    elif kind == 4:
        for _ in range(12):
            dx, dy, r = uniform(rng, -wide, wide) / 2, uniform(rng, -tall, 0) / 2, uniform(rng, 5, 14)
            pen.ellipse(
                [x + dx - r, horizon + dy - r, x + dx + r, horizon + dy + r], fill=_tint(tone, uniform(rng, 0.7, 1.2))
            )
    else:
        y, r = uniform(rng, 0, horizon / 2), uniform(rng, 4, 12)
        pen.ellipse(
            [x - r, y - r, x + r, y + r],
            fill=_tint(np.full(3, 235.0)) if palette.spectrum != 'thermal' else _tint(np.full(3, 150.0)),
        )
