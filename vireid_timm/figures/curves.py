"""Curves of a training run: losses and validation metrics over the epochs."""

import logging
from pathlib import Path
from typing import Any

from ..files import whole_file

_logger = logging.getLogger(__name__)


def plot_curves(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Plot the loss terms and the validation mAP and rank-1 over the epochs as `curves.png`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _logger.info('Skipping curves.png: it needs the extra `plots` (pip install "vireid_timm[plots]")')
        return
    figure = Figure(figsize=(10, 4), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for axes, prefix in ((left, 'train_'), (right, 'eval_')):
        for column in (name for name in columns if name.startswith(prefix)):
            points = [(int(row['epoch']), float(row[column])) for row in rows if row.get(column) not in (None, '')]
            if points and column not in ('train_accuracy', 'train_images_per_second'):
                axes.plot(*zip(*points), marker='.', label=column.removeprefix(prefix))
        axes.set_xlabel('epoch')
        if axes.lines:
            axes.legend()
        axes.grid(alpha=0.3)
    left.set_title('training losses')
    right.set_title('validation (held-out identities)')
    with whole_file(folder / 'curves.png') as temporary:
        figure.savefig(temporary, format='png', dpi=120)
