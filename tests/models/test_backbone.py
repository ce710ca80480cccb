"""The networks on timm backbones of many families, against these backbones and against the paper's ResNets."""

import copy
import math
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from networks import forward_calls, gradients, images, meta_images, on_meta, randomised, training_value
from timm.data import resolve_model_data_config
from timm.models import create_feature_extractor, get_graph_node_names
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vireid_timm
from vireid_timm.constants import MODALITIES
from vireid_timm.models.backbone import DualStreamBackbone, default_cfgs

SIZE = (64, 32)
# Backbone -> arguments that make it small, strides of its levels, and how it pools by default.
BACKBONES = {
    'resnet18': (dict(channels=(8, 16, 24, 32)), [4, 8, 16, 16], 'gem'),
    'resnet26d': (dict(channels=(8, 16, 24, 32)), [4, 8, 16, 16], 'gem'),
    'resnest14d': (dict(channels=(8, 16, 24, 32), stem_width=8), [4, 8, 16, 16], 'gem'),
    'resnetv2_50': (dict(channels=(32, 64, 96, 128), layers=(1, 1, 1, 1), stem_chs=16), [4, 8, 16, 16], 'gem'),
    'regnety_002': ({}, [4, 8, 16, 16], 'gem'),
    'tf_efficientnet_lite0': ({}, [4, 8, 16, 16], 'gem'),
    'mobilenetv3_small_050': ({}, [4, 8, 16, 16], 'avg'),
    'mobilenetv4_conv_small_035': ({}, [4, 8, 16, 16], 'gem'),
    'convnext_atto': (dict(depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)), [4, 8, 16, 32], 'avg'),
    'convnextv2_atto': (dict(depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)), [4, 8, 16, 32], 'avg'),
    'vit_tiny_patch16_224': (dict(depth=5, embed_dim=48), [16] * 4, 'avg'),
    'vit_small_patch14_dinov2': (dict(depth=4, embed_dim=48), [14] * 4, 'avg'),
    'vit_small_patch16_dinov3': (dict(depth=4, embed_dim=48), [16] * 4, 'avg'),
    'swin_tiny_patch4_window7_224': (dict(embed_dim=12, depths=(2, 2, 2, 2)), [4, 8, 16, 32], 'avg'),
    'pvt_v2_b0': (dict(depths=(1, 1, 1, 1)), [4, 8, 16, 16], 'avg'),
}

pytestmark = pytest.mark.usefixtures('one_thread')


def size_for(backbone: str) -> tuple[int, int]:
    return (70, 42) if 'patch14' in backbone else SIZE


def network_on(backbone: str, **arguments) -> DualStreamBackbone:
    arguments = {'img_size': size_for(backbone), 'backbone_args': BACKBONES[backbone][0], **arguments}
    return randomised(timm.create_model('vireid_dml', backbone=backbone, **arguments)).eval()


def images_for(backbone: str, count: int = 2, seed: int = 0) -> torch.Tensor:
    return images(count, size_for(backbone), seed=seed)


@pytest.fixture(scope='module', params=BACKBONES)
def network(request):
    torch.manual_seed(0)
    return network_on(request.param, num_classes=5)


# Against the backbones themselves


