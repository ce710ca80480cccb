"""Channel exchange and mixing, brightness of regions, frequencies and erasing, each against a loop over images."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vireid_timm.constants import AUGMENTATIONS
from vireid_timm.data.appearance import (
    CANDIDATES,
    beta,
    chosen_rows,
    draw_rectangles,
    erase_pixels,
    exchange_channels,
    mix_channels,
    scale_regions,
    swap_low_frequencies,
    uniform,
)
from vireid_timm.data.augment import Augment, normalize
from vireid_timm.options import parse_augmentations

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


pytestmark = pytest.mark.usefixtures('global_random_state_untouched')


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def swap(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    others = torch.rand(5, *images.shape[1:], generator=generator(9)).to(images.device)
    return swap_low_frequencies(images, others, draws)


FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    'exchange': exchange_channels,
    'mrle': mix_channels,
    'rrle': scale_regions,
    'rfa': swap,
    'erasing': erase_pixels,
}


# Every function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('function', FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_batch_is_changed_in_place_whatever_its_format(
    function: Callable, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    images = random_images(12, 3, 20, 10, dtype=dtype)
    expected = function(images.clone(), generator())
    changed = images.clone(memory_format=memory_format)
    assert function(changed, generator()) is changed
    assert changed.dtype == dtype
    torch.testing.assert_close(changed, expected)
    rows = (changed != images).flatten(1).any(1)
    assert 0 < rows.sum() < 12, 'each image has its own draw'


@pytest.mark.parametrize('function', FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_generator_decides_and_every_batch_has_new_draws(function: Callable) -> None:
    images = random_images(16, 3, 20, 10)
    draws = generator(1)
    first, again, second = (function(images.clone(), source) for source in (draws, generator(1), draws))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize('function', FUNCTIONS.values(), ids=FUNCTIONS)
def test_never_waits_for_the_device(function: Callable) -> None:
    """Tensors on the meta device have no values: a step that reads one on the host, and so waits for it, fails."""
    result = function(torch.empty(8, 3, 32, 16, device='meta'), generator())
    assert result.shape == (8, 3, 32, 16) and result.device.type == 'meta'


@pytest.mark.parametrize('function', FUNCTIONS.values(), ids=FUNCTIONS)
def test_nothing_happens_where_no_image_is_chosen(function: Callable) -> None:
    images = random_images(1, 3, 20, 10)
    seed = next(seed for seed in itertools.count() if not len(chosen_rows(1, 0.5, generator(seed))))
    if function is not exchange_channels:  # more likely than a half
        assert torch.equal(function(images.clone(), generator(seed)), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('function', FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_same_on_a_gpu(function: Callable) -> None:
    images = random_images(16, 3, 64, 32)
    expected = function(images.clone(), generator(3))
    torch.testing.assert_close(function(images.cuda(), generator(3)).cpu(), expected, rtol=1e-4, atol=1e-5)


def close_shares(counts: np.ndarray, shares: list[float]) -> bool:
    """Whether counts fit shares, within four standard deviations each."""
    shares = np.asarray(shares)
    return bool((abs(counts / counts.sum() - shares) <= 4 * np.sqrt(shares * (1 - shares) / counts.sum())).all())


# Channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('probability', [0.75, 0.2, 1.0])
def test_exchange_has_four_outcomes_with_their_shares(probability: float) -> None:
    image = random_images(3, 4, 3)
    outcomes = [image, *(image[channel].expand(3, 4, 3) for channel in range(3))]
    counts = np.zeros(4)
    results = exchange_channels(image.repeat(3000, 1, 1, 1), generator(), probability)
    for result in results:
        (match,) = (number for number, outcome in enumerate(outcomes) if torch.equal(result, outcome))
        counts[match] += 1
    assert close_shares(counts, [1 - probability, *3 * [probability / 3]])


def test_mixtures_are_linear_and_their_weights_are_those_of_the_paper() -> None:
    image = random_images(3, 6, 5, dtype=torch.float64)
    results = mix_channels(image.repeat(4000, 1, 1, 1), generator())
    mixed = results[(results != image).flatten(1).any(1)]
    assert close_shares(np.array([4000 - len(mixed), len(mixed)]), [0.5, 0.5])
    assert torch.equal(mixed[:, 0], mixed[:, 1]) and torch.equal(mixed[:, 0], mixed[:, 2])
    weights = torch.linalg.lstsq(image.flatten(1).T, mixed[:, 0].flatten(1).T).solution.T.numpy()
    np.testing.assert_allclose(weights @ image.flatten(1).numpy(), mixed[:, 0].flatten(1).numpy(), atol=1e-12)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-9)
    # The same draws one by one, as the authors' code makes them.
    draw = np.random.default_rng(0)
    slow = np.array([[draw.beta(0.3, 0.3) for _ in range(3)] for _ in range(4000)])
    slow /= slow.sum(1, keepdims=True)
    for level in np.linspace(0.05, 0.95, 10):  # Kolmogorov and Smirnov's distance, of each weight and of the largest
        for own, other in ((weights, slow), (weights.max(1), slow.max(1))):
            assert np.abs((own < level).mean(0) - (other < level).mean(0)).max() < 0.04


# Regions ----------------------------------------------------------------------------------------------------------


def slow_regions(image: np.ndarray, edges: np.ndarray, fits: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Rectangles one after the other, in place, with a mask of what each value was scaled by."""
    scaled_by = np.ones_like(image)
    for (top, bottom, left, right), is_inside, level in zip(edges, fits, levels, strict=True):
        if not is_inside:
            continue
        for channel in range(3):
            region = image[channel, top:bottom, left:right]
            if region.max() > 0:
                scaled_by[channel, top:bottom, left:right] *= level[channel] / region.max()
                region *= level[channel] / region.max()
        if scaled_by.min() < 0.1:
            break
    return image


