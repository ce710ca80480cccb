"""`vireid explain`."""

import argparse

from ..constants import FEATURES, MODALITIES
from ..files import expanded_path
from ..training.config import MODEL_HELP
from .parser import Parser, add_device_flag


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s IMAGE [OTHER] --model NAME --modality visible|infrared [flags]'
    parser.description = (
        'Show what a model looks at: Grad-CAM of each branch for the similarity of two images, or for the features of '
        'one, and the weight maps of the fused layers.'
    )
    parser.add_argument('image', type=expanded_path, metavar='IMAGE', help='image file')
    text = 'image file to compare it with (default: none)'
    parser.add_argument('other', type=expanded_path, nargs='?', metavar='OTHER', help=text)
    parser.add_argument('--model', '--checkpoint', type=expanded_path, required=True, metavar='NAME', help=MODEL_HELP)
    parser.add_argument('--modality', choices=MODALITIES, required=True, help='modality of IMAGE')
    text = 'modality of OTHER (default: that of IMAGE)'
    parser.add_argument('--other-modality', choices=MODALITIES, help=text)
    text = 'explain features after or before the BN-neck (default: as the model returns them)'
    parser.add_argument('--features', choices=FEATURES, default='auto', help=text)
    text = 'where to draw it (default: explanation.png)'
    parser.add_argument('--output', type=expanded_path, default='explanation.png', metavar='FILE.png', help=text)
    add_device_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Explain one image, or the similarity of two."""
    from ..device import resolve_device
    from ..figures.explain import explain, require_captum, save_explanations
    from ..files import check_writable
    from ..hub.folder import load_model

    require_captum()
    if args.other is None and args.other_modality is not None:
        raise ValueError('--other-modality needs a second image: vireid explain IMAGE OTHER ...')
    check_writable(args.output)
    images = [(args.image, args.modality)]
    if args.other is not None:
        images.append((args.other, args.other_modality or args.modality))
    model = load_model(args.model).to(resolve_device(args.device))
    explanations = explain(model, images, args.features)
    save_explanations(explanations, args.output)
    if len(explanations) > 1:
        print(f'Similarity: {explanations[0].similarity:.4f}')
    print(f'Image: {args.output}')
