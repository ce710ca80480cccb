"""Functions over many items in threads and processes, in order."""

import functools
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vireid_timm.data.store import _decode_chunk
from vireid_timm.data.workers import CHUNK, default_workers, in_order, map_chunks


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_in_order(workers):
    started = []

    def slow_start(number):
        started.append(number)
        time.sleep(0.001 * (number % 3 == 0))
        return number * number

    results = in_order(slow_start, range(50), workers=workers)
    assert next(results) == 0
    assert len(started) <= 2 * max(workers, 1) + 1 + workers  # only a few are computed ahead
    assert list(results) == [number * number for number in range(1, 50)]


def test_in_order_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda number: 1 // number, [1, 0, 1], workers=2))


def test_in_order_with_processes():
    assert list(in_order(math.sqrt, [4.0, 9.0, 16.0], workers=2, processes=True)) == [2.0, 3.0, 4.0]
    assert pickle.dumps(functools.partial(_decode_chunk, size=(24, 12))), 'worker processes get it pickled'


def test_death_of_a_worker_is_reported():
    with pytest.raises(ChildProcessError, match='worker process died.*--workers 0'):
        list(in_order(os._exit, [1, 1], workers=2, processes=True))


@pytest.mark.parametrize('workers', [0, 3])
@pytest.mark.parametrize('count', [0, 1, CHUNK, 2 * CHUNK + 5])
def test_map_chunks(workers, count):
    used = {}
    map_chunks(sum, range(count), used.__setitem__, rendered=0, workers=workers, label='', progress=False)
    assert list(used) == list(range(0, count, CHUNK))
    assert sum(used.values()) == sum(range(count))


def test_map_chunks_ends_its_threads_on_an_error():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        map_chunks(len, range(20 * CHUNK), lambda start, n: 1 // 0, rendered=0, workers=2, label='', progress=False)
    assert threading.active_count() == before


def test_default_workers():
    assert 1 <= default_workers() <= 8


SCRIPT = """
import sys
with open('log', 'a') as log:
    log.write(f'{__name__}\\n')
from vireid_timm.data.workers import in_order
assert __name__ == '__main__'
print(sum(in_order(abs, range(-50, 0), workers=2, processes=True)))
assert sys.modules['__main__'].log is log
"""


@pytest.mark.parametrize('way', ['file', 'module', 'stdin', 'interactive'])
def test_worker_processes_run_nothing_of_the_callers_script(tmp_path, way):
    (tmp_path / 'script.py').write_text(SCRIPT)
    options = {
        'file': ['script.py'],
        'module': ['-m', 'script'],
        'stdin': ['-'],
        'interactive': ['-i', '-q'],
    }[way]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get('PYTHONPATH')])]
    done = subprocess.run(
        [sys.executable, *options],
        input={'stdin': SCRIPT, 'interactive': 'exec(open("script.py").read())\n'}.get(way, ''),
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['1275']
    assert (tmp_path / 'log').read_text() == '__main__\n'


def test_starting_processes_from_several_threads_keeps_the_main_module():
    main = sys.modules['__main__']
    with ThreadPoolExecutor(3) as threads:
        run = functools.partial(in_order, abs, [-1, -2], workers=2, processes=True)
        assert list(threads.map(lambda _: list(run()), range(3))) == [[1, 2]] * 3
    assert sys.modules['__main__'] is main
