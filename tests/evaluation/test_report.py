"""Summaries, tables, files and comparisons against the same figures gathered image by image."""

import csv
import dataclasses
import json
import math
import os

import numpy as np
import pytest

from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data.records import Records
from vireid_timm.evaluation.compare import PairedDifference, ProtocolComparison, compare
from vireid_timm.evaluation.confidence import bootstrap_intervals, paired_test
from vireid_timm.evaluation.metrics import rank_metrics
from vireid_timm.evaluation.report import (
    METRICS,
    ProtocolResult,
    Report,
    breakdown,
    breakdown_table,
    failures_table,
    summarise,
)

CAMERAS = (1, 2, 3, 6)
SETTINGS = dict(
    direction='infrared to visible',
    draw='seeded',
    per_identity_cmc=True,
    gallery_size=7,
    trials_fingerprint='trials',
)


def make_images(root='data', identities=6):
    """Every identity twice in two infrared cameras and in two visible ones."""
    return Records.from_rows(
        [
            (os.path.join(root, f'cam{camera}', f'{number:04d}', f'{i}.jpg'), f'{number:04d}', camera, modality, 'test')
            for number in range(identities)
            for camera, modality in zip(CAMERAS, (VISIBLE, VISIBLE, INFRARED, INFRARED))
            for i in range(2)
        ]
    )


def make_trials(images, num_trials=3, seed=0, drop=0, shift=0.0):
    """Random similarities of infrared queries and a random gallery that lacks identity 0000 and some of the others."""
    generator = np.random.default_rng(seed)
    infrared = np.flatnonzero(images.modality == INFRARED)
    visible = np.flatnonzero((images.modality == VISIBLE) & (images.identity != '0000'))
    noise = np.random.default_rng(99)
    trials = []
    for _ in range(num_trials):
        query = np.sort(generator.choice(infrared, len(infrared) - drop, replace=False))
        gallery = generator.choice(visible, 7, replace=False)
        match = images.identity[query][:, None] == images.identity[gallery]
        similarity = noise.random(match.shape) + shift * match
        metrics = rank_metrics(similarity, images.identity[query], images.identity[gallery], per_identity_cmc=True)
        trials.append((query, metrics))
    return trials


@pytest.fixture
def images():
    return make_images()


@pytest.fixture
def result(images):
    return summarise(make_trials(images, drop=4), images, root='data', **SETTINGS)


def make_report(protocols, **options):
    defaults = dict(
        dataset='sysu_mm01',
        options={'trial': 1, 'size': [128, 64]},
        model='vireid_dml_r50',
        weights='0123456789ab',
        features='after-bn',
        size=(288, 144),
        precision='float32',
        versions={'torch': '2.5.0', 'numpy': '1.24.0'},
    )
    return Report(protocols=protocols, **{**defaults, **options})


def per_query(trials):
    """Row -> its (rank1, AP, INP) in every trial in which it is a query, None where it is not valid."""
    values = {}
    for rows, metrics in trials:
        for i, row in enumerate(rows.tolist()):
            found = (float(metrics.rank[i] == 1), metrics.ap[i], metrics.inp[i]) if metrics.valid[i] else None
            values.setdefault(row, []).append(found)
    return values


def test_summary_is_gathered_query_by_query(images, result):
    trials = make_trials(images, drop=4)
    gathered = per_query(trials)
    assert len(gathered) > len(trials[0][0]), 'the queries have to differ between trials'
    assert list(result.queries) == ['path', 'identity', 'camera', 'modality', 'rank1', 'AP', 'INP']
    means = []
    for place, row in enumerate(sorted(gathered)):
        number, camera = images.identity[row], images.camera[row]
        assert result.queries['path'][place] == f'cam{camera}/{number}/{row % 2}.jpg'
        assert result.queries['identity'][place] == number
        assert result.queries['camera'][place] == camera
        assert result.queries['modality'][place] == INFRARED
        valid = [found for found in gathered[row] if found is not None]
        for i, column in enumerate(('rank1', 'AP', 'INP')):
            value = result.queries[column][place]
            assert value == (round(sum(found[i] for found in valid) / len(valid), 6) if valid else None)
        if valid:
            means.append(np.mean(valid, axis=0))
    assert {len(column) for column in result.queries.values()} == {len(gathered)}
    assert None in result.queries['AP'] and any(value for value in result.queries['AP'])
    expected = bootstrap_intervals(np.transpose(means))
    assert list(result.intervals) == ['rank1', 'mAP', 'mINP']
    np.testing.assert_allclose(list(result.intervals.values()), expected, rtol=1e-12)


