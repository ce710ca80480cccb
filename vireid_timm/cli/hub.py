"""`vireid hub`: save, push, check and convert."""

import argparse
from pathlib import Path
from typing import Any

from ..constants import DATASETS, SOURCES
from ..files import expanded_path
from .parser import Parser, add_batch_size_flag, add_data_flags, add_decoding_flags, add_device_flag


def add_arguments(parser: Parser) -> None:
    """Add the actions and their flags."""
    parser.usage = '%(prog)s ACTION [flags]'
    parser.description = 'Models from and for the Hugging Face Hub: save a run for publishing, push, check, convert.'
    actions = parser.add_subparsers(required=True, prog=parser.prog, title='actions', metavar='ACTION')
    _add_save(actions)
    _add_push(actions)
    _add_check(actions)
    _add_convert(actions)


def _add_save(actions: Any) -> None:
    parser = actions.add_parser(
        'save',
        usage='%(prog)s RUN DIR [flags]',
        help='make a Hub-ready folder from a run',
        description='Write a folder to publish: weights, configuration, reference features, and a card with results.',
    )
    parser.add_argument('source', type=expanded_path, metavar='RUN', help='run folder, or a Hub-ready one')
    parser.add_argument('folder', type=expanded_path, metavar='DIR', help='where to write')
    _add_publication(parser)
    measured = parser.add_mutually_exclusive_group()
    text = 'results for the card: a report of `vireid eval` on these weights (default: validation results)'
    measured.add_argument('--report', type=expanded_path, metavar='FILE.json', help=text)
    text = f'or evaluate on all protocols of this dataset first: {", ".join(DATASETS)} (default: none)'
    measured.add_argument('--dataset', metavar='NAME', help=text)
    add_data_flags(parser)
    add_decoding_flags(parser)
    add_batch_size_flag(parser)
    add_device_flag(parser)
    parser.set_defaults(run=save)


def _add_publication(parser: Parser) -> None:
    parser.add_argument('--half', action='store_true', help='store weights in half precision (default: off)')
    text = "licence of the weights, by the Hub's identifier, e.g. apache-2.0 (default: not stated)"
    parser.add_argument('--license', default='', metavar='ID', help=text)
    text = 'terms of the training images, for the card (default: not stated)'
    parser.add_argument('--data-terms', default='', metavar='TEXT', help=text)


def save(args: argparse.Namespace) -> None:
    """Write a Hub-ready folder from a run, and check it."""
    from ..data.readers import create_dataset
    from ..device import resolve_device
    from ..evaluation.evaluate import evaluate
    from ..evaluation.report import Report
    from ..hub.folder import check_target, load_model, round_to_half, save_run, split_problem
    from ..hub.publish import check_model

    check_target(args.folder)
    publication = _publication(args)
    report = Report.load(args.report) if args.report is not None else None
    if args.dataset is not None:
        dataset = create_dataset(args.dataset, args.data_dir or None, **args.dataset_kwargs)
        model = load_model(args.source)
        learned, problem = split_problem(args.source, dataset)
        if learned:
            raise ValueError(problem)
        if args.half:  # measure what is published
            round_to_half(model)
        device = resolve_device(args.device)
        names = ('batch_size', 'skip_broken', 'cache', 'workers')
        report = evaluate(model.to(device), dataset, progress=True, **{name: getattr(args, name) for name in names})
    save_run(args.source, args.folder, report=report, **publication)
    print(*check_model(args.folder), sep='\n')
    print(f'Model: {args.folder}')


def _publication(args: argparse.Namespace) -> dict[str, Any]:
    for flag, text in (('--license', args.license), ('--data-terms', args.data_terms)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f'{flag} {text!r} is not text in UTF-8, which a model card has to be') from error
    return {name: getattr(args, name) for name in ('half', 'license', 'data_terms')}


def _add_push(actions: Any) -> None:
    parser = actions.add_parser(
        'push',
        usage='%(prog)s DIR OWNER/NAME [flags]',
        help='upload a Hub-ready folder',
        description='Check a folder, then upload it to the Hub in one commit. Log in first: hf auth login.',
    )
    parser.add_argument('folder', type=expanded_path, metavar='DIR', help='folder that `vireid hub save` made')
    parser.add_argument('repo_id', metavar='OWNER/NAME', help='repository on the Hub; created if missing')
    text = 'only you, or your organisation, can see the repository (default: off)'
    parser.add_argument('--private', action='store_true', help=text)
    text = 'open a pull request instead of committing (default: off)'
    parser.add_argument('--create-pr', action='store_true', help=text)
    parser.add_argument('--revision', metavar='BRANCH', help='branch to commit to (default: main)')
    text = 'commit message (default: %(default)s)'
    parser.add_argument('--message', default='Upload model made with vireid_timm', metavar='TEXT', help=text)
    parser.set_defaults(run=push)


def push(args: argparse.Namespace) -> None:
    """Upload a Hub-ready folder."""
    from ..hub.publish import push_folder

    chosen = {name: getattr(args, name) for name in ('private', 'create_pr', 'revision', 'message')}
    print(f'Pushed: {push_folder(args.folder, args.repo_id, **chosen)}')


def _add_check(actions: Any) -> None:
    parser = actions.add_parser(
        'check',
        usage='%(prog)s NAME',
        help='verify a published model',
        description='Load a model from the Hub or a folder; verify files, configuration, weights, reference features.',
    )
    text = 'OWNER/NAME or hf-hub:OWNER/NAME, with @REVISION or without, or a folder'
    parser.add_argument('name', type=expanded_path, metavar='NAME', help=text)
    parser.set_defaults(run=check)


def check(args: argparse.Namespace) -> None:
    """Verify a published model."""
    from ..hub.publish import check_model

    print(*check_model(args.name), sep='\n')
    print(f'Verified: {args.name}')


def _add_convert(actions: Any) -> None:
    parser = actions.add_parser(
        'convert',
        usage='%(prog)s FILE DIR --from SOURCE [flags]',
        help="turn others' checkpoints into a Hub-ready folder",
        description='Read a checkpoint safely, load it into a network of this library, and list what is not used.',
    )
    parser.add_argument('file', type=expanded_path, metavar='FILE', help='checkpoint')
    parser.add_argument('folder', type=expanded_path, metavar='DIR', help='where to write')
    text = 'library that wrote the checkpoint (required)'
    parser.add_argument('--from', dest='source', choices=SOURCES, required=True, help=text)
    _add_publication(parser)
    parser.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> None:
    """Turn a checkpoint into a Hub-ready folder, and check it."""
    from ..hub.convert import convert_checkpoint
    from ..hub.folder import save_model_folder
    from ..hub.publish import check_model

    conversion = convert_checkpoint(args.file, args.source)
    facts = {'converted': {'from': args.source, 'file': Path(args.file).name, 'notes': conversion.notes}}
    save_model_folder(conversion.model, args.folder, facts=facts, **_publication(args))
    for group, count in conversion.dropped.items():
        print(f'Not used: {group} ({count} tensor{"s" if count > 1 else ""})')
    print(*conversion.notes, *check_model(args.folder), sep='\n')
    print(f'Model: {args.folder}')
