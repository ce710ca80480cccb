"""Evaluation of tracklets, compared with a slow version that goes through them one by one."""

import dataclasses
import logging
import random

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import vireid_timm
from vireid_timm.constants import INFRARED, MODALITIES, VISIBLE
from vireid_timm.data.records import Dataset, Records
from vireid_timm.data.store import image_store
from vireid_timm.evaluation.evaluate import calibrate, evaluate, evaluate_features
from vireid_timm.evaluation.features import Extraction, extract, tracklet_features
from vireid_timm.evaluation.protocols import protocol_trials, protocols_of

EMPTY = Records.from_rows([])


def made_up(name, splits):
    """Uneven tracklets, whose images are not together in the table."""
    rng = random.Random(4)
    rows, number = [], 0
    for person in range(12):
        for modality in MODALITIES:
            for split in splits:
                for _ in range(rng.randint(0, 3)):
                    number += rng.randint(1, 5)
                    camera = rng.randint(1, 3)
                    for image in range(rng.randint(1, 4)):
                        rows.append((f'{number}/{image}.jpg', f'{person:04d}', camera, modality, split, number))
    rng.shuffle(rows)
    return Dataset(name, '', EMPTY, Records.from_rows(rows))


def slow_metrics(similarity, query, gallery, ignores_camera):
    """Rank-1 to rank-5 and mean AP; `query` and `gallery` are lists of (identity, camera)."""
    hits, precisions = [], []
    for row, (identity, camera) in enumerate(query):
        kept = [i for i, other in enumerate(gallery) if not (ignores_camera and other == (identity, camera))]
        kept.sort(key=lambda i: -similarity[row][i])
        places = [place for place, i in enumerate(kept, 1) if gallery[i][0] == identity]
        if places:
            hits.append([places[0] <= k for k in (1, 5)])
            precisions.append(np.mean([found / place for found, place in enumerate(places, 1)]))
    return np.mean(hits, axis=0).tolist(), np.mean(precisions)


@pytest.mark.parametrize(
    'name, splits, ignores_camera', [('hitsz_vcm', ('test',), True), ('buptcampus', ('query', 'gallery'), False)]
)
def test_protocols_compare_the_mean_features_of_tracklets(name, splits, ignores_camera):
    dataset = made_up(name, splits)
    test = dataset.test
    torch.manual_seed(0)
    features = F.normalize(torch.randn(len(test), 5, dtype=torch.float64))
    report = evaluate_features(features, dataset, failures=3)
    sides = {'visible-to-infrared': (VISIBLE, INFRARED), 'infrared-to-visible': (INFRARED, VISIBLE)}
    if name == 'buptcampus':
        sides['mixed'] = (MODALITIES, MODALITIES)
    assert set(protocols_of(dataset)) == set(report.protocols) == set(sides)
    means, facts = {}, {}
    for number in sorted(set(test.tracklet.tolist())):
        rows = [row for row in range(len(test)) if test.tracklet[row] == number]
        means[number] = F.normalize(features[rows].mean(dim=0), dim=0)
        facts[number] = (test.identity[rows[0]], test.camera[rows[0]], test.modality[rows[0]], test.split[rows[0]])
    for protocol, (searching, searched) in sides.items():
        query = [n for n, fact in facts.items() if fact[2] in searching and fact[3] in ('query', 'test')]
        gallery = [n for n, fact in facts.items() if fact[2] in searched and fact[3] in ('gallery', 'test')]
        similarity = [[float(means[a] @ means[b]) for b in gallery] for a in query]
        people = [[(facts[n][0], facts[n][1]) for n in side] for side in (query, gallery)]
        ranks, mean_ap = slow_metrics(similarity, *people, ignores_camera)
        result = report[protocol]
        assert (result.num_queries, result.gallery_size) == (len(query), len(gallery))
        assert [result.mean['rank1'], result.mean['rank5'], result.mean['mAP']] == pytest.approx([*ranks, mean_ap])
        (trial,) = protocol_trials(dataset, protocol)
        assert sorted(test.tracklet[trial.query].tolist()) == query and (trial.ignore is None) != ignores_camera
        firsts = {test.tracklet[row]: test.path[row] for row in reversed(range(len(test)))}
        worst = result.failures[0]
        assert worst['path'] in firsts.values() and worst['found'][0]['path'] in firsts.values()


