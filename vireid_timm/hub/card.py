"""The model card (README.md) of a Hub-ready folder, for people and for the Hub."""

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.report import Report

LOCAL_NAME = 'local-dir:FOLDER'  # in a card until its model has a name on the Hub
TASK = 'image-feature-extraction'
INTENDED_USE = """\
This model identifies people. Use it for research on retrieval across spectra, and to search recordings that you may
lawfully process. It must not be used for mass surveillance, to track or single out people without a legal basis, to
infer sensitive traits, or as the sole basis for a decision about a person. Its rankings are guesses that a person has
to check. Expect more errors on people, clothes and cameras unlike those in the training images."""

DATASET_TITLES = {
    'sysu_mm01': 'SYSU-MM01',
    'regdb': 'RegDB',
    'llcm': 'LLCM',
    'hitsz_vcm': 'HITSZ-VCM',
    'buptcampus': 'BUPTCampus',
    'synthetic': 'SynthVI',
}
METRIC_TITLES = {'rank1': 'Rank-1 (%)', 'mAP': 'mAP (%)', 'mINP': 'mINP (%)'}
SETTINGS = ('features', 'flip_test', 'crops', 'centre', 'reranking')  # of an evaluation; each changes its numbers


def evaluation_facts(report: Report) -> dict[str, Any]:
    """Return the results of a report and everything that changes them, without names of images or people."""
    return {
        **{name: getattr(report, name) for name in ('dataset', 'options', *SETTINGS, 'precision', 'weights')},
        'size': list(report.size) if report.size else None,
        'skipped_images': report.skipped_images,
        'protocols': {
            name: {
                **{
                    key: getattr(result, key)
                    for key in ('direction', 'draw', 'mean', 'std', 'other_features', 'decisions')
                },
                'trials': len(result.trials),
                'queries': result.num_valid_queries,
                'gallery': result.gallery_size,
                'intervals': {metric: list(interval) for metric, interval in result.intervals.items()},
            }
            for name, result in report.protocols.items()
        },
        'versions': report.versions,
    }


def model_card(
    architecture: str,
    num_features: int,
    facts: dict[str, Any],
    *,
    table: str = '',
    license: str = '',
    sample: str = '',
    name: str = LOCAL_NAME,
) -> str:
    """Return the text of `README.md`.

    Args:
        architecture: Name of the registered model.
        num_features: Number of features that it returns.
        facts: What `config.json` keeps under `vireid`. Its `evaluation` becomes the Hub's model-index, its `data_terms`
            replace what is known about the dataset.
        table: The measured results as text.
        license: Licence of the weights, by the Hub's identifier, e.g. `apache-2.0`.
        sample: File name of an image to show.
        name: What `timm.create_model` takes to load the model.
    """
    results = f'```\n{table}\n```' if table else 'These weights were not evaluated.'
    images = f'## Rendered people as such cameras see them\n\n![SynthVI]({sample})\n\n' if sample else ''
    made = {name: value for name, value in facts.items() if name not in ('evaluation', 'data_terms', 'calibration')}
    return f"""---
{_front_matter(architecture, facts, license)}
---
# {architecture}

A visible-infrared person re-identification model, made with `vireid_timm`. It maps images from visible-light and
infrared cameras to features that are compared by cosine similarity.

```python
import vireid_timm  # registers the architecture with timm
import timm

model = timm.create_model('{name}', pretrained=True, num_classes=0).eval()
visible_features = model(visible)  # normalised images [B, 3, H, W] -> [B, {num_features}]
infrared_features = model(infrared=infrared)
```

{images}## Results

{results}

{_probabilities(facts)}## Intended use and limits

{INTENDED_USE}

## Licence and training data

{f'Licence of the weights: {license}.' if license else 'No licence is stated for the weights: ask their publisher.'}

{facts.get('data_terms') or _default_data_terms(str(facts.get('dataset', '')))}

## How it was made

```json
{json.dumps(made, indent=2)}
```
"""


def results_of(card: str) -> str:
    """Return the results in the text of a card, as they were given to `model_card`; empty if there are none."""
    return card.partition('## Results\n\n```\n')[2].partition('\n```')[0]


def _probabilities(facts: dict[str, Any]) -> str:
    calibration = facts.get('calibration')
    if not calibration:
        return ''
    people = calibration['fitted_on']['identities']
    dataset = calibration['fitted_on']['dataset']
    return f"""## Probabilities

`config.json` has a calibration from similarities to probabilities, fitted on {people} people of
{DATASET_TITLES.get(dataset, dataset)} images. Other cameras need another one: `vireid calibrate`.

"""


def _default_data_terms(dataset: str) -> str:
    if dataset == 'synthetic':
        return (
            'Trained only on rendered people (SynthVI, made by `vireid_timm`). The images show no real person, and\n'
            'nobody has rights in them. The model has never seen a photograph.'
        )
    if dataset in DATASET_TITLES:
        title = DATASET_TITLES[dataset]
        return (
            f'Trained on {title}, which its owners provide for research under their own terms. Use these weights only\n'
            f'under the terms of {title}, and ask its owners before any other use.'
        )
    return (
        'The terms of the training images are not stated. Ask the publisher of these weights before you use them for\n'
        'anything that the people in the images and the owners of the images may not have agreed to.'
    )


def _front_matter(architecture: str, facts: dict[str, Any], license: str) -> str:
    results = _eval_results(facts['evaluation']) if 'evaluation' in facts else None
    data = ModelCardData(
        license=license or None,
        library_name='timm',
        pipeline_tag=TASK,
        tags=[TASK, 'timm', 'person-re-identification', 'visible-infrared', 'vireid_timm'],
        model_name=architecture if results else None,
        eval_results=results,
    )
    return data.to_yaml(line_break='\n')


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """Return the metrics of every protocol in the Hub's form, in percent; mean ± deviation of several trials."""
    dataset = evaluation['dataset']
    return [
        EvalResult(
            task_type=TASK,
            task_name='Visible-infrared person re-identification',
            dataset_type=dataset,
            dataset_name=DATASET_TITLES.get(dataset, dataset),
            dataset_config=protocol,
            dataset_split='test',
            dataset_args={name: evaluation[name] for name in SETTINGS if name in evaluation},
            metric_type=metric,
            metric_name=title,
            metric_value=_percent(result, metric),
        )
        for protocol, result in evaluation['protocols'].items()
        for metric, title in METRIC_TITLES.items()
    ]


def _percent(result: dict[str, Any], metric: str) -> float | str:
    mean = 100 * result['mean'][metric]
    return round(mean, 2) if result['trials'] == 1 else f'{mean:.2f} ± {100 * result["std"][metric]:.2f}'
