"""timm models as trunks: their levels as maps, and their stems cut off, so that each modality can have its own."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Optional

import timm
import torch
import torch.nn as nn
from timm.layers import PatchEmbed
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, register_notrace_module

from ..text import format_list


@register_notrace_module
class Trunk(nn.Module):
    """A timm model as four levels: the maps with 1/4, 1/8, 1/16 and 1/32 of the image's sides.

    Of a plain vision transformer they are the maps after each quarter of its blocks. The last level is the model's
    final map, after its last norm. The head is removed.

    Args:
        backbone: timm's name.
        size: Height and width of the images.
        last_stride: Stride of the last level, 1 or 2; None for 1 where that is possible.
        pretrained: Load timm's weights.
        weights: Where these are, as `pretrained_cfg_overlay` of `timm.create_model`.
        backbone_args: Further arguments for the model.

    Attributes:
        feature_info: timm's facts about the four levels.
        only_size: Height and width of the only images that it takes, None if it takes others.
        has_relu: Whether the last layer is a ReLU, so that the last map has no values below 0.

    Raises:
        ValueError: The model cannot be used; the message says what is missing.
    """

    def __init__(
        self,
        backbone: str,
        size: tuple[int, int],
        in_chans: int,
        last_stride: Optional[int],
        pretrained: bool,
        weights: Optional[dict[str, Any]],
        backbone_args: dict[str, Any],
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.only_size = size if backbone_cfg(backbone).fixed_input_size else None
        self.num_levels = 4  # fewer once pruned
        self.model = _create(backbone, size, pretrained, weights, {**backbone_args, 'in_chans': in_chans}, dd).eval()
        self.indices = _levels(self.model, backbone)
        infos = [self.model.feature_info[i] for i in self.indices]
        modules = dict(self.model.named_modules())
        unnamed = [info['module'] for info in infos if info['module'] not in modules]
        if unnamed:
            raise ValueError(f'{backbone} has no modules with the names of its levels, such as {unnamed[-1]}')
        # Of any values; drawn ones would touch the caller's random state.
        self.probe = torch.linspace(-1, 1, in_chans * size[0] * size[1], **dd).view(1, in_chans, *size)
        try:
            _set_last_stride(self.model, infos[2]['module'], last_stride, self._maps_of_probe)
            maps, last_layer = _remove_head(self.model, self._maps_of_probe)
        except Exception as error:  # any, from code that was not made for this
            message = f'cannot use the backbone {backbone} with images of {size[0]}x{size[1]}: {_words(error)}'
            raise ValueError(message) from error
        self.has_relu = isinstance(last_layer, (nn.ReLU, nn.ReLU6))
        grids, reductions = [level.shape[2:] for level in maps], [info['reduction'] for info in infos]
        reductions[3] = reductions[2] if grids[3] == grids[2] else reductions[3]
        self.feature_info = [
            dict(num_chs=level.shape[1], reduction=reduction, module=info['module'])
            for level, reduction, info in zip(maps, reductions, infos)
        ]
        self._check_grids(maps)
        self.probe_maps = maps

    def forward(self, x: torch.Tensor, earlier: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """Return the levels [B, C, h, w].

        Args:
            x: Output of the stem and of the levels that were cut off.
            earlier: Outputs of these levels but for the last of them, in their order.
        """
        levels = self._maps(x)
        levels[: len(earlier)] = [self._channels_first(level) for level in earlier]
        self._check_grids(levels)
        return levels

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        final, levels = self.model.forward_intermediates(x, indices=self.indices[: self.num_levels])
        if self.num_levels < 4:
            return levels + levels[-1:] * (4 - self.num_levels)
        if final.ndim == 3:
            tokens = final[:, getattr(self.model, 'num_prefix_tokens', 0) :]
            return [*levels[:3], tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *levels[-1].shape[2:])]
        return [*levels[:3], self._channels_first(final)]

    def _channels_first(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2) if getattr(self.model, 'output_fmt', 'NCHW') == 'NHWC' else x

    @torch.no_grad()
    def _maps_of_probe(self) -> list[torch.Tensor]:
        return self._maps(self.probe)

    def _check_grids(self, maps: list[torch.Tensor]) -> None:
        """Check that each position of a later level covers whole ones of the first, those at the border aside."""
        grids = [tuple(level.shape[2:]) for level in maps]
        for grid, level in zip(grids[: self.num_levels], self.feature_info):
            step = level['reduction'] // self.feature_info[0]['reduction']
            if grid != tuple(-(-side // step) for side in grids[0]):
                shown = format_list([f'{height}x{width}' for height, width in grids])
                raise ValueError(
                    f'the levels of {self.backbone} are maps of {shown} at this image size, which do not cover each '
                    'other evenly: try a height and width that are multiples of 32; if they are, this backbone has no '
                    'levels to fuse'
                )

    @torch.no_grad()
    def cut_stem(self, private_stages: int) -> list[nn.Sequential]:
        """Take the stem and the first `private_stages` levels out of the model.

        Returns:
            The stem, with the first level if that is cut off, too, and the other levels that are, up to all four.

        Raises:
            ValueError: What the model computes before the other levels is more than these layers in their order.
        """
        probe, expected = self.probe, self.probe_maps
        del self.probe, self.probe_maps
        parts = _cut_stem(self.model, [info['module'] for info in self.feature_info], private_stages, self.backbone)
        reason, x, earlier = '', probe, []
        try:
            for part in parts:
                x = part(x)
                earlier.append(x)
            actual = self(x, earlier[:-1])
        except Exception as error:  # any, from code that was not made for this
            actual, reason = [], f': {_words(error)}'
        if [level.shape for level in actual] == [level.shape for level in expected]:
            if probe.is_meta or all(torch.allclose(a, b, rtol=1e-3, equal_nan=True) for a, b in zip(actual, expected)):
                return parts
        stages = f' and its first {private_stages} levels' if private_stages else ''
        raise ValueError(
            f'{self.backbone} cannot have one stem per modality: what comes before the levels that are shared is more '
            f'than its stem{stages}, one layer after the other (position embeddings, say){reason}'
        )

    def prune(self, last: int) -> None:
        """Remove the levels after the level `last`, counted from 0."""
        if last < 3:
            self.model.prune_intermediate_layers([self.indices[last]], prune_norm=True)
            self.num_levels = last + 1


def _create(
    backbone: str,
    size: tuple[int, int],
    pretrained: bool,
    weights: Optional[dict[str, Any]],
    args: dict[str, Any],
    dd: dict[str, Any],
) -> nn.Module:
    """Create timm's model without its classifier."""
    refused = sorted({'img_size', 'num_classes', 'features_only', 'pretrained'} & set(args))
    if refused:
        raise ValueError(f'{", ".join(refused)} cannot be among backbone_args: the network has such an argument itself')
    cfg = backbone_cfg(backbone)
    if cfg.fixed_input_size:
        args = {'img_size': size, **args}
    if pretrained and weights and 'state_dict' in weights:
        # Without its classifier, so that timm requires every other tensor to be there, and to have a place.
        names = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier or ()
        classifiers = tuple(f'{name}.' for name in names)
        state = {key: value for key, value in weights['state_dict'].items() if not key.startswith(classifiers)}
        weights = {**weights, 'state_dict': state, 'num_classes': 0}
    try:
        model = timm.create_model(
            backbone, pretrained=pretrained, pretrained_cfg_overlay=weights, num_classes=0, **args, **dd
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f'cannot create the backbone {backbone} for images of {size[0]}x{size[1]}: {_words(error)}'
        ) from error
    for name in ('forward_intermediates', 'prune_intermediate_layers'):
        if not hasattr(model, name):
            raise ValueError(f'{backbone} has no {name}, by which timm models give the maps of their levels')
    model.feature_info = list(getattr(model.feature_info, 'info', model.feature_info))
    return model


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__  # a bare assertion says nothing


