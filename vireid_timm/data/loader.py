"""From stored images to augmented batches on the training device."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch

from ..constants import INFRARED, VISIBLE
from .augment import Augment
from .sampler import IdentityModalitySampler
from .store import ImageStore
from .workers import in_order


class Batch(NamedTuple):
    """What the network sees at one step.

    Attributes:
        step: Number of the batch in its epoch, from 0.
        inputs: (visible, infrared), [B, 3, H, W] each; with the augmentation `three_way` [2 B, 3, H, W] visible ones.
        labels: Class labels of the visible images, then of the infrared ones, [N] long.
        rows: Rows of the store in the same order, [N].
    """

    step: int
    inputs: tuple[torch.Tensor, torch.Tensor]
    labels: torch.Tensor
    rows: list[int]


def load_batches(
    store: ImageStore,
    labels: torch.Tensor,
    sampler: IdentityModalitySampler,
    augments: Mapping[str, Augment],
    device: torch.device,
    *,
    epoch: int,
    first_step: int = 0,
    seed: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's augmented batches of one epoch, from `first_step` on.

    A batch follows from (seed, epoch, step, rank) alone, so that any of them can be made again. Threads read images
    ahead; close the generator (`contextlib.closing`) to end them with the loop.

    Args:
        store: The images; its rows are those that the sampler yields.
        labels: Class label of each row, [N] long.
        sampler: Which rows make a batch; it is set to this epoch and step.
        augments: Augmentation of each modality.
        device: Where batches are augmented and returned.
        epoch: From 0.
        first_step: Number of batches of this epoch that are done already.
        seed: Of the augmentation; the sampler has its own.

    Raises:
        ImageError: An image that cannot be read, where images are decoded on access.
        OSError: The image store is gone or damaged.
    """
    sampler.set_epoch(epoch, first_step)
    generator = torch.Generator()  # on the CPU: nothing waits for what is drawn, whatever the device
    with closing(_images_ahead(store, sampler, device)) as images_ahead:
        for step, (rows, images) in enumerate(images_ahead, first_step):
            generator.manual_seed(step_seed(seed, epoch, step, sampler.rank, stream=1))
            visible, infrared = images.to(device, non_blocking=True).chunk(2)
            inputs = (
                augments[VISIBLE](visible, generator, infrared),
                augments[INFRARED](infrared, generator, visible),
            )
            rows = rows[: len(visible)] * augments[VISIBLE].copies + rows[len(visible) :]
            yield Batch(step, inputs, labels[rows].to(device, non_blocking=True), rows)


def step_seed(seed: int, epoch: int, step: int, rank: int, stream: int = 0) -> int:
    """Return the seed of everything random in one batch, so that no batch depends on those before it.

    Args:
        seed: Of the run.
        epoch: From 0.
        step: The batch's number in the epoch, from 0.
        rank: This process's rank.
        stream: 0 for what the network draws (dropout), 1 for augmentation.

    Returns:
        An integer of 32 bits.
    """
    return int(np.random.SeedSequence((seed, epoch, step, rank, stream)).generate_state(1)[0])


def _images_ahead(
    store: ImageStore,
    sampler: IdentityModalitySampler,
    device: torch.device,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the rows and the stored images [B, 3, H, W] of the sampler's batches, read while earlier ones are used."""

    def read(rows: list[int]) -> tuple[list[int], torch.Tensor]:
        images = store[rows]
        if device.type != 'cuda':
            return rows, images
        with torch.cuda.device(device):  # a thread starts on the first GPU, whatever this process uses
            return rows, images.pin_memory()

    if store.held is None:
        yield from in_order(read, sampler, workers=2)
    else:  # nothing to read: the device gathers its own
        for rows in sampler:
            yield rows, store.take_held(np.asarray(rows))
