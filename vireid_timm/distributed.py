"""Ranks that `torchrun` started together: join and leave, and the few things that they exchange."""

import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from timm.utils import init_distributed_device, is_distributed_env, world_info_from_env
from torch import distributed

from .device import named_device, resolve_device

_Result = TypeVar('_Result')


@contextmanager
def process_group(name: str = 'cuda') -> Iterator[torch.device]:
    """Join the other ranks if there are any, yield this rank's device, and leave at the end.

    `torchrun` and SLURM's `srun` start ranks that differ only in their environment. With GPUs each rank gets its own;
    GPU tensors are exchanged by NCCL, CPU tensors by Gloo. A process that runs alone only resolves its device. A group
    that is joined already is neither joined again nor left.

    Args:
        name: As for `resolve_device`; with several ranks the number of a GPU (`cuda:1`) is ignored.

    Raises:
        ValueError: Not the name of a device, a device that torch cannot compute on here, or more ranks than GPUs.
    """
    device = resolve_device(named_device(name).type if _is_rank() else name)
    if device.type == 'cuda' and _is_rank():
        local_rank = world_info_from_env()[0]
        _check_gpus(local_rank, torch.cuda.device_count())
        device = torch.device('cuda', local_rank)
    if _has_joined() or not _is_rank():
        yield device
        return
    # Gloo for flags: exchanging one on the CPU does not wait for what the GPU still has to do.
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else None
    device = init_distributed_device(Namespace(device=device.type, dist_backend=backend))
    try:
        yield device
    except BaseException as error:
        error.known_to_all = getattr(error, 'known_to_all', False)
        raise
    finally:
        # Gloo's thread may still have to drop the last tensor, which takes the interpreter. Leaving the group holds the
        # interpreter while it waits for that thread: with torch 2.5 both waited forever, with 2.11 and later never.
        if torch.__version__ < '2.11':
            time.sleep(0.5)
        distributed.destroy_process_group()


def _check_gpus(local_rank: int, count: int) -> None:
    """Check that every rank of this machine has a GPU."""
    known = os.environ.get('LOCAL_WORLD_SIZE')  # SLURM tells no rank how many others there are
    if int(known or local_rank + 1) > count:
        error = ValueError(
            f'there are {count} GPUs for {known or "more"} processes on this machine. Start at most one process per '
            'GPU (--nproc-per-node), or use the CPU (--device cpu)'
        )
        if not known:
            error.known_to_all = False
        raise error


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) where it runs alone."""
    return (distributed.get_rank(), distributed.get_world_size()) if _has_joined() else (0, 1)


def is_rank_zero() -> bool:
    """Return whether this is the rank that logs and writes; known from the environment before ranks have joined."""
    if _has_joined():
        return distributed.get_rank() == 0
    return not _is_rank() or world_info_from_env()[1] == 0


def is_local_rank_zero() -> bool:
    """Return whether this is the first rank of its machine, or runs alone."""
    return not _is_rank() or world_info_from_env()[0] == 0


def any_rank(flag: bool) -> bool:
    """Return True on every rank if the flag is set on any. Collective; a group with Gloo does not wait for a GPU."""
    if not _has_joined():
        return flag
    flags = torch.tensor(int(flag), device=_exchange_device())
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags.item())


def gather(values: torch.Tensor) -> torch.Tensor:
    """Stack the values of all ranks, [world_size, ...], without gradients. Collective.

    Args:
        values: Of the same shape on every rank.
    """
    everyone = values.new_empty(rank_and_world_size()[1], *values.shape)
    if len(everyone) == 1:
        return everyone.copy_(values.detach()[None])
    distributed.all_gather(list(everyone.unbind()), values.detach().contiguous())
    return everyone


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of the ranks' values, bit for bit the same on all of them. Collective.

    Args:
        values: Of the same shape on every rank; NaN on one rank makes the mean NaN.
    """
    world_size = rank_and_world_size()[1]
    # Added up in the order of the ranks: an all-reduce splits its work by shape, and the last bit depends on that.
    return sum(gather(values)) / world_size if world_size > 1 else values


def from_rank_zero(value: _Result) -> _Result:
    """Return rank 0's value on every rank; it travels as a pickle. Collective."""
    values = [value]
    if _has_joined():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def all_ranks(work: Callable[[], _Result]) -> _Result:
    """Run `work` on every rank, and raise on all of them if it fails on any. Collective.

    It is for mistakes that most ranks find, such as a wrong setting: they end with one message instead of one per rank.

    Args:
        work: What to run. It must not exchange anything itself.

    Returns:
        What `work` returned on this rank.

    Raises:
        Exception: What `work` raised on this rank.
        ValueError: What it raised on another rank, which the message names.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as caught:  # raised below, once every rank knows
        error = caught
    if not any_rank(error is not None):
        return result
    problems = [None] * world_size
    distributed.all_gather_object(problems, None if error is None else str(error) or type(error).__name__)
    if error is None:
        other = next(other for other, problem in enumerate(problems) if problem is not None)
        error = ValueError(f'rank {other} of {world_size}: {problems[other]}')
    raise known_to_all(error)


def known_to_all(error: BaseException) -> BaseException:
    """Mark an error that every rank raises, so that only rank 0 prints it."""
    error.known_to_all = True
    return error


def is_reported_here(error: BaseException) -> bool:
    """Return whether this rank prints the error: rank 0 always does, others if rank 0 may not know of it.

    Before ranks join, all those of a machine make the same mistakes, such as a wrong setting: its first rank tells.
    """
    known = getattr(error, 'known_to_all', False if _has_joined() else None)
    return is_rank_zero() or (is_local_rank_zero() if known is None else not known)


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an exchange failed because another rank is gone; that rank has printed its own error."""
    # By their texts: both come with types that other failures have, too.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ('gloo/transport', 'ncclRemoteError'))


def _is_rank() -> bool:
    """Return whether a launcher started this process as one of several."""
    # A shell of a SLURM allocation has the variables of a rank, but no address to meet at.
    return is_distributed_env() and 'MASTER_ADDR' in os.environ


def _has_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _exchange_device() -> torch.device:
    """Return where flags are exchanged: on the CPU if the group can, else on the device that it can use."""
    kinds = [backend.split(':')[0] for backend in distributed.get_backend_config().split(',')]
    return torch.device('cpu' if 'cpu' in kinds else kinds[0])
