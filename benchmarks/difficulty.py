"""How hard SynthVI v1 is: descriptors that learned nothing, and the weights in the package, on its test people.

    python benchmarks/difficulty.py --save benchmarks/results/difficulty.json     a minute on two cores

Prints a table in per cent and, as its last line, one JSON object. What networks learn from SynthVI v1 is in paper.py.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import synthvi_v1
import timm
import torch
import torch.nn.functional as F
from measuring import publish

import vireid_timm
from vireid_timm.data.store import image_store
from vireid_timm.device import resolve_device
from vireid_timm.evaluation.evaluate import evaluate_features

SIZE = (128, 64)
PROTOCOL = 'infrared-to-visible'


def histogram(images: torch.Tensor) -> torch.Tensor:
    """Joint colour histogram of 8 x 8 x 8 bins: [N, 3, H, W] uint8 -> [N, 512]."""
    bins = (images // 32).long()
    index = (bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]).flatten(1)
    return torch.zeros(len(images), 512).scatter_add_(1, index, torch.ones(index.shape)).sqrt()


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Grey pixels at 32 x 16 with zero mean: [N, 3, H, W] uint8 -> [N, 512]."""
    grey = images.float().mean(dim=1, keepdim=True)
    values = F.interpolate(grey, size=(32, 16), mode='area').flatten(1)
    return values - values.mean(dim=1, keepdim=True)


def reports(dataset: vireid_timm.Dataset) -> dict[str, vireid_timm.Report]:
    """Results by row of the table."""
    images = image_store(dataset.test, SIZE)[:]
    chance = torch.from_numpy(np.random.default_rng(0).normal(size=(len(images), 64))).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = timm.create_model('vireid_dml_r10t', num_classes=0)
    rows = {
        name: evaluate_features(F.normalize(features, dim=1), dataset, PROTOCOL)
        for name, features in (
            ('chance', chance),
            ('colour histogram', histogram(images)),
            ('raw pixels', pixels(images)),
        )
    }
    rows['untrained network'] = vireid_timm.evaluate(untrained, dataset, PROTOCOL)
    # They were trained on other people and by other cameras.
    rows['weights in the package'] = vireid_timm.evaluate(
        vireid_timm.load_model('vireid_dml_r10t.synthvi'), dataset, PROTOCOL
    )
    return rows


def scores(report: vireid_timm.Report) -> dict[str, Any]:
    """What the JSON object says of a row."""
    result = report[PROTOCOL]
    return {**result.mean, 'mAP_interval': result.intervals['mAP'], 'num_queries': result.num_valid_queries}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, in per cent."""
    lines = ['| | rank-1 | mAP | 95 % interval of mAP |', '|---|---|---|---|']
    for name, row in rows.items():
        low, high = row['mAP_interval']
        lines.append(
            f'| {name} | {100 * row["rank1"]:.1f} | {100 * row["mAP"]:.1f} | {100 * low:.1f} to {100 * high:.1f} |'
        )
    return '\n'.join(lines)


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--save', type=Path, help='write the JSON there, too')
    args = parser.parse_args()
    options = synthvi_v1.SPLITS['test']
    rows = {
        name: scores(report) for name, report in reports(vireid_timm.create_dataset('synthetic', **options)).items()
    }
    publish({'dataset': options, 'protocol': PROTOCOL, 'rows': rows}, table(rows), resolve_device(), args.save)


if __name__ == '__main__':
    main()
