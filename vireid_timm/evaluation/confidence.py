"""Confidence intervals of means over queries, and a test of the difference between two of them."""

import numpy as np

BLOCK_CELLS = 2**17  # random numbers held at a time: about 1 MB, which fits a core's cache


def bootstrap_intervals(
    values: np.ndarray,
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Return percentile bootstrap intervals of means (Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979).

    They estimate how much a mean would vary with other queries of the same kind. Queries count as independent. Images
    of one person are not quite independent, so the intervals are slightly too narrow.

    Args:
        values: M measures of the same queries, e.g. AP and INP of the valid ones, [M, Q]. All are resampled together.
        level: Confidence level.
        samples: Number of times the queries are resampled with replacement.
        seed: Seed of the private random generator.

    Returns:
        Lower and upper end of each mean's interval, [M, 2].

    Raises:
        ValueError: There are no values, one is NaN or infinite, or the level or number of samples is out of range.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f'values must be finite numbers [measures, queries], at least one, got shape {list(values.shape)}; '
            'leave out invalid queries'
        )
    if not 0 < level < 1 or samples < 1:
        raise ValueError(f'level must be between 0 and 1, and samples at least 1, got {level} and {samples}')
    queries = values.shape[1]
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_CELLS // queries)
    means = np.empty((samples, len(values)))
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = generator.integers(queries, size=(size, queries), dtype=np.int32)
        # The mean of a sample needs only how often each query was drawn. Each sample of the block gets its own range.
        drawn += np.arange(size, dtype=np.int32)[:, None] * queries
        counts = np.bincount(drawn.reshape(-1), minlength=size * queries).reshape(size, queries)
        means[start : start + size] = counts @ values.T / queries
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def paired_test(
    first: np.ndarray,
    second: np.ndarray,
    *,
    permutations: int = 9999,
    seed: int = 0,
) -> float:
    """Run a two-sided sign-flip permutation test (Fisher, "The Design of Experiments", 1935, section 21).

    If neither side were better, the difference of each query could equally have had the other sign. p is the share of
    random sign flips whose mean difference is at least as large as the observed one, which counts as one of them, so p
    is never 0 (Phipson and Smyth, arXiv:1603.05766).

    Args:
        first: One value per query, [Q].
        second: Values of the same queries in the same order, [Q].
        permutations: Number of random sign flips; p is at least 1 / (permutations + 1).
        seed: Seed of the private random generator.

    Returns:
        The p-value.

    Raises:
        ValueError: The values are not paired, there are none, one is NaN or infinite, or there are no permutations.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            'a paired test needs two values per query and at least one query, got shapes '
            f'{list(first.shape)} and {list(second.shape)}'
        )
    difference = second - first
    if not np.isfinite(difference).all():
        raise ValueError('a paired test needs finite values; leave out invalid queries')
    if permutations < 1:
        raise ValueError(f'permutations must be at least 1, got {permutations}')
    difference = difference[difference != 0]  # zero has no sign
    observed = difference.sum()
    # Sums that differ only by rounding count as equal.
    threshold = abs(observed) - 1e-12 * np.abs(difference).sum()
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_CELLS // max(1, len(difference)))
    hits = 0
    for start in range(0, permutations, block):
        size = min(block, permutations - start)
        flipped = generator.integers(2, size=(size, len(difference)), dtype=np.bool_)
        hits += int((np.abs(observed - 2 * (flipped @ difference)) >= threshold).sum())
    return (hits + 1) / (permutations + 1)
