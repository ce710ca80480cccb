"""Augment whole batches on their device, with a separate draw for each image (paper, sections 3.1 and 4.2).

The draws come from the generator that is passed to a call, or else from the object's own generator, seeded when it was
made. The global random state is neither used nor changed. The draws are a few numbers per image, and they are used on
the CPU to touch only the images that they concern. So pass a CPU generator: it gives the same draws for images on any
device, while a generator on an accelerator makes the CPU wait.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..constants import MODALITIES, PAPER_AUGMENTATIONS, VISIBLE
from ..options import parse_augmentations
from .appearance import (
    draw_rectangles,
    erase_pixels,
    exchange_channels,
    mix_channels,
    scale_regions,
    swap_low_frequencies,
    to_device_of,
    uniform,
)

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601, as in PIL and OpenCV)

# The seven outcomes of random channel combination (paper, section 3.1): the source channels of red, green and blue. The
# seventh is then made gray.
CHANNEL_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (2, 1, 0), (2, 0, 1), (1, 2, 0), (1, 0, 2), (0, 1, 2)])
GRAY_OUTCOME = 6

_VISIBLE_ONLY = {'rcc', 'exchange', 'three_way', 'mrle'}  # the channels of infrared images are equal
_OF_ONE_BATCH = {'exchange': exchange_channels, 'mrle': mix_channels, 'rrle': scale_regions}  # images in 0..1


def _check_images(images: torch.Tensor, floating: bool = True) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f'expected images [B, 3, H, W], got {list(images.shape)}')
    if floating and not images.is_floating_point():
        raise ValueError(f'expected float images, got {images.dtype}; convert 0..255 with images.float() / 255')


def _in_format_of(images: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Return the result in the images' memory format."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return (images − mean) / std per channel, as a new tensor.

    Args:
        images: [B, 3, H, W] float in 0..1.
        mean: Mean of each channel, as in a model's `pretrained_cfg`.
        std: Standard deviation of each channel.

    Returns:
        [B, 3, H, W] of the same type and memory format.
    """
    _check_images(images)
    mean, std = (to_device_of(images, values).view(3, 1, 1) for values in (mean, std))
    return (images - mean).div_(std)


