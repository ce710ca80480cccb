"""SynthVI: pedestrians rendered in two spectra.

A dataset that anyone can have, in any amount, without a licence and without real people. An image depends only on
(seed, spectrum, modality, camera, identity, image, size): it can be rendered alone, in any order and in any process,
and is always the same. (Another version of NumPy or Pillow may round a pixel differently.)

* An *identity* fixes body proportions, hair, garments with their patterns and prints, shoes, bag, hat and scarf, and
  the look of every material in each spectrum. Infrared reflectance is drawn independently of the colour, and three in
  ten patterns vanish there.
* A *camera* fixes its scene, viewpoint, light, colour cast or infrared lamp, sharpness and noise.
* An *image* draws heading, pose, crop, occlusion and brightness, and shows its own part of the camera's scene.

So colours and backgrounds do not identify anyone across the spectra; shapes, lengths and patterns do. `near-infrared`
images show reflectance under a lamp next to the camera (as in SYSU-MM01), `thermal` ones show warmth (as in RegDB).
`person.py` draws the identities, `body.py` paints them with `canvas.py`, and `scene.py` paints the scenes.
"""

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..constants import INFRARED, MODALITIES, SPECTRA, VISIBLE
from ..options import LARGEST_SEED, check_range
from .body import draw_labels
from .canvas import BASE, FRAME, SHADES, SHADOW, Canvas, View
from .person import GROUND, NUM_MATERIALS, OBSTACLE, OBSTACLE_TRIM, Person, draw_person, uniform
from .scene import draw_scene

_MAX_SIDE = 2048  # pixels, so that an address from a file cannot ask for all memory
_LUMA = np.array([0.299, 0.587, 0.114])
_ADDRESS = re.compile(
    r'synthvi:(?P<spectrum>[a-z-]+):s(?P<seed>[0-9]+):(?P<modality>[a-z]+):c(?P<camera>[0-9]+)'
    r':i(?P<identity>[0-9]+):p(?P<image>[0-9]+):(?P<height>[0-9]+)x(?P<width>[0-9]+)'
)
# What a random generator is for: the first number of its seed.
_PERSON, _CAMERA, _IMAGE, _NOISE, _ORDER, _SCENE = range(6)


def _generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, purpose, *numbers])))


@dataclass(frozen=True)
class CameraProfile:
    """What a camera does to all its images; see `_camera` for the ranges."""

    heading: float
    tall: float
    tilt: float
    light: int
    slope: tuple[float, float]
    gain: float
    cast: tuple[float, float, float]
    saturation: float
    gamma: float
    lamp: tuple[float, float, float]
    sharpness: float
    blur: float
    noise: float


@functools.lru_cache(maxsize=1024)
def _person(seed: int, identity: int) -> Person:
    return draw_person(_generator(seed, _PERSON, identity))


@functools.lru_cache(maxsize=1024)
def _camera(seed: int, modality: str, spectrum: str, camera: int) -> CameraProfile:
    rng = _generator(seed, _CAMERA, *_modality_seed(modality, spectrum), camera)
    infrared = modality == INFRARED
    return CameraProfile(
        heading=uniform(rng, -0.7, 0.7),
        tall=uniform(rng, 100, 111),
        tilt=uniform(rng, -0.04, 0.14),
        light=-1 if rng.random() < 0.5 else 1,
        slope=(uniform(rng, -0.25, 0.25), uniform(rng, -0.15, 0.15)),
        gain=uniform(rng, 0.85, 1.2),
        cast=tuple(math.exp(0.09 * float(rng.normal())) for _ in range(3)),
        saturation=uniform(rng, 0.55, 1.1),
        gamma=uniform(rng, 0.75, 1.3),
        lamp=_draw_lamp(rng) if infrared else (0.0, 0.0, 0.0),
        sharpness=uniform(rng, 0.65, 1.0),
        blur=uniform(rng, 0.0, 0.5),
        noise=uniform(rng, 0.008, 0.026) if infrared else uniform(rng, 0.006, 0.02),
    )


