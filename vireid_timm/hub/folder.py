"""Models as Hub-ready folders, and everything that names a model; `publish.py` brings them to the Hub."""

import copy
import hashlib
import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn as nn
from huggingface_hub import try_to_load_from_cache
from timm.models._hub import save_config_for_hf

from ..constants import MODALITIES
from ..evaluation.features import weights_fingerprint
from ..evaluation.report import Report
from ..files import whole_file, whole_folder
from ..models.dual_stream import DualStreamResNet
from ..run_folder import BEST, load_checkpoint
from ..synthvi.render import contact_sheet
from ..version import __version__
from .card import evaluation_facts, model_card

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
CARD = 'README.md'
REFERENCE = 'reference.safetensors'
SAMPLE = 'sample.png'
FILES = (CARD, CONFIG, WEIGHTS, REFERENCE, SAMPLE)  # a Hub-ready folder holds these and nothing else

# Settings that say where a run was, which is nobody's business in a model that may be published.
PLACES = ('data_dir', 'output', 'experiment', 'resume')
IMAGES = 2  # reference images of each modality
LONGEST_REASON = 400  # characters; a state dict that does not fit names hundreds of tensors


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
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads as it is.

    Beside weights, configuration and card it holds reference tensors: images of noise and the features that the
    network has for them, which `check_model` compares.

    Args:
        model: The network, with or without its classifiers.
        folder: Where to write; an earlier version is replaced when the new one is complete.
        facts: What re-ID users ask of a model (dataset, metrics, training settings), kept in `config.json` under
            `vireid`; timm's loader passes it by. Settings that name places on this machine are left out.
        model_args: Arguments that the model was created with, beyond those that timm records.
        table: The measured results as text, for the card.
        input_size: Channels, height and width that the model was trained with, if not its default.
        half: Store the weights in half precision; they are computed with in float32.
        license: The Hub's identifier of the weights' licence, e.g. `apache-2.0`.
        data_terms: Terms of the training images, for the card.
        sample: Put rendered people into the card, to show what the two modalities are.

    Raises:
        ValueError: The folder holds anything else, or the weights are too large for half precision.
    """
    _refuse_other_content(Path(folder))
    # safetensors refuses channels-last weights; the caller's network stays as it is.
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format).eval()
    if half:
        round_to_half(model)
    with whole_folder(folder) as temporary:
        _save_weights(model, temporary / WEIGHTS, half)
        facts = _complete(facts or {}, model, temporary / WEIGHTS, half)
        if data_terms:
            facts['data_terms'] = data_terms
        config = _export_config(model, facts, model_args, input_size)
        config['model_config']['pretrained_cfg']['license'] = license or None
        save_config_for_hf(model, temporary / CONFIG, **config)
        _save_reference(model, temporary)
        if sample:
            contact_sheet(range(3)).save(temporary / SAMPLE)
        card = model_card(
            model.pretrained_cfg['architecture'],
            model.num_features,
            facts,
            table=table,
            license=license,
            data_terms=data_terms,
            sample=SAMPLE if sample else '',
        )
        (temporary / CARD).write_text(card, encoding='utf-8')


def save_run(
    run: str | Path,
    folder: str | Path,
    *,
    report: Report | None = None,
    note: str = '',
    half: bool = False,
    license: str = '',
    data_terms: str = '',
) -> None:
    """Write the best model of a run as a folder to be published, with what was measured; what `vireid hub save` does.

    Args:
        run: A run's folder, or a Hub-ready one.
        folder: Where to write; an earlier folder of this kind is replaced.
        report: Of an evaluation of these very weights, rounded as with `round_to_half` where `half` is set.
        note: What the card says below the results, e.g. what other runs of the same recipe scored.
        half: Store the weights in half precision.
        license: As for `save_model_folder`; empty for what the folder states already.
        data_terms: Likewise.

    Raises:
        ValueError: No such folder, one that does not load, or a report of other weights.
    """
    source = _model_folder(run)
    config = read_config(source)
    facts = {name: value for name, value in config.get('vireid', {}).items() if name not in ('weights', 'evaluation')}
    model = created(f'local-dir:{source}', str(run))
    if report is not None:
        _check_report(report, model, half)
        facts['evaluation'] = evaluation_facts(report)
    table = str(report) if report is not None else _validation_text(facts)
    save_model_folder(
        model,
        folder,
        facts=facts,
        table='\n\n'.join(filter(None, (table, note))),
        half=half,
        license=license or config.get('pretrained_cfg', {}).get('license') or '',
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
    """Write the `config.json` that builds the network anew, without weights; arguments as for `save_model_folder`."""
    with whole_file(path) as temporary:
        save_config_for_hf(model, temporary, **_export_config(model, None, model_args, input_size))


def save_embedded_weights(model: nn.Module, path: str | Path) -> None:
    """Write the network's weights without classifiers in half precision, as they are shipped in the package."""
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
        if not key.endswith('_head.fc.weight')
    }
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)


