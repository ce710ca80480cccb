"""`Gallery` finds what a comparison of all features finds, whatever is added and removed meanwhile."""

import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from galleries import WIDTH, about, features, write_images
from PIL import Image
from torch import nn

import vireid_timm
from vireid_timm.evaluation.calibration import Calibration
from vireid_timm.evaluation.features import embed, weights_fingerprint
from vireid_timm.retrieval.gallery import FEWEST_TO_CENTRE, Answer, Gallery
from vireid_timm.retrieval.index import ABOUT, Index

TINY = dict(resnet_args=dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 24, 32)))

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model('vireid_dml_r10t', img_size=(64, 32), num_classes=0, **TINY).eval()


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """A gallery without a model: its features come from elsewhere."""
    Index.create(tmp_path / 'index', about()).close()
    return Gallery.open(tmp_path / 'index', device='cpu')


def fill(gallery: Gallery, count: int, **columns: list) -> torch.Tensor:
    table = features(count)
    gallery.add([f'/{number:03}.jpg' for number in range(count)], features=table, **columns)
    return table


def found(answer: Answer) -> list[int]:
    return [int(Path(match.path).stem) for match in answer.results]


def ranked(query: torch.Tensor, table: torch.Tensor, allowed: list[int]) -> list[int]:
    """All that a search may find, best first, equal ones by their number."""
    similarity = [math.fsum(map(float, query.double() * row)) for row in table.double()]
    return sorted(allowed, key=lambda row: (-round(similarity[row], 5), row))


def test_images_are_found_as_by_comparing_all_features(model: nn.Module, tmp_path: Path) -> None:
    paths = write_images(tmp_path, *(f'images/c{number % 3}_{number}.png' for number in range(9)))
    queries = write_images(tmp_path, *(f'queries/{number}.png' for number in range(4)))
    gallery = Gallery.create(tmp_path / 'index', model, 'visible', device='cpu', batch_size=4)
    assert gallery.add(paths, cameras=[number % 3 for number in range(9)], identities=['anna', None] * 4 + ['ben']) == 9
    table, query_table = embed(model, paths, 'visible')[0], embed(model, queries, 'infrared')[0]
    similarity = query_table @ table.T
    for row, answer in enumerate(gallery.search(queries, 'infrared', top=5)):
        assert answer.query == queries[row] and answer.nobody is None
        values = [match.similarity for match in answer.results]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(sorted(similarity[row].tolist(), reverse=True)[:5], abs=1e-3)
        for match in answer.results:
            number = paths.index(match.path)
            assert match.similarity == pytest.approx(float(similarity[row, number]), abs=1e-3)
            assert match.camera == number % 3 and match.time is None and match.probability is None
            assert match.identity == ('ben' if number == 8 else (None, 'anna')[number % 2 == 0])
    gallery.save()
    gallery.close()
    again = Gallery.open(tmp_path / 'index', model=model, device='cpu')
    assert len(again) == 9
    pixels = [np.asarray(Image.open(path)) for path in queries]
    in_memory = again.search(pixels, 'infrared', top=5)
    assert [answer.query for answer in in_memory] == [f'query {number}' for number in range(4)]
    assert [answer.results for answer in in_memory] == [
        answer.results for answer in again.search(queries, 'infrared', top=5)
    ]