def _draw_lamp(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draw how much darker the lamp's light is at the rim than in its middle, and the middle's x and y."""
    return uniform(rng, 0.2, 0.65), uniform(rng, -0.3, 0.3), uniform(rng, -0.4, 0.3)


def _modality_seed(modality: str, spectrum: str) -> tuple[int, int]:
    """Return two seed numbers; visible cameras do not depend on the infrared spectrum."""
    return (0, 0) if modality == VISIBLE else (1, SPECTRA.index(spectrum))


@functools.lru_cache(maxsize=512)
def _scene(seed: int, modality: str, spectrum: str, camera: int) -> Image.Image:
    palette = 'visible' if modality == VISIBLE else spectrum
    scene = draw_scene(_generator(seed, _SCENE, *_modality_seed(modality, spectrum), camera), palette)
    if modality == INFRARED:
        return scene.convert('L')
    profile = _camera(seed, modality, spectrum, camera)
    return Image.fromarray(_saturate(np.asarray(scene, np.float64), profile.saturation).clip(0, 255).astype(np.uint8))


def _saturate(colours: np.ndarray, amount: float) -> np.ndarray:
    grey = (colours @ _LUMA)[..., None]
    return grey + amount * (colours - grey)


@functools.lru_cache(maxsize=512)
def _light_field(seed: int, modality: str, spectrum: str, camera: int, size: tuple[int, int]) -> np.ndarray:
    """Return the brightness that camera and lamp give every pixel, [H, W, C] with one channel for infrared."""
    profile = _camera(seed, modality, spectrum, camera)
    y = np.linspace(-1, 1, size[0])[:, None]
    x = np.linspace(-1, 1, size[1])[None, :]
    fall_off, lamp_x, lamp_y = profile.lamp
    lamp = 1.0 - fall_off * np.clip(0.6 * (x - lamp_x) ** 2 + 0.8 * (y - lamp_y) ** 2, 0, 1.2) + 0.35 * fall_off
    field = profile.gain * (1 + profile.slope[0] * x + profile.slope[1] * y) * lamp
    return (field[..., None] * np.array(profile.cast if modality == VISIBLE else (1.0,))).astype(np.float32)


def render(
    modality: str,
    identity: int,
    camera: int,
    image: int,
    *,
    seed: int = 0,
    spectrum: str = 'near-infrared',
    size: tuple[int, int] = (128, 64),
) -> np.ndarray:
    """Render one image.

    Another size changes only the noise: a larger image shows the same moment.

    Args:
        modality: `visible` or `infrared`.
        identity: Number of the person, from 0.
        camera: Number of the camera in its modality, from 1; cameras of the two modalities share nothing.
        image: Number of the image, from 0.
        seed: Seed of people, cameras and images.
        spectrum: Spectrum of `infrared` images, `near-infrared` or `thermal`. Visible images do not depend on it.
        size: Height and width, from (32, 16) to (2048, 2048).

    Returns:
        uint8 [H, W, 3]; infrared images have three equal channels.

    Raises:
        ValueError: An argument is out of its range.
    """
    _check(modality, identity, camera, image, seed, spectrum, size)
    person, profile = _person(seed, identity), _camera(seed, modality, spectrum, camera)
    numbers, size = (*_modality_seed(modality, spectrum), camera, identity, image), (int(size[0]), int(size[1]))
    rng = _generator(seed, _IMAGE, *numbers)
    view = _draw_view(rng, profile)
    labels = draw_labels(person, view, (2 * size[0], 2 * size[1]))
    _occlude(rng, labels, view)
    drawn = _background(rng, _scene(seed, modality, spectrum, camera), labels.shape)
    shadow = 0 if modality == INFRARED and spectrum == 'thermal' else 90
    _paint(drawn, labels, _table(rng, person, profile, modality, spectrum), shadow)
    brightness = uniform(rng, 0.85, 1.15)
    pixels = _defocus(drawn, profile, size)
    noise = _generator(seed, _NOISE, *numbers).normal(0.0, 255 * profile.noise, pixels.shape)
    exposed = pixels * (_light_field(seed, modality, spectrum, camera, size) * np.float32(brightness)) + noise
    return _develop(exposed, profile.gamma)


def _check(modality: str, identity: int, camera: int, image: int, seed: int, spectrum: str, size: tuple) -> None:
    if modality not in MODALITIES:
        raise ValueError(f'unknown modality {modality!r}; expected one of {", ".join(MODALITIES)}')
    if spectrum not in SPECTRA:
        raise ValueError(f'unknown spectrum {spectrum!r}; expected one of {", ".join(SPECTRA)}')
    for name, value, least in (
        ('camera', camera, 1),
        ('identity', identity, 0),
        ('image', image, 0),
        ('seed', seed, 0),
    ):
        check_range(name, value, least, LARGEST_SEED)
    if len(size) != 2 or size[0] < 32 or size[1] < 16 or max(size) > _MAX_SIDE:
        raise ValueError(f'an image needs a (height, width) from (32, 16) to ({_MAX_SIDE}, {_MAX_SIDE}), got {size}')


def _draw_view(rng: np.random.Generator, profile: CameraProfile) -> View:
    """Draw pose and crop: people walk towards or away from the camera, and the boxes around them are never exact."""
    away = math.pi if rng.random() < 0.5 else 0.0
    zoom = uniform(rng, 0.94, 1.06)
    cut = uniform(rng, 0.0, 0.22) if rng.random() < 0.10 else 0.0  # sometimes the box misses the feet
    return View(
        heading=profile.heading + away + 0.35 * float(rng.normal()),
        tall=profile.tall * zoom * (1 + cut),
        middle=32 + 2.2 * float(np.clip(rng.normal(), -2.5, 2.5)),
        foot=120.5 + uniform(rng, -3.5, 3.5) + 112 * cut,
        tilt=profile.tilt + uniform(rng, -0.02, 0.02),
        phase=uniform(rng, 0, 2 * math.pi),
        swing=uniform(rng, 0.05, 0.5),
        light=profile.light,
    )


def _occlude(rng: np.random.Generator, labels: np.ndarray, view: View) -> None:
    """Sometimes put something in front; changes labels [h, w] in place. Every image draws the same count of numbers."""
    kind, place, width, level = (float(number) for number in rng.random(4))
    rows, columns = labels.shape[0] / FRAME[0], labels.shape[1] / FRAME[1]
    if kind < 0.05:  # a pole
        left, wide = (4 + 52 * place) * columns, (2 + 5 * width) * columns
        labels[:, int(left) : int(left + wide)] = 3 * OBSTACLE + BASE
    elif kind < 0.10:  # a box, a bench or a bush at the bottom
        top, left = int((84 + 34 * level) * rows), int((56 * place - 18) * columns)
        right = int(left + (22 + 22 * width) * columns)
        labels[top:, max(left, 0) : right] = 3 * OBSTACLE + BASE
        labels[top : top + int(3 * rows), max(left, 0) : right] = 3 * OBSTACLE_TRIM + BASE
    elif kind < 0.16:  # another person, half outside
        side = -1 if place < 0.5 else 1
        tall, middle = view.tall * (0.9 + 0.2 * level), 32 + side * (28 + 6 * width)
        other = View(0.0, tall, middle, view.foot + 3, tilt=0.0, phase=0.0, swing=0.0, light=1)
        canvas = Canvas(other, 1.0, labels.shape)
        canvas.limb(OBSTACLE_TRIM, (0, 0, 0.03, 0.05), (0, 0, 0.5, 0.085))
        canvas.tube([(0.83, 0.05, 0.05), (0.8, 0.13, 0.1), (0.45, 0.11, 0.1)], OBSTACLE)
        canvas.oval(0, 0, 0.92, 0.055, 0.07, OBSTACLE_TRIM)
        layer = np.asarray(canvas.image)
        labels[layer > 0] = layer[layer > 0]


def _background(rng: np.random.Generator, scene: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a random crop of the scene, resized to `size`, mirrored half the time."""
    across, down, zoom, mirror = (float(number) for number in rng.random(4))
    tall = 2 * FRAME[0] * (0.8 + 0.4 * zoom)
    wide = tall / 2
    left, top = across * (scene.width - wide), down * (scene.height - tall)
    crop = scene.resize((size[1], size[0]), Image.Resampling.BILINEAR, (left, top, left + wide, top + tall))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else crop


def _paint(image: Image.Image, labels: np.ndarray, table: np.ndarray, shadow: int) -> None:
    """Paint what the labels [h, w] show over the image; a `shadow` of 255 is black."""
    marks = Image.fromarray(labels)
    bands = [marks.point([*band.tolist(), *[0] * (256 - len(table))]) for band in table.T]
    cover = np.full(256, 255)
    cover[:3] = 0
    cover[SHADOW] = shadow
    image.paste(bands[0] if len(bands) == 1 else Image.merge('RGB', bands), mask=marks.point(cover.tolist()))


def _table(
    rng: np.random.Generator, person: Person, profile: CameraProfile, modality: str, spectrum: str
) -> np.ndarray:
    """Return the look of every label in this image, [3 * NUM_MATERIALS, C] uint8."""
    shades = SHADES
    if modality == VISIBLE:
        tones, obstacle = _saturate(person.visible, profile.saturation), 0.7 * rng.random() + 0.3 * rng.random(3)
    elif spectrum == 'near-infrared':
        tones, obstacle = person.near_infrared[:, None].copy(), rng.random(1)
    else:  # warmth hardly depends on the light, and obstacles are cool
        tones, obstacle, shades = person.thermal[:, None].copy(), 0.35 * rng.random(1), 1 + 0.5 * (SHADES - 1)
    tones[GROUND] = 0.0  # its only label is a shadow
    tones[OBSTACLE], tones[OBSTACLE_TRIM] = 0.1 + 0.7 * obstacle, 0.8 - 0.6 * obstacle
    table = tones[:, None, :] * shades[None, :, None]
    return np.clip(255 * table, 0, 255).astype(np.uint8).reshape(3 * NUM_MATERIALS, -1)


def _defocus(image: Image.Image, profile: CameraProfile, size: tuple[int, int]) -> np.ndarray:
    """Resize down to the camera's own resolution and up to the image's, [H, W, C] float32."""
    own = max(16, round(size[1] * profile.sharpness)), max(32, round(size[0] * profile.sharpness))
    image = image.resize(own, Image.Resampling.BILINEAR)
    if profile.blur > 0.15:
        image = image.filter(ImageFilter.GaussianBlur(profile.blur * own[1] / FRAME[0]))
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32).reshape(size[0], size[1], -1)


