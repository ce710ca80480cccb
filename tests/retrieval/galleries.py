"""Small galleries for tests."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vireid_timm.data.listing import ListedImage
from vireid_timm.retrieval.index import About, Index

WIDTH = 8  # of features that no model has made


def write_images(folder: Path, *names: str) -> list[str]:
    """Write noise of its own under each name; return the paths."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(list(os.fsencode(name))).integers(0, 256, (16, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format='PNG')
    return [str(folder / name) for name in names]


def about(**changes: object) -> About:
    values = dict(model=None, weights='w', architecture='a', modality='visible', size=(4, 2), features='after-bn')
    return About(**(values | dict(dimensions=WIDTH, mean=(0.5,) * 3, std=(0.5,) * 3) | changes))


def listed(names: Sequence[str], **columns: Sequence[object]) -> list[ListedImage]:
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())] or [{}] * len(names)
    return [ListedImage(name, size=1, mtime=1, **row) for name, row in zip(names, rows, strict=True)]


def features(count: int, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    """L2-normalised features that half precision holds exactly as they are."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn).half().float()


def made_index(folder: Path, names: Sequence[str], seed: int = 0, **columns: Sequence[object]) -> Index:
    """An index of images that are not there."""
    index = Index.create(folder, about())
    index.append(listed(names, **columns), features(len(names), seed).numpy())
    index.commit()
    return index


def paths_in(index: Index, where: str | None = None) -> list[str]:
    view = index.view(where)
    images = index.images(view, view.rows)
    return [images[row][0] for row in view.rows.tolist()]


def stored(index: Index) -> dict[str, np.ndarray]:
    """Path -> features, as a search would find them."""
    view = index.view()
    images = index.images(view, view.rows)
    return {images[row][0]: np.array(view.features[row]) for row in view.rows.tolist()}
