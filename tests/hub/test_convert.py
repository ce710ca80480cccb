"""Conversions against a naive AGW network, written from the paper and from what the published code does."""

import argparse
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.hub.convert import SOURCES, convert_checkpoint

State = dict[str, torch.Tensor]
RESNET50 = {'layer1': (3, 64), 'layer2': (4, 128), 'layer3': (6, 256), 'layer4': (3, 512)}  # blocks, width
STRIDES = {'layer1': 1, 'layer2': 2, 'layer3': 2, 'layer4': 1}
NON_LOCAL = {'layer2': (2, 3), 'layer3': (3, 4, 5)}  # behind which blocks
NETWORKS = ('visible_module.visible', 'thermal_module.thermal', 'base_resnet.base')
IDENTITIES = 395
UNUSED = 9.0  # what the parts of the three networks are filled with that have no effect

pytestmark = pytest.mark.usefixtures('one_thread')


# A naive AGW


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    tensors = ('weight', 'bias', 'running_mean', 'running_var')
    return {f'{name}.{tensor}': (channels,) for tensor in tensors} | {f'{name}.num_batches_tracked': ()}


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {'conv1.weight': (64, 3, 7, 7)} | norm_shapes('bn1', 64)
    channels = 64
    for layer, (blocks, width) in RESNET50.items():
        for i in range(blocks):
            block = f'{layer}.{i}'
            shapes |= {f'{block}.conv1.weight': (width, channels, 1, 1)} | norm_shapes(f'{block}.bn1', width)
            shapes |= {f'{block}.conv2.weight': (width, width, 3, 3)} | norm_shapes(f'{block}.bn2', width)
            shapes |= {f'{block}.conv3.weight': (4 * width, width, 1, 1)} | norm_shapes(f'{block}.bn3', 4 * width)
            if i == 0:
                shapes |= {f'{block}.downsample.0.weight': (4 * width, channels, 1, 1)}
                shapes |= norm_shapes(f'{block}.downsample.1', 4 * width)
            channels = 4 * width
    return shapes


def non_local_shapes(width: int | None) -> dict[str, tuple[int, ...]]:
    """Of all five blocks; a width of None is half of the map's."""
    shapes = {}
    for layer, blocks in NON_LOCAL.items():
        channels = 4 * RESNET50[layer][1]
        inner = width or channels // 2
        for i in range(len(blocks)):
            block = f'NL_{layer[-1]}.{i}'
            for part in ('g.0', 'theta', 'phi'):
                shapes |= {f'{block}.{part}.weight': (inner, channels, 1, 1), f'{block}.{part}.bias': (inner,)}
            shapes |= {f'{block}.W.0.weight': (channels, inner, 1, 1), f'{block}.W.0.bias': (channels,)}
            shapes |= norm_shapes(f'{block}.W.1', channels)
    return shapes


def agw_shapes(width: int | None = 1, non_local: bool = True) -> dict[str, tuple[int, ...]]:
    shapes = {f'{network}.{key}': shape for network in NETWORKS for key, shape in resnet50_shapes().items()}
    shapes |= non_local_shapes(width) if non_local else {}
    return shapes | norm_shapes('bottleneck', 2048) | {'classifier.weight': (IDENTITIES, 2048)}


def is_used(key: str) -> bool:
    for network in NETWORKS:
        if key.startswith(network):
            return key.startswith(f'{network}.layer') == (network == NETWORKS[2])
    return key != 'bottleneck.bias'


def hollow(shape: tuple[int, ...], value: float = 0.0) -> torch.Tensor:
    """One value everywhere, which takes no space in a file."""
    return torch.tensor(value).expand(shape)


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        if key.endswith('num_batches_tracked'):
            state[key] = torch.tensor(7)
        elif not is_used(key):
            state[key] = hollow(shape, 0.0 if key == 'bottleneck.bias' else UNUSED)
        elif key.endswith('bias') or key.endswith('running_mean'):
            state[key] = torch.empty(shape).normal_(0.0, 0.1, generator=generator)
        elif len(shape) == 1:  # weights and variances of normalisations; residual branches are kept small
            low, high = (0.2, 0.4) if 'bn3' in key else (0.5, 1.5)
            state[key] = torch.empty(shape).uniform_(low, high, generator=generator)
        else:
            scale = 0.1 if key.startswith('NL_') else 1.0  # a product of three
            deviation = scale * (2 / math.prod(shape[1:])) ** 0.5
            state[key] = torch.empty(shape).normal_(0.0, deviation, generator=generator)
    return state


