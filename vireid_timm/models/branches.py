"""The paper's branches over the maps of any trunk, which subclasses make.

The network of "Visible-Infrared Person Re-Identification via Feature Fusion and Deep Mutual Learning" (Lin and Wang): a
global branch over the last level, a fusion branch over earlier ones with adaptive spatial weights (ASFF,
arXiv:1911.09516), and a joint branch that concatenates the two. Retrieval uses the joint branch.

Power-average the fused map to the last level's grid and concatenate it with the last level's map: the GeM of this joint
map is the paper's V_joint (`layers/fusion.py` explains why that is exact). `forward_features` returns the joint map, so
all of timm's conventions hold.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models._features import FeatureGetterNet

from ..layers.fusion import SPATIAL_WEIGHTS, FusionBranch
from ..layers.head import BranchHead
from ..layers.power_mean import GeneralizedMeanPool, power_sum, root

__all__ = ['BranchOutput', 'DualStream']


class BranchOutput(NamedTuple):
    """The part of a forward pass that training needs.

    Attributes:
        features: V_joint before the BN-neck, float32 also under autocast, [B, num_features].
        logits: Branch name (`global`, `fusion`, `joint`) -> [B, num_classes]; empty when `num_classes=0`.
    """

    features: torch.Tensor
    logits: dict[str, torch.Tensor]


def check_branches(
    fuse_layers: Sequence[int],
    spatial_weights: str,
    num_classes: int,
    global_pool: str,
) -> None:
    """Raise ValueError, which names the argument, if the branches cannot be as the arguments say."""
    if list(fuse_layers) != sorted(set(fuse_layers) & {1, 2, 3, 4}):
        raise ValueError(f'fuse_layers must be increasing layer numbers from 1 to 4, got {tuple(fuse_layers)}')
    if spatial_weights not in SPATIAL_WEIGHTS:
        raise ValueError(f'unknown spatial_weights {spatial_weights!r}; expected one of {SPATIAL_WEIGHTS}')
    if global_pool == '' and num_classes > 0:
        raise ValueError("a classifier needs pooling: use num_classes=0 with global_pool=''")


def height_and_width(img_size: Union[int, Sequence[int]]) -> tuple[int, int]:
    """Return an image size as (height, width).

    Raises:
        ValueError: It is neither two whole numbers nor one for both.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
        raise ValueError(f'img_size must be height and width in pixels, or one number for both, got {img_size!r}')
    return size


