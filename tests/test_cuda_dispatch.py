"""Which kernel a call on a GPU takes, decided without one: made-up GPUs, drawn problems, fake tensors on a CUDA device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from reference import composition, gradients, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from typer.testing import CliRunner

import vggfast
from vggfast import _C, cli, cuda_plan, dispatch, ops, switches
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


# ---- what is known of a device ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert cuda_plan._look_at(0).obstacle == "torch sees no GPU"
    if _C.build_info()["cuda"]:
        assert _C.cuda_obstacle(0) == "no NVIDIA driver is loaded"


def test_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": ""})
    assert "built without nvcc" in cuda_plan.build_obstacle()
    with pytest.raises(ValueError, match="gpu: this build has no CUDA kernels"):
        vggfast.explain(torch.nn.Identity(), torch.zeros(1), gpu="8.0,108")


@pytest.mark.parametrize("text", ["8.0", "8,108", "8.0,0", "8.0,x", "sm80,108", ""])
def test_a_gpu_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"gpu: expected compute capability and number of SMs, as '8\.0,108', got"):
        Gpu.parse(text)


def test_a_gpu_in_words() -> None:
    assert Gpu.parse("12.0, 170") == (120, 170, "")
    assert str(Gpu(120, 170)) == "compute capability 12.0, 170 SMs"


# ---- explain ---------------------------------------------------------------------------------------------------------


@needs_cuda_build
@pytest.mark.parametrize("training", [False, True])
def test_explain_shows_a_gpus_plan_without_one(training: bool) -> None:
    network = vggfast.vgg11(num_classes=2, init_weights=False).bfloat16().train(training)
    explanation = vggfast.explain(network, torch.zeros(1, 3, 32, 32).bfloat16(), gpu="8.0,108")
    assert explanation.fused_convolutions == explanation.convolutions == 8
    convolutions = [row for row in explanation.rows if row.layers.startswith("Conv")]
    assert convolutions[0].kernel.startswith("cuda sm80 first_layer tile=m64n64 grid=16x1x1")
    assert all(row.kernel.startswith("cuda sm80 implicit_gemm tile=") for row in convolutions[1:])
    backward = [row for row in explanation.rows if row.layers.startswith("grad_")]
    assert len(backward) == (16 if training else 0)
    assert all(row.fused == (row.name != "features.0..2") for row in backward)
    assert str(explanation).endswith("on a GPU of compute capability 8.0, 108 SMs, with VGGFAST_CUDA_PLAN=sm80.")
    assert explanation.to_dict()["gpu"] == "compute capability 8.0, 108 SMs"


@needs_cuda_build
def test_explain_of_a_gpu_on_the_command_line() -> None:
    command = ["explain", "vgg16", "--size", "32", "--dtype", "bf16", "--gpu"]
    done = CliRunner().invoke(cli.app, [*command, "9.0,132"])
    assert done.exit_code == 0
    assert done.stdout.count("cuda sm80 implicit_gemm tile=") == 12
    switches.set_cuda_plan("sm90")
    done = CliRunner().invoke(cli.app, [*command, "9.0,132"])
    assert done.stdout.count("cuda sm90 wgmma tile=") == 12
    assert "with VGGFAST_CUDA_PLAN=sm90" in done.stdout
    switches.set_cuda_plan("aten")
    done = CliRunner().invoke(cli.app, [*command, "7.5,40"])
    assert done.stdout.count("compute capability 8.0") == 13
    assert "0 of 13 convolutions" in done.stdout
    done = CliRunner().invoke(cli.app, [*command, "9.0"])
    assert done.exit_code == 2
    assert done.stderr == "error: gpu: expected compute capability and number of SMs, as '8.0,108', got '9.0'\n"


# ---- fake tensors on a CUDA device -----------------------------------------------------------------------------------


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every CUDA device is one on which the kernels run, and tensors are fake ones."""
    monkeypatch.setattr(cuda_plan, "_look_at", lambda index: A100)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    torch._dynamo.reset()


def on_cuda(c: int = 16, batch: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, c, 8, 8), (24, c, 3, 3), (24,))
    x, weight, bias = (torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes)
    return x, weight, bias


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.conv3x3(x, weight, bias, pool=True)


class Graphs:
    """torch.compile with a backend that keeps the graphs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.codes: list[str] = []
        self.compiled = torch.compile(function, fullgraph=True, backend=self.keep)

    def keep(self, module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        self.codes.append(module.code)
        return module.forward

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.compiled(*inputs)

    @property
    def fused(self) -> bool:
        return "vggfast" in self.codes[-1]


@needs_cuda_build
def test_a_compiled_graph_follows_the_switch(a100: None) -> None:
    graphs = Graphs(fused)
    for plan, stride in (("aten", (384, 16, 4, 1)), ("sm80", (384, 1, 96, 24)), ("aten", (384, 16, 4, 1))):
        switches.set_cuda_plan(plan)
        y = graphs(*on_cuda())
        assert (y.shape, y.stride(), y.device.type) == ((2, 24, 4, 4), stride, "cuda")
    assert ["vggfast" in code for code in graphs.codes] == [False, True]  # the first is found again


@needs_cuda_build
@pytest.mark.parametrize(("dtype", "takes"), [(torch.float16, True), (torch.float32, False), (torch.float64, False)])
def test_a_compiled_graph_of_any_batch(a100: None, dtype: torch.dtype, takes: bool) -> None:
    """float32 stays torch's: a graph would not notice that TF32 was forbidden later."""
    switches.set_cuda_plan("sm80")
    graphs = Graphs(fused)
    for batch in (2, 3, 5, 7):
        assert graphs(*on_cuda(batch=batch, dtype=dtype)).shape == (batch, 24, 4, 4)
        assert graphs.fused == takes
    assert len(graphs.codes) <= 2


