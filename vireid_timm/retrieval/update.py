"""Bring an index up to date with a folder or a CSV file; the ranks that `torchrun` started share the work."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import distributed, nn
from tqdm import tqdm

from ..data.findings import Findings
from ..data.listing import ListedImage, list_images
from ..distributed import all_ranks, from_rank_zero, is_rank_zero, rank_and_world_size
from ..evaluation.features import Extraction, embed_batches
from ..files import check_writable
from .compressed import require_faiss
from .gallery import check_same, describe, loaded
from .index import ABOUT, About, Index

_logger = logging.getLogger(__name__)
_Result = TypeVar('_Result')

SAVE_EVERY = 5.0  # seconds after which what is ready is committed: a process that is killed loses no more


class Update(NamedTuple):
    """What an update has done: numbers of images.

    Attributes:
        new: Added.
        changed: Replaced, because their files have changed.
        relabelled: Given another camera, time or identity.
        dropped: Dropped, because they are gone from the gallery.
        unchanged: Left as they were.
        broken: Left out, because they cannot be read; they are among no others.
    """

    new: int
    changed: int
    relabelled: int
    dropped: int
    unchanged: int
    broken: int


def update_index(
    folder: str | os.PathLike,
    source: str | os.PathLike,
    *,
    model: str | Path | None = None,
    modality: str | None = None,
    size: tuple[int, int] | None = None,
    features: str | None = None,
    folders_are_identities: bool | None = None,
    compress: bool | None = None,
    batch_size: int = 128,
    device: torch.device | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Update:
    """Index the images of a folder or a CSV file, or bring their index up to date. Collective.

    Finished images are committed every few seconds, so the same call resumes after an interruption. Images that cannot
    be read are left out, counted and named, and tried again the next time.

    Args:
        folder: The index; it is made if it is not there.
        source: The gallery, see `list_images`.
        model: Any name that `load_model` takes; None for the one that made the index.
        modality: Modality of the gallery; None for that of the index.
        size: Height and width that images are resized to; None for those of the index, or of the model.
        features: `after-bn`, `before-bn` or `auto`, as for `embed`; None for those of the index, or `auto`.
        folders_are_identities: See `list_images`; None for what the index has, or False.
        compress: Compress the features, for a large gallery (docs/large_galleries.md); None for what the index has, or
            False.
        batch_size: Images per forward pass.
        device: Where to compute; None for the CPU.
        workers: Images decoded at once; None for one per core, at most 8.
        progress: Show a progress bar, if the output is a terminal.

    Raises:
        ValueError: The index was made by another model or with other settings, another process writes it, the gallery
            has no image, or none of those in the index.
        FileNotFoundError: There is no such gallery.
        OSError: The index cannot be written.
    """
    extraction = Extraction(
        features=features or 'auto',
        size=size,
        batch_size=batch_size,
        device=device or 'cpu',
        cache='off',
        skip_broken=True,
        workers=workers,
    )
    about = from_rank_zero(_on_rank_zero(lambda: _existing(Path(folder), model, modality)))
    kept = (about.modality, about.size, about.features) if about else (None, None, extraction.features)
    if folders_are_identities is None:
        folders_are_identities = about is not None and about.folders_are_identities and os.path.isdir(source)
    if compress is None:
        compress = about is not None and about.compress
    if compress:
        all_ranks(require_faiss)
    listed = _on_rank_zero(lambda: list_images(source, folders_are_identities=folders_are_identities))
    network, name = all_ranks(lambda: loaded(about.model if model is None else model, extraction.device))
    wanted = describe(network, name, modality or kept[0], extraction.size or kept[1], features or kept[2])
    wanted = replace(wanted, folders_are_identities=folders_are_identities, compress=compress)
    first = from_rank_zero(wanted)
    all_ranks(lambda: _check_agreement(first, wanted))
    extraction = replace(extraction, features=wanted.features, size=wanted.size)
    with ExitStack() as stack:
        index = _on_rank_zero(lambda: stack.enter_context(closing(_opened(Path(folder), wanted))))
        todo, counts = from_rank_zero(_on_rank_zero(lambda: _start(index, wanted, listed)))
        broken = _embed(index, network, todo, extraction, wanted.modality, progress)
        _on_rank_zero(lambda: _finish(index, compress))
    Findings().add('broken-image', 'images cannot be read and are left out', list(broken.values()))
    new = sum(row < counts['new'] for row in broken)  # the new ones come first
    counts = counts | {'new': counts['new'] - new, 'changed': counts['changed'] - (len(broken) - new)}
    return Update(**counts, broken=len(broken))


def _existing(folder: Path, model: str | Path | None, modality: str | None) -> About | None:
    """Return what the index says about itself, None if it has to be made; cheap checks before the work."""
    check_writable(folder, is_folder=True)
    if (folder / ABOUT).exists():
        about = About.load(folder)
        if model is None and about.model is None:
            raise ValueError(f'the index {folder} was made by a model in memory; name its model (--model)')
        return about
    missing = [flag for flag, value in (('--model', model), ('--modality', modality)) if value is None]
    if missing:
        raise ValueError(f'there is no index in {folder} yet, and making one needs {" and ".join(missing)}')
    return None


def _check_agreement(first: About, own: About) -> None:
    if first != own:
        raise ValueError('the ranks have different models; give all of them the same')


def _opened(folder: Path, wanted: About) -> Index:
    if not (folder / ABOUT).exists():
        with suppress(FileExistsError):  # by another process, just now
            return Index.create(folder, wanted)
    index = Index(folder)
    check_same(index, wanted)
    return index


def _start(index: Index, wanted: About, listed: list[ListedImage]) -> tuple[list[ListedImage], dict[str, int]]:
    """Lock the index, drop and correct what is there, and return the images to add, and counts."""
    index.hold()
    index.describe(wanted)
    todo, counts = index.difference(listed)
    index.expect(len(todo))
    index.commit()
    return todo, counts


def _finish(index: Index, compress: bool) -> None:
    index.expect(0)
    index.commit()
    if compress:
        index.compress()
    else:
        index.decompress()


def _embed(
    index: Index | None,
    model: nn.Module,
    todo: list[ListedImage],
    extraction: Extraction,
    modality: str,
    progress: bool,
) -> dict[int, str]:
    """Add the features of images to the index, which only rank 0 has; return row -> why an image cannot be read."""
    number, count = rank_and_world_size()
    own = [row for row in range(len(todo)) if row // extraction.batch_size % count == number]
    broken: dict[int, str] = {}
    done, saved = 0, time.monotonic()
    hidden = None if progress and is_rank_zero() else True  # None shows the bar on a terminal only
    batches = embed_batches(model, [todo[row].path for row in own], modality, extraction)
    with tqdm(total=len(todo), desc='features', unit='img', disable=hidden) as bar, closing(batches):
        while done < len(todo):
            for rows, features, problems in _everyone(all_ranks(lambda: _next(batches, own))):
                _on_rank_zero(partial(_write, index, todo, rows, features, problems))
                broken |= problems
                done += len(rows) + len(problems)
                bar.update(len(rows) + len(problems))
            if is_rank_zero() and time.monotonic() - saved > SAVE_EVERY:
                index.expect(len(todo) - done)
                index.commit()
                saved = time.monotonic()
    return broken


def _next(
    batches: Iterator[tuple[list[int], torch.Tensor, dict[int, str]]], own: list[int]
) -> tuple[list[int], np.ndarray, dict[int, str]]:
    """Compute this rank's next batch: rows of the images, their features, and row -> why another cannot be read."""
    rows, features, problems = next(batches, ([], torch.empty(0), {}))
    return [own[row] for row in rows], features.half().numpy(), {own[row]: text for row, text in problems.items()}


def _write(
    index: Index, todo: list[ListedImage], rows: list[int], features: np.ndarray, problems: dict[int, str]
) -> None:
    """Add a batch; an image that was there before and can no longer be read goes."""
    if rows:
        index.append([todo[row] for row in rows], features)
    index.remove(todo[row].path for row in problems)


def _everyone(part: _Result) -> list[_Result]:
    """Return what the ranks have, in their order. Collective."""
    parts = [part] * rank_and_world_size()[1]
    if len(parts) > 1:
        distributed.all_gather_object(parts, part)
    return parts


def _on_rank_zero(work: Callable[[], _Result]) -> _Result | None:
    """Run `work` on rank 0 alone, and raise on all ranks if it fails. Collective."""
    return all_ranks(lambda: work() if is_rank_zero() else None)
