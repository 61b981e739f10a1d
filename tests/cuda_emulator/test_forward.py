"""The fused forward kernel, on the emulator, against float64 and torch."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator_harness import TILES, Case, Emulator
from cuda_reference import assert_close, convolve, make_inputs, pack_argmax, pool_in_torch_order, torch_like

CASES = [
    Case(1, 4, 4, 8, 8),  # one tile, mostly empty; channels below one stage
    Case(2, 5, 7, 40, 72),  # odd image, ragged channels on both sides
    Case(1, 9, 8, 64, 136, relu=False),  # two column tiles, the last ragged
    Case(3, 6, 6, 32, 64, pool=True),  # exactly one stage of channels
    Case(2, 7, 9, 24, 40, pool=True),  # odd image: the last row and column belong to no pool
    Case(5, 2, 2, 16, 8, pool=True, relu=False),  # one pool an image
    Case(1, 1, 1, 8, 8),  # only the centre tap reads anything
    Case(4, 3, 1, 8, 16),  # one column: horizontal neighbours are padding
    Case(1, 18, 34, 16, 64),  # several row tiles
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def name(value: object) -> str:
    if isinstance(value, Case):
        flags = ("-relu" if value.relu else "") + ("-pool" if value.pool else "")
        return f"{value.n}x{value.h}x{value.w}x{value.c}-{value.k}{flags}"
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("tile", [*TILES, None])  # the last: as planned
@pytest.mark.parametrize("case", CASES, ids=name)
def test_forward(emulator: Emulator, case: Case, tile: str | None, dtype: torch.dtype) -> None:
    case = Case(case.n, case.h, case.w, case.c, case.k, dtype, case.relu, case.pool)
    x, weight, bias = make_inputs(case)
    y, argmax = emulator.forward(case, x, weight, bias, tile=tile)
    plain = Case(case.n, case.h, case.w, case.c, case.k, dtype, case.relu, pool=False)
    unpooled = emulator.forward(plain, x, weight, bias, tile=tile)[0] if case.pool else y
    exact = convolve(x, weight, bias, case.relu, torch.float64)
    assert_close(unpooled, exact, torch_like(x, weight, bias, case.relu, dtype))
    if case.pool:
        values, position = pool_in_torch_order(unpooled)
        assert torch.equal(y, values)
        assert torch.equal(argmax, pack_argmax(position))
