"""The names of `vireid_timm` itself: the contract's, found by editors, and imported only when they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vireid_timm

CONTRACT = {
    *('create_dataset', 'protocol_trials', 'rank_metrics', 'evaluate', 'embed', 'train'),
    *('RandomChannelCombination', 'ChannelRandomErasing', 'WeightedRegularizedTriplet', 'MutualLearningLoss'),
    *('IdentityModalitySampler', 'GeneralizedMeanPool', 'BranchOutput', '__version__'),
}


def test_the_door_holds_the_contract_and_little_else() -> None:
    assert CONTRACT <= set(vireid_timm.__all__) and len(vireid_timm.__all__) <= 25
    assert set(vireid_timm.__all__) <= set(dir(vireid_timm))
    for name in vireid_timm.__all__:
        assert getattr(vireid_timm, name) is not None
    assert callable(vireid_timm.train) and callable(vireid_timm.evaluate)
    with pytest.raises(AttributeError, match="'vireid_timm' has no attribute 'nothing'"):
        _ = vireid_timm.nothing


def test_editors_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(vireid_timm.__file__).read_text(encoding='utf-8'))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING')
    assert {alias.asname: node.module for node in block.body for alias in node.names} == vireid_timm._MODULE_OF


def test_the_import_registers_the_models_and_loads_nothing_else() -> None:
    program = """if True:
        import sys
        import vireid_timm
        loaded = {name.split('.')[1] for name in sys.modules if name.startswith('vireid_timm.')}
        assert loaded == {'cli', 'constants', 'layers', 'models', 'options', 'text', 'version'}, loaded
        from vireid_timm import train  # the function, not a module
        assert callable(train) and callable(vireid_timm.evaluate)
    """
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
