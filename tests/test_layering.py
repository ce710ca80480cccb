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
MODULES = sorted(path.stem for path in PACKAGE.glob('*.py'))

# A module imports from the rows above its own, or from its own but never in a circle. A new module gets a place here.
ROWS = (
    ('records', 'metrics', 'confidence', 'reranking', 'losses', 'augment', 'layers', 'models', 'files', 'device'),
    (
        *('pedestrian', 'sketch', 'figure', 'scenery', 'synthetic'),
        *('pictures', 'datasets', 'synth', 'protocols', 'sampler', 'task'),
    ),
    (
        'config',
        'batches',
        'runs',
        'features',
        'report',
        'evaluate',
        'retrieval',
        'tracking',
        'dry_run',
        'cards',
        'hub',
        'publish',
        'convert',
        'meter',
        'stopping',
        'factory',
        'checkpoints',
        'diverged',
        'loop',
        'train',
    ),
    ('demo', 'cli'),
    ('__init__', '__main__'),
)
ROW_OF = {module: row for row, modules in enumerate(ROWS) for module in modules}

# What a distribution is imported as, where that is not its own name.
IMPORT_NAMES = {'pillow': 'PIL', 'pyyaml': 'yaml', 'faiss-cpu': 'faiss'}

# Modalities are visible and infrared: no name and no flag has these words, no argument is called these. Exempt is, by
# module, what means something else: `thermal` as a spectrum of SynthVI, `rgb` as Pillow's picture mode.
BANNED_WORDS = {'rgb', 'ir', 'nir', 'vis', 'thermal', 'color'}
BANNED_ARGUMENTS = {'x1', 'x2'}
EXEMPT_WORDS = {'pedestrian': {'thermal'}, 'synthetic': {'thermal'}, 'pictures': {'rgb'}}


def _parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f'{module}.py').read_text(encoding='utf-8'))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)


def _imports(node: ast.AST, executed_only: bool = False) -> Iterator[tuple[str, str]]:
    """(module, name) of every import below `node`, or of those that run when the module itself is imported."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, '') for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        source = '.'.join(['vireid_timm'] * (node.level > 0) + [node.module] * (node.module is not None))
        yield from ((source, alias.name) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        delayed = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(child)
        if not (executed_only and delayed):
            yield from _imports(child, executed_only)


def _package_imports(module: str, executed_only: bool = False) -> set[str]:
    """The package's own modules that `module` imports; `__init__` for a name that it takes from the package itself."""
    imported = set()
    for source, name in _imports(_parse(module), executed_only):
        package, _, submodule = source.partition('.')
        if package == 'vireid_timm' and (submodule, name) != ('', '__version__'):
            imported.add(submodule or (name if name in MODULES else '__init__'))
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


def test_package_is_flat_and_every_module_has_a_place():
    nested = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob('*.py') if path.parent != PACKAGE]
    assert not nested, f'the package has flat modules only, found {nested}'
    homeless = [module for module in MODULES if module not in ROW_OF]
    assert not homeless, f'give {homeless} a row in ROWS'


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_one_way(module):
    upward = sorted(other for other in _package_imports(module) if ROW_OF[other] > ROW_OF[module])
    assert not upward, f'{module} must not import {upward}: they lie above it'


def test_imports_have_no_cycle():
    order = TopologicalSorter({module: _package_imports(module) for module in MODULES}).static_order()
    assert set(order) >= set(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_imports_are_declared(module):
    core, extras = _requirements()
    core |= sys.stdlib_module_names | {'vireid_timm'}
    at_import = {source.partition('.')[0] for source, _ in _imports(_parse(module), executed_only=True)}
    assert at_import <= core, f'{module}: import {sorted(at_import - core)} where it is used, not at the top'
    anywhere = {source.partition('.')[0] for source, _ in _imports(_parse(module))}
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
        'import a.b, c\nfrom .x import y\nfrom . import z\nfrom vireid_timm.w import v\n'
        'def f():\n    import late\nif TYPE_CHECKING:\n    import never\ntry:\n    import tried\nexcept E:\n    pass'
    )
    local = {('vireid_timm.x', 'y'), ('vireid_timm', 'z'), ('vireid_timm.w', 'v')}
    early = {('a.b', ''), ('c', ''), ('tried', '')} | local
    assert set(_imports(tree, executed_only=True)) == early
    assert set(_imports(tree)) == early | {('late', ''), ('never', '')}
