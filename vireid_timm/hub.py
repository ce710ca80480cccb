"""Models as Hub-ready folders: `config.json`, `model.safetensors` and a model card."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.models._hub import save_config_for_hf

from .files import whole_file, whole_folder
from .models import DualStreamResNet
from .runs import BEST, LAST, load_checkpoint

INTENDED_USE = """\
For research on retrieval across spectra and for searching recordings that the searcher may lawfully process. This model
identifies people. It must not be used for mass surveillance, to track or single out people without a legal basis, to
infer sensitive traits, or as the only ground for a decision about a person: its rankings are guesses that a person has
to check, and it errs more often on people, clothes and cameras unlike those it was trained on."""


def save_model_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    facts: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    table: str = '',
    input_size: tuple[int, int, int] | None = None,
) -> None:
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads as it is.

    Args:
        model: The network, with or without its classifiers.
        folder: Where to write; an earlier version is replaced when the new one is complete.
        facts: What re-ID users ask of a model (dataset, metrics, training settings), kept in `config.json` under
            `vireid`; timm's loader passes it by.
        model_args: Arguments that the model was created with, beyond those that timm records.
        table: The measured results as text, for the card.
        input_size: Channels, height and width that the model was trained with, if not its default.
    """
    # safetensors refuses channels-last weights; the caller's network stays as it is.
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)
    with whole_folder(folder) as temporary:
        config = _export_config(model, facts, model_args, input_size)
        save_for_hf(model, temporary, safe_serialization=True, **config)
        # safetensors gives its files to their owner alone.
        shutil.copymode(temporary / 'config.json', temporary / 'model.safetensors')
        architecture = model.pretrained_cfg['architecture']
        (temporary / 'README.md').write_text(_card(architecture, facts or {}, table), encoding='utf-8')


def save_model_config(
    model: nn.Module,
    path: str | Path,
    *,
    model_args: dict[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> None:
    """Write the `config.json` that builds the network anew, without weights; arguments as for `save_model_folder`."""
    with whole_file(path) as temporary:
        save_config_for_hf(model, temporary, **_export_config(model, None, model_args, input_size))


def _export_config(
    model: nn.Module,
    facts: dict[str, Any] | None,
    model_args: dict[str, Any] | None,
    input_size: tuple[int, int, int] | None,
) -> dict[str, Any]:
    return {
        # The weights are no longer those of the tag that the network was created with.
        'model_config': {'vireid': facts or {}, 'pretrained_cfg': {'tag': (facts or {}).get('dataset', 'trained')}},
        'model_args': model_args or {},
        'data_config': {'input_size': input_size} if input_size else None,
    }


def _card(architecture: str, facts: dict[str, Any], table: str) -> str:
    results = f'## Results\n\n```\n{table}\n```\n' if table else ''
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- timm
- person-re-identification
- visible-infrared
---
# {architecture}

A visible-infrared person re-identification model made with `vireid_timm`. It turns pictures from colour and from
infrared cameras into features that can be compared by cosine similarity.

```python
import vireid_timm  # registers the architecture with timm
import timm

model = timm.create_model('local-dir:FOLDER', pretrained=True, num_classes=0).eval()
visible_features = model(visible)  # normalised pictures [B, 3, H, W] -> [B, {facts.get('num_features', 'D')}]
infrared_features = model(infrared=infrared)
```

{results}
## Intended use and limits

{INTENDED_USE}

## How it was made

```json
{json.dumps(facts, indent=2)}
```
"""


def save_embedded_weights(model: nn.Module, path: str | Path) -> None:
    """Write the network's weights without classifiers in half precision, as they are shipped in the package."""
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
        if not key.endswith('_head.fc.weight')
    }
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)


def load_model(source: str | Path, pretrained: bool = True) -> nn.Module:
    """A network for retrieval (without classifiers) from whatever names one.

    Args:
        source: A run folder, a Hub-ready folder or a file in one of them; `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, or
            a registered model, with or without a tag.
        pretrained: Load the weights; without them a registered model is created untrained.

    Raises:
        ValueError: Nothing of the kind, or weights that do not fit.
    """
    path = Path(source)
    try:
        if str(source).startswith(('local-dir:', 'hf-hub:')) or not path.exists():
            return _created(str(source), pretrained)
        folder = path if path.is_dir() else path.parent
        if path.name == LAST or not (folder / BEST).is_dir() and not any(folder.glob('*.safetensors')):
            return _from_checkpoint(path)
        return _created(f'local-dir:{folder / BEST if (folder / BEST).is_dir() else folder}', pretrained)
    except (RuntimeError, OSError, KeyError, AssertionError, SafetensorError) as error:
        raise ValueError(f'cannot load a model from {source}: {error}') from error


def _created(name: str, pretrained: bool) -> nn.Module:
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        known = ', '.join(timm.list_models('vireid_*'))
        raise ValueError(f'there is neither a folder, a file nor a model {name!r}; models of this library: {known}')
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    if not isinstance(model, DualStreamResNet):
        raise ValueError(f'{name} is a {type(model).__name__}, not a visible-infrared re-ID model of this library')
    return model


def _from_checkpoint(path: Path) -> nn.Module:
    """The weights of a training checkpoint, averaged ones where the run kept them."""
    checkpoint = load_checkpoint(path)
    model = timm.create_model(f'local-dir:{path if path.is_dir() else path.parent}', pretrained=False)
    model.load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
    model.reset_classifier(0)
    return model
