"""Others' checkpoints as models of this library: AGW's family, ImageNet ResNets, and our own training checkpoints.

Files are read without running anything that is in them. Every tensor of a file has a place in the network, or is known
to be unused, or the conversion stops: a network that is nearly the one in the file is worth nothing.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch

from ..constants import AGW_FAMILY, SOURCES
from ..models.dual_stream import DualStreamResNet
from ..run_folder import MODEL_CONFIG

# Where a file may have its weights, the averaged ones first.
STATE_KEYS = ('net', 'state_dict_ema', 'model_ema', 'state_dict', 'model')

# Residual blocks per layer, bottleneck or basic, deep stem or not -> how our models name that ResNet.
RESNETS = {
    ((1, 1, 1, 1), False, True): 'r10t',
    ((2, 2, 2, 2), False, False): 'r18',
    ((3, 4, 6, 3), False, False): 'r34',
    ((3, 4, 6, 3), True, False): 'r50',
    ((3, 4, 23, 3), True, False): 'r101',
}

# AGW keeps three whole ResNet-50s. The stems of the first two are used, and the layers of the third.
AGW_VISIBLE = 'visible_module.visible.'
AGW_INFRARED = 'thermal_module.thermal.'
AGW_SHARED = 'base_resnet.base.'
AGW_PARTS = {
    'stem.visible.': AGW_VISIBLE,
    'stem.infrared.': AGW_INFRARED,
    'global_head.neck.': 'bottleneck.',
    'global_head.fc.': 'classifier.',
}
AGW_NON_LOCAL = {'theta': 'theta', 'phi': 'phi', 'g': 'g.0', 'out': 'W.0', 'norm': 'W.1'}
NON_LOCAL = '_non_local.'

BIAS_TOLERANCE = 1e-6
MOST_NAMED = 10  # in a message

State = dict[str, torch.Tensor]


class Conversion(NamedTuple):
    """What became of a checkpoint.

    Attributes:
        model: The network with the checkpoint's weights, on the CPU.
        dropped: What the network has no use for: group of tensors -> how many.
        notes: What whoever converts should know, in sentences.
    """

    model: DualStreamResNet
    dropped: dict[str, int]
    notes: list[str]


def convert_checkpoint(
    path: str | Path,
    source: str,
    *,
    model: str | None = None,
    num_classes: int | None = None,
) -> Conversion:
    """Turn a checkpoint file into a network of this library.

    | source | what it is | becomes |
    |---|---|---|
    | `agw`, `caj` | AGW (arXiv:2001.04193), CAJ (ICCV 2021) | `vireid_agw_r50`; `vireid_base_r50` if not non-local |
    | `torchvision`, `timm` | an ImageNet ResNet | start weights of `vireid_dml_r*`, or of `model` |
    | `vireid` | a run's `last.pth`, or weights of our own | the run's network, or `model` |

    Args:
        path: The file, of `torch.save` or safetensors.
        source: Whose checkpoint it is, one of `SOURCES`.
        model: Name of the network, for the sources that leave a choice.
        num_classes: 0 drops the checkpoint's classifiers. An ImageNet ResNet gets fresh ones, for as many identities;
            with the other sources anything else has to be the number of the checkpoint's own.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that cannot be read safely, tensors that fit nowhere or are missing, a wrong argument.
    """
    path = Path(path)
    if source not in SOURCES:
        raise ValueError(f'unknown source {source!r}; expected one of {", ".join(SOURCES)}')
    if model is not None and source in AGW_FAMILY:
        raise ValueError(f'the network of a checkpoint from {source} follows from the file: leave out model {model!r}')
    content = _read(path)
    try:
        state, rest = _weights(content)
        if source in AGW_FAMILY:
            conversion = _convert_agw(state, source, num_classes)
        elif source == 'vireid':
            conversion = _convert_own(state, model or _own_name(path, content), num_classes)
        else:
            conversion = _convert_resnet(state, model, num_classes or 0)
    except ValueError as error:
        raise ValueError(f'cannot convert {path} from {source}: {error}{_hint(content, source)}') from error
    if rest:
        conversion.notes.append(f'Not converted, beside the weights: {_few(rest)}.')
    return conversion


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f'no file {path}; give the checkpoint file to convert')
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_stand_ins()), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about the form of a pickle
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged file
        found = re.search(r'GLOBAL (\S+)', str(error))
        if found:
            raise ValueError(
                f'{path} needs {found.group(1)} to be read, which could run a program and is not done here. If you '
                "trust the file, save its weights alone where it came from: torch.save({'net': state_dict}, FILE)"
            ) from error
        raise ValueError(
            f'{path} is damaged, or not a file of weights that can be read without running what is in it'
        ) from error


class _Ignored:
    """Stands in for a NumPy object of a checkpoint, and forgets what it is given."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_ins() -> list[type]:
    """Classes by the names that NumPy's arrays and scalars have in a pickle.

    AGW's code saves its measurements, which are such, beside the weights; `torch.load` alone would refuse the file.
    """
    multiarray = ('numpy.core.multiarray', 'numpy._core.multiarray')  # before and since NumPy 2
    names = [(module, name) for module in multiarray for name in ('scalar', '_reconstruct')]
    names += [('numpy', 'dtype'), ('numpy', 'ndarray')]
    return [type(name, (_Ignored,), {'__module__': module}) for module, name in names]


