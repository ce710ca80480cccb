"""The version, and the versions of everything that can change a number."""

import re
from functools import cache
from pathlib import Path

__version__ = '0.1.0'
LOWEST_TIMM = '1.0.31'


def check_timm() -> None:
    """Check timm's version, because an older timm would fail much later, inside a training.

    Raises:
        ImportError: It is too old.
    """
    import timm

    installed, lowest = (
        [int(part) for part in re.findall(r'\d+', version)[:3]] for version in (timm.__version__, LOWEST_TIMM)
    )
    if installed < lowest:
        raise ImportError(
            f'vireid_timm needs timm {LOWEST_TIMM} or newer, but timm {timm.__version__} is installed; upgrade it: '
            f'pip install "timm>={LOWEST_TIMM}"'
        )


def package_versions() -> dict[str, str]:
    """Return the versions that reports and saved models record, by package.

    `commit` is among them if the package runs from a checkout.
    """
    import numpy
    import timm
    import torch

    versions = {
        'vireid_timm': __version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'numpy': numpy.__version__,
    }
    commit = _commit()
    return {**versions, 'commit': commit} if commit else versions


@cache
def _commit() -> str:
    """Return the commit of the checkout; empty for an installed package, whose version says enough."""
    import subprocess

    root = Path(__file__).resolve().parents[1]
    if not (root / '.git').exists():
        return ''
    try:
        command = ['git', '-C', str(root), 'rev-parse', 'HEAD']
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        return ''
