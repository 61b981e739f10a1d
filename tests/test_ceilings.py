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
    peak = _C.fma_peak(0.1)
    if isa == "baseline":  # torch's product has more lanes than this
        assert 1 < peak < 1e4
    else:
        assert peak > ceilings._matmul("cpu", torch.float32, 768) / 1.3  # the clock may have moved in between


def test_the_peak_of_fp32_is_that_of_the_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SECONDS", 0.05)
    monkeypatch.setattr(_C, "fma_peak", lambda seconds: 1e9)
    found = ceilings.measure("cpu", 1, ["fp32", "bf16"])
    assert found["peak_gflops"]["fp32"] == 1e9
    assert found["peak_source"] == {"fp32": "FMA loop in registers", "bf16": "torch's best matrix product"}
    assert 0 < found["peak_gflops"]["bf16"] == found["matmul_gflops"]["bf16"]
    assert min(found["dram_gbps"], found["l3_gbps"]) > 0
