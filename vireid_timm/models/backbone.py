"""The paper's network and its baseline on any timm backbone: `vireid_dml` and `vireid_base`.

`trunk.py` takes a timm model apart: each modality gets a stem of its own, and the levels are shared.
"""

import copy
import inspect
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    checkpoint,
    clean_state_dict,
    generate_default_cfgs,
    load_state_dict,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices

from ..constants import MODALITIES
from ..layers.stem import DualStem
from ..options import check_kinds
from .branches import (
    DualStream,
    DualStreamFeatures,
    check_branches,
    check_names,
    check_own_weights,
    complete_cfg,
    height_and_width,
    packaged_weights,
    set_retrieval,
)
from .trunk import Trunk, backbone_cfg

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
        fuse_width: Channels per fused level; by default as many as the first level has.
        gem_power: GeM's exponent p.
        spatial_weights: `asff` (weight maps predicted per image) or `static` (one learned map per level).
        last_stride: Stride of the last level, 1 or 2. By default 1 where its strides are those of convolutions with
            odd kernels, which give the same map without.
        plain_fusion: Build the paper's full fused map and pool it, instead of using the exact shortcut.
        private_stages: Levels that each modality has of its own, beside the stem; up to all 4.
        retrieval: What the model returns with `num_classes=0`: V_joint `after-bn`, as AGW does, or `before-bn` (eq. 3).
        img_size: Default image height and width, or one number for both. Backbones with position embeddings take no
            other size.
        backbone_args: Further arguments for the backbone.
        pretrained_backbone: Load timm's weights of the backbone, into both stems and the trunk.
        weights: Where these are, as `pretrained_cfg_overlay` of `timm.create_model`.

    Raises:
        ValueError: An argument is out of its range, or the backbone cannot be used; the message says what is missing.
    """

    pretrained_prefixes = ('stem.', 'private_levels.', 'trunk.')

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
        retrieval: str = 'after-bn',
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
        if private_stages not in (0, 1, 2, 3, 4):
            raise ValueError(f'private_stages must be from 0 to 4, got {private_stages}')
        check_branches(fuse_layers, fuse_width, spatial_weights, num_classes, global_pool, retrieval)
        size = height_and_width(img_size)
        # Attributes with the names of arguments are saved with a model.
        self.backbone = backbone
        self.in_chans = in_chans
        self.private_stages = int(private_stages)
        self.retrieval = retrieval
        self.grad_checkpointing = False

        args = backbone_args or {}
        self.trunk = Trunk(backbone, size, in_chans, last_stride, pretrained_backbone, weights, args, dd)
        self.last_stride = 1 if len({info['reduction'] for info in self.trunk.feature_info[2:]}) == 1 else 2
        stem, *levels = self.trunk.cut_stem(private_stages)
        # Both modalities start from the same values, random or of the backbone's weights.
        self.stem = DualStem(stem, copy.deepcopy(stem), in_chans, self.trunk.only_size)
        self.private_levels = nn.ModuleList([DualStem(level, copy.deepcopy(level)) for level in levels])
        self.train()
        self.feature_info = [{**info, 'module': f'trunk.model.{info["module"]}'} for info in self.trunk.feature_info]
        if global_pool is None:
            global_pool = 'gem' if self.trunk.has_relu else 'avg'
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

    def _forward_levels(
        self,
        visible: Optional[torch.Tensor],
        infrared: Optional[torch.Tensor],
    ) -> list[torch.Tensor]:
        recompute = self.grad_checkpointing and self.private_stages > 0
        x = checkpoint(self.stem, visible, infrared) if recompute else self.stem(visible, infrared)
        earlier = []
        for level in self.private_levels:
            earlier.append(x)
            count = 0 if visible is None else visible.shape[0]
            parts = None if visible is None else x[:count], None if infrared is None else x[count:]
            x = checkpoint(level, *parts) if recompute else level(*parts)
        return self.trunk(x, earlier)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        def on_trunk(pattern: str) -> str:
            unanchored = re.sub(r'(^|[|])\^', r'\1', pattern)
            return rf'^trunk\.model\.(?:{unanchored})'

        try:
            groups = self.trunk.model.group_matcher(coarse=coarse)
            blocks = groups['blocks']
        except (AttributeError, TypeError, KeyError) as error:
            raise ValueError(
                f'{self.backbone} does not say how its layers follow each other: no layer decay'
            ) from error
        blocks = on_trunk(blocks) if isinstance(blocks, str) else [(on_trunk(one), order) for one, order in blocks]
        return dict(stem=rf'^stem|^private_levels|{on_trunk(groups["stem"])}', blocks=blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {f'trunk.model.{name}' for name in getattr(self.trunk.model, 'no_weight_decay', set)()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        try:
            self.trunk.model.set_grad_checkpointing(enable)
        except AssertionError as error:
            raise ValueError(
                f'{self.backbone} cannot recompute its activations: leave out grad checkpointing'
            ) from error
        self.grad_checkpointing = enable

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
        self.trunk.prune(last)
        self.private_levels = self.private_levels[:last]  # level 1 is in the stem
        if prune_head or last < 3:
            self._remove_head(self.feature_info[last]['num_chs'])
        return take


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take this network's own weights, without the prefixes of wrappers; timm loads those of backbones.

    Raises:
        RuntimeError: The weights are of another network.
    """
    state_dict = clean_state_dict(state_dict)
    check_own_weights(state_dict, model)
    return state_dict