def round_to_half(model: nn.Module) -> None:
    """Round the weights in place to what half precision keeps of them; they stay float32.

    Raises:
        ValueError: A weight that half precision cannot hold.
    """
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(value.half())
                if not value.isfinite().all():
                    raise ValueError(f'{name} has values beyond half precision (65504); save without half')


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
    if str(source).startswith('hf-hub:'):
        try:
            model = created(str(source), pretrained=pretrained)
        finally:
            _check_cache(str(source))
    elif str(source).startswith('local-dir:') or not path.exists():
        model = created(str(source), pretrained=pretrained)
    else:
        folder = path if path.is_dir() else path.parent
        if path.suffix == '.pth' or not (folder / BEST).is_dir() and not any(folder.glob('*.safetensors')):
            model = _from_checkpoint(path)
        else:
            model = created(f'local-dir:{folder / BEST if (folder / BEST).is_dir() else folder}', str(source))
    model.reset_classifier(0)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a Hub-ready folder.

    Raises:
        ValueError: None there, or not one.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        if isinstance(config, dict) and isinstance(config.get('pretrained_cfg'), dict):
            return config
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'cannot read {folder / CONFIG}: {error}') from error
    raise ValueError(f'{folder / CONFIG} is not the configuration of a timm model: it has no pretrained_cfg')


def _refuse_other_content(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if others:
        raise ValueError(
            f'{folder} holds other things ({", ".join(others[:3])}); give a folder that does not exist yet'
        )


def _save_weights(model: nn.Module, path: Path, half: bool) -> None:
    state = model.state_dict()
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    path.write_bytes(safetensors.torch.save(state))  # not its own writing: a full disk has to be an OSError


def _complete(facts: dict[str, Any], model: nn.Module, weights: Path, half: bool) -> dict[str, Any]:
    """Facts with what is known of the weights, and without places."""
    precision = 'float16' if half else str(next(model.parameters()).dtype).removeprefix('torch.')
    return {
        'versions': _versions(),  # those that the facts bring along are what the network was trained with
        **_without_places(facts),
        'weights': {'precision': precision, 'sha256': sha256_of(weights)},
    }


def sha256_of(path: Path) -> str:
    """Of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _without_places(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without what names a place on this machine."""
    training = facts.get('training')
    if not isinstance(training, dict):
        return facts
    training = {name: value for name, value in training.items() if name not in PLACES}
    if str(training.get('model', '')).startswith('local-dir:'):
        training['model'] = f'local-dir:{Path(training["model"]).name}'
    return {**facts, 'training': training}


def _versions() -> dict[str, str]:
    versions = {'vireid_timm': __version__, 'timm': timm.__version__, 'torch': torch.__version__}
    commit = _commit()
    return {**versions, 'commit': commit} if commit else versions


def _commit() -> str:
    """The commit of the checkout that this package runs from; empty for an installed one, whose version says enough."""
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return ''
    try:
        command = ['git', '-C', str(root), 'rev-parse', 'HEAD']
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ''


def _export_config(
    model: nn.Module,
    facts: dict[str, Any] | None,
    model_args: dict[str, Any] | None,
    input_size: tuple[int, int, int] | None,
) -> dict[str, Any]:
    facts = facts or {}
    # Trained weights are no longer those of the tag that the network was created with.
    tag = model.pretrained_cfg.get('tag') if 'converted' in facts else facts.get('dataset', 'trained')
    return {
        'model_config': {'vireid': facts, 'pretrained_cfg': {'tag': tag}},
        'model_args': {**_known_args(model), **(model_args or {})},
        'data_config': {'input_size': input_size} if input_size else None,
    }


def _known_args(model: nn.Module) -> dict[str, Any]:
    """Arguments that the model remembers, so that a later version with other defaults builds the same network.

    timm adds those that it was called with, classes, channels, pooling and image size.
    """
    given = {'num_classes', 'in_chans', 'global_pool', 'drop_rate', *getattr(model, '_model_args', {})}
    names = [name for name in inspect.signature(type(model).__init__).parameters if name not in given]
    values = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str, tuple, list))}


