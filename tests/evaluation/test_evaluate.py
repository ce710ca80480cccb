"""The evaluation on rendered images against the same steps, one by one."""

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils import ModelEmaV3

from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data.images import ImageError, load_image
from vireid_timm.data.readers import create_dataset
from vireid_timm.data.records import Dataset, Records
from vireid_timm.evaluation import metrics
from vireid_timm.evaluation.compare import compare
from vireid_timm.evaluation.confidence import bootstrap_intervals
from vireid_timm.evaluation.evaluate import evaluate, evaluate_features
from vireid_timm.evaluation.features import centred, embed, weights_fingerprint
from vireid_timm.evaluation.metrics import rank_metrics
from vireid_timm.evaluation.protocols import draw_trials, protocol_trials, protocols_of
from vireid_timm.evaluation.reranking import ReRanking
from vireid_timm.version import package_versions

SIZE = (64, 32)
EMPTY = Records.from_rows([])


def make_model():
    return timm.create_model('vireid_dml_r10t.synthvi', pretrained=True, num_classes=0).eval()


@pytest.fixture(scope='module')
def model():
    return make_model()


@pytest.fixture(scope='module')
def dataset():
    return create_dataset('synthetic', identities=0, test_identities=6, images_per_modality=2, size=SIZE)


@pytest.fixture(scope='module')
def saved(dataset, tmp_path_factory):
    """The dataset's images as files, as a folder dataset with a query and a gallery side."""
    root = tmp_path_factory.mktemp('folder')
    rows = []
    for i in range(len(dataset.test)):
        records = dataset.test[[i]]
        path = root / f'{i:03d}.png'
        Image.fromarray(load_image(records.path[0], SIZE)).save(path)
        rows.append((str(path), records.identity[0], 0, records.modality[0], ('query', 'gallery', 'test')[i % 3]))
    return Dataset('folder', str(root), EMPTY, Records.from_rows(rows), {'test_share': 0.2})


def network_input(model, path, size):
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    image = torch.from_numpy(np.array(load_image(str(path), size))).permute(2, 0, 1) / 255
    return ((image - mean) / std)[None]


def naive_features(model, paths, modalities, size=SIZE):
    """Pass one image at a time through the network's public call."""
    with torch.no_grad():
        return torch.cat(
            [
                F.normalize(model(**{str(modality): network_input(model, path, size)}))
                for path, modality in zip(paths, modalities, strict=True)
            ]
        )


@pytest.fixture(scope='module')
def expected_features(model, dataset):
    return naive_features(model, dataset.test.path, dataset.test.modality)


def random_features(dataset, dimension=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(len(dataset.test), dimension, generator=generator))


def sysu_like(identities=5):
    """Every identity in every camera of SYSU-MM01, except the first, which is in one infrared camera only."""
    rows = []
    for number in range(identities):
        for camera in (1, 2, 3, 4, 5, 6) if number else (3,):
            modality = INFRARED if camera in (3, 6) else VISIBLE
            for file in range(3):
                rows.append((f'cam{camera}/{number:04d}/{file:04d}.jpg', f'{number:04d}', camera, modality, 'test'))
    return Dataset('sysu_mm01', 'root', EMPTY, Records.from_rows(rows))


def interval(values):
    return tuple(bootstrap_intervals(np.asarray(values)[None])[0])


def metrics_of(dataset, trial, similarity, per_identity_cmc=False):
    """Return the metrics of one trial, given the similarities of all test images."""
    identity = dataset.test.identity
    return rank_metrics(
        similarity[trial.query][:, trial.gallery],
        identity[trial.query],
        identity[trial.gallery],
        ignore=trial.ignore,
        per_identity_cmc=per_identity_cmc,
    )


def test_other_models_are_refused(dataset):
    with pytest.raises(ValueError, match='ResNet is not a model of vireid_timm'):
        evaluate(timm.create_model('resnet10t', num_classes=0), dataset)


@pytest.mark.parametrize('wrapper', [lambda model: torch.compile(model, backend='eager'), ModelEmaV3])
def test_wrapped_models_give_the_report_of_the_model(model, dataset, wrapper):
    options = dict(size=SIZE, protocol='infrared-to-visible')
    assert evaluate(wrapper(model), dataset, **options) == evaluate(model, dataset, **options)


