"""A headless Chromium with one page, driven through its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import websocket

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
# Nothing that the browser itself would fetch, and software that needs neither a GPU nor a large /dev/shm.
FLAGS = (
    '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--no-first-run', '--remote-debugging-port=0',
)  # fmt: skip
PATIENCE = 60  # seconds


class Browser:
    """A browser until the end of a `with` block.

    Attributes:
        requests: Addresses that the page has asked for, in order.
        errors: What the page has logged as errors.
    """

    def __init__(self, folder: Path) -> None:
        """Start it, with its profile in a folder."""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._numbers = 0
        command = [PROGRAM, *FLAGS, f'--user-data-dir={folder}', 'about:blank']
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._socket = websocket.create_connection(self._address(folder), timeout=PATIENCE, suppress_origin=True)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        for domain in ('Page', 'Network', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')

    def __enter__(self) -> 'Browser':
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; note the events that come before it."""
        self._numbers += 1
        self._socket.send(json.dumps({'id': self._numbers, 'method': method, 'params': parameters}))
        while True:
            reply = json.loads(self._socket.recv())
            self._note(reply)
            if reply.get('id') == self._numbers:
                assert 'error' not in reply, f'{method}: {reply["error"]}'
                return reply['result']

    def open(self, address: str, width: int = 1280, height: int = 900, scale: float = 1) -> None:
        """Load a page in a window of some size; a narrow one is a phone's."""
        is_phone = width < 600
        metrics = dict(width=width, height=height, deviceScaleFactor=scale, mobile=is_phone)
        self.call('Emulation.setDeviceMetricsOverride', **metrics)
        self.call('Page.navigate', url=address)

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in result, f'{expression}: {result["exceptionDetails"]}'
        return result['result'].get('value')

    def wait_for(self, expression: str) -> Any:
        """Wait until a JavaScript expression is true; return its value."""
        end = time.monotonic() + PATIENCE
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f'{expression} is still {value!r}; the page says {self.text()!r}'
            time.sleep(0.05)
        return value

    def text(self, selector: str = 'body') -> str:
        """Return the visible text of an element, empty if it is not there."""
        return self.value(f'document.querySelector({json.dumps(selector)})?.innerText ?? ""')

    def click(self, selector: str) -> None:
        """Click an element when it is there."""
        element = f'document.querySelector({json.dumps(selector)})'
        self.wait_for(f'{element} !== null')
        self.value(f'{element}.click()')

    def upload(self, path: Path) -> None:
        """Choose a file in the page's file input."""
        self.wait_for('document.querySelector("input[type=file]") !== null')
        found = self.call('Runtime.evaluate', expression='document.querySelector("input[type=file]")')
        self.call('DOM.setFileInputFiles', files=[str(path)], objectId=found['result']['objectId'])

    def screenshot(self, path: Path, whole_page: bool = True) -> None:
        """Write what the page looks like as PNG."""
        taken = self.call('Page.captureScreenshot', captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(taken['data']))

    def _address(self, folder: Path) -> str:
        """Return where the page can be driven, as soon as the browser has written its port."""
        file, end = folder / 'DevToolsActivePort', time.monotonic() + PATIENCE
        while not (file.is_file() and file.read_text().count('\n')):
            assert self._process.poll() is None, f'{PROGRAM} ended with status {self._process.returncode}'
            assert time.monotonic() < end, f'{PROGRAM} does not answer'
            time.sleep(0.05)
        with urllib.request.urlopen(f'http://127.0.0.1:{file.read_text().split()[0]}/json/list') as reply:
            return next(page['webSocketDebuggerUrl'] for page in json.load(reply) if page['type'] == 'page')

    def _note(self, reply: dict[str, Any]) -> None:
        method, parameters = reply.get('method'), reply.get('params', {})
        if method == 'Network.requestWillBeSent':
            self.requests.append(parameters['request']['url'])
        elif method == 'Network.webSocketCreated':
            self.requests.append(parameters['url'])
        elif method == 'Runtime.exceptionThrown':
            self.errors.append(json.dumps(parameters['exceptionDetails']))
        elif method == 'Log.entryAdded' and parameters['entry']['level'] == 'error':
            self.errors.append(parameters['entry']['text'])
