"""Training in processes of its own, to be killed, and what has to be left of it."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from processes import start

from vireid_timm.cli.main import main
from vireid_timm.run_folder import LAST

# A network of few weights, for what is saved many times.
THIN = {'resnet_args': dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=[8, 16, 24, 32])}
EXPERIMENT = 'run'


def train_command(output: Path, *arguments: str) -> list[str]:
    """Words of a training on enough rendered people for some sixty short steps per epoch, saving every few of them."""
    return [
        *('train', '--dataset', 'synthetic'),
        *('--dataset-kwargs', 'identities=120', 'test_identities=2', 'images_per_modality=2', 'size=(64,32)'),
        *('--model', 'vireid_dml_r10t', '--model-kwargs', f'resnet_args={THIN["resnet_args"]}'),
        *('--input-size', '3', '64', '32', '--identities-per-batch', '4', '--images-per-modality', '1', '--pad', '2'),
        *('--epochs', '2', '--warmup-epochs', '0', '--lr', '0.01', '--val-share', '0.05', '--val-interval', '1'),
        *('--model-ema', '--model-ema-decay', '0.9', '--drop', '0.1', '--workers', '0', '--device', 'cpu', '--no-amp'),
        *('--deterministic', '--checkpoint-interval', '4', '--resume', 'auto'),
        *('--output', str(output), '--experiment', EXPERIMENT, *arguments),
    ]


class Training:
    """A process that trains into `folder` / `EXPERIMENT`, with an image store of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.run = folder / EXPERIMENT
        self.cache = folder / 'cache'
        self._output = folder / f'{len(list(folder.glob("*.txt")))}.txt'
        self._output.touch()  # its number is taken
        environment = {'VIREID_CACHE': str(self.cache)}
        self.process = start(main, train_command(folder, *arguments), output=self._output, environment=environment)

    def said(self) -> str:
        """What this process has printed."""
        return self._output.read_text(encoding='utf-8')

    def kill_when(self, moment: Callable[[], Any], number: int, timeout: float = 120.0) -> int:
        """Send a signal as soon as something is so; the exit status."""
        deadline = time.monotonic() + timeout
        while not moment():
            assert self.process.exitcode is None, f'it ended before it could be killed: {self.said()}'
            assert time.monotonic() < deadline, f'the moment did not come: {self.said()}'
            time.sleep(0.001)
        os.kill(self.process.pid, number)
        return self.wait()

    def wait(self, timeout: float = 240.0) -> int:
        """The exit status."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.said())
        return self.process.exitcode

    def stores_images(self) -> bool:
        """Whether the image store is being written."""
        return self.cache.is_dir() and any(path.suffix == '.tmp' for path in self.cache.iterdir())

    def writes(self, name: str) -> Callable[[], bool]:
        """Whether a file or folder of the run is being written, other than what killed processes left of it."""
        pattern = f'.{name}.*.part'
        before = set(self.run.glob(pattern))
        return lambda: bool(set(self.run.glob(pattern)) - before)

    def replaces_checkpoint(self) -> Callable[[], bool]:
        """Whether a checkpoint is being written while there is one already."""
        writes = self.writes(LAST)
        return lambda: (self.run / LAST).exists() and writes()

    def checkpoints(self) -> Iterator[bool]:
        """Whether a checkpoint was written since this was called first."""
        before = self._stamp()
        while True:
            yield self._stamp() not in (before, 0)

    def _stamp(self) -> int:
        """When the last checkpoint was written; 0 if there is none, or it is just being replaced."""
        try:
            return (self.run / LAST).stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def equal(first: Any, second: Any) -> bool:
    """Whether two checkpoints are the same, bit for bit; images per second aside, which are wall-clock time."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        keys = first.keys() - {'train_images_per_second'}
        return keys == second.keys() - {'train_images_per_second'} and all(
            equal(first[key], second[key]) for key in keys
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second
