"""Map over many items in threads or processes, in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context


def default_workers() -> int:
    """One worker per core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(8, cores)


def in_order(
    function: Callable,
    items: Iterable,
    *,
    workers: int,
    processes: bool = False,
) -> Iterator:
    """Apply a function to every item in parallel and yield the results in order, only a few of them ahead of time.

    Args:
        function: What to apply; with `processes` it must be picklable.
        items: Its arguments.
        workers: How many at a time; 0 and 1 work in the calling thread.
        processes: Use processes rather than threads, for work that holds Python's lock (rendering does, decoding not).

    Raises:
        ChildProcessError: If a worker process dies or cannot start.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, get_context('spawn')) if processes else ThreadPoolExecutor(workers)
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
            'a worker process died or could not start; if a script of yours makes this call, put it under '
            '`if __name__ == "__main__":`, or pass workers=0 (--workers 0)'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
