"""Evaluate a model on a dataset: extract features once, then run every protocol with all its trials."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..constants import RERANKINGS, RETRIEVALS
from ..data.records import Dataset, Records
from ..data.store import ImageStore
from ..distributed import all_ranks
from ..options import LARGEST_SEED, check_range
from ..version import package_versions
from .calibration import Calibration, Pairs, fit_calibration, reliability
from .features import (
    Extraction,
    as_tensor,
    check_finite,
    extract,
    feature_kind,
    feature_settings,
    image_size,
    open_store,
    require_dual_stream,
    tracklet_features,
    weights_fingerprint,
)
from .metrics import Ranker, RankMetrics, check_similarity, chunks
from .protocols import Protocol, draw_trials, ignore_keys, protocol_of, protocols_of
from .report import FEW_PEOPLE, Report, mean_decisions, mean_metrics, relative_paths, summarise
from .reranking import ReRanking
from .verification import SHARES, PairFinder

_logger = logging.getLogger(__name__)

ANSWERS = 10  # gallery images listed for each query that a report describes

Rows = tuple[np.ndarray, np.ndarray]  # rows of a trial's queries and of its gallery
Found = tuple[RankMetrics, dict[str, float | None]]  # ranks and decisions of a trial


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
    calibration: Calibration | None = None,
    store: ImageStore | None = None,
    **options: Any,
) -> Report:
    """Evaluate a model on a dataset's test images: extract features once, then run every protocol and trial.

    The pass gives the features before and after the BN-neck. The report is about those that `features` names; without
    re-ranking it has the metrics of the others, too, see `ProtocolResult.other_features`.

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
        calibration: What predicts probabilities, to be compared with what is true; ignored with a warning if it was
            fitted with other settings.
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
    calibration = _applicable(calibration, _settings(model, extraction, dataset), reranking)
    kind = feature_kind(model, extraction.features)
    others = [other for other in RETRIEVALS if other != kind and reranking == 'none']
    tables, plans, num_broken = _test_features(model, dataset, plans, store, extraction, [kind, *others])
    report = _report(tables[0], dataset, plans, draw, reranking, failures, examples, calibration)
    if others:
        report = _with_other_features(report, tables[1], dataset, plans)
    return dataclasses.replace(
        report,
        model=(getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        weights=weights_fingerprint(model),
        features=kind,
        flip_test=extraction.flip_test,
        crops=extraction.crops,
        centre=extraction.centre,
        size=image_size(model, extraction),
        precision=str(extraction.amp_dtype or next(model.parameters()).dtype).removeprefix('torch.'),
        skipped_images=num_broken,
    )


def calibrate(
    model: nn.Module,
    dataset: Dataset,
    protocol: str | Sequence[str] | None = None,
    *,
    draw: str = 'seeded',
    seed: int = 0,
    store: ImageStore | None = None,
    **options: Any,
) -> Calibration:
    """Fit a calibration to a dataset's test images, of people that the model was not trained on.

    Args:
        model: As for `evaluate`.
        dataset: As for `evaluate`.
        protocol: Protocols across the modalities whose pairs are used, those of all trials; None for the first of each
            direction.
        draw: As for `evaluate`.
        seed: Of the sample of pairs, if there are many.
        store: As for `evaluate`.
        options: As for `evaluate`.

    Raises:
        ValueError: As for `evaluate`; there are too few people or queries; or the features do not tell people apart.
    """
    extraction, model, plans = all_ranks(
        lambda: (Extraction(**options), require_dual_stream(model), _crossing_plans(dataset, protocol, draw, seed))
    )
    kinds = [feature_kind(model, extraction.features)]
    (features,), plans, _ = _test_features(model, dataset, plans, store, extraction, kinds)
    return _fit(features, dataset, plans, draw, _settings(model, extraction, dataset), seed)


def calibrate_features(
    features: torch.Tensor | np.ndarray,
    dataset: Dataset,
    protocol: str | Sequence[str] | None = None,
    *,
    draw: str = 'seeded',
    seed: int = 0,
) -> Calibration:
    """Fit a calibration to given features: the second half of `calibrate`. It has no settings, so it fits any.

    Args:
        features: As for `evaluate_features`, L2-normalised.
        dataset: As for `calibrate`.
        protocol: As for `calibrate`.
        draw: As for `calibrate`.
        seed: As for `calibrate`.

    Raises:
        ValueError: The features do not fit the dataset, or as for `calibrate`.
    """
    features = _checked_features(features, dataset)
    return _fit(features, dataset, _crossing_plans(dataset, protocol, draw, seed), draw, {}, seed)


def evaluate_features(
    features: torch.Tensor | np.ndarray,
    dataset: Dataset,
    protocol: str | Sequence[str] | None = None,
    *,
    draw: str = 'seeded',
    reranking: str = 'none',
    failures: int = 0,
    examples: int = 0,
    calibration: Calibration | None = None,
) -> Report:
    """Evaluate given features: the second half of `evaluate`.

    Args:
        features: One row per row of `dataset.test`, compared by inner product: L2-normalise them for cosine similarity,
            as `embed` does, [N, D]. Rows that no trial needs may hold anything. The features of a tracklet's images are
            averaged. Ranks are computed on the device of the features.
        dataset: A dataset from `create_dataset`.
        protocol: One or several names from `protocols_of(dataset)`; None for all of them.
        draw: How trials are sampled, see `protocol_trials`.
        reranking: `none`, `k-reciprocal` or `cross-modality`, see `ReRanking`, which needs L2-normalised features.
        failures: Number of worst queries to list for each protocol.
        examples: Number of best, of worst and of random queries to list for each protocol, one per person.
        calibration: As for `evaluate`, but whether it is about such features is not checked; not with re-ranking.

    Raises:
        ValueError: The features do not fit the dataset or are not finite, a protocol, draw or re-ranking is unknown, or
            the protocol cannot use the data.
    """
    features = _checked_features(features, dataset)
    plans = _plans(dataset, protocol, draw, reranking, failures, examples)
    return _report(
        features, dataset, plans, draw, reranking, failures, examples, calibration if reranking == 'none' else None
    )


def _checked_features(features: torch.Tensor | np.ndarray, dataset: Dataset) -> torch.Tensor:
    features = as_tensor(features, 'features')
    if features.ndim != 2 or len(features) != len(dataset.test):
        raise ValueError(
            f'features must be [{len(dataset.test)}, D], one row per test image of {dataset.name}, '
            f'got {list(features.shape)}'
        )
    return _of_tracklets(features, np.arange(len(features)), dataset.test)


def _of_tracklets(features: torch.Tensor, rows: np.ndarray, records: Records) -> torch.Tensor:
    """Average the features of tracklets, and put all features into the rows that trials name.

    Args:
        features: Features of some images, [R, D].
        rows: Their rows, [R].
        records: The whole table, [N].

    Returns:
        Features of single images and of tracklets, these in the row of the first image; other rows are NaN, [N, D].
    """
    if records.tracklet is not None:
        features, rows = tracklet_features(features, records.first_rows()[rows])
    if len(rows) == len(records):
        return features
    table = features.new_full((len(records), features.shape[1]), torch.nan)
    table[_on_device(features, rows)] = features
    return table


def _settings(model: nn.Module, extraction: Extraction, dataset: Dataset) -> dict[str, Any]:
    return feature_settings(model, extraction, tracklets=dataset.test.tracklet is not None)


def _crossing_plans(dataset: Dataset, protocol: str | Sequence[str] | None, draw: str, seed: int) -> list[_Plan]:
    """Return the protocols for a calibration: those given, or the first one of each direction; check the seed."""
    check_range('seed', seed, maximum=LARGEST_SEED)
    plans = _plans(dataset, protocol, draw, 'none', 0, 0)
    if protocol is None:
        plans = [plan for plan in plans if plan.protocol.crosses]
        directions = [plan.protocol.direction for plan in plans]
        plans = [plan for i, plan in enumerate(plans) if directions.index(directions[i]) == i]
    same = [plan.protocol.name for plan in plans if not plan.protocol.crosses]
    if same:
        raise ValueError(
            f'a calibration is about images of different modalities, but protocol {same[0]} also pairs images of one'
        )
    _count_people(dataset, plans)  # too few are found before the work
    return plans


def _count_people(dataset: Dataset, plans: Sequence[_Plan]) -> int:
    """Count the people who are searched for; too few are an error."""
    rows = np.concatenate([query for plan in plans for query, _ in plan.trials])
    count = len(np.unique(dataset.test.identity[rows]))
    if count < FEW_PEOPLE:
        raise ValueError(f'a calibration needs at least {FEW_PEOPLE} people, and {dataset.name} has {count}')
    return count


def _fit(
    features: torch.Tensor,
    dataset: Dataset,
    plans: Sequence[_Plan],
    draw: str,
    settings: dict[str, Any],
    seed: int,
) -> Calibration:
    people = _count_people(dataset, plans)
    fitted_on = {
        'dataset': dataset.name,
        'options': plain_options(dataset),
        'split': 'test',
        'protocols': [plan.protocol.name for plan in plans],
        'draw': draw,
        'identities': people,
    }
    trials = [(plan, trial) for plan in plans for trial in plan.trials]
    num_pairs = sum(len(query) * len(gallery) for _, (query, gallery) in trials)
    parts = (part for plan, trial in trials for part in _pairs(features, dataset, plan.protocol, trial))
    return fit_calibration(parts, num_pairs, settings, fitted_on, seed)


def _test_features(
    model: nn.Module,
    dataset: Dataset,
    plans: list[_Plan],
    store: ImageStore | None,
    extraction: Extraction,
    kinds: Sequence[str],
) -> tuple[list[torch.Tensor], list[_Plan], int]:
    """Extract the features of the test images, at least of those that a trial needs.

    Returns:
        The features of each kind, of tracklets in the row of the first image, NaN where there are none, [N, D]; the
        trials without broken images; the number of these.
    """
    if store is None:  # decode the whole table, so that every choice of protocols shares the cache
        store = open_store(model, dataset.test, extraction)
    elif (len(store), store.size) != (len(dataset.test), image_size(model, extraction)):
        raise ValueError(
            f'the store has {len(store)} images of size {store.size}, but {dataset.name} needs {len(dataset.test)} of '
            f'size {image_size(model, extraction)}; give the store of this table, or None'
        )
    rows, first_rows = store.intact(), dataset.test.first_rows()
    if store.broken:
        plans = [_only_intact(plan, first_rows[rows]) for plan in plans]
    # The mean that centring subtracts must not depend on the choice of protocols.
    if not extraction.centre:
        rows = rows[np.isin(first_rows[rows], _rows_of(plans))]
    tables = extract(model, dataset.test[rows], store, rows, extraction, kinds)
    return [_of_tracklets(table, rows, dataset.test) for table in tables], plans, len(store.broken)


def _applicable(calibration: Calibration | None, settings: dict[str, Any], reranking: str) -> Calibration | None:
    """Return the calibration if it is about these similarities; otherwise None, saying why."""
    if calibration is None:
        return None
    reason = calibration.mismatch(settings) or ('' if reranking == 'none' else 'reranking')
    if reason:
        _logger.warning(f'The calibration of this model is ignored: it was fitted with other settings ({reason})')
    return None if reason else calibration


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
    """Remove broken images, and tracklets without an intact one, from the trials, without sampling others instead."""
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
    calibration: Calibration | None = None,
) -> Report:
    _check_needed(features, dataset, plans)
    found = _rank(features, dataset, plans, reranking)
    paths = relative_paths(dataset.root, dataset.test.path.tolist())
    images = hashlib.sha256('\n'.join(paths).encode('utf-8', 'surrogatepass'))  # names may be in another encoding
    results = {}
    for plan in plans:
        protocol, trials = plan.protocol, plan.trials
        result = summarise(
            [(query, metrics) for (query, _), (metrics, _) in zip(trials, found[protocol.name], strict=True)],
            dataset.test,
            root=dataset.root,
            direction=protocol.direction,
            draw=None if protocol.shots is None else draw,
            per_identity_cmc=protocol.per_identity_cmc,
            gallery_size=len(trials[0][1]),
            trials_fingerprint=_fingerprint(images.copy(), trials),
        )
        listed = {}
        if failures or examples:
            ranks = found[protocol.name][0][0]
            chosen = _chosen(ranks, dataset.test.identity[trials[0][0]], failures, examples)
            listed = _described(features, dataset, plan, ranks, reranking, chosen)
        results[protocol.name] = dataclasses.replace(
            result,
            decisions=mean_decisions([decided for _, decided in found[protocol.name]]),
            calibration=_reliability(features, dataset, plan, calibration),
            failures=listed.pop('failures', []),
            examples=listed,
        )
    return Report(
        dataset=dataset.name,
        options=plain_options(dataset),
        protocols=results,
        reranking=reranking,
        calibration=None if calibration is None else calibration.fitted_on,
        versions=package_versions(),
    )


