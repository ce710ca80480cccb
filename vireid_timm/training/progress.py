"""How a training run is doing: means of the loss terms, log lines with speed and time left, TensorBoard curves."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from ..device import peak_memory
from ..distributed import mean_over_ranks
from ..text import format_bytes

_logger = logging.getLogger(__name__)

TENSORBOARD = 'tensorboard'  # TensorBoard's folder within the run's
EARLY = (1, 10)  # steps of a process after which it logs out of turn: it works, and this is how long it will take


class NonFiniteLoss(FloatingPointError):
    """A loss that is NaN or infinite.

    Attributes:
        step: Number of its batch in the epoch, from 0.
        own: Whether it is this rank's loss, not only that of another.
    """

    def __init__(self, step: int, own: bool) -> None:
        self.step = step
        self.own = own
        super().__init__(f'the loss of step {step} is not finite')


class Progress:
    """Means of the loss terms over an epoch, and the lines and curves that report them.

    What `add` takes stays on the device until something is reported, so the host never waits for the device at a step.
    Sums are added up batch by batch in double precision: they do not depend on when they were read, and a resumed epoch
    has the means of one that was not interrupted. Time between `end_epoch` and the next `start_epoch` (validation,
    checkpoints) counts in no rate.

    Attributes:
        sums: Sum of each loss term and of the accuracy over the batches that were read back, mean over the ranks.
    """

    def __init__(
        self,
        *,
        num_epochs: int,
        steps_per_epoch: int,
        images_per_step: int,
        device: torch.device,
        log_interval: int = 50,
        tensorboard: Path | None = None,
        steps_done: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open TensorBoard's files, if wanted.

        Args:
            num_epochs: Epochs of the whole run.
            steps_per_epoch: Batches of a whole epoch.
            images_per_step: Visible and infrared images of a batch, over all ranks.
            device: Whose memory is reported.
            log_interval: Steps between log lines.
            tensorboard: The folder for TensorBoard's files; None writes none.
            steps_done: Batches that are done. TensorBoard drops what a killed process wrote about later ones.
            clock: Seconds from an arbitrary origin.

        Raises:
            ValueError: TensorBoard is not installed.
        """
        self.num_epochs = num_epochs
        self.steps_per_epoch = steps_per_epoch
        self.images_per_step = images_per_step
        self.device = device
        self.log_interval = log_interval
        self._clock = clock
        self._is_first_interval = self._is_first_epoch = True  # of this process
        self._measured = (0, 0.0)  # steps and seconds of this process, except for its first interval
        self.start_epoch(0)
        self._writer = None
        if tensorboard is not None:
            # Drop later steps even where none is done: a process killed before its first checkpoint has written, too.
            self._writer = summary_writer_type()(str(tensorboard), purge_step=steps_done + 1, flush_secs=30)

    def start_epoch(self, epoch: int, step: int = 0, sums: Mapping[str, float] | None = None) -> None:
        """Start to train an epoch, or the rest of one.

        Args:
            epoch: From 0.
            step: Batches of it that are done already.
            sums: Their sums.
        """
        self.epoch, self.step, self.sums = epoch, step, dict(sums or {})
        self._count = step  # batches in the sums
        self._waiting: list[torch.Tensor] = []
        self._reported = (step, dict(self.sums))
        self._start = self._last = (step, self._clock())

    def add(self, result: Mapping[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Take note of one batch; does not wait for the device.

        Args:
            result: What the task returned: scalars by name, and `output`, [B, C].
            labels: Class labels, [B].
        """
        accuracy = (result['output'].detach().argmax(dim=1) == labels).float().mean()
        terms = {name: value for name, value in result.items() if name != 'output'}
        self._names = (*terms, 'accuracy')
        self._waiting.append(torch.stack([*(value.detach().float() for value in terms.values()), accuracy]))
        self.step += 1

    def read(self) -> None:
        """Bring the sums up to date. Waits for the device. Collective.

        Raises:
            NonFiniteLoss: A loss that is NaN or infinite, on any rank; raised on all of them.
        """
        if not self._waiting:
            return
        own = torch.stack(self._waiting)
        rows = mean_over_ranks(own).tolist()
        self._waiting.clear()
        for number, row in enumerate(rows):
            values = dict(zip(self._names, row, strict=True))
            if not math.isfinite(values['loss']):
                raise NonFiniteLoss(self._count, not math.isfinite(own[number, self._names.index('loss')]))
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self._count += 1

    def means(self) -> dict[str, float]:
        """Return the means over the batches of the epoch that were read back."""
        return {name: total / self._count for name, total in self.sums.items()}

    def log_if_due(self, rates: Mapping[str, float]) -> None:
        """Log a line within the epoch if one is due: at every interval, and early in a process. Collective.

        Args:
            rates: Learning rates: `new` of what was initialised, `pretrained` of what was loaded.

        Raises:
            NonFiniteLoss: As `read`.
        """
        step, last, total = self.step, self._last[0], self.steps_per_epoch
        early = self._is_first_epoch and any(last < self._start[0] + soon <= step for soon in EARLY)
        if step >= total or not (early or step // self.log_interval > last // self.log_interval):
            return
        self.read()
        terms, speed, memory = self._recent(), self._measure(), peak_memory(self.device)
        where = f'Train: {self.epoch} [{step:>{len(str(total))}}/{total} ({step / total:4.0%})]'
        parts = [where, _terms(terms), _rates(rates), f'{speed:.1f} images/s', _memory(memory), f'ETA {self._eta()}']
        _logger.info('  '.join(filter(None, parts)))
        self._write(
            {
                **{f'train/{name}': value for name, value in terms.items()},
                **{f'lr/{name}': value for name, value in rates.items()},
                'speed/images_per_second': speed,
                **({'speed/memory_gb': memory / 1e9} if memory else {}),
            }
        )

    def end_epoch(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Log the epoch and return its columns of the summary. Collective.

        Args:
            rates: As for `log_if_due`.

        Returns:
            Means of the loss, its terms and the accuracy, prefixed `train_`, images per second and the learning rate.

        Raises:
            NonFiniteLoss: As `read`.
        """
        self.read()
        terms = self.means()
        self._measure()
        self._is_first_epoch = False
        seconds = self._last[1] - self._start[1]
        speed = (self.step - self._start[0]) * self.images_per_step / max(seconds, 1e-9)
        parts = [
            f'{_terms(terms)} {_rates(rates)}',
            f'{speed:.1f} images/s',
            _memory(peak_memory(self.device)),
            f'took {tqdm.format_interval(seconds)}',
            f'ETA {self._eta()}',
        ]
        _logger.info(f'epoch {self.epoch}: ' + ', '.join(filter(None, parts)))
        self._write({**{f'epoch/{name}': value for name, value in terms.items()}, 'epoch/images_per_second': speed})
        return {
            **{f'train_{name}': value for name, value in terms.items()},
            'train_images_per_second': speed,
            'lr': max(rates.values()),
        }

    def log_validation(self, scores: Mapping[str, float]) -> None:
        """Log the validation's results of the epoch that has ended."""
        _logger.info(f'validation: {", ".join(f"{name} {100 * value:.2f} %" for name, value in scores.items())}')
        self._write({f'validation/{name}': value for name, value in scores.items()})

    def close(self) -> None:
        """Flush and close TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _recent(self) -> dict[str, float]:
        """Return the means over what was read since the last line."""
        (count, sums), self._reported = self._reported, (self._count, dict(self.sums))
        return {name: (total - sums.get(name, 0.0)) / (self._count - count) for name, total in self.sums.items()}

    def _measure(self) -> float:
        """Return the images per second since the last line."""
        before, self._last = self._last, (self.step, self._clock())
        steps, seconds = self._last[0] - before[0], self._last[1] - before[1]
        if self._is_first_interval:  # it compiles and allocates, which later ones do not
            self._is_first_interval = False
        else:
            self._measured = (self._measured[0] + steps, self._measured[1] + seconds)
        return steps * self.images_per_step / max(seconds, 1e-9)

    def _eta(self) -> str:
        """Return the time that the rest of the run takes, without validation; `?` before anything was measured."""
        steps, seconds = self._measured
        left = (self.num_epochs - self.epoch) * self.steps_per_epoch - self.step
        return tqdm.format_interval(left * seconds / steps) if steps else '?'

    def _write(self, scalars: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, self.epoch * self.steps_per_epoch + self.step)


def summary_writer_type() -> type:
    """Return TensorBoard's writer, as torch has it.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'TensorBoard needs the extra `tensorboard` (pip install "vireid_timm[tensorboard]"), or leave out '
            f'--tensorboard: {error}'
        ) from error
    return SummaryWriter


def _terms(terms: Mapping[str, float]) -> str:
    return ' '.join(
        f'{name} {value:.1%}' if name == 'accuracy' else f'{name} {value:.4g}' for name, value in terms.items()
    )


def _rates(rates: Mapping[str, float]) -> str:
    new, pretrained = rates['new'], rates['pretrained']
    return f'lr {new:.3g}' if new == pretrained else f'lr {new:.3g} (pretrained part {pretrained:.3g})'


def _memory(num_bytes: int | None) -> str:
    return '' if num_bytes is None else format_bytes(num_bytes)
