import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from vireid_timm.constants import INFRARED, MODALITIES, VISIBLE
from vireid_timm.data.readers import synthetic_records
from vireid_timm.synthvi.body import draw_labels, pattern_mask
from vireid_timm.synthvi.canvas import FRAME, View
from vireid_timm.synthvi.person import (
    BACK_PRINT,
    BAG,
    HAIR,
    HAT,
    LOWER,
    LOWER_PATTERN,
    NUM_MATERIALS,
    PAIRED,
    PATTERNS,
    PRINT,
    SHOES,
    SKIN,
    UPPER,
    UPPER_PATTERN,
    Pattern,
    draw_person,
)
from vireid_timm.synthvi.render import SPECTRA, camera_numbers, contact_sheet, image_address, render, render_address

MOMENTS = [(modality, 3 * i, 1 + i % 3, i % 2) for i in range(4) for modality in MODALITIES]


def digest(pixels):
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def person(identity):
    return draw_person(np.random.Generator(np.random.PCG64(identity)))


def still_view(**changes):
    moment = dict(heading=0.0, tall=106.0, middle=32.0, foot=120.0, tilt=0.0, phase=0.0, swing=0.1, light=1)
    return View(**(moment | changes))


@pytest.mark.parametrize('spectrum', SPECTRA)
def test_an_image_depends_on_its_arguments_alone(spectrum):
    forwards = [render(*moment, seed=5, spectrum=spectrum) for moment in MOMENTS]
    backwards = [render(*moment, seed=5, spectrum=spectrum) for moment in reversed(MOMENTS)]
    for first, second in zip(forwards, reversed(backwards), strict=True):
        np.testing.assert_array_equal(first, second)


