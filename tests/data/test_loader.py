"""Batches against ones made by hand, whatever the cache and wherever an epoch is entered; reading ahead and its end."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from vireid_timm.constants import MODALITIES
from vireid_timm.data import store as images_module
from vireid_timm.data.augment import Augment
from vireid_timm.data.images import ImageError, load_image
from vireid_timm.data.layouts import write_layout
from vireid_timm.data.loader import Batch, load_batches, step_seed
from vireid_timm.data.store import CACHES, ImageStore
from vireid_timm.evaluation.evaluate import evaluate
from vireid_timm.training import run as run_module
from vireid_timm.training.config import TrainConfig
from vireid_timm.training.run import TrainData, load_data

CPU = torch.device('cpu')
SIZE = (3, 32, 16)
STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load(cache_dir: Path, **settings: Any) -> TrainData:
    config = {
        'dataset': 'synthetic',
        'dataset_kwargs': dict(identities=12, test_identities=2, images_per_modality=3, size=(32, 16)),
        'identities_per_batch': 3,
        'images_per_modality': 2,
        'val_share': 0.0,
        'workers': 0,
        'cache': 'ram',
        **settings,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('VIREID_CACHE', str(cache_dir))
        return load_data(TrainConfig.from_mapping(config), SIZE, CPU)


@pytest.fixture
def data(tmp_path: Path) -> TrainData:
    return load(tmp_path)


def draw(data: TrainData, device: torch.device = CPU, **options: Any) -> Iterator[Batch]:
    augments = {modality: Augment(modality, *STATISTICS, pad=3) for modality in MODALITIES}
    options = {'epoch': 1, 'seed': 5, **options}
    return load_batches(data.store, data.labels, data.sampler, augments, device, **options)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert [(batch.step, batch.rows) for batch in first] == [(batch.step, batch.rows) for batch in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert all(torch.equal(*pair) for pair in zip(one.inputs, other.inputs, strict=True))


def assert_same_images(store: ImageStore, paths: np.ndarray) -> None:
    """Whether the intact rows of a store show these files."""
    images = np.stack([load_image(path, SIZE[1:]) for path in paths.tolist()])
    assert np.array_equal(store[store.intact()], images.transpose(0, 3, 1, 2))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def augmented_by_hand(data: TrainData, rows: list[int], place: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Images of these rows as (seed, epoch, step, rank) has them augmented."""
    generator = torch.Generator().manual_seed(step_seed(*place, stream=1))
    inputs = []
    for modality, own in zip(MODALITIES, np.split(np.array(rows), 2), strict=True):
        assert set(data.records.modality[own].tolist()) == {modality}
        stored = np.stack([load_image(path, SIZE[1:]) for path in data.records.path[own]])
        augment = Augment(modality, *STATISTICS, pad=3)
        inputs.append(augment(torch.from_numpy(stored).permute(0, 3, 1, 2), generator))
    return inputs


@pytest.mark.parametrize('epoch', [0, 2])
def test_batches_are_those_made_by_hand(data: TrainData, epoch: int) -> None:
    before = torch.get_rng_state()
    drawn = list(draw(data, epoch=epoch))
    assert torch.equal(torch.get_rng_state(), before)
    data.sampler.set_epoch(epoch)
    assert len(drawn) == data.sampler.batches_per_epoch > 2
    for step, (batch, rows) in enumerate(zip(drawn, data.sampler, strict=True)):
        assert (batch.step, batch.rows) == (step, rows)
        assert batch.labels.tolist() == [data.class_map[name] for name in data.records.identity[rows].tolist()]
        by_hand = augmented_by_hand(data, rows, (5, epoch, step, 0))
        assert all(torch.equal(*pair) for pair in zip(batch.inputs, by_hand, strict=True))


def test_any_batch_can_be_made_again(data: TrainData) -> None:
    whole = list(draw(data))
    for first_step in (0, 1, len(whole) - 1, len(whole)):
        assert_same(list(draw(data, first_step=first_step)), whole[first_step:])
    other = next(draw(data, seed=6))
    assert other.rows == whole[0].rows, 'the sampler has its own seed'
    assert not torch.equal(other.inputs[0], whole[0].inputs[0])
    assert next(draw(data, epoch=2)).rows != whole[0].rows


@pytest.mark.parametrize('cache', CACHES)
def test_every_cache_gives_the_same_batches(tmp_path: Path, data: TrainData, cache: str) -> None:
    other = load(tmp_path, cache=cache)
    assert (other.store.held is not None) == (cache == 'device')
    assert_same(list(draw(other)), list(draw(data)))


def test_images_are_decoded_once_whoever_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, model = [], timm.create_model('vireid_dml_r10t', num_classes=0, img_size=SIZE[1:])
    monkeypatch.setattr(
        images_module, 'load_image', lambda path, size: (decoded.append(path), load_image(path, size))[1]
    )
    runs = [load(tmp_path, cache='disk', val_share=share, seed=seed) for share, seed in ((0.2, 1), (0.3, 2), (0.0, 3))]
    everybody = runs[0].dataset.train.path.tolist()
    assert sorted(decoded) == sorted(everybody) and len([*tmp_path.glob('images-*')]) == 1
    for run in runs:
        assert len(run.records) == len(everybody) - (0 if run.validation is None else len(run.validation.test))
        assert_same_images(run.store, run.records.path)
    held_out = runs[0].validation
    assert_same_images(runs[0].validation_store, held_out.test.path)
    report = evaluate(model, held_out, store=runs[0].validation_store, size=SIZE[1:])
    assert sorted(decoded) == sorted(everybody)
    assert report == evaluate(model, held_out, size=SIZE[1:], cache='off')


