"""Evaluate a model on a dataset: extract features once, then run every protocol with all its trials."""

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
from ..distributed import all_ranks
from ..options import check_range
from ..version import package_versions
from .features import (
    Extraction,
    as_tensor,
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

ANSWERS = 10  # gallery images listed for each query that a report describes

Rows = tuple[np.ndarray, np.ndarray]  # rows of a trial's queries and of its gallery


@dataclass(frozen=True, eq=False)
class _Plan:
    """A protocol and its trials."""

    protocol: Protocol
    trials: list[Rows]


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    protocol: str | Sequence[str] | None = None,
    *,
    draw: str = 'seeded',
    reranking: str = 'none',
    failures: int = 0,
    examples: int = 0,
    store: ImageStore | None = None,
    **options: Any,
) -> Report:
    """Evaluate a model on a dataset's test images: extract features once, then run every protocol and trial.

    Leaves the model on its device and its modules in their modes. Under `torchrun` every rank must make this call; the
    ranks share the images and return the same report.

    Args:
        model: A model of this package, with or without classifiers, compiled, or wrapped for parallel training.
        dataset: A dataset from `create_dataset`.
        protocol: One or several names from `protocols_of(dataset)`; None for all of them.
        draw: How trials are sampled, see `protocol_trials`.
        reranking: `none`, `k-reciprocal` or `cross-modality`, see `ReRanking`.
        failures: Number of worst queries to list for each protocol.
        examples: Number of best, of worst and of random queries to list for each protocol, one per person.
        store: The decoded images of `dataset.test`, row by row; None decodes them.
        options: Fields of `Extraction`, e.g. `flip_test=True`, `size=(288, 144)`, `batch_size=64`, `device='cuda'`,
            `skip_broken=True`.

    Raises:
        ValueError: A protocol, draw, re-ranking or feature type is unknown, the protocol cannot use the data, the store
            holds other images, an image cannot be read, or features are not finite.
        TypeError: An option is not a field of `Extraction`.
    """
    # Check everything that needs no image before decoding the first one.
    extraction, model, plans = all_ranks(
        lambda: (
            Extraction(**options),
            require_dual_stream(model),
            _plans(dataset, protocol, draw, reranking, failures, examples),
        )
    )
    if store is None:  # decode the whole table, so that every choice of protocols shares the cache
        store = open_store(model, dataset.test, extraction)
    elif (len(store), store.size) != (len(dataset.test), image_size(model, extraction)):
        raise ValueError(
            f'the store has {len(store)} images of size {store.size}, but {dataset.name} needs {len(dataset.test)} of '
            f'size {image_size(model, extraction)}; give the store of this table, or None'
        )
    if store.broken:
        plans = [_only_intact(plan, store.intact()) for plan in plans]
    rows = _rows_of(plans)
    features = extract(model, dataset.test[rows], store, rows, extraction)
    if len(rows) < len(dataset.test):  # rows that no trial needs are NaN
        extracted, features = features, features.new_full((len(dataset.test), features.shape[1]), torch.nan)
        features[_on_device(extracted, rows)] = extracted
    return dataclasses.replace(
        _report(features, dataset, plans, draw, reranking, failures, examples),
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
    examples: int = 0,
) -> Report:
    """Evaluate given features: the second half of `evaluate`.

    Args:
        features: One row per row of `dataset.test`, compared by inner product: L2-normalise them for cosine similarity,
            as `embed` does, [N, D]. Rows that no trial needs may hold anything. Ranks are computed on the device of
            the features.
        dataset: A dataset from `create_dataset`.
        protocol: One or several names from `protocols_of(dataset)`; None for all of them.
        draw: How trials are sampled, see `protocol_trials`.
        reranking: `none`, `k-reciprocal` or `cross-modality`, see `ReRanking`, which needs L2-normalised features.
        failures: Number of worst queries to list for each protocol.
        examples: Number of best, of worst and of random queries to list for each protocol, one per person.

    Raises:
        ValueError: The features do not fit the dataset or are not finite, a protocol, draw or re-ranking is unknown, or
            the protocol cannot use the data.
    """
    features = as_tensor(features, 'features')
    if features.ndim != 2 or len(features) != len(dataset.test):
        raise ValueError(
            f'features must be [{len(dataset.test)}, D], one row per test image of {dataset.name}, '
            f'got {list(features.shape)}'
        )
    plans = _plans(dataset, protocol, draw, reranking, failures, examples)
    return _report(features, dataset, plans, draw, reranking, failures, examples)


