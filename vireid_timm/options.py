"""Check what callers give: whole numbers in their range, augmentations, options of the kind that a function takes."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch

from .constants import AUGMENTATIONS

MANY = 1_000_000  # more of anything that is counted is a slip, and may never end
LARGEST_SEED = 2**63 - 1  # integer that torch and NumPy take
MAX_SIDE = 4096  # pixels of an image that a network takes
MAX_WORKERS = 256

_WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text', NoneType: 'None'}


def check_range(name: str, value: int, minimum: int = 0, maximum: int = MANY) -> None:
    """Raise ValueError, which names the number, if it is no whole number or not in its range."""
    check_kind(name, value, int)
    if value < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')
    if value > maximum:
        raise ValueError(f'{name} must be at most {maximum}, got {value}')


def parse_augmentations(words: Sequence[str]) -> dict[str, float]:
    """Return the probability of each augmentation that is named.

    Args:
        words: Names from `AUGMENTATIONS`, each alone or as `name=probability`.

    Returns:
        Name -> probability, in the order in which they are applied; without those of probability 0.

    Raises:
        ValueError: An unknown name, one that comes twice, or a probability outside 0..1.
    """
    chosen = {}
    for word in words:
        name, equals, text = word.partition('=')
        if name not in AUGMENTATIONS:
            raise ValueError(
                f'unknown augmentation {name!r}; expected some of {", ".join(AUGMENTATIONS)}, each alone or as '
                'name=probability'
            )
        if name in chosen:
            raise ValueError(f'augmentation {name!r} is named twice')
        chosen[name] = _probability(word, text) if equals else AUGMENTATIONS[name]
    return {name: chosen[name] for name in AUGMENTATIONS if chosen.get(name)}


def _probability(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f'expected a probability in 0..1 after {word.partition("=")[0]}=, got {text!r}')
    return value


def check_kinds(options: Mapping[str, Any], functions: Sequence[Callable], where: str = '') -> None:
    """Refuse values that a function does not expect, as far as its annotations and defaults tell.

    Python would take a text such as `off` for True, and many functions meet it only later, with an error of their own.

    Args:
        options: Argument -> value; arguments that no function has are left alone.
        functions: What the options are passed to.
        where: What the error says before the name.

    Raises:
        ValueError: A value of another kind; the message names argument, kind and value.
    """
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if name in options and options[name] is not parameter.default:
                check_kind(f'{where}{name!r}', options[name], _kind_of(parameter))


def check_kind(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError, which names the value, if it is not what an annotation says."""
    if not _fits(value, kind):
        raise ValueError(f'{name} must be {_described(kind)}, got {value!r}')


def _kind_of(parameter: inspect.Parameter) -> Any:
    """Return a parameter's annotation, or without one the type of its default, of a tuple with its elements."""
    default = parameter.default
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    if isinstance(default, tuple) and default:
        return tuple[tuple(float if _fits(one, float) else type(one) for one in default)]
    if _fits(default, float):
        return float  # a default of 0 does not say that the number has to be whole
    return type(default) if isinstance(default, (bool, str)) else Any


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a kind; any value is of a kind that options from a text cannot have."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (tuple, list, Sequence, Collection):
        several = isinstance(value, (list, tuple) if origin is list else Collection)
        return (
            several
            and not isinstance(value, (str, bytes, dict))
            and all(_fits(one, inner[0]) for one in value if inner)
        )
    if origin is dict:
        return isinstance(value, dict) and all(_fits(key, inner[0]) for key in value if inner)
    if origin in (bool, str, NoneType, torch.Tensor):
        return isinstance(value, origin)
    return True


def _described(kind: Any) -> str:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return ' or '.join(dict.fromkeys(_described(one) for one in inner if one is not torch.Tensor))
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return f'({", ".join(map(_described, inner))})'
    if origin is dict:
        return 'names with values' if inner and inner[0] is str else 'a dictionary'
    return _WORDS.get(origin) or (f'a list, each {_described(inner[0])}' if inner else 'a list')