def test_another_process_renders_the_same_images():
    addresses = [image_address(*moment, seed=2, spectrum='thermal') for moment in MOMENTS]
    program = (
        'import hashlib, sys\n'
        'from vireid_timm.synthvi.render import render_address\n'
        'for address in sys.argv[1:]:\n'
        '    print(hashlib.sha256(render_address(address).tobytes()).hexdigest())\n'
    )
    # Another hash seed: nothing may depend on the order of a set or on hash().
    done = subprocess.run(
        [sys.executable, '-c', program, *reversed(addresses)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {'PYTHONHASHSEED': '7', 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.stdout.split() == [digest(render_address(address)) for address in reversed(addresses)]


@pytest.mark.parametrize('size', [(32, 16), (96, 40), (128, 64), (288, 144), (384, 144)])
@pytest.mark.parametrize('spectrum', SPECTRA)
def test_any_size_has_the_right_shape_and_infrared_is_grey(size, spectrum):
    for modality in MODALITIES:
        pixels = render(modality, 4, 2, 0, spectrum=spectrum, size=size)
        assert pixels.shape == (*size, 3)
        assert pixels.dtype == np.uint8
        assert pixels.std() > 5, 'an image shows something'
        grey = np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])
        assert grey == (modality == INFRARED)


def test_a_larger_image_shows_the_same_moment():
    same, other = [], []
    for modality, identity, camera, image in MOMENTS:
        small = render(modality, identity, camera, image).astype(float)
        large = render(modality, identity, camera, image, size=(256, 128)).astype(float)
        shrunk = large.reshape(128, 2, 64, 2, 3).mean((1, 3))
        same.append(np.abs(small - shrunk).mean())
        other.append(np.abs(render(modality, identity, camera, image + 1) - shrunk).mean())
    assert max(same) < 8 < min(other)


def test_all_images_differ():
    rendered = Counter(
        digest(render(modality, identity, camera, image, seed=seed, size=(64, 32)))
        for modality in MODALITIES
        for identity in (0, 1, 40)
        for camera in (1, 2, 9)
        for image in range(4)
        for seed in (0, 1)
    )
    assert len(rendered) == rendered.total() == 144


def test_the_spectrum_changes_infrared_images_only():
    near, warm = (
        [render(modality, 8, 3, 1, spectrum=spectrum).astype(int) for modality in MODALITIES] for spectrum in SPECTRA
    )
    np.testing.assert_array_equal(near[0], warm[0])
    assert np.abs(near[1] - warm[1]).mean() > 10


def test_thermal_skin_is_warmer_than_anything_worn():
    for identity in range(50):
        warmth = person(identity).thermal
        assert warmth.argmax() == SKIN


@pytest.mark.parametrize('spectrum', ['near_infrared', 'thermal'])
def test_infrared_tones_are_independent_of_colours(spectrum):
    people = [person(identity) for identity in range(600)]
    luma = np.array([each.visible @ [0.299, 0.587, 0.114] for each in people])
    infrared = np.array([getattr(each, spectrum) for each in people])
    varying = [m for m in range(NUM_MATERIALS) if infrared[:, m].std() > 1e-6 and luma[:, m].std() > 1e-6]
    assert {SKIN, HAIR, UPPER, LOWER, SHOES, BAG, HAT} <= set(varying)
    for material in varying:
        for name, seen in (('brightness', luma), *((f'channel {c}', colour(people, c)) for c in range(3))):
            correlation = np.corrcoef(seen[:, material], infrared[:, material])[0, 1]
            assert abs(correlation) < 0.17, f'{name} of material {material} predicts its {spectrum} look'
    for decoration, ground in PAIRED.items():  # nor do contrasts in the visible predict those in the infrared
        contrasts = [tones[:, decoration] - tones[:, ground] for tones in (luma, infrared)]
        assert abs(np.corrcoef(*contrasts)[0, 1]) < 0.17


def colour(people, channel):
    return np.array([each.visible[:, channel] for each in people])


def test_three_in_ten_decorations_vanish_in_the_infrared_and_none_in_the_visible():
    people = [person(identity) for identity in range(300)]
    for spectrum, least in (('near_infrared', 0.29), ('thermal', 0.15)):
        for material, cloth in ((UPPER_PATTERN, UPPER), (LOWER_PATTERN, LOWER), (PRINT, UPPER)):
            tones = np.array([getattr(each, spectrum) for each in people])
            contrast = np.abs(tones[:, material] - tones[:, cloth])
            assert abs((contrast == 0).mean() - 0.3) < 0.08
            assert contrast[contrast > 0].min() > least
    value = np.array([each.visible.max(1) for each in people])
    assert np.abs(value[:, UPPER_PATTERN] - value[:, UPPER]).min() > 0.3


def test_prints_are_seen_from_their_side_only():
    front = back = 0
    for identity in range(60):
        each = person(identity)
        facing = draw_labels(each, still_view(), (256, 128)) // 3
        away = draw_labels(each, still_view(heading=np.pi), (256, 128)) // 3
        assert not (away == PRINT).any()
        assert not (facing == BACK_PRINT).any()
        front += (facing == PRINT).any()
        back += (away == BACK_PRINT).any()
    assert front > 12
    assert back > 12


def test_labels_scale_with_the_canvas_and_leave_a_margin():
    for identity in range(10):
        small = draw_labels(person(identity), still_view(heading=0.3 * identity), (2 * FRAME[0], 2 * FRAME[1]))
        large = draw_labels(person(identity), still_view(heading=0.3 * identity), (4 * FRAME[0], 4 * FRAME[1]))
        assert (small // 3 == large[::2, ::2] // 3).mean() > 0.95
        assert not small[:, :4].any()
        assert not small[:, -4:].any()


def _is_coloured(pattern, across, down):
    """Return whether one point of the cloth has the pattern's colour, by definition."""
    u, v = across / pattern.period + pattern.phase, down / pattern.period + pattern.phase
    u_part, v_part, start = u - np.floor(u), v - np.floor(v), 0.05 + 0.14 * pattern.phase
    return {
        'horizontal': v_part < pattern.duty,
        'vertical': u_part < pattern.duty,
        'checks': (u_part < 0.5) != (v_part < 0.5),
        'dots': np.hypot(u_part - 0.5, v_part - 0.5) < 0.25 + 0.25 * pattern.duty,
        'diagonal': (u + v) - np.floor(u + v) < pattern.duty,
        'band': start < down < start + 0.8 * pattern.period,
        'block': down > start,
        'diamonds': abs(u_part - 0.5) + abs(v_part - 0.5) < 0.3 + 0.3 * pattern.duty,
        'chevron': (v + abs(u % 2 - 1)) % 1 < pattern.duty,
    }[pattern.kind]


@pytest.mark.parametrize('kind', PATTERNS[1:])
def test_patterns_agree_with_their_definition(kind):
    pattern = Pattern(kind, period=0.071, duty=0.43, phase=0.37)
    across, down = np.linspace(-0.31, 0.29, 23), np.linspace(-0.2, 0.5, 41)
    expected = [[_is_coloured(pattern, u, v) for u in across] for v in down]
    np.testing.assert_array_equal(pattern_mask(pattern, across[None, :], down[:, None]), expected)
    assert 0 < np.mean(expected) < 1


def _mean_average_precision(similarity, query_names, gallery_names):
    precisions = []
    for row, name in zip(similarity, query_names, strict=True):
        hits = np.flatnonzero(gallery_names[np.argsort(-row, kind='stable')] == name)
        precisions.append(np.mean((np.arange(len(hits)) + 1) / (hits + 1)))
    return np.mean(precisions)


@pytest.mark.parametrize('spectrum', SPECTRA)
def test_neither_colours_nor_pixels_nor_backgrounds_solve_the_task(spectrum):
    records = synthetic_records(range(60), split='test', spectrum=spectrum, images_per_modality=4)
    images = np.stack([render_address(address) for address in records.path])
    grey = images.mean(-1)
    described = {
        'histogram': [np.sqrt([np.histogram(p[..., c], 16, (0, 256))[0] for c in range(3)]) for p in images],
        'pixels': grey.reshape(-1, 32, 4, 16, 4).mean((2, 4)),
        'background': np.concatenate([grey[:, ::4, :5], grey[:, ::4, -5:]], axis=2),
    }
    query, gallery = (np.flatnonzero(records.modality == modality) for modality in (INFRARED, VISIBLE))
    names = records.identity[query], records.identity[gallery]
    noise = np.random.Generator(np.random.PCG64(0)).random((len(query), len(gallery)))
    chance = _mean_average_precision(noise, *names)
    for name, values in described.items():
        features = np.asarray(values, float).reshape(len(images), -1)
        features -= features.mean(1, keepdims=True)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        found = _mean_average_precision(features[query] @ features[gallery].T, *names)
        assert found < 2.5 * chance, f'{name}: {found:.3f} against {chance:.3f} by chance'


def test_one_camera_shows_everybody_in_front_of_the_same_scene():
    """The borders of two images from one camera are as similar for two people as for one person."""
    rims = {}
    for identity in range(40):
        for image in range(2):
            pixels = render(VISIBLE, identity, 1, image).mean(-1)
            rims[identity, image] = np.concatenate([pixels[::4, :4], pixels[::4, -4:]], axis=1).ravel()
    same = [np.corrcoef(rims[i, 0], rims[i, 1])[0, 1] for i in range(40)]
    other = [np.corrcoef(rims[i, 0], rims[j, 1])[0, 1] for i in range(40) for j in range(40) if i != j]
    assert abs(np.mean(same) - np.mean(other)) < 3 * np.std(other) / np.sqrt(40)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(modality='rgb'), "unknown modality 'rgb'; expected one of visible, infrared"),
        (dict(spectrum='short-wave'), "unknown spectrum 'short-wave'; expected one of near-infrared, thermal"),
        (dict(camera=0), 'camera must be at least 1, got 0'),
        (dict(identity=-1), 'identity must be at least 0, got -1'),
        (dict(image=-3), 'image must be at least 0, got -3'),
        (dict(seed=-1), 'seed must be at least 0, got -1'),
        (dict(size=(31, 16)), 'got (31, 16)'),
        (dict(size=(32, 15)), 'got (32, 15)'),
        (dict(size=(128, 64, 3)), 'got (128, 64, 3)'),
        (dict(size=(4096, 64)), 'got (4096, 64)'),
    ],
)
@pytest.mark.parametrize('function', [render, image_address])
def test_arguments_out_of_range_are_named(function, changes, message):
    arguments = dict(modality=VISIBLE, identity=0, camera=1, image=0) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**arguments)