def test_summary_of_the_trials(images, result):
    metrics = [metrics for _, metrics in make_trials(images, drop=4)]
    assert list(result.mean) == list(result.std) == list(METRICS)
    for name, values in {
        'mAP': [entry.mAP for entry in metrics],
        'mINP': [entry.mINP for entry in metrics],
        **{f'rank{k}': [entry.cmc[k - 1] for entry in metrics] for k in (1, 5, 10, 20)},
    }.items():
        assert result.mean[name] == pytest.approx(np.mean(values), abs=1e-15)
        assert result.std[name] == pytest.approx(np.std(values), abs=1e-15)
        assert [trial[name] for trial in result.trials] == values
    assert result.num_queries == 20
    assert result.num_valid_queries == metrics[0].num_valid_queries < 20
    for name, value in SETTINGS.items():
        assert getattr(result, name) == value
    assert result.failures == []


def test_every_value_is_plain(result):
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    for column in result.queries.values():
        assert {type(value) for value in column} <= {str, int, float, type(None)}


def test_paths_are_relative_to_the_datasets_folder(tmp_path, images):
    trials = make_trials(images, drop=4)

    def paths(root, records):
        return summarise(trials, records, root=root, **SETTINGS).queries['path']

    def moved(folder):
        return dataclasses.replace(images, path=[f'{folder}{path}' for path in images.path])

    expected = paths('data', images)
    assert paths('data/', images) == expected
    assert paths(f'{tmp_path}/data', moved(f'{tmp_path}/')) == expected
    assert paths('ata', images) == [f'data/{path}' for path in expected]
    assert paths('dat', images) == [f'data/{path}' for path in expected], 'the folder has to be whole'
    assert paths('other', images) == [f'data/{path}' for path in expected]
    assert paths('', images) == [f'data/{path}' for path in expected]
    (tmp_path / 'images.csv').touch()
    assert paths(f'{tmp_path}/images.csv', moved(f'{tmp_path}/')) == [f'data/{path}' for path in expected]


def test_table(result):
    single = dataclasses.replace(
        result, direction='visible to infrared', draw=None, per_identity_cmc=False, trials=result.trials[:1]
    )
    report = make_report({'all-single': result, 'all-multi': result, 'visible-to-infrared': single})
    lines = str(report).splitlines()
    assert lines[:6] == [
        'sysu_mm01 (trial=1, size=[128, 64])',
        'vireid_dml_r50, weights 0123456789ab, features after-bn, images 288x144, float32',
        'no flip test, 1 crop, no re-ranking',
        'torch 2.5.0, numpy 1.24.0',
        'infrared to visible: all-single, all-multi',
        'visible to infrared: visible-to-infrared',
    ]
    table = lines[7:-1]
    assert table[0].split() == 'protocol trials queries gallery R1 R5 R10 R20 mAP mINP mAP 95 %'.split()
    assert len({len(line) for line in (table[0], table[1], table[3], table[5])}) == 1, 'columns must align'
    low, high = result.intervals['mAP']
    cells = [f'{100 * result.mean[name]:.2f}' for name in METRICS]
    interval = ['%.2f' % (100 * low), 'to', '%.2f' % (100 * high)]
    counts = [str(result.num_valid_queries), 'of', '20', '7']
    assert table[1].split() == ['all-single', '3', 'seeded', *counts, *cells, *interval]
    assert table[2].split() == ['std', *(f'{100 * result.std[name]:.2f}' for name in METRICS)]
    assert table[5].split() == ['visible-to-infrared', '1', *counts, *cells, *interval]
    assert len(table) == 6, 'a single trial has no deviation'
    assert lines[-1] == 'R1 to R20 count distinct identities: all-single, all-multi'
    assert report['all-multi'] is result


