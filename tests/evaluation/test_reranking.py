"""Re-ranking against a version with sets and dictionaries, one image at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vireid_timm.evaluation import reranking
from vireid_timm.evaluation.metrics import rank_metrics
from vireid_timm.evaluation.reranking import ReRanking

pytestmark = pytest.mark.usefixtures('one_thread')

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]


class SlowReRanking:
    """The docstring of `ReRanking`, sentence by sentence; images are numbers, `modality` None or one per image."""

    def __init__(self, features, modality, k1, k2, original_weight):
        self.similarity = (features @ features.T).tolist()
        self.modality = ['any'] * len(features) if modality is None else list(modality)
        self.images = range(len(features))
        self.original_weight = original_weight
        self.k1, self.half = k1, round(k1 / 2)
        self.ranked = [self.others_by_modality(p) for p in self.images]
        encodings = [self.encoding(p) for p in self.images]
        self.encodings = [self.mean(encodings, sorted(self.nearest(p, k2 - 1))) for p in self.images]

    def distance(self, p, g):
        farthest = max(2 - 2 * similarity for similarity in self.similarity[p])
        return max(0, 2 - 2 * self.similarity[p][g]) / max(farthest, 1e-5)

    def others_by_modality(self, p):
        others = [[g for g in self.images if g != p and self.modality[g] == name] for name in set(self.modality)]
        return [sorted(group, key=lambda g: (-self.similarity[p][g], g)) for group in others]

    def nearest(self, p, k):
        return {p}.union(*(group[:k] for group in self.ranked[p]))

    def reciprocal(self, p, k):
        return {g for g in self.nearest(p, k) if p in self.nearest(g, k)}

    def encoding(self, p):
        members = self.reciprocal(p, self.k1)
        expanded = set(members)
        for q in members:
            theirs = self.reciprocal(q, self.half)
            if len(theirs & members) > 2 / 3 * len(theirs):
                expanded |= theirs
        weights = {g: math.exp(-self.distance(p, g)) for g in expanded}
        return {g: weight / sum(weights.values()) for g, weight in weights.items()}

    def mean(self, encodings, images):
        return [sum(encodings[p].get(g, 0) for p in images) / len(images) for g in self.images]

    def final(self, p, g):
        pairs = list(zip(self.encodings[p], self.encodings[g]))
        jaccard = 1 - sum(min(pair) for pair in pairs) / sum(max(pair) for pair in pairs)
        return self.original_weight * self.distance(p, g) + (1 - self.original_weight) * jaccard


def slow_similarity(query, gallery, query_modality=None, gallery_modality=None, k1=20, k2=6, original_weight=0.3):
    modality = None if query_modality is None else [*gallery_modality, *query_modality]
    slow = SlowReRanking(torch.cat([gallery, query]).double(), modality, k1, k2, original_weight)
    gallery_rows = range(len(gallery))
    return torch.tensor([[-slow.final(len(gallery) + q, g) for g in gallery_rows] for q in range(len(query))])


def clusters(num_queries, num_gallery, seed=0, people=5, noise=0.4, gap=0.0, width=16):
    """Return features [Q, D] and [G, D] of some people, with a `gap` between both sides, and the identities."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people, width, generator=generator, dtype=torch.float64)
    away = gap * torch.randn(width, generator=generator, dtype=torch.float64)
    identities = [torch.randint(people, (count,), generator=generator) for count in (num_queries, num_gallery)]
    features = [
        F.normalize(centres[names] + shift + noise * torch.randn(len(names), width, generator=generator).double())
        for names, shift in zip(identities, (away, -away))
    ]
    return (*features, *identities)


def modalities(kind, num_queries, num_gallery):
    """Return keyword arguments for a kind of search; by default infrared searches visible."""
    if kind == 'none':
        return {}
    query, gallery = np.full(num_queries, 'infrared'), np.full(num_gallery, 'visible', dtype='<U8')
    if kind == 'mixed':
        query[::2], gallery[::3] = 'visible', 'infrared'
    elif kind == 'lone infrared':
        query[1:] = 'visible'
    elif kind == 'visible':
        query[:] = 'visible'
    return {'query_modality': query, 'gallery_modality': gallery}


