"""The script that writes the training data of `in1k_ft_synthvi`."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.constants import INFRARED, MODALITIES, VISIBLE
from vireid_timm.synthvi.render import render_address

SCRIPT = Path(__file__).parents[2] / 'hub' / 'in1k_ft_synthvi_data.py'


def _write(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, 'argv', [SCRIPT.name, '--workers', '0', *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name='__main__')


def test_every_identity_has_two_images_of_each_modality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(monkeypatch, tmp_path / 'data', '--identities', 3)
    records = vireid_timm.create_dataset('csv', tmp_path / 'data' / 'table.csv').train
    people = [f'person-0000{number}' for number in range(3)]
    scenes = [f'scene-00000{number}' for number in range(3)]
    assert records.identities() == [*people, *scenes]
    for identity in records.identities():
        modality = records.modality[records.identity == identity].tolist()
        assert sorted(modality) == 2 * [INFRARED] + 2 * [VISIBLE]
    assert {np.asarray(Image.open(path)).shape[:2] for path in records.path} == {(128, 64)}
    # The first two people are near-infrared, the third is thermal; cameras of the world are kept.
    for spectrum, identity, number in (('near-infrared', 1, 2), ('thermal', 2, 3)):
        rows = np.flatnonzero(records.identity == people[identity])
        camera = records.camera[rows[number]]
        address = f'synthvi:{spectrum}:s1:infrared:c{camera}:i{identity}:p{number - 2}:128x64'
        assert np.array_equal(np.asarray(Image.open(records.path[rows[number]])), render_address(address))


def test_a_scene_follows_from_seed_and_number(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    images = {}
    for run, seed in enumerate((0, 0, 1)):
        (tmp_path / f'{run}' / 'scenes').mkdir(parents=True)
        rows = script['write_scene'](tmp_path / f'{run}', seed, 5)
        images[run] = [np.asarray(Image.open(tmp_path / f'{run}' / name)) for name, *_ in rows]
    shapes = [image.shape for image in images[0]]
    assert shapes == [(128, 64, 3), (128, 64, 3), (128, 64), (128, 64)]
    assert all(map(np.array_equal, images[0], images[1])) and not any(map(np.array_equal, images[0], images[2]))
    assert not np.array_equal(images[0][0], images[0][1]) and not np.array_equal(images[0][2], images[0][3])


def test_the_spectra_share_outlines_and_not_tones() -> None:
    """Edges of the modalities coincide far more than by chance; brightness does not follow from brightness."""
    script = runpy.run_path(str(SCRIPT))
    together, apart, tones = [], [], []
    before = None
    for number in range(30):
        looks = script['scene'](np.random.default_rng((0, number)))
        visible, infrared = looks[VISIBLE].mean(axis=2), looks[INFRARED]
        edges = [np.hypot(*np.gradient(look)).ravel() for look in (visible, infrared)]
        together.append(np.corrcoef(edges)[0, 1])
        if before is not None:
            apart.append(np.corrcoef(edges[0], before)[0, 1])
        before = edges[1]
        tones.append(np.corrcoef(visible.ravel(), infrared.ravel())[0, 1])
    assert np.mean(together) > np.mean(apart) + 0.2
    assert abs(np.mean(tones)) < 0.5 and np.min(tones) < -0.3


@pytest.mark.usefixtures('one_thread')
def test_the_recipe_trains_on_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands at the top of the recipe, in small, from random values in place of ImageNet's."""
    monkeypatch.chdir(tmp_path)
    _write(monkeypatch, tmp_path / 'data', '--identities', 2)
    backbone = timm.create_model('tf_efficientnet_lite0')
    start = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    safetensors.torch.save_file(start, 'lite0.safetensors')
    small = '--input-size 3 64 32 --identities-per-batch 4 --epochs 1 --workers 0 --cache ram --device cpu'
    words = ['train', '--config', 'in1k_ft_synthvi', '--data-dir', 'data/table.csv', '--experiment', 'small']
    assert main([*words, *small.split()]) in (0, None)
    model = vireid_timm.load_model('output/train/small')
    class_map = json.loads(Path('output/train/small/class_map.json').read_text())
    assert list(class_map) == ['person-00000', 'person-00001', 'scene-000000', 'scene-000001']
    trained = model.state_dict()
    for modality in MODALITIES:  # batch norm keeps its statistics, the weights move
        for name in ('bn1.running_mean', 'bn1.running_var'):
            assert torch.equal(trained[f'stem.{modality}.{name}'], start[name])
        assert not torch.equal(trained[f'stem.{modality}.conv_stem.weight'], start['conv_stem.weight'])


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        (('--identities', 1), '--identities must be at least 2, got 1'),
        (('--seed', -1), '--seed must be at least 0, got -1'),
        (('--workers', 999), 'workers must be at most'),
    ):
        with pytest.raises(SystemExit, match=message):
            _write(monkeypatch, tmp_path / 'data', *words)
    assert not (tmp_path / 'data').exists()
    (tmp_path / 'data').mkdir()
    with pytest.raises(SystemExit, match='data exists already; choose another folder'):
        _write(monkeypatch, tmp_path / 'data')