def test_features_that_are_not_finite_name_the_image(dataset, saved):
    model = make_model()
    with torch.no_grad():
        model.stem.infrared.conv1[0].weight.fill_(math.nan)
    first = saved.test.path[saved.test.modality == INFRARED][0]
    with pytest.raises(ValueError, match=f'{first}.*not finite'):
        evaluate(model, saved, size=SIZE, cache='ram')
    features = random_features(dataset)
    features[4, 2] = math.inf
    with pytest.raises(ValueError, match=str(dataset.test.path[4])):
        evaluate_features(features, dataset)


def test_evaluate_is_embed_then_rank(model, dataset, expected_features):
    features = expected_features
    report = evaluate(model, dataset, size=SIZE, batch_size=5)
    assert list(report.protocols) == ['visible-to-infrared', 'infrared-to-visible', 'mixed']
    for protocol in ('visible-to-infrared', 'infrared-to-visible'):
        result = report[protocol]
        (trial,) = protocol_trials(dataset, protocol)
        identity = dataset.test.identity
        expected = rank_metrics(
            features[trial.query] @ features[trial.gallery].T, identity[trial.query], identity[trial.gallery]
        )
        assert result.mean['mAP'] == pytest.approx(expected.mAP)
        assert result.mean['mINP'] == pytest.approx(expected.mINP)
        for k in (1, 5, 10, 20):
            assert result.mean[f'rank{k}'] == pytest.approx(expected.cmc[k - 1])
        assert result.intervals['mAP'] == pytest.approx(interval(expected.ap))
        assert result.intervals['mAP'][0] < result.mean['mAP'] < result.intervals['mAP'][1]
        assert (result.num_queries, result.num_valid_queries, result.gallery_size) == (12, 12, 12)
        assert result.direction == protocol.replace('-', ' ')
        assert result.draw is None and not result.per_identity_cmc
        assert set(result.std.values()) == {0.0} and result.trials == [result.mean]


@pytest.mark.parametrize('kind', ['after-bn', 'before-bn'])
def test_a_report_has_the_metrics_of_the_other_features(model, dataset, kind):
    (other,) = {'after-bn', 'before-bn'} - {kind}
    report = evaluate(model, dataset, size=SIZE, features=kind, flip_test=True)
    of_other = evaluate(model, dataset, size=SIZE, features=other, flip_test=True)
    for name, result in report.protocols.items():
        assert result.other_features == pytest.approx(of_other[name].mean)
        assert result.other_features != pytest.approx(result.mean)
        assert of_other[name].other_features == pytest.approx(result.mean)
    reranked = evaluate(model, dataset, 'mixed', size=SIZE, reranking='k-reciprocal')
    assert reranked['mixed'].other_features == {}
    given = evaluate_features(embed(model, dataset.test, size=SIZE)[0], dataset)
    assert all(result.other_features == {} for result in given.protocols.values())


def test_only_the_features_that_were_asked_for_have_to_be_finite(dataset):
    model = make_model()
    with torch.no_grad():
        model.joint_head.neck.weight[3] = math.inf
    report = evaluate(model, dataset, size=SIZE, features='before-bn')
    assert all(result.other_features == {} for result in report.protocols.values())
    with pytest.raises(ValueError, match='not finite'):
        evaluate(model, dataset, size=SIZE, features='after-bn')


def test_report_names_what_changes_a_number(model, dataset):
    report = evaluate(model, dataset, 'visible-to-infrared', size=SIZE, features='after-bn', amp_dtype=torch.bfloat16)
    assert (report.dataset, report.options['test_identities'], report.options['seed']) == ('synthetic', 6, 0)
    assert (report.model, report.weights) == ('vireid_dml_r10t', weights_fingerprint(model))
    assert (report.features, report.size, report.precision) == ('after-bn', SIZE, 'bfloat16')
    versions = {'timm': timm.__version__, 'torch': torch.__version__, 'numpy': np.__version__}
    assert report.versions == package_versions() and report.versions.items() >= versions.items()
    assert report.skipped_images == 0
    text = str(report)
    for word in ('synthetic', 'test_identities=6', 'vireid_dml_r10t', report.weights, 'after-bn', '64x32', 'bfloat16'):
        assert word in text


