"""Means of the loss terms over an epoch, without waiting for the device at every step."""

import math

import torch

from ..distributed import mean_over_processes


class NonFiniteLoss(FloatingPointError):
    """A loss that is NaN or infinite.

    Attributes:
        step: Number of its batch in the epoch, from 0.
        own: Whether it is this process's own loss, not only that of another one.
    """

    def __init__(self, step: int, own: bool) -> None:
        self.step = step
        self.own = own
        super().__init__(f'the loss of step {step} is not finite')


class Meter:
    """Sums of loss terms and accuracy. They stay on the device until `read`.

    Sums are added up batch by batch in double precision, so that they do not depend on when they were read: a resumed
    epoch has the means of one that was not interrupted.

    Attributes:
        count: Batches in the sums.
        sums: Name -> sum over these batches, mean over processes.
    """

    def __init__(self, count: int = 0, sums: dict[str, float] | None = None) -> None:
        """Begin an epoch, or go on with one.

        Args:
            count: Batches that are done already.
            sums: Their sums.
        """
        self.count = count
        self.sums = dict(sums or {})
        self._reported = (count, dict(self.sums))
        self._waiting: list[torch.Tensor] = []
        self._names: tuple[str, ...] = ()

    def add(self, result: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Take note of one batch; the device is not waited for.

        Args:
            result: What the task returned: scalars by name, and `output`, [B, C].
            labels: Class labels, [B].
        """
        accuracy = (result['output'].detach().argmax(dim=1) == labels).float().mean()
        terms = {name: value for name, value in result.items() if name != 'output'}
        self._names = (*terms, 'accuracy')
        self._waiting.append(torch.stack([*(value.detach().float() for value in terms.values()), accuracy]))

    def read(self) -> None:
        """Bring the sums up to date; waits for the device, and for the other processes.

        Raises:
            NonFiniteLoss: A loss that is NaN or infinite, in any process.
        """
        if not self._waiting:
            return
        own = torch.stack(self._waiting)
        rows = mean_over_processes(own).tolist()
        self._waiting.clear()
        for number, row in enumerate(rows):
            values = dict(zip(self._names, row, strict=True))
            if not math.isfinite(values['loss']):
                raise NonFiniteLoss(self.count, not math.isfinite(own[number, self._names.index('loss')]))
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.count += 1

    def means(self) -> dict[str, float]:
        """Of everything that was read."""
        return {name: total / self.count for name, total in self.sums.items()}

    def recent(self) -> dict[str, float]:
        """Of what was read since this was called last."""
        count, sums = self._reported
        self._reported = (self.count, dict(self.sums))
        return {name: (total - sums.get(name, 0.0)) / (self.count - count) for name, total in self.sums.items()}
