"""The images of a batch whose loss is not finite, for looking at."""

from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from ..constants import INFRARED, VISIBLE
from ..data.augment import Augment
from ..distributed import process
from ..files import save_json, whole_folder
from .batches import batches
from .run import Run


def save_batch(run: Run, epoch: int, step: int) -> Path:
    """Make a batch of this process again and save what the network saw of it.

    Args:
        run: The run.
        epoch: From 0.
        step: The batch's number in the epoch, from 0.

    Returns:
        A folder in the run's, among several processes with the number of this one: each image as it came out of the
        augmentation, normalisation undone, and `batch.json` with what each one is.

    Raises:
        OSError: It cannot be written.
    """
    with closing(
        batches(run.data, run.augments, run.device, epoch=epoch, first_step=step, seed=run.config.seed)
    ) as drawn:
        batch = next(drawn)
    rank, world_size = process()
    suffix = f'-process{rank}' if world_size > 1 else ''
    folder = run.folder / f'nan-epoch{epoch}-step{step}{suffix}'
    with whole_folder(folder) as temporary:
        about = []
        for modality, images in zip((VISIBLE, INFRARED), batch.inputs, strict=True):
            for image in _denormalized(images, run.augments[modality]):
                row, label = batch.rows[len(about)], batch.labels[len(about)].item()
                name = f'{len(about):03d}-{modality}.png'
                Image.fromarray(image.numpy()).save(temporary / name)
                record = {'identity': str(run.data.records.identity[row]), 'path': str(run.data.records.path[row])}
                about.append({'file': name, **record, 'modality': modality, 'label': label})
        save_json(temporary / 'batch.json', about)
    return folder


def _denormalized(images: torch.Tensor, augment: Augment) -> torch.Tensor:
    """Network input [B, 3, H, W] as bytes [B, H, W, 3] on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.mean, augment.std))
    values = images.cpu().float() * std + mean
    return values.nan_to_num(0).mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
