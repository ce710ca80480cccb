"""Verification and open-set rates against one pair, one search and one threshold after the other."""

import math

import numpy as np
import pytest
import torch

from vireid_timm.evaluation import verification
from vireid_timm.evaluation.metrics import Ranker
from vireid_timm.evaluation.verification import DECISIONS, FARS, FPIRS, SHARES, PairFinder, exceeded_by


def highest_rate(values, rate, accepted):
    """Try every threshold between the values: the best share of accepted ones that keeps the rate; None without."""
    if not values or not accepted:
        return None
    shares = []
    for threshold in {-math.inf, *values, *(value for value, _ in accepted)}:
        if sum(value > threshold for value in values) <= rate * len(values) + 1e-9:
            shares.append(sum(value > threshold and right for value, right in accepted) / len(accepted))
    return max(shares)


def naive(similarity, query, gallery, ignore):
    """The definitions, word for word."""
    genuine, impostor, mated, non_mated = [], [], [], []
    for i, person in enumerate(query):
        own = [similarity[i, j] for j, other in enumerate(gallery) if other == person and not ignore[i, j]]
        others = [similarity[i, j] for j, other in enumerate(gallery) if other != person and not ignore[i, j]]
        genuine += [(value, True) for value in own]
        impostor += others
        if others:
            non_mated.append(max(others))
        if own:
            mated.append((max(own), max(own) > max(others, default=-math.inf)))
    found = {name: highest_rate(impostor, rate, genuine) for name, rate in FARS.items()}
    for name, rate in FPIRS.items():
        share = highest_rate(non_mated, rate, mated)
        found[name] = None if share is None else 1 - share
    return found


def decide(similarity, query, gallery, keys, trials, share=1.0, chunk=7):
    ranker = Ranker(gallery)
    sides = None if keys is None else tuple(map(torch.from_numpy, keys))
    finder = PairFinder(ranker, query, sides, torch.device('cpu'))
    floor = finder.floor(lambda rows: similarity[rows], share)
    starts = range(0, max(1, len(query)), chunk)
    return finder.decide([finder.find(similarity[start : start + chunk], start, floor) for start in starts], trials)


def made_up(seed, num_queries=24, num_columns=30, people=8, digits=2, signal=0.3):
    """Similarities with many ties, and keys that ignore some pairs of the same and of other people."""
    generator = np.random.default_rng(seed)
    query, gallery = (generator.integers(people, size=count) for count in (num_queries, num_columns))
    keys = tuple(generator.integers(4, size=count) for count in (num_queries, num_columns))
    similarity = generator.random((num_queries, num_columns)) + signal * (query[:, None] == gallery)
    return torch.from_numpy(similarity.round(digits)).float(), query, gallery, keys


def assert_agree(found, expected):
    assert found.keys() == expected.keys() == set(DECISIONS)
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('ignoring', [False, True])
@pytest.mark.parametrize('digits', [1, 6])
def test_rates_follow_their_definitions_in_every_trial(seed, ignoring, digits):
    similarity, query, gallery, keys = made_up(seed, digits=digits)
    ignore = keys[0][:, None] == keys[1] if ignoring else np.zeros(similarity.shape, dtype=bool)
    generator = np.random.default_rng(seed + 100)
    trials = [(np.arange(24), np.arange(30))]
    trials += [(np.sort(generator.choice(24, 15, replace=False)), generator.permutation(30)[:10]) for _ in range(3)]
    found = decide(similarity, query, gallery, keys if ignoring else None, trials)
    for (rows, columns), decided in zip(trials, found, strict=True):
        cells = np.ix_(rows, columns)
        assert_agree(decided, naive(similarity.numpy()[cells], query[rows], gallery[columns], ignore[cells]))


@pytest.mark.parametrize('share', SHARES)
def test_a_floor_changes_nothing_or_is_too_high(share, monkeypatch):
    monkeypatch.setattr(verification, 'FEW_PAIRS', 0)
    similarity, query, gallery, _ = made_up(5, 20, 60, people=10, digits=6)
    far_away = np.arange(60) < 10
    similarity[:, far_away] -= 5  # a gallery of these alone has no pair above the floor
    trials = [(np.arange(20), np.arange(60)), (np.arange(20), np.flatnonzero(far_away))]
    found = decide(similarity, query, gallery, None, trials, share)
    assert share < 1 or None not in found
    assert None in found or share == 1
    for (rows, columns), decided in zip(trials, found, strict=True):
        nothing = np.zeros((len(rows), len(columns)), dtype=bool)
        if decided is not None:
            assert_agree(decided, naive(similarity.numpy()[:, columns], query, gallery[columns], nothing))


def test_of_too_many_pairs_evenly_spaced_queries_are_used(monkeypatch):
    similarity, query, gallery, keys = made_up(6)
    monkeypatch.setattr(verification, 'MOST_PAIRS', 24 * 30 // 3)
    (found,) = decide(similarity, query, gallery, keys, [(np.arange(24), np.arange(30))])
    ignore = keys[0][:, None] == keys[1]
    assert_agree(found, naive(similarity.numpy()[::3], query[::3], gallery, ignore[::3]))


def test_nothing_to_decide():
    similarity = torch.tensor([[0.5, 0.4]])
    alone, strangers = np.array([0, 0]), np.array([1, 2])
    trial = [(np.arange(1), np.arange(2))]
    for gallery in (alone, strangers):
        assert decide(similarity, np.array([0]), gallery, None, trial) == [dict.fromkeys(DECISIONS)]


def test_perfect_and_constant_features():
    query, gallery = np.arange(20), np.repeat(np.arange(20), 2)
    match = torch.from_numpy(query[:, None] == gallery).float()
    trial = [(np.arange(20), np.arange(40))]
    (perfect,) = decide(match, query, gallery, None, trial)
    assert perfect == {**dict.fromkeys(FARS, 1.0), **dict.fromkeys(FPIRS, 0.0)}
    (constant,) = decide(torch.ones_like(match), query, gallery, None, trial)
    assert constant == {**dict.fromkeys(FARS, 0.0), **dict.fromkeys(FPIRS, 1.0)}, 'ties count against the model'


def test_threshold():
    values = torch.arange(100.0)
    assert exceeded_by(values, 0.1, 100) == 89
    assert exceeded_by(values, 0.29, 100) == 70, '0.29 * 100 is a little less than 29'
    assert exceeded_by(values[-5:], 0.05, 100) is None
    assert exceeded_by(values[-6:], 0.05, 100) == 94