def _check_needed(features: torch.Tensor, dataset: Dataset, plans: Sequence[_Plan]) -> None:
    """Raise a ValueError if features that a trial needs are not finite; the other rows may be NaN."""
    if not torch.stack(features.aminmax()).isfinite().all():
        rows = _rows_of(plans)
        check_finite(features[_on_device(features, rows)], dataset.test.path[rows])


def _with_other_features(report: Report, features: torch.Tensor, dataset: Dataset, plans: Sequence[_Plan]) -> Report:
    """Return a report that has the metrics of other features, too, if these are finite."""
    try:
        _check_needed(features, dataset, plans)
    except ValueError:  # nobody asked for these
        return report
    found = _rank(features, dataset, plans, 'none')
    results = {
        name: dataclasses.replace(result, other_features=mean_metrics([ranks for ranks, _ in found[name]]))
        for name, result in report.protocols.items()
    }
    return dataclasses.replace(report, protocols=results)


def plain_options(dataset: Dataset) -> dict[str, Any]:
    """Return a dataset's options as JSON holds them."""
    return json.loads(json.dumps(dataset.options, default=str))


def _pairs(features: torch.Tensor, dataset: Dataset, protocol: Protocol, trial: Rows) -> Iterator[Pairs]:
    """Yield the pairs of a trial, a chunk of queries at a time."""
    query, gallery = trial
    _, identities = np.unique(dataset.test.identity, return_inverse=True)
    identities = _on_device(features, identities)
    keys = ignore_keys(dataset.test, protocol.ignores)
    keys = None if keys is None else _on_device(features, keys)
    similarity = _similarity(features, dataset.test, query, gallery, 'none')
    for rows in chunks(len(query), len(gallery)):
        yield Pairs(
            similarity(rows),
            identities[query[rows]][:, None] == identities[gallery],
            None if keys is None else keys[query[rows]][:, None] == keys[gallery],
        )


