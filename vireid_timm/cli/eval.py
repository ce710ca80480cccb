"""`vireid eval`."""

import argparse
import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

from ..constants import DRAWS, GROUPINGS, RERANKINGS
from ..files import expanded_path
from ..training.config import MODEL_HELP
from .parser import (
    Parser,
    add_batch_size_flag,
    add_data_flags,
    add_dataset_flag,
    add_decoding_flags,
    add_device_flag,
    add_feature_flags,
    add_switch,
    check_input_size,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.records import Dataset
    from ..evaluation.report import Report

EXAMPLES = 5  # queries of each kind in a rank list


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s --model NAME --data-dir PATH [flags]'
    parser.description = (
        'Evaluate a model: extract features once, then run every protocol of the dataset with all its trials. '
        'Or compare two reports. With several GPUs: torchrun --nproc-per-node N -m vireid_timm eval ...'
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--model', '--checkpoint', type=expanded_path, metavar='NAME', help=MODEL_HELP)
    text = 'compare two reports instead'
    which.add_argument('--compare', nargs=2, type=expanded_path, metavar='FILE.json', help=text)
    add_switch(parser, '--pretrained', 'load the weights (default: on)', default=True)
    _add_data(parser.add_argument_group('data'))
    _add_features(parser.add_argument_group('features'))
    _add_output(parser.add_argument_group('output'))
    parser.set_defaults(run=run)


def _add_data(group: Any) -> None:
    add_dataset_flag(group)
    add_data_flags(group)
    text = "protocols to run (default: all of the dataset's)"
    group.add_argument('--protocol', nargs='+', metavar='NAME', help=text)
    text = "how gallery images are sampled: seeded (AGW's code) or official (the owners' file) (default: seeded)"
    group.add_argument('--draw', choices=DRAWS, default='seeded', help=text)
    add_decoding_flags(group)


def _add_features(group: Any) -> None:
    add_feature_flags(group)
    group.add_argument('--reranking', choices=RERANKINGS, default='none', help='re-rank the results (default: none)')
    add_batch_size_flag(group)
    add_device_flag(group)
    add_switch(group, '--amp', 'mixed precision (default: off)', default=False)
    text = 'type of mixed precision (default: bfloat16)'
    group.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), default='bfloat16', help=text)


def _add_output(group: Any) -> None:
    text = 'also print results by camera, identity or modality (default: none)'
    group.add_argument('--breakdown', nargs='+', choices=GROUPINGS, default=(), help=text)
    text = 'list the N worst queries of each protocol (default: 0)'
    group.add_argument('--failures', type=int, default=0, metavar='N', help=text)
    text = 'draw the best, worst and random queries of each protocol with what they found (default: none)'
    group.add_argument('--rank-list', type=expanded_path, metavar='DIR', help=text)
    text = 'save the report (default: only print it)'
    group.add_argument('--report', type=expanded_path, metavar='FILE.json', help=text)
    text = 'append one row per protocol to this table (default: none)'
    group.add_argument('--results-file', type=expanded_path, metavar='FILE.csv', help=text)


def run(args: argparse.Namespace) -> None:
    """Evaluate a model, or compare two reports."""
    from ..distributed import is_rank_zero, process_group
    from ..evaluation.compare import compare
    from ..evaluation.report import Report, read_results
    from ..files import check_writable

    if args.compare:
        print(compare(*map(Report.load, args.compare)))
        return
    check_input_size(args.input_size)
    if is_rank_zero():
        for path in (args.report, args.results_file):
            if path is not None:
                check_writable(path)
        if args.rank_list is not None:
            check_writable(os.path.join(args.rank_list, 'rank-list'))
        if args.results_file is not None:
            read_results(args.results_file)
    with process_group(args.device) as device:
        report, root = _evaluate(args, device)
    if is_rank_zero():
        _show(report, root, args)


def _evaluate(args: argparse.Namespace, device: 'torch.device') -> tuple['Report', str]:
    """Return the report and the root of the dataset."""
    from ..device import autocast_dtype
    from ..distributed import all_ranks
    from ..evaluation.evaluate import evaluate
    from ..hub.folder import model_calibration

    dataset, model, learned = all_ranks(lambda: _load(args))
    report = evaluate(
        model.to(device),
        dataset,
        args.protocol,
        draw=args.draw,
        reranking=args.reranking,
        failures=args.failures,
        examples=0 if args.rank_list is None else EXAMPLES,
        calibration=model_calibration(args.model) if args.pretrained else None,
        features=args.features,
        flip_test=args.flip_test,
        crops=args.crops,
        centre=args.centre,
        size=args.input_size,
        batch_size=args.batch_size,
        amp_dtype=autocast_dtype(device, args.amp, args.amp_dtype),
        cache=args.cache,
        skip_broken=args.skip_broken,
        workers=args.workers,
        progress=True,
    )
    return dataclasses.replace(report, learned_identities=learned), dataset.root


def _load(args: argparse.Namespace) -> tuple['Dataset', 'nn.Module', int]:
    """Return the dataset, the model, and how many test identities it was trained on."""
    from ..data.readers import create_dataset
    from ..hub.folder import load_model, split_problem

    dataset = create_dataset(args.dataset, args.data_dir or None, **args.dataset_kwargs)
    model = load_model(args.model, pretrained=args.pretrained)
    learned, problem = split_problem(args.model, dataset) if args.pretrained else (0, '')
    if problem:
        logging.getLogger(__name__).warning(problem)
    return dataset, model, learned


def _show(report: 'Report', root: str, args: argparse.Namespace) -> None:
    from ..evaluation.breakdown import breakdown_table, failures_table
    from ..figures.examples import save_rank_lists

    print(report)
    for name, result in report.protocols.items():
        for by in args.breakdown:
            print(f'\n{name} by {by}\n{breakdown_table(result, by)}')
        if args.failures:
            print(f'\n{name}, the worst queries\n{failures_table(result)}')
    if args.report is not None:
        report.save(args.report)
    if args.results_file is not None:
        report.save_csv(args.results_file)
    if args.rank_list is not None:
        save_rank_lists(report, root, args.rank_list)
        print(f'\nRank lists: {args.rank_list}')
