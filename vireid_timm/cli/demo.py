"""`vireid demo`: an untrained network, the weights in the package, and the same after fine-tuning on other cameras.

With `--web`: a page in the browser that searches visible images by infrared ones, and the reverse.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import INFRARED, VISIBLE
from ..files import expanded_path
from .parser import Parser, add_device_flag

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.records import Dataset

_logger = logging.getLogger(__name__)

MODEL = 'vireid_dml_r10t'
WEIGHTS = f'{MODEL}.synthvi'
PROTOCOL = 'infrared-to-visible'
# All people and cameras are new to the weights in the package, and the cameras are of another kind than those that they
# were trained on (near-infrared, 128x64): there is little to learn from new cameras of the same kind.
SIZE = (64, 32)
WORLD = dict(seed=2024, spectrum='thermal', size=SIZE)
IDENTITIES, TEST_IDENTITIES = 400, 120
RECIPE = 'fine_tune'
# What the recipe asks to change for hundreds of people.
FINE_TUNING = dict(warmup_epochs=0, epochs=3, identities_per_batch=16, images_per_modality=2)
ROWS = 8


# Flags of one of the two demos only.
FLAGS = {'output': 'output/demo', 'seed': 0}
WEB_FLAGS = {'index': [], 'host': '127.0.0.1', 'port': 7860}


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s [flags]'
    parser.description = (
        'Evaluate an untrained network and the weights in the package, fine-tune, evaluate again, save, reload and '
        'draw what the model finds, on rendered images. Takes about two minutes on two CPU cores. With --web, show a '
        'page in the browser instead that searches visible images by infrared ones, and the reverse.'
    )
    text = f'folder for the model, demo.json and ranking.png (default: {FLAGS["output"]})'
    parser.add_argument('--output', type=expanded_path, metavar='DIR', help=text)
    text = f'seed of the fine-tuning (default: {FLAGS["seed"]})'
    parser.add_argument('--seed', type=int, metavar='N', help=text)
    add_device_flag(parser)
    web = parser.add_argument_group('page in the browser')
    web.add_argument('--web', action='store_true', help='search in the browser (default: off)')
    text = 'index to search, at most one per modality (default: rendered people)'
    web.add_argument('--index', type=expanded_path, action='append', metavar='INDEX', help=text)
    text = f'address to listen at, 0.0.0.0 for all of this machine (default: {WEB_FLAGS["host"]})'
    web.add_argument('--host', metavar='ADDRESS', help=text)
    web.add_argument('--port', type=int, metavar='N', help=f'port to listen at (default: {WEB_FLAGS["port"]})')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run one of the two demos."""
    foreign = {name: getattr(args, name) for name in (FLAGS if args.web else WEB_FLAGS)}
    given = [
        f'--{name} {value}'
        for name, values in foreign.items()
        if values is not None
        for value in (values if isinstance(values, list) else [values])
    ]
    if given:
        raise ValueError(f'{", ".join(given)}: only {"without" if args.web else "with"} --web')
    own = WEB_FLAGS if args.web else FLAGS
    values = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in own.items()}
    if args.web:
        from ..web.app import serve

        serve(values['index'], host=values['host'], port=values['port'], device=args.device)
    else:
        run_demo(**values, device=args.device)


