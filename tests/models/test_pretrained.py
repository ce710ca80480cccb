"""ImageNet weights and Hub-ready folders, offline."""

import logging

import pytest
import safetensors.torch
import timm
import torch
from networks import IMAGENET_TAGS, THIN, TRUNK, images, on_meta, randomised
from torch import nn

import vireid_timm
from vireid_timm.models.dual_stream import checkpoint_filter_fn

START = 'start for fine-tuning'

pytestmark = pytest.mark.usefixtures('one_thread')


# ImageNet weights


def source_of(tag: str) -> str:
    """Name of the timm ResNet whose weights an ImageNet tag uses."""
    return timm.get_pretrained_cfg(tag).hf_hub_id.removeprefix('timm/').partition('.')[0]


def imagenet_weights(tag: str) -> dict[str, torch.Tensor]:
    """The tensors of timm's Hub repository, with random values."""
    state = timm.create_model(source_of(tag)).state_dict()
    generator = torch.Generator().manual_seed(5)
    for value in state.values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.9, generator=generator)
        else:
            value.fill_(77)
    return state


def source_keys(key: str) -> str:
    return key.removeprefix('stem.visible.').removeprefix('stem.infrared.')


def assert_arrived(model: nn.Module, weights: dict[str, torch.Tensor], fresh: nn.Module) -> None:
    """Every tensor of the source but its classifier is in the network bit for bit, the rest is as in `fresh`."""
    untouched, used = fresh.state_dict(), set()
    for key, value in model.state_dict().items():
        if key.startswith(('stem.', *TRUNK)) and '_non_local.' not in key:
            assert torch.equal(value, weights[source_keys(key)]), key
            used.add(source_keys(key))
        else:
            assert torch.equal(value, untouched[key]), key
    assert used == set(weights) - {'fc.weight', 'fc.bias'}


@pytest.mark.parametrize('tag', IMAGENET_TAGS)
def test_imagenet_tags_point_at_weights_that_timm_knows(tag: str) -> None:
    ours = timm.get_pretrained_cfg(tag)
    source = ours.hf_hub_id.removeprefix('timm/')
    theirs = timm.get_pretrained_cfg(source)
    assert source in timm.list_pretrained('resnet*') and source.partition('.')[2] == tag.partition('.')[2]
    assert (ours.license, ours.mean, ours.std) == (theirs.license, theirs.mean, theirs.std)
    default = {'vireid_dml_r10t': 'synthvi', 'vireid_base_r10t': 'c3_in1k'}.get(tag.partition('.')[0], 'tv_in1k')
    assert timm.get_pretrained_cfg(tag.partition('.')[0]).tag == default


@pytest.mark.parametrize('tag', IMAGENET_TAGS)
def test_imagenet_weights_fit_every_network(tag):
    assert timm.get_pretrained_cfg(tag).hf_hub_id == f'timm/{source_of(tag)}.{tag.partition(".")[2]}'
    assert source_of(tag).removeprefix('resnet') == tag.partition('.')[0].rpartition('_r')[2]
    model = on_meta(tag, num_classes=3)
    weights = timm.create_model(source_of(tag), device='meta').state_dict()
    mapped = checkpoint_filter_fn(weights, model)
    own = model.state_dict()
    assert {key: value.shape for key, value in mapped.items()} == {key: value.shape for key, value in own.items()}
    from_source = {source_keys(key) for key in mapped if key.startswith(('stem.', *TRUNK)) and '_non_local.' not in key}
    assert from_source == set(weights) - {'fc.weight', 'fc.bias'}


