"""Several processes (torchrun) that compute together."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import TypeVar

import torch
from timm.utils import init_distributed_device, is_distributed_env, world_info_from_env
from torch import distributed

from .device import resolve_device

_Result = TypeVar('_Result')


def init_distributed(name: str = 'cuda') -> torch.device:
    """Join the other processes if `torchrun` started this one, and choose this process's device.

    `torchrun --nproc-per-node N` starts N processes that differ in their environment alone. With GPUs each gets its own
    and they talk by NCCL (and by Gloo about what is not on a GPU), else by Gloo. A process that was started alone only
    resolves its device, and one that has joined already does not join again.

    Args:
        name: As for `resolve_device`; among several processes the number of a GPU (`cuda:1`) is ignored.

    Raises:
        ValueError: A name that is no device, or more processes than GPUs.
    """
    device = resolve_device(name)
    # A shell of a SLURM allocation looks like one of several processes, but has nobody to meet.
    if not is_distributed_env() or 'MASTER_ADDR' not in os.environ:
        return device
    local_rank = world_info_from_env()[0]
    if device.type == 'cuda' and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f'process {local_rank} of this machine finds no GPU of its own among {torch.cuda.device_count()}: start no '
            'more processes (--nproc-per-node) than there are GPUs, or compute on the CPU (--device cpu)'
        )
    if _has_joined():
        return torch.device(device.type, local_rank) if device.type == 'cuda' else device
    # A flag that is exchanged on the processor need not wait for what the GPU still has to do.
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else None
    return init_distributed_device(Namespace(device=device.type, dist_backend=backend))


def end_distributed() -> None:
    """Leave the other processes, if `init_distributed` joined any; to be called last, after an error too."""
    if _has_joined():
        distributed.destroy_process_group()


def process() -> tuple[int, int]:
    """Number of this process, and of how many that compute together; (0, 1) where it computes alone."""
    return (distributed.get_rank(), distributed.get_world_size()) if _has_joined() else (0, 1)


def is_primary() -> bool:
    """Whether this process is the one that prints and writes, known before the processes have joined."""
    return (process()[0] if _has_joined() else world_info_from_env()[1]) == 0


def any_process(flag: bool) -> bool:
    """Whether it is so in at least one process; all of them have to ask, and wait for each other.

    Cheap enough for every step: nothing waits for a GPU.
    """
    if not _has_joined():
        return flag
    flags = torch.tensor(int(flag), device=_exchange_device())
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags.item())


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Mean of the processes' values, the same in all of them: NaN everywhere if it is NaN in one.

    Args:
        values: Of any shape, the same one in every process; left as they are.
    """
    count = process()[1]
    if count == 1:
        return values
    # Added up in the order of the processes, whatever the shape: an exchange that adds up divides its work by shape.
    return sum(gather(values)) / count


def gather(values: torch.Tensor) -> torch.Tensor:
    """The values of all processes in their order, [world_size, ...], without gradients.

    Args:
        values: Of one shape in every process.
    """
    everyone = values.new_empty(process()[1], *values.shape)
    distributed.all_gather(list(everyone.unbind()), values.contiguous())
    return everyone


def together(work: Callable[[], _Result]) -> _Result:
    """Do what every process does at this point, and fail in all of them if it fails in one.

    Otherwise those that succeeded would wait for the failed one at their next exchange, until a timeout ends them.
    While nothing fails it costs no more than `any_process`.

    Args:
        work: This process's share; it must not exchange anything itself.

    Returns:
        What the work returned here.

    Raises:
        Exception: What the work raised here; `is_announced` says so of it.
        ValueError: What it raised in another process, named by its number.
    """
    number, count = process()
    if count == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as caught:  # raised again as soon as the others know
        error = caught
    if not any_process(error is not None):
        return result
    problems = [None] * count
    distributed.all_gather_object(problems, None if error is None else str(error) or type(error).__name__)
    if error is None:
        other = next(other for other, problem in enumerate(problems) if problem is not None)
        error = ValueError(f'process {other} of {count}: {problems[other]}')
    error.announced = True
    raise error


def on_primary(work: Callable[[], _Result]) -> _Result:
    """Do what one process does for all of them, and fail in all of them if it fails.

    Args:
        work: What process 0 does while the others wait; it must not exchange anything itself.

    Returns:
        What the work returned there, in every process; it is sent as a pickle.

    Raises:
        Exception: What the work raised, in process 0.
        ValueError: The same in the others, naming process 0.
    """
    result = [together(lambda: work() if is_primary() else None)]
    if process()[1] > 1:
        distributed.broadcast_object_list(result, src=0)
    return result[0]


def is_announced(error: BaseException) -> bool:
    """Whether every process knows of this error, so that it is enough if process 0 prints it."""
    return getattr(error, 'announced', False)


def has_lost_contact(error: BaseException) -> bool:
    """Whether an exchange failed since another process is gone; that one knows why, if it had the time to say so."""
    # torch has a type of its own for NCCL's errors only; Gloo's name the file that they come from.
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and 'gloo/transport' in str(error)
    )


def _has_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _exchange_device() -> torch.device:
    """Where small exchanges happen: on the CPU if the processes can, else on the device that they can use."""
    kinds = [backend.split(':')[0] for backend in distributed.get_backend_config().split(',')]
    return torch.device('cpu' if 'cpu' in kinds else kinds[0])
