"""The paper's branches over the maps of any trunk, which subclasses make.

The network of "Visible-Infrared Person Re-Identification via Feature Fusion and Deep Mutual Learning" (Lin and Wang): a
global branch over the last level, a fusion branch over earlier ones with adaptive spatial weights (ASFF,
arXiv:1911.09516), and a joint branch that concatenates the two. Retrieval uses the joint branch.

Power-average the fused map to the last level's grid and concatenate it with the last level's map: the GeM of this joint
map is the paper's V_joint (`layers/fusion.py` explains why that is exact). `forward_features` returns the joint map, so
all of timm's conventions hold.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models import is_model, model_entrypoint
from timm.models._features import FeatureGetterNet

from ..constants import RETRIEVALS
from ..layers.fusion import SPATIAL_WEIGHTS, FusionBranch
from ..layers.head import BranchHead
from ..layers.power_mean import GeneralizedMeanPool, power_sum, root
from ..text import format_list

__all__ = ['BranchOutput', 'DualStream']


_WEIGHTS = Path(__file__).parents[1] / 'weights'


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
    fuse_width: Optional[int],
    spatial_weights: str,
    num_classes: int,
    global_pool: str,
    retrieval: str,
) -> None:
    """Raise ValueError, which names the argument, if the branches cannot be as the arguments say."""
    if list(fuse_layers) != sorted(set(fuse_layers) & {1, 2, 3, 4}):
        raise ValueError(f'fuse_layers must be increasing layer numbers from 1 to 4, got {tuple(fuse_layers)}')
    if fuse_width is not None and fuse_width < 1:
        raise ValueError(f'fuse_width must be at least 1, got {fuse_width}')
    if spatial_weights not in SPATIAL_WEIGHTS:
        raise ValueError(f'unknown spatial_weights {spatial_weights!r}; expected one of {SPATIAL_WEIGHTS}')
    if retrieval not in RETRIEVALS:
        raise ValueError(f'unknown retrieval {retrieval!r}; expected one of {RETRIEVALS}')
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


def check_names(names: Iterable[str], module: str) -> None:
    """Refuse to replace a model of another package; timm would only warn, which is easily overlooked.

    Raises:
        ImportError: Another package has registered one of the names.
    """
    for name in names:
        owner = model_entrypoint(name).__module__ if is_model(name) else module
        if owner != module:
            raise ImportError(
                f'cannot register the model {name} with timm, because {owner} has already registered this name; '
                f'use {owner.partition(".")[0]} and vireid_timm in separate programs'
            )


def packaged_weights(name: str) -> str:
    """Return the file of weights in the package."""
    return str(_WEIGHTS / f'{name}.safetensors')


def complete_cfg(
    model: nn.Module,
    reduction: int,
    img_size: Optional[Union[int, Sequence[int]]],
    kwargs: dict[str, Any],
    overlay: dict[str, Any],
) -> None:
    """Write to a model's configuration: the image size, if one was given, its grid, and the names of the classifiers.

    Args:
        model: The model, or timm's wrapper of its features.
        reduction: Pixels of a position of the last map, along each side.
        img_size: The argument.
        kwargs: The other arguments. A saved model's own `img_size` comes back with its configuration, which may hold
            another input size.
        overlay: What the caller wants the configuration to say.
    """
    cfg, saved = model.pretrained_cfg, (kwargs.get('pretrained_model_args') or {}).get('img_size')
    size = cfg['input_size'][1:]
    if img_size is not None and (saved is None or height_and_width(saved) != height_and_width(img_size)):
        size = height_and_width(img_size)
    # The channels stay: as everywhere in timm, they are those of the weights.
    sizes = {'input_size': (cfg['input_size'][0], *size), 'pool_size': tuple(-(-side // reduction) for side in size)}
    network = model.model if isinstance(model, FeatureGetterNet) else model
    cfg.update({**sizes, 'classifier': network.classifier_names(), **overlay})


def set_retrieval(network: nn.Module, pretrained: bool, kwargs: dict[str, Any]) -> None:
    """Let weights in the package retrieve before BN, unless the caller chose: timm's tags carry no arguments.

    `vireid_dml_r10t.synthvi` is far better there; the others find photographs, which their BN never saw, more often.
    """
    if pretrained and Path(network.pretrained_cfg.get('file') or '').parent == _WEIGHTS and 'retrieval' not in kwargs:
        network.retrieval = 'before-bn'


def check_own_weights(state_dict: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Require every key but the classifiers'. timm loads without `strict` if the number of classes differs.

    Raises:
        RuntimeError: The weights are of another network; the message names the keys.
    """
    classifiers = tuple(f'{name}.' for name in model.classifier_names())
    given, own = (
        {key for key in state if not key.startswith(classifiers)} for state in (state_dict, model.state_dict())
    )
    if given != own:
        missing, unknown = (format_list(sorted(keys)) or 'none' for keys in (own - given, given - own))
        raise RuntimeError(f'weights of another network. Missing key(s): {missing}. Unexpected key(s): {unknown}')


