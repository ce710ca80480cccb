"""The benchmarks run from end to end in small; what they measure is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'


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