@pytest.mark.parametrize('size', [(32, 16), (16, 16), (7, 5)])
def test_regions_are_those_of_the_loop(size: tuple[int, int]) -> None:
    images = random_images(60, 3, *size, dtype=torch.float64)
    images[3] = 0  # black
    images[4, :, : size[0] // 2] = 0
    images[5, 1] = 0
    draws = generator(4)
    rows = chosen_rows(60, 0.9, draws)
    edges, fits = draw_rectangles(60, size, (0.02, 0.4), (0.3, 1 / 0.3), draws)
    levels = beta((60, CANDIDATES, 3), 0.4, draws)
    expected = images.numpy().copy()
    for row in rows:
        slow_regions(expected[row], edges[row], fits[row], levels[row])
    result = scale_regions(images.clone(), generator(4), probability=0.9)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-15)
    assert {3, 4, 5} <= set(rows.tolist()) and (result[3] == 0).all()
    assert result.min() >= 0 and result.max() <= 1


def test_ten_regions_are_enough() -> None:
    """After nearly every image some value has lost nine tenths; the share of the others is that of the comment."""
    images = torch.full((4000, 3, 24, 12), 0.7)
    results = scale_regions(images.clone(), generator(), probability=1.0)
    assert ((results / 0.7).amin((1, 2, 3)) >= 0.1).float().mean() < 1 / 500


# Frequencies ------------------------------------------------------------------------------------------------------


def slow_swap(image: np.ndarray, other: np.ndarray, width: float) -> np.ndarray:
    """Amplitude and phase of the full spectrum."""
    height, wide = image.shape[1:]
    spectrum, amplitude = np.fft.fft2(image), np.abs(np.fft.fft2(other))
    low = np.empty((height, wide))
    for row, column in itertools.product(range(height), range(wide)):
        down, across = np.fft.fftfreq(height)[row], np.fft.fftfreq(wide)[column]
        low[row, column] = np.exp(-(down**2 + across**2) / (2 * width**2))
    amplitude = low * amplitude + (1 - low) * np.abs(spectrum)
    return np.fft.ifft2(amplitude * np.exp(1j * np.angle(spectrum))).real.clip(0, 1)


@pytest.mark.parametrize('size', [(16, 8), (9, 7), (12, 5)])
@pytest.mark.parametrize('stored', [True, False])
def test_low_frequencies_are_those_of_the_loop(size: tuple[int, int], stored: bool) -> None:
    images, others = random_images(20, 3, *size, dtype=torch.float64), random_images(7, 3, *size, seed=1)
    if stored:
        others = (others * 255).to(torch.uint8)
    draws = generator(2)
    rows = chosen_rows(20, 0.6, draws)
    partners = (uniform((20,), draws) * 7).astype(int)
    expected, values = images.numpy().copy(), others.double().numpy() / (255 if stored else 1)
    for row in rows:
        expected[row] = slow_swap(expected[row], values[partners[row]], 0.1)
    result = swap_low_frequencies(images.clone(), others, generator(2), 0.6, width=0.1)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)
    assert len(set(partners[rows].tolist())) > 3


def test_a_swap_takes_the_mean_and_keeps_the_edges() -> None:
    """A dark image with an edge takes the brightness of a flat, bright one; flat images have no phase to keep."""
    dark, bright = torch.full((1, 3, 64, 32), 0.2), torch.full((1, 3, 64, 32), 0.8)
    dark[:, :, :, 16:] = 0.25
    result = swap_low_frequencies(dark.clone(), bright, generator(), 1.0, width=0.01)
    assert result.mean() == pytest.approx(0.8, abs=1e-3)
    edge = result[..., 16] - result[..., 15]
    torch.testing.assert_close(edge, torch.full_like(edge, 0.05), rtol=0.1, atol=0)
    black = swap_low_frequencies(torch.zeros_like(dark), bright, generator(), 1.0)
    torch.testing.assert_close(black, bright)


# Erasing ----------------------------------------------------------------------------------------------------------


