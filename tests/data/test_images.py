"""Decoding of images of every format and in every condition."""

import base64
import copy
import math
import struct
import sys
import types
import zlib

import numpy as np
import PIL
import pytest
from image_files import noise, write_broken, write_images
from PIL import Image, PngImagePlugin, features

from vireid_timm.constants import INFRARED
from vireid_timm.data.images import ImageError, image_suffixes, load_image, read_image, readable_formats
from vireid_timm.synthvi.render import render


@pytest.mark.parametrize(
    'mode, suffix',
    [
        ('1', '.png'),
        ('L', '.png'),
        ('L', '.jpg'),
        ('P', '.gif'),
        ('RGB', '.bmp'),
        ('RGB', '.webp'),
        ('CMYK', '.jpg'),
        ('CMYK', '.tif'),
        ('YCbCr', '.jpg'),
    ],
)
def test_every_mode_becomes_three_channels(tmp_path, mode, suffix):
    path = tmp_path / f'image{suffix}'
    Image.fromarray(noise(16, 8, 3)).convert(mode).save(path)
    image = read_image(str(path))
    with Image.open(path) as expected:
        assert (image.mode, image.size) == ('RGB', (8, 16))
        assert np.array_equal(np.asarray(image), np.asarray(expected.convert('RGB')))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'L', 'RGB'])
def test_transparent_parts_become_black(tmp_path, mode):
    path = tmp_path / 'image.png'
    pixels = noise(16, 8, 4)
    pixels[:8, :, 3], pixels[8:, :, 3] = 0, 255
    if mode in ('RGBA', 'LA'):
        Image.fromarray(pixels).convert(mode).save(path)
    elif mode == 'P':
        indices = Image.fromarray(np.repeat(np.uint8([[5], [6]]), 8, axis=0).repeat(8, axis=1), 'L').convert('P')
        indices.putpalette([number for colour in range(256) for number in (255 - colour, 2, 3)])
        indices.save(path, transparency=5)
    else:  # one colour marks transparency
        opaque = Image.new(mode, (8, 16), 'white')
        opaque.paste('gray', (0, 0, 8, 8))
        opaque.save(path, transparency=128 if mode == 'L' else (128, 128, 128))
    image = np.asarray(read_image(str(path)))
    assert (image[:8] == 0).all()
    assert image[8:].any()
    if mode == 'RGBA':
        assert np.array_equal(image[8:], pixels[8:, :, :3])


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
@pytest.mark.parametrize(
    'orientation, upright',
    [
        (1, lambda pixels: pixels),
        (2, lambda pixels: pixels[:, ::-1]),
        (3, lambda pixels: pixels[::-1, ::-1]),
        (4, lambda pixels: pixels[::-1]),
        (5, lambda pixels: pixels.swapaxes(0, 1)),
        (6, lambda pixels: pixels[::-1].swapaxes(0, 1)),
        (7, lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda pixels: pixels[:, ::-1].swapaxes(0, 1)),
        (77, lambda pixels: pixels),
    ],
)
@pytest.mark.parametrize('deep', [False, True])
def test_orientation_is_honoured(tmp_path, suffix, orientation, upright, deep):
    path = tmp_path / f'image{suffix}'
    pixels = np.arange(20 * 12, dtype=np.uint16).reshape(20, 12) * 200 if deep else noise(20, 12, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, **({'exif': exif} if suffix == '.png' else {'tiffinfo': {0x0112: orientation}}))
    plain = tmp_path / 'plain.png'
    Image.fromarray(pixels).save(plain)
    assert np.array_equal(np.asarray(read_image(str(path))), upright(np.asarray(read_image(str(plain)))))


def naive_stretch(values):
    """Scale one value at a time; the percentiles come from sorting."""
    finite = sorted(value for value in values.ravel().tolist() if math.isfinite(value))

    def percentile(percent):
        position = percent / 100 * (len(finite) - 1)
        below = int(position)
        above = min(below + 1, len(finite) - 1)
        return finite[below] + (position - below) * (finite[above] - finite[below])

    low, high = percentile(0.1), percentile(99.9)
    if low == high:
        low, high = finite[0], finite[-1]
    pixels = np.zeros(values.shape, np.uint8)
    for place, value in np.ndenumerate(values):
        share = 0.0 if low == high or math.isnan(value) else (value - low) / (high - low)
        pixels[place] = round(255 * min(max(share, 0.0), 1.0))
    return pixels