def backbone_cfg(backbone: str) -> PretrainedCfg:
    """Return timm's configuration of a backbone.

    Raises:
        ValueError: timm has no such model, or no such weights.
    """
    name, _, tag = backbone.partition('.')
    if not is_model(name) or name.startswith('vireid_'):
        raise ValueError(f'timm has no backbone {name!r}; timm.list_models() has the names')
    try:
        return get_pretrained_cfg(backbone) or PretrainedCfg()
    except RuntimeError:
        tags = [known.partition('.')[2] for known in timm.list_pretrained(name)]
        raise ValueError(f'{name} has no weights {tag!r}, but {format_list(tags) or "none"}') from None


def _remove_head(
    model: nn.Module,
    forward: Callable[[], list[torch.Tensor]],
) -> tuple[list[torch.Tensor], nn.Module]:
    """Run a forward pass and remove the layers of top-level modules that it does not call, such as the head's.

    Parameters without a gradient would stop training on several GPUs.

    Returns:
        The maps, and the layer that was called last.
    """
    called = []
    hooks = [module.register_forward_pre_hook(lambda one, _: called.append(one)) for module in model.modules()]
    maps = forward()
    for hook in hooks:
        hook.remove()
    for name, child in model.named_children():
        if set(called).isdisjoint(child.modules()):
            for inner, module in list(child.named_modules(prefix=name)):
                if next(module.parameters(recurse=False), None) is not None:
                    model.set_submodule(inner, nn.Identity())
    layers = [one for one in called if not isinstance(one, nn.Identity) and not any(one.children())]
    return maps, layers[-1]


