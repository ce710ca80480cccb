"""Hub-ready folders and everything that names a model."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import vireid_timm
from vireid_timm.hub import load_model, save_embedded_weights, save_model_folder


def _model(**kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('vireid_dml_r10t', **kwargs).eval()


def _features(model: torch.nn.Module) -> torch.Tensor:
    pictures = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model.eval()(pictures, pictures.flip(0))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(num_classes=5),
        dict(num_classes=0),
        dict(num_classes=3, fuse_layers=(2, 3), fuse_width=32, spatial_weights='static', img_size=(64, 32)),
        dict(num_classes=3, in_chans=1, gem_power=2.0, last_stride=2),
    ],
)
def test_a_saved_model_is_loaded_with_its_arguments_and_weights(tmp_path: Path, kwargs: dict) -> None:
    model = _model(**kwargs).to(memory_format=torch.channels_last)
    save_model_folder(model, tmp_path / 'model', facts={'dataset': 'none'})
    assert sorted(path.name for path in (tmp_path / 'model').iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
    ]
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.num_classes == model.num_classes and loaded.fuse_layers == model.fuse_layers
    assert loaded.gem_power == model.gem_power
    config = json.loads((tmp_path / 'model/config.json').read_text())
    assert config['architecture'] == 'vireid_dml_r10t' and config['vireid'] == {'dataset': 'none'}
    assert config['pretrained_cfg']['crop_mode'] == 'squash' and 'file' not in config['pretrained_cfg']


def test_the_card_imports_the_package_first_and_says_what_it_must_not_be_used_for(tmp_path: Path) -> None:
    save_model_folder(_model(), tmp_path / 'model', table='mAP 12.3')
    card = (tmp_path / 'model/README.md').read_text()
    code = card.split('```python\n')[1]
    assert code.startswith('import vireid_timm') and 'must not be used' in card and 'mAP 12.3' in card


def test_a_model_loads_from_every_name_that_it_has(tmp_path: Path) -> None:
    model = _model(num_classes=5)
    save_model_folder(model, tmp_path / 'model')
    model.reset_classifier(0)
    expected = _features(model)
    for source in (f'local-dir:{tmp_path / "model"}', str(tmp_path / 'model'), tmp_path / 'model/model.safetensors'):
        loaded = load_model(source)
        assert loaded.num_classes == 0
        torch.testing.assert_close(_features(loaded), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('vireid_dml_r51', 'neither a folder, a file nor a model'),
        ('resnet18', 'not a visible-infrared re-ID model'),
        ('vireid_dml_r10t.nonsense', 'nonsense'),
        ('local-dir:no/such/folder', 'no/such/folder'),
        ('no/such/file.pth', 'no/such/file.pth'),
    ],
)
def test_what_is_no_model_is_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(source, pretrained=source != 'resnet18')


def test_damaged_and_foreign_weights_are_named(tmp_path: Path) -> None:
    save_model_folder(_model(), tmp_path / 'model')
    weights = tmp_path / 'model/model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='cannot load a model'):
        load_model(tmp_path / 'model')
    other = timm.create_model('vireid_base_r10t').state_dict()
    safetensors.torch.save_file(other, weights)
    with pytest.raises(ValueError, match='Missing key'):
        load_model(tmp_path / 'model')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='no checkpoint'):
        load_model(tmp_path / 'empty')


def test_embedded_weights_are_half_and_without_classifiers(tmp_path: Path) -> None:
    model = _model(num_classes=5)
    save_embedded_weights(model, tmp_path / 'weights.safetensors')
    saved = safetensors.torch.load_file(tmp_path / 'weights.safetensors')
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float16}
    assert not [name for name in saved if '.fc.' in name]
    loaded = timm.create_model(
        'vireid_dml_r10t', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.safetensors'))
    )
    model.reset_classifier(0)
    torch.testing.assert_close(_features(loaded), _features(model), rtol=0.02, atol=0.02)


def test_package_offers_what_the_design_names() -> None:
    for name in (
        'create_dataset',
        'protocol_trials',
        'rank_metrics',
        'evaluate',
        'embed',
        'train',
        'RandomChannelCombination',
        'ChannelRandomErasing',
        'WeightedRegularizedTriplet',
        'MutualLearningLoss',
        'IdentityModalitySampler',
        'GeneralizedMeanPool',
    ):
        assert callable(getattr(vireid_timm, name))