def deep_images():
    rng = np.random.default_rng(1)
    counts = rng.normal(7800, 60, (60, 40)).astype(np.uint16)  # a thermal camera's raw counts
    hot = np.full((60, 40), 4000, np.uint16)
    hot[5, 5] = 4100
    gaps = rng.normal(295.0, 3.0, (60, 40)).astype(np.float32)  # kelvin, with pixels that failed
    gaps[3, :7], gaps[4, 0], gaps[5, 0] = np.nan, np.inf, -np.inf
    return {
        'counts': (counts, '.png'),
        'counts in tiff': (counts, '.tif'),
        'hot pixel': (hot, '.png'),
        'constant': (np.full((60, 40), 123, np.uint16), '.png'),
        'full range': (counts * 8, '.pgm'),
        'float': (gaps, '.tif'),
        'int': (counts.astype(np.int32) - 9000, '.tif'),
        'tiny': (np.array([[700, 900]], np.uint16), '.png'),
    }


@pytest.mark.parametrize('name', deep_images())
def test_deep_images_are_stretched(tmp_path, name):
    values, suffix = deep_images()[name]
    path = tmp_path / f'image{suffix}'
    if suffix == '.pgm':
        path.write_bytes(b'P5 %d %d 65535\n' % values.shape[::-1] + values.astype('>u2').tobytes())
    else:
        Image.fromarray(values).save(path)
    pixels = np.asarray(read_image(str(path)))
    assert pixels.shape == (*values.shape, 3)
    assert (pixels == pixels[..., :1]).all()
    # A value halfway between two bytes may round either way.
    assert np.abs(pixels[..., 0].astype(int) - naive_stretch(values)).max() <= 1
    assert pixels.min() == 0
    assert pixels.max() == (0 if name == 'constant' else 255)


def test_stretch_ignores_scale_and_offset(tmp_path):
    values = deep_images()['counts'][0]
    Image.fromarray(values).save(tmp_path / 'a.png')
    Image.fromarray(values * 5 + 1000).save(tmp_path / 'b.png')
    a, b = (np.asarray(read_image(str(tmp_path / name))) for name in ('a.png', 'b.png'))
    assert np.array_equal(a, b)


def test_eight_bits_are_not_stretched(tmp_path):
    pixels = np.full((8, 8), 50, np.uint8)
    pixels[0, 0] = 60
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    assert np.array_equal(np.asarray(read_image(str(tmp_path / 'a.png')))[..., 0], pixels)


@pytest.mark.parametrize('suffix', ['.gif', '.tif', '.png'])
def test_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new('RGB', (8, 16), colour) for colour in ('red', 'lime')]
    frames[0].save(tmp_path / f'a{suffix}', save_all=True, append_images=frames[1:])
    assert (np.asarray(read_image(str(tmp_path / f'a{suffix}'))) == (255, 0, 0)).all()


def test_broken_images_are_named(tmp_path):
    for name, message in write_broken(tmp_path).items():
        path = str(tmp_path / name)
        with pytest.raises(ImageError, match=message) as caught:
            read_image(path)
        text = str(caught.value)
        assert text.startswith(f'{path}: this image cannot be read ('), text
        assert '--skip-broken' in text
        assert str(copy.copy(caught.value)) == text  # rebuilt from its arguments, as between processes


def test_malformed_address_is_no_broken_image():
    with pytest.raises(ValueError, match='synthvi:nonsense') as caught:
        read_image('synthvi:nonsense')
    assert not isinstance(caught.value, ImageError)


def test_load_image(tmp_path):
    files = write_images(tmp_path / 'images')
    for path in files:
        expected = read_image(str(path)).resize((12, 24), Image.Resampling.BILINEAR)
        assert np.array_equal(load_image(str(path), (24, 12)), np.asarray(expected))
    assert np.array_equal(load_image(files[-1], (32, 16)), render(INFRARED, 3, 1, 0, size=(32, 16)))


