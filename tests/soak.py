"""Kill a training again and again at random moments, and compare what it ends as with a training left alone.

    python tests/soak.py --kills 40 --seed 0

Prints a table of the kills and, as its last line, a JSON document; fails if the two last checkpoints differ in a bit.
"""

import argparse
import json
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from killing import Training, equal

from vireid_timm.run_folder import load_checkpoint, newest_checkpoint

EPOCHS = 40
LONGEST_DELAY = 3.0  # seconds from the start of the process


def soak(folder: Path, kills: int, seed: int) -> dict:
    """Run both trainings; what the JSON line says."""
    chance = random.Random(seed)
    epochs = ('--epochs', str(EPOCHS), '--val-interval', '1')
    undisturbed, killed = folder / 'undisturbed', folder / 'killed'
    undisturbed.mkdir()
    killed.mkdir()
    start = time.monotonic()
    whole = Training(undisturbed, *epochs)
    assert whole.wait(3600) == 0, whole.said()
    seconds = time.monotonic() - start
    print(f'undisturbed: {seconds:.0f} s\n\n{"kill":>4}  {"while":<22}{"after":>7}  it had begun with')
    counts: dict[str, int] = {}
    for number in range(1, kills + 1):
        training = Training(killed, *epochs)
        doing, lived = _kill(training, chance)
        counts[doing] = counts.get(doing, 0) + 1
        print(f'{number:>4}  {doing:<22}{lived:>6.1f}s  {_beginning(training)}', flush=True)
    training = Training(killed, *epochs)
    assert training.wait(3600) == 0, training.said()
    same = equal(load_checkpoint(training.run), load_checkpoint(whole.run))
    path, state = newest_checkpoint(training.run)
    return {
        'kills': kills,
        'while': counts,
        'seed': seed,
        'epochs': state['epoch'],
        'checkpoint': path.name,
        'same_weights_averages_optimiser_and_summary': same,
    }


def _kill(training: Training, chance: random.Random) -> tuple[str, float]:
    """Kill it; what it was doing, and how many seconds after its start."""
    start, seen = time.monotonic(), []
    what, is_so = _moment(training, chance)

    def now() -> bool:
        if is_so():
            seen.append(what)
        return bool(seen) or time.monotonic() >= start + LONGEST_DELAY  # a best model may never come again

    status = training.kill_when(now, signal.SIGKILL)
    assert status == -signal.SIGKILL, training.said()
    return what if seen else 'any moment', time.monotonic() - start


def _moment(training: Training, chance: random.Random) -> tuple[str, Callable[[], bool]]:
    """What to wait for before the kill, in words and as a test."""
    if not any(training.cache.glob('images-*')) and chance.random() < 0.7:
        return 'storing images', training.stores_images
    wait_for = chance.random()
    if wait_for < 0.25:
        return 'writing a checkpoint', training.writes('last.pth')
    if wait_for < 0.4:
        return 'writing the summary', training.writes('summary.csv')
    if wait_for < 0.5:
        return 'saving the best model', training.writes('best')
    until = time.monotonic() + chance.uniform(0, LONGEST_DELAY)
    return 'any moment', lambda: time.monotonic() >= until


def _beginning(training: Training) -> str:
    said = training.said()
    place = re.search(r'from (epoch .*)', said)
    if place:
        return place[1]
    return 'a new run' if 'a new run' in said else 'nothing yet'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=40)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='vireid-soak-') as folder:
        result = soak(Path(folder), args.kills, args.seed)
    print(json.dumps(result))
    assert result['same_weights_averages_optimiser_and_summary'], 'the killed training ended as another one'


if __name__ == '__main__':
    main()
