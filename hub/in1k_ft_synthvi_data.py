"""Write the training data of the weights `in1k_ft_synthvi`: abstract scenes in two spectra, and a table with people.

    python hub/in1k_ft_synthvi_data.py output/in1k_ft_synthvi
    vireid train --config in1k_ft_synthvi --data-dir output/in1k_ft_synthvi/table.csv

A network that is fine-tuned on rendered people alone forgets what ImageNet's photographs taught it about everything
else. So every second identity is a scene of overlapping shapes ("dead leaves", as in arXiv:2106.05963), each a material
with a colour, a texture and an infrared tone of its own: what holds in both spectra is shape, as for people. A scene
has two visible and two infrared images that differ in crop, exposure, sharpness and noise. The people are SynthVI's,
half of them near-infrared, half of them thermal. A scene is a function of seed and number.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import vireid_timm
from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data.workers import in_order
from vireid_timm.files import whole_folder
from vireid_timm.options import check_range
from vireid_timm.synthvi.render import render_address

SIZE = (128, 64)  # height and width of an image
CANVAS = (332, 166)  # of a scene: twice the size, and a rim for shifted crops
COLUMNS = ('path', 'identity', 'camera', 'modality', 'split')
WORLD = dict(test_identities=0, images_per_modality=2, visible_cameras=400, infrared_cameras=200, seed=1)


def noise(rng: np.random.Generator, size: tuple[int, int], fading: float) -> np.ndarray:
    """Return a smooth random texture of unit deviation, [H, W]; octaves fade by a factor of 2 ** -`fading` each."""
    height, width = size
    total = np.zeros(size, np.float32)
    for octave in range(5):
        cells = 2 ** (octave + 1) + 1
        grid = rng.standard_normal((min(2 * cells, height), min(cells, width)), np.float32)
        total += np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC)) * 2 ** (-fading * octave)
    return total / (total.std() + 1e-6)


def outline(rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return the corners of a random shape: an ellipse, a rectangle, a bar, or a polygon; small ones are frequent."""
    height, width = CANVAS
    length = min(13 / rng.random() ** 0.7, height)
    stretch, angle = np.exp(rng.normal() * 0.6), rng.random() * np.pi
    kind = rng.random()
    corners = np.array([0.25, 0.75, 1.25, 1.75]) * np.pi
    radii = np.ones(4)
    if kind < 0.35:
        corners, radii = np.linspace(0, 2 * np.pi, 24), np.ones(24)
    elif kind > 0.8:
        count = int(rng.integers(3, 9))
        corners, radii = np.sort(rng.random(count)) * 2 * np.pi, rng.uniform(0.4, 1.3, count)
    elif kind > 0.65:
        stretch, angle = np.exp(rng.uniform(1.5, 2.7)), rng.choice([0, np.pi / 2]) + rng.normal() * 0.2
    x, y = radii * np.cos(corners) * length / 2 * stretch**0.5, radii * np.sin(corners) * length / 2 / stretch**0.5
    left, top = rng.random() * width, rng.random() * height
    return list(zip(left + x * np.cos(angle) - y * np.sin(angle), top + x * np.sin(angle) + y * np.cos(angle)))


