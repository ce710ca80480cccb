"""How fast and how exact galleries of ten thousand to a million images are searched.

    python benchmarks/retrieval.py --folder DIR               everything: needs 8 GB in DIR, about 15 minutes
    python benchmarks/retrieval.py --folder DIR --images 1000000 --save benchmarks/results/retrieval.cpu.json
    python benchmarks/retrieval.py --folder DIR --no-times    recall and size only, for a machine that is busy

Compares exact search in the half-precision file with compressed features, whose candidates are compared exactly. The
features are drawn to resemble those of unseen people after the BN-neck of the first weights in the package (32 % mAP),
see `People`. Infrared queries search visible images. Features stay in the folder and are used again. Rows of an earlier
result file stay, unless they are measured again. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import publish, seconds

from vireid_timm.files import save_json, whole_file
from vireid_timm.retrieval import compressed
from vireid_timm.retrieval.search import exact_search

TOP = 10
PEOPLE, IMAGES_PER_PERSON = 1_000, 10  # of a block, which is drawn at once
LATENT = 512  # more directions have no weight that matters
# Variance and spectrum (k + offset) ** -power of what makes up a feature, fitted to 1,400 unseen SynthVI people:
SHARED = (0.17, 8, 3.0)  # a person's, in both modalities
OWN = (0.335, 24, 1.92)  # a person's, in one modality
IMAGE = (0.47, 5, 1.17)  # of the single image
MEAN = 0.15  # length of a modality's mean
SPREAD = 0.2  # of the logarithm of the scale of IMAGE: some images are worse than others
CPU = torch.device('cpu')


class People:
    """Draws features of people, a block at a time, visible ones for the gallery and infrared ones for the queries.

    Mean similarity and its deviation, in brackets that of the real features: between visible images of one person 0.51
    and 0.12 (0.53 and 0.13), of different people 0.02 and 0.14 (0.02 and 0.12); between an infrared and a visible image
    of one person 0.16 and 0.09 (0.17 and 0.11), of different people 0.00 and 0.09 (0.00 and 0.08).
    """

    def __init__(self, dimensions: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        latent = min(LATENT, dimensions)
        self.basis = torch.linalg.qr(torch.randn(dimensions, latent, generator=random))[0].T
        self.means = MEAN * torch.nn.functional.normalize(torch.randn(2, latent, generator=random))
        # What one modality does not share with the other lies in other directions.
        self.directions = torch.randperm(latent, generator=random)
        self.scales = [_scales(*part, latent) for part in (SHARED, OWN, IMAGE)]
        self.seed = seed

    def block(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return L2-normalised features of visible images [10000, D] and of an infrared image per person [1000, D]."""
        random = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + number)
        shared = self._draw(random, PEOPLE, self.scales[0])
        visible = self._images(random, shared, IMAGES_PER_PERSON, self.means[0], torch.arange(len(self.directions)))
        return visible, self._images(random, shared, 1, self.means[1], self.directions)

    def _images(
        self, random: torch.Generator, shared: torch.Tensor, count: int, mean: torch.Tensor, directions: torch.Tensor
    ) -> torch.Tensor:
        person = shared + mean + self._draw(random, PEOPLE, self.scales[1])[:, directions]
        quality = torch.exp(SPREAD * torch.randn(PEOPLE * count, 1, generator=random))
        image = quality * self._draw(random, PEOPLE * count, self.scales[2])[:, directions]
        return torch.nn.functional.normalize(person.repeat_interleave(count, 0) + image) @ self.basis

    def _draw(self, random: torch.Generator, count: int, scales: torch.Tensor) -> torch.Tensor:
        return torch.randn(count, len(scales), generator=random) * scales


def _scales(variance: float, offset: float, power: float, count: int) -> torch.Tensor:
    spectrum = (torch.arange(1, count + 1) + offset) ** -power
    return (variance * spectrum / spectrum.sum()).sqrt()