def run_demo(output: str | Path = 'output/demo', seed: int = 0, device: str = 'cuda') -> dict[str, Any]:
    """Evaluate, fine-tune, evaluate again, save, reload and draw, on rendered images; a few minutes on two cores.

    Args:
        output: Where the model, `demo.json` and `ranking.png` go.
        seed: Of the fine-tuning; the images are always the same.
        device: Where to compute; falls back to the CPU.

    Returns:
        The content of `demo.json`: `untrained`, `embedded`, `fine_tuned` and `reloaded`, each with `rank1` and `mAP`
        as fractions on the same test identities, and the paths of the model and the image.

    Raises:
        ValueError: The reloaded model gives other numbers than the trained one.
    """
    import timm
    import torch

    from ..data.readers import create_dataset
    from ..device import resolve_device
    from ..files import save_json
    from ..hub.folder import load_model
    from ..run_folder import LAST
    from ..training.config import TrainConfig, load_yaml
    from ..training.loop import train

    output = Path(output)
    images = output / 'images'  # decoded images: nothing is left outside the output folder
    options = dict(identities=IDENTITIES, test_identities=TEST_IDENTITIES, **WORLD)
    places = dict(dataset='synthetic', dataset_kwargs=options, output=str(output), cache='ram')
    settings = {**load_yaml(RECIPE), **FINE_TUNING, **places, 'seed': seed, 'device': device}
    config = TrainConfig.from_mapping(settings)  # before minutes of work
    _logger.info(
        f'1/5 Rendering {IDENTITIES + TEST_IDENTITIES} people that no weights here have seen, at {SIZE[0]}x{SIZE[1]} '
        'pixels and with thermal cameras'
    )
    dataset = create_dataset('synthetic', **options)
    where = resolve_device(device)
    results = {}
    _logger.info(f'2/5 Searching {TEST_IDENTITIES} of them by thermal image among the visible ones')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results['untrained'] = _score(timm.create_model(MODEL, num_classes=0), dataset, where, images)
    results['embedded'] = _score(timm.create_model(WEIGHTS, pretrained=True), dataset, where, images)
    _logger.info(f'3/5 Fine-tuning on the other {IDENTITIES} people')
    run = train(config)
    results['fine_tuned'] = _score(load_model(run.folder / LAST), dataset, where, images)
    _logger.info('4/5 Reloading the saved model with timm')
    model = timm.create_model(f'local-dir:{run.best}', pretrained=True, num_classes=0)
    results['reloaded'] = _score(model, dataset, where, images)
    _logger.info('5/5 Drawing what it finds')
    ranking = output / 'ranking.png'
    _draw(model.to(where), dataset, ranking)
    summary = {
        **results,
        'test_identities': TEST_IDENTITIES,
        'protocol': PROTOCOL,
        'seed': seed,
        'model': str(run.best),
        'image': str(ranking),
    }
    save_json(output / 'demo.json', summary)
    _log_summary(summary)
    if results['reloaded'] != results['fine_tuned']:
        raise ValueError(f'the model saved in {run.best} does not give the numbers of the trained one')
    return summary


def _score(model: 'nn.Module', dataset: 'Dataset', device: 'torch.device', images: Path) -> dict[str, float]:
    """Return rank-1 and mAP in full precision, so that a reloaded model can be held to the same numbers."""
    from ..evaluation.evaluate import evaluate

    result = evaluate(model.to(device), dataset, PROTOCOL, cache_dir=images)[PROTOCOL]
    _logger.info(f'    rank-1 {result.mean["rank1"]:6.1%}   mAP {result.mean["mAP"]:6.1%}')
    return {name: result.mean[name] for name in ('rank1', 'mAP')}


def _draw(model: 'nn.Module', dataset: 'Dataset', path: Path) -> None:
    """Draw an infrared query of each of the first identities, with the ten nearest visible images (paper, fig. 6)."""
    from ..evaluation.features import embed
    from ..figures.rank_list import RankRow, Result, rank_list_image
    from ..files import whole_file
    from ..retrieval.search import nearest

    test = dataset.test
    infrared = test[test.modality == INFRARED]
    visible = test[test.modality == VISIBLE]
    people = infrared.identities()[:ROWS]
    queries = infrared[[infrared.identity.tolist().index(person) for person in people]]
    found = nearest(embed(model, queries)[0], embed(model, visible)[0], 10).rows.numpy()
    rows = [
        RankRow(Result(query), [Result(visible.path[i], hit=bool(visible.identity[i] == person)) for i in results])
        for query, person, results in zip(queries.path.tolist(), people, found, strict=True)
    ]
    image = rank_list_image(rows)
    with whole_file(path) as temporary:
        image.save(temporary, format='PNG')


def _log_summary(summary: dict[str, Any]) -> None:
    rows = {
        'untrained network': 'untrained',
        'weights in the package': 'embedded',
        'after fine-tuning': 'fine_tuned',
        'reloaded with timm': 'reloaded',
    }
    table = [f'{name:<24}{summary[key]["rank1"]:>8.1%}{summary[key]["mAP"]:>8.1%}' for name, key in rows.items()]
    _logger.info(
        '\n'.join(
            [
                '',
                f'{TEST_IDENTITIES} people never seen, thermal images search visible ones',
                f'{"":<24}{"rank-1":>8}{"mAP":>8}',
                *table,
                '',
                f'Model: {summary["model"]}',
                f'Image: {summary["image"]}',
                'Tens of people of your own, ROOT/train/visible/<person>/... and ROOT/train/infrared/<person>/...:',
                f'  vireid train --config {RECIPE} --data-dir ROOT',
                'For hundreds, as here, add',
                '  --warmup-epochs 0 --epochs 3 --identities-per-batch 16 --images-per-modality 2',
            ]
        )
    )
