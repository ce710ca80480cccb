"""The field's other networks, against slow versions of them."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import gradients, images, meta_images, on_meta, randomised, training_value
from timm.models import create_feature_extractor, get_graph_node_names
from torch import nn

import vireid_timm
from vireid_timm.training.task import ViReIDTask

SIZE = (96, 48)
RESNET = dict(channels=(8, 16, 24, 32), layers=(1, 1, 1, 1))

pytestmark = pytest.mark.usefixtures('one_thread')


def zero_padding(**kwargs) -> nn.Module:
    small = dict(layers=(1, 1, 1, 1), resnet_args=dict(channels=(8, 16, 24, 32)))
    return randomised(timm.create_model('vireid_zeropad_r50', **small, **kwargs)).eval()


def parts(**kwargs) -> nn.Module:
    model = timm.create_model('vireid_parts_r50', backbone_args=RESNET, part_width=8, img_size=SIZE, **kwargs)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.stem.infrared.parameters():  # both start with the same values
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return randomised(model).eval()


def test_zero_padding_is_one_network_on_two_channels():
    """Visible images are grey in the first channel, infrared ones in the second, and zeros fill the other."""
    model = zero_padding(num_classes=3)
    network = timm.create_model('resnet50', in_chans=2, num_classes=0, **RESNET).eval()
    network.layer4[0].conv2.stride = network.layer4[0].downsample[0].stride = (1, 1)
    state = model.state_dict()
    network.load_state_dict(
        {key.removeprefix('stem.shared.'): value for key, value in state.items() if '_head' not in key}
    )
    visible, infrared = images(3, SIZE), images(2, SIZE, seed=1)
    padded = []
    for channel, batch in enumerate((visible, infrared)):
        for image in batch:
            both = torch.zeros(2, *SIZE)
            both[channel] = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
            padded.append(both)
    with torch.inference_mode():
        maps = network.forward_features(torch.stack(padded))
        torch.testing.assert_close(model.forward_features(visible, infrared), maps, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(infrared=visible), model(visible), rtol=1e-3)
    assert zero_padding(in_chans=1)(images(2, SIZE, channels=1)).shape == (2, model.num_features)


def test_imagenet_weights_compute_the_same_on_grey_images():
    source = randomised(timm.create_model('resnet50', **RESNET)).eval()
    overlay = dict(state_dict=dict(source.state_dict()))
    small = dict(layers=(1, 1, 1, 1), resnet_args=dict(channels=(8, 16, 24, 32)), last_stride=2)
    model = timm.create_model('vireid_zeropad_r50', pretrained=True, pretrained_cfg_overlay=overlay, **small).eval()
    grey = images(2, SIZE, channels=1).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        expected = source.forward_features(grey)
        torch.testing.assert_close(model.forward_features(grey), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.forward_features(infrared=grey), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('size', [(96, 48), (288, 32)])
def test_parts_are_embedded_one_by_one(size):
    model = parts(num_classes=3)
    model.train()
    model.eval()
    given = {'visible': images(2, size), 'infrared': images(1, size, seed=1)}
    networks = {}
    for modality in given:
        network = timm.create_model('resnet50', num_classes=0, **RESNET).eval()
        network.layer4[0].conv2.stride = network.layer4[0].downsample[0].stride = (1, 1)
        own = {}
        for key, value in model.state_dict().items():
            if f'.{modality}.' in key:
                own[key.split(f'.{modality}.')[1]] = value
        network.load_state_dict(own)
        networks[modality] = network
    features, logits = [], []
    with torch.inference_mode():
        for modality, batch in given.items():
            for image in networks[modality].forward_features(batch):
                rows = image.shape[1] // 6
                values = []
                for number, part in enumerate(model.parts):
                    stripe = image[:, number * rows : (number + 1) * rows].mean(dim=(1, 2))
                    values.append(part.norm((part.embed.weight @ stripe + part.embed.bias)[None])[0])
                features.append(torch.cat([value / value.norm() for value in values]))
                scores = []
                for part, value in zip(model.parts, values):
                    scores.append(part.fc.weight @ torch.where(value > 0, value, 0.1 * value) + part.fc.bias)
                logits.append(torch.stack(scores).mean(dim=0))
        joint_map = model.forward_features(**given)
        actual = model.forward_head(joint_map, pre_logits=True)
        torch.testing.assert_close(actual, torch.stack(features), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(model(**given), torch.stack(logits), rtol=1e-3, atol=1e-5)
        branches = model.forward_branches(**given)
        mean = torch.stack(list(branches.logits.values())).mean(dim=0)
        torch.testing.assert_close(mean, model(**given))
        before = branches.features.split(8, dim=1)
        normed = torch.cat([F.normalize(part.norm(one)) for part, one in zip(model.parts, before)], dim=1)
        torch.testing.assert_close(normed, actual, rtol=1e-3, atol=1e-5)


def test_parts_of_each_modality_share_nothing_but_their_heads():
    model = on_meta('vireid_parts_r50', num_classes=3)
    assert tuple(model.forward_features(meta_images(model)).shape) == (2, 2048, 18, 9)
    assert (model.num_features, model.head_hidden_size) == (2048, 6 * 512)
    names = {name.split('.')[0] for name, _ in model.named_parameters()}
    assert names == {'stem', 'private_levels', 'parts'}
    assert {f'{name}.weight' for name in model.pretrained_cfg['classifier']} <= set(model.state_dict())
    with pytest.raises(ValueError, match='num_parts and part_width must be at least 1, got 0 and 512'):
        on_meta('vireid_parts_r50', num_parts=0)


@pytest.mark.parametrize('create', [zero_padding, parts])
def test_every_parameter_is_trained(create):
    model = create(num_classes=3).train()
    x = images(4, SIZE), images(4, SIZE, seed=1)
    for name, gradient in gradients(model, training_value(model.forward_branches(*x))).items():
        assert gradient.isfinite().all() and gradient.any(), name
    task = ViReIDTask(model, device=torch.device('cpu'))
    labels = torch.tensor([0, 0, 1, 1] * 2)
    losses = task(x, labels)
    assert losses['loss'].isfinite() and 'mutual' not in losses


@pytest.mark.parametrize('create', [zero_padding, parts])
def test_saving_resetting_and_tracing(create, tmp_path):
    model = create(num_classes=3)
    x = images(2, SIZE), images(1, SIZE, seed=1)
    vireid_timm.save_model_folder(model, tmp_path / 'model', input_size=(3, *SIZE))
    with torch.inference_mode():
        expected, features = model(*x), model.forward_head(model.forward_features(*x), pre_logits=True)
        loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
        assert torch.equal(loaded(*x), expected)
        assert tuple(loaded.pretrained_cfg['input_size']) == (3, *SIZE)
        _, nodes = get_graph_node_names(model)
        traced = create_feature_extractor(model, nodes[-1:])
        torch.testing.assert_close(next(iter(traced(x[0]).values())), model(x[0]))
        model.reset_classifier(7)
        assert model(*x).shape == (3, 7)
        model.reset_classifier(0)
        torch.testing.assert_close(model(*x), features)
        model.reset_classifier(0, '')
        assert model(*x).ndim == 4
    levels = model.forward_intermediates(*x, intermediates_only=True)
    for last in range(4):
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([last])
        torch.testing.assert_close(pruned.forward_features(*x), levels[last])
