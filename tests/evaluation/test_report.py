"""Summaries, tables and files against the same figures gathered query by query."""

import csv
import dataclasses
import json
import math
import os

import numpy as np
import pytest
from reports import FAILURE, SETTINGS, make_report, make_trials

from vireid_timm.constants import INFRARED
from vireid_timm.evaluation.confidence import bootstrap_intervals
from vireid_timm.evaluation.report import METRICS, Report, read_results, summarise


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


def test_cmc_is_counted_query_by_query(images, result):
    trials = make_trials(images, drop=4)
    found = {}
    for rows, metrics in trials:
        for i, row in enumerate(rows.tolist()):
            if metrics.valid[i]:
                found.setdefault(row, []).append([float(metrics.rank[i] <= k) for k in range(1, 21)])
    per_query = np.array([np.mean(values, axis=0) for _, values in sorted(found.items())])
    assert result.cmc['mean'] == pytest.approx(np.mean([metrics.cmc for _, metrics in trials], axis=0), abs=1e-6)
    for name, values in zip(('low', 'high'), bootstrap_intervals(per_query.T).T, strict=True):
        assert result.cmc[name] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize('cmc', [{'mean': [1.0] * 20}, {'mean': [1.0], 'low': [1.0], 'high': [1.0]}, 3])
def test_a_broken_cmc_is_no_report(cmc, tmp_path, result):
    report = make_report({'all-single': dataclasses.replace(result, cmc=cmc)})
    report.save(tmp_path / 'report.json')
    with pytest.raises(ValueError, match='is not a report'):
        Report.load(tmp_path / 'report.json')


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
    table = lines[7:-2]
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
    assert lines[-2] == 'R1 to R20 count distinct identities: all-single, all-multi'
    few = 'fewer than 10 people or 30 queries, so these results mean little'
    assert lines[-1] == f'{few}: all-single, all-multi, visible-to-infrared'
    assert report['all-multi'] is result


def test_the_table_has_the_other_features_in_its_last_column(result, tmp_path):
    other = {name: value / 2 for name, value in result.mean.items()}
    both = dataclasses.replace(result, other_features=other)
    report = make_report({'all-single': both, 'all-multi': result}, features='before-bn')
    table = str(report).splitlines()[6:-2]
    assert table[0].endswith('mAP 95 %  mAP after-bn')
    assert [line.split()[-1] for line in table[1:]] == [
        f'{50 * result.mean["mAP"]:.2f}',
        f'{100 * result.std["mINP"]:.2f}',
        '-',
        f'{100 * result.std["mINP"]:.2f}',
    ]
    assert str(make_report({'all-single': both})).splitlines()[6].endswith('mAP before-bn')
    report.save(tmp_path / 'report.json')
    assert Report.load(tmp_path / 'report.json') == report
    report.save_csv(tmp_path / 'report.csv')
    with open(tmp_path / 'report.csv', encoding='utf-8', newline='') as file:
        first, second = csv.DictReader(file)
    for metric in ('rank1', 'mAP', 'mINP'):
        assert float(first[f'{metric}_other_features']) == pytest.approx(100 * other[metric], abs=1e-4)
        assert second[f'{metric}_other_features'] == ''


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
        '3 broken images skipped',
    ):
        assert words in text
    assert 'no flip test' not in text
    elsewhere = str(Report('regdb', {}, {'all-single': result}, reranking='cross-modality'))
    assert elsewhere.splitlines()[:2] == ['regdb', 'cross-modality re-ranking']
    assert 'crop' not in elsewhere


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
    assert len(lines) < 80
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
def test_files_that_are_not_reports_are_named(tmp_path, text):
    (tmp_path / 'other.json').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=r'other\.json is not a report'):
        Report.load(tmp_path / 'other.json')
    (tmp_path / 'other.json').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match=r'other\.json is not a report'):
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
        (lambda values, result: result.update(other_features={'mAP': 1}), 'expected a number for each of rank1'),
        (lambda values, result: result['intervals'].pop('rank1'), 'expected intervals of rank1, mAP, mINP, got mAP'),
        (lambda values, result: result['intervals'].update(mAP=[0.5]), 'unpack'),
        (lambda values, result: result['queries'].pop('AP'), 'expected query columns'),
        (lambda values, result: result['queries']['AP'].pop(), 'of equal length'),
        (lambda values, result: result['queries']['AP'].__setitem__(3, 'bad'), 'could not convert'),
    ],
)
def test_the_error_of_a_damaged_report_is_shown(tmp_path, result, change, message):
    make_report({'all-single': result}).save(tmp_path / 'report.json')
    values = json.loads((tmp_path / 'report.json').read_text(encoding='utf-8'))
    change(values, values['protocols']['all-single'])
    (tmp_path / 'report.json').write_text(json.dumps(values), encoding='utf-8')
    with pytest.raises(ValueError, match=rf'report\.json is not a report.*{message}.*evaluate again'):
        Report.load(tmp_path / 'report.json')


