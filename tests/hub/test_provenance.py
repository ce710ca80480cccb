"""Test identities that a model was trained on are found, by the run's list or by the options in its configuration."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.data.records import Dataset
from vireid_timm.evaluation.report import Report
from vireid_timm.hub.folder import load_model, save_run, split_problem

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = '--identities 8 --test-identities 8 --size 64 32 --workers 0'.split()
SYNTHETIC = dict(identities=6, test_identities=4, size=[64, 32], images_per_modality=2)


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset in each layout whose split is an option or a column."""
    root = tmp_path_factory.mktemp('data')
    for layout in ('regdb', 'folder'):
        assert main(['synth', str(root / layout), '--layout', layout, *SMALL]) == 0
    for split in ('query', 'gallery'):
        (root / 'folder' / split).rename(root / f'unused-{split}')
    everyone = sorted(path.relative_to(root) for path in (root / 'folder').glob('*/*/*/*'))
    for name, tested in (('first', 4), ('second', 2)):
        people = sorted({path.parts[-2] for path in everyone})[:tested]
        rows = [
            f'{path},{path.parts[-2]},1,{path.parts[-3]},{"test" if path.parts[-2] in people else "train"}'
            for path in everyone
        ]
        (root / f'{name}.csv').write_text('\n'.join(['path,identity,camera,modality,split', *rows]))
    return root


def _run(copy: Path, dataset: Dataset, kwargs: dict) -> Path:
    """Return the folder of a run on a dataset, as training leaves it."""
    run = copy.parent / 'run'
    run.mkdir()
    copy.rename(run / 'best')
    config = json.loads((run / 'best/config.json').read_text())
    config['vireid'] |= {'dataset': dataset.name, 'dataset_options': json.loads(json.dumps(dataset.options))}
    (run / 'best/config.json').write_text(json.dumps(config))
    (run / 'class_map.json').write_text(json.dumps({name: i for i, name in enumerate(dataset.train.identities())}))
    settings = {'dataset': dataset.name, 'data_dir': dataset.root, 'dataset_kwargs': kwargs}
    (run / 'args.yaml').write_text(yaml.safe_dump(settings))
    return run


