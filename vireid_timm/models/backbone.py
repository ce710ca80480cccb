"""The paper's network and its baseline on any timm backbone: `vireid_dml` and `vireid_base`.

timm's models give the maps of their levels by `forward_intermediates`. What they compute before the first level becomes
the stem, of which each modality has its own, and gives way to identities in the trunk.
"""

import copy
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.layers import PatchEmbed
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    clean_state_dict,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices

from ..layers.stem import DualStem
from ..text import format_list
from .branches import (
    DualStream,
    DualStreamFeatures,
    check_branches,
    check_names,
    check_own_weights,
    height_and_width,
    reset_input_size,
)

_logger = logging.getLogger(__name__)

DEFAULT_SIZE = (256, 128)


class DualStreamBackbone(DualStream):
    """Dual-stream network on a timm backbone with a global, a fusion and a joint branch, or the global branch only.

    The four levels are the maps with a quarter to a thirty-second of the image's sides; of a plain vision transformer,
    the blocks after each quarter of its depth. The global branch pools the backbone's final map (after its last norm).

    Args:
        backbone: timm's name, with a tag (`convnext_tiny.fb_in22k`) if other weights than the default ones are meant.
        num_classes: Identities to classify; with 0 the model returns retrieval features.
        in_chans: Image channels, for both modalities.
        global_pool: `gem`, `avg`, or '' (with `num_classes=0`) for the unpooled joint map. By default GeM where the
            last layer is a ReLU, else the average: GeM takes values below 0 for 0.
        drop_rate: Dropout before each classifier.
        fuse_layers: Levels to fuse, from 1 to 4; empty for the baseline.
        fuse_width: Channels per fused level; by default as many as the first of them has.
        gem_power: GeM's exponent p.
        spatial_weights: `asff` (weight maps predicted per image) or `static` (one learned map per level).
        last_stride: Stride of the last level, 1 or 2. By default 1 where its strides are those of convolutions with
            odd kernels, which give the same map without.
        plain_fusion: Build the paper's full fused map and pool it, instead of using the exact shortcut.
        private_stages: Levels that each modality has of its own, beside the stem; up to 3.
        img_size: Default image height and width, or one number for both. Backbones with position embeddings take no
            other size.
        backbone_args: Further arguments for the backbone.
        pretrained_backbone: Load timm's weights of the backbone, into both stems and the trunk.
        weights: Where these are, as `pretrained_cfg_overlay` of `timm.create_model`.

    Raises:
        ValueError: An argument is out of its range, or the backbone cannot be used; the message says what is missing.
    """

    pretrained_prefixes = ('stem.', 'trunk.')

    def __init__(
        self,
        backbone: str,
        num_classes: int = 0,
        in_chans: int = 3,
        global_pool: Optional[str] = None,
        drop_rate: float = 0.0,
        fuse_layers: Sequence[int] = (1, 2, 3),
        fuse_width: Optional[int] = None,
        gem_power: float = 3.0,
        spatial_weights: str = 'asff',
        last_stride: Optional[int] = None,
        plain_fusion: bool = False,
        private_stages: int = 0,
        img_size: Union[int, tuple[int, int]] = DEFAULT_SIZE,
        backbone_args: Optional[dict[str, Any]] = None,
        pretrained_backbone: bool = False,
        weights: Optional[dict[str, Any]] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if last_stride not in (None, 1, 2):
            raise ValueError(f'last_stride must be 1 or 2, got {last_stride}')
        if private_stages not in (0, 1, 2, 3):
            raise ValueError(f'private_stages must be from 0 to 3, got {private_stages}')
        check_branches(fuse_layers, spatial_weights, num_classes, global_pool)
        size = height_and_width(img_size)
        # Attributes with the names of arguments are saved with a model.
        self.backbone = backbone
        self.in_chans = in_chans
        self.private_stages = private_stages
        self.only_size = size if _backbone_cfg(backbone).fixed_input_size else None
        self.grad_checkpointing = False
        self.num_levels = 4  # fewer once pruned

        trunk = _create_trunk(backbone, size, pretrained_backbone, weights, in_chans, backbone_args or {}, dd)
        self.trunk = trunk.eval()
        self.level_indices = _levels(trunk, backbone)
        names = [trunk.feature_info[i]['module'] for i in self.level_indices]
        image = torch.linspace(-1, 1, in_chans * size[0] * size[1], **dd).view(1, in_chans, *size)
        with torch.no_grad():
            try:
                _set_last_stride(trunk, names[2], last_stride, lambda: self._trunk_maps(image))
                expected, last_layer = _remove_head(trunk, lambda: self._trunk_maps(image))
            except Exception as error:  # any, from code that was not made for this
                raise ValueError(
                    f'cannot use the backbone {backbone} with images of {size[0]}x{size[1]}: {error}'
                ) from error
            grids = [tuple(level.shape[2:]) for level in expected]
            reductions = [trunk.feature_info[i]['reduction'] for i in self.level_indices]
            reductions[3] = reductions[2] if grids[3] == grids[2] else reductions[3]
            self.feature_info = [
                dict(num_chs=level.shape[1], reduction=reduction, module=f'trunk.{name}')
                for level, reduction, name in zip(expected, reductions, names)
            ]
            _check_grids(grids, self.feature_info)
            stem = _cut_stem(trunk, names, private_stages, backbone)
            # Both stems start from the same values, random or of the backbone's weights.
            self.stem = DualStem(stem, copy.deepcopy(stem), in_chans)
            self._check_cut(image, expected)
        self.train()
        if global_pool is None:
            global_pool = 'gem' if isinstance(last_layer, (nn.ReLU, nn.ReLU6)) else 'avg'
        self._create_branches(
            size,
            num_classes,
            global_pool,
            drop_rate,
            fuse_layers,
            fuse_width,
            gem_power,
            spatial_weights,
            plain_fusion,
            dd,
        )

    def _check_cut(self, image: torch.Tensor, expected: list[torch.Tensor]) -> None:
        """Check that stem and trunk compute what the backbone did."""
        try:
            actual = self._trunk_maps(self.stem.visible(image))
        except Exception as error:  # any, from code that was not made for this
            actual, reason = [], f': {error}'
        else:
            reason = ''
        if [level.shape for level in actual] == [level.shape for level in expected]:
            if image.is_meta or all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(actual, expected)):
                return
        stages = f' and its first {self.private_stages} levels' if self.private_stages else ''
        raise ValueError(
            f'{self.backbone} cannot have one stem per modality: what comes before the levels that are shared is more '
            f'than its stem{stages}, one layer after the other (position embeddings, say){reason}'
        )

    def _trunk_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps [B, C, h, w] of the levels, of the last one the final map, from the stem's output."""
        indices = self.level_indices[: self.num_levels]
        final, levels = self.trunk.forward_intermediates(x, indices=indices)
        if self.num_levels < 4:
            return levels + levels[-1:] * (4 - self.num_levels)
        if final.ndim == 3:  # tokens
            tokens = final[:, getattr(self.trunk, 'num_prefix_tokens', 0) :]
            final = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *levels[-1].shape[2:])
        elif final.shape[2:] != levels[-1].shape[2:]:  # channels last
            final = final.permute(0, 3, 1, 2)
        return [*levels[:3], final]

    def _forward_levels(
        self,
        visible: Optional[torch.Tensor],
        infrared: Optional[torch.Tensor],
    ) -> list[torch.Tensor]:
        given = visible if visible is not None else infrared
        if self.only_size is not None and given is not None and tuple(given.shape[2:]) != self.only_size:
            height, width = self.only_size
            raise ValueError(
                f'{self.backbone} was created for images of {height}x{width} and takes no others, got '
                f'{list(given.shape)}; create the model with another img_size'
            )
        levels = self._trunk_maps(self.stem(visible, infrared))
        _check_grids([tuple(level.shape[2:]) for level in levels], self.feature_info)
        return levels

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        def on_trunk(pattern: str) -> str:
            return rf'^trunk\.(?:{pattern.replace("^", "")})'

        groups = self.trunk.group_matcher(coarse=coarse)
        blocks = groups['blocks']
        blocks = on_trunk(blocks) if isinstance(blocks, str) else [(on_trunk(one), order) for one, order in blocks]
        return dict(stem=rf'^stem|{on_trunk(groups["stem"])}', blocks=blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {f'trunk.{name}' for name in getattr(self.trunk, 'no_weight_decay', set)()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        self.trunk.set_grad_checkpointing(enable)

    def forward_intermediates(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
        indices: Optional[Union[int, list[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[list[torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]]:
        """timm's `forward_intermediates` over the four levels (indices 0-3), for one or both modalities.

        Returns:
            The joint map and the maps of the chosen levels; with `intermediates_only`, only these. `stop_early` saves
            nothing, since the joint map needs every level.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt must be NCHW, got {output_fmt!r}')
        take, _ = feature_take_indices(4, indices)
        levels = self._forward_levels(visible, infrared)
        intermediates = [levels[i] for i in take]
        return intermediates if intermediates_only else (self._joint_map(levels), intermediates)

    def prune_intermediate_layers(
        self,
        indices: Union[int, list[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the levels after the last of `indices`. The head goes too if any do, or if `prune_head` is set."""
        take, last = feature_take_indices(4, indices)
        if last < 3:
            self.trunk.prune_intermediate_layers([self.level_indices[last]], prune_norm=True)
            self.num_levels = last + 1
        if prune_head or last < 3:
            self._remove_head(self.feature_info[last]['num_chs'])
        return take


def _create_trunk(
    backbone: str,
    size: tuple[int, int],
    pretrained: bool,
    weights: Optional[dict[str, Any]],
    in_chans: int,
    backbone_args: dict[str, Any],
    dd: dict[str, Any],
) -> nn.Module:
    """Create the backbone without its classifier."""
    args = {'in_chans': in_chans, 'num_classes': 0, **backbone_args}
    if _backbone_cfg(backbone).fixed_input_size:
        args.setdefault('img_size', size)
    try:
        trunk = timm.create_model(backbone, pretrained=pretrained, pretrained_cfg_overlay=weights, **args, **dd)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f'cannot create the backbone {backbone} for images of {size[0]}x{size[1]}: {error}') from error
    for name in ('forward_intermediates', 'prune_intermediate_layers'):
        if not hasattr(trunk, name):
            raise ValueError(f'{backbone} has no {name}, by which timm models give the maps of their levels')
    trunk.feature_info = list(getattr(trunk.feature_info, 'info', trunk.feature_info))
    return trunk


def _backbone_cfg(backbone: str) -> PretrainedCfg:
    """Return timm's configuration of a backbone."""
    name, _, tag = backbone.partition('.')
    if not is_model(name) or name.startswith('vireid_'):
        raise ValueError(f'timm has no backbone {name!r}; timm.list_models() has the names')
    try:
        return get_pretrained_cfg(backbone) or PretrainedCfg()
    except RuntimeError:
        tags = [known.partition('.')[2] for known in timm.list_pretrained(name)]
        raise ValueError(f'{name} has no weights {tag!r}, but {format_list(tags) or "none"}') from None


def _remove_head(
    trunk: nn.Module,
    forward: Callable[[], list[torch.Tensor]],
) -> tuple[list[torch.Tensor], nn.Module]:
    """Run a forward pass and remove the layers of top-level modules that it does not call, such as the head's.

    Parameters without a gradient would stop training on several GPUs.

    Returns:
        The maps, and the layer that was called last.
    """
    called = []
    hooks = [module.register_forward_pre_hook(lambda one, _: called.append(one)) for module in trunk.modules()]
    maps = forward()
    for hook in hooks:
        hook.remove()
    for name, child in trunk.named_children():
        if set(called).isdisjoint(child.modules()):
            for inner, module in list(child.named_modules(prefix=name)):
                if next(module.parameters(recurse=False), None) is not None:
                    trunk.set_submodule(inner, nn.Identity())
    layers = [one for one in called if not isinstance(one, nn.Identity) and not any(one.children())]
    return maps, layers[-1]


def _levels(trunk: nn.Module, backbone: str) -> list[int]:
    """Return the indices of four levels in the backbone's `feature_info`."""
    reductions = [info['reduction'] for info in trunk.feature_info]
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
    trunk: nn.Module,
    third_level: str,
    last_stride: Optional[int],
    forward: Callable[[], list[torch.Tensor]],
) -> None:
    """Remove the last level's stride, as is usual in re-ID, where that leaves the third level's grid."""
    before = [level.shape[2:] for level in forward()]
    if last_stride == 2 or before[3] == before[2]:
        return
    named = list(trunk.named_modules())
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
        trunk.set_submodule(name, module)
    try:
        if forward()[3].shape[2:] == before[2]:
            return
    except RuntimeError:  # a shortcut that is strided by other means
        pass
    if last_stride == 1:
        raise ValueError('last_stride=1 is not possible, because its last level merges neighbours')
    for name, module in strided:
        trunk.set_submodule(name, module)


def _cut_stem(trunk: nn.Module, levels: list[str], private_stages: int, backbone: str) -> nn.Sequential:
    """Return what the trunk computes before its first shared level, and leave identities there."""
    children = [name for name, _ in trunk.named_children()]
    tops = [level.partition('.')[0] for level in levels]
    if not set(tops) <= set(children) or children[0] == tops[0]:
        raise ValueError(f'{backbone} has no layers of its own before its first level, {levels[0]}: they are the stem')
    first = children.index(tops[0])
    patches = getattr(trunk, 'patch_embed', None)
    if isinstance(patches, PatchEmbed) and not private_stages:
        private = ['patch_embed.proj']
    elif not private_stages:
        private = children[:first]
    elif tops[0] != tops[1]:
        private = children[: children.index(tops[private_stages - 1]) + 1]
    else:
        stages = [name for name, _ in trunk.get_submodule(tops[0]).named_children()]
        last = stages.index(levels[private_stages - 1].split('.')[1])
        private = children[:first] + [f'{tops[0]}.{stage}' for stage in stages[: last + 1]]
    stem = OrderedDict((name.replace('.', '_'), trunk.get_submodule(name)) for name in private)
    for name in private:
        trunk.set_submodule(name, nn.Sequential())  # an identity that can be iterated, as some stems are
    if private == ['patch_embed.proj']:  # what arrives there now is a map with a position for each patch
        patches.img_size, patches.patch_size = patches.grid_size, (1, 1)
    return nn.Sequential(stem)


def _check_grids(grids: list[tuple[int, int]], levels: list[dict[str, Any]]) -> None:
    """Check that each position of a later level covers whole positions of the first one, those at the border aside."""
    base = levels[0]['reduction']
    for grid, level in zip(grids, levels):
        step = level['reduction'] // base
        if grid != tuple(-(-side // step) for side in grids[0]):
            raise ValueError(
                f'the levels are maps of {format_list([f"{h}x{w}" for h, w in grids])} at this image size, which do '
                'not cover each other evenly: try a height and width that are multiples of 32, or another backbone'
            )


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take this network's own weights, without the prefixes of wrappers; timm loads those of backbones.

    Raises:
        RuntimeError: The weights are of another network.
    """
    state_dict = clean_state_dict(state_dict)
    check_own_weights(state_dict, model)
    return state_dict


_SOURCES = ('file', 'url', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'custom_load', 'source')


def _create_on_backbone(
    variant: str,
    pretrained: bool = False,
    backbone: str = '',
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Optional[dict[str, Any]] = None,
    img_size: Optional[Union[int, Sequence[int]]] = None,
    **kwargs: Any,
) -> DualStreamBackbone:
    """Create a network. The weights of a saved folder, or in the package, are its own; others are the backbone's."""
    if not backbone:
        raise ValueError(
            f"{variant} needs a backbone, for instance timm.create_model({variant!r}, backbone='resnet26d')"
        )
    _check_backbone_arguments(kwargs)
    cfg, overlay = resolve_pretrained_cfg(variant, pretrained_cfg), dict(pretrained_cfg_overlay or {})
    is_own = bool(cfg.file) or not isinstance(pretrained_cfg, (str, type(None)))
    weights = {}
    if not is_own:
        backbone = f'{backbone}.{cfg.tag}' if cfg.tag and '.' not in backbone else backbone
        source = _backbone_cfg(backbone)
        weights = {name: overlay.pop(name) for name in _SOURCES if name in overlay}
        size = _default_size(backbone, source) if img_size is None else height_and_width(img_size)
        overlay = {**{name: getattr(source, name) for name in _FACTS}, 'input_size': (3, *size), **overlay}
    else:
        size = tuple(cfg.input_size[1:]) if img_size is None else height_and_width(img_size)
    model = build_model_with_cfg(
        DualStreamBackbone,
        variant,
        pretrained and is_own,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls=DualStreamFeatures),
        backbone=backbone,
        img_size=size,
        pretrained_backbone=pretrained and not is_own,
        weights=weights,
        **kwargs,
    )
    network = model.model if isinstance(model, DualStreamFeatures) else model
    network.starts_from_backbone = not is_own
    reset_input_size(model, network.feature_info[3]['reduction'], img_size, kwargs, overlay)
    if pretrained and not is_own:
        _logger.warning(
            f'Loaded the weights of {backbone} into both stems and the trunk: a start for fine-tuning, not a '
            're-identification model.'
        )
    return model


# What a network's configuration takes from that of its backbone.
_FACTS = ('hf_hub_id', 'tag', 'mean', 'std', 'interpolation', 'fixed_input_size', 'license')


def _check_backbone_arguments(names: Iterable[str]) -> None:
    """Refuse the arguments that may be the backbone's."""
    own = {*inspect.signature(DualStreamBackbone).parameters, 'features_only', 'out_indices', 'cache_dir'}
    unknown = [name for name in names if name not in own | {'pretrained_model_args', 'feature_cls'}]
    if unknown:
        raise TypeError(
            f'these networks do not take {", ".join(unknown)}; arguments of the backbone go into '
            f'backbone_args=dict({", ".join(f"{name}=..." for name in unknown)})'
        )


def _default_size(backbone: str, cfg: PretrainedCfg) -> tuple[int, int]:
    """Return the usual size of re-ID, as whole patches where the backbone takes no others."""
    if not cfg.fixed_input_size:
        return DEFAULT_SIZE
    patch = timm.create_model(backbone, device='meta').feature_info[-1]['reduction']
    return tuple(side // patch * patch for side in DEFAULT_SIZE)


def _cfg(heads: tuple[str, ...], hf_hub_id: Optional[str] = None) -> dict[str, Any]:
    return {
        'hf_hub_id': hf_hub_id,
        'num_classes': 0,
        'input_size': (3, *DEFAULT_SIZE),
        'crop_pct': 1.0,
        'crop_mode': 'squash',
        'classifier': tuple(f'{head}.fc' for head in heads),
        'paper_name': 'Visible-Infrared Person Re-Identification via Feature Fusion and Deep Mutual Learning',
    }


_FUSED, _GLOBAL = ('joint_head', 'global_head', 'fusion_head'), ('global_head',)

default_cfgs = generate_default_cfgs({'vireid_dml': _cfg(_FUSED), 'vireid_base': _cfg(_GLOBAL)})
check_names(default_cfgs, __name__)


@register_model
def vireid_dml(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's network on any timm backbone: `backbone='convnext_tiny'`. Default input 256x128."""
    return _create_on_backbone('vireid_dml', pretrained, **kwargs)


@register_model
def vireid_base(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's baseline, the global branch only, on any timm backbone. Default input 256x128."""
    return _create_on_backbone('vireid_base', pretrained, **{'fuse_layers': (), **kwargs})
