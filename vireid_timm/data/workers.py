"""Apply a function to many items in threads or processes, in order."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from types import ModuleType

from tqdm import tqdm

from ..options import MAX_WORKERS, check_range

CHUNK = 32  # items per task: enough to hide the overhead of a task, few enough for a smooth progress bar
PROCESSES_FROM = 4000  # rendered images from which processes pay off: each has to import the library first


_starting = threading.Lock()


class _Process(SpawnProcess):
    """A process that does not run the caller's script again.

    A spawned process is told the path of `__main__` and runs that file before its task, so a script without an
    `if __name__ == '__main__':` would start over in every worker. Nothing here needs a name from `__main__`, so an
    empty module takes its place for the few milliseconds of the start.
    """

    @staticmethod
    def _Popen(process: BaseProcess) -> object:
        with _starting:
            main = sys.modules['__main__']
            sys.modules['__main__'] = ModuleType('__main__')
            try:
                return SpawnProcess._Popen(process)
            finally:
                sys.modules['__main__'] = main

    def __reduce__(self) -> tuple:
        return object.__new__, (SpawnProcess,), self.__dict__  # the worker needs nothing of this class


class _Context(SpawnContext):
    Process = _Process


def default_workers() -> int:
    """Return one worker per core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(8, cores)


def in_order(
    function: Callable,
    items: Iterable,
    *,
    workers: int | None,
    processes: bool = False,
) -> Iterator:
    """Apply a function to every item in parallel and yield the results in order. Only a few are computed ahead.

    Args:
        function: The function. It must be picklable if `processes` is set, and not from `__main__`.
        items: Its arguments.
        workers: Items at a time; None for `default_workers`, 0 or 1 for the calling thread.
        processes: Use processes instead of threads, for work that holds the GIL (rendering does, decoding does not).

    Raises:
        ChildProcessError: If a worker process dies or cannot start.
    """
    workers = default_workers() if workers is None else workers
    check_range('workers', workers, maximum=MAX_WORKERS)
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, _Context()) if processes else ThreadPoolExecutor(workers)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            'a worker process died or could not start (out of memory?); pass workers=0 (--workers 0) to use none'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_chunks(
    function: Callable,
    items: Sequence,
    use: Callable[[int, object], None],
    *,
    rendered: int,
    workers: int | None,
    label: str,
    progress: bool,
) -> None:
    """Apply a function to chunks of items in parallel and use the results in order, with a progress bar.

    Args:
        function: Takes a list of up to `CHUNK` items. It must be picklable.
        items: The items.
        use: Takes the position of a chunk's first item and the chunk's result, in the calling thread.
        rendered: Number of items that are rendered, not decoded. From `PROCESSES_FROM` on, processes do the work.
        workers: Chunks at a time, as for `in_order`.
        label: Label of the progress bar.
        progress: Show the progress bar, if the output is a terminal.
    """
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    results = in_order(function, chunks, workers=workers, processes=rendered >= PROCESSES_FROM)
    with tqdm(total=len(items), desc=label, unit='img', disable=None if progress else True) as bar, closing(results):
        for index, result in enumerate(results):
            use(index * CHUNK, result)
            bar.update(len(chunks[index]))
