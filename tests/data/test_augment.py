"""The augmentations compared with per-image versions; their statistics under fixed seeds, and their determinism."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from vireid_timm.data.augment import Augment, ChannelRandomErasing, PadCropFlip, RandomChannelCombination, normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRANSFORMS: dict[str, Callable[[], object]] = {
    'crop': PadCropFlip,
    'combination': RandomChannelCombination,
    'erasing': ChannelRandomErasing,
    'fixed erasing': lambda: ChannelRandomErasing(fill=(0.4914, 0.4822, 0.4465)),
}


pytestmark = pytest.mark.usefixtures('global_random_state_untouched')


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


# Every transform --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_new_tensor_of_the_same_type_and_memory_format(
    make: Callable, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    images = (random_images(6, 3, 32, 16) / 255).to(dtype).contiguous(memory_format=memory_format)
    before = images.clone()
    result = make()(images, generator())
    assert result.dtype == dtype
    assert result.shape == images.shape
    assert result.is_contiguous(memory_format=memory_format)
    assert result.data_ptr() != images.data_ptr()
    assert torch.equal(images, before), 'the input was changed'
    torch.testing.assert_close(result, make()(images.contiguous(), generator()).to(result))


@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
def test_same_generator_state_gives_the_same_images(make: Callable) -> None:
    images = random_images(8, 3, 40, 20) / 255
    first, again, other = (make()(images, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    transform, shared = make(), generator(1)
    assert torch.equal(transform(images, shared), first)
    assert not torch.equal(transform(images, shared), first), 'a second batch must get new draws'


@pytest.mark.parametrize('make', [PadCropFlip, RandomChannelCombination, ChannelRandomErasing])
def test_without_a_generator_the_seed_decides(make: Callable) -> None:
    images = random_images(8, 3, 40, 20) / 255
    first, second, other = make(seed=3), make(seed=3), make(seed=4)
    for _ in range(2):
        assert torch.equal(first(images), second(images))
    assert not torch.equal(first(images), other(images))


@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
def test_each_image_has_its_own_draw(make: Callable) -> None:
    image = random_images(1, 3, 40, 20) / 255
    results = make()(image.expand(64, 3, 40, 20), generator())
    assert len({result.numpy().tobytes() for result in results}) >= 7


@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
def test_wrong_shapes_and_types_are_named(make: Callable) -> None:
    with pytest.raises(ValueError, match=r'\[B, 3, H, W\], got \[2, 1, 8, 8\]'):
        make()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r'\[B, 3, H, W\], got \[3, 8, 8\]'):
        make()(torch.zeros(3, 8, 8))
    assert make()(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
def test_never_waits_for_the_device(make: Callable) -> None:
    """Tensors on the meta device have no values: a step that reads one on the host, and so waits for it, fails."""
    result = make()(torch.empty(4, 3, 32, 16, device='meta'), generator())
    assert result.shape == (4, 3, 32, 16)
    assert result.device.type == 'meta'


@pytest.mark.parametrize('make', [RandomChannelCombination, ChannelRandomErasing])
def test_integer_images_are_refused_where_values_are_mixed(make: Callable) -> None:
    with pytest.raises(ValueError, match='float images, got torch.uint8'):
        make()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


# Normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_normalize_is_per_channel(memory_format: torch.memory_format) -> None:
    images = (random_images(2, 3, 5, 4) / 255).contiguous(memory_format=memory_format)
    before = images.clone()
    result = normalize(images, MEAN, STD)
    assert result.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, before)
    for channel in range(3):
        torch.testing.assert_close(result[:, channel], (images[:, channel] - MEAN[channel]) / STD[channel])


# Pad, crop, flip --------------------------------------------------------------------------------------------------


def naive_crops(image: torch.Tensor, pad: int) -> Iterator[tuple[tuple[int, int, bool], torch.Tensor]]:
    """Return every crop of one padded image [3, H, W], plain and mirrored."""
    _, height, width = image.shape
    padded = torch.zeros(3, height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        crop = padded[:, top : top + height, left : left + width]
        yield (top, left, False), crop
        yield (top, left, True), crop.flip(2)


@pytest.mark.parametrize(('size', 'pad'), [((6, 4), 2), ((4, 7), 3), ((5, 5), 0)])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_crops_are_exactly_those_of_the_loop_and_all_of_them_occur(
    size: tuple[int, int], pad: int, dtype: torch.dtype
) -> None:
    image = random_images(3, *size).to(dtype)
    expected = {crop.numpy().tobytes(): draw for draw, crop in naive_crops(image, pad)}
    assert len(expected) == 2 * (2 * pad + 1) ** 2
    results = PadCropFlip(pad)(image.expand(3000, 3, *size), generator())
    counts = dict.fromkeys(expected.values(), 0)
    for result in results:
        counts[expected[result.numpy().tobytes()]] += 1
    assert results.dtype == dtype
    assert chi_square(counts.values()) < chi_square_limit(len(counts))


@pytest.mark.parametrize('flip', [0.0, 1.0])
def test_flip_probability_at_its_ends(flip: float) -> None:
    images = random_images(20, 3, 6, 4)
    result = PadCropFlip(0, flip)(images, generator())
    assert torch.equal(result, images.flip(3) if flip else images)


def test_crop_moves_every_image_of_a_batch_alone() -> None:
    """With different images, no crop may take pixels from a neighbour."""
    images = random_images(12, 3, 8, 6)
    for result, image in zip(PadCropFlip(10)(images, generator()), images, strict=True):
        assert any(torch.equal(result, crop) for _, crop in naive_crops(image, 10))


@pytest.mark.parametrize('options', [{'pad': -1}, {'flip': 1.5}])
def test_crop_options_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match='pad >= 0 and 0 <= flip <= 1'):
        PadCropFlip(**options)


# Random combination of channels -----------------------------------------------------------------------------------


def chi_square(counts: object) -> float:
    counts = list(counts)
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def chi_square_limit(outcomes: int) -> float:
    """Return a generous bound for equally likely outcomes: chi-square mean plus four standard deviations."""
    freedom = outcomes - 1
    return freedom + 4 * (2 * freedom) ** 0.5


def naive_outcomes(image: torch.Tensor) -> list[torch.Tensor]:
    """Return the seven images that the paper's section 3.1 makes of one image [3, H, W]."""
    red, green, blue = image
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    return [
        torch.stack((red, green, blue)),
        torch.stack((red, blue, green)),
        torch.stack((blue, green, red)),
        torch.stack((blue, red, green)),
        torch.stack((green, blue, red)),
        torch.stack((green, red, blue)),
        torch.stack((gray, gray, gray)),
    ]


