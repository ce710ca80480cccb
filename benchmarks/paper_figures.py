"""Figures 5 and 6 of the paper, of networks that `paper.py` has trained, and what they show as numbers."""

from pathlib import Path

import numpy as np
import torch

import vireid_timm
from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.evaluation.confidence import bootstrap_intervals
from vireid_timm.figures.charts import require_matplotlib
from vireid_timm.figures.examples import SIZE, rank_row
from vireid_timm.figures.explain import explain, require_captum, save_cams
from vireid_timm.figures.rank_list import rank_list_image
from vireid_timm.files import whole_file

PEOPLE = 200  # at most, whose attentive maps are measured
DRAWN = 4  # people in figure 5, queries in figure 6


def require_extras(what: list[str]) -> None:
    """Check that what a figure draws with is installed.

    Raises:
        ValueError: It is not.
    """
    if 'fig5' in what:
        require_captum()
        require_matplotlib()


def attentive_maps(model: torch.nn.Module, dataset: vireid_timm.Dataset, path: Path) -> str:
    """Draw figure 5: Grad-CAM of the global and the fusion branch, for an image of some people in each modality.

    The paper sees more red in the maps of the fusion branch. Here it is a number: the share of the map that is above
    half of its maximum, averaged over more people than are drawn. The two maps have one grid, layer4's.

    Args:
        model: With a fusion branch.
        dataset: Its test images are shown.
        path: PNG file.

    Returns:
        The numbers as a sentence.
    """
    rows = one_row_each(dataset.test)[:PEOPLE]
    images = [(str(dataset.test.path[row]), str(dataset.test.modality[row])) for row in rows.ravel()]
    explanations = [explain(model, [image], 'after-bn')[0] for image in images]
    save_cams(explanations[: 2 * DRAWN], path)
    shares = np.asarray([[(cam > cam.max() / 2).mean() for cam in each.cams.values()] for each in explanations])
    empty = (shares == 0).sum(axis=0)  # nothing in these images raises the score
    more = shares[:, 1] - shares[:, 0]
    ((low, high),) = 100 * bootstrap_intervals(more.reshape(rows.shape).mean(axis=1)[None])
    means = 100 * shares.mean(axis=0)
    return (
        f'Grad-CAM is above half of its maximum in {means[0]:.1f} % of the area in the global branch and in '
        f'{means[1]:.1f} % in the fusion branch: {means[1] - means[0]:+.1f} (95 %: {low:+.1f} to {high:+.1f}, over '
        f'{len(rows)} people), and more in {(more > 0).mean():.0%} of {len(images)} images. '
        f'Maps without any area: {empty[0]} and {empty[1]}.'
    )


def one_row_each(records: vireid_timm.Records) -> np.ndarray:
    """The first visible and the first infrared row of each person who has both, [people, 2]."""
    first: dict[str, dict[str, int]] = {VISIBLE: {}, INFRARED: {}}
    for row, (identity, modality) in enumerate(zip(records.identity.tolist(), records.modality.tolist(), strict=True)):
        first[modality].setdefault(identity, row)
    return np.asarray([(row, first[INFRARED][name]) for name, row in first[VISIBLE].items() if name in first[INFRARED]])


def rank_lists(models: dict[str, torch.nn.Module], dataset: vireid_timm.Dataset, protocol: str, path: Path) -> str:
    """Draw figure 6: the first ten results of the same random queries in each of some networks.

    Args:
        models: Name -> network.
        dataset: Its test images are searched.
        protocol: The first trial of this protocol is drawn.
        path: PNG file.

    Returns:
        Their matches, and mAP over all queries, as a sentence.
    """
    results = {
        name: vireid_timm.evaluate(model, dataset, protocol, examples=DRAWN, features='after-bn')[protocol]
        for name, model in models.items()
    }
    examples = {name: result.examples['random'] for name, result in results.items()}  # the same draw for each network
    rows = [
        rank_row(example, dataset.root, name)
        for same_query in zip(*examples.values(), strict=True)
        for name, example in zip(examples, same_query, strict=True)
    ]
    with whole_file(path) as temporary:
        rank_list_image(rows, SIZE).save(temporary, format='PNG')
    found = {
        name: sum(answer['identity'] == example['identity'] for example in listed for answer in example['found'])
        for name, listed in examples.items()
    }
    counts = ', '.join(f'{name} {count}' for name, count in found.items())
    scores = ', '.join(f'{name} {100 * result.mean["mAP"]:.1f}' for name, result in results.items())
    return f'{protocol}, matches among the first ten of {len(rows) // len(models)} random queries: {counts}. ' + (
        f'mAP over all queries: {scores}.'
    )
