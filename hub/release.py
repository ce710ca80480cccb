"""Go from a recipe to a published and verified model. To resume, run the same command again.

    python hub/release.py RECIPE --data-dir DATA                      train, evaluate, save
    python hub/release.py RECIPE --data-dir DATA --push OWNER/NAME    the same, push, load back, compare
    python hub/release.py RECIPE --data-dir DATA --trials 1-10        RegDB: ten models, and their mean
    python hub/release.py RECIPE --embed                              write weights that the package ships

Everything is written to output/release/<name of the recipe>: the run, report.json, and model/, the folder to push. A
stage is skipped if its result exists; delete the result to repeat the stage. With `--trials` each trial has its own
folder with run and report, mean.json holds their mean scores, and model/ is the model of the first trial. `--embed`
writes vireid_timm/weights/<name>.safetensors (half precision, without classifiers), .json (the scores, whom it was
trained on, and with `--calibrate-kwargs` its calibration) and .md (the card). The tag has to be registered before.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch.nn as nn
from timm.utils import ParseKwargs

import vireid_timm
from vireid_timm.device import resolve_device
from vireid_timm.evaluation.evaluate import calibrate
from vireid_timm.evaluation.features import weights_fingerprint
from vireid_timm.evaluation.report import HEADER_OF, METRICS, Report
from vireid_timm.files import expanded_path, save_json, whole_file
from vireid_timm.hub.card import evaluation_facts, model_card
from vireid_timm.hub.folder import CARD, WEIGHTS, load_model, round_to_half, save_run, sha256_of
from vireid_timm.hub.publish import check_model, push_folder
from vireid_timm.training.config import find_config, load_yaml

EMBEDDED = Path(vireid_timm.__file__).with_name('weights')
LICENSE = 'apache-2.0'  # of the weights in the package


def main() -> None:
    """Run all stages."""
    args = _arguments()
    args.recipe = find_config(args.recipe)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    settings = load_yaml(args.recipe)
    settings |= {'data_dir': args.data_dir} if args.data_dir else {}
    work = Path(args.output) / args.recipe.stem
    _keep_recipe(args.recipe, work)
    if args.embed:
        embed(args, settings, work)
        return
    note = ''
    if args.trials:
        made = {trial: measured(_of_trial(settings, trial), work / f'trial-{trial}', args) for trial in args.trials}
        note = averaged({trial: Report.load(report) for trial, (_, report) in made.items()}, work / 'mean.json')
        print(note)
        run, report = made[args.trials[0]]  # the model that the Hub gets
    else:
        run, report = measured(settings, work, args)
    folder = saved(run, report, work / 'model', args, note)
    if args.push:
        pushed(folder, args.push, work / 'pushed.json', args.private)
        verified(folder, args.push)


def measured(settings: dict[str, Any], work: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """Train and evaluate; return the run folder and the file of the report."""
    run, report = trained(settings, work, args.device), work / 'report.json'
    evaluated(run, report, settings, args)
    return run, report


def trained(settings: dict[str, Any], work: Path, device: str) -> Path:
    """Train from the recipe, or resume; return the run folder."""
    run, done = work / 'run', work / 'trained.json'
    if done.is_file():
        print(f'train: done already ({run})')
        return run
    start = {**settings, 'output': str(work), 'experiment': 'run', 'resume': 'auto'}
    result = vireid_timm.train({**start, 'device': device})
    save_json(done, {'best_epoch': result.best_epoch, 'best_mAP': result.best_mAP})
    return run


def evaluated(run: Path, path: Path, settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Evaluate the model of the run on the test images, by every protocol unless some are named."""
    if path.is_file():
        print(f'evaluate: done already ({path})')
        return
    model = load_model(run)
    if args.half:  # measure the weights that are published
        round_to_half(model)
    report = _report(model, settings, args)
    report.save(path)
    print(report)