def _develop(exposed: np.ndarray, gamma: float) -> np.ndarray:
    """Clip, apply the camera's tone curve, and expand to three channels, uint8 [H, W, 3]."""
    curve = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    developed = curve[np.clip(np.rint(exposed), 0, 255).astype(np.uint8)]
    return np.ascontiguousarray(np.broadcast_to(developed, (*developed.shape[:2], 3)))


@functools.cache
def renderer_digest() -> str:
    """Return the SHA-256 of the renderer's source, because an address does not name a version of the renderer."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob('*.py')):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def image_address(
    modality: str,
    identity: int,
    camera: int,
    image: int,
    *,
    seed: int = 0,
    spectrum: str = 'near-infrared',
    size: tuple[int, int] = (128, 64),
) -> str:
    """Return the address that `render_address` turns into the image; arguments as for `render`.

    Returns:
        For example `synthvi:near-infrared:s0:visible:c1:i12:p3:128x64`.
    """
    _check(modality, identity, camera, image, seed, spectrum, size)
    return f'synthvi:{spectrum}:s{seed}:{modality}:c{camera}:i{identity}:p{image}:{size[0]}x{size[1]}'


def render_address(address: str) -> np.ndarray:
    """Render the image of an address, uint8 [H, W, 3].

    Raises:
        ValueError: The address is malformed, or one of its values is out of range.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(
            f'malformed SynthVI address {address!r}; '
            'expected one like synthvi:near-infrared:s0:visible:c1:i12:p3:128x64'
        )
    part = match.groupdict()
    try:
        return render(
            part['modality'],
            int(part['identity']),
            int(part['camera']),
            int(part['image']),
            seed=int(part['seed']),
            spectrum=part['spectrum'],
            size=(int(part['height']), int(part['width'])),
        )
    except ValueError as error:
        raise ValueError(f'SynthVI address {address!r}: {error}') from None