def _reliability(
    features: torch.Tensor,
    dataset: Dataset,
    plan: _Plan,
    calibration: Calibration | None,
) -> dict[str, dict[str, Any]] | None:
    """Compare a calibration with the first trial; None if there is none or it is not about such pairs."""
    if calibration is None or not plan.protocol.crosses:
        return None
    gallery = plan.trials[0][1]
    images_per_person = len(gallery) / len(np.unique(dataset.test.identity[gallery]))
    return reliability(_pairs(features, dataset, plan.protocol, plan.trials[0]), calibration, images_per_person)


def _rank(
    features: torch.Tensor,
    dataset: Dataset,
    plans: Sequence[_Plan],
    reranking: str,
) -> dict[str, list[Found]]:
    """Return what every trial gave, by the name of its protocol."""
    _, identities = np.unique(dataset.test.identity, return_inverse=True)  # integers are faster than names
    results: dict[str, list[Found]] = {plan.protocol.name: [] for plan in plans}
    for group in _groups(plans, reranking):
        for (plan, _), found in zip(group, _rank_group(features, dataset, identities, group, reranking), strict=True):
            results[plan.protocol.name].append(found)
    return results


def _rank_group(
    features: torch.Tensor,
    dataset: Dataset,
    identities: np.ndarray,
    group: list[tuple[_Plan, Rows]],
    reranking: str,
) -> list[Found]:
    """Return what the trials of a group gave, which share their similarities."""
    query, gallery = (np.unique(np.concatenate(sides)) for sides in zip(*(trial for _, trial in group)))
    similarity = _similarity(features, dataset.test, query, gallery, reranking)
    keys = ignore_keys(dataset.test, group[0][0].protocol.ignores)
    ranker = Ranker(identities[gallery])
    galleries = [
        ranker.gallery(np.searchsorted(gallery, rows), plan.protocol.per_identity_cmc) for plan, (_, rows) in group
    ]
    sides = None if keys is None else (_on_device(features, keys[query]), _on_device(features, keys[gallery]))
    finder = PairFinder(ranker, identities[query], sides, features.device)
    floor = finder.floor(similarity, SHARES[0])
    ranked, near = [], []
    for rows in chunks(len(query), len(gallery)):
        values = similarity(rows)
        check_similarity(values, rows.start)
        ignore = None if sides is None else sides[0][rows, None] == sides[1]
        ranked.append(ranker.rank(values, identities[query[rows]], ignore, galleries))
        near.append(finder.find(values, rows.start, floor))
    trials = [(np.searchsorted(query, rows), np.searchsorted(gallery, columns)) for _, (rows, columns) in group]
    decisions = finder.decide(near, trials)
    for share in SHARES[1:]:
        if None in decisions:  # a gallery of people who are less similar than those of the others
            floor = finder.floor(similarity, share)
            near = [finder.find(similarity(rows), rows.start, floor) for rows in chunks(len(query), len(gallery))]
            decisions = finder.decide(near, trials)
    found = []
    for (rows, _), parts, decided in zip(trials, zip(*ranked, strict=True), decisions, strict=True):
        values = (torch.cat(column).cpu().numpy()[rows] for column in zip(*parts, strict=True))
        found.append((RankMetrics.of_queries(*values), decided))
    return found


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