def _weights(content: Any) -> tuple[State, list[str]]:
    """The state dict, and the names of what else the file has."""
    state, rest = content, []
    if isinstance(content, Mapping):
        key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
        if key is not None:
            state, rest = content[key], sorted(str(name) for name in content if name != key)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f'it has no weights; expected a state dict, or one under {", ".join(STATE_KEYS)}')
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f'it has no state dict; no tensors are {_few(others)}')
    return {str(name).removeprefix('module.'): value for name, value in state.items()}, rest


def _hint(content: Any, source: str) -> str:
    """Whose checkpoint it looks like, where that is not what was said."""
    try:
        state, _ = _weights(content)
    except ValueError:
        return ''
    looks = [
        (AGW_SHARED + 'conv1.weight', AGW_FAMILY),
        ('stem.visible.conv1.weight', ('vireid',)),
        ('stem.visible.conv1.0.weight', ('vireid',)),
        ('layer1.0.conv1.weight', ('torchvision', 'timm')),
    ]
    sources = next((sources for key, sources in looks if key in state), (source,))
    return '' if source in sources else f'. It looks like one from {" or ".join(sources)} (--from)'


def _convert_agw(state: State, source: str, num_classes: int | None) -> Conversion:
    _check_bias(state)
    name, options, notes = 'vireid_agw_r50', {'non_local_width': _agw_width(state)}, []
    if not any(key.startswith('NL_') for key in state):
        name, options = 'vireid_base_r50', {'global_pool': 'avg'}
        notes.append(
            'There are no non-local blocks: taken as the method "base" of AGW\'s code, which pools by averaging. If '
            "this network pools by GeM, create it with global_pool='gem'."
        )
    model = _create(name, _num_classes(state, 'classifier.weight', num_classes), source, **options)
    resnet = {'fc.weight', 'fc.bias'}
    for key in model.state_dict():
        if key.startswith(('stem.visible.', 'layer')) and NON_LOCAL not in key:
            resnet.add(key.removeprefix('stem.visible.'))
    networks = (AGW_VISIBLE, AGW_INFRARED, AGW_SHARED)
    unused = {network + key for network in networks for key in resnet} | {'bottleneck.bias', 'classifier.weight'}
    dropped = _fill(model, state, _agw_key, unused)
    stored, lost = _num_parameters(state), _num_parameters({key: state[key] for key in dropped})
    notes.append(f'Of {stored / 1e6:.2f} M parameters in the file, {(stored - lost) / 1e6:.2f} M are used.')
    return Conversion(model, _grouped(dropped), notes)


def _check_bias(state: State) -> None:
    bias = state.get('bottleneck.bias')
    if bias is not None and not bias.abs().max() <= BIAS_TOLERANCE:
        raise ValueError(
            f'its bottleneck.bias reaches {bias.abs().max():.3g}. AGW keeps it at 0, and the BN-neck here has none: '
            'features and logits would lose that shift'
        )


def _agw_width(state: State) -> int | str:
    """Inner channels of the non-local blocks as our models name them; 1 where there are no such blocks."""
    shapes = {tuple(value.shape[:2]) for key, value in state.items() if re.fullmatch(r'NL_\d\.\d\.theta\.weight', key)}
    widths = {inner for inner, _ in shapes} or {1}
    if shapes and all(2 * inner == channels for inner, channels in shapes):
        return 'half'
    if len(widths) > 1:
        raise ValueError(f'its non-local blocks have different inner widths: {sorted(widths)}')
    return widths.pop()


def _agw_key(key: str) -> str:
    """What AGW calls a tensor of our network."""
    non_local = re.fullmatch(r'layer(\d)\.(\d)_non_local\.(\w+)\.(\w+)', key)
    if non_local:
        layer, block, part, tensor = non_local.groups()
        first = {'2': 2, '3': 3}[layer]  # blocks are counted from the first that has a non-local block
        return f'NL_{layer}.{int(block) - first}.{AGW_NON_LOCAL[part]}.{tensor}'
    for own, theirs in AGW_PARTS.items():
        if key.startswith(own):
            return theirs + key.removeprefix(own)
    return AGW_SHARED + key


