"""Exported files: they compute what `embed` does, say what they are, and appear only if that is so."""

import functools
import json
import os
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from processes import start
from torch import nn

import vireid_timm
from vireid_timm import export
from vireid_timm.cli.main import main
from vireid_timm.evaluation.features import Extraction, feature_settings
from vireid_timm.export import export_model
from vireid_timm.hub.folder import model_calibration, round_to_half, save_model_folder

pytestmark = pytest.mark.usefixtures('one_thread')

TINY = dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 24, 32))
FAMILIES = {
    'dml': ('vireid_dml_r10t', (64, 32), {}),
    'base': ('vireid_base_r10t', (51, 37), {}),
    'agw': ('vireid_base_r10t', (37, 51), {'non_local_blocks': (0, 1, 1, 0)}),  # in small
}
PARTS = ('visible', 'infrared', 'both')


def _randomise(model: nn.Module) -> None:
    """Fresh normalisations turn residual and non-local blocks off, and both stems start with equal values."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data.uniform_(0.1, 0.3, generator=generator)  # more overflows in AGW's non-local blocks
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.running_mean.normal_(0.0, 0.2, generator=generator)


@pytest.fixture(scope='module')
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for family, (name, size, options) in FAMILIES.items():
        folders[family] = tmp_path_factory.mktemp('models') / family
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model(name, img_size=size, num_classes=3, resnet_args=TINY, **options)
        _randomise(model)
        save_model_folder(model, folders[family])
    return folders


@pytest.fixture(scope='module')
def exported(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports of a family, to be left as they are."""

    @functools.cache
    def folder(family: str, format: str, half: bool) -> Path:
        folder = tmp_path_factory.mktemp('exports') / 'export'
        metadata = export_model(models[family], folder, format=format, half=half)
        assert metadata == json.loads((folder / 'metadata.json').read_text())
        return folder

    return folder


