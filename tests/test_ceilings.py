"""The roofline's lines: nothing gets above them."""

from __future__ import annotations

import pytest
import torch

from vggfast import _C
from vggfast.bench import ceilings


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_the_fma_peak_is_above_any_matrix_product(isa: str) -> None:
    torch.set_num_threads(1)
    _C.set_cpu_isa(isa)
    if isa == "baseline":  # torch's product has more lanes than this
        assert 1 < _C.fma_peak(0.1) < 1e4
        return
    lanes = 2 if isa == "avx2" and "avx512" in _C.cpu_isas() else 1  # torch's product takes the widest
    peak = product = 0.0
    for _ in range(20):
        # In turns, the best of each: others may have the CPU, or its clock may move, during one of them.
        peak = max(peak, _C.fma_peak(0.1))
        product = max(product, ceilings._matmul("cpu", torch.float32, 768) / lanes)
        if peak > product:
            return
    assert peak > product / 1.05


@pytest.mark.parametrize("fma", [1e9, 1e-9])
def test_a_peak_is_the_better_of_multiply_adds_and_matrix_products(monkeypatch: pytest.MonkeyPatch, fma: float) -> None:
    monkeypatch.setattr(ceilings, "SECONDS", 0.05)
    monkeypatch.setattr(_C, "fma_peak", lambda seconds: fma)
    found = ceilings.measure("cpu", 1, ["fp32", "bf16"])
    for dtype in ("fp32", "bf16"):
        assert found["peak_gflops"][dtype] == max(fma, found["matmul_gflops"][dtype]) > 0
        assert found["peak_source"][dtype] == ("FMA loop in registers" if fma > 1 else "torch's best matrix product")
    assert min(found["dram_gbps"], found["l3_gbps"]) > 0
