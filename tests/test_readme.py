"""Every block of README.md and docs/ that can run does run, in order; every other command is checked for what it names.

The Python blocks of a page share one namespace, and its `vireid` commands one scratch folder. The commands run in this
process, through the installed entry point. `<!-- not run: reason -->` above a block exempts what needs licensed data,
the network or minutes. Its Python must still compile, and its commands may only use flags that exist.
"""

import contextlib
import functools
import io
import re
import shlex
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import vireid_timm

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [README, *DOCS, ROOT / 'CONTRIBUTING.md']
PACKAGE_FOLDERS = {path.name for path in (ROOT / 'vireid_timm').iterdir() if path.is_dir() and path.name[0] not in '._'}
BLOCK = re.compile(r'(^<!-- not run: \S[^\n]* -->\n)?^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, the line where the text begins, and whether it runs."""

    language: str
    text: str
    line: int
    runs: bool


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _blocks(text: str) -> list[Block]:
    assert len(re.findall('^```', text, re.MULTILINE)) % 2 == 0, 'a block has no end'
    return [
        Block(match[2], match[3], text.count('\n', 0, match.start(3)) + 1, match[1] is None)
        for match in BLOCK.finditer(text)
    ]


def _commands(text: str) -> list[list[str]]:
    """Return the words of each command of a `bash` block."""
    lines = text.replace('\\\n', ' ').splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _vireid(*words: str) -> str:
    """Run the `vireid` command and return what it prints."""
    (command,) = entry_points(group='console_scripts', name='vireid')
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = command.load()(words)
        except SystemExit as stop:  # from argparse
            status = stop.code
    assert not status, f'vireid {shlex.join(words)}\n{output.getvalue()[-4000:]}'
    return output.getvalue()


@functools.cache
def _flags(*command: str) -> set[str]:
    text = _vireid(*command, '--help')
    if '--help-all' in text:
        text = _vireid(*command, '--help-all')
    return set(re.findall(r'--?[a-zA-Z][\w-]*', text))


def _check_vireid(words: list[str]) -> None:
    command = [word for word in words[: 2 if words[:1] == ['hub'] else 1] if not word.startswith('-')]
    unknown = {word for word in words if re.match('--?[a-zA-Z]', word)} - _flags(*command)
    assert not unknown, f'vireid {" ".join(command)} has no {unknown}'
    for flag, value in zip(words, words[1:]):
        if flag in ('-c', '--config'):
            assert (ROOT / 'vireid_timm' / 'recipes' / f'{value}.yaml').is_file(), f'no recipe {value}'


def _check_other(program: str, words: list[str]) -> None:
    """Check a command that a test cannot or should not run: the targets and files that it names must exist."""
    if program == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), flags=re.MULTILINE)
        assert words and set(words) <= set(targets), f'the Makefile has the targets {targets}'
    elif program == 'torchrun':
        module = words.index('-m')
        assert words[module + 1] == 'vireid_timm'
        _check_vireid(words[module + 2 :])
    elif program == 'python':
        assert (ROOT / words[0]).is_file(), f'no file {words[0]}'
    else:
        assert [program, *words] == ['pip', 'install', '.'], 'this test does not know how to check this command'


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {'__name__': '__main__'}
    for block in _blocks(page.read_text(encoding='utf-8')):
        if block.language == 'python':
            code = compile('\n' * (block.line - 1) + block.text, str(page), 'exec')
            if block.runs:
                exec(code, namespace)
        elif block.language == 'bash':
            for program, *words in _commands(block.text):
                if program != 'vireid':
                    _check_other(program, words)
                    continue
                _check_vireid(words)
                if block.runs:
                    _vireid(*words)


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_links_and_extras_exist(page: Path) -> None:
    text = page.read_text(encoding='utf-8')
    prose = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.DOTALL)
    targets = re.findall(r'\]\(([^)\s#]+)', prose) + re.findall(r'src="([^"]+)"', prose)
    missing = [target for target in targets if '://' not in target and not (page.parent / target).exists()]
    assert not missing, f'{_name(page)} links to {missing}'
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg', encoding='utf-8')
    assert set(re.findall(r'vireid_timm\[(\w+)\]', text)) <= set(config['options.extras_require'])


def test_readme_is_short_runs_and_shows_every_package() -> None:
    text = README.read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 120 and max(map(len, text.splitlines())) <= 120
    assert {block.language for block in _blocks(text) if block.runs} >= {'python', 'bash'}
    (tree,) = (block.text for block in _blocks(text) if block.text.startswith('vireid_timm/\n'))
    assert set(re.findall(r'^  (\w+)/ ', tree, flags=re.MULTILINE)) == PACKAGE_FOLDERS


def test_site_has_every_page_and_public_name() -> None:
    site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'))
    assert sorted(site['nav']) == [page.name for page in DOCS]
    reference = (ROOT / 'docs' / 'api.md').read_text(encoding='utf-8')
    names = set(re.findall(r'^::: vireid_timm\.(\w+)$', reference, flags=re.MULTILINE))
    assert names == set(vireid_timm.__all__) - {'__version__'}


def test_blocks_are_found_with_their_lines_and_marks() -> None:
    text = 'Text\n\n```python\na = 1\n```\n<!-- not run: why -->\n```bash\nvireid demo\n```\n```\nmake demo\n```\n'
    assert _blocks(text) == [
        Block('python', 'a = 1\n', 4, True),
        Block('bash', 'vireid demo\n', 8, False),
        Block('', 'make demo\n', 11, True),
    ]
    with pytest.raises(AssertionError, match='no end'):
        _blocks('\n```python\na = 1\n')


def test_commands_are_found() -> None:
    text = '# a remark\nvireid eval \\\n  --report "a b.json"  # why\nmake test\n'
    assert _commands(text) == [['vireid', 'eval', '--report', 'a b.json'], ['make', 'test']]


@pytest.mark.parametrize(
    'command', ['make nothing', 'pip install nothing', 'python benchmarks/nothing.py', 'torchrun -m timm', 'rm -r .']
)
def test_commands_that_cannot_work_are_refused(command: str) -> None:
    program, *words = command.split()
    with pytest.raises(AssertionError):
        _check_other(program, words)


@pytest.mark.parametrize('command', ['train --epochz 3', 'train --config nothing', 'hub save --nothing'])
def test_flags_and_recipes_that_do_not_exist_are_refused(command: str) -> None:
    with pytest.raises(AssertionError):
        _check_vireid(command.split())
