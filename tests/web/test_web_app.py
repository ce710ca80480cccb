"""The web demo over HTTP, as its page calls it; and the mistakes that end it before it starts."""

import http.client
import json
import socket
import sys
import uuid
from contextlib import closing
from pathlib import Path

import pytest
from web_demo import BROKEN, PEOPLE, Demo

from vireid_timm.cli.main import main
from vireid_timm.constants import MODALITIES


def _fetch(demo: Demo, path: str, data: bytes | None = None, kind: str = '') -> tuple[int, str]:
    """Return status and text; a redirection is not followed."""
    connection = http.client.HTTPConnection(demo.address.removeprefix('http://'), timeout=60)
    with closing(connection):
        connection.request('GET' if data is None else 'POST', f'/{path}', data, {'Content-Type': kind} if kind else {})
        reply = connection.getresponse()
        return reply.status, reply.read().decode()


def _upload(demo: Demo, file: Path) -> tuple[int, str]:
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'
    body = head.encode() + file.read_bytes() + f'\r\n--{boundary}--\r\n'.encode()
    return _fetch(demo, 'gradio_api/upload', body, f'multipart/form-data; boundary={boundary}')


def _search(demo: Demo, path: str, modality: str) -> str:
    """Call the page's search; return what the server says."""
    data = json.dumps({'data': [{'path': path, 'meta': {'_type': 'gradio.FileData'}}, modality]}).encode()
    _, reply = _fetch(demo, 'gradio_api/call/search', data, 'application/json')
    return _fetch(demo, f'gradio_api/call/search/{json.loads(reply)["event_id"]}')[1]


def _answer(demo: Demo, file: Path, modality: str) -> str:
    """Upload a file and search by it; return the answer as HTML."""
    status, reply = _upload(demo, file)
    assert status == 200, reply
    event, data = _search(demo, json.loads(reply)[0], modality).strip().split('\n')
    assert event == 'event: complete', data
    return json.loads(data.removeprefix('data: '))[1]


@pytest.mark.parametrize('modality', MODALITIES)
def test_an_upload_is_answered_in_both_directions(demo: Demo, image_files: Path, modality: str) -> None:
    answer = _answer(demo, image_files / f'{modality}.png', modality)
    (other,) = set(MODALITIES) - {modality}
    assert f'of {2 * PEOPLE} {other} images' in answer and f'Your {modality} image' in answer
    assert answer.count('data-rank=') == answer.count('same person') == 10 and 'not in the gallery' in answer


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_upload_is_answered_in_plain_words(demo: Demo, image_files: Path, name: str) -> None:
    answer = _answer(demo, image_files / name, 'infrared')
    assert f'>{name}: ' in answer and BROKEN[name] in answer and 'role="alert"' in answer


def test_what_is_too_heavy_is_refused(demo: Demo, image_files: Path) -> None:
    status, reply = _upload(demo, image_files / 'heavy.png')
    assert status == 413 and 'maximum' in reply


def test_nothing_is_sent_or_loaded(demo: Demo, image_files: Path) -> None:
    settings = json.loads(_fetch(demo, 'config')[1])
    assert settings['analytics_enabled'] is False
    assert not settings.get('run_history')  # where this Gradio has one
    assert _fetch(demo, 'monitoring')[0] == 403
    assert _answer(demo, image_files / 'visible.png', 'visible')
    assert 'Refused' not in demo.output.read_text(), 'Gradio itself wanted to connect'


def test_no_visitor_makes_it_read_another_file_or_a_web_address(demo: Demo) -> None:
    for path in (__file__, 'http://elsewhere.example/a.jpg'):
        assert _search(demo, path, 'infrared').startswith('event: error')
        status, text = _fetch(demo, f'gradio_api/file={path}')
        assert status != 200 and __doc__ not in text
    assert 'Refused a connection to elsewhere.example' in demo.output.read_text()


def test_a_port_in_use_is_one_line(demo: Demo, capsys: pytest.CaptureFixture) -> None:
    port = demo.address.rpartition(':')[2]
    assert main(['demo', '--web', '--port', port]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'vireid: error: cannot listen at 127.0.0.1:{port} (') and error.count('\n') == 1


@pytest.mark.parametrize('missing', ['gradio', 'captum.attr'])
def test_a_missing_package_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in {'gradio', missing}:  # the real one is slow to import
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    assert main(['demo', '--web', '--port', str(port)]) == 1
    error = capsys.readouterr().err
    assert 'vireid_timm[' in error and error.count('\n') == 1


@pytest.mark.parametrize(
    ('words', 'answer'),
    [
        ('--web --seed 3 --output there', '--output there, --seed 3: only without --web'),
        ('--host 0.0.0.0 --index here', '--index here, --host 0.0.0.0: only with --web'),
        ('--web --port 70000', 'port must be at most 65535, got 70000'),
        ('--web --host no.such.host.invalid', 'cannot listen at no.such.host.invalid:7860'),
    ],
)
def test_flags_that_do_not_fit_are_named(words: str, answer: str, capsys: pytest.CaptureFixture) -> None:
    assert main(['demo', *words.split()]) == 1
    error = capsys.readouterr().err
    assert answer in error and error.count('\n') == 1
