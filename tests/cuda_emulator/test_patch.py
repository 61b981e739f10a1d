"""The sm_90 kernels that read all nine taps from one patch, on the emulator: every tile and box over ragged sizes, and every plan
that VGG's layers get."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cuda_emulator_harness import H100, KERNELS, WIDE_TILES, Case, Emulator
from cuda_reference import convolve, make_inputs, make_saved
from test_sm90 import BATCHES, DTYPES, LAYERS, Box, Planned, check_forward, check_grad_input, check_planned_sizes, name

TILES = ("m256n64", "m256n128", "m128n128")
CHECKS = {"forward": check_forward, "grad_input": check_grad_input}
CASES = [
    Case(1, 3, 5, 8, 8),  # one tile, mostly outside the image
    Case(2, 11, 9, 72, 136, relu=False),  # two blocks of the reduction, the last ragged; ragged column tiles
    Case(3, 9, 17, 64, 64, pool=True),  # filters that stay, over several tiles; odd image
    Case(5, 8, 10, 136, 40),  # three blocks, which both rings go round
    Case(
        1, 9, 10, 136, 40
    ),  # three blocks in two splits: with what ReLU let through, two parts of grad_input's workspace
]


def boxes(tile: str) -> list[Box]:
    """Every box of the tile's rows: of one image, of two, ..."""
    lines = int(tile[1:].split("n")[0]) // 8
    return [(8, h, lines // h) for h in (32, 16, 8) if h <= lines]


COMBINATIONS = [(tile, box) for tile in TILES for box in boxes(tile)]


@pytest.mark.parametrize("step", CHECKS)
@pytest.mark.parametrize(("tile", "box"), COMBINATIONS, ids=str)
def test_every_tile_and_box(emulator: Emulator, step: str, tile: str, box: Box) -> None:
    for number, case in enumerate(CASES):
        if step == "grad_input":
            case = dataclasses.replace(case, c=case.k, k=case.c)
        case = dataclasses.replace(case, dtype=DTYPES[(number + box[2]) % 2])
        CHECKS[step](emulator, case, tile, box, splits=1 + number % 3, patch=True)


def test_vgg_gets_plans_with_patches(emulator: Emulator) -> None:
    """At batch 256 every layer of 56 pixels and more: what the boxes of one tap fetch nine times."""
    for c, k, size in LAYERS:
        for step in CHECKS:
            plan = emulator.patch_plan(step, Case(256, size, size, c, k), sms=132)
            assert KERNELS[plan.kernel] == "wgmma_patch"
            columns = k if step == "forward" else c
            assert WIDE_TILES[plan.wide_tile] == ("m256n64" if columns == 64 else "m256n128")
            assert plan.box_w == 8
            assert plan.tiles_m * plan.box_h * plan.box_n * 8 >= 256 * size * size
            assert plan.blocks <= 132


def test_64_pixels_in_order_are_of_one_image(emulator: Emulator) -> None:
    """A descriptor counts lines of one patch: low images leave lines idle, whatever their number."""
    for size in range(1, 12):
        for step in CHECKS:
            plan = emulator.patch_plan(step, Case(64, size, size, 64, 64), sms=132)
            assert plan.box_h % 8 == 0


@pytest.mark.parametrize("step", CHECKS)
def test_every_plan_of_vgg(emulator: Emulator, step: str) -> None:
    """On one or two small tiles a block, with the channels that make so many splits."""
    plans: dict[tuple[Planned, bool, torch.dtype], Case] = {}
    for batch, (c, k, size), pool in itertools.product(BATCHES[::-1], LAYERS, (False, True)):
        case = Case(batch, size, size, c, k, pool=pool)
        planned = Planned.of(emulator.patch_plan(step, case, sms=132))
        for dtype in DTYPES:
            plans.setdefault((planned, pool and step == "forward", dtype), dataclasses.replace(case, dtype=dtype))
    assert len(plans) > 10
    for number, ((planned, _, _), whole) in enumerate(plans.items()):
        columns = int(planned.tile.split("n")[1])
        deep, wide = 64 * max(1, planned.splits) - 8, min(whole.k if step == "forward" else whole.c, columns + 8)
        c, k = (deep, wide) if step == "forward" else (wide, deep)
        n, h = max(1, planned.box[2] - 1), min(planned.box[1], 10)
        case = dataclasses.replace(whole, n=n, h=h, w=9, c=c, k=k, relu=number % 2 == 0)
        plan = emulator.wide_plan_like(step, case, planned.tile, planned.box, splits=planned.splits, patch=True)
        assert Planned.of(plan) == planned
        try:
            CHECKS[step](emulator, case, planned.tile, planned.box, splits=planned.splits, patch=True)
        except Exception as error:
            raise AssertionError(f"{step}, {planned}, {name(case)}: {error}") from error


@pytest.mark.parametrize("step", CHECKS)
def test_grids_and_workspaces_are_those_that_the_tests_run_with(emulator: Emulator, step: str) -> None:
    check_planned_sizes(emulator, step, torch.bfloat16, patch=True)


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_filters_are_brought_once_where_they_stay(emulator: Emulator, seed: int) -> None:
    """64 channels in, 64 out: nine boxes of filters a block, and a patch a tile. The result does not depend on the schedule."""
    case = Case(3, 20, 18, 64, 64)
    x, weight, bias = make_inputs(case)

    def run(seed: int) -> torch.Tensor:
        plan = emulator.wide_plan_like("forward", case, "m256n64", (8, 32, 1), patch=True)
        assert (plan.tiles_m, plan.blocks) == (9, 2)
        result, _ = emulator.forward(case, x, weight, bias, plan=plan, seed=seed)
        return result

    results = run(1), run(seed)
    assert emulator.statistics().tma_boxes == 2 * 9 + 9
    assert torch.equal(*results)


def test_patches_and_boxes_of_one_tap_give_equal_bits(emulator: Emulator) -> None:
    """The reduction runs over the taps of 64 channels in the same order."""
    case = Case(2, 12, 10, 72, 72)
    x, weight, bias = make_inputs(case)
    saved = make_saved(case)
    found = []
    for patch in (False, True):
        forward, backward = (
            emulator.wide_plan_like(step, case, "m128n128", (8, 16, 1), patch=patch) for step in CHECKS
        )
        y, _ = emulator.forward(case, x, weight, bias, plan=forward)
        found.append((y, emulator.grad_input(case, saved, weight, plan=backward)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_infinities_stay_where_they_are_read(emulator: Emulator) -> None:
    """What a patch has beyond the image is zero, also between the images of one box."""
    case = Case(4, 8, 8, 8, 8, relu=False)
    x, weight, bias = make_inputs(case)
    x[1] = torch.inf
    plan = emulator.wide_plan_like("forward", case, "m256n64", (8, 8, 4), patch=True)
    y, _ = emulator.forward(case, x, weight, bias, plan=plan)
    exact = convolve(x, weight, bias, False, torch.float64)
    assert torch.equal(y.isfinite(), exact.isfinite())
    assert bool(y[[0, 2, 3]].isfinite().all())


def test_what_has_no_patch(emulator: Emulator) -> None:
    plan = emulator.patch_plan("grad_weight", Case(1, 8, 8, 64, 64), sms=132)
    assert KERNELS[plan.kernel] == "aten"
    assert b"shares its stages" in plan.reason
    tf32 = emulator.patch_plan("forward", Case(1, 8, 8, 64, 64, torch.float32), sms=132)
    assert KERNELS[tf32.kernel] == "aten"
    assert b"16-bit" in tf32.reason
    assert KERNELS[emulator.patch_plan("forward", Case(1, 8, 8, 3, 64), sms=132).kernel] == "aten"


def test_plans_print(emulator: Emulator) -> None:
    text = emulator.plan_text(emulator.patch_plan("forward", Case(64, 224, 224, 64, 64, pool=True), sms=H100[0]))
    assert text == (
        "wgmma_patch tile=m256n64 box=8x32x1 tiles=12544x1 splits=1 blocks=132 workspace=0: "
        "a patch serves nine taps, and the filters of all of them stay"
    )
