"""What every test may rely on: global switches are as they were, and the layer table of ``benchmarks`` can be imported."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Kernels that are off by default on architectures where nobody has timed them are tested all the same.
if platform.machine() in ("aarch64", "arm64"):
    os.environ.setdefault("VGGFAST_CPU_ISA", "neon")
# Threads of several processes that wait by spinning would take each other's cores. Read when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from on_device import on_gpu
from reference import ISAS

from vggfast import _C, switches

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture(autouse=True)
def _restore_switches() -> Iterator[None]:
    """Instruction set, algorithm, CUDA plan, thread count, gradient mode, denormals and poisoning are restored whatever a test does."""
    isa, algo, plan, threads = switches.cpu_isa(), _C.conv_algo(), switches.cuda_plan(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    switches.set_cpu_isa(isa)
    _C.set_conv_algo(algo)
    switches.set_cuda_plan(plan)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_flush_denormal(False)
    torch.set_grad_enabled(True)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this CPU runs, in use."""
    switches.set_cpu_isa(request.param)
    return str(request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, and the GPU with its kernels switched on where there is one."""
    place = torch.device(request.param)
    if place.type == "cuda" and switches.cuda_plan() == "aten":
        switches.set_cuda_plan("sm80")
    yield place
    if place.type == "cuda":
        torch.cuda.synchronize()  # an error of a kernel belongs to the test that ran it


def pytest_report_header() -> str:
    return f"vggfast: instruction sets {', '.join(_C.cpu_isas())}; torch {torch.__version__}"
