"""Modality-specific stems, one for visible and one for infrared images."""

from typing import Optional

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from timm.models.resnet import ResNet


class Stem(nn.Module):
    """The modality-specific part of the network (the paper's layer0): conv1, bn1, act1 and maxpool of a timm ResNet."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        self.conv1 = resnet.conv1
        self.bn1 = resnet.bn1
        self.act1 = resnet.act1
        self.maxpool = resnet.maxpool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))


@register_notrace_module
class DualStem(nn.Module):
    """One stem per modality. The outputs are stacked along the batch, visible rows first.

    Args:
        visible: The stem of visible images [B, in_chans, H, W].
        infrared: That of infrared images.
        in_chans: Channels of an image; None if what comes needs no check, since it is another stem's output.
        only_size: Height and width if the layers that follow take no others.
    """

    in_chans: Optional[int]
    only_size: Optional[tuple[int, int]]

    def __init__(
        self,
        visible: nn.Module,
        infrared: nn.Module,
        in_chans: Optional[int] = None,
        only_size: Optional[tuple[int, int]] = None,
    ) -> None:
        super().__init__()
        self.visible = visible
        self.infrared = infrared
        self.in_chans = in_chans
        self.only_size = only_size

    # Plain ifs, because TorchScript has to compile this.
    def forward(
        self,
        visible: Optional[torch.Tensor] = None,
        infrared: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        maps = []
        if visible is not None:
            self._check(visible, 'visible')
            maps.append(self.visible(visible))
        if infrared is not None:
            self._check(infrared, 'infrared')
            maps.append(self.infrared(infrared))
        if len(maps) == 0:
            raise ValueError('no images: pass visible=, infrared=, or both, each [B, C, H, W]')
        if len(maps) == 1:
            return maps[0]
        if visible is not None and infrared is not None and visible.shape[2:] != infrared.shape[2:]:
            raise ValueError(
                f'visible and infrared images need the same height and width, got {list(visible.shape)} and '
                f'{list(infrared.shape)}'
            )
        return torch.cat(maps)

    def _check(self, images: torch.Tensor, modality: str) -> None:
        in_chans, size = self.in_chans, self.only_size
        if in_chans is not None and (images.dim() != 4 or images.shape[1] != in_chans):
            raise ValueError(f'{modality} images need shape [B, {in_chans}, H, W], got {list(images.shape)}')
        if size is not None and (images.shape[2] != size[0] or images.shape[3] != size[1]):
            raise ValueError(
                f'{modality} images need height and width [{size[0]}, {size[1]}], got {list(images.shape[2:])}: the '
                'backbone takes no others, so create the model with img_size=(height, width)'
            )