def test_an_address_holds_all_arguments():
    address = image_address(VISIBLE, 12, 1, 3)
    assert address == 'synthvi:near-infrared:s0:visible:c1:i12:p3:128x64'
    np.testing.assert_array_equal(render_address(address), render(VISIBLE, 12, 1, 3))
    address = image_address(INFRARED, 7, 6, 0, seed=11, spectrum='thermal', size=(96, 48))
    assert address == 'synthvi:thermal:s11:infrared:c6:i7:p0:96x48'
    pixels = render(INFRARED, 7, 6, 0, seed=11, spectrum='thermal', size=(96, 48))
    np.testing.assert_array_equal(render_address(address), pixels)


@pytest.mark.parametrize(
    'address',
    [
        '',
        'image.png',
        'synthvi:',
        'synthvi:near-infrared:s0:visible:c1:i12:p3',
        'synthvi:near-infrared:s0:visible:c1:i12:p3:128x64 ',
        'synthvi:near-infrared:s0:visible:c1:i12:p3:128x64:more',
        'synthvi:near-infrared:s-1:visible:c1:i12:p3:128x64',
        'synthvi:near-infrared:s0:visible:c0:i12:p3:128x64',
        'synthvi:near-infrared:s0:visible:c1:i12:p3:8x4',
        'synthvi:near-infrared:s0:visible:c1:i12:p3:99999x99999',
        'synthvi:short-wave:s0:visible:c1:i12:p3:128x64',
        'synthvi:near-infrared:s0:rgb:c1:i12:p3:128x64',
        'synthvi:near-infrared:s0:visible:c1:ix:p3:128x64',
    ],
)
def test_a_malformed_address_is_named(address):
    with pytest.raises(ValueError, match=re.escape(repr(address))):
        render_address(address)


