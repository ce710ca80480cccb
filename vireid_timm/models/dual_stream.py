"""Dual-stream ResNets for visible-infrared person re-identification, registered with timm.

The paper's networks: one stem per modality and shared layers, under the branches of `branches.py`. AGW
(arXiv:2001.04193), the common baseline of the field, is the global branch with non-local blocks in the trunk.
"""

import copy
import inspect
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Optional, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    clean_state_dict,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..layers.non_local import NonLocalBlock
from ..layers.stem import DualStem, Stem
from ..options import check_kinds
from ..text import format_list
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

__all__ = ['DualStreamResNet']

_logger = logging.getLogger(__name__)


def set_last_stride(layer4: nn.Sequential, last_stride: int) -> None:
    """Remove layer4's stride, as is usual in re-ID, without the dilation of timm's `output_stride=16`."""
    if last_stride == 2:
        return
    for name, module in layer4[0].named_modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d):
            parent, _, child = name.rpartition('.')
            setattr(layer4[0].get_submodule(parent), child, nn.Identity())


def _with_non_local(
    layer: nn.Sequential,
    count: int,
    channels: int,
    width: Union[int, str],
    dd: dict[str, Any],
) -> nn.Sequential:
    """Insert a non-local block after each of the last `count` residual blocks, which keep their names."""
    modules = OrderedDict()
    for i, (name, block) in enumerate(layer.named_children()):
        modules[name] = block
        if i >= len(layer) - count:
            inner = channels // 2 if width == 'half' else int(width)
            modules[f'{name}_non_local'] = NonLocalBlock(channels, inner, **dd)
    return nn.Sequential(modules)


def _check_non_local(blocks: Sequence[int], width: Union[int, str], layers: Sequence[int]) -> None:
    if len(blocks) != 4 or not all(0 <= count <= num_blocks for count, num_blocks in zip(blocks, layers)):
        raise ValueError(f'non_local_blocks must be four counts of at most {tuple(layers)}, got {tuple(blocks)}')
    if width != 'half' and not (isinstance(width, int) and width >= 1):
        raise ValueError(f"non_local_width must be a positive number of channels or 'half', got {width!r}")


def _check_timm_arguments(names: Iterable[str]) -> None:
    """Refuse the arguments of timm's ResNet that these networks do not take. Python refuses unknown ones."""
    own, resnet = (inspect.signature(cls).parameters for cls in (DualStreamResNet, ResNet))
    refused = [name for name in names if name in resnet and name not in own]
    if 'output_stride' in refused:
        raise ValueError('these networks do not take output_stride, which dilates: last_stride is 1 or 2 instead')
    if refused:
        raise ValueError(
            f"these networks do not take {', '.join(refused)} directly: timm's ResNet does, so pass "
            f'resnet_args=dict({", ".join(f"{name}=..." for name in refused)})'
        )


