"""Calls every CUDA kernel in every instantiation, on small problems: what compute-sanitizer looks at.

    VGGFAST_CUDA_PLAN=sm80 compute-sanitizer --tool memcheck python scripts/gpu_kernels.py

Nothing but fills and copies of torch's own runs beside them. Prints the plans; fails if an instantiation was not reached, or a
result is not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from vggfast import cuda_plan, switches
from vggfast.cuda_plan import Gpu, Problem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILES = ("m128n128", "m256n64", "m64n64")
STEPS = {"forward": TILES, "grad_input": TILES, "unmasked grad_input": TILES, "grad_weight": ("m128n128", "m64n64")}


def expected_kernels() -> set[str]:
    """Every instantiation, as "dtype step tile"."""
    found = {f"{d} {step} {tile}" for d in DTYPES for step, tiles in STEPS.items() for tile in tiles}
    found -= {f"{torch.float32} grad_weight m128n128"}  # has too few registers for that
    return found | {f"{d} {name}" for d in DTYPES for name in ("first_layer", "pointwise")}


def planned_kernel(step: str, p: Problem, gpu: Gpu) -> str:
    kernel = cuda_plan.planned(step.removeprefix("unmasked "), p, gpu)[0].split()
    name = kernel[0] if kernel[0] != "implicit_gemm" else f"{step} {kernel[1].removeprefix('tile=')}"
    return f"{p.dtype} {name}"


def problems(gpu: Gpu) -> Iterator[Problem]:
    """Odd sizes and ragged channels; batches grow until the plan takes the large tiles on this GPU."""
    for dtype in DTYPES:
        yield Problem(2, 3, 72, 13, 18, True, dtype)
        yield Problem(3, 40, 72, 9, 7, False, dtype)
        yield Problem(2, 16, 64, 10, 15, True, dtype)
        for c, k, tile in ((16, 64, "m256n64"), (64, 16, "m256n64"), (72, 128, "m128n128"), (128, 72, "m128n128")):
            for n in (4, 8, 16, 32, 64, 128, 256, 512):
                p = Problem(n, c, k, 17, 31, True, dtype)
                step = "forward" if k > c else "grad_input"
                if planned_kernel(step, p, gpu).endswith(tile):
                    yield p
                    break


def run(p: Problem, gpu: Gpu, device: str = "cuda") -> set[str]:
    """Forward and backward of one problem, and a pool of its own; the kernels that ran."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(p.n, p.c, p.h, p.w, generator=generator).to(device, p.dtype)
    weight = (torch.randn(p.k, p.c, 3, 3, generator=generator) / (9 * p.c) ** 0.5).to(device, p.dtype)
    bias = torch.randn(p.k, generator=generator).to(device, p.dtype)
    ops = torch.ops.vggfast
    y, argmax = ops.conv3x3(x, weight, bias, True, p.pool, p.pool)
    saved = (y, argmax if p.pool else None)
    results, ran = [y], {planned_kernel("forward", p, gpu)}
    if p.c > 3:
        results.append(ops.conv3x3_grad_input(y, weight, *saved, p.h, p.w))
        unmasked = torch.full((p.n, p.k, p.h, p.w), 0.5, dtype=p.dtype, device=device)
        results.append(ops.conv3x3_grad_input(unmasked, weight, None, None, p.h, p.w))
        results.extend(ops.conv3x3_grad_weight(x, y, *saved))
        ran |= {planned_kernel(step, p, gpu) for step in ("grad_input", "unmasked grad_input", "grad_weight")}
    if planned_kernel("max_pool", p, gpu).endswith("pointwise"):
        pooled, codes = ops.max_pool2x2(x, True)
        results += [pooled, ops.max_pool2x2_grad(pooled, codes, p.h, p.w)]
        ran.add(planned_kernel("max_pool", p, gpu))
    assert all(bool(result.cpu().isfinite().all()) for result in results), f"{p}: a result is not finite"
    return ran


def main() -> int:
    gpu = cuda_plan.gpu_of(0)
    if gpu.obstacle or gpu.capability < 80:
        print(f"no GPU that runs these kernels: {gpu.obstacle or gpu}")
        return 1
    switches.set_cuda_plan("sm80")
    missing = expected_kernels()
    for p in problems(gpu):
        ran = run(p, gpu)
        missing -= ran
        print(f"n={p.n} c={p.c} k={p.k} {p.h}x{p.w} pool={p.pool}: {', '.join(sorted(ran))}", flush=True)
    print(f"not reached: {', '.join(sorted(missing))}" if missing else "every kernel ran")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