def test_several_trials_and_invalid_queries():
    dataset = sysu_like()
    features = random_features(dataset)
    report = evaluate_features(features, dataset)
    assert tuple(report.protocols) == protocols_of(dataset)
    identity = dataset.test.identity
    for protocol, result in report.protocols.items():
        trials = protocol_trials(dataset, protocol)
        expected = [
            rank_metrics(
                features[trial.query] @ features[trial.gallery].T,
                identity[trial.query],
                identity[trial.gallery],
                ignore=trial.ignore,
                per_identity_cmc=True,
            )
            for trial in trials
        ]
        assert result.mean['mAP'] == pytest.approx(np.mean([metrics.mAP for metrics in expected]))
        assert result.std['mAP'] == pytest.approx(np.std([metrics.mAP for metrics in expected]))
        assert result.mean['rank5'] == pytest.approx(np.mean([metrics.cmc[4] for metrics in expected]))
        assert [trial['mINP'] for trial in result.trials] == [metrics.mINP for metrics in expected]
        per_query = np.mean([metrics.ap[metrics.valid] for metrics in expected], axis=0)
        assert result.intervals['mAP'] == pytest.approx(interval(per_query))
        assert (result.num_queries, result.num_valid_queries) == (27, 24)
        assert result.draw == 'seeded' and result.per_identity_cmc and len(result.trials) == 10
    assert report['all-single'].gallery_size == 16
    assert report['indoor-multi'].gallery_size == 24
    lines = str(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('protocol'))
    table = lines[start : lines.index('', start)]
    assert len({len(line) for line in table if not line.lstrip().startswith('std')}) == 1, 'columns must align'
    assert '24 of 27' in table[1] and '10 seeded' in table[1]
    assert f'{100 * report["all-single"].mean["mAP"]:.2f}' in table[1]
    assert f'{100 * report["all-single"].std["mAP"]:.2f}' in table[2]
    assert lines[-2].startswith('R1 to R20 count distinct identities: all-single, all-multi')


def test_drawn_queries_are_averaged_by_image():
    rows = [
        (f'{folder}/cam{camera}/{number:04d}/{file}.jpg', f'{number:04d}', camera, modality, 'test')
        for folder, modality in (('vis', VISIBLE), ('nir', INFRARED))
        for number in range(4)
        for camera in (1, 2)
        for file in range(3)
    ]
    dataset = Dataset('llcm', 'root', EMPTY, Records.from_rows(rows))
    features = random_features(dataset)
    result = evaluate_features(features, dataset, 'visible-to-infrared-swapped')['visible-to-infrared-swapped']
    assert (result.direction, result.num_queries, result.gallery_size) == ('infrared to visible', 8, 24)
    per_image = {}
    for trial in protocol_trials(dataset, 'visible-to-infrared-swapped'):
        identity = dataset.test.identity
        metrics = rank_metrics(
            features[trial.query] @ features[trial.gallery].T,
            identity[trial.query],
            identity[trial.gallery],
            ignore=trial.ignore,
        )
        for row, precision in zip(trial.query.tolist(), metrics.ap, strict=True):
            per_image.setdefault(row, []).append(precision)
    means = [np.mean(per_image[row]) for row in sorted(per_image)]
    assert result.intervals['mAP'] == pytest.approx(interval(means))


def test_split_column_decides_who_searches(model, saved):
    report = evaluate(model, saved, size=SIZE, cache='ram')
    for protocol, modality in (('visible-to-infrared', VISIBLE), ('infrared-to-visible', INFRARED)):
        searching, searched = saved.test.modality == modality, saved.test.modality != modality
        assert report[protocol].num_queries == (searching & (saved.test.split != 'gallery')).sum()
        assert report[protocol].gallery_size == (searched & (saved.test.split != 'query')).sum()


def test_only_the_rows_of_the_protocol_are_needed():
    dataset = sysu_like()
    features = random_features(dataset)
    outdoor = np.isin(dataset.test.camera, (4, 5))
    expected = evaluate_features(features, dataset, 'indoor-single')
    features[outdoor] = math.nan
    assert evaluate_features(features, dataset, 'indoor-single') == expected
    with pytest.raises(ValueError, match=r'cam4.*not finite'):
        evaluate_features(features, dataset, 'all-multi')


