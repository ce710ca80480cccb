"""The `vireid` command: train, eval, hub, synth and demo."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ParseKwargs

from ..data.layouts import LAYOUT_NAMES, write_layout
from ..data.readers import READERS, create_dataset
from ..data.store import CACHES
from ..device import autocast_dtype, keep_memory, resolve_device
from ..distributed import end_distributed, has_lost_contact, init_distributed, is_announced, is_primary
from ..evaluation.breakdown import GROUPINGS, breakdown_table, failures_table
from ..evaluation.compare import compare
from ..evaluation.evaluate import RERANKINGS, evaluate
from ..evaluation.features import CROPS, FEATURES
from ..evaluation.protocols import DRAWS
from ..evaluation.report import Report
from ..hub.convert import SOURCES, convert_checkpoint
from ..hub.folder import load_model, round_to_half, save_model_folder, save_run
from ..hub.publish import check_model, push_folder
from ..synthvi.render import SPECTRA
from ..training.config import add_arguments, load_yaml
from ..training.dry_run import dry_run
from ..training.interrupt import Stopped
from ..training.train import train
from ..version import __version__
from .demo import run_demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those of the process when None.

    Returns:
        Exit status: 0, 1 after an error that the user can mend, 130 after Ctrl-C, 143 where SIGTERM ended a training.
    """
    args = vars(_parser().parse_args(arguments))
    command = args.pop('command')
    keep_memory()
    logger = logging.getLogger('vireid_timm')
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(message)s'))
    logger.addHandler(handler)
    # Of several processes under torchrun, one speaks.
    level, logger.level = logger.level, logging.INFO if is_primary() else logging.ERROR
    try:
        command(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if is_primary() or not is_announced(error):
            print(f'vireid: error: {error}', file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not has_lost_contact(error):
            raise
        if is_primary():
            print('vireid: error: another process is gone; its own message says why', file=sys.stderr)
        return 1
    except Stopped as stopped:
        if is_primary():
            print(f'vireid: {stopped}', file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print('vireid: stopped', file=sys.stderr)
        return 130
    finally:
        logger.removeHandler(handler)
        logger.level = level
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='vireid', description='Visible-infrared person re-identification: train, evaluate, make images.'
    )
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    _add_train(commands)
    _add_eval(commands)
    _add_hub(commands)
    _add_synth(commands)
    _add_demo(commands)
    return parser


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        'train',
        help='train or fine-tune a model',
        description='Train or fine-tune a model. Flags win over --config, which wins over the defaults. '
        'With several GPUs: torchrun --nproc-per-node N -m vireid_timm train ...',
    )
    parser.add_argument('-c', '--config', default=argparse.SUPPRESS, metavar='FILE', help='YAML file of settings')
    parser.add_argument(
        '--dry-run', action='store_true', help='say what would be done, and what it would take; train and write nothing'
    )
    add_arguments(parser)
    parser.set_defaults(command=_train)


def _train(args: dict[str, Any]) -> None:
    config, dry = args.pop('config', None), args.pop('dry_run')
    settings = {**(load_yaml(config) if config else {}), **args}
    if dry:
        said = dry_run(settings)
        if is_primary():
            print(said)
        return
    result = train(settings)
    if is_primary():
        print(f'Run: {result.folder}')
        print(f'Model: {result.best}')


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser('eval', help='evaluate a model on a dataset', description=_eval.__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--checkpoint', metavar='PATH', help='run folder, Hub-ready folder, or a file in one')
    which.add_argument('--model', metavar='NAME', help='local-dir:FOLDER, hf-hub:OWNER/NAME, or a model with a tag')
    which.add_argument('--compare', nargs=2, metavar='FILE.json', help='compare two reports instead')
    parser.add_argument(
        '--pretrained',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='load the weights of --model (default), or evaluate it untrained',
    )
    parser.add_argument('--dataset', default='folder', help=f'reader: {", ".join(READERS)} (default: folder)')
    parser.add_argument('--data-dir', default='', metavar='PATH', help='root of the data (the file itself for csv)')
    parser.add_argument('--dataset-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    parser.add_argument('--protocol', nargs='+', metavar='NAME', help="all of the dataset's protocols if unset")
    parser.add_argument('--draw', choices=DRAWS, default='seeded', help='how drawn galleries are drawn')
    parser.add_argument('--features', choices=FEATURES, default='after-bn')
    parser.add_argument('--flip-test', action='store_true', help='average over each image and its mirror image')
    parser.add_argument('--crops', type=int, choices=CROPS, default=1, help='5: average over shifts into the corners')
    parser.add_argument('--reranking', choices=RERANKINGS, default='none')
    parser.add_argument('--breakdown', nargs='+', choices=GROUPINGS, default=(), help='print results by these, too')
    parser.add_argument('--failures', type=int, default=0, metavar='N', help='name the worst queries of each protocol')
    parser.add_argument('--report', metavar='FILE.json', help='write the report there, too')
    parser.add_argument('--results-file', metavar='FILE.csv', help='write one row per protocol there, too')
    parser.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help="the model's own if unset")
    parser.add_argument('-b', '--batch-size', type=int, default=128)
    parser.add_argument('--device', default='cuda', help='falls back to the CPU, saying so')
    parser.add_argument('--amp', action=argparse.BooleanOptionalAction, default=False, help='mixed precision')
    parser.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), default='bfloat16')
    parser.add_argument('--cache', choices=CACHES, default='auto')
    parser.add_argument('--skip-broken', action='store_true', help='leave out images that cannot be read')
    parser.add_argument('--workers', type=int, default=None, help='images decoded at a time')
    parser.set_defaults(command=_eval)


