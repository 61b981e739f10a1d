"""A network that is compiled, traced, scripted, exported or transformed by torch.func gives what plain torch modules give."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from usage_reference import assert_same, backward, image, layers, pair

from vggfast import VGG11, FusedSequential


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    fused, plain = pair() if backend == "aot_eager" else (network[:4] for network in pair())  # C++ takes its time
    assert_same(backward(fused, torch.compile(fused, fullgraph=True, backend=backend)), backward(plain))


def test_compile_keeps_the_fused_ops() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(pair()[0], fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    compiled(image())
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(torch.ops.vggfast.conv3x3) + targets.count(torch.ops.vggfast.conv3x3.default) == 3


def test_compile_with_dynamic_sizes_compiles_once() -> None:
    torch._dynamo.reset()
    network, plain = FusedSequential(*layers()[:9]).eval(), nn.Sequential(*layers()[:9]).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    for n, size in ((2, 18), (3, 20), (5, 24), (2, 14)):
        assert_same(backward(network, compiled, image(n=n, size=size)), backward(plain, x=image(n=n, size=size)))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("child", "method"), [(2, "_conv_forward"), (2, "forward"), (3, "forward"), (4, "forward")])
def test_compiled_graphs_notice_methods_of_objects_replaced_later(child: int, method: str) -> None:
    torch._dynamo.reset()
    fused, plain = pair()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(backward(fused, compiled), backward(plain))
    for network in (fused, plain):
        original = getattr(network[child], method)
        setattr(network[child], method, lambda *args, original=original: 2 * original(*args))
    assert_same(backward(fused, compiled), backward(plain))
    for network in (fused, plain):
        delattr(network[child], method)
    assert_same(backward(fused, compiled), backward(plain))


def test_compiled_graphs_notice_patched_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    fused, plain = pair()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(backward(fused, compiled), backward(plain))
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: 2 * x)
    assert_same(backward(fused, compiled), backward(plain))


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        y = function(*args, **(kwargs or {}))
        return 2 * y if function is torch.conv2d else y


def test_compiled_graphs_obey_function_modes() -> None:
    torch._dynamo.reset()
    fused, plain = pair()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(backward(fused, compiled), backward(plain))
    with Doubled():
        assert_same([compiled(image()).detach()], [plain(image()).detach()])


def test_a_default_device_leaves_compiled_graphs_fused() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(pair()[0], fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.device("cpu"):
        compiled(image())
    assert str(graphs[0].graph).count("torch.ops.vggfast.conv3x3") == 3


@pytest.mark.parametrize("way", ["fx", "trace", "script", "export", "export, dynamic"])
def test_captured_graphs_hold_torchs_operators(way: str, tmp_path) -> None:
    fused, plain = pair()
    if way == "fx":
        captured: Callable[[Tensor], Tensor] = torch.fx.symbolic_trace(fused)
    elif way == "trace":
        captured = torch.jit.trace(fused, image())
    elif way == "script":
        torch.jit.script(fused).save(str(tmp_path / "scripted"))
        captured = torch.jit.load(str(tmp_path / "scripted"))
    else:
        dynamic = ({0: torch.export.Dim("n", min=2)},) if "dynamic" in way else None
        program = torch.export.export(fused, (image(),), dynamic_shapes=dynamic)
        assert "vggfast" not in str(program.graph)
        torch.export.save(program, str(tmp_path / "exported"))
        captured = torch.export.load(str(tmp_path / "exported")).module()
    sizes = (2,) if way == "export" else (2, 5)
    for n in sizes:
        assert_same([captured(image(n=n)).detach()], [plain(image(n=n)).detach()])
    assert_same([fused(image()).detach()], [captured(image()).detach()])


def test_vgg_is_exported_and_compiled_and_scripted() -> None:
    torch._dynamo.reset()
    model = VGG11(num_classes=3, dropout=0.0).eval().requires_grad_(False)
    x = image(size=32)
    expected = [model(x)]
    assert_same([torch.compile(model, fullgraph=True, backend="aot_eager")(x)], expected)
    assert_same([torch.export.export(model, (x,)).module()(x)], expected)
    assert_same([torch.jit.script(model)(x)], expected)


# ---- torch.func ----------------------------------------------------------------------------------------------------


def loss(network: nn.Module, x: Tensor) -> Tensor:
    return network(x).square().sum()


COMPILED_TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "grad": lambda n, x: torch.func.grad(lambda t: loss(n, t))(x),
    "jvp": lambda n, x: torch.func.jvp(lambda t: n(t), (x,), (x + 1,))[1],
    "vmap": lambda n, x: torch.func.vmap(lambda t: n(t[None])[0])(x),
    "vmap of grad": lambda n, x: torch.func.vmap(torch.func.grad(lambda t: loss(n, t[None])))(x),
}


@pytest.mark.parametrize("name", COMPILED_TRANSFORMS)
def test_compiled_transforms(name: str) -> None:
    torch._dynamo.reset()
    fused, plain = (network[:3] for network in pair())  # torch cannot compile the jvp of its own BatchNorm
    transform = COMPILED_TRANSFORMS[name]
    compiled = torch.compile(lambda x: transform(fused, x), fullgraph=True, backend="aot_eager")
    assert_same([compiled(image())], [transform(plain, image())])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_ensemble_by_vmap(layout: torch.memory_format) -> None:
    """torch.func's stacked module states: batched weights in one call."""
    networks = [FusedSequential(*layers()).eval() for _ in range(3)]
    for scale, network in enumerate(networks, 1):
        network[2].weight.data.mul_(scale)
    params, buffers = torch.func.stack_module_state(networks)
    base, x = copy.deepcopy(networks[0]).to("meta"), image().to(memory_format=layout)
    y = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(params, buffers)
    assert_same(list(y.detach()), [nn.Sequential(*network)(x).detach() for network in networks])


def test_a_gradient_within_a_gradient() -> None:
    """The inner one is of a head alone, so that nothing at its level says that the body's pool is differentiated at all."""
    found = []
    for build in (FusedSequential, nn.Sequential):
        torch.manual_seed(0)
        body = build(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)
        )
        body.requires_grad_(False)
        head = torch.randn(8)

        def adapted(x: Tensor, body: nn.Module = body, head: Tensor = head) -> Tensor:
            def loss(head: Tensor) -> Tensor:
                return (body(x).mean((2, 3)) @ head).square().sum()

            return loss(head - 0.1 * torch.func.grad(loss)(head))

        found.append(torch.func.grad(adapted)(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
