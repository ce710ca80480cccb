"""How a training run is doing, for people: lines with rate, memory and time left, and TensorBoard's curves."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from ..device import peak_memory

_logger = logging.getLogger(__name__)

TENSORBOARD = 'tensorboard'  # the folder of TensorBoard's files within a run's
SOON = (1, 10)  # steps of a process after which to report out of turn: it works, and how long it will take


class Tracker:
    """Lines for a terminal and a log file alike, in the style of timm's `train.py`, and the same for TensorBoard.

    The training loop calls `start` whenever it begins to train (each epoch, and after a resumption), `interval` with
    what it has read back at the steps for which `due` is true, and `epoch_done` at the end of an epoch. What happens
    between `epoch_done` and the next `start` (validation, checkpoints) counts in no rate. All values are Python
    numbers: reading them back has made the host wait for the device, so the clock here is right.
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
        """Open what is written to.

        Args:
            num_epochs: Of the whole run.
            steps_per_epoch: Batches of a whole epoch.
            images_per_step: Visible and infrared images of a batch, over all ranks.
            device: Whose memory is reported.
            log_interval: Steps between lines.
            tensorboard: The folder for TensorBoard's files; None writes none.
            steps_done: Batches that the run had done before this process; later ones that an earlier process wrote
                about are withdrawn from TensorBoard.
            clock: Seconds from an arbitrary origin.

        Raises:
            ValueError: TensorBoard's package is missing.
        """
        self.num_epochs = num_epochs
        self.steps_per_epoch = steps_per_epoch
        self.images_per_step = images_per_step
        self.device = device
        self.log_interval = log_interval
        self._clock = clock
        self._is_first_interval = self._is_first_epoch = True  # of this process
        self._measured = (0, 0.0)  # steps and seconds of training in this process, but for its first interval
        self.start()
        self._writer = None
        if tensorboard is not None:
            # Also where nothing is done yet: a process that was killed before its first checkpoint has written, too.
            self._writer = summary_writer_type()(str(tensorboard), purge_step=steps_done + 1, flush_secs=30)

    def start(self, step: int = 0) -> None:
        """Training begins now.

        Args:
            step: Batches of this epoch that are done already.
        """
        self._start = self._last = (step, self._clock())

    def due(self, step: int) -> bool:
        """Whether `interval` should be called after `step` batches of the epoch, which may come several at a time."""
        if step >= self.steps_per_epoch:  # left to `epoch_done`
            return False
        last = self._last[0]
        soon = self._is_first_epoch and any(last < self._start[0] + early <= step for early in SOON)
        return soon or step // self.log_interval > last // self.log_interval

    def interval(self, epoch: int, step: int, terms: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Report within an epoch.

        Args:
            epoch: From 0.
            step: Batches of it that are done.
            terms: `loss`, its terms and `accuracy`, means since the last report.
            rates: Learning rates: `new` of what was initialised, `pretrained` of what was loaded.
        """
        speed = self._measure(step)
        memory = peak_memory(self.device)
        total = self.steps_per_epoch
        where = f'Train: {epoch} [{step:>{len(str(total))}}/{total} ({step / total:4.0%})]'
        left = f'ETA {self._eta(epoch, step)}'
        parts = [where, _terms(terms), _rates(rates), f'{speed:.1f} images/s', _memory(memory), left]
        _logger.info('  '.join(filter(None, parts)))
        self._write(
            epoch * total + step,
            {
                **{f'train/{name}': value for name, value in terms.items()},
                **{f'lr/{name}': value for name, value in rates.items()},
                'speed/images_per_second': speed,
                **({'speed/memory_gb': memory / 1e9} if memory else {}),
            },
        )

    def epoch_done(self, epoch: int, terms: Mapping[str, float], rates: Mapping[str, float]) -> float:
        """Report a whole epoch.

        Args:
            epoch: From 0.
            terms: Means over the epoch.
            rates: As for `interval`.

        Returns:
            Images per second of the epoch, or of what this process did of it.
        """
        self._measure(self.steps_per_epoch)
        self._is_first_epoch = False
        seconds = self._last[1] - self._start[1]
        speed = (self.steps_per_epoch - self._start[0]) * self.images_per_step / max(seconds, 1e-9)
        parts = [
            f'{_terms(terms)} {_rates(rates)}',
            f'{speed:.1f} images/s',
            _memory(peak_memory(self.device)),
            f'took {tqdm.format_interval(seconds)}',
            f'ETA {self._eta(epoch, self.steps_per_epoch)}',
        ]
        _logger.info(f'epoch {epoch}: ' + ', '.join(filter(None, parts)))
        self._write(
            (epoch + 1) * self.steps_per_epoch,
            {**{f'epoch/{name}': value for name, value in terms.items()}, 'epoch/images_per_second': speed},
        )
        return speed

    def validated(self, epoch: int, scores: Mapping[str, float]) -> None:
        """Give TensorBoard the validation's results after an epoch; the validation logs its own line."""
        self._write((epoch + 1) * self.steps_per_epoch, {f'validation/{name}': value for name, value in scores.items()})

    def close(self) -> None:
        """Flush and close TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _measure(self, step: int) -> float:
        """Images per second since the last report, which this becomes."""
        before, now = self._last, self._clock()
        steps, seconds = step - before[0], now - before[1]
        self._last = (step, now)
        if self._is_first_interval:  # what is compiled and allocated in it is not done again
            self._is_first_interval = False
        else:
            self._measured = (self._measured[0] + steps, self._measured[1] + seconds)
        return steps * self.images_per_step / max(seconds, 1e-9)

    def _eta(self, epoch: int, step: int) -> str:
        """Time that the rest of the run takes at the measured rate, without validation; `?` before there is one."""
        steps, seconds = self._measured
        left = (self.num_epochs - epoch) * self.steps_per_epoch - step
        return tqdm.format_interval(left * seconds / steps) if steps else '?'

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)


def summary_writer_type() -> type:
    """TensorBoard's writer as torch has it.

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
    return '' if num_bytes is None else f'{num_bytes / 1e9:.2f} GB'
