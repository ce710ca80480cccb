"""What an evaluation found: results with everything that changes them, as a table, as files, and compared."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from ..constants import GROUPINGS, UNKNOWN_CAMERA
from ..data.records import Records
from ..files import whole_file
from ..text import aligned
from .confidence import bootstrap_intervals
from .metrics import RankMetrics

RANKS = (1, 5, 10, 20)
METRICS = (*(f'rank{k}' for k in RANKS), 'mAP', 'mINP')
# The metrics that are means over queries, and the column of `ProtocolResult.queries` that each is the mean of.
COLUMN_OF = {'rank1': 'rank1', 'mAP': 'AP', 'mINP': 'INP'}
QUERY_COLUMNS = ('path', 'identity', 'camera', 'modality', *COLUMN_OF.values())
HEADER_OF = {'rank1': 'R1', 'rank5': 'R5', 'rank10': 'R10', 'rank20': 'R20', 'mAP': 'mAP', 'mINP': 'mINP'}
ABSENT = '-'

Trials = Sequence[tuple[np.ndarray, RankMetrics]]


@dataclass(frozen=True)
class ProtocolResult:
    """What one protocol measured.

    Attributes:
        direction: Who searched for whom, e.g. `infrared to visible`.
        draw: How the trials' images were drawn; None where every image took part.
        per_identity_cmc: Whether the ranks count distinct identities rather than images.
        num_queries: Query images of a trial.
        num_valid_queries: Those with a match in the gallery; the metrics are means over them.
        gallery_size: Gallery images of a trial.
        mean: Mean over the trials of `rank1`, `rank5`, `rank10`, `rank20`, `mAP` and `mINP`, as fractions.
        std: Standard deviation over the trials (NumPy's, by the number of trials); 0 for a single one.
        intervals: 95 % bootstrap intervals of `rank1`, `mAP` and `mINP` over the queries, each at the mean of its
            trials.
        trials: The same metrics as `mean`, trial by trial.
        trials_fingerprint: Equal where the trials consist of the same images, so that results can be paired.
        queries: Columns of equal length, one value for every image that was a query: `path` (below the dataset's
            root, if it lies there), `identity`, `camera`, `modality`, and `rank1`, `AP` and `INP`: means over the
            trials in which the query is valid, None where it never is.
        failures: The worst queries, if asked for: `path`, `identity`, `camera`, `modality`, `AP`, `rank` of the first
            right image, and `found`: `path` and `identity` of the first answers.
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
    failures: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Results, and everything that changes them. Prints as a table in percent; `report[protocol]` is one result.

    Attributes:
        dataset: The dataset's name.
        options: The dataset's options as resolved (RegDB's trial, SynthVI's seed, ...).
        protocols: Protocol name -> its result.
        model: Architecture; empty where features came from elsewhere, when the fields from here to `crops`, `size` and
            `precision` say nothing.
        weights: Fingerprint of the weights, see `weights_fingerprint`.
        features: `after-bn` or `before-bn`.
        flip_test: Whether features are means over each image and its mirror image.
        crops: How many crops of each image features are means over.
        reranking: `none`, `k-reciprocal` or `cross-modality`.
        size: Height and width that images were resized to.
        precision: What the network computed in, e.g. `float32`.
        skipped_images: Broken test images that were left out.
        versions: Version of every package that takes part.
    """

    dataset: str
    options: dict[str, Any]
    protocols: dict[str, ProtocolResult]
    model: str = ''
    weights: str = ''
    features: str = ''
    flip_test: bool = False
    crops: int = 1
    reranking: str = 'none'
    size: tuple[int, int] | None = None
    precision: str = ''
    skipped_images: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, protocol: str) -> ProtocolResult:
        return self.protocols[protocol]

    def __str__(self) -> str:
        return '\n'.join([*_heading(self), '', *_table(self), *_notes(self)])

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        with whole_file(path) as temporary:
            temporary.write_text(_json(asdict(self)) + '\n', encoding='utf-8')

    def save_csv(self, path: str | Path) -> None:
        """Write one row per protocol as CSV, metrics in percent as in timm's results files, whole or not at all."""
        rows = [_csv_row(self, name, result) for name, result in self.protocols.items()]
        with whole_file(path) as temporary, open(temporary, 'w', encoding='utf-8', newline='') as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)

    @classmethod
    def load(cls, path: str | Path) -> 'Report':
        """Read what `save` wrote.

        Raises:
            ValueError: If the file holds no report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding='utf-8'))
            protocols = {name: _protocol_result(result) for name, result in values['protocols'].items()}
            size = values['size'] and tuple(values['size'])
            report = cls(**{**values, 'protocols': protocols, 'size': size})
            _check_types(report)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path} is no report that `Report.save` of this version wrote ({error!r}); evaluate again to make one'
            ) from error
        return report


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
    """The result of a protocol from the metrics of its trials, whose queries may differ.

    Args:
        trials: For each trial the rows of its queries in `images`, [Q], and the metrics of these queries, with a CMC
            of 20 ranks or more.
        images: The table that the rows are those of.
        root: The dataset's folder, or the CSV file in it; empty for images that are rendered.
        direction: See `ProtocolResult`, as for the arguments below.
        draw: See there.
        per_identity_cmc: See there.
        gallery_size: See there.
        trials_fingerprint: See there.
    """
    rows, means = _query_means(trials, len(images))
    values = [_metric_values(metrics) for _, metrics in trials]
    intervals = bootstrap_intervals(means[:, np.isfinite(means[0])])
    first_rows, first_metrics = trials[0]
    return ProtocolResult(
        direction=direction,
        draw=draw,
        per_identity_cmc=per_identity_cmc,
        num_queries=len(first_rows),
        num_valid_queries=first_metrics.num_valid_queries,
        gallery_size=gallery_size,
        mean={name: float(np.mean([value[name] for value in values])) for name in METRICS},
        std={name: float(np.std([value[name] for value in values])) for name in METRICS},
        intervals={name: (low, high) for name, (low, high) in zip(COLUMN_OF, intervals.tolist())},
        trials=values,
        trials_fingerprint=trials_fingerprint,
        queries=_query_columns(images, rows, means, root),
    )


@dataclass(frozen=True)
class Group:
    """What the queries of one camera, identity or modality measured.

    Attributes:
        name: Of the camera, the identity or the modality.
        num_valid_queries: How many queries the means are over.
        rank1: Mean over these, as a fraction.
        mAP: Likewise.
        mINP: Likewise.
    """

    name: str
    num_valid_queries: int
    rank1: float
    mAP: float
    mINP: float


def breakdown(result: ProtocolResult, by: str) -> list[Group]:
    """The metrics by camera, identity or modality of the query, for those that have a valid query.

    Args:
        result: With its queries.
        by: `camera`, `identity` or `modality`.

    Returns:
        Cameras by their numbers, modalities by their names, identities from the lowest mAP to the highest.

    Raises:
        ValueError: On anything else to group by.
    """
    if by not in GROUPINGS:
        raise ValueError(f'unknown breakdown {by!r}; expected one of {", ".join(GROUPINGS)}')
    values = query_values(result)
    valid = np.isfinite(values[0])
    names, group = np.unique(np.asarray(result.queries[by])[valid], return_inverse=True)
    count = np.bincount(group, minlength=len(names))
    means = [np.bincount(group, weights=column[valid], minlength=len(names)) / count for column in values]
    names = ['unknown' if by == 'camera' and name == UNKNOWN_CAMERA else str(name) for name in names.tolist()]
    groups = [Group(name, *row) for name, *row in zip(names, count.tolist(), *(mean.tolist() for mean in means))]
    return sorted(groups, key=lambda group: group.mAP) if by == 'identity' else groups


def breakdown_table(result: ProtocolResult, by: str, limit: int = 20) -> str:
    """`breakdown` as a table in percent.

    Args:
        result: With its queries.
        by: `camera`, `identity` or `modality`.
        limit: How many identities to show, the worst ones.
    """
    groups = breakdown(result, by)
    shown = groups[:limit] if by == 'identity' else groups
    rows = [
        [group.name, str(group.num_valid_queries), *(f'{100 * getattr(group, name):.2f}' for name in COLUMN_OF)]
        for group in shown
    ]
    lines = aligned([[by, 'queries', *(HEADER_OF[name] for name in COLUMN_OF)], *rows])
    if len(shown) < len(groups):
        lines.append(f'{len(groups) - len(shown)} more, with a higher mAP')
    silent = len(set(result.queries[by])) - len(groups)
    if silent:
        lines.append(f'{silent} more, none of whose queries has a match in the gallery')
    return '\n'.join(lines)


def failures_table(result: ProtocolResult) -> str:
    """The worst queries as a table: AP in percent, rank of the first right image, and who was found instead."""
    if not result.failures:
        return 'the report holds no list of failures'
    rows = [
        [
            failure['path'],
            failure['identity'],
            str(failure['camera']),
            failure['modality'],
            f'{100 * failure["AP"]:.2f}',
            str(failure['rank']),
            ' '.join(answer['identity'] for answer in failure['found']),
        ]
        for failure in result.failures
    ]
    header = ['query', 'identity', 'camera', 'modality', 'AP', 'first right', 'first answers']
    return '\n'.join(aligned([header, *rows], left=(0, 1, 3, 6)))


def _metric_values(metrics: RankMetrics) -> dict[str, float]:
    ranks = {f'rank{k}': float(metrics.cmc[k - 1]) for k in RANKS}
    return {**ranks, 'mAP': float(metrics.mAP), 'mINP': float(metrics.mINP)}


def _query_means(trials: Trials, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all queries, sorted, [Q], and the mean of each one's rank1, AP and INP over its valid trials, [3, Q]."""
    sums, count = np.zeros((len(COLUMN_OF), num_images)), np.zeros(num_images, dtype=np.int64)
    queried = np.zeros(num_images, dtype=bool)
    for rows, metrics in trials:
        queried[rows] = True
        valid = rows[metrics.valid]
        count[valid] += 1
        for total, values in zip(sums, (metrics.rank1, metrics.ap, metrics.inp)):
            total[valid] += values[metrics.valid]
    rows = np.flatnonzero(queried)
    means = np.full((len(COLUMN_OF), len(rows)), np.nan)
    np.divide(sums[:, rows], count[rows], out=means, where=count[rows] > 0)
    return rows, means


