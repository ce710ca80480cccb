"""Features of rendered images, compared with those of one image at a time."""

import copy
import dataclasses
import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from processes import start_two
from timm.utils import ModelEmaV3

from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data.images import ImageError, load_image
from vireid_timm.data.readers import create_dataset
from vireid_timm.data.records import Records
from vireid_timm.distributed import process_group, rank_and_world_size
from vireid_timm.evaluation.features import (
    Extraction,
    _gather,
    centred,
    check_finite,
    embed,
    extract,
    open_store,
    require_dual_stream,
    views,
    weights_fingerprint,
)

SIZE = (64, 32)
EMPTY = Records.from_rows([])

pytestmark = pytest.mark.usefixtures('one_thread')


def make_model(num_classes=0, name='vireid_dml_r10t', **kwargs):
    """Return a model with random weights, and with BN statistics that change its features."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.uniform_(0, 1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope='module')
def model():
    """A trained model: features of two images differ by far more than the tests' tolerance."""
    return timm.create_model('vireid_dml_r10t.synthvi', pretrained=True, num_classes=0).eval()


@pytest.fixture(scope='module')
def records():
    return create_dataset('synthetic', identities=0, test_identities=6, images_per_modality=2, size=SIZE).test


@pytest.fixture(scope='module')
def visible_paths(records, tmp_path_factory):
    """Five visible images as files."""
    folder = tmp_path_factory.mktemp('images')
    paths = []
    for i, address in enumerate(records.path[records.modality == VISIBLE][:5].tolist()):
        paths.append(str(folder / f'{i}.png'))
        Image.fromarray(load_image(address, SIZE)).save(paths[-1])
    return paths


def network_input(model, pixels):
    """Return the network input [1, 3, H, W] for one image [H, W, 3] uint8."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    return ((torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - mean) / std)[None]


def slow_features(model, paths, modalities, size=SIZE, variants=lambda pixels: [pixels]):
    """Compute features with the network's public call, one image and one variant at a time."""
    rows = []
    with torch.no_grad():
        for path, modality in zip(paths, modalities, strict=True):
            inputs = [network_input(model, pixels) for pixels in variants(load_image(str(path), size))]
            each = [F.normalize(model(**{str(modality): image})) for image in inputs]
            rows.append(F.normalize(torch.stack(each).mean(dim=0)))
    return torch.cat(rows)


@pytest.fixture(scope='module')
def expected(model, records):
    return slow_features(model, records.path, records.modality)


def assert_close(features, expected):
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_embed_records_in_their_order(model, records, expected):
    order_given = np.random.default_rng(0).permutation(len(records))
    shuffled = records[order_given]
    features, order = embed(model, shuffled, size=SIZE, batch_size=5, device='cpu')
    assert order == shuffled.path.tolist()
    assert features.dtype == torch.float32
    assert features.shape == (len(shuffled), model.num_features)
    assert not features.is_inference()
    assert_close(features, expected[order_given])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))


def test_embed_paths_and_pil_images(model, visible_paths):
    expected = slow_features(model, visible_paths, [VISIBLE] * 5, (48, 24))
    features, order = embed(model, visible_paths, VISIBLE, size=(48, 24), batch_size=2)
    assert order == visible_paths
    assert_close(features, expected)
    features, order = embed(model, map(Path, visible_paths), VISIBLE, size=(48, 24), batch_size=2)
    assert order == visible_paths
    assert_close(features, expected)
    opened = [Image.open(path) for path in visible_paths]
    features, order = embed(model, opened, VISIBLE, size=(48, 24), batch_size=2, flip_test=True)
    assert order == [0, 1, 2, 3, 4]
    assert_close(features, embed(model, visible_paths, VISIBLE, size=(48, 24), flip_test=True)[0])
    grey = opened[0].convert('L')
    in_one, in_three = (embed(model, [image], INFRARED)[0] for image in (grey, grey.convert('RGB')))
    torch.testing.assert_close(in_one, in_three)


