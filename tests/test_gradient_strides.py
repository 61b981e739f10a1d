"""Gradients have the strides that torch's have: those that autograd.grad returns, those that hooks see, and those of leaves."""

from __future__ import annotations

import pytest
import torch
from test_fused_container import _one_thread, image, pair  # noqa: F401 (the fixture is every test's)
from torch import nn

from vggfast import FusedSequential


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        (torch.contiguous_format, torch.contiguous_format),
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.channels_last),
        pytest.param(
            torch.channels_last,
            torch.contiguous_format,
            marks=pytest.mark.xfail(reason="gradients of weights have the weights' format, torch's that of the images"),
        ),
    ],
)
def test_gradients_have_the_strides_of_torchs(layout: torch.memory_format, weights: torch.memory_format) -> None:
    """`grad.view(n, -1)` is written for inputs that are contiguous."""
    fused, plain = pair()
    strides = []
    for network in (fused, plain):
        network.to(memory_format=weights)
        x = image().to(memory_format=layout).requires_grad_()
        gradients = torch.autograd.grad(network(x).sum(), [x, *network.parameters()])
        strides.append([g.stride() for g in gradients])
    assert strides[0] == strides[1]


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("first", [0, 2, 5])
def test_the_gradient_of_an_image_or_a_feature_map_has_the_strides_of_torchs(
    layout: torch.memory_format, weights: torch.memory_format, first: int
) -> None:
    """By autograd.grad, and as a hook sees it: what attacks and class activation maps take apart with `view`."""
    strides = []
    for network in pair():
        network.to(memory_format=weights)
        x = network[:first](image()).detach().to(memory_format=layout, copy=True).requires_grad_()
        seen: list[torch.Tensor] = []
        x.register_hook(seen.append)
        y = network[first:](x).sum()
        y.backward(retain_graph=True)
        strides.append([g.stride() for g in (*torch.autograd.grad(y, x), *seen)])
    assert strides[0] == strides[1]


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_accumulated_gradients_have_the_strides_of_torchs(
    layout: torch.memory_format, weights: torch.memory_format
) -> None:
    fused, plain = pair()
    strides = []
    for network in (fused, plain):
        network.to(memory_format=weights)
        x = image().to(memory_format=layout).requires_grad_()
        network(x).sum().backward()
        strides.append([t.grad.stride() for t in (x, *network.parameters())])
    assert strides[0] == strides[1]


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        (torch.contiguous_format, torch.contiguous_format),
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.channels_last),
    ],
)
def test_gradients_to_differentiate_have_the_strides_of_torchs(
    layout: torch.memory_format, weights: torch.memory_format
) -> None:
    """`torch.cat([g.view(-1) for g in gradients])` is how Hessian-vector products are written."""
    strides = []
    for network in pair():
        network.to(memory_format=weights)
        x = image().to(memory_format=layout).requires_grad_()
        gradients = torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()], create_graph=True)
        named = {name: p.detach() for name, p in network.named_parameters()}
        made = torch.func.grad(lambda p, net=network, x=x: torch.func.functional_call(net, p, (x,)).square().sum())(
            named
        )
        strides.append([g.stride() for g in (*gradients, *made.values())])
    assert strides[0] == strides[1]


@pytest.mark.parametrize("size", [(1, 6, 4), (3, 1, 1), (1, 1, 1), (4, 1, 5), (1, 5, 1)])
def test_gradients_of_images_with_a_dimension_of_size_one(size: tuple[int, ...]) -> None:
    """Where a size is 1 contiguous tensors have more than one set of strides, and torch's next layer looks at them."""
    strides = []
    for build in (nn.Sequential, FusedSequential):
        network = build(nn.Conv2d(size[0], 4, 3, padding=1), nn.ReLU())
        x = torch.randn(2, *size, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(x).sum(), x)
        network(x).sum().backward()
        assert x.grad is not None
        strides.append((gradient.stride(), x.grad.stride()))
    assert strides[0] == strides[1]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("channels", [(1, 4), (4, 1), (1, 1)])
def test_gradients_of_channels_last_filters_of_one_channel(channels: tuple[int, int], create_graph: bool) -> None:
    strides = []
    for build in (nn.Sequential, FusedSequential):
        network = build(nn.Conv2d(*channels, 3, padding=1), nn.ReLU()).to(memory_format=torch.channels_last)
        loss = network(torch.randn(2, channels[0], 6, 6)).square().sum()
        (gradient,) = torch.autograd.grad(loss, network[0].weight, retain_graph=True, create_graph=create_graph)
        loss.backward()
        strides.append((gradient.stride(), network[0].weight.grad.stride()))
    assert strides[0] == strides[1]


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_many_gradients_at_once(weights: torch.memory_format) -> None:
    x = image().to(memory_format=torch.channels_last).requires_grad_()
    network = pair()[0].to(memory_format=weights)
    y = network(x)
    directions = torch.stack([torch.ones_like(y), y.detach()])
    for leaf in (x, *network.parameters()):
        batched = torch.autograd.grad(y, leaf, directions, is_grads_batched=True, retain_graph=True)[0]
        each = [torch.autograd.grad(y, leaf, direction, retain_graph=True)[0] for direction in directions]
        torch.testing.assert_close(batched, torch.stack(each))
    assert torch.autograd.grad(y.sum(), x)[0]._base is None  # autograd adds to no view in place
