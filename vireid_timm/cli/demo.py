"""The demo: an untrained network, the weights in the package, and the same after fine-tuning on new cameras."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from ..constants import INFRARED, VISIBLE
from ..data.readers import create_dataset
from ..data.records import Dataset
from ..device import resolve_device
from ..evaluation.evaluate import evaluate
from ..evaluation.features import embed
from ..figures.rank_list import rank_list_image
from ..files import save_json, whole_file
from ..hub.folder import load_model
from ..retrieval.search import nearest
from ..run_folder import LAST
from ..training.loop import train

_logger = logging.getLogger(__name__)

MODEL = 'vireid_dml_r10t'
WEIGHTS = f'{MODEL}.synthvi'
PROTOCOL = 'infrared-to-visible'
# Another world than any that the weights in the package were trained in: none of its people or cameras was seen.
WORLD = 2024
IDENTITIES, TEST_IDENTITIES = 400, 120
FINE_TUNING = dict(
    epochs=3,
    opt='adamw',
    lr=0.001,
    weight_decay=0.02,
    sched='cosine',
    sched_on_updates=True,
    warmup_epochs=0,
    backbone_lr_scale=1.0,
    identities_per_batch=16,
    images_per_modality=2,
    val_share=0.0,
    pad=5,
)
ROWS = 8


def run_demo(output: str | Path = 'output/demo', seed: int = 0, device: str = 'cuda') -> dict[str, Any]:
    """Evaluate, fine-tune, evaluate again, save, reload and look, on rendered images; a few minutes on two cores.

    Args:
        output: Where the model, `demo.json` and `ranking.png` go.
        seed: Of the fine-tuning; the images are always the same.
        device: Where to compute; falls back to the CPU.

    Returns:
        What `demo.json` holds: `untrained`, `embedded`, `fine_tuned` and `reloaded`, each with `rank1` and `mAP` as
        fractions on the same test identities, and where things lie.
    """
    output = Path(output)
    images = output / 'images'  # the store of decoded images: nothing is left outside the output folder
    options = dict(identities=IDENTITIES, test_identities=TEST_IDENTITIES, seed=WORLD)
    _logger.info(f'1/5 Rendering {IDENTITIES + TEST_IDENTITIES} people that no weights here have seen, by new cameras')
    dataset = create_dataset('synthetic', **options)
    where = resolve_device(device)
    results = {}
    _logger.info(f'2/5 Searching {TEST_IDENTITIES} of them by infrared image among the visible ones')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results['untrained'] = _score(timm.create_model(MODEL, num_classes=0), dataset, where, images)
    results['embedded'] = _score(timm.create_model(WEIGHTS, pretrained=True), dataset, where, images)
    _logger.info(f'3/5 Fine-tuning on the other {IDENTITIES} people')
    run = train(
        {
            'dataset': 'synthetic',
            'dataset_kwargs': options,
            'model': WEIGHTS,
            'pretrained': True,
            'device': device,
            'seed': seed,
            'output': str(output),
            'cache': 'ram',
            **FINE_TUNING,
        }
    )
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
    _say(summary)
    if results['reloaded'] != results['fine_tuned']:
        raise ValueError(f'the model that was saved in {run.best} does not give the numbers of the trained one')
    return summary


def _score(model: nn.Module, dataset: Dataset, device: torch.device, images: Path) -> dict[str, float]:
    """Rank-1 and mAP in full precision, so that a reloaded model can be held to the same numbers."""
    result = evaluate(model.to(device), dataset, PROTOCOL, cache_dir=images)[PROTOCOL]
    _logger.info(f'    rank-1 {result.mean["rank1"]:6.1%}   mAP {result.mean["mAP"]:6.1%}')
    return {name: result.mean[name] for name in ('rank1', 'mAP')}


def _draw(model: nn.Module, dataset: Dataset, path: Path) -> None:
    """One infrared query of each of the first identities, with the ten nearest visible images (paper, fig. 6)."""
    test = dataset.test
    infrared = test[test.modality == INFRARED]
    visible = test[test.modality == VISIBLE]
    people = infrared.identities()[:ROWS]
    queries = infrared[[infrared.identity.tolist().index(person) for person in people]]
    order = nearest(embed(model, queries)[0], embed(model, visible)[0], 10).numpy()
    image = rank_list_image(
        queries.path.tolist(),
        [visible.path[row].tolist() for row in order],
        [(visible.identity[row] == person).tolist() for person, row in zip(people, order, strict=True)],
    )
    with whole_file(path) as temporary:
        image.save(temporary, format='PNG')


def _say(summary: dict[str, Any]) -> None:
    rows = (
        ('untrained network', 'untrained'),
        ('weights in the package', 'embedded'),
        ('after fine-tuning', 'fine_tuned'),
        ('reloaded with timm', 'reloaded'),
    )
    lines = [f'{name:<24}{summary[key]["rank1"]:>8.1%}{summary[key]["mAP"]:>8.1%}' for name, key in rows]
    _logger.info(
        '\n'.join(
            [
                '',
                f'{TEST_IDENTITIES} people never seen, infrared searches visible',
                f'{"":<24}{"rank-1":>8}{"mAP":>8}',
                *lines,
                '',
                f'Model:   {summary["model"]}',
                f'Image: {summary["image"]}',
                'On your own images (root/train/visible/<person>/..., root/train/infrared/<person>/...):',
                f'  vireid train --data-dir ROOT --model {WEIGHTS} --pretrained --backbone-lr-scale 1 \\',
                '      --opt adamw --lr 0.001 --weight-decay 0.02 --sched cosine --warmup-epochs 0 --epochs 20',
            ]
        )
    )
