"""What the tests that run on every device share. On "cuda" the kernels are switched on, and `kernel` asserts that they are what runs.

New tensors are made from numbers drawn on the CPU, so that they are the same on each device. Every such test runs on the CPU too: a
machine without a GPU then shows that the test itself works.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import pytest
import torch
from reference import DTYPES, check_against_float64, normal
from torch import Tensor

from vggfast import ops

EPILOGUES = list(itertools.product([False, True], repeat=2))
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability()
    return "" if capability >= (8, 0) else f"the GPU has compute capability {capability}, below 8.0"


NO_GPU = why_no_gpu()
on_gpu = pytest.mark.skipif(bool(NO_GPU), reason=f"needs a GPU of compute capability 8.0 or more: {NO_GPU}")


def to(device: torch.device, *tensors: Tensor, grad: bool = True) -> list[Tensor]:
    return [t.detach().to(device).requires_grad_(grad) for t in tensors]


def kernel(device: torch.device, *inputs: Tensor, pool: bool = False) -> str:
    """The kernel that the call takes, which must be one of this library's for the device."""
    decision = ops.conv3x3_kernel(*inputs, pool=pool)
    assert decision.fused, decision.reason
    assert decision.kernel.startswith(device.type)
    return decision.kernel


def algorithm(device: torch.device, *inputs: Tensor) -> str:
    """What bounds the arithmetic's error."""
    name = kernel(device, *inputs)
    if device.type == "cuda":
        return "tf32" if inputs[0].dtype == torch.float32 else "direct"
    return "winograd" if "winograd" in name else "direct"


def check(device: torch.device, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, **flags: bool) -> None:
    """Forward, decisions and all gradients; the operands are leaves on the device, in any layout."""
    algo = algorithm(device, *(t for t in (x, weight, bias) if t is not None))
    with device:  # what the check makes itself
        check_against_float64(x, weight, bias, grad, algo=algo, **flags)  # type: ignore[arg-type]


def gradient_for(device: torch.device, x: Tensor, c_out: int, pool: bool) -> Tensor:
    n, _, h, w = x.shape
    return normal(n, c_out, *((h // 2, w // 2) if pool else (h, w)), dtype=x.dtype, seed=7).to(device)


def busy_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Another stream that has work for some milliseconds: what is launched elsewhere overtakes what is launched on it."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # clock cycles
    return torch.cuda.stream(stream)


def captured(device: torch.device, function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """Results of `function`, and what computes them anew in the same memory: a CUDA graph's replay."""
    if device.type == "cpu":
        results = function()

        def replay() -> None:
            for result, value in zip(results, function(), strict=True):
                result.copy_(value)

        return results, replay
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # warm-up, as torch demands it
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return results, graph.replay


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
