"""How fast and how large a deployed model is on the CPU: eager, bfloat16, and what `vireid export` writes.

    python benchmarks/inference.py                                    about ten minutes on two quiet cores
    python benchmarks/inference.py --models vireid_dml_r10t.synthvi   one minute
    python benchmarks/inference.py --save benchmarks/results/inference.cpu.json

Every variant computes the features of infrared images of 8 bits, in batches of 1 and 32; variants take turns, so that a
busy machine slows all of them. The int8 variant is onnxruntime's static quantisation of the exported file, calibrated
on rendered images; `vireid export` does not write it. The weights in the package are also scored, on people and cameras
that they have not seen and that are not those of their published scores. Prints a table and, as its last line, one JSON
object; with --save the file grows with every model.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import torch.nn.functional as F
from measuring import publish
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import vireid_timm
from vireid_timm.constants import MODALITIES
from vireid_timm.data.store import ImageStore, image_store
from vireid_timm.evaluation.evaluate import evaluate_features
from vireid_timm.export import DeployedNetwork, export_model
from vireid_timm.files import save_json

MODELS = ('vireid_dml_r50', 'vireid_dml_r10t.synthvi')
PEOPLE = dict(identities=0, test_identities=200, images_per_modality=4, seed=13)
CALIBRATION = dict(identities=0, test_identities=16, images_per_modality=4, seed=12)
PROTOCOL = 'infrared-to-visible'

Compute = Callable[[np.ndarray], np.ndarray]


class RenderedImages(CalibrationDataReader):
    """Images of one modality, one at a time, as the quantiser reads them."""

    def __init__(self, images: np.ndarray, modality: str) -> None:
        self.batches: Iterator[np.ndarray] = iter(images[:, None])
        self.modality = modality

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.modality: batch}


def export(name: str, folder: Path, size: tuple[int, int] | None) -> tuple[int, int]:
    """Write every file that is measured; the height and width of their images."""
    pretrained = '.' in name
    with torch.random.fork_rng():
        torch.manual_seed(0)
        metadata = export_model(name, folder / 'full', size=size, pretrained=pretrained)
        torch.manual_seed(0)
        export_model(name, folder / 'half', size=size, pretrained=pretrained, half=True)
    people = vireid_timm.create_dataset('synthetic', **CALIBRATION).test
    (folder / 'int8').mkdir()
    for modality in MODALITIES:
        images = image_store(people[people.modality == modality], tuple(metadata['size']))[:].numpy()
        prepared = folder / f'{modality}.onnx'
        quant_pre_process(folder / f'full/{modality}.onnx', prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            folder / f'int8/{modality}.onnx',
            RenderedImages(images, modality),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=['Conv', 'Softmax'],  # onnxruntime 1.20 fails without the range of a softmax
            nodes_to_quantize=[node.name for node in onnx.load(prepared).graph.node if node.op_type == 'Conv'],
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
    return tuple(metadata['size'])


def load_file(file: Path) -> Compute:
    """An ONNX file, in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {file.stem: images})[0]


