"""What weights know of photographs that they never saw: patches of aligned visible and infrared pairs find each other.

    python hub/lite0_weights.py lite0.safetensors
    python benchmarks/transfer.py PAIRS vireid_dml_efficientnet_lite0=lite0.safetensors vireid_dml_r10t.synthvi

PAIRS holds the folders `visible` and `infrared`, whose files of the same name show the same scene from the same place,
as collections for image fusion do. Each pair is cut into upright patches, half as high as the image and half as wide as
high, which are resized to 128x64. Every patch searches all patches of the other modality for itself. Patches with next
to no contrast in one of the two are left out.

Prints a table in per cent, both directions averaged, and as its last line one JSON object. The features are those
before BN: the BN-neck's statistics are of the training images.
"""

import argparse
import csv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from measuring import publish
from PIL import Image

import vireid_timm
from vireid_timm.constants import MODALITIES
from vireid_timm.data.images import image_suffixes, read_image
from vireid_timm.device import resolve_device
from vireid_timm.evaluation.evaluate import evaluate_features
from vireid_timm.evaluation.features import centred

PROTOCOLS = ('visible-to-infrared', 'infrared-to-visible')
LOWEST_CONTRAST = 12  # standard deviation of the grey pixels, of 255
SIZE = (128, 64)


def read_pairs(root: Path) -> dict[str, tuple[Image.Image, Image.Image]]:
    """Return the visible and the infrared image of each pair, by name.

    Raises:
        ValueError: A folder is missing, an image cannot be read, or it has no counterpart of its size.
    """
    names = {}
    for modality in MODALITIES:
        folder = root / modality
        if not folder.is_dir():
            raise ValueError(f'{root} should hold the folders visible and infrared; there is no {folder}')
        names[modality] = {path.name for path in folder.iterdir() if path.suffix.lower() in image_suffixes()}
    alone = sorted(set.symmetric_difference(*names.values()))
    if alone:
        raise ValueError(f'{alone[0]} is in only one of the folders visible and infrared of {root}')
    pairs = {}
    for name in sorted(names['visible']):
        visible, infrared = (read_image(str(root / modality / name)) for modality in MODALITIES)
        if visible.size != infrared.size:
            sizes = [f'{image.width}x{image.height}' for image in (visible, infrared)]
            raise ValueError(f'{name} has {sizes[0]} pixels in the visible and {sizes[1]} in the infrared')
        pairs[name] = (visible, infrared)
    return pairs


def cut(image: Image.Image) -> list[Image.Image]:
    """Cut an image into an upper and a lower row of patches, spread evenly from left to right without overlap."""
    height = image.height // 2
    width = height // 2
    count = image.width // width if width else 0
    lefts = [round(number * (image.width - width) / max(count - 1, 1)) for number in range(count)]
    return [image.crop((left, top, left + width, top + height)) for top in (0, image.height - height) for left in lefts]


def contrast(patch: Image.Image) -> float:
    """Return the standard deviation of a patch's grey pixels."""
    return np.asarray(patch.convert('L')).std()


def write_patches(root: Path, folder: Path) -> vireid_timm.Dataset:
    """Write the patches of all pairs to a folder, and return them as a dataset in which each patch is an identity.

    Raises:
        ValueError: As `read_pairs`, or there is no patch with enough contrast.
    """
    rows = [('path', 'identity', 'modality', 'split')]
    for name, images in read_pairs(root).items():
        for number, patches in enumerate(zip(*map(cut, images), strict=True)):
            if min(map(contrast, patches)) > LOWEST_CONTRAST:
                for modality, patch in zip(MODALITIES, patches, strict=True):
                    path = f'{modality}-{number}-{name}.png'
                    patch.save(folder / path)
                    rows.append((path, f'{name}-{number}', modality, 'test'))
    if len(rows) == 1:
        raise ValueError(f'no pair in {root} has a patch with contrast in both modalities')
    with open(folder / 'table.csv', 'w', encoding='utf-8', newline='') as file:
        csv.writer(file).writerows(rows)
    return vireid_timm.create_dataset('csv', folder / 'table.csv')


def load(model: str) -> torch.nn.Module:
    """Return a model: `NAME` or `NAME=FILE`, as the command line gives it.

    Raises:
        ValueError: There is no such model or file, or the file does not fit.
    """
    name, _, file = model.partition('=')
    if not file:
        return vireid_timm.load_model(name)
    if not Path(file).is_file():
        raise ValueError(f'{model}: there is no file {file}')
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a backbone's weights leave the fusion branch as it is drawn
        try:
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': file})
        except Exception as error:  # loaders raise nearly anything on a damaged file
            raise ValueError(f'{model} cannot be loaded: {error}') from error


def scores(model: torch.nn.Module, dataset: vireid_timm.Dataset) -> dict[str, Any]:
    """Return rank-1 and mAP over both directions, as they are and centred: each modality minus its mean."""
    features = vireid_timm.embed(model, dataset.test, size=SIZE, features='before-bn')[0]
    row = {}
    for kind, values in (('', features), ('centred_', centred(features, dataset.test.modality))):
        report = evaluate_features(values, dataset, PROTOCOLS)
        for metric in ('rank1', 'mAP'):
            row[kind + metric] = float(np.mean([report[protocol].mean[metric] for protocol in PROTOCOLS]))
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, in per cent."""
    lines = ['| | rank-1 | mAP | rank-1, centred | mAP, centred |', '|---|---|---|---|---|']
    for name, row in rows.items():
        values = ' | '.join(f'{100 * row[key]:.1f}' for key in ('rank1', 'mAP', 'centred_rank1', 'centred_mAP'))
        lines.append(f'| {name} | {values} |')
    return '\n'.join(lines)


def main() -> None:
    """Measure the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pairs', type=Path, help='folder with the folders visible and infrared')
    text = 'name or folder of a model, or NAME=FILE for a network with the weights of a file'
    parser.add_argument('models', nargs='+', metavar='MODEL', help=text)
    parser.add_argument('--save', type=Path, help='also write the JSON object to this file')
    args = parser.parse_args()
    try:
        with TemporaryDirectory() as folder:
            dataset = write_patches(args.pairs, Path(folder))
            device = resolve_device()
            rows = {model: scores(load(model).to(device), dataset) for model in args.models}
    except (ValueError, OSError) as error:
        raise SystemExit(f'transfer.py: error: {error}') from None
    patches = len(dataset.test) // 2
    publish({'patches': patches, 'models': rows}, f'{patches} patches\n\n{table(rows)}', device, args.save)


if __name__ == '__main__':
    main()
