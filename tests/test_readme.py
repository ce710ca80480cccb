"""Every block of README.md and docs/ that can run does run, in order; every other command is checked for what it names.

A page's Python blocks share one namespace and its `vireid` commands one scratch folder. The commands run in this very
process, through the installed entry point. `<!-- not run: reason -->` above a block exempts what would need licensed
data, the network or minutes. Its Python still has to compile, and its commands may only use flags that `--help` knows.
"""

import contextlib
import functools
import io
import os
import re
import shlex
from configparser import ConfigParser
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'CONTRIBUTING.md']
SHELL = ('bash', 'console', 'sh', 'shell')


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line where the text begins, and whether it is to run."""

    page: str
    language: str
    text: str
    line: int
    runs: bool

    @property
    def place(self) -> str:
        return f'{self.page}:{self.line}'


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _blocks(text: str, page: str) -> list[Block]:
    blocks = []
    fence, exempt, start, language = '', False, 0, ''
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        opening = re.match(r'\s*(```+)\s*(\w*)', line)
        if fence:
            if line.strip() == fence:
                blocks.append(Block(page, language, '\n'.join(lines[start : number - 1]) + '\n', start + 1, not exempt))
                fence, exempt = '', False
        elif opening:
            fence, language = opening.groups()
            start = number
        elif line.strip():
            exempt = re.fullmatch(r'<!-- not run: \S.* -->', line.strip()) is not None
    assert not fence, f'{page}:{start}: this block has no end'
    return blocks


def _commands(block: Block) -> list[list[str]]:
    """The block's commands as word lists. A `console` block marks them with `$ `; the other lines are output."""
    text = block.text.replace('\\\n', ' ')
    lines = text.splitlines()
    if block.language == 'console':
        lines = [line.removeprefix('$ ') for line in lines if line.startswith('$ ')]
    commands = [part for line in lines for part in line.split(' && ')]
    return [words for words in (shlex.split(command, comments=True) for command in commands) if words]


def _vireid_words(command: list[str]) -> list[str] | None:
    """What follows `vireid`, in whichever of the documented ways it is called; None for any other command."""
    if Path(command[0]).name == 'vireid' and command[0] in ('vireid', '.venv/bin/vireid'):
        return command[1:]
    return command[3:] if command[:3] == ['python', '-m', 'vireid_timm'] else None


def _vireid(*words: str) -> tuple[object, str]:
    """Exit status of the `vireid` command, and what it said."""
    installed = entry_points(group='console_scripts', name='vireid')
    assert installed, 'the package is not installed; `make test` or `pip install --editable .` does that'
    main = next(iter(installed)).load()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(words)
        except SystemExit as stop:  # from argparse
            status = stop.code
    return status, said.getvalue()


@functools.cache
def _help(*words: str) -> str:
    flag = '--help-all' if words == ('train',) else '--help'
    status, said = _vireid(*words, flag)
    assert not status, f'vireid {shlex.join(words)} {flag}: {said}'
    return said


def _check_vireid(words: list[str], place: str) -> None:
    depth = 2 if words[:1] == ['hub'] else 1
    subcommand = [word for word in words[:depth] if not word.startswith('-')]
    known = set(re.findall(r'--?[a-zA-Z][\w-]*', _help(*subcommand)))
    unknown = [word for word in words if re.match('--?[a-zA-Z]', word) and word.partition('=')[0] not in known]
    assert not unknown, f'{place}: vireid {" ".join(subcommand)} has no {", ".join(unknown)}'


