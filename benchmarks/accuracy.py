"""How hard SynthVI is: unlearned descriptors, the paper's baseline and the paper's method on the standard setting.

    python benchmarks/accuracy.py                                 every row, three seeds (about 70 minutes on 2 cores)
    python benchmarks/accuracy.py --rows unlearned                seconds
    python benchmarks/accuracy.py --rows baseline --seeds 0       one run
    python benchmarks/accuracy.py --save benchmarks/results/synthvi.json

The standard setting: 2,000 rendered people to learn from and 200 others to search, four images of each per modality,
the same four visible and two infrared cameras. Runs go to --output and are kept: a second call trains what is missing
and continues what was interrupted. Prints a table in per cent and, as its last line, one JSON object.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from measuring import publish

import vireid_timm
from vireid_timm.data.store import image_store
from vireid_timm.device import resolve_device
from vireid_timm.evaluation.evaluate import evaluate_features
from vireid_timm.files import save_json
from vireid_timm.run_folder import LAST

DATASET = dict(identities=2000, test_identities=200, images_per_modality=4, seed=0)
SIZE = (128, 64)
TRAINING = {
    'dataset': 'synthetic',
    'dataset_kwargs': DATASET,
    'val_share': 0.0,
    'identities_per_batch': 16,
    'images_per_modality': 2,
    'pad': 5,
    'opt': 'adamw',
    'lr': 0.001,
    'weight_decay': 0.02,
    'sched': 'cosine',
    'sched_on_updates': True,
    'warmup_epochs': 1,
    'warmup_lr': 0.0001,
    'epochs': 6,
}
# The paper's table 1: the baseline has neither channel combination nor erasing, nor fusion and mutual learning.
LEARNED = {
    'baseline': {'model': 'vireid_base_r10t', 'channel_combination': False, 'reprob': 0.0},
    'baseline + augmentation': {'model': 'vireid_base_r10t'},
    'full': {'model': 'vireid_dml_r10t'},
}
GROUPS = ('unlearned', 'embedded', *LEARNED)
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


def unlearned(dataset: vireid_timm.Dataset) -> dict[str, list[dict[str, Any]]]:
    """Results of what needs no training, one per row of the table."""
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
    return {name: [_scores(report)] for name, report in rows.items()}


def embedded(dataset: vireid_timm.Dataset) -> dict[str, list[dict[str, Any]]]:
    """The weights in the package, which were trained on other people and by other cameras."""
    model = timm.create_model('vireid_dml_r10t.synthvi', pretrained=True)
    return {'weights in the package': [_scores(vireid_timm.evaluate(model, dataset, PROTOCOL))]}


def learned(name: str, seed: int, dataset: vireid_timm.Dataset, output: Path) -> dict[str, Any]:
    """Train one row with one seed, or continue it, and evaluate it on the test people."""
    experiment = f'{name.replace(" ", "")}-seed{seed}'
    folder = output / experiment
    finished = folder / 'result.json'
    if finished.is_file():
        return json.loads(finished.read_text(encoding='utf-8'))
    if (folder / LAST).is_file():
        vireid_timm.train({'resume': str(folder)})
    else:
        settings = {**TRAINING, **LEARNED[name], 'seed': seed, 'output': str(output), 'experiment': experiment}
        vireid_timm.train(settings)
    scores = _scores(vireid_timm.evaluate(vireid_timm.load_model(folder), dataset, PROTOCOL))
    save_json(finished, scores)
    return scores


def _scores(report: vireid_timm.Report) -> dict[str, Any]:
    result = report[PROTOCOL]
    return {**result.mean, 'mAP_interval': result.intervals['mAP'], 'num_queries': result.num_valid_queries}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: mean and, over several seeds, standard deviation in per cent."""
    lines = ['| | seeds | rank-1 | mAP | 95 % interval of mAP |', '|---|---|---|---|---|']
    for name, results in rows.items():
        cells = []
        for metric in ('rank1', 'mAP'):
            values = [100 * result[metric] for result in results]
            spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.1f}{spread}')
        low, high = results[0]['mAP_interval']
        interval = f'{100 * low:.1f} to {100 * high:.1f}' if len(results) == 1 else ''
        lines.append(f'| {name} | {len(results)} | {" | ".join(cells)} | {interval} |')
    return '\n'.join(lines)


def main() -> None:
    """Measure the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', choices=GROUPS, default=GROUPS)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--output', type=Path, default=Path('output/accuracy'))
    parser.add_argument('--save', type=Path, help='write the JSON there, too')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    dataset = vireid_timm.create_dataset('synthetic', **DATASET)
    rows: dict[str, list[dict[str, Any]]] = {}
    for group in args.rows:
        if group == 'unlearned':
            rows.update(unlearned(dataset))
        elif group == 'embedded':
            rows.update(embedded(dataset))
        else:
            rows[group] = [learned(group, seed, dataset, args.output) for seed in args.seeds]
    result = {
        'dataset': DATASET,
        'protocol': PROTOCOL,
        'rows': rows,
        'seeds': args.seeds,
    }
    publish(result, table(rows), resolve_device(), args.save)


if __name__ == '__main__':
    main()
