"""Compressed features find what exact search finds, on small galleries of clustered features."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vireid_timm.retrieval import compressed
from vireid_timm.retrieval.search import exact_search, rescored

TOP = 5
FEWEST = compressed.FEW


def clustered(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Features of identities with ten images each, L2-normalised, half precision."""
    random = np.random.default_rng(seed)
    identities = random.normal(size=(count // 10 + 1, dimensions))
    features = identities[np.arange(count) // 10] + 0.7 * random.normal(size=(count, dimensions))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)


def queries_like(features: np.ndarray, count: int = 20) -> torch.Tensor:
    random = np.random.default_rng(9)
    near = features[random.integers(len(features), size=count)] + 0.05 * random.normal(size=(count, features.shape[1]))
    return torch.nn.functional.normalize(torch.from_numpy(near.astype(np.float32)))


@pytest.fixture(scope='module')
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Path]:
    """A gallery that is really compressed, and its folder."""
    features, folder = clustered(FEWEST, 96), tmp_path_factory.mktemp('compressed') / 'index'
    compressed.build(features, folder)
    return features, folder


def check_equal_to_exact(features: np.ndarray, folder: Path, allowed: np.ndarray | None = None) -> None:
    index, gallery, queries = compressed.open(folder), torch.from_numpy(features), queries_like(features)
    rows = None if allowed is None else torch.from_numpy(np.flatnonzero(allowed))
    expected = exact_search(queries, gallery, TOP, rows)
    candidates = torch.from_numpy(index.search(queries.numpy(), TOP, allowed))
    found = rescored(queries, gallery, candidates, min(TOP, expected.rows.shape[1]))
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0, atol=1e-5)
    assert (found.rows == expected.rows).float().mean() > 0.99  # sums in another order may swap what is equal


def test_all_lists_find_what_exact_search_finds(many: tuple[np.ndarray, Path]) -> None:
    features, folder = many
    assert compressed.open(folder).count == len(features)
    assert compressed.PROBED >= compressed.open(folder).lists
    check_equal_to_exact(features, folder)


@pytest.mark.parametrize('share', [0.5, 0.02, 0.0005, 0])
def test_only_allowed_images_are_found(many: tuple[np.ndarray, Path], share: float) -> None:
    features, folder = many
    allowed = np.random.default_rng(1).random(len(features)) < share
    found = compressed.open(folder).search(queries_like(features).numpy(), TOP, allowed)
    assert allowed[found[found >= 0]].all()
    assert ((found >= 0).sum(axis=1) >= min(TOP, allowed.sum())).all()
    if allowed.any():
        check_equal_to_exact(features, folder, allowed)


@pytest.mark.parametrize('added', [0, 3, 500])
def test_later_images_are_found_and_removed_ones_are_not(
    many: tuple[np.ndarray, Path], added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, folder = many
    monkeypatch.setattr(compressed, 'CANDIDATES', len(features))
    grown = np.concatenate([features, clustered(500, 96, seed=1)[:added]])
    kept = np.random.default_rng(2).random(len(grown)) < 0.7
    rows, gallery = torch.from_numpy(np.flatnonzero(kept)), torch.from_numpy(grown)
    queries = torch.cat([queries_like(features), queries_like(grown[-added:] if added else grown)])
    found, expected = (
        compressed.open(folder).nearest(queries, gallery, TOP, rows),
        exact_search(queries, gallery, TOP, rows),
    )
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0, atol=1e-5)
    assert (found.rows == expected.rows).float().mean() > 0.99
    only_late = rows[rows >= len(features)]
    late = compressed.open(folder).nearest(queries, gallery, TOP, only_late)
    assert late.rows.shape == (len(queries), min(TOP, len(only_late)))
    assert torch.isin(late.rows, only_late).all()


def test_few_lists_still_fill_the_results(many: tuple[np.ndarray, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    features, folder = many
    monkeypatch.setattr(compressed, 'PROBED', 1)
    queries = queries_like(features).numpy()
    found = compressed.open(folder).search(queries, TOP)
    assert (found >= 0).all()
    assert all(len(set(row)) == len(row) for row in found.tolist())


@pytest.mark.parametrize('count', [1, 2, 30, FEWEST - 1])
def test_few_images(count: int, tmp_path: Path) -> None:
    features = clustered(count, 16)
    compressed.build(features, tmp_path / 'index')
    check_equal_to_exact(features, tmp_path / 'index')


@pytest.mark.parametrize('dimensions', [20, 200])
def test_any_length_of_features(dimensions: int, tmp_path: Path) -> None:
    features = clustered(FEWEST, dimensions)
    compressed.build(features, tmp_path / 'index')
    check_equal_to_exact(features, tmp_path / 'index')


def test_the_seed_decides(many: tuple[np.ndarray, Path], tmp_path: Path) -> None:
    features, folder = many
    compressed.build(features, tmp_path / 'same', seed=0)
    compressed.build(features[:, :20], tmp_path / 'first', seed=1)
    compressed.build(features[:, :20], tmp_path / 'second', seed=2)
    same, first, second = ((tmp_path / name / compressed.INDEX).read_bytes() for name in ('same', 'first', 'second'))
    assert same == (folder / compressed.INDEX).read_bytes() and first != second


def test_a_killed_build_leaves_what_was_there(tmp_path: Path) -> None:
    features = clustered(30, 16)
    compressed.build(features, tmp_path / 'index')
    before = (tmp_path / 'index' / compressed.INDEX).read_bytes()
    np.save(tmp_path / 'features.npy', clustered(5 * FEWEST, 256))
    program = (
        'import numpy as np; from vireid_timm.retrieval import compressed\n'
        f'features = np.load({str(tmp_path / "features.npy")!r}); print("go", flush=True)\n'
        f'compressed.build(features, {str(tmp_path / "index")!r})'
    )
    process = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'go\n'
    while not list(tmp_path.glob('.index.*.part')):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (tmp_path / 'index' / compressed.INDEX).read_bytes() == before


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match='no compressed features in'):
        compressed.open(tmp_path)
    with pytest.raises(ValueError, match='no features to compress'):
        compressed.build(np.empty((0, 8), np.float16), tmp_path / 'index')
    (tmp_path / compressed.INDEX).write_bytes(b'IxPT')
    with pytest.raises(ValueError, match='is damaged'):
        compressed.open(tmp_path)
    monkeypatch.setitem(sys.modules, 'faiss', None)
    for call in (lambda: compressed.open(tmp_path), lambda: compressed.build(clustered(2, 8), tmp_path / 'index')):
        with pytest.raises(ValueError, match=r'vireid_timm\[search\]'):
            call()
    assert not (tmp_path / 'index').exists()


def test_rescoring_ranks_each_querys_own_candidates() -> None:
    gallery = torch.eye(4).half()
    queries = torch.tensor([[0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    found = rescored(queries, gallery, torch.tensor([[3, 1, 0], [2, -1, -1]]), 3)
    assert found.rows.tolist() == [[1, 0, 3], [2, -1, -1]]
    torch.testing.assert_close(found.similarity[0], torch.tensor([0.8, 0.6, 0.0]))
    assert found.similarity[1].tolist() == [1.0, -torch.inf, -torch.inf]
