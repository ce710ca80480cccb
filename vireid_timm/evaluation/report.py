"""Evaluation reports: results with all settings that affect them, as tables and files."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from ..constants import RETRIEVALS
from ..data.records import Records
from ..files import whole_file
from ..text import aligned
from .confidence import bootstrap_intervals
from .metrics import RankMetrics
from .verification import DECISIONS

RANKS = (1, 5, 10, 20)
MAX_RANK = RANKS[-1]  # of a CMC
METRICS = (*(f'rank{k}' for k in RANKS), 'mAP', 'mINP')
# Metrics that are means over queries -> the column of `ProtocolResult.queries` that they average.
COLUMN_OF = {'rank1': 'rank1', 'mAP': 'AP', 'mINP': 'INP'}
QUERY_COLUMNS = ('path', 'identity', 'camera', 'modality', *COLUMN_OF.values())
HEADER_OF = {'rank1': 'R1', 'rank5': 'R5', 'rank10': 'R10', 'rank20': 'R20', 'mAP': 'mAP', 'mINP': 'mINP'}
DECISION_HEADERS = dict(zip(DECISIONS, ('TAR@FAR 1%', 'TAR@FAR 0.1%', 'FNIR@FPIR 1%', 'FNIR@FPIR 10%'), strict=True))
# Parts of `ProtocolResult.calibration` whose error the table shows.
CALIBRATION_HEADERS = {'pairs': 'ECE pairs', 'first': 'ECE first 10', 'nobody': 'ECE nobody'}
ABSENT = '-'
FEW_PEOPLE, FEW_QUERIES = 10, 30  # with fewer, a result says little about other people

Trials = Sequence[tuple[np.ndarray, RankMetrics]]


@dataclass(frozen=True)
class ProtocolResult:
    """Result of one protocol.

    Attributes:
        direction: Who searches for whom, e.g. `infrared to visible`.
        draw: How the trials were sampled; None if every image takes part.
        per_identity_cmc: Whether the ranks count distinct identities rather than images.
        num_queries: Number of query images in a trial.
        num_valid_queries: Number of those with a match in the gallery; the metrics average over them.
        gallery_size: Number of gallery images in a trial.
        mean: Mean over the trials of `rank1`, `rank5`, `rank10`, `rank20`, `mAP` and `mINP`, as fractions.
        std: Standard deviation over the trials (NumPy's, divided by the number of trials); 0 for a single trial.
        intervals: 95 % bootstrap intervals of `rank1`, `mAP` and `mINP` over the queries, each query averaged over its
            trials.
        trials: The same metrics as `mean` for each trial.
        trials_fingerprint: Equal if the trials consist of the same images, so that results can be paired.
        queries: Columns of equal length, one value per query image: `path` (relative to the dataset's root if the file
            is there), `identity`, `camera`, `modality`, and `rank1`, `AP` and `INP`, averaged over the trials in which
            the query is valid, None if there are none.
        decisions: Mean over the trials of `tar_at_far_1e-2`, `tar_at_far_1e-3`, `fnir_at_fpir_1e-2` and
            `fnir_at_fpir_1e-1`, as fractions, None where there is nothing to decide; see `verification`. Empty in
            reports of earlier versions.
        calibration: How far predicted probabilities are true in the first trial, see `reliability`; None without a
            calibration, and where query and gallery share a modality.
        failures: The worst queries, if requested: `path`, `identity`, `camera`, `modality`, `AP`, `rank` of the first
            match, and `found`: `path`, `identity`, `camera` and `similarity` of the first answers.
        cmc: Share of the valid queries with a match among the first k, for k from 1 to 20: `mean` over the trials, and
            `low` and `high` of the 95 % bootstrap interval over the queries. Empty in reports of earlier versions.
        examples: `best`, `worst` and `random` queries of the first trial, if requested, described like `failures`; each
            list has a person once.
        other_features: The same metrics as `mean` with the features on the other side of the BN-neck. Empty if the
            features were given, with re-ranking, and in reports of earlier versions.
    """

    direction: str
    draw: str | None
    per_identity_cmc: bool
    num_queries: int
    num_valid_queries: int
    gallery_size: int
    mean: dict[str, float]
    std: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    trials: list[dict[str, float]]
    trials_fingerprint: str
    queries: dict[str, list[Any]]
    decisions: dict[str, float | None] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cmc: dict[str, list[float]] = field(default_factory=dict)
    other_features: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Results and all settings that affect them. Prints as a table in percent; `report[protocol]` is one result.

    Attributes:
        dataset: Name of the dataset.
        options: Resolved options of the dataset (RegDB's trial, SynthVI's seed, ...).
        protocols: Protocol name -> result.
        model: Architecture. Empty if the features were given; the fields from here to `centre`, `size` and `precision`
            then have no meaning.
        weights: Fingerprint of the weights, see `weights_fingerprint`.
        features: `after-bn` or `before-bn`.
        flip_test: Whether features are averaged over each image and its mirror image.
        crops: Number of crops that features are averaged over.
        centre: Whether each modality's mean feature over the test images is subtracted.
        reranking: `none`, `k-reciprocal` or `cross-modality`.
        size: Height and width of the input images.
        precision: Dtype that the network computed in, e.g. `float32`.
        skipped_images: Number of broken test images that were skipped.
        learned_identities: Number of test identities that the model was trained on, as far as `vireid eval` can tell.
        calibration: What the calibration that predicts probabilities was fitted on, see `Calibration`; None without.
        versions: Versions of the packages.
    """

    dataset: str
    options: dict[str, Any]
    protocols: dict[str, ProtocolResult]
    model: str = ''
    weights: str = ''
    features: str = ''
    flip_test: bool = False
    crops: int = 1
    centre: bool = False
    reranking: str = 'none'
    size: tuple[int, int] | None = None
    precision: str = ''
    skipped_images: int = 0
    learned_identities: int = 0
    calibration: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, protocol: str) -> ProtocolResult:
        return self.protocols[protocol]

    def __str__(self) -> str:
        return '\n'.join([*_heading(self), '', *_table(self), *_decision_table(self), *_notes(self)])

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically."""
        with whole_file(path) as temporary:
            temporary.write_text(_json(asdict(self)) + '\n', encoding='utf-8')

    def save_csv(self, path: str | Path) -> None:
        """Append one CSV row per protocol, with metrics in percent as in timm's results files, atomically.

        Raises:
            ValueError: There is a file that is not such a table.
        """
        rows = read_results(path) + [_csv_row(self, name, result) for name, result in self.protocols.items()]
        columns = dict.fromkeys(column for row in rows for column in row)  # other versions have others
        text = dict(encoding='utf-8', errors='backslashreplace', newline='')  # options may hold any name
        with whole_file(path) as temporary, open(temporary, 'w', **text) as file:
            writer = csv.DictWriter(file, list(columns), restval='', lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)

    @classmethod
    def load(cls, path: str | Path) -> 'Report':
        """Read a report that `save` wrote.

        Raises:
            ValueError: The file is not a report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding='utf-8'))
            protocols = {name: _protocol_result(result) for name, result in values['protocols'].items()}
            size = values['size'] and tuple(values['size'])
            report = cls(**{**values, 'protocols': protocols, 'size': size})
            _check_types(report)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path} is not a report written by `Report.save` of this version ({error!r}); evaluate again'
            ) from error
        return report


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows that `Report.save_csv` wrote; none if the file is missing or empty.

    Raises:
        ValueError: The file is something else.
    """
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return []
    try:
        with open(path, encoding='utf-8', newline='') as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error):
        reader, rows = None, []
    if reader is None or 'protocol' not in (reader.fieldnames or ()) or any(None in row for row in rows):
        raise ValueError(f'{path} is not a table of results, so no rows can be appended; give another file')
    return rows


def summarise(
    trials: Trials,
    images: Records,
    *,
    root: str,
    direction: str,
    draw: str | None,
    per_identity_cmc: bool,
    gallery_size: int,
    trials_fingerprint: str,
) -> ProtocolResult:
    """Summarise the metrics of a protocol's trials, whose queries may differ.

    Args:
        trials: For each trial the rows of its queries in `images`, [Q], and their metrics with a CMC of at least 20
            ranks.
        images: The test images.
        root: The dataset's folder or CSV file; empty for rendered images.
        direction: See `ProtocolResult`.
        draw: See `ProtocolResult`.
        per_identity_cmc: See `ProtocolResult`.
        gallery_size: See `ProtocolResult`.
        trials_fingerprint: See `ProtocolResult`.
    """
    rows, means = _query_means(trials, len(images))
    values = [_metrics(found) for _, found in trials]
    intervals = bootstrap_intervals(means[:, np.isfinite(means[0])])
    first_rows, first_metrics = trials[0]
    return ProtocolResult(
        direction=direction,
        draw=draw,
        per_identity_cmc=per_identity_cmc,
        num_queries=len(first_rows),
        num_valid_queries=first_metrics.num_valid_queries,
        gallery_size=gallery_size,
        mean=_means(values),
        std={name: float(np.std([value[name] for value in values])) for name in METRICS},
        intervals={name: (low, high) for name, (low, high) in zip(COLUMN_OF, intervals.tolist())},
        trials=values,
        trials_fingerprint=trials_fingerprint,
        queries=_query_columns(images, rows, means, root),
        cmc=_cmc(trials, len(images)),
    )


def _metrics(found: RankMetrics) -> dict[str, float]:
    return dict(zip(METRICS, (*(float(found.cmc[k - 1]) for k in RANKS), float(found.mAP), float(found.mINP))))


def mean_metrics(trials: Sequence[RankMetrics]) -> dict[str, float]:
    """Return `ProtocolResult.mean` of trials."""
    return _means(list(map(_metrics, trials)))


def _means(values: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([value[name] for value in values])) for name in METRICS}


def _cmc(trials: Trials, num_images: int) -> dict[str, list[float]]:
    """Return the CMC, and its intervals with each query averaged over its trials."""
    ranks = np.arange(1, MAX_RANK + 1)[:, None]
    found, count = np.zeros((MAX_RANK, num_images)), np.zeros(num_images, dtype=np.int64)
    for rows, metrics in trials:
        valid = rows[metrics.valid]
        found[:, valid] += metrics.rank[metrics.valid] <= ranks
        count[valid] += 1
    queries = np.flatnonzero(count)
    low, high = bootstrap_intervals(found[:, queries] / count[queries]).T
    mean = np.mean([metrics.cmc[:MAX_RANK] for _, metrics in trials], axis=0)
    return {name: values.round(6).tolist() for name, values in (('mean', mean), ('low', low), ('high', high))}


def mean_decisions(trials: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Return the means of `ProtocolResult.decisions` over those trials that have a value."""
    known = {name: [found[name] for found in trials if found[name] is not None] for name in DECISIONS}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def _query_means(trials: Trials, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted rows of all queries, [Q], and their rank1, AP and INP averaged over their trials, [3, Q]."""
    sums, count = np.zeros((len(COLUMN_OF), num_images)), np.zeros(num_images, dtype=np.int64)
    is_query = np.zeros(num_images, dtype=bool)
    for rows, metrics in trials:
        is_query[rows] = True
        valid = rows[metrics.valid]
        count[valid] += 1
        for total, values in zip(sums, (metrics.rank1, metrics.ap, metrics.inp)):
            total[valid] += values[metrics.valid]
    rows = np.flatnonzero(is_query)
    means = np.full((len(COLUMN_OF), len(rows)), np.nan)
    np.divide(sums[:, rows], count[rows], out=means, where=count[rows] > 0)
    return rows, means


def _query_columns(images: Records, rows: np.ndarray, means: np.ndarray, root: str) -> dict[str, list[Any]]:
    valid = np.isfinite(means[0]).tolist()
    columns = [
        relative_paths(root, images.path[rows].tolist()),
        *(getattr(images, name)[rows].tolist() for name in ('identity', 'camera', 'modality')),
        # Six digits are finer than any relevant difference, and keep files small.
        *([value if known else None for value, known in zip(mean, valid)] for mean in means.round(6).tolist()),
    ]
    return dict(zip(QUERY_COLUMNS, columns, strict=True))


def relative_paths(root: str, paths: list[str]) -> list[str]:
    """Make paths relative to the dataset's folder, so that they are the same on every machine."""
    folder = os.path.dirname(root) if os.path.isfile(root) else root
    start = os.path.join(folder, '') if folder else ''
    if not start:
        return paths
    return [path[len(start) :].replace(os.sep, '/') if path.startswith(start) else path for path in paths]


def query_values(result: ProtocolResult) -> np.ndarray:
    """Return rank1, AP and INP of the queries, NaN if a query is invalid, [3, Q]."""
    # NumPy converts None to NaN.
    return np.asarray([result.queries[column] for column in COLUMN_OF.values()], dtype=np.float64)


def _protocol_result(values: dict[str, Any]) -> ProtocolResult:
    """Convert and check a result read from JSON."""
    intervals = {name: (float(low), float(high)) for name, (low, high) in values['intervals'].items()}
    result = ProtocolResult(**{**values, 'intervals': intervals})
    _check_types(result)
    others = [result.other_features] if result.other_features else []
    for metrics in (result.mean, result.std, *result.trials, *others):
        if set(metrics) != set(METRICS) or not all(isinstance(value, (int, float)) for value in metrics.values()):
            raise ValueError(f'expected a number for each of {", ".join(METRICS)}, got {metrics}')
    if set(intervals) != set(COLUMN_OF):
        raise ValueError(f'expected intervals of {", ".join(COLUMN_OF)}, got {", ".join(intervals) or "none"}')
    decisions = result.decisions
    if decisions and not (set(decisions) == set(DECISIONS) and all(map(_is_number_or_none, decisions.values()))):
        raise ValueError(f'expected a number or null for each of {", ".join(DECISIONS)}, got {decisions}')
    lengths = {name: len(column) for name, column in result.queries.items()}
    if set(lengths) != set(QUERY_COLUMNS) or len(set(lengths.values())) > 1:
        raise ValueError(f'expected query columns {", ".join(QUERY_COLUMNS)} of equal length, got {lengths}')
    query_values(result)
    if result.cmc and not all(
        np.asarray(result.cmc[name], dtype=np.float64).shape == (MAX_RANK,) for name in ('mean', 'low', 'high')
    ):
        raise ValueError(f'expected {MAX_RANK} ranks of the CMC, got {result.cmc}')
    return result


def _is_number_or_none(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _check_types(instance: ProtocolResult | Report) -> None:
    for name, hint in get_type_hints(type(instance)).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        value = getattr(instance, name)
        if not isinstance(value, tuple(get_origin(kind) or kind for kind in kinds)):
            raise TypeError(f'{name} cannot be {value!r}')


def _json(value: Any, indent: int = 0) -> str:
    """Return indented JSON that puts each list or object of plain values on a single line."""
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(items, (list, tuple)) or not any(isinstance(item, (dict, list, tuple)) for item in items):
        return json.dumps(value, allow_nan=False)
    texts = [_json(item, indent + 2) for item in items]
    opening, closing = '[]'
    if isinstance(value, dict):
        opening, closing = '{}'
        texts = [f'{json.dumps(key)}: {text}' for key, text in zip(value, texts)]
    space = '\n' + ' ' * indent
    return f'{opening}{space}  ' + f',{space}  '.join(texts) + space + closing


def _csv_row(report: Report, name: str, result: ProtocolResult) -> dict[str, Any]:
    height, width = report.size or ('', '')
    row = {'model': report.model, 'dataset': report.dataset, 'protocol': name}
    row |= {'direction': result.direction, 'draw': result.draw or ''}
    row |= {key: getattr(report, key) for key in ('features', 'flip_test', 'crops', 'centre', 'reranking')}
    row['trials'] = len(result.trials)
    row |= {key: getattr(result, key) for key in ('num_queries', 'num_valid_queries', 'gallery_size')}
    row |= {metric: _percent(result.mean[metric]) for metric in METRICS}
    row |= {f'{metric}_std': _percent(result.std[metric]) for metric in METRICS}
    for metric, (low, high) in result.intervals.items():
        row |= {f'{metric}_low': _percent(low), f'{metric}_high': _percent(high)}
    row |= {name: '' if value is None else _percent(value) for name, value in result.decisions.items()}
    for part in CALIBRATION_HEADERS:
        error = result.calibration and result.calibration[part]['ece']
        row[f'ece_{part}'] = '' if error is None else _percent(error)
    other = result.other_features
    row |= {f'{metric}_other_features': _percent(other[metric]) if other else '' for metric in COLUMN_OF}
    row |= {'per_identity_cmc': result.per_identity_cmc, 'img_height': height, 'img_width': width}
    row |= {key: getattr(report, key) for key in ('precision', 'weights', 'skipped_images', 'learned_identities')}
    row |= {'options': _pairs(report.options, '='), 'trials_fingerprint': result.trials_fingerprint}
    return row | {'versions': _pairs(report.versions, ' ')}


def _percent(fraction: float) -> float:
    return round(100 * fraction, 4)


def _pairs(values: dict[str, Any], separator: str) -> str:
    return ', '.join(f'{name}{separator}{value}' for name, value in values.items())


def _heading(report: Report) -> list[str]:
    lines = [f'{report.dataset} ({_pairs(report.options, "=")})' if report.options else report.dataset]
    reranking = 'no re-ranking' if report.reranking == 'none' else f'{report.reranking} re-ranking'
    if report.model:
        lines.append(
            f'{report.model}, weights {report.weights}, features {report.features}, images {size_text(report)}, '
            f'{report.precision}'
        )
        flip_test = 'flip test' if report.flip_test else 'no flip test'
        centred = ', modalities centred' if report.centre else ''
        lines.append(f'{flip_test}, {report.crops} crop{"s" if report.crops > 1 else ""}{centred}, {reranking}')
    else:
        lines.append(reranking)
    if report.calibration:
        count, split, dataset = (report.calibration.get(name) for name in ('identities', 'split', 'dataset'))
        lines.append(f'probabilities fitted on {count} {split} identities of {dataset}')
    if report.skipped_images:
        lines.append(f'{report.skipped_images} broken images skipped')
    if report.learned_identities:
        lines.append(f'WRONG SPLIT: the model was trained on {report.learned_identities} of the test identities')
    lines.append(_pairs(report.versions, ' '))
    for direction in dict.fromkeys(result.direction for result in report.protocols.values()):
        names = [name for name, result in report.protocols.items() if result.direction == direction]
        lines.append(f'{direction}: {", ".join(names)}')
    return lines


def size_text(report: Report) -> str:
    """Format height and width of the input images."""
    return 'x'.join(map(str, report.size)) if report.size else ABSENT


def _table(report: Report) -> list[str]:
    """Return aligned lines, with the deviation over several trials below the mean."""
    rows = [['protocol', 'trials', 'queries', 'gallery', *(HEADER_OF[name] for name in METRICS), 'mAP 95 %']]
    has_others = any(result.other_features for result in report.protocols.values())
    if has_others:
        (other,) = set(RETRIEVALS) - {report.features}
        rows[0].append(f'mAP {other}')
    for name, result in report.protocols.items():
        queries = str(result.num_queries)
        if result.num_valid_queries < result.num_queries:
            queries = f'{result.num_valid_queries} of {result.num_queries}'
        trials = f'{len(result.trials)} {result.draw or ""}'.strip()
        means = [f'{100 * result.mean[metric]:.2f}' for metric in METRICS]
        row = [name, trials, queries, str(result.gallery_size), *means, interval_text(result.intervals['mAP'])]
        if has_others:
            row.append(f'{100 * result.other_features["mAP"]:.2f}' if result.other_features else ABSENT)
        rows.append(row)
        if len(result.trials) > 1:
            deviations = ['', '', '', 'std', *(f'{100 * result.std[metric]:.2f}' for metric in METRICS)]
            rows.append(deviations + [''] * (len(row) - len(deviations)))
    return aligned(rows)


def _decision_table(report: Report) -> list[str]:
    """Return the lines of the table of decisions, with an empty one before; none for reports without decisions."""
    if not any(result.decisions for result in report.protocols.values()):
        return []
    rows = [['protocol', *DECISION_HEADERS.values(), *CALIBRATION_HEADERS.values()]]
    for name, result in report.protocols.items():
        values = [result.decisions.get(decision) for decision in DECISION_HEADERS]
        values += [result.calibration and result.calibration[part]['ece'] for part in CALIBRATION_HEADERS]
        rows.append([name, *(ABSENT if value is None else f'{100 * value:.2f}' for value in values)])
    return ['', *aligned(rows)]


def interval_text(interval: tuple[float, float], sign: str = '') -> str:
    """Format an interval of fractions in percent."""
    low, high = interval
    return f'{100 * low:{sign}.2f} to {100 * high:{sign}.2f}'


def _notes(report: Report) -> list[str]:
    per_identity = [name for name, result in report.protocols.items() if result.per_identity_cmc]
    notes = [f'R1 to R20 count distinct identities: {", ".join(per_identity)}'] if per_identity else []
    small = [name for name, result in report.protocols.items() if _is_small(result)]
    if small:
        limits = f'fewer than {FEW_PEOPLE} people or {FEW_QUERIES} queries'
        notes.append(f'{limits}, so these results mean little: {", ".join(small)}')
    return notes


def _is_small(result: ProtocolResult) -> bool:
    valid = [identity for identity, ap in zip(result.queries['identity'], result.queries['AP']) if ap is not None]
    return len(set(valid)) < FEW_PEOPLE or result.num_valid_queries < FEW_QUERIES