def _check_other(command: list[str], place: str) -> None:
    """What a test cannot or should not run: the targets, extras and files that the command names must exist."""
    said = f'{place}: {shlex.join(command)}'
    program, words = command[0], command[1:]
    if program == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), flags=re.MULTILINE)
        wanted = [word for word in words if '=' not in word]
        assert wanted and set(wanted) <= set(targets), f'{said}: the Makefile has the targets {targets}'
    elif program == 'pip':
        config = ConfigParser()
        config.read(ROOT / 'setup.cfg', encoding='utf-8')
        extras = [extra for word in words for extra in re.findall(r'[\w-]+', ''.join(re.findall(r'\[(.*)\]', word)))]
        assert words[:1] == ['install'], said
        assert set(extras) <= set(config['options.extras_require']), f'{said}: setup.cfg has no such extra'
    elif program == 'torchrun':
        module = words.index('-m')
        assert words[module + 1] == 'vireid_timm', f'{said}: no such module'
        _check_vireid(words[module + 2 :], place)
    elif program in ('python', 'bash') and words and not words[0].startswith('-'):
        assert (ROOT / words[0]).is_file(), f'{said}: no such file'
    elif program.startswith('.'):
        assert os.access(ROOT / program, os.X_OK), f'{said}: no such program'
    else:
        assert program in ('git', 'cd', 'source'), f'{said}: this test does not know how to check {program}'


def _run_vireid(words: list[str], place: str) -> None:
    status, said = _vireid(*words)
    assert not status, f'{place}: vireid {shlex.join(words)}\n{said[-4000:]}'


def _run_page(page: Path) -> dict[str, int]:
    """Go through a page in order, in the current folder; returns how many pieces of each kind were run."""
    ran = {'python': 0, 'vireid': 0}
    namespace = {'__name__': '__main__'}
    for block in _blocks(page.read_text(encoding='utf-8'), _name(page)):
        if block.language == 'python':
            code = compile('\n' * (block.line - 1) + block.text, str(page), 'exec')
            if block.runs:
                exec(code, namespace)
                ran['python'] += 1
        elif block.language in SHELL:
            for command in _commands(block):
                words = _vireid_words(command)
                if words is None:
                    _check_other(command, block.place)
                    continue
                _check_vireid(words, block.place)
                if block.runs:
                    _run_vireid(words, block.place)
                    ran['vireid'] += 1
    return ran


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = _run_page(page)
    if page == README:
        assert min(ran.values()) > 0, f'the README must have Python and vireid commands that are run, got {ran}'


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_local_links_lead_somewhere(page):
    prose = re.sub(r'```.*?```|`[^`\n]*`', '', page.read_text(encoding='utf-8'), flags=re.DOTALL)
    targets = re.findall(r'\]\(([^)\s#]+)', prose) + re.findall(r'src="([^"]+)"', prose)
    missing = [target for target in targets if '://' not in target and not (page.parent / target).exists()]
    assert not missing, f'{_name(page)} points at {missing}'


def test_blocks_are_found_with_their_lines_and_marks():
    text = (
        'Text\n\n```python\na = 1\n```\n<!-- not run: needs a licence -->\n\n```bash\nvireid demo\n```\n'
        '```bash\nmake demo\n```\n````\n```\n````\n'
    )
    assert _blocks(text, 'page') == [
        Block('page', 'python', 'a = 1\n', 4, True),
        Block('page', 'bash', 'vireid demo\n', 9, False),
        Block('page', 'bash', 'make demo\n', 12, True),
        Block('page', '', '```\n', 15, True),
    ]
    with pytest.raises(AssertionError, match='page:2'):
        _blocks('\n```python\na = 1\n', 'page')


def test_commands_are_found_in_every_form():
    text = 'git clone a && cd a\n# a remark\nvireid eval \\\n  --report "a b.json"  # why\n'
    assert _commands(Block('page', 'bash', text, 1, True)) == [
        ['git', 'clone', 'a'],
        ['cd', 'a'],
        ['vireid', 'eval', '--report', 'a b.json'],
    ]
    assert _commands(Block('page', 'console', '$ make test\n12 passed\n', 1, True)) == [['make', 'test']]
    assert _vireid_words(['python', '-m', 'vireid_timm', 'demo']) == ['demo']
    assert _vireid_words(['make', 'demo']) is None


@pytest.mark.parametrize(
    'command', ['make nothing', 'pip install vireid_timm[nothing]', 'python benchmarks/nothing.py', 'rm -r .']
)
def test_commands_that_cannot_work_are_refused(command):
    with pytest.raises(AssertionError, match='page:1'):
        _check_other(shlex.split(command), 'page:1')
