"""From a model and a dataset to numbers that can be compared: features once, then every protocol and trial."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..constants import RERANKINGS
from ..data.records import Dataset, Records
from ..data.store import ImageStore
from ..version import package_versions
from .features import (
    Extraction,
    check_finite,
    extract,
    image_size,
    open_store,
    require_dual_stream,
    weights_fingerprint,
)
from .metrics import Ranker, RankMetrics, check_similarity, chunks
from .protocols import Protocol, draw_trials, ignore_keys, protocol_of, protocols_of
from .report import Report, relative_paths, summarise
from .reranking import ReRanking

ANSWERS = 5  # first answers that are named for each of the worst queries

Rows = tuple[np.ndarray, np.ndarray]  # of the queries and of the gallery of one trial


@dataclass(frozen=True, eq=False)
class _Plan:
    """What one protocol wants ranked."""

    name: str
    rule: Protocol
    trials: list[Rows]


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    protocol: str | Sequence[str] | None = None,
    *,
    draw: str = 'seeded',
    reranking: str = 'none',
    failures: int = 0,
    store: ImageStore | None = None,
    **options: Any,
) -> Report:
    """Evaluate a model on a dataset's test images: features once, then every protocol with all its trials.

    The model is left as it was: on its device, every module in the mode that it was in. Under `torchrun` all processes
    make this call, share the images among them, and get the same report.

    Args:
        model: One of this package's models, with or without classifiers.
        dataset: As `create_dataset` returns it.
        protocol: A name or several of `protocols_of(dataset)`; None for all of them.
        draw: How protocols that draw images do so, see `protocol_trials`.
        reranking: `none`, `k-reciprocal` or `cross-modality`, see `ReRanking`.
        failures: How many of the worst queries each result names.
        store: The images of `dataset.test`, row by row, where they are decoded already; None decodes them.
        options: How features are extracted: fields of `Extraction`, e.g. `flip_test=True`, `size=(288, 144)`,
            `batch_size=64`, `device='cuda'`, `skip_broken=True`.

    Raises:
        ValueError: On an unknown protocol, draw, re-ranking or kind of features, on data that the protocol cannot use,
            on a store of other images, on an image that cannot be read, or on features that are not finite.
        TypeError: On an option that is none of `Extraction`.
    """
    # Everything that can be wrong without looking at an image is found before the first one is decoded.
    extraction = Extraction(**options)
    require_dual_stream(model)
    _check_ranking(reranking, failures)
    plans = _plans(dataset, protocol, draw)
    if store is None:  # of the whole table, so that every choice of protocols shares it
        store = open_store(model, dataset.test, extraction)
    elif (len(store), store.size) != (len(dataset.test), image_size(model, extraction)):
        raise ValueError(
            f'the store has {len(store)} images of {store.size}, {dataset.name} {len(dataset.test)} to be seen as '
            f'{image_size(model, extraction)}; give the store of this table, or none'
        )
    if store.broken:
        plans = [_without(plan, store.intact()) for plan in plans]
    rows = _rows_of(plans)
    features = extract(model, dataset.test[rows], store, rows, extraction)
    if len(rows) < len(dataset.test):  # a row that no trial needs is NaN
        found, features = features, features.new_full((len(dataset.test), features.shape[1]), torch.nan)
        features[_on(found, rows)] = found
    return dataclasses.replace(
        _report(features, dataset, plans, draw, reranking, failures),
        model=(getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        weights=weights_fingerprint(model),
        features=extraction.features,
        flip_test=extraction.flip_test,
        crops=extraction.crops,
        size=image_size(model, extraction),
        precision=str(extraction.amp_dtype or next(model.parameters()).dtype).removeprefix('torch.'),
        skipped_images=len(store.broken),
    )


def evaluate_features(
    features: torch.Tensor | np.ndarray,
    dataset: Dataset,
    protocol: str | Sequence[str] | None = None,
    *,
    draw: str = 'seeded',
    reranking: str = 'none',
    failures: int = 0,
) -> Report:
    """The second half of `evaluate`: from features, wherever they come from, to a report.

    Args:
        features: One row per row of `dataset.test`, compared by inner product: for cosine similarity they have to be
            L2-normalised, as those of `embed` are, [N, D]. Rows that no trial of the protocols needs may hold anything.
            Ranks are counted where they are, on the CPU or an accelerator.
        dataset: As `create_dataset` returns it.
        protocol: A name or several of `protocols_of(dataset)`; None for all of them.
        draw: How protocols that draw images do so, see `protocol_trials`.
        reranking: `none`, `k-reciprocal` or `cross-modality`, see `ReRanking`, which takes features as L2-normalised.
        failures: How many of the worst queries each result names.

    Raises:
        ValueError: On features that do not fit the dataset or are not finite, on an unknown protocol, draw or
            re-ranking, or on data that the protocol cannot use.
    """
    if isinstance(features, np.ndarray):
        features = torch.from_numpy(np.require(features, requirements=['C', 'W']))  # a read-only map is legal too
    features = features.detach()
    if features.ndim != 2 or len(features) != len(dataset.test) or not features.is_floating_point():
        raise ValueError(
            f'features must be floating point [{len(dataset.test)}, D], one row per test image of {dataset.name}, '
            f'got {features.dtype} {list(features.shape)}'
        )
    _check_ranking(reranking, failures)
    plans = _plans(dataset, protocol, draw)
    features = features if features.dtype == torch.float64 else features.float()
    return _report(features, dataset, plans, draw, reranking, failures)


def _check_ranking(reranking: str, failures: int) -> None:
    if reranking not in RERANKINGS:
        raise ValueError(f'unknown reranking {reranking!r}; expected one of {", ".join(RERANKINGS)}')
    if failures < 0:
        raise ValueError(f'failures must be at least 0, got {failures}')


def _plans(dataset: Dataset, protocol: str | Sequence[str] | None, draw: str) -> list[_Plan]:
    names = [protocol] if isinstance(protocol, str) else list(protocols_of(dataset) if protocol is None else protocol)
    if not names:
        raise ValueError(
            f'{dataset.name} has no test images that one modality could search for among the other'
            if protocol is None
            else f'no protocol to evaluate; available for {dataset.name}: {", ".join(protocols_of(dataset))}'
        )
    names = dict.fromkeys(names)
    return [_Plan(name, protocol_of(dataset, name), draw_trials(dataset, name, draw)) for name in names]


def _without(plan: _Plan, intact: np.ndarray) -> _Plan:
    """The plan without broken images: the others stay the very ones that were drawn."""
    trials = [(query[np.isin(query, intact)], gallery[np.isin(gallery, intact)]) for query, gallery in plan.trials]
    return dataclasses.replace(plan, trials=trials)


def _rows_of(plans: Sequence[_Plan]) -> np.ndarray:
    """Rows of the test table that any trial needs, each once, sorted."""
    sides = [rows for plan in plans for trial in plan.trials for rows in trial]
    return np.unique(np.concatenate(sides))


def _report(
    features: torch.Tensor,
    dataset: Dataset,
    plans: Sequence[_Plan],
    draw: str,
    reranking: str,
    failures: int,
) -> Report:
    if not torch.stack(features.aminmax()).isfinite().all():  # perhaps in rows that nobody needs
        rows = _rows_of(plans)
        check_finite(features[_on(features, rows)], dataset.test.path[rows])
    metrics = _rank(features, dataset, plans, reranking)
    paths = relative_paths(dataset.root, dataset.test.path.tolist())
    images = hashlib.sha256('\n'.join(paths).encode())
    results = {}
    for plan in plans:
        result = summarise(
            [(query, found) for (query, _), found in zip(plan.trials, metrics[plan.name], strict=True)],
            dataset.test,
            root=dataset.root,
            direction=plan.rule.direction,
            draw=None if plan.rule.shots is None else draw,
            per_identity_cmc=plan.rule.per_identity_cmc,
            gallery_size=len(plan.trials[0][1]),
            trials_fingerprint=_fingerprint(images.copy(), plan.trials),
        )
        worst = _failures(features, dataset, plan, metrics[plan.name][0], reranking, failures) if failures else []
        results[plan.name] = dataclasses.replace(result, failures=worst)
    return Report(
        dataset=dataset.name,
        options=json.loads(json.dumps(dataset.options, default=str)),  # as they will be read back
        protocols=results,
        reranking=reranking,
        versions=package_versions(),
    )


def _rank(
    features: torch.Tensor,
    dataset: Dataset,
    plans: Sequence[_Plan],
    reranking: str,
) -> dict[str, list[RankMetrics]]:
    """Metrics of every trial, by the name of its protocol."""
    # Integers compare and hash faster than names do.
    _, identities = np.unique(dataset.test.identity, return_inverse=True)
    results: dict[str, list[RankMetrics]] = {plan.name: [] for plan in plans}
    for group in _groups(plans, reranking):
        query, gallery = (np.unique(np.concatenate(sides)) for sides in zip(*(trial for _, trial in group)))
        similarity = _similarity(features, dataset.test, query, gallery, reranking)
        keys = _ignore_keys(features, dataset, group[0][0])
        ranker = Ranker(identities[gallery])
        searches = [
            ranker.search(np.searchsorted(gallery, columns), plan.rule.per_identity_cmc) for plan, (_, columns) in group
        ]
        parts = []
        for rows in chunks(len(query), len(gallery)):
            values = similarity(rows)
            check_similarity(values, rows.start)
            ignore = None if keys is None else keys[query[rows]][:, None] == keys[gallery]
            parts.append(ranker.rank(values, identities[query[rows]], ignore, searches))
        for (plan, (searching, _)), found in zip(group, zip(*parts, strict=True), strict=True):
            chosen = np.searchsorted(query, searching)
            columns = (torch.cat(column).cpu().numpy()[chosen] for column in zip(*found, strict=True))
            results[plan.name].append(RankMetrics.of_queries(*columns))
    return results


def _groups(plans: Sequence[_Plan], reranking: str) -> list[list[tuple[_Plan, Rows]]]:
    """Trials that one similarity matrix serves: all that search in the same direction, unless neighbours matter."""
    trials = [(plan, trial) for plan in plans for trial in plan.trials]
    if reranking != 'none':
        return [[trial] for trial in trials]
    groups: dict[tuple[Any, ...], list[tuple[_Plan, Rows]]] = {}
    for plan, trial in trials:
        groups.setdefault((plan.rule.query_modalities, plan.rule.gallery_modalities, plan.rule.ignores), []).append(
            (plan, trial)
        )
    return list(groups.values())


def _similarity(
    features: torch.Tensor,
    records: Records,
    query: np.ndarray,
    gallery: np.ndarray,
    reranking: str,
) -> Callable[[slice], torch.Tensor]:
    """What gives the similarities [q, G] of some of the queries."""
    searched = features[_on(features, gallery)]
    if reranking == 'none':
        return lambda rows: features[_on(features, query[rows])] @ searched.T
    neighbours: dict[str, np.ndarray] = {'query_in_gallery': _places(query, gallery)}
    if reranking == 'cross-modality':
        neighbours.update(query_modality=records.modality[query], gallery_modality=records.modality[gallery])
    return ReRanking(features[_on(features, query)], searched, **neighbours).similarity


def _places(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Where in the gallery each query's own image is, -1 where it is not, [Q] int64."""
    order = np.argsort(gallery)
    places = order[np.searchsorted(gallery[order], query).clip(max=len(gallery) - 1)]
    return np.where(gallery[places] == query, places, -1)


