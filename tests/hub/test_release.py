"""The release script: a small recipe to a folder and the Hub, resumed and repeated."""

import csv
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from hub_server import HubServer
from PIL import Image
from timm.models._registry import _model_pretrained_cfgs

import vireid_timm
from vireid_timm.data.layouts import write_layout
from vireid_timm.hub.card import INTENDED_USE
from vireid_timm.hub.folder import save_model_folder
from vireid_timm.hub.provenance import learned_identities
from vireid_timm.hub.publish import check_model
from vireid_timm.synthvi.render import render_address
from vireid_timm.training.config import TrainConfig, find_config, load_yaml, recipe_names

pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    # The Hub client, up to 2.4 at least, passes large files to its HTTP library in a deprecated way.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

HUB = Path(__file__).parents[2] / 'hub'
EMBEDDED = Path(vireid_timm.__file__).with_name('weights')
SMALL_RESNET = dict(stem_width=8, stem_type='deep_tiered', avg_down=True)
RECIPE = {
    'dataset': 'synthetic',
    'dataset_kwargs': dict(identities=4, test_identities=2, images_per_modality=2, size=[64, 32]),
    'model': 'vireid_base_r10t',
    'model_kwargs': {
        'resnet_args': dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=[8, 16, 24, 32])
    },
    'input_size': [3, 64, 32],
    'identities_per_batch': 4,
    'images_per_modality': 2,
    'val_share': 0.0,
    'epochs': 1,
    'lr': 0.01,
    'pad': 2,
    'warmup_epochs': 0,
    'workers': 0,
    'amp': False,
    'cache': 'ram',
}


def _release(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, 'argv', ['release.py', *map(str, words), '--device', 'cpu'])
    runpy.run_path(str(HUB / 'release.py'), run_name='__main__')