class DualStream(nn.Module):
    """Global, fusion and joint branch over four levels, or the global branch only (the paper's baseline).

    A subclass makes the trunk, sets `feature_info` of its four levels, calls `_create_branches`, and gives
    `_forward_levels`.

    Attributes:
        pretrained_prefixes: Prefixes of the parameters that a backbone's weights cover: stem and trunk.
        starts_from_backbone: Whether the pretrained weights are a backbone's, and not those of a re-ID model.
        retrieval: `after-bn` or `before-bn`: the features that the model returns with `num_classes=0`.
    """

    pretrained_prefixes: tuple[str, ...]
    starts_from_backbone = False
    retrieval: str = 'after-bn'

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
        """Create pooling, fusion branch and heads; a `fuse_width` of None is the width of the first level."""
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.gem_power = gem_power
        self.global_pool = GeneralizedMeanPool(gem_power, global_pool)
        self.fuse_layers = tuple(fuse_layers)
        self.fuse_width = fuse_width
        self.spatial_weights = spatial_weights
        self.fusion = None
        if fuse_layers:
            widths, reductions = ([info[key] for info in self.feature_info] for key in ('num_chs', 'reduction'))
            self.fuse_width = widths[0] if fuse_width is None else fuse_width
            steps = [reduction // reductions[0] for reduction in reductions]
            self.fusion = FusionBranch(
                [widths[i - 1] for i in fuse_layers],
                [steps[i - 1] for i in fuse_layers],
                out_step=steps[3],
                channels=self.fuse_width,
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
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the classifiers, as in timm's configurations."""
        return tuple(f'{branch}_head.fc' for branch in reversed(self.branches))

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

    def _remove_head(self, num_features: int) -> None:
        """Leave only the last map that is there, of `num_features` channels."""
        self.reset_classifier(0, '')
        self.fusion = self.global_head = self.fusion_head = self.joint_head = None
        self.branches = ('global',)
        self.num_features = self.head_hidden_size = num_features

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

    def forward_pool(self, x: torch.Tensor) -> torch.Tensor:
        """Pool the joint map [B, num_features, h, w]: V_joint before the BN-neck, [B, num_features] (eq. 3)."""
        return self.global_pool(x)

    @torch.jit.ignore
    def forward_neck(self, x: torch.Tensor) -> torch.Tensor:
        """Pool the joint map and apply the BN-neck: what the classifier of the last branch sees."""
        head = self.joint_head if self.joint_head is not None else self.global_head
        return head(self.forward_pool(x), pre_logits=True)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool the joint map, then apply BN-neck and classifier; `pre_logits` leaves out the classifier.

        Without classes it returns the features for retrieval, which may be those before the BN-neck.
        """
        pooled = self.forward_pool(x)
        if self.global_pool.pool_type == '':
            return pooled
        if self.num_classes == 0 and self.retrieval == 'before-bn':
            return pooled.to(self.global_head.neck.weight.dtype)
        if self.joint_head is not None:
            return self.joint_head(pooled, pre_logits)
        return self.global_head(pooled, pre_logits)

    def forward(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return joint logits [B, num_classes], or features for retrieval [B, num_features] when `num_classes=0`.

        Args:
            visible: Normalised visible images [B, 3, H, W].
            infrared: Normalised infrared images [B, 3, H, W]. Their rows follow the visible ones.

        Raises:
            ValueError: Neither modality is given, or a shape is wrong.
        """
        return self.forward_head(self.forward_features(visible, infrared))

    @torch.jit.ignore
    def _levels_to_pool(
        self,
        visible: Optional[torch.Tensor],
        infrared: Optional[torch.Tensor],
    ) -> list[torch.Tensor]:
        if self.global_pool.pool_type == '':
            raise ValueError("forward_branches needs pooling, but this model has global_pool=''")
        return self._forward_levels(visible, infrared)

    @torch.jit.ignore
    def forward_branches(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> BranchOutput:
        """Return V_joint before BN and every branch's logits (eq. 3, 4), which the losses need; visible rows first."""
        levels = self._levels_to_pool(visible, infrared)
        if self.global_pool.pool_type == 'avg':
            branch_features = {'global': self.global_pool(levels[3])}
        else:
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