def _query_columns(images: Records, rows: np.ndarray, means: np.ndarray, root: str) -> dict[str, list[Any]]:
    valid = np.isfinite(means[0]).tolist()
    columns = [
        relative_paths(root, images.path[rows].tolist()),
        *(getattr(images, name)[rows].tolist() for name in ('identity', 'camera', 'modality')),
        # Six digits are finer than any difference that matters, and keep files small.
        *([value if known else None for value, known in zip(mean, valid)] for mean in means.round(6).tolist()),
    ]
    return dict(zip(QUERY_COLUMNS, columns, strict=True))


def relative_paths(root: str, paths: list[str]) -> list[str]:
    """Paths relative to the dataset's folder, so that they are the same on every machine."""
    folder = os.path.dirname(root) if os.path.isfile(root) else root
    start = os.path.join(folder, '') if folder else ''
    if not start:
        return paths
    return [path[len(start) :].replace(os.sep, '/') if path.startswith(start) else path for path in paths]


def query_values(result: ProtocolResult) -> np.ndarray:
    """rank1, AP and INP of the queries, NaN where a query is not valid, [3, Q]."""
    # As floats None is NaN.
    return np.asarray([result.queries[column] for column in COLUMN_OF.values()], dtype=np.float64)


def _protocol_result(values: dict[str, Any]) -> ProtocolResult:
    """A result from what JSON made of it."""
    intervals = {name: (float(low), float(high)) for name, (low, high) in values['intervals'].items()}
    result = ProtocolResult(**{**values, 'intervals': intervals})
    _check_types(result)
    for metrics in (result.mean, result.std, *result.trials):
        if set(metrics) != set(METRICS) or not all(isinstance(value, (int, float)) for value in metrics.values()):
            raise ValueError(f'expected a number for each of {", ".join(METRICS)}, got {metrics}')
    if set(intervals) != set(COLUMN_OF):
        raise ValueError(f'expected intervals of {", ".join(COLUMN_OF)}, got {", ".join(intervals) or "none"}')
    lengths = {name: len(column) for name, column in result.queries.items()}
    if set(lengths) != set(QUERY_COLUMNS) or len(set(lengths.values())) > 1:
        raise ValueError(f'expected query columns {", ".join(QUERY_COLUMNS)} of equal length, got {lengths}')
    query_values(result)
    return result


