"""`vireid train --dry-run` as its users run it: what it says is so, and it leaves nothing behind."""

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vireid_timm.cli.main import main
from vireid_timm.data import store as images_module
from vireid_timm.data.layouts import write_layout

pytestmark = pytest.mark.usefixtures('one_thread')

SIZE = (64, 32)
SMALL = (
    *('--model', 'vireid_dml_r10t', '--input-size', '3', '64', '32', '--identities-per-batch', '3'),
    *('--images-per-modality', '2', '--epochs', '7', '--warmup-epochs', '0', '--workers', '0', '--no-amp'),
)


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, one of whom no infrared camera saw."""
    root = tmp_path_factory.mktemp('data') / 'images'
    write_layout(root, 'folder', identities=6, test_identities=2, size=SIZE, workers=0)
    person = sorted((root / 'train/infrared').iterdir())[0]
    for path in person.iterdir():
        path.unlink()
    return root


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is run, with a cache of its own: nothing may appear in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('VIREID_CACHE', str(tmp_path / 'cache'))
    return tmp_path


def _dry_run(capsys: pytest.CaptureFixture, *words: object) -> str:
    assert main(['train', '--dry-run', *SMALL, *map(str, words)]) == 0
    return capsys.readouterr().out


def _files(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob('*')}


@pytest.mark.parametrize(
    ('words', 'answer'),
    [
        ('--augment rcc mixup', "configuration: augment: unknown augmentation 'mixup'; expected some of rcc, rfa"),
        ('--augment cre=2', "augment: expected a probability in 0..1 after cre=, got '2'"),
        ('--loss triplet=1 centre=1', "configuration: loss: unknown loss 'centre'; expected some of triplet, hetero"),
    ],
)
def test_names_are_checked_before_anything_is_read(words: str, answer: str, capsys: pytest.CaptureFixture) -> None:
    assert main(['train', '--dry-run', '--data-dir', 'nowhere', *words.split()]) == 1
    said, error = capsys.readouterr()
    assert not said and answer in error and error.count('\n') == 1


def test_it_says_that_visible_images_have_copies(images: Path, capsys: pytest.CaptureFixture) -> None:
    said = _dry_run(capsys, '--data-dir', images, '--val-share', '0', '--augment', 'three_way', 'cre=0.3')
    assert '= 12 images per batch, the visible ones twice\n' in said
    assert re.search(r'\n +augment +three_way cre=0.3\n', said), said


def test_it_says_what_there_is_and_writes_nothing(images: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    before, state = _files(images), torch.get_rng_state()
    said = _dry_run(capsys, '--data-dir', images, '--val-share', '0')
    assert _files(images) == before and not list(here.iterdir()) and torch.equal(torch.get_rng_state(), state)

    people = sorted(path.name for path in (images / 'train/visible').iterdir())
    counts = {
        modality: sum(1 for name in people[1:] for _ in (images / 'train' / modality / name).iterdir())
        for modality in ('visible', 'infrared')
    }
    assert re.search(rf'to train on +5 +{counts["visible"]} +{counts["infrared"]}\n', said), said
    assert f'skipped, with images of one modality only: {people[0]}\n' in said
    for modality in counts:
        cameras = dict(re.findall(r'(\d+): (\d+)', re.search(rf'{modality} by camera: (.*)', said)[1]))
        for camera, count in cameras.items():
            found = [path for name in people[1:] for path in (images / 'train' / modality / name).glob(f'c{camera}_*')]
            assert len(found) == int(count)
        assert sum(map(int, cameras.values())) == counts[modality]

    per_epoch = max(counts.values()) // 6 + 1
    assert '3 identities x (2 visible + 2 infrared) = 12 images per batch\n' in said
    assert f'{per_epoch} per epoch, 7 epochs: {7 * per_epoch} batches, {7 * per_epoch} optimiser steps\n' in said
    model = timm.create_model('vireid_dml_r10t', num_classes=5)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert re.search(rf'{count / 1e6:.2f} M parameters; memory: [\d.]+ [MG]B at the peak of a step', said)
    assert re.search(rf'[\d.]+ ms per optimiser step, [\d.,]+ images/s\n +[\d:]+ for {7 * per_epoch} steps', said)
    assert 'Nothing was trained, nothing was written.' in said


def test_only_settings_that_are_not_the_defaults_are_listed(images: Path, capsys: pytest.CaptureFixture) -> None:
    settings = _dry_run(capsys, '--data-dir', images, '--model-kwargs', 'gem_power=4').partition('\n\n')[0]
    listed = dict(re.findall(r'^  (\w+) +(\S.*)$', settings, flags=re.MULTILINE))
    assert listed == {
        **{'data_dir': str(images), 'model': 'vireid_dml_r10t', 'model_kwargs': 'gem_power=4', 'amp': 'False'},
        **{'input_size': '3 64 32', 'identities_per_batch': '3', 'images_per_modality': '2', 'epochs': '7'},
        **{'warmup_epochs': '0', 'workers': '0'},
    }


def test_held_out_people_and_accumulation_are_counted(images: Path, capsys: pytest.CaptureFixture) -> None:
    words = ('--val-share', '0.4', '--grad-accum-steps', '3')
    said = _dry_run(capsys, '--data-dir', images, *words)
    held_out = re.search(r'held out: (.*)', said)[1].split(', ')
    assert re.search(r'to train on +3 ', said) and re.search(r'held out for validation +2 ', said)
    assert len(held_out) == 2 and set(held_out) < {path.name for path in (images / 'train/visible').iterdir()}
    assert '3 batches accumulated: 36 per optimiser step\n' in said
    batches, steps = map(int, re.search(r': (\d+) batches, (\d+) optimiser steps', said).groups())
    assert steps == 7 * -(-(batches // 7) // 3)


def test_unset_settings_are_shown_with_what_they_come_to(images: Path, capsys: pytest.CaptureFixture) -> None:
    words = ['--data-dir', images, '--backbone-lr-scale', '0.3', '--lr', '0.02', '--warmup-epochs', '4']
    words += ['--device', 'cpu']

    def resolved(*more: object) -> dict[str, str]:
        part = _dry_run(capsys, *words, *more).split('\n\n')[1]
        return dict(re.findall(r'^  (\w[\w -]*?)  +(\S.*)$', part, flags=re.MULTILINE))

    assert resolved() == {
        **{'learning rate': '0.02, of what was pretrained 0.006', 'input size': '3 64 32', 'cache': 'disk'},
        **{'warm-up': '4 epochs from 0.002, of what was pretrained 0.0006', 'device': 'cpu, computing in float32'},
        **{'workers': '0'},
    }
    # Without a schedule nothing scales the rates, and nothing warms up.
    constant = resolved('--sched', 'none', '--cache', 'ram', '--amp')
    assert constant['learning rate'] == '0.02' and constant['cache'] == 'ram' and 'warm-up' not in constant
    assert constant['device'] == 'cpu, computing in bfloat16'


def test_the_store_is_the_one_that_training_makes(images: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    words = ['--data-dir', str(images), '--val-share', '0.4', '--cache', 'disk']
    line = r'Decoded images of 64x32\n  (\d+), ([\d.]+) MB, (would be written to|found in) (\S+)\n'
    ((count, size, what, folder),) = re.findall(line, _dry_run(capsys, *words))
    assert what == 'would be written to' and not (here / 'cache').exists()
    assert main(['train', *SMALL, *words, '--epochs', '1', '--output', str(here / 'runs')]) == 0
    capsys.readouterr()
    assert [path for path in (here / 'cache').iterdir() if path.is_dir()] == [Path(folder)]
    size_on_disk = (Path(folder) / 'pixels.bin').stat().st_size
    assert size_on_disk == 3 * 64 * 32 * int(count) and float(size) == pytest.approx(size_on_disk / 1e6, abs=0.051)
    before = _files(here)
    other = _dry_run(capsys, *words, '--seed', '7', '--val-share', '0')  # of the same images, held out or not
    assert re.findall(line, other) == [(count, size, 'found in', folder)]
    assert _files(here) == before


def test_the_speed_of_reading_is_that_of_the_first_time(
    images: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, load = set(), images_module.load_image

    def load_from_slow_disk(path: str, size: tuple[int, int]) -> np.ndarray:
        if path not in known:  # the system keeps what was read once
            known.add(path)
            time.sleep(0.02)
        return load(path, size)

    monkeypatch.setattr(images_module, 'load_image', load_from_slow_disk)
    said = _dry_run(capsys, '--data-dir', images)
    assert int(re.search(r'read here at ([\d,]+) images/s', said)[1].replace(',', '')) <= 50


def test_a_resumed_run_is_told_what_is_left(images: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    words = ['--data-dir', str(images), '--val-share', '0', '--experiment', 'run', '--output', str(here / 'runs')]
    assert main(['train', *SMALL, *words, '--epochs', '1', '--cache', 'ram']) == 0
    before = _files(here)
    capsys.readouterr()
    assert main(['train', '--dry-run', '--resume', str(here / 'runs/run'), '--epochs', '4']) == 0
    said = capsys.readouterr().out
    per_epoch = int(re.search(r'(\d+) per epoch, 4 epochs', said)[1])
    assert f'{per_epoch} batches are done; it resumes in epoch 1\n' in said
    assert f'for {3 * per_epoch} steps' in said and f'go to {here / "runs/run"}.' in said
    assert _files(here) == before
    # As training would: the run is there already.
    assert main(['train', '--dry-run', *SMALL, *words]) == 1
    assert '--resume' in capsys.readouterr().err


def test_images_both_to_train_and_to_test_on_are_named(images: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(images, here / 'leak')
    copied = sorted((here / 'leak/gallery/visible').glob('*/*'))[0]
    shutil.copy(sorted((here / 'leak/train/visible').glob('*/*'))[3], copied)
    # All images are read to find the broken ones, as in training.
    assert main(['train', '--dry-run', *SMALL, '--data-dir', str(here / 'leak'), '--skip-broken']) == 0
    said = capsys.readouterr().err
    assert re.search(rf'1 images are both in the training and the test set.* = {copied}\n', said)


def test_broken_images_are_named(images: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    copy = here / 'broken'
    for path in images.rglob('*.*'):
        target = copy / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    broken = sorted((copy / 'train/visible').glob('*/*'))[-1]
    broken.write_bytes(b'no image')
    for share in ('0', '0.25', '0.5'):  # whether it was to be trained on, or held out
        said = _dry_run(capsys, '--data-dir', copy, '--val-share', share, '--skip-broken')
        assert re.search(rf'skipped, 1 that cannot be read: {broken}', said)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--model', 'resnet18'], 'resnet18'),
        (['--identities-per-batch', '64'], '64 identities'),
        (['--data-dir', 'nowhere'], 'nowhere'),
    ],
)
def test_what_cannot_be_trained_is_an_error_here_too(
    images: Path, here: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert main(['train', '--dry-run', *SMALL, '--data-dir', str(images), *words]) == 1
    assert message in capsys.readouterr().err and not list(here.iterdir())


@pytest.mark.parametrize('dry', [('--dry-run',), ()])
def test_a_folder_that_cannot_hold_the_run_is_an_error_before_anything_is_computed(
    dry: tuple[str], images: Path, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / 'file').touch()
    words = ['train', *dry, *SMALL, '--data-dir', str(images), '--experiment', 'run', '--output']

    def said(output: str) -> str:
        assert main([*words, output]) == 1
        assert [path.name for path in here.iterdir()] == ['file']  # no decoded images either
        return capsys.readouterr().err

    assert f'cannot train in file/run: {here}/file is not a folder' in said('file')
    weights = sum(tensor.nbytes for tensor in timm.create_model('vireid_dml_r10t', num_classes=0).state_dict().values())
    need = 3 * 2 * weights  # with SGD's momentum
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=need - 1))
    error = said('new/runs')
    assert 'cannot train in new/runs/run: No space left on device' in error and 'choose another --output' in error
    assert f'at least {2 * weights / 1e6:.1f} MB each, and there has to be room for 3' in error
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(os, 'access', lambda path, mode: False)  # root may write anywhere
    assert f'cannot train in new/runs/run: {here} is not writable' in said('new/runs')


def test_a_recipe_is_a_dry_run_away_from_its_cost(images: Path, capsys: pytest.CaptureFixture) -> None:
    """The one that needs no download, on people that it is meant for."""
    assert main(['train', '--dry-run', '--config', 'fine_tune', '--data-dir', str(images), '--no-amp']) == 0
    said = capsys.readouterr()
    assert 'except for the classifiers: these are new, for 5 identities' in said.err
    assert re.search(r'opt +adamw\n', said.out) and 'nobody is held out' in said.out
    assert '5 identities x (4 visible + 4 infrared) = 40 images per batch\n' in said.out


@pytest.mark.parametrize(
    ('words', 'warning'),
    [
        ('--warmup-epochs 7', 'The warm-up of 7 epochs does not end within the 7 epochs of the run'),
        ('--warmup-epochs 9 --sched cosine', 'The warm-up of 9 epochs does not end'),
        ('--warmup-epochs 6', None),
        ('--warmup-epochs 9 --sched none', None),  # which has no warm-up
        ('--identities-per-batch 1', 'the triplet loss nothing'),
        ('--identities-per-batch 2', None),
        ('--input-size 3 32 64', 'height 32 and width 64 show people lying down'),
        ('--input-size 3 64 64', None),
        ('--pad 4', '--pad 4 moves images of 64x32 by more than a tenth of their size; --pad 2 suits them'),
        ('--pad 3', None),
        ('--pad 7 --input-size 3 128 64', '--pad 7 moves images of 128x64'),
    ],
)
def test_settings_that_are_traps_are_warned_about(
    words: str, warning: str | None, images: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(['train', '--dry-run', *SMALL, '--pad', '2', '--data-dir', str(images), *words.split()]) == 0
    error = capsys.readouterr().err
    traps = ('The warm-up', 'triplet loss nothing', 'lying down', '--pad', 'one identity')
    assert [trap for trap in traps if trap in error] == ([trap for trap in traps if trap in warning] if warning else [])
    assert (warning or '') in error


def test_one_identity_is_warned_about(here: Path, capsys: pytest.CaptureFixture) -> None:
    one = ['identities=1', 'test_identities=2', 'size=(64,32)']
    words = ['--dataset', 'synthetic', '--val-share', '0', '--identities-per-batch', '1', '--dataset-kwargs', *one]
    assert main(['train', '--dry-run', *SMALL, *words]) == 0
    assert 'There is one identity to train on' in capsys.readouterr().err


def test_what_the_weights_start_from_is_said(images: Path, capsys: pytest.CaptureFixture) -> None:
    words = ['train', '--dry-run', *SMALL, '--data-dir', str(images)]
    assert main(words) == 0
    random = 'The weights start at random'
    error = capsys.readouterr().err
    assert random in error and '--pretrained starts from vireid_dml_r10t.synthvi' in error
    assert main([*words, '--pretrained']) == 0
    error = capsys.readouterr().err
    assert random not in error and 'Weights of vireid_dml_r10t loaded' in error
