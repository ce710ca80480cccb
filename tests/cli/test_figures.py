"""`vireid explain` and `vireid plot` as their users run them."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vireid_timm.cli.main import main
from vireid_timm.synthvi.render import image_address

MODEL = 'vireid_dml_r10t.synthvi'
INFRARED, VISIBLE = (image_address(modality, 3, 1, 0, size=(64, 32)) for modality in ('infrared', 'visible'))
TINY = (
    '--dataset synthetic --dataset-kwargs identities=6 test_identities=3 size=(64,32) --input-size 3 64 32 '
    '--identities-per-batch 2 --images-per-modality 2 --epochs 2 --val-share 0.5 --workers 0 --pad 2 --device cpu'
).split()


def _explain(*arguments: str) -> int:
    return main(['explain', *arguments, '--model', MODEL, '--device', 'cpu'])


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    output = tmp_path_factory.mktemp('runs')
    model = ['--model', 'vireid_base_r10t', '--experiment', 'first']
    assert main(['train', '--output', str(output), *model, *TINY]) == 0
    shutil.copytree(output / 'first', output / 'second' / 'first')
    return [output / 'first', output / 'second' / 'first']


@pytest.fixture(scope='module')
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('reports') / 'plain.json'
    data = '--dataset synthetic --dataset-kwargs identities=2 test_identities=4 --device cpu --cache off'.split()
    assert main(['eval', '--model', MODEL, *data, '--report', str(path)]) == 0
    return path


def test_two_images_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / 'new' / 'both.png'
    both = [INFRARED, VISIBLE, '--modality', 'infrared', '--other-modality', 'visible']
    assert _explain(*both, '--output', str(path), '--features', 'after-bn') == 0
    said = capsys.readouterr().out
    assert 'Similarity: ' in said and str(path) in said
    assert _explain(INFRARED, '--modality', 'infrared', '--output', str(tmp_path / 'one.png')) == 0
    assert 'Similarity' not in capsys.readouterr().out
    sizes = [np.asarray(Image.open(name)).shape[0] for name in (path, tmp_path / 'one.png')]
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['missing.png', '--modality', 'infrared'], 'missing.png: this image cannot be read (no such file)\n'),
        ([INFRARED, '--modality', 'infrared', '--other-modality', 'visible'], '--other-modality needs a second image'),
        ([INFRARED, '--modality', 'infrared', '--output', '.'], "Is a directory: '.'"),
    ],
)
def test_what_cannot_be_explained_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _explain(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1 and not list(tmp_path.iterdir())


def test_charts_are_drawn_of_what_there_is(
    runs: list[Path], report: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    features = f'--model {MODEL} --dataset synthetic --dataset-kwargs identities=2 test_identities=3 size=(64,32)'
    for sources, charts in (
        (runs, {'curves.png'}),
        ([report], {'cmc.png'}),
        (features.split(), {'similarities.png', 'features.png'}),
        ([runs[0], report, *features.split()], {'curves.png', 'cmc.png', 'similarities.png', 'features.png'}),
    ):
        output = tmp_path / f'{len(charts)}{len(sources)}'
        assert main(['plot', *map(str, sources), '--output', str(output), '--device', 'cpu']) == 0
        assert {path.name for path in output.iterdir()} == charts
        said = capsys.readouterr().out
        for chart in charts:
            assert str(output / chart) in said and np.asarray(Image.open(output / chart)).std() > 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'nothing to draw'),
        (['no/run'], 'there is no no/run/summary.csv'),
        (['missing.json'], "No such file or directory: 'missing.json'"),
        (['{run}', 'missing.json'], "No such file or directory: 'missing.json'"),
        (['{run}/config.json'], 'config.json is not a report'),
        (['{run}', '--output', '{run}/train.log'], "Not a directory: '{run}/train.log/curves.png'"),
        (['{run}', '--data-dir', 'images'], '--data-dir images needs --model'),
        (['--model', MODEL, '--data-dir', 'missing'], 'there is no folder missing'),
        (
            [*f'--model {MODEL} --dataset synthetic --dataset-kwargs identities=2 test_identities=0'.split()],
            'at least 3',
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_error_before_anything_is_drawn(
    arguments: list[str],
    message: str,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(['plot', *(word.format(run=runs[0]) for word in arguments)]) == 1
    error = capsys.readouterr().err
    assert message.format(run=runs[0]) in error and 'Traceback' not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('command', 'module', 'extra'), [('explain', 'captum', 'explain'), ('plot', 'matplotlib', 'plots')]
)
def test_a_missing_package_is_named_with_its_extra(
    command: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in (f'{module}.attr', f'{module}.figure'):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = [INFRARED, '--modality', 'infrared', '--model', MODEL] if command == 'explain' else ['run']
    assert main([command, *arguments]) == 1
    assert f'vireid_timm[{extra}]' in capsys.readouterr().err
