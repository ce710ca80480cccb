"""Augmentation of whole batches on the device that holds them, each picture its own draw (paper, sections 3.1 and 4.2).

Randomness comes from the generator that a call is given. Without one, each object has its own generator, seeded when
it was made; the global random state is neither read nor advanced. A generator may live on another device than the
pictures: one on the CPU makes the same draws whatever the device of the pictures.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .records import MODALITIES, VISIBLE

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601, as PIL's and OpenCV's grayscale)

# The seven outcomes of the random combination of channels: row i of a matrix makes output channel i out of (R, G, B).
CHANNEL_MIXES = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),  # R-G-B, the picture as it is
    ((1, 0, 0), (0, 0, 1), (0, 1, 0)),  # R-B-G
    ((0, 0, 1), (0, 1, 0), (1, 0, 0)),  # B-G-R
    ((0, 0, 1), (1, 0, 0), (0, 1, 0)),  # B-R-G
    ((0, 1, 0), (0, 0, 1), (1, 0, 0)),  # G-B-R
    ((0, 1, 0), (1, 0, 0), (0, 0, 1)),  # G-R-B
    (GRAY_WEIGHTS, GRAY_WEIGHTS, GRAY_WEIGHTS),
)

_ERASING_CANDIDATES = 10  # rectangles drawn per picture; the first that fits is used


def _uniform(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Uniform draws in [0, 1) from a generator on any device."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device, non_blocking=True)


def _constant(values: Sequence, pictures: torch.Tensor) -> torch.Tensor:
    """Numbers as a tensor beside the pictures, without waiting for the device."""
    return torch.tensor(values, dtype=pictures.dtype).to(pictures.device, non_blocking=True)


def _check_pictures(pictures: torch.Tensor, floating: bool = True) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f'pictures [B, 3, H, W] expected, got {list(pictures.shape)}')
    if floating and not pictures.is_floating_point():
        raise ValueError(f'float pictures expected, got {pictures.dtype}; convert 0..255 with pictures.float() / 255')


def _like_format(result: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """The result in the memory format of the pictures."""
    channels_last = pictures.is_contiguous(memory_format=torch.channels_last) and not pictures.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def normalize(pictures: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pictures − mean) / std per channel, as a new tensor.

    Args:
        pictures: [B, 3, H, W] float in 0..1.
        mean: Per channel, as in a model's `pretrained_cfg`.
        std: Per channel.

    Returns:
        [B, 3, H, W] of the same type and memory format.
    """
    _check_pictures(pictures)
    mean, std = (_constant(values, pictures).view(1, 3, 1, 1) for values in (mean, std))
    return (pictures - mean).div_(std)


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
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, pictures: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Crop and flip a batch.

        Args:
            pictures: [B, 3, H, W] of any type, not normalised (the border is 0).
            generator: Where the draws come from.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_pictures(pictures, floating=False)
        batch, _, height, width = pictures.shape
        top, left, mirrored = _uniform((3, batch, 1), generator or self.generator, pictures.device)
        rows = torch.arange(height, device=pictures.device) + (top * (2 * self.pad + 1)).long()  # [B, H]
        columns = torch.arange(width, device=pictures.device) + (left * (2 * self.pad + 1)).long()  # [B, W]
        columns = torch.where(mirrored < self.flip, columns.flip(1), columns)
        # One gather of whole pixels from the padded batch seen as a list of pixels.
        padded = F.pad(pictures.permute(0, 2, 3, 1), (0, 0, self.pad, self.pad, self.pad, self.pad))
        first_row = torch.arange(batch, device=pictures.device)[:, None] * padded.shape[1]
        index = ((first_row + rows) * padded.shape[2])[:, :, None] + columns[:, None, :]  # [B, H, W]
        cropped = padded.reshape(-1, 3).index_select(0, index.flatten()).view(batch, height, width, 3)
        return _like_format(cropped.permute(0, 3, 1, 2), pictures)


class RandomChannelCombination:
    """Random combination of channels (RCC; paper, section 3.1): one of seven outcomes, equally likely.

    The six orders of the channels and the grayscale picture. For visible pictures only, and before normalisation:
    after it, a reordering would also change each channel's scale.
    """

    def __init__(self, seed: int = 0) -> None:
        """Seed the draws of calls without a generator.

        Args:
            seed: For calls without a generator.
        """
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, pictures: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw an outcome for every picture and apply it.

        Args:
            pictures: [B, 3, H, W] float, channels in the order R, G, B, not normalised.
            generator: Where the draws come from.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_pictures(pictures)
        outcome = (_uniform((len(pictures),), generator or self.generator, pictures.device) * len(CHANNEL_MIXES)).long()
        mixes = _constant(CHANNEL_MIXES, pictures)[outcome][..., None, None]  # [B, 3, 3, 1, 1]
        # Not a matrix product: under autocast or TF32 that would round the channels, which a reordering must not.
        mixed = torch.zeros_like(pictures)
        for channel in range(3):
            mixed.addcmul_(mixes[:, :, channel], pictures[:, channel : channel + 1])
        return mixed


