import math

import numpy as np
import pytest
import torch

from vireid_timm.retrieval.search import nearest


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_nearest_is_an_argsort_of_the_similarities() -> None:
    queries, gallery = features(0, 5, 7), features(1, 11, 7)
    rows, similarity = nearest(queries, gallery, 4)
    for row in range(5):
        expected = [float(queries[row] @ image) for image in gallery]
        assert rows[row].tolist() == sorted(range(11), key=lambda column: -expected[column])[:4]
        assert similarity[row].tolist() == pytest.approx(sorted(expected, reverse=True)[:4])
    assert nearest(queries, gallery[:3], 10).rows.shape == (5, 3)
    assert nearest(queries, gallery[:0], 10).rows.shape == (5, 0)
    assert nearest(queries[:0], gallery, 4).similarity.shape == (0, 4)


@pytest.mark.parametrize(
    'convert',
    [
        lambda x: x.numpy(),
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: np.frombuffer(x.numpy().tobytes(), np.float32).reshape(x.shape),  # read-only
        lambda x: x.numpy().astype(np.float64),
        lambda x: x.numpy().astype(np.float16),
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.clone().requires_grad_(),
    ],
)
def test_features_of_every_kind_find_the_same(convert) -> None:
    queries, gallery = features(0, 5, 7), features(1, 11, 7)
    expected = nearest(queries, gallery, 11)
    for given in ((convert(queries), gallery), (queries, convert(gallery)), (convert(queries), convert(gallery))):
        found = nearest(*given, 11)
        assert found.similarity.dtype in (torch.float32, torch.float64) and not found.similarity.requires_grad
        in_order_of_rows = [part.similarity.gather(1, part.rows.argsort(dim=1)).double() for part in (found, expected)]
        torch.testing.assert_close(*in_order_of_rows, rtol=0, atol=0.01)
        assert torch.equal(found.rows[:, 0], expected.rows[:, 0])


@pytest.mark.parametrize('convert', [lambda x: x, lambda x: x.numpy()])
def test_a_single_query_finds_a_list(convert) -> None:
    queries, gallery = features(0, 5, 7), features(1, 11, 7)
    rows, similarity = nearest(convert(queries[2]), convert(gallery), 4)
    expected = nearest(queries[2:3], gallery, 4)
    assert rows.tolist() == expected.rows[0].tolist()
    torch.testing.assert_close(similarity, expected.similarity[0])


@pytest.mark.parametrize(
    'query, gallery, count, message',
    [
        (features(0, 5, 7), features(1, 11, 6), 4, r'got \[5, 7\] and \[11, 6\]'),
        (features(0, 5, 7), features(1, 7), 4, r'got \[5, 7\] and \[7\]'),
        (features(0, 1, 5, 7), features(1, 11, 7), 4, r'got \[1, 5, 7\]'),
        (features(0, 5, 7), features(1, 11, 7), 0, 'count must be at least 1, got 0'),
        (torch.ones(5, 7, dtype=torch.int64), features(1, 11, 7), 4, 'query features must have .* got torch.int64'),
        (features(0, 5, 7), np.ones((11, 7), int), 4, 'gallery features must have a floating-point dtype, got int64'),
        (torch.full((2, 7), math.nan), features(1, 11, 7), 4, '^query 0: .*not finite .2 such images among 2'),
        (features(0, 5, 7), torch.tensor([[0.0, 1.0] * 3 + [math.inf]]), 4, '^gallery 0: .*not finite'),
    ],
)
def test_wrong_features_are_named(query, gallery, count, message) -> None:
    with pytest.raises(ValueError, match=message):
        nearest(query, gallery, count)
