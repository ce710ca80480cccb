"""`vireid index` and `vireid search` as a user calls them."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vireid_timm.cli.main import main
from vireid_timm.data.readers import synthetic_records
from vireid_timm.evaluation.features import embed
from vireid_timm.hub.folder import load_model
from vireid_timm.synthvi.render import render_address

MODEL = 'vireid_dml_r10t.synthvi'
KEYS = ['path', 'camera', 'time', 'identity', 'similarity', 'probability']

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `visible/<person>/` and `infrared/<person>/`, a table of the former, and indexes of both."""
    home = tmp_path_factory.mktemp('home')
    records = synthetic_records(range(6), split='test', images_per_modality=3, size=(64, 32))
    lines = ['path,camera,time,identity']
    for row in range(len(records)):
        one = records[[row]]
        path = home / one.modality[0] / one.identity[0] / f'c{one.camera[0]}_{row:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render_address(one.path[0])).save(path)
        if one.modality[0] == 'visible':
            identity = '' if row % 6 == 0 else one.identity[0]
            lines.append(f'{path.relative_to(home)},{one.camera[0]},2026-11-01T{row % 24:02}:30,{identity}')
    (home / 'gallery.csv').write_text('\n'.join(lines))
    for source, output in (('visible', 'plain'), ('gallery.csv', 'index')):
        words = ['index', str(home / source), '--output', str(home / output), '--modality', 'visible', '--model', MODEL]
        assert main([*words, '--device', 'cpu']) == 0
    return home


def search(home: Path, *words: object, index: str = 'index') -> int:
    return main(['search', *map(str, words), '--index', str(home / index), '--modality', 'infrared', '--device', 'cpu'])


def found(capsys: pytest.CaptureFixture, home: Path, *words: object, index: str = 'index') -> list[dict]:
    assert search(home, *words, '--json', index=index) == 0
    answers = json.loads(capsys.readouterr().out)
    for answer in answers:
        assert list(answer) == ['query', 'nobody', 'results']
        assert all(list(result) == KEYS for result in answer['results'])
    return answers


def brute_force(queries: Sequence[Path], gallery: Sequence[Path]) -> np.ndarray:
    model = load_model(MODEL)
    tables = [
        embed(model, list(paths), modality)[0] for paths, modality in ((queries, 'infrared'), (gallery, 'visible'))
    ]
    return (tables[0] @ tables[1].T).numpy()


def test_json_is_what_a_comparison_of_all_images_finds(home: Path, capsys: pytest.CaptureFixture) -> None:
    queries, gallery = (sorted((home / name).rglob('*.png')) for name in ('infrared', 'visible'))
    similarity = brute_force(queries, gallery)
    answers = found(capsys, home, home / 'infrared', '--top', 4, index='plain')
    assert [answer['query'] for answer in answers] == list(map(str, queries)) and len(answers) == 18
    for row, answer in enumerate(answers):
        values = [result['similarity'] for result in answer['results']]
        assert values == pytest.approx(sorted(similarity[row], reverse=True)[:4], abs=2e-3)
        for result in answer['results']:
            path = Path(result['path'])
            assert result['similarity'] == pytest.approx(similarity[row, gallery.index(path)], abs=2e-3)
            assert result['camera'] == int(path.name[1]) and result['time'] is None and result['identity'] is None