def test_embed_arrays_and_tensors(model, visible_paths):
    opened = [Image.open(path) for path in visible_paths]
    expected = embed(model, opened, VISIBLE)[0]
    arrays = [np.asarray(image) for image in opened]
    tensors = [torch.tensor(array).permute(2, 0, 1) for array in arrays]
    forms = {
        'arrays': arrays,
        'one array': np.stack(arrays),
        'OpenCV': [np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1] for array in arrays],
        'float arrays': [array / 255 for array in arrays],
        'tensors': tensors,
        'one tensor': torch.stack(tensors),
        'float tensors': [tensor / 255 for tensor in tensors],
        'bfloat16': [(tensor / 255).bfloat16() for tensor in tensors],
        'mixed': [arrays[0], *tensors[1:4], opened[4]],
    }
    for name, given in forms.items():
        features, order = embed(model, given, VISIBLE)
        assert order == [0, 1, 2, 3, 4]
        torch.testing.assert_close(features, expected, rtol=0, atol=0.03 if name == 'bfloat16' else 1e-6, msg=name)


def test_embed_grey_arrays_and_tensors(model, visible_paths):
    grey = Image.open(visible_paths[0]).convert('L')
    expected = embed(model, [grey], INFRARED)[0]
    array = np.asarray(grey)
    for given in (array, array[:, :, None], array / 255, torch.tensor(array), torch.tensor(array)[None]):
        torch.testing.assert_close(embed(model, [given], INFRARED)[0], expected)


def test_embed_takes_an_array_of_paths(model, visible_paths):
    features, order = embed(model, np.array(visible_paths), VISIBLE)
    assert order == visible_paths
    assert_close(features, embed(model, visible_paths, VISIBLE)[0])


def test_embed_takes_the_size_of_the_model(model, records):
    features, _ = embed(model, records[:2])
    assert_close(features, slow_features(model, records.path[:2], records.modality[:2], (128, 64)))


def test_embed_before_and_after_bn(records):
    headless, classifying, other = make_model(0), make_model(5), make_model(0, retrieval='before-bn')
    for model in (classifying, other):
        model.load_state_dict(headless.state_dict(), strict=False)
    with torch.no_grad():
        image = network_input(headless, load_image(records.path[0], SIZE))
        before = headless.forward_pool(headless.forward_features(**{records.modality[0]: image}))
        after = headless.joint_head.neck(before)
    assert not torch.allclose(F.normalize(before), F.normalize(after), atol=0.01)
    for model, own in ((headless, after), (classifying, after), (other, before)):
        assert_close(embed(model, records[:1], size=SIZE)[0], F.normalize(own))
        assert_close(embed(model, records[:1], size=SIZE, features='after-bn')[0], F.normalize(after))
        assert_close(embed(model, records[:1], size=SIZE, features='before-bn')[0], F.normalize(before))


def test_embed_baseline_without_joint_branch(records):
    baseline = make_model(name='vireid_base_r10t')
    expected = slow_features(baseline, records.path[:3], records.modality[:3])
    assert_close(embed(baseline, records[:3], size=SIZE)[0], expected)


