"""Comparisons against differences gathered query by query."""

import dataclasses

import numpy as np
import pytest
from reports import SETTINGS, make_report, make_trials

from vireid_timm.constants import VISIBLE
from vireid_timm.evaluation.compare import PairedDifference, ProtocolComparison, compare
from vireid_timm.evaluation.confidence import bootstrap_intervals, paired_test
from vireid_timm.evaluation.report import ProtocolResult, Report, summarise


@pytest.fixture
def better(images):
    """The same queries and galleries with a better model."""
    return summarise(make_trials(images, drop=4, shift=0.6), images, root='data', **SETTINGS)


def test_compare_is_paired_query_by_query(result, better):
    comparison = compare(make_report({'all-single': result}), make_report({'all-single': better}))
    assert comparison.settings == [] and not comparison.only_first and not comparison.only_second
    protocol = comparison.protocols['all-single']
    valid = [i for i, value in enumerate(result.queries['AP']) if value is not None]
    differences = []
    for name, column in (('rank1', 'rank1'), ('mAP', 'AP'), ('mINP', 'INP')):
        first, second = ([entry.queries[column][i] for i in valid] for entry in (result, better))
        assert protocol.first[name] == result.mean[name] and protocol.second[name] == better.mean[name]
        assert protocol.paired[name].p == paired_test(first, second)
        differences.append(np.subtract(second, first))
    expected = bootstrap_intervals(differences)
    np.testing.assert_allclose([protocol.paired[name].interval for name in ('rank1', 'mAP', 'mINP')], expected)
    assert protocol.verdict == 'second is better in mAP'
    other_way = compare(make_report({'all-single': better}), make_report({'all-single': result}))
    assert other_way.protocols['all-single'].verdict == 'second is worse in mAP'
    same = compare(make_report({'all-single': result}), make_report({'all-single': result})).protocols['all-single']
    assert same.paired['mAP'] == PairedDifference((0.0, 0.0), 1.0)
    assert 'no significant difference' in same.verdict


@pytest.mark.parametrize('p, verdict', [(0.049, 'second is better in mAP'), (0.05, 'no significant difference in mAP')])
def test_a_difference_is_one_below_five_percent(p, verdict):
    means = [{'rank1': 0.5, 'mAP': mean, 'mINP': 0.5} for mean in (0.4, 0.41)]
    paired = {name: PairedDifference((-0.01, 0.03), p if name == 'mAP' else 0.5) for name in means[0]}
    assert ProtocolComparison(*means, paired).verdict.startswith(verdict)


@pytest.mark.parametrize(
    'change',
    [
        dict(trials_fingerprint='others'),
        dict(path=lambda value: f'{value}x'),
        dict(identity=lambda value: f'{value}x'),
        dict(camera=lambda value: value + 1),
        dict(modality=lambda value: VISIBLE),
        dict(AP=lambda value: None, rank1=lambda value: None, INP=lambda value: None),
    ],
)
def test_other_images_are_not_paired(result, better, change):
    place = next(i for i, value in enumerate(better.queries['AP']) if value is not None)
    columns = {
        name: [convert(value) if i == place else value for i, value in enumerate(better.queries[name])]
        for name, convert in change.items()
        if name in better.queries
    }
    fields = {name: value for name, value in change.items() if name not in better.queries}
    other = dataclasses.replace(better, queries={**better.queries, **columns}, **fields)
    comparison = compare(make_report({'all-single': result}), make_report({'all-single': other}))
    protocol = comparison.protocols['all-single']
    assert protocol.paired == {}
    assert protocol.second['mAP'] == better.mean['mAP']
    assert 'all-single: measured on different images' in str(comparison)


def test_compare_names_settings_and_missing_protocols(result, better):
    first = make_report({'all-single': result, 'all-multi': result})
    second = make_report(
        {'all-single': dataclasses.replace(better, draw='official', gallery_size=8), 'indoor-single': better},
        options={'trial': 2, 'size': [128, 64], 'seed': 0},
        flip_test=True,
        crops=5,
        reranking='k-reciprocal',
        size=None,
        precision='',
        skipped_images=1,
        versions={'torch': '2.6.0', 'numpy': '1.24.0'},
    )
    comparison = compare(first, second)
    assert comparison.settings == [
        ('options: trial', '1', '2'),
        ('flip_test', 'False', 'True'),
        ('crops', '1', '5'),
        ('reranking', 'none', 'k-reciprocal'),
        ('size', '288x144', '-'),
        ('precision', 'float32', '-'),
        ('skipped_images', '0', '1'),
        ('versions: torch', '2.5.0', '2.6.0'),
        ('all-single: draw', 'seeded', 'official'),
        ('all-single: gallery_size', '7', '8'),
        ('options: seed', '-', '0'),
    ]
    assert (comparison.only_first, comparison.only_second) == (['all-multi'], ['indoor-single'])
    lines = str(comparison).splitlines()
    assert lines[0].split() == ['setting', 'first', 'second']
    assert lines[1].split() == ['options:', 'trial', '1', '2']
    assert lines[-2:] == ['only in the first report: all-multi', 'only in the second report: indoor-single']


def test_every_setting_is_compared(result):
    """A new field of a report or a result must not be forgotten in comparisons."""
    others = dict(
        dataset='regdb',
        options={},
        model='other',
        weights='other',
        features='before-bn',
        flip_test=True,
        crops=5,
        centre=True,
        reranking='cross-modality',
        size=(128, 64),
        precision='bfloat16',
        skipped_images=1,
        learned_identities=3,
        versions={},
    )
    assert set(others) == {field.name for field in dataclasses.fields(Report)} - {'protocols', 'calibration'}
    first = make_report({'all-single': result})
    for name, value in others.items():
        settings = compare(first, dataclasses.replace(first, **{name: value})).settings
        assert settings and all(setting.startswith(name) for setting, _, _ in settings)
    changed = dict(
        direction='other',
        draw=None,
        per_identity_cmc=False,
        num_queries=1,
        num_valid_queries=1,
        gallery_size=1,
        trials=result.trials[:1],
    )
    results = {'mean', 'std', 'intervals', 'trials_fingerprint', 'queries', 'failures', 'examples', 'cmc'}
    results |= {'decisions', 'calibration', 'other_features'}
    assert set(changed) | results == {field.name for field in dataclasses.fields(ProtocolResult)}
    for name, value in changed.items():
        other = make_report({'all-single': dataclasses.replace(result, **{name: value})})
        assert [setting for setting, _, _ in compare(first, other).settings] == [f'all-single: {name}']


def test_comparison_prints(result, better):
    lines = str(compare(make_report({'all-single': result}), make_report({'all-single': better}))).splitlines()
    assert lines[:2] == ['no setting differs', '']
    assert lines[2].split() == ['protocol', 'metric', 'first', 'second', 'difference', '95', '%', 'p']
    assert lines[3].split()[:2] == ['all-single', 'R1']
    means = [entry.mean['mAP'] for entry in (result, better)]
    p = paired_test(*([value for value in entry.queries['AP'] if value is not None] for entry in (result, better)))
    cells = lines[4].split()
    assert cells[:4] == ['mAP', *(f'{100 * mean:.2f}' for mean in means), f'+{100 * (means[1] - means[0]):.2f}']
    assert cells[4].startswith('+') and cells[5] == 'to' and cells[-1] == f'{p:.4f}'
    assert lines[6:] == ['', 'all-single: second is better in mAP']
    nothing = compare(make_report({'all-single': result}), make_report({'all-multi': result}))
    assert str(nothing).splitlines()[1:] == [
        'only in the first report: all-single',
        'only in the second report: all-multi',
    ]
