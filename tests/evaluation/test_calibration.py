"""Calibrations against known curves, the formulas written out, and counts pair by pair."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from vireid_timm.data.readers import create_dataset
from vireid_timm.evaluation import calibration as module
from vireid_timm.evaluation.calibration import BINS, FIRST, Calibration, Pairs, fit_calibration, reliability
from vireid_timm.evaluation.evaluate import calibrate_features, evaluate_features

SETTINGS = {'weights': 'abc', 'features': 'after-bn', 'size': [64, 32]}


def drawn_pairs(seed=0, num_queries=60, people=40, images=3, ignoring=False):
    """Features of people with noise; the pairs of queries with every gallery image, in three parts."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people, 16, generator=generator)
    query, gallery = torch.arange(num_queries) % people, torch.arange(people * images) // images
    sides = [centres[who] + 0.8 * torch.randn(len(who), 16, generator=generator) for who in (query, gallery)]
    similarity = torch.nn.functional.normalize(sides[0]) @ torch.nn.functional.normalize(sides[1]).T
    match = query[:, None] == gallery
    ignore = torch.rand(match.shape, generator=generator) < 0.2 if ignoring else None
    parts = torch.arange(num_queries).split(25)
    return [Pairs(similarity[rows], match[rows], None if ignore is None else ignore[rows]) for rows in parts]


def fitted(parts, seed=0):
    return fit_calibration(parts, sum(part.match.numel() for part in parts), SETTINGS, {'dataset': 'made up'}, seed)


@pytest.mark.parametrize('ignoring', [False, True])
def test_the_curve_is_the_most_likely_one(ignoring):
    parts = drawn_pairs(ignoring=ignoring)
    found = fitted(parts)
    similarity = torch.cat([part.similarity.flatten() for part in parts]).double()
    seen = [torch.ones_like(part.match) if part.ignore is None else ~part.ignore for part in parts]
    counted = torch.cat(seen).flatten()
    truth = torch.cat([part.match.flatten() for part in parts])[counted]
    similarity = similarity[counted]
    assert found.prior == pytest.approx(truth.double().mean().item())
    assert found.fitted_on == {'dataset': 'made up', 'queries': 60, 'pairs': len(truth), 'matches': int(truth.sum())}
    # Where the likelihood of Platt's targets is highest, its slopes are 0.
    positive, negative = truth.sum().item(), (~truth).sum().item()
    target = torch.where(truth, (positive + 1) / (positive + 2), 1 / (negative + 2))
    difference = found.probability(similarity) - target
    assert abs(difference.sum().item()) < 1e-4 and abs((difference * similarity).sum().item()) < 1e-4


def test_what_is_kept_of_best_matches_and_of_the_nearest_strangers():
    parts = drawn_pairs(ignoring=True)
    found = fitted(parts)
    best, nearest, counts = [], [], []
    for part in parts:
        for row in range(len(part.match)):
            seen = ~part.ignore[row]
            own, others = part.similarity[row][seen & part.match[row]], part.similarity[row][seen & ~part.match[row]]
            best += [own.max().item()] if len(own) else []
            nearest.append(others.max().item())
            counts.append(seen.sum().item())
    assert found.best_mean == pytest.approx(np.mean(best)) and found.best_deviation == pytest.approx(np.std(best))
    assert found.gallery_size == pytest.approx(np.mean(counts))
    for rate, threshold in found.thresholds.items():
        above = sum(value > threshold for value in nearest)
        assert above <= float(rate) * len(nearest) < above + 1


def test_the_prior_follows_the_gallery():
    found = fitted(drawn_pairs())
    similarity = torch.tensor([[0.1, 0.4], [0.6, 0.9]])
    odds = found.probability(similarity) / (1 - found.probability(similarity))
    assert found.prior == pytest.approx(1 / 40) and found.gallery_size == 120
    for size, images, prior in ((120, None, 1 / 40), (12_000, None, 1 / 4000), (100, 5, 1 / 20), (2, None, 1 / 2)):
        shifted = found.probability(similarity, size, images)
        expected = odds * (prior / (1 - prior)) / (found.prior / (1 - found.prior))
        torch.testing.assert_close(shifted, expected / (1 + expected))
    of_each = found.probability(similarity, torch.tensor([[120], [12_000]]))
    torch.testing.assert_close(of_each[1], found.probability(similarity[1], 12_000))


def test_nobody_follows_the_formula():
    found = fitted(drawn_pairs())
    sizes = [1, 120, 10**6]
    for size in sizes:
        previous = 1.0
        for top in (-0.5, 0.2, 0.5, 0.8, 1.0):
            usual = 0.5 * (1 + math.erf((top - found.best_mean) / found.best_deviation / math.sqrt(2)))
            usual = found.uninformative + (1 - found.uninformative) * usual
            ratio = math.exp(found.ratio_slope * top + found.ratio_intercept) / size
            value = found.nobody(torch.tensor([top]), size).item()
            assert value == pytest.approx(1 / (1 + usual + ratio), rel=1e-6)
            assert value <= previous
            previous = value
    top = torch.tensor([0.7, 0.7, 0.7])
    torch.testing.assert_close(found.nobody(top, torch.tensor(sizes))[1], found.nobody(top)[0])


def test_the_share_that_says_nothing_is_the_most_likely_one():
    parts = drawn_pairs()
    found = fitted(parts)

    def loss(calibration):
        total = 0
        for part in parts:
            stranger = part.similarity.masked_fill(part.match, -1).amax(dim=1)
            absent, present = (calibration.nobody(top) for top in (stranger, part.similarity.amax(dim=1)))
            total -= ((1 - present).log() + absent.log())[part.match.any(dim=1)].sum().item()
        return total

    losses = [loss(dataclasses.replace(found, uninformative=share / 100)) for share in range(101)]
    assert found.uninformative == int(np.argmin(losses)) / 100