def _stages_done_already(said: str) -> list[str]:
    return [stage for stage in ('train', 'evaluate', 'save', 'push') if f'{stage}: done already' in said]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / 'small.yaml'
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_a_release_goes_through_its_stages_once(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    words = (recipe, '--output', tmp_path / 'out', '--half', '--license', 'mit')
    _release(monkeypatch, *words)
    work = tmp_path / 'out/small'
    assert {path.name for path in work.iterdir()} == {'recipe.yaml', 'run', 'trained.json', 'report.json', 'model'}
    report = vireid_timm.Report.load(work / 'report.json')
    facts = json.loads((work / 'model/config.json').read_text())['vireid']
    assert facts['evaluation']['weights'] == report.weights
    assert set(facts['evaluation']['protocols']) == {'visible-to-infrared', 'infrared-to-visible', 'mixed'}
    assert facts['weights']['precision'] == 'float16' and facts['training']['epochs'] == 1
    assert check_model(work / 'model') and 'license: mit' in (work / 'model/README.md').read_text()

    before = {path: path.stat().st_mtime_ns for path in sorted(work.rglob('*')) if path.is_file()}
    capsys.readouterr()
    _release(monkeypatch, *words)
    said = capsys.readouterr().out
    assert _stages_done_already(said) == ['train', 'evaluate', 'save']
    assert before == {path: path.stat().st_mtime_ns for path in sorted(work.rglob('*')) if path.is_file()}

    # Interrupted: the run resumes from its last epoch, and the later stages are repeated.
    for name in ('trained.json', 'report.json', 'model/config.json', 'model/model.safetensors'):
        (work / name).unlink()
    for path in (work / 'model').iterdir():
        path.unlink()
    (work / 'model').rmdir()
    _release(monkeypatch, *words)
    assert vireid_timm.Report.load(work / 'report.json').weights == report.weights

    recipe.write_text(yaml.safe_dump({**RECIPE, 'lr': 0.02}))
    with pytest.raises(SystemExit, match='another version of'):
        _release(monkeypatch, *words)


def test_a_release_is_pushed_loaded_back_and_compared(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    hub: HubServer,
) -> None:
    words = (recipe, '--output', tmp_path / 'out', '--push', 'someone/small')
    work = tmp_path / 'out/small'

    # The Hub fails after everything else is done. The same command resumes from there.
    hub.fault('POST', '/commit/main', status=500)
    with pytest.raises(SystemExit, match='release: error: someone/small'):
        _release(monkeypatch, *words)
    assert (work / 'model').is_dir() and not (work / 'pushed.json').exists() and not hub.files('someone/small')
    hub.faults.clear()
    capsys.readouterr()
    _release(monkeypatch, *words)
    said = capsys.readouterr().out
    assert _stages_done_already(said) == ['train', 'evaluate', 'save']
    assert f'verify: hf-hub:someone/small has the weights of {work}' in said
    pushed = hub.files('someone/small')
    assert pushed['model.safetensors'] == (work / 'model/model.safetensors').read_bytes()
    assert set(pushed) == {path.name for path in (work / 'model').iterdir()}
    facts = json.loads(pushed['config.json'])['vireid']['evaluation']
    assert set(facts['protocols']) == {'visible-to-infrared', 'infrared-to-visible', 'mixed'}

    # Pushed once; verified each time.
    hub.requests.clear()
    _release(monkeypatch, *words)
    said = capsys.readouterr().out
    assert _stages_done_already(said) == ['train', 'evaluate', 'save', 'push'] and 'verify: ' in said
    assert {method for method, _ in hub.requests} <= {'GET', 'HEAD'}

    # A different model that somebody else pushed is an error, even if it is valid.
    other = tmp_path / 'other'
    save_model_folder(timm.create_model('vireid_base_r10t', num_classes=4), other, input_size=(3, 64, 32))
    hub.publish('someone/small', {path.name: path.read_bytes() for path in other.iterdir()})
    with pytest.raises(SystemExit, match='hf-hub:someone/small has the weights'):
        _release(monkeypatch, *words)
    hub.publish('someone/small', {**pushed, 'config.json': (other / 'config.json').read_bytes()})
    with pytest.raises(SystemExit, match='release: error: .*someone/small'):
        _release(monkeypatch, *words)


def test_the_models_of_several_trials_are_averaged_and_the_first_is_saved(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_layout(tmp_path / 'RegDB', 'regdb', identities=4, size=(64, 32), workers=0)
    recipe.write_text(yaml.safe_dump({**RECIPE, 'dataset': 'regdb', 'dataset_kwargs': {'trial': 1}}))
    words = (recipe, '--data-dir', tmp_path / 'RegDB', '--output', tmp_path / 'out', '--trials')
    work = tmp_path / 'out/small'
    _release(monkeypatch, *words, '2')
    first = work / 'trial-2/run/best/model.safetensors'
    before = first.read_bytes()
    capsys.readouterr()
    _release(monkeypatch, *words, '2-3')  # the second one is all that is left to do
    said = capsys.readouterr().out
    assert f'train: done already ({work / "trial-2/run"})' in said and str(work / 'trial-3/run') not in said
    assert first.read_bytes() == before
    reports = [vireid_timm.Report.load(work / f'trial-{trial}/report.json') for trial in (2, 3)]
    assert [report.options['trial'] for report in reports] == [2, 3] and reports[0].weights != reports[1].weights
    mean = json.loads((work / 'mean.json').read_text())
    card = (work / 'model/README.md').read_text()
    assert mean['trials'] == [2, 3] and set(mean['protocols']) == set(reports[0].protocols)
    for protocol, scores in mean['protocols'].items():
        for metric in ('rank1', 'mAP', 'mINP'):
            one, other = (report[protocol].mean[metric] for report in reports)
            assert scores['mean'][metric] == pytest.approx((one + other) / 2)
            assert scores['std'][metric] == pytest.approx(abs(one - other) / 2)
        # The card has both the scores of this model, which the Hub shows, and the mean.
        assert f'{100 * scores["mean"]["mAP"]:.2f} ± {100 * scores["std"]["mAP"]:.2f}' in card
    facts = json.loads((work / 'model/config.json').read_text())['vireid']['evaluation']
    assert facts['weights'] == reports[0].weights and 'Mean and deviation of the models of trials 2, 3' in card


def test_embedded_weights_are_half_and_without_classifiers(tmp_path: Path) -> None:
    release = runpy.run_path(str(HUB / 'release.py'))
    model = timm.create_model('vireid_dml_r10t', num_classes=5).eval()
    release['save_embedded_weights'](model, tmp_path / 'weights.safetensors')
    saved = safetensors.torch.load_file(tmp_path / 'weights.safetensors')
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float16}
    assert not [name for name in saved if '.fc.' in name]
    loaded = timm.create_model(
        'vireid_dml_r10t', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.safetensors'))
    )
    model.reset_classifier(0)
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(images), model(images), rtol=0.02, atol=0.02)


