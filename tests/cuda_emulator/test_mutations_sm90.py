"""Bugs put into copies of the sm_90 kernels, one each: small versions of test_sm90's checks must then fail."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import pytest
from cuda_emulator_harness import (
    CSRC,
    KERNEL_FLAGS,
    Emulator,
    EmulatorError,
    build_runtime,
    compile_object,
    link,
)
from mutations_sm90 import MUTATIONS

# One instantiation of each kernel, with what it calls of sm_80.
SOURCE = """
#include "cuda/sm80/grad_weight.cuh"
#include "cuda/sm80/pointwise.cuh"
#include "cuda/sm90/finish_splits.cu"
#include "cuda/sm90/{file}.cuh"
#include "cuda/sm90/launch.h"
namespace vggfast::cuda::sm90 {{
void {function}(const Problem& p, const Plan& plan, const {pointers}Pointers& pointers, cudaStream_t stream) {{
  launch_{function}<{element}, WideTile::{tile}>(p, plan, pointers, stream);
}}
}}
namespace vggfast::cuda::sm80 {{
void grad_preact(const Problem& p, const GradPreactPointers& pointers, cudaStream_t stream) {{
  launch_grad_preact<{element}>(p, pointers, stream);
}}
void reduce_splits(const Problem& p, int splits, const GradWeightPointers& pointers, cudaStream_t stream) {{
  launch_reduce_splits<{element}>(p, splits, pointers, stream);
}}
}}
"""
KERNELS = {  # file, pointers, element, tile; the function is the first word
    "forward": ("forward", "Forward", "BFloat16", "m128n128"),
    "forward tf32": ("forward", "Forward", "TFloat32", "m128n128"),
    "grad_input": ("grad_input", "GradInput", "BFloat16", "m128n128"),
    "grad_input tf32": ("grad_input", "GradInput", "TFloat32", "m128n128"),
    "grad_weight": ("grad_weight", "GradWeight", "BFloat16", "m64n64"),
    "forward_patch": ("patch_gemm", "Forward", "BFloat16", "m256n64"),
}
CHECKS = sorted({(kernel, check) for kernel, _, _, _, check in MUTATIONS.values()}, key=lambda c: c[1].__name__)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    return build_runtime(tmp_path_factory.mktemp("runtime"))


def build_one(csrc: pathlib.Path, folder: pathlib.Path, kernel: str, runtime: list[pathlib.Path]) -> Emulator:
    file, pointers, element, tile = KERNELS[kernel]
    source, target, library = (folder / f"{kernel.replace(' ', '_')}.{suffix}" for suffix in ("cpp", "o", "so"))
    function = kernel.split()[0]
    source.write_text(SOURCE.format(function=function, file=file, pointers=pointers, element=element, tile=tile))
    compile_object(source, target, csrc, KERNEL_FLAGS)
    return link([*runtime, target], library, only_some_kernels=True)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory, runtime: list[pathlib.Path]) -> dict[str, Emulator]:
    folder = tmp_path_factory.mktemp("unchanged")
    return {kernel: build_one(CSRC, folder, kernel, runtime) for kernel in KERNELS}


@pytest.mark.parametrize(("kernel", "check"), CHECKS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_checks_pass_on_the_kernels_as_they_are(
    unchanged: dict[str, Emulator], kernel: str, check: Callable[[Emulator], None]
) -> None:
    check(unchanged[kernel])


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_mutation_is_caught(
    tmp_path: pathlib.Path, runtime: list[pathlib.Path], mutation: tuple[str, str, str, str, Callable[[Emulator], None]]
) -> None:
    kernel, name, old, new, check = mutation
    shutil.copytree(CSRC / "cuda", tmp_path / "csrc" / "cuda")
    file = tmp_path / "csrc" / "cuda" / "sm90" / name
    text = file.read_text()
    assert text.count(old) == 1, f"{name} has {text.count(old)} of {old!r}, not one"
    file.write_text(text.replace(old, new))
    mutant = build_one(tmp_path / "csrc", tmp_path, kernel, runtime)
    with pytest.raises((EmulatorError, AssertionError)):
        check(mutant)
