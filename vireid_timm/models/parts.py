"""Two streams and horizontal stripes: TSLFN (Zhu et al., arXiv:1910.09830, the paper of the hetero-center loss).

Each modality has a whole backbone of its own. The last map is cut into stripes, each of which has its own embedding and
classifier, which the modalities share. Retrieval uses the embeddings side by side, each of length 1.
"""

from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model

from ..layers.power_mean import GeneralizedMeanPool
from .backbone import DualStreamBackbone, create_on_backbone, network_cfg
from .branches import BranchOutput, check_names


class PartHead(nn.Module):
    """Embedding and classifier of one stripe: linear, batch norm; then leaky ReLU, dropout, linear."""

    def __init__(self, channels: int, width: int, num_classes: int, drop_rate: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width, **dd)
        self.norm = nn.BatchNorm1d(width, **dd)
        self.act = nn.LeakyReLU(0.1)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one of the same device, dtype and mode."""
        self.fc = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.embed.out_features, num_classes, **get_device_dtype(self.embed))
            nn.init.normal_(self.fc.weight, 0.0, 0.001)
            nn.init.zeros_(self.fc.bias)
        self.fc.train(self.training)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of what the batch norm returned."""
        return self.fc(self.drop(self.act(x)))


class PartsNet(DualStreamBackbone):
    """Stripes over the last map of a backbone, of which each modality has its own.

    Args:
        num_parts: Stripes.
        part_width: Features of each.
        drop_rate: Dropout before each classifier.
        private_stages: Levels that each modality has of its own; all, as published, if 4.
        kwargs: As for `DualStreamBackbone`, but for the fusion branch, which is not there.
    """

    def __init__(
        self,
        backbone: str,
        num_parts: int = 6,
        part_width: int = 512,
        drop_rate: float = 0.5,
        private_stages: int = 4,
        **kwargs: Any,
    ) -> None:
        refused = sorted({'fuse_layers', 'fuse_width', 'spatial_weights', 'plain_fusion', 'gem_power'} & set(kwargs))
        if refused or kwargs.get('global_pool') not in (None, 'avg', ''):
            name = refused[0] if refused else 'global_pool'
            raise ValueError(f'{name}: a network of stripes takes their averages, and fuses no levels')
        kwargs['global_pool'] = '' if kwargs.get('global_pool') == '' else 'avg'
        super().__init__(backbone, drop_rate=drop_rate, private_stages=private_stages, fuse_layers=(), **kwargs)
        if num_parts < 1 or part_width < 1:
            raise ValueError(f'num_parts and part_width must be at least 1, got {num_parts} and {part_width}')
        self.num_parts, self.part_width = num_parts, part_width
        self.global_head = None
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        channels = self.feature_info[3]['num_chs']
        self.parts = nn.ModuleList(
            [PartHead(channels, part_width, self.num_classes, drop_rate, dd) for _ in range(num_parts)]
        )
        self.num_features, self.head_hidden_size = channels, num_parts * part_width
        self.branches = tuple(f'part{part + 1}' for part in range(num_parts))

    @torch.jit.ignore
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the classifiers, as in timm's configurations."""
        return tuple(f'parts.{part}.fc' for part in range(len(self.parts)))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifiers of the stripes."""
        return nn.ModuleList([part.fc for part in self.parts]) if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier of every stripe but keep the embeddings."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = GeneralizedMeanPool(self.gem_power, global_pool).train(self.training)
        for part in getattr(self, 'parts', ()):
            part.reset(num_classes)

    def _remove_head(self, num_features: int) -> None:
        super()._remove_head(num_features)
        self.parts = nn.ModuleList()

    def _embed(self, levels_map: torch.Tensor) -> list[torch.Tensor]:
        """Return the embedding of each stripe before its batch norm, from top to bottom."""
        stripes = F.adaptive_avg_pool2d(levels_map, (self.num_parts, 1)).squeeze(3).to(self.parts[0].embed.weight.dtype)
        return [part.embed(stripes[:, :, i]) for i, part in enumerate(self.parts)]

    def forward_pool(self, x: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the stripes before their batch norms, side by side."""
        return torch.cat(self._embed(x), dim=1)

    def forward_neck(self, x: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the stripes after their batch norms, each of length 1, side by side."""
        return torch.cat([F.normalize(value) for value in self._normed(x)], dim=1)

    def _normed(self, levels_map: torch.Tensor) -> list[torch.Tensor]:
        return [part.norm(value) for part, value in zip(self.parts, self._embed(levels_map))]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return the features of the last map, or the mean of the stripes' logits if there are classes."""
        if self.global_pool.pool_type == '':
            return x
        if pre_logits or self.num_classes == 0:
            is_before = self.num_classes == 0 and self.retrieval == 'before-bn'
            return self.forward_pool(x) if is_before else self.forward_neck(x)
        logits = [part.classify(value) for part, value in zip(self.parts, self._normed(x))]
        return torch.stack(logits).mean(dim=0)

    @torch.jit.ignore
    def forward_branches(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> BranchOutput:
        """Return the embeddings before batch norm, side by side, and each stripe's logits; visible rows first."""
        embedded = self._embed(self._levels_to_pool(visible, infrared)[3])
        logits = {}
        if self.num_classes:
            parts = zip(self.branches, self.parts, embedded)
            logits = {name: part.classify(part.norm(value)) for name, part, value in parts}
        return BranchOutput(torch.cat(embedded, dim=1).float(), logits)


def _cfg() -> dict[str, Any]:
    classifiers = tuple(f'parts.{part}.fc' for part in range(6))
    name = 'Hetero-Center Loss for Cross-Modality Person Re-Identification'
    cfg = {**network_cfg('resnet50.tv_in1k'), 'input_size': (3, 288, 144), 'interpolation': 'bilinear'}
    return {**cfg, 'classifier': classifiers, 'paper_name': name, 'paper_ids': 'arXiv:1910.09830'}


default_cfgs = generate_default_cfgs({'vireid_parts_r50.tv_in1k': _cfg()})
check_names(default_cfgs, __name__)


@register_model
def vireid_parts_r50(pretrained: bool = False, **kwargs: Any) -> PartsNet:
    """Two ResNet-50 and six stripes of 512 features (TSLFN, arXiv:1910.09830)."""
    return create_on_backbone('vireid_parts_r50', pretrained, PartsNet, **{'backbone': 'resnet50', **kwargs})
