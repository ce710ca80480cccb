"""Breakdowns against means gathered group by group, and the tables."""

import dataclasses

import pytest
from reports import FAILURE

from vireid_timm.constants import INFRARED
from vireid_timm.evaluation.breakdown import breakdown, breakdown_table, failures_table


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


def test_cameras_are_sorted_by_number_and_unknown_ones_named(result):
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
    assert [line.split()[0] for line in lines[3:]] == [str(len(groups) - 2), str(missing)]
    assert 'higher mAP' in lines[3] and 'without any match' in lines[4]
    assert len(breakdown_table(result, 'identity').splitlines()) == 1 + len(groups) + 1
    assert breakdown_table(result, 'camera', limit=1) == breakdown_table(result, 'camera'), 'identities only'


def test_failures_table(result):
    assert 'no failures' in failures_table(result)
    second = {**FAILURE, 'path': 'cam6/0004/0.jpg', 'camera': 6, 'AP': 0.5, 'rank': 2, 'found': []}
    lines = failures_table(dataclasses.replace(result, failures=[FAILURE, second])).splitlines()
    assert lines[0].split() == 'query identity camera modality AP first right first answers'.split()
    assert lines[1].split() == ['cam3/0001/1.jpg', '0001', '3', INFRARED, '3.12', '17', '0002', '0003']
    assert lines[2].split() == ['cam6/0004/0.jpg', '0001', '6', INFRARED, '50.00', '2']
