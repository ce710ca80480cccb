"""Make the weights that the package ships: train, evaluate on people never seen, write weights and card.

    python hub/release_synthvi.py            train from the recipe beside this file (resumes where it was interrupted)
    python hub/release_synthvi.py --run DIR  take a finished run of that recipe

Writes vireid_timm/weights/vireid_dml_r10t.synthvi.safetensors (half precision, without classifiers), .json (what it
scores) and .md (the card).
"""

import argparse
import json
import logging
from pathlib import Path

import timm
import yaml

import vireid_timm
from vireid_timm.files import save_json, whole_file
from vireid_timm.hub import INTENDED_USE, load_model, save_embedded_weights
from vireid_timm.runs import LAST

NAME = 'vireid_dml_r10t.synthvi'
RECIPE = Path(__file__).with_name(f'{NAME}.yaml')
WEIGHTS = Path(vireid_timm.__file__).with_name('weights')
# The test people of the standard setting (benchmarks/accuracy.py), another world than the recipe's: none was seen.
PROTOCOLS = ('visible-to-infrared', 'infrared-to-visible')
TEST = dict(identities=2000, test_identities=200, pictures_per_modality=4, seed=0)


def trained(output: Path) -> Path:
    """Train from the recipe, or continue; returns the run's folder."""
    folder = output / NAME
    if (folder / LAST).is_file():
        return vireid_timm.train({'resume': str(folder)}).folder
    settings = yaml.safe_load(RECIPE.read_text(encoding='utf-8'))
    return vireid_timm.train({**settings, 'output': str(output), 'experiment': NAME}).folder


def card(report: vireid_timm.Report) -> str:
    """The card beside the weights."""
    return f"""# {NAME}

The paper's network on ResNet-10-T, trained from scratch on rendered people (SynthVI). For trying things out, for tests
and as a start for fine-tuning: it has never seen a photograph.

```python
import timm
import vireid_timm  # registers the model

model = timm.create_model('{NAME}', pretrained=True).eval()
```

Weights in half precision, without classifiers; Apache-2.0. Made by `python hub/release_synthvi.py`.

## Results

On {TEST['test_identities']} people and six cameras that it never saw (another SynthVI world than it was trained in):

```
{report}
```

## Intended use and limits

{INTENDED_USE}

## Training

```yaml
{RECIPE.read_text(encoding='utf-8').strip()}
```
"""


def main() -> None:
    """Train if need be, then write weights, scores and card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', type=Path, help='a finished run of the recipe')
    parser.add_argument('--output', type=Path, default=Path('output/release'))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    run = args.run or trained(args.output)
    target = WEIGHTS / f'{NAME}.safetensors'
    target.parent.mkdir(exist_ok=True)
    with whole_file(target) as temporary:
        save_embedded_weights(load_model(run), temporary)
    # What is shipped is what is scored: half precision, loaded the way a user loads it.
    model = timm.create_model('vireid_dml_r10t', pretrained=True, pretrained_cfg_overlay=dict(file=str(target)))
    report = vireid_timm.evaluate(model, vireid_timm.create_dataset('synthetic', **TEST), PROTOCOLS)
    scores = {
        name: {**result.mean, 'mAP_interval': result.intervals['mAP']} for name, result in report.protocols.items()
    }
    save_json(target.with_suffix('.json'), {'dataset': TEST, 'weights': report.weights, 'protocols': scores})
    with whole_file(target.with_suffix('.md')) as temporary:
        temporary.write_text(card(report), encoding='utf-8')
    print(report)
    print(json.dumps(scores))


if __name__ == '__main__':
    main()