def test_broken_images_are_skipped_and_counted(model, saved, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'no image')
    columns = {
        field: getattr(saved.test, field).copy() for field in ('path', 'identity', 'camera', 'modality', 'split')
    }
    columns['path'] = columns['path'].astype(object)
    columns['path'][[2, 20]] = str(tmp_path / 'broken.png')
    damaged = dataclasses.replace(saved, test=Records(**columns))
    with pytest.raises(ImageError, match=r'broken\.png'):
        evaluate(model, damaged, size=SIZE, cache='ram')
    report = evaluate(model, damaged, size=SIZE, cache='ram', skip_broken=True)
    kept = dataclasses.replace(saved, test=saved.test[[i for i in range(len(saved.test)) if i not in (2, 20)]])
    expected = evaluate(model, kept, size=SIZE, cache='ram')
    assert report.skipped_images == 2
    for protocol, result in report.protocols.items():
        assert dataclasses.replace(result, trials_fingerprint='') == dataclasses.replace(
            expected[protocol], trials_fingerprint=''
        )
        assert result.trials_fingerprint != expected[protocol].trials_fingerprint
    assert '2 broken images skipped' in str(report)


def test_a_broken_image_does_not_change_the_sampling(model, tmp_path):
    rows = []
    for number in range(4):
        for camera, modality in ((1, VISIBLE), (2, VISIBLE), (6, INFRARED)):
            for file in range(3):
                path = tmp_path / f'cam{camera}' / f'{number:04d}' / f'{file:04d}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (8, 16), (9 * number, 9 * camera, 9 * file)).save(path)
                rows.append((str(path), f'{number:04d}', camera, modality, 'test'))
    dataset = Dataset('sysu_mm01', str(tmp_path), EMPTY, Records.from_rows(rows))
    drawn = draw_trials(dataset, 'all-single')[0][1]
    with open(dataset.test.path[drawn[3]], 'wb') as file:
        file.write(b'no image')
    report = evaluate(model, dataset, 'all-single', size=SIZE, cache='ram', skip_broken=True)
    assert report['all-single'].gallery_size == len(drawn) - 1


@pytest.mark.parametrize(
    'convert',
    [
        lambda features: features.numpy(),
        lambda features: features.double(),
        lambda features: features.numpy()[::-1][::-1],
        lambda features: features.requires_grad_(),
    ],
)
def test_features_of_any_kind(dataset, convert):
    expected = evaluate_features(random_features(dataset), dataset)
    result = evaluate_features(convert(random_features(dataset)), dataset)
    assert result['visible-to-infrared'].mean == pytest.approx(expected['visible-to-infrared'].mean)
    read_only = random_features(dataset).numpy()
    read_only.flags.writeable = False
    assert evaluate_features(read_only, dataset) == expected


@pytest.mark.parametrize(
    'features, message',
    [
        (torch.zeros(3, 8), r'features must be \[24, D\], .* got \[3, 8\]'),
        (torch.zeros(24), r'features must be \[24, D\], .* got \[24\]'),
        (torch.zeros(24, 8, dtype=torch.int64), 'features must have a floating-point dtype, got torch.int64'),
        (np.zeros((24, 8), np.uint8), 'features must have a floating-point dtype, got uint8'),
    ],
)
def test_features_that_do_not_fit(dataset, features, message):
    with pytest.raises(ValueError, match=message):
        evaluate_features(features, dataset)


def test_unknown_names_and_empty_choices(model, dataset):
    with pytest.raises(ValueError, match='no protocol .all-single.*visible-to-infrared'):
        evaluate(model, dataset, 'all-single')
    with pytest.raises(ValueError, match='unknown draw'):
        evaluate(model, dataset, draw='lucky')
    with pytest.raises(ValueError, match='no protocol to evaluate; available'):
        evaluate(model, dataset, [])
    with pytest.raises(ValueError, match='no test images'):
        evaluate(model, Dataset('folder', 'root', EMPTY, EMPTY))
    twice = evaluate_features(random_features(dataset), dataset, ['infrared-to-visible', 'infrared-to-visible'])
    assert list(twice.protocols) == ['infrared-to-visible']