CASES = {  # reader, file, options of the run, options of the test, what the message advises
    'another trial': ('regdb', 'regdb', dict(trial=3), {}, '--dataset-kwargs trial=3'),
    'the default trial': ('regdb', 'regdb', {}, dict(trial=2), '--dataset-kwargs trial=1'),
    'another seed': ('folder', 'folder', dict(seed=1), {}, '--dataset-kwargs seed=1'),
    'another share': (
        'folder',
        'folder',
        dict(test_share=0.3),
        dict(test_share=0.6),
        '--dataset-kwargs test_share=0.3',
    ),
    'two options': ('folder', 'folder', dict(seed=1, test_share=0.4), {}, '--dataset-kwargs test_share=0.4 seed=1'),
    'more rendered people': (
        'synthetic',
        '',
        SYNTHETIC | dict(identities=9),
        SYNTHETIC,
        '--dataset-kwargs identities=9',
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_a_run_is_not_tested_on_its_training_identities(case: str, data: Path, copy: Path) -> None:
    reader, file, trained_with, tested_with, advice = CASES[case]
    root = data / file if file else None
    trained = vireid_timm.create_dataset(reader, root, **trained_with)
    tested = vireid_timm.create_dataset(reader, root, **tested_with)
    run = _run(copy, trained, trained_with)
    shared = set(trained.train.identities()) & set(tested.test.identities())
    count, text = split_problem(run, tested)
    assert count == len(shared) > 0
    assert f'{count} of the {len(tested.test.identities())} test identities' in text and text.endswith(advice)
    for source in (run / 'best', f'local-dir:{run / "best"}', run / 'best/model.safetensors'):
        assert split_problem(source, tested) == (count, text)
    assert split_problem(run, trained) == (0, '')


def test_an_edited_table_is_compared_by_name(data: Path, copy: Path) -> None:
    first = vireid_timm.create_dataset('csv', data / 'first.csv')
    run = _run(copy, first, {})
    (data / 'first.csv').write_text((data / 'first.csv').read_text().replace(',train', ',test'))
    count, text = split_problem(run, vireid_timm.create_dataset('csv', data / 'first.csv'))
    assert count == len(first.train.identities()) and 'another split of these data' in text
    # Another file may call other people by the same names.
    assert split_problem(run, vireid_timm.create_dataset('csv', data / 'second.csv')) == (0, '')


def test_equal_names_in_other_data_are_no_alarm(data: Path, copy: Path, tmp_path: Path) -> None:
    trained = vireid_timm.create_dataset('folder', data / 'folder', seed=1)
    run = _run(copy, trained, dict(seed=1))
    (tmp_path / 'elsewhere').symlink_to(data / 'folder')
    assert split_problem(run, vireid_timm.create_dataset('folder', tmp_path / 'elsewhere'))[0], 'the same folder'
    other = vireid_timm.create_dataset('folder', data / 'folder')
    assert split_problem(run, dataclasses.replace(other, root=str(tmp_path)))[0] == 0
    assert split_problem(run, vireid_timm.create_dataset('regdb', data / 'regdb', trial=2))[0] == 0
    assert split_problem('vireid_dml_r10t.synthvi', other) == (0, '')


def test_rendered_people_of_another_seed_are_others(copy: Path) -> None:
    run = _run(copy, vireid_timm.create_dataset('synthetic', **SYNTHETIC), SYNTHETIC)
    others = vireid_timm.create_dataset('synthetic', **SYNTHETIC, seed=5)
    assert split_problem(run, dataclasses.replace(others, test=others.train)) == (0, '')


@pytest.mark.parametrize('case', ['another trial', 'more rendered people'])
def test_a_published_model_names_nobody_and_is_still_checked(case: str, data: Path, copy: Path) -> None:
    reader, file, trained_with, tested_with, advice = CASES[case]
    root = data / file if file else None
    trained = vireid_timm.create_dataset(reader, root, **trained_with)
    run = _run(copy, trained, trained_with)
    save_run(run, run.parent / 'release')
    tested = vireid_timm.create_dataset(reader, root, **tested_with)
    assert split_problem(run.parent / 'release', tested) == split_problem(run, tested)
    assert split_problem(run.parent / 'release', trained) == (0, '')


def test_the_command_warns_and_a_card_does_not_claim_it(
    data: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = _run(copy, vireid_timm.create_dataset('regdb', data / 'regdb', trial=3), dict(trial=3))
    on = ['--dataset', 'regdb', '--data-dir', str(data / 'regdb'), '--device', 'cpu']
    reports = {'wrong': tmp_path / 'wrong.json', 'right': tmp_path / 'right.json'}
    command = ['eval', *on, '--checkpoint', str(run)]
    assert main([*command, '--report', str(reports['wrong'])]) == 0
    shown = capsys.readouterr()
    assert 'it was trained with trial=3): give --dataset-kwargs trial=3' in shown.err
    assert 'WRONG SPLIT' in shown.out
    assert main([*command, '--dataset-kwargs', 'trial=3', '--report', str(reports['right'])]) == 0
    shown = capsys.readouterr()
    assert 'trained with' not in shown.err and 'WRONG SPLIT' not in shown.out
    assert Report.load(reports['wrong']).learned_identities > 0 == Report.load(reports['right']).learned_identities

    save = ['hub', 'save', str(run), str(tmp_path / 'out')]
    for measured in (on, ['--report', str(reports['wrong'])]):
        assert main([*save, *measured]) == 1
        error = capsys.readouterr().err
        assert error.endswith('--dataset-kwargs trial=3\n') and 'vireid: error: ' in error and 'Traceback' not in error
        assert not (tmp_path / 'out').exists()
    assert main([*save, *on, '--dataset-kwargs', 'trial=3']) == 0
    assert main([*save, '--report', str(reports['right'])]) == 0


def test_a_report_made_in_python_is_checked_by_name(data: Path, copy: Path, tmp_path: Path) -> None:
    run = _run(copy, vireid_timm.create_dataset('regdb', data / 'regdb', trial=3), dict(trial=3))
    tested = vireid_timm.create_dataset('regdb', data / 'regdb')
    report = vireid_timm.evaluate(load_model(run), tested, cache='off')
    with pytest.raises(ValueError, match='no measurement: .* test identities .*--dataset-kwargs trial=3'):
        save_run(run, tmp_path / 'out', report=report)
    # The report of another folder's evaluation says what its command found.
    with pytest.raises(ValueError, match='no measurement: the model was trained on 3 of the test identities'):
        save_run(run, tmp_path / 'out', report=dataclasses.replace(report, dataset='folder', learned_identities=3))