def _check_types(instance: ProtocolResult | Report) -> None:
    for name, hint in get_type_hints(type(instance)).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        value = getattr(instance, name)
        if not isinstance(value, tuple(get_origin(kind) or kind for kind in kinds)):
            raise TypeError(f'{name} cannot be {value!r}')


def _json(value: Any, indent: int = 0) -> str:
    """Indented JSON, in which a list or an object of plain values takes a single line, however long it is."""
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
    row |= {key: getattr(report, key) for key in ('features', 'flip_test', 'crops', 'reranking')}
    row['trials'] = len(result.trials)
    row |= {key: getattr(result, key) for key in ('num_queries', 'num_valid_queries', 'gallery_size')}
    row |= {metric: _percent(result.mean[metric]) for metric in METRICS}
    row |= {f'{metric}_std': _percent(result.std[metric]) for metric in METRICS}
    for metric, (low, high) in result.intervals.items():
        row |= {f'{metric}_low': _percent(low), f'{metric}_high': _percent(high)}
    row |= {'per_identity_cmc': result.per_identity_cmc, 'img_height': height, 'img_width': width}
    row |= {key: getattr(report, key) for key in ('precision', 'weights', 'skipped_images')}
    row |= {'options': _listing(report.options, '='), 'trials_fingerprint': result.trials_fingerprint}
    return row | {'versions': _listing(report.versions, ' ')}


