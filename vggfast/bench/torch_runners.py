"""Contenders that run in torch: vggfast, torch's own operators, torch.compile, CUDA graphs, cuDNN's fused convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggfast import _C, ops, switches
from vggfast.bench import answers, cases, perceptual
from vggfast.bench.cases import DTYPES, LOSSES, Case
from vggfast.bench.contenders import Runner


def build(
    case: Case,
    files: dict[str, str],
    engine: str = "eager",
    layout: str = "channels_last",
    mode: str | None = None,
    graph: bool = False,
    plan: str | None = None,
) -> Runner:
    """``engine``: vggfast, eager, compile or cudnn; ``layout``: a name of torch's memory formats; ``mode``: torch.compile's;
    ``plan``: the CUDA kernels of vggfast's, where not those in use."""
    torch.set_num_threads(case.threads)
    torch.backends.cudnn.benchmark = True
    with _planned(plan):
        if case.layer:
            runner = _layer(case, files, engine, layout, mode)
        else:
            of_network = perceptual.build if case.task in LOSSES else _network
            runner = of_network(case, files, engine, layout, mode, graph)
        if case.layer and engine == "vggfast":
            runner.kernel = describe_kernel(case)
    if plan:
        runner.run = partial(_run_planned, plan, runner.run)
    runner.buffers, runner.of_layer = case.buffers, case.layer is not None
    if case.device == "cuda":
        runner.clock = "cuda"
        runner.setting += ", cudnn.benchmark"
    runner.version = torch.__version__
    return runner


@contextmanager
def _planned(plan: str | None) -> Iterator[None]:
    """With the CUDA kernels of ``plan``, where one is named."""
    before = switches.cuda_plan()
    switches.set_cuda_plan(plan or before)
    try:
        yield
    finally:
        switches.set_cuda_plan(before)


def _run_planned(plan: str, run: Callable[[int], Any], buffer: int) -> Any:
    with _planned(plan):
        return run(buffer)


# ---- whole networks ------------------------------------------------------------------------------------------------


def _network(case: Case, files: dict[str, str], engine: str, layout: str, mode: str | None, graph: bool) -> Runner:
    net = cases.network(case, Path(files["weights"])).to(case.device)
    # vggfast takes images and filters as users have them; the others get the layout they are asked for.
    memory = torch.contiguous_format if engine == "vggfast" else getattr(torch, layout)
    called: Any = net if engine == "vggfast" else cases.plain_network(net)
    if engine != "vggfast":
        called = called.to(memory_format=memory)
    inputs = [cases.images(case, i).to(case.device, memory_format=memory) for i in range(case.buffers)]
    setting = "NCHW in" if engine == "vggfast" else {"contiguous_format": "NCHW"}.get(layout, layout)
    if case.task == "inference":
        if case.dtype == "bf16":
            called, inputs = called.to(torch.bfloat16), [x.to(torch.bfloat16) for x in inputs]
            setting += ", bfloat16 weights"
        if engine == "compile":
            called, compiled = _compile(called, mode, case.device == "cpu")
            setting += compiled
        run = _inference(called, inputs, engine)
    else:
        if case.dtype == "bf16":
            setting += ", autocast"
        if engine == "compile":
            called, compiled = _compile(called, mode, False)
            setting += compiled
        run = _training(case, net, called, inputs)
    if graph:
        run = _graph(run, inputs)
        setting += ", CUDA graph"

    def outputs(result: Any) -> cases.Outputs:
        gradients = {
            f"grad of {name}": p.grad.float().contiguous() for name, p in net.named_parameters() if p.grad is not None
        }
        return {"scores": result.detach().float().cpu(), **{name: g.cpu() for name, g in gradients.items()}}

    return Runner(run, outputs, setting, parameters=list(net.parameters()))


def _compile(module: nn.Module, mode: str | None, freeze: bool) -> tuple[nn.Module, str]:
    if freeze:  # constants folded, filters repacked once: what inductor does for a served model
        import torch._inductor.config as inductor

        inductor.freezing = True
    compiled: nn.Module = torch.compile(module, mode=mode)  # type: ignore[assignment]
    return compiled, (", inductor with freezing" if freeze else ", inductor") + (f", {mode}" if mode else "")


def _inference(called: nn.Module, inputs: list[Tensor], engine: str) -> Callable[[int], Tensor]:
    quiet = torch.no_grad if engine == "compile" else torch.inference_mode  # freezing wants no_grad

    def run(buffer: int) -> Tensor:
        with quiet():
            scores: Tensor = called(inputs[buffer])
            return scores

    return run


def _training(case: Case, net: nn.Module, called: nn.Module, inputs: list[Tensor]) -> Callable[[int], Tensor]:
    classes = [m for m in net.modules() if isinstance(m, nn.Linear)][-1].out_features
    target = cases.targets(case, classes).to(case.device)
    parameters = list(net.parameters())

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(case.device, torch.bfloat16) if case.dtype == "bf16" else nullcontext()

    def run(buffer: int) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        with autocast():
            scores: Tensor = called(inputs[buffer])
            loss = F.cross_entropy(scores.float(), target)
        torch.autograd.backward(loss)
        return scores

    return run