def test_heading_names_everything_that_changes_a_number(result):
    text = str(
        make_report(
            {'all-single': result},
            options={},
            features='before-bn',
            flip_test=True,
            crops=5,
            reranking='k-reciprocal',
            skipped_images=3,
        )
    )
    for words in (
        'sysu_mm01\n',
        'features before-bn',
        'flip test, 5 crops, k-reciprocal re-ranking\n',
        '3 broken images left out',
    ):
        assert words in text
    assert 'no flip test' not in text
    elsewhere = str(Report('regdb', {}, {'all-single': result}, reranking='cross-modality'))
    assert elsewhere.splitlines()[:2] == ['regdb', 'cross-modality re-ranking']
    assert 'crop' not in elsewhere


FAILURE = dict(
    path='cam3/0001/1.jpg',
    identity='0001',
    camera=3,
    modality=INFRARED,
    AP=0.0312,
    rank=17,
    found=[{'path': 'cam1/0002/0.jpg', 'identity': '0002'}, {'path': 'cam2/0003/1.jpg', 'identity': '0003'}],
)


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(flip_test=True, crops=5, reranking='k-reciprocal', skipped_images=2),
        dict(model='', weights='', features='', size=None, precision='', versions={}, options={}),
    ],
)
def test_saved_and_read_back(tmp_path, result, options):
    result = dataclasses.replace(result, failures=[FAILURE], draw=None)
    report = make_report({'all-single': result, 'all-multi': result}, **options)
    report.save(tmp_path / 'new' / 'report.json')
    again = Report.load(tmp_path / 'new' / 'report.json')
    assert again == report
    assert str(again) == str(report)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['report.json']
    text = (tmp_path / 'new' / 'report.json').read_text(encoding='utf-8')
    assert json.loads(text)['protocols']['all-multi']['mean']['mAP'] == result.mean['mAP']


def test_file_has_a_line_for_every_list(tmp_path, result):
    result = dataclasses.replace(result, failures=[FAILURE])
    make_report({'all-single': result}).save(tmp_path / 'report.json')
    lines = (tmp_path / 'report.json').read_text(encoding='utf-8').splitlines()
    assert len(lines) < 70
    assert f'        "AP": {json.dumps(result.queries["AP"])},' in lines
    assert f'      "mean": {json.dumps(result.mean)},' in lines
    assert '  "dataset": "sysu_mm01",' in lines
    assert f'            {json.dumps(FAILURE["found"][1])}' in lines


def test_nan_is_never_written(tmp_path, result):
    broken = dataclasses.replace(result, mean={**result.mean, 'mAP': math.nan})
    with pytest.raises(ValueError, match='JSON compliant'):
        make_report({'all-single': broken}).save(tmp_path / 'report.json')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"protocols": {}, "size": null, "colour": 1}', 'nonsense', '7'])
