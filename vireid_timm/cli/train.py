"""`vireid train`."""

import argparse
import dataclasses
from typing import Any, get_args, get_origin

from ..training.config import SETTINGS, kind_of, load_yaml, recipe_names
from .parser import KeyValues, Parser, add_switch

_METAVARS = {
    int: 'N',
    float: 'X',
    str: 'NAME',
    'data_dir': 'PATH',
    'input_size': ('C', 'H', 'W'),
    'checkpoint_interval': 'INTERVAL',
    'output': 'PATH',
    'resume': 'PATH',
    'loss': 'NAME=WEIGHT',
}


def add_arguments(parser: Parser, every: bool = False) -> None:
    """Add the flags.

    Args:
        parser: Of the command.
        every: Describe every flag in the help, not only the everyday ones.
    """
    parser.usage = '%(prog)s --data-dir PATH [flags]'
    parser.description = (
        "Train or fine-tune a model. Flags override --config, which overrides the defaults: the paper's recipe. "
        'With several GPUs: torchrun --nproc-per-node N -m vireid_timm train ...'
    )
    parser.add_argument('--help-all', action=_HelpAll, help='show every flag and exit')
    recipes = f'YAML file of settings, or a recipe of the package: {", ".join(recipe_names())} (default: none)'
    parser.add_argument('-c', '--config', metavar='NAME', help=recipes)
    dry_run = 'print what would be done, and the time and memory it would take; write nothing (default: off)'
    parser.add_argument('--dry-run', action='store_true', help=dry_run)
    groups = {}
    for setting in SETTINGS.values():
        title = setting.metadata['group']
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_setting(groups[title], setting, every or setting.metadata.get('everyday', False))
    if not every:
        parser.epilog = f'These are the everyday flags; `{parser.prog} --help-all` shows every flag.'
    parser.set_defaults(run=run)


class _HelpAll(argparse.Action):
    """Print the help of every flag."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Parser, *_: Any) -> None:
        complete = Parser(prog=parser.prog)
        add_arguments(complete, every=True)
        complete.print_help()
        parser.exit()


def _add_setting(group: Any, setting: dataclasses.Field, shown: bool) -> None:
    """Add the flag of a setting; the parsed namespace holds only the flags that were given."""
    flag, metadata, (kind, _) = f'--{setting.name.replace("_", "-")}', setting.metadata, kind_of(setting)
    text = f'{metadata["help"]} (default: {_default(setting)})' if shown else argparse.SUPPRESS
    argument = {'dest': setting.name, 'default': argparse.SUPPRESS}
    if kind is bool:
        add_switch(group, flag, text, **argument)
    elif get_origin(kind) is dict:
        metavar = _METAVARS.get(setting.name, 'KEY=VALUE')
        group.add_argument(flag, help=text, nargs='*', action=KeyValues, metavar=metavar, **argument)
    else:
        argument['type'] = get_args(kind)[0] if get_origin(kind) is list else kind
        argument.update({name: metadata[name] for name in ('nargs', 'choices') if name in metadata})
        metavar = None if 'choices' in metadata else _METAVARS.get(setting.name, _METAVARS[argument['type']])
        group.add_argument(flag, help=text, metavar=metavar, **argument)


def _default(setting: dataclasses.Field) -> str:
    if setting.default is dataclasses.MISSING:
        value = setting.default_factory()
        words = [f'{key}={entry}' for key, entry in value.items()] if isinstance(value, dict) else map(str, value)
        return ' '.join(words) or 'none'
    if isinstance(setting.default, bool):
        return 'on' if setting.default else 'off'
    return setting.metadata.get('unset', 'none') if setting.default in (None, '') else str(setting.default)


def run(args: argparse.Namespace) -> None:
    """Train, or print what training would do."""
    from ..distributed import is_rank_zero
    from ..training.dry_run import dry_run
    from ..training.loop import train

    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    settings = {**(load_yaml(args.config) if args.config else {}), **given}
    if args.dry_run:
        summary = dry_run(settings)
    else:
        result = train(settings)
        summary = f'Run: {result.folder}\nModel: {result.best}'
    if is_rank_zero():
        print(summary)