def _eval(args: dict[str, Any]) -> None:
    """Evaluate a model: features once, then every protocol of the dataset with all its trials. Or compare two reports.

    With several GPUs: torchrun --nproc-per-node N -m vireid_timm eval ...
    """
    if args['compare']:
        print(compare(*map(Report.load, args['compare'])))
        return
    try:
        device = init_distributed(args['device'])
        report = _evaluate(args, device)
    finally:
        end_distributed()
    if is_primary():
        _show(report, args)


def _evaluate(args: dict[str, Any], device: torch.device) -> Report:
    dataset = create_dataset(args['dataset'], args['data_dir'] or None, **args['dataset_kwargs'])
    model = load_model(args['checkpoint'] or args['model'], pretrained=args['pretrained'])
    return evaluate(
        model.to(device),
        dataset,
        args['protocol'],
        draw=args['draw'],
        reranking=args['reranking'],
        failures=args['failures'],
        features=args['features'],
        flip_test=args['flip_test'],
        crops=args['crops'],
        size=tuple(args['input_size'][1:]) if args['input_size'] else None,
        batch_size=args['batch_size'],
        amp_dtype=autocast_dtype(device, args['amp'], args['amp_dtype']),
        cache=args['cache'],
        skip_broken=args['skip_broken'],
        workers=args['workers'],
        progress=True,
    )


def _show(report: Report, args: dict[str, Any]) -> None:
    if args['report']:
        report.save(args['report'])
    if args['results_file']:
        report.save_csv(args['results_file'])
    print(report)
    for name, result in report.protocols.items():
        for by in args['breakdown']:
            print(f'\n{name} by {by}\n{breakdown_table(result, by)}')
        if args['failures']:
            print(f'\n{name}, the worst queries\n{failures_table(result)}')


def _add_hub(commands: Any) -> None:
    parser = commands.add_parser('hub', help='publish, check and convert models', description=_HUB)
    actions = parser.add_subparsers(required=True, metavar='ACTION')
    _add_hub_save(actions)
    _add_hub_push(actions)
    _add_hub_check(actions)
    _add_hub_convert(actions)


_HUB = 'Models to and from the Hugging Face Hub: save one from a run, push it, check a published one, convert others.'