def test_embed_leaves_the_model_as_it_was(records):
    model = make_model(3).train()
    model.joint_head.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embed(model, records[:4], size=SIZE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with pytest.raises(ValueError, match='cannot be read'):
        embed(model, ['missing.png'], VISIBLE)
    assert [module.training for module in model.modules()] == modes
    assert not torch.is_inference_mode_enabled()


def test_embed_in_half_precision(model, records, expected):
    half = embed(model, records[:4], size=SIZE, amp_dtype=torch.bfloat16)[0]
    assert half.dtype == torch.float32
    assert not torch.allclose(expected[:4], half, atol=1e-4)
    assert ((expected[:4] * half).sum(dim=1) > 0.99).all()


def test_embed_nothing(model):
    features, order = embed(model, [], VISIBLE)
    assert features.shape == (0, model.num_features)
    assert order == []


def test_embed_skips_broken_images_on_request(model, visible_paths, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'no image')
    paths = [visible_paths[0], str(tmp_path / 'broken.png'), visible_paths[1]]
    with pytest.raises(ImageError, match=r'broken\.png'):
        embed(model, paths, VISIBLE, size=SIZE)
    features, order = embed(model, paths, VISIBLE, size=SIZE, skip_broken=True)
    assert order == [paths[0], paths[2]]
    assert_close(features, slow_features(model, order, [VISIBLE] * 2))


def mirrored(pixels):
    return pixels[:, ::-1]


def five_crops(pixels):
    """Return the middle and the corners of the image within a black border."""
    height, width, _ = pixels.shape
    high, wide = round(10 * height / 288), round(10 * width / 144)
    framed = np.zeros((height + 2 * high, width + 2 * wide, 3), np.uint8)
    framed[high : high + height, wide : wide + width] = pixels
    corners = [(high, wide), (2 * high, 2 * wide), (2 * high, 0), (0, 2 * wide), (0, 0)]
    return [framed[top : top + height, left : left + width] for top, left in corners]


VARIANTS = {
    (False, 1): lambda pixels: [pixels],
    (True, 1): lambda pixels: [pixels, mirrored(pixels)],
    (False, 5): five_crops,
    (True, 5): lambda pixels: [variant for crop in five_crops(pixels) for variant in (crop, mirrored(crop))],
}


@pytest.mark.parametrize('flip_test, crops', VARIANTS)
def test_features_are_averaged_over_flips_and_crops(model, records, expected, flip_test, crops):
    some = records[[0, 1, -1]]
    features, _ = embed(model, some, size=SIZE, flip_test=flip_test, crops=crops, batch_size=2)
    averaged = slow_features(model, some.path, some.modality, variants=VARIANTS[flip_test, crops])
    assert_close(features, averaged)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    if flip_test or crops > 1:
        assert not torch.allclose(features, expected[[0, 1, -1]], atol=0.01)


@pytest.mark.parametrize('size', [(288, 144), (64, 32), (97, 50), (8, 5)])
def test_views_are_moved_pixels(size):
    pixels = np.random.default_rng(0).integers(1, 256, (2, *size, 3)).astype(np.uint8)
    for flip_test, crops in VARIANTS:
        found = list(views(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), flip_test, crops))
        if size == (8, 5) and crops > 1:  # a border that rounds to nothing is one pixel wide
            assert len({bytes(view.numpy().tobytes()) for view in found}) == crops * (1 + flip_test)
            continue
        for i in range(2):
            wanted = VARIANTS[flip_test, crops](pixels[i])
            assert len(found) == len(wanted)
            for view, variant in zip(found, wanted, strict=True):
                assert np.array_equal(view[i].permute(1, 2, 0).numpy(), variant)


@pytest.mark.parametrize(
    'images, modality, options, message',
    [
        (['a.png'], None, {}, 'modality must be one of visible, infrared'),
        (['a.png'], 'x-ray', {}, "got 'x-ray'"),
        ('a.png', VISIBLE, {}, 'takes a list'),
        (['a.png', Image.new('RGB', (4, 8))], VISIBLE, {}, 'cannot be mixed, got 1 paths of 2'),
        (['a.png', np.zeros((8, 4), np.uint8)], VISIBLE, {}, 'cannot be mixed'),
        (np.zeros((8, 4, 3), np.uint8), VISIBLE, {}, r'takes a list of images, got a single one of shape \[8, 4, 3\]'),
        (torch.zeros(3, 8, 4), VISIBLE, {}, r'takes a list of images, got a single one of shape \[3, 8, 4\]'),
        ([np.zeros((8, 4, 3), np.uint8), np.zeros((0, 4, 3), np.uint8)], VISIBLE, {}, r'image 1 is empty \(0x4x3\)'),
        ([np.zeros((8, 0), np.float32)], VISIBLE, {}, r'image 0 is empty \(8x0\)'),
        ([torch.zeros(3, 0, 4)], VISIBLE, {}, r'image 0 is empty \(3x0x4\)'),
        ([Image.new('RGB', (4, 8)).crop((2, 0, 2, 8))], VISIBLE, {}, r'image 0 is empty \(8x0\)'),
        ([np.zeros((8, 4, 4), np.uint8)], VISIBLE, {}, r'image 0 has shape \[8, 4, 4\]; arrays must be \[H, W, 3\]'),
        ([np.zeros((3, 8, 4), np.uint8)], VISIBLE, {}, r'image 0 has shape \[3, 8, 4\]; arrays must be \[H, W, 3\]'),
        ([torch.zeros(8, 4, 3)], VISIBLE, {}, r'image 0 has shape \[8, 4, 3\]; .* tensors \[3, H, W\]'),
        ([torch.zeros(2, 3, 8, 4)], VISIBLE, {}, r'image 0 has shape \[2, 3, 8, 4\]'),
        ([np.full((8, 4), 300, np.uint16)], INFRARED, {}, 'image 0 has type uint16; pass uint8, .*path'),
        ([torch.zeros(3, 8, 4, dtype=torch.int64)], VISIBLE, {}, 'image 0 has type int64; pass uint8'),
        ([np.full((8, 4, 3), 255.0)], VISIBLE, {}, 'image 0 has values from 255 to 255; .* from 0 to 1'),
        ([torch.full((3, 8, 4), -2.0)], VISIBLE, {}, 'image 0 has values from -2 to -2; .*not normalised'),
        ([np.full((8, 4), math.nan)], VISIBLE, {}, 'image 0 has values from nan'),
        ([None], VISIBLE, {}, 'image 0 is a NoneType; pass a path'),
        ([Image.new('I;16', (4, 8))], INFRARED, {}, 'image 0 has mode I;16'),
        (EMPTY, VISIBLE, {}, 'records have their own modality'),
        (EMPTY, None, {'cache': 'tape'}, "unknown cache 'tape'"),
    ],
)
def test_embed_rejects(model, images, modality, options, message):
    with pytest.raises(ValueError, match=message):
        embed(model, images, modality, **options)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'features': 'bn'}, "unknown features 'bn'; expected one of auto, after-bn, before-bn"),
        ({'crops': 10}, 'unknown crops 10; expected one of 1, 5'),
        ({'amp_dtype': torch.int8}, 'unknown amp_dtype torch.int8; expected one of None, torch.bfloat16'),
        ({'batch_size': 0}, 'at least 1, got 0'),
        ({'workers': -1}, 'workers must be at least 0, got -1'),
        ({'size': (128,)}, r'height and width in pixels, got \(128,\)'),
        ({'size': (1, 3, 128, 64)}, r'height and width in pixels, got \(1, 3, 128, 64\)'),
        ({'size': (32, 64, 3)}, '3 channels, height and width, in this order, got 32 64 3'),
        ({'size': (1, 64, 32)}, '3 channels, height and width, in this order, got 1 64 32'),
        ({'size': [3, 64, 0]}, 'size must be at least 1, got 0'),
        ({'size': (128, 0)}, 'size must be at least 1, got 0'),
        ({'device': 'gpu'}, "unknown device 'gpu'"),
    ],
)
def test_extraction_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        Extraction(**options)


