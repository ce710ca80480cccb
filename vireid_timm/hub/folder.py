"""Hub-ready folders: write them, verify them, and load a model by any of its names."""

import copy
import dataclasses
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn as nn
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from timm.models import clean_state_dict, parse_model_name
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model

from ..constants import MODALITIES
from ..data.records import Dataset
from ..evaluation.calibration import Calibration
from ..evaluation.features import weights_fingerprint
from ..evaluation.report import Report
from ..files import check_writable, save_json, whole_file, whole_folder
from ..models.branches import DualStream
from ..run_folder import BEST, LAST, MODEL_CONFIG, PREVIOUS, has_checkpoint, load_checkpoint
from ..synthvi.render import contact_sheet
from ..text import format_list
from ..version import package_versions
from .card import evaluation_facts, model_card, results_of
from .provenance import known_facts, learned_identities

_logger = logging.getLogger(__name__)

CARD = 'README.md'
WEIGHTS = 'model.safetensors'
REFERENCE = 'reference.safetensors'
SAMPLE = 'sample.png'
REQUIRED = (MODEL_CONFIG, WEIGHTS, REFERENCE)
FILES = (CARD, *REQUIRED, SAMPLE)  # a Hub-ready folder holds nothing else

PLACES = ('data_dir', 'output', 'experiment', 'resume')  # settings that name a place on this machine
IMAGES = 2  # reference images of each modality
# Largest difference of the reference features, as a share of the largest feature. They are computed in float32 from the
# stored weights, so only the order in which processors and versions add numbers makes a difference.
TOLERANCE = 1e-3
LONGEST_REASON = 400  # characters; a state dict that does not fit names hundreds of tensors


def resolve_model_name(source: str | Path) -> str:
    """Return the name by which `timm.create_model` finds a model.

    Args:
        source: A registered model with or without a tag, `hf-hub:OWNER/NAME[@REVISION]` and `local-dir:FOLDER` are
            returned as they are. A run folder becomes the `local-dir:` of its `best/`; a Hub-ready folder, or a file
            in it, that of the folder.

    Raises:
        ValueError: There is no such model, or the source is a checkpoint, which only `load_model` and `save_run` take.
    """
    name, checkpoint = _locate(source)
    if checkpoint is not None:
        raise ValueError(
            f'{source} is a training checkpoint. Give a run folder with a {BEST}/ model, or save the checkpoint as a '
            f'model first: vireid hub save {source} DIR'
        )
    return name


def load_model(source: str | Path, pretrained: bool = True) -> nn.Module:
    """Load a model for retrieval, without its classifiers.

    Args:
        source: Any name that `resolve_model_name` takes, or a training checkpoint: a `.pth` file of a run, or a run
            folder without `best/`. Averaged weights win where the run kept them.
        pretrained: Load the weights; otherwise the network is untrained.

    Raises:
        ValueError: There is no such model, or its weights do not fit.
    """
    model = _load(source, pretrained)
    model.reset_classifier(0)
    return model


def model_calibration(source: str | Path) -> Calibration | None:
    """Return the calibration that is kept with a model; None if there is none, or none that this version can read.

    Whether it is about the weights and settings in use, `Calibration.mismatch` tells.

    Args:
        source: The model, as for `load_model`; one on the Hub has to be in the cache, where loading it puts it.
    """
    name, checkpoint = _locate(source)
    values = None if checkpoint is not None else known_facts(name)[1].get('calibration')
    try:
        return Calibration.from_dict(values) if values else None
    except ValueError as error:
        _logger.warning(f'The calibration of {source} is ignored: {error}')
        return None


def save_calibration(calibration: Calibration, source: str | Path, output: str | Path | None = None) -> Path:
    """Keep a calibration with its model: in the Hub-ready folder of the model, or in a copy of it.

    Args:
        calibration: The calibration.
        source: The model, as for `load_model`.
        output: Where to write a Hub-ready folder; needed for a model that is not in such a folder.

    Returns:
        The folder.

    Raises:
        ValueError: There is no such folder to write to, or it has other weights.
        OSError: It cannot be written.
    """
    name, checkpoint = _locate(source)
    folder = calibration_target(source, output)
    values = {'calibration': calibration.to_dict()}
    if output is None:
        config = read_config(folder)
        config['vireid'] = {**(config.get('vireid') or {}), **values}
        save_json(folder / MODEL_CONFIG, config)
    elif name.startswith('local-dir:'):
        save_run(source, folder, calibration=calibration)
    else:
        model = load_model(source)
        facts = {key: value for key, value in known_facts(name)[1].items() if key not in ('weights', 'evaluation')}
        license = model.pretrained_cfg.get('license') or ''
        save_model_folder(model, folder, facts={**facts, **values}, license=license)
    return folder