def test_every_suffix_that_is_read_can_be_read(tmp_path):
    saved = {'.apng': 'PNG', '.avifs': 'AVIF', '.mpo': 'JPEG', '.pfm': 'PPM'}
    for suffix in image_suffixes():
        name = saved.get(suffix) or Image.registered_extensions()[suffix]
        pixels = noise(16, 8) if suffix == '.pfm' else noise(16, 8, 3)
        image = Image.fromarray(pixels).convert('F') if suffix == '.pfm' else Image.fromarray(pixels)
        path = tmp_path / f'image{suffix}'
        image.save(path, format=name)
        assert read_image(str(path)).size == (8, 16), suffix


def test_heic_is_read_with_its_plugin(tmp_path, monkeypatch):
    path = tmp_path / 'image.heic'
    Image.new('RGB', (8, 16), 'red').save(path, format='PNG')
    plugin = types.ModuleType('pillow_heif')

    def register_heif_opener():
        Image.register_open('HEIF', PngImagePlugin.PngImageFile, lambda prefix: prefix.startswith(b'\x89PNG'))
        Image.register_extension('HEIF', '.heic')

    plugin.register_heif_opener = register_heif_opener
    for registry in ('OPEN', 'EXTENSION', 'ID'):
        monkeypatch.setattr(Image, registry, copy.copy(getattr(Image, registry)))
    monkeypatch.setitem(sys.modules, 'pillow_heif', plugin)
    readable_formats.cache_clear()
    try:
        assert 'HEIF' in readable_formats()
        assert '.heic' in image_suffixes()
        assert read_image(str(path)).size == (8, 16)
    finally:
        readable_formats.cache_clear()


def write_deep(path, values):
    """Write [H, W, C] uint16 as PNG, TIFF or PPM of grey and alpha, colour, or colour and alpha; Pillow cannot."""
    height, width, channels = values.shape
    if path.suffix == '.ppm':
        is_plain = path.stem == 'plain'
        content = ' '.join(map(str, values.ravel())).encode() if is_plain else values.astype('>u2').tobytes()
        path.write_bytes(f'P{3 if is_plain else 6}\n{width} {height}\n65535\n'.encode() + content)
        return
    if path.suffix == '.png':
        kind = {2: 4, 3: 2, 4: 6}[channels]
        rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
        parts = {b'IHDR': struct.pack('>IIBBBBB', width, height, 16, kind, 0, 0, 0), b'IDAT': zlib.compress(rows)}
        chunks = [
            struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
            for name, data in (*parts.items(), (b'IEND', b''))
        ]
        path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunks))
        return
    mark, order = (b'MM', '>') if path.stem.endswith('big') else (b'II', '<')
    pixels, bits = values.astype(f'{order}u2').tobytes(), 8
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, None), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, None), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(pixels))]
    tags += [(338, 3, 1, 2)] if channels == 4 else []
    end = 8 + 2 + 12 * len(tags) + 4
    content = struct.pack(f'{order}2sHI', mark, 42, bits) + struct.pack(f'{order}H', len(tags))
    for tag, kind, count, value in tags:
        value = {258: end, 273: end + 2 * channels}.get(tag, value)
        packed = struct.pack(
            f'{order}HH' if kind == 3 and count == 1 else f'{order}I',
            *([value, 0] if kind == 3 and count == 1 else [value]),
        )
        content += struct.pack(f'{order}HHI', tag, kind, count) + packed
    path.write_bytes(content + bytes(4) + struct.pack(f'{order}{channels}H', *[16] * channels) + pixels)


DEEP_FILES = [('a.png', 2), ('a.png', 3), ('a.png', 4), ('a.tif', 3), ('big.tif', 3), ('a.tif', 4), ('big.tif', 4)]
DEEP_FILES += [('a.ppm', 3)]
if tuple(map(int, PIL.__version__.split('.')[:2])) >= (9, 2):  # older ones do not read it
    DEEP_FILES += [('plain.ppm', 3)]