def test_erased_pixels_are_noise_in_one_rectangle() -> None:
    height, width = 48, 24
    images = torch.full((600, 3, height, width), 9.0)
    results = erase_pixels(images, generator())
    noise, areas = [], []
    for result in results:
        erased = result != 9.0
        assert torch.equal(erased[0], erased[1]) and torch.equal(erased[0], erased[2])
        if not erased.any():
            continue
        rows, columns = erased[0].any(1).nonzero().flatten(), erased[0].any(0).nonzero().flatten()
        assert erased[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), 'a rectangle'
        areas.append(erased[0].float().mean().item())
        noise.append(result[:, erased[0]].flatten())
    assert close_shares(np.array([600 - len(areas), len(areas)]), [0.5, 0.5])
    assert 0.01 < min(areas) < 0.05 and 0.35 < max(areas) < 0.42
    noise = torch.cat(noise)
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    assert len(noise.unique()) > 0.98 * len(noise), 'every pixel has its own value'


# By name ----------------------------------------------------------------------------------------------------------


def test_names_have_probabilities_and_one_order() -> None:
    assert parse_augmentations(['cre', 'rcc']) == {'rcc': 1.0, 'cre': 0.5}
    assert list(parse_augmentations(list(reversed(AUGMENTATIONS)))) == list(AUGMENTATIONS)
    assert parse_augmentations(['mrle=0.3', 'rrle=0', 'rfa=1']) == {'rfa': 1.0, 'mrle': 0.3}
    assert parse_augmentations([]) == {}


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (
            ['rcc', 'mixup'],
            "unknown augmentation 'mixup'; expected some of rcc, rfa, .*erasing, each alone",
        ),
        (['rcc', 'rcc=0.5'], "'rcc' is named twice"),
        (['cre=2'], "expected a probability in 0..1 after cre=, got '2'"),
        (['cre=often'], "expected a probability in 0..1 after cre=, got 'often'"),
        (['cre=nan'], "got 'nan'"),
        (['cre='], "got ''"),
        ([''], "unknown augmentation ''"),
    ],
)
def test_wrong_names_and_probabilities_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Augment('visible', MEAN, STD, augmentations=words)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('modality', ['visible', 'infrared'])
def test_augment_is_its_parts_in_order(modality: str) -> None:
    stored, others = (torch.randint(0, 256, (30, 3, 20, 10), generator=generator(seed)).byte() for seed in (0, 1))
    plain = Augment(modality, MEAN, STD, pad=2, augmentations=['rcc=0.4'])
    draws = generator(7)
    expected = plain(stored, draws)
    for channel in range(3):  # before normalisation
        expected[:, channel] = expected[:, channel] * STD[channel] + MEAN[channel]
    swap_low_frequencies(expected, others, draws, 0.8)
    if modality == 'visible':
        exchange_channels(expected, draws, 0.2)
        mix_channels(expected, draws)
    scale_regions(expected, draws)
    expected = erase_pixels(normalize(expected, MEAN, STD), draws)
    words = ['erasing', 'rrle', 'mrle', 'exchange=0.2', 'rfa=0.8', 'rcc=0.4']
    augment = Augment(modality, MEAN, STD, pad=2, augmentations=words)
    torch.testing.assert_close(augment(stored, generator(7), others), expected, rtol=0, atol=1e-5)
    meta = augment(stored.to('meta'), generator(7), others.to('meta'))
    assert meta.shape == stored.shape and meta.device.type == 'meta'
    assert augment(stored[:0], generator(7), others).shape == (0, 3, 20, 10)


def test_rcc_with_a_probability_leaves_the_others_as_they_are() -> None:
    stored = torch.tensor([10, 100, 200]).view(1, 3, 1, 1).expand(4000, 3, 2, 2).byte()
    results = Augment('visible', (0, 0, 0), (1, 1, 1), pad=0, augmentations=['rcc=0.3'])(stored, generator())
    unchanged = (results * 255 - stored).abs().flatten(1).amax(1) < 0.5
    count = int(unchanged.sum())
    assert close_shares(np.array([count, 4000 - count]), [0.7 + 0.3 / 7, 0.3 * 6 / 7])


def test_three_way_adds_copies_with_exchanged_channels() -> None:
    stored = torch.randint(0, 256, (40, 3, 12, 6), generator=generator()).byte()
    augment = Augment('visible', (0, 0, 0), (1, 1, 1), pad=0, flip=0.0, augmentations=['three_way'])
    results = augment(stored, generator())
    first, second = results.split(40)
    torch.testing.assert_close(first, stored / 255)
    for image, copy in zip(first, second, strict=True):
        assert any(torch.equal(copy, image[channel].expand(3, 12, 6)) for channel in range(3))
    infrared = Augment('infrared', (0, 0, 0), (1, 1, 1), augmentations=['three_way'])
    assert augment.copies == 2 and infrared.copies == 1 and len(infrared(stored, generator())) == 40


def test_rfa_needs_the_other_modality() -> None:
    with pytest.raises(ValueError, match="'rfa' needs images of the other modality: pass others="):
        Augment('visible', MEAN, STD, augmentations=['rfa'])(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
