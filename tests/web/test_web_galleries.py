"""What the web demo searches, and what it says, without a server."""

import html
import re
import shutil
from pathlib import Path

import pytest
from web_demo import BROKEN

from vireid_timm.constants import MODALITIES
from vireid_timm.retrieval.gallery import Gallery
from vireid_timm.web import galleries as web_galleries
from vireid_timm.web.app import LARGEST_IMAGE, Shown, explanation_of, show
from vireid_timm.web.galleries import Query, example_queries, open_galleries, other_modality, render_galleries

pytestmark = pytest.mark.usefixtures('one_thread')

PEOPLE = 6
Galleries = dict[str, Gallery]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('galleries')


@pytest.fixture(scope='module')
def rendered(folder: Path) -> Galleries:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web_galleries, 'PEOPLE', PEOPLE)
        return render_galleries(folder, 'cpu')


def _uncalibrated(saved: Path, folder: Path, files: list[str]) -> Galleries:
    """A gallery of visible images by a model without calibration."""
    gallery = Gallery.create(folder, saved, 'visible', device='cpu')
    gallery.add(files, identities=['<b>anna</b>', *[None] * (len(files) - 1)])
    gallery.save()
    return {'visible': gallery}


def test_rendered_people_are_searched_in_both_directions(rendered: Galleries) -> None:
    assert set(rendered) == set(MODALITIES)
    examples = example_queries(rendered)
    for modality, queries in examples.items():
        assert len(queries) == len(set(queries)) == web_galleries.EXAMPLES
        for query in queries:
            assert query.modality == modality and Path(query.path).is_file()
        (answer,) = rendered[other_modality(modality)].search([queries[0].path], modality, top=20)
        assert {match.identity for match in answer.results} == {f'{number:05}' for number in range(PEOPLE)}
        assert answer.nobody is not None and answer.results[0].probability is not None


def test_indexes_are_opened_by_modality(folder: Path, rendered: Galleries) -> None:
    indexes = [folder / f'{modality}_index' for modality in MODALITIES]
    both = open_galleries(indexes, 'cpu')
    assert {modality: len(gallery) for modality, gallery in both.items()} == dict.fromkeys(MODALITIES, 2 * PEOPLE)
    one = open_galleries(indexes[:1], 'cpu')
    assert example_queries(one) == {'infrared': []}  # an index of visible images is searched by infrared ones


def test_an_incomplete_index_is_named(
    saved: Path, image_files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gallery = Gallery.create(tmp_path / 'index', saved, 'visible', device='cpu')
    gallery.add([image_files / 'visible.png'])
    gallery.index.expect(3)
    gallery.save()
    gallery.close()
    assert set(open_galleries([tmp_path / 'index'], 'cpu')) == {'visible'}
    assert 'index is incomplete: 3 images are still to come' in caplog.text


def test_indexes_that_do_not_fit_are_named(folder: Path, rendered: Galleries, tmp_path: Path, saved: Path) -> None:
    index = folder / 'visible_index'
    with pytest.raises(ValueError, match=f'{index} and {index} both have visible images'):
        open_galleries([index, index], 'cpu')
    with pytest.raises(FileNotFoundError, match='nowhere'):
        open_galleries([tmp_path / 'nowhere'], 'cpu')
    Gallery.create(tmp_path / 'empty', saved, 'visible', device='cpu').save()
    with pytest.raises(ValueError, match='empty has no image'):
        open_galleries([tmp_path / 'empty'], 'cpu')
    shutil.copytree(saved, tmp_path / 'model')
    made = Gallery.create(tmp_path / 'made', tmp_path / 'model', 'visible', device='cpu')
    made.add([example_queries(rendered)['visible'][0].path])
    made.save()
    made.close()
    shutil.rmtree(tmp_path / 'model')
    with pytest.raises((ValueError, OSError), match='model'):  # when it starts, not when somebody searches
        open_galleries([tmp_path / 'made'], 'cpu')


@pytest.mark.parametrize('modality', MODALITIES)
def test_an_answer_shows_what_was_found(rendered: Galleries, modality: str) -> None:
    query = example_queries(rendered)[modality][2]
    shown, answer, explanation = show(rendered, query)
    (expected,) = rendered[other_modality(modality)].search([query.path], modality)
    assert shown == Shown(query, [match.path for match in expected.results]) and explanation == ''
    assert re.findall(r'data-rank="(\d+)"', answer) == [str(rank) for rank in range(1, 11)]
    assert re.findall(r'similarity (-?[\d.]+)', answer) == [f'{match.similarity:.3f}' for match in expected.results]
    assert re.findall(r'class="result (hit|miss)"', answer) == [
        'hit' if match.identity == query.identity else 'miss' for match in expected.results
    ]
    percents = re.findall(r'<b>(?:&[lg]t; )?(\d+) %</b>', answer)
    odds = [expected.nobody, *(match.probability for match in expected.results)]
    assert [int(percent) for percent in percents] == [min(max(round(100 * p), 1), 99) for p in odds]


def test_an_upload_has_no_marks(rendered: Galleries, image_files: Path) -> None:
    _, answer, _ = show(rendered, Query(str(image_files / 'visible.png'), 'visible', is_upload=True))
    assert 'Your visible image' in answer and 'class="mark"' not in answer


@pytest.mark.parametrize('name', [*BROKEN, 'gone.png'])
def test_a_broken_image_is_a_message_without_its_folder(rendered: Galleries, image_files: Path, name: str) -> None:
    query = Query(str(image_files / name), 'infrared', is_upload=True)
    shown, answer, _ = show(rendered, query)
    assert shown == Shown(query) and 'role="alert"' in answer
    assert html.unescape(answer).partition('>')[2].startswith(f'{name}: this image cannot be read')
    assert BROKEN.get(name, 'no such file') in answer and str(image_files) not in answer and 'skip' not in answer
    assert f'{LARGEST_IMAGE:,}' in BROKEN['bomb.png']


def test_a_model_without_calibration_gives_no_percentages(saved: Path, tmp_path: Path, image_files: Path) -> None:
    gone = tmp_path / 'gone.png'
    shutil.copy(image_files / 'visible.png', gone)
    galleries = _uncalibrated(saved, tmp_path / 'index', [str(image_files / 'visible.png'), str(gone)])
    gone.unlink()
    query = Query(str(image_files / 'infrared.png'), 'infrared', is_upload=True)
    shown, answer, _ = show(galleries, query)
    assert '%</b>' not in answer and 'not calibrated' in answer and answer.count('data-rank=') == 2
    assert 'person &lt;b&gt;anna&lt;/b&gt;' in answer and 'this file cannot be read' in answer
    rank = shown.results.index(str(gone)) + 1
    assert 'gone.png: this image cannot be read' in explanation_of(galleries, shown, rank)


def test_an_explanation_is_drawn_for_a_result(rendered: Galleries, image_files: Path) -> None:
    shown, _, _ = show(rendered, Query(str(image_files / 'infrared.png'), 'infrared', is_upload=True))
    drawn = explanation_of(rendered, shown, 2)
    assert 'in result 2' in drawn and 'src="data:image/jpeg;base64,' in drawn
    assert explanation_of(rendered, shown, 0) == explanation_of(rendered, shown, 11) == ''
    assert explanation_of(rendered, Shown(), 1) == ''
