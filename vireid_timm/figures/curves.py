"""Curves of training runs: losses, learning rate and validation metrics over the epochs."""

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run_folder import SUMMARY, folder_of
from .charts import label, new_figure, require_matplotlib, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
HIDDEN = ('train_accuracy', 'train_images_per_second')


def read_summary(run: str | Path) -> Rows:
    """Read the table of a run's epochs.

    Args:
        run: The run's folder, or a checkpoint in it.

    Raises:
        ValueError: There is no such table, or it is something else.
    """
    path = folder_of(run) / SUMMARY
    if not path.is_file():
        raise ValueError(f'there is no {path}: a run writes it after each epoch; give the folder of a run')
    try:
        with open(path, encoding='utf-8', newline='') as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row['epoch'])
            _ = [float(value) for value in row.values() if value]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f'{path} is not the table of a run ({error!r})') from error
    if not rows:
        raise ValueError(f'{path} has no epoch yet')
    return rows


def save_curves(runs: Mapping[str, Rows], path: str | Path) -> None:
    """Plot the losses, the learning rate and the validation metrics over the epochs.

    Args:
        runs: Name of each run -> its rows as in `summary.csv`. Of several runs only the total loss, rank-1 and mAP are
            shown.
        path: The PNG.
    """
    figure = new_figure(12, 4)
    losses, rate, validation = figure.subplots(1, 3, sharex=True)
    columns = list(dict.fromkeys(column for rows in runs.values() for row in rows for column in row))
    if len(runs) == 1:
        (rows,) = runs.values()
        terms = [name for name in columns if name.startswith('train_') and name not in HIDDEN]
        for axes, prefix, shown in (
            (losses, 'train_', terms),
            (validation, 'eval_', [name for name in columns if name.startswith('eval_')]),
            (rate, '', ['lr']),
        ):
            for number, column in enumerate(shown):
                _draw(axes, rows, column, column.removeprefix(prefix), style(number))
    else:
        for number, (name, rows) in enumerate(runs.items()):
            look = style(number)
            _draw(losses, rows, 'train_loss', label(name), look)
            _draw(rate, rows, 'lr', label(name), look)
            _draw(validation, rows, 'eval_mAP', f'{label(name)}: mAP', look)
            _draw(
                validation,
                rows,
                'eval_rank1',
                f'{label(name)}: rank-1',
                {**look, 'linestyle': '--', 'markerfacecolor': 'white'},
            )
    for axes, title in ((losses, 'training loss'), (rate, 'learning rate'), (validation, 'validation')):
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, 'none', ha='center', transform=axes.transAxes)
    save_figure(figure, path)


def _draw(axes: 'Axes', rows: Rows, column: str, name: str, look: dict[str, str]) -> None:
    points = [(int(row['epoch']), float(row[column])) for row in rows if row.get(column) not in (None, '')]
    if points:
        axes.plot(*zip(*points), label=name, markersize=4, **look)


def plot_curves(folder: Path, rows: Rows) -> None:
    """Plot a run's own curves as `curves.png`; without matplotlib, log that they are skipped."""
    try:
        require_matplotlib()
    except ValueError as error:
        _logger.info(f'Skipping curves.png: {error}')
        return
    save_curves({folder.name: rows}, folder / 'curves.png')
