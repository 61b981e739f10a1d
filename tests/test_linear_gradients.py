"""Gradients of ops.linear that a training step alone does not show: of weights that are calculated, of the second order, under autocast."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import gradients, normal
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

from vggfast import convert, ops

OUT, IN = 1100, 1000  # just enough weights for the kernel
Linear = Callable[..., Tensor]


def leaves(*needs: bool) -> list[Tensor]:
    made = normal(3, IN), normal(OUT, IN, seed=1) / IN**0.5, normal(OUT, seed=2)
    return [t.requires_grad_(need) for t, need in zip(made, needs or (True,) * 3, strict=True)]


def test_of_a_weight_that_is_calculated() -> None:
    """It is no leaf, whose gradient might come last."""

    def run(linear: Linear) -> list[Tensor]:
        x, weight, bias = leaves()
        return gradients(linear(x, weight * 2, bias + 1).sin().sum(), (x, weight, bias))

    assert ops.linear_kernel(*leaves()).fused
    for ours, theirs in zip(run(ops.linear), run(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_of_the_second_order_through_every_operand() -> None:
    def run(linear: Linear, dtype: torch.dtype) -> list[Tensor]:
        operands = [t.detach().to(dtype).requires_grad_() for t in leaves()]
        first = torch.autograd.grad(linear(*operands).sin().sum(), operands, create_graph=True)
        return gradients(sum(t.square().sum() for t in first), tuple(operands))  # type: ignore[arg-type]

    for ours, exact in zip(run(ops.linear, torch.float32), run(F.linear, torch.float64), strict=True):
        assert float((ours.double() - exact).norm()) <= 1e-5 * float(exact.norm())


def test_of_the_second_order_wherever_torch_has_one() -> None:
    """Zeros for the bias of a layer with ReLU, not None."""
    for linear in (lambda *operands: F.relu(F.linear(*operands)), lambda *operands: ops.linear(*operands, relu=True)):
        x, weight, bias = leaves()
        (first,) = torch.autograd.grad(linear(x, weight, bias).sum(), x, create_graph=True)
        again = torch.autograd.grad(first.square().sum(), (x, weight, bias))
        assert [bool(t.any()) for t in again] == [False, True, False]


def test_of_the_second_order_under_autocast() -> None:
    """The weights are float32 still, the gradient of the output is not."""

    def run(linear: Linear) -> list[Tensor]:
        operands = leaves()
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(*operands)
        first = torch.autograd.grad(y.float().sin().sum(), operands, create_graph=True)
        return gradients(sum(t.square().sum() for t in first), tuple(operands))  # type: ignore[arg-type]

    for ours, theirs in zip(run(ops.linear), run(F.linear), strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).norm()) <= 0.02 * float(theirs.norm())


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_the_input_is_saved_for_those_of_weight_and_bias_alone(needs: tuple[bool, ...]) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear(*leaves(*needs))
    assert any(t.shape == (3, IN) for t in saved) == (needs[1] or needs[2])


def test_of_each_sample_by_torchs_expanded_weights() -> None:
    """A subclass of Tensor that refuses whatever it is asked, but for torch's own layers."""
    plain = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 3))
    fused = convert(copy.deepcopy(plain))
    x, _, _ = leaves(False, False, False)
    for network in (plain, fused):
        call_for_per_sample_grads(network)(x).sin().sum().backward()
    for ours, torchs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad_sample, torchs.grad_sample)
