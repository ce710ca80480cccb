"""What the web demo searches: the user's own indexes, or rendered people; and examples of queries."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..constants import MODALITIES
from ..data.images import read_image
from ..data.readers import create_dataset
from ..retrieval.gallery import Gallery

_logger = logging.getLogger(__name__)

MODEL = 'vireid_dml_r10t.synthvi'
# Rendered people: as many as a small machine renders in seconds, in a world that the weights have not seen.
PEOPLE, IMAGES_PER_MODALITY = 60, 2
WORLD = 2024
SIZE = (256, 128)
EXAMPLES = 8  # of each modality


class Query(NamedTuple):
    """An image to search by.

    Attributes:
        path: Its file.
        modality: Its modality.
        identity: Name of the person, None if unknown.
        is_upload: Whether a visitor has brought it.
    """

    path: str
    modality: str
    identity: str | None = None
    is_upload: bool = False


def other_modality(modality: str) -> str:
    """Return the modality in which images of a modality are searched."""
    return MODALITIES[1 - MODALITIES.index(modality)]


def open_galleries(indexes: Sequence[str | os.PathLike], device: str) -> dict[str, Gallery]:
    """Open indexes, at most one per modality; return them by their modality.

    Raises:
        FileNotFoundError: There is no such index.
        ValueError: Two of them have the same modality, or one is empty or cannot be searched.
    """
    galleries: dict[str, Gallery] = {}
    for index in indexes:
        gallery = Gallery.open(index, device=device)
        if gallery.modality in galleries:
            raise ValueError(
                f'{galleries[gallery.modality].index.folder} and {index} both have {gallery.modality} images; give at '
                'most one index of each modality'
            )
        if not len(gallery):
            raise ValueError(f'the index {index} has no image')
        if gallery.index.pending:
            _logger.warning(f'The index {index} is incomplete: {gallery.index.pending:,} images are still to come')
        galleries[gallery.modality] = gallery
    for gallery in galleries.values():
        gallery.network()  # now, not when somebody searches
    return galleries


def render_galleries(folder: str | os.PathLike, device: str) -> dict[str, Gallery]:
    """Render people into a folder, and index them with the weights in the package; return galleries by modality."""
    options = dict(identities=0, test_identities=PEOPLE, images_per_modality=IMAGES_PER_MODALITY, seed=WORLD, size=SIZE)
    people = create_dataset('synthetic', **options).test
    galleries = {}
    for modality in MODALITIES:
        images = people[people.modality == modality]
        paths = [Path(folder, modality, f'person_{identity}_{row}.png') for row, identity in enumerate(images.identity)]
        paths[0].parent.mkdir()
        for address, path in zip(images.path, paths, strict=True):
            read_image(address).save(path)
        gallery = Gallery.create(Path(folder, f'{modality}_index'), MODEL, modality, device=device)
        gallery.add(paths, cameras=images.camera, identities=images.identity)
        gallery.save()
        galleries[modality] = gallery
    return galleries


def example_queries(galleries: dict[str, Gallery]) -> dict[str, list[Query]]:
    """Return some images of each modality that can be searched by, spread evenly over the gallery of that modality.

    A modality that has no gallery of the other one to search has no entry; one without own gallery has no example.
    """
    examples: dict[str, list[Query]] = {other_modality(modality): [] for modality in galleries}
    for modality, gallery in galleries.items():
        if modality not in examples:
            continue
        view = gallery.index.view()
        count = min(EXAMPLES, len(view.rows))
        rows = view.rows[np.arange(count) * len(view.rows) // count]
        images = gallery.index.images(view, rows)
        for path, _, _, identity in (images[row] for row in rows.tolist()):
            examples[modality].append(Query(path, modality, identity))
    return examples
