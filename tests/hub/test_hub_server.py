"""Push, load, check and fail through the installed Hub client, against a Hub on a loopback port."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from hub_server import READER, HubServer
from timm.models import push_to_hf_hub

from vireid_timm.cli.main import main
from vireid_timm.hub.folder import load_model, save_model_folder
from vireid_timm.hub.publish import check_model, push_folder
from vireid_timm.models.dual_stream import DualStreamResNet

pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    # The Hub client, up to 2.4 at least, passes large files to its HTTP library in a deprecated way.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

NAME = 'someone/model'
CONFIG, WEIGHTS, REFERENCE = 'config.json', 'model.safetensors', 'reference.safetensors'
# A network of 40,000 weights with every part of the real ones.
TINY = dict(
    resnet_args=dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 24, 32)),
    fuse_width=8,
    img_size=(64, 32),
)


def _model(name: str = 'vireid_dml_r10t', **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{'num_classes': 5, **TINY, **kwargs}).eval()
    with torch.no_grad():
        for value in model.state_dict().values():  # the two stems differ, and the statistics are not those of a start
            if value.is_floating_point():
                value += 0.1 * torch.rand(value.shape)
    return model


@pytest.fixture(scope='module')
def model() -> torch.nn.Module:
    return _model()


@pytest.fixture(scope='module')
def folder(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('saved') / 'model'
    save_model_folder(model, folder, input_size=(3, 64, 32))
    return folder


@pytest.fixture(scope='module')
def files(folder: Path) -> dict[str, bytes]:
    return _read(folder)


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _outputs(model: torch.nn.Module, channels: int = 3) -> list[torch.Tensor]:
    visible, infrared = torch.randn(2, 2, channels, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if isinstance(model, DualStreamResNet):
            return [model.eval()(visible, infrared)]
        return model.eval()(visible)  # features_only


def _assert_equal(left: torch.nn.Module, right: torch.nn.Module, channels: int = 3) -> None:
    for one, other in zip(_outputs(left, channels), _outputs(right, channels), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def _assert_loads(model: torch.nn.Module, source: str = f'hf-hub:{NAME}') -> None:
    """Compares features, since `load_model` drops the classifiers."""
    with torch.inference_mode():
        visible, infrared = torch.randn(2, 2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
        expected = model.forward_head(model.forward_features(visible, infrared), pre_logits=True)
    torch.testing.assert_close(_outputs(load_model(source)), [expected], rtol=0, atol=0)


def _downloads(hub: HubServer) -> list[tuple[str, str]]:
    """Return the requests since the last call: method and file name."""
    asked = [(method, path.rpartition('/')[2]) for method, path in hub.requests]
    hub.requests.clear()
    return asked


# Loading


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=0), dict(in_chans=1), dict(features_only=True)])
def test_a_published_model_loads_as_its_folder_does(
    hub: HubServer, folder: Path, files: dict[str, bytes], kwargs: dict[str, Any]
) -> None:
    sha = hub.publish(NAME, files)
    local = timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    for name in (f'hf-hub:{NAME}', f'hf-hub:{NAME}@{sha}', f'hf-hub:{NAME}@main'):
        _assert_equal(timm.create_model(name, pretrained=True, **kwargs), local, kwargs.get('in_chans', 3))


def test_a_model_is_downloaded_once_and_a_named_commit_needs_no_request(
    hub: HubServer, files: dict[str, bytes], model: torch.nn.Module
) -> None:
    sha = hub.publish(NAME, files)
    _assert_equal(timm.create_model(f'hf-hub:{NAME}', pretrained=True), model)
    assert _downloads(hub) == [('HEAD', CONFIG), ('GET', CONFIG), ('HEAD', WEIGHTS), ('GET', WEIGHTS)]
    _assert_equal(timm.create_model(f'hf-hub:{NAME}', pretrained=True), model)
    assert _downloads(hub) == [('HEAD', CONFIG), ('HEAD', WEIGHTS)]
    _assert_loads(model)
    assert {method for method, _ in _downloads(hub)} == {'HEAD'}
    _assert_loads(model, f'hf-hub:{NAME}@{sha}')
    assert _downloads(hub) == []


def test_branches_move_and_commits_stay(
    hub: HubServer, files: dict[str, bytes], model: torch.nn.Module, tmp_path: Path
) -> None:
    first = hub.publish(NAME, files)
    _assert_loads(model)
    other = _model()
    with torch.no_grad():
        other.joint_head.neck.weight += 1
    save_model_folder(other, tmp_path / 'other', input_size=(3, 64, 32))
    hub.publish(NAME, _read(tmp_path / 'other'))
    _assert_loads(other)
    hub.requests.clear()
    _assert_loads(model, f'hf-hub:{NAME}@{first}')
    assert not hub.requests


def test_offline_a_cached_model_loads_and_another_is_an_error(
    hub: HubServer, files: dict[str, bytes], model: torch.nn.Module, tmp_path: Path
) -> None:
    hub.publish(NAME, files)
    _assert_loads(model)
    check_model(f'hf-hub:{NAME}')
    hub.requests.clear()
    program = f"""if True:
        import sys
        from vireid_timm.cli.main import main
        from vireid_timm.hub.folder import load_model
        assert load_model('hf-hub:{NAME}').num_features == {model.num_features}
        sys.exit(main(['hub', 'check', 'hf-hub:{NAME}']) + 10 * main(['hub', 'check', 'hf-hub:someone/else']))
    """
    environment = dict(os.environ, HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(tmp_path / 'cache'))
    done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 10, done.stderr
    assert len(done.stderr.splitlines()) == 1 and 'someone/else' in done.stderr
    assert not hub.requests


def test_imagenet_weights_come_from_timms_repositories(hub: HubServer) -> None:
    torch.manual_seed(0)
    source = timm.create_model('resnet10t').state_dict()
    weights = safetensors.torch.save(source)
    with pytest.raises(ValueError, match='resnet10t'):
        load_model('vireid_dml_r10t.c3_in1k')
    hub.publish('timm/resnet10t.c3_in1k', {WEIGHTS: weights})
    for name in ('vireid_dml_r10t.c3_in1k', 'vireid_base_r10t'):
        own = timm.create_model(name, pretrained=True).state_dict()
        for key, value in source.items():
            stem = key.startswith(('conv1.', 'bn1.'))
            for place in (f'stem.visible.{key}', f'stem.infrared.{key}') if stem else (key,):
                assert key.startswith('fc.') or torch.equal(own[place], value), place


# What is missing or private


def test_what_the_hub_does_not_have_is_named(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.publish(NAME, files)
    hub.publish('someone/no-weights', {CONFIG: files[CONFIG]})
    hub.publish('someone/no-config', {WEIGHTS: files[WEIGHTS]})
    hub.publish('someone/no-reference', {CONFIG: files[CONFIG], WEIGHTS: files[WEIGHTS]})
    for source, load_says, check_says in (
        ('someone/nothing', 'Not Found', 'someone/nothing: .* Not Found'),
        (f'{NAME}@v9', 'v9', f'{NAME}@v9: .* Not Found'),
        (f'{NAME}@{40 * "0"}', 40 * '0', f'{NAME}@{40 * "0"}: .* Not Found'),
        ('someone/no-weights', 'pytorch_model.bin', WEIGHTS),
        ('someone/no-config', CONFIG, CONFIG),
        ('someone/no-reference', '', REFERENCE),
    ):
        if load_says:
            with pytest.raises(ValueError, match=f'{re.escape(source)}(.|\n)*{load_says}'):
                load_model(f'hf-hub:{source}')
        with pytest.raises(ValueError, match=check_says):
            check_model(f'hf-hub:{source}')


def test_a_private_model_needs_a_token(
    hub: HubServer, files: dict[str, bytes], model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish('someone/private', files, private=True)
    for token in ('', 'hf_expired'):
        monkeypatch.setenv('HF_TOKEN', token)
        for look in (load_model, check_model):
            with pytest.raises(ValueError, match='someone/private'):
                look('hf-hub:someone/private')
    monkeypatch.setenv('HF_TOKEN', READER)
    _assert_loads(model, 'hf-hub:someone/private')


# Broken connections and servers


@pytest.mark.parametrize(
    ('fault', 'is_an_error'),
    [
        # Later versions of the client resume a cut download, earlier ones do so when they are called again.
        pytest.param(dict(method='GET', ending=WEIGHTS, cut_after=60_000, times=1), False, id='cut once'),
        pytest.param(dict(method='GET', ending=WEIGHTS, cut_after=9_000), True, id='cut always'),
        pytest.param(dict(method='GET', ending=WEIGHTS, cut_after=0), True, id='nothing arrives'),
        pytest.param(dict(method='GET', ending=CONFIG, cut_after=5), True, id='configuration cut'),
        pytest.param(dict(method='HEAD'), True, id='connection closed'),
        pytest.param(dict(method='HEAD', status=500), True, id='server error'),
        pytest.param(dict(method='HEAD', ending=WEIGHTS, status=503), True, id='server down in between'),
        pytest.param(dict(method='GET', status=500), True, id='server error on download'),
        pytest.param(dict(method='HEAD', status=403), True, id='forbidden'),
        pytest.param(dict(method='HEAD', status=429), True, id='too many requests'),
    ],
)
def test_a_failed_download_is_an_error_and_the_next_one_succeeds(
    hub: HubServer,
    files: dict[str, bytes],
    model: torch.nn.Module,
    fault: dict[str, Any],
    is_an_error: bool,
) -> None:
    hub.publish(NAME, files)
    hub.fault(**fault)
    try:
        _assert_loads(model)
    except ValueError as error:
        assert NAME in str(error)
    else:
        assert not is_an_error
    hub.faults.clear()
    _assert_loads(model)


def test_a_hub_that_does_not_answer_is_named(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.publish(NAME, files)
    hub.fault('GET')
    with pytest.raises(ValueError, match=rf'{NAME}: .* \(asking {re.escape(hub.url)}\)'):
        check_model(f'hf-hub:{NAME}')


def test_a_file_that_arrived_damaged_is_an_error_and_not_kept(
    hub: HubServer, files: dict[str, bytes], model: torch.nn.Module
) -> None:
    """The client compares only lengths, and would load such a file from its cache forever."""
    weights = files[WEIGHTS]
    for i, look in enumerate((load_model, check_model)):
        for j, body in enumerate((bytes(len(weights)), _with_other_last_value(weights))):
            name = f'someone/damaged{i}{j}'
            hub.publish(name, files)
            hub.fault('GET', WEIGHTS, body=body, times=1)
            with pytest.raises(ValueError, match=name):
                look(f'hf-hub:{name}')
            look(f'hf-hub:{name}')
            _assert_loads(model, f'hf-hub:{name}')


def test_a_file_that_arrives_short_is_an_error_and_not_kept(
    hub: HubServer, files: dict[str, bytes], model: torch.nn.Module
) -> None:
    hub.publish(NAME, files)
    hub.fault('GET', WEIGHTS, body=files[WEIGHTS][:-10])
    with pytest.raises(ValueError, match=NAME):
        load_model(f'hf-hub:{NAME}')
    hub.faults.clear()
    _assert_loads(model)


# Damaged and foreign files


def _with_other_last_value(weights: bytes) -> bytes:
    return weights[:-4] + b'\x00\x00\x80\x3f'


def _damaged(files: dict[str, bytes]) -> Iterator[tuple[str, dict[str, bytes], bool]]:
    """Yield name, files, and whether only `check_model` detects the damage."""
    weights, config = files[WEIGHTS], json.loads(files[CONFIG])
    yield 'truncated', {WEIGHTS: weights[: len(weights) // 2]}, False
    yield 'changed', {WEIGHTS: _with_other_last_value(weights)}, True
    yield 'empty', {WEIGHTS: b''}, False
    yield 'page', {WEIGHTS: b'<!doctype html><title>Log in</title>'}, False
    state = safetensors.torch.load(weights)
    yield 'incomplete', {WEIGHTS: safetensors.torch.save({k: v for k, v in state.items() if 'fusion.' not in k})}, False
    base = {k: v.contiguous() for k, v in _model('vireid_base_r10t', num_classes=5).state_dict().items()}
    yield 'base-in-dml', {WEIGHTS: safetensors.torch.save(base)}, False
    others = {'vireid_base_r10t': {**config['model_args'], 'fuse_layers': []}, 'vireid_dml_r18': {}, 'resnet18': {}}
    for name, arguments in {**others, 'vireid_no_r1': {}}.items():
        changed = {**config, 'architecture': name, 'model_args': arguments}
        yield f'as-{name}', {CONFIG: json.dumps(changed).encode()}, False
    wider = {**config['model_args'], 'fuse_width': 16}
    yield 'wider', {CONFIG: json.dumps({**config, 'model_args': wider}).encode()}, False
    unknown = {**config['model_args'], 'no_argument': 1}
    yield 'unknown', {CONFIG: json.dumps({**config, 'model_args': unknown}).encode()}, False
    key = {**config['pretrained_cfg'], 'no_key': 1}
    yield 'key', {CONFIG: json.dumps({**config, 'pretrained_cfg': key}).encode()}, False
    for number, text in enumerate((b'', b'{', b'[]', b'{}', b'{"pretrained_cfg": {}}', b'\xff\xfe')):
        yield f'config{number}', {CONFIG: text}, False
    cropped = {**config['pretrained_cfg'], 'crop_mode': 'center'}
    yield 'cropped', {CONFIG: json.dumps({**config, 'pretrained_cfg': cropped}).encode()}, True
    shifted = {**config['pretrained_cfg'], 'mean': [0.5, 0.5, 0.5]}
    yield 'shifted', {CONFIG: json.dumps({**config, 'pretrained_cfg': shifted}).encode()}, True
    yield 'reference-cut', {REFERENCE: files[REFERENCE][:-100]}, True
    yield 'pickled', {'extra/pytorch_model.bin': b''}, True


def test_damaged_tampered_and_foreign_files_are_one_clear_error(
    hub: HubServer, files: dict[str, bytes], capsys: pytest.CaptureFixture
) -> None:
    for name, changed, by_comparison in _damaged(files):
        source = f'hf-hub:someone/{name}'
        hub.publish(f'someone/{name}', {**files, **changed})
        if not by_comparison:
            with pytest.raises(ValueError, match=name):
                load_model(source)
        assert main(['hub', 'check', source]) == 1, name
        printed = capsys.readouterr()
        assert printed.err.startswith('vireid: error: ') and name in printed.err, printed.err
        assert len(printed.err.splitlines()) == 1 and len(printed.err) < 700 and not printed.out, printed.err


def test_timm_itself_refuses_weights_of_another_network(hub: HubServer, files: dict[str, bytes]) -> None:
    """Also without the classifier, where timm ignores missing and unexpected tensors."""
    for name, changed, _ in _damaged(files):
        if name in ('incomplete', 'base-in-dml', 'as-vireid_base_r10t', 'wider'):
            hub.publish(f'someone/{name}', {**files, **changed})
            for kwargs in ({}, dict(num_classes=0), dict(num_classes=7), dict(features_only=True)):
                with pytest.raises(RuntimeError, match='fusion'):
                    timm.create_model(f'hf-hub:someone/{name}', pretrained=True, **kwargs)


class _Program:
    """Unpickles to a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ['VIREID_TEST_RAN'],)


