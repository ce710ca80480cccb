"""The web demo in a process of its own, as `vireid demo --web` starts it, with few people; and files to upload."""

from pathlib import Path
from typing import NamedTuple

from vireid_timm.cli.main import main

PEOPLE = 8
BROKEN = {
    'text.jpg': 'not one of the formats',
    'cut.jpg': 'truncated',
    'bomb.png': 'more than the limit of 25,000,000 pixels',
}


class Demo(NamedTuple):
    """A running demo: its address, and the file with what it prints."""

    address: str
    output: Path


def serve(port: int) -> int:
    from vireid_timm.web import galleries

    galleries.PEOPLE = PEOPLE
    return main(['demo', '--web', '--port', str(port), '--device', 'cpu'])
