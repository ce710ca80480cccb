"""Intervals and tests against plain loops that resample, count and enumerate."""

import itertools
import math

import numpy as np
import pytest

from vireid_timm.evaluation import confidence
from vireid_timm.evaluation.confidence import bootstrap_intervals, paired_test


def slow_intervals(values, level, samples, seed):
    """One sample at a time, each query looked up."""
    generator = np.random.default_rng(seed)
    count = len(values[0])
    drawn = [generator.integers(count, size=count, dtype=np.int32) for _ in range(samples)]
    rows = []
    for row in values:
        means = sorted(sum(row[i] for i in sample) / count for sample in drawn)
        ends = []
        for share in ((1 - level) / 2, (1 + level) / 2):
            place = share * (samples - 1)
            below, above = means[math.floor(place)], means[math.ceil(place)]
            ends.append(below + (above - below) * (place - math.floor(place)))
        rows.append(ends)
    return rows


def exact_p(first, second):
    """Every choice of signs, in whole thousandths so that nothing is rounded."""
    differences = [round(1000 * (b - a)) for a, b in zip(first, second, strict=True)]
    sums = [
        abs(sum(sign * difference for sign, difference in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= abs(sum(differences)) for value in sums) / len(sums)


@pytest.mark.parametrize('block_cells', [1, 23, confidence.BLOCK_CELLS])
@pytest.mark.parametrize('queries', [1, 2, 7])
def test_intervals_are_by_resampling(monkeypatch, block_cells, queries):
    monkeypatch.setattr(confidence, 'BLOCK_CELLS', block_cells)
    values = np.random.default_rng(queries).random((3, queries)).round(1)
    result = bootstrap_intervals(values, level=0.8, samples=50, seed=7)
    assert result.shape == (3, 2)
    np.testing.assert_allclose(result, slow_intervals(values.tolist(), 0.8, 50, 7), atol=1e-12)


def test_intervals_agree_with_theory():
    values = np.random.default_rng(0).random((2, 400)) * [[1], [3]]
    intervals = bootstrap_intervals(values)
    for row, (low, high) in zip(values, intervals, strict=True):
        half_width = 1.96 * row.std() / math.sqrt(len(row))
        assert low == pytest.approx(row.mean() - half_width, abs=0.1 * half_width)
        assert high == pytest.approx(row.mean() + half_width, abs=0.1 * half_width)
    np.testing.assert_array_equal(bootstrap_intervals(values), intervals)
    assert (bootstrap_intervals(values, seed=1) != intervals).all()
    narrow = bootstrap_intervals(values, level=0.5)
    assert (intervals[:, 0] < narrow[:, 0]).all() and (narrow[:, 1] < intervals[:, 1]).all()


def test_measures_are_drawn_together():
    values = np.random.default_rng(0).random(50)
    together = bootstrap_intervals([values, 1 - values, values])
    np.testing.assert_allclose(together[0], 1 - together[1][::-1])
    np.testing.assert_array_equal(together[0], together[2])
    np.testing.assert_allclose(bootstrap_intervals([values]), together[:1], rtol=1e-12)
    np.testing.assert_array_equal(bootstrap_intervals([[0.25]]), [[0.25, 0.25]])


def test_more_queries_than_a_block_holds():
    values = np.zeros((1, confidence.BLOCK_CELLS + 1))
    values[0, ::2] = 1
    low, high = bootstrap_intervals(values, samples=20)[0]
    assert 0.49 < low < high < 0.51


@pytest.mark.parametrize(
    'values, options, message',
    [
        ([[]], {}, 'at least one'),
        (np.empty((0, 3)), {}, 'at least one'),
        ([[0.5, math.nan]], {}, 'leave out invalid queries'),
        ([[0.5, math.inf]], {}, 'finite'),
        ([0.5], {}, r'got shape \[1\]'),
        ([[0.5]], {'level': 1.0}, 'between 0 and 1'),
        ([[0.5]], {'level': 0.0}, 'got 0.0'),
        ([[0.5]], {'samples': 0}, 'at least 1, got 0.95 and 0'),
    ],
)
def test_intervals_reject(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(values, **options)


@pytest.mark.parametrize('block_cells', [100, confidence.BLOCK_CELLS])
@pytest.mark.parametrize('seed', range(4))
def test_paired_test_agrees_with_every_choice_of_signs(monkeypatch, block_cells, seed):
    monkeypatch.setattr(confidence, 'BLOCK_CELLS', block_cells)
    generator = np.random.default_rng(seed)
    # In tenths, so that many sums are equal; zeros among the differences.
    first, second = generator.integers(0, 10, size=(2, 9)) / 10
    second[:2] = first[:2]
    expected = exact_p(first, second)
    result = paired_test(first, second, permutations=3999)
    assert result == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000) + 1 / 4000)
    assert paired_test(second, first, permutations=3999) == result, 'two-sided'
    assert paired_test(first + 1, second + 1, permutations=3999) == result, 'only differences count'


def test_equal_sums_count_as_hits_in_spite_of_rounding():
    # 0.1 + 0.2 + 0.3 and similar sums differ in the last digit with the order of their terms.
    first = np.zeros(6)
    second = np.asarray([0.1, 0.2, 0.3, -0.1, -0.2, -0.3])
    assert paired_test(first, second) == 1.0, 'a difference of zero is reached by every choice of signs'
    assert paired_test([0.3, 0.1], [0.3, 0.1]) == 1.0
    assert paired_test([0.7], [0.1]) == 1.0, 'one query decides nothing'


def test_paired_test_finds_real_differences_only():
    generator = np.random.default_rng(0)
    first = generator.random(300)
    assert paired_test(first, first + 0.05 + 0.1 * generator.standard_normal(300)) == 1e-4
    assert paired_test(first, first + 0.05 + 0.1 * generator.standard_normal(300), permutations=99) == 0.01
    noise = [paired_test(first, first + generator.standard_normal(300), permutations=199) for _ in range(200)]
    assert 0.01 < np.mean(np.asarray(noise) <= 0.05) < 0.1, 'without a difference, p <= 0.05 has probability 0.05'
    second = first + 0.01 * generator.standard_normal(300)
    assert paired_test(first, second) == paired_test(first, second)
    assert paired_test(first, second) != paired_test(first, second, seed=1)


@pytest.mark.parametrize(
    'first, second, options, message',
    [
        ([], [], {}, 'at least one query'),
        ([0.5], [0.5, 0.5], {}, r'\[1\] and \[2\]'),
        ([[0.5]], [[0.5]], {}, r'\[1, 1\]'),
        ([0.5, math.nan], [0.5, 0.5], {}, 'finite'),
        ([0.5], [0.5], {'permutations': 0}, 'at least 1, got 0'),
    ],
)
def test_paired_test_rejects(first, second, options, message):
    with pytest.raises(ValueError, match=message):
        paired_test(first, second, **options)
