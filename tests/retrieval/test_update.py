"""`vireid index` in processes of its own: killed and resumed, two at once, ranks; and what a second call changes."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from galleries import paths_in, stored, write_images
from PIL import Image
from processes import start, start_two

from vireid_timm.cli.main import main
from vireid_timm.data.listing import list_images
from vireid_timm.evaluation.features import embed
from vireid_timm.hub.folder import load_model
from vireid_timm.retrieval import update
from vireid_timm.retrieval.index import Index
from vireid_timm.retrieval.update import update_index

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / 'images', *(f'{number % 4}/c{number % 3}_{number:02}.png' for number in range(24)))
    return tmp_path / 'images'


def command(images: Path, output: Path, model: Path, *words: str) -> list[str]:
    places = ['--output', str(output), '--model', str(model)]
    return ['index', str(images), *places, '--modality', 'visible', '--device', 'cpu', '-b', '2', *words]


def run_saving_at_once(words: list[str]) -> int:
    """Run the command, which commits after every batch."""
    update.SAVE_EVERY = 0.0
    return main(words)


def expected(images: Path, model: Path) -> dict[str, np.ndarray]:
    paths = [image.path for image in list_images(images)]
    table = embed(load_model(model), paths, 'visible', batch_size=2)[0]
    return dict(zip(paths, table.half().numpy(), strict=True))


def assert_holds(folder: Path, features: dict[str, np.ndarray]) -> None:
    index = Index(folder)
    found = stored(index)
    assert index.pending == 0 and set(found) == set(features)
    for path, row in found.items():
        np.testing.assert_allclose(row, features[path], atol=1e-4)  # batches differ
    index.close()


def kill_when(process: BaseProcess, moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not moment():
        assert process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)


def committed(folder: Path) -> int:
    try:
        index = Index(folder)
    except (OSError, ValueError):
        return -1
    try:
        return len(index)
    finally:
        index.close()


@pytest.mark.parametrize('count', [0, 6, 14])
def test_a_killed_index_goes_on_where_it_was(
    count: int, images: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / 'index'
    process = start(run_saving_at_once, command(images, output, saved), output=tmp_path / 'said.txt', environment={})
    kill_when(process, lambda: committed(output) >= count)
    index = Index(output)
    there, pending = len(index), index.pending
    index.close()
    assert there + pending in (0, 24) and there >= count
    if pending and there:
        query = next(iter(paths_in(index := Index(output))))
        index.close()
        assert main(['search', query, '--index', str(output), '--modality', 'visible', '--device', 'cpu']) == 0
        assert f'incomplete: {pending} images are still to come; it has {there}' in capsys.readouterr().err
    assert main(command(images, output, saved)) == 0
    said = capsys.readouterr().out
    assert (f'{24 - there} new' in said) == (there < 24) and (f'{there} unchanged' in said) == (there > 0)
    assert_holds(output, expected(images, saved))
    assert main(['search', str(images), '--index', str(output), '--modality', 'visible', '--device', 'cpu']) == 0
    assert 'incomplete' not in capsys.readouterr().err


def test_a_killed_update_leaves_what_was_there(images: Path, saved: Path, tmp_path: Path) -> None:
    output = tmp_path / 'index'
    assert main(command(images, output, saved)) == 0
    write_images(images, *(f'more/{number}.png' for number in range(24)))
    process = start(run_saving_at_once, command(images, output, saved), output=tmp_path / 'said.txt', environment={})
    kill_when(process, lambda: committed(output) > 24)
    assert main(command(images, output, saved)) == 0
    assert_holds(output, expected(images, saved))


def test_two_that_start_together_leave_a_whole_index(images: Path, saved: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f'{number}.txt' for number in range(2)]
    words = command(images, tmp_path / 'index', saved)
    processes = [start(run_saving_at_once, words, output=output, environment={}) for output in outputs]
    for process in processes:
        process.join(120)
    said = ''.join(output.read_text() for output in outputs)
    # The second one waits, and finds nothing left to do; after a while it would give up.
    assert sorted(process.exitcode for process in processes) == [0, 0] or 'another process is writing' in said
    assert 'Traceback' not in said and 'fault of' not in said
    assert_holds(tmp_path / 'index', expected(images, saved))


def test_ranks_share_the_images(images: Path, saved: Path, tmp_path: Path) -> None:
    (images / 'broken.png').write_bytes(b'no image')
    words = command(images, tmp_path / 'index', saved, '--workers', '1')
    statuses, said = start_two(main, words, folder=tmp_path, OMP_NUM_THREADS='1')
    assert statuses == [0, 0], said
    assert said.count('Index: ') == 1 and '24 new, 1 broken' in said and said.count('cannot be read') == 2
    (images / 'broken.png').unlink()
    (images / '0' / 'c0_00.png').unlink()
    statuses, said = start_two(main, words, folder=tmp_path)
    assert statuses == [0, 0] and '1 dropped, 23 unchanged' in said
    assert_holds(tmp_path / 'index', expected(images, saved))


def test_ranks_end_with_one_message(images: Path, saved: Path, tmp_path: Path) -> None:
    (tmp_path / 'index').mkdir()
    (tmp_path / 'index' / 'notes.txt').touch()
    statuses, said = start_two(main, command(images, tmp_path / 'index', saved), folder=tmp_path)
    assert statuses == [1, 1] and said.count('holds other files (notes.txt)') == 1


def updated(images: Path, saved: Path, output: Path) -> dict[str, int]:
    counts = update_index(output, images, model=saved, modality='visible', batch_size=4)._asdict()
    return {name: count for name, count in counts.items() if count}


def test_a_second_call_follows_the_folder(
    images: Path, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / 'index'
    assert updated(images, saved, output) == {'new': 24}
    assert updated(images, saved, output) == {'unchanged': 24}
    (images / '0' / 'c0_00.png').rename(images / '1' / 'c2_renamed.png')
    (images / '1' / 'c1_01.png').unlink()
    write_images(images, os.fsdecode(b'new/caf\xe9.png'))
    Image.fromarray(np.zeros((16, 8, 3), np.uint8)).save(images / '2' / 'c2_02.png')
    assert updated(images, saved, output) == {'new': 2, 'changed': 1, 'dropped': 2, 'unchanged': 21}
    assert_holds(output, expected(images, saved))
    (images / '2' / 'c2_02.png').write_bytes(b'no image any more')
    assert updated(images, saved, output) == {'unchanged': 23, 'broken': 1}
    assert 'c2_02.png: this image cannot be read' in caplog.text
    assert committed(output) == 23
    shutil.rmtree(images / '2')
    assert updated(images, saved, output)['dropped'] > 0
    assert_holds(output, expected(images, saved))
    for number in (0, 1):
        shutil.rmtree(images / str(number))
    assert updated(images, saved, output)['dropped'] > 0  # most are gone: the features move together
    assert_holds(output, expected(images, saved))
    assert not (output / 'features-0.f16').exists()


def test_a_csv_file_and_its_columns(images: Path, saved: Path, tmp_path: Path) -> None:
    table, output = tmp_path / 'gallery.csv', tmp_path / 'index'
    lines = ['path;identity;camera']
    lines += [f'{image.path};p{number % 5};{image.camera}' for number, image in enumerate(list_images(images))]
    table.write_text('\n'.join(lines))
    assert updated(table, saved, output) == {'new': 24}
    table.write_text('\n'.join(lines[:-4]).replace(';p1;', ';anna;'))
    assert updated(table, saved, output) == {'relabelled': 4, 'dropped': 4, 'unchanged': 16}
    index = Index(output)
    assert len(paths_in(index, "identity = 'anna'")) == 4 and len(paths_in(index, 'camera = 2')) == 6
    index.close()
    assert_holds(output, {path: row for path, row in expected(images, saved).items() if path in table.read_text()})


def test_identities_from_folders_stay(images: Path, saved: Path, tmp_path: Path) -> None:
    words = command(images, tmp_path / 'index', saved, '--folders-are-identities')
    assert main(words) == 0
    assert main(['index', str(images), '--output', str(tmp_path / 'index'), '--device', 'cpu']) == 0
    index = Index(tmp_path / 'index')
    assert len(paths_in(index, "identity = '3'")) == 6 and index.about.folders_are_identities
    index.close()
    assert main([*words[:-1], '--no-folders-are-identities']) == 0
    index = Index(tmp_path / 'index')
    assert index.unknown('identity') == 24
    index.close()


def test_a_single_image_and_none(images: Path, saved: Path, tmp_path: Path) -> None:
    (tmp_path / 'one').mkdir()
    shutil.copy(images / '0' / 'c0_00.png', tmp_path / 'one')
    assert updated(tmp_path / 'one', saved, tmp_path / 'index') == {'new': 1}
    (tmp_path / 'one' / 'c0_00.png').unlink()
    with pytest.raises(ValueError, match='one has no image'):
        updated(tmp_path / 'one', saved, tmp_path / 'index')
    (tmp_path / 'one' / 'broken.png').write_bytes(b'no image')
    assert updated(tmp_path / 'one', saved, tmp_path / 'other') == {'broken': 1}
    assert_holds(tmp_path / 'other', {})


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'modality': 'infrared'}, 'it has modality visible, not infrared'),
        ({'size': (32, 16)}, r'it has size \(64, 32\), not \(32, 16\)'),
        ({'features': 'before-bn'}, 'it has features after-bn, not before-bn'),
        ({'model': 'vireid_dml_r10t.synthvi'}, 'it has weights .*, not '),
        ({'source': 'other'}, 'none of the 24 images in .* is in the gallery given'),
        ({'source': 'nowhere'}, 'there is no folder or CSV file'),
    ],
)
def test_an_index_by_another_model_is_left_alone(
    options: dict, message: str, images: Path, saved: Path, tmp_path: Path
) -> None:
    updated(images, saved, tmp_path / 'index')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'index').iterdir()}
    write_images(tmp_path / 'other', 'a.png')
    settings = {'source': images, 'model': saved, 'modality': 'visible'} | options
    settings['source'] = tmp_path / settings['source']
    with pytest.raises((ValueError, OSError), match=message):
        update_index(tmp_path / 'index', **settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'index').iterdir()} == before


def test_other_weights_in_the_same_folder_are_noticed(images: Path, copy: Path, tmp_path: Path) -> None:
    from vireid_timm.hub.folder import save_model_folder

    updated(images, copy, tmp_path / 'index')
    model = load_model(copy)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    save_model_folder(model, copy, input_size=(3, 64, 32))
    with pytest.raises(ValueError, match='it has weights .*, not .*Use the model and the settings'):
        update_index(tmp_path / 'index', images)
    assert main(['search', str(images), '--index', str(tmp_path / 'index'), '--modality', 'infrared']) == 1


def test_what_a_first_call_needs(images: Path, saved: Path, tmp_path: Path) -> None:
    for options, missing in (
        ({}, '--model and --modality'),
        ({'model': saved}, '--modality'),
        ({'modality': 'visible'}, '--model'),
    ):
        with pytest.raises(ValueError, match=f'making one needs {missing}$'):
            update_index(tmp_path / 'index', images, **options)
    assert not (tmp_path / 'index').exists()


def test_compressed_features_follow_the_index(
    images: Path, saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    pytest.importorskip('faiss')
    output, words = tmp_path / 'index', [str(images), '--index', str(tmp_path / 'index'), '--modality', 'infrared']

    def results() -> list[list[str]]:
        capfd.readouterr()
        assert main(['search', *words, '--device', 'cpu', '--json', '--top', '5']) == 0
        answers = json.loads(capfd.readouterr().out)  # FAISS prints nothing in between
        return [[result['path'] for result in answer['results']] for answer in answers]

    assert main(command(images, output, saved)) == 0
    exact = results()
    assert main(command(images, output, saved, '--compress')) == 0
    assert (output / 'compressed-0').is_dir() and results() == exact
    write_images(images, 'new/0.png', 'new/1.png')
    assert updated(images, saved, output) == {'new': 2, 'unchanged': 24}
    index = Index(output)
    assert index.about.compress and index.candidates(index.view()).count == 24  # two more do not pay
    index.close()
    found = results()
    assert main(command(images, output, saved, '--no-compress')) == 0
    assert not list(output.glob('compressed*')) and results() == found
    assert main(command(images, output, saved, '--compress')) == 0
    for number in (0, 1, 2):
        shutil.rmtree(images / str(number))
    assert updated(images, saved, output) == {'dropped': 18, 'unchanged': 8}
    assert [path.name for path in output.glob('compressed*')] == ['compressed-1']
    found = results()
    assert main(command(images, output, saved, '--no-compress')) == 0 and results() == found
