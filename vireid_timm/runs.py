"""What a training run leaves behind: its folder, checkpoints, summary and curves."""

import csv
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from .files import whole_file

_logger = logging.getLogger(__name__)

LAST = 'last.pth'
BEST = 'best'
SUMMARY = 'summary.csv'
CONFIG = 'args.yaml'
MODEL_CONFIG = 'config.json'
CLASS_MAP = 'class_map.json'
LOG = 'train.log'


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the run's `last` checkpoint; the previous one stays until the new one is on disk."""
    with whole_file(folder / LAST) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint of this library, a run folder's `last.pth`, on the CPU.

    Raises:
        ValueError: No such file, or one that is not such a checkpoint.
    """
    path = Path(path)
    path = path / LAST if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f'no checkpoint {path}; a run writes it after its first epoch')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged file
        raise ValueError(f'{path} is damaged or not a checkpoint of this library: {error}') from error
    if not isinstance(state, dict) or not {'state_dict', 'epoch', 'arch'} <= set(state):
        raise ValueError(f'{path} is not a training checkpoint of this library')
    return state


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Keep what this package logs, from INFO on, in the run's `train.log` as long as the block runs."""
    package = logging.getLogger(__package__)
    handler = logging.FileHandler(folder / LOG, encoding='utf-8')
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    level = package.level
    package.addHandler(handler)
    if package.getEffectiveLevel() > logging.INFO:
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


def save_config(folder: Path, settings: dict[str, Any]) -> None:
    """Write the resolved settings, usable as `--config`."""
    with whole_file(folder / CONFIG) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding='utf-8')


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write all epochs anew: timm's appending helper would keep rows of epochs that a resumed run repeats."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with whole_file(folder / SUMMARY) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, restval='')
        writer.writeheader()
        writer.writerows(rows)


def plot_curves(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Draw the loss terms and the validation's mAP and rank-1 over the epochs as `curves.png`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _logger.info('No curves.png: install the extra `plots` (pip install "vireid_timm[plots]") to get it')
        return
    figure = Figure(figsize=(10, 4), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for axes, prefix in ((left, 'train_'), (right, 'eval_')):
        for column in (name for name in columns if name.startswith(prefix)):
            points = [(int(row['epoch']), float(row[column])) for row in rows if row.get(column) not in (None, '')]
            if points and column not in ('train_accuracy', 'train_pictures_per_second'):
                axes.plot(*zip(*points), marker='.', label=column.removeprefix(prefix))
        axes.set_xlabel('epoch')
        if axes.lines:
            axes.legend()
        axes.grid(alpha=0.3)
    left.set_title('training loss and its terms')
    right.set_title('validation (held-out identities)')
    with whole_file(folder / 'curves.png') as temporary:
        figure.savefig(temporary, format='png', dpi=120)