_SOURCES = ('file', 'url', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'custom_load', 'source')


def create_on_backbone(
    variant: str,
    pretrained: bool = False,
    model_cls: type[DualStreamBackbone] = DualStreamBackbone,
    backbone: str = 'resnet50.tv_in1k',
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Optional[dict[str, Any]] = None,
    img_size: Optional[Union[int, Sequence[int]]] = None,
    **kwargs: Any,
) -> DualStreamBackbone:
    """Create a network. The weights of a saved folder, or in the package, are its own; others are the backbone's."""
    _check_backbone_arguments(kwargs, model_cls)
    check_kinds({'backbone': backbone, **kwargs}, [DualStreamBackbone, model_cls], 'argument ')
    cfg, overlay = resolve_pretrained_cfg(variant, pretrained_cfg), dict(pretrained_cfg_overlay or {})
    is_own = bool(cfg.file) or not isinstance(pretrained_cfg, (str, type(None)))
    weights = {}
    if not is_own:
        if cfg.hf_hub_id == f'timm/{backbone}.{cfg.tag}':  # the variant's own backbone, with the weights of its tag
            backbone = f'{backbone}.{cfg.tag}'
        source = backbone_cfg(backbone)
        weights = {name: overlay.pop(name) for name in _SOURCES if name in overlay}
        state = weights.get('state_dict')
        if 'file' in weights and Path(weights['file']).is_file():
            state = clean_state_dict(load_state_dict(weights['file']))
        if state is not None and any(key.startswith('trunk.model.') for key in state):
            overlay, weights, is_own = {**overlay, **weights}, {}, True  # what `state_dict` of such a network gave
        elif state is not None:
            weights = {**weights, 'file': None, 'state_dict': state}
        size = _default_size(backbone, source, cfg) if img_size is None else height_and_width(img_size)
        facts = {name: getattr(source, name) for name in _FACTS}
        overlay = {**facts, 'first_conv': _first_conv(source), 'input_size': (3, *size), **overlay}
    else:
        size = tuple(cfg.input_size[1:]) if img_size is None else height_and_width(img_size)
    model = build_model_with_cfg(
        model_cls,
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
    set_retrieval(network, pretrained, kwargs)
    complete_cfg(model, network.feature_info[3]['reduction'], img_size, kwargs, overlay)
    if pretrained and not is_own:
        _logger.warning(
            f'Loaded the weights of {backbone} into both stems and the trunk: a start for fine-tuning, not a '
            're-identification model.'
        )
    return model


# What a network's configuration takes from that of its backbone.
_FACTS = ('hf_hub_id', 'tag', 'mean', 'std', 'interpolation', 'fixed_input_size', 'license')


def _first_conv(source: PretrainedCfg) -> tuple[str, ...]:
    """Return the names of the first convolutions in the stems."""
    names = (source.first_conv,) if isinstance(source.first_conv, str) else source.first_conv or ()
    names = [name.replace('patch_embed.proj', 'patch_embed_proj') for name in names]
    return tuple(f'stem.{modality}.{name}' for modality in MODALITIES for name in names)


def _check_backbone_arguments(names: Iterable[str], model_cls: type[DualStreamBackbone]) -> None:
    """Refuse the arguments that may be the backbone's."""
    own = {name for cls in (model_cls, DualStreamBackbone) for name in inspect.signature(cls).parameters}
    own |= {'features_only', 'out_indices', 'cache_dir', 'pretrained_model_args', 'feature_cls'}
    unknown = [name for name in names if name not in own]
    if unknown:
        raise TypeError(
            f'these networks do not take {", ".join(unknown)}; arguments of the backbone go into '
            f'backbone_args=dict({", ".join(f"{name}=..." for name in unknown)})'
        )


def _default_size(backbone: str, source: PretrainedCfg, cfg: PretrainedCfg) -> tuple[int, int]:
    """Return the network's own image size, as whole patches where the backbone takes no others."""
    size = cfg.input_size[1:]
    if not source.fixed_input_size:
        return size
    patch = timm.create_model(backbone, device='meta').feature_info[-1]['reduction']
    return tuple(side // patch * patch for side in size)


def network_cfg(backbone: str, has_weights: bool = True, fused: bool = True) -> dict[str, Any]:
    """Return the configuration of a network on a backbone."""
    heads = ('joint_head', 'global_head', 'fusion_head') if fused else ('global_head',)
    return {
        'hf_hub_id': f'timm/{backbone}' if has_weights else None,
        'num_classes': 0,
        'input_size': (3, *DEFAULT_SIZE),
        'crop_pct': 1.0,
        'crop_mode': 'squash',
        'first_conv': _first_conv(backbone_cfg(backbone)),
        'classifier': tuple(f'{head}.fc' for head in heads),
        'paper_name': 'Visible-Infrared Person Re-Identification via Feature Fusion and Deep Mutual Learning',
    }


default_cfgs = generate_default_cfgs(
    {
        'vireid_dml': network_cfg('resnet50.tv_in1k', has_weights=False),
        'vireid_base': network_cfg('resnet50.tv_in1k', has_weights=False, fused=False),
        'vireid_dml_efficientnet_lite0.in1k': network_cfg('tf_efficientnet_lite0.in1k'),
        'vireid_dml_efficientnet_lite0.in1k_ft_synthvi': {
            **network_cfg('tf_efficientnet_lite0.in1k', has_weights=False),
            'file': packaged_weights('vireid_dml_efficientnet_lite0.in1k_ft_synthvi'),
            'input_size': (3, 128, 64),
            'mean': IMAGENET_INCEPTION_MEAN,
            'std': IMAGENET_INCEPTION_STD,
            'interpolation': 'bilinear',
            'license': 'apache-2.0',
        },
        'vireid_dml_mobilenetv4_conv_medium.e500_r256_in1k': network_cfg('mobilenetv4_conv_medium.e500_r256_in1k'),
        'vireid_dml_regnety_032.ra_in1k': network_cfg('regnety_032.ra_in1k'),
        'vireid_dml_convnext_tiny.in12k_ft_in1k': network_cfg('convnext_tiny.in12k_ft_in1k'),
        'vireid_dml_vit_small_dinov2.lvd142m': network_cfg('vit_small_patch14_dinov2.lvd142m'),
    }
)
check_names(default_cfgs, __name__)


@register_model
def vireid_dml(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's network on any timm backbone, `backbone='convnext_tiny'`. Default input 256x128."""
    return create_on_backbone('vireid_dml', pretrained, **kwargs)


@register_model
def vireid_base(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's baseline, the global branch only, on any timm backbone. Default input 256x128."""
    return create_on_backbone('vireid_base', pretrained, **{'fuse_layers': (), **kwargs})


@register_model
def vireid_dml_efficientnet_lite0(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's network on EfficientNet-Lite0, for phones and CPUs."""
    model_args = {'backbone': 'tf_efficientnet_lite0', **kwargs}
    return create_on_backbone('vireid_dml_efficientnet_lite0', pretrained, **model_args)


@register_model
def vireid_dml_mobilenetv4_conv_medium(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's network on MobileNetV4 Conv-M, for phones and CPUs."""
    model_args = {'backbone': 'mobilenetv4_conv_medium', **kwargs}
    return create_on_backbone('vireid_dml_mobilenetv4_conv_medium', pretrained, **model_args)


@register_model
def vireid_dml_regnety_032(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's network on RegNetY-3.2GF."""
    return create_on_backbone('vireid_dml_regnety_032', pretrained, **{'backbone': 'regnety_032', **kwargs})


@register_model
def vireid_dml_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's network on ConvNeXt-T."""
    return create_on_backbone('vireid_dml_convnext_tiny', pretrained, **{'backbone': 'convnext_tiny', **kwargs})


@register_model
def vireid_dml_vit_small_dinov2(pretrained: bool = False, **kwargs: Any) -> DualStreamBackbone:
    """The paper's network on a ViT-S/14 pretrained by DINOv2. Default input 252x126."""
    model_args = {'backbone': 'vit_small_patch14_dinov2', **kwargs}
    return create_on_backbone('vireid_dml_vit_small_dinov2', pretrained, **model_args)
