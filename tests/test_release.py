"""The release script: from a recipe to a folder, in small, resumed and repeated."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import yaml

import vireid_timm
from vireid_timm.cards import INTENDED_USE
from vireid_timm.config import TrainConfig, load_yaml
from vireid_timm.publish import check_model

pytestmark = pytest.mark.usefixtures('one_thread')

HUB = Path(__file__).parents[1] / 'hub'
RECIPES = sorted(HUB.glob('*.yaml'))
EMBEDDED = Path(vireid_timm.__file__).with_name('weights')
RECIPE = {
    'dataset': 'synthetic',
    'dataset_kwargs': dict(identities=4, test_identities=2, pictures_per_modality=2, size=[64, 32]),
    'model': 'vireid_base_r10t',
    'input_size': [3, 64, 32],
    'identities_per_batch': 4,
    'pictures_per_modality': 2,
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
    assert [stage for stage in ('train', 'evaluate', 'save') if f'{stage}: done already' not in said] == []
    assert before == {path: path.stat().st_mtime_ns for path in sorted(work.rglob('*')) if path.is_file()}

    # Interrupted: the run goes on from its last epoch, the later stages are made anew.
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


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipes_are_settings_for_models_that_exist(path: Path) -> None:
    settings = load_yaml(path)
    config = TrainConfig.from_mapping(settings)
    model, dataset = path.stem.split('.')
    assert timm.is_model(model) and config.model.partition('.')[0] == model
    assert config.dataset == {'synthvi': 'synthetic'}.get(dataset, dataset)
    assert f'hub/{path.name}' in path.read_text(), 'the command in its first lines'


@pytest.mark.parametrize('dataset', ['sysu_mm01', 'regdb', 'llcm'])
def test_recipes_for_the_licensed_datasets_are_the_papers(dataset: str) -> None:
    # The defaults are the paper's recipe; a recipe says what would change with them.
    settings = load_yaml(HUB / f'vireid_dml_r50.{dataset}.yaml')
    defaults = TrainConfig()
    of_its_own = ('dataset', 'dataset_kwargs', 'model', 'pretrained', 'val_share')
    assert settings['pretrained'] and settings['val_share'] == 0 and settings['model'] == 'vireid_dml_r50.tv_in1k'
    implied = {'input_size': [3, 288, 144], 'identities_per_batch': 8, 'backbone_lr_scale': 0.1}
    for name in settings.keys() - of_its_own:
        assert settings[name] == (getattr(defaults, name) if name not in implied else implied[name]), name


def test_the_table_of_weights_knows_every_recipe_and_claims_what_was_measured() -> None:
    table = (HUB / 'weights.md').read_text(encoding='utf-8')
    for path in RECIPES:
        assert f'`{path.name}`' in table
    for weights in EMBEDDED.glob('*.safetensors'):
        stated = json.loads(weights.with_suffix('.json').read_text())['protocols']
        rows = [line for line in table.splitlines() if line.startswith('| ') and 'SynthVI `' in line]
        for (protocol, result), row in zip(stated.items(), rows, strict=True):
            cells = [cell.strip() for cell in row.split('|')]
            assert protocol in row
            assert cells[-3:-1] == [f'{100 * result["rank1"]:.2f}', f'{100 * result["mAP"]:.2f}']


def test_the_cards_in_the_package_are_whole() -> None:
    for weights in EMBEDDED.glob('*.safetensors'):
        card = weights.with_suffix('.md').read_text(encoding='utf-8')
        front = yaml.safe_load(card.split('---\n')[1])
        assert front['library_name'] == 'timm' and front['license'] == 'apache-2.0'
        assert front['model-index'][0]['name'] == weights.stem
        assert INTENDED_USE in card and f"create_model('{weights.stem}'" in card