@pytest.mark.parametrize('block', [1, 24, 1 << 20])
def test_searches_of_any_block_size_find_the_same(
    gallery: Gallery, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('vireid_timm.retrieval.search._BLOCK', block)
    table = fill(gallery, 40, cameras=[number % 5 for number in range(40)])
    gallery.remove([f'/{number:03}.jpg' for number in (0, 7, 39)])
    queries = features(6, seed=1)
    for where, allowed in (
        (None, [row for row in range(40) if row not in (0, 7, 39)]),
        ('camera = 2', [2, 12, 17, 22, 27, 32, 37]),
        ('camera = 99', []),
    ):
        for query, answer in zip(queries, gallery.search_features(queries, 'infrared', top=9, where=where)):
            assert found(answer) == ranked(query, table, allowed)[:9]


def test_of_equal_images_the_one_added_first_is_first(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('vireid_timm.retrieval.search._BLOCK', 5 * WIDTH)
    table = features(3)[[0, 1, 1, 2, 1, 0, 1, 1, 1, 0, 2, 1]]
    gallery.add([f'/{number:03}.jpg' for number in range(12)], features=table)
    for top in (1, 3, 5, 12):
        (answer,) = gallery.search_features(features(3)[1:2], 'infrared', top=top)
        assert found(answer)[:7] == [1, 2, 4, 6, 7, 8, 11][:top]


def test_candidates_are_compared_exactly_with_whatever_was_added_since(gallery: Gallery) -> None:
    pytest.importorskip('faiss')
    table = fill(gallery, 40, cameras=[number % 5 for number in range(40)])
    gallery.save()
    gallery.index.compress()
    more = features(30, seed=5)
    more[3] = table[8]  # equal to one that is compressed
    gallery.add([f'/{number:03}.jpg' for number in range(40, 70)], features=more, cameras=[9] * 30)
    gallery.remove(['/003.jpg', '/050.jpg'])
    everything, queries = torch.cat([table, more]), torch.cat([features(6, seed=1), table[8:9]])
    assert gallery.index.candidates(gallery.index.view()).count == 40
    for where, allowed in (
        (None, [row for row in range(70) if row not in (3, 50)]),
        ('camera = 2', [2, 7, 12, 17, 22, 27, 32, 37]),
        ('camera = 9', [row for row in range(40, 70) if row != 50]),
        ('camera = 99', []),
    ):
        for query, answer in zip(queries, gallery.search_features(queries, 'infrared', top=9, where=where)):
            assert found(answer) == ranked(query, everything, allowed)[:9]


@pytest.mark.parametrize('names', [['a', 'b', 'c'], ['a'] * 6 + ['b', None], [None], ['a']])
def test_one_result_per_identity(gallery: Gallery, names: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('vireid_timm.retrieval.gallery._PER_IDENTITY', 1)
    identities = [names[number * number % len(names)] for number in range(30)]
    table = fill(gallery, 30, identities=identities)
    queries = features(5, seed=2)
    answers = gallery.search_features(queries, 'infrared', top=4, by_identity=True, where="path != '/003.jpg'")
    for query, answer in zip(queries, answers):
        expected, seen = [], set()
        for row in ranked(query, table, [row for row in range(30) if row != 3]):
            if identities[row] is None or identities[row] not in seen:
                expected.append(row)
                seen.add(identities[row])
        assert found(answer) == expected[:4]


def test_a_tracklet_is_the_mean_of_its_images(model: nn.Module, tmp_path: Path) -> None:
    paths = write_images(tmp_path, *(f'{number}.png' for number in range(8)))
    gallery = Gallery.create(tmp_path / 'index', model, 'visible', device='cpu')
    gallery.add(paths)
    answers = gallery.search([paths[:3], paths[3], [paths[4]]], 'infrared', top=8)
    table = embed(model, paths[:5], 'infrared')[0]
    expected = torch.stack([F.normalize(table[:3].mean(dim=0), dim=0), table[3], table[4]])
    for answer, same in zip(answers, gallery.search_features(expected, 'infrared', top=8), strict=True):
        assert [match.path for match in answer.results] == [match.path for match in same.results]
        values = [match.similarity for match in answer.results]
        assert values == pytest.approx([match.similarity for match in same.results], abs=1e-5)
    assert [answer.query for answer in answers] == [paths[0], paths[3], paths[4]]


def test_centring_subtracts_both_means(gallery: Gallery) -> None:
    table, queries = fill(gallery, 20), features(FEWEST_TO_CENTRE, seed=3)
    plain = gallery.search_features(queries, 'infrared', top=20)
    centred = F.normalize(queries - queries.mean(dim=0)) @ F.normalize(table - table.mean(dim=0)).T
    for row, answer in enumerate(gallery.search_features(queries, 'infrared', top=20, centre=True)):
        assert found(answer) == centred[row].argsort(descending=True).tolist() != found(plain[row])
        values = [match.similarity for match in answer.results]
        assert values == pytest.approx(centred[row].sort(descending=True).values.tolist(), abs=1e-5)
    selected = gallery.search_features(queries, 'infrared', top=3, centre=True, where="path > '/009.jpg'")
    assert found(selected[0]) == [row for row in centred[0].argsort(descending=True).tolist() if row > 9][:3]
    with pytest.raises(ValueError, match=f'{FEWEST_TO_CENTRE - 1} are too few: give at least {FEWEST_TO_CENTRE}'):
        gallery.search_features(queries[1:], 'infrared', centre=True)


def calibration(**changes: object) -> Calibration:
    settings = {'weights': 'w', 'features': 'after-bn', 'size': [4, 2], 'flip_test': False, 'crops': 1, 'centre': False}
    curve = dict(
        slope=9.0, intercept=-5.0, prior=0.1, gallery_size=10.0, best_mean=0.8, best_deviation=0.1, uninformative=0.1
    )
    curve |= dict(ratio_slope=5.0, ratio_intercept=-1.0, thresholds={'0.01': 0.9}, fitted_on={})
    return Calibration(**curve, settings=settings | changes)


def test_probabilities_come_from_the_calibration_and_only_where_it_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Index.create(tmp_path / 'index', about(calibration=calibration().to_dict())).close()
    gallery = Gallery.open(tmp_path / 'index', device='cpu')
    fill(gallery, 20, cameras=[1] * 12 + [2] * 8)
    queries = features(FEWEST_TO_CENTRE, seed=4)
    for where, size in ((None, 20), ('camera = 2', 8)):
        for answer in gallery.search_features(queries, 'infrared', where=where):
            values = torch.tensor([match.similarity for match in answer.results])
            assert [match.probability for match in answer.results] == calibration().probability(values, size).tolist()
            assert answer.nobody == calibration().nobody(values[:1], size).item()
    # Where all identities are known, so is the mean number of a person's images.
    gallery.add(['/000.jpg'], features=features(1), identities=['anna'], cameras=[2])
    gallery.remove([f'/{number:03}.jpg' for number in range(1, 12)])
    gallery.add([f'/{number:03}.jpg' for number in range(12, 20)], features=features(8), identities=[*'aaabbbbc'])
    for where, size, mean in ((None, 9, 9 / 4), ("identity IN ('b', 'c')", 5, 5 / 2)):
        for answer in gallery.search_features(queries, 'infrared', where=where):
            values = torch.tensor([match.similarity for match in answer.results])
            expected = calibration().probability(values, size, mean).tolist()
            assert [match.probability for match in answer.results] == expected
    assert all(
        answer.nobody is None and answer.results[0].probability is None
        for answers in (
            gallery.search_features(queries, 'visible'),
            gallery.search_features(queries, 'infrared', centre=True),
        )
        for answer in answers
    )
    assert 'the calibration was fitted with another centre' in caplog.text
    Index.create(tmp_path / 'older', about(calibration={'slope': 9.0})).close()
    older = Gallery.open(tmp_path / 'older', device='cpu')
    fill(older, 2)
    assert older.search_features(queries[:1], 'infrared')[0].nobody is None
    assert 'the calibration in it cannot be read' in caplog.text
    (nothing,) = gallery.search_features(queries[:1], 'infrared', where='camera = 3')
    assert nothing == ('query 0', None, [])


def test_added_again_and_removed(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second, third = features(3)
    gallery.add(['a.jpg', Path('b.jpg')], features=torch.stack([first, second]), times=['2026-11-01', None])
    gallery.add(['a.jpg'], features=third[None], cameras=[np.int64(4)])
    (answer,) = gallery.search_features(third[None], 'infrared')
    assert answer.results[0][:4] == (str(tmp_path / 'a.jpg'), 4, None, None) and len(answer.results) == 2
    assert answer.results[0].similarity == pytest.approx(1, abs=1e-3)
    assert gallery.remove([str(tmp_path / 'a.jpg'), 'c.jpg']) == 1 and len(gallery) == 1
    gallery.save()
    assert len(Gallery.open(tmp_path / 'index')) == 1
    gallery.remove(['b.jpg'])
    gallery.close()
    assert len(Gallery.open(tmp_path / 'index')) == 1


def test_threads_search_while_another_adds(model: nn.Module, tmp_path: Path) -> None:
    paths = write_images(tmp_path, *(f'{number:02}.png' for number in range(24)))
    gallery = Gallery.create(tmp_path / 'index', model, 'visible', device='cpu', batch_size=2)
    gallery.add(paths[:4])
    sizes, problems = [], []

    def search() -> None:
        try:
            while adding.is_alive():
                (answer,) = gallery.search([paths[0]], 'visible', top=100)
                sizes.append(len(answer.results))
                assert answer.results[0].path == paths[0] and answer.results[0].similarity > 0.99
        except Exception as error:
            problems.append(error)

    def add() -> None:
        for start in range(4, 24, 2):
            gallery.add(paths[start : start + 2])
            gallery.remove(paths[start : start + 1])
            gallery.save()

    adding = threading.Thread(target=add)
    searching = [threading.Thread(target=search) for _ in range(2)]
    for thread in (adding, *searching):
        thread.start()
    for thread in (adding, *searching):
        thread.join()
    assert not problems and len(gallery) == 14 and sizes
    assert len(gallery.search([paths[0]], 'visible', top=100)[0].results) == 14
    table = embed(model, [path for number, path in enumerate(paths) if number < 4 or number % 2], 'visible')[0]
    np.testing.assert_allclose(gallery.index.view().features[gallery.index.view().rows], table.numpy(), atol=1e-3)


def test_images_that_cannot_be_read(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_images(tmp_path, 'a.png', 'b.png', os.fsdecode(b'caf\xe9.png'))
    (tmp_path / 'broken.png').write_bytes(b'no image')
    paths.insert(1, str(tmp_path / 'broken.png'))
    gallery = Gallery.create(tmp_path / 'index', model, 'visible', device='cpu', batch_size=2)
    with pytest.raises(ValueError, match='broken.png: this image cannot be read'):
        gallery.add(paths)
    gallery.close()
    gallery = Gallery.open(tmp_path / 'index', model=model, device='cpu')
    assert len(gallery) == 0
    assert gallery.add(paths, skip_broken=True) == 3
    assert '1 images cannot be read and are left out' in caplog.text
    assert gallery.search([paths[3]], 'visible', top=1)[0].results[0].path == paths[3]
    with pytest.raises(ValueError, match='broken.png: this image cannot be read'):
        gallery.search(paths, 'infrared')
    answers = gallery.search([*paths, paths[1:3]], 'infrared', skip_broken=True)
    assert [answer.query for answer in answers] == [paths[0], *paths[2:], paths[1]]
    assert '2 queries cannot be read and are left out' in caplog.text
    assert gallery.search([paths[1]], 'infrared', skip_broken=True) == []


def test_a_model_is_loaded_from_where_the_index_says_if_it_is_the_same(copy: Path, tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, 'a.png')
    gallery = vireid_timm.Gallery.create(tmp_path / 'index', copy, 'visible', device='cpu')
    gallery.add([path])
    gallery.save()
    expected = gallery.search([path], 'infrared')
    again = Gallery.open(tmp_path / 'index', device='cpu')
    assert again.index.about.model == str(copy) and again.search([path], 'infrared') == expected
    moved = copy.rename(tmp_path / 'moved')
    with pytest.raises(ValueError, match='there is no file or folder .*copy'):
        Gallery.open(tmp_path / 'index', device='cpu').search([path], 'infrared')
    assert Gallery.open(tmp_path / 'index', model=moved, device='cpu').search([path], 'infrared') == expected
    with pytest.raises(ValueError, match='does not fit: it has weights .*, not .*Use the model'):
        Gallery.open(tmp_path / 'index', model='vireid_dml_r10t.synthvi')


def test_an_index_by_a_model_in_memory_asks_for_it(model: nn.Module, tmp_path: Path) -> None:
    gallery = Gallery.create(tmp_path / 'index', model, 'infrared', features='before-bn', size=(32, 16), device='cpu')
    own = gallery.index.about
    assert (own.modality, own.features, own.size, own.weights) == (
        *('infrared', 'before-bn', (32, 16)),
        weights_fingerprint(model),
    )
    assert own.model is None and own.dimensions == model.num_features and gallery.modality == 'infrared'
    with pytest.raises(ValueError, match='was made by a model in memory; open it with model='):
        Gallery.open(tmp_path / 'index').search(write_images(tmp_path, 'a.png'), 'visible')
    assert (tmp_path / 'index' / ABOUT).exists()


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda g: g.add('a.jpg'), 'expected a list of paths, got a single one'),
        (lambda g: g.add(['a.jpg'], cameras=[1, 2]), r'expected as many cameras as paths \(1\), got 2'),
        (lambda g: g.add(['a.jpg'], times=['noon']), "'noon' is no ISO 8601 time"),
        (lambda g: g.add(['a.jpg'], features=features(2)), r'expected features \[1, 8\], got \[2, 8\]'),
        (lambda g: g.add(['a.jpg'], features=features(1, width=9)), r'expected features \[1, 8\], got \[1, 9\]'),
        (lambda g: g.add(['a.jpg'], features=torch.full((1, 8), math.nan)), 'features 0: .* not finite'),
        (lambda g: g.search_features(features(1, width=9), 'visible'), r'expected features \[Q, 8\], got \[1, 9\]'),
        (lambda g: g.search_features(features(1)[0], 'visible'), r'expected features \[Q, 8\], got \[8\]'),
        (lambda g: g.search_features(features(1), 'visible', top=0), 'top must be at least 1, got 0'),
        (lambda g: g.search_features(features(1), 'ultraviolet'), "visible, infrared, got 'ultraviolet'"),
        (lambda g: g.search_features(features(1), 'visible', where='camra'), 'no such column: camra'),
        (lambda g: g.search('a.jpg', 'visible'), 'expected a list of queries, got a single one'),
        (lambda g: g.search([['a.jpg'], []], 'visible'), 'query 1 is a tracklet without images'),
    ],
)
def test_mistakes_are_named(gallery: Gallery, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(gallery)
    assert len(gallery) == 0


def test_an_empty_gallery_finds_nothing(gallery: Gallery) -> None:
    for by_identity in (False, True):
        assert [a.results for a in gallery.search_features(features(2), 'infrared', by_identity=by_identity)] == [
            [],
            [],
        ]
    assert gallery.search_features(features(0), 'infrared') == []
