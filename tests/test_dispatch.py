"""Calls that look as though a kernel took them, and are torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import composition, normal
from torch import Tensor

from vggfast import ops

LARGE = normal(2, 1000), normal(1100, 1000, seed=1), normal(1100, seed=2)
SMALL = normal(1, 8, 6, 6), normal(8, 8, 3, 3, seed=1), normal(8, seed=2)


def answer(function: Callable[..., Tensor], *operands: Tensor) -> Tensor | str:
    try:
        return function(*operands)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_leaves_float64_and_integers_as_they_are(dtype: torch.dtype, autocast: torch.dtype) -> None:
    pairs = ((ops.conv3x3, composition, SMALL), (ops.linear, F.linear, LARGE))
    for ours, torchs, operands in pairs:
        given = [t.to(dtype) for t in operands]
        with torch.autocast("cpu", autocast):
            got, expected = answer(ours, *given), answer(torchs, *given)
        if isinstance(expected, Tensor):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)
        else:
            assert got == expected


@pytest.mark.parametrize("shape", [(1,), (1, 1100), (2, 1100)], ids=str)
def test_a_bias_of_linear_that_torch_broadcasts(shape: tuple[int, ...]) -> None:
    x, weight, _ = LARGE
    bias = normal(*shape)
    got, expected = answer(ops.linear, x, weight, bias), answer(F.linear, x, weight, bias)
    assert isinstance(got, Tensor) == isinstance(expected, Tensor)
    assert torch.equal(got, expected) if isinstance(got, Tensor) else got == expected


@pytest.mark.parametrize("channels", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_no_channels(channels: tuple[int, int]) -> None:
    c_in, c_out = channels
    operands = normal(1, c_in, 6, 6), normal(c_out, c_in, 3, 3), normal(c_out)
    got, expected = answer(ops.conv3x3, *operands), answer(composition, *operands)
    assert isinstance(got, Tensor) == isinstance(expected, Tensor)
    assert torch.equal(got, expected) if isinstance(got, Tensor) else got == expected
