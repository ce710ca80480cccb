"""What one GPU gives within some minutes: training, evaluation, CUDA graphs, compiling, several trainings at once.

    python benchmarks/gpu.py --minutes 12                          everything, the most valuable first
    python benchmarks/gpu.py --parts step profile --again step     some parts, `step` anew
    python benchmarks/gpu.py --device cpu --tiny --output tiny.json     does the program itself work?

Each part (`gpu_parts.py` describes them) runs in a process of its own with its own time limit. Every result is printed
and written to --output as soon as it is there, so a killed run keeps what it has, and the same command does only the
rest. Meanwhile other processes render a dataset of SYSU-MM01's size for the parts that need images. It runs from a
checkout, without installing anything. Prints a table and, as its last line, one JSON object; the exit status is 1
unless everything that was asked for is there.
"""

import argparse
import configparser
import ctypes
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Part -> seconds at most. Those in NEED_IMAGES come later if the images are not rendered yet. `device` comes first.
LIMITS = {
    'step': 180,
    'loop': 150,
    'evaluation': 120,
    'graphs': 120,
    'profile': 60,
    'compile': 240,
    'compile-again': 120,
    'several': 180,
}
LEAST = 20  # seconds left that are worth starting a part
NEED_IMAGES = ('loop', 'evaluation')


def unmet_requirements(setup: Path) -> list[str]:
    """What setup.cfg requires and is missing or too old here, without importing any of it."""
    parser = configparser.ConfigParser()
    parser.read(setup, encoding='utf-8')
    unmet = []
    for requirement in parser['options']['install_requires'].split():
        name, _, floor = requirement.partition('>=')
        try:
            found = version(name)
        except PackageNotFoundError:
            unmet.append(f'{requirement} (missing)')
            continue
        if _numbers(found) < _numbers(floor):
            unmet.append(f'{requirement} (found {found})')
    return unmet


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text.partition('+')[0])]


def start_rendering(args: argparse.Namespace) -> subprocess.Popen:
    """Render the images in processes beside this one, unless they are there."""
    shutil.rmtree(f'{args.images}.partial', ignore_errors=True)  # of a run that was killed
    scale = ['--identities', '12', '--test-identities', '8'] if args.tiny else ['--full-size']
    workers = 0 if args.tiny else max(1, (os.cpu_count() or 2) // 2)  # the other half is for what is measured
    command = [sys.executable, '-m', 'vireid_timm', 'synth', str(args.images), '--layout', 'sysu_mm01', *scale]
    command += ['--size', *map(str, args.size), '--workers', str(workers)]
    with open(args.folder / 'render.log', 'w') as log:
        return subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=lead_a_group)


def lead_a_group() -> None:
    """Let this process and those that it starts be ended together, and with the one that started it."""
    os.setsid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of Linux


def end_group(leader: int) -> None:
    """End such processes."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def in_turn(parts: list[str], rendering: subprocess.Popen | None, end: float) -> Iterator[str]:
    """Yield the parts in their order, those that need images not before these are rendered."""
    waiting = list(parts)
    while waiting:
        can_wait = rendering is not None and rendering.poll() is None and time.monotonic() < end
        ready = [part for part in waiting if part not in NEED_IMAGES or not can_wait]
        if ready:
            waiting.remove(ready[0])
            yield ready[0]
        else:
            time.sleep(0.2)


class Results:
    """The results so far, of one device: printed and written whenever there is a new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {'parts': {}}

    def is_complete(self, part: str) -> bool:
        return self.values['parts'].get(part, {}).get('complete', False)

    def add(self, part: str, values: dict[str, Any]) -> None:
        from vireid_timm.files import save_json

        known = self.values['parts'].get('device', {}).get('hardware', '')
        if known and values.get('hardware', known) != known:
            sys.exit(f'{self.path} has results of {known}, not of {values["hardware"]}: give another --output')
        self.values['parts'].setdefault(part, {}).update(values)
        save_json(self.path, self.values)
        print(f'{part}: {json.dumps(values)}', flush=True)


