"""Hub-ready folders: how they are written, and how models are named and loaded."""

import json
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import vireid_timm
from vireid_timm.cli.main import main
from vireid_timm.hub.card import results_of
from vireid_timm.hub.folder import (
    REFERENCE,
    load_model,
    resolve_model_name,
    round_to_half,
    save_model_config,
    save_model_folder,
    save_run,
)
from vireid_timm.hub.publish import check_model
from vireid_timm.run_folder import LAST, MODEL_CONFIG
from vireid_timm.training.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')

FILES = ['README.md', 'config.json', 'model.safetensors', 'reference.safetensors']
SMALL = dict(resnet_args=dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 24, 32)))
SIZE = (3, 64, 32)
DATA = dict(identities=2, test_identities=3, images_per_modality=2, size=[64, 32])


def _model(name: str = 'vireid_dml_r10t', **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{'img_size': SIZE[1:], **kwargs}).eval()


def _features(model: torch.nn.Module, channels: int = 3) -> torch.Tensor:
    images = torch.randn(2, channels, 64, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model.eval()(images, images.flip(0))


def _config(folder: Path) -> dict:
    return json.loads((folder / 'config.json').read_text())


def _save_config(folder: Path, config: dict) -> None:
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(num_classes=5),
        dict(num_classes=0),
        dict(num_classes=3, fuse_layers=(2, 3), fuse_width=32, spatial_weights='static', img_size=(64, 32)),
        dict(num_classes=3, in_chans=1, gem_power=2.0, last_stride=2, retrieval='before-bn'),
    ],
)
def test_a_saved_model_is_loaded_with_its_arguments_and_weights(tmp_path: Path, kwargs: dict) -> None:
    model = _model(**kwargs, **SMALL).to(memory_format=torch.channels_last)
    save_model_folder(model, tmp_path / 'model', facts={'dataset': 'none'})
    assert sorted(path.name for path in (tmp_path / 'model').iterdir()) == FILES
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.num_classes == model.num_classes and loaded.fuse_layers == model.fuse_layers
    assert (loaded.gem_power, loaded.retrieval) == (model.gem_power, model.retrieval)
    config = _config(tmp_path / 'model')
    assert config['architecture'] == 'vireid_dml_r10t' and config['vireid']['dataset'] == 'none'
    assert config['pretrained_cfg']['crop_mode'] == 'squash' and 'file' not in config['pretrained_cfg']
    # Written out, so that a later version with other defaults builds the same network.
    assert config['model_args']['fuse_layers'] == list(model.fuse_layers)
    assert config['model_args']['gem_power'] == model.gem_power
    assert config['model_args']['retrieval'] == model.retrieval
    assert check_model(tmp_path / 'model')


def _compiled(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend='eager')