@pytest.mark.parametrize(
    ('tag', 'ending'),
    [
        ('vireid_dml_r10t.c3_in1k', 'safetensors'),
        ('vireid_base_r10t.c3_in1k', 'pth'),
        ('vireid_dml_r18.tv_in1k', 'safetensors'),
    ],
)
def test_imagenet_weights_arrive_bit_for_bit(tag, ending, tmp_path, caplog):
    weights = imagenet_weights(tag)
    path = tmp_path / f'model.{ending}'
    (safetensors.torch.save_file if ending == 'safetensors' else torch.save)(weights, path)
    for arguments in ({}, {'num_classes': 7}):
        caplog.clear()
        torch.manual_seed(3)
        model = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **arguments)
        torch.manual_seed(3)
        assert_arrived(model, weights, timm.create_model(tag, **arguments))
        assert model.num_classes == arguments.get('num_classes', 0)
        lines = [record for record in caplog.records if START in record.getMessage()]
        assert len(lines) == 1
        assert lines[0].levelno == logging.WARNING
        assert lines[0].name == 'vireid_timm.models.dual_stream'
        assert 'not a re-identification model' in lines[0].getMessage()


@pytest.mark.parametrize('tag', ['vireid_dml_r50.tv_in1k', 'vireid_agw_r50.tv_in1k'])
def test_imagenet_weights_of_the_published_networks(tag):
    weights = imagenet_weights(tag)
    torch.manual_seed(3)
    model = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), num_classes=2)
    torch.manual_seed(3)
    assert_arrived(model, weights, timm.create_model(tag, num_classes=2))


@pytest.mark.parametrize('tag', ['vireid_dml_r10t.c3_in1k', 'vireid_dml_r18.tv_in1k'])
def test_imagenet_weights_for_one_channel(tag):
    weights = imagenet_weights(tag)
    model = timm.create_model(tag, pretrained=True, in_chans=1, pretrained_cfg_overlay=dict(state_dict=dict(weights)))
    state = model.state_dict()
    convolutions = [f'{conv}.weight' for conv in model.pretrained_cfg['first_conv']]
    for key in convolutions:
        torch.testing.assert_close(state[key], weights[source_keys(key)].sum(dim=1, keepdim=True))
    rest = [key for key in state if key.startswith(('stem.', *TRUNK)) and key not in convolutions]
    assert all(torch.equal(state[key], weights[source_keys(key)]) for key in rest)
    assert model.eval()(images(channels=1), images(channels=1)).shape == (4, model.num_features)


def test_imagenet_weights_serve_features_too():
    tag = 'vireid_dml_r10t.c3_in1k'
    weights = imagenet_weights(tag)
    overlay = dict(state_dict=dict(weights))
    model = timm.create_model(tag, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.model.layer4[0].conv1.weight, weights['layer4.0.conv1.weight'])


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.', '_orig_mod.module.'])
def test_prefixes_of_wrapped_models_are_ignored(prefix):
    model = on_meta('vireid_dml_r10t', num_classes=3)
    for weights in (model.state_dict(), imagenet_weights('vireid_dml_r10t.c3_in1k')):
        wrapped = {prefix + key: value for key, value in weights.items()}
        expected, mapped = checkpoint_filter_fn(weights, model), checkpoint_filter_fn(wrapped, model)
        assert mapped.keys() == expected.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ('removed', 'added', 'message'),
    [
        ([], ['layer1.0.se.fc1.weight'], 'tensors that this network lacks: layer1.0.se.fc1.weight'),
        ([], ['norm.bias', 'head.weight'], 'tensors that this network lacks: head.weight, norm.bias'),
        (['layer3.0.conv1.weight'], [], 'lack tensors of the stem and trunk: layer3.0.conv1.weight'),
        (['bn1.bias'], [], 'lack tensors of the stem and trunk: stem.infrared.bn1.bias, stem.visible.bn1.bias'),
    ],
)
def test_imagenet_weights_that_do_not_fit_are_named(removed, added, message):
    tag = 'vireid_dml_r10t.c3_in1k'
    weights = imagenet_weights(tag)
    weights = {key: value for key, value in weights.items() if key not in removed} | dict.fromkeys(added, torch.ones(1))
    overlay = dict(state_dict=weights)
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(tag, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)


