"""grad_input, grad_weight, grad_bias and the gradient before ReLU and pool, on the emulator."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cuda_emulator_harness import TILES, Case, Emulator, Saved
from cuda_reference import (
    assert_close,
    convolution_gradients,
    grad_preact,
    make_inputs,
    make_saved,
    torch_like_gradients,
)

CASES = [
    Case(1, 4, 4, 8, 8),
    Case(2, 5, 7, 40, 72),  # odd image, ragged channels on both sides
    Case(1, 9, 8, 136, 64, relu=False),  # nothing to mask: the gradient is read as it is
    Case(3, 6, 6, 32, 64, pool=True),
    Case(2, 7, 9, 24, 40, pool=True),  # odd image: the last row and column get no gradient from any pool
    Case(5, 2, 2, 16, 8, pool=True, relu=False),
    Case(1, 1, 1, 8, 8),
    Case(4, 3, 1, 8, 16),
    Case(1, 18, 34, 16, 72, pool=True),  # several row tiles, many stages of pixels
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def name(value: object) -> str:
    if isinstance(value, Case):
        flags = ("-relu" if value.relu else "") + ("-pool" if value.pool else "")
        return f"{value.n}x{value.h}x{value.w}x{value.c}-{value.k}{flags}"
    return str(value).removeprefix("torch.")


def finite(saved: Saved) -> Saved:
    """Masks by NaN stay, a gradient of NaN would hide everything."""
    assert bool(saved.grad.isfinite().all())
    return saved


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("tile", [*TILES, None])  # the last: as planned
@pytest.mark.parametrize("case", CASES, ids=name)
def test_grad_input(emulator: Emulator, case: Case, tile: str | None, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    x, weight, _ = make_inputs(case)
    saved = finite(make_saved(case))
    ours = emulator.grad_input(case, saved, weight, tile=tile)
    grad = grad_preact(case, saved)
    exact = convolution_gradients(grad, x, weight, torch.float64)[0]
    assert_close(ours, exact, torch_like_gradients(grad, x, weight, dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("tile", ["m128n128", "m64n64"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_grad_weight_and_bias(emulator: Emulator, case: Case, tile: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        tile = "m64n64"
    case = dataclasses.replace(case, dtype=dtype)
    x, weight, _ = make_inputs(case)
    saved = finite(make_saved(case))
    splits = 1 + case.h % 4
    ours, ours_bias = emulator.grad_weight(case, saved, x, tile=tile, splits=splits)
    grad = grad_preact(case, saved)
    exact = convolution_gradients(grad, x, weight, torch.float64)
    theirs = torch_like_gradients(grad, x, weight, dtype)
    assert_close(ours, exact[1], theirs[1])
    assert_close(ours_bias, exact[2], theirs[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_grad_weight_as_planned(emulator: Emulator, dtype: torch.dtype) -> None:
    """On the tile that the plan names, in the workspace that it asks for: more than 64 channels on both sides."""
    case = Case(1, 7, 9, 72, 136, dtype)
    x, weight, _ = make_inputs(case)
    saved = finite(make_saved(case))
    ours, _ = emulator.grad_weight(case, saved, x)
    grad = grad_preact(case, saved)
    exact = convolution_gradients(grad, x, weight, torch.float64)[1]
    assert_close(ours, exact, torch_like_gradients(grad, x, weight, dtype)[1])


def test_grad_weight_without_bias(emulator: Emulator) -> None:
    case = Case(2, 4, 5, 16, 24)
    x, _, _ = make_inputs(case)
    saved = make_saved(case)
    with_bias, _ = emulator.grad_weight(case, saved, x)
    without, nothing = emulator.grad_weight(case, saved, x, bias=False)
    assert nothing is None
    assert torch.equal(with_bias, without)


@pytest.mark.parametrize("seed", [2, 3])
def test_gradients_do_not_depend_on_the_schedule(emulator: Emulator, seed: int) -> None:
    case = Case(2, 6, 7, 24, 72, pool=True)
    x, weight, _ = make_inputs(case)
    saved = make_saved(case)
    first = emulator.grad_weight(case, saved, x, splits=3)
    again = emulator.grad_weight(case, saved, x, splits=3, seed=seed)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    ours, ours_again = (emulator.grad_input(case, saved, weight, seed=number) for number in (1, seed))
    assert torch.equal(ours, ours_again)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_grad_preact(emulator: Emulator, case: Case, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    saved = make_saved(case)
    saved.grad.view(-1)[::5] = torch.nan
    assert torch.equal(emulator.grad_preact(case, saved).isnan(), grad_preact(case, saved).isnan())
    ours, expected = emulator.grad_preact(case, saved).nan_to_num(7), grad_preact(case, saved).nan_to_num(7)
    assert torch.equal(ours, expected)