def draw(folder: Path, images: int, dimensions: int, queries: int, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    """Return gallery features [N, D], half precision in a file, and query features [Q, D]; use what the folder has."""
    path = folder / f'{images}x{dimensions}-{seed}.f16'
    query_path = path.with_suffix(f'.{queries}-queries.npy')
    if not (path.exists() and query_path.exists()):
        people, size = People(dimensions, seed), PEOPLE * IMAGES_PER_PERSON
        numbers = range(-(-images // size))
        searching = []
        with whole_file(path) as temporary, open(temporary, 'wb') as file:
            for number in numbers:
                visible, infrared = people.block(number)
                file.write(visible[: images - number * size].half().numpy().tobytes())
                searching.append(infrared[: -(-queries // len(numbers))])
        with whole_file(query_path) as temporary, open(temporary, 'wb') as file:
            np.save(file, torch.cat(searching)[:queries].numpy())
    features = np.memmap(path, np.float16, 'c', shape=(images, dimensions))
    return features, torch.from_numpy(np.load(query_path))


def recall(found: torch.Tensor, right: torch.Tensor) -> float:
    """Return the share of the rows in `right` [Q, K] that are among those found [Q, K]."""
    return (found[:, :, None] == right[:, None]).any(1).float().mean().item()


def rates(search: Callable[[torch.Tensor], Any], queries: torch.Tensor, single: int) -> dict[str, float]:
    """Queries per second one at a time (by the median), and all in one call."""
    search(queries[:1])
    one = statistics.median(seconds(lambda i=i: search(queries[i : i + 1]), CPU) for i in range(single))
    return {'one': 1 / one, 'batch': len(queries) / seconds(lambda: search(queries), CPU)}


def measure(
    features: np.ndarray, queries: torch.Tensor, folder: Path, with_times: bool, seed: int
) -> dict[str, float | None]:
    """Search one gallery exactly and with compressed features."""
    gallery = torch.from_numpy(features)
    start = time.perf_counter()
    compressed.build(features, folder, seed)
    row = {'build_s': time.perf_counter() - start if with_times else None}
    index = compressed.open(folder)

    every_row = torch.arange(len(features))

    def fast(some: torch.Tensor) -> torch.Tensor:
        return index.nearest(some, gallery, TOP, every_row).rows

    def exact(some: torch.Tensor) -> torch.Tensor:
        return exact_search(some, gallery, TOP).rows

    row['recall'] = recall(fast(queries), exact(queries))
    row['bytes_per_image'] = sum(path.stat().st_size for path in folder.iterdir()) / len(features)
    for name, search, single in (('exact', exact, 5), ('compressed', fast, min(200, len(queries)))):
        measured = rates(search, queries, single) if with_times else dict.fromkeys(('one', 'batch'))
        row |= {f'{name}_{way}_per_s': value for way, value in measured.items()}
    return row


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """Markdown; a dash for what was not measured."""
    names = ('exact_one_per_s', 'exact_batch_per_s', 'compressed_one_per_s', 'compressed_batch_per_s', 'build_s')
    lines = [
        '| images | dimensions | exact, 1 query/s | exact, batch/s | compressed, 1 query/s | batch/s | build s '
        '| recall@10 | bytes/image |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for name, row in rows.items():
        cells = [f'{int(part):,}' for part in name.split('x')]
        cells += ['—' if row[key] is None else f'{row[key]:,.3g}' for key in names]
        lines.append(f'| {" | ".join(cells)} | {row["recall"]:.3f} | {row["bytes_per_image"]:.0f} |')
    return '\n'.join(lines)


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, required=True, help='where features are written, and found again')
    parser.add_argument('--images', type=int, nargs='+', default=[10_000, 100_000, 1_000_000])
    parser.add_argument('--dimensions', type=int, nargs='+', default=[704, 2816])
    parser.add_argument('--queries', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--no-times', action='store_true', help='leave out what a busy machine would spoil')
    parser.add_argument('--save', type=Path, help='write the JSON there, too, after every size')
    args = parser.parse_args()
    rows = json.loads(args.save.read_text())['rows'] if args.save and args.save.exists() else {}
    result = {'top': TOP, 'queries': args.queries, 'rows': rows}
    for dimensions in args.dimensions:
        for images in args.images:
            features, queries = draw(args.folder, images, dimensions, args.queries, args.seed)
            folder = args.folder / f'{images}x{dimensions}-{args.seed}.compressed'
            rows[f'{images}x{dimensions}'] = measure(features, queries, folder, not args.no_times, args.seed)
            if args.save:
                save_json(args.save, result)
    publish(result, table(rows), CPU, args.save)


if __name__ == '__main__':
    main()