def test_camera_numbers_follow_sysu_mm01_where_they_can():
    assert camera_numbers(4, 2) == ([1, 2, 4, 5], [3, 6])
    assert camera_numbers(4, 2, first_camera=101) == ([101, 102, 104, 105], [103, 106])
    assert camera_numbers(1, 1) == ([1], [2])
    assert camera_numbers(3, 4, first_camera=5) == ([5, 6, 7], [8, 9, 10, 11])


@pytest.mark.parametrize(
    ('images', 'visible', 'infrared', 'first'),
    [(6, 4, 2, 1), (1, 4, 2, 1), (3, 4, 2, 7), (5, 1, 1, 1), (4, 3, 5, 2), (7, 4, 2, 1)],
)
def test_records_have_every_identity_evenly_on_the_cameras(images, visible, infrared, first):
    identities = [0, 7, 3, 12345, 99999]
    records = synthetic_records(
        identities,
        split='train',
        seed=4,
        images_per_modality=images,
        visible_cameras=visible,
        infrared_cameras=infrared,
        first_camera=first,
    )
    assert len(records) == len(identities) * 2 * images
    assert records.identities() == ['00000', '00003', '00007', '12345', '99999']
    assert set(records.split.tolist()) == {'train'}
    assert len(set(records.path.tolist())) == len(records)
    for modality, numbers in zip(MODALITIES, camera_numbers(visible, infrared, first), strict=True):
        for name in records.identities():
            mine = records[(records.identity == name) & (records.modality == modality)]
            per_camera = Counter(mine.camera.tolist())
            assert set(per_camera) <= set(numbers)
            counts = [per_camera[number] for number in numbers]
            assert sum(counts) == images
            assert max(counts) - min(counts) <= 1
            numbered = [int(re.search(r':p(\d+):', address)[1]) for address in mine.path.tolist()]
            assert numbered == list(range(images))


