"""The paper's tables as commands: each row is a recipe, trained and evaluated here.

    python benchmarks/paper.py table1 --budget smoke                  a minute: does it run?
    python benchmarks/paper.py table1 table4 --seeds 0 1 2            SynthVI v1 from scratch, 10 to 20 minutes a run
    python benchmarks/paper.py table1 --budget full --dataset sysu_mm01 --data-dir SYSU-MM01
    python benchmarks/paper.py report                                 the tables of all results so far

Finished runs are not repeated, interrupted ones are resumed, and rows that several tables share are trained once.
`--minutes` sets a time limit, and `--jobs` trains several networks side by side. Every run appends its lines to
`results.csv` in --output: one for each set of people, protocol and feature.
"""

import argparse
import csv
import json
import logging
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import synthvi_v1
import torch
import torch.nn.functional as F
from measuring import commit
from paper_tables import BUDGETS, CELLS, CLAIMS, TABLES

import vireid_timm
from vireid_timm.device import resolve_device
from vireid_timm.evaluation.confidence import bootstrap_intervals, paired_test
from vireid_timm.evaluation.evaluate import evaluate_features
from vireid_timm.evaluation.features import centred
from vireid_timm.evaluation.report import METRICS, query_values
from vireid_timm.files import save_json, whole_file
from vireid_timm.run_folder import SUMMARY, has_checkpoint
from vireid_timm.training.interrupt import Stopped

# The last four are made from features after BN: two are parts of them, one averages over mirror images, one has each
# modality's mean subtracted.
FEATURES = ('after BN', 'before BN', 'global', 'fusion', 'flip test', 'centred')
MAIN_PROTOCOL = {
    'sysu_mm01': 'all-single',
    'regdb': 'visible-to-infrared',
    'llcm': 'visible-to-infrared',
}  # others: infrared-to-visible
COLUMNS = (
    *('dataset', 'budget', 'cell', 'seed', 'split', 'protocol', 'feature', *METRICS, 'queries'),
    *('train_accuracy', 'train_images_per_second', 'parameters', 'features', 'commit', 'hardware', 'torch', 'finished'),
)

_logger = logging.getLogger('paper')


