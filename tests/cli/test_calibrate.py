"""`vireid calibrate` from end to end, on rendered people."""

import json
from pathlib import Path

import pytest
import torch

from vireid_timm.cli.main import main
from vireid_timm.evaluation.features import weights_fingerprint
from vireid_timm.evaluation.report import Report, read_results
from vireid_timm.hub.folder import load_model, model_calibration, save_model_folder

pytestmark = pytest.mark.usefixtures('one_thread')

WEIGHTS = 'vireid_dml_r10t.synthvi'
SMALL = '--input-size 3 64 32 --device cpu --cache off --workers 0'.split()


def people(seed: int, count: int = 12) -> list[str]:
    options = f'identities=0 test_identities={count} images_per_modality=2 size=(64,32) seed={seed}'
    return ['--dataset', 'synthetic', '--dataset-kwargs', *options.split()]


@pytest.fixture(scope='module')
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('calibrated') / 'model'
    assert main(['calibrate', WEIGHTS, '--output', str(folder), *people(5), *SMALL]) == 0
    return folder


def test_a_copy_of_a_named_model_gets_a_calibration_and_eval_uses_it(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = model_calibration(calibrated)
    assert found.settings['size'] == [64, 32] and found.fitted_on['options']['seed'] == 5
    assert found.settings['weights'] == weights_fingerprint(load_model(WEIGHTS))
    report, table = tmp_path / 'report.json', tmp_path / 'results.csv'
    files = ['--report', str(report), '--results-file', str(table)]
    command = ['eval', '--model', str(calibrated), *people(6), *SMALL]
    assert main([*command, *files]) == 0
    result = Report.load(report)['infrared-to-visible']
    assert result.calibration['pairs']['count'] == 24 * 24 and 0 <= result.calibration['pairs']['ece'] <= 1
    row = next(row for row in read_results(table) if row['protocol'] == 'infrared-to-visible')
    assert float(row['ece_pairs']) == pytest.approx(100 * result.calibration['pairs']['ece'], abs=1e-3)
    assert float(row['tar_at_far_1e-2']) == pytest.approx(100 * result.decisions['tar_at_far_1e-2'], abs=1e-3)
    assert 'probabilities fitted on 12 test identities of synthetic' in capsys.readouterr().out
    for flag, name in (('--flip-test', 'flip_test'), ('--centre', 'centre')):
        assert main([*command, flag, '--report', str(report)]) == 0
        assert f'other settings ({name})' in capsys.readouterr().err
        assert (
            Report.load(report).calibration is None and Report.load(report)['infrared-to-visible'].calibration is None
        )
    assert Report.load(report).centre


def test_it_stays_with_the_same_weights_only(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(['hub', 'save', str(calibrated), str(tmp_path / 'half'), '--half']) == 0
    kept = model_calibration(tmp_path / 'half')
    assert kept.slope == model_calibration(calibrated).slope
    assert kept.settings['weights'] == weights_fingerprint(load_model(tmp_path / 'half'))
    model = load_model(calibrated)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    other = tmp_path / 'other'
    facts = json.loads((calibrated / 'config.json').read_text())['vireid']
    save_model_folder(model, other, facts={'calibration': facts['calibration']})
    capsys.readouterr()
    assert main(['hub', 'save', str(other), str(tmp_path / 'saved')]) == 0
    assert 'about other weights' in capsys.readouterr().err
    assert model_calibration(tmp_path / 'saved') is None
    assert 'calibration' not in json.loads((tmp_path / 'saved/config.json').read_text())['vireid']


def test_a_folder_is_changed_in_place(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / 'model'
    save_model_folder(load_model(WEIGHTS), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert model_calibration(folder) is None
    assert main(['calibrate', str(folder), *people(5), *SMALL]) == 0
    assert model_calibration(folder).slope == pytest.approx(model_calibration(calibrated).slope)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {'config.json'}
    assert 'Fitted on 12 people of synthetic' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([WEIGHTS, *people(5)], 'give --output DIR'),
        ([WEIGHTS, '--output', '{new}', *people(1)], 'training identities of this model'),
        ([WEIGHTS, '--output', '{new}', *people(5, 4)], 'at least 10 people'),
        ([WEIGHTS, '--output', '{new}', *people(5), '--protocol', 'mixed'], 'also pairs images of one'),
        ([WEIGHTS, '--output', '/proc/new', *people(5)], '/proc/new'),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [word.format(new=tmp_path / 'new') for word in arguments]
    assert main(['calibrate', *words, *SMALL]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('vireid: error: ') and message in error
    assert not (tmp_path / 'new').exists()


def test_the_weights_in_the_package_are_calibrated_on_other_people_than_they_were_trained_on() -> None:
    found = model_calibration(WEIGHTS)
    assert (
        found.mismatch(
            {
                'weights': weights_fingerprint(load_model(WEIGHTS)),
                'features': 'before-bn',
                'flip_test': False,
                'crops': 1,
                'centre': False,
                'size': [128, 64],
                'tracklets': False,
            }
        )
        == ''
    )
    assert found.fitted_on['options']['seed'] not in (0, 1)
