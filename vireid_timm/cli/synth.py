"""`vireid synth`."""

import argparse

from ..constants import FULL_SIZES, LAYOUT_NAMES, SPECTRA
from ..files import expanded_path
from .parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s DIR [flags]'
    parser.description = 'Render SynthVI images in the layout of a real dataset or of your own folders.'
    parser.add_argument('directory', metavar='DIR', type=expanded_path, help='folder to create')
    parser.add_argument('--layout', choices=LAYOUT_NAMES, default='folder', help='layout to write (default: folder)')
    text = 'training identities (default: 100)'
    parser.add_argument('--identities', type=int, metavar='N', help=text)
    text = 'test identities (default: a fifth of --identities, at least 8; as many as --identities for regdb)'
    parser.add_argument('--test-identities', type=int, metavar='N', help=text)
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='seed of people and cameras (default: 0)')
    text = 'infrared spectrum (default: thermal for regdb, else near-infrared)'
    parser.add_argument('--spectrum', choices=SPECTRA, help=text)
    text = 'height and width of the images (default: 128 64)'
    parser.add_argument('--size', nargs=2, type=int, default=(128, 64), metavar=('H', 'W'), help=text)
    text = f"use the real dataset's identity and image counts, of {', '.join(FULL_SIZES)} (default: off)"
    parser.add_argument('--full-size', action='store_true', help=text)
    text = 'processes that render (default: one per core, at most 8)'
    parser.add_argument('--workers', type=int, metavar='N', help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Render the images."""
    from ..data.layouts import write_layout

    write_layout(
        args.directory,
        args.layout,
        identities=100 if args.identities is None and not args.full_size else args.identities,
        test_identities=args.test_identities,
        seed=args.seed,
        spectrum=args.spectrum,
        size=tuple(args.size),
        full_size=args.full_size,
        workers=args.workers,
    )
    print(f'Images: {args.directory}')
