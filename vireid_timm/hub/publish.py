"""Publishing models on the Hub, and verifying published ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import timm
import torch
import torch.nn as nn
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from ..constants import MODALITIES
from ..run_folder import BEST, CLASS_MAP, LAST
from .card import LOCAL_NAME
from .folder import (
    CARD,
    CONFIG,
    FILES,
    IMAGES,
    REFERENCE,
    WEIGHTS,
    check_download,
    created,
    one_line,
    read_config,
    reference_features,
    repo_and_revision,
    sha256_of,
)

PICKLES = ('.bin', '.ckpt', '.pickle', '.pkl', '.pt', '.pth', '.tar')
# Of the largest feature. The features are computed in float32 from the weights as stored, so that the precision that
# they are stored in changes nothing; what is left is the order in which processors and versions add things up.
TOLERANCE = 1e-3

# The Hub client's errors derive from those of its HTTP library, which is another one from version to version.
_HUB_ERRORS = (OSError, RuntimeError, EntryNotFoundError, HfHubHTTPError.__bases__[0])


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    message: str = 'Upload model made with vireid_timm',
) -> str:
    """Upload a Hub-ready folder in one commit, after having checked it; what `vireid hub push` does.

    Args:
        folder: As `save_model_folder` or `save_run` wrote it. Exactly these files are uploaded; in the card,
            the name on the Hub takes the place of the folder's.
        repo_id: OWNER/NAME; created where it does not exist, unless `create_pr` is set.
        private: Nobody else can see it; an error where it exists and is public.
        create_pr: Open a pull request instead of committing.
        revision: Branch to commit to; it has to exist.
        message: Of the commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: A folder that is not fit to be published, or what the Hub had against it.
    """
    folder = Path(folder)
    repo_id = repo_id.removeprefix('hf-hub:')
    names = _publishable(folder)
    check_model(folder)
    card = (folder / CARD).read_text(encoding='utf-8').replace(LOCAL_NAME, f'hf-hub:{repo_id}')
    with _hub_errors(repo_id, revision):
        api = HfApi(library_name='vireid_timm')
        if not create_pr:
            # None rather than False: an organisation may have private as its default.
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise ValueError(f'{repo_id} exists and is public; make it private on the Hub, or choose another name')
        # One commit, unlike `upload_folder`, which may make several: nobody ever loads half of it.
        content = {name: card.encode() if name == CARD else str(folder / name) for name in names}
        operations = [CommitOperationAdd(name, source) for name, source in content.items()]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr or None
        )
    return str(commit.pr_url or commit.commit_url)


def check_model(name: str | Path) -> list[str]:
    """Verify a published or local model against what its folder says of it; what `vireid hub check` does.

    Args:
        name: `hf-hub:OWNER/NAME`, OWNER/NAME, either with @REVISION; `local-dir:FOLDER`, or a folder.

    Returns:
        What was checked, a line each.

    Raises:
        ValueError: No such model, or the first thing that is not as it should be.
    """
    name = str(name)
    folder, files = _fetched(name)
    try:
        said = [_check_files(name, files), _check_config(name, folder), _check_weights(name, folder)]
        model = created(f'local-dir:{folder}', name).eval()
        return [*said, _check_reference(name, folder, model)]
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # what the files say may be of any kind
        raise ValueError(f'{name} cannot be checked: {one_line(error)}') from error


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Say in one line what the Hub had against it."""
    name = f'{repo_id}@{revision}' if revision else repo_id
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError(f'{name}: HF_HUB_OFFLINE is set, and this needs the Hub') from error
    except RevisionNotFoundError as error:
        raise ValueError(f'{repo_id} has no revision {revision!r} on the Hub; create the branch first') from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f'{repo_id}: there is no such model on the Hub, or you may not see it; check the name, or log in with '
            '`hf auth login`'
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(f'{name} is not in the cache, and the Hub did not answer: {one_line(error)}') from error
    except _HUB_ERRORS as error:
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        hint = '; log in with a token that may do this (`hf auth login`)' if status in (401, 403) else ''
        cause = f' ({one_line(error.__cause__)})' if isinstance(error, RuntimeError) and error.__cause__ else ''
        asked = '' if status else f' (asking {constants.ENDPOINT})'
        raise ValueError(f'{name}: {one_line(error)}{cause}{asked}{hint}') from error


