"""`vireid data`."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from ..constants import DATASETS
from ..files import expanded_path
from .parser import KeyValues, Parser


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s DIR [flags]'
    parser.description = (
        'Check images before you use them: read every one, count people and images, and list all that is odd. '
        'The exit status is 1 if something makes results meaningless.'
    )
    parser.add_argument('directory', metavar='DIR', type=expanded_path, help='root folder; the file itself for csv')
    names = ', '.join(name for name in DATASETS if name != 'synthetic')
    text = f'reader: {names} (default: folder, or csv for a file)'
    parser.add_argument('--dataset', metavar='NAME', help=text)
    text = "reader's options, e.g. trial=3 for regdb (default: none)"
    parser.add_argument('--dataset-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help=text)
    parser.add_argument('--json', action='store_true', help='print JSON (default: off)')
    text = 'images decoded at once (default: one per core, at most 8)'
    parser.add_argument('--workers', type=int, metavar='N', help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check a dataset."""
    from ..data.check import check_dataset
    from ..data.readers import create_dataset

    name = args.dataset or ('csv' if Path(args.directory).is_file() else 'folder')
    with _findings_only_after_an_error():
        dataset = create_dataset(name, args.directory, **args.dataset_kwargs)
        summary = check_dataset(dataset, workers=args.workers)
    print(summary.to_json() if args.json else summary)
    serious = [finding.kind for finding in summary.findings if finding.is_serious]
    if serious:
        raise ValueError(f'results on this data would be meaningless: {", ".join(serious)}')


@contextmanager
def _findings_only_after_an_error() -> Iterator[None]:
    """Hold back the warnings about findings, which the printed summary lists; after an error, show them first."""
    logger = logging.getLogger('vireid_timm.data.findings')
    held = MemoryHandler(1_000_000, flushLevel=logging.CRITICAL)
    logger.addHandler(held)
    logger.propagate = False
    try:
        yield
    except Exception:
        held.setTarget(logger.parent)
        raise
    finally:
        logger.removeHandler(held)
        logger.propagate = True
        held.close()