def _plans(
    dataset: Dataset, protocol: str | Sequence[str] | None, draw: str, reranking: str, failures: int, examples: int
) -> list[_Plan]:
    """Return what to evaluate, after a check of how."""
    if reranking not in RERANKINGS:
        raise ValueError(f'unknown reranking {reranking!r}; expected one of {", ".join(RERANKINGS)}')
    check_range('failures', failures)
    check_range('examples', examples)
    names = [protocol] if isinstance(protocol, str) else list(protocols_of(dataset) if protocol is None else protocol)
    if not names:
        raise ValueError(
            f'{dataset.name} has no test images of one modality to search among those of the other'
            if protocol is None
            else f'no protocol to evaluate; available for {dataset.name}: {", ".join(protocols_of(dataset))}'
        )
    return [_Plan(protocol_of(dataset, name), draw_trials(dataset, name, draw)) for name in dict.fromkeys(names)]


def _only_intact(plan: _Plan, intact: np.ndarray) -> _Plan:
    """Remove broken images from the trials, without sampling others instead."""
    trials = [(query[np.isin(query, intact)], gallery[np.isin(gallery, intact)]) for query, gallery in plan.trials]
    return dataclasses.replace(plan, trials=trials)


def _rows_of(plans: Sequence[_Plan]) -> np.ndarray:
    """Return the rows of the test table that any trial needs, sorted and unique."""
    sides = [rows for plan in plans for trial in plan.trials for rows in trial]
    return np.unique(np.concatenate(sides))