def _images(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def _load(file: Path) -> Callable[[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """As a user would, with nothing of this package."""
    if file.suffix == '.onnx':
        session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        return lambda batch: [
            torch.from_numpy(features)
            for features in session.run(None, {name: images.numpy() for name, images in batch.items()})
        ]
    program = torch.export.load(file).module()
    return lambda batch: [program(**batch)] if len(batch) == 1 else list(program(**batch))


def _facts(file: Path) -> dict:
    """What a file says about itself."""
    if file.suffix == '.onnx':
        props = {item.key: item.value for item in onnx.load(file).metadata_props}
        plain = ('format', 'source', 'architecture', 'fingerprint', 'features', 'modality')
        return {name: value if name in plain else json.loads(value) for name, value in props.items()}
    extra = {'metadata.json': ''}
    torch.export.load(file, extra_files=extra)
    return json.loads(extra['metadata.json'])


def _assert_same_as_embed(folder: Path, format: str, model: nn.Module, size: tuple[int, int], **options: str) -> None:
    images = {'visible': _images(9, size, 1), 'infrared': _images(6, size, 2)}
    expected = {
        modality: vireid_timm.embed(model, list(values), modality, size=size, **options)[0]
        for modality, values in images.items()
    }
    compute = {part: _load(folder / f'{part}.{format}') for part in PARTS}
    for counts in ((1, 1), (9, 6), (3, 5), (0, 2), (2, 0), (1, 6)):
        batch = {name: images[name][:count] for name, count in zip(images, counts)}
        found = dict(zip(batch, compute['both'](batch)))
        for modality, given in batch.items():
            want = expected[modality][: len(given)]
            assert found[modality].shape == want.shape and found[modality].dtype == torch.float32
            torch.testing.assert_close(found[modality], want, rtol=0, atol=1e-4)
            if len(given):
                (alone,) = compute[modality]({modality: given})
                torch.testing.assert_close(alone, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ('family', 'format', 'half'),
    [
        *((family, 'onnx', half) for family in FAMILIES for half in (False, True)),
        *(('dml', 'pt2', False), ('base', 'pt2', True), ('agw', 'pt2', False)),
    ],
)
def test_files_compute_what_embed_computes(
    family: str, format: str, half: bool, models: dict[str, Path], exported: Callable[..., Path]
) -> None:
    folder = exported(family, format, half)
    metadata = json.loads((folder / 'metadata.json').read_text())
    model, size = vireid_timm.load_model(models[family]), FAMILIES[family][1]
    fingerprint = feature_settings(model, Extraction())['weights']
    if half:
        round_to_half(model)
    _assert_same_as_embed(folder, format, model, size)

    assert {path.name for path in folder.iterdir()} == {'metadata.json', *(f'{part}.{format}' for part in PARTS)}
    assert set(metadata['files']) == {f'{part}.{format}' for part in PARTS}
    assert all(0 <= difference <= 1e-4 for difference in metadata['files'].values())
    for part in PARTS:
        facts = _facts(folder / f'{part}.{format}')
        assert facts == {**{name: value for name, value in metadata.items() if name != 'files'}, 'modality': part}
        assert facts['size'] == list(size) and facts['fingerprint'] == fingerprint and facts['half'] is half
        assert facts['dimension'] == model.num_features and facts['source'] == family
        assert facts['mean'] == list(model.pretrained_cfg['mean']) and facts['std'] == list(model.pretrained_cfg['std'])


def test_the_same_with_features_before_bn_at_another_size(models: dict[str, Path], tmp_path: Path) -> None:
    metadata = export_model(models['dml'], tmp_path / 'export', features='before-bn', size=(3, 48, 40))
    assert metadata['features'] == 'before-bn' and metadata['size'] == [48, 40]
    model = vireid_timm.load_model(models['dml'])
    _assert_same_as_embed(tmp_path / 'export', 'onnx', model, (48, 40), features='before-bn')


@pytest.mark.parametrize('format', ['onnx', 'pt2'])
def test_half_halves_the_weights_and_changes_little(format: str, exported: Callable[..., Path]) -> None:
    file = exported('base', format, True) / f'visible.{format}'
    assert 0 < _facts(file)['half_difference'] < 5e-3
    if format == 'onnx':
        stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    else:
        stored = [tensor.detach().numpy() for tensor in torch.export.load(file).state_dict.values()]
    halves, others = (sum(x.size for x in stored if (x.dtype == np.float16) is half) for half in (True, False))
    assert halves > 100 * others > 0  # mean and std are among the others


def test_images_are_resized_outside_as_embed_does_it(models: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for modality, mode in (('visible', 'RGB'), ('infrared', 'L')):
        (tmp_path / modality).mkdir()
        for number in range(3):
            pixels = rng.integers(256, size=(90 + number, 55 - number, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(tmp_path / modality / f'{number}.png')
    export_model(models['dml'], tmp_path / 'export')
    features, expected = {}, {}
    for modality in ('visible', 'infrared'):
        paths = sorted((tmp_path / modality).iterdir())
        resized = [Image.open(path).convert('RGB').resize((32, 64), Image.Resampling.BILINEAR) for path in paths]
        batch = np.stack([np.asarray(image).transpose(2, 0, 1) for image in resized])
        (features[modality],) = _load(tmp_path / f'export/{modality}.onnx')({modality: torch.from_numpy(batch)})
        expected[modality], _ = vireid_timm.embed(vireid_timm.load_model(models['dml']), paths, modality)
    found = features['infrared'] @ features['visible'].T
    torch.testing.assert_close(found, expected['infrared'] @ expected['visible'].T, rtol=0, atol=1e-4)


def test_a_calibration_goes_with_the_features_that_it_holds_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = 'vireid_dml_r10t.synthvi'
    calibration = model_calibration(name).to_dict()
    metadata = export_model(name, tmp_path / 'export')
    assert metadata['calibration'] == json.loads((tmp_path / 'export/metadata.json').read_text())['calibration']
    assert metadata['calibration'] == _facts(tmp_path / 'export/both.onnx')['calibration'] == calibration
    metadata = export_model(name, tmp_path / 'other', features='after-bn', size=(64, 32))
    assert metadata['calibration'] is None and _facts(tmp_path / 'other/both.onnx')['calibration'] is None
    assert 'is left out' in caplog.text and 'features, size' in caplog.text


@pytest.mark.parametrize('format', ['onnx', 'pt2'])
def test_files_name_no_place_of_this_machine(
    format: str, models: dict[str, Path], exported: Callable[..., Path]
) -> None:
    for file in exported('base', format, True).iterdir():
        parts = [file.read_bytes()]
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts = [archive.read(name) for name in archive.namelist()]
        for place in (models['base'].parent, Path(torch.__file__).parent, Path(vireid_timm.__file__).parent):
            assert not any(str(place).encode() in part for part in parts), f'{file.name}: {place}'


def _export(*words: str | Path) -> int:
    return main(['export', *map(str, words)])


def test_the_command_exports_and_replaces_its_own_exports_only(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / 'new/export'
    assert _export('--model', models['base'], folder) == 0
    printed, errors = capsys.readouterr()
    assert not errors and all(f'{part}.onnx' in printed for part in PARTS) and f'Export: {folder}' in printed
    assert _export(f'--model=local-dir:{models["base"]}', folder, '--half', '--input-size', '3', '32', '16') == 0
    assert 'half precision' in capsys.readouterr().out
    assert json.loads((folder / 'metadata.json').read_text())['size'] == [32, 16]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert _export('--model', models['base'], folder, '--format', 'pt2') == 1
    assert 'holds other files (both.onnx, infrared.onnx, visible.onnx)' in _said(capsys)
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'visible.onnx').write_text('mine')
    for target, words in ((other, 'other files (visible.onnx)'), (other / 'visible.onnx', 'is a file')):
        assert _export('--model', models['base'], target) == 1
        assert words in _said(capsys)
    assert _export('--model', models['base'], other / 'visible.onnx/export') == 1
    assert 'visible.onnx/export' in _said(capsys)
    assert (other / 'visible.onnx').read_text() == 'mine'
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def _said(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and error.startswith('vireid: error: ')
    return error.strip()


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--model resnet18 --no-pretrained', 'not a visible-infrared re-ID model'),
        ('--model vireid_dml_r99', 'there is no file, folder or model'),
        ('--model vireid_dml_r10t.synthvi --input-size 128 64 3', '3 channels, height and width, in this order'),
        ('--model vireid_dml_r10t.synthvi --input-size 3 0 64', 'size must be at least 1, got 0'),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _export(*words.split(), tmp_path / 'export') == 1
    assert message in _said(capsys) and not list(tmp_path.iterdir())


def test_models_that_return_no_features_are_refused(tmp_path: Path) -> None:
    model = timm.create_model('vireid_base_r10t', num_classes=0, global_pool='', resnet_args=TINY)
    save_model_folder(model, tmp_path / 'model')
    with pytest.raises(ValueError, match='maps, not features'):
        export_model(tmp_path / 'model', tmp_path / 'export')
    with pytest.raises(ValueError, match="unknown format 'tflite'; expected one of onnx, pt2"):
        export_model(tmp_path / 'model', tmp_path / 'export', format='tflite')


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_a_missing_package_is_named_with_its_extra(
    package: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks what is not there
    assert _export('--model', models['base'], tmp_path / 'export') == 1
    error = _said(capsys)
    assert 'pip install "vireid_timm[export]"' in error and package in error and not list(tmp_path.iterdir())


def _spoil(file: Path) -> None:
    """Change one weight of an ONNX file, as a faulty exporter might."""
    written = onnx.load(file)
    tensor = next(tensor for tensor in written.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(tensor).copy()
    values[0] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(written, file)


@pytest.mark.parametrize('part', PARTS)
def test_a_file_that_computes_something_else_is_not_left(
    part: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export._write

    def write_and_spoil(file: Path, *arguments: object) -> None:
        write(file, *arguments)
        if file.stem == part:
            _spoil(file)

    export_model(models['base'], tmp_path / 'export')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'export').iterdir()}
    monkeypatch.setattr(export, '_write', write_and_spoil)
    for folder in ('export', 'new'):
        with pytest.raises(ValueError, match=f'{part}.onnx computes other .* features than the model: they differ by'):
            export_model(models['base'], tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ['export']
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'export').iterdir()}


def _interruptible(command: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    return main(command)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_a_killed_export_leaves_no_folder(number: int, models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / 'output.txt'
    command = ['export', '--model', str(models['base']), str(tmp_path / 'export'), '--format', 'pt2']
    process = start(_interruptible, command, output=output, environment={})
    _wait_for(lambda: list(tmp_path.glob('.export.*.part')))
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode not in (0, None) and not (tmp_path / 'export').exists()
    if number == signal.SIGINT:
        assert [path.name for path in tmp_path.iterdir()] == ['output.txt']
        assert output.read_text().splitlines()[-1:] == ['vireid: stopped']


def _wait_for(moment: Callable[[], object], timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while not moment():
        assert time.monotonic() < deadline
        time.sleep(0.001)