def test_unknown_settings(model, dataset):
    with pytest.raises(ValueError, match='unknown reranking .magic.; expected one of none, k-reciprocal'):
        evaluate(model, dataset, reranking='magic')
    for name in ('failures', 'examples'):
        with pytest.raises(ValueError, match=f'{name} must be at least 0'):
            evaluate_features(random_features(dataset), dataset, **{name: -1})
    with pytest.raises(TypeError, match='colour'):
        evaluate(model, dataset, colour=True)


def test_chunks_of_queries_change_nothing(monkeypatch):
    dataset = sysu_like()
    expected = evaluate_features(random_features(dataset), dataset)
    monkeypatch.setattr(metrics, 'CHUNK_ROWS', (1, 100))
    monkeypatch.setattr(metrics, 'CHUNK_CELLS', 200)
    report = evaluate_features(random_features(dataset), dataset)
    for name, result in report.protocols.items():
        assert result.mean == pytest.approx(expected[name].mean)
        assert result.trials_fingerprint == expected[name].trials_fingerprint


def test_mixed_gallery(saved):
    dataset = dataclasses.replace(saved, test=dataclasses.replace(saved.test, camera=np.arange(len(saved.test)) % 3))
    features = random_features(dataset)
    (trial,) = protocol_trials(dataset, 'mixed')
    expected = metrics_of(dataset, trial, features @ features.T)
    result = evaluate_features(features, dataset, 'mixed')['mixed']
    assert result.mean['mAP'] == pytest.approx(expected.mAP)
    assert result.direction == 'both to both'
    assert trial.ignore.any()


@pytest.mark.parametrize('reranking', ['k-reciprocal', 'cross-modality'])
@pytest.mark.parametrize('protocol', ['all-single', 'indoor-multi', 'mixed'])
def test_reranking_is_done_in_each_trial(saved, reranking, protocol):
    dataset = saved if protocol == 'mixed' else sysu_like()
    features = random_features(dataset)
    result = evaluate_features(features, dataset, protocol, reranking=reranking)[protocol]
    modality = dataset.test.modality
    expected = []
    for trial in protocol_trials(dataset, protocol):
        own = [np.flatnonzero(trial.gallery == row) for row in trial.query]
        neighbours = {'query_in_gallery': [int(found[0]) if len(found) else -1 for found in own]}
        if reranking == 'cross-modality':
            neighbours |= {'query_modality': modality[trial.query], 'gallery_modality': modality[trial.gallery]}
        search = ReRanking(features[trial.query], features[trial.gallery], **neighbours)
        similarity = torch.full((len(dataset.test),) * 2, -math.inf)
        rows, columns = torch.from_numpy(trial.query), torch.from_numpy(trial.gallery)
        similarity[rows[:, None], columns] = search.similarity(slice(0, len(rows)))
        expected.append(metrics_of(dataset, trial, similarity, protocol != 'mixed'))
    assert result.mean['mAP'] == pytest.approx(np.mean([found.mAP for found in expected]), abs=1e-5)
    assert result.mean['rank5'] == pytest.approx(np.mean([found.cmc[4] for found in expected]), abs=1e-5)
    plain = evaluate_features(features, dataset, protocol)[protocol]
    assert result.trials_fingerprint == plain.trials_fingerprint
    assert result.mean != plain.mean


def test_reranking_is_named():
    dataset = sysu_like()
    report = evaluate_features(random_features(dataset), dataset, 'all-single', reranking='k-reciprocal')
    assert report.reranking == 'k-reciprocal'
    assert 'k-reciprocal' in str(report)


