"""A network that fuses and plain torch modules with the same weights, for tests of the ways people run a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo.testing
from network_reference import error
from reference import WINOGRAD_BOUND, normal
from torch import Tensor, nn

from vggfast import FusedSequential

BOUND = 8 * WINOGRAD_BOUND  # three convolutions, beside torch's own error


def layers(inplace: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    act = lambda: nn.ReLU(inplace=inplace)  # noqa: E731
    return [
        *(nn.Conv2d(3, 16, 3, padding=1), act()),
        *(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24).eval(), act(), nn.MaxPool2d(2, 2)),
        *(nn.Conv2d(24, 16, 3, padding=1), act(), nn.MaxPool2d(2, 2), nn.Flatten(), nn.Linear(256, 5)),
    ]


def pair(inplace: bool = True) -> tuple[FusedSequential, nn.Sequential]:
    return FusedSequential(*layers(inplace)).eval(), nn.Sequential(*layers(inplace)).eval()


def image(seed: int = 0, n: int = 2, size: int = 16) -> Tensor:
    return normal(n, 3, size, size, seed=seed)


def backward(
    network: nn.Module, call: Callable[[Tensor], Tensor] | None = None, x: Tensor | None = None
) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter."""
    x = (image() if x is None else x).detach().clone().requires_grad_()
    network.zero_grad()
    y = (call or network)(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def assert_same(ours: list[Tensor], torchs: list[Tensor], bound: float = BOUND) -> None:
    assert len(ours) == len(torchs) > 0
    for a, b in zip(ours, torchs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert error(a, b.double()) <= bound
