"""Training steps as one CUDA graph: recorded once on fixed memory, then repeated by the GPU without Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ..distributed import rank_and_world_size
from .config import TrainConfig

WARM_UP = 3  # steps before the recording, in which cuDNN chooses its kernels and the optimiser creates its state
_RECORDABLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

Step = Callable[..., dict[str, torch.Tensor]]


def why_no_graph(config: TrainConfig, optimizer: torch.optim.Optimizer, device: torch.device, scaled: bool) -> str:
    """Return what keeps the steps of a run from being recorded, in words; empty if nothing does.

    Args:
        config: The run's settings.
        optimizer: Its optimiser.
        device: Where it trains.
        scaled: Whether its loss is scaled.
    """
    is_fused = isinstance(optimizer, _RECORDABLE) and all(group.get('fused') for group in optimizer.param_groups)
    reasons = {
        '--no-cuda-graphs': not config.cuda_graphs,
        f'{device.type} has none': device.type != 'cuda',
        'float16 reads back at each step whether the gradients overflowed': scaled,
        'several processes exchange gradients': rank_and_world_size()[1] > 1,
        '--torchcompile launches its own kernels': config.torchcompile,
        '--grad-accum-steps makes steps of several batches': config.grad_accum_steps > 1,
        '--grad-checkpointing saves random states': config.grad_checkpointing,
        f"--opt {config.opt} is not torch's fused SGD, Adam or AdamW": not is_fused,
    }
    return next((reason for reason, holds in reasons.items() if holds), '')


class CudaRecorder:
    """Records kernels as torch does it: beside the default stream, after steps on the same side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> None:
        """Run work on the side stream, between what was and what will be launched on the current one."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that repeats the work's kernels; the work itself changes nothing yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: those that read images pin memory.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode='thread_local'),
        ):
            work()
        return graph.replay


class StepGraph:
    """A training step, run as it is for `WARM_UP` batches, then recorded and repeated.

    The step gets its tensors in memory that stays the same, and its results lie in memory that the next call
    overwrites. It must not read anything back from the device. Learning rates may change between calls; the optimiser
    reads them from the device here, so its schedules go on writing numbers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """Record nothing yet.

        Args:
            optimizer: torch's fused SGD, Adam or AdamW, which the step updates.
            device: A GPU.
        """
        self._optimizer = optimizer  # not its groups: resuming replaces them
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._recorder = CudaRecorder(device)
        self._inputs: list[torch.Tensor] = []
        self._results: dict[str, torch.Tensor] = {}
        self._replay: Callable[[], None] | None = None
        self._num_calls = 0

    def __call__(self, step: Step, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the step on a batch.

        Args:
            step: From tensors to tensors; always the same. Which one is recorded is seen at the first recording.
            inputs: Tensors of the same shapes and types at every call.

        Returns:
            What the step returned; the next call overwrites it.

        Raises:
            ValueError: The step cannot be recorded.
        """
        self._inputs = self._inputs or [torch.empty_like(values) for values in inputs]
        for fixed, values in zip(self._inputs, inputs, strict=True):
            fixed.copy_(values)
        for fixed, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            fixed.fill_(group['lr'])
        self._num_calls += 1
        work = partial(self._work, step)
        if self._num_calls <= WARM_UP:
            with self._on_the_device():
                self._recorder.run(work)
            return self._results
        if self._replay is None:
            self._record(work)
        self._replay()
        return self._results

    def _work(self, step: Step) -> None:
        self._results = step(*self._inputs)

    def _record(self, work: Callable[[], None]) -> None:
        try:
            with self._on_the_device(capturable=True):
                self._replay = self._recorder.record(work)
        except RuntimeError as error:
            reason = str(error.__context__ or error).partition('\n')[0]  # ending a broken recording fails, too
            raise ValueError(f'the step cannot become a CUDA graph: {reason}; give --no-cuda-graphs') from error

    @contextmanager
    def _on_the_device(self, capturable: bool = False) -> Iterator[None]:
        """Let the optimiser read its learning rates from the device, and let torch know that it is recorded."""
        groups = self._optimizer.param_groups
        before = [(group['lr'], group.get('capturable')) for group in groups]
        try:
            for group, rate in zip(groups, self._rates):
                group['lr'] = rate
                if 'capturable' in group:  # SGD always is
                    group['capturable'] |= capturable
            yield
        finally:
            for group, (rate, was_capturable) in zip(groups, before):
                group['lr'] = rate
                if was_capturable is not None:
                    group['capturable'] = was_capturable