def _report(
    features: torch.Tensor,
    dataset: Dataset,
    plans: Sequence[_Plan],
    draw: str,
    reranking: str,
    failures: int,
    examples: int,
) -> Report:
    if not torch.stack(features.aminmax()).isfinite().all():  # rows that no trial needs may be NaN
        rows = _rows_of(plans)
        check_finite(features[_on_device(features, rows)], dataset.test.path[rows])
    metrics = _rank(features, dataset, plans, reranking)
    paths = relative_paths(dataset.root, dataset.test.path.tolist())
    images = hashlib.sha256('\n'.join(paths).encode('utf-8', 'surrogatepass'))  # names may be in another encoding
    results = {}
    for plan in plans:
        protocol, trials = plan.protocol, plan.trials
        result = summarise(
            [(query, found) for (query, _), found in zip(trials, metrics[protocol.name], strict=True)],
            dataset.test,
            root=dataset.root,
            direction=protocol.direction,
            draw=None if protocol.shots is None else draw,
            per_identity_cmc=protocol.per_identity_cmc,
            gallery_size=len(trials[0][1]),
            trials_fingerprint=_fingerprint(images.copy(), trials),
        )
        if failures or examples:
            found = metrics[protocol.name][0]
            chosen = _chosen(found, dataset.test.identity[trials[0][0]], failures, examples)
            listed = _described(features, dataset, plan, found, reranking, chosen)
            result = dataclasses.replace(result, failures=listed.pop('failures'), examples=listed)
        results[protocol.name] = result
    return Report(
        dataset=dataset.name,
        options=json.loads(json.dumps(dataset.options, default=str)),  # as a saved report holds them
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
    """Return the metrics of every trial, by the name of its protocol."""
    _, identities = np.unique(dataset.test.identity, return_inverse=True)  # integers are faster than names
    results: dict[str, list[RankMetrics]] = {plan.protocol.name: [] for plan in plans}
    for group in _groups(plans, reranking):
        query, gallery = (np.unique(np.concatenate(sides)) for sides in zip(*(trial for _, trial in group)))
        similarity = _similarity(features, dataset.test, query, gallery, reranking)
        keys = _ignore_keys(features, dataset, group[0][0])
        ranker = Ranker(identities[gallery])
        galleries = [
            ranker.gallery(np.searchsorted(gallery, rows), plan.protocol.per_identity_cmc) for plan, (_, rows) in group
        ]
        parts = []
        for rows in chunks(len(query), len(gallery)):
            values = similarity(rows)
            check_similarity(values, rows.start)
            ignore = None if keys is None else keys[query[rows]][:, None] == keys[gallery]
            parts.append(ranker.rank(values, identities[query[rows]], ignore, galleries))
        for (plan, (trial_query, _)), found in zip(group, zip(*parts, strict=True), strict=True):
            rows = np.searchsorted(query, trial_query)
            values = (torch.cat(column).cpu().numpy()[rows] for column in zip(*found, strict=True))
            results[plan.protocol.name].append(RankMetrics.of_queries(*values))
    return results


def _groups(plans: Sequence[_Plan], reranking: str) -> list[list[tuple[_Plan, Rows]]]:
    """Group trials that can share a similarity matrix: those of one direction, or each on its own if re-ranked."""
    trials = [(plan, trial) for plan in plans for trial in plan.trials]
    if reranking != 'none':  # similarities depend on the other images of the trial
        return [[trial] for trial in trials]
    groups: dict[tuple[Any, ...], list[tuple[_Plan, Rows]]] = {}
    for plan, trial in trials:
        protocol = plan.protocol
        key = (protocol.query_modalities, protocol.gallery_modalities, protocol.ignores)
        groups.setdefault(key, []).append((plan, trial))
    return list(groups.values())


def _similarity(
    features: torch.Tensor,
    records: Records,
    query: np.ndarray,
    gallery: np.ndarray,
    reranking: str,
) -> Callable[[slice], torch.Tensor]:
    """Return a function that computes the similarities [q, G] of some of the queries."""
    gallery_features = features[_on_device(features, gallery)]
    if reranking == 'none':
        return lambda rows: features[_on_device(features, query[rows])] @ gallery_features.T
    options: dict[str, np.ndarray] = {'query_in_gallery': _index_in(gallery, query)}
    if reranking == 'cross-modality':
        options.update(query_modality=records.modality[query], gallery_modality=records.modality[gallery])
    return ReRanking(features[_on_device(features, query)], gallery_features, **options).similarity


def _index_in(gallery: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the index of each query's own image in the gallery, -1 if it is not there, [Q] int64."""
    order = np.argsort(gallery)
    index = order[np.searchsorted(gallery[order], query).clip(max=len(gallery) - 1)]
    return np.where(gallery[index] == query, index, -1)


def _ignore_keys(features: torch.Tensor, dataset: Dataset, plan: _Plan) -> torch.Tensor | None:
    keys = ignore_keys(dataset.test, plan.protocol.ignores)
    return None if keys is None else _on_device(features, keys)


def _chosen(metrics: RankMetrics, identities: np.ndarray, failures: int, examples: int) -> dict[str, Sequence[int]]:
    """Choose valid queries of a trial: the worst ones, and examples of different people."""
    ascending = np.argsort(metrics.ap, kind='stable')[: metrics.num_valid_queries]  # NaN comes last
    descending = np.argsort(-metrics.ap, kind='stable')[: metrics.num_valid_queries]
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(metrics.valid))
    chosen = {'failures': ascending[:failures].tolist()}
    for name, order in (('best', descending), ('worst', ascending), ('random', shuffled)) if examples else ():
        _, first = np.unique(identities[order], return_index=True)
        chosen[name] = order[np.sort(first)[:examples]].tolist()
    return chosen


def _described(
    features: torch.Tensor,
    dataset: Dataset,
    plan: _Plan,
    metrics: RankMetrics,
    reranking: str,
    chosen: dict[str, Sequence[int]],
) -> dict[str, list[dict[str, Any]]]:
    """Describe the chosen queries of the first trial with their first answers."""
    query, gallery = plan.trials[0]
    similarity = _similarity(features, dataset.test, query, gallery, reranking)
    keys = _ignore_keys(features, dataset, plan)

    def describe(i: int) -> dict[str, Any]:
        values = similarity(slice(i, i + 1))[0]
        if keys is not None:
            values = values.masked_fill(keys[query[i]] == keys[gallery], -torch.inf)
        # There are fewer if most of the gallery is ignored.
        best = values.topk(min(ANSWERS, int(values.isfinite().sum())))
        answers = zip(gallery[best.indices.cpu().numpy()], best.values.tolist(), strict=True)
        return {
            **_description(dataset, query[i]),
            'modality': str(dataset.test.modality[query[i]]),
            'AP': float(metrics.ap[i]),
            'rank': int(metrics.rank[i]),
            'found': [{**_description(dataset, row), 'similarity': round(value, 6)} for row, value in answers],
        }

    return {name: [describe(i) for i in rows] for name, rows in chosen.items()}


def _description(dataset: Dataset, row: int) -> dict[str, Any]:
    test = dataset.test
    (path,) = relative_paths(dataset.root, [str(test.path[row])])
    return {'path': path, 'identity': str(test.identity[row]), 'camera': int(test.camera[row])}


def _fingerprint(images: Any, trials: Sequence[Rows]) -> str:
    """Return 12 digits of a hash over the table's images (already in `images`) and the rows of the trials."""
    for query, gallery in trials:
        for rows in (query, gallery):
            images.update(np.append(len(rows), rows).astype('<i8').tobytes())
    return images.hexdigest()[:12]


def _on_device(features: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """Return integers as a tensor on the device of the features."""
    return torch.from_numpy(values).to(features.device)
