"""How sure one can be of a mean over queries, and of the difference between two of them."""

import numpy as np

BLOCK_CELLS = 2**17  # random numbers held at a time: about a megabyte, which stays in the cache of a core


def bootstrap_intervals(
    values: np.ndarray,
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Percentile bootstrap intervals of means (Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979).

    They say how far a mean would move with other queries of the same kind. Queries count as independent; images of
    one person are not quite, so that the intervals are rather too narrow than too wide.

    Args:
        values: M measures of the same queries, e.g. AP and INP of the valid ones, [M, Q]. All are drawn together.
        level: Probability that an interval is meant to hold.
        samples: How many times the queries are drawn anew, with replacement.
        seed: Of the private generator that draws them.

    Returns:
        Lower and upper end of each mean's interval, [M, 2].

    Raises:
        ValueError: Without values, on NaN or infinite ones, or on an impossible level or number of samples.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f'values must be finite numbers [measures, queries], at least one, got shape {list(values.shape)}; '
            'leave out queries that are not valid'
        )
    if not 0 < level < 1 or samples < 1:
        raise ValueError(f'level must lie between 0 and 1 and samples be at least 1, got {level} and {samples}')
    queries = values.shape[1]
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_CELLS // queries)
    means = np.empty((samples, len(values)))
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = generator.integers(queries, size=(size, queries), dtype=np.int32)
        # A sample's mean needs only how often each query was drawn. Every sample of the block counts in its own range.
        drawn += np.arange(size, dtype=np.int32)[:, None] * queries
        times = np.bincount(drawn.reshape(-1), minlength=size * queries).reshape(size, queries)
        means[start : start + size] = times @ values.T / queries
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def paired_test(
    first: np.ndarray,
    second: np.ndarray,
    *,
    permutations: int = 9999,
    seed: int = 0,
) -> float:
    """Sign-flip permutation test of paired values, two-sided (Fisher, "The Design of Experiments", 1935, section 21).

    If neither side were better, each query's difference could as well have had the other sign. p is the share of such
    draws of all signs that leave a mean difference at least as large as the one seen, itself counted among them, so
    that p is never 0 (Phipson and Smyth, arXiv:1603.05766).

    Args:
        first: One value per query, [Q].
        second: Values of the same queries in the same order, [Q].
        permutations: How many times signs are drawn; p is at least 1 / (permutations + 1).
        seed: Of the private generator that draws them.

    Returns:
        p.

    Raises:
        ValueError: On values that are not paired, without values, on NaN or infinite ones, or without permutations.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            'a paired test needs two values per query, for at least one query, got shapes '
            f'{list(first.shape)} and {list(second.shape)}'
        )
    difference = second - first
    if not np.isfinite(difference).all():
        raise ValueError('a paired test needs finite values; leave out queries that are not valid')
    if permutations < 1:
        raise ValueError(f'permutations must be at least 1, got {permutations}')
    difference = difference[difference != 0]  # zero has no sign
    seen = difference.sum()
    # Sums that are equal in exact arithmetic may differ by rounding; they count as equal.
    threshold = abs(seen) - 1e-12 * np.abs(difference).sum()
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_CELLS // max(1, len(difference)))
    hits = 0
    for start in range(0, permutations, block):
        size = min(block, permutations - start)
        flipped = generator.integers(2, size=(size, len(difference)), dtype=np.bool_)
        hits += int((np.abs(seen - 2 * (flipped @ difference)) >= threshold).sum())
    return (hits + 1) / (permutations + 1)