def calibration_target(source: str | Path, output: str | Path | None) -> Path:
    """Return the folder that `save_calibration` writes to.

    Raises:
        ValueError, OSError: As for `save_calibration`.
    """
    if output is not None:
        return check_target(output)
    name, checkpoint = _locate(source)
    prefix, identifier = parse_model_name(name)
    if prefix != 'local-dir' or checkpoint is not None or not (Path(identifier) / WEIGHTS).is_file():
        raise ValueError(
            f'{source} is not a Hub-ready folder that a calibration could be written to; give --output DIR for a copy'
        )
    check_writable(Path(identifier) / MODEL_CONFIG)
    return Path(identifier)


def split_problem(source: str | Path, dataset: Dataset) -> tuple[int, str]:
    """Return how many test identities a model was trained on, and a sentence about them, see `learned_identities`.

    Args:
        source: The model, as for `load_model`.
        dataset: What it is tested on.
    """
    name = _locate(source)[0]
    return learned_identities(name, dataset.name, dataset.options, dataset.root, dataset.test.identities())


def _locate(source: str | Path) -> tuple[str, Path | None]:
    """Return timm's name of a model, and the training checkpoint to load if the source is one."""
    name, path = str(source), Path(source)
    if source == '':  # a path would make it the current folder
        raise ValueError('the name of the model is empty; give a registered model, hf-hub:OWNER/NAME or a folder')
    is_registered = timm.is_model(name.partition('.')[0])
    if not path.exists() or (is_registered and isinstance(source, str)):
        try:
            prefix, identifier = parse_model_name(name)
        except ValueError as error:
            raise ValueError(f'there is no file or folder {name!r}. {error}') from error
        if not prefix and not is_registered:
            known = ', '.join(timm.list_models('vireid_*'))
            raise ValueError(f'there is no file, folder or model {name!r}; models of this library: {known}')
        return f'{prefix}:{identifier}' if prefix else name, None
    folder = path if path.is_dir() else path.parent
    folder = folder / BEST if (folder / BEST).is_dir() else folder
    if path.is_file() and path.suffix != '.pth' and path.name not in FILES:
        raise ValueError(f'{path} is not part of a Hub-ready folder. {_plain_weights_hint(path)}')
    if path.suffix == '.pth' or (has_checkpoint(path) and not (folder / WEIGHTS).is_file()):
        return f'local-dir:{path if path.is_dir() else path.parent}', path
    if not (folder / MODEL_CONFIG).is_file():
        raise ValueError(f'{folder} has no {MODEL_CONFIG}; give a run folder or a Hub-ready folder')
    return f'local-dir:{folder}', None


def _load(source: str | Path, pretrained: bool = True, shown: str = '') -> DualStream:
    """Load a model with its classifiers, so that every tensor has to fit; `shown` replaces `source` in messages."""
    name, checkpoint = _locate(source)
    state = _checkpoint_state(checkpoint) if checkpoint is not None and pretrained else None
    shown = shown or str(source)
    try:
        model = timm.create_model(name, pretrained=pretrained and checkpoint is None)
        if state is not None:
            model.load_state_dict(state)
    except Exception as error:  # a wrong configuration makes timm raise any type
        raise ValueError(f'cannot load a model from {shown}: {one_line(error)}') from error
    finally:
        check_cache(name)
    if not isinstance(model, DualStream):
        raise ValueError(f'{shown} is a {type(model).__name__}, not a visible-infrared re-ID model of this library')
    return model


