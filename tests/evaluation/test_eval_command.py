"""`vireid eval`: mistakes are found before anything is computed, and no result is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.evaluation.report import Report, read_results
from vireid_timm.run_folder import LAST
from vireid_timm.training.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')

DATA = '--dataset synthetic --dataset-kwargs identities=0 test_identities=3 images_per_modality=2 size=(64,32)'.split()
ON = [*DATA, *'--device cpu --cache off --workers 0 --protocol infrared-to-visible'.split()]


def _command(model: Path | str, *arguments: str) -> list[str]:
    return ['eval', '--checkpoint', str(model), *ON, *arguments]


@pytest.fixture
def run(copy: Path, tmp_path: Path) -> Path:
    """A run folder: `best/`, and a checkpoint of the same weights."""
    folder = tmp_path / 'run'
    folder.mkdir()
    copy.rename(folder / 'best')
    (folder / 'config.json').write_bytes((folder / 'best/config.json').read_bytes())
    state = safetensors.torch.load_file(folder / 'best/model.safetensors')
    write_checkpoint(folder, {'arch': 'vireid_dml_r10t', 'epoch': 1, 'state_dict': state})
    return folder


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading data or loading a model is a failure."""
    monkeypatch.setattr(sys.modules['vireid_timm.data.readers'], 'create_dataset', None)


@pytest.mark.parametrize('flag', ['--report', '--results-file'])
@pytest.mark.parametrize('place', ['{folder}', '{file}/new', '/proc/new/report', '{file}/deep/new'])
@pytest.mark.usefixtures('nothing_computed')
def test_an_unwritable_file_is_found_before_the_evaluation(
    flag: str, place: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / 'file').touch()
    path = place.format(folder=tmp_path, file=tmp_path / 'file')
    assert main(_command(saved, flag, path)) == 1
    error = capsys.readouterr().err
    assert path in error and error.startswith('vireid: error: ') and error.count('\n') == 1
    assert list(tmp_path.iterdir()) == [tmp_path / 'file']


@pytest.mark.usefixtures('nothing_computed')
def test_a_file_that_is_no_table_of_results_is_found_before_the_evaluation(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / 'notes.txt').write_text('mine\n')
    assert main(_command(saved, '--results-file', str(tmp_path / 'notes.txt'))) == 1
    assert 'notes.txt is not a table of results' in capsys.readouterr().err
    assert (tmp_path / 'notes.txt').read_text() == 'mine\n'


def test_the_table_is_printed_even_if_it_cannot_be_written(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, 'No space left on device', 'report.json')

    monkeypatch.setattr(Report, 'save', full)
    assert main(_command(saved, '--report', str(tmp_path / 'report.json'))) == 1
    shown = capsys.readouterr()
    assert 'infrared-to-visible' in shown.out and 'No space left' in shown.err


def test_two_evaluations_fill_one_table(saved: Path, tmp_path: Path) -> None:
    table = tmp_path / 'results.csv'
    for flip in ('--no-amp', '--flip-test'):
        assert main(_command(saved, flip, '--results-file', str(table))) == 0
    assert [row['flip_test'] for row in read_results(table)] == ['False', 'True']
    assert vireid_timm.__version__ in read_results(table)[0]['versions']


