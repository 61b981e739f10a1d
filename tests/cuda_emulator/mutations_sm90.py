"""Bugs for copies of the sm_90 kernels, and the small versions of test_sm90's checks that must then fail."""

from __future__ import annotations

import torch
from cuda_emulator_harness import Case, Emulator
from test_sm90 import check_forward as forward_of
from test_sm90 import check_grad_input as grad_input_of
from test_sm90 import check_grad_weight as grad_weight_of
from test_sm90 import check_rounded_forward
from test_sm90 import test_infinities_at_the_edge_reach_only_the_taps_that_read_them as check_infinities


def check_forward(emulator: Emulator) -> None:
    # Two tiles a block, so that the second finds the ring where the first left it; ragged on every side.
    forward_of(emulator, Case(2, 9, 10, 72, 136), "m128n128", (8, 4, 4), sms=3)


def check_splits(emulator: Emulator) -> None:
    forward_of(emulator, Case(1, 9, 10, 72, 136), "m128n128", (8, 4, 4), splits=4)


def check_pool(emulator: Emulator) -> None:
    forward_of(emulator, Case(2, 11, 18, 24, 40, pool=True), "m128n128", (8, 4, 4), sms=2)


def check_grad_input(emulator: Emulator) -> None:
    grad_input_of(emulator, Case(2, 7, 9, 136, 72, pool=True), "m128n128", (4, 8, 4))


def check_grad_weight(emulator: Emulator) -> None:
    # Nine stages a block: the ring goes round.
    for seed in (1, 2, 3):
        grad_weight_of(emulator, Case(9, 7, 9, 40, 40), "m64n64", (4, 4, 4), splits=2, seed=seed)


def check_patch(emulator: Emulator) -> None:
    # Three blocks of the reduction and several tiles a block: both rings go round. Two images a box, the last box not full.
    for seed in (1, 2):
        forward_of(emulator, Case(3, 17, 9, 136, 40), "m256n64", (8, 16, 2), sms=2, seed=seed, patch=True)


def check_patch_that_stays(emulator: Emulator) -> None:
    for seed in (1, 2):
        forward_of(emulator, Case(1, 33, 18, 40, 40), "m256n64", (8, 32, 1), sms=1, seed=seed, patch=True)


def check_patch_splits(emulator: Emulator) -> None:
    forward_of(emulator, Case(1, 9, 10, 136, 40), "m256n64", (8, 32, 1), splits=3, patch=True)


def check_rounding(emulator: Emulator) -> None:
    check_rounded_forward(emulator, "m128n128")


def check_tf32(emulator: Emulator) -> None:
    # Three blocks of the reduction, two tiles of columns.
    forward_of(emulator, Case(2, 9, 10, 72, 136, torch.float32), "m128n128", (8, 4, 4), sms=3)


def check_tf32_splits(emulator: Emulator) -> None:
    forward_of(emulator, Case(1, 9, 10, 72, 136, torch.float32), "m128n128", (8, 4, 4), splits=4)


def check_tf32_grad_input(emulator: Emulator) -> None:
    # Two tiles of the filters' copy each way, both ragged.
    grad_input_of(emulator, Case(2, 7, 9, 40, 72, torch.float32, pool=True), "m128n128", (4, 8, 4))


