"""Real processes that are there at once: forked from one that has imported torch and this package already."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

METHOD = 'forkserver'  # how torch.multiprocessing.start_processes is to start them
_CONTEXT = multiprocessing.get_context(METHOD)
_CONTEXT.set_forkserver_preload(['vireid_timm.cli.main'])


def start(work: Callable, *arguments: Any, output: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Start a process that computes with one thread, and whose words go to a file.

    Args:
        work: A function of a module; what it returns is the exit status.
        arguments: Its arguments.
        output: Where what it prints goes.
        environment: Variables that it has beside those of this process.
    """
    process = _CONTEXT.Process(target=_work, args=(work, arguments, output, dict(environment)), daemon=True)
    process.start()
    return process


def start_two(
    work: Callable,
    *arguments: Any,
    folder: Path,
    slurm: bool = False,
    **environment: str,
) -> tuple[list[int | None], str]:
    """Start two processes that can meet as those of `torchrun`, or of SLURM, can, and wait until they are done.

    Args:
        work: As for `start`.
        arguments: Its arguments.
        folder: An existing one, where what they print goes.
        slurm: Whether their variables are those of SLURM's `srun`.
        environment: Variables that they have as well.

    Returns:
        Exit statuses, None of one that does not end, and what they have printed.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        meeting = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1])}
    size, *numbers = (
        ('SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID') if slurm else ('WORLD_SIZE', 'RANK', 'LOCAL_RANK')
    )
    outputs = [folder / f'{number}.txt' for number in range(2)]
    processes = []
    for number, output in enumerate(outputs):
        own = {**environment, **meeting, size: '2', **dict.fromkeys(numbers, str(number))}
        processes.append(start(work, *arguments, output=output, environment=own))
    for process in processes:
        process.join(120)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses, ''.join(output.read_text(encoding='utf-8') for output in outputs)


def _work(work: Callable, arguments: tuple, output: Path, environment: dict[str, str]) -> None:
    import torch  # not where this module is imported: tests/conftest.py has settings to make before that

    with open(output, 'wb') as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(work(*arguments))