def load_torch(name: str, modality: str, bfloat16: bool) -> Compute:
    """The model itself, in torch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vireid_timm.load_model(name, pretrained='.' in name)
    network = DeployedNetwork(model, model.retrieval).eval()
    if bfloat16:
        network = network.to(memory_format=torch.channels_last)

    def compute(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            return network(**{modality: torch.from_numpy(images)}).float().numpy()

    return compute


def variants(name: str, folder: Path, modality: str) -> dict[str, Compute]:
    """Every way to compute the features."""
    return {
        'eager': load_torch(name, modality, bfloat16=False),
        'channels-last bf16': load_torch(name, modality, bfloat16=True),
        'onnx': load_file(folder / f'full/{modality}.onnx'),
        'onnx --half': load_file(folder / f'half/{modality}.onnx'),
        'onnx int8': load_file(folder / f'int8/{modality}.onnx'),
    }


def latency(computes: dict[str, Compute], batch: np.ndarray, repeats: int) -> dict[str, float]:
    """Median milliseconds of a call of each variant; they take turns after one call each to warm up."""
    taken = {name: [] for name in computes}
    for repeat in range(repeats + 1):
        for name, compute in computes.items():
            start = time.perf_counter()
            compute(batch)
            if repeat:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def scores(name: str, folder: Path, store: ImageStore, dataset: vireid_timm.Dataset) -> dict[str, float]:
    """The mAP of every variant."""
    features: dict[str, torch.Tensor] = {}
    for modality in MODALITIES:
        rows = np.flatnonzero(dataset.test.modality == modality)
        images = store[rows].numpy()
        for variant, compute in variants(name, folder, modality).items():
            table = features.setdefault(variant, torch.empty(0))
            found = np.concatenate([compute(images[i : i + 32]) for i in range(0, len(images), 32)])
            table = table if len(table) else torch.empty(len(dataset.test), found.shape[1])
            table[torch.from_numpy(rows)] = torch.from_numpy(found)
            features[variant] = table
    return {
        variant: evaluate_features(F.normalize(table), dataset, PROTOCOL)[PROTOCOL].mean['mAP']
        for variant, table in features.items()
    }


def file_sizes(name: str, folder: Path) -> dict[str, int]:
    """Bytes of what each variant loads for one modality; of a model in torch, of all weights."""
    files = {'onnx': 'full', 'onnx --half': 'half', 'onnx int8': 'int8'}
    weights = 4 * sum(value.numel() for value in vireid_timm.load_model(name, pretrained=False).state_dict().values())
    sizes = {variant: os.path.getsize(folder / kind / 'infrared.onnx') for variant, kind in files.items()}
    return {'eager': weights, 'channels-last bf16': weights, **sizes}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All results of one model."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = export(name, folder, args.size)
        computes = variants(name, folder, 'infrared')
        result: dict[str, Any] = {'size': list(size), 'bytes': file_sizes(name, folder), 'ms': {}}
        rng = np.random.default_rng(0)
        for count in args.batches:
            batch = rng.integers(256, size=(count, 3, *size), dtype=np.uint8)
            result['ms'][str(count)] = latency(computes, batch, args.repeats)
        if '.' in name and not timm.get_pretrained_cfg(name).tag.endswith('in1k'):
            dataset = vireid_timm.create_dataset('synthetic', **{**PEOPLE, 'test_identities': args.people})
            result['mAP'] = scores(name, folder, image_store(dataset.test, size), dataset)
    return result


def table(models: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    batches = list(next(iter(models.values()))['ms'])
    heads = [*(f'batch of {count}' for count in batches), *(f'batch of {count}, times eager' for count in batches)]
    lines = [f'| | MB | {" | ".join(heads)} | mAP |', f'|---|---|{"---|" * (2 * len(batches) + 1)}']
    for name, result in models.items():
        for variant, count in result['bytes'].items():
            times = [result['ms'][batch][variant] for batch in batches]
            ratios = [result['ms'][batch]['eager'] / result['ms'][batch][variant] for batch in batches]
            cells = [f'{count / 1e6:.1f}', *(f'{ms:.1f} ms' for ms in times), *(f'{ratio:.2f}' for ratio in ratios)]
            score = f'{100 * result["mAP"][variant]:.2f} %' if 'mAP' in result else ''
            lines.append(f'| `{name}`, {variant} | {" | ".join(cells)} | {score} |')
    return '\n'.join(lines)


def main() -> None:
    """Measure the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME', help='without a tag: untrained')
    parser.add_argument('--batches', nargs='+', type=int, default=(1, 32))
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--threads', type=int, help="default: torch's")
    parser.add_argument('--size', nargs=2, type=int, help="height and width (default: the model's)")
    parser.add_argument('--people', type=int, default=200, help='people on whom mAP is measured')
    parser.add_argument('--save', type=Path, help='write the JSON there, too')
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    models: dict[str, Any] = {}
    for name in args.models:
        models[name] = measure(name, args)
        if args.save:
            save_json(args.save, {'models': models})
    result = {
        'protocol': PROTOCOL,
        'people': {**PEOPLE, 'test_identities': args.people},
        'models': models,
    }
    publish(result, table(models), torch.device('cpu'), args.save)


if __name__ == '__main__':
    main()