class DualStream(nn.Module):
    """Global, fusion and joint branch over four levels, or the global branch only (the paper's baseline).

    A subclass makes the trunk, sets `feature_info` of its four levels, calls `_create_branches`, and gives
    `_forward_levels`. The prefixes of its trunk's parameters are `pretrained_prefixes`: what ImageNet weights cover.
    """

    pretrained_prefixes: tuple[str, ...]

    def _create_branches(
        self,
        img_size: tuple[int, int],
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        fuse_layers: Sequence[int],
        fuse_width: Optional[int],
        gem_power: float,
        spatial_weights: str,
        plain_fusion: bool,
        dd: dict[str, Any],
    ) -> None:
        """Create pooling, fusion branch and heads; a `fuse_width` of None is the width of the first fused level."""
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.gem_power = gem_power
        self.global_pool = GeneralizedMeanPool(gem_power, global_pool)
        self.fuse_layers = tuple(fuse_layers)
        self.fusion = None
        if fuse_layers:
            widths, reductions = ([info[key] for info in self.feature_info] for key in ('num_chs', 'reduction'))
            steps = [reduction // reductions[0] for reduction in reductions]
            self.fusion = FusionBranch(
                [widths[i - 1] for i in fuse_layers],
                [steps[i - 1] for i in fuse_layers],
                out_step=steps[3],
                channels=fuse_width or widths[fuse_layers[0] - 1],
                power=self.global_pool.power,
                spatial_weights=spatial_weights,
                grid=tuple(-(-side // reductions[0]) for side in img_size),
                plain=plain_fusion,
                **dd,
            )
        self._create_heads(self.feature_info[3]['num_chs'], dd)

    def _create_heads(self, global_features: int, dd: dict[str, Any]) -> None:
        self.global_head = BranchHead(global_features, self.num_classes, self.drop_rate, **dd)
        self.fusion_head = None
        self.joint_head = None
        self.num_features = self.head_hidden_size = global_features
        self.branches = ('global',)  # retrieval uses the last one
        if self.fusion is not None:
            self.branches = ('global', 'fusion', 'joint')
            fused = self.fusion.num_features
            self.num_features = self.head_hidden_size = global_features + fused
            self.fusion_head = BranchHead(fused, self.num_classes, self.drop_rate, **dd)
            self.joint_head = BranchHead(self.num_features, self.num_classes, self.drop_rate, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier of the branch that retrieval uses."""
        head = self.joint_head if self.joint_head is not None else self.global_head
        return nn.Identity() if head is None else head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier of every branch but keep the necks; `global_pool=None` keeps the pooling."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool = GeneralizedMeanPool(self.gem_power, global_pool).train(self.training)
        self.num_classes = num_classes
        if self.fusion is not None:
            self.fusion.power = self.global_pool.power
        if self.global_head is None and global_pool:  # pruned: create a head for the remaining features
            self._create_heads(self.num_features, get_device_dtype(self.stem))
            self.global_head.train(self.training)
        for head in (self.global_head, self.fusion_head, self.joint_head):
            if head is not None:
                head.reset(num_classes)

    def _joint_map(self, levels: list[torch.Tensor]) -> torch.Tensor:
        x = levels[3]
        if self.fusion is not None:
            size = [levels[0].shape[2], levels[0].shape[3]]
            powers = self.fusion([levels[i - 1] for i in self.fuse_layers], size)
            x = torch.cat([x, root(powers, self.global_pool.power)], dim=1)
        return x

    def forward_features(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return the joint map [B, num_features, h, w], layer4's channels before the fused ones. Its GeM is V_joint."""
        return self._joint_map(self._forward_levels(visible, infrared))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool the joint map, then apply BN-neck and classifier; `pre_logits` returns the features after BN."""
        x = self.global_pool(x)
        if self.global_pool.pool_type == '':
            return x
        if self.joint_head is not None:
            return self.joint_head(x, pre_logits)
        return self.global_head(x, pre_logits)

    def forward(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return joint logits [B, num_classes], or features after BN [B, num_features] when `num_classes=0`.

        Args:
            visible: Normalised visible images [B, 3, H, W].
            infrared: Normalised infrared images [B, 3, H, W]. Their rows follow the visible ones.

        Raises:
            ValueError: Neither modality is given, or a shape is wrong.
        """
        return self.forward_head(self.forward_features(visible, infrared))

    @torch.jit.ignore
    def forward_branches(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> BranchOutput:
        """Return V_joint before BN and every branch's logits (eq. 3, 4), which the losses need; visible rows first."""
        if self.global_pool.pool_type == '':
            raise ValueError("forward_branches needs pooling, but this model has global_pool=''")
        levels = self._forward_levels(visible, infrared)
        size = levels[3].shape[2] * levels[3].shape[3]
        mean_power = power_sum(levels[3], None, self.global_pool.power) / size
        branch_features = {'global': root(mean_power, self.global_pool.power)}
        if self.fusion is not None:
            fused = [levels[i - 1] for i in self.fuse_layers]
            mean_power = self.fusion.mean_power(fused, list(levels[0].shape[2:]))
            branch_features['fusion'] = root(mean_power, self.global_pool.power)
            branch_features['joint'] = torch.cat(list(branch_features.values()), dim=1)
        heads = {'global': self.global_head, 'fusion': self.fusion_head, 'joint': self.joint_head}
        logits = {name: heads[name](branch_features[name]) for name in self.branches} if self.num_classes else {}
        return BranchOutput(branch_features[self.branches[-1]], logits)


class DualStreamFeatures(FeatureGetterNet):
    """timm's `features_only` wrapper, for one or both modalities."""

    def forward(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> list[torch.Tensor]:
        options = dict(indices=self.out_indices, norm=self.norm, output_fmt=self.output_fmt)
        return self.model.forward_intermediates(visible, infrared, intermediates_only=True, **options)
