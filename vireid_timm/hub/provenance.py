"""What is known about a model besides its weights; whom it was trained on: test identities that it has learned."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import try_to_load_from_cache
from timm.models import parse_model_name

from ..data.readers import create_dataset
from ..run_folder import BEST, CLASS_MAP, CONFIG, MODEL_CONFIG


def learned_identities(
    name: str,
    dataset: str,
    options: dict[str, Any],
    root: str | None,
    tested: Iterable[str],
) -> tuple[int, str]:
    """Return how many test identities a model was trained on, as far as its run or configuration tells.

    Names are compared only where equal names mean the same person: in the public datasets; in SynthVI with the
    same seed; in `folder` and `csv` if the run read the same path. A run has a list of its identities. Other Hub-ready
    folders name nobody, but RegDB's and SynthVI's identities follow from the options in `config.json`.

    Args:
        name: The model's name for timm, or `local-dir:` and a run; a model on the Hub has to be in the cache.
        dataset: Name of the dataset that the model is tested on.
        options: Its options.
        root: Its folder or file; None if unknown.
        tested: The test identities.

    Returns:
        Their number, and a sentence about them that names the right options; 0 and an empty text if there are none.
    """
    run, facts = known_facts(name)
    trained_with = facts.get('dataset_options')
    if facts.get('dataset') != dataset or trained_with is None:
        return 0, ''
    if dataset == 'synthetic' and trained_with.get('seed', 0) != options.get('seed', 0):
        return 0, ''
    if dataset in ('folder', 'csv') and not (run and root and _same_path(_settings(run).get('data_dir'), root)):
        return 0, ''
    if run:
        known = set(_read(run / CLASS_MAP))
    elif dataset == 'synthetic' or (dataset == 'regdb' and root):
        known = set(create_dataset(dataset, root or None, **trained_with).train.identities())
    else:
        known = set()
    tested = set(tested)
    count, options = len(known & tested), json.loads(json.dumps(options, default=str))
    if not count:
        return 0, ''
    text = f'{count} of the {len(tested)} test identities are training identities of this model'
    differing = ' '.join(f'{key}={value}' for key, value in trained_with.items() if options.get(key) != value)
    if differing:
        return count, f'{text} (it was trained with {differing}): give --dataset-kwargs {differing}'
    return count, f'{text}: it was trained on another split of these data, so test it on what that split left out'


def known_facts(name: str) -> tuple[Path | None, dict[str, Any]]:
    """Return the run that a model belongs to, if it is here, and what its configuration tells, see `save_model_folder`.

    Args:
        name: The model's name for timm, or `local-dir:` and a run; a model on the Hub has to be in the cache.
    """
    prefix, identifier = parse_model_name(name)
    if prefix == 'hf-hub':
        repo_id, _, revision = identifier.partition('@')
        path = try_to_load_from_cache(repo_id, MODEL_CONFIG, revision=revision or None)
        return None, _read(Path(path)).get('vireid') or {} if isinstance(path, str) else {}
    if not prefix:  # weights in the package have their facts beside them
        cfg = timm.get_pretrained_cfg(name)
        path = Path(cfg.file).with_suffix('.json') if cfg is not None and cfg.file else None
        return None, _read(path).get('vireid') or {} if path is not None and path.is_file() else {}
    folder = Path(identifier)
    if not folder.is_dir():
        return None, {}
    run = next((path for path in (folder, folder.absolute().parent) if (path / CLASS_MAP).is_file()), None)
    for place in (folder, folder / BEST):
        facts = _read(place / MODEL_CONFIG).get('vireid') if (place / MODEL_CONFIG).is_file() else None
        if facts:
            return run, facts
    settings = _settings(run) if run else {}
    return run, {'dataset': settings.get('dataset'), 'dataset_options': settings.get('dataset_kwargs')}


def _settings(run: Path) -> dict[str, Any]:
    path = run / CONFIG
    try:
        return yaml.safe_load(path.read_text(encoding='utf-8')) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f'cannot read {path}: {error}') from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ValueError(f'cannot read {path}: {error}') from error


def _same_path(first: Any, second: str) -> bool:
    return bool(first) and os.path.realpath(os.path.expanduser(str(first))) == os.path.realpath(second)
