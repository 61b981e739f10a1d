"""Runs of Linear -> ReLU in a FusedSequential: fused where the kernel takes them, and torch's answers everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import normal
from torch import nn

import vggfast
from vggfast import dispatch, ops
from vggfast.fused import FusedSequential


def head(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1000, 1100), nn.ReLU(True), nn.Dropout(dropout), nn.Linear(1100, 1000), nn.ReLU(), nn.Linear(1000, 10)
    )


def test_convert_fuses_a_classifier_of_any_model() -> None:
    plain = head().eval()
    ours = vggfast.convert(copy.deepcopy(plain))
    assert type(ours) is FusedSequential
    assert [row.name for row in vggfast.explain(ours, normal(2, 1000)).rows if row.fused] == ["0..1", "3..4"]
    torch.testing.assert_close(ours(normal(2, 1000)), plain(normal(2, 1000)), rtol=1e-5, atol=1e-5)
    assert type(vggfast.convert(nn.Sequential(nn.Linear(10, 10), nn.ReLU()))) is nn.Sequential


def test_training_steps_follow_torchs() -> None:
    nets = [head(0.5), vggfast.convert(head(0.5))]
    states = []
    for net in nets:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            net(normal(4, 1000, seed=step)).square().sum().backward()
            optimizer.step()
        states.append(net.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)


def test_a_run_asks_once_whether_the_kernel_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    why_not = dispatch.why_not_linear
    monkeypatch.setattr(dispatch, "why_not_linear", lambda *arguments: asked.append(arguments) or why_not(*arguments))
    net, x = vggfast.convert(head().eval()), normal(2, 1000)
    net(x)
    assert len(asked) == sum(isinstance(module, nn.Linear) for module in net)
    for rows in (2, dispatch.LINEAR_ROWS + 1):  # by itself the op asks, too
        asked.clear()
        ops.linear(normal(rows, 1000), net[0].weight)
        assert len(asked) == 1


def test_hooks_patches_and_in_place_modules_are_seen() -> None:
    net = vggfast.convert(head().eval())
    x, seen = normal(2, 1000), []
    handle = net[1].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    expected = net(x)
    handle.remove()
    assert torch.equal(seen[0], F.relu(ops.linear(x, net[0].weight, net[0].bias)))
    assert torch.equal(net(x), expected)
    tail = FusedSequential(nn.Linear(1000, 1100), nn.ReLU(), nn.Dropout(0.5, inplace=True), nn.Linear(1100, 1000))
    plain = nn.Sequential(*copy.deepcopy(tail))
    plain[2].inplace = False  # torch refuses to overwrite what its ReLU saved; here it gets a copy
    for network in (tail, plain):
        torch.manual_seed(3)
        network(x).square().sum().backward()
    for ours, theirs in zip(tail.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


def test_compiled_without_breaks() -> None:
    net = vggfast.convert(head())
    compiled = torch.compile(net, fullgraph=True)
    x = normal(3, 1000)
    expected, got = (run(x).square().sum() for run in (net, compiled))
    torch.testing.assert_close(got, expected)
    gradients_ = [torch.autograd.grad(loss, list(net.parameters())) for loss in (expected, got)]
    for ours, theirs in zip(*gradients_, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_is_compiled_without_breaks() -> None:
    net = vggfast.convert(head())
    compiled = torch.compile(net, fullgraph=True)
    x = normal(3, 1000)
    results = []
    for run in (net, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), list(net.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_nested_tensors_are_torchs() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024))
    x = torch.nested.nested_tensor([normal(3, 1024), normal(5, 1024, seed=1)])
    with torch.no_grad():
        expected = model(x)
        found = vggfast.convert(model)(x)
        assert all(torch.equal(a, b) for a, b in zip(found.unbind(), expected.unbind(), strict=True))
        assert ops.linear(x, model[0].weight, model[0].bias).size(0) == 2