def material(rng: np.random.Generator, size: tuple[int, int], colourfulness: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how an area looks in the visible, [H, W, 3], and in the infrared, [H, W].

    Three materials in ten have an infrared tone near their brightness, the others any. A texture may show in the
    infrared as it is, reversed, weaker or not at all.
    """
    brightness = rng.random()
    colour = np.clip(brightness + (rng.random(3) - 0.5) * colourfulness, 0, 1)
    tone = rng.random() if rng.random() < 0.7 else np.clip(brightness + rng.normal() * 0.15, 0, 1)
    texture = rng.random() ** 2 * 0.25 * noise(rng, size, rng.uniform(0.3, 1.4))
    down, across = (np.linspace(-0.5, 0.5, side) * rng.normal() * 0.2 for side in size)
    shade = down[:, None] + across[None]
    visible = colour + (texture + shade)[..., None]
    infrared = tone + texture * rng.choice([1, -1, 0, 0.5]) + shade * rng.choice([1, 0, -1])
    return visible.astype(np.float32), infrared.astype(np.float32)


def scene(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return a scene in both modalities: [H, W, 3] and [H, W], about 0..1."""
    colourfulness = rng.beta(1.2, 2.5)
    visible, infrared = material(rng, CANVAS, colourfulness)
    for _ in range(int(np.exp(rng.uniform(np.log(6), np.log(90))))):
        mask = Image.new('L', CANVAS[::-1])
        ImageDraw.Draw(mask).polygon(outline(rng), fill=255)
        box = mask.getbbox()
        if box is None:  # outside
            continue
        left, top, right, bottom = box
        inside = np.asarray(mask.crop(box)) > 0
        looks = material(rng, inside.shape, colourfulness)
        for canvas, look in zip((visible, infrared), looks):
            canvas[top:bottom, left:right][inside] = look[inside]
    if rng.random() < 0.5:  # a camera that uses its whole range
        darkest, brightest = np.percentile(infrared, [1, 99])
        infrared = (infrared - darkest) / max(brightest - darkest, 0.2)
    return {VISIBLE: visible, INFRARED: infrared}


def view(rng: np.random.Generator, canvas: np.ndarray) -> Image.Image:
    """Return an image of a scene: another crop, exposure, tone curve, resolution, sharpness and noise each time."""
    height, width = (2 * side * rng.uniform(0.88, 1.05) for side in SIZE)
    left = (canvas.shape[1] - width) / 2 + rng.uniform(-0.06, 0.06) * width
    top = (canvas.shape[0] - height) / 2 + rng.uniform(-0.06, 0.06) * height
    exposed = np.clip(canvas * np.exp(rng.normal() * 0.25) + rng.normal() * 0.08, 0, 1) ** np.exp(rng.normal() * 0.3)
    image = Image.fromarray((exposed * 255).astype(np.uint8))
    scale = rng.choice([1, 1, 0.7, 0.5])
    small = (int(SIZE[1] * scale), int(SIZE[0] * scale))
    image = image.resize(small, Image.BILINEAR, box=(left, top, left + width, top + height))
    image = image.resize(SIZE[::-1], Image.BILINEAR)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.2)))
    pixels = np.asarray(image, np.float32)
    pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * rng.random() ** 2 * 18
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_scene(folder: Path, seed: int, number: int) -> list[tuple[str, str, int, str, str]]:
    """Write the four images of a scene; return their rows of the table."""
    rng = np.random.default_rng((seed, number))
    rows = []
    for camera, (modality, canvas) in enumerate(scene(rng).items(), start=1):
        for image in range(2):
            name = f'scenes/{number:06d}_{modality}_{image}.png'
            view(rng, canvas).save(folder / name)
            rows.append((name, f'scene-{number:06d}', camera, modality, 'train'))
    return rows


def write_people(folder: Path, identities: int, workers: int | None) -> list[tuple[str, str, int, str, str]]:
    """Write the images of SynthVI's people, the second half of them thermal; return their rows of the table."""
    rows = []
    near = identities - identities // 2
    for spectrum, first, count in (('near-infrared', 0, near), ('thermal', near, identities - near)):
        options = {**WORLD, 'identities': count, 'first_identity': first, 'spectrum': spectrum}
        records = vireid_timm.create_dataset('synthetic', **options).train
        drawn = in_order(render_address, records.path, workers=workers, processes=True)
        for row, pixels in enumerate(drawn):
            person, modality, camera = records.identity[row], records.modality[row], int(records.camera[row])
            name = f'people/{person}_{modality}_c{camera}_{row:06d}.png'
            Image.fromarray(pixels).save(folder / name)
            rows.append((name, f'person-{person}', camera, modality, 'train'))
    return rows


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path, help='the folder to write')
    parser.add_argument('--identities', type=int, default=6000, help='people, and as many scenes (default: 6000)')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other scenes (default: 0)')
    parser.add_argument('--workers', type=int, help='processes that render people (default: one per CPU core)')
    args = parser.parse_args()
    try:
        check_range('--identities', args.identities, minimum=2)  # one of each spectrum
        check_range('--seed', args.seed)
        if args.output.exists():
            raise ValueError(f'{args.output} exists already; choose another folder')
        with whole_folder(args.output) as folder:
            for name in ('people', 'scenes'):
                (folder / name).mkdir()
            rows = write_people(folder, args.identities, args.workers)
            for number in range(args.identities):
                rows += write_scene(folder, args.seed, number)
            with open(folder / 'table.csv', 'w', encoding='utf-8', newline='') as file:
                csv.writer(file, lineterminator='\n').writerows([COLUMNS, *rows])
    except (ValueError, OSError) as error:
        raise SystemExit(f'{Path(__file__).name}: error: {error}') from None
    print(f'{2 * args.identities:,} identities, {len(rows):,} images: {args.output / "table.csv"}')


if __name__ == '__main__':
    main()