def test_a_sample_is_drawn_from_many_pairs_and_is_always_the_same(monkeypatch):
    parts = drawn_pairs(num_queries=200)
    whole = fitted(parts)
    monkeypatch.setattr(module, 'MOST_PAIRS', 5_000)
    state = torch.get_rng_state()
    sample = fitted(parts)
    assert sample == fitted(parts) != whole
    assert torch.equal(torch.get_rng_state(), state)
    assert sample.slope == pytest.approx(whole.slope, rel=0.1)
    assert (sample.prior, sample.fitted_on, sample.thresholds) == (whole.prior, whole.fitted_on, whole.thresholds)


def test_perfect_features_give_a_finite_curve():
    match = torch.eye(40, dtype=torch.bool)
    found = fitted([Pairs(match.float(), match)])
    assert found.probability(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1 / 1562, 41 / 42], rel=0.01)
    assert found.nobody(torch.tensor([0.0, 1.0])).tolist()[1] < 0.7


def test_too_little_and_senseless_data():
    with pytest.raises(ValueError, match='at least 30 queries with a match'):
        fitted(drawn_pairs(num_queries=29))
    parts = [dataclasses.replace(part, similarity=-part.similarity) for part in drawn_pairs()]
    with pytest.raises(ValueError, match='not more similar'):
        fitted(parts)


def test_json_and_settings():
    found = fitted(drawn_pairs())
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Calibration.from_dict(values) == found
    assert found.mismatch(SETTINGS) == found.mismatch({**SETTINGS, 'new': 1}) == ''
    assert found.mismatch({**SETTINGS, 'weights': 'def', 'size': [1, 2]}) == 'weights, size'
    for wrong in ({}, None, {**values, 'more': 1}, {**values, 'slope': None}, {**values, 'thresholds': {'0.1': 'x'}}):
        with pytest.raises(ValueError, match='not a calibration'):
            Calibration.from_dict(wrong)


@pytest.mark.parametrize('ignoring', [False, True])
def test_reliability_counts_pair_by_pair(ignoring):
    parts = drawn_pairs(3, ignoring=ignoring)
    found = fitted(drawn_pairs(4))
    predicted = {'pairs': [], 'first': [], 'nobody': []}
    for part in parts:
        for row in range(len(part.match)):
            seen = torch.ones_like(part.match[row]) if part.ignore is None else ~part.ignore[row]
            values, own, size = part.similarity[row][seen], part.match[row][seen], int(seen.sum())
            pairs = list(zip(found.probability(values, size, 3).tolist(), own.tolist()))
            predicted['pairs'] += pairs
            predicted['first'] += sorted(pairs, reverse=True)[:FIRST]
            if own.any():
                tops = torch.stack([values.max(), values[~own].max()])
                predicted['nobody'] += list(zip(found.nobody(tops, size).tolist(), [False, True]))
    measured = reliability(parts, found, 3)
    assert measured.keys() == predicted.keys()
    for name, listed in predicted.items():
        bins = [[] for _ in range(BINS)]
        for probability, truth in listed:
            bins[min(BINS - 1, int(probability * BINS))].append((probability, truth))
        means = [np.mean(content, axis=0) if content else (0, 0) for content in bins]
        error = sum(len(content) * abs(p - t) for content, (p, t) in zip(bins, means)) / len(listed)
        loss = -np.mean([math.log(probability if truth else 1 - probability) for probability, truth in listed])
        share = np.mean([truth for _, truth in listed])
        assert measured[name]['count'] == len(listed)
        assert measured[name]['ece'] == pytest.approx(error, abs=1e-9)
        assert measured[name]['log_loss'] == pytest.approx(loss)
        entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert measured[name]['constant_log_loss'] == pytest.approx(entropy)
        assert measured[name]['bins']['count'] == [len(content) for content in bins]
        shares = [None if not content else pytest.approx(mean[1]) for content, mean in zip(bins, means)]
        assert measured[name]['bins']['share'] == shares


def test_a_dataset_is_calibrated_by_its_protocols():
    dataset = create_dataset('synthetic', identities=0, test_identities=12, images_per_modality=2)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 8, generator=generator)
    people = torch.tensor([int(name) for name in dataset.test.identity])
    noise = torch.randn(len(people), 8, generator=generator)
    features = torch.nn.functional.normalize(centres[people] + noise)
    found = calibrate_features(features, dataset)
    assert found.fitted_on['protocols'] == ['visible-to-infrared', 'infrared-to-visible']
    assert (found.fitted_on['identities'], found.fitted_on['queries'], found.fitted_on['pairs']) == (
        12,
        48,
        2 * 24 * 24,
    )
    report = evaluate_features(features, dataset, calibration=found)
    assert report['mixed'].calibration is None and report['mixed'].decisions
    assert report['infrared-to-visible'].calibration['pairs']['count'] == 24 * 24
    assert evaluate_features(features, dataset)['infrared-to-visible'].calibration is None
    with pytest.raises(ValueError, match='mixed also pairs images of one'):
        calibrate_features(features, dataset, 'mixed')
    few = create_dataset('synthetic', identities=0, test_identities=9, images_per_modality=2)
    with pytest.raises(ValueError, match='at least 10 people'):
        calibrate_features(features[: len(few.test)], few)