def _convert_resnet(state: State, name: str | None, num_classes: int) -> Conversion:
    size = _resnet_size(state)
    name = name or f'vireid_dml_{size}'
    if not name.partition('.')[0].endswith(f'_{size}'):
        raise ValueError(f'it is a ResNet for the models that end in _{size}, which {name!r} does not')
    model = _create(name, num_classes, 'in1k')

    def their_key(key: str) -> str | None:
        if key.startswith('stem.'):
            return key.removeprefix('stem.visible.').removeprefix('stem.infrared.')
        return key if key.startswith('layer') and NON_LOCAL not in key else None

    dropped = _fill(model, state, their_key, {'fc.weight', 'fc.bias'})
    notes = ['A start for fine-tuning, not a re-identification model: what no ImageNet ResNet has is untrained.']
    return Conversion(model, _grouped(dropped), notes)


def _resnet_size(state: State) -> str:
    blocks = [re.match(r'layer([1-4])\.(\d+)\.', key) for key in state]
    layers = [{found.group(2) for found in blocks if found and found.group(1) == layer} for layer in '1234']
    kind = tuple(map(len, layers)), 'layer1.0.conv3.weight' in state, 'conv1.0.weight' in state
    if kind not in RESNETS:
        raise ValueError(
            f'it is no ResNet that a model here starts from; blocks in layer1 to 4: {list(kind[0])}, bottlenecks: '
            f'{kind[1]}, deep stem: {kind[2]}'
        )
    return RESNETS[kind]


def _own_name(path: Path, content: Any) -> str:
    if path.with_name(MODEL_CONFIG).is_file():
        return f'local-dir:{path.parent}'
    if isinstance(content, Mapping) and isinstance(content.get('arch'), str):
        return content['arch']
    raise ValueError(f'neither it nor a {MODEL_CONFIG} beside it names its network: give model')


def _convert_own(state: State, name: str, num_classes: int | None) -> Conversion:
    model = _create(name, _num_classes(state, 'global_head.fc.weight', num_classes), 'trained')
    classifiers = {key for key in state if key.endswith('_head.fc.weight')}
    dropped = _fill(model, state, lambda key: key, classifiers if model.num_classes == 0 else set())
    return Conversion(model, _grouped(dropped), [])


def _create(name: str, num_classes: int, tag: str, **options: Any) -> DualStreamResNet:
    """The network, untrained; what stays so is the same every time."""
    known = ', '.join(timm.list_models('vireid_*'))
    if not name.startswith('local-dir:') and not timm.is_model(name.partition('.')[0]):
        raise ValueError(f'there is no model {name!r}; choose one of {known}')
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            overlay = {'tag': tag}
            model = timm.create_model(name, num_classes=num_classes, pretrained_cfg_overlay=overlay, **options)
    except (RuntimeError, OSError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f'cannot create the network {name}: {error}') from error
    if not isinstance(model, DualStreamResNet):
        raise ValueError(f'{name} is not a network of this library; choose one of {known}')
    return model


def _num_classes(state: State, classifier: str, num_classes: int | None) -> int:
    stored = state[classifier].shape[0] if classifier in state else 0
    if num_classes not in (None, 0, stored):
        raise ValueError(
            f'it tells {stored} identities apart, not {num_classes}: leave out num_classes to keep its classifier, '
            'or give 0 to drop it'
        )
    return stored if num_classes is None else num_classes


def _fill(
    model: DualStreamResNet,
    state: State,
    their_key: Callable[[str], str | None],
    unused: set[str],
) -> list[str]:
    """Put a checkpoint's tensors into the network, all of them.

    Args:
        model: The network.
        state: The checkpoint.
        their_key: What the checkpoint calls a tensor of the network; None for one that keeps its fresh value.
        unused: What the checkpoint may have that the network does without, used elsewhere or not.

    Returns:
        Names of the checkpoint's tensors that were not used.

    Raises:
        ValueError: Tensors that fit nowhere, are missing, or have another shape.
    """
    own = model.state_dict()
    keys = {key: their_key(key) for key in own}
    wanted = {theirs for theirs in keys.values() if theirs is not None}
    found = {key: state[theirs] for key, theirs in keys.items() if theirs in state}
    missing = (theirs for theirs in wanted - set(state) if not theirs.endswith('num_batches_tracked'))
    shapes = (
        f'{keys[key]} {list(value.shape)} for {list(own[key].shape)}'
        for key, value in found.items()
        if value.shape != own[key].shape
    )
    problems = {
        'tensors that fit nowhere': sorted(set(state) - wanted - unused),
        'missing tensors': sorted(missing),
        'tensors of another shape': sorted(shapes),
    }
    texts = [f'{len(names)} {problem}: {_few(names)}' for problem, names in problems.items() if names]
    if texts:
        raise ValueError('; '.join(texts))
    model.load_state_dict({**own, **found})
    return sorted(set(state) - wanted)


def _num_parameters(state: State) -> int:
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    return sum(value.numel() for key, value in state.items() if not key.endswith(buffers))


def _grouped(names: Iterable[str]) -> dict[str, int]:
    """Counts by the first three parts of the name."""
    return dict(Counter('.'.join(name.split('.')[:3]) for name in names))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f' and {len(names) - MOST_NAMED} more' if len(names) > MOST_NAMED else ''
    return ', '.join(names[:MOST_NAMED]) + more
