"""The `vireid` command as its users run it, on every layout, from images on disk to a report."""

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import start_two

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.evaluation.report import Report
from vireid_timm.figures.rank_list import HIT, MISS

TINY = (
    '--input-size 3 64 32 --identities-per-batch 3 --images-per-modality 2 --epochs 1 --val-share 0 --workers 0 '
    '--no-amp --lr 0.01 --pad 2 --experiment run'
).split()
PROTOCOLS = {
    'folder': {'visible-to-infrared', 'infrared-to-visible', 'mixed'},
    'sysu_mm01': {'all-single', 'all-multi', 'indoor-single', 'indoor-multi'},
    'regdb': {'visible-to-infrared', 'infrared-to-visible'},
    'llcm': {'visible-to-infrared', 'infrared-to-visible', 'visible-to-infrared-swapped'},
    'market': {'visible-to-infrared', 'infrared-to-visible', 'mixed'},
    'hitsz_vcm': {'visible-to-infrared', 'infrared-to-visible'},
    'buptcampus': {'visible-to-infrared', 'infrared-to-visible', 'mixed'},
}


def _synth(folder: Path, layout: str = 'folder') -> Path:
    small = '--identities 4 --size 64 32 --workers 0'.split()
    assert main(['synth', str(folder), '--layout', layout, *small]) == 0
    return folder


def _train_command(root: Path, output: Path, *arguments: str, model: str = 'vireid_base_r10t') -> list[str]:
    return ['train', '--data-dir', str(root), '--output', str(output), '--model', model, *TINY, *arguments]


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _synth(tmp_path_factory.mktemp('data') / 'images')


@pytest.fixture(scope='module')
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp('runs')
    assert main(_train_command(data, output, model='vireid_dml_r10t')) == 0
    return output / 'run'


@pytest.mark.parametrize('layout', sorted(PROTOCOLS))
def test_synth_train_and_eval_work_for_every_layout(layout: str, tmp_path: Path) -> None:
    root = _synth(tmp_path / 'data', layout)
    reader = ['--dataset', layout]
    if layout == 'market':
        reader = ['--dataset', 'folder', '--dataset-kwargs', 'names=market']
    assert main(['data', str(root), *reader, '--workers', '0']) == 0
    assert main(_train_command(root, tmp_path, *reader)) == 0
    report = tmp_path / 'report.json'
    arguments = [*reader, '--data-dir', str(root), '--checkpoint', str(tmp_path / 'run')]
    assert main(['eval', *arguments, '--report', str(report)]) == 0
    saved = json.loads(report.read_text())
    assert set(saved['protocols']) == PROTOCOLS[layout]
    assert saved['size'] == [64, 32] and saved['model'] == 'vireid_base_r10t'
    for result in saved['protocols'].values():
        assert 0 < result['mean']['mAP'] <= 1 and result['num_valid_queries'] > 0