def _ignore_keys(features: torch.Tensor, dataset: Dataset, plan: _Plan) -> torch.Tensor | None:
    keys = ignore_keys(dataset.test, plan.rule.ignores)
    return None if keys is None else _on(features, keys)


def _failures(
    features: torch.Tensor,
    dataset: Dataset,
    plan: _Plan,
    metrics: RankMetrics,
    reranking: str,
    count: int,
) -> list[dict[str, Any]]:
    """The worst queries of the first trial, with what they were answered."""
    query, gallery = plan.trials[0]
    worst = np.argsort(metrics.ap, kind='stable')[: min(count, metrics.num_valid_queries)]  # NaN comes last
    similarity = _similarity(features, dataset.test, query, gallery, reranking)
    keys = _ignore_keys(features, dataset, plan)
    listed = []
    for i in worst.tolist():
        values = similarity(slice(i, i + 1))[0]
        if keys is not None:
            values = values.masked_fill(keys[query[i]] == keys[gallery], -torch.inf)
        # Fewer where the query may not even see as many.
        answers = gallery[values.topk(min(ANSWERS, int(values.isfinite().sum()))).indices.cpu().numpy()]
        listed.append(
            {
                **_description(dataset, query[i]),
                'camera': int(dataset.test.camera[query[i]]),
                'modality': str(dataset.test.modality[query[i]]),
                'AP': float(metrics.ap[i]),
                'rank': int(metrics.rank[i]),
                'found': [_description(dataset, row) for row in answers],
            }
        )
    return listed


def _description(dataset: Dataset, row: int) -> dict[str, str]:
    (path,) = relative_paths(dataset.root, [str(dataset.test.path[row])])
    return {'path': path, 'identity': str(dataset.test.identity[row])}


def _fingerprint(images: Any, trials: Sequence[Rows]) -> str:
    """Of the table's images, whose hash is given, and of those that make up the trials: 12 digits."""
    for query, gallery in trials:
        for rows in (query, gallery):
            images.update(np.append(len(rows), rows).astype('<i8').tobytes())
    return images.hexdigest()[:12]


def _on(features: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """Integers where the features are."""
    return torch.from_numpy(values).to(features.device)