def test_seven_outcomes_exact_and_equally_likely() -> None:
    image = random_images(3, 4, 3) / 255
    *orders, gray = naive_outcomes(image)
    counts = [0] * 7
    for result in RandomChannelCombination()(image.expand(3500, 3, 4, 3), generator()):
        matches = [number for number, order in enumerate(orders) if torch.equal(result, order)]  # bit for bit
        if not matches:
            torch.testing.assert_close(result, gray, rtol=0.0, atol=1e-6)
            assert torch.equal(result[0], result[1])
            assert torch.equal(result[0], result[2])
            matches = [6]
        counts[matches[0]] += 1
    assert chi_square(counts) < chi_square_limit(7)


def test_combination_is_exact_under_autocast() -> None:
    images = random_images(32, 3, 4, 3) / 255
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = RandomChannelCombination()(images, generator())
    assert torch.equal(result, RandomChannelCombination()(images, generator()))
    assert result.dtype == torch.float32


# Channel random erasing -------------------------------------------------------------------------------------------


def rectangle_of(erased: torch.Tensor) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the erased pixels [H, W], which must form one full rectangle."""
    rows, columns = erased.any(1).nonzero().flatten().tolist(), erased.any(0).nonzero().flatten().tolist()
    top, left, height, width = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert int(erased.sum()) == height * width
    return top, left, height, width


def test_erasing_draws_rectangles_in_the_ranges_with_one_value_per_channel() -> None:
    height, width = 72, 36
    images = torch.full((2000, 3, height, width), 9.0)  # a value that a standard normal distribution does not reach
    results = ChannelRandomErasing()(images, generator())
    erased = results != 9.0
    chosen = erased.flatten(1).any(1)
    assert abs(chosen.float().mean() - 0.5) < 0.05
    rectangles, fills = [], []
    for result, mask in zip(results[chosen], erased[chosen], strict=True):
        assert torch.equal(mask[0], mask[1])
        assert torch.equal(mask[0], mask[2])
        rectangles.append(rectangle_of(mask[0]))
        values = result[:, mask[0]]
        assert torch.equal(values, values[:, :1].expand_as(values))
        fills.append(values[:, 0])
    top, left, tall, wide = torch.tensor(rectangles, dtype=torch.float64).unbind(1)
    assert (tall < height).all()
    assert (wide < width).all()
    # Rounding moves each side by up to half a pixel.
    assert ((tall + 0.5) * (wide + 0.5) >= 0.02 * height * width).all()
    assert ((tall - 0.5) * (wide - 0.5) <= 0.4 * height * width).all()
    assert ((tall + 0.5) / (wide - 0.5) >= 0.3).all()
    assert ((tall - 0.5) / (wide + 0.5) <= 3.33).all()
    share = tall * wide / (height * width)
    assert abs(share.mean() - 0.2) < 0.02  # uniform; a little below 0.21, because rectangles that do not fit are large
    assert abs((tall > wide).double().mean() - 0.8) < 0.05  # uniform in height / width, not in its inverse or logarithm
    assert share.min() < 0.03
    assert share.max() > 0.37
    for start, room in ((top, height - tall), (left, width - wide)):  # uniform over all places inside
        assert abs(((start + 0.5) / (room + 1)).mean() - 0.5) < 0.03
        assert (start == 0).any()
        assert (start == room).any()
    fills = torch.stack(fills)
    assert fills.mean(0).abs().max() < 0.12
    assert (fills.std(0) - 1).abs().max() < 0.1
    assert torch.corrcoef(fills.T).triu(1).abs().max() < 0.12


def test_erasing_with_fixed_values_and_certainty() -> None:
    images = torch.full((50, 3, 24, 12), 9.0)
    results = ChannelRandomErasing(1.0, fill=(0.25, -0.5, 1.0))(images, generator())
    for result in results:
        erased = result[0] != 9.0
        rectangle_of(erased)
        for channel, value in enumerate((0.25, -0.5, 1.0)):
            assert (result[channel][erased] == value).all()
            assert (result[channel][~erased] == 9.0).all()


def test_erasing_never_with_probability_zero_or_where_nothing_fits() -> None:
    images = random_images(50, 3, 24, 12) / 255
    assert torch.equal(ChannelRandomErasing(0.0)(images, generator()), images)
    # A square of the image's whole area is always too wide for an upright image.
    assert torch.equal(ChannelRandomErasing(1.0, (1.0, 1.0), (1.0, 1.0))(images, generator()), images)


def test_erasing_falls_back_on_a_later_candidate() -> None:
    """Wide rectangles on a narrow image: most candidates do not fit, yet nearly every image gets one."""
    images = torch.full((500, 3, 64, 16), 9.0)
    results = ChannelRandomErasing(1.0, (0.1, 0.3), (0.3, 3.33))(images, generator())
    assert (results != 9.0).flatten(1).any(1).float().mean() > 0.98


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'probability': 2}, 'probability in 0..1'),
        ({'area': (0.5, 0.1)}, 'smallest <= largest'),
        ({'area': (0.5, 1.1)}, 'at most 1'),
        ({'aspect': (0.0, 1.0)}, 'smallest <= largest'),
        ({'fill': 'mean'}, "'random' or one value.*'mean'"),
        ({'fill': (1.0, 2.0)}, 'three channels'),
    ],
)
def test_erasing_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelRandomErasing(**options)


# All together -----------------------------------------------------------------------------------------------------


def parts_in_order(modality: str, stored: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Apply the public classes that `Augment` fuses, one after the other."""
    expected = PadCropFlip(4, 0.3)(stored, draws).float() / 255
    if modality == 'visible':
        expected = RandomChannelCombination()(expected, draws)
    return ChannelRandomErasing(fill=(0.1, 0.2, 0.3))(normalize(expected, MEAN, STD), draws)