def test_broken_images_are_left_out_on_both_sides(tmp_path: Path) -> None:
    write_layout(tmp_path / 'people', 'folder', identities=12, test_identities=2, size=SIZE[1:], workers=0)
    settings = dict(dataset='folder', data_dir=str(tmp_path / 'people'), dataset_kwargs={}, val_share=0.3)
    whole = load(tmp_path, **settings)
    broken = [str(whole.records.path[3]), str(whole.validation.test.path[4])]
    Path(broken[1]).write_bytes(b'no image')
    with pytest.raises(ImageError, match=broken[1]):  # before the training begins
        load(tmp_path, **settings)
    Path(broken[0]).write_bytes(b'no image')
    rest = load(tmp_path, **settings, skip_broken=True)
    assert rest.records.path.tolist() == [path for path in whole.records.path.tolist() if path not in broken]
    assert (list(rest.store.broken), list(rest.validation_store.broken)) == ([], [4])
    assert all(any(path in reason for reason in rest.broken) for path in broken) and len(rest.broken) == 2
    assert rest.validation.test.path.tolist() == whole.validation.test.path.tolist()
    assert_same_images(rest.store, rest.records.path)
    model = timm.create_model('vireid_dml_r10t', num_classes=0, img_size=SIZE[1:])
    assert evaluate(model, rest.validation, store=rest.validation_store, size=SIZE[1:]).skipped_images == 1


def test_a_store_of_other_images_is_refused(data: TrainData) -> None:
    model = timm.create_model('vireid_dml_r10t', num_classes=0, img_size=SIZE[1:])
    for store, size in ((data.store, (16, 16)), (data.store.select(np.arange(3)), SIZE[1:])):
        with pytest.raises(ValueError, match='give the store of this table'):
            evaluate(model, data.dataset, store=store, size=size)


def test_seeds_are_their_own_for_every_step_rank_and_stream() -> None:
    grid = list(itertools.product((0, 1, 42), (0, 1, 79), (0, 1, 695), (0, 1, 7), (0, 1)))
    seeds = [step_seed(*place) for place in grid]
    assert len(set(seeds)) == len(grid)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert step_seed(1, 2, 3, 4) == step_seed(1, 2, 3, 4, stream=0)


def test_ranks_share_the_batches_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(draw(load(tmp_path, identities_per_batch=6)))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(run_module, 'rank_and_world_size', lambda rank=rank: (rank, 2))
        shares.append(list(draw(load(tmp_path))))
    for whole, first, second in zip(alone, *shares, strict=True):
        assert first.rows[:6] + second.rows[:6] + first.rows[6:] + second.rows[6:] == whole.rows
        assert len(set(first.labels.tolist())) == len(set(second.labels.tolist())) == 3
    for rank, share in enumerate(shares):  # each draws its own augmentation
        by_hand = augmented_by_hand(load(tmp_path), share[1].rows, (5, 1, 1, rank))
        assert all(torch.equal(*pair) for pair in zip(share[1].inputs, by_hand, strict=True))


def test_the_next_batches_are_read_while_one_is_used(data: TrainData, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = type(data.store).__getitem__

    def noted(store: object, rows: np.ndarray) -> torch.Tensor:
        reads.append(threading.current_thread().name)
        return read(store, rows)

    monkeypatch.setattr(type(data.store), '__getitem__', noted)
    drawn = draw(data)
    next(drawn)
    wait_for(lambda: len(reads) >= 2)
    assert threading.current_thread().name not in reads
    drawn.close()


def test_an_epoch_that_is_left_early_leaves_no_thread(data: TrainData) -> None:
    before = threading.active_count()
    for _ in range(3):
        drawn = draw(data)
        next(drawn)
        assert threading.active_count() > before
        drawn.close()
        assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(drawn)


def test_a_store_that_is_cut_short_is_an_error_of_the_loop(tmp_path: Path) -> None:
    data = load(tmp_path / 'cache', cache='disk')
    before = threading.active_count()
    drawn = draw(data)
    next(drawn)
    (file,) = (tmp_path / 'cache').glob('*/pixels.bin')
    os.truncate(file, 10)
    with pytest.raises(OSError, match=f'{file}: .* has 10 of'):
        list(itertools.chain(drawn, draw(data)))  # what was read ahead is still good
    assert threading.active_count() == before


def test_an_image_that_vanishes_is_an_error_of_the_loop(tmp_path: Path) -> None:
    data = load(tmp_path, cache='off')
    data.store._paths = np.full(len(data.store), str(tmp_path / 'gone.png'))
    before = threading.active_count()
    with pytest.raises(ImageError, match='gone.png'):
        next(draw(data))
    assert threading.active_count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('cache', ['ram', 'device'])
def test_batches_on_a_gpu_are_those_on_the_cpu(tmp_path: Path, data: TrainData, cache: str) -> None:
    other = load(tmp_path, cache=cache)
    device = torch.device('cuda')
    if cache == 'device':
        other.store.hold(device)
    for one, expected in zip(draw(other, device), draw(data), strict=True):
        assert one.rows == expected.rows
        assert torch.equal(one.labels.cpu(), expected.labels)
        for images, reference in zip(one.inputs, expected.inputs, strict=True):
            torch.testing.assert_close(images.cpu(), reference, rtol=0.0, atol=1e-6)
