"""Features of a test set as charts: how similar pairs are, and where features lie in two dimensions."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..constants import MODALITIES
from ..data.records import Records
from ..evaluation.protocols import IGNORE_SAME_IDENTITY_MODALITY_AND_CAMERA, ignore_keys
from .charts import COLOURS, MARKERS, label, new_figure, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_IMAGES = 2000  # of a chart
PEOPLE = len(COLOURS)


def sample(records: Records, seed: int = 0) -> np.ndarray:
    """Return the sorted rows of all images, or of so many random people that they are not above `MOST_IMAGES`."""
    generator = np.random.default_rng(seed)
    people = generator.permutation(records.identities())
    counts = [int((records.identity == person).sum()) for person in people]
    enough = int(np.searchsorted(np.cumsum(counts), MOST_IMAGES, side='right'))
    rows = np.flatnonzero(np.isin(records.identity, people[: max(2, enough)]))
    return np.sort(generator.permutation(rows)[:MOST_IMAGES])


def save_similarities(features: torch.Tensor, records: Records, path: str | Path) -> None:
    """Plot histograms of the similarities of two images of the same person and of different people.

    Pairs of one modality and of two have a chart each. Pairs of one person from the same camera and modality are left
    out, as in the protocol `mixed`.

    Args:
        features: L2-normalised, [N, D].
        records: The images, [N].
        path: The PNG.
    """
    _, identity = np.unique(records.identity, return_inverse=True)
    keys = ignore_keys(records, IGNORE_SAME_IDENTITY_MODALITY_AND_CAMERA)
    first, second = np.triu_indices(len(records), k=1)
    first, second = (rows[keys[first] != keys[second]] for rows in (first, second))
    similarity = (features @ features.T).cpu().numpy()[first, second]
    bins = np.linspace(similarity.min(initial=1), similarity.max(initial=-1), 61)
    same = identity[first] == identity[second]
    within = records.modality[first] == records.modality[second]
    figure = new_figure(9, 3.6)
    charts = zip(figure.subplots(1, 2, sharex=True, sharey=True), (within, ~within), ('one modality', 'two modalities'))
    for axes, chosen, title in charts:
        for number, (name, pairs) in enumerate((('same person', same & chosen), ('different people', ~same & chosen))):
            if pairs.any():
                text = f'{name}: {pairs.sum():,} pairs, mean {similarity[pairs].mean():.2f}'
                _histogram(axes, similarity[pairs], bins, text, number)
        axes.set(title=f'images of {title}', xlabel='similarity')
        axes.grid(alpha=0.3)
        if axes.patches:
            axes.legend(fontsize=8, loc='upper left')
            axes.margins(y=0.25)
        else:
            axes.text(0.5, 0.5, 'no pairs', ha='center', transform=axes.transAxes)
    figure.supylabel('density', fontsize=10)
    save_figure(figure, path)


def _histogram(axes: 'Axes', values: np.ndarray, bins: np.ndarray, name: str, number: int) -> None:
    """Draw a histogram; hatching tells the two apart as well as their colours."""
    options = {'bins': bins, 'density': True, 'histtype': 'stepfilled', 'label': name}
    axes.hist(
        values, facecolor=COLOURS[number], edgecolor=COLOURS[number], alpha=0.5, hatch=('', '///')[number], **options
    )


def save_map(features: torch.Tensor, records: Records, path: str | Path, seed: int = 0) -> None:
    """Plot features on their first two principal components: all by modality, and those of a few people by identity.

    Args:
        features: [N, D].
        records: The images, [N].
        path: The PNG.
        seed: Of the choice of people.
    """
    figure = new_figure(10, 4.6)
    left, right = figure.subplots(1, 2)
    points, shares = principal_components(features)
    for number, modality in enumerate(MODALITIES):
        chosen = records.modality == modality
        if chosen.any():
            left.scatter(*points[chosen].T, s=14, alpha=0.6, linewidth=0, label=modality, **style(number))
    left.set_title(f'{len(records):,} images by modality')
    people = np.random.default_rng(seed).permutation(records.identities())[:PEOPLE]
    few = np.isin(records.identity, people)
    few_points, few_shares = principal_components(features[torch.from_numpy(few)])
    for number, person in enumerate(sorted(people.tolist())):
        for marker, modality in zip(MARKERS, MODALITIES):
            chosen = (records.identity[few] == person) & (records.modality[few] == modality)
            name = label(person) if modality == MODALITIES[0] else None
            options = {'s': 36, 'color': COLOURS[number], 'marker': marker, 'alpha': 0.8, 'linewidth': 0}
            right.scatter(*few_points[chosen].T, label=name, **options)
    right.set_title(f'{len(people)} people by identity')
    for axes, explained in ((left, shares), (right, few_shares)):
        for axis, number, share in zip((axes.xaxis, axes.yaxis), (1, 2), explained):
            axis.set_label_text(f'component {number}: {share:.0%} of the variance')
        axes.grid(alpha=0.3)
    left.legend()
    right.legend(
        title=' '.join(f'{sign} {modality}' for sign, modality in zip('●▲', MODALITIES)),
        fontsize=8,
        loc='center left',
        bbox_to_anchor=(1, 0.5),
    )
    save_figure(figure, path)


def principal_components(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Project features on their first two principal components.

    Args:
        features: [N, D].

    Returns:
        The projections, [N, 2], each with the sign that makes its largest value positive, and the share of the variance
        in each, [2].
    """
    centred = features.double() - features.double().mean(dim=0)
    variances, vectors = torch.linalg.eigh(centred @ centred.T)  # in ascending order
    variances = variances.clamp(min=0)
    points = (vectors * variances.sqrt())[:, -2:].flip(1)
    signs = points.gather(0, points.abs().argmax(dim=0, keepdim=True)).sign()
    shares = variances[-2:].flip(0) / variances.sum().clamp(min=1e-12)
    return (points * signs).cpu().numpy(), shares.cpu().numpy()