def test_every_way_to_name_a_trained_model_gives_the_same_report(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sources = (
        ['--checkpoint', run],
        ['--checkpoint', run / 'last.pth'],
        ['--checkpoint', run / 'best'],
        ['--checkpoint', run / 'best/model.safetensors'],
        ['--model', f'local-dir:{run / "best"}'],
        ['--model', run],
    )
    metrics = []
    for number, source in enumerate(sources):
        report = tmp_path / f'{number}.json'
        chosen = '--input-size 3 64 32 --protocol infrared-to-visible'.split()
        command = ['eval', *map(str, source), '--data-dir', str(data), *chosen, '--report', str(report)]
        command += ['--device', 'cpu']  # a GPU may choose other kernels
        assert main(command) == 0
        metrics.append(json.loads(report.read_text())['protocols'])
    assert all(other == metrics[0] for other in metrics)
    assert 'infrared-to-visible' in capsys.readouterr().out


def _eval_command(data: Path, run: Path, *arguments: str) -> list[str]:
    return ['eval', '--data-dir', str(data), '--checkpoint', str(run), '--device', 'cpu', *arguments]


def test_evaluation_shows_and_writes_what_it_is_asked_for(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    report, results = tmp_path / 'new/report.json', tmp_path / 'new/results.csv'
    wanted = ('--flip-test', '--crops', '5', '--reranking', 'cross-modality', '--features', 'before-bn')
    shown = ('--breakdown', 'camera', 'identity', '--failures', '2')
    written = ('--report', str(report), '--results-file', str(results))
    assert main(_eval_command(data, run, *wanted, *shown, *written)) == 0
    printed = capsys.readouterr().out
    for words in ('flip test', '5 crops', 'cross-modality', 'before-bn', 'mixed by camera', 'mixed, the worst queries'):
        assert words in printed
    saved = json.loads(report.read_text())
    assert saved['reranking'] == 'cross-modality' and saved['flip_test'] and saved['crops'] == 5
    assert [len(result['failures']) for result in saved['protocols'].values()] == [2, 2, 2]
    with open(results, newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['protocol'] for row in rows] == ['visible-to-infrared', 'infrared-to-visible', 'mixed']
    assert float(rows[0]['mAP']) == pytest.approx(
        100 * saved['protocols']['visible-to-infrared']['mean']['mAP'], abs=0.01
    )


def test_two_reports_are_compared(data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = [str(tmp_path / name) for name in ('plain.json', 'flipped.json')]
    assert main(_eval_command(data, run, '--report', files[0])) == 0
    assert main(_eval_command(data, run, '--report', files[1], '--flip-test')) == 0
    capsys.readouterr()
    assert main(['eval', '--compare', *files]) == 0
    printed = capsys.readouterr().out
    assert 'flip' in printed and 'infrared-to-visible' in printed and 'mAP' in printed
    assert main(['eval', '--compare', files[0], str(run / 'summary.csv')]) == 1
    assert 'summary.csv is not a report' in capsys.readouterr().err


def test_rank_lists_show_every_kind_of_query(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / 'new' / 'lists'
    command = _eval_command(data, run, '--protocol', 'mixed', 'infrared-to-visible', '--rank-list', str(folder))
    assert main(command) == 0
    said = capsys.readouterr()
    assert str(folder) in said.out and 'not shown' not in said.err
    kinds = ('best', 'worst', 'random')
    for protocol in ('mixed', 'infrared-to-visible'):
        page = (folder / f'{protocol}.html').read_text(encoding='utf-8')
        assert all(f'{kind}: AP' in page for kind in kinds) and 'similarity' in page and 'camera' in page
        for kind in kinds:
            pixels = np.asarray(Image.open(folder / f'{protocol}-{kind}.png'))
            assert (pixels == HIT).all(axis=2).any() and (pixels == MISS).all(axis=2).any()
    assert sum(1 for _ in folder.iterdir()) == 2 * 4
    (tmp_path / 'file').touch()
    assert main([*command[:-1], str(tmp_path / 'file')]) == 1
    assert str(tmp_path / 'file') in capsys.readouterr().err


def test_official_galleries_of_a_written_tree(tmp_path: Path) -> None:
    root = _synth(tmp_path / 'sysu', 'sysu_mm01')
    command = ['eval', '--model', 'vireid_dml_r10t.synthvi', '--dataset', 'sysu_mm01', '--data-dir', str(root)]
    reports = {draw: tmp_path / f'{draw}.json' for draw in ('seeded', 'official')}
    for draw, path in reports.items():
        assert main([*command, '--draw', draw, '--report', str(path), '--device', 'cpu']) == 0
    seeded, official = (Report.load(path) for path in reports.values())
    for name, result in official.protocols.items():
        assert (result.draw, seeded[name].draw) == ('official', 'seeded')
        assert result.gallery_size == seeded[name].gallery_size
        assert result.trials_fingerprint != seeded[name].trials_fingerprint
    (root / 'exp/rand_perm_cam.mat').unlink()
    assert main([*command, '--draw', 'official']) == 1


def test_processes_share_an_evaluation(data: Path, run: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / 'alone.json', tmp_path / 'shared.json'
    assert main(_eval_command(data, run, '--batch-size', '3', '--report', str(alone))) == 0
    command = _eval_command(data, run, '--batch-size', '3', '--report', str(shared))
    statuses, said = start_two(main, command, folder=tmp_path)
    assert statuses == [0, 0], said
    assert said.count('infrared-to-visible') == str(Report.load(shared)).count('infrared-to-visible')
    first, second = Report.load(alone), Report.load(shared)
    for name, result in first.protocols.items():
        assert second[name].mean == pytest.approx(result.mean, abs=1e-6)
        assert second[name].other_features == pytest.approx(result.other_features, abs=1e-6)
        assert result.other_features != result.mean
        assert second[name].trials_fingerprint == result.trials_fingerprint


def test_a_run_resumes_from_its_own_settings(run: Path) -> None:
    assert main(['train', '--resume', str(run), '--epochs', '2']) == 0
    assert len((run / 'summary.csv').read_text().splitlines()) == 3


def test_config_file_and_flags_share_settings(data: Path, tmp_path: Path) -> None:
    config = tmp_path / 'recipe.yaml'
    config.write_text(f'data_dir: {data}\nmodel: vireid_base_r10t\nlr: 0.5\n')
    assert main(['train', '--config', str(config), '--output', str(tmp_path), *TINY]) == 0
    saved = (tmp_path / 'run/args.yaml').read_text()
    assert 'model: vireid_base_r10t' in saved and 'lr: 0.01' in saved  # the flag wins


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['train', '--data-dir', 'no/such/folder'], 'no/such/folder'),
        (['train', '--data-dir', '{data}', '--model', 'resnet51'], 'resnet51'),
        (
            ['train', '--data-dir', '{data}', '--model', 'vireid_dml_r10t', '--identities-per-batch', '64'],
            '64 identities',
        ),
        (['train', '--config', '{tmp}/bad.yaml'], "no setting 'epoch'; did you mean 'epochs'?"),
        (['train', '--resume', '{data}'], 'args.yaml'),
        (['eval', '--data-dir', '{data}', '--checkpoint', 'no/such/run'], 'no/such/run'),
        (['eval', '--data-dir', '{data}', '--model', 'resnet18', '--no-pretrained'], 'resnet18'),
        (['eval', '--data-dir', '{data}', '--checkpoint', '{run}', '--protocol', 'all-single'], 'infrared-to-visible'),
        (['eval', '--dataset', 'sysu', '--data-dir', '{data}', '--checkpoint', '{run}'], "unknown dataset 'sysu'"),
        (['synth', '{data}', '--identities', '0'], 'identit'),
    ],
)
def test_user_errors_are_one_line_and_a_non_zero_exit_code(
    arguments: list[str],
    message: str,
    data: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.yaml').write_text('epoch: 3\n')
    filled = [argument.format(data=data, run=run, tmp=tmp_path) for argument in arguments]
    assert main(filled) != 0
    error = capsys.readouterr().err
    assert 'vireid: error: ' in error and message in error and 'Traceback' not in error
    assert [path.name for path in tmp_path.iterdir()] == ['bad.yaml']


def test_a_broken_image_stops_a_run_unless_it_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = _synth(tmp_path / 'data')
    broken = sorted((root / 'train/visible').glob('*/*'))[0]
    broken.write_bytes(broken.read_bytes()[:40])
    command = _train_command(root, tmp_path)
    assert main(command) == 1
    assert broken.name in capsys.readouterr().err and not (tmp_path / 'run').exists()
    assert main([*command, '--skip-broken']) == 0
    assert broken.name in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = _train_command(data, tmp_path)
    assert main(command) == 0
    before = (tmp_path / 'run/last.pth').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # the kernel refuses what goes beyond
    try:
        assert main(['train', '--resume', str(tmp_path / 'run'), '--epochs', '2']) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert 'vireid: error: ' in error and 'File too large' in error and str(tmp_path / 'run') in error
    assert 'Traceback' not in error
    assert (tmp_path / 'run/last.pth').read_bytes() == before
    assert main(['train', '--resume', str(tmp_path / 'run'), '--epochs', '2']) == 0


def test_infrared_images_of_one_channel_and_sixteen_bits_train(tmp_path: Path) -> None:
    root = _synth(tmp_path / 'data')
    for path in sorted((root / 'train/infrared').glob('*/*')):
        grey = Image.open(path).convert('L').point(lambda value: value * 200, 'I').convert('I;16')
        path.unlink()
        grey.save(path.with_suffix('.png'))
    assert main(_train_command(root, tmp_path)) == 0


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'vireid_timm', '--version'], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == vireid_timm.__version__