def test_embed_trains_once_and_scores_what_users_load(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Training images in a table, test people of SynthVI: the facts name the people, and the card what was done."""
    people = vireid_timm.create_dataset('synthetic', **{**RECIPE['dataset_kwargs'], 'test_identities': 0}).train
    rows = zip(people.path, people.identity, people.camera, people.modality)
    with open(tmp_path / 'table.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('path', 'identity', 'camera', 'modality', 'split'))
        for number, (address, identity, camera, modality) in enumerate(rows):
            Image.fromarray(render_address(address)).save(tmp_path / f'{number}.png')
            writer.writerow((f'{number}.png', identity, camera, modality, 'train'))
    settings = {key: value for key, value in RECIPE.items() if key not in ('dataset_kwargs', 'model_kwargs')}
    recipe.write_text(yaml.safe_dump({**settings, 'dataset': 'csv', 'model': 'vireid_base_r10t.c3_in1k'}))
    release = runpy.run_path(str(HUB / 'release.py'))
    monkeypatch.setitem(release['main'].__globals__, 'EMBEDDED', tmp_path)
    target = tmp_path / 'vireid_base_r10t.small.safetensors'
    seen = dict(identities=4, images_per_modality=2)
    words = ['--embed', '--data-dir', str(tmp_path / 'table.csv'), '--test-dataset', 'synthetic', '--test-kwargs']
    words += ['first_identity=4', 'identities=0', 'test_identities=2', 'images_per_modality=2', '--trained-kwargs']
    words += [*(f'{key}={value}' for key, value in seen.items()), '--data-terms', 'Nobody has rights in them.']
    words += ['--output', str(tmp_path / 'out'), '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', ['release.py', str(recipe), *words])
    with pytest.raises(ValueError, match=r'register the tag vireid_base_r10t.small with the file .*small.safetensors'):
        release['main']()
    assert not (tmp_path / 'out/small/run').exists()

    cfg = replace(timm.get_pretrained_cfg('vireid_base_r10t.c3_in1k'), file=str(target), tag='small', hf_hub_id=None)
    monkeypatch.setitem(_model_pretrained_cfgs, 'vireid_base_r10t.small', replace(cfg, input_size=(3, 64, 32)))
    release['main']()
    written = {path: path.read_bytes() for path in tmp_path.glob('vireid_base_r10t.small.*')}
    assert {path.suffix for path in written} == {'.safetensors', '.json', '.md'}
    facts = json.loads(target.with_suffix('.json').read_text())
    training = facts['vireid'].pop('training')
    assert facts['vireid'] == {'dataset': 'synthetic', 'dataset_options': seen}
    assert training['dataset'] == 'csv' and 'data_dir' not in training
    assert facts['dataset']['test_identities'] == 2 and set(facts['protocols']) > {'visible-to-infrared'}
    count, warning = learned_identities('vireid_base_r10t.small', 'synthetic', seen, None, ['00003', '00004'])
    assert count == 1 and 'training identities' in warning
    card = target.with_suffix('.md').read_text()
    assert 'Nobody has rights in them.' in card and str(tmp_path) not in card
    capsys.readouterr()
    release['main']()
    assert 'train: done already' in capsys.readouterr().out
    assert {path: path.read_bytes() for path in written} == written


@pytest.mark.parametrize('recipe', recipe_names())
def test_recipes_are_settings_for_models_that_exist(recipe: str) -> None:
    config = TrainConfig.from_mapping(load_yaml(recipe))
    others = {'synthvi': 'synthetic', 'in1k_ft_synthvi': 'csv', 'fine_tune': 'folder', 'plus': 'folder'}
    assert config.dataset == others.get(recipe, recipe)
    assert timm.is_model(config.model.partition('.')[0])
    head = [line for line in find_config(recipe).read_text().splitlines() if line.startswith('#')]
    for part in (f'  command:  vireid train --config {recipe}', '  cost:     ', '  expected: '):
        assert any(part in line for line in head), f'{part} in its first lines'


@pytest.mark.parametrize('dataset', ['sysu_mm01', 'regdb', 'llcm'])
def test_recipes_for_the_licensed_datasets_are_the_papers(dataset: str) -> None:
    # The defaults are the paper's recipe; a recipe says what would change with them.
    settings = load_yaml(dataset)
    defaults = TrainConfig()
    of_its_own = ('dataset', 'dataset_kwargs', 'model', 'pretrained', 'val_share')
    assert settings['pretrained'] and settings['val_share'] == 0 and settings['model'] == 'vireid_dml_r50.tv_in1k'
    implied = {'input_size': [3, 288, 144], 'identities_per_batch': 8, 'backbone_lr_scale': 0.1}
    for name in settings.keys() - of_its_own:
        assert settings[name] == (getattr(defaults, name) if name not in implied else implied[name]), name


def test_the_table_of_weights_knows_every_recipe_and_claims_what_was_measured() -> None:
    table = (HUB / 'weights.md').read_text(encoding='utf-8')
    for recipe in set(recipe_names()) - {'fine_tune', 'plus'}:  # which make no weights of ours
        assert f'`{recipe}`' in table
    lines = table.splitlines()
    for weights in EMBEDDED.glob('*.safetensors'):
        stated = json.loads(weights.with_suffix('.json').read_text())['protocols']
        first = next(number for number, line in enumerate(lines) if line.startswith(f'| `{weights.stem}`'))
        last = next(number for number, line in enumerate(lines) if number > first and not line.startswith('| | '))
        for (protocol, result), row in zip(stated.items(), lines[first:last], strict=True):
            cells = [cell.strip() for cell in row.split('|')]
            assert f'SynthVI `{protocol}`' in row
            assert cells[-3:-1] == [f'{100 * result["rank1"]:.2f}', f'{100 * result["mAP"]:.2f}']


def test_the_cards_in_the_package_are_whole() -> None:
    for weights in EMBEDDED.glob('*.safetensors'):
        card = weights.with_suffix('.md').read_text(encoding='utf-8')
        front = yaml.safe_load(card.split('---\n')[1])
        assert front['library_name'] == 'timm' and front['license'] == 'apache-2.0'
        assert front['model-index'][0]['name'] == weights.stem
        assert INTENDED_USE in card and f"create_model('{weights.stem}'" in card
