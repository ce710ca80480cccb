"""The paper's tables and figures as commands: each row is a recipe, trained and evaluated here.

    python benchmarks/paper.py table1 --budget smoke                  a minute: does it run?
    python benchmarks/paper.py table1 table4 --seeds 0 1 2            SynthVI v1 from scratch, 10 to 20 minutes a run
    python benchmarks/paper.py table1 table6 --budget full --dataset sysu_mm01 --data-dir SYSU-MM01
    python benchmarks/paper.py table5 --budget full --dataset regdb --data-dir RegDB --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/paper.py fig5 fig6                              attentive maps and rank lists
    python benchmarks/paper.py report                                 the tables of all results so far

Finished runs are not repeated, interrupted ones are resumed, and rows that several tables share are trained once.
`--minutes` sets a time limit, and `--jobs` trains several networks side by side, spread over the GPUs. Every run
appends its lines to `results.csv` in --output: one for each set of people, protocol and feature.

Tables 5 and 6 compare with published results on RegDB and on SYSU-MM01. On other data they show only what is measured.
A published result on RegDB is the mean over its ten trials. So seed 0 trains and tests on trial 1, seed 1 on trial 2,
and so on; seed 10 is on trial 1 again.

Figures 5 and 6 are drawn from the first seed, on test people, as `fig5.png` and `fig6.png` in --output. Figure 5 needs
the extras `explain` and `plots`.
"""

import argparse
import csv
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import synthvi_v1
import torch
import torch.nn.functional as F
from measuring import commit
from paper_figures import attentive_maps, rank_lists, require_extras
from paper_report import MAIN_PROTOCOL, Lines, folder_of, report
from paper_tables import BUDGETS, CELLS, FIGURES, TABLES