def test_what_is_no_report_is_named(tmp_path, text):
    (tmp_path / 'other.json').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=r'other\.json is no report'):
        Report.load(tmp_path / 'other.json')
    (tmp_path / 'other.json').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match=r'other\.json is no report'):
        Report.load(tmp_path / 'other.json')
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path / 'missing.json')


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda values, result: values.pop('size'), 'size'),
        (lambda values, result: values.update(flip_test='yes'), "flip_test cannot be 'yes'"),
        (lambda values, result: values.update(crops=None), 'crops cannot be None'),
        (lambda values, result: values.update(size=7), 'not iterable'),
        (lambda values, result: result.pop('queries'), 'queries'),
        (lambda values, result: result.update(mAP_interval=[0, 1]), 'mAP_interval'),
        (lambda values, result: result.update(draw=7), 'draw cannot be 7'),
        (lambda values, result: result.update(trials='none'), 'trials cannot be'),
        (lambda values, result: result['mean'].pop('mINP'), 'expected a number for each of rank1'),
        (lambda values, result: result['std'].update(mAP='high'), 'expected a number for each of rank1'),
        (lambda values, result: result['trials'][2].pop('rank5'), 'expected a number for each of rank1'),
        (lambda values, result: result['intervals'].pop('rank1'), 'expected intervals of rank1, mAP, mINP, got mAP'),
        (lambda values, result: result['intervals'].update(mAP=[0.5]), 'unpack'),
        (lambda values, result: result['queries'].pop('AP'), 'expected query columns'),
        (lambda values, result: result['queries']['AP'].pop(), 'of equal length'),
        (lambda values, result: result['queries']['AP'].__setitem__(3, 'bad'), 'could not convert'),
    ],
)
def test_damaged_reports_say_what_is_wrong(tmp_path, result, change, message):
    make_report({'all-single': result}).save(tmp_path / 'report.json')
    values = json.loads((tmp_path / 'report.json').read_text(encoding='utf-8'))
    change(values, values['protocols']['all-single'])
    (tmp_path / 'report.json').write_text(json.dumps(values), encoding='utf-8')
    with pytest.raises(ValueError, match=rf'report\.json is no report.*{message}.*evaluate again'):
        Report.load(tmp_path / 'report.json')


def test_csv(tmp_path, result):
    plain = dataclasses.replace(result, draw=None)
    report = make_report({'all-single': result, 'infrared-to-visible': plain}, flip_test=True, crops=5)
    report.save_csv(tmp_path / 'new' / 'results.csv')
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['results.csv']
    assert b'\r' not in (tmp_path / 'new' / 'results.csv').read_bytes()
    with open(tmp_path / 'new' / 'results.csv', encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['protocol'], row['draw']) for row in rows] == [('all-single', 'seeded'), ('infrared-to-visible', '')]
    row = rows[0]
    assert next(iter(row)) == 'model', 'as in the results files of timm'
    for name in METRICS:
        assert float(row[name]) == round(100 * result.mean[name], 4)
        assert float(row[f'{name}_std']) == round(100 * result.std[name], 4)
    for name, (low, high) in result.intervals.items():
        assert (float(row[f'{name}_low']), float(row[f'{name}_high'])) == (round(100 * low, 4), round(100 * high, 4))
    expected = dict(
        model='vireid_dml_r50',
        dataset='sysu_mm01',
        direction='infrared to visible',
        features='after-bn',
        flip_test='True',
        crops='5',
        reranking='none',
        trials='3',
        num_queries='20',
        num_valid_queries=str(result.num_valid_queries),
        gallery_size='7',
        per_identity_cmc='True',
        img_height='288',
        img_width='144',
        precision='float32',
        weights='0123456789ab',
        skipped_images='0',
        options='trial=1, size=[128, 64]',
        trials_fingerprint='trials',
        versions='torch 2.5.0, numpy 1.24.0',
    )
    assert {name: row[name] for name in expected} == expected
    Report('regdb', {}, {'visible-to-infrared': result}).save_csv(tmp_path / 'features.csv')
    with open(tmp_path / 'features.csv', encoding='utf-8', newline='') as file:
        (row,) = csv.DictReader(file)
    assert (row['model'], row['img_height'], row['versions']) == ('', '', '')


