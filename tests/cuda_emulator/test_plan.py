"""`choose_plan` is a pure function of sizes and device: what it promises, without running a kernel."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator_harness import H100, KERNELS, TILES, TINY_GPU, Case, Emulator, Problem

VGG16 = [
    (3, 64, 224, False),
    (64, 64, 224, True),
    (64, 128, 112, False),
    (128, 128, 112, True),
    (128, 256, 56, False),
    (256, 256, 56, True),
    (256, 512, 28, False),
    (512, 512, 28, True),
    (512, 512, 14, True),
]
TILE_NAMES = {number: name for name, number in TILES.items()}


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize(("c", "k", "size", "pool"), VGG16)
def test_every_vgg_layer_has_a_kernel(emulator: Emulator, batch: int, c: int, k: int, size: int, pool: bool) -> None:
    problem = Case(batch, size, size, c, k, pool=pool).problem
    plan = emulator.plan("forward", problem)
    assert KERNELS[plan.kernel] == ("first_layer" if c == 3 else "implicit_gemm")
    rows, columns = (64, 64) if c == 3 else map(int, TILE_NAMES[plan.tile][1:].split("n"))
    assert (plan.tiles_m - 1) * rows < batch * size * size <= plan.tiles_m * rows
    assert (plan.tiles_n - 1) * columns < k <= plan.tiles_n * columns
    if c == 3:
        return
    assert KERNELS[emulator.plan("grad_input", problem).kernel] == "implicit_gemm"
    weight_plan = emulator.plan("grad_weight", problem)
    assert KERNELS[weight_plan.kernel] == "implicit_gemm"
    assert weight_plan.workspace_bytes == weight_plan.splits * (9 * c * k + k) * 4 <= 32 << 20
    assert weight_plan.tiles_m * weight_plan.tiles_n * weight_plan.splits >= min(132, batch * size * size // 256)


def test_large_layers_use_large_tiles(emulator: Emulator) -> None:
    """A batch of 64 fills 132 SMs many times over: 64x64 per warp everywhere, 256 rows where there are 64 columns."""
    for c, k, size, pool in VGG16[1:]:
        plan = emulator.plan("forward", Case(64, size, size, c, k, pool=pool).problem)
        assert TILE_NAMES[plan.tile] == ("m256n64" if k == 64 else "m128n128") or size == 14
    small = emulator.plan("forward", Case(1, 14, 14, 512, 512).problem)
    assert TILE_NAMES[small.tile] == "m64n64"


REFUSED = {
    "capability": (Case(1, 8, 8, 64, 64).problem, (108, 75), "capability 8.0"),
    "empty batch": (Case(0, 8, 8, 64, 64).problem, H100, "no output"),
    "pool of one row": (Case(1, 1, 8, 64, 64, pool=True).problem, H100, "no output"),
    "output channels": (Case(1, 8, 8, 64, 60).problem, H100, "output channels"),
    "input channels": (Case(1, 8, 8, 60, 64).problem, H100, "input channels"),
    "four input channels": (Case(1, 8, 8, 4, 64).problem, H100, "input channels"),
    "pixels": (Case(1 << 16, 256, 256, 8, 8).problem, H100, "pixels"),
    "weight": (Case(1, 8, 8, 1 << 14, 1 << 14).problem, H100, "weight"),
    "one very wide row": (Case(1, 1, 1 << 22, 512, 8).problem, H100, "tile"),
    "one very wide row of outputs": (Case(1, 1, 1 << 22, 8, 512).problem, H100, "tile"),
}


@pytest.mark.parametrize(("problem", "device", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_goes_to_aten_and_says_why(
    emulator: Emulator, problem: Problem, device: tuple[int, int], reason: str
) -> None:
    plan = emulator.plan("forward", problem, device)
    assert KERNELS[plan.kernel] == "aten"
    assert reason in plan.reason.decode()
    assert emulator.plan_text(plan) == f"aten: {plan.reason.decode()}"


def test_pixels_end_a_tile_before_2_31(emulator: Emulator) -> None:
    """Kernels count pixels, and pools, up to a tile past the last."""
    for step in ("forward", "grad_input", "grad_weight"):
        plans = [emulator.plan(step, Case(2**31 - 1024 - less, 1, 1, 8, 8).problem) for less in (1, 0)]
        assert [KERNELS[plan.kernel] for plan in plans] == ["implicit_gemm", "aten"]


def test_first_layer_has_no_backward_kernel(emulator: Emulator) -> None:
    problem = Case(1, 8, 8, 3, 64).problem
    assert {KERNELS[emulator.plan(step, problem).kernel] for step in ("grad_input", "grad_weight")} == {"aten"}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(2, 8, 8, 40, 40, pool=True), ""),
        (Case(2, 8, 8, 1 << 15, 1 << 15, pool=True), ""),  # no weight that could be too large
        (Case(2, 8, 8, 36, 36, pool=True), "channels are not a multiple of 16 bytes"),
        (Case(2, 1, 8, 40, 40, pool=True), "no output"),
        (Case(1 << 16, 256, 256, 8, 8, pool=True), "pixels"),
    ],
)
def test_pools_of_their_own(emulator: Emulator, case: Case, reason: str) -> None:
    plan = emulator.plan("max_pool", case.problem)
    assert KERNELS[plan.kernel] == ("aten" if reason else "pointwise")
    assert reason in plan.reason.decode()


def test_fp32_counts_channels_in_fours(emulator: Emulator) -> None:
    plans = [
        emulator.plan("forward", Case(1, 8, 8, 12, 20, dtype).problem) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert [KERNELS[plan.kernel] for plan in plans] == ["implicit_gemm", "aten"]


def test_plans_print_and_repeat(emulator: Emulator) -> None:
    problem = Case(8, 56, 56, 128, 256).problem
    texts = {emulator.plan_text(emulator.plan("forward", problem)) for _ in range(3)}
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith("implicit_gemm tile=m128n128 grid=196x2x1 workspace=0: ")
    assert emulator.plan_text(emulator.plan("grad_weight", problem, TINY_GPU)).startswith(
        "implicit_gemm tile=m128n128 grid=2x9x"
    )