@pytest.mark.parametrize('size', ['32 64 3', '1 64 32', '64 32 3', '0 64 32', '3 0 32', '3 64 -1'])
@pytest.mark.usefixtures('nothing_computed')
def test_an_image_size_in_another_order_is_refused(size: str, saved: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(_command(saved, '--input-size', *size.split())) == 1
    error = capsys.readouterr().err
    assert f'--input-size {size}: expected channels, height and width' in error and '3 channels' in error


def test_an_image_size_in_the_right_order_is_used(saved: Path, tmp_path: Path) -> None:
    report = tmp_path / 'report.json'
    assert main(_command(saved, '--input-size', '3', '96', '32', '--report', str(report))) == 0
    assert Report.load(report).size == (96, 32)


@pytest.mark.parametrize('flag', ['--checkpoint', '--model'])
def test_without_pretrained_no_weights_of_a_checkpoint_are_used(flag: str, run: Path, tmp_path: Path) -> None:
    weights = {}
    for source in (run, run / 'best', run / LAST):
        for switch in ('--pretrained', '--no-pretrained'):
            report = tmp_path / 'report.json'
            assert main(['eval', flag, str(source), *ON, switch, '--report', str(report)]) == 0
            weights.setdefault(switch, set()).add(Report.load(report).weights)
    assert not weights['--pretrained'] & weights['--no-pretrained']
    assert len(weights['--pretrained']) == 1


MISTAKES = {
    'no name of a model': (['--checkpoint', '', *DATA], 'the name of the model is empty'),
    'a word instead of KEY=VALUE': ('--checkpoint {saved} --dataset-kwargs trial 3'.split(), ''),
    'text for a share': (
        '--checkpoint {saved} --data-dir {data} --dataset-kwargs test_share=abc'.split(),
        'test_share',
    ),
    'one number for a size': ('--checkpoint {saved} --dataset synthetic --dataset-kwargs size=64'.split(), 'size'),
    'half an identity': (
        '--checkpoint {saved} --dataset synthetic --dataset-kwargs identities=2.5'.split(),
        'identities',
    ),
    'nothing for a number': ('--checkpoint {saved} --dataset synthetic --dataset-kwargs seed=None'.split(), 'seed'),
    'a device that torch was not built for': ([*'--checkpoint {saved} --device xpu'.split(), *DATA], 'xpu'),
    'a device that computes nothing': ([*'--checkpoint {saved} --device meta'.split(), *DATA], 'meta'),
    'no name of a report': ([*'--checkpoint {saved} --report'.split(), '', *DATA], 'directory'),
    'no name of a table': ([*'--checkpoint {saved} --results-file'.split(), '', *DATA], 'directory'),
    'a folder for a report': ('--compare {data} {data}'.split(), 'directory'),
    'another file for a report': ('--compare {saved}/model.safetensors {data}'.split(), 'is not a report'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_line(mistake: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments, words = MISTAKES[mistake]
    for modality in ('visible', 'infrared'):
        (tmp_path / 'train' / modality / 'anna').mkdir(parents=True)
    try:
        status = main(['eval', *(argument.format(saved=saved, data=tmp_path) for argument in arguments)])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status in (1, 2) and words in error and 'Traceback' not in error
    assert error.strip().splitlines()[-1].startswith(('vireid: error: ', 'vireid eval: error: '))


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems allow no such names')
def test_names_in_another_encoding_reach_the_report(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    encoded = '张'.encode('gbk')
    data = os.path.join(os.fsencode(tmp_path), encoded)
    assert main(['synth', os.fsdecode(data), *'--identities 2 --test-identities 3 --size 64 32'.split()]) == 0
    for split in (b'query', b'gallery'):
        for modality in (b'visible', b'infrared'):
            folder = os.path.join(data, split, modality)
            for person in os.listdir(folder):
                os.rename(os.path.join(folder, person), os.path.join(folder, encoded + person))
    report, table = (tmp_path / os.fsdecode(encoded + ending) for ending in (b'.json', b'.csv'))
    written = ['--report', str(report), '--results-file', str(table), '--breakdown', 'identity', '--failures', '2']
    where = ['--data-dir', os.fsdecode(data), '--workers', '0', '--device', 'cpu']
    command = [sys.executable, '-m', 'vireid_timm', 'eval', '--checkpoint', str(saved), *where, *written]
    subprocess.run(command, check=True, env={**os.environ, 'PYTHONIOENCODING': 'utf-8:backslashreplace'})
    assert r'\udcd5\udcc5' in capfd.readouterr().out
    (result,) = (result for name, result in Report.load(report).protocols.items() if name == 'visible-to-infrared')
    assert {os.fsencode(name)[: len(encoded)] for name in result.queries['identity']} == {encoded}
    assert os.fsencode(result.failures[0]['path']).startswith(b'query/visible/' + encoded)
    assert len(read_results(table)) == 3
    release = str(tmp_path / 'release')
    assert main(['hub', 'save', str(saved), release, '--report', str(report)]) == 0
    for card in Path(release).glob('*.[mj]*'):
        assert card.suffix == '.safetensors' or card.read_text(encoding='utf-8')
    assert main(['hub', 'save', str(saved), release, '--data-terms', os.fsdecode(encoded)]) == 1
    assert '--data-terms' in capfd.readouterr().err