import vireid_timm
from vireid_timm.data.readers import REGDB_TRIALS
from vireid_timm.device import resolve_device
from vireid_timm.evaluation.evaluate import evaluate_features
from vireid_timm.evaluation.features import centred
from vireid_timm.evaluation.report import METRICS
from vireid_timm.files import save_json, whole_file
from vireid_timm.run_folder import SUMMARY, has_checkpoint
from vireid_timm.training.interrupt import Stopped

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
    settings['model_kwargs'] = {**budget.get('model_kwargs', {}), **changes.get('model_kwargs', {})}
    if cell == 'agw' and 'r50' in settings['model']:
        settings['model_kwargs']['non_local_blocks'] = (0, 2, 3, 0)
    return {
        **with_weights(settings, args),
        **data_of(seed, args),
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


def data_of(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the data that a run with this seed trains on."""
    if args.dataset == 'synthetic':
        small = dict(identities=8, test_identities=0, images_per_modality=2)
        return {'dataset': 'synthetic', 'dataset_kwargs': small if args.budget == 'smoke' else synthvi_v1.TRAINING}
    trial = {'trial': REGDB_TRIALS[seed % len(REGDB_TRIALS)]} if args.dataset == 'regdb' else {}
    return {'dataset': args.dataset, 'data_dir': args.data_dir, 'dataset_kwargs': trial}


def test_sets(seed: int, args: argparse.Namespace) -> dict[str, vireid_timm.Dataset]:
    """The sets of people that a run with this seed is evaluated on, by name."""
    if args.dataset != 'synthetic':
        return {
            'test': vireid_timm.create_dataset(args.dataset, args.data_dir, **data_of(seed, args)['dataset_kwargs'])
        }
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
        # Side by side the rate is that of the others, too.
        'train_images_per_second': None if args.jobs > 1 else round(float(last['train_images_per_second']), 1),
        'parameters': sum(value.numel() for value in model.parameters()),
        'features': model.head_hidden_size,
        'commit': commit(),
        'hardware': hardware(),
        'torch': torch.__version__,
        'finished': datetime.now(timezone.utc).isoformat(timespec='seconds'),
    }
    lines = []
    for split, dataset in test_sets(settings['seed'], args).items():
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
    after = vireid_timm.embed(model, dataset.test, cache='auto', features='after-bn')[0]
    yield 'after BN', after
    yield 'before BN', vireid_timm.embed(model, dataset.test, cache='auto', features='before-bn')[0]
    if model.fusion is not None:
        width = model.global_head.num_features
        yield 'global', F.normalize(after[:, :width])
        yield 'fusion', F.normalize(after[:, width:])
    yield 'flip test', vireid_timm.embed(model, dataset.test, cache='auto', features='after-bn', flip_test=True)[0]
    yield 'centred', centred(after, dataset.test.modality)


def hardware() -> str:
    """The device in words."""
    device = resolve_device()
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{platform.machine()}, {torch.get_num_threads()} threads'


def collect(args: argparse.Namespace) -> Lines:
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
    """Train all cells of the tables and figures; return whether all of them are done."""
    runs = {}
    for seed in args.seeds:
        for cell in cells_of(args):
            command = [sys.executable, __file__, 'cell', '--cell', cell, '--seeds', str(seed), *shared_options(args)]
            runs[f'{cell}, seed {seed}'] = (folder_of(cell, seed, args) / 'lines.json', command)
    return run_all(runs, args, lambda: collect(args))


def cells_of(args: argparse.Namespace) -> list[str]:
    """The cells of what was asked for, each once; AGW's blocks need a ResNet."""
    cells = [cell for name in args.what for cell in FIGURES.get(name, [row[1] for row in TABLES.get(name, [])])]
    is_resnet = 'backbone' not in BUDGETS[args.budget].get('model_kwargs', {})
    return [cell for cell in dict.fromkeys(cells) if cell != 'agw' or is_resnet]


def shared_options(args: argparse.Namespace) -> list[str]:
    """Flags that a process for one run has from this one."""
    data = ['--dataset', args.dataset, *(['--data-dir', args.data_dir] if args.data_dir else [])]
    return ['--output', str(args.output), '--budget', args.budget, '--jobs', str(args.jobs), *data]


def run_all(runs: dict[str, tuple[Path, list[str]]], args: argparse.Namespace, collect: Callable[[], Any]) -> bool:
    """Run commands, some side by side and within the time limit; return whether all of them are done.

    Each has a process of its own, so that nothing of a run can fail another one, and memory is given back. Each of
    several GPUs gets its share of the processes.

    Args:
        runs: Name -> a file that is there when it is done, and the command.
        args: With `jobs` and `minutes`.
        collect: Called after each run, never twice at once.
    """
    end = time.monotonic() + 60 * args.minutes if args.minutes else float('inf')
    collecting = Lock()
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for gpu in gpus_of_jobs(args.jobs, torch.cuda.device_count(), os.environ.get('CUDA_VISIBLE_DEVICES')):
        free.put(gpu)

    def work(name: str) -> bool:
        finished, command = runs[name]
        left = end - time.monotonic()
        if finished.is_file():
            return True
        if left <= 0:
            return False
        _logger.info(name)
        gpu = free.get()
        process = subprocess.Popen(command, env={**os.environ, **gpu})
        try:
            status = process.wait(None if left == float('inf') else left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves a checkpoint
            status = process.wait()
        free.put(gpu)
        if status not in (0, 143, -signal.SIGTERM):  # the last one: stopped while it was evaluated
            _logger.error('%s ended with status %d', name, status)
        with collecting:
            collect()
        return status == 0

    with ThreadPoolExecutor(args.jobs) as pool:
        return all(list(pool.map(work, runs)))


def gpus_of_jobs(jobs: int, count: int, visible: str | None) -> list[dict[str, str]]:
    """What to add to the environment of each job, so that they take turns on the GPUs.

    Args:
        jobs: Processes side by side.
        count: GPUs that CUDA sees.
        visible: CUDA_VISIBLE_DEVICES, which names them; None if it is not set.
    """
    names = visible.split(',') if visible else [str(gpu) for gpu in range(count)]
    return [{'CUDA_VISIBLE_DEVICES': names[job % count]} if count > 1 else {} for job in range(jobs)]


def draw(figure: str, args: argparse.Namespace) -> str:
    """Draw a figure of the networks that the first seed gave, on test people; return what it shows in words."""
    seed, path = args.seeds[0], args.output / f'{figure}.png'
    dataset = test_sets(seed, args)['test']
    models = {
        cell: vireid_timm.load_model(folder_of(cell, seed, args)).to(resolve_device()) for cell in FIGURES[figure]
    }
    if figure == 'fig5':
        text = attentive_maps(models['full'], dataset, path)
    else:
        text = rank_lists(models, dataset, MAIN_PROTOCOL.get(args.dataset, 'infrared-to-visible'), path)
    return f'### {figure}: {path}\n\n{BUDGETS[args.budget]["title"]}, seed {seed}. {text}\n'


def main() -> None:
    """Train what was asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='+', choices=(*TABLES, *FIGURES, 'report', 'cell'))
    parser.add_argument('--budget', choices=BUDGETS, default='cpu', help='how much is trained (default: cpu)')
    parser.add_argument('--dataset', default='synthetic', help='synthetic is SynthVI v1 (default: synthetic)')
    parser.add_argument('--data-dir', default='')
    text = 'one training each; on regdb they choose the trial, 0 to 9 are all ten (default: 0)'
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help=text)
    parser.add_argument('--jobs', type=int, default=1, help='trainings side by side, spread over the GPUs (default: 1)')
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
    try:
        require_extras(args.what)
        if args.what != ['report']:
            test_sets(args.seeds[0], args)  # data that are missing end this here, not in every run
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
    complete = args.what == ['report'] or train_all(args)
    print(report(collect(args), args))
    for figure in FIGURES:
        if complete and figure in args.what:
            print(draw(figure, args))
    print(json.dumps({'complete': complete, 'results': str(args.output / 'results.csv')}))
    if not complete:
        sys.exit(1)


if __name__ == '__main__':
    main()