def _save_reference(model: nn.Module, folder: Path) -> None:
    if model.global_pool.pool_type == '':  # a map, no features
        return
    cfg = read_config(folder)['pretrained_cfg']
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for modality in MODALITIES:
        images = torch.randint(256, (IMAGES, *cfg['input_size']), dtype=torch.uint8, generator=generator)
        before, after = reference_features(model, cfg, modality, images)
        tensors |= {modality: images, f'{modality}_before_bn': before, f'{modality}_after_bn': after}
    (folder / REFERENCE).write_bytes(safetensors.torch.save(tensors))


def reference_features(
    model: nn.Module,
    cfg: dict[str, Any],
    modality: str,
    images: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features before and after the BN-neck, [N, D] float32, of images as bytes [N, C, H, W]."""
    mean, std = (torch.tensor(cfg[name]).view(1, -1, 1, 1) for name in ('mean', 'std'))
    normalised = {modality: ((images / 255 - mean) / std).to(next(model.parameters()).dtype)}
    with torch.inference_mode():
        before = model.forward_branches(**normalised).features
        after = model.forward_head(model.forward_features(**normalised), pre_logits=True)
    return before.float(), after.float()


def _model_folder(run: str | Path) -> Path:
    folder = Path(str(run).removeprefix('local-dir:'))
    for candidate in (folder / BEST, folder):
        if (candidate / WEIGHTS).is_file():
            return candidate
    raise ValueError(f'{run} is neither a run with a {BEST}/ model nor a folder with {WEIGHTS} and {CONFIG}')


def _check_report(report: Report, model: nn.Module, half: bool) -> None:
    """A card must not claim what other weights scored."""
    model = copy.deepcopy(model)
    if half:
        round_to_half(model)
    fingerprints = [weights_fingerprint(model)]
    model.reset_classifier(0)
    fingerprints.append(weights_fingerprint(model))
    if report.weights not in fingerprints:
        rounded = ' in half precision' if half else ''
        raise ValueError(
            f'the report is about the weights {report.weights or "of features from elsewhere"}, this model'
            f'{rounded} has {fingerprints[1]}; evaluate this very model, e.g. with --dataset and --data-dir here'
        )


def _validation_text(facts: dict[str, Any]) -> str:
    validation = facts.get('validation')
    if not validation:
        return ''
    values = ', '.join(f'{name} {100 * value:.2f} %' for name, value in validation.items())
    return f'On held-out training identities (validation), nothing else was measured:\n{values}'


def created(name: str, said: str = '', pretrained: bool = True) -> nn.Module:
    """A model with the classifiers that it was saved with, so that every tensor has to fit.

    Args:
        name: As timm takes it.
        said: What the user called it.
        pretrained: Load the weights.
    """
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        known = ', '.join(timm.list_models('vireid_*'))
        raise ValueError(f'there is neither a folder, a file nor a model {name!r}; models of this library: {known}')
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # timm raises whatever a wrong configuration happens to lead to
        raise ValueError(f'cannot load a model from {said or name}: {one_line(error)}') from error
    if not isinstance(model, DualStreamResNet):
        kind = type(model).__name__
        raise ValueError(f'{said or name} is a {kind}, not a visible-infrared re-ID model of this library')
    return model


def _from_checkpoint(path: Path) -> nn.Module:
    """The weights of a training checkpoint, averaged ones where the run kept them."""
    checkpoint = load_checkpoint(path)
    model = created(f'local-dir:{path if path.is_dir() else path.parent}', str(path), pretrained=False)
    try:
        model.load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
    except RuntimeError as error:
        raise ValueError(f'cannot load a model from {path}: {one_line(error)}') from error
    return model


def one_line(error: BaseException) -> str:
    """An error in one line of bearable length."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f'{text[:LONGEST_REASON]} ...'


def repo_and_revision(name: str) -> tuple[str, str | None]:
    """OWNER/NAME and the revision, None for the main branch, of `hf-hub:OWNER/NAME@REVISION`."""
    repo_id, _, revision = name.removeprefix('hf-hub:').partition('@')
    return repo_id, revision or None


def _check_cache(name: str) -> None:
    repo_id, revision = repo_and_revision(name)
    path = try_to_load_from_cache(repo_id, WEIGHTS, revision=revision)
    if isinstance(path, str):
        check_download(name, Path(path))


def check_download(name: str, path: Path) -> None:
    """Compare a large file with its SHA-256, after which the cache names it, and remove it if it is damaged.

    The client compares lengths alone, and would serve the damaged file from its cache ever after.
    """
    content = path.resolve()
    if re.fullmatch('[0-9a-f]{64}', content.name) and sha256_of(content) != content.name:
        path.unlink()
        content.unlink()
        raise ValueError(f'{name}: {path.name} was damaged on its way and has been removed; try again')
