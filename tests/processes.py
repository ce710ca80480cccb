"""Real processes that are there at once: forked from one that has imported torch and this package already."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

METHOD = 'forkserver'  # how torch.multiprocessing.start_processes is to start them
_CONTEXT = multiprocessing.get_context(METHOD)
_CONTEXT.set_forkserver_preload(['vireid_timm.cli'])


def start(work: Callable, *arguments: Any, output: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Start a process that computes with one thread, and whose words go to a file.

    Args:
        work: A function of a module.
        arguments: Its arguments.
        output: Where what it prints goes.
        environment: Variables that it has beside those of this process.
    """
    process = _CONTEXT.Process(target=_work, args=(work, arguments, output, dict(environment)), daemon=True)
    process.start()
    return process


def _work(work: Callable, arguments: tuple, output: Path, environment: dict[str, str]) -> None:
    import torch  # not where this module is imported: tests/conftest.py has settings to make before that

    with open(output, 'wb') as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*arguments)