SHAPES = [(1, 1), (1, 6), (6, 1), (5, 8), (21, 1), (16, 14), (30, 25)]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', ['none', 'across', 'mixed', 'lone infrared'])
@pytest.mark.parametrize('shape', SHAPES)
def test_agrees_with_sets(shape, kind, device):
    query, gallery, _, _ = clusters(*shape, seed=sum(shape), gap=0.5)
    options = modalities(kind, *shape)
    for settings in ({}, {'k1': 1, 'k2': 1}, {'k1': 5, 'k2': 3}, {'k1': 2, 'k2': 9}, {'k1': 7, 'k2': 2}):
        expected = slow_similarity(query, gallery, **options, **settings)
        found = ReRanking(query.to(device), gallery.to(device), **options, **settings).similarity(slice(None))
        assert found.shape == shape
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.cpu(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', ['none', 'across', 'mixed'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_ties_are_broken_by_row(dtype, kind, device):
    # Halves and quarters have no rounding: 30 images at 16 places, all tied with copies and in distance.
    corners = torch.tensor([[x, y, z, w] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1) for w in (-1, 1)]) / 2
    for seed in range(3):
        rows = torch.randint(16, (30,), generator=torch.Generator().manual_seed(seed))
        query, gallery = corners[rows].to(dtype).split([14, 16])
        options = modalities(kind, 14, 16)
        for settings in ({'k1': 3, 'k2': 2}, {'k1': 6, 'k2': 4}, {}):
            found = ReRanking(query.to(device), gallery.to(device), **options, **settings).similarity(slice(None))
            expected = slow_similarity(query, gallery, **options, **settings)
            np.testing.assert_allclose(found.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('original_weight', [0, 0.5, 1])
def test_original_weight(original_weight):
    query, gallery, _, _ = clusters(12, 15)
    found = ReRanking(query, gallery, original_weight=original_weight, k1=6).similarity(slice(None))
    expected = slow_similarity(query, gallery, original_weight=original_weight, k1=6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    if original_weight == 1:
        assert torch.equal(found.argsort(dim=1), (query @ gallery.T).argsort(dim=1))
    if original_weight == 0:
        assert found.min() == -1  # nothing in common
        assert found.max() <= 0


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('count', [1, 2, 5, 39, 40, 41])
def test_most_similar_is_a_stable_sort(count, device):
    # Whole numbers: in some rows only the last value is tied, between one that is included and others that are not.
    values = torch.randint(60, (300, 40), generator=torch.Generator().manual_seed(count)).float()
    expected = np.argsort(-values.numpy(), axis=1, kind='stable')[:, :count]
    np.testing.assert_array_equal(reranking._most_similar(values.to(device), count).cpu(), expected)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('width', [3, 5, 7, 100])
def test_rounding_is_no_distance_between_equal_images(width, device):
    features = torch.ones(40, width, device=device) / math.sqrt(width)
    for options in ({}, modalities('mixed', 15, 25)):
        similarity = ReRanking(features[:15], features[15:], **options).similarity(slice(None)).cpu()
        exact = torch.eye(width, dtype=torch.float64)[torch.zeros(40, dtype=torch.int64)]
        expected = slow_similarity(exact[:15], exact[15:], **options)
        assert (similarity - expected).abs().max() < 0.05


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_computed_in_float32(dtype):
    query, gallery, _, _ = clusters(20, 30, noise=0.1)
    query, gallery = query.to(dtype).requires_grad_(), gallery.to(dtype)
    found = ReRanking(query, gallery).similarity(slice(None))
    assert found.dtype == torch.float32
    assert not found.requires_grad
    expected = slow_similarity(*(F.normalize(features.detach().float()) for features in (query, gallery)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_arrays_one_query_and_mixed_precision():
    query, gallery, _, _ = clusters(20, 30, noise=0.1)
    expected = ReRanking(query, gallery).similarity(slice(None))
    arrays = ReRanking(query.numpy(), gallery.numpy()).similarity(slice(None))
    assert torch.equal(arrays, expected)
    single = ReRanking(query[0], gallery)
    assert (single.num_queries, single.gallery_size) == (1, 30)
    assert torch.equal(single.similarity(slice(None)), ReRanking(query[:1], gallery).similarity(slice(None)))
    for other, result in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        for given in ((query.float(), gallery.to(other)), (query.numpy().astype('f4'), gallery.to(other).numpy())):
            mixed = ReRanking(*given).similarity(slice(None))
            assert mixed.dtype == result
            torch.testing.assert_close(mixed.double(), expected.double(), rtol=0, atol=0.01)


@pytest.mark.parametrize('kind', ['none', 'across', 'mixed'])
def test_chunks_and_slices_change_nothing(monkeypatch, kind):
    query, gallery, _, _ = clusters(33, 29, gap=0.3)
    options = modalities(kind, 33, 29)
    whole = ReRanking(query, gallery, **options).similarity(slice(None))
    for cells in (1, 200, 62 * 7):
        monkeypatch.setattr(reranking, 'CHUNK_CELLS', cells)
        chunked = ReRanking(query, gallery, **options)
        parts = torch.cat([chunked.similarity(slice(start, start + 5)) for start in range(0, 33, 5)])
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize('device', DEVICES)
def test_same_input_same_output(device):
    query, gallery, _, _ = clusters(120, 150, people=12)
    copies = query.clone(), gallery.clone()
    options = modalities('mixed', 120, 150)
    first, second = (
        ReRanking(query.to(device), gallery.to(device), **options).similarity(slice(0, 50)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(query, copies[0])
    assert torch.equal(gallery, copies[1])


def test_one_modality_is_the_plain_method():
    query, gallery, _, _ = clusters(20, 25)
    plain = ReRanking(query, gallery).similarity(slice(None))
    visible = ReRanking(query, gallery, **modalities('visible', 20, 25)).similarity(slice(None))
    across = ReRanking(query, gallery, **modalities('across', 20, 25)).similarity(slice(None))
    assert torch.equal(plain, visible)
    assert not torch.allclose(plain, across, atol=1e-3)


@pytest.mark.parametrize('kind', ['none', 'mixed'])
def test_image_that_is_query_and_gallery_takes_part_once(kind):
    features, _, _, _ = clusters(40, 1)
    modality = np.where(np.arange(40) % 3 == 0, 'infrared', 'visible')
    query, gallery = np.asarray([7, 30, 2, 39, 11, 5]), np.arange(5, 35)
    places = np.asarray([2, 25, -1, -1, 6, 0])
    options = {} if kind == 'none' else {'query_modality': modality[query], 'gallery_modality': modality[gallery]}
    found = ReRanking(features[query], features[gallery], query_in_gallery=places, **options, k1=4, k2=3)
    images = np.concatenate([gallery, [2, 39]])
    slow = SlowReRanking(features[images], None if kind == 'none' else modality[images], 4, 3, 0.3)
    number = {image: i for i, image in enumerate(images.tolist())}
    expected = [[-slow.final(number[q], number[g]) for g in gallery.tolist()] for q in query.tolist()]
    np.testing.assert_allclose(found.similarity(slice(None)), expected, rtol=0, atol=1e-6)


def test_gain_across_modalities():
    query, gallery, query_names, gallery_names = clusters(150, 160, people=12, noise=1.4, gap=0.9, width=32)

    def mean_ap(similarity):
        return rank_metrics(similarity, query_names, gallery_names).mAP

    plain = ReRanking(query, gallery).similarity(slice(None))
    across = ReRanking(query, gallery, **modalities('across', 150, 160)).similarity(slice(None))
    without = mean_ap(query @ gallery.T)
    assert mean_ap(across) > max(without, mean_ap(plain)) + 0.1


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_stays_below_all_pairs(monkeypatch):
    monkeypatch.setattr(reranking, 'CHUNK_CELLS', 2**14)
    query, gallery, _, _ = clusters(900, 1000, people=150, noise=0.3)
    with LargestTensor() as preparing:
        found = ReRanking(query, gallery, **modalities('across', 900, 1000))
    # Lists of 2 x 21 images, and encodings of a few dozen; a table of all pairs would be 3,610,000.
    assert 1900 * 42 <= preparing.elements < 1900 * 100
    with LargestTensor() as searching:
        found.similarity(slice(0, 16))
    assert searching.elements == 16 * 1000


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'query': torch.zeros(2, 3)}, r'\[2, 3\] and \[5, 4\]'),
        ({'query': torch.zeros(4)}, 'query 0 have length 0'),
        ({'query': torch.zeros(1, 2, 4)}, 'at least one image each'),
        ({'gallery': np.ones((5, 4), np.uint8)}, 'gallery features must have a floating-point dtype, got uint8'),
        ({'query': torch.zeros(0, 4)}, 'at least one image each'),
        ({'gallery': torch.zeros(0, 4)}, 'at least one image each'),
        ({'query': torch.ones(2, 4, dtype=torch.int64)}, 'query features must have a floating-point dtype'),
        (
            {'gallery': torch.eye(4)[[0, 1, 2, 3, 3]] * torch.tensor([1, 1, 2, 1, 3])[:, None]},
            'gallery 2 have length 2;',
        ),
        ({'query': torch.tensor([[1, 0, 0, 0], [math.nan, 0, 0, 0]])}, 'query 1 have length nan'),
        ({'k1': 0}, 'at least 1, got 0 and 6'),
        ({'k2': 0}, 'at least 1, got 20 and 0'),
        ({'original_weight': 1.5}, 'between 0 and 1, got 1.5'),
        ({'original_weight': math.nan}, 'between 0 and 1, got nan'),
        ({'query_modality': ['visible'] * 2}, 'both .*, or neither'),
        ({'gallery_modality': ['visible'] * 5}, 'both .*, or neither'),
        ({'query_modality': ['visible'] * 3, 'gallery_modality': ['infrared'] * 5}, 'got 3 for 2 queries'),
        ({'query_modality': ['visible', 'thermal'], 'gallery_modality': ['infrared'] * 5}, "modality 'thermal'"),
        ({'query_in_gallery': [0]}, r'each of the 2 queries, got int64 \[1\]'),
        ({'query_in_gallery': [0.0, 1.0]}, 'got float64'),
        ({'query_in_gallery': [-1, 5]}, r'and 4, got -1 to 5'),
        ({'query_in_gallery': [-2, 1]}, 'got -2 to 1'),
    ],
)
def test_wrong_input_is_named(changes, message):
    arguments = {'query': torch.eye(4)[:2], 'gallery': torch.eye(4)[[0, 1, 2, 3, 3]], **changes}
    with pytest.raises(ValueError, match=message):
        ReRanking(**arguments)
