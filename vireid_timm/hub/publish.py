"""Push models to the Hub, and check published ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from timm.models import parse_model_name

from ..run_folder import BEST, CLASS_MAP
from .card import LOCAL_NAME
from .folder import CARD, FILES, REQUIRED, check_cache, check_folder, one_line, resolve_model_name

PICKLES = ('.bin', '.ckpt', '.pickle', '.pkl', '.pt', '.pth', '.tar')

# The Hub client's errors derive from those of its HTTP library, which differs between versions.
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
    """Check a Hub-ready folder and upload it in one commit. `vireid hub push` calls this.

    Args:
        folder: As `save_model_folder` or `save_run` wrote it. Exactly these files are uploaded; the card names the
            model by its name on the Hub.
        repo_id: OWNER/NAME. The repository is created if it does not exist, unless `create_pr` is set.
        private: Create a private repository; an error if a public one exists.
        create_pr: Open a pull request instead of committing.
        revision: Existing branch to commit to.
        message: The commit message.

    Returns:
        The URL of the commit or the pull request.

    Raises:
        ValueError: The folder is not fit for publishing, or the Hub refused.
    """
    folder = Path(folder)
    repo_id = repo_id.removeprefix('hf-hub:')
    names = _publishable(folder)
    check_model(folder)
    card = (folder / CARD).read_text(encoding='utf-8').replace(LOCAL_NAME, f'hf-hub:{repo_id}')
    with _hub_errors(repo_id, revision):
        api = HfApi(library_name='vireid_timm')
        if not create_pr:
            # None rather than False: an organisation may create private repositories by default.
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise ValueError(f'{repo_id} exists and is public; make it private on the Hub, or choose another name')
        # `upload_folder` may make several commits, and somebody could load half a model.
        content = {name: card.encode() if name == CARD else str(folder / name) for name in names}
        operations = [CommitOperationAdd(name, source) for name, source in content.items()]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr or None
        )
    return str(commit.pr_url or commit.commit_url)


def check_model(source: str | Path) -> list[str]:
    """Verify a model on the Hub or in a folder against what it says about itself. `vireid hub check` calls this.

    Args:
        source: `hf-hub:OWNER/NAME[@REVISION]`, `local-dir:FOLDER`, a Hub-ready folder, or a run folder.

    Returns:
        One line per check.

    Raises:
        ValueError: There is no such model, or the first check that failed.
    """
    name = resolve_model_name(source)
    prefix, identifier = parse_model_name(name)
    if prefix == 'hf-hub':
        folder, files = _download(name)
    else:
        folder = Path(identifier)
        if not folder.is_dir():
            raise ValueError(f'no folder {folder}; give hf-hub:OWNER/NAME or a folder')
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
        _check_files(name, files)
    return [f'files: {", ".join(files)}', *check_folder(folder, name)]


def _download(name: str) -> tuple[Path, list[str]]:
    """Return the cached folder of a model and the names of all files in its repository."""
    repo_id, _, revision = name.removeprefix('hf-hub:').partition('@')
    files, commit = list(REQUIRED), revision or None
    with _hub_errors(repo_id, commit):
        try:
            info = HfApi(library_name='vireid_timm').model_info(repo_id, revision=commit)
            files, commit = sorted(file.rfilename for file in info.siblings or []), info.sha  # the branch may move
        except OfflineModeIsEnabled:
            pass  # the cache may have all of them
        _check_files(name, files)
        paths = [hf_hub_download(repo_id, file, revision=commit) for file in REQUIRED]
    check_cache(f'hf-hub:{repo_id}@{commit}' if commit else name)
    return Path(paths[0]).parent, files


def _check_files(name: str, files: list[str]) -> None:
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles:
        raise ValueError(f'{name} holds {", ".join(pickles[:3])}: pickles can run programs, only safetensors are safe')
    missing = [file for file in REQUIRED if file not in files]
    if missing:
        raise ValueError(f'{name} has no {", ".join(missing)}: only folders that `vireid hub save` made can be checked')


def _publishable(folder: Path) -> list[str]:
    """Return the names of the files to upload."""
    if not folder.is_dir():
        raise ValueError(f'no folder {folder}; make one with `vireid hub save RUN {folder}`')
    found = sorted(path.name for path in folder.iterdir())
    private = [name for name in found if name in (CLASS_MAP, BEST) or name.endswith(PICKLES)]
    missing = [name for name in (CARD, *REQUIRED) if name not in found]
    if private:
        raise ValueError(
            f'{folder} holds {", ".join(private[:3])}, which may name people or run programs: do not publish it; '
            'make a folder with `vireid hub save RUN DIR` and push that'
        )
    if missing:
        raise ValueError(f'{folder} has no {", ".join(missing)}; make a folder with `vireid hub save RUN DIR`')
    return [name for name in FILES if name in found]


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn every error of the Hub client into a ValueError of one line."""
    try:
        yield
    except _HUB_ERRORS as error:
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        cause = f' ({one_line(error.__cause__)})' if isinstance(error, RuntimeError) and error.__cause__ else ''
        asked = '' if status else f' (asking {constants.ENDPOINT})'
        hint = '; log in with a token that may do this (`hf auth login`)' if status in (401, 403) else ''
        revision = f'@{revision}' if revision else ''
        raise ValueError(f'{repo_id}{revision}: {one_line(error)}{cause}{asked}{hint}') from error