def normalise(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias, mean, variance = (
        state[f'{name}.{tensor}'].reshape(1, -1, *[1] * (x.ndim - 2))
        for tensor in ('weight', 'bias', 'running_mean', 'running_var')
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def bottleneck(state: State, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
    y = normalise(state, f'{name}.bn1', F.conv2d(x, state[f'{name}.conv1.weight'])).relu()
    y = F.conv2d(y, state[f'{name}.conv2.weight'], stride=stride, padding=1)
    y = normalise(state, f'{name}.bn2', y).relu()
    y = normalise(state, f'{name}.bn3', F.conv2d(y, state[f'{name}.conv3.weight']))
    if f'{name}.downsample.0.weight' in state:
        x = F.conv2d(x, state[f'{name}.downsample.0.weight'], stride=stride)
        x = normalise(state, f'{name}.downsample.1', x)
    return (y + x).relu()


def non_local(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """Position by position and image by image, with the affinity of every pair."""

    def convolved(part: str, values: torch.Tensor) -> torch.Tensor:  # [positions, channels]
        return values @ state[f'{name}.{part}.weight'][:, :, 0, 0].T + state[f'{name}.{part}.bias']

    outputs = []
    for image in x:
        positions = image.flatten(1).T
        theta, phi, g = (convolved(part, positions) for part in ('theta', 'phi', 'g.0'))
        affinity = theta @ phi.T / len(positions)
        rows = [sum(row[j] * g[j] for j in range(len(positions))) for row in affinity]
        outputs.append(convolved('W.0', torch.stack(rows)).T.reshape(image.shape))
    return x + normalise(state, f'{name}.W.1', torch.stack(outputs))


def naive_agw(state: State, images: torch.Tensor, modality: str, gem: bool = True) -> tuple[torch.Tensor, ...]:
    """Pooled features, features behind the BN-neck, logits."""
    stem = {'visible': NETWORKS[0], 'infrared': NETWORKS[1]}[modality]
    x = F.conv2d(images, state[f'{stem}.conv1.weight'], stride=2, padding=3)
    x = F.max_pool2d(normalise(state, f'{stem}.bn1', x).relu(), 3, stride=2, padding=1)
    for layer, (blocks, _) in RESNET50.items():
        for i in range(blocks):
            x = bottleneck(state, f'{NETWORKS[2]}.{layer}.{i}', x, STRIDES[layer] if i == 0 else 1)
            behind = NON_LOCAL.get(layer, ())
            if i in behind and 'NL_2.0.theta.weight' in state:
                x = non_local(state, f'NL_{layer[-1]}.{behind.index(i)}', x)
    pooled = ((x**3).mean(dim=(2, 3)) + 1e-12) ** (1 / 3) if gem else x.mean(dim=(2, 3))
    features = normalise(state, 'bottleneck', pooled)
    return pooled, features, features @ state['classifier.weight'].T


def images(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(seed))


def assert_equal_outputs(model: torch.nn.Module, state: State, gem: bool = True) -> None:
    with torch.inference_mode():
        for modality, x in (('visible', images(0)), ('infrared', images(1))):
            pooled, features, logits = naive_agw(state, x, modality, gem)
            joint_map = model.forward_features(**{modality: x})
            for actual, expected in (
                (model.forward_branches(**{modality: x}).features, pooled),
                (model.forward_head(joint_map, pre_logits=True), features),
                (model(**{modality: x}), logits),
            ):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """For large files: pytest would keep them."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope='module')
def agw_state(one_thread) -> State:
    return random_state(agw_shapes())


@pytest.fixture(scope='module')
def agw_file(agw_state, tmp_path_factory) -> Iterator[Path]:
    """As AGW's code writes it, with NumPy values next to the weights."""
    path = tmp_path_factory.mktemp('agw') / 'sysu_agw_best.t'
    measured = {'cmc': np.linspace(0.4, 0.9, 20), 'mAP': np.float64(0.47), 'mINP': np.float32(0.35), 'epoch': 40}
    torch.save({'net': agw_state, **measured}, path)
    yield path
    path.unlink()


def test_agw_gives_the_same_outputs(agw_state, agw_file):
    conversion = convert_checkpoint(agw_file, 'agw')
    model = conversion.model.eval()
    assert model.pretrained_cfg['architecture'] == 'vireid_agw_r50'
    assert model.num_classes == IDENTITIES
    assert_equal_outputs(model, agw_state)
    # Without the non-local blocks it would be another network.
    plain = {key: value for key, value in agw_state.items() if not key.startswith('NL_')}
    with torch.inference_mode():
        assert not torch.allclose(naive_agw(plain, images(0), 'visible')[2], model(images(0)), rtol=0.1)


def test_agw_drops_what_it_does_not_use_and_says_so(agw_state, agw_file):
    conversion = convert_checkpoint(agw_file, 'agw')
    assert conversion.notes == []
    unused = [key for key in agw_state if not is_used(key)]
    assert sum(conversion.dropped.values()) == len(unused)
    assert set(conversion.dropped) == {
        *(f'{network}.{layer}' for network in NETWORKS[:2] for layer in RESNET50),
        *(f'{NETWORKS[2]}.{part}' for part in ('conv1', 'bn1')),
        'bottleneck.bias',
    }
    assert conversion.dropped['base_resnet.base.bn1'] == 5
    for value in conversion.model.state_dict().values():
        assert not (value == UNUSED).any()


@pytest.mark.parametrize('module', [b'numpy.core.multiarray', b'numpy._core.multiarray'])
def test_files_of_old_are_read(module, tmp_path):
    """Before zip archives and NumPy 2, as the published files are."""
    state = {key: hollow(shape) for key, shape in agw_shapes().items()}
    path = tmp_path / 'old.t'
    measured = {'cmc': np.ones(20, dtype=np.float32), 'mAP': np.float64(0.5), 'counts': np.arange(3)}
    torch.save({'net': state, **measured}, path, _use_new_zipfile_serialization=False)
    content = re.sub(rb'cnumpy\._?core\.multiarray\n', b'c' + module + b'\n', path.read_bytes())
    assert content.count(module) >= 2
    path.write_bytes(content)
    assert convert_checkpoint(path, 'agw').model.num_classes == IDENTITIES


def test_a_converted_network_is_saved_and_loaded(agw_file, folder):
    model = convert_checkpoint(agw_file, 'caj').model.eval()
    assert model.pretrained_cfg['tag'] == 'caj'
    vireid_timm.save_model_folder(model, folder / 'agw')
    loaded = timm.create_model(f'local-dir:{folder}/agw', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(images(0), images(1)), model(images(0), images(1)))


def saved(path: Path, content: Any) -> str:
    (safetensors.torch.save_file if path.suffix == '.safetensors' else torch.save)(content, path)
    return str(path)


def test_the_method_base_pools_by_averaging(agw_state, folder):
    state = {key: value for key, value in agw_state.items() if not key.startswith('NL_')}
    others = {'base_resnet.base.fc.weight': hollow((1000, 2048)), 'base_resnet.base.fc.bias': hollow((1000,))}
    parallel = {f'module.{key}': value for key, value in (state | others).items()}
    conversion = convert_checkpoint(saved(folder / 'base.pth', parallel), 'agw')
    assert conversion.model.pretrained_cfg['architecture'] == 'vireid_base_r50'
    assert any('average pooling' in note and "global_pool='gem'" in note for note in conversion.notes)
    assert conversion.dropped['base_resnet.base.fc'] == 2
    assert_equal_outputs(conversion.model.eval(), state, gem=False)


def test_non_local_blocks_of_the_intended_width(agw_state, folder):
    kept = {key: value for key, value in agw_state.items() if not key.startswith('NL_')}
    state = kept | random_state(non_local_shapes(None))
    model = convert_checkpoint(saved(folder / 'half.pth', state), 'agw').model.eval()
    assert [block.theta.weight.shape[0] for block in (model.layer2[-1], model.layer3[-1])] == [256, 512]
    assert_equal_outputs(model, state)


def test_non_local_blocks_of_any_one_width(tmp_path):
    state = {key: hollow(shape) for key, shape in agw_shapes(width=3).items()}
    model = convert_checkpoint(saved(tmp_path / 'wide.pth', state), 'agw').model
    assert [block.theta.weight.shape[0] for block in (model.layer2[-1], model.layer3[-1])] == [3, 3]
    state['NL_2.1.theta.weight'] = hollow((5, 512, 1, 1))
    with pytest.raises(ValueError, match=r'non-local blocks have different inner widths: \[3, 5\]'):
        convert_checkpoint(saved(tmp_path / 'mixed.pth', state), 'agw')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'base_resnet.base.layer1.0.se.weight': torch.ones(1), 'NL_4.0.g.0.bias': torch.ones(1)},
            '2 tensors without a place: NL_4.0.g.0.bias, base_resnet.base.layer1.0.se.weight',
        ),
        ({f'extra.{i:02}': torch.ones(1) for i in range(12)}, '12 tensors without a place: .*extra.09 and 2 more'),
        (
            {'base_resnet.base.layer2.2.conv1.weight': None, 'NL_3.2.W.1.bias': None, 'bottleneck.running_var': None},
            '3 tensors missing: NL_3.2.W.1.bias, base_resnet.base.layer2.2.conv1.weight, bottleneck.running_var',
        ),
        (
            {'thermal_module.thermal.conv1.weight': torch.ones(64, 1, 7, 7), 'more': torch.ones(1)},
            r'1 tensors without a place: more; 1 tensors of another shape: thermal_module.thermal.conv1.weight '
            r'\[64, 1, 7, 7\], expected \[64, 3, 7, 7\]',
        ),
        ({'bottleneck.bias': torch.full((2048,), -0.25)}, 'bottleneck.bias reaches 0.25. AGW keeps it at 0'),
        ({'bottleneck.bias': torch.full((2048,), math.nan)}, 'bottleneck.bias reaches nan'),
    ],
)
def test_what_does_not_fit_agw_is_named(change, message, tmp_path):
    state = {key: hollow(shape) for key, shape in agw_shapes().items()} | change
    state = {key: value for key, value in state.items() if value is not None}
    path = saved(tmp_path / 'agw.pth', {'net': state})
    with pytest.raises(ValueError, match=f'^cannot convert {re.escape(path)} from agw: .*{message}'):
        convert_checkpoint(path, 'agw')


