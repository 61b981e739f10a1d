"""The sm_90 kernels, on the emulator: every tile over ragged sizes, and every plan that VGG's layers get."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cuda_emulator_harness import KERNELS, WIDE_TILES, Case, Emulator, Plan, Saved
from cuda_reference import (
    assert_close,
    convolution_gradients,
    convolve,
    grad_preact,
    make_inputs,
    make_saved,
    pack_argmax,
    pool_in_torch_order,
    round_tf32,
    torch_like,
    torch_like_gradients,
)
from test_torch_semantics import few_values, identity_weight, off_the_grid

from vggfast.bench.layers import CONFIGS, conv_layers

Box = tuple[int, int, int]

CASES = [
    Case(1, 4, 4, 8, 8),  # one tile, mostly empty; channels below one stage
    Case(2, 5, 7, 40, 72),  # odd image, ragged channels on both sides
    Case(1, 9, 8, 72, 136, relu=False),  # two blocks of the reduction, the last ragged; ragged column tiles
    Case(3, 6, 6, 64, 64, pool=True),  # exactly one block of the reduction
    Case(2, 7, 9, 24, 40, pool=True),  # odd image: the last row and column belong to no pool
    Case(5, 2, 2, 16, 8, pool=True, relu=False),  # one pool an image
    Case(17, 3, 2, 8, 16),  # more images than a box has
]
DTYPES = (torch.bfloat16, torch.float16)
PIXEL_DTYPES = (*DTYPES, torch.float32)  # of forward and grad_input
PIXEL_TILES = WIDE_TILES[:4]
WEIGHT_TILES = WIDE_TILES[3:]


def name(value: object) -> str:
    if isinstance(value, Case):
        flags = ("-relu" if value.relu else "") + ("-pool" if value.pool else "")
        return f"{value.n}x{value.h}x{value.w}x{value.c}-{value.k}{flags}"
    return str(value).removeprefix("torch.")


def boxes(tile: str, case: Case, pools: bool) -> list[Box]:
    """A flat and a tall box of the tile's rows."""
    rows = int(tile[1:].split("n")[0])
    return [(8, 2, rows // 16), (8, rows // 8, 1)] if pools else [(4, 4, rows // 16), (16, 2, rows // 32)]


def check_forward(
    emulator: Emulator,
    case: Case,
    tile: str,
    box: Box,
    *,
    splits: int = 1,
    sms: int = 2,
    seed: int = 1,
    patch: bool = False,
) -> None:
    x, weight, bias = make_inputs(case)

    def run(case: Case, box: Box) -> tuple[torch.Tensor, torch.Tensor | None]:
        plan = emulator.wide_plan_like("forward", case, tile, box, splits=splits, sms=sms, patch=patch)
        return emulator.forward(case, x, weight, bias, plan=plan, seed=seed)

    y, argmax = run(case, box)
    unpooled = run(dataclasses.replace(case, pool=False), box)[0] if case.pool else y
    exact = convolve(x, weight, bias, case.relu, torch.float64)
    assert_close(unpooled, exact, torch_like(x, weight, bias, case.relu, case.dtype))
    if case.pool:
        values, position = pool_in_torch_order(unpooled)
        assert torch.equal(y, values)
        assert torch.equal(argmax, pack_argmax(position))


def check_grad_input(
    emulator: Emulator,
    case: Case,
    tile: str,
    box: Box,
    *,
    splits: int = 1,
    sms: int = 2,
    seed: int = 1,
    patch: bool = False,
) -> None:
    x, weight, _ = make_inputs(case)
    saved = make_saved(case)
    plan = emulator.wide_plan_like("grad_input", case, tile, box, splits=splits, sms=sms, patch=patch)
    ours = emulator.grad_input(case, saved, weight, plan=plan, seed=seed)
    grad = grad_preact(case, saved)
    exact = convolution_gradients(grad, x, weight, torch.float64)[0]
    assert_close(ours, exact, torch_like_gradients(grad, x, weight, case.dtype)[0])


def check_grad_weight(emulator: Emulator, case: Case, tile: str, box: Box, *, splits: int = 1, seed: int = 1) -> None:
    x, weight, _ = make_inputs(case)
    saved = make_saved(case)
    plan = emulator.wide_plan_like("grad_weight", case, tile, box, splits=splits)
    ours, ours_bias = emulator.grad_weight(case, saved, x, plan=plan, seed=seed)
    grad = grad_preact(case, saved)
    exact = convolution_gradients(grad, x, weight, torch.float64)
    theirs = torch_like_gradients(grad, x, weight, case.dtype)
    assert_close(ours, exact[1], theirs[1])
    assert_close(ours_bias, exact[2], theirs[2])


@pytest.mark.parametrize("dtype", PIXEL_DTYPES, ids=name)
@pytest.mark.parametrize("tile", PIXEL_TILES)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_forward(emulator: Emulator, case: Case, tile: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    splits = 1 + case.h % 3  # 4 and 5 rows: two and three
    check_forward(emulator, case, tile, boxes(tile, case, case.pool)[dtype == torch.float16], splits=splits)


@pytest.mark.parametrize("dtype", PIXEL_DTYPES, ids=name)
@pytest.mark.parametrize("tile", PIXEL_TILES)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_grad_input(emulator: Emulator, case: Case, tile: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype, c=case.k, k=case.c)
    splits = 1 + case.h % 3
    check_grad_input(emulator, case, tile, boxes(tile, case, False)[dtype == torch.float16], splits=splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("tile", WEIGHT_TILES)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_grad_weight_and_bias(emulator: Emulator, case: Case, tile: str, dtype: torch.dtype) -> None:
    box = (8, 8, 1) if dtype == torch.float16 else (2, 4, 8)
    check_grad_weight(emulator, dataclasses.replace(case, dtype=dtype), tile, box, splits=1 + case.h % 4)


# ---- Every plan that a GPU of 132 SMs gives the layers of VGG11 to VGG19, on images cut down to little more than a box, with
# channels cut down to little more than a tile, and no more of the reduction than the plan's splits need.

BATCHES = (1, 3, 8, 64)
LAYERS = sorted({layer[1:4] for model in CONFIGS for layer in conv_layers(model) if layer.c_in != 3})


class Planned(NamedTuple):
    """What of a plan decides which code runs and how it cuts the problem up."""

    tile: str
    box: Box
    splits: int  # of grad_weight: partial results

    @classmethod
    def of(cls, plan: Plan) -> Planned:
        return cls(WIDE_TILES[plan.wide_tile], (plan.box_w, plan.box_h, plan.box_n), plan.splits)


def vgg_plans(emulator: Emulator, step: str, dtype: torch.dtype) -> dict[tuple[Planned, bool], Case]:
    """Every plan of the step, pooled or not, with the largest batch of a layer that gets it."""
    found: dict[tuple[Planned, bool], Case] = {}
    for batch, (c, k, size), pool, relu in itertools.product(BATCHES[::-1], LAYERS, (False, True), (True, False)):
        case = Case(batch, size, size, c, k, dtype, relu, pool)
        plan = emulator.wide_plan(step, case, sms=132)
        assert KERNELS[plan.kernel] == "wgmma", plan.reason
        # Backward, pools only matter to the kernel that materialises the gradient before them.
        found.setdefault((Planned.of(plan), pool and step == "forward"), case)
    return found


def reduced(step: str, case: Case, planned: Planned) -> Case:
    rows, columns = (int(part) for part in planned.tile[1:].split("n"))
    box_w, box_h, box_n = planned.box
    if step == "grad_weight":  # a box a split, the last one not full
        boxes = planned.splits // (2 if rows == 64 else 1)
        n = boxes * box_n - (box_n > 1)
        return dataclasses.replace(case, n=n, h=max(2, box_h), w=box_w - (box_n == 1), c=40, k=72)
    # Blocks of a row of channels, of nine stages each: the least that make so many splits, and more than one.
    blocks = next(b for b in range(1, 17) if -(-9 * b // -(-9 * b // planned.splits)) == planned.splits)
    deep, wide = (
        128 // case.dtype.itemsize * blocks + 8 * (blocks == 1),
        min(case.k if step == "forward" else case.c, columns + 8),
    )
    c, k = (deep, wide) if step == "forward" else (wide, deep)
    return dataclasses.replace(case, n=max(1, box_n - 1), h=box_h, w=box_w + 2, c=c, k=k)


CHECKS = {"forward": check_forward, "grad_input": check_grad_input, "grad_weight": check_grad_weight}
PLANNED = [(s, d) for s in CHECKS for d in PIXEL_DTYPES if s != "grad_weight" or d in DTYPES]


@pytest.mark.parametrize(("step", "dtype"), PLANNED, ids=name)
def test_every_plan_of_vgg(emulator: Emulator, step: str, dtype: torch.dtype) -> None:
    check = CHECKS[step]
    plans = vgg_plans(emulator, step, dtype)
    assert len(plans) > 20
    ran = set()
    for number, ((planned, pool), case) in enumerate(plans.items()):
        case = dataclasses.replace(reduced(step, case, planned), relu=number % 2 == 0)
        forced = Planned.of(emulator.wide_plan_like(step, case, planned.tile, planned.box, splits=planned.splits))
        try:
            check(emulator, case, planned.tile, planned.box, splits=planned.splits)
        except Exception as error:
            raise AssertionError(f"{step}, {planned}, {name(case)}: {error}") from error
        assert emulator.statistics().wgmma > 0
        ran.add((forced, pool))
    assert ran == set(plans)


@pytest.mark.parametrize(("step", "dtype"), PLANNED, ids=name)
def test_grids_and_workspaces_are_those_that_the_tests_run_with(
    emulator: Emulator, step: str, dtype: torch.dtype
) -> None:
    """`wide_plan_like` counts them anew; with 512 images they pass 2^31 bytes."""
    check_planned_sizes(emulator, step, dtype)


def check_planned_sizes(emulator: Emulator, step: str, dtype: torch.dtype, *, patch: bool = False) -> None:
    for batch, (c, k, size), pool, relu in itertools.product((1, 8, 512), LAYERS, (False, True), (False, True)):
        case = Case(batch, size, size, c, k, dtype, relu, pool)
        plan = (emulator.patch_plan if patch else emulator.wide_plan)(step, case, sms=132)
        tile, box, splits = Planned.of(plan)
        if step == "grad_weight" and tile.startswith("m64"):
            splits //= 2  # two partial results a split
        same = emulator.wide_plan_like(step, case, tile, box, splits=splits, sms=132, patch=patch)
        for field in ("tiles_m", "tiles_n", "splits", "blocks", "workspace_bytes"):
            assert getattr(plan, field) == getattr(same, field), (name(case), field)


def test_grad_weight_of_several_tiles(emulator: Emulator) -> None:
    """Two of output channels, two of input channels, of every tile."""
    for tile in WEIGHT_TILES:
        check_grad_weight(emulator, Case(2, 4, 6, 136, 136), tile, (4, 4, 4), splits=2)


def test_whole_layer_of_512_channels(emulator: Emulator) -> None:
    """72 stages a tile, forward and grad_input: the ring goes round many times."""
    case = Case(2, 4, 4, 512, 512)
    check_forward(emulator, case, "m128n256", (4, 4, 8))
    check_grad_input(emulator, case, "m128n128", (4, 4, 8))


@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_results_do_not_depend_on_the_schedule(emulator: Emulator, seed: int) -> None:
    case = Case(2, 10, 12, 72, 72, pool=True)
    x, weight, bias = make_inputs(case)
    saved = make_saved(case)

    def results(seed: int) -> list[torch.Tensor | None]:
        forward, backward = (emulator.wide_plan(step, case) for step in ("forward", "grad_input"))
        weights = emulator.wide_plan_like("grad_weight", case, "m128n128", (4, 4, 4), splits=2)
        gx = emulator.grad_input(case, saved, weight, plan=backward, seed=seed)
        return [
            *emulator.forward(case, x, weight, bias, plan=forward, seed=seed),
            gx,
            *emulator.grad_weight(case, saved, x, plan=weights, seed=seed),
        ]

    for first, again in zip(results(1), results(seed), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", PIXEL_DTYPES, ids=name)
def test_ties_and_nan_in_pools(emulator: Emulator, dtype: torch.dtype) -> None:
    case = Case(2, 6, 12, 16, 16, dtype, relu=False, pool=True)
    x = few_values((2, 6, 12, 16), dtype)
    x[0, 2, 3, :] = torch.nan
    plan = emulator.wide_plan_like("forward", case, "m256n64", (8, 4, 8))
    y, argmax = emulator.forward(case, x, identity_weight(16, dtype), None, plan=plan)
    unpooled = convolve(x, identity_weight(16, dtype), None, False, torch.float32).to(dtype)
    values, position = pool_in_torch_order(unpooled)
    assert torch.equal(y.nan_to_num(9), values.nan_to_num(9))
    assert int(y.isnan().sum()) == 4 * 16
    assert torch.equal(argmax, pack_argmax(position))


def test_infinities_at_the_edge_reach_only_the_taps_that_read_them(emulator: Emulator) -> None:
    """Boxes reach past the image: what lies there must be zero on both sides, since 0 * inf is NaN."""
    case = Case(3, 5, 7, 8, 8, relu=False)
    x, _, _ = make_inputs(case)
    x[:, -1, :, :] = torch.inf
    x[:, :, -1, :] = torch.inf
    saved = make_saved(case)
    plan = emulator.wide_plan_like("grad_weight", case, "m64n64", (8, 8, 1))
    ours, _ = emulator.grad_weight(case, saved, x, plan=plan)
    exact = convolution_gradients(saved.grad, x, torch.zeros(8, 3, 3, 8), torch.float64)[1]
    assert torch.equal(ours.isfinite(), exact.isfinite())
    assert int(ours.isfinite().sum()) == 64  # the tap up and left never meets the last row or column


# ---- TF32: what the operands are rounded to. Exact, because an error of one operand alone would pass for rounding.


def check_rounded_forward(emulator: Emulator, tile: str = "m256n64") -> None:
    """Pixels under filters that copy them, and filters of a single pixel."""
    case = Case(1, 5, 6, 40, 40, torch.float32, relu=False)
    plan = emulator.wide_plan_like("forward", case, tile, (8, 8, int(tile[1:4]) // 64))
    x, weight = off_the_grid((1, 5, 6, 40)), off_the_grid((40, 3, 3, 40))
    y, _ = emulator.forward(case, x, identity_weight(40, torch.float32), None, plan=plan)
    assert torch.equal(y, round_tf32(x))
    one = torch.zeros_like(x)
    one[0, 2, 3, 7] = 1
    y, _ = emulator.forward(case, one, weight, None, plan=plan)
    assert torch.equal(y[0, 1:4, 2:5], round_tf32(weight[..., 7]).permute(1, 2, 0).flip(0, 1))


def check_rounded_grad_input(emulator: Emulator, tile: str = "m256n64") -> None:
    case = Case(1, 5, 6, 40, 40, torch.float32, relu=False)
    plan = emulator.wide_plan_like("grad_input", case, tile, (8, 8, int(tile[1:4]) // 64))
    grad, weight = off_the_grid((1, 5, 6, 40)), off_the_grid((40, 3, 3, 40))
    gx = emulator.grad_input(case, Saved(grad, None, None), identity_weight(40, torch.float32), plan=plan)
    assert torch.equal(gx, round_tf32(grad))
    one = torch.zeros_like(grad)
    one[0, 2, 3, 7] = 1
    gx = emulator.grad_input(case, Saved(one, None, None), weight, plan=plan)
    assert torch.equal(gx[0, 1:4, 2:5], round_tf32(weight[7]))


@pytest.mark.parametrize("check", [check_rounded_forward, check_rounded_grad_input])
def test_operands_are_rounded_to_tf32(emulator: Emulator, check: Callable[[Emulator, str], None]) -> None:
    check(emulator, "m256n64")
    check(emulator, "m128n128")


REFUSED = {
    "capability": (Case(1, 8, 8, 64, 64), "forward", (132, 80), "9.0"),
    "capability above": (Case(1, 8, 8, 64, 64), "forward", (132, 100), "9.0"),
    "fp32": (Case(1, 8, 8, 64, 64, torch.float32), "grad_weight", (132, 90), "runs over pixels"),
    "fp32, first layer": (Case(1, 8, 8, 3, 64, torch.float32), "forward", (132, 90), "multiple of 16 bytes"),
    "first layer": (Case(1, 8, 8, 3, 64), "forward", (132, 90), "multiple of 16 bytes"),
    "one column": (Case(1, 8, 1, 64, 64), "grad_weight", (132, 90), "one row or column"),
    "what no kernel takes": (Case(1, 8, 8, 64, 60), "forward", (132, 90), "output channels"),
}


@pytest.mark.parametrize(("case", "step", "device", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_wgmma_does_not_take(
    emulator: Emulator, case: Case, step: str, device: tuple[int, int], reason: str
) -> None:
    plan = emulator.wide_plan(step, case, device=device)
    assert KERNELS[plan.kernel] == "aten"
    assert reason in plan.reason.decode()


def test_plans_print(emulator: Emulator) -> None:
    case = Case(64, 56, 56, 256, 256, pool=True)
    texts = [emulator.plan_text(emulator.wide_plan(step, case, sms=132)) for step in ("forward", "grad_weight")]
    assert texts[0].startswith("wgmma tile=m128n256 box=8x8x2 tiles=1568x1 splits=1 blocks=132 workspace=0: 128x256")
    tf32 = dataclasses.replace(case, dtype=torch.float32)
    text = emulator.plan_text(emulator.wide_plan("grad_input", tf32, sms=132))
    workspace = 4 * (64 * 56 * 56 * 256 + 9 * 256 * 256)  # the gradient before the pool, the copy of the filters
    assert text.startswith(f"wgmma tile=m128n256 box=8x8x2 tiles=1568x1 splits=1 blocks=132 workspace={workspace}: ")
    assert texts[1].startswith("wgmma tile=m128n128 box=8x8x1 tiles=2x6 splits=11 blocks=132 workspace=")
