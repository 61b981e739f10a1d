"""ReLU and pool without a convolution before them, as behind a BatchNorm in training: one run, whose ReLU comes last."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from reference import normal
from torch import Tensor, nn

import vggfast
from vggfast import FusedSequential
from vggfast.bench import memory

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def pair(c: int, dtype: torch.dtype = torch.float32, inplace: bool = True) -> tuple[FusedSequential, nn.Sequential]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace), nn.MaxPool2d(2)).to(dtype)
    nn.init.normal_(plain[0].weight)
    nn.init.normal_(plain[0].bias)
    return FusedSequential(*copy.deepcopy(plain).children()), plain


def results(network: nn.Module, x: Tensor, grad: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """Output, gradients and the statistics afterwards; and the output's strides."""
    x = x.detach().requires_grad_()
    y = network(x)
    gradients = torch.autograd.grad(y, (x, *network.parameters()), grad)
    return [y, *gradients, *(b.clone() for b in network.buffers())], y.stride()


def grouped(network: nn.Module, x: Tensor) -> list[str]:
    return [row.layers for row in vggfast.explain(copy.deepcopy(network), x).rows]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 20, 8, 10), (3, 2, 7, 5), (1, 33, 2, 3), (2, 1, 6, 6)])
def test_bits_are_torchs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format, inplace: bool
) -> None:
    n, c, h, w = shape
    fused, plain = pair(c, dtype, inplace)
    x = normal(*shape).to(dtype).to(memory_format=layout)
    grad = normal(n, c, h // 2, w // 2).to(dtype)
    assert grouped(fused, x) == (["BatchNorm", "ReLU", "MaxPool"] if c == 1 else ["BatchNorm", "ReLU + MaxPool"])
    (ours, strides), (expected, expected_strides) = results(fused, x, grad), results(plain, x, grad)
    assert strides == expected_strides
    for got, wanted in zip(ours, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_ties_nan_and_infinities() -> None:
    """Behind a ReLU by itself, whose input they reach as they are."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1.0, -1.0])
    x = values[torch.randint(8, (4, 6, 12, 12), generator=torch.Generator().manual_seed(1))]
    layers = nn.ReLU(), nn.MaxPool2d(2)
    assert grouped(FusedSequential(*layers), x) == ["ReLU + MaxPool"]
    found = []
    for network in (FusedSequential(*layers), nn.Sequential(*layers)):
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        found.append((y.detach(), torch.autograd.grad(y, leaf, normal(4, 6, 6, 6))[0]))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("grad", [False, True])
def test_what_torch_overwrites_is_overwritten(grad: bool) -> None:
    """The caller's tensor, by an in-place ReLU that comes first or gets it handed on; nobody's behind a module whose output a hook has."""
    x = normal(2, 4, 6, 6)
    for container, before in itertools.product((FusedSequential, nn.Sequential), ([], [nn.Identity()])):
        network = container(*before, nn.ReLU(True), nn.MaxPool2d(2))
        mine = x.clone().requires_grad_(grad) * 1.0
        network(mine)
        assert torch.equal(mine, x.relu())
    fused, _ = pair(4)
    seen: list[Tensor] = []
    fused[0].register_forward_hook(lambda module, args, y: seen.append(y))
    fused(x)
    assert (seen[0] < 0).any()


def test_a_hook_sees_the_relus_output() -> None:
    outputs = []
    for network in pair(4):
        network[1].register_forward_hook(lambda module, args, y: outputs.append(y.detach().clone()))
        assert network(normal(2, 4, 6, 6)).shape == (2, 4, 3, 3)
    assert outputs[0].shape == (2, 4, 6, 6)
    assert torch.equal(*outputs)


def test_a_quarter_of_the_values_is_kept_for_the_backward_pass() -> None:
    x = normal(4, 16, 32, 32)
    kept = []
    for network in pair(16):
        with memory.Saved([*network.parameters()]) as saved:
            network(x.clone().requires_grad_())
        kept.append(saved.bytes - x.nbytes)  # BatchNorm's input
    ours, torchs = kept
    assert ours < 0.3 * x.nbytes
    assert torchs > x.nbytes


def test_a_gradient_may_be_differentiated_and_the_graph_compiled() -> None:
    fused, plain = pair(5)
    x = normal(2, 5, 6, 6)
    second = []
    for network in (fused, plain):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*second)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = compiled(leaf), plain(other)
    torch.testing.assert_close(y, expected)
    grad = normal(2, 5, 3, 3)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, grad), torch.autograd.grad(expected, other, grad))


def test_a_layer_that_writes_into_the_output_gets_a_copy() -> None:
    """The output is the ReLU's mask."""
    x, gradients = normal(2, 4, 6, 6), []
    for network in pair(4):
        longer = type(network)(*network.children(), nn.Hardtanh(-0.5, 0.5, inplace=True))
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(longer(leaf).sum(), leaf)[0])
    torch.testing.assert_close(*gradients)