def _checkpoint_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a training checkpoint, the averaged ones where there are some."""
    try:
        state = load_checkpoint(path)
    except ValueError as error:
        if path.is_dir() or path.name in (LAST, PREVIOUS):
            raise
        raise ValueError(f'{one_line(error)}. {_plain_weights_hint(path)}') from error
    return clean_state_dict(state.get('state_dict_ema', state['state_dict']))


def _plain_weights_hint(path: Path) -> str:
    return (
        f'If it holds plain weights of a model NAME with N classes (0 without classifiers), make a Hub-ready folder: '
        f'vireid_timm.save_model_folder(timm.create_model(NAME, pretrained=True, num_classes=N, pretrained_cfg_overlay='
        f"dict(file={str(path)!r}, num_classes=N)), DIR). For checkpoints of AGW's code: vireid hub convert {path} DIR "
        '--from agw'
    )


def save_model_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    facts: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    table: str = '',
    input_size: tuple[int, int, int] | None = None,
    half: bool = False,
    license: str = '',
    data_terms: str = '',
    sample: bool = False,
) -> None:
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    Besides weights, configuration and card it holds reference tensors: noise images and the features that the network
    computes for them, which `check_model` compares.

    Args:
        model: The network, with or without its classifiers; a compiled or parallel one is unwrapped.
        folder: Where to write. A complete new version replaces an old one.
        facts: What re-ID users ask about a model (dataset, metrics, training settings), kept in `config.json` under
            `vireid`, which timm ignores. Settings that name places on this machine are left out.
        model_args: Arguments that the model was created with, beyond those that timm records.
        table: The measured results as text, for the card.
        input_size: Channels, height and width that the model was trained with; the model's default if None.
        half: Store the weights in half precision; they are still computed with in float32.
        license: Licence of the weights, by the Hub's identifier, e.g. `apache-2.0`.
        data_terms: Terms of the training images, for the card.
        sample: Show rendered people in the card, to explain the two modalities.

    Raises:
        ValueError: The folder is something else or holds other files, weights or features are not finite, or a weight
            is too large for half precision.
    """
    folder = check_target(folder)
    # safetensors refuses channels-last weights, and the caller's network must not change.
    model = copy.deepcopy(unwrap_model(model)).to('cpu', memory_format=torch.contiguous_format).eval()
    broken = [name for name, value in model.state_dict().items() if not is_finite(value)]
    if broken:
        raise ValueError(f'weights with values that are NaN or infinite are not saved: {format_list(broken)}')
    if half:
        round_to_half(model)
    with whole_folder(folder) as temporary:
        state = {
            key: value.half() if half and value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
        (temporary / WEIGHTS).write_bytes(
            safetensors.torch.save(state)
        )  # unlike `save_file`, a full disk is an OSError
        precision = 'float16' if half else str(next(model.parameters()).dtype).removeprefix('torch.')
        facts = {
            'versions': package_versions(),  # a model saved again keeps those that it was trained with
            **{name: value for name, value in _without_places(facts or {}).items() if value is not None},
            'weights': {'precision': precision, 'sha256': sha256_of(temporary / WEIGHTS)},
            **({'data_terms': data_terms} if data_terms else {}),
        }
        _save_config(model, temporary / MODEL_CONFIG, facts, model_args, input_size, license)
        _save_reference(model, temporary)
        if sample:
            contact_sheet(range(3)).save(temporary / SAMPLE)
        architecture, shown = model.pretrained_cfg['architecture'], SAMPLE if sample else ''
        texts = dict(table=table, license=license, sample=shown)
        (temporary / CARD).write_text(
            model_card(architecture, model.head_hidden_size, facts, **texts), encoding='utf-8'
        )


def check_target(folder: str | Path, files: Sequence[str] = FILES) -> Path:
    """Return where to write a folder, if nothing else is lost there.

    Args:
        folder: Where to write.
        files: Names of the files that a new version replaces; those of a Hub-ready folder by default.

    Raises:
        ValueError: It is a file or a link, or a folder that holds other files.
        OSError: It cannot be written.
    """
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = 'link' if folder.is_symlink() else 'file'
        raise ValueError(f'{folder} is a {kind}, which is not replaced; give a folder that does not exist yet')
    others = sorted({path.name for path in folder.iterdir()} - set(files)) if folder.is_dir() else []
    if others:
        raise ValueError(f'{folder} holds other files ({", ".join(others[:3])}); give a folder that does not exist yet')
    check_writable(folder, is_folder=True)
    return folder


def save_run(
    run: str | Path,
    folder: str | Path,
    *,
    report: Report | None = None,
    calibration: Calibration | None = None,
    note: str = '',
    half: bool = False,
    license: str = '',
    data_terms: str = '',
) -> None:
    """Write a model of a run as a folder to publish, with its measured results. `vireid hub save` calls this.

    Args:
        run: A run folder, a checkpoint in it, or a Hub-ready folder.
        folder: Where to write. A complete new version replaces an old one.
        report: An evaluation of exactly these weights, rounded by `round_to_half` if `half` is set.
        calibration: A calibration of these weights, rounded or not; None for the one that the model has.
        note: Text for the card below the results, e.g. the scores of other runs of the same recipe.
        half: Store the weights in half precision.
        license: As for `save_model_folder`; what the saved model states if empty.
        data_terms: As for `save_model_folder`; what the saved model states if empty.

    Raises:
        ValueError: There is no such model, it does not load, or the report is about other weights or about people whom
            the model was trained on.
    """
    prefix, source = parse_model_name(_locate(run)[0])
    if prefix != 'local-dir':
        raise ValueError(f'{run} is not a folder; give a run folder or a Hub-ready folder')
    model = _load(run)
    config = read_config(Path(source))
    facts = {name: value for name, value in config.get('vireid', {}).items() if name not in ('weights', 'evaluation')}
    earlier = folder if (Path(folder) / MODEL_CONFIG).is_file() else None
    known = [calibration, model_calibration(run), earlier and model_calibration(earlier)]
    facts = {**facts, 'calibration': _kept_calibration([each for each in known if each], model, half)}
    if report is not None:
        _check_report(report, model, half)
        _check_split(report, f'{prefix}:{source}')
        facts['evaluation'], table = evaluation_facts(report), str(report)
    else:
        kept, table = _kept_results(Path(folder), model, half)
        facts |= {'evaluation': kept} if kept else {}
        table = table or _validation_text(facts)
    save_model_folder(
        model,
        folder,
        facts=facts,
        table=table if note in table else '\n\n'.join(filter(None, (table, note))),
        half=half,
        license=license or config['pretrained_cfg'].get('license') or '',
        data_terms=data_terms or facts.get('data_terms', ''),
        sample=True,
    )


def save_model_config(
    model: nn.Module,
    path: str | Path,
    *,
    model_args: dict[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> None:
    """Write only the `config.json` that rebuilds the network; arguments as for `save_model_folder`."""
    with whole_file(path) as temporary:
        _save_config(unwrap_model(model), temporary, {}, model_args, input_size)


def round_to_half(model: nn.Module) -> None:
    """Round the weights in place to the precision of float16; they stay float32.

    Raises:
        ValueError: A weight is too large for half precision.
    """
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(value.half())
                if not value.isfinite().all():
                    raise ValueError(f'{name} has values beyond half precision (65504); save without half')


def is_finite(value: torch.Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity."""
    return bool(value.isfinite().all())


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a Hub-ready folder; anything else there is a ValueError."""
    path = folder / MODEL_CONFIG
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'cannot read {path}: {error}') from error
    if not isinstance(config, dict) or not isinstance(config.get('pretrained_cfg'), dict):
        raise ValueError(f'{path} is not the configuration of a timm model: it has no pretrained_cfg')
    return config


def check_folder(folder: Path, name: str) -> list[str]:
    """Verify a Hub-ready folder, which messages call `name`; return one line per check.

    Raises:
        ValueError: The first check that failed.
    """
    config = read_config(folder)
    try:
        lines = [_check_config(config, name), _check_weights(config, folder / WEIGHTS, name)]
        return [*lines, _check_reference(_load(f'local-dir:{folder}', shown=name).eval(), folder / REFERENCE, name)]
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # values in the files may be of any type
        raise ValueError(f'{name} cannot be checked: {one_line(error)}') from error


def check_cache(name: str) -> None:
    """Verify the cached weights of a model on the Hub, and remove a damaged file.

    The Hub client compares only lengths, and would load a damaged file from its cache forever. The cache names large
    files by their SHA-256.
    """
    prefix, identifier = parse_model_name(name)
    repo_id, _, revision = identifier.partition('@')
    for file in (WEIGHTS, REFERENCE) if prefix == 'hf-hub' else ():
        path = try_to_load_from_cache(repo_id, file, revision=revision or None)
        content = Path(path).resolve() if isinstance(path, str) else Path()
        if re.fullmatch('[0-9a-f]{64}', content.name) and sha256_of(content) != content.name:
            Path(path).unlink()
            content.unlink()
            raise ValueError(f'{name}: {file} was damaged during download and has been removed; try again')


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line(error: BaseException) -> str:
    """Return an error message as one line of limited length."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f'{text[:LONGEST_REASON]} ...'


def _without_places(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts without paths on this machine, which must not be published."""
    if not isinstance(facts.get('training'), dict):
        return facts
    training = {name: value for name, value in facts['training'].items() if name not in PLACES}
    model = str(training.get('model', ''))
    if model and not model.startswith('hf-hub:'):
        prefix = 'local-dir:' if model.startswith('local-dir:') else ''
        training['model'] = prefix + Path(model.removeprefix(prefix)).name
    return {**facts, 'training': training}


def _save_config(
    model: nn.Module,
    path: Path,
    facts: dict[str, Any],
    model_args: dict[str, Any] | None,
    input_size: tuple[int, int, int] | None,
    license: str | None = None,
) -> None:
    # Trained weights no longer have the tag that the network was created with.
    tag = model.pretrained_cfg.get('tag') if 'converted' in facts else facts.get('dataset', 'trained')
    save_config_for_hf(
        model,
        path,
        model_config={'vireid': facts, 'pretrained_cfg': {'tag': tag, 'license': license or None}},
        model_args={**_known_args(model), **(model_args or {}), 'retrieval': model.retrieval},
        data_config={'input_size': input_size} if input_size else None,
    )


def _known_args(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that the model remembers, so that a version with other defaults builds the same network.

    timm adds the arguments of the call, the classes, channels, pooling and image size.
    """
    given = {'num_classes', 'in_chans', 'global_pool', 'drop_rate', *getattr(model, '_model_args', {})}
    names = [name for name in inspect.signature(type(model).__init__).parameters if name not in given]
    values = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str, tuple, list))}


def _save_reference(model: nn.Module, folder: Path) -> None:
    if model.global_pool.pool_type == '':  # returns a map, not features
        return
    cfg, generator = read_config(folder)['pretrained_cfg'], torch.Generator().manual_seed(0)
    shape = (IMAGES, *cfg['input_size'])
    images = {name: torch.randint(256, shape, dtype=torch.uint8, generator=generator) for name in MODALITIES}
    features = _reference_features(model, cfg, images)
    if not all(map(is_finite, features.values())):
        raise ValueError('the features of this model are not finite, so it is not saved; check its weights')
    (folder / REFERENCE).write_bytes(safetensors.torch.save({**images, **features}))


def _reference_features(
    model: nn.Module,
    cfg: dict[str, Any],
    images: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return each modality's features before and after the BN-neck, [N, D] float32, of uint8 images [N, C, H, W]."""
    mean, std = (torch.tensor(cfg[name]).view(1, -1, 1, 1) for name in ('mean', 'std'))
    features = {}
    with torch.inference_mode():
        for modality, values in images.items():
            normalised = {modality: ((values / 255 - mean) / std).to(next(model.parameters()).dtype)}
            joint_map = model.forward_features(**normalised)
            features[f'{modality}_before_bn'] = model.forward_pool(joint_map).float()
            features[f'{modality}_after_bn'] = model.forward_neck(joint_map).float()
    return features


def _check_report(report: Report, model: nn.Module, half: bool) -> None:
    """A card must not claim the scores of other weights."""
    fingerprints = _fingerprints(model, half)
    if report.weights not in fingerprints:
        rounded = ' in half precision' if half else ''
        raise ValueError(
            f'the report is about the weights {report.weights or "of precomputed features"}, but this model{rounded} '
            f'has {fingerprints[1]}; evaluate this model, e.g. with --dataset and --data-dir here'
        )


def _fingerprints(model: nn.Module, half: bool) -> tuple[str, str]:
    """Return the fingerprints of a model's weights as they are stored, with and without classifiers."""
    model = copy.deepcopy(model)
    if half:
        round_to_half(model)
    with_classifiers = weights_fingerprint(model)
    model.reset_classifier(0)
    return with_classifiers, weights_fingerprint(model)


def _kept_calibration(known: list[Calibration], model: nn.Module, half: bool) -> dict[str, Any] | None:
    """Return the first calibration that is about these weights, as it is kept with them as they are stored."""
    stored = _fingerprints(model, half)[1]
    weights = (stored, weights_fingerprint(model, classifiers=False))  # rounding changes similarities hardly
    kept = next((each for each in known if each.settings.get('weights') in weights), None)
    if kept is None:
        if known:
            _logger.warning(
                'The calibration there is about other weights and is left out: run `vireid calibrate` again'
            )
        return None
    return dataclasses.replace(kept, settings={**kept.settings, 'weights': stored}).to_dict()


def _kept_results(folder: Path, model: nn.Module, half: bool) -> tuple[dict[str, Any] | None, str]:
    """Return what an earlier version of a folder says about the results of the same weights: facts, and text.

    Raises:
        ValueError: It has results of other weights.
    """
    facts = read_config(folder).get('vireid') or {} if (folder / MODEL_CONFIG).is_file() else {}
    evaluation = facts.get('evaluation')
    if not evaluation:
        return None, ''
    table = results_of((folder / CARD).read_text(encoding='utf-8')) if (folder / CARD).is_file() else ''
    if evaluation.get('weights') not in _fingerprints(model, half) or not table:
        raise ValueError(
            f'{folder} holds results of the weights {evaluation.get("weights")}, which would be lost: measure this '
            'model, with --dataset and --data-dir or with --report, or give another folder'
        )
    return evaluation, table


def _check_split(report: Report, name: str) -> None:
    """A card must not claim scores on people whom the model was trained on."""
    tested = {identity for result in report.protocols.values() for identity in result.queries['identity']}
    learned, problem = learned_identities(name, report.dataset, report.options, None, tested)
    if learned or report.learned_identities:
        problem = problem or f'the model was trained on {report.learned_identities} of the test identities'
        raise ValueError(f'the report is no measurement: {problem}')


def _validation_text(facts: dict[str, Any]) -> str:
    values = ', '.join(f'{name} {100 * value:.2f} %' for name, value in (facts.get('validation') or {}).items())
    return f'Measured only on held-out training identities (validation):\n{values}' if values else ''


def _check_config(config: dict[str, Any], name: str) -> str:
    architecture, cfg = config.get('architecture'), config['pretrained_cfg']
    if architecture not in timm.list_models('vireid_*'):
        raise ValueError(f'{name}: {architecture!r} is not an architecture of this version of vireid_timm')
    if cfg.get('crop_mode') != 'squash':
        raise ValueError(f'{name}: crop_mode is {cfg.get("crop_mode")!r}, expected squash')
    size = 'x'.join(map(str, cfg.get('input_size', ())))
    return f'configuration: {architecture}, {config.get("num_classes")} classes, images {size}'


def _check_weights(config: dict[str, Any], path: Path, name: str) -> str:
    facts = config.get('vireid', {}).get('weights', {})
    sha256, stated = sha256_of(path), str(facts.get('sha256'))
    if sha256 != stated:
        raise ValueError(
            f'{name}: {WEIGHTS} was damaged or replaced: its SHA-256 is {sha256[:12]}..., but {MODEL_CONFIG} states '
            f'{stated[:12]}...'
        )
    return f'weights: safetensors, {facts.get("precision")}, SHA-256 {sha256}'


def _check_reference(model: nn.Module, path: Path, name: str) -> str:
    try:
        reference = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{name}: cannot read {REFERENCE}: {one_line(error)}') from error
    cfg = model.pretrained_cfg
    images, shape = {modality: reference[modality] for modality in MODALITIES}, (IMAGES, *cfg['input_size'])
    if any(values.shape != shape for values in images.values()):
        raise ValueError(f'{name}: {REFERENCE} has no images of shape {shape}, which the model takes')
    worst = 0.0
    for key, found in _reference_features(model, cfg, images).items():
        stated = reference[key]
        same = found.shape == stated.shape and found.isfinite().all() and stated.isfinite().all()
        difference = (
            ((found - stated).abs().max() / stated.abs().max().clamp_min(1e-12)).item() if same else float('inf')
        )
        worst = max(worst, difference)
    result = f'differ by {worst:.2g} of the largest feature, at most {TOLERANCE:g} is allowed'
    if worst > TOLERANCE:
        raise ValueError(f'{name}: the model does not compute the features that it was published with: they {result}')
    return f'reference: every tensor fits; features of {2 * IMAGES} images before and after BN {result}'
