"""The evaluation on rendered pictures, against the same steps taken one by one."""

import dataclasses
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import vireid_timm
from vireid_timm.datasets import create_dataset
from vireid_timm.evaluate import Report, embed, evaluate, evaluate_features, weights_fingerprint
from vireid_timm.metrics import bootstrap_interval, rank_metrics
from vireid_timm.pictures import PictureError, load_picture
from vireid_timm.protocols import protocol_trials, protocols_of
from vireid_timm.records import INFRARED, VISIBLE, Dataset, Records

SIZE = (64, 32)
EMPTY = Records.from_rows([])


def make_model(num_classes=0, name='vireid_dml_r10t'):
    """Random weights whose BN statistics are no longer those of an untouched network, so that BN changes features."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.uniform_(0, 1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope='module')
def model():
    return make_model()


@pytest.fixture(scope='module')
def dataset():
    return create_dataset('synthetic', identities=0, test_identities=6, pictures_per_modality=2, size=SIZE)


@pytest.fixture(scope='module')
def saved(dataset, tmp_path_factory):
    """The dataset's pictures as files, as a folder dataset with a query and a gallery side."""
    root = tmp_path_factory.mktemp('folder')
    rows = []
    for i in range(len(dataset.test)):
        records = dataset.test[[i]]
        path = root / f'{i:03d}.png'
        Image.fromarray(load_picture(records.path[0], SIZE)).save(path)
        rows.append((str(path), records.identity[0], 0, records.modality[0], ('query', 'gallery', 'test')[i % 3]))
    return Dataset('folder', str(root), EMPTY, Records.from_rows(rows), {'test_share': 0.2})


def network_input(model, path, size):
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    picture = torch.from_numpy(np.array(load_picture(str(path), size))).permute(2, 0, 1) / 255
    return ((picture - mean) / std)[None]


def naive_features(model, paths, modalities, size=SIZE):
    """One picture at a time through the network's public call."""
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
    """Every identity in every camera of SYSU-MM01, but the first, which only one infrared camera saw."""
    rows = []
    for number in range(identities):
        for camera in (1, 2, 3, 4, 5, 6) if number else (3,):
            modality = INFRARED if camera in (3, 6) else VISIBLE
            for file in range(3):
                rows.append((f'cam{camera}/{number:04d}/{file:04d}.jpg', f'{number:04d}', camera, modality, 'test'))
    return Dataset('sysu_mm01', 'root', EMPTY, Records.from_rows(rows))


def assert_close(features, expected):
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_embed_records_in_their_order(model, dataset, expected_features):
    order_given = np.random.default_rng(0).permutation(len(dataset.test))
    shuffled = dataset.test[order_given]
    features, order = embed(model, shuffled, size=SIZE, batch_size=4, device='cpu')
    assert order == shuffled.path.tolist()
    assert features.dtype == torch.float32
    assert features.shape == (len(shuffled), model.num_features)
    assert not features.is_inference()
    assert_close(features, expected_features[order_given])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))


def test_embed_paths_and_pil_pictures(model, saved):
    paths = saved.test.path[saved.test.modality == VISIBLE][:5].tolist()
    expected = naive_features(model, paths, [VISIBLE] * 5, (48, 24))
    features, order = embed(model, paths, VISIBLE, size=(48, 24), batch_size=2)
    assert order == paths
    assert_close(features, expected)
    features, order = embed(model, [Image.open(path) for path in paths], VISIBLE, size=(48, 24), batch_size=2)
    assert order == [0, 1, 2, 3, 4]
    assert_close(features, expected)
    grey = Image.open(paths[0]).convert('L')
    in_one, in_three = (embed(model, [picture], INFRARED)[0] for picture in (grey, grey.convert('RGB')))
    torch.testing.assert_close(in_one, in_three)


def test_embed_takes_the_size_of_the_model(model, dataset):
    records = dataset.test[:2]
    features, _ = embed(model, records)
    assert_close(features, naive_features(model, records.path, records.modality, (128, 64)))


def test_embed_before_and_after_bn(dataset):
    records = dataset.test[[0]]
    headless, classifying = make_model(0), make_model(5)
    classifying.load_state_dict(headless.state_dict(), strict=False)
    with torch.no_grad():
        before = headless.forward_branches(**{records.modality[0]: network_input(headless, records.path[0], SIZE)})[0]
        after = headless.joint_head.neck(before)
    assert not torch.allclose(F.normalize(before), F.normalize(after), atol=0.01)
    for model in (headless, classifying):
        assert_close(embed(model, records, size=SIZE)[0], F.normalize(after))
        assert_close(embed(model, records, size=SIZE, features='before-bn')[0], F.normalize(before))


def test_embed_baseline_without_joint_branch(dataset):
    baseline = make_model(name='vireid_base_r10t')
    records = dataset.test[:3]
    assert_close(embed(baseline, records, size=SIZE)[0], naive_features(baseline, records.path, records.modality))


