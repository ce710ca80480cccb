"""timm's own model tests on every model of this package: `make timm-suite` (needs the network, minutes).

pip fetches the source distribution of the installed timm. Its tests/test_models.py lists the registered models when it
is imported, and ours are among them, because this program has imported them before. Left out are the tests that load
weights from the Hub; a model whose weights come with the package runs those too. Ends with an error if any test fails
that is not expected to (see EXPECTED), or if a model was not tested.
"""

import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import timm

BUILD = Path(__file__).parents[2] / 'build' / 'timm_suite'
MODULE = 'dual_stream'  # timm knows a module by its last name only
SELECTION = 'vireid and (not pretrained or synthvi)'
FEATURE_MODULES = 'FEAT_INTER_FILTERS = [\n'
PASSED_BY_EVERY_MODEL = ('test_model_forward', 'test_model_forward_fx', 'test_model_forward_intermediates')

# These ask for a gradient in every parameter. timm's batch has one modality, so the other stem, and the branches that
# only training uses, get none. Test -> what its failure must say; any other failure of it counts as one.
EXPECTED = {
    'test_model_backward': 'No gradient for',
    'test_model_backward_fx': 'No gradient for',
    'test_prune_intermediate_layers_contract': 'unused params',
}


class Outcomes:
    """A pytest plugin that says and keeps how every test ended: kind of end -> (test, model) pairs."""

    def __init__(self) -> None:
        self.ended: dict[str, list[tuple[str, str]]] = {'passed': [], 'failed as expected': [], 'FAILED': []}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext)

    def pytest_report_teststatus(self) -> tuple[str, str, str]:
        return '', '', ''  # no letter for each test: a line follows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.passed and report.when != 'call'):
            return
        test, _, parameters = report.nodeid.rpartition('::')[2].partition('[')
        model = parameters.rstrip(']').rpartition('-')[2]
        end = 'passed' if report.passed else 'FAILED'
        if report.failed and test in EXPECTED and EXPECTED[test] in report.longreprtext:
            end = 'failed as expected'
        self.ended[end].append((test, model))
        print(f'{end}: {test} {model}', flush=True)
        if end == 'FAILED':
            print(report.longreprtext)


def _timm_tests() -> Path:
    """Path of the installed timm's test_models.py, with our module added to those that have intermediate features."""
    target = BUILD / f'timm-{timm.__version__}' / 'test_models.py'
    if not target.exists():
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:', '--dest', BUILD]
        subprocess.run([*pip, f'timm=={timm.__version__}'], check=True)
        with tarfile.open(BUILD / f'timm-{timm.__version__}.tar.gz') as archive:
            source = archive.extractfile(f'timm-{timm.__version__}/tests/test_models.py').read().decode()
        if source.count(FEATURE_MODULES) != 1:
            raise SystemExit(f'timm {timm.__version__}: test_models.py no longer has one list FEAT_INTER_FILTERS')
        target.parent.mkdir(exist_ok=True)
        target.write_text(source.replace(FEATURE_MODULES, f'{FEATURE_MODULES}    {MODULE!r},\n'), encoding='utf-8')
    return target


def _summarise(ended: dict[str, list[tuple[str, str]]]) -> int:
    """Print what happened in short; returns the exit code."""
    models = timm.list_models(module=MODULE)
    print(f'\n{len(models)} models: {", ".join(models)}')
    for end, tests in ended.items():
        for test, count in sorted(Counter(test for test, _ in tests).items()):
            print(f'{end}: {test}, {count} times')
    wanted = {(test, model) for test in PASSED_BY_EVERY_MODEL for model in models}
    untested = sorted(wanted - set(ended['passed']) - set(ended['FAILED']))
    for test, model in untested:
        print(f'NOT RUN: {test} {model}')
    print(', '.join(f'{len(tests)} {end}' for end, tests in ended.items()))
    return 1 if ended['FAILED'] or untested or not models else 0


def main() -> int:
    outcomes = Outcomes()
    tests = _timm_tests()
    # /dev/null keeps this project's own settings (warnings are errors) away from timm's tests.
    settings = ['-c', os.devnull, '--rootdir', str(tests.parent), '-p', 'no:cacheprovider', '--tb=short']
    quiet = ['-qq', '--no-header', '--no-summary', '--disable-warnings', '-o', 'console_output_style=classic']
    code = pytest.main([*settings, *quiet, '-k', SELECTION, str(tests)], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    return _summarise(outcomes.ended)


if __name__ == '__main__':
    raise SystemExit(main())