def settings_of(cell: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Settings of `vireid_timm.train` for one run."""
    budget, changes = BUDGETS[args.budget], dict(CELLS[cell])
    is_baseline = changes.pop('model', '') == 'baseline'
    settings = {**budget['settings'], **changes, 'model': budget['baseline' if is_baseline else 'method']}
    width = {'fuse_width': budget['width']} if 'width' in budget and not is_baseline else {}
    settings['model_kwargs'] = {**budget.get('model_kwargs', {}), **width, **changes.get('model_kwargs', {})}
    data = {'dataset': args.dataset, 'data_dir': args.data_dir}
    if args.dataset == 'synthetic':
        small = dict(identities=8, test_identities=0, images_per_modality=2)
        data = {'dataset': 'synthetic', 'dataset_kwargs': small if args.budget == 'smoke' else synthvi_v1.TRAINING}
    return {
        **with_weights(settings, args),
        **data,
        'seed': seed,
        'output': str(args.output),
        'experiment': folder_of(cell, seed, args).name,
    }


def with_weights(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Settings whose `pretrained_path` lies in --output; the ImageNet weights are written there if they are missing."""
    if 'pretrained_path' not in settings:
        return settings
    path = args.output / settings['pretrained_path']
    if not path.is_file():
        script = Path(__file__).parents[1] / 'hub' / 'lite0_weights.py'
        subprocess.run([sys.executable, script, path], check=True)
    return {**settings, 'pretrained_path': str(path)}


def folder_of(cell: str, seed: int, args: argparse.Namespace) -> Path:
    """Where a run lies."""
    return args.output / f'{args.dataset}-{args.budget}-{cell.replace(" ", "-")}-seed{seed}'


def test_sets(args: argparse.Namespace) -> dict[str, vireid_timm.Dataset]:
    """The sets of people that every run is evaluated on, by name."""
    if args.dataset != 'synthetic':
        return {'test': vireid_timm.create_dataset(args.dataset, args.data_dir)}
    if args.budget == 'smoke':
        tiny = dict(identities=0, first_identity=8, test_identities=8, images_per_modality=2)
        return {split: vireid_timm.create_dataset('synthetic', **tiny) for split in ('validation', 'test')}
    return {split: vireid_timm.create_dataset('synthetic', **options) for split, options in synthvi_v1.SPLITS.items()}


def run_cell(cell: str, seed: int, args: argparse.Namespace) -> None:
    """Train or resume one cell with one seed, evaluate it, and write `lines.json` to its folder when it is finished."""
    facts = {
        'dataset': 'SynthVI v1' if args.dataset == 'synthetic' else args.dataset,
        'budget': args.budget,
        'cell': cell,
        'seed': seed,
    }
    train_and_evaluate(folder_of(cell, seed, args), settings_of(cell, seed, args), facts, args)


def train_and_evaluate(folder: Path, settings: dict[str, Any], facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Do what `run_cell` does, for any settings; `facts` go into every line."""
    if (folder / 'lines.json').is_file():
        return
    vireid_timm.train({'resume': str(folder)} if has_checkpoint(folder) else settings)
    model = vireid_timm.load_model(folder).to(resolve_device())
    with open(folder / SUMMARY, encoding='utf-8', newline='') as file:
        last = list(csv.DictReader(file))[-1]
    facts = {
        **facts,
        'train_accuracy': round(float(last['train_accuracy']), 4),
        'train_images_per_second': round(float(last['train_images_per_second']), 1),
        'parameters': sum(value.numel() for value in model.parameters()),
        'features': model.head_hidden_size,
        'commit': commit(),
        'hardware': hardware(),
        'torch': torch.__version__,
        'finished': datetime.now(timezone.utc).isoformat(timespec='seconds'),
    }
    lines = []
    for split, dataset in test_sets(args).items():
        protocols = [name for name in vireid_timm.protocols_of(dataset) if name != 'mixed']
        for feature, values in features_of(model, dataset):
            report = evaluate_features(values, dataset, protocols)
            report.save(folder / f'{split}, {feature}.json')
            for protocol, result in report.protocols.items():
                scores = {name: round(100 * result.mean[name], 4) for name in METRICS}
                where = {'split': split, 'protocol': protocol, 'feature': feature}
                lines.append({**facts, **where, **scores, 'queries': result.num_valid_queries})
    save_json(folder / 'lines.json', lines)


def features_of(model: torch.nn.Module, dataset: vireid_timm.Dataset) -> Iterator[tuple[str, torch.Tensor]]:
    """L2-normalised features of the test images, by name."""
    after = vireid_timm.embed(model, dataset.test, cache='auto')[0]
    yield 'after BN', after
    yield 'before BN', vireid_timm.embed(model, dataset.test, cache='auto', features='before-bn')[0]
    if model.fusion is not None:
        width = model.global_head.num_features
        yield 'global', F.normalize(after[:, :width])
        yield 'fusion', F.normalize(after[:, width:])
    yield 'flip test', vireid_timm.embed(model, dataset.test, cache='auto', flip_test=True)[0]
    yield 'centred', centred(after, dataset.test.modality)


def hardware() -> str:
    """The device in words."""
    device = resolve_device()
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{platform.machine()}, {torch.get_num_threads()} threads'


def collect(args: argparse.Namespace) -> list[dict[str, str]]:
    """Append the lines of runs that the table does not have yet, and return all of its lines."""
    path = args.output / 'results.csv'
    known = []
    if path.is_file():
        with open(path, encoding='utf-8', newline='') as file:
            known = list(csv.DictReader(file))
    done = {(line['dataset'], line['budget'], line['cell'], line['seed']) for line in known}
    for finished in sorted(args.output.glob('*/lines.json')):
        lines = [{name: str(value) for name, value in line.items()} for line in json.loads(finished.read_text())]
        known += [line for line in lines if (line['dataset'], line['budget'], line['cell'], line['seed']) not in done]
    with whole_file(path) as temporary, open(temporary, 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(known)
    return known


def train_all(args: argparse.Namespace) -> bool:
    """Train all cells of the tables; return whether all of them are done."""
    cells = list(dict.fromkeys(cell for table in args.what for _, cell, _ in TABLES[table]))
    runs = {}
    for seed in args.seeds:
        for cell in cells:
            command = [sys.executable, __file__, 'cell', '--cell', cell, '--seeds', str(seed), *shared_options(args)]
            runs[f'{cell}, seed {seed}'] = (folder_of(cell, seed, args) / 'lines.json', command)
    return run_all(runs, args, lambda: collect(args))


def shared_options(args: argparse.Namespace) -> list[str]:
    """Flags that a process for one run has from this one."""
    data = ['--dataset', args.dataset, *(['--data-dir', args.data_dir] if args.data_dir else [])]
    return ['--output', str(args.output), '--budget', args.budget, *data]


def run_all(runs: dict[str, tuple[Path, list[str]]], args: argparse.Namespace, collect: Callable[[], Any]) -> bool:
    """Run commands, some side by side and within the time limit; return whether all of them are done.

    Each has a process of its own, so that nothing of a run can fail another one, and memory is given back.

    Args:
        runs: Name -> a file that is there when it is done, and the command.
        args: With `jobs` and `minutes`.
        collect: Called after each run, never twice at once.
    """
    end = time.monotonic() + 60 * args.minutes if args.minutes else float('inf')
    collecting = Lock()

    def work(name: str) -> bool:
        finished, command = runs[name]
        left = end - time.monotonic()
        if finished.is_file():
            return True
        if left <= 0:
            return False
        _logger.info(name)
        process = subprocess.Popen(command)
        try:
            status = process.wait(None if left == float('inf') else left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves a checkpoint
            status = process.wait()
        if status not in (0, 143, -signal.SIGTERM):  # the last one: stopped while it was evaluated
            _logger.error('%s ended with status %d', name, status)
        with collecting:
            collect()
        return status == 0

    with ThreadPoolExecutor(args.jobs) as pool:
        return all(list(pool.map(work, runs)))


def report(args: argparse.Namespace) -> str:
    """The tables of everything that is measured, as Markdown."""
    lines, text = collect(args), []
    for dataset, budget in dict.fromkeys((line['dataset'], line['budget']) for line in lines):
        group = [line for line in lines if (line['dataset'], line['budget']) == (dataset, budget)]
        for table, rows in TABLES.items():
            cells = {line['cell'] for line in group}
            if sum(cell in cells for _, cell, _ in rows) > 1 and (args.what == ['report'] or table in args.what):
                text += [table_text(table, dataset, budget, group, args), '']
    return '\n'.join(text)


def table_text(table: str, dataset: str, budget: str, lines: list[dict[str, str]], args: argparse.Namespace) -> str:
    """One table with its paired tests."""
    split = 'validation' if table in ('plus', 'readings') and dataset == 'SynthVI v1' else 'test'
    protocol = MAIN_PROTOCOL.get(dataset, 'infrared-to-visible')
    lines = [line for line in lines if line['split'].startswith(split) and line['protocol'] == protocol]
    splits = list(dict.fromkeys(line['split'] for line in lines))
    has_paper = dataset == 'sysu_mm01'
    header = ['', 'seeds', 'training accuracy', *(['paper: rank-1, mAP'] if has_paper else [])]
    header += [
        f'{split}: {name}' for split in splits for name in ('rank-1', *(f'mAP {feature}' for feature in FEATURES))
    ]
    rows = [header]
    for label, cell, published in TABLES[table]:
        own = [line for line in lines if line['cell'] == cell]
        seeds = sorted({line['seed'] for line in own})
        row = [label, ' '.join(seeds), spread([100 * float(line['train_accuracy']) for line in first_of_seed(own)])]
        row += [f'{published[0]}, {published[1]}' if published else ''] if has_paper else []
        for split in splits:
            for feature, metric in (('after BN', 'rank1'), *((feature, 'mAP') for feature in FEATURES)):
                row.append(
                    spread(
                        [float(line[metric]) for line in own if (line['split'], line['feature']) == (split, feature)]
                    )
                )
        rows.append(row)
    title = (
        f'### {table}: {dataset}, {protocol}\n\n{BUDGETS[budget]["title"]}. In per cent, mean ± deviation over seeds.'
    )
    tests = [test for pair in CLAIMS[table] for test in paired(pair, splits, lines, budget, protocol, args)]
    heading = ['is better than', 'people', 'seeds', 'ahead in', 'difference in mAP', '95 %', 'p']
    return '\n\n'.join([title, markdown(rows), *([markdown([heading, *tests])] if tests else [])])


def first_of_seed(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """One line of each seed."""
    return list({line['seed']: line for line in lines}.values())


def spread(values: list[float]) -> str:
    """Mean and, of several values, standard deviation."""
    if not values:
        return ''
    return f'{statistics.mean(values):.1f}' + (f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else '')


def paired(
    pair: tuple[str, str],
    splits: list[str],
    lines: list[dict[str, str]],
    budget: str,
    protocol: str,
    args: argparse.Namespace,
) -> Iterator[list[str]]:
    """Compare two cells person by person, each averaged over their common seeds, with features after BN.

    Queries of one person are not independent of each other, so the people are resampled, not the queries. That covers
    other people, not other seeds: 'ahead in' shows those.
    """
    better, worse = ({line['seed'] for line in lines if line['cell'] == cell} for cell in pair)
    seeds = sorted(better & worse)
    for split in splits if seeds else []:
        differences = []
        for seed in seeds:
            aps = []
            for cell in pair:
                namespace = argparse.Namespace(**{**vars(args), 'budget': budget})
                path = folder_of(cell, int(seed), namespace) / f'{split}, after BN.json'
                if not path.is_file():
                    return
                result = vireid_timm.Report.load(path)[protocol]
                identities, ap = np.asarray(result.queries['identity']), query_values(result)[1]
                aps.append([np.nanmean(ap[identities == name]) for name in sorted(set(identities.tolist()))])
            differences.append(np.subtract(*aps))
        mean = np.mean(differences, axis=0)
        ahead = sum(float(difference.mean()) > 0 for difference in differences)
        ((low, high),) = bootstrap_intervals(mean[None])
        numbers = [f'{100 * mean.mean():+.1f}', f'{100 * low:+.1f} to {100 * high:+.1f}']
        p = paired_test(np.zeros_like(mean), mean)
        yield [f'{pair[0]} > {pair[1]}', split, str(len(seeds)), f'{ahead} of {len(seeds)}', *numbers, f'{p:.4f}']


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown."""
    head, *body = (f'| {" | ".join(row)} |' for row in rows)
    return '\n'.join([head, '|' + '---|' * len(rows[0]), *body])


def main() -> None:
    """Train what was asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='+', choices=(*TABLES, 'report', 'cell'))
    parser.add_argument('--budget', choices=BUDGETS, default='cpu', help='how much is trained (default: cpu)')
    parser.add_argument('--dataset', default='synthetic', help='synthetic is SynthVI v1 (default: synthetic)')
    parser.add_argument('--data-dir', default='')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--jobs', type=int, default=1, help='trainings side by side (default: 1)')
    parser.add_argument('--minutes', type=float, help='stop after this time; the same command resumes')
    parser.add_argument('--output', type=Path, default=Path('output/paper'))
    parser.add_argument('--cell', choices=CELLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s', stream=sys.stderr)
    if args.cell:
        try:
            for seed in args.seeds:
                run_cell(args.cell, seed, args)
        except Stopped as stopped:  # it has saved a checkpoint
            sys.exit(stopped.status)
        return
    complete = args.what == ['report'] or train_all(args)
    print(report(args))
    print(json.dumps({'complete': complete, 'results': str(args.output / 'results.csv')}))
    if not complete:
        sys.exit(1)


if __name__ == '__main__':
    main()
