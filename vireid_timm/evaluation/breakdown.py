"""Break a result down by camera, identity or modality, and list its worst queries."""

from dataclasses import dataclass

import numpy as np

from ..constants import GROUPINGS, UNKNOWN_CAMERA
from ..text import aligned
from .report import COLUMN_OF, HEADER_OF, ProtocolResult, query_values


@dataclass(frozen=True)
class Group:
    """Metrics of the queries of one camera, identity or modality.

    Attributes:
        name: Name of the camera, identity or modality.
        num_valid_queries: Number of queries that are averaged.
        rank1: Mean over these queries, as a fraction.
        mAP: The same.
        mINP: The same.
    """

    name: str
    num_valid_queries: int
    rank1: float
    mAP: float
    mINP: float


def breakdown(result: ProtocolResult, by: str) -> list[Group]:
    """Group the metrics by camera, identity or modality of the query; groups without a valid query are left out.

    Args:
        result: The result.
        by: `camera`, `identity` or `modality`.

    Returns:
        Cameras by number, modalities by name, or identities by mAP, lowest first.

    Raises:
        ValueError: `by` is something else.
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
    """Format `breakdown` as a table in percent.

    Args:
        result: The result.
        by: `camera`, `identity` or `modality`.
        limit: Number of identities to show, worst first.
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
    without_match = len(set(result.queries[by])) - len(groups)
    if without_match:
        lines.append(f'{without_match} more without any match in the gallery')
    return '\n'.join(lines)


def failures_table(result: ProtocolResult) -> str:
    """Format the worst queries as a table: AP in percent, rank of the first match, and identities of five answers."""
    if not result.failures:
        return 'the report lists no failures'
    rows = [
        [
            failure['path'],
            failure['identity'],
            str(failure['camera']),
            failure['modality'],
            f'{100 * failure["AP"]:.2f}',
            str(failure['rank']),
            ' '.join(answer['identity'] for answer in failure['found'][:5]),
        ]
        for failure in result.failures
    ]
    header = ['query', 'identity', 'camera', 'modality', 'AP', 'first right', 'first answers']
    return '\n'.join(aligned([header, *rows], left=(0, 1, 3, 6)))