@pytest.mark.parametrize('modality', ['visible', 'infrared'])
def test_augment_is_its_parts_in_order(modality: str) -> None:
    augment = Augment(modality, MEAN, STD, pad=4, flip=0.3, cre_fill=(0.1, 0.2, 0.3))
    # Several batches, also of other sizes: the memory is reused, and nothing of one batch may show in the next.
    for seed, shape in enumerate([(40, 3, 32, 16), (40, 3, 32, 16), (3, 3, 32, 16), (3, 3, 16, 32), (3, 3, 16, 32)]):
        stored = random_images(*shape, seed=seed)
        before = stored.clone()
        result = augment(stored, generator(5))
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        assert torch.equal(stored, before), 'the input was changed'
        torch.testing.assert_close(result, parts_in_order(modality, stored, generator(5)), rtol=0.0, atol=1e-6)
        pixel_after_pixel = stored.contiguous(memory_format=torch.channels_last)
        assert torch.equal(augment(pixel_after_pixel, generator(5)), result)


def test_augment_without_anything_is_the_normalised_image() -> None:
    stored = random_images(4, 3, 9, 7)
    augment = Augment('visible', MEAN, STD, pad=0, flip=0.0, augmentations=[])
    expected = (stored / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(augment(stored), expected)


def test_augment_of_nothing_and_without_waiting_for_the_device() -> None:
    augment = Augment('visible', MEAN, STD)
    for device, shape in (('cpu', (0, 3, 8, 8)), ('meta', (0, 3, 8, 8)), ('meta', (16, 3, 32, 16))):
        result = augment(torch.empty(shape, dtype=torch.uint8, device=device), generator())
        assert (result.shape, result.device.type, result.dtype) == (shape, device, torch.float32)


def test_infrared_channels_stay_equal_until_erasing() -> None:
    stored = random_images(8, 1, 20, 10).expand(8, 3, 20, 10)
    result = Augment('infrared', (0.5,) * 3, (0.25,) * 3, augmentations=['rcc'])(stored, generator())
    assert torch.equal(result[:, 0], result[:, 1])
    assert torch.equal(result[:, 0], result[:, 2])


def test_augment_seed_decides_without_a_generator() -> None:
    stored = random_images(8, 3, 20, 10)
    first, second, other = (Augment('visible', MEAN, STD, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first(stored), second(stored))
    assert not torch.equal(first(stored), other(stored))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('modality', ['visible', 'infrared'])
def test_augment_is_the_same_on_a_gpu(modality: str) -> None:
    stored = random_images(40, 3, 64, 32)
    augment = Augment(modality, MEAN, STD)
    expected = augment(stored, generator(3))
    torch.testing.assert_close(augment(stored.cuda(), generator(3)).cpu(), expected, rtol=0.0, atol=1e-6)


def test_augment_errors() -> None:
    with pytest.raises(ValueError, match="'grey'; expected one of visible, infrared"):
        Augment('grey', MEAN, STD)
    with pytest.raises(ValueError, match=r'\[B, 3, H, W\], got \[2, 8, 8, 3\]'):
        Augment('visible', MEAN, STD)(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match='uint8 images.*, got torch.float32'):
        Augment('visible', MEAN, STD)(torch.zeros(2, 3, 8, 8))
