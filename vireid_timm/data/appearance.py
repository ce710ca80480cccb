"""What changes the look of images: exchange and mixing of channels, brightness of regions, frequencies, erasing.

Each function changes a float batch [B, 3, H, W] in place and returns it; each image has its own draw. As in
`augment.py`, the draws are a few numbers per image from a CPU generator, so that nothing waits for the images' device.
"""

from collections.abc import Sequence

import numpy as np
import torch

CANDIDATES = 10  # rectangles drawn per image


def uniform(shape: Sequence[int], generator: torch.Generator) -> np.ndarray:
    """Draw from [0, 1) with a generator on any device, float32."""
    return torch.rand(shape, generator=generator, device=generator.device).cpu().numpy()


def beta(shape: Sequence[int], concentration: float, generator: torch.Generator) -> np.ndarray:
    """Draw from Beta(concentration, concentration), float64."""
    # torch has no such draw from a generator of one's own; NumPy has.
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed)).beta(concentration, concentration, shape)


def to_device_of(images: torch.Tensor, values: np.ndarray | Sequence[float]) -> torch.Tensor:
    """Move numbers to the images' device without waiting for it; floats also get the images' type."""
    values = torch.as_tensor(values)
    if values.is_floating_point():
        values = values.to(images.dtype)
    return values.to(images.device, non_blocking=True)


def chosen_rows(batch: int, probability: float, generator: torch.Generator) -> np.ndarray:
    """Return the rows of the images that something happens to, each with the probability."""
    return np.flatnonzero(uniform((batch,), generator) < probability)


