"""The networks against timm's contract, naive ResNets, and other forms of themselves."""

import copy
import io
import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from networks import (
    IMAGENET_TAGS,
    RESNETS,
    THIN,
    TRUNK,
    forward_calls,
    gradients,
    images,
    meta_images,
    on_meta,
    randomised,
    small,
    training_value,
)
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import create_feature_extractor, get_graph_node_names
from timm.models.resnet import BasicBlock, Bottleneck
from timm.optim import create_optimizer_v2
from torch import nn

from vireid_timm.layers.power_mean import POWER_EPS, root
from vireid_timm.models.branches import BranchOutput
from vireid_timm.models.dual_stream import DualStreamResNet

SUBSETS = [layers for count in range(4) for layers in combinations((1, 2, 3), count)]  # table 2

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module', params=RESNETS)
def network(request):
    """Every registered network, with five classes and the statistics of a batch, so that deep ones do not overflow."""
    torch.manual_seed(0)
    model = randomised(timm.create_model(request.param, num_classes=5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(8, (64, 32), seed=2), images(8, (64, 32), seed=3))
    return model.eval()


def pooled(features_map: torch.Tensor, power: float = 3.0) -> torch.Tensor:
    return ((features_map.clamp(min=0) ** power).mean(dim=(2, 3)) + POWER_EPS) ** (1 / power)


# What every registered network does


def test_the_papers_networks_are_registered():
    sizes = ('r10t', 'r18', 'r34', 'r50', 'r101')
    assert {f'vireid_dml_{size}' for size in sizes} | {'vireid_base_r10t', 'vireid_base_r50'} <= set(RESNETS)
    assert 'vireid_agw_r50' in RESNETS
    assert {tag.partition('.')[0] for tag in IMAGENET_TAGS} == set(RESNETS)


def test_both_modalities_give_the_rows_of_each_alone(network):
    visible, infrared = images(3), images(2, seed=1)
    with torch.inference_mode():
        both, seen = network(visible, infrared), network.forward_branches(visible, infrared)
        alone = [network(visible=visible), network(infrared=infrared)]
        seen_alone = [network.forward_branches(visible), network.forward_branches(infrared=infrared)]
        torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.features, torch.cat([out.features for out in seen_alone]), rtol=1e-4, atol=1e-5)
        for name, logits in seen.logits.items():
            expected = torch.cat([out.logits[name] for out in seen_alone])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(network(visible), alone[0])
        assert not torch.allclose(network(infrared=visible), alone[0], rtol=1e-3)


