"""From a run's settings to augmented batches on the training device."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from timm.data import resolve_model_data_config

from ..constants import INFRARED, VISIBLE
from ..data.augment import Augment
from ..data.readers import create_dataset, split_identities
from ..data.records import Dataset, Records, class_map_of
from ..data.sampler import IdentityModalitySampler
from ..data.store import ImageStore, image_store
from ..data.workers import in_order
from ..distributed import process
from .config import TrainConfig


@dataclass
class TrainData:
    """The images of a run.

    Attributes:
        dataset: As read.
        records: Images to train on, those that can be read.
        store: Bytes of the images to train on; its intact rows are the rows of `records`.
        labels: Class label per row of `records`, [N] long; -1 for identities that batches skip.
        class_map: Identity name -> class label.
        sampler: Batches of rows of `records`.
        validation: Held-out identities as a dataset of their own; None if there are none.
        validation_store: Bytes of their images; with `store`, a part of one store of all training images.
    """

    dataset: Dataset
    records: Records
    store: ImageStore
    labels: torch.Tensor
    class_map: dict[str, int]
    sampler: IdentityModalitySampler
    validation: Dataset | None
    validation_store: ImageStore


class Batch(NamedTuple):
    """What the network sees at one step.

    Attributes:
        step: Number of the batch in its epoch, from 0.
        inputs: (visible, infrared), [B, 3, H, W] each.
        labels: Class labels of the visible, then of the infrared images, [2 B] long.
        rows: Rows of `TrainData.records` in the same order, [2 B].
    """

    step: int
    inputs: tuple[torch.Tensor, torch.Tensor]
    labels: torch.Tensor
    rows: list[int]


def load_data(config: TrainConfig, size: tuple[int, int, int], device: torch.device) -> TrainData:
    """Read the records, hold out validation identities, decode the images and set up the batches.

    Args:
        config: The run's settings.
        size: Channels, height and width of the network's input.
        device: Where batches will be wanted.

    Raises:
        ValueError: Data that cannot be trained on.
        OSError: The image store cannot be written.
    """
    rank, world_size = process()
    dataset = create_dataset(config.dataset, config.data_dir or None, **config.dataset_kwargs)
    records, held_out = split_identities(dataset.train, config.val_share, config.seed)
    validation = Dataset('validation', dataset.root, records, held_out) if len(held_out) else None
    # One store for every --seed and --val-share: those that are held out from one are trained on with another.
    stored = image_store(
        dataset.train,
        size[1:],
        cache=config.cache,
        device=device,
        skip_broken=config.skip_broken,
        workers=config.workers,
    )
    is_held_out = np.isin(dataset.train.identity, held_out.identities())
    store, held_out_store = (stored.select(np.flatnonzero(rows)) for rows in (~is_held_out, is_held_out))
    sampled = records[store.intact()]
    sampler = IdentityModalitySampler(
        sampled.identity,
        sampled.modality,
        identities_per_batch=config.identities_per_batch,
        images_per_modality=config.images_per_modality,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )
    class_map = class_map_of(sampled[~np.isin(sampled.identity, sampler.skipped)])
    labels = torch.tensor([class_map.get(name, -1) for name in sampled.identity.tolist()])
    return TrainData(dataset, sampled, store, labels, class_map, sampler, validation, held_out_store)


def step_seed(seed: int, epoch: int, step: int, rank: int, stream: int = 0) -> int:
    """Seed of all that is drawn at random for one batch, so that no batch depends on those before it.

    Args:
        seed: Of the run.
        epoch: From 0.
        step: The batch's number in the epoch, from 0.
        rank: Number of the process.
        stream: 0 for what the network draws (dropout), 1 for augmentation; they have no number in common.

    Returns:
        An integer of 32 bits.
    """
    return int(np.random.SeedSequence((seed, epoch, step, rank, stream)).generate_state(1)[0])


def batches(
    data: TrainData,
    augments: dict[str, Augment],
    device: torch.device,
    *,
    epoch: int,
    first_step: int = 0,
    seed: int,
) -> Iterator[Batch]:
    """Augmented batches of one epoch, those of this process.

    They follow from (seed, epoch, step, rank) alone, so that any of them can be made again. Images are read ahead in
    the background; to end that with the loop rather than with the garbage collector, close the generator
    (`contextlib.closing`).

    Args:
        data: The images and the order in which they come; the sampler is set to this epoch and step.
        augments: Of each modality.
        device: Where batches are augmented and given out.
        epoch: From 0.
        first_step: Batches of this epoch that are already done.
        seed: Of augmentation; the sampler has its own.

    Yields:
        The batches from `first_step` to the end of the epoch.

    Raises:
        ImageError: An image that cannot be read, where images are decoded on access.
        OSError: The image store is gone or damaged.
    """
    data.sampler.set_epoch(epoch, first_step)
    generator = torch.Generator()  # on the CPU: nothing waits for what is drawn, whatever the device
    with closing(_images_ahead(data, device)) as images_ahead:
        for step, (rows, images) in enumerate(images_ahead, first_step):
            generator.manual_seed(step_seed(seed, epoch, step, data.sampler.rank, stream=1))
            visible, infrared = images.to(device, non_blocking=True).chunk(2)
            inputs = (augments[VISIBLE](visible, generator), augments[INFRARED](infrared, generator))
            yield Batch(step, inputs, data.labels[rows].to(device, non_blocking=True), rows)


def _images_ahead(data: TrainData, device: torch.device) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Rows and stored images [B, 3, H, W] of the sampler's batches, read while earlier ones are used."""
    store, intact = data.store, data.store.intact()

    def read(rows: list[int]) -> tuple[list[int], torch.Tensor]:
        images = store[intact[rows]]
        if device.type != 'cuda':
            return rows, images
        with torch.cuda.device(device):  # a thread starts on the first GPU, whatever this process computes on
            return rows, images.pin_memory()

    if store.held is None:
        yield from in_order(read, data.sampler, workers=2)
    else:  # nothing to read: the device gathers its own
        for rows in data.sampler:
            yield rows, store.take_held(intact[rows])


def create_augments(config: TrainConfig, model: nn.Module) -> dict[str, Augment]:
    """The training augmentation of each modality, with the model's own normalisation."""
    data_config = resolve_model_data_config(model)
    return {
        modality: Augment(
            modality,
            data_config['mean'],
            data_config['std'],
            pad=config.pad,
            flip=config.hflip,
            channel_combination=config.channel_combination,
            erasing_probability=config.reprob,
            erasing_fill='random' if config.erasing_fill is None else config.erasing_fill,
        )
        for modality in (VISIBLE, INFRARED)
    }