def test_imagenet_weights_of_another_width_are_refused():
    weights = imagenet_weights('vireid_dml_r18.tv_in1k')
    weights['layer2.0.conv1.weight'] = weights['layer2.0.conv1.weight'][:, :32]
    with pytest.raises(RuntimeError, match=r'size mismatch for layer2\.0\.conv1\.weight'):
        timm.create_model('vireid_dml_r18.tv_in1k', pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))


# Hub-ready folders


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('vireid_dml_r10t', {}),
        ('vireid_dml_r10t', dict(spatial_weights='static', fuse_layers=[1, 3], fuse_width=16, img_size=[64, 32])),
        ('vireid_dml_r10t', dict(last_stride=2, gem_power=2.5, global_pool='avg', in_chans=1, resnet_args=THIN)),
        ('vireid_base_r10t', dict(fuse_layers=[], resnet_args=THIN)),
        ('vireid_base_r10t', dict(non_local_blocks=[0, 1, 1, 0], non_local_width='half', resnet_args=THIN)),
        ('vireid_dml_r18.tv_in1k', {}),
    ],
)
def test_saved_folders_give_the_same_outputs(name, arguments, tmp_path, caplog):
    model = randomised(timm.create_model(name, num_classes=6, **arguments)).eval()
    vireid_timm.save_model_folder(model, tmp_path / 'model', model_args=arguments)
    x = images(channels=model.in_chans), images(seed=1, channels=model.in_chans)
    with torch.inference_mode():
        logits, features = model(*x), model.forward_head(model.forward_features(*x), pre_logits=True)
        branches = model.forward_branches(*x)
        loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
        assert torch.equal(loaded(*x), logits)
        for branch, expected in branches.logits.items():
            assert torch.equal(loaded.forward_branches(*x).logits[branch], expected)
        loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True, num_classes=0).eval()
        assert torch.equal(loaded(*x), features)
        assert torch.equal(loaded.forward_branches(*x).features, branches.features)
        loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True, num_classes=9).eval()
        assert torch.equal(loaded.forward_head(loaded.forward_features(*x), pre_logits=True), features)
    # The warning is for ImageNet weights only.
    assert not [record for record in caplog.records if START in record.getMessage()]


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('vireid_dml_r10t', dict(resnet_args=THIN)),
        ('vireid_dml', dict(backbone='resnet10t', img_size=(64, 32))),
        ('vireid_parts_r50', dict(backbone='resnet10t', part_width=8, img_size=(64, 32))),
    ],
)
def test_what_a_model_retrieves_with_is_saved_with_it(name, arguments, tmp_path):
    model = randomised(timm.create_model(name, retrieval='after-bn', **arguments)).eval()
    x = images(size=(64, 32))
    with torch.inference_mode():
        joint_map = model.forward_features(x)
        for retrieval, expected in (
            ('before-bn', model.forward_pool(joint_map)),
            ('after-bn', model.forward_neck(joint_map)),
        ):
            model.retrieval = retrieval
            vireid_timm.save_model_folder(model, tmp_path / retrieval)
            loaded = timm.create_model(f'local-dir:{tmp_path / retrieval}', pretrained=True).eval()
            assert loaded.retrieval == retrieval
            torch.testing.assert_close(loaded(x), expected)
            embedded = vireid_timm.embed(loaded, x.clamp(0, 1), 'visible')[0]
            assert torch.equal(embedded, vireid_timm.embed(model, x.clamp(0, 1), 'visible', features=retrieval)[0])


def test_saved_folders_keep_their_image_size_unless_another_is_given(tmp_path):
    model = timm.create_model('vireid_dml_r10t', img_size=(64, 32), resnet_args=THIN)
    vireid_timm.save_model_folder(model, tmp_path / 'model', input_size=(3, 96, 48))
    for given, expected in (({}, (96, 48)), (dict(img_size=(80, 40)), (80, 40)), (dict(img_size=64), (64, 64))):
        loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True, **given)
        assert tuple(loaded.pretrained_cfg['input_size']) == (3, *expected)