class DualStreamResNet(DualStream):
    """Dual-stream ResNet with a global, a fusion and a joint branch, or with the global branch only (the baseline).

    Args:
        block: timm's residual block.
        layers: Blocks per stage.
        num_classes: Identities to classify; with 0 the model returns retrieval features.
        in_chans: Image channels, for both modalities.
        global_pool: `gem`, `avg`, or '' (with `num_classes=0`) for the unpooled joint map.
        drop_rate: Dropout before each classifier.
        fuse_layers: Layers to fuse, from 1 to 4 (table 2); empty for the baseline.
        fuse_width: Channels per fused layer; by default as many as layer1 has, 256 in the paper's ResNet-50.
        gem_power: GeM's exponent p.
        spatial_weights: `asff` (weight maps predicted per image) or `static` (one learned map per layer).
        last_stride: Stride of layer4, 1 or 2.
        plain_fusion: Build the paper's full fused map and pool it, instead of using the exact shortcut.
        non_local_blocks: How many of the last blocks of layer1 to layer4 are followed by a non-local block. None in
            the paper's networks, (0, 2, 3, 0) in AGW (arXiv:2001.04193).
        non_local_width: Inner channels of the non-local blocks, or `half` for half of the map's channels. AGW meant
            half, but its code, and therefore every set of weights trained with it, has 1.
        retrieval: What the model returns with `num_classes=0`: V_joint `after-bn`, as AGW does, or `before-bn` (eq. 3).
        img_size: Default image height and width, or one number for both. Sets the grid of the `static` weight maps,
            and through `timm.create_model` the input size in the model's configuration.
        resnet_args: Further arguments for timm's `ResNet` (stem type, ...), but not `output_stride`.

    Raises:
        ValueError: An argument is out of its range.
    """

    pretrained_prefixes = ('stem.', 'layer')
    stem_chans: Optional[int] = None  # of the first convolution, where it is not the images' channels

    def __init__(
        self,
        block: Union[type[BasicBlock], type[Bottleneck]],
        layers: Sequence[int],
        num_classes: int = 0,
        in_chans: int = 3,
        global_pool: str = 'gem',
        drop_rate: float = 0.0,
        fuse_layers: Sequence[int] = (1, 2, 3),
        fuse_width: Optional[int] = None,
        gem_power: float = 3.0,
        spatial_weights: str = 'asff',
        last_stride: int = 1,
        plain_fusion: bool = False,
        non_local_blocks: Sequence[int] = (0, 0, 0, 0),
        non_local_width: Union[int, str] = 1,
        retrieval: str = 'after-bn',
        img_size: Union[int, tuple[int, int]] = (288, 144),
        resnet_args: Optional[dict[str, Any]] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if 'output_stride' in (resnet_args or {}):
            _check_timm_arguments(['output_stride'])
        check_branches(fuse_layers, fuse_width, spatial_weights, num_classes, global_pool, retrieval)
        if last_stride not in (1, 2):
            raise ValueError(f'last_stride must be 1 or 2, got {last_stride}')
        _check_non_local(non_local_blocks, non_local_width, layers)
        size = height_and_width(img_size)
        self.in_chans = in_chans
        self.last_stride = last_stride
        self.retrieval = retrieval
        self.grad_checkpointing = False

        stem_chans = in_chans if self.stem_chans is None else self.stem_chans
        trunk = ResNet(block, layers, num_classes=0, in_chans=stem_chans, **(resnet_args or {}), **dd)
        self.stem = self._create_stem(Stem(trunk))
        set_last_stride(trunk.layer4, last_stride)
        for i, count in enumerate(non_local_blocks, start=1):
            channels = trunk.feature_info[i]['num_chs']
            layer = _with_non_local(getattr(trunk, f'layer{i}'), count, channels, non_local_width, dd)
            setattr(self, f'layer{i}', layer)
        self.feature_info = [
            dict(info, reduction=reduction, module=f'layer{i}')
            for i, (info, reduction) in enumerate(zip(trunk.feature_info[1:], (4, 8, 16, 16 * last_stride)), start=1)
        ]
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

    def _create_stem(self, stem: Stem) -> nn.Module:
        # Both stems start from the same values, random or (see `checkpoint_filter_fn`) from ImageNet.
        return DualStem(stem, copy.deepcopy(stem), self.in_chans)

    @torch.jit.ignore
    def stem_weights(self, key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of the stem that an ImageNet network's tensor fills."""
        return {f'stem.visible.{key}': value, f'stem.infrared.{key}': value.clone()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return dict(stem=r'^stem', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
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
        """timm's `forward_intermediates` over layer1-4 (indices 0-3), for one or both modalities.

        Returns:
            The joint map and the maps of the chosen layers; with `intermediates_only`, only these. If `stop_early`
            stops before layer4, the map of the last layer replaces the joint map.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt must be NCHW, got {output_fmt!r}')
        take, last = feature_take_indices(4, indices)
        x = self.stem(visible, infrared)
        levels = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4)[: last + 1 if stop_early else 4]:
            x = checkpoint_seq(layer, x) if self.grad_checkpointing else layer(x)
            levels.append(x)
        intermediates = [levels[i] for i in take]
        if intermediates_only:
            return intermediates
        return self._joint_map(levels) if len(levels) == 4 else levels[-1], intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, list[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers after the last of `indices`. The head goes too if any do, or if `prune_head` is set."""
        take, last = feature_take_indices(4, indices)
        for i in range(last + 1, 4):
            setattr(self, f'layer{i + 1}', nn.Sequential().train(self.training))  # empty, for checkpoint_seq
        if prune_head or last < 3:
            self._remove_head(self.feature_info[last]['num_chs'])
        return take

    def _forward_levels(
        self,
        visible: Optional[torch.Tensor],
        infrared: Optional[torch.Tensor],
    ) -> list[torch.Tensor]:
        x0 = self.stem(visible, infrared)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x1 = checkpoint_seq(self.layer1, x0)
            x2 = checkpoint_seq(self.layer2, x1)
            x3 = checkpoint_seq(self.layer3, x2)
            x4 = checkpoint_seq(self.layer4, x3)
        else:
            x1 = self.layer1(x0)
            x2 = self.layer2(x1)
            x3 = self.layer3(x2)
            x4 = self.layer4(x3)
        return [x1, x2, x3, x4]


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Map a timm or torchvision ImageNet ResNet onto the dual-stream network; our own weights pass unchanged.

    As in timm, prefixes of `torch.compile` and of parallel training (`_orig_mod.`, `module.`) are ignored.

    The stem is copied to both modalities, the trunk is shared, and the ImageNet classifier is dropped. The fusion
    branch, the non-local blocks and the heads keep their random values.

    Raises:
        RuntimeError: The source has a tensor that the network lacks, or lacks a tensor of the stem or trunk.
    """
    state_dict = clean_state_dict(state_dict)
    if any(key.startswith('stem.') for key in state_dict):
        check_own_weights(state_dict, model)
        return state_dict
    mapped = {}
    for key, value in state_dict.items():
        if key.startswith(('conv1.', 'bn1.')):
            mapped.update(model.stem_weights(key, value))
        elif not key.startswith('fc.'):
            mapped[key] = value
    own = model.state_dict()
    pretrained_part = {key for key in own if key.startswith(('stem.', 'layer')) and '_non_local.' not in key}
    unknown = sorted(set(mapped) - pretrained_part)
    if unknown:
        raise RuntimeError(f'the ImageNet weights have tensors that this network lacks: {format_list(unknown)}')
    missing = sorted(key for key in pretrained_part - set(mapped) if not key.endswith('num_batches_tracked'))
    if missing:
        raise RuntimeError(f'the ImageNet weights lack tensors of the stem and trunk: {format_list(missing)}')
    _logger.warning(
        'Loaded ImageNet weights into both stems and the trunk: a start for fine-tuning, not a re-identification model.'
    )
    return {**own, **mapped}


def create_dual_stream(
    variant: str,
    pretrained: bool = False,
    model_cls: type[DualStreamResNet] = DualStreamResNet,
    img_size: Optional[Union[int, Sequence[int]]] = None,
    pretrained_cfg_overlay: Optional[dict[str, Any]] = None,
    **kwargs: Any,
) -> DualStreamResNet:
    """Create a registered network.

    Args:
        variant: Its name.
        pretrained: Load its weights.
        model_cls: Its class.
        img_size: Height and width of the images; those of its configuration if None.
        pretrained_cfg_overlay: As for `timm.create_model`.
        kwargs: Further arguments of its class.
    """
    _check_timm_arguments(kwargs)
    check_kinds(kwargs, [DualStreamResNet], 'argument ')
    check_kinds(kwargs.get('resnet_args') or {}, [ResNet], 'resnet_args: argument ')
    size = get_pretrained_cfg(variant).input_size[1:] if img_size is None else height_and_width(img_size)
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls=DualStreamFeatures),
        img_size=size,
        **kwargs,
    )
    network = model.model if isinstance(model, DualStreamFeatures) else model
    network.starts_from_backbone = (model.pretrained_cfg.get('tag') or '').endswith('in1k')
    set_retrieval(network, pretrained, kwargs)
    complete_cfg(model, 16 * kwargs.get('last_stride', 1), img_size, kwargs, pretrained_cfg_overlay or {})
    return model


def resnet_cfg(
    hf_hub_id: Optional[str] = None, fused: bool = True, deep_stem: bool = False, **kwargs: Any
) -> dict[str, Any]:
    """Return the configuration of a network on a ResNet."""
    conv = 'conv1.0' if deep_stem else 'conv1'
    heads = ('joint_head', 'global_head', 'fusion_head') if fused else ('global_head',)
    size = (128, 64) if deep_stem else (288, 144)
    return {
        'hf_hub_id': hf_hub_id,
        'num_classes': 0,
        'input_size': (3, *size),
        'pool_size': (size[0] // 16, size[1] // 16),
        'crop_pct': 1.0,
        'crop_mode': 'squash',
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': (f'stem.visible.{conv}', f'stem.infrared.{conv}'),
        'classifier': tuple(f'{head}.fc' for head in heads),
        'license': 'apache-2.0',
        'paper_name': 'Visible-Infrared Person Re-Identification via Feature Fusion and Deep Mutual Learning',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'vireid_dml_r10t.synthvi': resnet_cfg(file=packaged_weights('vireid_dml_r10t.synthvi'), deep_stem=True),
        'vireid_dml_r10t.c3_in1k': resnet_cfg('timm/resnet10t.c3_in1k', deep_stem=True),
        # The first tag of a model is its default: tv, which the field starts from. a1 (arXiv:2110.00476) and tv2 are
        # the stronger ImageNet recipes of timm and torchvision.
        'vireid_dml_r18.tv_in1k': resnet_cfg('timm/resnet18.tv_in1k', license='bsd-3-clause'),
        'vireid_dml_r18.a1_in1k': resnet_cfg('timm/resnet18.a1_in1k'),
        'vireid_dml_r34.tv_in1k': resnet_cfg('timm/resnet34.tv_in1k', license='bsd-3-clause'),
        'vireid_dml_r34.a1_in1k': resnet_cfg('timm/resnet34.a1_in1k'),
        'vireid_dml_r50.tv_in1k': resnet_cfg('timm/resnet50.tv_in1k', license='bsd-3-clause'),
        'vireid_dml_r50.tv2_in1k': resnet_cfg('timm/resnet50.tv2_in1k', license='bsd-3-clause'),
        'vireid_dml_r50.a1_in1k': resnet_cfg('timm/resnet50.a1_in1k'),
        'vireid_dml_r101.tv_in1k': resnet_cfg('timm/resnet101.tv_in1k', license='bsd-3-clause'),
        'vireid_dml_r101.tv2_in1k': resnet_cfg('timm/resnet101.tv2_in1k', license='bsd-3-clause'),
        'vireid_dml_r101.a1_in1k': resnet_cfg('timm/resnet101.a1_in1k'),
        'vireid_base_r10t.c3_in1k': resnet_cfg('timm/resnet10t.c3_in1k', fused=False, deep_stem=True),
        'vireid_base_r50.tv_in1k': resnet_cfg('timm/resnet50.tv_in1k', fused=False, license='bsd-3-clause'),
        'vireid_base_r50.tv2_in1k': resnet_cfg('timm/resnet50.tv2_in1k', fused=False, license='bsd-3-clause'),
        'vireid_base_r50.a1_in1k': resnet_cfg('timm/resnet50.a1_in1k', fused=False),
        'vireid_agw_r50.tv_in1k': resnet_cfg(
            'timm/resnet50.tv_in1k',
            fused=False,
            license='bsd-3-clause',
            paper_name='Deep Learning for Person Re-Identification: A Survey and Outlook',
            paper_ids='arXiv:2001.04193',
        ),
    }
)


check_names(default_cfgs, __name__)
_R10T = dict(
    block=BasicBlock,
    layers=(1, 1, 1, 1),
    resnet_args=dict(stem_width=32, stem_type='deep_tiered', avg_down=True),
)


@register_model
def vireid_dml_r10t(pretrained: bool = False, **kwargs: Any) -> DualStreamResNet:
    """The paper's network on timm's ResNet-10-T, for CPUs, demos and tests. Default input 128x64."""
    return create_dual_stream('vireid_dml_r10t', pretrained, **dict(_R10T, **kwargs))


@register_model
def vireid_dml_r18(pretrained: bool = False, **kwargs: Any) -> DualStreamResNet:
    """The paper's network on ResNet-18."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return create_dual_stream('vireid_dml_r18', pretrained, **dict(model_args, **kwargs))


@register_model
def vireid_dml_r34(pretrained: bool = False, **kwargs: Any) -> DualStreamResNet:
    """The paper's network on ResNet-34."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return create_dual_stream('vireid_dml_r34', pretrained, **dict(model_args, **kwargs))


@register_model
def vireid_dml_r50(pretrained: bool = False, **kwargs: Any) -> DualStreamResNet:
    """The paper's network: ResNet-50 with layer1-3 fused; V_joint has 2048 + 768 features."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return create_dual_stream('vireid_dml_r50', pretrained, **dict(model_args, **kwargs))


@register_model
def vireid_dml_r101(pretrained: bool = False, **kwargs: Any) -> DualStreamResNet:
    """The paper's network on ResNet-101."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return create_dual_stream('vireid_dml_r101', pretrained, **dict(model_args, **kwargs))


@register_model
def vireid_base_r10t(pretrained: bool = False, **kwargs: Any) -> DualStreamResNet:
    """The paper's baseline, the global branch only, on timm's ResNet-10-T. Default input 128x64."""
    model_args = dict(_R10T, fuse_layers=())
    return create_dual_stream('vireid_base_r10t', pretrained, **dict(model_args, **kwargs))


@register_model
def vireid_base_r50(pretrained: bool = False, **kwargs: Any) -> DualStreamResNet:
    """The paper's baseline, the global branch only, on ResNet-50."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), fuse_layers=())
    return create_dual_stream('vireid_base_r50', pretrained, **dict(model_args, **kwargs))


@register_model
def vireid_agw_r50(pretrained: bool = False, **kwargs: Any) -> DualStreamResNet:
    """AGW (arXiv:2001.04193) on ResNet-50: the baseline with two non-local blocks in layer2, three in layer3."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), fuse_layers=(), non_local_blocks=(0, 2, 3, 0))
    return create_dual_stream('vireid_agw_r50', pretrained, **dict(model_args, **kwargs))
