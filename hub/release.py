"""From a recipe to a published and verified model in one command, which goes on where it was interrupted.

    python hub/release.py RECIPE.yaml --data-dir DATA                      train, evaluate, save
    python hub/release.py RECIPE.yaml --data-dir DATA --push OWNER/NAME    the same, push, load back, compare
    python hub/release.py RECIPE.yaml --embed                              write weights that the package ships

Everything lies in output/release/<name of the recipe>: the run, report.json, and model/, the folder that is pushed. A
stage whose result is there already is skipped; delete the result to repeat it. `--embed` writes
vireid_timm/weights/<name>.safetensors (half precision, without classifiers), .json (what it scores) and .md (the card).
"""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn
from timm.utils import ParseKwargs

import vireid_timm
from vireid_timm.cards import evaluation_facts, model_card
from vireid_timm.config import load_yaml
from vireid_timm.device import resolve_device
from vireid_timm.features import weights_fingerprint
from vireid_timm.files import save_json, whole_file
from vireid_timm.hub import load_model, round_to_half, save_embedded_weights, save_run
from vireid_timm.publish import check_model, push_folder
from vireid_timm.report import Report
from vireid_timm.runs import LAST

EMBEDDED = Path(vireid_timm.__file__).with_name('weights')
LICENSE = 'apache-2.0'  # of what the package ships


def main() -> None:
    """Go through the stages."""
    args = _arguments()
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    settings = load_yaml(args.recipe)
    settings |= {'data_dir': args.data_dir} if args.data_dir else {}
    work = args.output / args.recipe.stem
    _keep_recipe(args.recipe, work)
    if args.embed:
        embed(args, settings, work)
        return
    report = work / 'report.json'
    run = trained(settings, work, args.device)
    evaluated(run, report, settings, args)
    folder = saved(run, report, work / 'model', args)
    if args.push:
        pushed(folder, args.push, work / 'pushed.json', args.private)
        verified(folder, args.push)


def trained(settings: dict[str, Any], work: Path, device: str) -> Path:
    """Train from the recipe, or continue; returns the run's folder."""
    run, done = work / 'run', work / 'trained.json'
    if done.is_file():
        print(f'train: done already ({run})')
        return run
    start = {'resume': str(run)} if (run / LAST).is_file() else {**settings, 'output': str(work), 'experiment': 'run'}
    result = vireid_timm.train({**start, 'device': device})
    save_json(done, {'best_epoch': result.best_epoch, 'best_mAP': result.best_mAP})
    return run


def evaluated(run: Path, path: Path, settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Evaluate the run's model on the test pictures, every protocol unless some are named."""
    if path.is_file():
        print(f'evaluate: done already ({path})')
        return
    model = load_model(run)
    if args.half:  # what is published is what is measured
        round_to_half(model)
    report = _report(model, settings, args)
    report.save(path)
    print(report)


def saved(run: Path, report: Path, folder: Path, args: argparse.Namespace) -> Path:
    """Write the folder to be pushed."""
    if folder.is_dir():
        print(f'save: done already ({folder})')
    else:
        chosen = dict(half=args.half, license=args.license, data_terms=args.data_terms)
        save_run(run, folder, report=Report.load(report), **chosen)
    print(*check_model(folder), sep='\n')
    return folder


def pushed(folder: Path, repo_id: str, path: Path, private: bool) -> None:
    """Push the folder, unless these very weights were."""
    done = {'repo_id': repo_id, 'weights': weights_fingerprint(load_model(folder))}
    before = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    if done.items() <= before.items():
        print(f'push: done already ({before["commit"]})')
        return
    commit = push_folder(folder, repo_id, private=private)
    save_json(path, {**done, 'commit': commit})
    print(f'push: {commit}')


def verified(folder: Path, repo_id: str) -> None:
    """Load the model back from the Hub, check it, and compare it with the folder."""
    name = f'hf-hub:{repo_id}'
    print(*check_model(name), sep='\n')
    fingerprints = [weights_fingerprint(load_model(source)) for source in (folder, name)]
    if fingerprints[0] != fingerprints[1]:
        raise SystemExit(f'{name} has the weights {fingerprints[1]}, {folder} has {fingerprints[0]}')
    print(f'verify: {name} has the weights of {folder}')


def embed(args: argparse.Namespace, settings: dict[str, Any], work: Path) -> None:
    """Write weights, scores and card of a model that the package ships; weights that are there stay."""
    name = args.recipe.stem
    target = EMBEDDED / f'{name}.safetensors'
    if target.is_file():
        print(f'train: done already ({target})')
    else:
        with whole_file(target) as temporary:
            save_embedded_weights(load_model(trained(settings, work, args.device)), temporary)
    # What is shipped is what is scored: half precision, loaded the way a user loads it.
    overlay = dict(file=str(target))
    model = timm.create_model(name.partition('.')[0], pretrained=True, pretrained_cfg_overlay=overlay)
    report = _report(model, settings, args)
    facts = {
        'dataset': settings['dataset'],
        'training': {key: value for key, value in settings.items() if key != 'data_dir'},
        'weights': {'precision': 'float16', 'classifiers': 'left out'},
        'evaluation': evaluation_facts(report),
    }
    scores = {
        protocol: {**result.mean, 'mAP_interval': result.intervals['mAP']}
        for protocol, result in report.protocols.items()
    }
    save_json(
        target.with_suffix('.json'),
        {'dataset': _test_options(settings, args), 'weights': report.weights, 'protocols': scores},
    )
    card = model_card(name, model.num_features, facts, table=str(report), license=LICENSE, name=name)
    with whole_file(target.with_suffix('.md')) as temporary:
        temporary.write_text(card, encoding='utf-8')
    print(report)


def _report(model: nn.Module, settings: dict[str, Any], args: argparse.Namespace) -> Report:
    options = _test_options(settings, args)
    dataset = vireid_timm.create_dataset(settings['dataset'], settings.get('data_dir') or None, **options)
    return vireid_timm.evaluate(model.to(resolve_device(args.device)), dataset, args.protocol, progress=True)


def _test_options(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    return args.test_kwargs or settings.get('dataset_kwargs', {})


def _keep_recipe(recipe: Path, work: Path) -> None:
    """What lies in the folder was made by the recipe that lies there, and by no other."""
    kept = work / 'recipe.yaml'
    if not kept.is_file():
        work.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as temporary:
            shutil.copyfile(recipe, temporary)
    elif load_yaml(kept) != load_yaml(recipe):
        raise SystemExit(f'{work} was made by another version of {recipe}; delete it, or give another --output')


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', type=Path, metavar='RECIPE.yaml', help='settings of `vireid train`')
    parser.add_argument('--data-dir', default='', help='root of the data')
    parser.add_argument(
        '--test-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help="options of the dataset to evaluate on; the recipe's if unset",
    )
    parser.add_argument('--protocol', nargs='+', metavar='NAME', help='all if unset')
    parser.add_argument('--half', action='store_true', help='publish the weights in half precision')
    parser.add_argument('--license', default='', metavar='ID', help='of the weights')
    parser.add_argument('--data-terms', default='', metavar='TEXT', help='terms of the training pictures')
    parser.add_argument('--push', metavar='OWNER/NAME', help='publish on the Hub')
    parser.add_argument('--private', action='store_true', help='for nobody else to see')
    parser.add_argument('--embed', action='store_true', help='write the files that the package ships instead')
    parser.add_argument('--output', type=Path, default=Path('output/release'))
    parser.add_argument('--device', default='cuda', help='falls back to the CPU, saying so')
    return parser.parse_args()


if __name__ == '__main__':
    main()
