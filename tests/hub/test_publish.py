"""Check Hub-ready folders and refuse to publish unfit ones; test_hub_server.py tests the transfer."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vireid_timm.cli.main import main
from vireid_timm.hub.folder import REFERENCE
from vireid_timm.hub.publish import check_model, push_folder

pytestmark = pytest.mark.usefixtures('one_thread')

FILES = ['README.md', 'config.json', 'model.safetensors', 'reference.safetensors']


def _config(folder: Path) -> dict:
    return json.loads((folder / 'config.json').read_text())


def _save_config(folder: Path, config: dict) -> None:
    (folder / 'config.json').write_text(json.dumps(config))


def test_check_says_what_it_checked(saved: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(['hub', 'check', str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in lines[:4]] == ['files', 'configuration', 'weights', 'reference']
    assert '5 classes, images 3x64x32' in lines[1]
    assert hashlib.sha256((saved / 'model.safetensors').read_bytes()).hexdigest() in lines[2]


def _rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Replace the weights and the SHA-256 in the configuration."""
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    change(state)
    safetensors.torch.save_file(state, folder / 'model.safetensors')
    config = _config(folder)
    config['vireid']['weights']['sha256'] = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    _save_config(folder, config)


def _set(config: dict, keys: str, value: object) -> None:
    *path, last = keys.split('.')
    for key in path:
        config = config[key]
    config[last] = value


def _configured(keys: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = _config(folder)
        _set(config, keys, value)
        _save_config(folder, config)

    return change


def _with_reference(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        reference = safetensors.torch.load_file(folder / REFERENCE)
        change(reference)
        safetensors.torch.save_file(reference, folder / REFERENCE)

    return rewrite


SPOILED = {
    'pickle': (lambda folder: (folder / 'pytorch_model.bin').touch(), 'pytorch_model.bin: pickles can run'),
    'no reference': (lambda folder: (folder / REFERENCE).unlink(), 'has no reference.safetensors'),
    'no weights': (lambda folder: (folder / 'model.safetensors').unlink(), 'has no model.safetensors'),
    'no configuration': (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
    'broken configuration': (lambda folder: (folder / 'config.json').write_text('[]'), 'no pretrained_cfg'),
    'truncated weights': (
        lambda folder: (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:999]),
        'damaged or replaced',
    ),
    'truncated reference': (lambda folder: (folder / REFERENCE).write_bytes(b'1234'), 'cannot read reference'),
    'another architecture': (_configured('architecture', 'resnet18'), "'resnet18' is not an architecture"),
    'an architecture with other tensors': (_configured('architecture', 'vireid_dml_r18'), 'Missing key'),
    'another pooling': (_configured('model_args.gem_power', 2.5), 'does not compute the features'),
    'another normalisation': (_configured('pretrained_cfg.mean', [0.5, 0.5, 0.5]), 'does not compute the features'),
    'another image size': (
        _configured('pretrained_cfg.input_size', [3, 96, 32]),
        r'no images of shape .* 96, 32',
    ),
    'cropped images': (_configured('pretrained_cfg.crop_mode', 'center'), 'crop_mode'),
    'other weights': (
        lambda folder: _rewrite_weights(folder, lambda state: state['stem.visible.conv1.0.weight'].mul_(1.05)),
        'does not compute the features',
    ),
    'weights that are not numbers': (
        lambda folder: _rewrite_weights(folder, lambda state: state['joint_head.neck.running_var'].fill_(torch.nan)),
        'differ by inf',
    ),
    'a tensor less': (
        lambda folder: _rewrite_weights(folder, lambda state: state.pop('layer4.0.conv1.weight')),
        'Missing key',
    ),
    'other reference features': (
        _with_reference(lambda reference: reference['infrared_before_bn'].mul_(1.01)),
        'does not compute the features',
    ),
    'features left out': (_with_reference(lambda reference: reference.pop('visible_after_bn')), 'visible_after_bn'),
}


@pytest.mark.parametrize('spoiled', SPOILED)
def test_check_refuses(copy: Path, spoiled: str, capsys: pytest.CaptureFixture) -> None:
    spoil, message = SPOILED[spoiled]
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        check_model(copy)
    assert main(['hub', 'check', f'local-dir:{copy}']) == 1
    error = capsys.readouterr().err
    assert error.startswith('vireid: error: ') and error.count('\n') == 1 and str(copy) in error


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('local-dir:no/such', 'no folder no/such'),
        ('vireid_dml_r50', 'no folder vireid_dml_r50; give hf-hub:OWNER/NAME or a folder'),
        ('nothing', 'no file, folder or model .nothing.'),
        ('someone/nothing', 'hf-hub:someone/nothing.*local-dir:someone/nothing'),
        ('hf-hub:someone/nothing', 'someone/nothing'),
        ('hf-hub:a/b/c', 'a/b/c'),
    ],
)
def test_check_names_what_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(name)


@pytest.mark.parametrize('private', ['last.pth', 'class_map.json', 'best', 'weights.bin'])
def test_push_refuses_what_is_not_for_others(copy: Path, private: str) -> None:
    (copy / private).touch()
    with pytest.raises(ValueError, match=f'{private}.* do not publish'):
        push_folder(copy, 'someone/model')


@pytest.mark.parametrize('missing', FILES)
def test_push_refuses_an_incomplete_folder(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(ValueError, match=f'has no {missing}'):
        push_folder(copy, 'someone/model')


def test_push_refuses_what_does_not_pass_the_check(copy: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match='no folder'):
        push_folder(copy / 'nowhere', 'someone/model')
    _configured('model_args.gem_power', 2.5)(copy)
    assert main(['hub', 'push', str(copy), 'someone/model', '--private']) == 1
    assert 'does not compute the features' in capsys.readouterr().err


def test_push_without_a_hub_says_so(copy: Path) -> None:
    with pytest.raises(ValueError, match='someone/model: .*HF_HUB_OFFLINE'):
        push_folder(copy, 'hf-hub:someone/model')
    with pytest.raises(ValueError, match='not a name'):
        push_folder(copy, 'not a name')