def test_rows_are_appended_to_a_table_of_results(tmp_path, result):
    path = tmp_path / 'results.csv'
    path.touch()  # as mktemp leaves it
    make_report({'all-single': result}).save_csv(path)
    first = path.read_text(encoding='utf-8')
    make_report({'all-single': result, 'all-multi': result}, model='other').save_csv(path)
    assert path.read_text(encoding='utf-8').startswith(first)
    rows = read_results(path)
    assert [(row['model'], row['protocol']) for row in rows] == [
        ('vireid_dml_r50', 'all-single'),
        ('other', 'all-single'),
        ('other', 'all-multi'),
    ]


def test_rows_of_another_version_keep_their_columns(tmp_path, result):
    path = tmp_path / 'results.csv'
    path.write_text('model,protocol,mAP,note\nold,all-single,12.5,"by hand, once"\n')
    make_report({'all-single': result}).save_csv(path)
    old, new = read_results(path)
    assert (old['model'], old['mAP'], old['note'], old['rank1']) == ('old', '12.5', 'by hand, once', '')
    assert (new['model'], new['note']) == ('vireid_dml_r50', '')
    assert float(new['mAP']) == round(100 * result.mean['mAP'], 4)


@pytest.mark.parametrize('content', [b'my notes\n', b'\x89PNG\r\n\x1a\n\x00', b'model,protocol\na,b,c\n', b'\x00'])
def test_another_file_is_no_table_of_results(tmp_path, result, content):
    path = tmp_path / 'results.csv'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='results.csv is not a table of results.*give another file'):
        make_report({'all-single': result}).save_csv(path)
    assert path.read_bytes() == content


def test_names_in_another_encoding_are_written_and_read_back(tmp_path, result):
    name = os.fsdecode('张'.encode('gbk'))
    queries = {**result.queries, **{column: [name] * len(result.queries['path']) for column in ('path', 'identity')}}
    named = dataclasses.replace(result, queries=queries, failures=[{**FAILURE, 'path': name, 'identity': name}])
    report = make_report({'all-single': named}, options={'list': name, 'half': '\ud800'})
    report.save(tmp_path / f'{name}.json')
    assert Report.load(tmp_path / f'{name}.json') == report
    report.save_csv(tmp_path / f'{name}.csv')
    report.save_csv(tmp_path / f'{name}.csv')
    rows = read_results(tmp_path / f'{name}.csv')
    assert [row['options'] for row in rows] == [
        f'list={name}, half='.encode('utf-8', 'backslashreplace').decode() + r'\ud800'
    ] * 2


@pytest.mark.parametrize('people, queries, small', [(10, 30, False), (9, 30, True), (10, 29, True), (1, 1, True)])
def test_few_people_or_queries_are_named(result, people, queries, small):
    columns = {name: [0.5] * (queries + 5) for name in result.queries}
    columns['identity'] = [str(number % people) for number in range(queries)] + ['without a match'] * 5
    columns['AP'] = [0.5] * queries + [None] * 5
    counted = dataclasses.replace(result, queries=columns, num_valid_queries=queries)
    assert ('mean little: all-single' in str(make_report({'all-single': counted}))) == small


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
