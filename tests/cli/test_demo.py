"""The demo end to end, in small, and the weights that the package ships."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vireid_timm
from vireid_timm.cli import demo
from vireid_timm.cli.main import main
from vireid_timm.figures.rank_list import HIT, MISS

NAME = 'vireid_dml_r10t.synthvi'
WEIGHTS = Path(vireid_timm.__file__).with_name('weights') / f'{NAME}.safetensors'


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, 'IDENTITIES', 8)
    monkeypatch.setattr(demo, 'TEST_IDENTITIES', 6)
    monkeypatch.setitem(demo.FINE_TUNING, 'epochs', 1)
    monkeypatch.setitem(demo.FINE_TUNING, 'identities_per_batch', 4)


def test_the_demo_fails_if_the_saved_model_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # What was trained is taken for an untrained network, so that the saved one cannot agree with it.
    monkeypatch.setattr(
        'vireid_timm.hub.folder.load_model', lambda path: timm.create_model('vireid_dml_r10t', num_classes=0)
    )
    assert main(['demo', '--output', str(tmp_path / 'demo'), '--device', 'cpu']) == 1
    assert 'does not give the numbers of the trained one' in capsys.readouterr().err


def test_the_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    assert main(['demo', '--output', str(tmp_path / 'demo'), '--device', 'cpu']) == 0
    summary = json.loads((tmp_path / 'demo/demo.json').read_text())
    for row in ('untrained', 'embedded', 'fine_tuned', 'reloaded'):
        assert 0 <= summary[row]['rank1'] <= 1 and 0 < summary[row]['mAP'] <= 1
    assert summary['reloaded'] == summary['fine_tuned']
    assert summary['embedded']['mAP'] > summary['untrained']['mAP']
    assert (Path(summary['model']) / 'model.safetensors').is_file()
    pixels = np.asarray(Image.open(summary['image']))
    assert (pixels == HIT).all(axis=2).any() and (pixels == MISS).all(axis=2).any()


def test_shipped_weights_are_small_half_precision_and_load_without_network() -> None:
    assert WEIGHTS.stat().st_size < 12e6
    model = timm.create_model(NAME, pretrained=True)
    assert timm.create_model('vireid_dml_r10t', pretrained=True).pretrained_cfg['tag'] == 'synthvi'  # the default tag
    assert model.num_classes == 0 and model.num_features == 704
    classifying = timm.create_model(NAME, pretrained=True, num_classes=7).eval()
    assert classifying(torch.randn(1, 3, 64, 32)).shape == (1, 7)


def test_shipped_weights_score_what_their_card_says() -> None:
    stated = json.loads(WEIGHTS.with_suffix('.json').read_text())
    model = timm.create_model(NAME, pretrained=True)
    report = vireid_timm.evaluate(model, vireid_timm.create_dataset('synthetic', **stated['dataset']))
    assert report.weights == stated['weights']
    for protocol, result in stated['protocols'].items():
        # Another machine may render a pixel or round a product differently.
        assert report[protocol].mean['mAP'] == pytest.approx(result['mAP'], abs=0.01)
        assert report[protocol].num_valid_queries >= 200 * 4
    assert f'{100 * stated["protocols"]["infrared-to-visible"]["mAP"]:.2f}' in WEIGHTS.with_suffix('.md').read_text()