@pytest.mark.parametrize('modality', ['visible', 'infrared'])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_levels_and_final_map_are_the_backbones(backbone, modality):
    model = network_on(backbone, last_stride=2 if len(set(BACKBONES[backbone][1])) > 1 else None)
    args, size = BACKBONES[backbone][0], size_for(backbone)
    fixed = {'img_size': size} if timm.get_pretrained_cfg(backbone).fixed_input_size else {}
    original = timm.create_model(backbone, num_classes=0, **args, **fixed).eval()
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith('trunk.model.'):
            state[key.removeprefix('trunk.model.')] = value
        elif key.startswith(f'stem.{modality}.'):
            state[key.removeprefix(f'stem.{modality}.').replace('patch_embed_proj.', 'patch_embed.proj.')] = value
    missing, unknown = original.load_state_dict(state, strict=False)
    assert not unknown and all('head' in key or 'fc_norm' in key for key in missing), missing
    x = images_for(backbone)
    with torch.inference_mode():
        joint_map, levels = model.forward_intermediates(**{modality: x})
        features = original.forward_features(x)
        if features.ndim == 3:
            features = features[:, original.num_prefix_tokens :].transpose(1, 2).unflatten(2, levels[3].shape[2:])
        elif getattr(original, 'output_fmt', 'NCHW') == 'NHWC':
            features = features.permute(0, 3, 1, 2)
        assert torch.equal(levels[3], features)
        assert torch.equal(levels[3], joint_map[:, : features.shape[1]])
        tapped = original.forward_intermediates(x, intermediates_only=True)
        assert all(any(torch.equal(level, one) for one in tapped) for level in levels[:3])


@pytest.mark.parametrize('depth', [18, 50])
def test_on_a_resnet_it_is_the_papers_network(depth):
    small = dict(channels=(8, 16, 24, 32))
    args = dict(num_classes=3, fuse_width=8)
    paper = timm.create_model(f'vireid_dml_r{depth}', layers=(1, 1, 1, 2), resnet_args=small, **args)
    paper = randomised(paper).eval()
    small['layers'] = (1, 1, 1, 2)
    model = timm.create_model('vireid_dml', backbone=f'resnet{depth}', backbone_args=small, **args).eval()
    state = {}
    for key, value in paper.state_dict().items():
        state[f'trunk.model.{key}' if key.startswith('layer') else key] = value
    model.load_state_dict(state)
    for size in (SIZE, (57, 33)):
        x = images(2, size), images(1, size, seed=1)
        with torch.inference_mode():
            assert torch.equal(model(*x), paper(*x))
            expected = paper.forward_branches(*x)
            actual = model.forward_branches(*x)
            assert torch.equal(actual.features, expected.features)
            assert all(torch.equal(actual.logits[name], logits) for name, logits in expected.logits.items())
    assert [info['reduction'] for info in model.feature_info] == [info['reduction'] for info in paper.feature_info]


# What every one does