def draw_rectangles(
    batch: int,
    size: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw candidate rectangles for each image.

    Args:
        batch: Number of images, B.
        size: Their height and width.
        area: Smallest and largest share of the image; uniform.
        aspect: Smallest and largest height / width of the rectangle; uniform.
        generator: Source of the draws.

    Returns:
        Top, bottom, left, right of each candidate, [B, candidates, 4], and whether it is strictly smaller than the
        image, [B, candidates]. The place is uniform over all places inside the image.
    """
    height, width = size
    share, shape, top, left = uniform((4, batch, CANDIDATES), generator)
    pixels = (area[0] + share * (area[1] - area[0])) * (height * width)
    shape = aspect[0] + shape * (aspect[1] - aspect[0])
    tall, wide = np.round(np.sqrt(pixels * shape)), np.round(np.sqrt(pixels / shape))
    top, left = np.floor(top * (height - tall + 1)), np.floor(left * (width - wide + 1))
    edges = np.stack((top, top + tall, left, left + wide), axis=2).astype(np.int64)
    return edges, (tall < height) & (wide < width)


def exchange_channels(images: torch.Tensor, generator: torch.Generator, probability: float = 0.75) -> torch.Tensor:
    """Channel exchange of CAJ (Ye et al., ICCV 2021): red, green or blue takes the place of all three.

    Before normalisation: after it, a channel's place also means a scale. By default one image in four stays as it is,
    as in CAJ's code where the copy is not a second one of the same image.

    Args:
        images: [B, 3, H, W] float, in any unit; changed in place.
        generator: Source of the draws.
        probability: Of an exchange, for each image; the three channels are equally likely.

    Returns:
        The images.
    """
    rows = chosen_rows(len(images), probability, generator)
    channels = (uniform((len(images),), generator) * 3).astype(np.int64)
    planes = images.flatten(0, 1).index_select(0, to_device_of(images, rows * 3 + channels[rows]))
    return images.index_copy_(0, to_device_of(images, rows), planes[:, None].expand(-1, 3, -1, -1))


def mix_channels(
    images: torch.Tensor, generator: torch.Generator, probability: float = 0.5, concentration: float = 0.3
) -> torch.Tensor:
    """Moderate random linear enhancement (MRLE of RLE, arXiv:2411.01225): a random mixture of channels.

    One gray image λr·R + λg·G + λb·B takes the place of all channels. The λ are draws from a Beta distribution, divided
    by their sum. Before normalisation. Probability and concentration are those of the authors' code.

    Args:
        images: [B, 3, H, W] float, in any unit; changed in place.
        generator: Source of the draws.
        probability: Of a mixture, for each image.
        concentration: Both parameters of the Beta distribution; below 1, one channel often dominates.

    Returns:
        The images.
    """
    rows = chosen_rows(len(images), probability, generator)
    weights = beta((len(images), 3), concentration, generator)[rows]
    weights = to_device_of(images, weights / weights.sum(axis=1, keepdims=True))
    rows = to_device_of(images, rows)
    mixed = (images.index_select(0, rows) * weights[:, :, None, None]).sum(1, keepdim=True)
    return images.index_copy_(0, rows, mixed.expand(-1, 3, -1, -1))


def scale_regions(
    images: torch.Tensor,
    generator: torch.Generator,
    probability: float = 0.5,
    concentration: float = 0.4,
    darkest: float = 0.1,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> torch.Tensor:
    """Radical random linear enhancement (RRLE of RLE, arXiv:2411.01225): other brightness in rectangles.

    In a rectangle each channel is scaled so that its largest value becomes a draw from a Beta distribution. Rectangles
    follow each other, and may overlap, until some pixel has lost all but the share `darkest` of its value. Before
    normalisation. The defaults are those of the authors' code.

    Args:
        images: [B, 3, H, W] float in 0..1; changed in place.
        generator: Source of the draws.
        probability: Of any rectangle, for each image.
        concentration: Both parameters of the Beta distribution.
        darkest: Rectangles end once a value is scaled by less than this.
        area: Smallest and largest share of the image; uniform.
        aspect: Smallest and largest height / width of a rectangle; uniform.

    Returns:
        The images.
    """
    # Differs from RLE: at most ten rectangles, not a hundred, which less than one image in 500 would need; a region
    # that is black stays black, where RLE divides by zero.
    batch, _, height, width = images.shape
    rows = chosen_rows(batch, probability, generator)
    edges, fits = draw_rectangles(batch, (height, width), area, aspect, generator)
    levels = to_device_of(images, beta((batch, CANDIDATES, 3), concentration, generator)[rows])
    edges, fits = edges[rows], to_device_of(images, fits[rows])
    # The edges cut an image into cells, in each of which all pixels are scaled alike. So the rectangles, one after the
    # other, need only the largest value of each cell.
    row_cells, in_rows = _cells(edges[:, :, 0], edges[:, :, 1], height)
    column_cells, in_columns = _cells(edges[:, :, 2], edges[:, :, 3], width)
    inside = to_device_of(images, in_rows[:, :, :, None] & in_columns[:, :, None, :])[:, :, None]  # [E, C, 1, R, R]
    rows, row_cells, column_cells = (to_device_of(images, values) for values in (rows, row_cells, column_cells))
    row_cells, column_cells = row_cells[:, None, :, None], column_cells[:, None, None, :]
    count, cells = len(rows), 2 * CANDIDATES + 1
    regions = images.index_select(0, rows)
    largest = images.new_zeros(count, 3, cells, width)
    largest = largest.scatter_reduce(2, row_cells.expand_as(regions), regions, 'amax')
    columns = column_cells.expand_as(largest)
    largest = images.new_zeros(count, 3, cells, cells).scatter_reduce(3, columns, largest, 'amax')
    factors = torch.ones_like(largest)
    for number in range(CANDIDATES):
        is_bright = factors.amin((1, 2, 3)) >= darkest
        here = inside[:, number] & (is_bright & fits[:, number])[:, None, None, None]
        brightest = (largest * factors * here).amax((2, 3))
        scale = torch.where(brightest > 0, levels[:, number] / brightest, 1.0)
        factors = torch.where(here, factors * scale[:, :, None, None], factors)
    factors = factors.gather(2, row_cells.expand(-1, 3, -1, cells)).gather(3, column_cells.expand_as(regions))
    return images.index_copy_(0, rows, regions * factors)


def _cells(starts: np.ndarray, ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut 0..length at the edges of intervals [E, C] into 2 C + 1 cells, of which some are empty.

    Returns:
        The cell of each position, [E, length], and whether an interval covers a cell, [E, C, 2 C + 1].
    """
    cuts = np.sort(np.concatenate((starts, ends), axis=1), axis=1)
    cell_of = (cuts[:, :, None] <= np.arange(length)).sum(axis=1)
    first = np.concatenate((np.zeros_like(cuts[:, :1]), cuts), axis=1)[:, None, :]
    return cell_of, (starts[:, :, None] <= first) & (first < ends[:, :, None])


def swap_low_frequencies(
    images: torch.Tensor,
    others: torch.Tensor,
    generator: torch.Generator,
    probability: float = 0.5,
    width: float = 0.03,
) -> torch.Tensor:
    """Random frequency augmentation (RFA of MFEN, CVPR 2026): the illumination of an image of the other modality.

    The low frequencies' amplitudes come from a random image of the other modality, A(x) − G·A(x) + G·A(x'), with a
    Gaussian low-pass filter G; all phases stay. Before normalisation. MFEN then lets one channel of a visible image
    take the place of all three, which is channel exchange with probability 1.

    Args:
        images: [B, 3, H, W] float in 0..1; changed in place.
        others: Images of the other modality, [N, 3, H, W] uint8 or float in 0..1.
        generator: Source of the draws.
        probability: Of a swap, for each image.
        width: Standard deviation of G in cycles per pixel.

    Returns:
        The images, values limited to 0..1.
    """
    # MFEN has no public code. Probability and width are our choice: at 0.03, G reaches details of about 33 pixels.
    rows = chosen_rows(len(images), probability, generator)
    partners = (uniform((len(images),), generator) * len(others)).astype(np.int64)[rows]
    if not len(rows):
        return images  # FFTs refuse an empty batch
    rows = to_device_of(images, rows)
    partners = others.index_select(0, to_device_of(others, partners))
    partners = partners.to(images.dtype) if partners.is_floating_point() else partners.to(images.dtype) / 255
    spectra, amplitudes = torch.fft.rfft2(images.index_select(0, rows)), torch.fft.rfft2(partners).abs()
    height, wide = images.shape[2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(wide))
    low = to_device_of(images, np.exp(-0.5 * (frequency / width) ** 2))
    spectra = torch.polar(torch.lerp(spectra.abs(), amplitudes, low), spectra.angle())
    return images.index_copy_(0, rows, torch.fft.irfft2(spectra, s=(height, wide)).clamp_(0, 1))


def erase_pixels(
    images: torch.Tensor,
    generator: torch.Generator,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> torch.Tensor:
    """Random erasing (arXiv:1708.04896): one rectangle per image becomes noise.

    After normalisation: each value is drawn from the standard normal distribution, as timm's erasing mode `pixel` does.

    Args:
        images: [B, 3, H, W] float, normalised; changed in place.
        generator: Source of the draws.
        probability: Of erasing, for each image.
        area: Smallest and largest share of the image; uniform.
        aspect: Smallest and largest height / width of the rectangle; uniform.

    Returns:
        The images.
    """
    rows = chosen_rows(len(images), probability, generator)
    edges, fits = draw_rectangles(len(images), images.shape[2:], area, aspect, generator)
    rows = rows[fits[rows].any(axis=1)]
    edges = edges[rows, fits[rows].argmax(axis=1)]
    tall, wide = edges[:, 1] - edges[:, 0], edges[:, 3] - edges[:, 2]
    sizes = (3 * tall * wide).tolist()
    noise = torch.randn(sum(sizes), generator=generator, device=generator.device)
    noise = noise.to(images.device, images.dtype, non_blocking=True).split(sizes)
    for row, (top, bottom, left, right), values in zip(rows.tolist(), edges.tolist(), noise, strict=True):
        images[row, :, top:bottom, left:right] = values.view(3, bottom - top, right - left)
    return images
