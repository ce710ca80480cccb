"""`vireid plot`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..constants import FEATURES
from ..files import expanded_path
from ..training.config import MODEL_HELP
from .parser import Parser, add_batch_size_flag, add_data_flags, add_dataset_flag, add_decoding_flags, add_device_flag

if TYPE_CHECKING:
    import torch

    from ..data.records import Records


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s [RUN ...] [REPORT.json ...] [--model NAME --data-dir PATH] [flags]'
    parser.description = (
        'Draw charts: the curves of training runs (curves.png), the CMC of evaluation reports (cmc.png), and with a '
        'model and data how similar pairs of test images are (similarities.png) and where their features lie '
        '(features.png).'
    )
    text = 'folders of training runs and reports of vireid eval'
    parser.add_argument('sources', type=expanded_path, nargs='*', metavar='RUN|REPORT.json', help=text)
    text = 'folder for the charts (default: output/plots)'
    parser.add_argument('--output', type=expanded_path, default='output/plots', metavar='DIR', help=text)
    group = parser.add_argument_group('features')
    text = f'{MODEL_HELP} (default: none)'
    group.add_argument('--model', '--checkpoint', type=expanded_path, metavar='NAME', help=text)
    add_dataset_flag(group)
    add_data_flags(group)
    text = 'features after or before the BN-neck (default: as the model returns them)'
    group.add_argument('--features', choices=FEATURES, default='auto', help=text)
    add_decoding_flags(group)
    add_batch_size_flag(group)
    add_device_flag(group)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw the charts that the arguments have data for."""
    from ..evaluation.report import Report
    from ..figures.charts import require_matplotlib
    from ..figures.cmc import save_cmc
    from ..figures.curves import read_summary, save_curves
    from ..figures.features import save_map, save_similarities
    from ..files import check_writable

    require_matplotlib()
    reports = [path for path in args.sources if path.endswith('.json')]
    runs = [path for path in args.sources if path not in reports]
    if not args.sources and args.model is None:
        raise ValueError('nothing to draw: give folders of runs, reports, or --model and --data-dir')
    if args.data_dir and args.model is None:
        raise ValueError(f'--data-dir {args.data_dir} needs --model, whose features of these images are drawn')
    output = Path(args.output)
    check_writable(output / 'curves.png')
    # Everything is read before anything is drawn.
    summaries = {name: read_summary(path) for name, path in _named(runs).items()}
    loaded = {name: Report.load(path) for name, path in _named(reports).items()}
    features = None if args.model is None else _features(args)
    charts = {}
    if summaries:
        charts['curves.png'] = lambda path: save_curves(summaries, path)
    if loaded:
        charts['cmc.png'] = lambda path: save_cmc(loaded, path)
    if features is not None:
        charts['similarities.png'] = lambda path: save_similarities(*features, path)
        charts['features.png'] = lambda path: save_map(*features, path)
    for name, save in charts.items():
        save(output / name)
        print(f'Chart: {output / name}')


def _named(paths: list[str]) -> dict[str, str]:
    """Return the path of each source by its name in a legend: the last part, or the whole path where two share it."""
    paths = list(dict.fromkeys(paths))
    names = [Path(path).absolute().name.removesuffix('.json') for path in paths]
    return {name if names.count(name) == 1 else path: path for name, path in zip(names, paths, strict=True)}


def _features(args: argparse.Namespace) -> tuple['torch.Tensor', 'Records']:
    """Return the features of the test images, or of a sample, and their records."""
    import numpy as np

    from ..data.readers import create_dataset
    from ..device import resolve_device
    from ..evaluation.features import embed
    from ..figures.features import sample
    from ..hub.folder import load_model

    dataset = create_dataset(args.dataset, args.data_dir or None, **args.dataset_kwargs)
    if len(dataset.test) < 3:
        raise ValueError(f'charts of features need at least 3 test images, and {dataset.name} has {len(dataset.test)}')
    records = dataset.test[sample(dataset.test)]
    model = load_model(args.model).to(resolve_device(args.device))
    features, paths = embed(
        model,
        records,
        features=args.features,
        batch_size=args.batch_size,
        cache=args.cache,
        skip_broken=args.skip_broken,
        workers=args.workers,
        progress=True,
    )
    return features, records[np.isin(records.path, paths)]