def _levels(model: nn.Module, backbone: str) -> list[int]:
    """Return the indices of four levels in the backbone's `feature_info`."""
    reductions = [info['reduction'] for info in model.feature_info]
    count = len(reductions)
    if count >= 4 and len(set(reductions)) == 1:
        return [count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    levels = [i for i, reduction in enumerate(reductions) if reduction >= 4]
    if [reductions[i] for i in levels] != [4, 8, 16, 32]:
        raise ValueError(
            f'{backbone} has maps with 1/{", 1/".join(map(str, reductions))} of the image; needed are 1/4, 1/8, 1/16 '
            'and 1/32, or the same for at least four blocks'
        )
    return levels


def _set_last_stride(
    model: nn.Module,
    third_level: str,
    last_stride: Optional[int],
    forward: Callable[[], list[torch.Tensor]],
) -> None:
    """Remove the last level's stride, as is usual in re-ID, where that leaves the third level's grid."""
    before = [level.shape[2:] for level in forward()]
    if before[3] == before[2]:
        if last_stride == 2:
            raise ValueError('last_stride=2 is not possible, because its levels have equal grids')
        return
    if last_stride == 2:
        return
    named = list(model.named_modules())
    last = max(i for i, (name, _) in enumerate(named) if f'{name}.'.startswith(f'{third_level}.'))
    strided = [
        (name, module)
        for name, module in named[last + 1 :]
        if hasattr(module, 'kernel_size') and getattr(module, 'stride', None) in (2, (2, 2), [2, 2])
    ]
    # The pooling is that of a ResNet-D's shortcut or of a ResNeSt's block: it does nothing but reduce.
    possible = all(
        isinstance(module, nn.AvgPool2d) or (isinstance(module, nn.Conv2d) and all(s % 2 for s in module.kernel_size))
        for _, module in strided
    )
    changed = [(name, nn.Identity() if isinstance(one, nn.AvgPool2d) else copy.copy(one)) for name, one in strided]
    for name, module in changed if possible else ():
        module.stride = (1, 1)
        model.set_submodule(name, module)
    try:
        if forward()[3].shape[2:] == before[2]:
            return
    except RuntimeError:  # a shortcut that is strided by other means
        pass
    if last_stride == 1:
        raise ValueError('last_stride=1 is not possible, because its last level merges neighbours')
    for name, module in strided:
        model.set_submodule(name, module)


def _cut_stem(model: nn.Module, levels: list[str], private_stages: int, backbone: str) -> list[nn.Sequential]:
    """Take what `Trunk.cut_stem` returns out of the model, and leave identities there."""
    children = [name for name, _ in model.named_children()]
    tops = [level.partition('.')[0] for level in levels]
    if not set(tops) <= set(children) or children[0] == tops[0]:
        raise ValueError(f'{backbone} has no layers of its own before its first level, {levels[0]}: they are the stem')
    parts = [children[: children.index(tops[0])]]
    patches = getattr(model, 'patch_embed', None)
    is_cut = isinstance(patches, PatchEmbed) and not private_stages
    if is_cut:
        parts = [['patch_embed.proj']]
    # The levels are top-level modules, or all in one.
    inner = [f'{tops[0]}.{name}' for name, _ in model.get_submodule(tops[0]).named_children()]
    stages = inner if tops[0] == tops[1] else children
    start = stages.index(tops[0]) if tops[0] in stages else 0
    for level in levels[:private_stages]:
        end = next(i for i, name in enumerate(stages) if f'{level}.'.startswith(f'{name}.')) + 1
        parts.append(stages[start:end])
        start = end
    if private_stages:
        parts = [parts[0] + parts[1], *parts[2:]]
    cut = []
    for names in parts:
        cut.append(nn.Sequential(OrderedDict((name.replace('.', '_'), model.get_submodule(name)) for name in names)))
        for name in names:
            # Some models go over the layers of their stem.
            count = len(module) if isinstance(module := model.get_submodule(name), nn.Sequential) else 0
            model.set_submodule(name, nn.Sequential(*[nn.Identity() for _ in range(count)]))
    if is_cut:  # what arrives there now is a map with a position for each patch
        patches.img_size, patches.patch_size = patches.grid_size, (1, 1)
    return cut