def test_both_modalities_give_the_rows_of_each_alone(network):
    visible, infrared = images_for(network.backbone, 3), images_for(network.backbone, seed=1)
    for one in network.stem.infrared.parameters():  # both stems start with the same values
        one.data += 0.1 * torch.linspace(-1, 1, one.numel()).view(one.shape)
    with torch.inference_mode():
        joint = network(visible, infrared)
        alone = torch.cat([network(visible), network(infrared=infrared)])
        torch.testing.assert_close(joint, alone, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(network(infrared=visible), network(visible), rtol=1e-3)
        features = network.forward_head(network.forward_features(visible), pre_logits=True)
        branches = network.forward_branches(visible)
        neck = network.joint_head.neck(branches.features)
        torch.testing.assert_close(features, neck, rtol=1e-3, atol=1e-4)
        assert torch.equal(network(visible), network.get_classifier()(features))
    assert branches.features.shape == (3, network.num_features)
    assert tuple(branches.logits) == ('global', 'fusion', 'joint')


def test_the_configuration_matches_the_network(network):
    _, strides, pooling = BACKBONES[network.backbone]
    height, width = size_for(network.backbone)
    source = timm.get_pretrained_cfg(network.backbone)
    cfg = network.pretrained_cfg
    assert [info['reduction'] for info in network.feature_info] == strides
    assert network.global_pool.pool_type == pooling
    assert (cfg['mean'], cfg['std'], cfg['interpolation']) == (source.mean, source.std, source.interpolation)
    assert resolve_model_data_config(network)['input_size'] == (3, height, width)
    with torch.inference_mode():
        levels = network.forward_intermediates(images_for(network.backbone), intermediates_only=True)
        joint_map = network.forward_features(images_for(network.backbone))
    for level, info in zip(levels, network.feature_info, strict=True):
        grid = [math.ceil(side / info['reduction']) for side in (height, width)]
        assert list(level.shape) == [2, info['num_chs'], *grid]
    assert tuple(joint_map.shape) == (2, network.num_features, *cfg['pool_size'])
    first = network.feature_info[0]['num_chs']
    assert network.fuse_width == first  # the paper's 256 are layer1's channels
    assert network.num_features == network.feature_info[3]['num_chs'] + 3 * first
    assert (levels[3] < 0).any() == (pooling == 'avg')


def test_training_and_retrieval_pool_alike(network):
    """GeM takes negative values for 0, the average does not."""
    x = images_for(network.backbone, 3)
    with torch.inference_mode():
        last = network.forward_intermediates(x, intermediates_only=True)[3]
        clamped = (last.clamp(min=0) ** 3).mean(dim=(2, 3)) ** (1 / 3)
        expected = last.mean(dim=(2, 3)) if network.global_pool.pool_type == 'avg' else clamped
        features = network.forward_branches(x).features[:, : last.shape[1]]
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
        pooled = network.global_pool(network.forward_features(x))
        torch.testing.assert_close(pooled[:, : last.shape[1]], expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pooled, network.forward_branches(x).features, rtol=1e-3, atol=1e-3)


def test_every_parameter_is_trained_with_and_without_checkpointing(network):
    model = copy.deepcopy(network).train()
    x = images_for(model.backbone, 4), images_for(model.backbone, 4, seed=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == 'DropPath':
            module.eval()
    value = training_value(model.forward_branches(*x))
    expected = gradients(model, value)
    assert all(gradient.isfinite().all() for gradient in expected.values())
    model.set_grad_checkpointing()
    actual = gradients(model, training_value(model.forward_branches(*x)))
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_layer_decay_and_the_groups_of_the_optimiser_cover_everything(network):
    optimizer = create_optimizer_v2(network, 'sgd', lr=0.1, momentum=0.9, layer_decay=0.5)
    scales = {id(one): group['lr_scale'] for group in optimizer.param_groups for one in group['params']}
    names = {name: scales[id(one)] for name, one in network.named_parameters()}
    assert len(scales) == len(names)
    stem = {scale for name, scale in names.items() if name.startswith('stem.')}
    deepest = max(scale for name, scale in names.items() if name.startswith('trunk.'))
    assert len(stem) == 1 and min(stem) == min(names.values()) < deepest
    rest = [name for name in names if not name.startswith(network.pretrained_prefixes)]
    assert {names[name] for name in rest} == {1.0}
    assert {name.partition('.')[0] for name in rest} == {'fusion', 'global_head', 'fusion_head', 'joint_head'}


@pytest.mark.parametrize('backbone', ['tf_efficientnet_lite0', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_saved_folders_give_the_same_outputs(backbone, tmp_path):
    model = network_on(backbone, num_classes=4, in_chans=1, fuse_layers=[1, 3], global_pool='avg', drop_rate=0.2)
    vireid_timm.save_model_folder(model, tmp_path / 'model', half=False)
    x = [images(2, SIZE, seed=seed, channels=1) for seed in (0, 1)]
    with torch.inference_mode():
        expected = model(*x)
        loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
        assert torch.equal(loaded(*x), expected)
        assert loaded.pretrained_cfg['interpolation'] == timm.get_pretrained_cfg(backbone).interpolation
        assert not loaded.starts_from_backbone and model.starts_from_backbone
        features = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True, num_classes=0).eval()(*x)
        assert torch.equal(features, model.forward_head(model.forward_features(*x), pre_logits=True))
    with pytest.raises(RuntimeError, match='weights of another network'):
        timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True, backbone='resnet18', backbone_args={})


def test_new_classifiers_and_no_pooling(network):
    model = copy.deepcopy(network)
    x = images_for(model.backbone)
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), before)
    model.reset_classifier(0, '')
    assert model(x).shape == model.forward_features(x).shape
    model.reset_classifier(0, 'gem')
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize('last', [0, 1, 2, 3])
def test_features_only_and_pruning(network, last):
    x = images_for(network.backbone)
    wrapper = timm.create_model(
        'vireid_dml',
        backbone=network.backbone,
        backbone_args=BACKBONES[network.backbone][0],
        img_size=size_for(network.backbone),
        features_only=True,
        out_indices=(last,),
    ).eval()
    state = network.state_dict()
    wrapper.model.load_state_dict({key: state[key] for key in wrapper.model.state_dict()})
    with torch.inference_mode():
        levels = network.forward_intermediates(infrared=x, intermediates_only=True)
        alone = wrapper(infrared=x)
    assert len(alone) == 1
    # Only the last level has the final norm, and a head convolution where the backbone has one.
    assert torch.equal(alone[0], levels[last])
    assert wrapper.feature_info.channels() == [network.feature_info[last]['num_chs']]