class PadCropFlip:
    """Pad with black, crop to the original size at random, and flip horizontally at random.

    This is AGW's recipe; the paper names crop and flip. Pixels are moved, never resampled.
    """

    def __init__(self, pad: int = 10, flip: float = 0.5, seed: int = 0) -> None:
        """Set the range of the draws.

        Args:
            pad: Width of the border on every side, in pixels.
            flip: Probability of a flip.
            seed: Seed of the draws of calls without a generator.

        Raises:
            ValueError: On a negative border or a probability outside 0..1.
        """
        if pad < 0 or not 0 <= flip <= 1:
            raise ValueError(f'expected pad >= 0 and 0 <= flip <= 1, got pad={pad} and flip={flip}')
        self.pad = pad
        self.flip = flip
        self._padded: torch.Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Crop and flip a batch.

        Args:
            images: [B, 3, H, W] of any type, not normalised (black is 0).
            generator: Source of the draws; None for the object's own.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_images(images, floating=False)
        cuts = self._draw(len(images), generator or self.generator)
        return _in_format_of(images, self._cut(images, cuts))

    def _draw(self, batch: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the first row and column of each crop in the padded image, and whether it is mirrored; [B] each."""
        top, left, mirrored = uniform((3, batch), generator)
        positions = 2 * self.pad + 1
        return (top * positions).astype(np.int64), (left * positions).astype(np.int64), mirrored < self.flip

    def _cut(
        self,
        images: torch.Tensor,
        cuts: tuple[np.ndarray, np.ndarray, np.ndarray],
        orders: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Crop and flip images [B, 3, H, W], and reorder their channels [B, 3] in the same pass; contiguous."""
        batch, channels, height, width = images.shape
        if not batch:
            return images.clone()
        top, left, mirrored = cuts
        pad = self.pad
        # Memory for every padded image and its mirror image. The rows of a crop are runs of W pixels in it: `unfold`
        # views all such (overlapping) runs, and one gather copies whole rows.
        padded = self._blank((2, batch, channels, height + 2 * pad, width + 2 * pad), images)
        inside = padded[..., pad : pad + height, pad : pad + width]
        inside[0], inside[1] = images, images.flip(3)
        planes = (mirrored * batch + np.arange(batch))[:, None] * channels
        planes = planes + (np.arange(channels) if orders is None else orders)  # [B, 3]
        starts = (planes * padded.shape[3] + top[:, None]) * padded.shape[4] + left[:, None]
        rows = torch.arange(height, device=images.device) * padded.shape[4]
        index = to_device_of(images, starts)[:, :, None] + rows  # [B, 3, H]
        return padded.flatten().unfold(0, width, 1).index_select(0, index.flatten()).view(images.shape)

    def _blank(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Return memory with a black border; that of the last batch if it fits, since its border is still black."""
        padded = self._padded
        if padded is None or (padded.shape, padded.dtype, padded.device) != (shape, like.dtype, like.device):
            self._padded = like.new_zeros(shape)
        return self._padded


class RandomChannelCombination:
    """Random channel combination (RCC; paper, section 3.1): one of seven equally likely outcomes for each image.

    The outcomes are the six orders of the channels, and grayscale. It is for visible images only, before normalisation:
    after it, a new order would also change the scale of each channel.
    """

    def __init__(self, probability: float = 1.0, seed: int = 0) -> None:
        """Set the range of the draws.

        Args:
            probability: Probability of a draw of one of the seven, for each image.
            seed: Seed of the draws of calls without a generator.

        Raises:
            ValueError: On a probability outside 0..1.
        """
        if not 0 <= probability <= 1:
            raise ValueError(f'expected a probability of channel combination in 0..1, got {probability}')
        self.probability = probability
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw an outcome for every image and apply it.

        Args:
            images: [B, 3, H, W] float, channels in the order R, G, B, not normalised.
            generator: Source of the draws; None for the object's own.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_images(images)
        outcomes = self._draw(len(images), generator or self.generator)
        planes = np.arange(len(images))[:, None] * 3 + CHANNEL_ORDERS[outcomes]
        mixed = images.flatten(0, 1).index_select(0, to_device_of(images, planes.flatten())).view(images.shape)
        self._gray(mixed, outcomes)
        return _in_format_of(images, mixed)

    def _draw(self, batch: int, generator: torch.Generator) -> np.ndarray:
        outcomes = (uniform((batch,), generator) * len(CHANNEL_ORDERS)).astype(np.int64)
        if self.probability < 1:
            outcomes[uniform((batch,), generator) >= self.probability] = 0
        return outcomes

    def _gray(self, images: torch.Tensor, outcomes: np.ndarray) -> None:
        """Convert the images [B, 3, H, W] with the gray outcome to grayscale, in place."""
        for row in np.flatnonzero(outcomes == GRAY_OUTCOME).tolist():
            red, green, blue = images[row]
            gray = red * GRAY_WEIGHTS[0]
            images[row] = gray.add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])


class ChannelRandomErasing:
    """Channel random erasing (CRE; paper, sections 2.2 and 4.2, after CAJ, ICCV 2021): one rectangle per image.

    It is for both modalities, after normalisation. The paper replaces the rectangle's pixels "with random values from
    all three channels": each channel gets one value, drawn from the standard normal distribution, which is that of
    normalised images (timm's erasing mode `rand`). CAJ uses fixed values instead; pass them as `fill`.
    """

    # Differs from CAJ: draws ten candidate rectangles per image at once and uses the first that is strictly smaller
    # than the image, instead of up to 100 attempts one by one. At 288×144 about one candidate in twenty does not fit,
    # so all ten fail for less than one in 10^12 images. Such an image is not erased.

    def __init__(
        self,
        probability: float = 0.5,
        area: tuple[float, float] = (0.02, 0.4),
        aspect: tuple[float, float] = (0.3, 3.33),
        fill: str | Sequence[float] = 'random',
        seed: int = 0,
    ) -> None:
        """Set the range of the draws.

        Args:
            probability: Probability of erasing, for each image.
            area: Smallest and largest share of the image; uniform.
            aspect: Smallest and largest height / width of the rectangle; uniform.
            fill: `random`, or one value per channel in normalised units.
            seed: Seed of the draws of calls without a generator.

        Raises:
            ValueError: On a value out of range.
        """
        if not 0 <= probability <= 1:
            raise ValueError(f'expected an erasing probability in 0..1, got {probability}')
        if not 0 < area[0] <= area[1] <= 1 or not 0 < aspect[0] <= aspect[1]:
            raise ValueError(
                f'expected 0 < smallest <= largest, and an area of at most 1, got area={area} and aspect={aspect}'
            )
        if fill != 'random' and (isinstance(fill, str) or len(fill) != 3):
            raise ValueError(f"expected fill='random' or one value for each of the three channels, got {fill!r}")
        self.probability = probability
        self.area = area
        self.aspect = aspect
        self.fill = fill
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Erase a rectangle in each of some images.

        Args:
            images: [B, 3, H, W] float, normalised.
            generator: Source of the draws; None for the object's own.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_images(images)
        erased = images.clone()
        self._erase(erased, *self._draw(images.shape, generator or self.generator))
        return erased

    def _draw(self, shape: torch.Size, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the images to erase in [E], their rectangles' top, bottom, left, right [E, 4], and fills [E, 3]."""
        batch, _, height, width = shape
        chosen = uniform((batch,), generator) < self.probability
        edges, fits = draw_rectangles(batch, (height, width), self.area, self.aspect, generator)
        if self.fill == 'random':
            fill = torch.randn((batch, 3), generator=generator, device=generator.device).cpu().numpy()
        else:
            fill = np.broadcast_to(np.float32(self.fill), (batch, 3))
        erased = np.flatnonzero(chosen & fits.any(axis=1))
        return erased, edges[erased, fits[erased].argmax(axis=1)], fill[erased]

    def _erase(self, images: torch.Tensor, erased: np.ndarray, edges: np.ndarray, fill: np.ndarray) -> None:
        """Erase rectangles in images [B, 3, H, W], in place."""
        # One by one: a mask would be a pass over the whole batch, and on a CPU the most expensive one.
        fills = to_device_of(images, fill)[:, :, None, None].unbind()
        for row, (top, bottom, left, right), value in zip(erased.tolist(), edges.tolist(), fills, strict=True):
            images[row, :, top:bottom, left:right] = value


class Augment:
    """Training augmentation of one modality (paper, sections 3.1 and 4.2), from stored images to network input.

    The steps are pad, crop and flip; what changes the look of images in 0..1; normalisation; erasing.
    """

    def __init__(
        self,
        modality: str,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int = 10,
        flip: float = 0.5,
        augmentations: Sequence[str] = PAPER_AUGMENTATIONS,
        cre_fill: str | Sequence[float] = 'random',
        seed: int = 0,
    ) -> None:
        """Compose the steps.

        Args:
            modality: `visible` or `infrared`.
            mean: Mean of each channel, from the model's `pretrained_cfg`.
            std: Standard deviation of each channel.
            pad: Border of the random crop, in pixels.
            flip: Probability of a horizontal flip.
            augmentations: Names from `constants.AUGMENTATIONS`, each alone or as `name=probability`; by default the
                paper's. What exchanges or mixes channels leaves infrared images alone: their channels are equal.
            cre_fill: Of channel random erasing: `random`, or one value per channel in normalised units.
            seed: Seed of the draws of calls without a generator.

        Raises:
            ValueError: On an unknown modality or augmentation, or a value out of range.
        """
        if modality not in MODALITIES:
            raise ValueError(f'unknown modality {modality!r}; expected one of {", ".join(MODALITIES)}')
        self.modality = modality
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.crop = PadCropFlip(pad, flip)
        skipped = () if modality == VISIBLE else _VISIBLE_ONLY
        chosen = {name: value for name, value in parse_augmentations(augmentations).items() if name not in skipped}
        self.copies = 2 if 'three_way' in chosen else 1
        self.combination = RandomChannelCombination(chosen['rcc']) if 'rcc' in chosen else None
        self.looks = {name: chosen[name] for name in ('rfa', 'exchange', 'three_way', 'mrle', 'rrle') if name in chosen}
        self.erasing = ChannelRandomErasing(chosen['cre'], fill=cre_fill) if 'cre' in chosen else None
        self.pixel_erasing = chosen.get('erasing', 0.0)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        images: torch.Tensor,
        generator: torch.Generator | None = None,
        others: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Turn stored images into network input.

        Args:
            images: [B, 3, H, W] uint8, as stored.
            generator: Source of the draws; None for the object's own.
            others: Stored images of the other modality, [N, 3, H, W] uint8; only `rfa` needs them.

        Returns:
            [B, 3, H, W] float32, normalised, in the standard memory format. With `three_way` [2 B, 3, H, W]: the second
            copies, with their channels exchanged, follow the first.

        Raises:
            ValueError: If this is not a batch of uint8 images, or `others` are missing.
        """
        _check_images(images, floating=False)
        if images.dtype != torch.uint8:
            raise ValueError(f'expected uint8 images, as an image store returns them, got {images.dtype}')
        generator = generator or self.generator
        if self.copies > 1:
            images = torch.cat([images] * self.copies)
        cuts = self.crop._draw(len(images), generator)
        outcomes = orders = None
        if self.combination is not None:
            outcomes = self.combination._draw(len(images), generator)
            orders = CHANNEL_ORDERS[outcomes]
        # Pixels move as uint8, a quarter of the bytes of float32; the later steps change one float tensor in place.
        augmented = self.crop._cut(images, cuts, orders).float()
        if outcomes is not None:
            self.combination._gray(augmented, outcomes)
        largest = 255
        if self.looks and len(images):
            self._change_looks(augmented.div_(255), generator, others)
            largest = 1
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            plane = augmented[:, channel]
            torch.add(plane.new_full((), -mean / std), plane, alpha=1 / (largest * std), out=plane)  # in one pass
        if self.erasing is not None:
            self.erasing._erase(augmented, *self.erasing._draw(augmented.shape, generator))
        if self.pixel_erasing:
            erase_pixels(augmented, generator, self.pixel_erasing)
        return augmented

    def _change_looks(self, images: torch.Tensor, generator: torch.Generator, others: torch.Tensor | None) -> None:
        """Apply what needs images in 0..1, in place."""
        for name, probability in self.looks.items():
            if name == 'rfa':
                if others is None or not len(others):
                    raise ValueError("the augmentation 'rfa' needs images of the other modality: pass others=")
                swap_low_frequencies(images, others, generator, probability)
            elif name == 'three_way':
                exchange_channels(images[len(images) // 2 :], generator, probability)
            else:
                _OF_ONE_BATCH[name](images, generator, probability)
