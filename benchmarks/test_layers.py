"""Each of VGG16's convolutions, with its ReLU and pool: vggfast beside torch in both memory formats, checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vgg_layers import VGG16_LAYERS, Layer

from vggfast import ops

Run = Callable[[], tuple[Tensor, ...]]
CONTENDERS = ["vggfast", "torch channels_last", "torch nchw"]
ids = [layer.name for layer in VGG16_LAYERS]


def problem(layer: Layer, batch: int, contender: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, layer.c_in, layer.size, layer.size, generator=generator)
    weight = torch.randn(layer.c_out, layer.c_in, 3, 3, generator=generator) * (2 / (9 * layer.c_in)) ** 0.5
    bias = torch.randn(layer.c_out, generator=generator)
    if contender == "torch nchw":
        return x, weight, bias
    x = x.to(memory_format=torch.channels_last)
    return x, weight if contender == "vggfast" else weight.to(memory_format=torch.channels_last), bias


def plain(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    y = F.relu(F.conv2d(x, weight, bias, padding=1), inplace=True)
    return F.max_pool2d(y, 2) if pool else y


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def measure(  # type: ignore[no-untyped-def]
    benchmark, rounds: int, gflop: float, run: Run, expected: list[Tensor], tolerance: float
) -> None:
    """Check, then time. ``extra_info``: the error, and the rate counted in a direct convolution's operations."""
    error = max(relative_error(got, want) for got, want in zip(run(), expected, strict=True))
    assert error <= tolerance, f"relative error before timing: {error:.2e}, expected at most {tolerance:.0e}"
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info.update(relative_error=error, gflops=gflop / benchmark.stats.stats.median)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("layer", VGG16_LAYERS, ids=ids)
def test_forward(benchmark, layer: Layer, contender: str, batch: int, rounds: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"forward {layer.name} batch {batch}"
    x, weight, bias = problem(layer, batch, contender)
    expected = plain(x.double(), weight.double(), bias.double(), layer.pool)

    def run() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            if contender == "vggfast":
                return (ops.conv3x3(x, weight, bias, pool=layer.pool),)
            return (plain(x, weight, bias, layer.pool),)

    measure(benchmark, rounds, layer.gflop(batch), run, [expected], 5e-6)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("layer", VGG16_LAYERS, ids=ids)
def test_forward_backward(benchmark, layer: Layer, contender: str, batch: int, rounds: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"forward+backward {layer.name} batch {batch}"
    x, weight, bias = (t.requires_grad_() for t in problem(layer, batch, contender))

    def gradients(forward: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        y = forward(*inputs, pool=layer.pool)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    forward = ops.conv3x3 if contender == "vggfast" else plain
    expected = gradients(plain, *(t.detach().double().requires_grad_() for t in (x, weight, bias)))
    # An activation within rounding of zero opens its ReLU in one computation and not in the other, and a tie within rounding sends a
    # pool's gradient elsewhere: a few in a million elements, in float32 against float64, for every contender.
    measure(
        benchmark, rounds, 3 * layer.gflop(batch), lambda: gradients(forward, x, weight, bias), list(expected), 3e-3
    )