def test_old_files_lack_the_counts_of_batches(tmp_path):
    optional = ('num_batches_tracked', 'bottleneck.bias')
    state = {key: hollow(shape, 2.0) for key, shape in agw_shapes().items() if not key.endswith(optional)}
    model = convert_checkpoint(saved(tmp_path / 'old.pth', {'net': state}), 'agw').model
    assert model.stem.infrared.bn1.num_batches_tracked == 0
    assert (model.global_head.fc.weight == 2.0).all()


# What needs no conversion


@pytest.mark.parametrize(
    ('name', 'command'),
    [
        (
            'resnet18',
            r"timm\.create_model\('vireid_dml_r50', pretrained=True, pretrained_cfg_overlay=dict\(file='%s'\)\)",
        ),
        ('vireid_base_r10t', r'load_model.* timm\.create_model\(NAME, .*file=.%s'),
    ],
)
def test_what_timm_loads_is_not_converted(name, command, tmp_path):
    path = saved(tmp_path / 'weights.pth', {'state_dict': timm.create_model(name, num_classes=2).state_dict()})
    with pytest.raises(ValueError, match=f'from agw: .* no conversion. .*{command % re.escape(path)}'):
        convert_checkpoint(path, 'agw')


DEEN = ['DEE.FC11.weight', 'MFA1.CNL.g.weight', 'MFA3.PNL.W.1.running_var', 'visible_module.visible.conv1.weight']
DEEN_ON_REGDB = [key for key in DEEN if not key.startswith('MFA3')]
MPANET = [
    'backbone.conv1.weight',
    'backbone.layer1.0.conv1.weight',
    'backbone.MAM4.channel_attention.0.weight',
    'spatial_attention.weight',
    'visible_classifier.weight',
    'infrared_classifier_.weight',
    'bn_neck.weight',
]
MPANET_WITHOUT_ATTENTION = [key for key in MPANET if 'MAM' not in key and 'attention' not in key]


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
@pytest.mark.parametrize(
    ('keys', 'network'),
    [
        (DEEN, r'DEEN \(arXiv:2303.14481\): .*DEE.*MFA'),
        (DEEN_ON_REGDB, 'DEEN'),
        (MPANET, 'MPANet .*single stem'),
        (MPANET_WITHOUT_ATTENTION, 'MPANet'),
    ],
)
def test_other_networks_are_refused_by_name(keys, network, prefix, tmp_path):
    path = saved(tmp_path / 'best.t', {'net': {prefix + key: torch.ones(1) for key in keys}})
    with pytest.raises(ValueError, match=f'from agw: it is a checkpoint of {network}.* no counterpart in'):
        convert_checkpoint(path, 'agw')


