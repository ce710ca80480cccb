"""What the charts show, read back from what is drawn, and that nobody's name spoils them."""

import csv
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image

from vireid_timm.data.readers import create_dataset
from vireid_timm.data.records import Records
from vireid_timm.evaluation.evaluate import evaluate_features
from vireid_timm.evaluation.report import Report
from vireid_timm.figures import features as feature_charts
from vireid_timm.figures.charts import COLOURS, label, new_figure, save_figure
from vireid_timm.figures.cmc import save_cmc
from vireid_timm.figures.curves import read_summary, save_curves
from vireid_timm.figures.features import principal_components, sample, save_map, save_similarities


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved, to be looked at as objects."""
    figures = []
    savefig = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        'savefig',
        lambda figure, *args, **options: (figures.append(figure), savefig(figure, *args, **options)),
    )
    return figures


def _rows(count: int, shift: float = 0.0) -> list[dict]:
    return [
        {
            **{'epoch': epoch, 'train_loss': 9.0 - epoch + shift, 'train_triplet': 1.0, 'train_accuracy': 0.5},
            **{'lr': 0.1, 'eval_rank1': 0.1 * epoch if epoch % 2 else '', 'eval_mAP': 0.2 * epoch if epoch % 2 else ''},
        }
        for epoch in range(count)
    ]


def _lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data())) for line in axes.lines}


def test_curves_of_one_run_have_every_term_and_of_several_the_total(tmp_path: Path, drawn: list) -> None:
    save_curves({'run': _rows(4)}, tmp_path / 'one.png')
    losses, rate, validation = drawn[0].axes
    assert _lines(losses) == {
        'loss': [(0, 9), (1, 8), (2, 7), (3, 6)],
        'triplet': [(epoch, 1) for epoch in range(4)],
    }
    assert _lines(rate)['lr'] == [(epoch, 0.1) for epoch in range(4)]
    assert _lines(validation)['rank1'] == [(1, 0.1), (3, pytest.approx(0.3))]
    save_curves({'a': _rows(4), 'b': _rows(2, 5.0), 'c': []}, tmp_path / 'several.png')
    losses, rate, validation = drawn[1].axes
    assert _lines(losses) == {'a': [(0, 9), (1, 8), (2, 7), (3, 6)], 'b': [(0, 14), (1, 13)]}
    assert set(_lines(validation)) == {'a: mAP', 'a: rank-1', 'b: mAP', 'b: rank-1'}
    assert len({line.get_color() for line in losses.lines}) == 2


def test_a_summary_is_read_back_and_anything_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='there is no .*summary.csv'):
        read_summary(tmp_path)
    path = tmp_path / 'summary.csv'
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(_rows(1)[0]))
        writer.writeheader()
        writer.writerows(_rows(3))
    assert [row['train_loss'] for row in read_summary(tmp_path / 'last.pth')] == ['9.0', '8.0', '7.0']
    for text in ('', 'epoch,train_loss\n', 'epoch,train_loss\nfirst,2\n', 'a,b\n1,2\n', 'epoch,lr\n1,\xff\n', '\0'):
        path.write_bytes(text.encode('latin-1'))
        with pytest.raises(ValueError, match='summary.csv'):
            read_summary(tmp_path)


def _report(seed: int, *protocols: str) -> Report:
    dataset = create_dataset('synthetic', identities=2, test_identities=8, size=(32, 16))
    features = torch.randn(len(dataset.test), 8, generator=torch.Generator().manual_seed(seed))
    return evaluate_features(torch.nn.functional.normalize(features), dataset, protocols or None)


def test_cmc_has_a_line_and_a_band_for_every_report(tmp_path: Path, drawn: list) -> None:
    reports = {'first': _report(0), 'second': _report(1, 'infrared-to-visible')}
    reports['first'].save(tmp_path / 'first.json')
    reports['first'] = Report.load(tmp_path / 'first.json')
    save_cmc(reports, tmp_path / 'cmc.png')
    charts = {axes.get_title(): axes for axes in drawn[0].axes}
    assert [len(axes.lines) for axes in charts.values()] == [1, 2, 1]
    for (name, report), line in zip(reports.items(), charts['infrared-to-visible'].lines, strict=True):
        result = report['infrared-to-visible']
        np.testing.assert_allclose(line.get_ydata(), 100 * np.asarray(result.cmc['mean']))
        for k in (1, 5, 10, 20):
            assert result.cmc['mean'][k - 1] == pytest.approx(result.mean[f'rank{k}'], abs=1e-6), name
        assert all(low <= mean <= high for low, mean, high in zip(*(result.cmc[p] for p in ('low', 'mean', 'high'))))
        assert (result.cmc['low'][0], result.cmc['high'][0]) == pytest.approx(result.intervals['rank1'], abs=1e-6)
    reports['first'].protocols['mixed'].cmc.clear()
    with pytest.raises(ValueError, match='first was written by a version'):
        save_cmc(reports, tmp_path / 'cmc.png')


def _test_images(people: int = 3, images: int = 2) -> Records:
    return Records.from_rows(
        [
            (f'{person}-{modality}-{camera}-{image}', f'{person}', camera, modality, 'test')
            for person in range(people)
            for modality, cameras in (('visible', (1, 2)), ('infrared', (3,)))
            for camera in cameras
            for image in range(images)
        ]
    )


def test_histograms_count_every_pair_once_but_those_of_one_camera(tmp_path: Path, drawn: list) -> None:
    records = _test_images()
    features = torch.nn.functional.normalize(torch.randn(len(records), 4, generator=torch.Generator().manual_seed(0)))
    save_similarities(features, records, tmp_path / 'similarities.png')
    counts = {}
    for i in range(len(records)):
        for j in range(i):
            same = records.identity[i] == records.identity[j]
            if not (same and records.camera[i] == records.camera[j]):
                kind = (bool(records.modality[i] == records.modality[j]), bool(same))
                counts.setdefault(kind, []).append(float(features[i] @ features[j]))
    for axes, within in zip(drawn[0].axes, (True, False), strict=True):
        shown = [text.get_text() for text in axes.get_legend().get_texts()]
        for text, same in zip(shown, (True, False), strict=True):
            pairs = counts[within, same]
            assert f'{len(pairs):,} pairs, mean {np.mean(pairs):.2f}' in text
    for few in (records[records.modality == 'visible'], records[:1], records[:2]):
        save_similarities(features[: len(few)], few, tmp_path / 'similarities.png')


def test_the_map_shows_every_image_by_modality_and_a_few_people_by_identity(tmp_path: Path, drawn: list) -> None:
    records = _test_images(people=len(COLOURS) + 2)
    features = torch.randn(len(records), 5, generator=torch.Generator().manual_seed(0))
    save_map(features, records, tmp_path / 'features.png')
    left, right = drawn[0].axes
    assert sum(len(points.get_offsets()) for points in left.collections) == len(records)
    assert len(right.get_legend().get_texts()) == len(COLOURS) and len(right.collections) == 2 * len(COLOURS)
    save_map(features[:3], records[:3], tmp_path / 'features.png')
    assert len(drawn[1].axes[1].get_legend().get_texts()) == 1


def test_components_are_those_of_the_covariance() -> None:
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    points, shares = principal_components(features)
    values, directions = np.linalg.eigh(np.cov(features.numpy().T.astype(np.float64)))
    centred = features.numpy() - features.numpy().mean(axis=0)
    for i in (0, 1):
        np.testing.assert_allclose(np.abs(points[:, i]), np.abs(centred @ directions[:, -1 - i]), atol=1e-5)
        assert shares[i] == pytest.approx(values[-1 - i] / values.sum())
        assert points[np.abs(points[:, i]).argmax(), i] > 0
    assert np.isfinite(principal_components(torch.ones(4, 3))[1]).all()


def test_a_sample_has_whole_people(monkeypatch: pytest.MonkeyPatch) -> None:
    records = _test_images(people=10)
    assert sample(records).tolist() == list(range(len(records)))
    monkeypatch.setattr(feature_charts, 'MOST_IMAGES', 20)
    rows = sample(records)
    assert len(rows) == 18 and (np.diff(rows) > 0).all() and len(set(records.identity[rows])) == 3
    assert (sample(records) == rows).all() and (sample(records, seed=1) != rows).any()
    monkeypatch.setattr(feature_charts, 'MOST_IMAGES', 4)  # fewer than one person has
    assert len(sample(records)) == 4


@pytest.mark.parametrize('name', ['_hidden', '$5', '张', 'a\udcd5', r'\alpha$', 'é_1'])
def test_any_name_can_be_in_a_legend(name: str, tmp_path: Path) -> None:
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.plot([0, 1], label=label(name))
    assert len(axes.legend().get_texts()) == 1
    save_figure(figure, tmp_path / 'chart.png')
    assert np.asarray(Image.open(tmp_path / 'chart.png')).shape[:2] == (300, 450)
