"""`vireid export`."""

import argparse

from ..constants import EXPORT_FORMATS, FEATURES
from ..files import expanded_path
from ..training.config import MODEL_HELP
from .parser import Parser, add_switch


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s --model NAME DIR [flags]'
    parser.description = (
        'Write a model as files that run without this package: one for visible images, one for infrared images, and '
        'one for both. Each is compared with the model before the folder appears.'
    )
    parser.add_argument('folder', type=expanded_path, metavar='DIR', help='folder to create')
    text = f'{MODEL_HELP}, or a checkpoint (required)'
    parser.add_argument('--model', '--checkpoint', type=expanded_path, required=True, metavar='NAME', help=text)
    add_switch(parser, '--pretrained', 'load the weights (default: on)', default=True)
    text = 'onnx, or pt2: a program of torch.export (default: onnx)'
    parser.add_argument('--format', choices=EXPORT_FORMATS, default='onnx', help=text)
    text = 'store weights in half precision, a file of half the size (default: off)'
    parser.add_argument('--half', action='store_true', help=text)
    text = 'features after or before the BN-neck (default: as the model returns them)'
    parser.add_argument('--features', choices=FEATURES, default='auto', help=text)
    text = "channels, height, width of the images (default: the model's)"
    parser.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export a model, and show what was written."""
    from pathlib import Path

    from ..export import export_model
    from ..text import aligned, format_bytes

    options = {name: getattr(args, name) for name in ('format', 'half', 'features', 'pretrained')}
    metadata = export_model(args.model, args.folder, size=args.input_size, **options)
    rows = [['file', 'size', 'largest difference from the model']]
    for name, difference in metadata['files'].items():
        rows.append([name, format_bytes((Path(args.folder) / name).stat().st_size), f'{difference:.1g}'])
    print(*aligned(rows), sep='\n')
    if args.half:
        print(f'Rounding the weights to half precision changed the features by {metadata["half_difference"]:.1g}')
    print(f'Export: {args.folder}')