@pytest.mark.parametrize('value', [torch.nan, -torch.inf])
def test_weights_that_are_not_numbers_are_named_and_leave_nothing(value, agw_state, tmp_path, capsys):
    broken = {**agw_state, 'bottleneck.running_var': agw_state['bottleneck.running_var'].clone()}
    broken['bottleneck.running_var'][3] = value
    path = saved(tmp_path / 'agw.t', {'net': broken})
    assert main(['hub', 'convert', str(path), str(tmp_path / 'out'), '--from', 'agw']) == 1
    assert 'that are NaN or infinite: bottleneck.running_var' in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ['agw.t']


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
@pytest.mark.parametrize('num_classes', [0, 5])
def test_timm_loads_our_own_weights_from_a_file(ending, num_classes, tmp_path):
    model = timm.create_model('vireid_base_r10t', num_classes=5).eval()
    path = saved(tmp_path / f'weights.{ending}', model.state_dict())
    overlay = dict(file=path, num_classes=5)
    loaded = timm.create_model(
        'vireid_base_r10t', pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay
    ).eval()
    model.reset_classifier(0) if num_classes == 0 else None
    with torch.inference_mode():
        assert torch.equal(loaded(images(0), images(1)), model(images(0), images(1)))
    del overlay['num_classes']
    with pytest.raises(RuntimeError, match='weights of another network'):
        timm.create_model('vireid_dml_r10t', pretrained=True, pretrained_cfg_overlay=overlay)