class ChannelRandomErasing:
    """Channel random erasing (CRE; paper, sections 2.2 and 4.2, after CAJ, ICCV 2021): one rectangle per picture.

    For both modalities, after normalisation. The paper replaces the rectangle's pixels "with random values from all
    three channels": each channel gets one value of its own, drawn from a standard normal distribution, which is that of
    normalised pictures (timm's erasing mode `rand`). CAJ fills with fixed values instead; pass them as `fill`.
    """

    # Differs from CAJ: ten candidate rectangles per picture are drawn at once and the first that is strictly smaller
    # than the picture is used, instead of up to 100 attempts one by one. At 288×144 about one candidate in twenty does
    # not fit, so that all ten fail less than once in 10^12 pictures; such a picture stays as it is.

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
            probability: Of erasing, for each picture.
            area: Least and greatest share of the picture, uniform.
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

    def __call__(self, pictures: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Erase in a batch.

        Args:
            pictures: [B, 3, H, W] float, normalised.
            generator: Where the draws come from.

        Returns:
            [B, 3, H, W] of the same type and memory format, a new tensor.
        """
        _check_pictures(pictures)
        generator = generator or self.generator
        batch = len(pictures)
        erased = self._erased_pixels(pictures, generator)
        if self.fill == 'random':
            fill = torch.randn((batch, 3), generator=generator, device=generator.device)
            fill = fill.to(pictures.device, pictures.dtype, non_blocking=True)
        else:
            fill = _constant(self.fill, pictures).expand(batch, 3)
        return _like_format(torch.where(erased[:, None], fill[:, :, None, None], pictures), pictures)

    def _erased_pixels(self, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Which pixels the rectangles cover, [B, H, W] bool."""
        batch, _, height, width = pictures.shape
        device = pictures.device
        chosen = _uniform((batch,), generator, device) < self.probability
        area, aspect, top, left = _uniform((4, batch, _ERASING_CANDIDATES), generator, device)
        area = (self.area[0] + area * (self.area[1] - self.area[0])) * (height * width)
        aspect = self.aspect[0] + aspect * (self.aspect[1] - self.aspect[0])
        tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (tall < height) & (wide < width)
        # A place for every candidate, uniform over all where it lies inside the picture.
        top, left = (top * (height - tall + 1)).floor(), (left * (width - wide + 1)).floor()
        first = fits.int().argmax(dim=1, keepdim=True)
        top, tall, left, wide = (values.gather(1, first) for values in (top, tall, left, wide))  # [B, 1] each
        row, column = torch.arange(height, device=device), torch.arange(width, device=device)
        rows = (row >= top) & (row < top + tall) & (chosen & fits.any(dim=1))[:, None]  # [B, H]
        columns = (column >= left) & (column < left + wide)  # [B, W]
        return rows[:, :, None] & columns[:, None, :]


class Augment:
    """The training augmentation of one modality (paper, sections 3.1 and 4.2), from stored pictures to network input.

    Pad, crop and flip; for visible pictures the random combination of channels; normalisation; channel random erasing.
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
            channel_combination: Whether visible pictures get RCC; without effect on infrared ones.
            erasing_probability: Of CRE, for each picture; 0 leaves it out.
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

    def __call__(self, pictures: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Turn stored pictures into network input.

        Args:
            pictures: uint8, [B, H, W, 3] as stored or [B, 3, H, W].
            generator: Where the draws come from.

        Returns:
            [B, 3, H, W] float32, normalised, in the standard memory format.

        Raises:
            ValueError: Not a batch of uint8 pictures.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or 3 not in (pictures.shape[1], pictures.shape[3]):
            raise ValueError(
                f'uint8 pictures [B, H, W, 3] or [B, 3, H, W] expected, got {pictures.dtype} {list(pictures.shape)}'
            )
        generator = generator or self.generator
        if pictures.shape[3] == 3:
            pictures = pictures.permute(0, 3, 1, 2)
        # Planes, not pixels, are contiguous from here on: on the CPU the float steps are two to four times as fast,
        # which more than pays for a later conversion to channels_last.
        pictures = self.crop(pictures, generator).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        if self.combination is not None:
            pictures = self.combination(pictures, generator)
        pictures = normalize(pictures, self.mean, self.std)
        return pictures if self.erasing is None else self.erasing(pictures, generator)
