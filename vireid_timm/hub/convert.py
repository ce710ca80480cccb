"""Convert checkpoints of AGW (arXiv:2001.04193), CAJ (ICCV 2021) and code built on them.

Nothing in a file is executed. Every tensor must have a place in the network or be known to be unused, or the conversion
stops: a network that almost matches its checkpoint is worthless.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict

from ..constants import SOURCES
from ..models.dual_stream import DualStreamResNet
from .folder import is_finite

STATE_KEYS = ('net', 'state_dict', 'model')  # where a file may keep its weights

# AGW stores three whole ResNet-50s, but uses only the stems of the first two and the layers of the third.
VISIBLE, INFRARED, SHARED = 'visible_module.visible.', 'thermal_module.thermal.', 'base_resnet.base.'
AGW_PREFIXES = {
    'stem.visible.': VISIBLE,
    'stem.infrared.': INFRARED,
    'layer': f'{SHARED}layer',
    'global_head.neck.': 'bottleneck.',
    'global_head.fc.': 'classifier.',
}
AGW_NON_LOCAL = {'theta': 'theta', 'phi': 'phi', 'g': 'g.0', 'out': 'W.0', 'norm': 'W.1'}
NON_LOCAL = '_non_local.'

BIAS_TOLERANCE = 1e-6
MOST_NAMED = 10  # names in a message

# Networks that share names with AGW's or are asked for often, by tensors that only they have: what has no place here.
OTHERS = {
    ('DEE.', 'MFA1.'): 'DEEN (arXiv:2303.14481): its blocks DEE (diverse embeddings) and MFA (feature aggregation)',
    ('spatial_attention.', 'visible_classifier.', 'backbone.MAM'): (
        'MPANet (CVPR 2021): its single stem for both modalities and its attention to patterns and modalities'
    ),
}

State = dict[str, torch.Tensor]


class Conversion(NamedTuple):
    """A converted checkpoint."""

    model: DualStreamResNet  # on the CPU
    dropped: dict[str, int]  # group of unused tensors -> count
    notes: list[str]  # sentences for the user


def convert_checkpoint(path: str | Path, source: str) -> Conversion:
    """Convert a checkpoint into `vireid_agw_r50`, or `vireid_base_r50` if it has no non-local blocks.

    Args:
        path: A file written by `torch.save` or safetensors.
        source: Which code wrote it, one of `SOURCES`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely, a tensor is missing or has no place, or the source is unknown.
    """
    path = Path(path)
    if source not in SOURCES:
        raise ValueError(f'unknown source {source!r}; expected one of {", ".join(SOURCES)}')
    content = _read(path)
    try:
        state = _state_dict(content)
        _check_kind(state, path)
        return _convert(state, source)
    except ValueError as error:
        raise ValueError(f'cannot convert {path} from {source}: {error}') from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f'no file {path}; give the checkpoint file to convert')
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_stand_ins()), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about the pickle protocol
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged file
        found = re.search(r'GLOBAL (\S+)', str(error))
        if found:
            raise ValueError(
                f'loading {path} would call {found.group(1)}, which could run a program. If you trust the file, save '
                "only its weights where it came from: torch.save({'net': state_dict}, FILE)"
            ) from error
        raise ValueError(f'{path} is damaged, or is not a file of weights that can be read safely') from error


def _stand_ins() -> list[type]:
    """Return classes that ignore their content, under the names that NumPy arrays and scalars have in a pickle.

    AGW's code saves its metrics as such next to the weights, and `torch.load` would refuse the whole file.
    """

    def ignore(self: Any, *args: Any) -> None:
        pass

    multiarray = ('numpy.core.multiarray', 'numpy._core.multiarray')  # before and since NumPy 2
    names = [(module, name) for module in multiarray for name in ('scalar', '_reconstruct')]
    names += [('numpy', 'dtype'), ('numpy', 'ndarray')]
    methods = {'__init__': ignore, '__setstate__': ignore}
    return [type(name, (), {'__module__': module, **methods}) for module, name in names]


def _state_dict(content: Any) -> State:
    if isinstance(content, Mapping):
        content = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'it has no weights; expected a state dict, or one under {", ".join(STATE_KEYS)}')
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f'it has no state dict; these are not tensors: {_few(others)}')
    return clean_state_dict({str(name): value for name, value in content.items()})


def _check_kind(state: State, path: Path) -> None:
    """Refuse what timm loads without a conversion, and say how, and other networks, and say why."""
    overlay = f'pretrained=True, pretrained_cfg_overlay=dict(file={str(path)!r})'
    for prefixes, network in OTHERS.items():
        if any(key.startswith(prefixes) for key in state):
            raise ValueError(f'it is a checkpoint of {network} have no counterpart in the networks of vireid_timm')
    if any(key.startswith('stem.visible.') for key in state):
        raise ValueError(
            'these are weights of vireid_timm and need no conversion. Load a checkpoint of a run with '
            f'vireid_timm.load_model, and any other file with timm.create_model(NAME, {overlay})'
        )
    if 'layer1.0.conv1.weight' in state:
        raise ValueError(
            'it looks like an ImageNet ResNet, which needs no conversion. Load it into the model of its size, '
            f"e.g. timm.create_model('vireid_dml_r50', {overlay})"
        )


def _convert(state: State, source: str) -> Conversion:
    bias = state.get('bottleneck.bias', torch.zeros(1))
    if not bias.abs().max() <= BIAS_TOLERANCE:
        raise ValueError(
            f'its bottleneck.bias reaches {bias.abs().max():.3g}. AGW keeps it at 0, and the BN-neck here has no bias: '
            'features and logits would lose that shift'
        )
    name, options, notes = 'vireid_agw_r50', {'non_local_width': _non_local_width(state)}, []
    if not any(key.startswith('NL_') for key in state):
        name, options = 'vireid_base_r50', {'global_pool': 'avg'}
        notes.append(
            'No non-local blocks: converted as the method "base" of AGW\'s code, which uses average pooling. If this '
            "network uses GeM, create the model with global_pool='gem'."
        )
    classes, overlay = len(state.get('classifier.weight', ())), dict(tag=source)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
        model = timm.create_model(name, num_classes=classes, pretrained_cfg_overlay=overlay, **options)
    dropped = Counter('.'.join(key.split('.')[:3]) for key in _fill(model, state))
    return Conversion(model, dict(dropped), notes)


def _non_local_width(state: State) -> int | str:
    """Return `non_local_width` of our models; 1 if there are no non-local blocks."""
    shapes = {tuple(value.shape[:2]) for key, value in state.items() if re.fullmatch(r'NL_\d\.\d\.theta\.weight', key)}
    if shapes and all(2 * inner == channels for inner, channels in shapes):
        return 'half'
    widths = {inner for inner, _ in shapes} or {1}
    if len(widths) > 1:
        raise ValueError(f'its non-local blocks have different inner widths: {sorted(widths)}')
    return widths.pop()


def _agw_key(key: str) -> str:
    """Return AGW's name for a tensor of our network."""
    non_local = re.fullmatch(r'layer(\d)\.(\d)_non_local\.(\w+)\.(\w+)', key)
    if non_local:
        layer, block, part, tensor = non_local.groups()
        first = {'2': 2, '3': 3}[layer]  # AGW counts from the first block that has a non-local block
        return f'NL_{layer}.{int(block) - first}.{AGW_NON_LOCAL[part]}.{tensor}'
    prefix = next(prefix for prefix in AGW_PREFIXES if key.startswith(prefix))
    return AGW_PREFIXES[prefix] + key.removeprefix(prefix)


