"""A Hub on a loopback port, with enough of huggingface.co's protocol for the installed client to push, load and fail.

Repositories live in memory, every request is recorded, and `fault` makes requests fail. As on the real Hub, writing
needs a token with write access, a new repository starts with `.gitattributes`, and weights are uploaded as large files.
"""

import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Optional
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

READER, WRITER = 'hf_may_read', 'hf_may_write'  # tokens
MAIN = 'main'
LARGE_FILES = ('.safetensors', '.bin', '.pth', '.png')
GIT_ATTRIBUTES = ''.join(f'*{ending} filter=lfs diff=lfs merge=lfs -text\n' for ending in LARGE_FILES).encode()


class HubError(Exception):
    """An error answer, with the code by which the client distinguishes one 404 from another."""

    def __init__(self, status: int, message: str, code: str = '') -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    body: bytes = b''
    headers: dict[str, str] = {}
    status: int = 200
    cut_after: Optional[int] = None


@dataclass
class Fault:
    """How the next `times` requests of `method` to paths with this ending fail; by default unanswered and closed."""

    method: str
    ending: str
    times: float
    status: Optional[int]  # the whole answer
    cut_after: Optional[int]  # bytes of the body, before the connection is closed
    body: Optional[bytes]  # sent instead of the file's, with a length to match


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # hash -> path -> content
    heads: dict[str, str] = field(default_factory=dict)  # branch, or refs/pr/N -> hash

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        blobs = [blob_id(path, content) for path, content in sorted(files.items())]
        sha = hashlib.sha1(repr((len(self.commits), name, blobs)).encode()).hexdigest()
        self.commits[sha] = files
        self.heads[name] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.heads.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return sha


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(path: str, content: bytes) -> str:
    """Return the Hub's name for a file's content: its SHA-256 if it is large, else git's hash."""
    if path.endswith(LARGE_FILES):
        return sha256(content)
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class HubServer:
    """The server, as a context manager.

    Args:
        port: Where to listen; 0 takes a free one.

    Attributes:
        url: The value for HF_ENDPOINT.
        repositories: OWNER/NAME -> `Repository`.
        requests: (method, path) of every request so far.
        faults: Failures still to come.
    """

    def __init__(self, port: int = 0) -> None:
        self._http = ThreadingHTTPServer(('127.0.0.1', port), _handler(self))
        self.url = f'http://127.0.0.1:{self._http.server_address[1]}'
        self._lock = threading.RLock()
        self.reset()

    def __enter__(self) -> 'HubServer':
        # With the default of 0.5 s, leaving the block would take that long.
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []

    def publish(self, name: str, files: dict[str, bytes], *, branch: str = MAIN, private: bool = False) -> str:
        """Commit exactly these files without the client; return the commit's hash."""
        return self.repositories.setdefault(name, Repository(private)).commit(branch, dict(files))

    def files(self, name: str, revision: str = MAIN) -> dict[str, bytes]:
        """Return the files of a revision, except `.gitattributes`."""
        repository = self.repositories[name]
        files = repository.commits[repository.resolve(revision)]
        return {path: content for path, content in files.items() if path != '.gitattributes'}

    def fault(
        self,
        method: str,
        ending: str = '',
        *,
        status: Optional[int] = None,
        cut_after: Optional[int] = None,
        body: Optional[bytes] = None,
        times: float = math.inf,
    ) -> None:
        """Make the next requests of a method, to paths with this ending, fail."""
        self.faults.append(Fault(method, ending, times, status, cut_after, body))

    def answer(self, request: Request) -> Optional[Answer]:
        with self._lock:
            self.requests.append((request.method, request.path))
            fault = self._next_fault(request)
            if fault is not None and (fault.status, fault.cut_after, fault.body) == (None, None, None):
                return None
            try:
                if fault is not None and fault.status is not None:
                    raise HubError(fault.status, 'as the test wants it')
                answer = self._route(request, fault.body if fault else None)
            except HubError as error:
                headers = {'X-Error-Message': error.message, **({'X-Error-Code': error.code} if error.code else {})}
                return _json({'error': error.message}, headers, error.status)
            return answer._replace(cut_after=fault.cut_after) if fault else answer

    def _next_fault(self, request: Request) -> Optional[Fault]:
        for fault in self.faults:
            if fault.times > 0 and fault.method == request.method and request.path.endswith(fault.ending):
                fault.times -= 1
                return fault
        return None

    def _route(self, request: Request, body: Optional[bytes]) -> Answer:
        for methods, pattern, name in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in methods:
                groups = [unquote(group) if group else None for group in match.groups()]
                function: Callable[..., Answer] = getattr(self, name)
                return function(request, *groups, **({'instead': body} if body is not None else {}))
        raise HubError(404, f'no such page: {request.method} {request.path}')

    def _role(self, request: Request) -> str:
        token = request.headers.get('Authorization', '').removeprefix('Bearer ')
        if token not in ('', READER, WRITER):
            raise HubError(401, 'Invalid credentials in Authorization header')
        return token

    def _check_writer(self, request: Request) -> None:
        role = self._role(request)
        if role != WRITER:
            raise HubError(
                403 if role else 401, "You don't have the rights" if role else 'Invalid username or password.'
            )

    def _repository(self, request: Request, name: str) -> Repository:
        repository = self.repositories.get(name)
        role = self._role(request)
        if repository is None or repository.private and not role:
            raise HubError(404 if role or repository is None else 401, 'Repository not found', 'RepoNotFound')
        return repository

    def create(self, request: Request) -> Answer:
        self._check_writer(request)
        asked = request.json()
        name = f'{asked["organization"] or "me"}/{asked["name"]}'
        if name in self.repositories:
            return _json({'error': 'You already created this model repo', 'url': f'{self.url}/{name}'}, status=409)
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.publish(name, {'.gitattributes': GIT_ATTRIBUTES}, private=bool(private))
        return _json({'url': f'{self.url}/{name}', 'name': name})

    def validate_card(self, request: Request) -> Answer:
        match = re.match(r'---\n(.*?)\n---\n', request.json()['content'], re.DOTALL)
        try:
            facts = yaml.safe_load(match[1]) if match else None
            problems = [] if isinstance(facts, dict) else ['no metadata at the head of the card']
        except yaml.YAMLError as error:
            problems = [str(error)]
        return _json(
            {'errors': [{'message': text} for text in problems], 'warnings': []}, status=400 if problems else 200
        )

    def info(self, request: Request, name: str, revision: Optional[str] = None) -> Answer:
        repository = self._repository(request, name)
        sha = repository.resolve(revision or MAIN)
        siblings = [{'rfilename': path} for path in sorted(repository.commits[sha])]
        return _json({'id': name, 'sha': sha, 'private': repository.private, 'siblings': siblings, 'tags': []})

    def branch(self, request: Request, name: str, branch: str) -> Answer:
        self._check_writer(request)
        repository = self._repository(request, name)
        if branch in repository.heads:
            raise HubError(409, f'Reference already exists: refs/heads/{branch}')
        repository.heads[branch] = repository.resolve(request.json().get('startingPoint', MAIN))
        return _json({'success': True}, status=201)

    def preupload(self, request: Request, name: str, revision: str) -> Answer:
        self._check_writer(request)
        repository = self._repository(request, name)
        there = repository.commits[repository.resolve(revision)]
        files = []
        for path in (file['path'] for file in request.json()['files']):
            mode = 'lfs' if path.endswith(LARGE_FILES) else 'regular'
            oid = blob_id(path, there[path]) if path in there else None
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        return _json({'files': files})

    def large_batch(self, request: Request, name: str) -> Answer:
        self._check_writer(request)
        self._repository(request, name)
        objects = []
        for asked in request.json()['objects']:
            href = {'href': f'{self.url}/large/{asked["oid"]}'}
            missing = asked['oid'] not in self.large_files
            objects.append({**asked, **({'actions': {'upload': href, 'verify': href}} if missing else {})})
        return _json({'transfer': 'basic', 'objects': objects})

    def large_put(self, request: Request, oid: str) -> Answer:
        if sha256(request.body) != oid:
            raise HubError(400, 'the content does not have this SHA-256')
        self.large_files[oid] = request.body
        return Answer()

    def large_verify(self, request: Request, oid: str) -> Answer:
        self._check_writer(request)
        asked = request.json()
        if len(self.large_files.get(asked['oid'], b'')) != asked['size'] or asked['oid'] != oid:
            raise HubError(422, 'no such large file')
        return Answer()

    def commit(self, request: Request, name: str, revision: str) -> Answer:
        self._check_writer(request)
        repository = self._repository(request, name)
        files = dict(repository.commits[repository.resolve(revision)])
        for line in request.body.splitlines():
            self._apply(files, **json.loads(line))
        target, extra = revision, {}
        if 'create_pr' in request.query:
            number = 1 + sum(head.startswith('refs/pr/') for head in repository.heads)
            target, extra = f'refs/pr/{number}', {'pullRequestUrl': f'{self.url}/{name}/discussions/{number}'}
        elif revision not in repository.heads:
            raise HubError(404, f'{revision} is not a branch', 'RevisionNotFound')
        sha = repository.commit(target, files)
        return _json({'success': True, 'commitOid': sha, 'commitUrl': f'{self.url}/{name}/commit/{sha}', **extra})

    def _apply(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        if key == 'file':
            files[value['path']] = base64.b64decode(value['content'])
        elif key == 'lfsFile':
            if value['oid'] not in self.large_files:
                raise HubError(400, f'the content of {value["path"]} was never uploaded')
            files[value['path']] = self.large_files[value['oid']]
        elif key != 'header':
            raise HubError(400, f'unknown operation {key}')

    def resolve(
        self, request: Request, name: str, revision: str, path: str, *, instead: Optional[bytes] = None
    ) -> Answer:
        repository = self._repository(request, name)
        sha = repository.resolve(revision)
        if path not in repository.commits[sha]:
            raise HubError(404, f'{path} does not exist on {revision}', 'EntryNotFound')
        content = repository.commits[sha][path]
        # The hash of the true content, whatever is sent.
        headers = {'X-Repo-Commit': sha, 'ETag': f'"{blob_id(path, content)}"', 'Accept-Ranges': 'bytes'}
        if path.endswith(LARGE_FILES):
            headers |= {'X-Linked-Etag': headers['ETag'], 'X-Linked-Size': str(len(content))}
        content = content if instead is None else instead
        asked = re.fullmatch(r'bytes=(\d+)-', request.headers.get('Range', ''))
        if not asked:
            return Answer(content, headers)
        start = int(asked[1])
        if start >= len(content):
            raise HubError(416, 'nothing left in this range')
        headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
        return Answer(content[start:], headers, 206)


_REPOSITORY = r'([^/]+/[^/]+)'
ROUTES = (
    (('POST',), r'/api/repos/create', 'create'),
    (('POST',), r'/api/validate-yaml', 'validate_card'),
    (('GET',), rf'/api/models/{_REPOSITORY}(?:/revision/([^/]+))?', 'info'),
    (('POST',), rf'/api/models/{_REPOSITORY}/branch/([^/]+)', 'branch'),
    (('POST',), rf'/api/models/{_REPOSITORY}/preupload/([^/]+)', 'preupload'),
    (('POST',), rf'/api/models/{_REPOSITORY}/commit/([^/]+)', 'commit'),
    (('POST',), rf'/{_REPOSITORY}\.git/info/lfs/objects/batch', 'large_batch'),
    (('PUT',), r'/large/([0-9a-f]{64})', 'large_put'),
    (('POST',), r'/large/([0-9a-f]{64})', 'large_verify'),
    (('GET', 'HEAD'), rf'/{_REPOSITORY}/resolve/([^/]+)/(.+)', 'resolve'),
)


def _json(value: Any, headers: Optional[dict[str, str]] = None, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), {'Content-Type': 'application/json', **(headers or {})}, status)


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def _handle(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query, keep_blank_values=True)
            answer = server.answer(Request(self.command, url.path, query, self.headers, self._body()))
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in {'Content-Length': str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(answer.body[: answer.cut_after])
            # Closing early looks like a broken connection to the client.
            self.close_connection |= answer.cut_after is not None

        do_HEAD = do_GET = do_POST = do_PUT = _handle

        def _body(self) -> bytes:
            if self.headers.get('Transfer-Encoding') != 'chunked':
                return self.rfile.read(int(self.headers.get('Content-Length', 0)))
            chunks = []
            while size := int(self.rfile.readline().split(b';')[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)

        def log_message(self, *args: object) -> None:
            """The tests read `requests` instead."""

    return Handler
