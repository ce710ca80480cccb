"""Which device computes, in which precision, and how several processes (torchrun) go about one job together."""

import ctypes
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from typing import TypeVar

import torch
from timm.utils import init_distributed_device, is_distributed_env, world_info_from_env
from torch import distributed

_logger = logging.getLogger(__name__)

_Result = TypeVar('_Result')

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt (malloc.h)


def named_device(name: torch.device | str) -> torch.device:
    """The device of that name, whether or not this machine has it.

    Raises:
        ValueError: A name that is no device.
    """
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'unknown device {name!r}; expected cuda, cuda:1, mps, cpu, ...') from error


def resolve_device(name: str = 'cuda') -> torch.device:
    """The device of that name, or the CPU, saying so, where there is no such accelerator.

    Raises:
        ValueError: A name that is no device.
    """
    device = named_device(name)
    missing = (device.type == 'cuda' and not torch.cuda.is_available()) or (
        device.type == 'mps' and not torch.backends.mps.is_available()
    )
    if missing:
        _logger.info(f'No {name} device here: computing on the CPU')
        return torch.device('cpu')
    return device


def autocast_dtype(device: torch.device, amp: bool | None, amp_dtype: str = 'bfloat16') -> torch.dtype | None:
    """The type that autocast computes in, or None for full precision.

    Args:
        device: Where.
        amp: Whether; None decides for mixed precision where the device is fast at bfloat16.
        amp_dtype: `bfloat16` or `float16`.
    """
    if amp is None:
        amp = _fast_at_bfloat16(device)
    return getattr(torch, amp_dtype) if amp else None


def keep_memory() -> None:
    """Let glibc's allocator keep what is freed, for a process of one's own that computes on the CPU; a no-op elsewhere.

    By default every large tensor gets fresh pages from the kernel and gives them back. A training step makes and frees
    thousands of them, of the same sizes every time (docs/performance.md has figures).
    """
    try:
        allocator = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    allocator(_M_MMAP_MAX, 0)
    allocator(_M_TRIM_THRESHOLD, -1)  # never


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
    everyone = values.new_empty(count * values.numel())
    distributed.all_gather_into_tensor(everyone, values.flatten())
    # Added up in the order of the processes, whatever the shape: an exchange that adds up divides its work by shape.
    return sum(everyone.view(count, *values.shape)) / count


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


def _fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    # Without these instructions a CPU imitates bfloat16 and is slower than in float32.
    checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return device.type == 'cpu' and any(getattr(torch.cpu, check, lambda: False)() for check in checks)