def test_a_pickle_runs_nothing(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('VIREID_TEST_RAN', str(tmp_path / 'ran'))
    hub.publish(NAME, {CONFIG: files[CONFIG], 'pytorch_model.bin': pickle.dumps(_Program(), protocol=2)})
    for look in (load_model, check_model):
        with pytest.raises(ValueError, match=NAME):
            look(f'hf-hub:{NAME}')
    assert not (tmp_path / 'ran').exists()


# Publishing


def test_timms_own_push_round_trips(hub: HubServer, model: torch.nn.Module) -> None:
    def push(**kwargs: Any) -> Any:
        task = 'image-feature-extraction'
        return push_to_hf_hub(model, NAME, safe_serialization=True, task_name=task, model_args=TINY, **kwargs)

    push(private=True)
    assert hub.repositories[NAME].private and set(hub.files(NAME)) == {'README.md', CONFIG, WEIGHTS}
    assert '.gitattributes' in hub.repositories[NAME].commits[hub.repositories[NAME].resolve('main')]
    _assert_equal(timm.create_model(f'hf-hub:{NAME}', pretrained=True), model)
    commits = len(hub.repositories[NAME].commits)
    push()
    assert len(hub.repositories[NAME].commits) == commits


def test_a_pushed_folder_is_published_whole_and_loads(
    hub: HubServer, folder: Path, files: dict[str, bytes], model: torch.nn.Module
) -> None:
    url = push_folder(folder, NAME, message='The first')
    assert url.startswith(f'{hub.url}/{NAME}')
    published = hub.files(NAME)
    assert set(published) == set(files) and not hub.repositories[NAME].private
    assert {name for name in files if published[name] != files[name]} <= {'README.md'}
    assert f"'hf-hub:{NAME}'" in published['README.md'].decode()
    metadata = huggingface_hub.ModelCard(published['README.md'].decode()).data
    assert metadata.library_name == 'timm' and metadata.pipeline_tag == 'image-feature-extraction'
    _assert_equal(timm.create_model(f'hf-hub:{NAME}', pretrained=True), model)
    _assert_loads(model)
    for revision in ('', '@main', f'@{hub.repositories[NAME].heads["main"]}'):
        assert any('reference' in line for line in check_model(f'hf-hub:{NAME}{revision}'))
    # The push was one commit after the initial one, and pushing the same again makes none.
    push_folder(folder, NAME)
    assert len(hub.repositories[NAME].commits) == 2


def test_pull_requests_branches_and_private_repositories(
    hub: HubServer, folder: Path, files: dict[str, bytes], model: torch.nn.Module
) -> None:
    push_folder(folder, 'someone/hidden', private=True)
    assert hub.repositories['someone/hidden'].private
    start = hub.publish(NAME, {'README.md': b'---\nlicense: mit\n---\n'})
    assert push_folder(folder, NAME, create_pr=True) == f'{hub.url}/{NAME}/discussions/1'
    assert hub.repositories[NAME].heads['main'] == start and set(hub.files(NAME, 'refs/pr/1')) == set(files)
    _assert_loads(model, f'hf-hub:{NAME}@refs/pr/1')
    huggingface_hub.HfApi().create_branch(NAME, branch='v2')
    push_folder(folder, NAME, revision='v2')
    assert hub.repositories[NAME].heads['main'] == start and set(hub.files(NAME, 'v2')) == set(files)
    _assert_loads(model, f'hf-hub:{NAME}@v2')
    with pytest.raises(ValueError, match='v3'):
        push_folder(folder, NAME, revision='v3')
    with pytest.raises(ValueError, match='public'):
        push_folder(folder, NAME, private=True)
    assert hub.repositories[NAME].heads['main'] == start


@pytest.mark.parametrize('token', ['', 'hf_expired', READER])
def test_who_may_not_push_is_told_to_log_in(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(ValueError, match=f'{NAME}.*log in'):
        push_folder(folder, NAME)
    assert not hub.repositories


@pytest.mark.parametrize(
    'fault',
    [
        dict(method='POST', ending='/api/repos/create', status=500),
        dict(method='POST', ending='/preupload/main', status=500),
        dict(method='POST', ending='/objects/batch', status=500),
        dict(method='PUT', status=500),
        dict(method='PUT'),
        dict(method='POST', ending='/commit/main', status=500),
        dict(method='POST', ending='/commit/main'),
    ],
    ids=lambda fault: f'{fault["method"]} {fault.get("ending", "")} {fault.get("status", "closed")}',
)
def test_a_failed_push_is_an_error_leaves_nothing_half_and_can_be_repeated(
    hub: HubServer, folder: Path, files: dict[str, bytes], fault: dict[str, Any]
) -> None:
    hub.fault(**fault)
    with pytest.raises(ValueError, match=NAME):
        push_folder(folder, NAME)
    assert NAME not in hub.repositories or not hub.files(NAME)
    hub.faults.clear()
    push_folder(folder, NAME)
    assert set(hub.files(NAME)) == set(files)


def test_a_card_that_the_hub_refuses_is_named_before_anything_is_uploaded(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / 'model')
    (tmp_path / 'model/README.md').write_text('---\nlicense: [mit\n---\n')
    with pytest.raises(ValueError, match='README.md'):
        push_folder(tmp_path / 'model', NAME)
    assert not hub.files(NAME) and not hub.large_files


def test_the_command_line_pushes_and_checks(
    hub: HubServer, folder: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture
) -> None:
    assert main(['hub', 'push', str(folder), NAME, '--private', '--message', 'By hand']) == 0
    assert f'{hub.url}/{NAME}' in capsys.readouterr().out
    assert hub.repositories[NAME].private and set(hub.files(NAME)) == set(files)
    huggingface_hub.HfApi().create_branch(NAME, branch='v2')
    assert main(['hub', 'push', str(folder), NAME, '--revision', 'v2']) == 0
    assert main(['hub', 'check', f'hf-hub:{NAME}@v2']) == 0
    assert 'reference' in capsys.readouterr().out
    assert main(['hub', 'push', str(folder), f'{NAME}s', '--create-pr']) == 1
    assert 'someone/models' in capsys.readouterr().err


# Fine-tuning


@pytest.mark.parametrize('source', ['local-dir', 'hf-hub'])
@pytest.mark.parametrize('people', [5, 4])  # as many as the model was made for are not the same ones
def test_a_published_model_is_fine_tuned_on_other_people(
    hub: HubServer,
    folder: Path,
    files: dict[str, bytes],
    source: str,
    people: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """With learning rate 0 and frozen statistics, the run ends with the loaded weights, except the classifiers."""
    hub.publish(NAME, files)
    name = f'local-dir:{folder}' if source == 'local-dir' else f'hf-hub:{NAME}'
    data = ['--dataset', 'synthetic', '--dataset-kwargs', f'identities={people}', 'test_identities=2', 'size=(64,32)']
    still = ['--lr', '0', '--weight-decay', '0', '--freeze-bn', '--sched', 'none', '--epochs', '1', '--val-share', '0']
    quick = ['--identities-per-batch', '4', '--images-per-modality', '1', '--workers', '0', '--cache', 'ram']
    words = ['--model', name, '--pretrained', '--output', str(tmp_path), '--experiment', 'tuned']
    assert main(['train', *words, *data, *still, *quick, '--no-amp']) == 0
    said = capsys.readouterr().err
    assert f'Weights of {name} loaded, except for the classifiers: these are new, for {people} identities' in said
    before = safetensors.torch.load(files[WEIGHTS])
    after = safetensors.torch.load_file(tmp_path / 'tuned/best' / WEIGHTS)
    assert before.keys() == after.keys()
    for key, value in after.items():
        if key.endswith('fc.weight'):
            assert value.shape[0] == people and not (people == 5 and torch.equal(value, before[key])), key
        else:
            assert torch.equal(value, before[key]), key
