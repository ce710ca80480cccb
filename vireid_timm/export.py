"""Export a model as ONNX files or torch.export programs, which run without this package, and prove that they agree.

A file takes 8-bit images that are resized already, and returns features of length 1.
"""

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import nn

from .constants import EXPORT_FORMATS, MODALITIES
from .data.images import load_image
from .evaluation.features import Extraction, embed, feature_settings, image_size, require_dual_stream
from .files import save_json, whole_folder
from .hub.folder import check_target, load_model, model_calibration, round_to_half
from .synthvi.render import image_address
from .version import package_versions

_logger = logging.getLogger(__name__)

METADATA = 'metadata.json'
OPSET = 18
# Largest difference of a feature from those of `embed`.
TOLERANCE = 1e-4
PARTS = {'visible': ('visible',), 'infrared': ('infrared',), 'both': MODALITIES}
LARGEST_BATCH = 65536  # torch 2.5 wants a bound
# Visible and infrared images per call with which the files are compared; a file of both also takes none of one.
CALLS = ((7, 5), (1, 3), (0, 1), (2, 0))

Compute = Callable[[dict[str, torch.Tensor]], Sequence[np.ndarray | torch.Tensor]]


class DeployedNetwork(nn.Module):
    """A network that takes images [B, 3, H, W] uint8 and returns features of length 1, [B, D] float32.

    With images of both modalities it returns two tables, visible first. They share one pass through the trunk.
    """

    def __init__(self, model: nn.Module, features: str) -> None:
        super().__init__()
        self.model = model
        self.features = features
        config = resolve_model_data_config(model)
        # As buffers: torch 2.5 warns about the constants of a program when it is loaded.
        self.register_buffer('mean', torch.tensor(config['mean']).view(3, 1, 1))
        self.register_buffer('std', torch.tensor(config['std']).view(3, 1, 1))

    def forward(
        self,
        visible: torch.Tensor | None = None,
        infrared: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        given = {
            modality: (images.float() / 255 - self.mean) / self.std
            for modality, images in zip(MODALITIES, (visible, infrared))
            if images is not None
        }
        joint_map = self.model.forward_features(**given)
        is_before = self.features == 'before-bn'
        features = F.normalize(self.model.forward_pool(joint_map) if is_before else self.model.forward_neck(joint_map))
        if len(given) == 1:
            return features
        return features[: visible.shape[0]], features[visible.shape[0] :]


class HalfStored(nn.Module):
    """A network whose weights are stored in half precision where that loses nothing, and computed with in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point() and _is_half(tensor.detach().numpy()):
                tensor.data = tensor.data.half()

    def forward(
        self,
        visible: torch.Tensor | None = None,
        infrared: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        tensors = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        state = {name: tensor.float() if tensor.dtype == torch.half else tensor for name, tensor in tensors.items()}
        return torch.func.functional_call(self.network, state, (visible, infrared))


def export_model(
    source: str | Path,
    folder: str | Path,
    *,
    format: str = 'onnx',
    half: bool = False,
    features: str = 'auto',
    size: Sequence[int] | None = None,
    pretrained: bool = True,
) -> dict[str, Any]:
    """Write a model as files that run without this package.

    There is one file per modality, and one that takes both. Each is compared with `embed` on random and on rendered
    images, in batches of several sizes, before the folder appears.

    Args:
        source: Any name that `load_model` takes.
        folder: Where to write. A complete new version replaces an old one of the same format.
        format: `onnx`, or `pt2` for programs of `torch.export`.
        half: Round the weights to half precision and store them so; they are still computed with in float32.
        features: `after-bn`, `before-bn` or `auto`, as for `embed`.
        size: Height and width of the images, or (3, height, width); the model's own if None.
        pretrained: Load the weights; otherwise the network is untrained.

    Returns:
        What `metadata.json` holds, among it `files`: the largest difference of each file's features from those of
        `embed`, and with `half` also `half_difference`: theirs from the features with the full weights.

    Raises:
        ValueError: There is no such model, the format is unknown or its packages are missing, the folder holds other
            files, or a file computes other features than the model.
        OSError: The folder cannot be written.
    """
    if format not in EXPORT_FORMATS:
        raise ValueError(f'unknown format {format!r}; expected one of {", ".join(EXPORT_FORMATS)}')
    extraction = Extraction(features=features, size=size)
    folder = _check_folder(Path(folder), format)
    if format == 'onnx':
        _check_packages()
    model = require_dual_stream(load_model(source, pretrained)).to('cpu').eval()
    size = image_size(model, extraction)
    settings = feature_settings(model, extraction)
    metadata = _metadata(model, source, format, half, settings)
    metadata['calibration'] = _calibration(source, settings) if pretrained else None
    images = _images(size)
    expected = _embedded(model, images, extraction)
    if half:
        round_to_half(model)
        full, expected = expected, _embedded(model, images, extraction)
        metadata['half_difference'] = max(float((expected[name] - full[name]).abs().max()) for name in MODALITIES)
    network = DeployedNetwork(model, settings['features']).eval()
    if half and format == 'pt2':
        network = HalfStored(network).eval()
    differences = {}
    with whole_folder(folder) as temporary:
        for part, modalities in PARTS.items():
            file, given = temporary / f'{part}.{format}', {modality: images[modality] for modality in modalities}
            _write(file, network, given, {**metadata, 'modality': part})
            differences[file.name] = _compare(file, given, expected)
        metadata['files'] = differences
        save_json(temporary / METADATA, metadata)
    return metadata


def _check_folder(folder: Path, format: str) -> Path:
    """Return the folder if nothing but an older export of the same format is lost there."""
    own = (METADATA, *(f'{part}.{format}' for part in PARTS))
    return check_target(folder, own if (folder / METADATA).is_file() else ())


def _check_packages() -> None:
    try:
        for name in ('onnx', 'onnxruntime'):
            importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f'the format onnx needs the extra `export` (pip install "vireid_timm[export]"), or choose pt2: {error}'
        ) from error


def _metadata(
    model: nn.Module,
    source: str | Path,
    format: str,
    half: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    config = resolve_model_data_config(model)
    named = timm.is_model(str(source).partition('.')[0]) or str(source).startswith('hf-hub:')
    return {
        'format': format,
        **({'opset': OPSET} if format == 'onnx' else {}),
        'source': str(source) if named else Path(source).name,  # not where it is on this machine
        'architecture': model.pretrained_cfg['architecture'],
        'fingerprint': settings['weights'],
        'size': settings['size'],
        'mean': list(config['mean']),
        'std': list(config['std']),
        'features': settings['features'],
        'dimension': model.head_hidden_size,
        'half': half,
        'versions': package_versions(),
    }


def _calibration(source: str | Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the model's calibration if it holds for the exported features."""
    calibration = model_calibration(source)
    if calibration is None:
        return None
    mismatch = calibration.mismatch(settings)
    if mismatch:
        _logger.warning(f'The calibration of {source} is left out: it was fitted with other settings: {mismatch}')
        return None
    return calibration.to_dict()


def _images(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return images of both modalities, [N, 3, H, W] uint8: of noise, and of rendered people."""
    images = {}
    for modality, count in zip(MODALITIES, CALLS[0]):
        rendered = [
            load_image(image_address(modality, identity, camera=1, image=0), size) for identity in range(count // 2 + 1)
        ]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (count - len(rendered), 3, *size), dtype=torch.uint8, generator=generator)
        images[modality] = torch.cat([torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2), noise]).contiguous()
    return images


def _embedded(model: nn.Module, images: dict[str, torch.Tensor], extraction: Extraction) -> dict[str, torch.Tensor]:
    return {
        modality: embed(model, list(values), modality, features=extraction.features, size=extraction.size)[0]
        for modality, values in images.items()
    }


def _write(file: Path, network: nn.Module, examples: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write one file, without what the exporters print and warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if facts['format'] == 'onnx':
            _write_onnx(file, network, examples, facts)
        else:
            _write_program(file, network, examples, facts)


def _write_onnx(file: Path, network: nn.Module, examples: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write one ONNX file, with its facts as `metadata_props`."""
    import onnx

    inputs = list(examples)
    outputs = ['features'] if len(inputs) == 1 else [f'{modality}_features' for modality in inputs]
    # The tracing exporter: torch 2.5's other one cannot keep the number of images free, and takes 20 times as long.
    torch.onnx.export(
        network,
        (),
        str(file),
        kwargs=examples,
        input_names=inputs,
        output_names=outputs,
        dynamic_axes={name: {0: f'{modality}_images'} for name, modality in zip(inputs + outputs, 2 * inputs)},
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,  # it is in evaluation mode; this keeps the weights as they are
        dynamo=False,
    )
    written = onnx.load(file)
    if facts['half']:
        _store_in_half(written)
    onnx.helper.set_model_props(
        written, {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    )
    onnx.checker.check_model(written, full_check=True)
    onnx.save(written, file)


def _store_in_half(written: Any) -> None:
    """Store the weights of an ONNX model in half precision where that loses nothing; casts give float32 again."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in written.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and _is_half(values):
            name = f'{tensor.name}.half'
            casts.append(helper.make_node('Cast', [name], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
    nodes = [*casts, *written.graph.node]
    del written.graph.node[:]
    written.graph.node.extend(nodes)


def _is_half(values: np.ndarray) -> bool:
    with np.errstate(over='ignore'):
        return bool((values.astype(np.float16) == values).all())


def _write_program(file: Path, network: nn.Module, examples: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write one program of `torch.export`, with its facts as an extra file of the archive."""
    shapes = {modality: {0: torch.export.Dim(f'{modality}_images', min=0, max=LARGEST_BATCH)} for modality in examples}
    program = torch.export.export(network, (), examples, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # it names folders of this machine
    torch.export.save(program, file, extra_files={METADATA: json.dumps(facts)})


def _compare(file: Path, images: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a file's features from the expected ones.

    Raises:
        ValueError: It is more than `TOLERANCE`.
    """
    compute = _compute_onnx(file) if file.suffix == '.onnx' else _compute_program(file)
    worst = 0.0
    for counts in CALLS:
        batch = {name: images[name][:count] for name, count in zip(MODALITIES, counts) if name in images}
        if not any(map(len, batch.values())):
            continue
        for (modality, given), found in zip(batch.items(), compute(batch)):
            difference = torch.as_tensor(found) - expected[modality][: len(given)]
            worst = max(worst, difference.abs().max().item()) if len(given) else worst
            if not worst <= TOLERANCE:
                raise ValueError(
                    f'{file.name} computes other {modality} features than the model: they differ by {worst:.2g}, at '
                    f'most {TOLERANCE:g} is allowed, so nothing was written. Please report it, with the model and your '
                    f'versions: {package_versions()}'
                )
    return worst


def _compute_onnx(file: Path) -> Compute:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return lambda batch: session.run(None, {modality: images.numpy() for modality, images in batch.items()})


def _compute_program(file: Path) -> Compute:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch 2.11 warns of how it reads its own files
        program = torch.export.load(file).module()

    def compute(batch: dict[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.inference_mode():
            found = program(**batch)
        return found if isinstance(found, (tuple, list)) else [found]

    return compute