def _distributed(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures('group')
@pytest.mark.parametrize(
    'wraps',
    [
        (_compiled,),
        (torch.nn.DataParallel,),
        (_distributed,),
        (_distributed, _compiled),
        (_compiled, _distributed),
        (timm.utils.ModelEmaV3,),
    ],
)
def test_a_wrapped_model_is_saved_as_the_model_in_it(wraps: tuple, tmp_path: Path) -> None:
    model = _model(num_classes=5, **SMALL)
    wrapped = model
    for wrap in wraps:
        wrapped = wrap(wrapped)
    save_model_folder(wrapped, tmp_path / 'wrapped')
    save_model_folder(model, tmp_path / 'plain')
    for name in ('config.json', 'model.safetensors', 'reference.safetensors'):
        assert (tmp_path / 'wrapped' / name).read_bytes() == (tmp_path / 'plain' / name).read_bytes()
    save_model_config(wrapped, tmp_path / 'config.json')
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'vireid_dml_r10t'


def test_files_are_for_everybody_to_read_where_the_users_files_are(saved: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize('half', [False, True])
def test_timm_loads_a_folder_in_every_way(tmp_path: Path, half: bool) -> None:
    model = _model(num_classes=5, **SMALL)
    save_model_folder(model, tmp_path / 'model', half=half, input_size=SIZE)
    if half:
        round_to_half(model)
    name = f'local-dir:{tmp_path / "model"}'
    stored = safetensors.torch.load_file(tmp_path / 'model/model.safetensors')
    types = {value.dtype for value in stored.values() if value.is_floating_point()}
    assert types == {torch.float16 if half else torch.float32}
    loaded = timm.create_model(name, pretrained=True)
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(_features(loaded), _features(model), rtol=0, atol=0)
    assert timm.create_model(name, pretrained=True, in_chans=1).eval()(torch.zeros(1, 1, 64, 32)).shape == (1, 5)
    maps = timm.create_model(name, pretrained=True, features_only=True).eval()(torch.zeros(1, 3, 64, 32))
    assert [entry.shape[1] for entry in maps] == [8, 16, 24, 32]
    torch.testing.assert_close(maps[3], model.forward_intermediates(torch.zeros(1, 3, 64, 32))[1][3])
    model.reset_classifier(0)
    loaded = timm.create_model(name, pretrained=True, num_classes=0)
    torch.testing.assert_close(_features(loaded), _features(model), rtol=0, atol=0)
    assert tuple(timm.data.resolve_model_data_config(loaded)['input_size']) == SIZE


def test_what_half_precision_cannot_hold_is_named(tmp_path: Path) -> None:
    model = _model(**SMALL)
    with torch.no_grad():
        model.global_head.neck.running_var[0] = 1e6
    with pytest.raises(ValueError, match='global_head.neck.running_var.*half'):
        save_model_folder(model, tmp_path / 'model', half=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('tensor', ['global_head.neck.running_var', 'stem.infrared.conv1.0.weight'])
def test_weights_that_are_not_numbers_are_named_and_leave_nothing(
    tensor: str, half: bool, value: float, tmp_path: Path
) -> None:
    model = _model(**SMALL)
    with torch.no_grad():
        model.state_dict()[tensor].view(-1)[0] = value
    with pytest.raises(ValueError, match=f'NaN or infinite are not saved: {tensor}$'):
        save_model_folder(model, tmp_path / 'model', half=half)
    assert not list(tmp_path.iterdir())


def test_finite_weights_with_other_features_leave_nothing(tmp_path: Path) -> None:
    model = _model(**SMALL)
    with torch.no_grad():
        model.stem.visible.conv1[1].running_var.fill_(-1.0)  # a variance
    with pytest.raises(ValueError, match='features of this model are not finite'):
        save_model_folder(model, tmp_path / 'model')
    assert not list(tmp_path.iterdir())


def test_reference_features_are_those_of_noise_by_the_definition(saved: Path) -> None:
    reference = safetensors.torch.load_file(saved / REFERENCE)
    model = load_model(saved).eval()
    for modality in ('visible', 'infrared'):
        images = reference[modality]
        assert images.dtype == torch.uint8 and images.shape == (2, *SIZE) and images.float().std() > 60
        mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
        normalised = {modality: (images.float() / 255 - mean) / std}
        with torch.inference_mode():
            joint_map = model.forward_features(**normalised)
            after, before = model(**normalised), model.forward_pool(joint_map)
        torch.testing.assert_close(reference[f'{modality}_after_bn'], after)
        torch.testing.assert_close(reference[f'{modality}_before_bn'], before)
    assert not torch.equal(reference['visible'], reference['infrared'])


def test_a_checkout_is_named_by_its_commit(saved: Path) -> None:
    root = Path(vireid_timm.__file__).parents[1]
    commit = None
    if (root / '.git').exists():
        command = ['git', '-C', str(root), 'rev-parse', 'HEAD']
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert _config(saved)['vireid']['versions'].get('commit') == commit


def test_writing_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    model = _model(**SMALL)
    state = torch.get_rng_state()
    save_model_folder(model, tmp_path / 'model', sample=True)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_that_names_a_place_on_this_machine_is_kept(tmp_path: Path) -> None:
    training = dict(data_dir='/home/me/data', output='/home/me/out', experiment='mine', resume='/home/me/run', lr=0.1)
    facts = {'dataset': 'folder', 'training': {**training, 'model': 'local-dir:/home/me/run/best'}}
    save_model_folder(_model(**SMALL), tmp_path / 'model', facts=facts)
    assert _config(tmp_path / 'model')['vireid']['training'] == {'lr': 0.1, 'model': 'local-dir:best'}
    for name in ('config.json', 'README.md'):
        assert '/home/me' not in (tmp_path / 'model' / name).read_text()
    assert facts['training']['data_dir'] == '/home/me/data'
    for given, kept in (('/home/me/run', 'run'), ('vireid_dml_r50.tv_in1k',) * 2, ('hf-hub:me/it@v1',) * 2):
        save_model_folder(_model(**SMALL), tmp_path / 'model', facts={'training': {'model': given}})
        assert _config(tmp_path / 'model')['vireid']['training'] == {'model': kept}


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/me.jpg').touch()
    with pytest.raises(ValueError, match='photos holds other files .me.jpg.'):
        save_model_folder(_model(**SMALL), tmp_path / 'photos')
    assert (tmp_path / 'photos/me.jpg').is_file()


@pytest.mark.parametrize('kind', ['file', 'link to a folder', 'link to a file', 'link to nothing', 'in a file'])
def test_a_file_or_a_link_is_not_replaced(
    kind: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target, file, folder = tmp_path / 'release', tmp_path / 'thesis.tex', tmp_path / 'folder'
    file.write_text('mine')
    folder.mkdir()
    if kind == 'file':
        target = file
    elif kind == 'in a file':
        target = file / 'release'
    else:
        target.symlink_to({'folder': folder, 'file': file, 'nothing': tmp_path / 'nothing'}[kind.split()[-1]])
    before = sorted(tmp_path.iterdir())
    # Before an evaluation: the dataset does not exist.
    assert main(['hub', 'save', str(saved), str(target), '--dataset', 'folder', '--data-dir', 'no/such/data']) == 1
    assert str(target) in capsys.readouterr().err
    with pytest.raises((ValueError, OSError), match=str(target)):
        save_model_folder(_model(**SMALL), target)
    assert file.read_text() == 'mine' and sorted(tmp_path.iterdir()) == before
    assert target.is_symlink() == kind.startswith('link')


# From a run to a folder


def test_hub_save_evaluates_and_writes_what_it_measured(saved: Path, tmp_path: Path, capsys) -> None:
    kwargs = [f'{name}={value}' for name, value in DATA.items()]
    command = ['hub', 'save', str(saved), str(tmp_path / 'out'), '--half', '--license', 'mit', '--data-terms', 'Mine.']
    assert main([*command, '--dataset', 'synthetic', '--device', 'cpu', '--dataset-kwargs', *kwargs]) == 0
    said = capsys.readouterr().out
    assert 'reference: every tensor fits' in said and 'float16' in said
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [*FILES, 'sample.png']
    model = load_model(saved)
    round_to_half(model)
    expected = vireid_timm.evaluate(model, vireid_timm.create_dataset('synthetic', **DATA), cache='off')
    config = _config(tmp_path / 'out')
    facts = config['vireid']['evaluation']
    assert facts['weights'] == expected.weights and facts['size'] == [64, 32]
    assert facts['protocols'].keys() == expected.protocols.keys()
    for name, result in expected.protocols.items():
        assert facts['protocols'][name]['mean']['mAP'] == pytest.approx(result.mean['mAP'], abs=1e-6)
    assert config['pretrained_cfg']['license'] == 'mit' and config['vireid']['data_terms'] == 'Mine.'
    card = (tmp_path / 'out/README.md').read_text()
    assert 'license: mit' in card and 'Mine.' in card and 'sample.png' in card and 'model-index' in card
    # Saved again, what was stated stays, and what nobody measured is not said.
    save_run(tmp_path / 'out', tmp_path / 'again')
    card = (tmp_path / 'again/README.md').read_text()
    assert 'license: mit' in card and 'Mine.' in card and 'model-index' not in card
    assert 'evaluation' not in _config(tmp_path / 'again')['vireid']
    assert _config(tmp_path / 'again')['num_classes'] == 5


def test_a_report_of_other_weights_is_refused(saved: Path, tmp_path: Path) -> None:
    dataset = vireid_timm.create_dataset('synthetic', **DATA)
    report = vireid_timm.evaluate(load_model(saved), dataset, 'infrared-to-visible', cache='off')
    save_run(saved, tmp_path / 'right', report=report)
    with pytest.raises(ValueError, match='report is about the weights .* in half precision .*has'):
        save_run(saved, tmp_path / 'rounded', report=report, half=True)
    path = tmp_path / 'report.json'
    vireid_timm.evaluate(_model(num_classes=0, **SMALL | {'gem_power': 2.0}), dataset, cache='off').save(path)
    other = _model(num_classes=5)
    save_model_folder(other, tmp_path / 'other')
    assert main(['hub', 'save', str(tmp_path / 'other'), str(tmp_path / 'wrong'), '--report', str(path)]) == 1
    assert not (tmp_path / 'wrong').exists() and not (tmp_path / 'rounded').exists()


def test_hub_save_has_the_flags_that_its_messages_name(saved: Path, tmp_path: Path, capsys) -> None:
    assert main(['synth', str(tmp_path / 'data'), *'--identities 2 --test-identities 2 --size 64 32'.split()]) == 0
    broken = next((tmp_path / 'data/query').rglob('*.*g'))
    broken.write_bytes(b'no image')
    command = ['hub', 'save', str(saved), str(tmp_path / 'out'), '--dataset', 'folder', '--data-dir']
    command += [str(tmp_path / 'data'), '--device', 'cpu', '--cache', 'ram', '--workers', '0']
    assert main(command) == 1
    error = capsys.readouterr().err
    assert str(broken) in error and '(--skip-broken)' in error
    assert main([*command, '--skip-broken']) == 0
    assert _config(tmp_path / 'out')['vireid']['evaluation']['skipped_images'] == 1


def test_results_of_an_earlier_release_are_not_lost(saved: Path, tmp_path: Path) -> None:
    release, dataset = tmp_path / 'release', vireid_timm.create_dataset('synthetic', **DATA)
    report = vireid_timm.evaluate(load_model(saved), dataset, 'infrared-to-visible', cache='off')
    save_run(saved, release, report=report, note='Twice the same.')
    evaluation, card = _config(release)['vireid']['evaluation'], (release / 'README.md').read_text()
    # The same weights keep their results, however often they are saved.
    for _ in range(2):
        save_run(saved, release, license='mit', note='Twice the same.')
        assert _config(release)['vireid']['evaluation'] == evaluation
        again = (release / 'README.md').read_text()
        assert results_of(again) == results_of(card) and str(report) in again and again.count('Twice the same.') == 1
        assert 'model-index' in again and 'license: mit' in again
    # Other weights do not inherit them, and do not remove them.
    other = _model(num_classes=5)
    save_model_folder(other, tmp_path / 'other')
    for source, half in ((tmp_path / 'other', False), (saved, True)):
        with pytest.raises(ValueError, match='release holds results of the weights .*--dataset.*--report.*another'):
            save_run(source, release, half=half)
    assert (release / 'README.md').read_text() == again
    new = vireid_timm.evaluate(load_model(tmp_path / 'other'), dataset, 'infrared-to-visible', cache='off')
    save_run(tmp_path / 'other', release, report=new)
    assert _config(release)['vireid']['evaluation']['weights'] == new.weights


def test_a_run_is_saved_from_its_best_model(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / 'run/best')
    config = _config(tmp_path / 'run/best')
    config['vireid']['validation'] = {'rank1': 0.5, 'mAP': 0.25}
    _save_config(tmp_path / 'run/best', config)
    save_run(tmp_path / 'run', tmp_path / 'out')
    assert 'rank1 50.00 %, mAP 25.00 %' in (tmp_path / 'out/README.md').read_text()
    with pytest.raises(ValueError, match='no file or folder .*nowhere'):
        save_run(tmp_path / 'nowhere', tmp_path / 'out')


# Names and loading


@pytest.fixture
def run(copy: Path, tmp_path: Path) -> Path:
    """A run folder: `best/`, and a last checkpoint with other averaged weights."""
    folder = tmp_path / 'run'
    folder.mkdir()
    copy.rename(folder / 'best')
    model = _model(num_classes=5, **SMALL)
    save_model_config(model, folder / MODEL_CONFIG, input_size=SIZE)
    averaged = {key: value * 2 if key.endswith('neck.weight') else value for key, value in model.state_dict().items()}
    state = {'arch': 'vireid_dml_r10t', 'epoch': 3, 'state_dict': model.state_dict(), 'state_dict_ema': averaged}
    write_checkpoint(folder, state)
    return folder


def test_every_name_of_a_model_leads_to_what_timm_takes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = run / 'best'
    for source in (run, str(run), best, best / 'model.safetensors', str(best / 'config.json'), run / MODEL_CONFIG):
        assert resolve_model_name(source) == f'local-dir:{best}'
    for name in ('vireid_dml_r50', 'vireid_dml_r10t.synthvi', f'local-dir:{run}', 'hf-hub:me/it', 'hf-hub:me/it@v1'):
        assert resolve_model_name(name) == name
    # As in timm, a registered name never means a folder of this name in the current directory.
    monkeypatch.chdir(run.parent)
    best.rename('vireid_dml_r50')
    assert resolve_model_name('vireid_dml_r50') == 'vireid_dml_r50'
    for source in ('./vireid_dml_r50', Path('vireid_dml_r50')):
        assert resolve_model_name(source) == 'local-dir:vireid_dml_r50'
    for checkpoint in (run, run / LAST):  # a run without best/ has only its checkpoint
        with pytest.raises(ValueError, match='is a training checkpoint.*vireid hub save'):
            resolve_model_name(checkpoint)


def test_a_model_loads_by_every_name(run: Path) -> None:
    model = _model(num_classes=5, **SMALL)
    model.reset_classifier(0)
    expected = _features(model)
    best = run / 'best'
    for source in (f'local-dir:{best}', str(best), best / 'model.safetensors', run):
        loaded = load_model(source)
        assert loaded.num_classes == 0
        torch.testing.assert_close(_features(loaded), expected, rtol=0, atol=0)
        untrained = load_model(source, pretrained=False)
        assert not torch.equal(_features(untrained), expected)
    # Averaged weights win, and a run that has no best/ yet is its last checkpoint.
    averaged = 2 * model.joint_head.neck.weight
    assert torch.equal(load_model(run / LAST).joint_head.neck.weight, averaged)
    shutil.rmtree(best)
    assert torch.equal(load_model(run).joint_head.neck.weight, averaged)
    assert not torch.equal(load_model(run, pretrained=False).joint_head.neck.weight, averaged)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_checkpoints_of_wrapped_models_are_read_as_timm_reads_them(prefix: str, run: Path) -> None:
    expected = _features(load_model(run / LAST))
    state = torch.load(run / LAST, weights_only=True)
    for key in ('state_dict', 'state_dict_ema'):
        state[key] = {prefix + name: value for name, value in state[key].items()}
    write_checkpoint(run, state)
    torch.testing.assert_close(_features(load_model(run / LAST)), expected, rtol=0, atol=0)
    weights = run / 'best/model.safetensors'
    expected = _features(load_model(run))
    stored = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({prefix + name: value for name, value in stored.items()}, weights)
    torch.testing.assert_close(_features(load_model(run)), expected, rtol=0, atol=0)


def test_a_checkpoint_is_saved_with_its_averaged_weights(run: Path, tmp_path: Path) -> None:
    save_run(run / LAST, tmp_path / 'out')
    torch.testing.assert_close(_features(load_model(tmp_path / 'out')), _features(load_model(run / LAST)))
    assert check_model(tmp_path / 'out') and _config(tmp_path / 'out')['num_classes'] == 5
    for source in ('vireid_dml_r10t.synthvi', 'hf-hub:me/it'):
        with pytest.raises(ValueError, match=f'{source} is not a folder'):
            save_run(source, tmp_path / 'other')


@pytest.mark.parametrize('num_classes', [0, 5])
@pytest.mark.parametrize('name', ['mine.pth', 'mine.pt', 'mine.t', 'mine.bin', 'mine.safetensors'])
def test_plain_weights_are_told_how_to_load(name: str, num_classes: int, run: Path, tmp_path: Path) -> None:
    model = _model(num_classes=num_classes, img_size=(128, 64))
    path = run / name  # not taken for a name of the run's model
    if path.suffix == '.safetensors':
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=f'{name}.* vireid hub convert {path} DIR --from agw$') as caught:
        load_model(path)
    assert '\n' not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(str(caught.value))):
        save_run(path, tmp_path / 'release')
    # What it advises works.
    call = re.search(r'vireid_timm.save_model_folder\(.*DIR\)', str(caught.value))[0]
    names = dict(vireid_timm=vireid_timm, timm=timm, NAME='vireid_dml_r10t', N=num_classes, DIR=tmp_path / 'out')
    exec(call, names)
    model.reset_classifier(0)
    torch.testing.assert_close(_features(load_model(tmp_path / 'out')), _features(model), rtol=0, atol=0)


def test_a_damaged_checkpoint_of_a_run_is_only_damaged(run: Path) -> None:
    (run / LAST).write_bytes(b'1234')
    with pytest.raises(ValueError, match='damaged') as caught:
        load_model(run / LAST)
    assert 'plain weights' not in str(caught.value)


@pytest.mark.parametrize(
    'command',
    [
        ['check', ''],
        ['save', '', '{out}'],
        ['save', '{saved}', '{out}', '--report', ''],
        ['save', '{saved}', '{out}', '--dataset', ''],
        ['save', '{saved}', '{out}', '--dataset', 'synthetic', '--dataset-kwargs', 'size=64'],
        ['save', '{saved}', '{out}', '--dataset', 'synthetic', '--dataset-kwargs', 'trial'],
        ['save', '{saved}', '{out}', '--dataset', 'synthetic', '--device', 'meta'],
        ['save', '{saved}', ''],
        ['push', '', 'me/it'],
        ['push', '{saved}', ''],
        ['convert', '', '{out}', '--from', 'agw'],
    ],
)
def test_a_mistake_is_one_line(command: list, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    try:
        status = main(['hub', *(word.format(saved=saved, out=tmp_path / 'out') for word in command)])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status in (1, 2) and 'Traceback' not in error
    assert error.strip().splitlines()[-1].startswith(('vireid: error: ', 'vireid hub save: error: '))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('vireid_dml_r51', 'no file, folder or model .vireid_dml_r51.; models of this library: vireid_'),
        ('resnet18', 'not a visible-infrared re-ID model'),
        ('vireid_dml_r10t.nonsense', 'nonsense'),
        ('local-dir:no/such/folder', 'no/such/folder'),
        ('no/such', "no file or folder 'no/such'.*hf-hub:no/such.*local-dir:no/such"),
        ('hub:someone/model', 'hub:someone/model.*valid sources: hf-hub, local-dir'),
        ('hf-hub:someone/nothing', 'someone/nothing'),
    ],
)
def test_a_wrong_name_is_an_error_that_names_it(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(source, pretrained=source != 'resnet18')
    assert '\n' not in str(caught.value)


def test_damaged_and_foreign_weights_are_named(copy: Path) -> None:
    weights = copy / 'model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='cannot load a model'):
        load_model(copy)
    other = _model('vireid_base_r10t', num_classes=5, **SMALL).state_dict()
    safetensors.torch.save_file(other, weights)
    # Classifiers that nobody asked for do not excuse the rest.
    with pytest.raises(ValueError, match='Missing key'):
        load_model(copy)
    config = _config(copy)
    config['model_args']['nonsense'] = 1
    _save_config(copy, config)
    with pytest.raises(ValueError, match='nonsense'):
        load_model(copy)
    (copy / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='cannot load a model'):
        load_model(copy)
    (copy.parent / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty has no config.json; give a run folder or a Hub-ready folder'):
        load_model(copy.parent / 'empty')


def test_package_offers_what_the_design_names() -> None:
    for name in (
        'create_dataset',
        'protocol_trials',
        'rank_metrics',
        'evaluate',
        'embed',
        'train',
        'RandomChannelCombination',
        'ChannelRandomErasing',
        'WeightedRegularizedTriplet',
        'MutualLearningLoss',
        'IdentityModalitySampler',
        'GeneralizedMeanPool',
    ):
        assert callable(getattr(vireid_timm, name))
