"""The tables of `paper.py` as Markdown, made from the lines of its results and from the reports of its runs."""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from paper_tables import BUDGETS, CLAIMS, PUBLISHED, TABLES

import vireid_timm
from vireid_timm.evaluation.confidence import bootstrap_intervals, paired_test
from vireid_timm.evaluation.report import ProtocolResult, query_values

# The last four are made from features after BN: two are parts of them, one averages over mirror images, one has each
# modality's mean subtracted.
FEATURES = ('after BN', 'before BN', 'global', 'fusion', 'flip test', 'centred')
MAIN_PROTOCOL = {
    'sysu_mm01': 'all-single',
    'regdb': 'visible-to-infrared',
    'llcm': 'visible-to-infrared',
}  # others: infrared-to-visible
COMPARED = {'rank1': 'rank-1', 'rank10': 'rank-10', 'rank20': 'rank-20', 'mAP': 'mAP', 'mINP': 'mINP'}

Lines = list[dict[str, str]]


def folder_of(cell: str, seed: int, args: argparse.Namespace) -> Path:
    """Where a run lies."""
    return args.output / f'{args.dataset}-{args.budget}-{cell.replace(" ", "-")}-seed{seed}'


def report(lines: Lines, args: argparse.Namespace) -> str:
    """The tables of everything that is measured, or of what was asked for."""
    text = []
    for dataset, budget in dict.fromkeys((line['dataset'], line['budget']) for line in lines):
        group = [line for line in lines if (line['dataset'], line['budget']) == (dataset, budget)]
        cells = {line['cell'] for line in group}
        own = {'dataset': 'synthetic' if dataset == 'SynthVI v1' else dataset, 'budget': budget}
        for table, rows in TABLES.items():
            # Tables 5 and 6 differ in their published rows only.
            is_copy = table in PUBLISHED and table != ('table5' if dataset == 'regdb' else 'table6')
            is_wanted = table in args.what or (args.what == ['report'] and not is_copy)
            if is_wanted and sum(cell in cells for _, cell, _ in rows) > 1:
                kind = comparison if table in PUBLISHED else ablation
                text += [kind(table, group, argparse.Namespace(**{**vars(args), **own})), '']
    return '\n'.join(text)


def ablation(table: str, lines: Lines, args: argparse.Namespace) -> str:
    """One of tables 1 to 4, figure 4 or our own tables, under the dataset's main protocol, with its paired tests.

    Args:
        table: A key of `TABLES`.
        lines: Of one dataset and budget.
        args: With this dataset and budget.
    """
    dataset = lines[0]['dataset']
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
        row = [label, seeds_of(own), spread([100 * float(line['train_accuracy']) for line in first_of_seed(own)])]
        row += [f'{published[0]}, {published[1]}' if published else ''] if has_paper else []
        for split in splits:
            for feature, metric in (('after BN', 'rank1'), *((feature, 'mAP') for feature in FEATURES)):
                row.append(
                    spread(
                        [float(line[metric]) for line in own if (line['split'], line['feature']) == (split, feature)]
                    )
                )
        rows.append(row)
    head = f'### {table}: {dataset}, {protocol}'
    title = f'{BUDGETS[args.budget]["title"]}. In per cent, mean ± deviation over seeds.'
    return '\n\n'.join([head, title, markdown(rows), *paired_tests(table, splits, (protocol,), lines, args)])


def comparison(table: str, lines: Lines, args: argparse.Namespace) -> str:
    """Table 5 or 6, in both directions or searches of the dataset: what is published of it, and what is measured.

    Args:
        table: A key of `PUBLISHED`.
        lines: As for `ablation`.
        args: As for `ablation`.
    """
    dataset = lines[0]['dataset']
    protocols = ('visible-to-infrared', 'infrared-to-visible')
    if dataset == 'sysu_mm01':
        protocols = ('all-single', 'indoor-single')
    lines = [line for line in lines if line['split'].startswith('test') and line['feature'] == 'after BN']
    splits = list(dict.fromkeys(line['split'] for line in lines))
    home, published = PUBLISHED[table]
    rows = [['', 'from', *(f'{protocol}: {name}' for protocol in protocols for name in COMPARED.values())]]
    if dataset == home:
        rows += [[name, venue, *first.split(), *second.split()] for name, venue, first, second in published]
    for label, cell, _ in TABLES[table]:
        for split in splits:
            own = [line for line in lines if (line['cell'], line['split']) == (cell, split)]
            by_protocol = [[line for line in own if line['protocol'] == protocol] for protocol in protocols]
            scores = [spread([float(line[metric]) for line in part]) for part in by_protocol for metric in COMPARED]
            if own:
                rows.append([f'{label}, measured', f'{split}, seeds {seeds_of(own)}', *scores])
    title = f'{BUDGETS[args.budget]["title"]}. In per cent, with features after BN, mean ± deviation over seeds.'
    if dataset == home:
        title += ' Published rows are as the paper prints them; it mentions no re-ranking.'
    return '\n\n'.join(
        [f'### {table}: {dataset}', title, markdown(rows), *paired_tests(table, splits, protocols, lines, args)]
    )


