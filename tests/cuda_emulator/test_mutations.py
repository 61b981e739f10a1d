"""Would the tests notice? Each mutation puts one bug into a copy of the kernels, and the named check must then fail.

The checks are small versions of this folder's tests; every one of them passes on the kernels as they are.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from cuda_emulator_harness import (
    CSRC,
    JOBS,
    KERNEL_FLAGS,
    Case,
    Emulator,
    EmulatorError,
    build_runtime,
    compile_object,
    link,
)
from cuda_reference import (
    assert_close,
    convolution_gradients,
    convolve,
    grad_preact,
    make_inputs,
    make_saved,
    pack_argmax,
    pool_in_torch_order,
    torch_like,
    torch_like_gradients,
)
from test_large import test_forward_far_end as check_forward_far_end
from test_torch_semantics import test_nan_goes_through_relu_and_pool as check_nan
from test_torch_semantics import test_pool_compares_after_rounding as check_rounding
from test_torch_semantics import test_ties_take_the_first_maximum as check_ties

BF16 = torch.bfloat16
RAGGED = Case(2, 5, 7, 40, 72)
POOLED = Case(2, 7, 9, 24, 40, pool=True)

# One instantiation of each kernel: compiles in about two seconds.
ONE_TILE = """
#include "cuda/sm80/{header}.cuh"
#include "cuda/sm80/launch.h"
namespace vggfast::cuda::sm80 {{
{functions}
}}
"""
POINTERS = {"forward": "Forward", "first_layer": "Forward", "grad_input": "GradInput", "grad_weight": "GradWeight"}


def one_tile_source(kernel: str) -> str:
    tile = "" if kernel == "first_layer" else ", TileId::m64n64"
    arguments = f"const Problem& p, const Plan& plan, const {POINTERS[kernel]}Pointers& pointers, cudaStream_t stream"
    body = f"launch_{kernel}<BFloat16{tile}>(p, plan, pointers, stream);"
    return ONE_TILE.format(header=kernel, functions=f"void {kernel}({arguments}) {{ {body} }}")


def check_forward(emulator: Emulator) -> None:
    # 40 channels are two ragged blocks of the reduction, 24 one: the loop then ends on the stage that the epilogue reuses.
    for case in (RAGGED, Case(1, 6, 8, 24, 16)):
        x, weight, bias = make_inputs(case)
        y, _ = emulator.forward(case, x, weight, bias, tile="m64n64")
        exact = convolve(x, weight, bias, case.relu, torch.float64)
        assert_close(y, exact, torch_like(x, weight, bias, case.relu, case.dtype))
        assert emulator.statistics().ldmatrix_conflicts == 0


def check_pool(emulator: Emulator) -> None:
    x, weight, bias = make_inputs(POOLED)
    y, argmax = emulator.forward(POOLED, x, weight, bias, tile="m64n64")
    unpooled = emulator.forward(dataclasses.replace(POOLED, pool=False), x, weight, bias, tile="m64n64")[0]
    values, position = pool_in_torch_order(unpooled)
    assert torch.equal(y, values)
    assert torch.equal(argmax, pack_argmax(position))


def check_pool_ties(emulator: Emulator) -> None:
    check_ties(emulator, "m64n64", BF16, True)


def check_pool_rounding(emulator: Emulator) -> None:
    check_rounding(emulator, "m64n64")


def check_pool_nan(emulator: Emulator) -> None:
    check_nan(emulator, BF16, True)


def check_first_layer(emulator: Emulator) -> None:
    case = Case(2, 9, 21, 3, 72)
    x, weight, bias = make_inputs(case)
    y, _ = emulator.forward(case, x, weight, bias)
    exact = convolve(x, weight, bias, case.relu, torch.float64)
    assert_close(y, exact, torch_like(x, weight, bias, case.relu, BF16))


def check_grad_input(emulator: Emulator) -> None:
    for case in (POOLED, dataclasses.replace(RAGGED, relu=False)):
        x, weight, _ = make_inputs(case)
        saved = make_saved(case)
        ours = emulator.grad_input(case, saved, weight, tile="m64n64")
        grad = grad_preact(case, saved)
        exact = convolution_gradients(grad, x, weight, torch.float64)[0]
        assert_close(ours, exact, torch_like_gradients(grad, x, weight, BF16)[0])


def check_grad_weight(emulator: Emulator) -> None:
    for case in (RAGGED, POOLED):
        x, weight, _ = make_inputs(case)
        saved = make_saved(case)
        ours, ours_bias = emulator.grad_weight(case, saved, x, tile="m64n64", splits=2)
        grad = grad_preact(case, saved)
        exact = convolution_gradients(grad, x, weight, torch.float64)
        theirs = torch_like_gradients(grad, x, weight, BF16)
        assert_close(ours, exact[1], theirs[1])
        assert_close(ours_bias, exact[2], theirs[2])


@dataclasses.dataclass
class Mutation:
    """``old`` becomes ``new`` in ``file``; ``check`` of ``kernel`` then fails."""

    kernel: str
    file: str
    old: str
    new: str
    check: Callable[[Emulator], None]


FORWARD, EPILOGUE, PIXELS, LOOP = "sm80/forward.cuh", "epilogue.cuh", "sm80/pixel_loader.cuh", "sm80/mainloop.cuh"
GRAD_INPUT, GRAD_WEIGHT, SOURCE, TILE = "sm80/grad_input.cuh", "sm80/grad_weight.cuh", "grad_source.cuh", "tile.cuh"
BARRIER = "    __syncthreads();\n    const bool more"
MUTATIONS = {
    "index: taps one column off": Mutation("forward", PIXELS, "tap % 3 - 1; }", "tap % 3; }", check_forward),
    "index: pools two rows high overlap": Mutation(
        "forward", TILE, "return row / 16 * 4 + row % 8 / 2;", "return row / 16 * 2 + row % 8 / 2;", check_forward
    ),
    "mask: right padding read from the next row": Mutation(
        "forward", TILE, "source_w < grid.source_w;", "source_w <= grid.source_w;", check_forward
    ),
    "mask: ragged input channels": Mutation(
        "forward", PIXELS, "at.channel + column() < channels_;", "true;", check_forward
    ),
    "mask: ragged output channels": Mutation(
        "forward", FORWARD, "inside && i * kRowStep < rows_left_;", "inside;", check_forward
    ),
    "mask: pools past the last": Mutation(
        "forward", EPILOGUE, "return first_pool + row < pools ? ", "return first_pool + row < pools + 1 ? ", check_pool
    ),
    "swizzle: written otherwise than read": Mutation(
        "forward",
        PIXELS,
        "swizzle<kStageRowBytes>(row() + i * kRowStep, chunk())",
        "swizzle<kStageRowBytes>(row() + i * kRowStep, chunk() ^ 1)",
        check_forward,
    ),
    "swizzle: none, so ldmatrix conflicts": Mutation(
        "forward", TILE, "((chunk ^ (row >> 1)) & 3)", "(chunk & 3)", check_forward
    ),
    "barrier: none in the main loop": Mutation("forward", LOOP, BARRIER, "    const bool more", check_forward),
    "barrier: none before the finished tile is stored": Mutation(
        "forward", EPILOGUE, "    Gemm::barrier();\n    if (!epilogue_.pool)", "    if (!epilogue_.pool)", check_forward
    ),
    "barrier: none between main loop and epilogue": Mutation(
        "forward", LOOP, "  ptx::cp_async_wait<0>();\n  __syncthreads();", "  ptx::cp_async_wait<0>();", check_forward
    ),
    "wait: one group too few": Mutation(
        "forward", LOOP, "cp_async_wait<stages - 2>", "cp_async_wait<stages - 1>", check_forward
    ),
    "pipeline: refills a stage still in use": Mutation(
        "forward", LOOP, "write = stages - 1;", "write = stages - 2;", check_forward
    ),
    "commit: only when there is more to fetch": Mutation(
        "forward",
        LOOP,
        "    ptx::cp_async_commit();\n    Gemm",
        "    if (more) ptx::cp_async_commit();\n    Gemm",
        check_forward,
    ),
    "tie order: the last maximum wins": Mutation(
        "forward", EPILOGUE, "candidate > value ||", "candidate >= value ||", check_pool_ties
    ),
    "NaN: the pool drops it": Mutation("forward", EPILOGUE, " || candidate != candidate", "", check_pool_nan),
    "NaN: ReLU drops it": Mutation(
        "forward", EPILOGUE, "value <= 0.0f ? 0.0f : value", "value > 0.0f ? value : 0.0f", check_pool_nan
    ),
    "rounding: the pool compares fp32 sums": Mutation(
        "forward", EPILOGUE, "= Element::load(Element::round(value));", "= value;", check_pool_rounding
    ),
    "tie order: columns before rows": Mutation(
        "forward",
        EPILOGUE,
        "best.take(odd ? mine[0] : theirs[0], 1);\n        best.take(odd ? theirs[1] : mine[1], 2);",
        "best.take(odd ? theirs[1] : mine[1], 2);\n        best.take(odd ? mine[0] : theirs[0], 1);",
        check_pool_ties,
    ),
    "argmax: channels of a byte shuffled": Mutation(
        "forward", EPILOGUE, "(pair_column + odd) % 4", "(pair_column + 1 - odd) % 4", check_pool
    ),
    "overflow: 32-bit offset of the tile": Mutation(
        "forward",
        FORWARD,
        "int64_t{pixel} * params.c",
        "static_cast<int>(static_cast<unsigned>(pixel) * params.c)",
        check_forward_far_end,
    ),
    "first layer: weights of another tap": Mutation(
        "first_layer",
        "sm80/first_layer.cuh",
        "(tap % 3 - 1) * params.stride_w",
        "(1 - tap % 3) * params.stride_w",
        check_first_layer,
    ),
    "first layer: tile overwritten while it is stored": Mutation(
        "first_layer",
        "sm80/first_layer.cuh",
        "    __syncthreads(); // the tile before is stored",
        "    // ",
        check_first_layer,
    ),
    "grad mask: zeros let the gradient through": Mutation(
        "grad_input", SOURCE, "<= 0.0f;", "< 0.0f;", check_grad_input
    ),
    "grad mask: NaN stops the gradient": Mutation(
        "grad_input",
        SOURCE,
        "Element::load(y_.elements[e]) <= 0.0f",
        "!(Element::load(y_.elements[e]) > 0.0f)",
        check_grad_input,
    ),
    "pool scatter: rows and columns exchanged": Mutation(
        "grad_input", GRAD_INPUT, "(dh & 1) * 2 + (dw & 1)", "(dw & 1) * 2 + (dh & 1)", check_grad_input
    ),
    "grad_input: taps not mirrored": Mutation("grad_input", GRAD_INPUT, "8 - at.tap", "at.tap", check_grad_input),
    "grad_input: gradient of another row": Mutation(
        "grad_input", GRAD_INPUT, "dh >>= 1;", "dh /= 2;", check_grad_input
    ),
    "grad_weight: splits overlap": Mutation(
        "grad_weight",
        GRAD_WEIGHT,
        "first_stage = split * params.stages_per_split",
        "first_stage = split * (params.stages_per_split - 1)",
        check_grad_weight,
    ),
    "grad_weight: pixels past the last": Mutation(
        "grad_weight",
        GRAD_WEIGHT,
        "bool valid = pixel < params_.pixels && channel_ < params_.k;",
        "bool valid = channel_ < params_.k;",
        check_grad_weight,
    ),
    "grad_weight: the reduction skips a split": Mutation(
        "grad_weight", GRAD_WEIGHT, "for (int split = 0;", "for (int split = 1;", check_grad_weight
    ),
    "grad_bias: summed before everyone wrote": Mutation(
        "grad_weight",
        GRAD_WEIGHT,
        "    __syncthreads();\n    const int first_channel",
        "    const int first_channel",
        check_grad_weight,
    ),
}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    return build_runtime(tmp_path_factory.mktemp("runtime"))


def build_one_tile(csrc: pathlib.Path, folder: pathlib.Path, kernel: str, runtime: list[pathlib.Path]) -> Emulator:
    """``kernel`` in one instantiation, from the sources under ``csrc``."""
    source = folder / f"{kernel}.cpp"
    source.write_text(one_tile_source(kernel))
    compile_object(source, folder / f"{kernel}.o", csrc, KERNEL_FLAGS)
    return link([*runtime, folder / f"{kernel}.o"], folder / f"{kernel}.so", only_some_kernels=True)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory, runtime: list[pathlib.Path]) -> dict[str, Emulator]:
    folder = tmp_path_factory.mktemp("unchanged")
    return {kernel: build_one_tile(CSRC, folder, kernel, runtime) for kernel in POINTERS}


CHECKS = sorted({(mutation.kernel, mutation.check) for mutation in MUTATIONS.values()}, key=lambda c: c[1].__name__)


@pytest.mark.parametrize(("kernel", "check"), CHECKS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_checks_pass_on_the_kernels_as_they_are(
    unchanged: dict[str, Emulator], kernel: str, check: Callable[[Emulator], None]
) -> None:
    check(unchanged[kernel])


def build_mutant(mutation: Mutation, folder: pathlib.Path, runtime: list[pathlib.Path]) -> Emulator:
    shutil.copytree(CSRC / "cuda", folder / "csrc" / "cuda")
    file = folder / "csrc" / "cuda" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file} has {text.count(mutation.old)} of {mutation.old!r}, not one"
    file.write_text(text.replace(mutation.old, mutation.new))
    return build_one_tile(folder / "csrc", folder, mutation.kernel, runtime)


@pytest.fixture(scope="module")
def mutants(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, runtime: list[pathlib.Path]
) -> Iterator[dict[str, Future[Emulator]]]:
    """Every mutation that is asked for, being built JOBS at a time while the tests before it run."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    names = [call.params["name"] for call in parameters if call is not None and "name" in call.params]
    with ThreadPoolExecutor(JOBS) as pool:
        yield {
            name: pool.submit(build_mutant, MUTATIONS[name], tmp_path_factory.mktemp("mutant"), runtime)
            for name in names
            if name in MUTATIONS
        }


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(mutants: dict[str, Future[Emulator]], name: str) -> None:
    mutant = mutants[name].result()
    with pytest.raises((EmulatorError, AssertionError)):
        MUTATIONS[name].check(mutant)


def test_the_page_lists_every_mutation_with_its_test() -> None:
    page = (CSRC.parent / "docs" / "emulator.md").read_text()
    for name, mutation in MUTATIONS.items():
        check = mutation.check.__name__.removeprefix("check_")
        assert f"| {mutation.kernel} | {name} | `{check}` |" in page
