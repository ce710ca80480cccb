"""The metrics against a loop that sorts and counts, one query at a time."""

import math

import numpy as np
import pytest
import torch

from vireid_timm.evaluation import metrics
from vireid_timm.evaluation.metrics import rank_metrics


def naive_query(similarity, identity, gallery, ignore, per_identity_cmc):
    """Return (first rank, AP, INP) of one query by walking down the sorted list, or None without a match."""
    seen = [(similarity[i], gallery[i] == identity, gallery[i]) for i in range(len(gallery)) if not ignore[i]]
    seen.sort(key=lambda entry: (-entry[0], entry[1]))  # among equals, wrong images come first
    hits = [position for position, entry in enumerate(seen, start=1) if entry[1]]
    if not hits:
        return None
    average_precision = sum(j / position for j, position in enumerate(hits, start=1)) / len(hits)
    first = hits[0]
    if per_identity_cmc:
        distinct = list(dict.fromkeys(name for _, _, name in seen))  # every identity at its first occurrence
        # A wrong identity whose best image ties with the right one comes first, because wrong images come first.
        first = distinct.index(identity) + 1
    return first, average_precision, len(hits) / hits[-1]


def naive_metrics(similarity, queries, gallery, ignore=None, per_identity_cmc=False, max_rank=20):
    if ignore is None:
        ignore = np.zeros(similarity.shape, dtype=bool)
    rows = [
        naive_query(similarity[i].tolist(), queries[i], list(gallery), ignore[i], per_identity_cmc)
        for i in range(len(queries))
    ]
    valid = [row for row in rows if row is not None]
    cmc = [sum(first <= k for first, _, _ in valid) / len(valid) for k in range(1, max_rank + 1)]
    mean_ap, mean_inp = (sum(row[i] for row in valid) / len(valid) for i in (1, 2))
    return cmc, mean_ap, mean_inp, rows


def random_case(generator, num_queries, num_gallery, num_identities, levels, ignored):
    """Similarities (rounded to `levels` steps, so that they tie, or not at all), identities, and what to ignore."""
    similarity = generator.uniform(-1, 1, size=(num_queries, num_gallery))
    if levels:
        similarity = np.round(similarity * levels) / levels
    queries = generator.integers(num_identities, size=num_queries)
    gallery = generator.integers(num_identities, size=num_gallery)
    ignore = generator.random((num_queries, num_gallery)) < ignored
    return similarity, queries, gallery, ignore