@pytest.mark.parametrize('by', ['camera', 'identity', 'modality'])
def test_breakdown_averages_group_by_group(result, by):
    groups = breakdown(result, by)
    valid = [i for i, value in enumerate(result.queries['AP']) if value is not None]
    names = {str(result.queries[by][i]) for i in valid}
    assert {group.name for group in groups} == names and len(groups) == len(names)
    for group in groups:
        members = [i for i in valid if str(result.queries[by][i]) == group.name]
        assert group.num_valid_queries == len(members)
        for name, column in (('rank1', 'rank1'), ('mAP', 'AP'), ('mINP', 'INP')):
            mean = sum(result.queries[column][i] for i in members) / len(members)
            assert getattr(group, name) == pytest.approx(mean, abs=1e-12)
    if by == 'identity':
        assert [group.mAP for group in groups] == sorted(group.mAP for group in groups)
        assert len(groups) > 2 and '0000' not in names
    else:
        assert [group.name for group in groups] == (['3', '6'] if by == 'camera' else [INFRARED])


def test_cameras_come_by_number_and_unknown_ones_by_name(result):
    cameras = [(10, 2, 0)[i % 3] for i in range(len(result.queries['camera']))]
    groups = breakdown(dataclasses.replace(result, queries={**result.queries, 'camera': cameras}), 'camera')
    assert [group.name for group in groups] == ['unknown', '2', '10']
    with pytest.raises(ValueError, match="unknown breakdown 'weather'; expected one of camera, identity, modality"):
        breakdown(result, 'weather')


def test_breakdown_tables(result):
    groups = breakdown(result, 'identity')
    lines = breakdown_table(result, 'identity', limit=2).splitlines()
    assert lines[0].split() == ['identity', 'queries', 'R1', 'mAP', 'mINP']
    for line, group in zip(lines[1:3], groups):
        numbers = [f'{100 * value:.2f}' for value in (group.rank1, group.mAP, group.mINP)]
        assert line.split() == [group.name, str(group.num_valid_queries), *numbers]
    assert len({len(line) for line in lines[:3]}) == 1
    missing = len(set(result.queries['identity'])) - len(groups)
    assert missing > 0
    assert lines[3:] == [
        f'{len(groups) - 2} more, with a higher mAP',
        f'{missing} more, none of whose queries has a match in the gallery',
    ]
    assert len(breakdown_table(result, 'identity').splitlines()) == 1 + len(groups) + 1
    assert breakdown_table(result, 'camera', limit=1) == breakdown_table(result, 'camera'), 'only identities are cut'


def test_failures_table(result):
    assert failures_table(result) == 'the report holds no list of failures'
    second = {**FAILURE, 'path': 'cam6/0004/0.jpg', 'camera': 6, 'AP': 0.5, 'rank': 2, 'found': []}
    lines = failures_table(dataclasses.replace(result, failures=[FAILURE, second])).splitlines()
    assert lines[0].split() == 'query identity camera modality AP first right first answers'.split()
    assert lines[1].split() == ['cam3/0001/1.jpg', '0001', '3', INFRARED, '3.12', '17', '0002', '0003']
    assert lines[2].split() == ['cam6/0004/0.jpg', '0001', '6', INFRARED, '50.00', '2']


@pytest.fixture
def better(images):
    """The same queries and galleries, seen by a better model."""
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
    assert same.verdict == 'no difference in mAP that these queries could show'


@pytest.mark.parametrize('p, verdict', [(0.049, 'second is better in mAP'), (0.05, 'no difference in mAP')])
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
    assert 'all-single: measured on other images' in str(comparison)


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
    """A new field of a report or a result that nobody compares would let a difference go unnoticed."""
    others = dict(
        dataset='regdb',
        options={},
        model='other',
        weights='other',
        features='before-bn',
        flip_test=True,
        crops=5,
        reranking='cross-modality',
        size=(128, 64),
        precision='bfloat16',
        skipped_images=1,
        versions={},
    )
    assert set(others) == {field.name for field in dataclasses.fields(Report)} - {'protocols'}
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
    results = {'mean', 'std', 'intervals', 'trials_fingerprint', 'queries', 'failures'}
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
