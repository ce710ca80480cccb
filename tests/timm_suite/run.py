"""Run timm's own model tests on every model of this package: `make timm-suite` (needs the network, takes minutes).

pip downloads the source distribution of the installed timm. Its tests/test_models.py lists the registered models on
import, and ours are among them because this program imports them first. Tests that load weights from the Hub are
skipped; models whose weights ship with the package run them too. Exits with an error if a test fails unexpectedly (see
EXPECTED) or a model was not tested.
"""

import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import timm

from vireid_timm.models import backbone, dual_stream, parts, zero_padding

BUILD = Path(__file__).parents[2] / 'build' / 'timm_suite'
# timm knows modules by their last name only.
MODULES = [module.__name__.rpartition('.')[2] for module in (backbone, dual_stream, parts, zero_padding)]
SELECTION = 'vireid and (not pretrained or synthvi)'
FEATURE_MODULES = 'FEAT_INTER_FILTERS = [\n'
PASSED_BY_EVERY_MODEL = ('test_model_forward', 'test_model_forward_fx', 'test_model_forward_intermediates')

# Some require a gradient in every parameter. timm's batch has one modality, so the other stem gets none, and neither do
# the branches that only training uses. It also gives a transformer images of another size than it takes. Networks on
# any backbone (models/trunk.py) cannot be scripted. Test -> texts, one of which its failure must contain.
EXPECTED = {
    'test_model_backward': ('No gradient for', 'the backbone takes no others'),
    'test_model_backward_fx': ('No gradient for', 'the backbone takes no others'),
    'test_prune_intermediate_layers_contract': ('unused params',),
    'test_model_forward_torchscript': ('models/trunk.py',),
    'test_model_forward_fx_torchscript': ('models.trunk.', 'models/trunk.py'),
}


class Outcomes:
    """A pytest plugin that prints and collects the outcomes: outcome -> (test, model) pairs."""

    def __init__(self) -> None:
        self.tests: dict[str, list[tuple[str, str]]] = {'passed': [], 'failed as expected': [], 'FAILED': []}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext)

    def pytest_report_teststatus(self) -> tuple[str, str, str]:
        return '', '', ''  # no letter per test, because a line follows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.passed and report.when != 'call'):
            return
        test, _, parameters = report.nodeid.rpartition('::')[2].partition('[')
        model = parameters.rstrip(']').rpartition('-')[2]
        outcome = 'passed' if report.passed else 'FAILED'
        if report.failed and any(text in report.longreprtext for text in EXPECTED.get(test, ())):
            outcome = 'failed as expected'
        self.tests[outcome].append((test, model))
        print(f'{outcome}: {test} {model}', flush=True)
        if outcome == 'FAILED':
            print(report.longreprtext)


def _timm_tests() -> Path:
    """Download the installed timm's test_models.py, and add our modules to those with intermediate features."""
    target = BUILD / f'timm-{timm.__version__}' / 'test_models.py'
    if not target.exists():
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:', '--dest', BUILD]
        subprocess.run([*pip, f'timm=={timm.__version__}'], check=True)
        with tarfile.open(BUILD / f'timm-{timm.__version__}.tar.gz') as archive:
            source = archive.extractfile(f'timm-{timm.__version__}/tests/test_models.py').read().decode()
        if source.count(FEATURE_MODULES) != 1:
            raise SystemExit(f'timm {timm.__version__}: expected one list FEAT_INTER_FILTERS in test_models.py')
        target.parent.mkdir(exist_ok=True)
        modules = ''.join(f'    {name!r},\n' for name in MODULES)
        target.write_text(source.replace(FEATURE_MODULES, FEATURE_MODULES + modules), encoding='utf-8')
    return target


def _summarise(outcomes: dict[str, list[tuple[str, str]]]) -> int:
    """Print a summary and return the exit code."""
    models = [name for module in MODULES for name in timm.list_models('vireid_*', module=module)]
    print(f'\n{len(models)} models: {", ".join(models)}')
    for outcome, tests in outcomes.items():
        for test, count in sorted(Counter(test for test, _ in tests).items()):
            print(f'{outcome}: {test}, {count} times')
    required = {(test, model) for test in PASSED_BY_EVERY_MODEL for model in models}
    untested = sorted(required - set(outcomes['passed']) - set(outcomes['FAILED']))
    for test, model in untested:
        print(f'NOT RUN: {test} {model}')
    print(', '.join(f'{len(tests)} {outcome}' for outcome, tests in outcomes.items()))
    return 1 if outcomes['FAILED'] or untested or not models else 0


def main() -> int:
    outcomes = Outcomes()
    tests = _timm_tests()
    # The empty configuration keeps this project's settings (warnings are errors) away from timm's tests.
    settings = ['-c', os.devnull, '--rootdir', str(tests.parent), '-p', 'no:cacheprovider', '--tb=short']
    quiet = ['-qq', '--no-header', '--no-summary', '--disable-warnings', '-o', 'console_output_style=classic']
    code = pytest.main([*settings, *quiet, '-k', SELECTION, str(tests)], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    return _summarise(outcomes.tests)


if __name__ == '__main__':
    raise SystemExit(main())
