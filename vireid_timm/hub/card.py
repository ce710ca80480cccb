"""The model card: what a Hub-ready folder says about its model, for people and for the Hub."""

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.report import Report

LOCAL_NAME = 'local-dir:FOLDER'  # in a card until its folder has a name on the Hub
TASK = 'image-feature-extraction'
INTENDED_USE = """\
For research on retrieval across spectra and for searching recordings that the searcher may lawfully process. This model
identifies people. It must not be used for mass surveillance, to track or single out people without a legal basis, to
infer sensitive traits, or as the only ground for a decision about a person: its rankings are guesses that a person has
to check, and it errs more often on people, clothes and cameras unlike those it was trained on."""

DATASET_TITLES = {'sysu_mm01': 'SYSU-MM01', 'regdb': 'RegDB', 'llcm': 'LLCM', 'synthetic': 'SynthVI'}
METRIC_TITLES = {'rank1': 'Rank-1 (%)', 'mAP': 'mAP (%)', 'mINP': 'mINP (%)'}


def evaluation_facts(report: Report) -> dict[str, Any]:
    """What a report found and everything that changes it, without the names of any image or person."""
    return {
        'dataset': report.dataset,
        'options': report.options,
        **{name: getattr(report, name) for name in ('features', 'flip_test', 'crops', 'reranking', 'precision')},
        'size': list(report.size) if report.size else None,
        'weights': report.weights,
        'skipped_images': report.skipped_images,
        'protocols': {
            name: {
                'direction': result.direction,
                'draw': result.draw,
                'trials': len(result.trials),
                'queries': result.num_valid_queries,
                'gallery': result.gallery_size,
                'mean': result.mean,
                'std': result.std,
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
    data_terms: str = '',
    sample: str = '',
    name: str = LOCAL_NAME,
) -> str:
    """The text of `README.md`.

    Args:
        architecture: Name of the registered model.
        num_features: Features that it returns.
        facts: What `config.json` keeps under `vireid`; its `evaluation` becomes the Hub's model-index.
        table: The measured results as text.
        license: The Hub's identifier of the weights' licence, e.g. `apache-2.0`; empty where nothing is stated.
        data_terms: Terms of the training images; empty for what is known of the dataset.
        sample: File name of a sample image beside the card.
        name: What `timm.create_model` takes to load the model.
    """
    results = f'```\n{table}\n```' if table else 'Nothing was measured with these weights.'
    shown = f'## Rendered people as such cameras see them\n\n![SynthVI]({sample})\n\n' if sample else ''
    made = {name: value for name, value in facts.items() if name not in ('evaluation', 'data_terms')}
    return f"""---
{_front_matter(architecture, facts, license)}
---
# {architecture}

A visible-infrared person re-identification model made with `vireid_timm`. It turns images from colour and from
infrared cameras into features that can be compared by cosine similarity.

```python
import vireid_timm  # registers the architecture with timm
import timm

model = timm.create_model('{name}', pretrained=True, num_classes=0).eval()
visible_features = model(visible)  # normalised images [B, 3, H, W] -> [B, {num_features}]
infrared_features = model(infrared=infrared)
```

{shown}## Results

{results}

## Intended use and limits

{INTENDED_USE}

## Licence and training data

{f'Licence of the weights: {license}.' if license else 'No licence is stated for the weights: ask their publisher.'}

{data_terms or default_data_terms(str(facts.get('dataset', '')))}

## How it was made

```json
{json.dumps(made, indent=2)}
```
"""


def default_data_terms(dataset: str) -> str:
    """What can be said about the terms of the training images from the dataset's name alone."""
    if dataset == 'synthetic':
        return (
            'Trained on rendered people alone (SynthVI, made by `vireid_timm`): the images show no real person, and\n'
            'nobody has terms on them. It has never seen a photograph.'
        )
    if dataset in DATASET_TITLES:
        title = DATASET_TITLES[dataset]
        return (
            f'Trained on {title}, which its owners hand out for research under terms of their own. Whoever uses these\n'
            f'weights has to keep to the terms of {title}, too; ask its owners before any other use.'
        )
    return (
        'The terms of the training images are not stated: ask whoever published these weights before using them\n'
        'for anything that the people in the images and the owners of the images may not have agreed to.'
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
    """Rank-1, mAP and mINP of every protocol in the Hub's form, in percent; over several trials mean ± deviation."""
    dataset = evaluation['dataset']
    settings = {name: evaluation[name] for name in ('features', 'flip_test', 'crops', 'reranking')}
    return [
        EvalResult(
            task_type=TASK,
            task_name='Visible-infrared person re-identification',
            dataset_type=dataset,
            dataset_name=DATASET_TITLES.get(dataset, dataset),
            dataset_config=protocol,
            dataset_split='test',
            dataset_args=settings,
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
