"""The identity × modality sampler: properties of every batch and every epoch, on uneven data."""

import functools
import logging
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vireid_timm.data.sampler import IdentityModalitySampler

Table = tuple[list[str], list[str]]


def table(counts: dict[str, tuple[int, int]], seed: int = 0) -> Table:
    """Return columns identity and modality, in random order, from name -> (visible images, infrared images)."""
    rows = [
        (name, modality)
        for name, pair in counts.items()
        for modality, count in zip(('visible', 'infrared'), pair, strict=True)
        for _ in range(count)
    ]
    random.Random(seed).shuffle(rows)
    identities, modalities = zip(*rows, strict=True)
    return list(identities), list(modalities)


def uneven_table() -> Table:
    counts = {f'{number:04d}': (1 + number * 7 % 23, 1 + number * 5 % 11) for number in range(30)}
    return table(counts | {'only visible': (400, 0), 'only infrared': (0, 40)})


def halves_of(batch: list[int], columns: Table, per_identity: int) -> tuple[list[str], list[str]]:
    """Return the identities of both halves, one per group of K rows; fail if a group is mixed."""
    identities, modalities = columns
    half = len(batch) // 2
    assert {modalities[row] for row in batch[:half]} == {'visible'}
    assert {modalities[row] for row in batch[half:]} == {'infrared'}
    groups = [
        {identities[row] for row in batch[start : start + per_identity]} for start in range(0, len(batch), per_identity)
    ]
    assert all(len(group) == 1 for group in groups)
    names = [group.pop() for group in groups]
    return names[: len(names) // 2], names[len(names) // 2 :]


@pytest.mark.parametrize(('identities_per_batch', 'images_per_modality'), [(8, 4), (1, 1), (30, 3), (5, 60)])
def test_every_batch_is_balanced_and_ordered(identities_per_batch: int, images_per_modality: int) -> None:
    columns = uneven_table()
    sizes = Counter(zip(*columns, strict=True))
    sampler = IdentityModalitySampler(
        *columns, identities_per_batch=identities_per_batch, images_per_modality=images_per_modality
    )
    for batch in sampler:
        assert len(batch) == 2 * identities_per_batch * images_per_modality
        assert all(type(row) is int for row in batch)
        visible, infrared = halves_of(batch, columns, images_per_modality)
        assert visible == infrared
        assert len(set(visible)) == identities_per_batch
        for row, times in Counter(batch).items():
            size = sizes[columns[0][row], columns[1][row]]
            assert times <= -(-images_per_modality // size), 'an image came twice before all came once'


def test_epoch_length_is_that_of_agw_over_the_eligible_images() -> None:
    columns = uneven_table()
    sampler = IdentityModalitySampler(*columns)
    sizes = Counter(
        modality for name, modality in zip(*columns, strict=True) if name not in ('only visible', 'only infrared')
    )
    assert sizes['visible'] > sizes['infrared']
    expected = sizes['visible'] // (8 * 4) + 1
    assert sampler.batches_per_epoch == len(sampler) == len(list(sampler)) == expected


@pytest.mark.parametrize(('visible', 'infrared', 'batches'), [(22258, 11909, 696), (2060, 2060, 65)])
def test_epoch_length_of_the_real_datasets(visible: int, infrared: int, batches: int) -> None:
    """SYSU-MM01 and RegDB with 8 × 4 have the lengths that AGW iterates."""
    number = np.arange(visible + infrared)
    modalities = np.where(number < visible, 'visible', 'infrared')
    assert len(IdentityModalitySampler(number % 206, modalities)) == batches


def test_images_of_an_identity_are_dealt_evenly_over_an_epoch() -> None:
    columns = table(dict.fromkeys('abcdefgh', (10, 7)))
    counts = Counter(row for batch in IdentityModalitySampler(*columns, images_per_modality=3) for row in batch)
    for name in 'abcdefgh':
        for modality in ('visible', 'infrared'):
            rows = [row for row, key in enumerate(zip(*columns, strict=True)) if key == (name, modality)]
            dealt = [counts[row] for row in rows]
            assert max(dealt) - min(dealt) <= 1


def test_identities_are_equally_likely() -> None:
    columns = table({f'{number}': (20, 20) for number in range(10)})
    sampler = IdentityModalitySampler(*columns, identities_per_batch=3, images_per_modality=1)
    counts = Counter()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        for batch in sampler:
            counts.update(halves_of(batch, columns, 1)[0])
    assert len(counts) == 10
    expected = sum(counts.values()) / 10
    assert all(abs(count - expected) < 0.2 * expected for count in counts.values())


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    columns = uneven_table()
    first, second = IdentityModalitySampler(*columns, seed=5), IdentityModalitySampler(*columns, seed=5)
    epoch_0 = list(first)
    assert list(first) == epoch_0, 'iterating again repeats the epoch'
    first.set_epoch(3)
    second.set_epoch(3)
    epoch_3 = list(second)
    assert list(first) == epoch_3
    assert epoch_3 != epoch_0
    other = IdentityModalitySampler(*columns, seed=6)
    assert list(other) != epoch_0
    first.set_epoch(1)
    assert list(first) != list(other), 'the next epoch must not be that of the next seed'


def test_any_batch_of_an_epoch_can_be_the_start() -> None:
    columns = uneven_table()
    sampler = IdentityModalitySampler(*columns, identities_per_batch=4, images_per_modality=2)
    sampler.set_epoch(2)
    whole = list(sampler)
    for start in (0, 1, len(whole) - 1, len(whole)):
        sampler.set_epoch(2, start_batch=start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == len(whole) - start
        assert sampler.batches_per_epoch == len(whole)
    sampler.set_epoch(2)
    assert list(sampler) == whole


@pytest.mark.parametrize('world_size', [2, 3])
def test_joined_ranks_draw_the_batches_of_one_process(world_size: int) -> None:
    columns = uneven_table()
    alone = IdentityModalitySampler(*columns, identities_per_batch=2 * world_size, images_per_modality=3)
    ranks = [
        IdentityModalitySampler(
            *columns, identities_per_batch=2, images_per_modality=3, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    for epoch, start in ((0, 0), (4, 0), (4, 2)):
        for sampler in (alone, *ranks):
            sampler.set_epoch(epoch, start)
        assert {len(sampler) for sampler in ranks} == {len(alone)}
        for whole, *shares in zip(alone, *ranks, strict=True):
            names = [name for share in shares for name in halves_of(share, columns, 3)[0]]
            assert len(set(names)) == 2 * world_size, 'an identity came in two processes'
            assert all(len(share) == 2 * 2 * 3 for share in shares)
            halves = [row for half in (slice(0, 6), slice(6, 12)) for share in shares for row in share[half]]
            assert halves == whole


def test_ranks_share_the_available_identities() -> None:
    columns = table({f'{number}': (5, 5) for number in range(11)})
    make = functools.partial(IdentityModalitySampler, *columns, identities_per_batch=None, rank=1)
    assert make(world_size=2).identities_per_batch == 5
    assert make(world_size=11).identities_per_batch == 1
    with pytest.raises(ValueError, match=r'needs 12 identities .* \(1 on each of 12 ranks\), but there are 11'):
        make(world_size=12)
    with pytest.raises(ValueError, match=r'needs 12 identities .* \(6 on each of 2 ranks\), but there are 11'):
        IdentityModalitySampler(*columns, identities_per_batch=6, world_size=2)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match='rank in 0..world_size - 1'):
            IdentityModalitySampler(*columns, rank=rank, world_size=world_size)


def test_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state(), repr(np.random.get_bit_generator().state), random.getstate()
    list(IdentityModalitySampler(*uneven_table()))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_bit_generator().state) == before[1]
    assert random.getstate() == before[2]


def test_integer_labels_and_names_give_the_same_batches() -> None:
    names, modalities = uneven_table()
    order = {name: label for label, name in enumerate(sorted(set(names)))}
    labels = np.asarray([order[name] for name in names])
    assert list(IdentityModalitySampler(labels, np.asarray(modalities))) == list(
        IdentityModalitySampler(names, modalities)
    )


def test_identities_of_one_modality_are_skipped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    columns = uneven_table()
    with caplog.at_level(logging.WARNING):
        sampler = IdentityModalitySampler(*columns)
    assert sampler.skipped == ['only infrared', 'only visible']
    assert '2 of 32 identities are present in only one modality' in caplog.text
    assert 'only infrared, only visible' in caplog.text
    used = {columns[0][row] for epoch in range(3) for batch in sampler for row in batch}
    assert not used & set(sampler.skipped)


def test_an_unset_p_is_eight_or_what_there_is_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    for available, expected in ((3, 3), (8, 8), (20, 8)):
        columns = table({f'{number}': (5, 5) for number in range(available)})
        caplog.clear()
        with caplog.at_level(logging.INFO):
            sampler = IdentityModalitySampler(*columns, identities_per_batch=None)
        assert sampler.identities_per_batch == expected
        assert f'{expected} identities per batch ({available} available)' in caplog.text


def test_too_few_identities_for_an_explicit_p() -> None:
    columns = table({'a': (5, 5), 'b': (5, 5), 'c': (5, 0)})
    with pytest.raises(ValueError, match='needs 8 identities with images of both modalities, but there are 2'):
        IdentityModalitySampler(*columns)
    for wanted in (1, None):
        with pytest.raises(ValueError, match='needs 1 identities .* there are 0'):
            IdentityModalitySampler(['a', 'b'], ['visible', 'infrared'], identities_per_batch=wanted)


def test_arguments_are_checked() -> None:
    columns = table({'a': (5, 5), 'b': (5, 5)})
    with pytest.raises(ValueError, match=r'got \(3,\) and \(2,\)'):
        IdentityModalitySampler(['a', 'b', 'c'], ['visible', 'infrared'])
    with pytest.raises(ValueError, match="'sepia'; expected one of visible, infrared"):
        IdentityModalitySampler(['a', 'b'], ['visible', 'sepia'])
    for options in ({'identities_per_batch': 0}, {'images_per_modality': 0}):
        with pytest.raises(ValueError, match='at least one identity per batch'):
            IdentityModalitySampler(*columns, **options)
    sampler = IdentityModalitySampler(*columns, identities_per_batch=2)
    for epoch, start in ((-1, 0), (0, -1), (0, len(sampler) + 1)):
        with pytest.raises(ValueError, match='a start in 0..2'):
            sampler.set_epoch(epoch, start)


def test_serves_as_the_batch_sampler_of_a_loader() -> None:
    columns = uneven_table()
    sampler = IdentityModalitySampler(*columns)
    loader = DataLoader(range(len(columns[0])), batch_sampler=sampler)
    assert len(loader) == len(sampler)
    assert [batch.tolist() for batch in loader] == list(sampler)
