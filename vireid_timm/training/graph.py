"""Training steps as one CUDA graph: recorded once on fixed memory, then repeated by the GPU without Python."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ..distributed import rank_and_world_size
from ..loss.by_name import is_library_loss
from .config import TrainConfig

WARM_UP = 3  # steps before the recording, in which cuDNN chooses its kernels and the optimiser creates its state
_RECORDABLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def why_no_graph(config: TrainConfig, optimizer: torch.optim.Optimizer, device: torch.device, scaled: bool) -> str:
    """Return what keeps the steps of a run from being recorded, or an empty text; `scaled` means its loss is."""
    is_fused = isinstance(optimizer, _RECORDABLE) and all(group.get('fused') for group in optimizer.param_groups)
    reasons = {
        '--no-cuda-graphs': not config.cuda_graphs,
        f'{device.type} has none': device.type != 'cuda',
        'float16 reads back at each step whether the gradients overflowed': scaled,
        'several processes exchange gradients': rank_and_world_size()[1] > 1,
        '--torchcompile launches its own kernels': config.torchcompile,
        '--grad-accum-steps makes steps of several batches': config.grad_accum_steps > 1,
        '--grad-checkpointing saves random states': config.grad_checkpointing,
        'losses of pytorch-metric-learning read back from the GPU': any(map(is_library_loss, config.loss)),
        f"--opt {config.opt} is not torch's fused SGD, Adam or AdamW": not is_fused,
    }
    return next((reason for reason, holds in reasons.items() if holds), '')


class CudaRecorder:
    """Records kernels as torch wants it: on a side stream that they have run on before."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> None:
        """Run work on the side stream, between what was and what will be launched on the current one."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that repeats the work's kernels; nothing is computed yet."""
        gc.collect()  # not within the recording: an earlier run's graph may be among the garbage
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: those that read images pin memory.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode='thread_local'):
            work()
        return graph.replay


class StepGraph:
    """A training step, run as it is for `WARM_UP` batches, then recorded and repeated.

    Its tensors lie in memory that stays the same. It must not read anything back from the device. The optimiser reads
    its learning rates from the device here, so they may change between calls; schedules go on writing numbers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """Record nothing yet; the optimiser is torch's fused SGD, Adam or AdamW."""
        self._optimizer = optimizer  # not its groups: resuming replaces them
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._recorder = CudaRecorder(device)
        self._inputs: list[torch.Tensor] = []
        self._results: dict[str, torch.Tensor] = {}
        self._replay: Callable[[], None] | None = None
        self._num_calls = 0

    def __call__(self, step: Callable[..., dict[str, torch.Tensor]], *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the step on a batch.

        Args:
            step: Always the same.
            inputs: Tensors for it, of the same shapes and types at every call.

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
            with self._recordable():
                self._recorder.run(work)
            return self._results
        if self._replay is None:
            try:
                with self._recordable(capturable=True):
                    self._replay = self._recorder.record(work)
            except RuntimeError as error:
                reason = str(error.__context__ or error).partition('\n')[0]  # ending a broken recording fails, too
                raise ValueError(f'the step cannot become a CUDA graph: {reason}; give --no-cuda-graphs') from error
        self._replay()
        return self._results

    def _work(self, step: Callable[..., dict[str, torch.Tensor]]) -> None:
        self._results = step(*self._inputs)

    @contextmanager
    def _recordable(self, **settings: bool) -> Iterator[None]:
        """Give the optimiser its learning rates on the device, and those of the settings that it has."""
        groups = self._optimizer.param_groups
        before = [dict(group) for group in groups]
        for group, rate in zip(groups, self._rates):
            group.update({'lr': rate, **{name: value for name, value in settings.items() if name in group}})
        try:
            yield
        finally:
            for group, values in zip(groups, before):
                group.update(values)
