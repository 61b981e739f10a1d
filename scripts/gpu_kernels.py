"""Calls every CUDA kernel in every instantiation, on small problems: what compute-sanitizer looks at.

    VGGFAST_CUDA_PLAN=sm80 compute-sanitizer --tool memcheck python scripts/gpu_kernels.py

Nothing but fills and copies of torch's own runs beside them. With VGGFAST_CUDA_PLAN=sm90 it calls Hopper's kernels, with sm90patch
those of Hopper's that read patches, with anything else those for compute capability 8.0. Prints the plans; fails if an instantiation was not reached, or a result is not finite.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator

import torch

from vggfast import cuda_plan, switches
from vggfast.cuda_plan import Gpu, Problem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SM80_TILES = {
    **dict.fromkeys(("forward", "grad_input", "unmasked grad_input"), ("m128n128", "m256n64", "m64n64")),
    "grad_weight": ("m128n128", "m64n64"),
}
SM90_TILES = {
    **dict.fromkeys(("forward", "grad_input"), ("m256n64", "m256n128", "m128n256", "m128n128")),
    "grad_weight": ("m128n128", "m128n64", "m64n64"),
}
PATCH_TILES = ("m256n64", "m256n128", "m128n128")
CHANNELS = ((3, 72), (40, 72), (16, 64), (64, 16), (72, 128), (128, 72), (64, 64), (72, 264), (72, 256), (256, 72))
BATCHES = (2, 3, 4, 8, 16, 32, 64, 128, 256, 512)


def expected_kernels(plan: str) -> set[str]:
    """Every instantiation that `plan` can reach, as "dtype step tile"."""
    if plan == "sm90patch":
        return {
            f"{d} {step} patch {tile}" for d in DTYPES[:2] for step in ("forward", "grad_input") for tile in PATCH_TILES
        }
    if plan == "sm90":
        found = {f"{d} {step} {tile}" for d in DTYPES for step, tiles in SM90_TILES.items() for tile in tiles}
        found -= {f"{torch.float32} grad_weight {tile}" for tile in SM90_TILES["grad_weight"]}  # sm80's
        return found | {f"{d} finish_splits" for d in DTYPES} | {f"{torch.float32} mirror_filters"}
    found = {f"{d} {step} {tile}" for d in DTYPES for step, tiles in SM80_TILES.items() for tile in tiles}
    found -= {f"{torch.float32} grad_weight m128n128"}  # has too few registers for that
    return found | {f"{d} {name}" for d in DTYPES for name in ("first_layer", "pointwise")}


def planned_kernels(p: Problem, gpu: Gpu, plan: str) -> set[str]:
    """What `run` calls for one problem."""
    steps = ("forward", "grad_input", "grad_weight", "max_pool") if p.c > 3 else ("forward",)
    found = set()
    for step in steps:
        words, _ = cuda_plan.planned(step, p, gpu, plan)
        kernel, *rest = words.split()
        tile = re.search(r"tile=(\w+)", words)
        named = {"implicit_gemm": step, "wgmma": step, "wgmma_patch": f"{step} patch"}.get(kernel)
        found.add(f"{p.dtype} {named} {tile[1]}" if named and tile else f"{p.dtype} {kernel}")
        if kernel == "implicit_gemm" and step == "grad_input" and tile:
            found.add(f"{p.dtype} unmasked grad_input {tile[1]}")
        if kernel.startswith("wgmma") and step != "grad_weight" and "splits=1" not in rest:
            found.add(f"{p.dtype} finish_splits")
        if kernel == "wgmma" and step == "grad_input" and p.dtype == torch.float32:
            found.add(f"{p.dtype} mirror_filters")
    return found


def problems(gpu: Gpu, plan: str) -> Iterator[Problem]:
    """Odd sizes and ragged channels, until the plan has named every kernel: large tiles take large batches."""
    missing = expected_kernels(plan)
    for dtype, n, (c, k) in itertools.product(DTYPES, BATCHES, CHANNELS):
        p = Problem(n, c, k, 17, 31, n % 3 > 0, dtype)
        new = planned_kernels(p, gpu, plan) & missing
        if new:
            missing -= new
            yield p


def run(p: Problem, device: str = "cuda") -> None:
    """Forward and backward of one problem, and a pool of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(p.n, p.c, p.h, p.w, generator=generator).to(device, p.dtype)
    weight = (torch.randn(p.k, p.c, 3, 3, generator=generator) / (9 * p.c) ** 0.5).to(device, p.dtype)
    bias = torch.randn(p.k, generator=generator).to(device, p.dtype)
    ops = torch.ops.vggfast
    y, argmax = ops.conv3x3(x, weight, bias, True, p.pool, p.pool)
    saved = (y, argmax if p.pool else None)
    results = [y]
    if p.c > 3:
        results.append(ops.conv3x3_grad_input(y, weight, *saved, p.h, p.w))
        unmasked = torch.full((p.n, p.k, p.h, p.w), 0.5, dtype=p.dtype, device=device)
        results.append(ops.conv3x3_grad_input(unmasked, weight, None, None, p.h, p.w))
        results.extend(ops.conv3x3_grad_weight(x, y, *saved))
        pooled, codes = ops.max_pool2x2(x, True)
        results += [pooled, ops.max_pool2x2_grad(pooled, codes, p.h, p.w)]
    assert all(bool(result.cpu().isfinite().all()) for result in results), f"{p}: a result is not finite"


def main() -> int:
    gpu = cuda_plan.gpu_of(0)
    plan = switches.cuda_plan() if switches.cuda_plan() != "aten" else "sm80"
    if gpu.obstacle or gpu.capability < 80 or (plan != "sm80" and gpu.capability != 90):
        print(f"no GPU that runs the kernels of {plan}: {gpu.obstacle or gpu}")
        return 1
    switches.set_cuda_plan(plan)
    missing = expected_kernels(plan)
    for p in problems(gpu, plan):
        run(p)
        ran = planned_kernels(p, gpu, plan)
        missing -= ran
        print(f"n={p.n} c={p.c} k={p.k} {p.h}x{p.w} pool={p.pool}: {', '.join(sorted(ran))}", flush=True)
    print(f"not reached: {', '.join(sorted(missing))}" if missing else f"every kernel of {plan} ran")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
