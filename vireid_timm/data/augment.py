"""Augmentation of whole batches on the device that holds them, each image its own draw (paper, sections 3.1 and 4.2).

Randomness comes from the generator that a call is given. Without one, each object has its own generator, seeded when
it was made; the global random state is neither read nor advanced. What was drawn is a few numbers per image. They
are used on the CPU, so that only the images that an outcome concerns are touched: a generator should live there (one
on an accelerator is waited for), and then makes the same draws whatever the device of the images.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..constants import MODALITIES, VISIBLE

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601, as PIL's and OpenCV's grayscale)

# The seven outcomes of the random combination of channels (paper, section 3.1): which channel becomes red, green and
# blue. The seventh is made gray after this.
CHANNEL_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (2, 1, 0), (2, 0, 1), (1, 2, 0), (1, 0, 2), (0, 1, 2)])
GRAY_OUTCOME = 6

_ERASING_CANDIDATES = 10  # rectangles drawn per image; the first that fits is used


def _uniform(shape: Sequence[int], generator: torch.Generator) -> np.ndarray:
    """Uniform draws in [0, 1) from a generator on any device, float32."""
    return torch.rand(shape, generator=generator, device=generator.device).cpu().numpy()


def _beside(values: np.ndarray | Sequence[float], images: torch.Tensor) -> torch.Tensor:
    """Numbers on the device of the images, without waiting for it: integers as they are, others in their type."""
    values = torch.as_tensor(values)
    if values.is_floating_point():
        values = values.to(images.dtype)
    return values.to(images.device, non_blocking=True)


def _check_images(images: torch.Tensor, floating: bool = True) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f'images [B, 3, H, W] expected, got {list(images.shape)}')
    if floating and not images.is_floating_point():
        raise ValueError(f'float images expected, got {images.dtype}; convert 0..255 with images.float() / 255')


def _like_format(result: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The result in the memory format of the images."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(images − mean) / std per channel, as a new tensor.

    Args:
        images: [B, 3, H, W] float in 0..1.
        mean: Per channel, as in a model's `pretrained_cfg`.
        std: Per channel.

    Returns:
        [B, 3, H, W] of the same type and memory format.
    """
    _check_images(images)
    mean, std = (_beside(values, images).view(3, 1, 1) for values in (mean, std))
    return (images - mean).div_(std)


