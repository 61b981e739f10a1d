"""What the machine can do at most, measured in the same run: arithmetic and copying. A roofline's two lines."""

from __future__ import annotations

import time
from typing import Any

import torch

from vggfast import _C
from vggfast.bench.cases import DTYPES

MATMUL_SIZES = {"cpu": (768, 1536, 2304), "cuda": (4096, 8192)}
DRAM_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
L3_BYTES = 3 << 20  # read plus written: past the second-level caches of two cores, within a shared third-level cache
SECONDS = 0.4  # a measurement


def measure(device: str, threads: int, dtypes: list[str]) -> dict[str, Any]:
    """Best rates: ``peak_gflops`` by dtype with its ``peak_source``, ``dram_gbps`` and (CPU) ``l3_gbps``, read plus written.

    The best, not the median: a ceiling is what nothing gets above.
    """
    torch.set_num_threads(threads)
    ceilings: dict[str, Any] = {"peak_gflops": {}, "peak_source": {}, "matmul_gflops": {}}
    fma = _fma_peak(device)
    for dtype in dtypes:
        rate = max(_matmul(device, DTYPES[dtype], n) for n in MATMUL_SIZES[device])
        ceilings["matmul_gflops"][dtype] = rate
        ceilings["peak_gflops"][dtype] = max(rate, fma)
        ceilings["peak_source"][dtype] = "FMA loop in registers" if fma > rate else "torch's best matrix product"
    ceilings["dram_gbps"] = _copy(device, DRAM_BYTES[device])
    if device == "cpu":
        ceilings["l3_gbps"] = _copy(device, L3_BYTES)
    return ceilings


def _fma_peak(device: str) -> float:
    """GFLOP/s of the extension's own loop of multiply-adds on all threads of a CPU, else 0.

    It is in fp32, in which 16-bit values may be multiplied, too: without products of their own that is their peak.
    """
    return float(_C.fma_peak(SECONDS)) if device == "cpu" else 0.0


def _best_seconds(device: str, run: Any) -> float:
    best, end = float("inf"), time.perf_counter() + SECONDS
    run()
    while True:
        if device == "cuda":
            cuda: Any = torch.cuda
            begin, done = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            run()
            done.record()
            done.synchronize()
            best = min(best, begin.elapsed_time(done) * 1e-3)
        else:
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return best


def _matmul(device: str, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2e-9 * n**3 / _best_seconds(device, lambda: torch.mm(a, b, out=out))


def _copy(device: str, size: int) -> float:
    source, target = torch.zeros(size // 4, device=device), torch.zeros(size // 4, device=device)
    return 2e-9 * size / _best_seconds(device, lambda: target.copy_(source))
