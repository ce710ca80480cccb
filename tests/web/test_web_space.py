"""The folder of the Hugging Face Space."""

import runpy
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SPACE = ROOT / 'hub' / 'space'


def test_it_starts_the_demo_for_the_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr('vireid_timm.web.app.serve', lambda **options: calls.append(options))
    runpy.run_path(str(SPACE / 'app.py'), run_name='__main__')
    assert calls == [{'host': '0.0.0.0'}]


def test_its_header_says_what_the_hub_needs() -> None:
    _, header, text = (SPACE / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    values = yaml.safe_load(header)
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg', encoding='utf-8')
    assert (SPACE / values['app_file']).is_file() and values['sdk'] == 'gradio'
    assert values['license'] == config['metadata']['license'].lower()
    assert len(values['short_description']) <= 60
    (floor,) = (line.partition('>=')[2] for line in config['options.extras_require']['web'].split() if 'gradio' in line)
    assert _numbers(values['sdk_version']) >= _numbers(floor)
    assert 'must not be used for' in text


def test_it_needs_the_extra_that_has_the_demo() -> None:
    assert 'vireid_timm[web]' in (SPACE / 'requirements.txt').read_text(encoding='utf-8').splitlines()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split('.')]
