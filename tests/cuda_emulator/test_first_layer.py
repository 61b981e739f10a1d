"""The first layer: 3 input channels or fewer, images in any memory order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cuda_emulator_harness import KERNELS, Case, Emulator
from cuda_reference import assert_close, convolve, make_inputs, pack_argmax, pool_in_torch_order, torch_like

CASES = [
    Case(1, 5, 6, 3, 64),
    Case(2, 9, 21, 3, 72, relu=False),  # more tiles than one block takes, ragged output channels
    Case(2, 6, 5, 3, 16, pool=True),
    Case(3, 4, 4, 1, 8),  # grey images
    Case(1, 2, 3, 2, 8, pool=True),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def name(value: object) -> str:
    if isinstance(value, Case):
        return f"{value.n}x{value.h}x{value.w}x{value.c}-{value.k}{'-pool' if value.pool else ''}"
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("order", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_first_layer(emulator: Emulator, case: Case, dtype: torch.dtype, order: str) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    assert KERNELS[emulator.plan("forward", case.problem).kernel] == "first_layer"
    x, weight, bias = make_inputs(case)
    if order == "nchw":
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    y, argmax = emulator.forward(case, x, weight, bias)
    plain = dataclasses.replace(case, pool=False)
    unpooled = emulator.forward(plain, x, weight, bias)[0] if case.pool else y
    exact = convolve(x, weight, bias, case.relu, torch.float64)
    assert_close(unpooled, exact, torch_like(x, weight, bias, case.relu, dtype))
    if case.pool:
        values, position = pool_in_torch_order(unpooled)
        assert torch.equal(y, values)
        assert torch.equal(argmax, pack_argmax(position))


def test_memory_order_does_not_change_the_result(emulator: Emulator) -> None:
    case = Case(2, 6, 7, 3, 64)
    x, weight, bias = make_inputs(case)
    planar = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(emulator.forward(case, x, weight, bias)[0], emulator.forward(case, planar, weight, bias)[0])
