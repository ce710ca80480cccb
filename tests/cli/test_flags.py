"""Flags: what the help says, what a mistake is answered with, and that asking is cheap."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from timm.utils import ParseKwargs

from vireid_timm.cli.demo import FINE_TUNING
from vireid_timm.cli.main import COMMANDS, main
from vireid_timm.cli.parser import Parser
from vireid_timm.cli.train import add_arguments
from vireid_timm.constants import DATASETS
from vireid_timm.data.readers import READERS
from vireid_timm.training.config import SETTINGS, TrainConfig, find_config

ROOT = Path(__file__).parents[2]


def _parsers(command: str) -> Iterator[Parser]:
    """The parser of a command, and those of its actions."""
    parser = Parser(prog=f'vireid {command}')
    options = {'every': True} if command == 'train' else {}
    importlib.import_module(f'vireid_timm.cli.{command}').add_arguments(parser, **options)
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _parse_train(*arguments: str) -> dict:
    parser = Parser()
    add_arguments(parser)
    given = vars(parser.parse_args(arguments))
    return {name: value for name, value in given.items() if name in SETTINGS}


def _said(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code, *capsys.readouterr()


def test_every_setting_has_a_flag_and_only_given_flags_are_returned() -> None:
    assert _parse_train() == {}
    (parser,) = _parsers('train')
    assert set(SETTINGS) <= {action.dest for action in parser._actions}


def test_flags_parse_to_the_settings_types() -> None:
    words = '--lr 0.02 --epochs 3 --augment cre=0.3 mrle --loss triplet=1 pml.CircleLoss=0.5 --amp'
    words += ' --decay-milestones 3 5 --input-size 3 64 32'
    words += ' --model-kwargs spatial_weights=static fuse_layers=(2,3) --dataset-kwargs trial=4'
    config = TrainConfig.from_mapping(_parse_train(*words.split(), '--identities-per-batch', '6', '--clip-grad', '1'))
    assert config.lr == 0.02 and config.epochs == 3 and config.augment == ['cre=0.3', 'mrle'] and config.amp is True
    assert config.loss == {'triplet': 1, 'pml.CircleLoss': 0.5}
    assert TrainConfig.from_mapping(_parse_train('--augment', '--loss')).augment == []
    assert config.decay_milestones == [3, 5] and config.input_size == [3, 64, 32]
    assert config.model_kwargs == {'spatial_weights': 'static', 'fuse_layers': (2, 3)}
    assert config.dataset_kwargs == {'trial': 4} and config.identities_per_batch == 6 and config.clip_grad == 1.0


@pytest.mark.parametrize('command', COMMANDS)
def test_every_flag_has_a_help_text_with_its_default(command: str) -> None:
    for parser in _parsers(command):
        assert parser.format_usage().count('\n') == 1 and not parser.allow_abbrev
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help, f'{parser.prog} {action.dest}'
            # One of the alternatives of eval is required.
            exempt = {'help', 'help_all', *(('model', 'checkpoint', 'compare') if command == 'eval' else ())}
            if action.option_strings and not action.required and action.dest not in exempt:
                assert action.help.count('(default: ') == 1, f'{parser.prog} --{action.dest}: {action.help}'
                assert 'None' not in action.help and 'True' not in action.help


def test_the_help_of_train_shows_everyday_flags_and_where_the_rest_is(capsys: pytest.CaptureFixture) -> None:
    _, everyday, _ = _said(capsys, 'train', '--help')
    status, complete, _ = _said(capsys, 'train', '--help-all')
    flags = {f'--{name.replace("_", "-")} ' for name in SETTINGS}
    shown = {flag for flag in flags if flag in everyday}
    assert status == 0 and '--help-all' in everyday and 10 <= len(shown) <= 14 and len(everyday.splitlines()) < 60
    assert {'--data-dir ', '--model ', '--epochs ', '--lr ', '--resume '} <= shown
    for name in SETTINGS:
        assert f'--{name.replace("_", "-")}' in complete


@pytest.mark.parametrize(
    ('words', 'answer'),
    [
        ('train --epochz 3', 'vireid train: error: there is no flag --epochz; did you mean --epochs?'),
        ('train --epochz=3', 'did you mean --epochs?'),
        ('train --epoch 3', 'did you mean --epochs?'),  # no abbreviations
        ('eval --checkpointt run', 'did you mean --checkpoint?'),
        ('hub push folder someone/model --privat', 'vireid hub push: error: there is no flag --privat'),
        ('--versio', 'did you mean --version?'),
        ('demo --xyzzy', 'see `vireid demo --help`'),
    ],
)
def test_a_mistyped_flag_is_answered_in_one_line(words: str, answer: str, capsys: pytest.CaptureFixture) -> None:
    status, out, error = _said(capsys, *words.split())
    assert status == 2 and not out and error.count('\n') == 1 and answer in error


@pytest.mark.parametrize('words', ['train --epochs many', 'eval', 'synth', 'hub pusg', 'trian', 'train extra', ''])
def test_other_mistakes_show_the_usage_in_one_line(words: str, capsys: pytest.CaptureFixture) -> None:
    status, out, error = _said(capsys, *words.split())
    assert status == 2 and not out
    usage, message = error.splitlines()
    assert usage.startswith('usage: vireid') and message.startswith('vireid') and ': error: ' in message


SMALL = '--dataset synthetic --dataset-kwargs identities=0 test_identities=4'
# A complete command line of every parser that has flags with whole numbers; of `train` they are settings.
COMPLETE = {
    'vireid synth': 'synth {folder}/images --identities 2 --test-identities 2 --size 32 16',
    'vireid data': 'data {folder} --dataset-kwargs test_share=0',
    'vireid demo': 'demo --output {folder}/demo',
    'vireid index': 'index {folder} --output {folder}/index --modality visible --model vireid_dml_r10t.synthvi',
    'vireid search': 'search {folder} --index {folder}/index --modality infrared',
    'vireid hub save': f'hub save vireid_dml_r10t.synthvi {{folder}}/model {SMALL}',
    'vireid plot': f'plot --output {{folder}}/charts --model vireid_dml_r10t.synthvi {SMALL}',
    'vireid export': 'export --model vireid_dml_r10t.synthvi {folder}/export',
    'vireid calibrate': f'calibrate vireid_dml_r10t.synthvi --output {{folder}}/model {SMALL}',
    'vireid eval': f'eval --model vireid_dml_r10t.synthvi {SMALL} --input-size 3 32 16',
}


@pytest.mark.parametrize(
    ('prog', 'flag', 'count'),
    [
        (parser.prog, action.option_strings[-1], action.nargs or 1)
        for command in sorted(set(COMMANDS) - {'train'})
        for parser in _parsers(command)
        for action in parser._actions
        if action.type is int and not action.choices
    ],
)
def test_whole_numbers_out_of_range_are_named(
    prog: str, flag: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for modality in ('visible', 'infrared'):
        (tmp_path / 'train' / modality / 'anna').mkdir(parents=True)
        Image.new('RGB', (8, 16)).save(tmp_path / 'train' / modality / 'anna' / 'a.png')
    for value in (-1, 10**30):
        values = ['3'] * (count == 3) + [str(value)] * min(count, 2)
        assert main([*COMPLETE[prog].format(folder=tmp_path).split(), flag, *values]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith('vireid: error: ') and str(value) in error and 'fault of' not in error


# Texts that name no file or folder, as do those of a setting.
NO_PATHS = {'dataset', 'device', 'license', 'data_terms', 'repo_id', 'revision', 'message', 'protocol', 'where', 'host'}


@pytest.mark.parametrize('command', sorted(set(COMMANDS) - {'train'}))
def test_a_tilde_is_the_home_folder_in_every_path(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    for parser in _parsers(command):
        for action in parser._actions:
            is_text = action.nargs != 0 and action.type is not int and action.choices is None
            if not is_text or action.dest in NO_PATHS or isinstance(action, ParseKwargs):
                continue
            assert action.type('~/a') == f'{tmp_path}/a', f'{parser.prog} {action.dest}'


def test_a_tilde_after_an_equals_sign_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main('synth ~/images --identities 2 --test-identities 2 --size 32 16 --workers 0'.split()) == 0
    words = 'eval --data-dir=~/images --model vireid_dml_r10t.synthvi --device=cpu --report=~/a.json --cache=off'
    assert main([*words.split(), '--results-file=~/a.csv', '--input-size', '3', '32', '16']) == 0
    assert main(['eval', '--compare', '~/a.json', '~/a.json']) == 0
    assert main('eval --data-dir=~/images --checkpoint=~/no --device=cpu'.split()) == 1
    assert f'{tmp_path}/no' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.csv', 'a.json', 'images']


def test_short_flags_stay() -> None:
    (parser,) = _parsers('eval')
    assert parser.parse_args(['--model', 'any', '-b', '3']).batch_size == 3
    (parser,) = _parsers('train')
    assert parser.parse_args(['-c', 'regdb']).config == 'regdb'


def test_a_recipe_is_found_by_name_and_an_unknown_one_lists_them(capsys: pytest.CaptureFixture) -> None:
    assert main(['train', '--config', 'regdb', '--data-dir', 'no/such/folder']) == 1
    assert 'no/such/folder' in capsys.readouterr().err
    assert main(['train', '--config', 'sysu']) == 1
    error = capsys.readouterr().err
    assert all(name in error for name in ('sysu ', 'fine_tune', 'llcm', 'regdb', 'synthvi', 'sysu_mm01'))


def test_the_rule_for_fine_tuning_is_the_same_everywhere() -> None:
    flags = '--warmup-epochs 0 --epochs 3 --identities-per-batch 16 --images-per-modality 2'
    assert _parse_train(*flags.split()) == FINE_TUNING
    for page in (ROOT / 'docs/training.md', find_config('fine_tune')):
        words = page.read_text(encoding='utf-8').replace('\\', ' ').replace('#', ' ').split()
        assert flags in ' '.join(words), page


def test_the_datasets_in_the_help_are_those_there_are() -> None:
    assert sorted(READERS) == list(DATASETS)


def test_questions_import_nothing_that_timm_does_not() -> None:
    program = """if True:
        import contextlib, io, sys
        import timm
        import vireid_timm.cli.main
        roots = lambda: {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)
        before = roots()
        for words in ('--version', '--help', 'train --help', 'train --help-all', 'train --epochz 3', 'eval --help',
                      'eval --modle x', 'hub --help', 'hub save --help', 'export --help', 'synth --help',
                      'demo --help', 'explain --help', 'plot --help', 'index --help', 'search --help'):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    vireid_timm.cli.main.main(words.split())
                except SystemExit:
                    continue
                raise AssertionError(words)
        print(sorted(roots() - before))
        print(sorted({name.split('.')[1] for name in sys.modules if name.startswith('vireid_timm.')}))
        print([name for name in sys.modules if name.startswith('vireid_timm.training.')])
    """
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    roots, packages, training = map(eval, done.stdout.splitlines())
    assert not roots
    light = {
        'cli',
        'constants',
        'device',
        'distributed',
        'files',
        'layers',
        'loss',
        'models',
        'options',
        'text',
        'training',
        'version',
    }
    assert set(packages) <= light
    assert set(training) <= {'vireid_timm.training.config', 'vireid_timm.training.interrupt'}


@pytest.mark.parametrize('as_module', [True, False])
def test_an_interrupt_during_the_imports_shows_nothing(as_module: bool, tmp_path: Path) -> None:
    # In place of torch: the user presses Ctrl-C as soon as its import begins.
    (tmp_path / 'torch.py').write_text(
        'import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\nraise SystemError\n'
    )
    script = tmp_path / 'vireid'
    script.write_text('from vireid_timm.cli.main import main\nraise SystemExit(main())\n')
    command = ['-m', 'vireid_timm'] if as_module else [str(script)]
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *command, '--version'],
        capture_output=True,
        text=True,
        timeout=50,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
        env={**os.environ, 'PYTHONPATH': path},
        check=False,
    )
    assert done.returncode in (130, -2) and not done.stdout and not done.stderr  # a shell shows both as 130


def test_an_interrupt_of_a_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('vireid_timm.cli.main.importlib.import_module', interrupted)
    assert main(['demo']) == 130
    assert capsys.readouterr().err == 'vireid: stopped\n'
