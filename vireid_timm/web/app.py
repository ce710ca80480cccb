"""The web demo: a Gradio app that searches visible images by infrared ones, and the reverse."""

import inspect
import logging
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ..data.images import ImageError, read_image
from ..device import resolve_device
from ..figures.explain import explain, require_captum, save_explanations
from ..options import check_range
from ..retrieval.gallery import Gallery
from ..training.interrupt import stop_signals
from . import page
from .galleries import Query, example_queries, open_galleries, other_modality, render_galleries
from .offline import offline

if TYPE_CHECKING:
    import gradio

_logger = logging.getLogger(__name__)

TOP = 10
LARGEST_UPLOAD = '20mb'
LARGEST_IMAGE = 25_000_000  # pixels
_SECONDS = 1800  # after which uploads are deleted
# A click on one of the buttons of a part of the page, with its data attributes.
_CLICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('click', {...button.dataset});
});"""
_SHOW = "() => document.getElementById('{}').scrollIntoView({{behavior: 'smooth', block: 'nearest'}})"


class Shown(NamedTuple):
    """What a visitor sees.

    Attributes:
        query: The query; None if there is none yet.
        results: Files of the results, best first.
    """

    query: Query | None = None
    results: Sequence[str] = ()


def serve(
    indexes: Sequence[str | os.PathLike] = (),
    *,
    host: str = '127.0.0.1',
    port: int = 7860,
    device: str = 'cuda',
) -> None:
    """Serve the web demo until Ctrl-C or SIGTERM.

    Pages load nothing from elsewhere, and this process connects to no other machine: no telemetry, no share links.

    Args:
        indexes: Folders that `vireid index` has written, at most one per modality; none for rendered people.
        host: Address to listen at; 0.0.0.0 for every one of this machine.
        port: Port to listen at.
        device: Where to compute; falls back to the CPU.

    Raises:
        FileNotFoundError: There is no such index.
        ValueError: A package is missing, or the indexes do not fit.
        OSError: The port is in use, or cannot be listened at.
    """
    _check_free(host, port)
    with stop_signals(), tempfile.TemporaryDirectory(prefix='vireid-web-') as folder:
        # Uploads are nobody else's to read, and end with the demo.
        os.environ['GRADIO_TEMP_DIR'] = os.path.join(folder, 'uploads')
        require_gradio()
        device = str(resolve_device(device))
        if indexes:
            galleries = open_galleries(indexes, device)
            if host not in ('127.0.0.1', 'localhost'):
                _logger.warning('Everybody who can reach this machine can search, and see images of the index')
        else:
            _logger.info('Rendering people to search')
            galleries = render_galleries(folder, device)
        with offline(host):
            app = build(galleries, rendered=not indexes)
            launch(app, host, port)
            _logger.info(f'The demo runs at http://{"127.0.0.1" if host == "0.0.0.0" else host}:{port}; Ctrl-C ends it')
            try:
                while True:
                    time.sleep(3600)
            finally:
                app.close(verbose=False)


def require_gradio() -> Any:
    """Return Gradio.

    Raises:
        ValueError: It is not installed, or what explanations need is not.
    """
    try:
        import gradio
    except ImportError:
        raise ValueError('the web demo needs the extra `web` (pip install "vireid_timm[web]")') from None
    require_captum()
    return gradio


def build(galleries: dict[str, Gallery], rendered: bool = False) -> 'gradio.Blocks':
    """Return the app, ready to be launched.

    Args:
        galleries: A gallery of each modality that can be searched.
        rendered: Whether their images are rendered, which the page then states.
    """
    gradio = require_gradio()
    examples = example_queries(galleries)
    modalities = sorted(examples)  # infrared first
    shown, answer = _start(galleries, modalities[0], examples[modalities[0]])
    settings = dict(analytics_enabled=False, delete_cache=(_SECONDS // 6, _SECONDS))
    with gradio.Blocks(title=page.TITLE, fill_width=True, **settings) as app:
        state = gradio.State(shown)
        part = partial(gradio.HTML, elem_classes='vireid', apply_default_css=False)
        part(page.introduction(modalities))
        with gradio.Row():
            with gradio.Column(scale=2, min_width=240):
                modality = gradio.Radio(modalities, value=modalities[0], label='Your image is')
                upload = gradio.File(show_label=False, height=130)
                strip = part(page.example_strip(examples[modalities[0]]), js_on_load=_CLICK)
            with gradio.Column(scale=9, min_width=300):
                found = part(answer, js_on_load=_CLICK, elem_id='answer')
                explanation = part('', elem_id='explanation')
        part(page.RESPONSIBLE_USE + page.RENDERED * rendered)

        def search(path: str, modality: str) -> tuple[Shown, str, str, None]:
            return *show(galleries, Query(path, modality, is_upload=True)), None  # ready for the next upload

        def try_example(event: gradio.EventData, modality: str) -> tuple[Shown, str, str]:
            return show(galleries, examples[modality][int(event.number)])

        def turn(modality: str, shown: Shown) -> tuple[Shown, str, str, str]:
            query = shown.query._replace(modality=modality) if shown.query.is_upload else examples[modality][0]
            return *show(galleries, query), page.example_strip(examples[modality])

        def explain_result(event: gradio.EventData, shown: Shown) -> str:
            return explanation_of(galleries, shown, int(event.rank))

        outputs = [state, found, explanation]
        turns = dict(concurrency_limit=1, concurrency_id='model', show_progress='minimal')
        hidden = dict(api_visibility='private', **turns)
        uploaded = upload.upload(search, [upload, modality], [*outputs, upload], api_name='search', **turns)
        tried = strip.click(try_example, modality, outputs, **hidden)
        modality.input(turn, [modality, state], [*outputs, strip], **hidden)
        explained = found.click(explain_result, state, explanation, **hidden)
        for event, place in ((uploaded, 'answer'), (tried, 'answer'), (explained, 'explanation')):
            event.then(None, js=_SHOW.format(place))
    return app


def launch(app: 'gradio.Blocks', host: str, port: int) -> None:
    """Start to serve an app in the background, with all that Gradio could send or load elsewhere switched off."""
    gradio = require_gradio()
    options = {}
    if 'run_history' in inspect.signature(app.launch).parameters:  # since Gradio 6.24
        options['run_history'] = False
    fonts = dict(font=('system-ui', 'sans-serif'), font_mono=('ui-monospace', 'monospace'))
    app.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        max_file_size=LARGEST_UPLOAD,
        footer_links=[],
        theme=gradio.themes.Default(primary_hue='blue', **fonts),
        css=page.CSS,
        **options,
    )


def show(galleries: dict[str, Gallery], query: Query) -> tuple[Shown, str, str]:
    """Search by an image; return what is shown now, the query with its results as HTML, and no explanation."""
    gallery = galleries[other_modality(query.modality)]
    try:
        image = read_image(query.path, LARGEST_IMAGE)
        (answer,) = gallery.search([query.path], query.modality, top=TOP)
    except (ValueError, OSError) as error:
        return Shown(query), page.message(_plain(error, query)), ''
    part = page.answer(query, image, answer, len(gallery), gallery.modality)
    return Shown(query, [match.path for match in answer.results]), part, ''


def _start(galleries: dict[str, Gallery], modality: str, examples: Sequence[Query]) -> tuple[Shown, str]:
    """Return what a visitor sees first."""
    if examples:
        return show(galleries, examples[0])[:2]
    gallery = galleries[other_modality(modality)]
    return Shown(), page.empty(len(gallery), modality, gallery.modality)


def explanation_of(galleries: dict[str, Gallery], shown: Shown, rank: int) -> str:
    """Return why the query and the result of some rank are similar, as HTML."""
    if shown.query is None or not 1 <= rank <= len(shown.results):
        return ''
    gallery = galleries[other_modality(shown.query.modality)]
    pair = [(shown.query.path, shown.query.modality), (shown.results[rank - 1], gallery.modality)]
    try:
        explanations = explain(gallery.network(), pair, gallery.index.about.features)
    except (ValueError, OSError) as error:
        return page.message(_plain(error, shown.query))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'explanation.png')
        save_explanations([each._replace(weights={}) for each in explanations], path)  # narrow enough for a phone
        with Image.open(path) as image:
            return page.explanation(image.convert('RGB'), rank)


def _plain(error: Exception, query: Query) -> str:
    """Return what went wrong without the folder of an upload, and without advice for the command line."""
    text = str(error.args[0] if isinstance(error, ImageError) else error)
    return text.replace(query.path, Path(query.path).name)


def _check_free(host: str, port: int) -> None:
    """Check that a port can be listened at, before the work."""
    check_range('port', port, 1, 65535)
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = str(error.strerror).partition(' (')[0]  # without the address again
        raise OSError(f'cannot listen at {host}:{port} ({reason}); choose another port or address') from error
