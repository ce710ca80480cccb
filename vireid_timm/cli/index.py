"""`vireid index`."""

import argparse

from ..constants import FEATURES, MODALITIES
from ..files import expanded_path
from .parser import Parser, add_batch_size_flag, add_device_flag, add_switch, check_input_size


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s GALLERY --output INDEX --model NAME --modality visible [flags]'
    parser.description = (
        'Index the images of a gallery, for `vireid search`. The same command again adds what is new or changed, drops '
        'what is gone, and resumes after an interruption; it needs neither --model nor --modality then. With several '
        'GPUs: torchrun --nproc-per-node N -m vireid_timm index ...'
    )
    text = 'folder of images at any depth, or a CSV file with columns path and, if known, camera, time, identity'
    parser.add_argument('gallery', type=expanded_path, metavar='GALLERY', help=text)
    text = 'folder of the index'
    parser.add_argument('-o', '--output', type=expanded_path, required=True, metavar='INDEX', help=text)
    text = 'registered model, hf-hub:NAME, run or model folder (default: that of the index)'
    parser.add_argument('--model', type=expanded_path, metavar='NAME', help=text)
    text = 'modality of the gallery (default: that of the index)'
    parser.add_argument('--modality', choices=MODALITIES, help=text)
    text = "the name of an image's own folder is the person's identity (default: as in the index, or off)"
    add_switch(parser, '--folders-are-identities', text)
    text = 'also compress the features, to search millions of images (default: as in the index, or off)'
    add_switch(parser, '--compress', text)
    text = 'features after or before the BN-neck (default: those of the index, or as the model returns them)'
    parser.add_argument('--features', choices=FEATURES, help=text)
    text = "channels, height, width (default: the index's, or the model's)"
    parser.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help=text)
    add_batch_size_flag(parser)
    add_device_flag(parser)
    text = 'images decoded at once (default: one per core, at most 8)'
    parser.add_argument('--workers', type=int, metavar='N', help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Index a gallery."""
    from ..distributed import is_rank_zero, process_group
    from ..retrieval.update import update_index

    check_input_size(args.input_size)
    with process_group(args.device) as device:
        update = update_index(
            args.output,
            args.gallery,
            model=args.model,
            modality=args.modality,
            size=args.input_size,
            features=args.features,
            folders_are_identities=args.folders_are_identities,
            compress=args.compress,
            batch_size=args.batch_size,
            device=device,
            workers=args.workers,
            progress=True,
        )
    if is_rank_zero():
        counts = ', '.join(f'{count:,} {name}' for name, count in update._asdict().items() if count)
        print(f'Index: {args.output} ({counts})')
