"""Inputs for the losses, and checks that every loss must pass."""

from collections.abc import Callable

import torch


def random_features(count: int, width: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def three_branches() -> dict[str, torch.Tensor]:
    return {name: 2 * random_features(6, 9, seed) for seed, name in enumerate(('global', 'fusion', 'joint'))}


def value_and_gradient(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs = [values.detach().clone().requires_grad_() for values in inputs]
    loss = function(*inputs)
    loss.backward()
    return (loss.detach(), *(values.grad for values in inputs))


def assert_compiles(loss: Callable, *inputs: object) -> None:
    """Compile into one graph: no Python branch depends on a value, so the loss never waits for the device."""
    compiled = torch.compile(loss, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