GEMM, SHARED, PIPELINE, WEIGHT = "implicit_gemm.cuh", "consumers.cuh", "pipeline.cuh", "grad_weight.cuh"
PATCH, MAP, MIRROR = "patch_gemm.cuh", "tensor_map.h", "mirror_filters.cuh"
# Kernel as test_mutations_sm90 names them, file, what is there, what is put there, and the check.
MUTATIONS = {
    "index: taps one column off": ("forward", GEMM, "tap % 3 - 1,", "tap % 3,", check_forward),
    "index: channel tiles and boxes exchanged": (
        "forward",
        GEMM,
        "index - box * tiles_channels.divisor()",
        "box - index * tiles_channels.divisor()",
        check_forward,
    ),
    "index: images of a box one too far": ("forward", GEMM, "at.n + image,", "at.n + image + 1,", check_forward),
    "mask: pixels past the last row": (
        "forward",
        GEMM,
        "p.n < grid.n && p.h < grid.h && p.w < grid.w ? (int64_t{p.n} * grid.h + p.h)",
        "p.n < grid.n && p.w < grid.w ? (int64_t{p.n} * grid.h + p.h)",
        check_forward,
    ),
    "pool: first pixels of pools": (
        "forward",
        GEMM,
        "row / 4 * 16 + row % 4 * 2",
        "row / 4 * 16 + row % 4",
        check_pool,
    ),
    "wait: the stage is not waited for": (
        "forward",
        SHARED,
        "    wait_phase(barriers.full[at.stage], at.parity);\n",
        "",
        check_forward,
    ),
    "parity: never flips": ("forward", PIPELINE, "parity ^= 1u;", "", check_forward),
    "parity: the producer waits for the wrong phase": (
        "forward",
        GEMM,
        "at.parity ^ 1u);",
        "at.parity);",
        check_forward,
    ),
    "release: the stage just read, not the one before": (
        "forward",
        SHARED,
        "      release(barriers.empty[before]);\n    }\n    before",
        "      release(barriers.empty[at.stage]);\n    }\n    before",
        check_forward,
    ),
    "release: before the products are done": (
        "forward",
        SHARED,
        "ptx::wgmma_wait<1>();",
        "ptx::wgmma_wait<2>();",
        check_forward,
    ),
    "release: the last stage of a tile is kept": (
        "forward",
        SHARED,
        "  ptx::wgmma_wait<0>();\n  release(barriers.empty[before]);",
        "  ptx::wgmma_wait<0>();",
        check_forward,
    ),
    "products: read before they are done": (
        "forward",
        SHARED,
        "  ptx::wgmma_wait<0>();\n  release",
        "  release",
        check_forward,
    ),
    "fence: none before the products": ("forward", GEMM, "    ptx::wgmma_fence();\n", "", check_forward),
    "bytes: fewer than a stage": ("forward", GEMM, "sizeof(Stage));", "sizeof(Stage) - 128);", check_forward),
    "barriers: one warp too many": (
        "forward",
        SHARED,
        "shared.barriers.init(kConsumerWarps);",
        "shared.barriers.init(kConsumerWarps + 1);",
        check_forward,
    ),
    "barriers: invisible to the copy engine": (
        "forward",
        PIPELINE,
        "    ptx::fence_barrier_init();\n",
        "",
        check_forward,
    ),
    "registers: more than there are": (
        "forward",
        SHARED,
        "ptx::setmaxnreg_inc<kConsumerRegisters>",
        "ptx::setmaxnreg_inc<kConsumerRegisters + 8>",
        check_forward,
    ),
    "descriptor: rows of the next step": (
        "forward",
        PIPELINE,
        "kRowStep = 32 >> 4",
        "kRowStep = 64 >> 4",
        check_forward,
    ),
    "descriptor: pattern stride": (
        "forward",
        PIPELINE,
        "swizzled_descriptor(tile, 16, kPatternBytes)",
        "swizzled_descriptor(tile, 16, 2 * kPatternBytes)",
        check_forward,
    ),
    "staging: overwritten while it is stored": (
        "forward",
        GEMM,
        "        group_barrier(); // what",
        "        // what",
        check_forward,
    ),
    "splits: overlap": (
        "forward",
        GEMM,
        "first_stage = split * per_split;",
        "first_stage = split * (per_split - 1);",
        check_splits,
    ),
    "splits: slabs of the warpgroups exchanged": (
        "forward",
        GEMM,
        "group * (slabs / kConsumers)",
        "(1 - group) * (slabs / kConsumers)",
        check_splits,
    ),
    "splits: the second pass skips one": (
        "forward",
        "finish_splits.cuh",
        "int split = 0;",
        "int split = 1;",
        check_splits,
    ),
    "filters: taps not mirrored": ("grad_input", GEMM, "8 - tap, reduced", "tap, reduced", check_grad_input),
    "descriptor: blocks of 64 columns": (
        "grad_input",
        PIPELINE,
        "swizzled_descriptor(tile, block_bytes, kPatternBytes)",
        "swizzled_descriptor(tile, kPatternBytes, block_bytes)",
        check_grad_input,
    ),
    "descriptor: 16 rows a step": (
        "grad_input",
        PIPELINE,
        "kColumnStep = 16 * 128 >> 4",
        "kColumnStep = 8 * 128 >> 4",
        check_grad_input,
    ),
    "tf32: cut off by the tensor cores": (
        "forward tf32",
        MAP,
        ": CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;",
        ": CU_TENSOR_MAP_DATA_TYPE_FLOAT32;",
        check_rounding,
    ),
    "tf32: strides of 16-bit elements": (
        "forward tf32",
        MAP,
        "static_cast<cuuint64_t>(element_bytes(dtype))",
        "2",
        check_tf32,
    ),
    "tf32: columns of 16-bit slabs": (
        "forward tf32",
        GEMM,
        "kN + part * Part::kColumns",
        "kN + part * 64",
        check_tf32,
    ),
    "tf32: columns of 16-bit slabs in the second pass": (
        "forward tf32",
        "finish_splits.cuh",
        "slab % parts * Part::kColumns",
        "slab % parts * 64",
        check_tf32_splits,
    ),
    "tf32: the filters' copy over the gradient": (
        "grad_input tf32",
        "grad_input.cuh",
        "static_cast<unsigned char*>(preact) + plan_detail::grad_preact_bytes(p)",
        "preact",
        check_tf32_grad_input,
    ),
    "tf32: taps of the copy not mirrored": (
        "grad_input tf32",
        MIRROR,
        "(c * 9 + 8 - tap)",
        "(c * 9 + tap)",
        check_tf32_grad_input,
    ),
    "tf32: the copy is written before it is read": (
        "grad_input tf32",
        MIRROR,
        "  __syncthreads();\n",
        "",
        check_tf32_grad_input,
    ),
    "patch: lines without their halo": (
        "forward_patch",
        PATCH,
        "tap / 3 * kPatchWidth + tap % 3",
        "tap / 3 * 8 + tap % 3",
        check_patch,
    ),
    "patch: images without their halo": ("forward_patch", PATCH, "line + 2 * image", "line + image", check_patch),
    "patch: starts at the box": (
        "forward_patch",
        PATCH,
        "pixel.w - 1, pixel.h - 1",
        "pixel.w, pixel.h - 1",
        check_patch,
    ),
    "patch: bytes of the largest": (
        "forward_patch",
        PATCH,
        "patch_rows(params.grid.boxes.box) * kPixelBytes",
        "shape.most_rows() * kPixelBytes",
        check_patch,
    ),
    "patch: the next group of rows is a pattern further": (
        "forward_patch",
        PATCH,
        "kPixelBytes, 16, kPatchLineBytes)",
        "kPixelBytes, 16, kPatternBytes)",
        check_patch,
    ),
    "patch: the start of the matrix as base offset": (
        "forward_patch",
        PATCH,
        "16, kPatchLineBytes);",
        "16, kPatchLineBytes) | uint64_t{1} << 49;",
        check_patch,
    ),
    "patch: not waited for": (
        "forward_patch",
        PATCH,
        "    wait_phase(shared.barriers.patches.full[at.patch.stage], at.patch.parity);\n",
        "",
        check_patch,
    ),
    "patch: released while it is read": (
        "forward_patch",
        PATCH,
        "    at.patch_before = at.patch.stage;\n",
        "    release(shared.barriers.patches.empty[at.patch.stage]);\n",
        check_patch_that_stays,  # elsewhere the ring of filters holds the copy engine back
    ),
    "patch: kept": ("forward_patch", PATCH, "    at.patch_before = at.patch.stage;\n", "", check_patch),
    "patch: filters released while they are read": (
        "forward_patch",
        PATCH,
        "ptx::wgmma_wait<1>();",
        "ptx::wgmma_wait<2>();",
        check_patch,
    ),
    "patch: the tile is finished before its products": (
        "forward_patch",
        PATCH,
        "      ptx::wgmma_wait<0>();\n",
        "",
        check_patch,
    ),
    "patch: filters that stay are waited for again": (
        "forward_patch",
        PATCH,
        "stays ? 0u : at.filters.parity",
        "at.filters.parity",
        check_patch_that_stays,
    ),
    "patch: filters stay that are not all": (
        "forward_patch",
        PATCH,
        "filters_stay(kStages, params.stages,",
        "filters_stay(kStages, 1,",
        check_patch,
    ),
    "patch: splits begin at taps": (
        "forward_patch",
        PATCH,
        "(work.first_stage + i) * Tile::kDepth",
        "(work.first_stage + i) / 9 * Tile::kDepth",
        check_patch_splits,
    ),
    "grad_weight: taps of a row exchanged": (
        "grad_weight",
        WEIGHT,
        "pixel.w + tap - 1",
        "pixel.w + 1 - tap",
        check_grad_weight,
    ),
    "grad_weight: both warpgroups take the same pixels": (
        "grad_weight",
        WEIGHT,
        "kParts == 1 ? 0 : group * (kStageDepth / kParts)",
        "0 * group",
        check_grad_weight,
    ),
    "grad_weight: whole tensors under every tap": ("grad_weight", WEIGHT, "tap == 0 ? 0 : 1]", "1]", check_infinities),
    "grad_bias: the stage is released while it is read": (
        "grad_weight",
        WEIGHT,
        "        __syncwarp();",
        "        //",
        check_grad_weight,
    ),
    "grad_bias: summed before everyone wrote": (
        "grad_weight",
        WEIGHT,
        "    group_barrier();\n    if (thread <",
        "    if (thread <",
        check_grad_weight,
    ),
}
