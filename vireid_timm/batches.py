"""From a run's settings to augmented batches on the training device."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from timm.data import resolve_model_data_config

from .augment import Augment
from .config import TrainConfig
from .datasets import create_dataset, split_identities
from .pictures import PictureStore, picture_store
from .records import INFRARED, VISIBLE, Dataset, Records, class_map_of
from .sampler import IdentityModalitySampler


@dataclass
class TrainData:
    """The pictures of a run.

    Attributes:
        dataset: As read.
        records: Pictures to train on.
        store: Their bytes.
        labels: Class label per row of `records`, [N] long; -1 for identities that batches skip.
        class_map: Identity name -> class label.
        sampler: Batches of rows of `records`.
        validation: Held-out identities as a dataset of their own; None if there are none.
    """

    dataset: Dataset
    records: Records
    store: PictureStore
    labels: torch.Tensor
    class_map: dict[str, int]
    sampler: IdentityModalitySampler
    validation: Dataset | None


def load_data(config: TrainConfig, size: tuple[int, int, int]) -> TrainData:
    """Read the records, hold out validation identities, decode the pictures and set up the batches.

    Args:
        config: The run's settings.
        size: Channels, height and width of the network's input.

    Raises:
        ValueError: Data that cannot be trained on.
    """
    dataset = create_dataset(config.dataset, config.data_dir or None, **config.dataset_kwargs)
    records, held_out = split_identities(dataset.train, config.val_share, config.seed)
    validation = Dataset('validation', dataset.root, records, held_out) if len(held_out) else None
    store = picture_store(records, size[1:], cache=config.cache, skip_broken=config.skip_broken, workers=config.workers)
    sampled = records[store.intact()]
    sampler = IdentityModalitySampler(
        sampled.identity,
        sampled.modality,
        identities_per_batch=config.identities_per_batch,
        pictures_per_modality=config.pictures_per_modality,
        seed=config.seed,
    )
    class_map = class_map_of(sampled[~np.isin(sampled.identity, sampler.skipped)])
    labels = torch.tensor([class_map.get(name, -1) for name in sampled.identity.tolist()])
    return TrainData(dataset, sampled, store, labels, class_map, sampler, validation)


def batches(
    data: TrainData,
    augments: dict[str, Augment],
    device: torch.device,
    generator: torch.Generator,
) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, list[int]]]:
    """Augmented batches of the sampler's current epoch.

    Yields:
        (visible [B, 3, H, W], infrared [B, 3, H, W]), labels of both [2 B], rows of `data.records` [2 B].
    """
    intact = data.store.intact()
    for rows in data.sampler:
        pictures = torch.from_numpy(data.store[intact[rows]]).to(device, non_blocking=True)
        visible, infrared = pictures.chunk(2)
        inputs = (augments[VISIBLE](visible, generator), augments[INFRARED](infrared, generator))
        yield inputs, data.labels[torch.as_tensor(rows)].to(device, non_blocking=True), rows


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