def _fill(model: DualStreamResNet, state: State) -> list[str]:
    """Load a checkpoint into the network, and return the names of the tensors that AGW's network does not use."""
    own = model.state_dict()
    keys = {key: _agw_key(key) for key in own}
    found = {key: state[theirs] for key, theirs in keys.items() if theirs in state}
    left = sorted(set(state) - set(keys.values()))
    trunk = [key for key in own if key.startswith(('stem.visible.', 'layer')) and NON_LOCAL not in key]
    resnet = {'fc.weight', 'fc.bias', *(key.removeprefix('stem.visible.') for key in trunk)}
    unused = {network + key for network in (VISIBLE, INFRARED, SHARED) for key in resnet}
    unused |= {'bottleneck.bias', 'classifier.weight'}
    problems = {
        'without a place': [key for key in left if key not in unused],
        'missing': sorted(
            theirs for theirs in keys.values() if theirs not in state and not theirs.endswith('num_batches_tracked')
        ),
        'of another shape': sorted(
            f'{keys[key]} {list(value.shape)}, expected {list(own[key].shape)}'
            for key, value in found.items()
            if value.shape != own[key].shape
        ),
        'with values that are NaN or infinite': [keys[key] for key, value in found.items() if not is_finite(value)],
    }
    texts = [f'{len(names)} tensors {problem}: {_few(names)}' for problem, names in problems.items() if names]
    if texts:
        raise ValueError('; '.join(texts))
    model.load_state_dict({**own, **found})
    return left


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f' and {len(names) - MOST_NAMED} more' if len(names) > MOST_NAMED else ''
    return ', '.join(names[:MOST_NAMED]) + more
