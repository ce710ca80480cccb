"""What `vireid` takes to answer a simple question, compared with the import of timm.

    python benchmarks/startup.py
    python benchmarks/startup.py --save benchmarks/results/startup.cpu.json

Every command runs as often as `import timm`, in turns. Prints a table and, as its last line, one JSON object: medians
of CPU seconds (user and system, of all threads), and how many times `import timm` they are.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import publish

REFERENCE = 'import timm'
QUESTIONS = ('--version', '--help', 'train --help', 'train --epochz 3')


def cpu_seconds(*arguments: str) -> float:
    """Return the CPU time of one Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(repeats: int) -> dict[str, Any]:
    """Return medians over the repeats; commands take turns, so that a busy machine slows all of them."""
    commands = {REFERENCE: ('-c', REFERENCE)}
    commands |= {f'vireid {words}': ('-m', 'vireid_timm', *words.split()) for words in QUESTIONS}
    taken = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            taken[name].append(cpu_seconds(*command))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ratios = {name: median / medians[REFERENCE] for name, median in medians.items() if name != REFERENCE}
    return {'repeats': repeats, 'cpu_s': medians, 'over_import_timm': ratios}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        f'| `{name}` | {seconds:.2f} s | {result["over_import_timm"].get(name, 1):.2f} |'
        for name, seconds in result['cpu_s'].items()
    ]
    return '\n'.join(['| | CPU time | times `import timm` |', '|---|---|---|', *rows])


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--save', type=Path, help='write the JSON there, too')
    args = parser.parse_args()
    result = measure(args.repeats)
    publish(result, table(result), torch.device('cpu'), args.save)


if __name__ == '__main__':
    main()