def test_the_command_writes_a_folder_and_lists_what_it_dropped(agw_file, folder, capsys):
    command = ['hub', 'convert', str(agw_file), str(folder / 'out'), '--from', 'agw']
    assert main([*command, '--license', 'mit']) == 0
    printed = capsys.readouterr().out
    assert 'Not used: bottleneck.bias (1 tensor)' in printed and 'reference: every tensor fits' in printed
    config = json.loads((folder / 'out/config.json').read_text())
    assert config['pretrained_cfg']['tag'] == 'agw' and config['pretrained_cfg']['license'] == 'mit'
    assert config['vireid']['converted'] == {'from': 'agw', 'file': agw_file.name, 'notes': []}
    assert 'not evaluated' in (folder / 'out/README.md').read_text()
    (folder / 'no.pth').touch()
    assert main(['hub', 'convert', str(folder / 'no.pth'), str(folder / 'no'), '--from', 'caj']) == 1
    assert not (folder / 'no').exists()


# Files


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv('VIREID_TEST_RUN', 'no')

    class Program:
        def __reduce__(self):
            return exec, ("import os; os.environ['VIREID_TEST_RUN'] = 'yes'",)

    weights = {'conv1.weight': torch.ones(1)}
    before = list(torch.serialization.get_safe_globals())  # torch 2.5 changes the list itself
    for content, what in (
        ({'net': weights, 'best': Program()}, r'(builtins\.)?exec'),
        ({'net': weights, 'args': argparse.Namespace(lr=0.1)}, 'argparse.Namespace'),
    ):
        path = saved(tmp_path / 'program.t', content)
        with pytest.raises(
            ValueError, match=f'^loading {re.escape(path)} would call {what}, .* If you trust the file, save only its'
        ):
            convert_checkpoint(path, 'agw')
    assert os.environ['VIREID_TEST_RUN'] == 'no'
    assert list(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize('source', SOURCES)
def test_files_without_weights_are_named(source, tmp_path):
    with pytest.raises(FileNotFoundError, match='no file .*nothing.pth; give the checkpoint file'):
        convert_checkpoint(tmp_path / 'nothing.pth', source)
    for content, message in (
        ([torch.ones(1)], 'it has no weights; expected a state dict, or one under net, state_dict, model'),
        ({}, 'it has no weights'),
        ({'net': {}, 'epoch': 3}, 'it has no weights'),
        ({'epoch': 3, 'weight': torch.ones(1)}, 'it has no state dict; these are not tensors: epoch'),
    ):
        path = saved(tmp_path / 'file.pth', content)
        with pytest.raises(ValueError, match=f'^cannot convert {re.escape(path)} from {source}: {message}'):
            convert_checkpoint(path, source)


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_damaged_files_are_named(ending, tmp_path):
    path = tmp_path / f'weights.{ending}'
    saved(path, {'conv1.weight': torch.ones(64, 3, 7, 7)})
    whole = path.read_bytes()
    for content in (b'', b'not weights at all', whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'^{re.escape(str(path))} is damaged, or is not a file of weights'):
            convert_checkpoint(path, 'agw')


def test_an_unknown_source_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown source 'deen'; expected one of agw, caj"):
        convert_checkpoint(tmp_path / 'file.pth', 'deen')
