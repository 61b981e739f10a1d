"""Which kernel a call on a GPU takes, decided without one: fake tensors on a CUDA device, explain, gradients without a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from reference import composition, gradients, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from typer.testing import CliRunner

import vggfast
from vggfast import _C, cli, cuda_plan, dispatch, ops, switches
from vggfast.cuda_plan import NOT_PROVEN, Gpu, Problem

A100 = Gpu(80, 108)

needs_cuda_build = pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA kernels: no plans to ask")


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
    assert done.stderr == "error: --gpu: expected compute capability and number of SMs, as '8.0,108', got '9.0'\n"


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
    monkeypatch.setattr(dispatch, "PLAIN", (FakeTensor,))
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
