"""What depends on the torch that runs beneath one and the same built library: registration, autograd, compile, autocast, torch.func."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vggfast
from vggfast import ops


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2)


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.conv3x3(x, weight, bias, pool=True)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 16, 12, 12), torch.randn(24, 16, 3, 3) / 12, torch.randn(24)


def gradients(function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 5e-6) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm() / b.norm()) <= tolerance


def test_forward_and_gradients(inputs: tuple[Tensor, ...]) -> None:
    assert ops.conv3x3_kernel(*inputs, pool=True).fused
    assert_close(gradients(fused, inputs), gradients(plain, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        got, expected = fused(*inputs), plain(*inputs)
    assert got.dtype == expected.dtype == dtype
    assert_close((got.float(),), (expected.float(),), 2e-2)


def test_opcheck(inputs: tuple[Tensor, ...]) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.vggfast.conv3x3.default, (*leaves, True, True, True))
    torch.library.opcheck(torch.ops.vggfast.conv3x3.default, (*leaves, True, False, False))
    torch.library.opcheck(torch.ops.vggfast.max_pool2x2.default, (leaves[0], True))
    rows, matrix = torch.randn(3, 40, requires_grad=True), torch.randn(7, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.vggfast.linear.default, (rows, matrix, torch.randn(7, requires_grad=True), True))
    torch.library.opcheck(
        torch.ops.vggfast.linear_grad_input.default, (torch.randn(3, 7), matrix.detach(), torch.randn(3, 7))
    )
    torch.library.opcheck(torch.ops.vggfast.linear_grad_weight.default, (rows.detach(), torch.randn(3, 7), None, False))
    y, argmax = torch.ops.vggfast.conv3x3(*inputs, True, True, True)
    torch.library.opcheck(torch.ops.vggfast.conv3x3_grad_input.default, (y, inputs[1], y, argmax, 12, 12))
    torch.library.opcheck(torch.ops.vggfast.conv3x3_grad_weight.default, (inputs[0], y, y, argmax))
    torch.library.opcheck(torch.ops.vggfast.max_pool2x2_grad.default, (y, argmax, 12, 12))


def test_compile(inputs: tuple[Tensor, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, inputs), gradients(plain, inputs))


def test_func_grad_and_vmap(inputs: tuple[Tensor, ...]) -> None:
    got = torch.func.grad(lambda *t: fused(*t).square().sum(), argnums=(0, 1, 2))(*inputs)
    assert_close(got, gradients(plain, inputs)[1:])
    assert_close((torch.func.vmap(lambda x: fused(x[None], *inputs[1:])[0])(inputs[0]),), (plain(*inputs),))


def test_double_backward(inputs: tuple[Tensor, ...]) -> None:
    def penalty(function):  # type: ignore[no-untyped-def]
        leaves = [t.clone().requires_grad_() for t in inputs]
        (first,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves)

    assert_close(penalty(fused), penalty(plain))


def test_no_pre_pool_activation_is_saved(inputs: tuple[Tensor, ...]) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = fused(*leaves)
    assert sorted(t.numel() * t.element_size() for t in saved) == sorted(
        [inputs[0].numel() * 4, inputs[1].numel() * 4, y.numel() * 4, y.numel() // 4]
    )


def test_vgg_trains(inputs: tuple[Tensor, ...]) -> None:
    model = vggfast.VGG11(num_classes=4, dropout=0.0)
    explanation = vggfast.explain(model, torch.randn(1, 3, 32, 32))
    assert explanation.fused_convolutions == explanation.convolutions == 8
    x, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True), losses


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(1, 4, 8, 8), torch.randn(8, 3, 3, 3)), RuntimeError, "3 channels"),
        ((torch.randn(1, 3, 8, 8), torch.randn(8, 3, 5, 5)), ValueError, r"\[C_out, C_in, 3, 3\], got \[8, 3, 5, 5\]"),
        (("x", torch.randn(8, 3, 3, 3)), TypeError, "expected a torch.Tensor, got str"),
        ((torch.randn(1, 3, 8, 8).bfloat16(), torch.randn(8, 3, 3, 3)), RuntimeError, "(?i)type"),
        ((torch.randn(8, 8), torch.randn(8, 3, 3, 3)), RuntimeError, "(?i)3D .*4D"),
    ],
)
def test_errors(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.conv3x3(*arguments)  # type: ignore[arg-type]