@pytest.mark.parametrize('name, channels', DEEP_FILES)
def test_deep_grey_of_several_channels_is_stretched_as_one_channel(tmp_path, name, channels):
    counts = deep_images()['counts'][0]
    values = np.repeat(counts[..., None], channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = 65535
    write_deep(tmp_path / name, values)
    Image.fromarray(counts).save(tmp_path / 'one.png')
    expected = np.asarray(read_image(str(tmp_path / 'one.png')))
    assert expected.std() > 30
    assert np.array_equal(np.asarray(read_image(str(tmp_path / name))), expected)


@pytest.mark.parametrize('name, channels', DEEP_FILES[1:])
@pytest.mark.parametrize('bits', [8, 10, 12, 16])
def test_deep_colour_keeps_its_hue_and_is_not_black(tmp_path, name, channels, bits):
    values = np.random.default_rng(0).integers(0, 1 << bits, (40, 20, channels)).astype(np.uint16)
    if channels == 4:
        values[..., 3] = 65535
    write_deep(tmp_path / name, values)
    pixels = np.asarray(read_image(str(tmp_path / name)))
    colour = values[..., :3]
    if bits == 16:
        assert np.abs(pixels - (colour >> 8).astype(int)).max() <= (1 if name.endswith('.ppm') else 0)
    else:
        low, high = np.percentile(colour, (0.1, 99.9))
        assert np.abs(pixels - np.clip((colour - low) / (high - low), 0, 1) * 255).max() <= 0.51


def test_a_ppm_of_ten_bits_uses_all_of_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 1024, (40, 20, 3))
    (tmp_path / 'a.ppm').write_bytes(b'P6 20 40 1023\n' + values.astype('>u2').tobytes())
    assert np.abs(np.asarray(read_image(str(tmp_path / 'a.ppm'))) - values / 1023 * 255).max() <= 0.51


# 8x4 pixels of colour with values below 1024 of 16 bits, losslessly, by OpenJPEG 2.5.4.
DARK_JPEG2000 = base64.b64decode(
    '/0//UQAvAAAAAAAEAAAACAAAAAAAAAAAAAAABAAAAAgAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEBAAQEAAH/XAAEQID/ZAAlAAFDcmVhdG'
    'VkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAACnAAH/k8/8MMQRUFLDjNACzpJZEDMohn9tmD5PjfeBfM0rCf4dAl+hUltCFq1Y'
    '39BLsAd2z3ZZ7I4vwH7FwBsHFFNEQhNagrceljoz9apYYjSwYBPAFe7rH6YHxVXKKu5hpppWUWPOJQxGOr/AfsXAGJGwM+0GolOpF2xW+3QD9k'
    'hPtr7dk8ynd0GcslocvXCyNmOWctf6V6kL9h5VPf/Z'
)


@pytest.mark.skipif(not features.check('jpg_2000'), reason='this Pillow has no JPEG 2000')
def test_deep_jpeg_2000_that_would_be_black_is_refused(tmp_path):
    (tmp_path / 'a.j2k').write_bytes(DARK_JPEG2000)
    with pytest.raises(ImageError, match='a.j2k: .*of its 16 bits per channel only the upper 8 can be read'):
        read_image(str(tmp_path / 'a.j2k'))
    for mode in ('L', 'RGB', 'RGBA'):  # 8 bits may be as dark
        for suffix in ('j2k', 'jp2'):
            Image.new(mode, (8, 4)).save(tmp_path / f'black.{suffix}')
            assert not np.asarray(read_image(str(tmp_path / f'black.{suffix}'))).any()


@pytest.mark.parametrize('channels', [2, 4])
def test_transparent_parts_of_deep_images_are_black_and_do_not_count(tmp_path, channels):
    counts = deep_images()['counts'][0]
    values = np.repeat(counts[..., None], channels, axis=2)
    values[..., -1] = 65535
    values[:30] = 0
    write_deep(tmp_path / 'a.png', values)
    Image.fromarray(counts[30:]).save(tmp_path / 'half.png')
    pixels = np.asarray(read_image(str(tmp_path / 'a.png')))
    assert not pixels[:30].any()
    assert np.array_equal(pixels[30:], np.asarray(read_image(str(tmp_path / 'half.png'))))
    values[...] = 0
    write_deep(tmp_path / 'a.png', values)
    assert not np.asarray(read_image(str(tmp_path / 'a.png'))).any()


@pytest.mark.parametrize('content', [b'P6 0 0 255\n', b'P5 0 4 255\n', b'P5 4 0 65535\n'])
def test_images_without_pixels_are_refused(tmp_path, content):
    (tmp_path / 'a.ppm').write_bytes(content)
    with pytest.raises(ImageError, match='a.ppm: this image cannot be read'):
        read_image(str(tmp_path / 'a.ppm'))
