"""Heads: a BN-neck and a classifier, both without bias."""

from typing import Optional

import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models import register_notrace_module


@register_notrace_module  # BatchNorm1d checks the number of dimensions, which FX cannot trace
class BatchNormNeck(nn.BatchNorm1d):
    """BN-neck (arXiv:1903.07071): batch normalisation with no bias parameter at all, rather than a frozen one."""

    def __init__(
        self,
        num_features: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(num_features, device=device, dtype=dtype)
        self.register_parameter('bias', None)
        nn.init.normal_(self.weight, 1.0, 0.01)


class BranchHead(nn.Module):
    """BN-neck, dropout and bias-free classifier of one branch; the classifier is an identity if `num_classes` is 0."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        drop_rate: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.neck = BatchNormNeck(num_features, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one of the same device, dtype and mode."""
        if num_classes > 0:
            fc = nn.Linear(self.num_features, num_classes, bias=False, **get_device_dtype(self.neck))
            nn.init.normal_(fc.weight, 0.0, 0.001)
            self.fc = fc.train(self.training)
        else:
            self.fc = nn.Identity().train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.to(self.neck.weight.dtype)
        if torch.jit.is_tracing():  # torch's older ONNX exporter has to know the width if there is no bias
            x = x.view(x.shape[0], self.num_features)
        x = self.neck(x)
        return x if pre_logits else self.fc(self.drop(x))