def _add_hub_save(actions: Any) -> None:
    parser = actions.add_parser('save', help='make a folder to publish from a run', description=_hub_save.__doc__)
    parser.add_argument('run', metavar='RUN', help="a run's folder, or one that was saved before")
    parser.add_argument('folder', metavar='DIR', help='where to write')
    _add_publication(parser)
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument('--report', metavar='FILE.json', help='what `vireid eval --report` found for this very model')
    measured.add_argument('--dataset', help=f'evaluate on all its protocols first: {", ".join(READERS)}')
    parser.add_argument('--data-dir', default='', metavar='PATH', help='root of the data (the file itself for csv)')
    parser.add_argument('--dataset-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    parser.add_argument('-b', '--batch-size', type=int, default=128)
    parser.add_argument('--device', default='cuda', help='falls back to the CPU, saying so')
    parser.set_defaults(command=_hub_save)


def _add_publication(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--half', action='store_true', help='store the weights in half precision')
    parser.add_argument('--license', default='', metavar='ID', help="of the weights, by the Hub's name: apache-2.0")
    parser.add_argument('--data-terms', default='', metavar='TEXT', help='terms of the training images, for the card')


def _hub_save(args: dict[str, Any]) -> None:
    """Make a folder to publish: weights, configuration, reference features, and a card with what was measured."""
    report = Report.load(args['report']) if args['report'] else None
    if args['dataset']:
        dataset = create_dataset(args['dataset'], args['data_dir'] or None, **args['dataset_kwargs'])
        model = load_model(args['run'])
        if args['half']:  # what is published is what is measured
            round_to_half(model)
        device = resolve_device(args['device'])
        report = evaluate(model.to(device), dataset, batch_size=args['batch_size'], progress=True)
    chosen = {name: args[name] for name in ('half', 'license', 'data_terms')}
    save_run(args['run'], args['folder'], report=report, **chosen)
    print(*check_model(args['folder']), sep='\n')
    print(f'Model: {args["folder"]}')


def _add_hub_push(actions: Any) -> None:
    parser = actions.add_parser('push', help='upload such a folder', description=_hub_push.__doc__)
    parser.add_argument('folder', metavar='DIR', help='as `vireid hub save` made it')
    parser.add_argument('repo_id', metavar='OWNER/NAME', help='made if there is none')
    parser.add_argument('--private', action='store_true', help='only you, or your organisation, can see it')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--revision', metavar='BRANCH', help='commit to this branch instead of main')
    parser.add_argument('--message', default='Upload model made with vireid_timm', help='of the commit')
    parser.set_defaults(command=_hub_push)


def _hub_push(args: dict[str, Any]) -> None:
    """Check a folder, then upload it to the Hub in one commit. Log in first: hf auth login."""
    print(f'Pushed: {push_folder(**args)}')


def _add_hub_check(actions: Any) -> None:
    parser = actions.add_parser('check', help='verify a published model', description=_hub_check.__doc__)
    parser.add_argument('name', metavar='NAME', help='OWNER/NAME or hf-hub:OWNER/NAME, with @REVISION or not; a folder')
    parser.set_defaults(command=_hub_check)


def _hub_check(args: dict[str, Any]) -> None:
    """Load a model from the Hub or a folder, and verify files, configuration, weights and reference features."""
    print(*check_model(args['name']), sep='\n')
    print(f'{args["name"]} is what it says')


def _add_hub_convert(actions: Any) -> None:
    parser = actions.add_parser('convert', help="turn others' checkpoints into such a folder", description=_CONVERT)
    parser.add_argument('file', metavar='FILE', help='the checkpoint')
    parser.add_argument('folder', metavar='DIR', help='where to write')
    parser.add_argument('--from', dest='source', choices=SOURCES, required=True, help='whose checkpoint it is')
    parser.add_argument('--model', metavar='NAME', help='the network, where the file leaves a choice')
    parser.add_argument('--num-classes', type=int, metavar='N', help='0 drops classifiers')
    _add_publication(parser)
    parser.set_defaults(command=_hub_convert)


_CONVERT = 'Read a checkpoint safely, map it onto a network of this library, and say what of it is not used.'


def _hub_convert(args: dict[str, Any]) -> None:
    conversion = convert_checkpoint(args['file'], args['source'], model=args['model'], num_classes=args['num_classes'])
    facts = {'converted': {'from': args['source'], 'file': Path(args['file']).name, 'notes': conversion.notes}}
    chosen = {name: args[name] for name in ('half', 'license', 'data_terms')}
    save_model_folder(conversion.model, args['folder'], facts=facts, **chosen)
    for group, count in conversion.dropped.items():
        print(f'Not used: {group} ({count} tensor{"s" if count > 1 else ""})')
    print(*conversion.notes, *check_model(args['folder']), sep='\n')
    print(f'Model: {args["folder"]}')


def _add_synth(commands: Any) -> None:
    parser = commands.add_parser('synth', help='write SynthVI images to disk', description=_synth.__doc__)
    parser.add_argument('directory', metavar='DIR', type=Path, help='a folder that does not exist yet')
    parser.add_argument('--layout', choices=LAYOUT_NAMES, default='folder')
    parser.add_argument('--identities', type=int, help='training identities (default: 100); test ones come on top')
    parser.add_argument('--test-identities', type=int, default=None)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--spectrum', choices=SPECTRA, default=None, help="the layout's own if unset")
    parser.add_argument('--size', nargs=2, type=int, default=(128, 64), metavar=('H', 'W'))
    parser.add_argument('--full-size', action='store_true', help="the real dataset's identities and image counts")
    parser.add_argument('--workers', type=int, default=None, help='processes that render')
    parser.set_defaults(command=_synth)


def _synth(args: dict[str, Any]) -> None:
    """Render SynthVI in the layout of a real dataset or of your own folders."""
    directory = args.pop('directory')
    if args['identities'] is None and not args['full_size']:
        args['identities'] = 100
    write_layout(directory, size=tuple(args.pop('size')), **args)
    print(f'Images: {directory}')


_DEMO = 'Evaluate, fine-tune, evaluate again, save, reload and look, on rendered images, in about four minutes.'


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser('demo', help='see it work in four minutes', description=_DEMO)
    parser.add_argument('--output', type=Path, default=Path('output/demo'), metavar='DIR')
    parser.add_argument('--seed', type=int, default=0, help='of the fine-tuning')
    parser.add_argument('--device', default='cuda', help='falls back to the CPU, saying so')
    parser.set_defaults(command=lambda args: run_demo(**args))