def test_embed_leaves_the_model_as_it_was(dataset):
    model = make_model(3).train()
    model.joint_head.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embed(model, dataset.test[:4], size=SIZE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with pytest.raises(ValueError, match='cannot be read'):
        embed(model, ['missing.png'], VISIBLE)
    assert [module.training for module in model.modules()] == modes


def test_embed_in_half_precision(model, dataset):
    records = dataset.test[:4]
    full = embed(model, records, size=SIZE)[0]
    half = embed(model, records, size=SIZE, amp_dtype=torch.bfloat16)[0]
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert ((full * half).sum(dim=1) > 0.99).all()


def test_embed_nothing(model):
    features, order = embed(model, [], VISIBLE)
    assert features.shape == (0, model.num_features)
    assert order == []


def test_embed_skips_broken_pictures_on_request(model, saved, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    paths = [str(saved.test.path[0]), str(tmp_path / 'broken.png'), str(saved.test.path[1])]
    with pytest.raises(PictureError, match=r'broken\.png'):
        embed(model, paths, VISIBLE, size=SIZE)
    features, order = embed(model, paths, VISIBLE, size=SIZE, skip_broken=True)
    assert order == [paths[0], paths[2]]
    assert_close(features, naive_features(model, order, [VISIBLE] * 2))


@pytest.mark.parametrize(
    'pictures, modality, options, message',
    [
        (['a.png'], None, {}, 'modality must be one of visible, infrared'),
        (['a.png'], 'x-ray', {}, "got 'x-ray'"),
        ('a.png', VISIBLE, {}, 'takes a list'),
        (['a.png', Image.new('RGB', (4, 8))], VISIBLE, {}, 'cannot be mixed'),
        ([Image.new('I;16', (4, 8))], INFRARED, {}, 'picture 0 has mode I;16'),
        (EMPTY, VISIBLE, {}, 'records know their modality'),
        (EMPTY, None, {'features': 'bn'}, 'after-bn, before-bn'),
        (EMPTY, None, {'batch_size': 0}, 'at least 1, got 0'),
    ],
)
def test_embed_rejects(model, pictures, modality, options, message):
    with pytest.raises(ValueError, match=message):
        embed(model, pictures, modality, **options)


def test_other_models_are_refused(dataset):
    with pytest.raises(ValueError, match='ResNet is none of the models of vireid_timm'):
        evaluate(timm.create_model('resnet10t', num_classes=0), dataset)


def test_features_that_are_not_finite_name_the_picture(dataset, saved):
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
    assert list(report.protocols) == ['visible-to-infrared', 'infrared-to-visible']
    for protocol, result in report.protocols.items():
        (trial,) = protocol_trials(dataset, protocol)
        identity = dataset.test.identity
        expected = rank_metrics(
            features[trial.query] @ features[trial.gallery].T, identity[trial.query], identity[trial.gallery]
        )
        assert result.mean['mAP'] == pytest.approx(expected.mAP)
        assert result.mean['mINP'] == pytest.approx(expected.mINP)
        for k in (1, 5, 10, 20):
            assert result.mean[f'rank{k}'] == pytest.approx(expected.cmc[k - 1])
        assert result.mAP_interval == pytest.approx(bootstrap_interval(expected.ap))
        assert result.mAP_interval[0] < result.mean['mAP'] < result.mAP_interval[1]
        assert (result.num_queries, result.num_valid_queries, result.gallery_size) == (12, 12, 12)
        assert result.direction == protocol.replace('-', ' ')
        assert result.draw is None and not result.per_identity_cmc
        assert set(result.std.values()) == {0.0} and result.trials == [result.mean]


def test_report_names_what_changes_a_number(model, dataset):
    report = evaluate(model, dataset, 'visible-to-infrared', size=SIZE, features='before-bn', amp_dtype=torch.bfloat16)
    assert (report.dataset, report.options['test_identities'], report.options['seed']) == ('synthetic', 6, 0)
    assert (report.model, report.weights) == ('vireid_dml_r10t', weights_fingerprint(model))
    assert (report.features, report.size, report.precision) == ('before-bn', SIZE, 'bfloat16')
    assert report.versions == {
        'vireid_timm': vireid_timm.__version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'numpy': np.__version__,
    }
    assert report.skipped_pictures == 0
    text = str(report)
    for word in ('synthetic', 'test_identities=6', 'vireid_dml_r10t', report.weights, 'before-bn', '64x32', 'bfloat16'):
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
        assert result.mAP_interval == pytest.approx(bootstrap_interval(per_query))
        assert (result.num_queries, result.num_valid_queries) == (27, 24)
        assert result.draw == 'seeded' and result.per_identity_cmc and len(result.trials) == 10
    assert report['all-single'].gallery_size == 16
    assert report['indoor-multi'].gallery_size == 24
    lines = str(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('protocol'))
    table = lines[start:-1]
    assert len({len(line) for line in table if not line.lstrip().startswith('std')}) == 1, 'columns must align'
    assert '24 of 27' in table[1] and '10 seeded' in table[1]
    assert f'{100 * report["all-single"].mean["mAP"]:.2f}' in table[1]
    assert f'{100 * report["all-single"].std["mAP"]:.2f}' in table[2]
    assert lines[-1].startswith('R1 to R20 count distinct identities: all-single, all-multi')


def test_drawn_queries_are_averaged_by_picture():
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
    per_picture = {}
    for trial in protocol_trials(dataset, 'visible-to-infrared-swapped'):
        identity = dataset.test.identity
        metrics = rank_metrics(
            features[trial.query] @ features[trial.gallery].T,
            identity[trial.query],
            identity[trial.gallery],
            ignore=trial.ignore,
        )
        for row, precision in zip(trial.query.tolist(), metrics.ap, strict=True):
            per_picture.setdefault(row, []).append(precision)
    means = [np.mean(per_picture[row]) for row in sorted(per_picture)]
    assert result.mAP_interval == pytest.approx(bootstrap_interval(means))


def test_split_column_decides_who_searches(model, saved):
    report = evaluate(model, saved, size=SIZE, cache='ram')
    for protocol, modality in (('visible-to-infrared', VISIBLE), ('infrared-to-visible', INFRARED)):
        searching, searched = saved.test.modality == modality, saved.test.modality != modality
        assert report[protocol].num_queries == (searching & (saved.test.split != 'gallery')).sum()
        assert report[protocol].gallery_size == (searched & (saved.test.split != 'query')).sum()


def test_only_the_rows_of_the_protocol_have_to_be_there():
    dataset = sysu_like()
    features = random_features(dataset)
    outdoor = np.isin(dataset.test.camera, (4, 5))
    expected = evaluate_features(features, dataset, 'indoor-single')
    features[outdoor] = math.nan
    assert evaluate_features(features, dataset, 'indoor-single') == expected
    with pytest.raises(ValueError, match=r'cam4.*not finite'):
        evaluate_features(features, dataset, 'all-multi')


def test_broken_pictures_are_left_out_and_counted(model, saved, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    columns = {field.name: getattr(saved.test, field.name).copy() for field in dataclasses.fields(Records)}
    columns['path'] = columns['path'].astype(object)
    columns['path'][[2, 20]] = str(tmp_path / 'broken.png')
    damaged = dataclasses.replace(saved, test=Records(**columns))
    with pytest.raises(PictureError, match=r'broken\.png'):
        evaluate(model, damaged, size=SIZE, cache='ram')
    report = evaluate(model, damaged, size=SIZE, cache='ram', skip_broken=True)
    kept = dataclasses.replace(saved, test=saved.test[[i for i in range(len(saved.test)) if i not in (2, 20)]])
    assert report.skipped_pictures == 2
    assert report == dataclasses.replace(evaluate(model, kept, size=SIZE, cache='ram'), skipped_pictures=2)
    assert '2 broken pictures left out' in str(report)


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


@pytest.mark.parametrize('features', [torch.zeros(3, 8), torch.zeros(24), torch.zeros(24, 8, dtype=torch.int64)])
def test_features_that_do_not_fit(dataset, features):
    with pytest.raises(ValueError, match=r'floating point \[24, D\]'):
        evaluate_features(features, dataset)


def test_unknown_names_and_empty_choices(model, dataset):
    with pytest.raises(ValueError, match='no protocol .all-single.*visible-to-infrared'):
        evaluate(model, dataset, 'all-single')
    with pytest.raises(ValueError, match='unknown draw'):
        evaluate(model, dataset, draw='lucky')
    with pytest.raises(ValueError, match='no protocol to evaluate; available'):
        evaluate(model, dataset, [])
    with pytest.raises(ValueError, match='no test pictures'):
        evaluate(model, Dataset('folder', 'root', EMPTY, EMPTY))
    twice = evaluate_features(random_features(dataset), dataset, ['infrared-to-visible', 'infrared-to-visible'])
    assert list(twice.protocols) == ['infrared-to-visible']


def test_report_is_saved_whole_and_read_back(model, dataset, tmp_path):
    report = evaluate(model, dataset, size=SIZE)
    report.save(tmp_path / 'new' / 'report.json')
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['report.json']
    again = Report.load(tmp_path / 'new' / 'report.json')
    assert again == report
    assert str(again) == str(report)
    values = json.loads((tmp_path / 'new' / 'report.json').read_text(encoding='utf-8'))
    assert values['protocols']['visible-to-infrared']['mean']['mAP'] == report['visible-to-infrared'].mean['mAP']
    features_only = evaluate_features(random_features(dataset), dataset)
    features_only.save(tmp_path / 'features.json')
    assert Report.load(tmp_path / 'features.json') == features_only


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"protocols": {}, "size": null, "colour": 1}', 'nonsense'])
def test_what_is_no_report_is_named(tmp_path, text):
    (tmp_path / 'other.json').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=r'other\.json is no report'):
        Report.load(tmp_path / 'other.json')


def test_weights_fingerprint():
    model = make_model(2)
    first = weights_fingerprint(model)
    assert len(first) == 12 and first == weights_fingerprint(make_model(2).train())
    with torch.no_grad():
        model.joint_head.neck.running_var[3] += 1e-3
    assert weights_fingerprint(model) != first
    assert weights_fingerprint(make_model(2).bfloat16()) != first
