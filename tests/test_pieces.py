"""Winograd's products of floats in three pieces of bfloat16, on AMX's tile registers and on their emulation."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from network_reference import error
from reference import AMX_FORMS, NAMES, assert_same_bits, check_against_float64, normal, problem
from torch import Tensor

from vggfast import _C, ops

pytestmark = pytest.mark.skipif(not AMX_FORMS, reason="AMX's kernels and their emulation need AVX-512")

# n, c_in, c_out, h, w and what is special about it: panels are 32 tiles or channels, 128 tiles at least are done in pieces.
SHAPES = {
    "whole panels": (2, 96, 96, 32, 32),
    "one tile in the last panel": (1, 96, 100, 12, 172),
    "16 tiles in the last panel": (1, 128, 96, 24, 96),
    "22 tiles in the last panel, 130 channels": (1, 96, 130, 24, 100),
    "edges of F(2)": (5, 128, 96, 22, 26),
    "an edge of F(2) in the last row": (4, 96, 160, 25, 28),
    "several passes": (23, 96, 96, 24, 24),
    "ranges of output channels": (2, 416, 416, 32, 32),
    "chunks of the last column alone": (1, 96, 96, 560, 6),
}


@pytest.fixture(autouse=True, params=AMX_FORMS)
def amx(request: pytest.FixtureRequest) -> str:
    _C.set_cpu_isa(request.param)
    _C.set_conv_algo("auto")
    return str(request.param)


def in_pieces(n: int, c_in: int, c_out: int, h: int, w: int, dtype: str = "float32") -> list[bool]:
    passes = ("forward", "grad_input", "grad_weight")
    return ["products on AMX tiles" in _C.cpu_plan(which, n, c_in, c_out, h, w, dtype) for which in passes]


def results(*operands: Tensor) -> list[Tensor]:
    return reference.results(ops.conv3x3, list(operands[:3]), operands[3], False, False)


def float64_results(*operands: Tensor) -> list[Tensor]:
    return reference.float64_results(list(operands[:3]), operands[3], False, False)


@pytest.mark.parametrize("name", SHAPES)
def test_pieces_are_as_accurate_as_vectors(name: str, amx: str) -> None:
    """A product of pieces that is missing, the smallest of the six included, costs several times the error that vectors have."""
    n, _, c_out, h, w = shape = SHAPES[name]
    assert in_pieces(*shape) == [True, c_out % 32 == 0, True]
    operands = *problem(*shape), normal(n, c_out, h, w, seed=5)
    pieces, exact = results(*operands), float64_results(*operands)
    _C.set_cpu_isa("avx512")
    assert in_pieces(*shape) == [False] * 3
    vectors = results(*operands)
    for got, other, expected, what in zip(pieces, vectors, exact, NAMES, strict=True):
        assert error(got, expected) <= error(other, expected), what
        assert error(got, expected) < 1.2e-6, what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_images(dtype: torch.dtype) -> None:
    _C.set_conv_algo("winograd")
    shape = SHAPES["edges of F(2)"]
    operands = problem(*shape, dtype, grad=True)
    grad = normal(5, 96, 22, 26, dtype=dtype, seed=5)
    check_against_float64(*operands, grad, relu=True, pool=False, algo="winograd")


@pytest.mark.parametrize("size", [(1, 24, 24), (1, 22, 30), (2, 14, 14), (3, 29, 16)])
def test_gradients_of_filters_over_few_tiles(size: tuple[int, int, int]) -> None:
    """36, 48, 32 and 96 tiles, which the last step of 32 terms is or is not filled by."""
    n, h, w = size
    operands = *problem(n, 96, 96, h, w), normal(n, 96, h, w, seed=5)
    assert in_pieces(n, 96, 96, h, w) == [False, False, True]
    for got, exact in zip(results(*operands)[2:], float64_results(*operands)[2:], strict=True):
        assert error(got, exact) < 1.2e-6


@pytest.mark.parametrize(("relu", "pool"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("name", ["edges of F(2)", "one tile in the last panel"])
def test_relu_and_pool(name: str, relu: bool, pool: bool) -> None:
    n, _, c_out, h, w = shape = SHAPES[name]
    operands = problem(*shape, grad=True)
    grad = normal(n, c_out, h // 2, w // 2, seed=5) if pool else normal(n, c_out, h, w, seed=5)
    check_against_float64(*operands, grad, relu=relu, pool=pool, algo="winograd")


def test_every_layout_of_operands() -> None:
    x, weight, bias = problem(2, 96, 128, 32, 32)
    grad = normal(2, 128, 32, 32, seed=5)
    last = torch.channels_last
    expected = results(x, weight, bias, grad)
    for operands in (
        (x.to(memory_format=last), weight, bias, grad.to(memory_format=last)),
        (x, weight.to(memory_format=last), bias, grad),
        (x[:, :1].expand_as(x), weight, bias, grad[:, :, :1].expand_as(grad)),
        (torch.cat([x, x], 3)[..., ::2], weight.flip(0), bias.flip(0), grad.permute(0, 1, 3, 2)),
    ):
        same = all(map(torch.equal, operands, (x, weight, bias, grad)))
        for got, exact, one in zip(results(*operands), float64_results(*operands), expected, strict=True):
            assert error(got, exact) < 1.2e-6
            if same:
                assert_same_bits(got, one)


@pytest.mark.parametrize("name", ["edges of F(2)", "several passes", "ranges of output channels"])
def test_threads_make_no_difference(name: str) -> None:
    n, _, c_out, h, w = shape = SHAPES[name]
    operands = *problem(*shape), normal(n, c_out, h, w, seed=5)
    torch.set_num_threads(1)
    expected = results(*operands)
    for threads in (2, 3, 16, 64):
        torch.set_num_threads(threads)
        assert all(in_pieces(*shape))
        for got, one, what in zip(results(*operands), expected, NAMES, strict=True):
            assert_same_bits(got, one, f"{what}, {threads} threads")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("operand", [0, 1, 3])
def test_what_is_not_finite_gives_what_the_direct_kernel_gives(operand: int, value: float) -> None:
    operands = [*problem(2, 96, 96, 32, 32), normal(2, 96, 32, 32, seed=5)]
    operands[operand][1, 7, 2, 1] = value
    got = results(*operands)
    _C.set_conv_algo("direct")
    for ours, direct, what in zip(got, results(*operands), NAMES, strict=True):
        if not direct.isfinite().all():
            assert_same_bits(ours, direct, what)
        else:
            assert bool(ours.isfinite().all()), what


def test_a_nan_that_only_the_last_bits_tell_from_infinity() -> None:
    """Its leading piece is an infinity."""
    x, weight, bias = problem(2, 96, 96, 32, 32)
    x[0, 0, 3, 3] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    assert bool(ops.conv3x3(x, weight, bias)[0, :, 2:5, 2:5].isnan().all())


@pytest.mark.parametrize("exponent", [100, 0, -60, -95])
def test_scale(exponent: int) -> None:
    """The last pieces of numbers above 2^-100 are no denormals, which tile registers take for zero."""
    x, weight, bias = problem(2, 96, 96, 32, 32)
    scaled = ops.conv3x3(x * 2.0**exponent, weight, bias * 2.0**exponent, relu=False)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert error(scaled.double() * 2.0**-exponent, exact) < 1e-6


def test_the_smallest_numbers() -> None:
    x, weight, _ = problem(2, 96, 96, 32, 32)
    for exponent in (-110, -120, -130, -140):
        y = ops.conv3x3(x * 2.0**exponent, weight, relu=False)
        exact = F.conv2d((x * 2.0**exponent).double(), weight.double(), padding=1)
        assert float((y.double() - exact).abs().max()) < 1e-35


def test_when() -> None:
    """By the problem alone, whatever the threads: whole blocks of 32 input channels, enough channels and tiles."""
    assert in_pieces(2, 96, 96, 32, 32) == [True] * 3
    assert in_pieces(2, 96, 96, 32, 32, "float16") == [True] * 3
    assert in_pieces(2, 96, 96, 32, 32, "bfloat16") == [False] * 3  # which tile registers multiply directly
    assert in_pieces(2, 96, 97, 32, 32) == [True, False, True]
    assert in_pieces(2, 64, 96, 32, 32) == [False] * 3
    assert in_pieces(1, 96, 96, 32, 32) == [False, False, True]  # 64 tiles
    assert in_pieces(1, 96, 96, 20, 20) == [False] * 3
    for threads in (1, 2, 16, 64):
        torch.set_num_threads(threads)
        assert in_pieces(2, 96, 96, 32, 32) == [True] * 3
    _C.set_conv_algo("winograd")
    assert in_pieces(2, 96, 96, 32, 32) == [True] * 3
    assert in_pieces(2, 96, 96, 32, 32, "bfloat16") == [True] * 3
    _C.set_conv_algo("direct")
    assert in_pieces(2, 96, 96, 32, 32) == [False] * 3


def test_registers_and_emulation_agree() -> None:
    if "amx" not in AMX_FORMS:
        pytest.skip("this CPU has no AMX to compare its emulation with")
    for shape in ((2, 96, 96, 32, 32), (5, 128, 96, 22, 26)):
        n, _, c_out, h, w = shape
        operands = *problem(*shape), normal(n, c_out, h, w, seed=5)
        _C.set_cpu_isa("amx")
        real = results(*operands)
        _C.set_cpu_isa("amx_emulated")
        for a, b, what in zip(real, results(*operands), NAMES, strict=True):
            assert error(a, b.double()) < 2e-7, what