def averaged(reports: dict[int, Report], path: Path) -> str:
    """Write the mean scores of several trials as JSON, and return them as text."""
    protocols, lines = {}, []
    for name in next(iter(reports.values())).protocols:
        scores = [report[name].mean for report in reports.values()]
        values = {metric: [score[metric] for score in scores] for metric in METRICS}
        mean = {metric: float(np.mean(value)) for metric, value in values.items()}
        std = {metric: float(np.std(value)) for metric, value in values.items()}
        protocols[name] = {'mean': mean, 'std': std, 'trials': scores}
        lines += [f'{name}:', *(f'  {HEADER_OF[m]:<4} {100 * mean[m]:6.2f} ± {100 * std[m]:.2f}' for m in METRICS)]
    save_json(path, {'trials': list(reports), 'protocols': protocols})
    trials = ', '.join(map(str, reports))
    return '\n'.join([f'Mean and deviation of the models of trials {trials}, each tested on its own trial:', *lines])


def saved(run: Path, report: Path, folder: Path, args: argparse.Namespace, note: str) -> Path:
    """Write the folder to push, unless it exists with these results."""
    results = Report.load(report)
    card = folder / CARD
    if card.is_file() and all(text in card.read_text(encoding='utf-8') for text in (str(results), note)):
        print(f'save: done already ({folder})')
    else:
        chosen = dict(half=args.half, license=args.license, data_terms=args.data_terms)
        save_run(run, folder, report=results, note=note, **chosen)
    print(*check_model(folder), sep='\n')
    return folder


def pushed(folder: Path, repo_id: str, path: Path, private: bool) -> None:
    """Push the folder, unless it was pushed before."""
    done = {'repo_id': repo_id, **{name: sha256_of(folder / name) for name in (WEIGHTS, CARD)}}
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
    """Write weights, scores and card of a model that the package ships; existing weights are kept."""
    name = f'{settings["model"].partition(".")[0]}.{args.recipe.stem}'
    target = EMBEDDED / f'{name}.safetensors'
    _check_registered(name, target)
    _test_dataset(settings, args)  # what is wrong there ends this before the training
    if target.is_file():
        print(f'train: done already ({target})')
    else:
        with whole_file(target) as temporary:
            save_embedded_weights(load_model(trained(settings, work, args.device)), temporary)
    model = timm.create_model(name, pretrained=True)  # score what users get: half precision, loaded by timm
    report = _report(model, settings, args)
    facts = {
        'dataset': settings['dataset'],
        'training': {key: value for key, value in settings.items() if key != 'data_dir'},
        'weights': {'precision': 'float16', 'classifiers': 'left out'},
        **({'data_terms': args.data_terms} if args.data_terms else {}),
        'evaluation': evaluation_facts(report),
    }
    learned = {'dataset': settings['dataset'], 'dataset_options': settings.get('dataset_kwargs', {})}
    if args.trained_kwargs:
        learned = {'dataset': args.test_dataset, 'dataset_options': args.trained_kwargs}
    scores = {
        protocol: {**result.mean, 'mAP_interval': result.intervals['mAP']}
        for protocol, result in report.protocols.items()
    }
    save_json(
        target.with_suffix('.json'),
        {
            'dataset': _test_options(settings, args),
            'weights': report.weights,
            'protocols': scores,
            'vireid': {
                **learned,
                'training': facts['training'],
                **({'calibration': _calibration(model, settings, args)} if args.calibrate_kwargs else {}),
            },
        },
    )
    card = model_card(name, model.num_features, facts, table=str(report), license=LICENSE, name=name)
    with whole_file(target.with_suffix('.md')) as temporary:
        temporary.write_text(card, encoding='utf-8')
    print(report)


def _check_registered(name: str, target: Path) -> None:
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        cfg = None
    if cfg is None or cfg.file != str(target):
        raise ValueError(f'register the tag {name} with the file {target} before its weights are trained')


