"""Deep zero-padding, the first network of the field: one stream, whose channels say which modality an image has.

Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017.
"""

from typing import Any, Optional

import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models.resnet import Bottleneck

from ..layers.stem import DualStem, Stem
from .branches import check_names
from .dual_stream import DualStreamResNet, create_dual_stream, resnet_cfg

GREY = (0.299, 0.587, 0.114)


class ZeroPadding(nn.Module):
    """Images [B, 3 or 1, H, W] -> [B, 2, H, W]: their grey values in one channel, zeros in the other."""

    def __init__(self, channel: int, in_chans: int, dd: dict[str, Any]) -> None:
        super().__init__()
        weights = torch.tensor(GREY if in_chans == 3 else [1 / in_chans] * in_chans, **dd)
        self.register_buffer('weights', weights.view(1, -1, 1, 1), persistent=False)
        self.channel = channel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grey = (x * self.weights).sum(dim=1, keepdim=True)
        zeros = torch.zeros_like(grey)
        return torch.cat([grey, zeros] if self.channel == 0 else [zeros, grey], dim=1)


@register_notrace_module
class ZeroPaddedStem(nn.Module):
    """One stem for both modalities: visible images in the first of its two channels, infrared ones in the second."""

    def __init__(self, stem: Stem, in_chans: int) -> None:
        super().__init__()
        dd = get_device_dtype(stem)
        self.padding = DualStem(ZeroPadding(0, in_chans, dd), ZeroPadding(1, in_chans, dd), in_chans)
        self.shared = stem

    def forward(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        return self.shared(self.padding(visible, infrared))


class ZeroPaddingResNet(DualStreamResNet):
    """A ResNet over zero-padded images, with a global branch as the paper's baseline has.

    The original trains an identity classifier alone (`--loss triplet=0`), on smaller images.
    """

    stem_chans = 2

    def _create_stem(self, stem: Stem) -> nn.Module:
        return ZeroPaddedStem(stem, self.in_chans)

    @torch.jit.ignore
    def stem_weights(self, key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """As in `DualStreamResNet`; both channels get the weights that compute the same on a grey image."""
        if value.ndim == 4 and value.shape[1] == 3:
            value = value.sum(dim=1, keepdim=True).expand(-1, 2, -1, -1).clone()
        return {f'stem.shared.{key}': value}


default_cfgs = generate_default_cfgs(
    {
        'vireid_zeropad_r50.tv_in1k': resnet_cfg(
            'timm/resnet50.tv_in1k',
            fused=False,
            license='bsd-3-clause',
            first_conv=(),
            paper_name='RGB-Infrared Cross-Modality Person Re-Identification',
        )
    }
)
check_names(default_cfgs, __name__)


@register_model
def vireid_zeropad_r50(pretrained: bool = False, **kwargs: Any) -> ZeroPaddingResNet:
    """Deep zero-padding (ICCV 2017) on ResNet-50: one stream for both modalities."""
    model_args = {'block': Bottleneck, 'layers': (3, 4, 6, 3), 'fuse_layers': (), **kwargs}
    return create_dual_stream('vireid_zeropad_r50', pretrained, model_cls=ZeroPaddingResNet, **model_args)