class PadCropFlip:
    """Black border, random crop back to the size, random horizontal flip (AGW's recipe; the paper names crop and flip).

    Pixels are moved, never resampled.
    """

    def __init__(self, pad: int = 10, flip: float = 0.5, seed: int = 0) -> None:
        """Set the range of the draws.

        Args:
            pad: Width of the border on every side, in pixels.
            flip: Probability of the flip.
            seed: For calls without a generator.

        Raises:
            ValueError: A negative border or a probability outside 0..1.
        """
        if pad < 0 or not 0 <= flip <= 1:
            raise ValueError(f'pad >= 0 and 0 <= flip <= 1 expected, got pad={pad} and flip={flip}')
        self.pad = pad
        self.flip = flip
        self._padded: torch.Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Crop and flip a batch.

        Args:
            images: [B, 3, H, W] of any type, not normalised (the border is 0).
            generator: Where the draws come from.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_images(images, floating=False)
        cuts = self._draw(len(images), generator or self.generator)
        return _like_format(self._cut(images, cuts), images)

    def _draw(self, batch: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First row and column of each crop in the padded image, whether it is mirrored; [B] each."""
        top, left, mirrored = _uniform((3, batch), generator)
        positions = 2 * self.pad + 1
        return (top * positions).astype(np.int64), (left * positions).astype(np.int64), mirrored < self.flip

    def _cut(
        self,
        images: torch.Tensor,
        cuts: tuple[np.ndarray, np.ndarray, np.ndarray],
        orders: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Crop and flip [B, 3, H, W], at once putting the channels of each image in an order [B, 3]; contiguous."""
        batch, channels, height, width = images.shape
        if not batch:
            return images.clone()
        top, left, mirrored = cuts
        pad = self.pad
        # Every image padded as it is, and once more mirrored. Of all runs of W pixels in this memory, which overlap,
        # the rows of the crops are then gathered whole.
        padded = self._blank((2, batch, channels, height + 2 * pad, width + 2 * pad), images)
        inside = padded[..., pad : pad + height, pad : pad + width]
        inside[0], inside[1] = images, images.flip(3)
        planes = (mirrored * batch + np.arange(batch))[:, None] * channels
        planes = planes + (np.arange(channels) if orders is None else orders)  # [B, 3]
        starts = (planes * padded.shape[3] + top[:, None]) * padded.shape[4] + left[:, None]
        rows = torch.arange(height, device=images.device) * padded.shape[4]
        index = _beside(starts, images)[:, :, None] + rows  # [B, 3, H]
        return padded.flatten().unfold(0, width, 1).index_select(0, index.flatten()).view(images.shape)

    def _blank(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Memory with a black border; that of the last batch if it fits, whose border is still black."""
        padded = self._padded
        if padded is None or (padded.shape, padded.dtype, padded.device) != (shape, like.dtype, like.device):
            self._padded = like.new_zeros(shape)
        return self._padded


class RandomChannelCombination:
    """Random combination of channels (RCC; paper, section 3.1): one of seven outcomes, equally likely.

    The six orders of the channels and the grayscale image. For visible images only, and before normalisation:
    after it, a reordering would also change each channel's scale.
    """

    def __init__(self, seed: int = 0) -> None:
        """Seed the draws of calls without a generator.

        Args:
            seed: For calls without a generator.
        """
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw an outcome for every image and apply it.

        Args:
            images: [B, 3, H, W] float, channels in the order R, G, B, not normalised.
            generator: Where the draws come from.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_images(images)
        outcomes = self._draw(len(images), generator or self.generator)
        planes = np.arange(len(images))[:, None] * 3 + CHANNEL_ORDERS[outcomes]
        mixed = images.flatten(0, 1).index_select(0, _beside(planes.flatten(), images)).view(images.shape)
        self._gray(mixed, outcomes)
        return _like_format(mixed, images)

    def _draw(self, batch: int, generator: torch.Generator) -> np.ndarray:
        return (_uniform((batch,), generator) * len(CHANNEL_ORDERS)).astype(np.int64)

    def _gray(self, images: torch.Tensor, outcomes: np.ndarray) -> None:
        """Make gray, in place, the images [B, 3, H, W] whose outcome says so."""
        for row in np.flatnonzero(outcomes == GRAY_OUTCOME).tolist():
            red, green, blue = images[row]
            gray = red * GRAY_WEIGHTS[0]
            images[row] = gray.add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])


class ChannelRandomErasing:
    """Channel random erasing (CRE; paper, sections 2.2 and 4.2, after CAJ, ICCV 2021): one rectangle per image.

    For both modalities, after normalisation. The paper replaces the rectangle's pixels "with random values from all
    three channels": each channel gets one value of its own, drawn from a standard normal distribution, which is that of
    normalised images (timm's erasing mode `rand`). CAJ fills with fixed values instead; pass them as `fill`.
    """

    # Differs from CAJ: ten candidate rectangles per image are drawn at once and the first that is strictly smaller
    # than the image is used, instead of up to 100 attempts one by one. At 288×144 about one candidate in twenty does
    # not fit, so that all ten fail less than once in 10^12 images; such an image stays as it is.

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
            probability: Of erasing, for each image.
            area: Least and greatest share of the image, uniform.
            aspect: Least and greatest height / width of the rectangle, uniform.
            fill: `random`, or one value per channel in normalised units.
            seed: For calls without a generator.

        Raises:
            ValueError: A value outside its range.
        """
        if not 0 <= probability <= 1:
            raise ValueError(f'an erasing probability in 0..1 expected, got {probability}')
        if not 0 < area[0] <= area[1] <= 1 or not 0 < aspect[0] <= aspect[1]:
            raise ValueError(
                f'0 < least <= greatest expected, and an area of at most 1; got area={area} and aspect={aspect}'
            )
        if fill != 'random' and (isinstance(fill, str) or len(fill) != 3):
            raise ValueError(f"fill='random' or one value for each of the three channels expected, got {fill!r}")
        self.probability = probability
        self.area = area
        self.aspect = aspect
        self.fill = fill
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Erase in a batch.

        Args:
            images: [B, 3, H, W] float, normalised.
            generator: Where the draws come from.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_images(images)
        erased = images.clone()
        self._erase(erased, *self._draw(images.shape, generator or self.generator))
        return erased

    def _draw(self, shape: torch.Size, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which images, [E]; top, bottom, left and right of each one's rectangle, [E, 4]; its fill, [E, 3]."""
        batch, _, height, width = shape
        chosen = _uniform((batch,), generator) < self.probability
        area, aspect, top, left = _uniform((4, batch, _ERASING_CANDIDATES), generator)
        if self.fill == 'random':
            fill = torch.randn((batch, 3), generator=generator, device=generator.device).cpu().numpy()
        else:
            fill = np.broadcast_to(np.float32(self.fill), (batch, 3))
        area = (self.area[0] + area * (self.area[1] - self.area[0])) * (height * width)
        aspect = self.aspect[0] + aspect * (self.aspect[1] - self.aspect[0])
        tall, wide = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
        fits = (tall < height) & (wide < width)
        # A place for every candidate, uniform over all where it lies inside the image.
        top, left = np.floor(top * (height - tall + 1)), np.floor(left * (width - wide + 1))
        edges = np.stack((top, top + tall, left, left + wide), axis=2).astype(np.int64)  # [B, candidates, 4]
        erased = np.flatnonzero(chosen & fits.any(axis=1))
        return erased, edges[erased, fits[erased].argmax(axis=1)], fill[erased]

    def _erase(self, images: torch.Tensor, erased: np.ndarray, edges: np.ndarray, fill: np.ndarray) -> None:
        """Erase in place in [B, 3, H, W]."""
        # One by one: a mask over the batch would be a pass over all of it, on a CPU the most expensive of all.
        fills = _beside(fill, images)[:, :, None, None].unbind()
        for row, (top, bottom, left, right), value in zip(erased.tolist(), edges.tolist(), fills, strict=True):
            images[row, :, top:bottom, left:right] = value


class Augment:
    """The training augmentation of one modality (paper, sections 3.1 and 4.2), from stored images to network input.

    Pad, crop and flip; for visible images the random combination of channels; normalisation; channel random erasing.
    """

    def __init__(
        self,
        modality: str,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int = 10,
        flip: float = 0.5,
        channel_combination: bool = True,
        erasing_probability: float = 0.5,
        erasing_fill: str | Sequence[float] = 'random',
        seed: int = 0,
    ) -> None:
        """Compose the steps.

        Args:
            modality: `visible` or `infrared`.
            mean: Per channel, from the model's `pretrained_cfg`.
            std: Per channel.
            pad: Border of the random crop, in pixels.
            flip: Probability of the horizontal flip.
            channel_combination: Whether visible images get RCC; without effect on infrared ones.
            erasing_probability: Of CRE, for each image; 0 leaves it out.
            erasing_fill: `random`, or one value per channel in normalised units.
            seed: For calls without a generator.

        Raises:
            ValueError: Unknown modality, or a value outside its range.
        """
        if modality not in MODALITIES:
            raise ValueError(f'unknown modality {modality!r}; expected one of {", ".join(MODALITIES)}')
        self.modality = modality
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.crop = PadCropFlip(pad, flip)
        self.combination = RandomChannelCombination() if channel_combination and modality == VISIBLE else None
        self.erasing = ChannelRandomErasing(erasing_probability, fill=erasing_fill) if erasing_probability else None
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Turn stored images into network input.

        Args:
            images: [B, 3, H, W] uint8, as stored.
            generator: Where the draws come from.

        Returns:
            [B, 3, H, W] float32, normalised, in the standard memory format.

        Raises:
            ValueError: Not a batch of uint8 images.
        """
        _check_images(images, floating=False)
        if images.dtype != torch.uint8:
            raise ValueError(f'uint8 images expected, as an image store has them, got {images.dtype}')
        generator = generator or self.generator
        cuts = self.crop._draw(len(images), generator)
        outcomes = orders = None
        if self.combination is not None:
            outcomes = self.combination._draw(len(images), generator)
            orders = CHANNEL_ORDERS[outcomes]
        # Moved as bytes, of which there are four times fewer; all that comes after changes the one float tensor.
        augmented = self.crop._cut(images, cuts, orders).float()
        if outcomes is not None:
            self.combination._gray(augmented, outcomes)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            plane = augmented[:, channel]
            torch.add(plane.new_full((), -mean / std), plane, alpha=1 / (255 * std), out=plane)  # in one pass
        if self.erasing is not None:
            self.erasing._erase(augmented, *self.erasing._draw(augmented.shape, generator))
        return augmented
