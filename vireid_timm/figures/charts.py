"""What all charts share: colours and marks, and matplotlib figures that need no screen."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow, which is faint on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#999999')
MARKERS = ('o', '^', 's', 'D', 'v', 'P', 'X', '*')


def require_matplotlib() -> None:
    """Check that matplotlib is there.

    Raises:
        ValueError: It is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError('charts need the extra `plots` (pip install "vireid_timm[plots]")') from None


def new_figure(width: float, height: float) -> 'Figure':
    """Return an empty figure of some inches that lays itself out, independent of the global `pyplot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: 'Figure', path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format='png', dpi=150)


def style(number: int) -> dict[str, str]:
    """Return colour and marker of the series of some number, different for the first eight."""
    return {'color': COLOURS[number % len(COLOURS)], 'marker': MARKERS[number % len(MARKERS)]}


def label(name: str) -> str:
    """Return a name that matplotlib shows as it is: its font lacks many letters, and `$` and `_` mean something."""
    escaped = name.encode('ascii', 'backslashreplace').decode().replace('$', r'\$')
    return f' {escaped}' if escaped.startswith('_') else escaped
