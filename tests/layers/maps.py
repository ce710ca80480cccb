"""Random feature maps, and gradients to compare."""

import torch


def random_map(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values >= 0, some of them zero, as after a ReLU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu().to(dtype)


def with_gradients(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the value, and the gradients of a random weighted sum of its entries."""
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), inputs)]


def assert_all_close(actual: list[torch.Tensor], expected: list[torch.Tensor], **tolerances: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerances)