@pytest.mark.parametrize('reranking', ['none', 'k-reciprocal'])
def test_failures_are_the_worst_queries_and_what_they_found(reranking):
    dataset = sysu_like()
    features = random_features(dataset)
    result = evaluate_features(features, dataset, 'all-multi', failures=7, reranking=reranking)['all-multi']
    trial = protocol_trials(dataset, 'all-multi')[0]
    similarity = features[trial.query] @ features[trial.gallery].T
    if reranking != 'none':
        similarity = ReRanking(features[trial.query], features[trial.gallery]).similarity(slice(None))
    identity = dataset.test.identity
    found = rank_metrics(
        similarity, identity[trial.query], identity[trial.gallery], ignore=trial.ignore, per_identity_cmc=True
    )
    precision = sorted(found.ap[found.valid])
    assert [failure['AP'] for failure in result.failures] == pytest.approx(precision[:7])
    for failure in result.failures:
        (query,) = np.flatnonzero(np.char.endswith(dataset.test.path, failure['path']))
        row = int(np.flatnonzero(trial.query == query)[0])
        assert (failure['identity'], failure['camera']) == (identity[query], dataset.test.camera[query])
        assert (failure['rank'], failure['modality']) == (found.rank[row], INFRARED)
        seen = [column for column in similarity[row].argsort(descending=True).tolist() if not trial.ignore[row, column]]
        best = trial.gallery[seen[:10]]
        assert [answer['identity'] for answer in failure['found']] == identity[best].tolist()
        assert [answer['path'] for answer in failure['found']] == dataset.test.path[best].tolist()
        assert [answer['camera'] for answer in failure['found']] == dataset.test.camera[best].tolist()
        values = similarity[row][seen[:10]].tolist()
        assert [answer['similarity'] for answer in failure['found']] == pytest.approx(values, abs=1e-6)
    everything = evaluate_features(features, dataset, 'all-multi', failures=1000)['all-multi']
    assert len(everything.failures) == everything.num_valid_queries
    assert not evaluate_features(features, dataset, 'all-multi')['all-multi'].failures


def test_examples_are_the_best_and_worst_query_of_different_people_and_random_ones():
    dataset = sysu_like()
    features = random_features(dataset)
    result = evaluate_features(features, dataset, 'all-single', examples=3, failures=1)['all-single']
    everyone = evaluate_features(features, dataset, 'all-single', failures=1000)['all-single'].failures
    extreme = {'best': {}, 'worst': {}}
    for query in everyone:
        extreme['worst'].setdefault(query['identity'], query)
        extreme['best'][query['identity']] = max(query, extreme['best'].get(query['identity'], query), key=_precision)
    assert list(result.examples) == ['best', 'worst', 'random'] and len(result.failures) == 1
    best = sorted(extreme['best'].values(), key=_precision, reverse=True)[:3]
    assert [query['AP'] for query in result.examples['best']] == [query['AP'] for query in best]
    worst = sorted(extreme['worst'].values(), key=_precision)[:3]
    assert [query['AP'] for query in result.examples['worst']] == [query['AP'] for query in worst]
    for listed in result.examples.values():
        assert len({query['identity'] for query in listed}) == 3 and all(query in everyone for query in listed)
    all_people = len(extreme['worst'])
    everything = evaluate_features(features, dataset, 'all-single', examples=1000)['all-single'].examples
    assert {len(listed) for listed in everything.values()} == {all_people}
    assert not evaluate_features(features, dataset, 'all-single')['all-single'].examples


def _precision(query):
    return query['AP']


def test_results_can_be_paired_where_the_images_are_the_same():
    dataset = sysu_like()
    first, second = (evaluate_features(random_features(dataset, seed=seed), dataset) for seed in (0, 1))
    assert [result.trials_fingerprint for result in first.protocols.values()] == [
        result.trials_fingerprint for result in second.protocols.values()
    ]
    assert len({result.trials_fingerprint for result in first.protocols.values()}) == 4
    moved = dataclasses.replace(dataset, root='')
    assert evaluate_features(random_features(dataset), moved)['all-single'].trials_fingerprint == (
        first['all-single'].trials_fingerprint
    ), 'the paths of this table are not below its root'
    fewer = dataclasses.replace(dataset, test=dataset.test[1:])
    assert evaluate_features(random_features(fewer), fewer)['all-single'].trials_fingerprint != (
        first['all-single'].trials_fingerprint
    )
    paired = compare(first, second)
    assert set(paired.protocols['all-single'].paired) == {'rank1', 'mAP', 'mINP'}


def test_centring_does_not_depend_on_the_protocols(model, dataset, expected_features):
    options = dict(size=SIZE, centre=True, cache='off')
    everything = evaluate(model, dataset, **options)
    one = evaluate(model, dataset, 'infrared-to-visible', **options)
    assert one['infrared-to-visible'] == everything['infrared-to-visible'] and one.centre
    moved = centred(expected_features, dataset.test.modality)
    expected = evaluate_features(moved, dataset, 'infrared-to-visible')['infrared-to-visible']
    assert one['infrared-to-visible'].mean == pytest.approx(expected.mean, abs=1e-6)
    assert 'modalities centred' in str(one)