def test_extraction_has_one_form_of_each_value():
    assert Extraction(size=[64, 32], device='cpu') == Extraction(size=(64, 32), device=torch.device('cpu'))
    assert Extraction(size=(3, 64, 32)) == Extraction(size=(64, 32))
    assert Extraction().cache == 'auto'


def test_models_of_other_channels_are_refused_before_an_image_is_read(records):
    model = timm.create_model('vireid_dml_r10t', in_chans=1)
    for images in (Records.from_rows([('missing.png', '', 0, VISIBLE, 'test')]), records):
        with pytest.raises(ValueError, match=r'takes images of 1 channels \(in_chans\), .* read with 3'):
            embed(model, images)


@pytest.mark.parametrize('name', ['vireid_dml_r10t', 'vireid_parts_r50'])
def test_models_that_return_maps_are_refused(name):
    model = timm.create_model(name, global_pool='', img_size=(64, 32))
    with pytest.raises(ValueError, match=r"maps, not features \(global_pool=''\)"):
        embed(model, Records.from_rows([('missing.png', '', 0, VISIBLE, 'test')]))


class Distributed(torch.nn.Module):
    """Holds its model as DistributedDataParallel does, without a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPERS = {
    'compiled': lambda model: torch.compile(model, backend='eager'),
    'DataParallel': torch.nn.DataParallel,
    'DistributedDataParallel': Distributed,
    'compiled, then distributed': lambda model: Distributed(torch.compile(model, backend='eager')),
    'distributed, then compiled': lambda model: torch.compile(Distributed(model), backend='eager'),
    'EMA': ModelEmaV3,
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrapped_models_are_unwrapped(records, wrapper):
    model = make_model(2)
    wrapped = WRAPPERS[wrapper](model)
    assert weights_fingerprint(require_dual_stream(wrapped)) == weights_fingerprint(model)
    # DataParallel moves a model to the GPU if there is one.
    expected, order = embed(model, records[:3], size=SIZE, device='cpu')
    features, order_of_wrapped = embed(wrapped, records[:3], size=SIZE, device='cpu')
    assert torch.equal(features, expected)
    assert order_of_wrapped == order


@pytest.mark.filterwarnings('ignore')  # what torch says of its scripts and traces
def test_scripted_models_are_refused(records):
    for scripted in (torch.jit.script(make_model()), torch.jit.trace(make_model(), torch.zeros(1, 3, *SIZE))):
        with pytest.raises(ValueError, match='scripted or traced model has lost its configuration'):
            embed(scripted, records[:1])


def test_other_models_are_refused(records):
    with pytest.raises(ValueError, match='ResNet is not a model of vireid_timm'):
        embed(timm.create_model('resnet10t', num_classes=0), records)


def test_extract_leaves_features_where_they_were_computed(model, records, expected):
    extraction = Extraction(size=SIZE, batch_size=7, cache='ram')
    store = open_store(model, records, extraction)
    rows = np.array([3, 20, 4])
    (features,) = extract(model, records[rows], store, rows, extraction, [model.retrieval])
    assert features.device == next(model.parameters()).device
    assert_close(features, expected[rows])


@pytest.mark.parametrize('settings', [{}, {'centre': True}, {'flip_test': True, 'crops': 5}])
def test_one_pass_gives_several_kinds_of_features(model, records, settings):
    passes = []
    extraction = Extraction(size=SIZE, batch_size=7, cache='ram', **settings)
    store = open_store(model, records, extraction)
    kinds = ['before-bn', 'after-bn']
    with model.stem.register_forward_hook(lambda *_: passes.append(1)):
        tables = extract(model, records, store, store.intact(), extraction, kinds)
    views_of_an_image = 10 if 'crops' in settings else 1
    assert len(passes) == 4 * views_of_an_image, 'two batches of each modality'
    for kind, table in zip(kinds, tables, strict=True):
        assert_close(table, embed(model, records, size=SIZE, features=kind, **settings)[0])


def test_too_little_memory_names_the_setting(records):
    def fail(*arguments):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    model = make_model()
    model.global_pool.register_forward_hook(fail)
    with pytest.raises(ValueError, match='3 images at a time do not fit into the memory of cpu.*--batch-size'):
        embed(model, records, size=SIZE, batch_size=3)


def test_features_that_are_not_finite_name_the_image(records):
    model = make_model()
    with torch.no_grad():
        model.stem.infrared.conv1[0].weight.fill_(math.nan)
    first = records.path[records.modality == INFRARED][0]
    with pytest.raises(ValueError, match=f'{first}.*not finite .12 such images among 24'):
        embed(model, records, size=SIZE)
    features = torch.zeros(3, 4)
    check_finite(features, ['a', 'b', 'c'])
    features[1, 2] = -math.inf
    with pytest.raises(ValueError, match='^b: .*1 such images among 3'):
        check_finite(features, ['a', 'b', 'c'])


def test_weights_fingerprint():
    model = make_model(2)
    first = weights_fingerprint(model)
    assert len(first) == 12 and first == weights_fingerprint(make_model(2).train())
    with torch.no_grad():
        model.joint_head.neck.running_var[3] += 1e-3
    assert weights_fingerprint(model) != first
    assert weights_fingerprint(make_model(2).bfloat16()) != first


def extract_with_another(folder):
    """Run in each of two processes: extract what succeeds, then what fails on one of them, and save the results."""
    logging.basicConfig(level=logging.INFO)
    with process_group('cpu'):
        _extract_with_another(folder, rank_and_world_size()[0])


def _extract_with_another(folder, number):
    model = timm.create_model('vireid_dml_r10t', num_classes=0, retrieval='before-bn')  # as the weights that follow
    model.load_state_dict(torch.load(folder / 'weights.pth', weights_only=True))
    broken_twin, changed_twin = copy.deepcopy(model), copy.deepcopy(model)
    torch.nn.init.constant_(broken_twin.fusion.reduce[0].bn.weight, torch.nan)
    torch.nn.init.constant_(changed_twin.joint_head.neck.weight, number)
    tables = {name: Records.from_rows(rows) for name, rows in json.loads((folder / 'tables.json').read_text()).items()}
    whole, one_batch, damaged = (tables[name] for name in ('whole', 'one batch', 'damaged'))
    options = {'size': SIZE, 'batch_size': 4}

    features = {
        'whole': embed(model, whole, cache='disk', flip_test=True, **options),
        'one batch': embed(model, one_batch, **options),
        'none': embed(model, whole[:0], **options),
        'damaged': embed(model, damaged, skip_broken=True, **options),
    }
    torch.save(features, folder / f'features-{number}.pth')

    attempts = {
        'damaged, read on the way': lambda: embed(model, damaged, **options),
        'damaged, on disk': lambda: embed(model, damaged, cache='disk', **options),
        'not finite': lambda: embed(broken_twin, whole, **options),
        'images': lambda: embed(model, whole if number else one_batch, **options),
        'settings': lambda: embed(model, whole, size=SIZE, batch_size=4 + number, flip_test=number == 0),
        'weights': lambda: embed(changed_twin, whole, **options),
        'twice': lambda: _gather(torch.zeros(1, 4, 2), [0, 1, 2] if number else [2, 3]),
        'never': lambda: _gather(torch.zeros(1, 4, 2), [0] if number else [2, 3]),
    }
    errors = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            errors[name] = str(error)
    (folder / f'errors-{number}.json').write_text(json.dumps(errors))


@pytest.fixture(scope='module')
def by_two_processes(model, records, tmp_path_factory):
    """Features and errors of both processes, and their logs."""
    folder = tmp_path_factory.mktemp('processes')
    (folder / 'broken.png').write_bytes(b'no image')
    columns = [getattr(records, field.name) for field in dataclasses.fields(Records)]
    rows = list(zip(*(column.tolist() for column in columns if column is not None), strict=True))
    damaged = [*rows[:13], (str(folder / 'broken.png'), *rows[13][1:]), *rows[14:]]
    tables = {'whole': rows, 'one batch': rows[:3], 'damaged': damaged}
    (folder / 'tables.json').write_text(json.dumps(tables), encoding='utf-8')
    torch.save(model.state_dict(), folder / 'weights.pth')
    statuses, said = start_two(extract_with_another, folder, folder=folder, VIREID_CACHE=str(folder / 'cache'))
    assert statuses == [0, 0], said
    features = [torch.load(folder / f'features-{number}.pth', weights_only=True) for number in range(2)]
    errors = [json.loads((folder / f'errors-{number}.json').read_text(encoding='utf-8')) for number in range(2)]
    return features, errors, said


def test_processes_extract_what_one_does(model, records, by_two_processes):
    options = {'size': SIZE, 'batch_size': 4}
    expected = {
        'whole': embed(model, records, flip_test=True, **options),
        'one batch': embed(model, records[:3], **options),
        'none': embed(model, records[:0], **options),
        'damaged': embed(model, records[np.arange(len(records)) != 13], **options),
    }
    for features in by_two_processes[0]:
        for name, (table, order) in features.items():
            assert order == expected[name][1]
            torch.testing.assert_close(table, expected[name][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    'name, message',
    [
        ('damaged, read on the way', r'broken\.png: this image cannot be read'),
        ('damaged, on disk', r'broken\.png: this image cannot be read'),
        ('not finite', r'^synthvi:.*not finite \(24 such images among 24\)'),
        ('images', 'the 2 ranks were given different images to'),
        ('settings', 'different flip_test, batch_size to'),
        ('weights', 'different weights to'),
        ('twice', r'row 2 2 times \(1 such rows of 4\)'),
        ('never', r'row 1 0 times \(1 such rows of 4\)'),
    ],
)
def test_what_fails_in_one_process_fails_in_all(by_two_processes, name, message):
    for errors in by_two_processes[1]:
        assert re.search(message, errors.get(name, 'no error'))


def test_every_process_says_whose_error_it_is(by_two_processes):
    first, second = (errors['damaged, read on the way'] for errors in by_two_processes[1])
    assert first == f'rank 1 of 2: {second}'


def test_one_process_decodes_for_all(by_two_processes):
    stores = re.findall('Storing 24 images of 64x32 once: .* in (.*)', by_two_processes[2])
    (whole,) = {path for path in stores if Path(path).is_dir()}  # the damaged table has no store
    assert stores.count(whole) == 1


def test_centring_subtracts_the_mean_of_each_modality():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(7, 5, generator=generator) + 2)
    modality = np.array(['visible', 'infrared', 'visible', 'visible', 'infrared', 'infrared', 'visible'])
    found = centred(features, modality)
    for name in ('visible', 'infrared'):
        rows = torch.from_numpy(modality == name)
        expected = torch.stack([F.normalize(row - features[rows].mean(dim=0), dim=0) for row in features[rows]])
        torch.testing.assert_close(found[rows], expected)
    assert (centred(features[:1].expand(3, -1), np.array(['visible'] * 3)) == 0).all(), 'each equals the mean'
    with pytest.raises(ValueError, match='there is one infrared image'):
        centred(features[:3], modality[:3])
