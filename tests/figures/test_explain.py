"""Grad-CAM against a slow version that differentiates the joint map itself, and weight maps that sum to one."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from vireid_timm.data.images import load_image
from vireid_timm.figures.explain import explain, save_cams, save_explanations
from vireid_timm.synthvi.render import image_address

SIZE = (64, 32)
IMAGES = [
    (image_address('infrared', 3, 1, 0, size=SIZE), 'infrared'),
    (image_address('visible', 3, 4, 1, size=SIZE), 'visible'),
]
MODELS = {
    'fused': ('vireid_dml_r10t', {}),
    'global': ('vireid_base_r10t', {}),
    'layer4 fused': ('vireid_dml_r10t', {'fuse_layers': (2, 4)}),
    'static': ('vireid_dml_r10t', {'spatial_weights': 'static'}),
}


def _model(name: str) -> torch.nn.Module:
    model, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(model, num_classes=0, img_size=SIZE, device='cpu', **options)


def _joint_map(model: torch.nn.Module, image: tuple[str, str]) -> torch.Tensor:
    path, modality = image
    pixels = torch.tensor(load_image(path, SIZE)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    return model.forward_features(**{modality: (pixels - mean) / std})


def _slow_cams(
    model: torch.nn.Module, image: tuple[str, str], other: tuple[str, str], features: str
) -> tuple[float, dict[str, np.ndarray]]:
    def pooled(joint_map: torch.Tensor) -> torch.Tensor:
        power = model.global_pool.power
        vector = ((joint_map**power).mean(dim=(2, 3)) + 1e-12) ** (1 / power)
        if features == 'before-bn':
            return vector
        neck = (model.joint_head or model.global_head).neck
        return (vector - neck.running_mean) / (neck.running_var + neck.eps).sqrt() * neck.weight

    direction = F.normalize(pooled(_joint_map(model, other)).detach())
    joint_map = _joint_map(model, image).detach().requires_grad_()
    own = pooled(joint_map)
    similarity = (own * direction).sum() / own.norm().detach()
    (gradient,) = torch.autograd.grad(similarity, joint_map)
    cams = {}
    for branch, channels in (
        ('global', range(512)),
        ('fusion', range(512, joint_map.shape[1])),
    ):
        for channel in channels:
            part = gradient[0, channel].mean() * joint_map[0, channel].detach()
            cams[branch] = cams.get(branch, 0) + part
    return similarity.item(), {branch: cam.clamp(min=0).numpy() for branch, cam in cams.items()}


@pytest.mark.parametrize('features', ['after-bn', 'before-bn'])
@pytest.mark.parametrize('name', MODELS)
def test_maps_are_those_of_a_slow_version(name: str, features: str) -> None:
    model = _model(name)
    for found, image, other in zip(explain(model, IMAGES, features), IMAGES, IMAGES[::-1], strict=True):
        similarity, cams = _slow_cams(model.eval(), image, other, features)
        assert found.similarity == pytest.approx(similarity, abs=1e-5) and found.modality == image[1]
        assert found.cams.keys() == cams.keys() and (found.image == load_image(image[0], SIZE)).all()
        for branch, cam in cams.items():
            np.testing.assert_allclose(found.cams[branch], cam, atol=1e-5 * cam.max())
            assert cam.shape == (4, 2) and cam.max() > 0
    (alone,) = explain(model, IMAGES[:1], features)
    similarity, cams = _slow_cams(model, IMAGES[0], IMAGES[0], features)
    assert alone.similarity == pytest.approx(1) == pytest.approx(similarity)
    np.testing.assert_allclose(alone.cams['global'], cams['global'], atol=1e-5 * cams['global'].max())


@pytest.mark.parametrize(
    ('name', 'layers'),
    [
        ('fused', ['layer1', 'layer2', 'layer3']),
        ('layer4 fused', ['layer2', 'layer4']),
        ('static', ['layer1', 'layer2', 'layer3']),
        ('global', []),
    ],
)
def test_weights_sum_to_one_over_the_layers(name: str, layers: list[str], tmp_path: Path) -> None:
    explanations = explain(_model(name), IMAGES)
    for found in explanations:
        assert list(found.weights) == layers
        assert all(weights.shape == (16, 8) and (weights > 0).all() for weights in found.weights.values())
        if layers:
            np.testing.assert_allclose(sum(found.weights.values()), 1, atol=1e-6)
    for count in (1, 2):
        save_explanations(explanations[:count], tmp_path / f'{count}.png')
    heights = [len(np.asarray(Image.open(tmp_path / f'{count}.png'))) for count in (1, 2)]
    assert heights[0] < heights[1]


@pytest.mark.parametrize('corner', [(8, 0), (40, 16)])
def test_what_two_images_share_attracts_the_maps(corner: tuple[int, int], tmp_path: Path) -> None:
    pattern = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    y, x = corner
    images = []
    for number, grey in enumerate((40, 60)):
        pixels = np.full((*SIZE, 3), grey, dtype=np.uint8)
        pixels[y : y + 16, x : x + 16] = pattern
        Image.fromarray(pixels).save(tmp_path / f'{number}.png')
        images.append((str(tmp_path / f'{number}.png'), 'visible'))
    for found in explain(_model('fused'), images, 'before-bn'):
        for cam in found.cams.values():
            row, column = np.unravel_index(cam.argmax(), cam.shape)
            assert y <= 16 * row + 8 < y + 16 + 8 and x <= 16 * column < x + 16


def test_maps_of_many_images_are_drawn_side_by_side(tmp_path: Path) -> None:
    explanations = [explain(_model('fused'), [image])[0] for image in IMAGES]
    sizes = []
    for count in (1, 6):
        save_cams((explanations * 3)[:count], tmp_path / 'cams.png')
        with Image.open(tmp_path / 'cams.png') as image:
            sizes.append(image.size)
    assert sizes[0][0] < sizes[1][0] and sizes[0][1] == sizes[1][1]


def test_the_model_is_left_as_it_was() -> None:
    model = _model('fused').train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, IMAGES)
    assert [module.training for module in model.modules()] == modes
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_explained_is_named() -> None:
    model = _model('fused')
    with pytest.raises(ValueError, match='no such file') as raised:
        explain(model, [('missing.png', 'visible')])
    assert 'skip' not in str(raised.value)
    with pytest.raises(ValueError, match="unknown features 'both'"):
        explain(model, IMAGES, 'both')
    model.reset_classifier(0, '')
    with pytest.raises(ValueError, match='returns maps'):
        explain(model, IMAGES)