def save_embedded_weights(model: nn.Module, path: Path) -> None:
    """Write the weights without classifiers in half precision, as the package ships them."""
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
        if not key.endswith('_head.fc.weight')
    }
    safetensors.torch.save_file(state, path)


def _report(model: nn.Module, settings: dict[str, Any], args: argparse.Namespace) -> Report:
    dataset = _test_dataset(settings, args)
    return vireid_timm.evaluate(model.to(resolve_device(args.device)), dataset, args.protocol, progress=True)


def _calibration(model: nn.Module, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    dataset = vireid_timm.create_dataset(*_test_data(settings, args), **args.calibrate_kwargs)
    return calibrate(model.to(resolve_device(args.device)), dataset, progress=True).to_dict()


def _test_data(settings: dict[str, Any], args: argparse.Namespace) -> tuple[str, str | None]:
    if args.test_dataset:
        return args.test_dataset, None
    return settings['dataset'], settings.get('data_dir') or None


def _test_options(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    return args.test_kwargs or ({} if args.test_dataset else settings.get('dataset_kwargs', {}))


def _test_dataset(settings: dict[str, Any], args: argparse.Namespace) -> vireid_timm.Dataset:
    return vireid_timm.create_dataset(*_test_data(settings, args), **_test_options(settings, args))


def _of_trial(settings: dict[str, Any], trial: int) -> dict[str, Any]:
    return {**settings, 'dataset_kwargs': {**settings.get('dataset_kwargs', {}), 'trial': trial}}


def _trials(text: str) -> list[int]:
    """Parse `3` or `1-10`."""
    first, _, last = text.partition('-')
    trials = list(range(int(first), int(last or first) + 1))
    if not trials:
        raise ValueError(text)
    return trials


def _keep_recipe(recipe: Path, work: Path) -> None:
    """Refuse to mix results of two recipes in a folder."""
    kept = work / 'recipe.yaml'
    if not kept.is_file():
        work.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as temporary:
            shutil.copyfile(recipe, temporary)
    elif load_yaml(kept) != load_yaml(recipe):
        raise SystemExit(f'{work} was made by another version of {recipe}; delete it, or choose another --output')


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', metavar='RECIPE', help='recipe of the package, by name, or a YAML file of settings')
    parser.add_argument('--data-dir', type=expanded_path, default='', help='root of the data')
    text = "evaluate, and calibrate, on another dataset without --data-dir, such as synthetic (default: the recipe's)"
    parser.add_argument('--test-dataset', metavar='NAME', help=text)
    parser.add_argument(
        '--test-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help="options of the evaluation dataset (default: the recipe's)",
    )
    parser.add_argument(
        '--trained-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help='with --embed: options of --test-dataset that give the people whom the recipe trains on',
    )
    parser.add_argument(
        '--calibrate-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help='with --embed: options of the dataset to fit a calibration on (default: none is fitted)',
    )
    parser.add_argument(
        '--trials', type=_trials, metavar='A-B', help="RegDB's trials, each trained and tested separately"
    )
    parser.add_argument('--protocol', nargs='+', metavar='NAME', help='protocols to evaluate (default: all)')
    parser.add_argument('--half', action='store_true', help='publish the weights in half precision')
    parser.add_argument('--license', default='', metavar='ID', help='licence of the weights, by its name on the Hub')
    parser.add_argument('--data-terms', default='', metavar='TEXT', help='terms of the training images')
    parser.add_argument('--push', metavar='OWNER/NAME', help='publish on the Hub')
    parser.add_argument('--private', action='store_true', help='create a private repository')
    parser.add_argument('--embed', action='store_true', help='write the files that the package ships')
    parser.add_argument('--output', type=expanded_path, default='output/release', help='default: output/release')
    parser.add_argument('--device', default='cuda', help='default: cuda; the CPU if there is no GPU')
    return parser.parse_args()


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f'release: error: {error}') from error
    except KeyboardInterrupt:
        raise SystemExit('release: stopped; run the same command again to resume') from None