def assert_agrees(result, expected, max_rank=20):
    cmc, mean_ap, mean_inp, rows = expected
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-6)
    assert result.cmc.shape == (max_rank,)
    assert result.mAP == pytest.approx(mean_ap, abs=1e-6)
    assert result.mINP == pytest.approx(mean_inp, abs=1e-6)
    assert result.valid.tolist() == [row is not None for row in rows]
    assert result.num_valid_queries == sum(row is not None for row in rows)
    assert result.rank.tolist() == [0 if row is None else row[0] for row in rows]
    np.testing.assert_allclose(result.ap, [math.nan if row is None else row[1] for row in rows], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.inp, [math.nan if row is None else row[2] for row in rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize('per_identity_cmc', [False, True])
@pytest.mark.parametrize('levels', [0, 1, 3, 10])
@pytest.mark.parametrize('shape', [(1, 1), (1, 50), (40, 1), (7, 5), (30, 19), (30, 20), (25, 21), (33, 70)])
def test_agrees_with_naive_loop(shape, levels, per_identity_cmc):
    generator = np.random.default_rng([*shape, levels])
    compared = 0
    for num_identities in (1, 3, 12):
        for ignored in (0, 0.2, 0.9):
            similarity, queries, gallery, ignore = random_case(generator, *shape, num_identities, levels, ignored)
            if not ((queries[:, None] == gallery) & ~ignore).any():
                with pytest.raises(ValueError, match='nothing to measure'):
                    rank_metrics(similarity, queries, gallery, ignore=ignore, per_identity_cmc=per_identity_cmc)
                continue
            result = rank_metrics(similarity, queries, gallery, ignore=ignore, per_identity_cmc=per_identity_cmc)
            assert_agrees(result, naive_metrics(similarity, queries, gallery, ignore, per_identity_cmc))
            compared += 1
    assert compared >= 1


@pytest.mark.parametrize('per_identity_cmc', [False, True])
@pytest.mark.parametrize('levels', [0, 10])
def test_accelerators_do_the_same(monkeypatch, levels, per_identity_cmc):
    case = random_case(np.random.default_rng(6), 23, 40, 5, levels, 0.2)
    expected = rank_metrics(*case[:3], ignore=case[3], per_identity_cmc=per_identity_cmc)
    monkeypatch.setattr(metrics, '_on_cpu', lambda values: False)
    result = rank_metrics(*case[:3], ignore=case[3], per_identity_cmc=per_identity_cmc)
    np.testing.assert_array_equal(result.rank, expected.rank)
    np.testing.assert_array_equal(result.ap, expected.ap)
    np.testing.assert_array_equal(result.inp, expected.inp)
    for device in ['cuda'] * torch.cuda.is_available():
        arguments = [torch.from_numpy(values).to(device) for values in (case[0], case[3])]
        there = rank_metrics(arguments[0], *case[1:3], ignore=arguments[1], per_identity_cmc=per_identity_cmc)
        np.testing.assert_array_equal(there.rank, expected.rank)
        np.testing.assert_allclose(there.ap, expected.ap, rtol=0, atol=1e-9)


@pytest.mark.parametrize('per_identity_cmc', [False, True])
@pytest.mark.parametrize('num_matches', [253, 254, 255, 256, 300])
def test_many_matches(num_matches, per_identity_cmc):
    generator = np.random.default_rng(num_matches)
    similarity = np.round(generator.uniform(-1, 1, size=(3, num_matches + 40)), 2)
    gallery = generator.permutation([0] * num_matches + [1] * 30 + [2] * 10)
    result = rank_metrics(similarity, [0, 2, 1], gallery, per_identity_cmc=per_identity_cmc)
    assert_agrees(result, naive_metrics(similarity, [0, 2, 1], gallery, per_identity_cmc=per_identity_cmc))


def test_many_galleries_share_a_matrix():
    generator = np.random.default_rng(8)
    similarity, queries, gallery, ignore = random_case(generator, 25, 60, 6, 8, 0.2)
    galleries = [np.sort(generator.choice(60, size, replace=False)) for size in (1, 7, 30, 59)]
    galleries.append(generator.permutation(60))
    ranker = metrics.Ranker(gallery)
    chosen = [ranker.gallery(columns, bool(i % 2)) for i, columns in enumerate(galleries)]
    tensors = torch.from_numpy(similarity), torch.from_numpy(ignore)
    found = ranker.rank(tensors[0], queries, tensors[1], chosen)
    for i, (columns, (rank, ap, inp)) in enumerate(zip(galleries, found, strict=True)):
        rows = naive_metrics(similarity[:, columns], queries, gallery[columns], ignore[:, columns], bool(i % 2))[3]
        assert rank.tolist() == [0 if row is None else row[0] for row in rows]
        np.testing.assert_allclose(ap, [math.nan if row is None else row[1] for row in rows], rtol=0, atol=1e-9)
        np.testing.assert_allclose(inp, [math.nan if row is None else row[2] for row in rows], rtol=0, atol=1e-9)


def test_by_hand():
    # The right images come at ranks 1, 3 and 6; identity b is met twice before the second image of a.
    similarity = np.asarray([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    result = rank_metrics(similarity, ['a'], ['a', 'b', 'a', 'b', 'c', 'a'], max_rank=3)
    assert result.mAP == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)
    assert result.mINP == pytest.approx(3 / 6)
    assert result.cmc.tolist() == [1, 1, 1]
    # Two images of b and one of c before the first of a: rank 4 in images, 3 in identities.
    gallery = ['b', 'b', 'c', 'a', 'a', 'b']
    assert rank_metrics(similarity, ['a'], gallery, max_rank=5).cmc.tolist() == [0, 0, 0, 1, 1]
    per_identity = rank_metrics(similarity, ['a'], gallery, per_identity_cmc=True, max_rank=5)
    assert per_identity.cmc.tolist() == [0, 0, 1, 1, 1]
    assert per_identity.mAP == pytest.approx((1 / 4 + 2 / 5) / 2)


@pytest.mark.parametrize('per_identity_cmc', [False, True])
def test_ties_count_against_the_model(per_identity_cmc):
    similarity = np.full((1, 5), 0.5, dtype=np.float32)
    result = rank_metrics(similarity, [7], [7, 1, 1, 7, 2], per_identity_cmc=per_identity_cmc, max_rank=5)
    assert result.rank.tolist() == [3 if per_identity_cmc else 4]
    assert result.mAP == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert result.mINP == pytest.approx(2 / 5)


def test_result_does_not_depend_on_the_order_of_the_gallery():
    generator = np.random.default_rng(5)
    similarity, queries, gallery, ignore = random_case(generator, 20, 40, 5, 2, 0.1)
    order = generator.permutation(40)
    for per_identity_cmc in (False, True):
        options = {'per_identity_cmc': per_identity_cmc}
        first = rank_metrics(similarity, queries, gallery, ignore=ignore, **options)
        second = rank_metrics(similarity[:, order], queries, gallery[order], ignore=ignore[:, order], **options)
        np.testing.assert_array_equal(first.ap, second.ap)
        np.testing.assert_array_equal(first.rank, second.rank)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_as_tensor_and_as_array(dtype):
    generator = np.random.default_rng(1)
    values, queries, gallery, ignore = random_case(generator, 30, 60, 6, 0, 0.1)
    similarity = torch.from_numpy(values).to(dtype).requires_grad_()
    expected = naive_metrics(similarity.detach().double().numpy(), queries, gallery, ignore)
    as_tensors = rank_metrics(
        similarity, torch.from_numpy(queries), torch.from_numpy(gallery), ignore=torch.from_numpy(ignore)
    )
    assert_agrees(as_tensors, expected)
    if dtype != torch.bfloat16:
        assert_agrees(rank_metrics(similarity.detach().numpy(), queries, gallery, ignore=ignore), expected)


def test_float64_keeps_differences_that_float32_loses():
    similarity = np.asarray([[0.5 + 1e-12, 0.5]])
    assert rank_metrics(similarity, [1], [1, 2]).cmc[0] == 1
    assert rank_metrics(similarity.astype(np.float32), [1], [1, 2]).cmc[0] == 0


@pytest.mark.parametrize(
    'convert',
    [
        lambda codes: [f'{code:04d}' for code in codes],
        lambda codes: np.asarray([f'person {code}' for code in codes], dtype=object),
        lambda codes: codes.astype(np.int32) - 3,
        lambda codes: torch.from_numpy(codes),
    ],
)
def test_identities_may_be_names_or_numbers(convert):
    similarity, queries, gallery, ignore = random_case(np.random.default_rng(2), 12, 30, 4, 0, 0)
    result = rank_metrics(similarity, convert(queries), convert(gallery), ignore=ignore, per_identity_cmc=True)
    assert_agrees(result, naive_metrics(similarity, queries, gallery, ignore, True))


@pytest.mark.parametrize('per_identity_cmc', [False, True])
def test_chunks_change_nothing(monkeypatch, per_identity_cmc):
    case = random_case(np.random.default_rng(3), 23, 31, 5, 4, 0.2)
    whole = rank_metrics(*case[:3], ignore=case[3], per_identity_cmc=per_identity_cmc)
    monkeypatch.setattr(metrics, 'CHUNK_ROWS', (1, 100))
    for cells in (1, 31 * 4, 31 * 22):
        monkeypatch.setattr(metrics, 'CHUNK_CELLS', cells)
        chunked = rank_metrics(*case[:3], ignore=case[3], per_identity_cmc=per_identity_cmc)
        np.testing.assert_array_equal(chunked.ap, whole.ap)
        np.testing.assert_array_equal(chunked.inp, whole.inp)
        np.testing.assert_array_equal(chunked.cmc, whole.cmc)


def test_inputs_are_not_changed():
    similarity, queries, gallery, ignore = random_case(np.random.default_rng(4), 9, 12, 3, 2, 0.3)
    copies = similarity.copy(), ignore.copy()
    rank_metrics(similarity, queries, gallery, ignore=ignore, per_identity_cmc=True)
    np.testing.assert_array_equal(similarity, copies[0])
    np.testing.assert_array_equal(ignore, copies[1])


def test_queries_without_a_match_are_excluded_and_counted():
    similarity = np.asarray([[0.1, 0.9], [0.9, 0.1], [0.3, 0.2]])
    ignore = np.asarray([[False, False], [True, True], [False, False]])  # everything is ignored for the second query
    result = rank_metrics(similarity, ['a', 'a', 'stranger'], ['a', 'b'], ignore=ignore, max_rank=4)
    assert result.num_valid_queries == 1
    assert result.valid.tolist() == [True, False, False]
    assert result.cmc.tolist() == [0, 1, 1, 1]
    assert result.mAP == 0.5
    np.testing.assert_array_equal(result.rank1, [0, math.nan, math.nan])


@pytest.mark.parametrize('identities', [(['a'], ['b', 'b']), ([], ['a', 'b']), (['a'], [])])
def test_no_valid_query_is_an_error(identities):
    similarity = np.zeros((len(identities[0]), len(identities[1])))
    with pytest.raises(ValueError, match='nothing to measure'):
        rank_metrics(similarity, *identities)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_non_finite_similarity_is_named(monkeypatch, value, dtype):
    monkeypatch.setattr(metrics, 'CHUNK_ROWS', (2, 100))
    monkeypatch.setattr(metrics, 'CHUNK_CELLS', 6)
    similarity = torch.zeros(4, 3, dtype=dtype)
    similarity[3, 1] = value
    with pytest.raises(ValueError, match='query 3 and gallery image 1'):
        rank_metrics(similarity, [1, 1, 2, 2], [1, 2, 2])


@pytest.mark.parametrize(
    'arguments, options, message',
    [
        ((np.zeros((2, 3)), [1], [1, 2, 3]), {}, r'must be \[queries, gallery\] = \[1, 3\]'),
        ((np.zeros(3), [1], [1, 2, 3]), {}, r'got \[3\]'),
        ((np.zeros((1, 3)), [1], [[1, 2, 3]]), {}, 'one-dimensional'),
        ((np.zeros((1, 3), dtype=int), [1], [1, 2, 3]), {}, 'floating-point dtype, got int64'),
        ((torch.zeros(1, 3, dtype=int), [1], [1, 2, 3]), {}, 'floating-point dtype, got torch.int64'),
        ((np.zeros((1, 3)), ['1'], [1, 2, 3]), {}, 'nothing can match'),
        ((np.zeros((1, 3)), [1], [1, 2, 3]), {'ignore': np.zeros((3, 1), dtype=bool)}, r'ignore must be bool'),
        ((np.zeros((1, 3)), [1], [1, 2, 3]), {'ignore': np.zeros((1, 3))}, r'got float64 \[1, 3\]'),
        ((np.zeros((1, 3)), [1], [1, 2, 3]), {'max_rank': 0}, 'at least 1, got 0'),
    ],
)
def test_wrong_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rank_metrics(*arguments, **options)