def _graph(run: Callable[[int], Tensor], inputs: list[Tensor]) -> Callable[[int], Tensor]:
    """The run on buffer 0 as one CUDA graph; other buffers are copied into it, which is part of the time."""
    static = inputs[0].clone()
    originals = [x.clone() for x in inputs]
    inputs[0] = static
    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(3):
            run(0)
    cuda.current_stream().wait_stream(side)
    captured = cuda.CUDAGraph()
    with cuda.graph(captured):
        scores = run(0)

    def replay(buffer: int) -> Tensor:
        static.copy_(originals[buffer])
        captured.replay()
        return scores

    return replay


# ---- single layers -------------------------------------------------------------------------------------------------


def _layer(case: Case, files: dict[str, str], engine: str, layout: str, mode: str | None) -> Runner:
    layer = case.layer
    assert layer is not None
    data = [copy(each) for each in _layer_data(case.subject, case.batch, case.dtype, case.device)]
    if case.task != "forward":
        data[0].grad = answers.load(case, files["reference"])[cases.GIVEN].to(data[0].grad)
    for each in data:
        each.x, each.weight, each.bias = (t.detach() for t in (each.x, each.weight, each.bias))
        # The layer before hands its image over in channels_last where that is the network's layout; vggfast's always does.
        each.x, each.grad = (t.to(memory_format=getattr(torch, layout)) for t in (each.x, each.grad))
        if engine != "vggfast":
            each.weight = each.weight.to(memory_format=getattr(torch, layout))
    forward = _forward(engine, mode)
    setting = {"contiguous_format": "NCHW"}.get(layout, layout) + (f", inductor, {mode}" if mode else "")
    if case.task == "forward":

        def run_forward(buffer: int) -> tuple[Tensor, ...]:
            d = data[buffer]
            with torch.inference_mode():
                return (forward(d.x, d.weight, d.bias, layer.pool),)

        return Runner(run_forward, lambda result: _named(("y",), result), setting)
    names = tuple(cases.differentiated(case, data[0]))
    inputs = [list(cases.differentiated(case, each).values()) for each in data]
    if case.task == "forward+backward":

        def run_both(buffer: int) -> tuple[Tensor, ...]:
            d = data[buffer]
            y = forward(d.x, d.weight, d.bias, layer.pool)
            return (y.detach(), *torch.autograd.grad(y, inputs[buffer], d.grad))

        return Runner(run_both, lambda result: _named(("y", *names), result), setting)
    with torch.enable_grad():
        done = [forward(d.x, d.weight, d.bias, layer.pool) for d in data]

    def run_backward(buffer: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(done[buffer], inputs[buffer], data[buffer].grad, retain_graph=True)

    return Runner(run_backward, lambda result: _named(names, result), setting)


@lru_cache(maxsize=1)
def _layer_data(subject: str, batch: int, dtype: Any, device: Any) -> list[cases.LayerData]:
    """The same for every contender and task, which is why the last are kept."""
    case = Case(subject, "forward", batch, dtype, device)
    return [cases.layer_data(case, i) for i in range(case.buffers)]


def _forward(engine: str, mode: str | None = None) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    if engine == "vggfast":
        return lambda x, weight, bias, pool: ops.conv3x3(x, weight, bias, pool=pool)
    if engine == "cudnn":

        def cudnn(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
            y = torch.cudnn_convolution_relu(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)
            return F.max_pool2d(y, 2) if pool else y

        return cudnn
    if engine == "compile":
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # the backward pass is timed again and again on one forward pass
        # A CUDA graph would copy the layer's input in and its output out.
        compiled: Any = torch.compile(cases.plain_layer, dynamic=False, mode=f"{mode}-no-cudagraphs" if mode else None)
        return compiled  # type: ignore[no-any-return]
    return cases.plain_layer


def _named(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> cases.Outputs:
    return {name: t.detach().float() for name, t in zip(names, tensors, strict=True)}


def describe_kernel(case: Case) -> str:
    """The kernel that vggfast takes for a layer's task, with its plan; of forward with backward, the forward one."""
    layer = case.layer
    assert layer is not None
    x = torch.empty(case.batch, layer.c_in, layer.size, layer.size, dtype=DTYPES[case.dtype], device=case.device)
    weight = torch.empty(layer.c_out, layer.c_in, 3, 3, dtype=x.dtype, device=x.device)
    step = case.task if case.device == "cuda" and case.task in ("grad_input", "grad_weight") else "forward"
    decision = ops.conv3x3_kernel(x, weight, pool=layer.pool, step=step)
    if decision.fused and case.device == "cpu" and case.task in ("grad_input", "grad_weight"):
        dtype = str(x.dtype).removeprefix("torch.")
        plan: str = _C.cpu_plan(case.task, case.batch, layer.c_in, layer.c_out, layer.size, layer.size, dtype)
        return plan.partition(": ")[0]
    return decision.kernel if decision.fused else f"aten: {decision.reason}"