def test_records_agree_with_their_addresses():
    identities = np.arange(30, 33)  # NumPy integers are accepted
    records = synthetic_records(identities, split='gallery', seed=3, spectrum='thermal', size=(64, 32))
    for i in range(len(records)):
        modality, name, camera = records.modality[i], records.identity[i], records.camera[i]
        pattern = rf'synthvi:thermal:s3:{modality}:c{camera}:i{int(name)}:p\d:64x32'
        assert re.fullmatch(pattern, records.path[i])
    np.testing.assert_array_equal(
        render_address(records.path[0]),
        render(VISIBLE, 30, int(records.camera[0]), 0, seed=3, spectrum='thermal', size=(64, 32)),
    )


def test_with_few_images_the_cameras_differ_between_identities():
    records = synthetic_records(range(100), split='train', images_per_modality=2)
    seen = Counter(records.camera[records.modality == VISIBLE].tolist())
    assert set(seen) == {1, 2, 4, 5}
    assert min(seen.values()) > 30
    pairs = {
        tuple(sorted(records.camera[(records.identity == n) & (records.modality == VISIBLE)]))
        for n in records.identities()
    }
    assert len(pairs) == 6, 'every pair of the four cameras occurs'


def test_records_do_not_depend_on_other_identities():
    everybody = synthetic_records(range(10), split='train')
    few = synthetic_records([8, 2], split='train')
    for name in ('00002', '00008'):
        np.testing.assert_array_equal(few.path[few.identity == name], everybody.path[everybody.identity == name])


def test_no_identities_give_an_empty_table():
    assert len(synthetic_records([], split='train')) == 0


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(images_per_modality=0), 'images_per_modality must be at least 1, got 0'),
        (dict(visible_cameras=0), 'visible_cameras must be at least 1, got 0'),
        (dict(infrared_cameras=-2), 'infrared_cameras must be at least 1, got -2'),
        (dict(first_camera=0), 'first_camera must be at least 1, got 0'),
        (dict(identities=[1, 2, 1]), 'an identity occurs twice'),
        (dict(spectrum='warm'), "unknown spectrum 'warm'"),
        (dict(split='validation'), "unknown split 'validation'"),
    ],
)
def test_wrong_options_of_records_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        synthetic_records(**(dict(identities=range(3), split='train') | changes))


def test_a_contact_sheet_shows_identities_by_cameras():
    sheet = contact_sheet([5, 9], seed=1, size=(64, 32), images_per_camera=2, visible_cameras=3, infrared_cameras=1)
    assert sheet.mode == 'RGB'
    assert sheet.height > 2 * 64
    assert sheet.width > 8 * 32
    pixels = np.asarray(sheet)
    for modality, identity, camera, image in ((VISIBLE, 5, 1, 0), (VISIBLE, 9, 3, 1), (INFRARED, 9, 4, 1)):
        wanted = render(modality, identity, camera, image, seed=1, size=(64, 32))
        windows = np.lib.stride_tricks.sliding_window_view(pixels, wanted.shape)[:, :, 0]
        corner = windows[:, :, :3, :3] == wanted[:3, :3]
        found = np.argwhere(corner.all((2, 3, 4)))
        assert any(np.array_equal(windows[tuple(at)], wanted) for at in found), (modality, identity, camera, image)
