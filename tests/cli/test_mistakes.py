"""No mistake of a user ends in a traceback: one line, and exit status 1 or 2."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vireid_timm.cli import eval as eval_command
from vireid_timm.cli.main import main
from vireid_timm.cli.parser import KeyValues, Parser

TRAIN = 'train --dry-run --dataset synthetic --model vireid_dml_r10t --device cpu'.split()
EVAL = 'eval --model vireid_dml_r10t.synthvi --device cpu'.split()


def _said(capsys: pytest.CaptureFixture, arguments: list[str]) -> tuple[int, str]:
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    'command',
    [
        [*EVAL, '--dataset-kwargs'],
        ['hub', 'save', 'run', 'folder', '--dataset-kwargs'],
        ['data', 'folder', '--dataset-kwargs'],
        *([*TRAIN, flag] for flag in ('--dataset-kwargs', '--model-kwargs', '--opt-kwargs')),
    ],
)
@pytest.mark.parametrize('words', ['trial 3', 'trial', '=3', '3=4', 'a-b=3', 'a.=3', 'trial=3 seed', 'trial={[]:1}'])
def test_options_that_are_no_assignments_are_named(
    capsys: pytest.CaptureFixture, command: list[str], words: str
) -> None:
    status, error = _said(capsys, [*command, *words.split()])
    assert status == 2 and f'argument {command[-1]}: ' in error.splitlines()[-1] and 'Traceback' not in error
    assert any(repr(word) in error for word in words.split())


def test_options_are_read_as_timm_reads_them() -> None:
    parser = Parser()
    parser.add_argument('--options', nargs='*', action=KeyValues)
    words = 'size=(64,32) share=0.3 name=thermal on=True equation=a=b nothing='.split()
    assert parser.parse_args(['--options', *words]).options == {
        **{'size': (64, 32), 'share': 0.3, 'name': 'thermal', 'on': True, 'equation': 'a=b', 'nothing': ''},
    }


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--model-kwargs num_classes=100', '--model-kwargs num_classes: training chooses it; leave it out'),
        ('--model-kwargs pretrained=True', '--model-kwargs pretrained: training chooses it'),
        ('--model-kwargs device=cpu', '--model-kwargs device: training chooses it'),
        ('--model-kwargs gem_power=abc', "cannot create the model 'vireid_dml_r10t'"),
        ('--model-kwargs fuse_layers=2', "cannot create the model 'vireid_dml_r10t'"),
        ('--model-kwargs drop_rate=high', "cannot create the model 'vireid_dml_r10t'"),
        ('--model-kwargs nonsense=1', "'nonsense'"),
        ('--opt-kwargs nonsense=1', "cannot create the optimiser 'sgd'"),
        ('--opt adamw --opt-kwargs betas=0.9', "cannot create the optimiser 'adamw'"),
        ('--opt adamw --opt-kwargs eps=abc', "cannot create the optimiser 'adamw'"),
        ('--opt momentum --opt-kwargs dampening=abc', "'dampening' must be a number, got 'abc'"),
        ('--opt adamw --opt-kwargs amsgrad=abc', "'amsgrad' must be True or False, got 'abc'"),
        ('--opt lookahead_adamw --opt-kwargs amsgrad=off', "'amsgrad' must be True or False, got 'off'"),
        ('--opt lars --opt-kwargs trust_clip=no', "'trust_clip' must be True or False, got 'no'"),
        ('--model-kwargs plain_fusion=off', "argument 'plain_fusion' must be True or False, got 'off'"),
        ('--opt adamw --opt-kwargs betas=(0.9,)', "cannot create the optimiser 'adamw'"),
        ('--model-kwargs pretrained_cfg_overlay=abc', "cannot create the model 'vireid_dml_r10t'"),
        ('--model-kwargs img_size=abc', "cannot create the model 'vireid_dml_r10t'"),
        ('--opt-kwargs lr=1', "cannot create the optimiser 'sgd'"),
        ('--dataset-kwargs size=64', "option 'size' must be (a whole number, a whole number), got 64"),
        ('--dataset-kwargs size=(64,32.5)', "option 'size' must be (a whole number, a whole number), got (64, 32.5)"),
        ('--dataset-kwargs identities=2.5', "option 'identities' must be a whole number, got 2.5"),
        ('--dataset-kwargs identities=True', "option 'identities' must be a whole number, got True"),
        ('--dataset-kwargs spectrum=1', "option 'spectrum' must be text, got 1"),
        (f'--seed {10**30}', f'seed must be at most {2**63 - 1}, got {10**30}'),
        (f'--epochs {2**63}', 'epochs must be at most 1000000'),
        (f'--epochs {"9" * 5000}', 'argument --epochs: '),
    ],
)
def test_values_of_the_wrong_type_are_named(capsys: pytest.CaptureFixture, words: str, message: str) -> None:
    status, error = _said(capsys, [*TRAIN, *words.split()])
    assert status in (1, 2) and message in error and 'Traceback' not in error and 'fault of' not in error


@pytest.mark.parametrize('value', ['abc', '"0.3"', '[0.1]', 'True', ''])
def test_an_option_of_the_wrong_type_in_yaml_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, value: str
) -> None:
    for modality in ('visible', 'infrared'):
        (tmp_path / 'train' / modality).mkdir(parents=True)
    config = tmp_path / 'config.yaml'
    config.write_text(f'data_dir: {tmp_path}\nmodel: vireid_dml_r10t\ndataset_kwargs: {{test_share: {value}}}\n')
    status, error = _said(capsys, ['train', '--dry-run', '--config', str(config)])
    assert status == 1 and "dataset 'folder': option 'test_share' must be a number, got " in error


# Where there is no GPU, a GPU's name is the CPU: tests/test_device.py.
NOT_HERE = ['meta', 'xpu', 'hpu', 'vulkan', 'gpu', '', *(['cuda:999'] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize('device', NOT_HERE)
@pytest.mark.parametrize('command', [TRAIN, [*EVAL, '--dataset', 'synthetic']])
def test_devices_that_cannot_compute_are_named(capsys: pytest.CaptureFixture, command: list[str], device: str) -> None:
    status, error = _said(capsys, [*command, '--dataset-kwargs', 'identities=4', '--device', device])
    assert status == 1 and error.count('\n') == 1
    assert re.search(rf"torch cannot compute on {device} here: |unknown device '{device}'", error)


@pytest.mark.parametrize('kind', [RuntimeError, TypeError, AttributeError, IndexError, AssertionError])
def test_what_nobody_foresaw_is_one_line_that_names_a_traceback(
    kind: type[Exception], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise kind('it broke\nin two lines') from ValueError('\udcd5')

    monkeypatch.setattr(eval_command, 'run', fail)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    status, error = _said(capsys, EVAL)
    (report,) = tmp_path.iterdir()
    assert status == 1 and error.count('\n') == 1
    assert error.startswith(f'vireid: error: {kind.__name__}: it broke') and 'Please report it' in error
    assert str(report) in error and 'in two lines' in error
    assert 'Traceback (most recent call last)' in report.read_text() and 'in fail' in report.read_text()


def test_where_no_file_can_be_written_the_traceback_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_command, 'run', lambda args: 1 / 0)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'nowhere'))
    status, error = _said(capsys, EVAL)
    assert status == 1 and 'Traceback' in error and error.endswith('with the traceback above\n')


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('tried to allocate\n2 GiB')])
def test_too_little_memory_is_no_fault_of_the_library(
    error: Exception, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(eval_command, 'run', fail)
    status, said = _said(capsys, EVAL)
    assert status == 1 and said.count('\n') == 1 and 'too little memory' in said and 'report' not in said


def test_an_import_that_an_interrupt_broke_is_a_stop(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: argparse.Namespace) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError('half imported') from error

    monkeypatch.setattr(eval_command, 'run', fail)
    assert _said(capsys, EVAL) == (130, 'vireid: stopped\n')


def _run(program: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run main with an `eval` that is replaced by a program."""
    code = f'import sys\nfrom vireid_timm.cli import eval, main\n{program}\nsys.exit(main.main(sys.argv[1:]))'
    return subprocess.run(
        [sys.executable, '-c', code, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_names_that_a_terminal_cannot_encode_are_escaped(encoding: str) -> None:
    program = "eval.run = lambda args: print('name: ' + chr(0x5f20) + chr(0xdcd5))"
    done = _run(program, *EVAL, PYTHONIOENCODING=encoding, PYTHONUTF8='0')
    assert done.returncode == 0 and not done.stderr
    shown = chr(0x5F20) if encoding == 'utf-8' else r'\u5f20'
    assert done.stdout == f'name: {shown}' + '\\udcd5\n'


@pytest.mark.parametrize('closed', ['stdout', 'stderr'])
def test_a_reader_that_leaves_ends_the_command_quietly(closed: str) -> None:
    program = f"""
import os
read, write = os.pipe()
os.dup2(write, sys.{closed}.fileno())
os.close(write), os.close(read)
def run(args):
    while True:
        print('line' * 1000, file=sys.{closed})
eval.run = run
"""
    done = _run(program, *EVAL)
    assert done.returncode == 141 and not done.stdout and not done.stderr


def test_a_connection_that_breaks_is_not_taken_for_a_reader_that_leaves(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise BrokenPipeError(32, 'Broken pipe')

    monkeypatch.setattr(eval_command, 'run', fail)
    status, error = _said(capsys, EVAL)
    assert status == 1 and error == 'vireid: error: a connection broke: [Errno 32] Broken pipe\n'
