"""Compare two reports: which settings differ, and whether the difference could be chance."""

from dataclasses import dataclass, fields

import numpy as np

from ..text import aligned
from .confidence import bootstrap_intervals, paired_test
from .report import (
    ABSENT,
    COLUMN_OF,
    HEADER_OF,
    ProtocolResult,
    Report,
    interval_text,
    query_values,
    size_text,
)

SIGNIFICANCE = 0.05  # a p-value below it counts as a difference


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a metric between two reports on the same images.

    Attributes:
        interval: 95 % bootstrap interval of the difference, second minus first, over the queries.
        p: The p-value of `paired_test`.
    """

    interval: tuple[float, float]
    p: float


@dataclass(frozen=True)
class ProtocolComparison:
    """Comparison of one protocol.

    Attributes:
        first: `rank1`, `mAP` and `mINP` of the first report, as fractions.
        second: The same of the second report.
        paired: The paired difference of each of these; empty if the images differ.
    """

    first: dict[str, float]
    second: dict[str, float]
    paired: dict[str, PairedDifference]

    @property
    def verdict(self) -> str:
        """Which is better in mAP, in words."""
        if not self.paired:
            return 'measured on different images, so no paired test is possible'
        if self.paired['mAP'].p >= SIGNIFICANCE:
            return 'no significant difference in mAP'
        return f'second is {"better" if self.second["mAP"] > self.first["mAP"] else "worse"} in mAP'


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`; prints as text in percent.

    Attributes:
        settings: Every setting that differs and affects the results, as (name, first value, second value).
        protocols: Name -> comparison, for every protocol that both reports have.
        only_first: Protocols that only the first report has.
        only_second: Protocols that only the second report has.
    """

    settings: list[tuple[str, str, str]]
    protocols: dict[str, ProtocolComparison]
    only_first: list[str]
    only_second: list[str]

    def __str__(self) -> str:
        lines = ['no setting differs']
        if self.settings:
            lines = aligned([['setting', 'first', 'second'], *map(list, self.settings)], left=(0, 1, 2))
        if self.protocols:
            lines += ['', *aligned(_comparison_rows(self.protocols), left=(0, 1)), '']
            lines += [f'{name}: {comparison.verdict}' for name, comparison in self.protocols.items()]
        for which, names in (('first', self.only_first), ('second', self.only_second)):
            if names:
                lines.append(f'only in the {which} report: {", ".join(names)}')
        return '\n'.join(lines)


def compare(first: Report, second: Report) -> Comparison:
    """Compare two reports by protocol, and query by query if both were measured on the same images.

    The test estimates whether other queries of the same kind would show the difference too. It does not cover the
    randomness of training: only several training runs show how much a recipe varies with its seed.
    """
    common = [name for name in first.protocols if name in second.protocols]
    left, right = (_settings(report, common) for report in (first, second))
    return Comparison(
        settings=[
            (name, left.get(name, ABSENT), right.get(name, ABSENT))
            for name in dict.fromkeys([*left, *right])
            if left.get(name, ABSENT) != right.get(name, ABSENT)
        ],
        protocols={name: _compare_results(first[name], second[name]) for name in common},
        only_first=[name for name in first.protocols if name not in common],
        only_second=[name for name in second.protocols if name not in common],
    )


def _settings(report: Report, protocols: list[str]) -> dict[str, str]:
    """Return all settings that affect the results of these protocols, as text."""
    values = {field.name: getattr(report, field.name) for field in fields(report)} | {'size': size_text(report)}
    del values['protocols'], values['calibration']  # which changes no rank
    texts = {}
    for name, value in values.items():
        if isinstance(value, dict):
            texts |= {f'{name}: {key}': str(entry) for key, entry in value.items()}
        else:
            texts[name] = ABSENT if value == '' else str(value)
    names = ('direction', 'draw', 'per_identity_cmc', 'num_queries', 'num_valid_queries', 'gallery_size')
    for protocol in protocols:
        result = report[protocol]
        texts |= {f'{protocol}: {name}': str(getattr(result, name)) for name in names}
        texts[f'{protocol}: trials'] = str(len(result.trials))
    return texts


def _compare_results(first: ProtocolResult, second: ProtocolResult) -> ProtocolComparison:
    means = [{name: result.mean[name] for name in COLUMN_OF} for result in (first, second)]
    values = [query_values(result) for result in (first, second)]
    if not _same_images(first, second):
        return ProtocolComparison(*means, {})
    valid = np.isfinite(values[0][0])
    left, right = (value[:, valid] for value in values)
    intervals = bootstrap_intervals(right - left).tolist()
    return ProtocolComparison(
        *means,
        {
            name: PairedDifference((low, high), paired_test(*pair))
            for name, (low, high), pair in zip(COLUMN_OF, intervals, zip(left, right))
        },
    )


def _same_images(first: ProtocolResult, second: ProtocolResult) -> bool:
    """Return whether the same queries searched the same galleries, and the same ones were valid."""
    columns = ('path', 'identity', 'camera', 'modality')
    return (
        first.trials_fingerprint == second.trials_fingerprint
        and all(first.queries[column] == second.queries[column] for column in columns)
        and np.array_equal(*(np.isfinite(query_values(result)[0]) for result in (first, second)))
    )


def _comparison_rows(protocols: dict[str, ProtocolComparison]) -> list[list[str]]:
    """Return the cells of the table in `Comparison`, header first."""
    rows = [['protocol', 'metric', 'first', 'second', 'difference', '95 %', 'p']]
    for protocol, comparison in protocols.items():
        for name in COLUMN_OF:
            first, second = comparison.first[name], comparison.second[name]
            difference = comparison.paired.get(name)
            rows.append(
                [
                    protocol if name == 'rank1' else '',
                    HEADER_OF[name],
                    f'{100 * first:.2f}',
                    f'{100 * second:.2f}',
                    f'{100 * (second - first):+.2f}',
                    interval_text(difference.interval, '+') if difference else ABSENT,
                    f'{difference.p:.4f}' if difference else ABSENT,
                ]
            )
    return rows
