"""Which kernel a problem gets on a GPU, decided without one: made-up GPUs, drawn problems, torch's TF32 settings, the switches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import vggfast
from vggfast import _C, cuda_plan, switches
from vggfast.cuda_plan import NOT_PROVEN, Gpu, Problem, decide, tf32_obstacle, why_not

ROOT = Path(__file__).parents[1]
A100, TURING = Gpu(80, 108), Gpu(75, 40)
STEPS = ("forward", "grad_input", "grad_weight", "max_pool")
LAYER = Problem(8, 64, 128, 56, 56, False, torch.bfloat16)
NO_TF32 = "TF32 is forbidden"

needs_cuda_build = pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA kernels: no plans to ask")


# ---- the pure part: sizes, dtype, GPU and switches -------------------------------------------------------------------


@needs_cuda_build
def test_the_default_is_aten_and_says_how_to_switch_on() -> None:
    for step in STEPS:
        assert decide(step, LAYER, A100, "aten", "") == (False, "aten", NOT_PROVEN)
    assert "VGGFAST_CUDA_PLAN=sm80" in NOT_PROVEN


@needs_cuda_build
def test_a_kernel_shows_its_tile_and_grid() -> None:
    decision = decide("forward", LAYER, A100, "sm80", NO_TF32)
    assert decision.fused
    assert decision.kernel == "cuda sm80 implicit_gemm tile=m128n128 grid=196x1x1 workspace=0"
    assert decide("max_pool", LAYER, A100, "sm80", NO_TF32).kernel == "cuda sm80 pointwise"


@needs_cuda_build
def test_hopper_kernels_where_they_fit_and_the_others_elsewhere() -> None:
    hopper = Gpu(90, 132)
    decision = decide("forward", LAYER, hopper, "sm90", NO_TF32)
    assert decision.kernel.startswith("cuda sm90 wgmma tile=")
    for step in ("grad_input", "grad_weight"):
        assert decide(step, LAYER, hopper, "sm90", NO_TF32).kernel.startswith("cuda sm90 wgmma tile=")
    assert decide("forward", LAYER, hopper, "sm80", NO_TF32).kernel.startswith("cuda sm80 implicit_gemm")
    tf32 = LAYER._replace(dtype=torch.float32)
    for step in ("forward", "grad_input"):
        for plan in ("sm90", "sm90patch"):
            decision = decide(step, tf32, hopper, plan, "")
            assert decision.kernel.startswith("cuda sm90 wgmma tile=")
            assert decision.reason.endswith("float32 is multiplied in TF32")
        assert decide(step, tf32, hopper, "sm90", NO_TF32) == (False, "aten", NO_TF32)
    for step, p, gpu, reason in (
        ("forward", LAYER, A100, "not wgmma: wgmma exists only on compute capability 9.0"),
        ("grad_weight", tf32, hopper, "not wgmma: fp32"),
    ):
        decision = decide(step, p, gpu, "sm90", "")
        assert decision.kernel.startswith("cuda sm80 implicit_gemm")
        assert reason in decision.reason
    assert decide("max_pool", LAYER, hopper, "sm90", NO_TF32).kernel == "cuda sm80 pointwise"
    assert decide("forward", LAYER._replace(k=60), hopper, "sm90", NO_TF32).kernel == "aten"


@needs_cuda_build
def test_patches_where_they_are_expected_to_be_faster() -> None:
    hopper, large = Gpu(90, 132), LAYER._replace(n=64, c=64, k=64, h=224, w=224)
    for step in ("forward", "grad_input"):
        decision = decide(step, large, hopper, "sm90patch", NO_TF32)
        assert decision.kernel.startswith("cuda sm90 wgmma_patch tile=m256n64 box=8x")
        small = decide(step, LAYER._replace(n=256, c=512, k=512, h=2, w=2), hopper, "sm90patch", NO_TF32)
        assert small.kernel.startswith("cuda sm90 wgmma tile=")  # most of a patch of 8x8 would lie outside
    assert decide("grad_weight", large, hopper, "sm90patch", NO_TF32).kernel.startswith("cuda sm90 wgmma tile=")
    assert decide("forward", large, A100, "sm90patch", NO_TF32).kernel.startswith("cuda sm80 implicit_gemm")
    assert decide("max_pool", large, hopper, "sm90patch", NO_TF32).kernel == "cuda sm80 pointwise"


REFUSED: dict[str, tuple[str, Problem, Gpu, str]] = {
    "old GPU": ("forward", LAYER, TURING, "compute capability 8.0"),
    "driver": ("forward", LAYER, Gpu(90, 132, "the NVIDIA driver is for CUDA 12"), "driver is for CUDA 12"),
    "float32": ("forward", LAYER._replace(dtype=torch.float32), A100, NO_TF32),
    "float32 grad_weight": ("grad_weight", LAYER._replace(dtype=torch.float32), A100, NO_TF32),
    "output channels": ("forward", LAYER._replace(k=60), A100, "output channels"),
    "four input channels": ("forward", LAYER._replace(c=4), A100, "input channels"),
    "first layer, grad_input": ("grad_input", LAYER._replace(c=3), A100, "input channels"),
    "first layer, grad_weight": ("grad_weight", LAYER._replace(c=3), A100, "input channels"),
    "pool of narrow channels": ("max_pool", LAYER._replace(c=36), A100, "channels are not a multiple"),
    "pool of one row": ("max_pool", LAYER._replace(h=1, pool=True), A100, "no output"),
    "pixels": ("forward", LAYER._replace(n=1 << 20), A100, "2^31 pixels"),
    "weight": ("forward", LAYER._replace(c=1 << 14, k=1 << 14), A100, "weight"),
}


@needs_cuda_build
@pytest.mark.parametrize(("step", "p", "gpu", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_kernel_takes_is_atens_and_says_why(step: str, p: Problem, gpu: Gpu, reason: str) -> None:
    decision = decide(step, p, gpu, "sm80", NO_TF32)
    assert (decision.fused, decision.kernel) == (False, "aten")
    assert reason in decision.reason
    assert why_not(step, p, gpu, "sm80", NO_TF32) == decision.reason


@needs_cuda_build
def test_float32_is_fused_where_tf32_is_allowed_and_pools_always() -> None:
    p = LAYER._replace(dtype=torch.float32, c=12, k=20)
    decision = decide("forward", p, A100, "sm80", "")
    assert decision.fused
    assert "TF32" in decision.reason
    assert decide("max_pool", p, A100, "sm80", NO_TF32).fused


sizes = st.one_of(st.integers(0, 70), st.sampled_from([512, 1 << 11, 1 << 16, 1 << 20]))
channels = st.one_of(st.integers(1, 20), st.sampled_from([64, 72, 512, 4096, 1 << 14, 1 << 18, 1 << 22]))
problems = st.builds(
    Problem, sizes, channels, channels, sizes, sizes, st.booleans(), st.sampled_from(list(cuda_plan._VECTOR))
)


@needs_cuda_build
@hypothesis.settings(max_examples=3000, deadline=None, database=None, derandomize=True)
@hypothesis.given(st.sampled_from(STEPS), problems, st.sampled_from([75, 80, 86, 90, 120]))
def test_python_and_the_plan_agree_about_every_problem(step: str, p: Problem, capability: int) -> None:
    gpu = Gpu(capability, 108)
    kernel, reason = cuda_plan.planned(step, p, gpu)
    assert why_not(step, p, gpu, "sm80", "") == (reason if kernel == "aten" else "")


# ---- torch's TF32 setting, by its old and its new name ---------------------------------------------------------------

TF32 = {
    "pass": True,
    "cudnn.allow_tf32 = False": False,
    "cudnn.allow_tf32 = True": True,
    "cudnn.conv.fp32_precision = 'ieee'": False,
    "cudnn.allow_tf32 = False; cudnn.conv.fp32_precision = 'tf32'": True,
    "cudnn.conv.fp32_precision = 'none'": False,
    "cudnn.conv.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'": True,
    "cudnn.conv.fp32_precision = 'none'; cudnn.fp32_precision = 'ieee'": False,
    "torch.set_float32_matmul_precision('highest')": True,  # products, not convolutions
}
ASK_TF32 = """
import json, os, sys, torch
from torch.backends import cudnn
from vggfast.cuda_plan import tf32_obstacle
for setting in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        exec(setting)
        print(json.dumps(tf32_obstacle()), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_tf32_is_allowed_as_torch_allows_it() -> None:
    command = [sys.executable, "-c", ASK_TF32, json.dumps(list(TF32))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert dict(zip(TF32, (answer == "" for answer in answers), strict=True)) == TF32, done.stderr
    assert all("torch.backends.cudnn.conv.fp32_precision" in answer for answer in answers if answer)


def test_nvidias_own_switch_forbids_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert "NVIDIA_TF32_OVERRIDE" in tf32_obstacle()


def test_tf32_within_cudnn_flags() -> None:
    assert not tf32_obstacle()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert tf32_obstacle()
    assert not tf32_obstacle()


# ---- the switches ----------------------------------------------------------------------------------------------------


def test_switches() -> None:
    switches.set_cuda_plan("sm80")
    assert switches.cuda_plan() == "sm80"
    switches.set_conv_algo("direct")
    assert switches.conv_algo() == _C.conv_algo() == "direct"
    switches.set_cpu_isa("baseline")
    assert switches.cpu_isa() == _C.cpu_isa() == "baseline"
    assert "baseline" in switches.cpu_isas()
    with pytest.raises(ValueError, match="VGGFAST_CUDA_PLAN: expected aten, sm80, sm90 or sm90patch, got 'fast'"):
        switches.set_cuda_plan("fast")
    with pytest.raises(ValueError, match="VGGFAST_CONV_ALGO: expected"):
        switches.set_conv_algo("fast")
    with pytest.raises(ValueError, match="VGGFAST_CPU_ISA: expected"):
        switches.set_cpu_isa("fast")
    assert switches.cuda_plan() == "sm80"


@pytest.mark.parametrize(("value", "plan"), [("", "aten"), ("sm80", "sm80"), ("sm90patch", "sm90patch")])
def test_the_environment_sets_the_plan(value: str, plan: str) -> None:
    command = [sys.executable, "-m", "vggfast", "info", "--json"]
    environment = os.environ | {"VGGFAST_CUDA_PLAN": value}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    assert facts["cuda_plan"] == plan
    assert value != "" or not _C.build_info()["cuda"] or "VGGFAST_CUDA_PLAN=sm80" in facts["cuda_plan_reason"]


def test_a_wrong_plan_in_the_environment_is_a_message() -> None:
    command = [sys.executable, "-m", "vggfast", "info"]
    environment = os.environ | {"VGGFAST_CUDA_PLAN": "fast"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: VGGFAST_CUDA_PLAN: expected aten, sm80, sm90 or sm90patch, got 'fast'\n"


# ---- what is compiled ------------------------------------------------------------------------------------------------

ASK_ARCHS = """
import setuptools
setuptools.setup = lambda **_: None
import setup
print(*setup.gencode_flags(), bool(setup.find_nvcc()))
"""


@pytest.mark.parametrize(
    ("listed", "flags"),
    [
        ("7.5 8.0 9.0+PTX", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),  # as images with torch have it
        ("7.0;7.5+PTX;12.0a;", ["120a,code=sm_120a"]),
        ("7.5", []),
        ("", ["80,code=sm_80", "80,code=compute_80", "90,code=sm_90"]),
    ],
)
def test_gpus_without_kernels_are_not_compiled_for(tmp_path: Path, listed: str, flags: list[str]) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    environment = {name: value for name, value in os.environ.items() if name != "VGGFAST_CUDA"}
    environment |= {"TORCH_CUDA_ARCH_LIST": listed, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ASK_ARCHS], cwd=ROOT, env=environment, capture_output=True, text=True)
    *found, builds = done.stdout.splitlines()[-1].split()
    assert found == [f"-gencode=arch=compute_{flag}" for flag in flags], done.stderr
    assert builds == str(bool(flags))
    assert ("names no GPU" in done.stdout) == (not flags)


# ---- what is known of a device ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert cuda_plan._look_at(0).obstacle == "torch sees no GPU"
    if _C.build_info()["cuda"]:
        assert _C.cuda_obstacle(0) == "no NVIDIA driver is loaded"


def test_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": ""})
    assert "built without nvcc" in cuda_plan.build_obstacle()
    with pytest.raises(ValueError, match=r"gpu: this build has no CUDA kernels: .*pip install \. brings nvcc"):
        vggfast.explain(torch.nn.Identity(), torch.zeros(1), gpu="8.0,108")


@pytest.mark.parametrize("text", ["8.0", "8,108", "8.0,0", "8.0,x", "sm80,108", ""])
def test_a_gpu_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"gpu: expected compute capability and number of SMs, as '8\.0,108', got"):
        Gpu.parse(text)


def test_a_gpu_in_words() -> None:
    assert Gpu.parse("12.0, 170") == (120, 170, "")
    assert str(Gpu(120, 170)) == "compute capability 12.0, 170 SMs"