def seeds_of(lines: Lines) -> str:
    """The seeds of some lines."""
    return ' '.join(sorted({line['seed'] for line in lines}, key=int))


def first_of_seed(lines: Lines) -> Lines:
    """One line of each seed."""
    return list({line['seed']: line for line in lines}.values())


def spread(values: list[float]) -> str:
    """Mean and, of several values, standard deviation."""
    if not values:
        return ''
    return f'{statistics.mean(values):.1f}' + (f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else '')


def paired_tests(
    table: str,
    splits: list[str],
    protocols: tuple[str, ...],
    lines: Lines,
    args: argparse.Namespace,
) -> list[str]:
    """The tests of what a table claims as a table of their own, or nothing."""
    tests = [
        test for pair in CLAIMS[table] for protocol in protocols for test in paired(pair, splits, lines, protocol, args)
    ]
    heading = ['is better than', 'people', 'protocol', 'seeds', 'ahead in', 'difference in mAP', '95 %', 'p']
    return [markdown([heading, *tests])] if tests else []


def paired(
    pair: tuple[str, str],
    splits: list[str],
    lines: Lines,
    protocol: str,
    args: argparse.Namespace,
) -> Iterator[list[str]]:
    """Compare two cells person by person, each averaged over their common seeds.

    Features are those after BN, unless a cell's name is followed by a comma and others.

    Queries of one person are not independent of each other, so the people are resampled, not the queries. That covers
    other people, not other seeds: 'ahead in' shows those. On RegDB a person is averaged over the seeds, that is the
    trials, that test on him or her.
    """
    sides = [(cell, feature or 'after BN') for cell, _, feature in (name.partition(', ') for name in pair)]
    better, worse = ({line['seed'] for line in lines if line['cell'] == cell} for cell, _ in sides)
    seeds = sorted(better & worse)
    for split in splits if seeds else []:
        differences: dict[str, list[float]] = {}
        ahead = 0
        for seed in seeds:
            aps = []
            for cell, feature in sides:
                path = folder_of(cell, int(seed), args) / f'{split}, {feature}.json'
                if not path.is_file():
                    return
                aps.append(aps_of_people(vireid_timm.Report.load(path)[protocol]))
            own = {name: ap - aps[1][name] for name, ap in aps[0].items()}
            ahead += sum(own.values()) > 0
            for name, difference in own.items():
                differences.setdefault(name, []).append(difference)
        mean = np.asarray([np.mean(values) for values in differences.values()])
        ((low, high),) = bootstrap_intervals(mean[None])
        numbers = [f'{100 * mean.mean():+.1f}', f'{100 * low:+.1f} to {100 * high:+.1f}']
        p = paired_test(np.zeros_like(mean), mean)
        counts = [str(len(seeds)), f'{ahead} of {len(seeds)}']
        yield [f'{pair[0]} > {pair[1]}', split, protocol, *counts, *numbers, f'{p:.4f}']


def aps_of_people(result: ProtocolResult) -> dict[str, float]:
    """Mean average precision of each person's queries, without people who have no valid one."""
    identities, ap = np.asarray(result.queries['identity']), query_values(result)[1]
    valid = ~np.isnan(ap)
    return {name: float(ap[valid & (identities == name)].mean()) for name in sorted(set(identities[valid].tolist()))}


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown."""
    head, *body = (f'| {" | ".join(row)} |' for row in rows)
    return '\n'.join([head, '|' + '---|' * len(rows[0]), *body])