def _publishable(folder: Path) -> list[str]:
    """The files to upload."""
    if not folder.is_dir():
        raise ValueError(f'no folder {folder}; `vireid hub save RUN {folder}` makes one')
    found = sorted(path.name for path in folder.iterdir())
    private = [name for name in found if name in (LAST, CLASS_MAP, BEST) or name.endswith(PICKLES)]
    if private:
        raise ValueError(
            f'{folder} holds {", ".join(private[:3])}, which may name people or run programs and is not for others; '
            'make a folder with `vireid hub save RUN DIR` and push that'
        )
    missing = [name for name in (CARD, CONFIG, WEIGHTS, REFERENCE) if name not in found]
    if missing:
        raise ValueError(f'{folder} has no {", ".join(missing)}; make a folder with `vireid hub save RUN DIR`')
    return [name for name in FILES if name in found]


def _fetched(name: str) -> tuple[Path, list[str]]:
    """The folder that holds a model, downloaded if need be, and the names of all files that were published with it."""
    folder = Path(name.removeprefix('local-dir:'))
    if name.startswith('local-dir:') or folder.is_dir():
        if not folder.is_dir():
            raise ValueError(f'no folder {folder}')
        return folder, sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
    repo_id, revision = repo_and_revision(name)
    if '/' not in repo_id:
        raise ValueError(f'there is no folder {name}, and names on the Hub are OWNER/NAME')
    wanted = files = [CONFIG, WEIGHTS, REFERENCE]
    with _hub_errors(repo_id, revision):
        try:
            info = HfApi(library_name='vireid_timm').model_info(repo_id, revision=revision)
            # From here on this commit, should the branch move.
            files, revision = sorted(file.rfilename for file in info.siblings or []), info.sha
        except OfflineModeIsEnabled:
            pass  # the cache has to have them all
        _check_files(name, files)
        paths = [hf_hub_download(repo_id, file, revision=revision) for file in wanted]
    for path in map(Path, paths):
        check_download(name, path)
    return path.parent, files


def _check_files(name: str, files: list[str]) -> str:
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f'{name} holds {", ".join(pickles[:3])}: pickles can run programs, only safetensors may be there'
        )
    missing = [file for file in (CONFIG, WEIGHTS, REFERENCE) if file not in files]
    if missing:
        raise ValueError(
            f'{name} has no {", ".join(missing)}: it is no folder of `vireid hub save` and cannot be verified'
        )
    return f'files: {", ".join(files)}'


def _check_config(name: str, folder: Path) -> str:
    config = read_config(folder)
    architecture, cfg = config.get('architecture'), config['pretrained_cfg']
    if architecture not in timm.list_models('vireid_*'):
        raise ValueError(f'{name}: {architecture!r} is not an architecture of this version of vireid_timm')
    if cfg.get('crop_mode') != 'squash':
        raise ValueError(f'{name}: images must be squashed to size, but crop_mode is {cfg.get("crop_mode")!r}')
    size = 'x'.join(map(str, cfg.get('input_size', ())))
    return f'configuration: {architecture}, {config.get("num_classes")} classes, images {size}'


def _check_weights(name: str, folder: Path) -> str:
    facts = read_config(folder).get('vireid', {}).get('weights', {})
    sha256, stated = sha256_of(folder / WEIGHTS), str(facts.get('sha256'))
    if sha256 != stated:
        raise ValueError(
            f'{name}: {WEIGHTS} is not the file that {CONFIG} was written for: its SHA-256 is {sha256[:12]}..., '
            f'not {stated[:12]}...; it was damaged or exchanged'
        )
    return f'weights: safetensors, {facts.get("precision")}, SHA-256 {sha256}'


def _check_reference(name: str, folder: Path, model: nn.Module) -> str:
    try:
        reference = safetensors.torch.load_file(folder / REFERENCE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{name}: cannot read {REFERENCE}: {one_line(error)}') from error
    cfg = model.pretrained_cfg
    shape = (IMAGES, *cfg['input_size'])
    worst = 0.0
    for modality in MODALITIES:
        images, *stated = (reference.get(f'{modality}{end}') for end in ('', '_before_bn', '_after_bn'))
        if images is None or tuple(images.shape) != shape:
            raise ValueError(f'{name}: {REFERENCE} has no {modality} images of the shape {shape} that the model takes')
        found = reference_features(model, cfg, modality, images)
        worst = max(worst, *map(_difference, found, stated))
    if worst > TOLERANCE:
        raise ValueError(
            f'{name}: the model does not compute the features that it was published with: they differ by '
            f'{worst:.2g} of the largest one, more than {TOLERANCE:g}'
        )
    return (
        f'reference: every tensor fits; features of {2 * IMAGES} images, before and after BN, differ by '
        f'{worst:.1g} of the largest one (at most {TOLERANCE:g})'
    )


def _difference(found: torch.Tensor, stated: torch.Tensor | None) -> float:
    if stated is None or found.shape != stated.shape or not (found.isfinite().all() and stated.isfinite().all()):
        return float('inf')
    return ((found - stated).abs().max() / stated.abs().max().clamp_min(1e-12)).item()
