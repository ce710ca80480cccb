"""The benchmarks run from end to end in small; what they measure is not looked at."""

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import safetensors.torch
import timm
from PIL import Image

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.synthvi.render import render_address
from vireid_timm.training.config import TrainConfig

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))

gpu, paper, paper_report, paper_tables, synthvi_v1 = map(
    importlib.import_module, ('gpu', 'paper', 'paper_report', 'paper_tables', 'synthvi_v1')
)


def test_training_speed_prints_a_table_and_one_json_object(tmp_path: Path) -> None:
    small = '--model vireid_dml_r10t --size 64 32 --batch-size 8 --identities 2 --steps 2 --repeats 1 --workers 1'
    parts = '--parts data step loop peers profile saving --batches 4 --settings smoothing=0.1'
    command = [sys.executable, str(BENCHMARKS / 'training_speed.py'), *small.split(), *parts.split()]
    saved = tmp_path / 'result.json'
    done = subprocess.run([*command, '--save', str(saved)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(saved.read_text())
    ratios = ('data_over_chain', 'step_over_bare', 'loop_over_step_rate', 'over_peers')
    for name in (*ratios, 'checkpointing_over_step', 'cached_triplet_over_step'):
        assert result[name] > 0
    assert result['settings'] == {'smoothing': 0.1}
    assert abs(sum(result['profile'].values()) - 1) < 1e-6 and result['profile']['convolutions'] > 0
    assert result['batches'].keys() == {'4'}
    assert '| ... times the bare one |' in done.stdout


def test_what_a_gpu_gives_is_kept_when_the_program_is_killed_and_only_the_rest_is_measured_then(tmp_path: Path) -> None:
    saved = tmp_path / 'results' / 'gpu.json'
    command = [sys.executable, str(BENCHMARKS / 'gpu.py'), '--device', 'cpu', '--tiny', '--output', str(saved)]
    command += ['--folder', str(tmp_path / 'gpu')]
    # Compiling takes minutes on a CPU, so the compiled network is the network itself.
    environment = {**os.environ, 'TORCHDYNAMO_DISABLE': '1', 'OMP_NUM_THREADS': '1'}
    with open(tmp_path / 'log', 'w') as log:
        killed = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)
    while '"problem": "", "seconds"' not in (tmp_path / 'log').read_text().partition('step: ')[2]:
        assert killed.poll() is None, (tmp_path / 'log').read_text()
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    first = json.loads(saved.read_text())['parts']
    assert first['step']['complete'] and first['step']['4 graph']['over_bare'] > 0
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'step: ' not in done.stdout and '| step, 4 eager, ms |' in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(saved.read_text()) and result['parts']['step'] == first['step']
    parts = result['parts']
    assert set(gpu.LIMITS) < set(parts) and all(part['complete'] for part in parts.values())
    assert parts['graphs']['deterministic'] == {'resumed_equal': True, 'eager_equal': True}
    assert parts['loop']['epoch_s'] > 0 and parts['compile-again']['first_step_s'] > 0
    again = subprocess.run([*command, '--again', 'step', '--minutes', '0'], capture_output=True, text=True)
    assert again.returncode == 1 and json.loads(saved.read_text())['parts']['step'] == first['step']


def test_what_a_gpu_program_needs_is_checked_before_anything_is_imported(tmp_path: Path) -> None:
    (tmp_path / 'setup.cfg').write_text(
        '[options]\ninstall_requires =\n    torch>=99.1\n    timm>=0.1\n    no-such-package>=1\n'
    )
    torch_found = version('torch')
    expected = [f'torch>=99.1 (found {torch_found})', 'no-such-package>=1 (missing)']
    assert gpu.unmet_requirements(tmp_path / 'setup.cfg') == expected
    assert gpu.unmet_requirements(BENCHMARKS.parent / 'setup.cfg') == []


def test_startup_prints_a_table_and_one_json_object(tmp_path: Path) -> None:
    saved = tmp_path / 'result.json'
    command = [sys.executable, str(BENCHMARKS / 'startup.py'), '--repeats', '1', '--save', str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(saved.read_text())
    assert result['over_import_timm'].keys() == result['cpu_s'].keys() - {'import timm'}
    assert all(ratio > 0 for ratio in result['over_import_timm'].values())
    assert '| `vireid --version` |' in done.stdout


def test_inference_prints_a_table_and_one_json_object(tmp_path: Path) -> None:
    small = '--models vireid_dml_r10t.synthvi --size 64 32 --batches 1 2 --repeats 1 --people 3'
    saved = tmp_path / 'result.json'
    command = [sys.executable, str(BENCHMARKS / 'inference.py'), *small.split(), '--save', str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(saved.read_text())
    measured = result['models']['vireid_dml_r10t.synthvi']
    variants = {'eager', 'channels-last bf16', 'onnx', 'onnx --half', 'onnx int8'}
    for values in (measured['bytes'], *measured['ms'].values(), measured['mAP']):
        assert values.keys() == variants and all(value > 0 for value in values.values())
    assert measured['mAP']['onnx'] == pytest.approx(measured['mAP']['eager'], abs=1e-3)
    assert '| `vireid_dml_r10t.synthvi`, onnx int8 |' in done.stdout


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two aligned pairs of noise; the right half of the second infrared image has one colour."""
    rng = np.random.default_rng(0)
    for modality in ('visible', 'infrared'):
        (tmp_path / 'pairs' / modality).mkdir(parents=True)
    for name in ('a', 'b'):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'pairs' / 'visible' / f'{name}.png')
        pixels[:, 32 if name == 'b' else 64 :] = (200, 30, 120)
        Image.fromarray(pixels).save(tmp_path / 'pairs' / 'infrared' / f'{name}.png')
    return tmp_path / 'pairs'


def test_transfer_lets_patches_of_pairs_find_each_other(pairs: Path, tmp_path: Path) -> None:
    weights = tmp_path / 'weights.safetensors'
    model = timm.create_model('vireid_dml_r10t')
    safetensors.torch.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    names, saved = ['vireid_dml_r10t.synthvi', f'vireid_dml_r10t={weights}'], tmp_path / 'result.json'
    command = [sys.executable, str(BENCHMARKS / 'transfer.py'), str(pairs), *names, '--save', str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(saved.read_text()) and list(result['models']) == names
    # Four patches of 16 x 32 pixels in each of two rows; half of the second pair's are left out.
    assert result['patches'] == 8 + 4
    trained, untrained = (result['models'][name] for name in names)
    assert trained.keys() == {'rank1', 'mAP', 'centred_rank1', 'centred_mAP'}
    # The patches that are left have the same pixels in both modalities, and an untrained network has equal stems.
    assert set(untrained.values()) == {1.0} and trained['rank1'] > 0.5


MISTAKES = ('no folder', 'no counterpart', 'another size', 'no contrast', 'no model', 'no file', 'damaged file')


@pytest.mark.parametrize('mistake', MISTAKES)
def test_transfer_says_what_is_wrong(pairs: Path, mistake: str) -> None:
    infrared, model = pairs / 'infrared', 'vireid_dml_r10t.synthvi'
    if mistake == 'no folder':
        infrared.rename(pairs / 'thermal')
        message = 'there is no .*infrared'
    elif mistake == 'no counterpart':
        (infrared / 'a.png').unlink()
        message = 'a.png is in only one of the folders'
    elif mistake == 'another size':
        Image.new('RGB', (32, 64)).save(infrared / 'a.png')
        message = r'a.png has 64x64 pixels in the visible and 32x64 in the infrared'
    elif mistake == 'no contrast':
        for name in ('a', 'b'):
            Image.new('RGB', (64, 64)).save(infrared / f'{name}.png')
        message = 'no pair in .* has a patch with contrast'
    elif mistake == 'no model':
        model, message = 'nonsense', 'nonsense'
    elif mistake == 'no file':
        model, message = 'vireid_dml_r10t=missing.pth', 'there is no file missing.pth'
    else:
        (pairs / 'bad.safetensors').write_bytes(b'nothing')
        model, message = f'vireid_dml_r10t={pairs}/bad.safetensors', 'bad.safetensors cannot be loaded'
    command = [sys.executable, str(BENCHMARKS / 'transfer.py'), str(pairs), model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.search(f'^transfer.py: error: .*{message}', done.stderr, re.MULTILINE)
    assert 'Traceback' not in done.stderr


def test_the_standard_test_images_of_synthvi_never_change() -> None:
    """Results of SynthVI v1 are comparable as long as this holds; a change of the renderer needs a v2."""
    test = vireid_timm.create_dataset('synthetic', **synthvi_v1.SPLITS['test']).test
    pixels = [render_address(path) for path in test.path.tolist()]
    means = np.asarray([image.mean() for image in pixels])
    by_camera = [means[test.camera == camera].mean() for camera in range(1, 7)]
    np.testing.assert_allclose(by_camera, [95.040, 83.390, 135.720, 66.572, 144.123, 87.378], atol=0.01)
    # Pillow rounds some pixels differently from version to version, and so does NumPy before 2.
    digests = {
        '12.3': '9dd3bdd07ba71712ebf4edcd05eb87b810ca12fd372c57d4a145b28ac86b6398',
        '13.0': '43fcd21ea6ab3af6ecc75cdd4e5302f95402095560722476621ab9d260561d99',
    }
    expected = digests.get('.'.join(PIL.__version__.split('.')[:2]))
    if np.lib.NumpyVersion(np.__version__) >= '2.0.0' and expected is not None:
        assert hashlib.sha256(b''.join(image.tobytes() for image in pixels)).hexdigest() == expected


def test_nobody_is_in_two_parts_of_synthvi_v1() -> None:
    train = vireid_timm.create_dataset('synthetic', **synthvi_v1.TRAINING).train
    parts = {name: vireid_timm.create_dataset('synthetic', **part).test for name, part in synthvi_v1.SPLITS.items()}
    people = {name: set(part.identities()) for name, part in parts.items()}
    assert len(train.identities()) == 2000 and {len(names) for names in people.values()} == {200}
    assert not set(train.identities()) & set().union(*people.values())
    assert not people['validation'] & people['test']
    cameras = {name: set(part.camera.tolist()) for name, part in parts.items()} | {'train': set(train.camera.tolist())}
    assert cameras['test'] == cameras['validation'] == cameras['train']
    new = (cameras['test, new cameras'], cameras['validation, new cameras'])
    assert not new[0] & new[1] and not cameras['train'] & (new[0] | new[1])


@pytest.fixture(scope='module')
def smoke_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell of the paper's tables but one, trained at the budget `smoke`."""
    output = tmp_path_factory.mktemp('paper')
    args = argparse.Namespace(budget='smoke', dataset='synthetic', data_dir='', output=output, jobs=1)
    for cell in paper.CELLS:
        if cell != 'joint-to-fusion':
            paper.run_cell(cell, 0, args)
    return output


def test_every_table_and_figure_of_the_paper_is_one_command(smoke_runs: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / 'paper.py'), *paper.TABLES, *paper.FIGURES, '--budget', 'smoke']
    stopped = subprocess.run([*command, '--output', str(smoke_runs), '--minutes', '1e-9'], capture_output=True)
    assert stopped.returncode == 1, 'one cell is missing, and there is no time for it'
    assert not list(smoke_runs.glob('*.png'))
    done = subprocess.run([*command, '--output', str(smoke_runs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])['complete']
    for table, rows in paper.TABLES.items():
        text = done.stdout.partition(f'### {table}: ')[2].partition('###')[0]
        lines = [line.split(' | ') for line in text.splitlines() if line.startswith('| ')]
        is_comparison = table in paper_report.PUBLISHED
        for label, _, _ in rows:
            (line,) = (line for line in lines if line[0] in (f'| {label}', f'| {label}, measured'))
            assert line[1] == ('test, seeds 0' if is_comparison else '0') and float(line[4]) > 0, line
        tests = sum(' > ' in line[0] for line in lines)
        assert tests == (2 if is_comparison else 1) * len(paper_report.CLAIMS[table])
    for figure in paper.FIGURES:
        assert f'### {figure}: {smoke_runs / figure}.png' in done.stdout
        assert (smoke_runs / f'{figure}.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('budget', paper_tables.BUDGETS)
def test_training_knows_the_settings_of_every_cell(budget: str, tmp_path: Path) -> None:
    (tmp_path / paper_tables.LITE0_WEIGHTS).touch()
    args = argparse.Namespace(budget=budget, dataset='synthetic', data_dir='', output=tmp_path)
    for cell in paper.cells_of(argparse.Namespace(what=paper.TABLES, budget=budget)):
        settings = paper.settings_of(cell, 1, args)
        config = TrainConfig.from_mapping(settings)
        assert config.seed == 1 and config.epochs == settings['epochs'] and Path(config.output) == tmp_path


def test_missing_data_end_before_anything_is_trained(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / 'paper.py'), 'table1', '--dataset', 'sysu_mm01']
    command += ['--data-dir', str(tmp_path / 'nowhere'), '--output', str(tmp_path / 'runs')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ') and str(tmp_path / 'nowhere') in done.stderr.splitlines()[0]
    assert not (tmp_path / 'runs').exists()


def test_results_are_appended_once(smoke_runs: Path) -> None:
    args = argparse.Namespace(output=smoke_runs)
    first = paper.collect(args)
    assert first == paper.collect(args)
    by_cell = Counter(line['cell'] for line in first)
    # Two protocols and sets of people, with features in four ways and, of three branches, two slices.
    assert by_cell['rcc+cre'] == 16 and by_cell['teacher constant'] == 24
    assert {line['parameters'] for line in first if line['cell'] == 'width 256'} != {
        line['parameters'] for line in first if line['cell'] == 'full'
    }


def test_features_are_what_their_names_say(smoke_runs: Path) -> None:
    args = argparse.Namespace(output=smoke_runs, budget='smoke', dataset='synthetic', data_dir='')
    model, dataset = vireid_timm.load_model(paper.folder_of('full', 0, args)), paper.test_sets(0, args)['test']
    found = dict(paper.features_of(model, dataset))
    for name, kind in (('after BN', 'after-bn'), ('before BN', 'before-bn')):
        expected, _ = vireid_timm.embed(model, dataset.test, features=kind)
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def _average_precisions(folder: Path, protocol: str) -> dict[str, list[float]]:
    """Those of each person's queries, with features after BN."""
    queries = vireid_timm.Report.load(folder / 'test, after BN.json')[protocol].queries
    aps = {}
    for identity, ap in zip(queries['identity'], queries['AP'], strict=True):
        aps.setdefault(identity, []).append(ap)
    return aps


def test_paired_differences_are_those_of_people(smoke_runs: Path) -> None:
    args = argparse.Namespace(output=smoke_runs, budget='smoke', dataset='synthetic', data_dir='')
    (line,) = paper_report.paired(('full', 'rcc'), ['test'], paper.collect(args), 'infrared-to-visible', args)
    means = []
    for cell in ('full', 'rcc'):
        aps = _average_precisions(paper.folder_of(cell, 0, args), 'infrared-to-visible')
        means.append(sum(sum(values) / len(values) for values in aps.values()) / len(aps))
    assert line[5] == f'{100 * (means[0] - means[1]):+.1f}'


def test_regdb_has_a_trial_for_each_seed_beside_what_is_published(tmp_path: Path) -> None:
    main(['synth', str(tmp_path / 'regdb'), '--layout', 'regdb', '--identities', '8', '--size', '64', '32'])
    root, what = str(tmp_path / 'regdb'), ['report']
    args = argparse.Namespace(
        budget='smoke', dataset='regdb', data_dir=root, output=tmp_path / 'runs', what=what, jobs=1
    )
    assert [paper.data_of(seed, args)['dataset_kwargs']['trial'] for seed in (0, 9, 10)] == [1, 10, 1]
    for seed in (0, 3):
        for cell in ('baseline', 'full'):
            paper.run_cell(cell, seed, args)
    people = [set(_average_precisions(paper.folder_of('full', seed, args), 'infrared-to-visible')) for seed in (0, 3)]
    for seed, tested in zip((0, 3), people, strict=True):
        dataset = vireid_timm.create_dataset('regdb', root, trial=seed + 1)
        assert tested == set(dataset.test.identities())
    assert people[0] != people[1]

    args.dataset = 'synthetic'  # as by default; the results say what they are of
    text = paper.report(paper.collect(args), args)
    assert text.count('### ') == 2, 'table 1 and table 5'
    rows = [
        line.strip('| ').split(' | ') for line in text.partition('### table5')[2].splitlines() if line.startswith('| ')
    ]
    by_name = {row[0]: row for row in rows}
    assert by_name['AGMNet'][1:7] == ['IEEE23', '88.40', '95.10', '96.94', '81.45', '68.51']
    lines = [line for line in rows if line[1] == 'test, seeds 0 3']
    assert {line[0] for line in lines} == {'baseline, measured', 'the method, measured'}
    assert all(len(line) == 12 and all(' ± ' in score for score in line[2:]) for line in lines)

    args.dataset = 'regdb'
    differences = {}
    for seed in (0, 3):
        aps = [
            _average_precisions(paper.folder_of(cell, seed, args), 'infrared-to-visible')
            for cell in ('full', 'baseline')
        ]
        for name in aps[0]:
            differences.setdefault(name, []).append(np.mean(aps[0][name]) - np.mean(aps[1][name]))
    (line,) = (row for row in rows if row[:3] == ['full > baseline', 'test', 'infrared-to-visible'])
    assert line[5] == f'{100 * np.mean([np.mean(values) for values in differences.values()]):+.1f}'


def test_what_is_published_has_five_scores_in_both_directions() -> None:
    for _, rows in paper_report.PUBLISHED.values():
        for name, _, *scores in rows:
            assert [len(part.split()) for part in scores] == [5, 5], name
            assert all(score == '-' or 0 < float(score) < 100 for part in scores for score in part.split()), name


def test_jobs_take_turns_on_the_gpus() -> None:
    def numbers(*arguments: Any) -> list[str | None]:
        return [added.get('CUDA_VISIBLE_DEVICES') for added in paper.gpus_of_jobs(*arguments)]

    assert numbers(3, 2, None) == ['0', '1', '0'] and numbers(2, 4, None) == ['0', '1']
    assert numbers(3, 2, '5,GPU-a') == ['5', 'GPU-a', '5']
    assert numbers(2, 1, '5') == numbers(2, 0, None) == [None, None]


def test_retrieval_prints_a_table_and_keeps_earlier_results(tmp_path: Path) -> None:
    saved = tmp_path / 'result.json'
    command = [sys.executable, str(BENCHMARKS / 'retrieval.py'), '--folder', str(tmp_path / 'features')]
    command += ['--dimensions', '16', '--queries', '3', '--save', str(saved)]
    for images, times in (('40', ['--no-times']), ('1100', [])):
        done = subprocess.run([*command, '--images', images, *times], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(saved.read_text())
    assert result['rows'].keys() == {'40x16', '1100x16'}
    assert all(row['recall'] == 1 for row in result['rows'].values())
    assert result['rows']['40x16']['build_s'] is None and result['rows']['1100x16']['build_s'] > 0
    assert '| 1,100 | 16 |' in done.stdout


def test_the_leaderboard_trains_ranks_and_draws(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / 'leaderboard.py'), '--budget', 'smoke', '--output', str(tmp_path)]
    done = subprocess.run([*command, '--rows', 'stripes', 'method on regnet'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['complete'] and {run['row'] for run in result['runs']} == {'stripes', 'method on regnet'}
    for run in result['runs']:
        assert run['gflops'] > 0 and run['images_per_second'] > 0 and 0 < run['scores']['test'][1] <= 100
    assert (tmp_path / 'leaderboard.png').read_bytes().startswith(b'\x89PNG')
    again = subprocess.run([*command, '--report'], capture_output=True, text=True)
    assert json.loads(again.stdout.splitlines()[-1])['runs'] == result['runs']
    rows = [line.split(' | ') for line in again.stdout.splitlines() if line.startswith('| ')][1:]
    scores = [float(row[3]) for row in rows]
    assert scores == sorted(scores, reverse=True) and len(scores) == 2