@needs_cuda_build
def test_a_compiled_graph_takes_only_channels_that_fit(a100: None) -> None:
    switches.set_cuda_plan("sm80")
    for c, takes in ((16, True), (12, False), (3, True)):
        torch._dynamo.reset()
        graphs = Graphs(fused)
        graphs(*on_cuda(c))
        assert graphs.fused == takes
    torch._dynamo.reset()
    graphs = Graphs(ops.max_pool2x2)
    graphs(on_cuda(12)[0])
    assert not graphs.fused
    graphs(on_cuda(16)[0])
    assert graphs.fused


def test_autocast_on_cuda(a100: None) -> None:
    x, weight, bias = on_cuda(dtype=torch.float32)
    assert torch.ops.vggfast.conv3x3(x, weight, bias, True, True, True)[0].dtype == torch.float32
    with torch._C._DisableAutocast():
        torch.set_autocast_dtype("cuda", torch.float16)
    torch.set_autocast_enabled("cuda", True)
    try:
        y, argmax = torch.ops.vggfast.conv3x3(x, weight, bias, True, True, True)
        assert dispatch._conv_problem(x, weight, True).dtype == torch.float16
        assert dispatch._pool_problem(x).dtype == torch.float32  # torch pools in the dtype that comes
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    assert (y.dtype, argmax.dtype, y.device.type) == (torch.float16, torch.uint8, "cuda")


def test_uncompiled_fake_tensors_stay_with_torch(a100: None) -> None:
    switches.set_cuda_plan("sm80")
    assert "FakeTensor" in ops.conv3x3_kernel(*on_cuda()).reason
    assert fused(*on_cuda()).shape == (2, 24, 4, 4)
    convolution = torch.nn.Conv2d(3, 24, 3, padding=1, device="meta")
    _, convolution.weight, convolution.bias = map(torch.nn.Parameter, on_cuda(3, dtype=torch.float32))
    with torch.no_grad():  # a CPU build of torch aborts where it records a gradient on CUDA
        assert vggfast.FusedSequential(convolution, torch.nn.ReLU())(on_cuda(3)[0].float()).shape == (2, 24, 8, 8)


@needs_cuda_build
def test_kernels_are_named_on_a_cuda_device(a100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_PLAIN", (FakeTensor,))
    assert ops.conv3x3_kernel(*on_cuda()) == (False, "aten", NOT_PROVEN)
    assert ops.max_pool2x2_kernel(on_cuda()[0]) == (False, "aten", NOT_PROVEN)
    switches.set_cuda_plan("sm80")
    assert ops.conv3x3_kernel(*on_cuda(), pool=True).kernel.startswith("cuda sm80 implicit_gemm tile=m64n64 grid=2x1x1")
    assert ops.conv3x3_kernel(*on_cuda(3)).kernel.startswith("cuda sm80 first_layer")
    assert ops.conv3x3_kernel(*on_cuda(3), step="grad_input").kernel == "aten"
    assert ops.max_pool2x2_kernel(on_cuda()[0]).kernel == "cuda sm80 pointwise"


@needs_cuda_build
@pytest.mark.parametrize("c", [3, 16])
def test_the_first_layers_gradients_are_torchs(a100: None, c: int) -> None:
    """Its forward kernel has no counterpart backward; the other layers' have."""
    switches.set_cuda_plan("sm80")
    p = Problem(2, c, 24, 8, 8, True, torch.bfloat16)
    assert ops._steps_without_kernel(p, torch.device("cuda", 0)) == (c == 3, c == 3)


@needs_cuda_build
@pytest.mark.parametrize("c", [3, 16])
def test_sizes_may_be_symbols(monkeypatch: pytest.MonkeyPatch, c: int) -> None:
    """As where torch.compile traces the backward pass of any batch."""
    monkeypatch.setattr(cuda_plan, "_look_at", lambda index: A100)
    switches.set_cuda_plan("sm80")
    n = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False).from_tensor(torch.empty(5, 2)).shape[0]
    assert isinstance(n, torch.SymInt)
    p = Problem(n, c, 24, 8, 8, True, torch.bfloat16)
    assert ops._steps_without_kernel(p, torch.device("cuda", 0)) == (c == 3, c == 3)


# ---- gradients of which a part has no kernel, on the CPU -------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("missing", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("relu", "pool"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_gradient_without_kernel_comes_from_torch(
    monkeypatch: pytest.MonkeyPatch, relu: bool, pool: bool, missing: tuple[bool, bool], wanted: tuple[bool, ...]
) -> None:
    tensors = problem(2, 6, 8, 7, 9, torch.float64)
    x, weight, bias = (t.float().requires_grad_(needed) for t, needed in zip(tensors, wanted, strict=True))
    inputs = [t for t in (x, weight, bias) if t.requires_grad]
    expected = gradients(composition(x, weight, bias, relu=relu, pool=pool), inputs)
    monkeypatch.setattr(ops, "_steps_without_kernel", lambda problem, device: missing)
    calls: list[str] = []
    with Recorded(calls):
        got = gradients(ops.conv3x3(x, weight, bias, relu=relu, pool=pool), inputs)
    for a, b in zip(got, expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ("conv3x3_grad_input" in calls) == (wanted[0] and not missing[0])
    assert ("conv3x3_grad_weight" in calls) == (any(wanted[1:]) and not missing[1])


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the names of this library's ops that run."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function.namespace == "vggfast":
            self.names.append(function._schema.name.removeprefix("vggfast::"))
        return function(*args, **(kwargs or {}))
