"""Where an answer could differ from torch's without being inaccurate: NaN, ties, overflow, infinities, odd edges."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cuda_emulator_harness import TILES, Case, Emulator, Saved
from cuda_reference import convolve, make_inputs, make_saved, pack_argmax, pool_in_torch_order, round_tf32

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def identity_weight(channels: int, dtype: torch.dtype) -> torch.Tensor:
    """A convolution that copies its input, ``[C, 3, 3, C]``."""
    weight = torch.zeros(channels, 3, 3, channels, dtype=dtype)
    weight[range(channels), 1, 1, range(channels)] = 1
    return weight


def few_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small integers, so that pools are full of ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off_the_grid(shape: tuple[int, ...], seed: int = 3) -> torch.Tensor:
    """fp32 that TF32 does not hold, half of which truncation would get wrong; none in the middle between two, where the rule for ties
    would matter."""
    bits = torch.randint(0x3F000000, 0x41000000, shape, generator=torch.Generator().manual_seed(seed))
    tied = (bits & 0x1FFF) == 0x1000
    return (bits + tied.long()).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("tile", TILES)
def test_ties_take_the_first_maximum(emulator: Emulator, tile: str, dtype: torch.dtype, relu: bool) -> None:
    case = Case(2, 6, 8, 16, 16, dtype, relu=relu, pool=True)
    x = few_values((2, 6, 8, 16), dtype)
    y, argmax = emulator.forward(case, x, identity_weight(16, dtype), None, tile=tile)
    values, position = pool_in_torch_order(F.relu(x) if relu else x)
    assert torch.equal(y, values)
    assert torch.equal(argmax, pack_argmax(position))


@pytest.mark.parametrize("tile", TILES)
def test_pool_compares_after_rounding(emulator: Emulator, tile: str) -> None:
    """1 and 1 + 2^-10 are one value in bfloat16: the first of them wins although the second sum is larger."""
    case = Case(1, 2, 8, 16, 8, relu=False, pool=True)
    x = torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16)
    x[..., 0] = 1
    x[0, 1, :, 1] = 2.0**-10
    weight = torch.zeros(8, 3, 3, 16, dtype=torch.bfloat16)
    weight[:, 1, 1, :2] = 1
    y, argmax = emulator.forward(case, x, weight, None, tile=tile)
    assert bool((y == 1).all())
    assert bool((argmax == 0).all())


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nan_goes_through_relu_and_pool(emulator: Emulator, dtype: torch.dtype, relu: bool) -> None:
    case = Case(1, 8, 8, 8, 8, dtype, relu=relu, pool=True)
    x = few_values((1, 8, 8, 8), dtype)
    x[0, 2, 3, :] = torch.nan  # spreads to 3x3 outputs: pools with one, two and four of them
    weight = identity_weight(8, dtype)
    y, argmax = emulator.forward(case, x, weight, None)
    unpooled = emulator.forward(dataclasses.replace(case, pool=False), x, weight, None)[0]
    expected = convolve(x, weight, None, relu, torch.float32)
    assert torch.equal(unpooled.nan_to_num(9), expected.to(dtype).nan_to_num(9))
    assert int(unpooled.isnan().sum()) == 9 * 8
    values, position = pool_in_torch_order(unpooled)
    assert torch.equal(y.nan_to_num(9), values.nan_to_num(9))
    assert int(y.isnan().sum()) == 4 * 8
    assert torch.equal(argmax, pack_argmax(position))


def test_float16_overflow_becomes_infinity(emulator: Emulator) -> None:
    case = Case(1, 2, 2, 8, 8, torch.float16, relu=False)
    x = torch.full((1, 2, 2, 8), 60000.0, dtype=torch.float16)
    weight = torch.zeros(8, 3, 3, 8, dtype=torch.float16)
    weight[:4, 1, 1] = 1
    weight[4:, 1, 1] = -1
    y = emulator.forward(case, x, weight, None)[0]
    assert bool((y[..., :4] == torch.inf).all())
    assert bool((y[..., 4:] == -torch.inf).all())


def test_padding_is_zero_even_next_to_infinity(emulator: Emulator) -> None:
    """An out-of-image tap multiplies a true zero: no infinity or NaN leaks in from elsewhere in the batch."""
    case = Case(2, 3, 3, 8, 8, relu=False)
    x = torch.ones(2, 3, 3, 8, dtype=torch.bfloat16)
    x[1] = torch.inf
    y = emulator.forward(case, x, torch.ones(8, 3, 3, 8, dtype=torch.bfloat16), None)[0]
    assert bool(y[0].isfinite().all())
    assert float(y[0, 0, 0, 0]) == 32.0


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(1, 2, 2, 8), (2, 5, 7, 40), (3, 6, 4, 8), (1, 3, 90, 264)], ids=str)
def test_max_pool2x2(emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = few_values(shape, dtype)
    x.view(-1)[::13] = torch.nan
    x[:, 0, 0, 0] = -torch.inf
    y, argmax = emulator.max_pool2x2(x)
    values, position = pool_in_torch_order(x)
    assert torch.equal(y.nan_to_num(9), values.nan_to_num(9))
    assert torch.equal(argmax, pack_argmax(position))
    assert torch.equal(emulator.max_pool2x2(x, argmax=False)[0].nan_to_num(9), y.nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("tile", TILES)
def test_nothing_but_y_is_written_without_argmax(emulator: Emulator, tile: str, dtype: torch.dtype) -> None:
    case = Case(1, 4, 6, 8, 24, dtype, pool=True)
    x, weight, bias = make_inputs(case)
    with_argmax = emulator.forward(case, x, weight, bias, tile=tile)[0]
    without, nothing = emulator.forward(case, x, weight, bias, tile=tile, argmax=False)
    assert nothing is None
    assert torch.equal(with_argmax, without)


def test_results_do_not_depend_on_the_schedule(emulator: Emulator) -> None:
    case = Case(2, 10, 12, 40, 72, pool=True)
    x, weight, bias = make_inputs(case)
    first = emulator.forward(case, x, weight, bias, tile="m64n64")
    for seed in (2, 3, 4):
        again = emulator.forward(case, x, weight, bias, tile="m64n64", seed=seed)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("tile", TILES)
def test_ldmatrix_has_no_bank_conflicts(emulator: Emulator, tile: str, dtype: torch.dtype) -> None:
    case = Case(1, 6, 6, 64, 64, dtype)
    x, weight, bias = make_inputs(case)
    saved = make_saved(case)
    emulator.forward(case, x, weight, bias, tile=tile)
    statistics = emulator.statistics()
    assert statistics.ldmatrix > 0
    assert statistics.ldmatrix_conflicts == 0
    emulator.grad_input(case, saved, weight, tile=tile)
    assert emulator.statistics().ldmatrix_conflicts == 0
    if tile != "m256n64":
        emulator.grad_weight(case, saved, x, tile="m64n64" if dtype == torch.float32 else tile)
        assert emulator.statistics().ldmatrix_conflicts == 0


# ---- TF32: what the operands are rounded to. Exact, because an error of one operand alone would pass for rounding.


@pytest.mark.parametrize("tile", TILES)
def test_both_operands_are_rounded_to_tf32(emulator: Emulator, tile: str) -> None:
    """Pixels under filters that copy them, and filters of a single pixel."""
    case = Case(1, 5, 6, 40, 40, torch.float32, relu=False)
    pixels, weight, copy = off_the_grid((1, 5, 6, 40)), off_the_grid((40, 3, 3, 40)), identity_weight(40, case.dtype)
    one = torch.zeros_like(pixels)
    one[0, 2, 3, 7] = 1
    y, spread = (emulator.forward(case, *inputs, None, tile=tile)[0] for inputs in ((pixels, copy), (one, weight)))
    assert torch.equal(y, round_tf32(pixels))
    assert torch.equal(spread[0, 1:4, 2:5], round_tf32(weight[..., 7]).permute(1, 2, 0).flip(0, 1))
    y, spread = (
        emulator.grad_input(case, Saved(grad, None, None), filters, tile=tile)
        for grad, filters in ((pixels, copy), (one, weight))
    )
    assert torch.equal(y, round_tf32(pixels))
    assert torch.equal(spread[0, 1:4, 2:5], round_tf32(weight[7]))


def test_both_operands_of_grad_weight_are_rounded_to_tf32(emulator: Emulator) -> None:
    """The gradient of one pixel takes the pixels around it; one pixel is taken by the gradients around it."""
    case = Case(1, 5, 6, 40, 40, torch.float32, relu=False)
    pixels = off_the_grid((1, 5, 6, 40))
    one = torch.zeros_like(pixels)
    one[0, 2, 3, 7] = 1
    rounded = round_tf32(pixels[0, 1:4, 2:5])
    assert torch.equal(emulator.grad_weight(case, Saved(one, None, None), pixels)[0][7], rounded)
    of_one_pixel = emulator.grad_weight(case, Saved(pixels, None, None), one)[0][..., 7]
    assert torch.equal(of_one_pixel, rounded.flip(0, 1).permute(2, 0, 1))


def test_both_operands_of_the_first_layer_are_rounded_to_tf32(emulator: Emulator) -> None:
    case = Case(1, 5, 6, 3, 8, torch.float32, relu=False)
    pixels, weight, copy = off_the_grid((1, 5, 6, 3)), off_the_grid((8, 3, 3, 3)), torch.zeros(8, 3, 3, 3)
    copy[:3] = identity_weight(3, case.dtype)
    one = torch.zeros_like(pixels)
    one[0, 2, 3, 1] = 1
    assert torch.equal(emulator.forward(case, pixels, copy, None)[0][..., :3], round_tf32(pixels))
    spread = emulator.forward(case, one, weight, None)[0]
    assert torch.equal(spread[0, 1:4, 2:5], round_tf32(weight[..., 1]).permute(1, 2, 0).flip(0, 1))
