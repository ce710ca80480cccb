"""The content of model cards, and that the Hub can read them."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

import vireid_timm
from vireid_timm.evaluation.report import METRICS, ProtocolResult, Report
from vireid_timm.hub.card import DATASET_TITLES, INTENDED_USE, LOCAL_NAME, evaluation_facts, model_card

PERSON, IMAGE = 'Jane Doe', 'cam1/jane-doe.jpg'


def _result(trials: int, value: float, deviation: float) -> ProtocolResult:
    return ProtocolResult(
        direction='infrared to visible',
        draw='seeded' if trials > 1 else None,
        per_identity_cmc=False,
        num_queries=4,
        num_valid_queries=3,
        gallery_size=7,
        mean=dict.fromkeys(METRICS, value),
        std=dict.fromkeys(METRICS, deviation),
        intervals=dict.fromkeys(('rank1', 'mAP', 'mINP'), (value - 0.1, value + 0.1)),
        trials=[dict.fromkeys(METRICS, value)] * trials,
        trials_fingerprint='0',
        queries={'path': [IMAGE], 'identity': [PERSON]},
        failures=[{'path': IMAGE, 'identity': PERSON}],
    )


@pytest.fixture
def report() -> Report:
    protocols = {'all-single': _result(10, 0.61234, 0.0123), 'indoor-single': _result(1, 0.7, 0.0)}
    return Report('sysu_mm01', {'seed': 0}, protocols, 'vireid_dml_r50', 'abc', 'after-bn', size=(288, 144))


def _card(facts: dict | None = None, **options: str) -> str:
    return model_card('vireid_dml_r50', 2816, facts or {}, **options)


def test_facts_of_an_evaluation_name_nobody(report: Report) -> None:
    facts = evaluation_facts(report)
    text = json.dumps(facts)
    assert PERSON not in text and IMAGE not in text
    result = facts['protocols']['all-single']
    assert (result['trials'], result['queries'], result['gallery'], result['draw']) == (10, 3, 7, 'seeded')
    assert result['mean']['mAP'] == 0.61234 and result['std']['mAP'] == 0.0123 and result['other_features'] == {}
    assert result['intervals']['mAP'] == pytest.approx([0.51234, 0.71234])
    assert facts['size'] == [288, 144] and facts['weights'] == 'abc' and facts['reranking'] == 'none'


def test_the_hub_reads_the_metrics_as_they_were_measured(report: Report) -> None:
    facts = {'dataset': 'sysu_mm01', 'evaluation': evaluation_facts(report)}
    card = ModelCard(_card(facts, license='mit'), ignore_metadata_errors=False)
    results = {(entry.dataset_config, entry.metric_type): entry for entry in card.data.eval_results}
    assert results.keys() == {(p, m) for p in ('all-single', 'indoor-single') for m in ('rank1', 'mAP', 'mINP')}
    assert results['all-single', 'mAP'].metric_value == '61.23 ± 1.23'
    assert results['indoor-single', 'rank1'].metric_value == 70.0
    entry = results['all-single', 'rank1']
    assert (entry.dataset_name, entry.dataset_type, entry.metric_name) == ('SYSU-MM01', 'sysu_mm01', 'Rank-1 (%)')
    settings = {'features': 'after-bn', 'flip_test': False, 'crops': 1, 'centre': False, 'reranking': 'none'}
    assert entry.dataset_args == settings
    data = card.data.to_dict()
    assert (data['library_name'], data['license']) == ('timm', 'mit')
    assert data['pipeline_tag'] == 'image-feature-extraction' and 'visible-infrared' in data['tags']


def test_nothing_is_claimed_that_was_not_measured_or_stated() -> None:
    card = _card()
    front = yaml.safe_load(card.split('---\n')[1])
    assert 'model-index' not in front and 'license' not in front
    assert 'not evaluated' in card and 'No licence is stated' in card and '![' not in card


def test_the_card_imports_the_package_first_and_says_what_it_must_not_be_used_for() -> None:
    card = _card(table='mAP 12.3')
    code = card.split('```python\n')[1].split('```')[0]
    assert code.startswith('import vireid_timm') and LOCAL_NAME in code and '[B, 2816]' in code
    compile(code, 'card', 'exec')
    assert INTENDED_USE in card and 'must not be used for mass surveillance' in card and '```\nmAP 12.3\n```' in card
    assert "create_model('hf-hub:me/it', " in _card(name='hf-hub:me/it')
    assert '](sample.png)' in _card(sample='sample.png')


@pytest.mark.parametrize('dataset', ['sysu_mm01', 'regdb', 'llcm', 'hitsz_vcm', 'buptcampus'])
def test_licensed_training_data_are_named_with_their_terms(dataset: str) -> None:
    title = DATASET_TITLES[dataset]
    assert f'terms of {title}' in _card({'dataset': dataset})
    card = _card({'dataset': dataset, 'data_terms': 'Ask me.'})
    assert title not in card and 'Ask me.' in card


def test_terms_of_rendered_and_of_unknown_images() -> None:
    assert 'never seen a photograph' in _card({'dataset': 'synthetic'})
    assert 'terms of the training images are not stated' in _card({'dataset': 'folder'})


def test_settings_are_shown_and_metrics_not_twice(report: Report) -> None:
    facts = {'training': {'lr': 0.125}, 'evaluation': evaluation_facts(report), 'data_terms': 'Ask me.'}
    made = json.loads(_card(facts).split('```json\n')[1].split('```')[0])
    assert made == {'training': {'lr': 0.125}}


def test_every_dataset_that_has_a_title_has_a_reader() -> None:
    for name in DATASET_TITLES:
        with pytest.raises(ValueError) as caught:
            vireid_timm.create_dataset(name, 'no/such/folder', nonsense=1)
        assert 'nonsense' in str(caught.value)
