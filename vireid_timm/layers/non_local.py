"""The non-local block of AGW."""

from typing import Optional

import torch
import torch.nn as nn


class NonLocalBlock(nn.Module):
    """Non-local block (arXiv:1711.07971) in AGW's form (arXiv:2001.04193): dot products, divided by the position count.

    Every position adds a weighted sum over all positions to its own value. The last normalisation starts at zero, so
    a fresh block is the identity.

    Args:
        channels: Channels of the map.
        width: Inner channels.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.theta = nn.Conv2d(channels, width, 1, **dd)
        self.phi = nn.Conv2d(channels, width, 1, **dd)
        self.g = nn.Conv2d(channels, width, 1, **dd)
        self.out = nn.Conv2d(width, channels, 1, **dd)
        self.norm = nn.BatchNorm2d(channels, **dd)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        theta = self.theta(x)
        # There is no softmax, so (theta phi) g = theta (phi g), and the affinity of all pairs is never built.
        # Divide before summing: the sum would overflow in half precision.
        phi = self.phi(x).flatten(2) / (x.shape[2] * x.shape[3])
        context = torch.bmm(self.g(x).flatten(2), phi.transpose(1, 2))
        sums = torch.bmm(context, theta.flatten(2)).view_as(theta)
        return x + self.norm(self.out(sums))