@pytest.mark.parametrize(
    'backbone', ['resnet26d', 'convnext_atto', 'vit_small_patch16_dinov3', 'swin_tiny_patch4_window7_224']
)
def test_compilers(backbone, compiled):
    network = network_on(backbone)
    x = images_for(backbone), images_for(backbone, seed=1)
    _, nodes = get_graph_node_names(network)
    traced = create_feature_extractor(network, nodes[-1:])
    function = compiled(network)
    with torch.inference_mode():
        expected = network(x[0])
        assert torch.equal(next(iter(traced(x[0]).values())), expected)
        torch.testing.assert_close(function(*x), network(*x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('backbone', ['mobilenetv4_conv_small_035', 'vit_small_patch14_dinov2'])
def test_exported_with_any_number_of_images(backbone):
    model = network_on(backbone)
    x = {'visible': images_for(backbone, 2), 'infrared': images_for(backbone, 3)}
    shapes = {name: {0: torch.export.Dim(f'{name}_count', min=1, max=64)} for name in x}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exported = torch.export.export(model, (), x, dynamic_shapes=shapes).module()
    visible, infrared = images_for(backbone, 5, seed=1), images_for(backbone, 1, seed=2)
    with torch.inference_mode():
        actual = exported(visible=visible, infrared=infrared)
        torch.testing.assert_close(actual, model(visible, infrared), rtol=1e-3, atol=1e-4)


# Options


def in_shared(key: str) -> str:
    """The name that a tensor of a level of each modality's own has where the level is shared."""
    name, rest = re.sub(r'^(stem|private_levels\.\d)\.\w+?\.', '', key).split('.', 1)
    if name == 'patch_embed' and rest.startswith('proj.'):
        return f'stem.visible.patch_embed_{rest}'
    name = name if name == 'patch_embed' else name.replace('_', '.')
    return f'trunk.model.{name}.{rest}'


@pytest.mark.parametrize(
    ('backbone', 'private'),
    [
        ('resnet18', {1: ['layer1'], 2: ['layer1', 'layer2'], 4: ['layer1', 'layer2', 'layer3', 'layer4']}),
        ('regnety_002', {1: ['s1'], 2: ['s1', 's2']}),
        ('convnext_atto', {1: ['stages_0'], 3: ['stages_0', 'stages_1', 'stages_2']}),
        ('tf_efficientnet_lite0', {1: ['blocks_0', 'blocks_1'], 2: ['blocks_0', 'blocks_1', 'blocks_2']}),
        ('swin_tiny_patch4_window7_224', {1: ['layers_0']}),
    ],
)
def test_stages_of_each_modality(backbone, private):
    shared = network_on(backbone)
    for count, names in private.items():
        model = network_on(backbone, private_stages=count)
        parts = [model.stem, *model.private_levels]
        assert [name for part in parts for name, _ in part.infrared.named_children()][-len(names) :] == names
        assert len(parts) == max(count, 1)
        # Both start from the same values, so one may compare with the network that shares them.
        state = shared.state_dict()
        for key, value in model.state_dict().items():
            value.copy_(state[key] if key in state else state[in_shared(key)])
        x = images_for(backbone), images_for(backbone, seed=1)
        with torch.inference_mode():
            torch.testing.assert_close(model(*x), shared(*x), rtol=1e-3, atol=1e-4)
            levels = model.forward_intermediates(*x, intermediates_only=True)
            expected = shared.forward_intermediates(*x, intermediates_only=True)
            for level, one in zip(levels, expected, strict=True):
                torch.testing.assert_close(level, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(backbone='nothing'), "timm has no backbone 'nothing'"),
        (dict(backbone='vireid_dml_r18'), "timm has no backbone 'vireid_dml_r18'"),
        (dict(backbone='resnet18.no_such_tag'), "resnet18 has no weights 'no_such_tag', but .*a1_in1k"),
        (dict(backbone='vgg11'), 'vgg11 has no layers of its own before its first level'),
        (dict(backbone='levit_128s'), 'levit_128s has maps with 1/16, 1/32, 1/64 of the image; needed are 1/4'),
        (dict(backbone='xcit_nano_12_p16_224'), 'xcit_nano_12_p16_224 cannot have one stem per modality'),
        (dict(backbone='efficientformer_l1'), 'cannot use the backbone efficientformer_l1 with images of 256x128'),
        (dict(backbone='resnet18', img_size=(0, 3)), 'img_size must be height and width'),
        (dict(backbone='resnet18', private_stages=5), 'private_stages must be from 0 to 4, got 5'),
        (dict(backbone='resnet18', last_stride=3), 'last_stride must be 1 or 2, got 3'),
        (dict(backbone='resnet18', fuse_layers=(3, 1)), r'increasing layer numbers .*got \(3, 1\)'),
        (dict(backbone='resnet18', backbone_args=dict(nonsense=1)), 'cannot create the backbone resnet18 .*nonsense'),
        (dict(backbone='vit_tiny_patch16_224', private_stages=1), 'cannot have one stem .* and its first 1 levels'),
        (dict(backbone='vit_tiny_patch16_224', last_stride=2), 'last_stride=2 is not possible, because .* equal grids'),
        (dict(backbone=5), "'backbone' must be text, got 5"),
        (dict(backbone='resnet18', backbone_args=3), "'backbone_args' must be .*, got 3"),
        (dict(backbone='resnet18', fuse_layers=3), "'fuse_layers' must be a list, .* got 3"),
        (dict(backbone='resnet18', fuse_width=0), 'fuse_width must be at least 1, got 0'),
        (dict(backbone='resnet18', backbone_args=dict(num_classes=3)), 'num_classes cannot be among backbone_args'),
        (dict(backbone='convnext_atto', last_stride=1), 'last_stride=1 is not possible, because .* merges neighbours'),
        (dict(backbone='swin_tiny_patch4_window7_224', last_stride=1), 'last_stride=1 is not possible'),
        (dict(backbone='convnext_atto', img_size=(120, 60)), 'convnext_atto are maps of .* multiples of 32'),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta('vireid_dml', **arguments)


def test_arguments_of_the_backbone_are_sent_to_it():
    with pytest.raises(TypeError, match=r'do not take drop_path_rate; .* backbone_args=dict\(drop_path_rate=\.\.\.\)'):
        on_meta('vireid_dml', backbone='resnet18', drop_path_rate=0.1)
    model = on_meta('vireid_dml', backbone='resnet18', backbone_args=dict(drop_path_rate=0.5))
    assert model.trunk.model.layer4[1].drop_path.drop_prob == 0.5


def test_images_of_another_size_where_the_backbone_takes_one():
    model = network_on('vit_tiny_patch16_224')
    with pytest.raises(ValueError, match=r'infrared images need height and width \[64, 32\], got \[96, 32\]'):
        model(images(2, SIZE), images(2, (96, 32)))
    convolutional = network_on('tf_efficientnet_lite0')
    assert convolutional(images(2, (97, 45))).shape == (2, convolutional.num_features)
    with pytest.raises(ValueError, match='maps of .* at this image size'):
        network_on('convnext_atto')(images(2, (72, 36)))


def test_the_default_size_is_whole_patches():
    sizes = {'resnet18': (256, 128), 'vit_tiny_patch16_224': (256, 128), 'vit_small_patch14_dinov2': (252, 126)}
    for backbone, size in sizes.items():
        model = on_meta('vireid_dml', backbone=backbone)
        assert resolve_model_data_config(model)['input_size'] == (3, *size)
        assert model(meta_images(model)).shape == (2, model.num_features)


@pytest.mark.parametrize('name', sorted(set(timm.list_models(module='backbone')) - {'vireid_dml', 'vireid_base'}))
def test_names_with_a_backbone(name):
    model = on_meta(name, num_classes=3)
    assert model(meta_images(model)).shape == (2, 3)
    hub_id = model.pretrained_cfg['hf_hub_id']
    assert hub_id == f'timm/{model.backbone}' and model.backbone in timm.list_pretrained()
    assert model.pretrained_cfg['license'] == timm.get_pretrained_cfg(model.backbone).license
    assert f'{name}.{model.pretrained_cfg["tag"]}' in timm.list_pretrained('vireid_*')
    first, *others = default_cfgs[name].tags
    assert first == model.pretrained_cfg['tag'] and all(default_cfgs[name].cfgs[tag].file for tag in others)
    assert on_meta(name, backbone='resnet18').backbone == 'resnet18'


def test_the_weights_in_the_package_that_start_from_imagenet():
    name = 'vireid_dml_efficientnet_lite0'
    model = timm.create_model(f'{name}.in1k_ft_synthvi', pretrained=True).eval()
    start = timm.get_pretrained_cfg('tf_efficientnet_lite0')
    config = resolve_model_data_config(model)
    assert (config['input_size'], config['mean'], config['std']) == ((3, 128, 64), start.mean, start.std)
    assert model.pretrained_cfg['license'] == start.license
    assert model.retrieval == 'before-bn' and not model.starts_from_backbone
    # The two stems were trained apart, and batch norm kept the statistics that both started with.
    state = model.state_dict()
    conv, norm = ('stem.{}.conv_stem.weight', 'stem.{}.bn1.running_mean')
    assert not torch.equal(*(state[conv.format(modality)] for modality in MODALITIES))
    assert torch.equal(*(state[norm.format(modality)] for modality in MODALITIES))
    assert timm.create_model(f'{name}.in1k_ft_synthvi').retrieval == 'after-bn'  # untrained


def test_the_documented_table_is_right():
    page = Path(__file__).parents[2] / 'docs' / 'backbones.md'
    pattern = r'`(vireid_dml_\w+)` \| `(\S+)` \| (\d+)×(\d+) \| (\d+) \| (\S+) M \| (\S+) \|'
    rows = re.findall(pattern, page.read_text('utf-8'))
    assert {name for name, *_ in rows} == {*timm.list_models('vireid_dml_*', module='backbone'), 'vireid_dml_r50'}
    for name, backbone, height, width, features, parameters, gflops in rows:
        model = on_meta(name)
        assert model.pretrained_cfg['hf_hub_id'] == f'timm/{backbone}'
        assert resolve_model_data_config(model)['input_size'] == (3, int(height), int(width))
        assert model.head_hidden_size == int(features)
        assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}' == parameters
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.forward_features(meta_images(model, 1))
        assert f'{counter.get_total_flops() / 2e9:.2f}' == gflops


def test_the_baseline_has_the_global_branch_only():
    model = on_meta('vireid_base', backbone='regnety_002', num_classes=3)
    assert model.branches == ('global',) and model.num_features == 368
    assert model.pretrained_cfg['classifier'] == ('global_head.fc',)
    assert on_meta('vireid_base').num_features == 2048


def test_a_batch_goes_through_the_trunk_once():
    model = network_on('regnety_002')
    calls = forward_calls(model.trunk.model.s3)
    model(images(2, SIZE), images(3, SIZE))
    assert len(calls) == 1


# Weights of backbones


def test_the_weights_of_a_backbone_arrive_in_both_stems_and_the_trunk(tmp_path, caplog):
    original = randomised(timm.create_model('mobilenetv4_conv_small_035'))
    path = tmp_path / 'weights.pth'
    torch.save(original.state_dict(), path)
    arguments = dict(backbone='mobilenetv4_conv_small_035', img_size=SIZE, pretrained=True, num_classes=3)
    model = timm.create_model('vireid_dml', pretrained_cfg_overlay=dict(file=str(path)), **arguments)
    weights, own = original.state_dict(), model.state_dict()
    for key, value in own.items():
        name = key.removeprefix('trunk.model.').removeprefix('stem.visible.').removeprefix('stem.infrared.')
        if key.startswith(('trunk.', 'stem.')):
            assert torch.equal(value, weights[name]), key
    used = {key.split('.', 2)[2] for key in own if key.startswith(('trunk.', 'stem.'))}
    assert {key for key in weights if key not in used} == {
        key for key in weights if key.startswith(('conv_head', 'norm_head', 'classifier'))
    }
    lines = [record.getMessage() for record in caplog.records if 'start for fine-tuning' in record.getMessage()]
    assert len(lines) == 1 and 'mobilenetv4_conv_small_035' in lines[0]
    assert model.starts_from_backbone


def test_files_of_other_weights_are_refused_and_those_of_the_network_taken(tmp_path):
    arguments = dict(backbone='resnet10t', img_size=SIZE, num_classes=3)
    other = timm.create_model('test_convnext').state_dict()
    half = {key: value for key, value in timm.create_model('resnet10t').state_dict().items() if 'layer3' not in key}
    for name, state in {'other': other, 'half': half}.items():
        torch.save(state, tmp_path / f'{name}.pth')
        overlay = dict(file=str(tmp_path / f'{name}.pth'))
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict'):
            timm.create_model('vireid_dml', pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    own = randomised(timm.create_model('vireid_dml', **arguments))
    torch.save(own.state_dict(), tmp_path / 'own.pth')
    overlay = dict(file=str(tmp_path / 'own.pth'), num_classes=3)
    model = timm.create_model('vireid_dml', pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in own.state_dict().items())
    assert not model.starts_from_backbone
    assert 'state_dict' not in model.pretrained_cfg


def numbers_kept_for_backward(model: nn.Module) -> int:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        model.forward_branches(images(4, SIZE), images(4, SIZE))
    return sum(sizes)


def test_grad_checkpointing_keeps_fewer_numbers_of_private_levels_too():
    model = network_on('resnet18', num_classes=3, private_stages=3).train()
    before = numbers_kept_for_backward(model)
    model.set_grad_checkpointing()
    assert numbers_kept_for_backward(model) < 0.6 * before
    with pytest.raises(ValueError, match='dla34 cannot recompute its activations'):
        on_meta('vireid_dml', backbone='dla34').set_grad_checkpointing()


def test_the_weights_of_a_transformer_are_resized(tmp_path):
    args = dict(depth=4, embed_dim=48)
    original = timm.create_model('vit_tiny_patch16_224', **args)
    path = tmp_path / 'weights.pth'
    torch.save(original.state_dict(), path)
    model = timm.create_model(
        'vireid_dml',
        backbone='vit_tiny_patch16_224',
        backbone_args=args,
        pretrained=True,
        img_size=SIZE,
        pretrained_cfg_overlay=dict(file=str(path)),
    )
    assert model.trunk.model.pos_embed.shape == (1, 1 + 4 * 2, 48)
    assert torch.equal(model.trunk.model.pos_embed[:, 0], original.pos_embed[:, 0])
    assert torch.equal(model.stem.infrared.patch_embed_proj.weight, original.patch_embed.proj.weight)