def _percent(fraction: float) -> float:
    return round(100 * fraction, 4)


def _listing(values: dict[str, Any], between: str) -> str:
    return ', '.join(f'{name}{between}{value}' for name, value in values.items())


def _heading(report: Report) -> list[str]:
    lines = [f'{report.dataset} ({_listing(report.options, "=")})' if report.options else report.dataset]
    reranking = 'no re-ranking' if report.reranking == 'none' else f'{report.reranking} re-ranking'
    if report.model:
        lines.append(
            f'{report.model}, weights {report.weights}, features {report.features}, images {_size(report)}, '
            f'{report.precision}'
        )
        flip_test = 'flip test' if report.flip_test else 'no flip test'
        lines.append(f'{flip_test}, {report.crops} crop{"s" if report.crops > 1 else ""}, {reranking}')
    else:
        lines.append(reranking)
    if report.skipped_images:
        lines.append(f'{report.skipped_images} broken images left out')
    lines.append(_listing(report.versions, ' '))
    for direction in dict.fromkeys(result.direction for result in report.protocols.values()):
        names = [name for name, result in report.protocols.items() if result.direction == direction]
        lines.append(f'{direction}: {", ".join(names)}')
    return lines


def _size(report: Report) -> str:
    return 'x'.join(map(str, report.size)) if report.size else ABSENT


def _table(report: Report) -> list[str]:
    """Aligned columns; the deviation over several trials stands below the mean."""
    rows = [['protocol', 'trials', 'queries', 'gallery', *(HEADER_OF[name] for name in METRICS), 'mAP 95 %']]
    for name, result in report.protocols.items():
        queries = str(result.num_queries)
        if result.num_valid_queries < result.num_queries:
            queries = f'{result.num_valid_queries} of {result.num_queries}'
        trials = f'{len(result.trials)} {result.draw or ""}'.strip()
        means = [f'{100 * result.mean[metric]:.2f}' for metric in METRICS]
        rows.append([name, trials, queries, str(result.gallery_size), *means, interval_text(result.intervals['mAP'])])
        if len(result.trials) > 1:
            rows.append(['', '', '', 'std', *(f'{100 * result.std[metric]:.2f}' for metric in METRICS), ''])
    return aligned(rows)


def interval_text(interval: tuple[float, float], sign: str = '') -> str:
    """An interval of fractions as text, in percent."""
    low, high = interval
    return f'{100 * low:{sign}.2f} to {100 * high:{sign}.2f}'


def _notes(report: Report) -> list[str]:
    per_identity = [name for name, result in report.protocols.items() if result.per_identity_cmc]
    return [f'R1 to R20 count distinct identities: {", ".join(per_identity)}'] if per_identity else []


def report_settings(report: Report) -> dict[str, str]:
    """Everything outside the protocols that changes a number, as text."""
    values = {field.name: getattr(report, field.name) for field in fields(report)} | {'size': _size(report)}
    del values['protocols']
    texts = {}
    for name, value in values.items():
        if isinstance(value, dict):
            texts |= {f'{name}: {key}': str(entry) for key, entry in value.items()}
        else:
            texts[name] = ABSENT if value == '' else str(value)
    return texts


def protocol_settings(report: Report, protocols: list[str]) -> dict[str, str]:
    """Everything about these protocols that changes a number, as text."""
    names = ('direction', 'draw', 'per_identity_cmc', 'num_queries', 'num_valid_queries', 'gallery_size')
    texts = {}
    for protocol in protocols:
        result = report[protocol]
        texts |= {f'{protocol}: {name}': str(getattr(result, name)) for name in names}
        texts[f'{protocol}: trials'] = str(len(result.trials))
    return texts
