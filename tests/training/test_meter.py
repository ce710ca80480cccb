"""Means of loss terms: those of plain arithmetic, whenever they are read."""

import math

import pytest
import torch

from vireid_timm.training.meter import Meter, NonFiniteLoss


def _results(count: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(count):
        terms = torch.rand(2, generator=generator)
        logits, labels = torch.rand(6, 3, generator=generator), torch.randint(3, (6,), generator=generator)
        results.append(({'loss': terms.sum(), 'a': terms[0], 'b': terms[1], 'output': logits}, labels))
    return results


def _naive(results: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> dict[str, float]:
    means = {name: sum(float(result[name]) for result, _ in results) / len(results) for name in ('loss', 'a', 'b')}
    hits = [sum(int(row.argmax() == label) for row, label in zip(r['output'], labels)) / 6 for r, labels in results]
    return {**means, 'accuracy': sum(hits) / len(hits)}


def test_means_are_those_of_a_loop() -> None:
    results = _results(7)
    meter = Meter()
    for number, (result, labels) in enumerate(results, start=1):
        meter.add(result, labels)
        if number == 3:
            meter.read()
            assert meter.recent() == pytest.approx(_naive(results[:3]))
    assert meter.means() == pytest.approx(_naive(results[:3]))  # what was read
    meter.read()
    assert meter.means() == pytest.approx(_naive(results), rel=1e-12, abs=1e-7)
    assert meter.recent() == pytest.approx(_naive(results[3:]))


def test_when_it_is_read_and_resumed_changes_no_bit() -> None:
    results = _results(50)
    often, once = Meter(), Meter()
    for number, (result, labels) in enumerate(results):
        often.add(result, labels)
        once.add(result, labels)
        if number % 7 == 0:
            often.read()
        if number == 30:
            often.read()
            often = Meter(often.count, often.sums)
    often.read()
    once.read()
    assert often.sums == once.sums and often.count == once.count == 50


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_found_by_its_step(bad: float) -> None:
    meter = Meter(count=10, sums={})
    for number, (result, labels) in enumerate(_results(6)):
        meter.add({**result, 'loss': torch.tensor(bad) if number in (4, 5) else result['loss']}, labels)
        if number == 2:
            meter.read()
    with pytest.raises(NonFiniteLoss) as caught:
        meter.read()
    assert caught.value.step == 14