def test_mean_features():
    features = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, -1.0], [2.0, 0.0]])
    means, rows = tracklet_features(features, np.array([4, 1, 4, 1, 0]))
    assert rows.tolist() == [0, 1, 4]
    expected = [[2.0, 0.0], [1.0, -1.0], [3.0, 6.0]]
    torch.testing.assert_close(means, F.normalize(torch.tensor(expected)))


@pytest.fixture(scope='module')
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        channels = dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 24, 32))
        return timm.create_model('vireid_base_r10t', num_classes=0, img_size=(32, 16), resnet_args=channels).eval()


@pytest.fixture(scope='module')
def rendered():
    """SynthVI, where the images of a person in one camera are a tracklet, and its store."""
    dataset = vireid_timm.create_dataset(
        'synthetic', identities=0, test_identities=12, size=(32, 16), visible_cameras=2, infrared_cameras=2
    )
    columns = [dataset.test.identity, dataset.test.camera, dataset.test.modality]
    tracklets = np.unique(columns, axis=1, return_inverse=True)[1].reshape(-1)
    store = image_store(dataset.test, (32, 16), cache='ram', workers=0)
    return with_column(dataset, tracklet=tracklets), store


def with_column(dataset, **columns):
    return dataclasses.replace(dataset, test=dataclasses.replace(dataset.test, **columns))


def test_a_model_gives_what_its_features_give_and_a_broken_image_is_left_out(model, rendered):
    dataset, store = rendered
    kinds = ['after-bn', 'before-bn']
    features, before_bn = extract(model, dataset.test, store, store.intact(), Extraction(size=(32, 16)), kinds)
    report = evaluate(model, dataset, store=store, size=(32, 16))
    table = {name: result.mean for name, result in report.protocols.items()}
    assert table == {name: result.mean for name, result in evaluate_features(features, dataset).protocols.items()}
    table = {name: result.other_features for name, result in report.protocols.items()}
    assert table == {name: result.mean for name, result in evaluate_features(before_bn, dataset).protocols.items()}

    paths = dataset.test.path.copy()
    alone = np.flatnonzero(dataset.test.tracklet == dataset.test.tracklet[-1])
    broken = [0, *alone.tolist()]  # the first image of a tracklet, and a whole one
    paths = np.array(['missing.jpg' if row in broken else path for row, path in enumerate(paths.tolist())])
    report = evaluate(
        model, with_column(dataset, path=paths), 'infrared-to-visible', skip_broken=True, cache='ram', size=(32, 16)
    )
    rest = np.setdiff1d(np.arange(len(paths)), broken)
    kept = dataclasses.replace(dataset, test=dataset.test[rest])
    expected = evaluate_features(features[rest], kept, 'infrared-to-visible')
    result = report['infrared-to-visible']
    assert result.mean == pytest.approx(expected['infrared-to-visible'].mean, abs=1e-6)
    expected = evaluate_features(before_bn[rest], kept, 'infrared-to-visible')
    assert result.other_features == pytest.approx(expected['infrared-to-visible'].mean, abs=1e-6)
    assert (result.num_queries, result.gallery_size) == (23, 24) and report.skipped_images == len(broken)


def test_a_calibration_is_about_tracklets_or_about_images(model, rendered, caplog):
    dataset, store = rendered
    options = dict(store=store, size=(32, 16))
    single = with_column(dataset, tracklet=None)
    for fitted, other in ((dataset, single), (single, dataset)):
        calibration = calibrate(model, fitted, **options)
        for tested, expected in ((fitted, True), (other, False)):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                report = evaluate(model, tested, 'infrared-to-visible', calibration=calibration, **options)
            assert (report.calibration is not None) == expected
            assert ('fitted with other settings (tracklets)' in caplog.text) != expected
