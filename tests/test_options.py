"""Options are refused if they are of another kind than the function that takes them says."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import numpy as np
import pytest
import timm
import torch
from timm.optim import get_optimizer_class, list_optimizers

from vireid_timm.options import check_kinds, check_range


def _takes(
    switch: bool = False,
    maybe: Optional[bool] = None,
    count: int = 1,
    share: float = 1,
    name: str = '',
    pair: tuple[float, float] = (0.9, 0.99),
    either: Union[int, str] = 1,
    tensor: float | torch.Tensor = 1.0,
    layers: Sequence[int] = (1, 2),
    more: Optional[dict[str, Any]] = None,
    hook: Optional[Callable] = None,
    bare=None,
    bare_switch=False,
    bare_number=0,
    bare_pair=(0.9, 0.99),
    odd: float = None,
) -> None:
    pass


GOOD = {
    'switch': [True],
    'maybe': [True, None],
    'count': [3, np.int64(3)],
    'share': [0.5, 3, np.float32(1)],
    'name': ['static', ''],
    'pair': [(0.5, 1), [0.5, 0.5]],
    'either': [2, 'half'],
    'tensor': [0.1, torch.tensor(0.1)],
    'layers': [(2,), [], range(3)],
    'more': [{'a': 1}, {}, None],
    'hook': ['anything', 1],
    'bare': ['anything', 1],
    'bare_switch': [True],
    'bare_number': [0.5, 2],
    'bare_pair': [(0.5, 0.5)],
    'odd': [1.0, None],
    'elsewhere': ['anything'],
}
BAD = {
    'switch': ['abc', 1, None, (True,)],
    'maybe': ['abc', 1],
    'count': ['3', 2.5, True, None],
    'share': ['abc', True, (1,)],
    'name': [1, True, None],
    'pair': ['ab', 0.9, (0.9,), (0.9, 'b'), (0.9, True)],
    'either': [0.5, (1,)],
    'tensor': ['abc', True],
    'layers': ['12', 2, ('a',), {1: 2}],
    'more': ['abc', 1],
    'bare_switch': ['abc', 1],
    'bare_number': ['abc', True],
    'bare_pair': ['ab', (0.9,), 0.9],
    'odd': ['abc'],
}


@pytest.mark.parametrize(('name', 'value'), [(name, value) for name, values in GOOD.items() for value in values])
def test_values_of_the_kind_pass(name: str, value: object) -> None:
    check_kinds({name: value}, [_takes])


@pytest.mark.parametrize(('name', 'value'), [(name, value) for name, values in BAD.items() for value in values])
def test_values_of_another_kind_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^option '{name}' must be .+, got ") as caught:
        check_kinds({'elsewhere': 1, name: value}, [len, _takes], 'option ')
    assert str(caught.value).endswith(repr(value))


@pytest.mark.parametrize('name', list_optimizers(exclude_filters=['bnb*', 'fused*']))
def test_no_switch_and_no_number_of_an_optimiser_takes_a_text(name: str) -> None:
    function = get_optimizer_class(name, bind_defaults=False)
    options = {'amsgrad', 'nesterov', 'maximize', 'foreach', 'caution', 'eps', 'betas', 'momentum', 'weight_decay'}
    for option in options & set(inspect.signature(function).parameters):
        with pytest.raises(ValueError, match=f"'{option}' must be .*got 'abc'"):
            check_kinds({option: 'abc'}, [function])


@pytest.mark.parametrize(
    'arguments',
    [
        {'plain_fusion': 'off'},
        {'gem_power': 'abc'},
        {'fuse_layers': '12'},
        {'last_stride': True},
        {'resnet_args': {'avg_down': 'abc'}},
    ],
)
def test_arguments_of_a_model_are_checked(arguments: dict) -> None:
    with pytest.raises(ValueError, match='argument .* must be '):
        timm.create_model('vireid_dml_r10t', device='meta', **arguments)


@pytest.mark.parametrize('value', [1, 5, np.int64(5)])
def test_a_number_within_its_range(value: int) -> None:
    check_range('count', value, 1, 5)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (0, 'count must be at least 1, got 0'),
        (6, 'count must be at most 5, got 6'),
        (10**30, 'count must be at most 5, got 10{30}'),
        (2.0, 'count must be a whole number, got 2.0'),
        (True, 'count must be a whole number, got True'),
        ('2', "count must be a whole number, got '2'"),
        (None, 'count must be a whole number, got None'),
    ],
)
def test_a_number_out_of_its_range(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f'^{message}$'):
        check_range('count', value, 1, 5)
