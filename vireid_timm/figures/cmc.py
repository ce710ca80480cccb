"""CMC curves of several evaluation reports."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..evaluation.report import Report
from .charts import label, new_figure, save_figure, style

COLUMNS = 3


def save_cmc(reports: Mapping[str, Report], path: str | Path) -> None:
    """Plot the CMC of every protocol, a line per report, with the 95 % bootstrap interval over the queries as a band.

    Args:
        reports: Name of each report -> the report.
        path: The PNG.

    Raises:
        ValueError: A report is of a version that saved no CMC.
    """
    for name, report in reports.items():
        if not all(result.cmc for result in report.protocols.values()):
            raise ValueError(f'{name} was written by a version that saved no CMC; evaluate again')
    protocols = list(dict.fromkeys(protocol for report in reports.values() for protocol in report.protocols))
    columns = min(COLUMNS, len(protocols))
    rows = -(-len(protocols) // columns)
    figure = new_figure(max(5, 4 * columns), 3.4 * rows + 0.25 * len(reports) + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    lines = {}
    for axes, protocol in zip(grid, protocols):
        shown = {name: report[protocol] for name, report in reports.items() if protocol in report.protocols}
        for name, result in shown.items():
            low, mean, high = (100 * np.asarray(result.cmc[part]) for part in ('low', 'mean', 'high'))
            ranks = range(1, len(mean) + 1)
            look = style(list(reports).index(name))
            (lines[name],) = axes.plot(ranks, mean, markersize=4, **look)
            axes.fill_between(ranks, low, high, color=look['color'], alpha=0.2, linewidth=0)
        counted = 'people' if all(result.per_identity_cmc for result in shown.values()) else 'images'
        axes.set(title=protocol, xlabel=f'k, in {counted}', xticks=[1, 5, 10, 15, 20])
        axes.grid(alpha=0.3)
    for axes in grid[len(protocols) :]:
        axes.set_visible(False)
    figure.supylabel('queries with a match among the first k, %', fontsize=10)
    figure.legend(lines.values(), [label(name) for name in lines], loc='outside lower center')
    save_figure(figure, path)