def camera_order(seed: int, identity: int, modality: str, count: int) -> list[int]:
    """Return the order in which an identity's images are assigned to the `count` cameras of a modality."""
    rng = _generator(seed, _ORDER, identity, MODALITIES.index(modality))
    return np.argsort(rng.random(count), kind='stable').tolist()


def camera_numbers(visible: int, infrared: int, first_camera: int = 1) -> tuple[list[int], list[int]]:
    """Return the numbers of the visible and of the infrared cameras.

    Four visible and two infrared cameras are numbered as in SYSU-MM01 (1, 2, 4, 5 and 3, 6); otherwise the visible ones
    come first. `first_camera` shifts all numbers by `first_camera - 1`, which gives different cameras.
    """
    shift = first_camera - 1
    if (visible, infrared) == (4, 2):
        return [number + shift for number in (1, 2, 4, 5)], [number + shift for number in (3, 6)]
    numbers = [number + shift for number in range(1, visible + infrared + 1)]
    return numbers[:visible], numbers[visible:]


def contact_sheet(
    identities: Sequence[int],
    *,
    seed: int = 0,
    spectrum: str = 'near-infrared',
    size: tuple[int, int] = (128, 64),
    images_per_camera: int = 1,
    visible_cameras: int = 4,
    infrared_cameras: int = 2,
    first_camera: int = 1,
) -> Image.Image:
    """Draw one row per identity and one column per camera and image, visible first; arguments as for `render`."""
    cameras = camera_numbers(visible_cameras, infrared_cameras, first_camera)
    columns = [
        (modality, camera, image)
        for modality, numbers in zip(MODALITIES, cameras, strict=True)
        for camera in numbers
        for image in range(images_per_camera)
    ]
    gap, header = 2, 12
    step, offset = size[1] + gap, {VISIBLE: gap, INFRARED: 4 * gap}
    sheet = Image.new('RGB', (5 * gap + len(columns) * step, header + len(identities) * (size[0] + gap)), 'white')
    pen = ImageDraw.Draw(sheet)
    for column, (modality, camera, image) in enumerate(columns):
        left = offset[modality] + column * step
        pen.text((left + 2, 0), f'{modality[0].upper()} {camera}', fill='black')
        for row, identity in enumerate(identities):
            pixels = render(modality, identity, camera, image, seed=seed, spectrum=spectrum, size=size)
            sheet.paste(Image.fromarray(pixels), (left, header + row * (size[0] + gap)))
    return sheet
