"""Settings: one dataclass behind the command line, YAML files and `train()`."""

from pathlib import Path
from typing import get_args

import pytest

from vireid_timm.training.config import RECIPES, SETTINGS, TrainConfig, find_config, kind_of, load_yaml, recipe_names


def test_defaults_are_the_papers_recipe() -> None:
    config = TrainConfig()
    assert (config.epochs, config.lr, config.momentum, config.weight_decay) == (80, 0.1, 0.9, 5e-4)
    assert (config.global_weight, config.fusion_weight, config.mutual) == (0.6, 1.8, 'joint-to-both')
    assert (config.identities_per_batch, config.images_per_modality) == (None, 4)
    assert (config.augment, config.loss, config.smoothing) == (['rcc', 'cre'], {'triplet': 1.0}, 0.0)


def test_yaml_gives_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / 'recipe.yaml'
    path.write_text('lr: 5e-3\nweight-decay: 0\nmodel: vireid_base_r50\nidentities_per_batch:\n')
    assert load_yaml(path) == {
        'lr': 0.005,
        'weight_decay': 0.0,
        'model': 'vireid_base_r50',
        'identities_per_batch': None,
    }


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('learning_rate: 1', "no setting 'learning_rate'"),
        ('epoch: 3', "did you mean 'epochs'"),
        ('epochs: many', 'epochs must be a whole number'),
        ('epochs: 2.5', 'epochs must be a whole number'),
        ('epochs: true', 'epochs must be a whole number'),
        ('epochs:', 'epochs needs a value'),
        ('lr: fast', 'lr must be a number'),
        ('amp: 1', 'amp must be True or False'),
        ('val_interval: 0', 'val_interval must be at least 1, got 0'),
        ('checkpoint_interval: 10 min', "checkpoint_interval must be 500, 10m, or nothing for none, got '10 min'"),
        ('checkpoint_interval: 0', "got '0'"),
        ('checkpoint_interval: 0.0m', "got '0.0m'"),
        ('smoothing: 2', 'smoothing must be at most 1, got 2.0'),
        ('clip_grad: 0', 'clip_grad must be above 0, got 0.0'),
        ('lr: .nan', 'lr must be a finite number, got nan'),
        ('workers: -3', 'workers must be at least 0, got -3'),
        ('input_size: [288, 144]', r'input_size must be 3 values, got \[288, 144\]'),
        ('input_size: [3, 288, -144]', 'input_size must be at least 1, got -144'),
        ('input_size: 288', 'input_size must be a list, got 288'),
        ('decay_milestones: [a]', "decay_milestones must be a whole number, got 'a'"),
        ('id_branches: joint', "id_branches must be a list, got 'joint'"),
        ('cre_fill: [0, zero, 0]', "cre_fill must be a number, got 'zero'"),
        ('augment: rcc', "augment must be a list, got 'rcc'"),
        ('augment: [rcc, cre: 0.5]', r"augment must be text, got \{'cre': 0.5\}"),
        ('augment: [rcc, mixup]', "augment: unknown augmentation 'mixup'; expected some of rcc, rfa, exchange"),
        ('augment: [cre=2]', 'augment: expected a probability in 0..1 after cre='),
        ('loss: triplet', "loss must be names with values, got 'triplet'"),
        ('loss: {triplets: 1}', "loss: unknown loss 'triplets'; expected some of triplet, hetero_center"),
        ('loss: {triplet: -1}', "loss: the weight of the loss 'triplet' must be a number of at least 0, got -1"),
        ('model_kwargs: static', "model_kwargs must be names with values, got 'static'"),
        ('model_kwargs: {1: 2}', r'model_kwargs must be names with values, got \{1: 2\}'),
        (f'seed: {2**63}', f'seed must be at most {2**63 - 1}, got {2**63}'),
        (f'epochs: {"9" * 5000}', 'cannot read|epochs must be at most'),
        ('lr: .inf', 'lr must be a finite number, got inf'),
        (f'lr: {"9" * 400}', 'lr must be a finite number, got inf'),
        ('dist_bn: none', 'dist_bn must be one of reduce, broadcast'),
        ('mutual: all', 'mutual must be one of none, global-to-fusion'),
        ('- a\n- b', 'setting: value'),
        ('a: [', 'cannot read'),
        ('a: ' + '[' * 3000, 'cannot read'),
    ],
)
def test_bad_yaml_names_file_setting_and_fix(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / 'recipe.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)


def test_every_whole_number_has_a_largest_value() -> None:
    names = [name for name, setting in SETTINGS.items() if int in (kind_of(setting)[0], *get_args(kind_of(setting)[0]))]
    assert {'epochs', 'seed', 'input_size', 'workers'} < set(names)
    for name in names:
        is_list = 'nargs' in SETTINGS[name].metadata
        for value, bound in ((-1, 'at least'), (10**30, 'at most')):
            with pytest.raises(ValueError, match=f'configuration: {name} must be {bound} [0-9]+, got {value}'):
                TrainConfig.from_mapping({name: [value] * 3 if is_list else value})


def test_numbers_can_be_text(tmp_path: Path) -> None:
    path = tmp_path / 'recipe.yaml'
    path.write_text('checkpoint_interval: 500\nexperiment: 7\n')
    assert load_yaml(path) == {'checkpoint_interval': '500', 'experiment': '7'}
    for text in ('10m', '0.5m', "''"):
        path.write_text(f'checkpoint_interval: {text}\n')
        assert load_yaml(path) == {'checkpoint_interval': text.strip("'")}


def test_a_missing_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='nowhere.yaml'):
        load_yaml(tmp_path / 'nowhere.yaml')


@pytest.mark.parametrize('setting', ['data_dir', 'output', 'resume', 'model'])
@pytest.mark.parametrize('prefix', ['', 'local-dir:'])
def test_a_tilde_is_the_home_folder(setting: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    config = tmp_path / 'config.yaml'
    for path, expanded in (('~/a~b', f'{tmp_path}/a~b'), ('~', str(tmp_path)), ('./~', './~'), ('a/~/b', 'a/~/b')):
        config.write_text(f"{setting}: '{prefix}{path}'\n")
        assert load_yaml('~/config.yaml') == {setting: f'{prefix}{expanded}'}
        assert getattr(TrainConfig.from_mapping({setting: prefix + path}), setting) == f'{prefix}{expanded}'


def test_recipes_are_found_by_name_before_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == ['fine_tune', 'in1k_ft_synthvi', 'llcm', 'plus', 'regdb', 'synthvi', 'sysu_mm01']
    Path('regdb').mkdir()  # a folder of data, for example
    Path('other').write_text('lr: 0.5')
    assert find_config('regdb') == RECIPES / 'regdb.yaml' and load_yaml('regdb')['dataset'] == 'regdb'
    assert load_yaml('other') == {'lr': 0.5} and load_yaml(RECIPES / 'regdb.yaml') == load_yaml('regdb')
    with pytest.raises(ValueError, match='sysu is neither a recipe nor a file; .*regdb.*sysu_mm01'):
        load_yaml('sysu')
