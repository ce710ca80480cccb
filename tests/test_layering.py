"""Arrows between modules go one way, extras are imported where they are used, and each thing has one word."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'vireid_timm'
# Names below the package: `data.records`, `files`, `__init__`. The empty `__init__` of sub-packages are left out.
MODULES = sorted(
    '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    for path in PACKAGE.rglob('*.py')
    if path.name != '__init__.py' or path.parent == PACKAGE
)

# A package imports from the rows above its own, or from its own row but never in a circle. A new one gets a place here.
ROWS = (
    ('version', 'constants', 'text', 'options', 'files', 'device', 'distributed', 'run_folder'),
    ('layers', 'loss'),
    ('models',),
    ('synthvi',),
    ('data',),
    ('evaluation',),
    ('hub',),
    ('retrieval', 'figures', 'export'),
    ('training', 'web'),
    ('cli',),
    ('__init__', '__main__'),
)
ROW_OF = {package: row for row, packages in enumerate(ROWS) for package in packages}

# What a distribution is imported as, where that is not its own name.
IMPORT_NAMES = {
    'pillow': 'PIL',
    'pillow-heif': 'pillow_heif',
    'pyyaml': 'yaml',
    'faiss-cpu': 'faiss',
    'pytorch-metric-learning': 'pytorch_metric_learning',
}

# Modalities are visible and infrared: no name and no flag has these words, no argument is called these. Exempt is, by
# module, what means something else: `thermal` as a spectrum of SynthVI, `rgb` as Pillow's image mode.
BANNED_WORDS = {'rgb', 'ir', 'nir', 'vis', 'thermal', 'color'}
BANNED_ARGUMENTS = {'x1', 'x2'}
EXEMPT_WORDS = {'synthvi.person': {'thermal'}, 'synthvi.render': {'thermal'}, 'data.images': {'rgb'}}


def _parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f'{module.replace(".", "/")}.py').read_text(encoding='utf-8'))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)


def _package_of(module: str) -> str:
    return module.partition('.')[0]


def _imports(node: ast.AST, executed_only: bool = False, package: str = 'vireid_timm') -> Iterator[tuple[str, str]]:
    """(module, name) of every import below `node`, or of those that run when the module itself is imported."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, '') for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
        source = '.'.join([*parents, *([node.module] if node.module else [])])
        yield from ((source, alias.name) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        delayed = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(child)
        if not (executed_only and delayed):
            yield from _imports(child, executed_only, package)


def _imports_of(module: str, executed_only: bool = False) -> Iterator[tuple[str, str]]:
    parent = module.rpartition('.')[0]
    return _imports(_parse(module), executed_only, f'vireid_timm.{parent}' if parent else 'vireid_timm')


def _own_imports(module: str) -> set[str]:
    """The package's own modules that `module` imports; `__init__` for a name that it takes from the package itself."""
    imported = set()
    for source, name in _imports_of(module):
        root, _, inner = source.partition('.')
        if root == 'vireid_timm':
            submodule = f'{inner}.{name}'.lstrip('.')
            imported.add(submodule if submodule in MODULES else inner or '__init__')
    return imported


def _requirements() -> tuple[set[str], set[str]]:
    """Import names of the core dependencies, and of what only the extras bring."""
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg', encoding='utf-8')
    extras = '\n'.join(config['options.extras_require'].values())

    def import_names(requirements: str) -> set[str]:
        names = re.findall(r'^[\w-]+', requirements, flags=re.MULTILINE)
        return {IMPORT_NAMES.get(name, name) for name in names} - {'vireid_timm'}

    core = import_names(config['options']['install_requires'])
    return core, import_names(extras) - core


def _named(tree: ast.Module) -> Iterator[str]:
    """Every name that the module gives to something, and every command-line flag."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r'--[\w-]+', node.value):
            yield node.value


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r'[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*', name)}


def test_every_package_has_a_place_and_one_door():
    homeless = sorted({_package_of(module) for module in MODULES} - set(ROW_OF))
    assert not homeless, f'give {homeless} a row in ROWS'
    doors = [
        path for path in PACKAGE.rglob('__init__.py') if path.parent != PACKAGE and path.read_text(encoding='utf-8')
    ]
    assert not doors, f'the one public door is vireid_timm/__init__.py; leave {doors} empty'


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_one_way(module):
    upward = sorted(other for other in _own_imports(module) if ROW_OF[_package_of(other)] > ROW_OF[_package_of(module)])
    assert not upward, f'{module} must not import {upward}: they lie above it'


@pytest.mark.parametrize('part', [lambda module: module, _package_of], ids=['modules', 'packages'])
def test_imports_have_no_cycle(part):
    graph = {}
    for module in MODULES:
        graph.setdefault(part(module), set()).update(map(part, _own_imports(module)))
    for name, imported in graph.items():
        imported.discard(name)
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)


@pytest.mark.parametrize('module', MODULES)
def test_imports_are_declared(module):
    core, extras = _requirements()
    core |= sys.stdlib_module_names | {'vireid_timm'}
    at_import = {source.partition('.')[0] for source, _ in _imports_of(module, executed_only=True)}
    assert at_import <= core, f'{module}: import {sorted(at_import - core)} where it is used, not at the top'
    anywhere = {source.partition('.')[0] for source, _ in _imports_of(module)}
    undeclared = sorted(anywhere - core - extras)
    assert not undeclared, f'{module}: {undeclared} are in no requirement of setup.cfg'


def test_import_is_silent_and_light():
    extras = sorted(_requirements()[1])
    program = f"""if True:
        import random, sys, warnings
        import numpy, timm, torch
        states = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1]
        threads = torch.get_num_threads()
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            import vireid_timm
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert (numpy.random.get_state()[1] == states[2]).all()
        assert torch.get_num_threads() == threads
        assert not [name for name in {extras!r} if name in sys.modules]
        assert any(name.startswith('vireid_') for name in timm.list_models())
    """
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', ''), done.stderr


@pytest.mark.parametrize('module', MODULES)
def test_words(module):
    tree = _parse(module)
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    banned = BANNED_WORDS - EXEMPT_WORDS.get(module, set())
    found = {name for name in _named(tree) if _words(name) & banned} | (arguments & BANNED_ARGUMENTS)
    assert not found, f'{module}: say visible or infrared instead of {sorted(found)}'


def test_word_finder_sees_every_spelling():
    assert _words('RGBToGray') == {'rgb', 'to', 'gray'}
    assert _words('--ir-mode') == {'ir', 'mode'}
    assert not _words('irregular_first_visible') & BANNED_WORDS
    tree = ast.parse(
        'def f(x1, *, ir): pass\nclass RGBStem:\n    thermal: int = 0\n'
        'self.rgb = 1\nimport a as color\nadd("--vis", "-- no")'
    )
    assert {'x1', 'ir', 'RGBStem', 'thermal', 'rgb', 'color', '--vis'} <= set(_named(tree))
    assert '-- no' not in _named(tree)


def test_import_finder_sees_every_form():
    tree = ast.parse(
        'import a.b, c\nfrom .x import y\nfrom . import z\nfrom ..w import v\n'
        'def f():\n    import late\nif TYPE_CHECKING:\n    import never\ntry:\n    import tried\nexcept E:\n    pass'
    )
    local = {('vireid_timm.p.x', 'y'), ('vireid_timm.p', 'z'), ('vireid_timm.w', 'v')}
    early = {('a.b', ''), ('c', ''), ('tried', '')} | local
    assert set(_imports(tree, True, 'vireid_timm.p')) == early
    assert set(_imports(tree, False, 'vireid_timm.p')) == early | {('late', ''), ('never', '')}
