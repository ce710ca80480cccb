"""`vireid calibrate`."""

import argparse
from typing import TYPE_CHECKING, Any

from ..constants import DRAWS
from ..files import expanded_path
from .parser import (
    Parser,
    add_batch_size_flag,
    add_data_flags,
    add_dataset_flag,
    add_decoding_flags,
    add_device_flag,
    add_feature_flags,
    check_input_size,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.records import Dataset
    from ..evaluation.calibration import Calibration


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s MODEL --data-dir PATH [flags]'
    parser.description = (
        'Learn what similarities mean as probabilities, from the test images of people whom the model has not seen, '
        'and keep it with the model. With several GPUs: torchrun --nproc-per-node N -m vireid_timm calibrate ...'
    )
    parser.add_argument(
        'model',
        type=expanded_path,
        metavar='MODEL',
        help='run, Hub-ready folder, or with --output the name of any model',
    )
    text = 'write a Hub-ready folder there instead of changing that of the model (default: none)'
    parser.add_argument('--output', type=expanded_path, metavar='DIR', help=text)
    _add_data(parser.add_argument_group('data'))
    group = parser.add_argument_group('features')
    add_feature_flags(group)
    add_batch_size_flag(group)
    add_device_flag(group)
    parser.set_defaults(run=run)


def _add_data(group: Any) -> None:
    add_dataset_flag(group)
    add_data_flags(group)
    text = 'protocols across the modalities whose pairs are used (default: the first of each direction)'
    group.add_argument('--protocol', nargs='+', metavar='NAME', help=text)
    group.add_argument('--draw', choices=DRAWS, default='seeded', help='how galleries are sampled (default: seeded)')
    text = 'of the sample that is taken of very many pairs (default: 0)'
    group.add_argument('--seed', type=int, default=0, metavar='N', help=text)
    add_decoding_flags(group)


def run(args: argparse.Namespace) -> None:
    """Fit a calibration and keep it with the model."""
    from ..distributed import is_rank_zero, process_group
    from ..hub.folder import calibration_target, save_calibration

    check_input_size(args.input_size)
    if is_rank_zero():
        calibration_target(args.model, args.output)
    with process_group(args.device) as device:
        calibration = _fit(args, device)
    if is_rank_zero():
        folder = save_calibration(calibration, args.model, args.output)
        _show(calibration)
        print(f'Model: {folder}')


def _fit(args: argparse.Namespace, device: 'torch.device') -> 'Calibration':
    from ..distributed import all_ranks
    from ..evaluation.evaluate import calibrate

    dataset, model = all_ranks(lambda: _load(args))
    names = ('features', 'flip_test', 'crops', 'centre', 'batch_size', 'cache', 'skip_broken', 'workers')
    options = {'size': args.input_size, 'progress': True, **{name: getattr(args, name) for name in names}}
    return calibrate(model.to(device), dataset, args.protocol, draw=args.draw, seed=args.seed, **options)


def _load(args: argparse.Namespace) -> tuple['Dataset', 'nn.Module']:
    from ..data.readers import create_dataset
    from ..hub.folder import load_model, split_problem

    dataset = create_dataset(args.dataset, args.data_dir or None, **args.dataset_kwargs)
    model = load_model(args.model)
    learned, problem = split_problem(args.model, dataset)
    if learned:
        raise ValueError(f'no probability follows from people whom the model knows: {problem}')
    return dataset, model


def _show(calibration: 'Calibration') -> None:
    """Print what was fitted, and the similarities at which it says certain probabilities."""
    fitted = calibration.fitted_on
    print(
        f'Fitted on {fitted["identities"]} people of {fitted["dataset"]}, {fitted["pairs"]:,} pairs '
        f'({100 * calibration.prior:.2g} % of the same person), galleries of {calibration.gallery_size:.0f} images'
    )
    for fpir, threshold in calibration.thresholds.items():
        print(f'Similarity that {100 * float(fpir):g} % of the searches for somebody not there exceed: {threshold:.3f}')
