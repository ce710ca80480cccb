"""setup.cfg agrees with the other files."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import timm
import yaml

import vireid_timm
from vireid_timm.version import LOWEST_TIMM, check_timm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'vireid_timm'


def _config() -> ConfigParser:
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg', encoding='utf-8')
    return config


def _requirements() -> dict[str, str]:
    """Distribution -> version specifier, over the core dependencies and every extra."""
    config = _config()
    text = '\n'.join([config['options']['install_requires'], *config['options.extras_require'].values()])
    pairs = re.findall(r'^([\w-]+)(.*)$', text, flags=re.MULTILINE)
    return {name: specifier for name, specifier in pairs if name != 'vireid_timm'}


def test_lowest_versions_are_the_floors():
    lines = (ROOT / '.ci' / 'lowest.txt').read_text(encoding='utf-8').splitlines()
    lowest = dict(line.split('==') for line in lines if line and not line.startswith('#'))
    requirements = _requirements()
    assert lowest.keys() == requirements.keys()
    for name, specifier in requirements.items():
        if specifier:  # torchvision has none: it goes with torch
            floor = re.fullmatch(r'[>~]=([\d.]+)', specifier)
            assert floor, f'{name}{specifier}: floors only, no caps'
            padded = floor.group(1) + '.0' * (2 - floor.group(1).count('.'))
            assert lowest[name] in (floor.group(1), padded), f'{name}: floor {specifier}, lowest {lowest[name]}'


@pytest.mark.parametrize('version', ['0.9.16', '1.0.29', '1.0.30.dev0'])
def test_an_older_timm_is_an_error(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, '__version__', version)
    with pytest.raises(ImportError, match=re.escape(f'needs timm {LOWEST_TIMM} or newer, but timm {version} is')):
        check_timm()


@pytest.mark.parametrize('version', [LOWEST_TIMM, f'{LOWEST_TIMM}.dev0', '1.0.100', '1.1.0rc1', '2.0'])
def test_a_newer_timm_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, '__version__', version)
    check_timm()


def test_the_lowest_timm_is_the_floor_and_checked_at_import() -> None:
    assert _requirements()['timm'] == f'>={LOWEST_TIMM}'
    program = "import timm; timm.__version__ = '1.0.29'; import vireid_timm"
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('ImportError: vireid_timm needs timm')


def test_everything_in_the_package_is_packed():
    patterns = _config()['options.package_data']['vireid_timm'].split(',')
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern.strip())}
    files = {path for path in PACKAGE.rglob('*') if path.is_file() and path.suffix not in ('.py', '.pyc')}
    left_out = sorted(str(path.relative_to(PACKAGE)) for path in files - packed)
    assert not left_out, f'no pattern of package_data in setup.cfg matches {left_out}'


def test_lowest_python_is_the_same_everywhere():
    floor = _config()['options']['python_requires'].removeprefix('>=')
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'test.yml').read_text(encoding='utf-8'))
    lowest = workflow['jobs']['test']['strategy']['matrix']['include'][0]
    assert (lowest['python'], lowest['constraint']) == (floor, '.ci/lowest.txt')
    assert f"target-version = 'py{floor.replace('.', '')}'" in (ROOT / 'ruff.toml').read_text(encoding='utf-8')
    assert f'sys.version_info < ({floor.replace(".", ", ")})' in (ROOT / 'Makefile').read_text(encoding='utf-8')


def test_citation_is_complete():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors', 'license', 'references'} <= citation.keys()
    assert citation['license'] == _config()['metadata']['license']


def test_changelog_has_this_version():
    changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(rf'^## {re.escape(vireid_timm.__version__)}\b', changelog, flags=re.MULTILINE)