def test_output_is_classifier_after_neck_after_pooling(network):
    x = images()
    with torch.inference_mode():
        joint_map = network.forward_features(x)
        features = network.forward_neck(joint_map)
        logits = network.forward_head(joint_map)
        branches = network.forward_branches(x)
        assert torch.equal(logits, network(x))
        assert torch.equal(logits, network.get_classifier()(features))
        torch.testing.assert_close(pooled(joint_map), branches.features, rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(branches.logits[network.branches[-1]], logits, rtol=1e-4, atol=1e-6)
    assert joint_map.shape[:2] == (2, network.num_features)
    assert features.shape == (2, network.head_hidden_size) == branches.features.shape
    assert logits.shape == (2, 5)


def test_branches_are_slices_of_the_joint_features(network):
    with torch.inference_mode():
        output = network.forward_branches(images(), images(seed=1))
    assert isinstance(output, BranchOutput)
    width = network.feature_info[3]['num_chs']
    parts = {'global': output.features[:, :width]}
    if 'dml' in network.pretrained_cfg['architecture']:
        parts |= {'fusion': output.features[:, width:], 'joint': output.features}
    assert tuple(output.logits) == network.branches == tuple(parts)
    with torch.inference_mode():
        for name, logits in output.logits.items():
            head = getattr(network, f'{name}_head')
            torch.testing.assert_close(logits, head.neck(parts[name]) @ head.fc.weight.T)


def test_wrong_images_are_named(network):
    x = images()
    for call in (network, network.forward_features, network.forward_branches, network.forward_intermediates):
        with pytest.raises(ValueError, match='no images: .*visible=, infrared=, or both'):
            call()
        with pytest.raises(ValueError, match=r'infrared images need shape \[B, 3, H, W\], got \[2, 1, 32, 16\]'):
            call(x, x[:, :1])
        with pytest.raises(ValueError, match=r'visible images need shape \[B, 3, H, W\], got \[3, 32, 16\]'):
            call(x[0])
        with pytest.raises(ValueError, match=r'same height and width, got \[2, 3, 32, 16\] and \[2, 3, 32, 15\]'):
            call(x, x[..., 1:])


def test_necks_and_classifiers_have_no_bias_and_classifiers_are_named(network):
    state = network.state_dict()
    assert not [key for key in state if '_head.' in key and key.endswith('bias')]
    classifiers = {f'{name}_head.fc' for name in network.branches}
    assert set(network.pretrained_cfg['classifier']) == classifiers
    assert {key for key in state if '.fc.' in key} == {f'{name}.weight' for name in classifiers}


@pytest.mark.parametrize('name', RESNETS)
def test_the_configuration_matches_the_network(name):
    model = on_meta(name)
    cfg = model.pretrained_cfg
    assert (model.num_classes, model.in_chans) == (0, 3) == (cfg['num_classes'], cfg['input_size'][0])
    assert isinstance(model.get_classifier(), nn.Identity)
    size = (128, 64) if name.endswith('r10t') else (288, 144)
    assert cfg['input_size'][1:] == size
    joint_map = model.forward_features(meta_images(model))
    assert tuple(joint_map.shape) == (2, model.num_features, *cfg['pool_size'])
    assert cfg['pool_size'] == (size[0] // 16, size[1] // 16)  # last stride 1: 18 x 9
    assert model(meta_images(model)).shape == (2, model.num_features)
    width, first = (2048, 256) if name.endswith(('r50', 'r101')) else (512, 64)
    assert model.num_features == model.head_hidden_size == width + ('dml' in name) * 3 * first
    state = model.state_dict()
    assert len(cfg['first_conv']) == 2
    assert all(state[f'{conv}.weight'].shape[1] == 3 for conv in cfg['first_conv'])
    reductions = [info['reduction'] for info in model.feature_info]
    assert reductions == [4, 8, 16, 16]


@pytest.mark.parametrize('name', RESNETS)
def test_no_pooling_gives_the_map(name):
    x = images(1)
    model = on_meta(name, num_classes=0, global_pool='')
    expected = model.forward_features(meta_images(model)).shape
    assert model(meta_images(model)).shape == expected
    assert model.forward_head(model.forward_features(meta_images(model)), pre_logits=True).shape == expected
    with pytest.raises(ValueError, match="forward_branches needs pooling.* global_pool=''"):
        model.forward_branches(x.to('meta'))
    with pytest.raises(ValueError, match="use num_classes=0 with global_pool=''"):
        on_meta(name, num_classes=3, global_pool='')


@pytest.mark.parametrize('name', RESNETS)
def test_new_classifiers_keep_device_type_mode_and_frozen_necks(name):
    model = on_meta(name, num_classes=4, dtype=torch.float64)
    model.requires_grad_(False)
    keys = set(model.state_dict())
    for count in (0, 9):
        model.reset_classifier(count)
        assert model.num_classes == count
        assert model(meta_images(model).double()).shape == (2, count or model.num_features)
        assert not any(module.training for module in model.modules())
        assert {tensor.device.type for tensor in model.state_dict().values()} == {'meta'}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == ({f'{branch}_head.fc.weight' for branch in model.branches} if count else set())
    assert set(model.state_dict()) == keys
    assert model.get_classifier().weight.shape == (9, model.num_features)


@pytest.mark.parametrize('name', RESNETS)
def test_arguments_reach_the_network(name):
    with pytest.raises(TypeError, match='not_an_argument'):
        on_meta(name, not_an_argument=1)
    model = on_meta(name, in_chans=1, dtype=torch.bfloat16, drop_rate=0.25, last_stride=2, fuse_layers=[2, 3])
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    height, width = model.pretrained_cfg['input_size'][1:]
    x = torch.zeros(2, 1, height, width, device='meta', dtype=torch.bfloat16)
    assert tuple(model.forward_features(x).shape[2:]) == (math.ceil(height / 32), math.ceil(width / 32))
    assert model.feature_info[3]['reduction'] == 32
    assert model.num_features == model.feature_info[3]['num_chs'] + 2 * model.feature_info[0]['num_chs']
    drops = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert drops == [0.25] * 3
    infrared = model.stem.infrared.state_dict()
    assert {key: value.shape for key, value in model.stem.visible.state_dict().items()} == {
        key: value.shape for key, value in infrared.items()
    }


@pytest.mark.parametrize('name', RESNETS)
def test_layer_decay_orders_stem_layers_and_head(name):
    model = on_meta(name, num_classes=3)
    assert not model.no_weight_decay()
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, momentum=0.9, weight_decay=5e-4, layer_decay=0.5)
    scale = {id(parameter): group['lr_scale'] for group in optimizer.param_groups for parameter in group['params']}
    assert len(scale) == sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
    part_scales: dict[str, set[float]] = {}
    for parameter_name, parameter in model.named_parameters():
        part_scales.setdefault(parameter_name.partition('.')[0], set()).add(scale[id(parameter)])
    ordered = [part_scales[part] for part in ('stem', 'layer1', 'layer2', 'layer3', 'layer4')]
    assert len(ordered[0]) == 1
    assert all(max(lower) < min(higher) for lower, higher in zip(ordered, ordered[1:]))
    heads = {part: scales for part, scales in part_scales.items() if part not in ('stem', *[t[:-1] for t in TRUNK])}
    assert set(heads) == {f'{branch}_head' for branch in model.branches} | ({'fusion'} if model.fusion else set())
    assert all(scales == {1.0} for scales in heads.values())
    coarse = create_optimizer_v2(model, 'adamw', lr=0.1, layer_decay=0.5)
    assert sum(len(group['params']) for group in coarse.param_groups) == len(scale)


@pytest.mark.parametrize('kind', ['vireid_dml_r10t', 'vireid_base_r10t', 'bottleneck'])
def test_a_batch_of_both_modalities_trains_every_parameter(kind):
    model = network_of(kind, num_classes=4, last_stride=1).train()
    value = training_value(model.forward_branches(images(size=(64, 32)), images(size=(64, 32), seed=1)))
    for name, gradient in gradients(model, value).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


def test_meta_tensors_can_be_trained():
    model = on_meta('vireid_dml_r18', num_classes=4).train()
    output = model.forward_branches(meta_images(model), meta_images(model))
    (output.features.sum() + sum(logits.sum() for logits in output.logits.values())).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


# The trunk is timm's ResNet but for the last stride


def naive_resnet(model: DualStreamResNet, modality: str, last_stride: int) -> nn.Module:
    """timm's own ResNet with the network's weights, and stride 1 in the first block of layer4."""
    name = {BasicBlock: 'resnet18', Bottleneck: 'resnet50'}[type(model.layer1[0])]
    layers = [len(getattr(model, layer[:-1])) for layer in TRUNK]
    options = dict(layers=layers, num_classes=0, global_pool='')
    if isinstance(model.stem.visible.conv1, nn.Sequential):
        options |= dict(stem_width=32, stem_type='deep_tiered', avg_down=True)
    resnet = timm.create_model(name, **options)
    if last_stride == 1:
        block = resnet.layer4[0]
        (block.conv2 if isinstance(block, Bottleneck) else block.conv1).stride = (1, 1)
        if isinstance(block.downsample[0], nn.AvgPool2d):
            block.downsample[0] = nn.Identity()
        else:
            block.downsample[0].stride = (1, 1)
    state = model.state_dict()
    stem = f'stem.{modality}.'
    own = {key.removeprefix(stem): value for key, value in state.items() if key.startswith((stem, *TRUNK))}
    resnet.load_state_dict(own)
    return resnet.eval()


def network_of(kind: str, **kwargs) -> DualStreamResNet:
    if kind == 'bottleneck':
        return randomised(DualStreamResNet(Bottleneck, (1, 1, 1, 2), **kwargs)).eval()
    return randomised(timm.create_model(kind, **kwargs)).eval()


@pytest.mark.parametrize('last_stride', [1, 2])
@pytest.mark.parametrize('kind', ['vireid_dml_r10t', 'vireid_dml_r18', 'bottleneck'])
def test_trunk_is_bitwise_a_resnet_with_that_last_stride(kind, last_stride):
    model = network_of(kind, last_stride=last_stride)
    for size in ((64, 32), (51, 37)):
        x = images(size=size)
        for modality in ('visible', 'infrared'):
            naive = naive_resnet(model, modality, last_stride)
            with torch.inference_mode():
                _, expected = naive.forward_intermediates(x, indices=[1, 2, 3, 4])
                _, actual = model.forward_intermediates(**{modality: x})
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
            assert actual[3].shape[2] == -(-size[0] // (16 * last_stride))


@pytest.mark.parametrize('name', ['vireid_dml_r10t', 'vireid_dml_r18'])
def test_both_streams_start_from_the_same_values(name):
    stem = timm.create_model(name).stem
    infrared = stem.infrared.state_dict()
    for key, value in stem.visible.state_dict().items():
        assert torch.equal(value, infrared[key])
        assert value.data_ptr() != infrared[key].data_ptr()


# The joint map and the branches


@pytest.mark.parametrize('kind', ['asff', 'static'])
@pytest.mark.parametrize('layers', SUBSETS)
def test_every_subset_of_fused_layers_in_both_forms(layers, kind):
    model = small(num_classes=3, fuse_layers=layers, spatial_weights=kind, img_size=(64, 32))
    plain = small(num_classes=3, fuse_layers=layers, spatial_weights=kind, img_size=(64, 32), plain_fusion=True)
    plain.load_state_dict(model.state_dict())
    assert model.num_features == 64 + 8 * len(layers)
    assert model.branches == (('global', 'fusion', 'joint') if layers else ('global',))
    for size in ((64, 32), (57, 33)):
        x = images(1, size), images(1, size, seed=1)
        with torch.inference_mode():
            output, joint_map = model.forward_branches(*x), model.forward_features(*x)
            _, levels = model.forward_intermediates(*x)
            expected = [pooled(levels[3])]
            if layers:
                fused = [levels[i - 1] for i in layers]
                expected.append(root(model.fusion.mean_power(fused, list(levels[0].shape[2:])), 3.0))
            expected = torch.cat(expected, dim=1)
            torch.testing.assert_close(output.features, expected)
            torch.testing.assert_close(pooled(joint_map), expected, rtol=1e-5, atol=3e-5)
            torch.testing.assert_close(plain.forward_branches(*x).features, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(plain.forward_features(*x), joint_map, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(plain(*x), model(*x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('pool', ['gem', 'avg'])
@pytest.mark.parametrize('power', [2.0, 3.0])
def test_training_and_retrieval_pool_alike(pool, power):
    """`forward_branches` trains the features that `forward` retrieves with, for any pooling."""
    model = small(global_pool=pool, gem_power=power)
    x = images()
    with torch.no_grad():
        features, joint_map = model.forward_branches(x).features, model.forward_features(x)
        torch.testing.assert_close(features, pooled(joint_map, 1.0 if pool == 'avg' else power), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x), model.joint_head.neck(features), rtol=1e-4, atol=1e-3)
        other = small(global_pool={'gem': 'avg', 'avg': 'gem'}[pool], gem_power=power)
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(other.forward_branches(x).features, features, rtol=0.05)
        other.reset_classifier(0, pool)
        assert torch.equal(other.forward_branches(x).features, features)
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize('retrieval', ['after-bn', 'before-bn'])
@pytest.mark.parametrize('name', ['vireid_dml_r10t', 'vireid_base_r10t'])
def test_without_classes_the_output_is_the_features_for_retrieval(name, retrieval):
    model = small(name, num_classes=5, retrieval=retrieval)
    x = images()
    with torch.inference_mode():
        joint_map = model.forward_features(x)
        before, after = model.forward_pool(joint_map), model.forward_neck(joint_map)
        torch.testing.assert_close(before, model.forward_branches(x).features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after, getattr(model, f'{model.branches[-1]}_head').neck(before))
        assert torch.equal(model.forward_head(joint_map, pre_logits=True), after)  # what the classifier sees
        logits = model(x)
        assert torch.equal(model.get_classifier()(after), logits)
        model.reset_classifier(0)
        expected = after if retrieval == 'after-bn' else before
        assert torch.equal(model(x), expected)
        assert torch.equal(model.forward_head(joint_map, pre_logits=True), expected)
        assert model.forward_branches(x).logits == {}
    with pytest.raises(ValueError, match=r"unknown retrieval 'bn'; expected one of \('after-bn', 'before-bn'\)"):
        small(name, retrieval='bn')


def test_only_the_weights_in_the_package_retrieve_before_bn():
    assert timm.create_model('vireid_dml_r10t', pretrained=True).retrieval == 'before-bn'
    assert timm.create_model('vireid_dml_r10t.synthvi', pretrained=True, retrieval='after-bn').retrieval == 'after-bn'
    assert timm.create_model('vireid_dml_r10t').retrieval == 'after-bn'


def test_new_classifiers_change_nothing_else():
    model = small(num_classes=5).train()
    before = copy.deepcopy(model.state_dict())
    model.reset_classifier(11)
    after = model.state_dict()
    assert set(after) == set(before)
    for key, value in after.items():
        assert value.shape[0] == 11 if '.fc.' in key else torch.equal(value, before[key])
    output = model.forward_branches(images())
    assert {name: logits.shape[1] for name, logits in output.logits.items()} == dict.fromkeys(model.branches, 11)
    assert model.global_head.fc.weight.std() < 0.002


def test_a_refused_reset_changes_nothing():
    model = small(num_classes=5)
    expected = model(images())
    with pytest.raises(ValueError, match="unknown pooling 'max'"):
        model.reset_classifier(7, 'max')
    assert model.num_classes == 5
    assert torch.equal(model(images()), expected)


def test_a_classifier_without_pooling_is_used_once_there_is_one_as_in_timm():
    model = small(num_classes=0, global_pool='')
    model.reset_classifier(2)
    assert model.get_classifier().weight.shape[0] == 2 and model(images()).ndim == 4
    model.reset_classifier(2, 'gem')
    assert model(images()).shape[1] == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(fuse_layers=(2, 1)), r'increasing layer numbers .*1 to 4, got \(2, 1\)'),
        (dict(fuse_layers=(0, 1)), r'increasing layer numbers .*1 to 4, got \(0, 1\)'),
        (dict(fuse_layers=(1, 1)), r'increasing layer numbers .*1 to 4, got \(1, 1\)'),
        (dict(spatial_weights='learned'), r"unknown spatial_weights 'learned'; expected one of \('asff', 'static'\)"),
        (dict(last_stride=3), 'last_stride must be 1 or 2, got 3'),
        (dict(gem_power=0.5), 'power of at least 1, got 0.5'),
        (dict(global_pool='max'), "unknown pooling 'max'"),
        (dict(non_local_blocks=(0, 2, 0, 0)), r'four counts of at most \(1, 1, 1, 1\), got \(0, 2, 0, 0\)'),
        (dict(non_local_blocks=(0, 1)), r'four counts of at most \(1, 1, 1, 1\), got \(0, 1\)'),
        (dict(non_local_width='full'), "non_local_width .* 'half', got 'full'"),
        (dict(non_local_width=0), "non_local_width .* 'half', got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta('vireid_dml_r10t', **arguments)


@pytest.mark.parametrize('name', RESNETS)
@pytest.mark.parametrize('given, size', [(256, (256, 256)), ((256, 128), (256, 128)), ([90, 50], (90, 50))])
def test_the_image_size_reaches_the_configuration(name, given, size):
    model = on_meta(name, img_size=given)
    config = resolve_model_data_config(model)
    assert config['input_size'] == (3, *size)
    assert tuple(model.forward_features(meta_images(model)).shape[2:]) == model.pretrained_cfg['pool_size']
    assert resolve_model_data_config(on_meta(name))['input_size'] != config['input_size']  # the default stays


def test_the_image_size_sets_the_grid_of_static_maps():
    model = on_meta('vireid_dml_r50', img_size=(256, 128), last_stride=2, spatial_weights='static')
    assert model.fusion.weights.maps.shape[2:] == (64, 32)
    assert model.pretrained_cfg['input_size'] == (3, 256, 128)
    assert model.pretrained_cfg['pool_size'] == (8, 4)
    assert on_meta('vireid_dml_r10t', spatial_weights='static').fusion.weights.maps.shape[2:] == (32, 16)
    features = on_meta('vireid_dml_r10t', img_size=64, features_only=True)
    assert resolve_model_data_config(features)['input_size'] == (3, 64, 64)
    overlaid = on_meta('vireid_dml_r10t', img_size=64, pretrained_cfg_overlay=dict(input_size=(3, 32, 16)))
    assert overlaid.pretrained_cfg['input_size'] == (3, 32, 16)


@pytest.mark.parametrize('size', [(256, 128, 3), (0, 64), (128.5, 64), -1, '256'])
def test_wrong_image_sizes_are_named(size):
    for create in (lambda: on_meta('vireid_dml_r10t', img_size=size), lambda: small(img_size=size)):
        with pytest.raises(ValueError, match='img_size must be height and width in pixels, or one number'):
            create()


@pytest.mark.parametrize('name', ['vireid_dml_r10t', 'vireid_base_r50'])
@pytest.mark.parametrize('argument', ['drop_path_rate', 'act_layer', 'norm_layer', 'aa_layer', 'stem_type', 'avg_down'])
def test_arguments_of_timms_resnet_are_sent_to_it(name, argument):
    with pytest.raises(ValueError, match=rf'do not take {argument} directly.* resnet_args=dict\({argument}=\.\.\.\)'):
        on_meta(name, **{argument: 0.1})


def test_the_output_stride_is_the_last_stride():
    for arguments in (dict(output_stride=16), dict(resnet_args=dict(output_stride=16)), dict(output_stride=32)):
        with pytest.raises(ValueError, match='do not take output_stride, .* last_stride is 1 or 2'):
            on_meta('vireid_dml_r50', **arguments)


def test_arguments_of_timms_resnet_reach_it():
    model = timm.create_model('vireid_dml_r18', resnet_args=dict(drop_path_rate=0.5, act_layer='silu'))
    assert model.layer4[1].drop_path.drop_prob == 0.5
    assert isinstance(model.stem.infrared.act1, nn.SiLU)


# Numbers


@pytest.mark.parametrize('plain', [False, True])
def test_features_stay_float32_under_autocast(plain):
    model = small(num_classes=3, plain_fusion=plain)
    x = images(size=(64, 32)), images(size=(64, 32), seed=1)
    with torch.no_grad():
        exact = model.forward_branches(*x).features, model.forward_head(model.forward_features(*x), pre_logits=True)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            output = model.forward_branches(*x)
            close = output.features, model.forward_head(model.forward_features(*x), pre_logits=True)
    for a, b in zip(close, exact):
        assert a.dtype == torch.float32
        assert torch.cosine_similarity(a, b).min() > 0.999
        assert not torch.equal(a, b)
    assert torch.equal(close[0], close[0].clamp(min=0))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = training_value(model.train().forward_branches(*x))
    assert all(gradient.isfinite().all() for gradient in gradients(model, value).values())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision(dtype):
    exact = small()
    model = copy.deepcopy(exact).to(dtype)
    x = images()
    with torch.inference_mode():
        assert model.forward_branches(x.to(dtype)).features.dtype == torch.float32
        features = model(x.to(dtype))
        assert features.dtype == dtype
        assert torch.cosine_similarity(features.float(), exact(x)).min() > 0.99


def test_channels_last_changes_nothing():
    model = small(num_classes=3)
    x = images(), images(seed=1)
    expected = gradients(model, training_value(model.forward_branches(*x)))
    model.to(memory_format=torch.channels_last)
    x = [batch.to(memory_format=torch.channels_last) for batch in x]
    for name, gradient in gradients(model, training_value(model.forward_branches(*x))).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))


def test_checkpointing_changes_no_gradient():
    model = small(num_classes=3).train()
    calls = forward_calls(model.layer2[0])
    x = images(), images(seed=1)
    expected_output = model.forward_branches(*x)
    expected = gradients(model, training_value(expected_output))
    assert len(calls) == 1
    model.set_grad_checkpointing()
    output = model.forward_branches(*x)
    torch.testing.assert_close(output.features, expected_output.features)
    actual = gradients(model, training_value(output))
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(calls) == 3  # once more in the backward pass
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing
    torch.testing.assert_close(model.forward_branches(*x).features, output.features)


def test_empty_batches_pass():
    model = small(num_classes=3)
    none, some = images(0), images(2)
    with torch.inference_mode():
        assert model(none).shape == (0, 3)
        torch.testing.assert_close(model(none, some), model(infrared=some))


# Copies


def test_state_dict_round_trip():
    model = small(num_classes=3)
    other = timm.create_model('vireid_dml_r10t', num_classes=3, resnet_args=THIN, fuse_width=8).eval()
    x = images(), images(seed=1)
    with torch.inference_mode():
        expected = model(*x)
        assert not torch.allclose(other(*x), expected)
        assert str(other.load_state_dict(model.state_dict())) == '<All keys matched successfully>'
        assert torch.equal(other(*x), expected)


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize('copied', [copy.deepcopy, through_a_file])
def test_copies_give_the_same_output(copied):
    model = small(num_classes=3)
    other = copied(model)
    x = images(), images(seed=1)
    with torch.inference_mode():
        assert torch.equal(other(*x), model(*x))
        assert torch.equal(other.forward_branches(*x).features, model.forward_branches(*x).features)
    assert other.pretrained_cfg == model.pretrained_cfg


# Intermediate features


def test_intermediates_of_both_modalities():
    model = small()
    visible, infrared = images(2, (64, 32)), images(1, (64, 32), seed=1)
    with torch.inference_mode():
        joint_map, levels = model.forward_intermediates(visible, infrared)
        assert torch.equal(joint_map, model.forward_features(visible, infrared))
        for level, info in zip(levels, model.feature_info, strict=True):
            step = info['reduction']
            assert level.shape == (3, info['num_chs'], 64 // step, 32 // step)
        assert torch.equal(levels[3], joint_map[:, :64])
        for indices, expected in (([0, 2], [0, 2]), (1, [3]), ([-1], [3]), (2, [2, 3]), ([1], [1])):
            chosen = model.forward_intermediates(visible, infrared, indices=indices, intermediates_only=True)
            assert all(torch.equal(a, levels[i]) for a, i in zip(chosen, expected, strict=True))
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got 'NHWC'"):
        model.forward_intermediates(visible, output_fmt='NHWC')


@pytest.mark.parametrize('last', [0, 1, 2, 3])
def test_intermediates_can_stop_early(last):
    model = small()
    with torch.inference_mode():
        joint_map, levels = model.forward_intermediates(images())
        final, chosen = model.forward_intermediates(images(), indices=[last], stop_early=True)
    assert torch.equal(chosen[0], levels[last])
    assert torch.equal(final, joint_map if last == 3 else levels[last])


@pytest.mark.parametrize('last', [0, 1, 2, 3])
def test_pruned_networks_keep_what_is_left(last):
    model = small(num_classes=3)
    x = images(), images(seed=1)
    with torch.inference_mode():
        levels = model.forward_intermediates(*x, intermediates_only=True)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([last]) == [last]
    assert isinstance(pruned.get_classifier(), nn.Identity)
    width = model.feature_info[last]['num_chs']
    assert pruned.num_features == pruned.head_hidden_size == width
    with torch.inference_mode():
        chosen = pruned.forward_intermediates(*x, indices=[last], intermediates_only=True)[0]
        assert torch.equal(chosen, levels[last])
        assert torch.equal(pruned.forward_features(*x), levels[last])
        assert torch.equal(pruned(*x), levels[last])
    pruned.train().set_grad_checkpointing()
    pruned(*x).sum().backward()
    assert not [name for name, parameter in pruned.named_parameters() if parameter.grad is None]
    pruned.eval().reset_classifier(4, 'gem')
    assert pruned(*x).shape == (4, 4)
    assert not any(module.training for module in pruned.modules())
    output = pruned.forward_branches(*x)
    assert output.features.shape == (4, width)
    assert list(output.logits) == ['global']


def test_pruning_nothing_changes_nothing():
    model = small(num_classes=3)
    expected = model(images())
    assert model.prune_intermediate_layers([3], prune_head=False) == [3]
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize('name', RESNETS)
def test_features_only_gives_the_layers(name):
    model = on_meta(name, features_only=True)
    maps = model(meta_images(model))
    height, width = model.pretrained_cfg['input_size'][1:]
    expected = [
        (2, channels, height // step, width // step)
        for channels, step in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]
    assert [tuple(level.shape) for level in maps] == expected
    assert len(on_meta(name, features_only=True, out_indices=(0, 2))(meta_images(model))) == 2


def test_features_only_takes_both_modalities():
    model = small(num_classes=0)
    wrapper = timm.create_model(
        'vireid_dml_r10t', features_only=True, out_indices=(0, 3), resnet_args=THIN, fuse_width=8
    ).eval()
    wrapper.model.load_state_dict(model.state_dict(), strict=False)  # a wrapper has no heads
    x = images(2), images(3, seed=1)
    with torch.inference_mode():
        for given in (dict(visible=x[0]), dict(infrared=x[1]), dict(visible=x[0], infrared=x[1])):
            expected = model.forward_intermediates(**given, indices=[0, 3], intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(wrapper(**given), expected, strict=True))


def test_features_only_trains_with_checkpointing():
    expected = None
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = randomised(timm.create_model('vireid_dml_r10t', features_only=True, out_indices=(0, 1))).train()
        model.model.set_grad_checkpointing(checkpointing)
        calls = forward_calls(model.model.layer2[0])
        levels = model(images())
        sum(level.square().mean() for level in levels).backward()
        actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(calls) == 1 + checkpointing
        assert not [name for name in actual if 'infrared' in name]
        expected = expected or actual
        assert set(actual) == set(expected)
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name])


# As timm's scripts use a model


@pytest.mark.parametrize('name', RESNETS)
def test_images_are_prepared_as_the_network_expects(name):
    """What timm's validate.py does: the whole image, squashed to the input size, normalised as for ImageNet."""
    model = on_meta(name)
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    height, width = (128, 64) if name.endswith('r10t') else (288, 144)
    values = np.zeros((90, 201, 3), dtype=np.uint8)
    values[:, 100:] = (255, 51, 102)  # the right half
    prepared = transform(Image.fromarray(values))
    assert tuple(prepared.shape) == (3, height, width)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for columns, colour in ((slice(0, width // 3), (0, 0, 0)), (slice(-width // 3, None), (255, 51, 102))):
        expected = ((torch.tensor(colour) / 255 - mean) / std)[:, None, None]
        part = prepared[:, :, columns]
        torch.testing.assert_close(part, expected.expand_as(part))
    assert model(prepared[None].to('meta')).shape == (1, model.num_features)


def test_names_that_another_package_has_registered_are_refused():
    program = """if True:
        import importlib, sys, types, warnings
        import timm
        import vireid_timm

        with warnings.catch_warnings(record=True) as caught:  # timm's own, for each model
            warnings.simplefilter('always')
            importlib.reload(vireid_timm.models.dual_stream)
        names = timm.list_models('vireid_*', module='dual_stream')
        assert len(caught) == len(names), [str(warning.message) for warning in caught]
        assert timm.create_model('vireid_agw_r50', device='meta').num_features == 2048

        other = types.ModuleType('other_plugin.zoo')
        sys.modules['other_plugin.zoo'] = other
        exec('def vireid_dml_r18(): pass', other.__dict__)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            timm.models.register_model(other.vireid_dml_r18)
        for name in [name for name in sys.modules if name.startswith('vireid_timm')]:
            del sys.modules[name]
        warnings.simplefilter('error')
        for _ in range(2):
            try:
                import vireid_timm
            except ImportError as error:
                print(error)
        assert timm.models.model_entrypoint('vireid_dml_r18') is other.vireid_dml_r18
    """
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert 'cannot register the model vireid_dml_r18' in line and 'other_plugin.zoo has already registered' in line
        assert 'other_plugin and vireid_timm in separate programs' in line


# Compilers


@pytest.mark.parametrize('fuse_layers', [(), (1, 2, 3)])
def test_symbolic_tracing(fuse_layers):
    model = small(num_classes=3, fuse_layers=fuse_layers)
    _, nodes = get_graph_node_names(model)
    traced = create_feature_extractor(model, nodes[-1:])
    with torch.inference_mode():
        for x in (images(), images(3, (48, 33))):
            assert torch.equal(next(iter(traced(x).values())), model(x))


def test_compiled_inference(compiled):
    model = small()
    x = images(), images(seed=1)
    function = compiled(model)
    with torch.inference_mode():
        torch.testing.assert_close(function(*x), model(*x), rtol=1e-4, atol=1e-4)


def test_compiled_training(compiled):
    model = small(num_classes=3).train()
    x = images(), images(seed=1)
    expected = gradients(model, training_value(model.forward_branches(*x)))
    actual = gradients(model, training_value(compiled(model.forward_branches)(*x)))
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))


def test_exported_with_any_number_of_images():
    model = small()
    x = {'visible': images(2), 'infrared': images(3, seed=1)}
    shapes = {name: {0: torch.export.Dim(f'{name}_count', min=1, max=64)} for name in x}
    both = torch.export.export(model, (), x, dynamic_shapes=shapes).module()
    alone = torch.export.export(
        model, (), {'infrared': x['infrared']}, dynamic_shapes={'infrared': shapes['infrared']}
    ).module()
    with torch.inference_mode():
        for counts in ((2, 3), (5, 1)):
            visible, infrared = images(counts[0], seed=2), images(counts[1], seed=3)
            exported = both(visible=visible, infrared=infrared)
            torch.testing.assert_close(exported, model(visible, infrared), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone(infrared=infrared), model(infrared=infrared), rtol=1e-4, atol=1e-4)
