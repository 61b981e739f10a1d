"""The ops' numbers on a GPU, as on a CPU: errors, exact sums, layouts, NaN, pools, judged as in reference.py.

Errors are at most twice those of torch's own result on the same device, against float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from on_device import ALL_DTYPES, EPILOGUES, check, gradient_for, kernel, to
from reference import LAYOUTS, assert_same_bits, assert_same_specials, composition, gradients, integers, normal, problem
from torch import Tensor

from vggfast import ops, switches

# ---- numbers --------------------------------------------------------------------------------------------------------

SHAPES = {
    "first layer": (2, 3, 64, 20, 22),
    "grey images": (3, 1, 24, 9, 11),
    "few channels": (2, 8, 16, 11, 13),
    "ragged channels": (2, 40, 72, 9, 7),
    "one pixel": (4, 16, 8, 1, 1),
    "one column": (2, 16, 24, 6, 1),
    "wide": (1, 64, 64, 6, 130),
    "many images": (130, 16, 8, 2, 2),
    "VGG's last block": (2, 512, 512, 6, 6),
}


@ALL_DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_errors_are_at_most_twice_torchs(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for relu, pool in EPILOGUES:
        if pool and min(shape[3:]) < 2:
            continue
        x, weight, bias = to(device, *problem(*shape, dtype))  # type: ignore[misc]
        check(device, x, weight, bias, gradient_for(device, x, shape[2], pool), relu=relu, pool=pool)
    x, weight, _ = to(device, *problem(*shape, dtype))  # type: ignore[misc]
    check(device, x, weight, None, gradient_for(device, x, shape[2], False), relu=True, pool=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c_in", "operand"), [(3, "x"), (16, "x"), (16, "weight"), (16, "grad")])
def test_every_layout_of_every_operand(device: torch.device, c_in: int, operand: str, layout: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, bias = to(device, *problem(2, c_in, 24, 7, 6, dtype), grad=False)
        tensors = {"x": x, "weight": weight, "bias": bias, "grad": gradient_for(device, x, 24, True)}
        with device:
            tensors[operand] = LAYOUTS[layout](tensors[operand])
        leaves = [tensors[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
        check(device, *leaves, tensors["grad"], relu=True, pool=True)  # type: ignore[arg-type]


def small_integers(*shape: int, seed: int) -> Tensor:
    return integers(*shape, seed=seed).clamp(-1, 1)


@ALL_DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 72, 11, 13), (1, 16, 8, 8, 6), (2, 32, 40, 7, 2)], ids=str)
def test_sums_of_small_integers_have_torchs_bits(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """No sum is rounded, ties are everywhere: outputs, decisions and gradients must be torch's exactly."""
    switches.set_conv_algo("direct")
    n, c_in, c_out, h, w = shape
    sizes = (n, c_in, h, w), (c_out, c_in, 3, 3), (c_out,)
    exact = [small_integers(*size, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    leaves = to(device, *(t.to(dtype) for t in exact))
    for relu, pool in EPILOGUES:
        kernel(device, *leaves, pool=pool)
        y, expected = ops.conv3x3(*leaves, relu=relu, pool=pool), composition(*exact, relu=relu, pool=pool)
        assert_same_bits(y.detach().cpu() + 0, expected.detach().to(dtype) + 0, "y")
        grad = small_integers(*y.shape, seed=9)
        ours = gradients(y, tuple(leaves), grad.to(device, dtype))
        for name, a, b in zip("xwb", ours, gradients(expected, tuple(exact), grad), strict=True):
            assert_same_bits(a.cpu() + 0, b.to(dtype) + 0, f"gradient of {name}")


@ALL_DTYPES
@pytest.mark.parametrize("c_in", [3, 16])
def test_nan_and_infinities_are_where_a_convolution_has_them(
    device: torch.device, c_in: int, dtype: torch.dtype
) -> None:
    x, weight, bias = problem(2, c_in, 24, 10, 12, dtype)
    x[0, 0, 3, 3], x[0, 1 % c_in, 8, 2], x[1, 2 % c_in, 5, 9] = torch.nan, torch.inf, -torch.inf
    x[1, 0, 0, 0] = torch.finfo(dtype).max / (
        256 if dtype == torch.float32 else 1
    )  # which TF32 would round to infinity
    weight[5, :, 1, 1] = torch.inf
    for relu, pool in EPILOGUES:
        expected = composition(x.float(), weight.float(), bias.float(), relu=relu, pool=pool).to(dtype)
        ours = ops.conv3x3(*to(device, x, weight, bias), relu=relu, pool=pool)
        assert_same_specials(ours.detach().cpu(), expected, f"relu {relu}, pool {pool}")


@ALL_DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pool_alone_has_torchs_bits(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    for shape in ((2, 16, 9, 6), (1, 8, 2, 3), (3, 40, 5, 12)):
        values = integers(*shape, dtype=dtype)
        values.view(-1)[::13] = torch.nan
        with device:
            x = LAYOUTS[layout](values.to(device)).detach().requires_grad_()
        assert ops.max_pool2x2_kernel(x).kernel.startswith(device.type)
        y, expected = ops.max_pool2x2(x), F.max_pool2d(x, 2)
        assert_same_bits(y.detach(), expected.detach(), "y")
        grad = normal(*y.shape, dtype=dtype).to(device)
        assert_same_bits(gradients(y, (x,), grad)[0], gradients(expected, (x,), grad)[0], "gradient")