def run_part(part: str, args: argparse.Namespace, sender: Connection) -> None:
    """What the process of a part does."""
    lead_a_group()
    import gpu_parts

    gpu_parts.run(part, args, sender)


def measure(part: str, args: argparse.Namespace, limit: float, results: Results) -> None:
    """Run one part in its own process; add its results as they come, and whether it is complete or why not."""
    start, context = time.monotonic(), multiprocessing.get_context('forkserver')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_part, args=(part, args, sender))
    process.start()
    sender.close()  # a process that has ended is then the end of the pipe
    problem = ''
    try:
        while receiver.poll(max(0, start + limit - time.monotonic())):
            results.add(part, receiver.recv())
        problem = f'stopped after {limit:.0f} s'
    except EOFError:
        process.join()
        if process.exitcode:
            said = (args.folder / f'{part}.log').read_text().strip().rpartition('\n')[2]
            problem = said or f'ended with status {process.exitcode}'
    finally:
        if process.is_alive():
            end_group(process.pid)
        process.join()
    taken = round(time.monotonic() - start, 1)
    results.add(part, {'complete': not problem, 'problem': problem, 'seconds': taken})


def rows(values: dict[str, Any], name: str = '') -> Iterator[str]:
    """Lines of a Markdown table."""
    for key, value in values.items():
        label = f'{name}, {key}' if name else key
        if isinstance(value, dict):
            yield from rows(value, label)
        else:
            yield f'| {label} | {f"{value:.4g}" if isinstance(value, float) else value} |'


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=12, help='for everything (default: 12)')
    parser.add_argument('--parts', nargs='+', choices=LIMITS, default=list(LIMITS), metavar='PART')
    parser.add_argument('--again', nargs='+', choices=LIMITS, default=[], metavar='PART', help='measure anew')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--tiny', action='store_true', help='to try the program, not the device')
    parser.add_argument('--output', type=Path, default=ROOT / 'benchmarks/results/gpu.cuda.json')
    parser.add_argument('--folder', type=Path, default=Path('output/gpu'), help='for images, logs and compiled code')
    args = parser.parse_args()
    args.size = (64, 32) if args.tiny else (288, 144)
    args.folder = args.folder.absolute()
    args.images = args.folder / f'sysu_mm01-{"tiny" if args.tiny else "full"}'
    args.parts = [part for part in LIMITS if part in {*args.parts, *args.again}]
    return args


def main() -> None:
    """Measure what was asked for and is not there yet."""
    args, end = arguments(), time.monotonic()
    end += 60 * args.minutes
    if unmet := unmet_requirements(ROOT / 'setup.cfg'):
        sys.exit(f'this needs {", ".join(unmet)}')
    sys.path.insert(0, str(ROOT))
    paths = (str(ROOT), str(ROOT / 'benchmarks'), os.environ.get('PYTHONPATH'))
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, paths))  # of the other processes
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = str(args.folder / 'compiled')
    args.folder.mkdir(parents=True, exist_ok=True)
    results = Results(args.output)
    parts = [part for part in args.parts if part in args.again or not results.is_complete(part)]
    if 'compile' in parts:
        shutil.rmtree(args.folder / 'compiled', ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended below
    rendering = start_rendering(args) if set(parts) & set(NEED_IMAGES) else None
    late = []
    try:
        multiprocessing.set_forkserver_preload(['gpu_parts'])  # a process that imports it once, for all parts
        forkserver.ensure_running()
        if parts:
            measure('device', args, 60, results)
        for part in in_turn(parts, rendering, end) if results.is_complete('device') else ():
            left = end - time.monotonic()
            if left < LEAST:
                late.append(part)
            else:
                measure(part, args, min(LIMITS[part], left), results)
    finally:
        if rendering is not None and rendering.poll() is None:
            end_group(rendering.pid)
    complete = not late and all(results.is_complete(part) for part in args.parts)
    if late:
        print(f'There was no time for {", ".join(late)}; the same command measures the rest')
    print('\n'.join(['| | |', '|---|---|', *rows(results.values['parts'])]))
    print(json.dumps(results.values))
    sys.exit(0 if complete else 1)


if __name__ == '__main__':
    main()