def test_probabilities_are_null_without_calibration(
    home: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = str(tmp_path / 'index')
    words = ['index', str(home / 'visible'), '--output', output, '--modality', 'visible', '--model', str(saved)]
    assert main([*words, '--device', 'cpu']) == 0
    capsys.readouterr()
    for index, is_known in (('index', True), (output, False)):
        for answer in found(capsys, home, home / 'infrared' / '00001', index=index):
            values = [answer['nobody'], *(result['probability'] for result in answer['results'])]
            assert all(0 < value < 1 if is_known else value is None for value in values)


def test_columns_of_a_csv_file_filter_and_come_back(home: Path, capsys: pytest.CaptureFixture) -> None:
    query = home / 'infrared' / '00002'
    where = "camera != 3 and time > '2026-11-01T08:30'"
    for answer in found(capsys, home, query, '--where', where, '--top', 99):
        assert answer['results']
        for result in answer['results']:
            assert result['camera'] != 3 and result['time'] > '2026-11-01T08:30:00' and result['identity'] != ''
    everything = found(capsys, home, query, '--top', 99)[0]['results']
    kept = [r['path'] for r in everything if r['camera'] != 3 and r['time'] > '2026-11-01T08:30:00']
    assert [r['path'] for r in found(capsys, home, query, '--where', where, '--top', 99)[0]['results']] == kept
    by_identity = found(capsys, home, query, '--by-identity', '--top', 99)[0]['results']
    best, seen = [], set()
    for result in everything:
        if result['identity'] is None or result['identity'] not in seen:
            best.append(result)
        seen.add(result['identity'])
    assert [r['path'] for r in by_identity] == [r['path'] for r in best]
    assert None in seen and len(best) < len(everything)
    assert search(home, query, '--where', 'identity != "00002"') == 0
    assert '6 images have no identity, so no comparison of it finds them' in capsys.readouterr().err


def test_a_folder_may_be_one_query(home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    answers = found(capsys, home, 'infrared/00001', 'infrared/00004/', '--tracklet', '--top', 3)
    assert [answer['query'] for answer in answers] == ['infrared/00001', 'infrared/00004/']
    assert answers[0]['nobody'] is None and answers[0]['results'][0]['probability'] is None
    mean = brute_force(sorted((home / 'infrared' / '00001').iterdir()), sorted((home / 'visible').rglob('*.png')))
    assert answers[0]['results'][0]['similarity'] > mean.mean(axis=0).max()  # averaged features are normalised again
    assert [answer['query'] for answer in found(capsys, home, 'infrared/00001')] == sorted(
        str(path) for path in Path('infrared/00001').iterdir()
    )
    assert search(home, 'infrared/00001', home / 'gallery.csv', '--tracklet') == 1
    assert 'gallery.csv is no folder; each tracklet' in capsys.readouterr().err


def test_a_table_for_people(home: Path, capsys: pytest.CaptureFixture) -> None:
    query = next((home / 'infrared' / '00003').iterdir())
    assert search(home, query, '--top', 2) == 0
    name, header, *lines = capsys.readouterr().out.splitlines()
    assert name.startswith(f'{query} (not in the gallery: ')
    assert header.split() == ['rank', 'similarity', 'probability', 'camera', 'time', 'identity', 'path']
    assert len(lines) == 2 and str(home / 'visible') in lines[0]
    assert search(home, query, '--where', 'camera = 99') == 0
    assert 'no result' in capsys.readouterr().out
    assert search(home, query, '--top', 2, index='plain') == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        *('rank', 'similarity', 'probability', 'camera', 'path'),
    ]


def test_pages_and_pictures(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    queries = tmp_path / 'queries.csv'
    paths = sorted((home / 'infrared').rglob('*.png'))[:4]
    queries.write_text('path,identity\n' + '\n'.join(f'{path},{path.parent.name}' for path in paths))
    page, picture = tmp_path / 'results.html', tmp_path / 'found.png'
    assert search(home, queries, '--page', page, '--picture', picture, '--top', 3) == 0
    text = page.read_text(encoding='utf-8')
    assert text.count('class="query"') == 4 and text.count('class="hit"') + text.count('class="miss"') > 0
    with Image.open(picture) as image:
        assert image.format == 'PNG' and image.width > 4 * 64
    assert search(home, paths[0], '--page', page, index='plain') == 0
    assert 'class="hit"' not in page.read_text(encoding='utf-8')


def test_centring_is_named(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert search(home, home / 'infrared', '--centre', '--top', 1) == 0
    assert 'Centred: the mean of the 18 queries' in capsys.readouterr().err
    assert search(home, home / 'infrared' / '00000', '--centre') == 1
    assert 'centring takes the mean of the queries, and 3 are too few' in capsys.readouterr().err


def test_unreadable_queries(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / os.fsdecode(b'caf\xe9')
    shutil.copytree(home / 'infrared' / '00000', folder)
    (folder / 'broken.png').write_bytes(b'no image')
    answers = found(capsys, home, folder)
    assert len(answers) == 3 and answers[0]['query'].startswith(str(folder))
    assert search(home, folder) == 0
    assert '1 queries cannot be read and are left out' in capsys.readouterr().err
    broken = shutil.copy(folder / 'broken.png', tmp_path)
    assert search(home, broken) == 1
    assert 'broken.png: this image cannot be read' in capsys.readouterr().err
    assert search(home, broken, broken) == 1
    assert 'none of the queries can be read' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['infrared', '--index', 'nowhere'], 'there is no index in nowhere; make one with: vireid index'),
        (['infrared', '--index', 'visible'], 'there is no index in visible'),
        (['nowhere.jpg'], 'there is no query nowhere.jpg: no such image, folder or CSV file'),
        (['index'], 'index has no image'),
        (['infrared', '--top', '0'], '--top must be at least 1, got 0'),
        (['infrared', '--where', 'camra = 3'], 'no such column: camra'),
        (['infrared', '--where', '1; DROP TABLE images'], 'expected an SQL expression over path, camera, time'),
        (['infrared', '--model', 'vireid_dml_r10t.unknown'], 'vireid_dml_r10t.unknown'),
        (['infrared', '--picture', 'found.jpg'], '--picture found.jpg: expected the name of a PNG file'),
        (['infrared', '--page', 'gallery.csv/page.html'], 'gallery.csv'),
        (['infrared', '--device', 'gpu'], "unknown device 'gpu'"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    defaults = {'--index': 'index', '--modality': 'infrared', '--device': 'cpu'}
    rest = [word for flag, value in defaults.items() if flag not in words for word in (flag, value)]
    assert main(['search', *words, *rest]) == 1
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1] and 'Traceback' not in said.err and not said.out


def test_mistakes_of_index_are_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    (tmp_path / 'file').touch()
    for words, message in (
        ('visible --output new', 'there is no index in new yet, and making one needs --model and --modality'),
        ('nowhere --output index', 'there is no folder or CSV file nowhere'),
        ('infrared --output plain', 'none of the 18 images in plain is in the gallery given'),
        ('visible --output plain --modality infrared', 'it has modality visible, not infrared'),
        ('visible --output plain --input-size 3 32 16', 'it has size (128, 64), not (32, 16)'),
        ('visible --output plain --input-size 32 16 3', '--input-size 32 16 3: expected channels, height and width'),
        ('visible --output infrared --modality visible --model vireid_dml_r10t.synthvi', 'holds other files'),
        (f'visible --output {tmp_path}/file/x --modality visible --model {MODEL}', 'file'),
        ('visible --output plain --batch-size 0', 'batch_size must be at least 1'),
    ):
        assert main(['index', *words.split(), '--device', 'cpu']) == 1, words
        said = capsys.readouterr()
        last = said.err.splitlines()[-1]
        assert message in last and 'Traceback' not in said.err and 'fault of' not in last and not said.out, last
    assert not (home / 'new').exists()
