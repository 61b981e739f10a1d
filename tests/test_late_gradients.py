"""Gradients of large fully connected weights come last, and are what they would have been at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vggfast
from vggfast import late_gradients, ops

Step = Callable[[nn.Module, Tensor], list[Tensor]]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    classifier = [
        nn.Flatten(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, 1030, bias=False),
        nn.ReLU(),
        nn.Linear(1030, 5),
    ]
    return vggfast.convert(nn.Sequential(*layers, *classifier))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def arrival(model: nn.Module) -> list[str]:
    """The names of parameters, in the order in which they get their gradients from now on."""
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    return order


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def backward(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().sum().backward()
    return gradients_of(model)


def under_autocast(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    return gradients_of(model)


def bfloat16_weights_under_autocast(model: nn.Module, x: Tensor) -> list[Tensor]:
    model[6].weight.data = model[6].weight.data.bfloat16()
    return under_autocast(model, x)


def in_half_precision(model: nn.Module, x: Tensor) -> list[Tensor]:
    return backward(model.bfloat16(), x.bfloat16())


def twice_over_one_graph(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x).square().sum()
    y.backward(retain_graph=True)
    y.backward()
    return gradients_of(model)


def in_two_threads_over_one_graph(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    found: list[tuple[Tensor, ...]] = [(), ()]

    def run(i: int) -> None:
        for _ in range(20):
            found[i] = torch.autograd.grad(y, list(model.parameters()), torch.full_like(y, i + 1.0), retain_graph=True)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [*found[0], *found[1]]


def of_some_parameters(model: nn.Module, x: Tensor) -> list[Tensor]:
    x.requires_grad_()
    wanted = [[model[6].weight], [model[6].bias], [x], [model[8].weight, model[0].weight]]
    return [g for some in wanted for g in torch.autograd.grad(model(x).square().sum(), some)]


def of_the_second_order(model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))


def of_a_batch_of_outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x).sum(0)
    return list(torch.autograd.grad(y, list(model.parameters()), torch.eye(5), is_grads_batched=True))


def of_one_weight_in_two_layers(model: nn.Module, x: Tensor) -> list[Tensor]:
    model[8].weight, model[8].bias = nn.Parameter(model[6].weight.detach()), None
    weight = model[8].weight
    h = model[:6](x)
    (ops.linear(ops.linear(h, weight, relu=True), weight)).square().sum().backward()
    return gradients_of(model)


def in_anomaly_mode(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autograd.set_detect_anomaly(True):
        return backward(model, x)


def with_activations_elsewhere(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        return backward(model, x)


def checkpointed(model: nn.Module, x: Tensor, reentrant: bool = False) -> list[Tensor]:
    h = checkpoint(model[:5], x.requires_grad_(), use_reentrant=reentrant)
    checkpoint(model[5:], h, use_reentrant=reentrant).square().sum().backward()
    return gradients_of(model)


def checkpointed_by_the_older_way(model: nn.Module, x: Tensor) -> list[Tensor]:
    return checkpointed(model, x, reentrant=True)


def with_hooks_on_weights(model: nn.Module, x: Tensor) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.register_hook(lambda g: 3 * g)
    return backward(model, x)


def accumulated(model: nn.Module, x: Tensor) -> list[Tensor]:
    backward(model, x)
    return backward(model, 2 * x)


@pytest.mark.parametrize(
    "step",
    [
        *(backward, under_autocast, bfloat16_weights_under_autocast, in_half_precision, twice_over_one_graph),
        *(in_two_threads_over_one_graph, of_some_parameters, of_the_second_order, of_a_batch_of_outputs),
        *(of_one_weight_in_two_layers, in_anomaly_mode, with_activations_elsewhere, checkpointed),
        *(checkpointed_by_the_older_way, with_hooks_on_weights, accumulated),
    ],
)
def test_they_are_what_they_would_have_been(monkeypatch: pytest.MonkeyPatch, step: Step) -> None:
    late = step(network(), images())
    monkeypatch.setattr(late_gradients, "pays", lambda *_: False)
    at_once = step(network(), images())
    assert len(late) == len(at_once) > 0
    for ours, expected in zip(late, at_once, strict=True):
        assert ours.stride() == expected.stride()
        assert_same_bits(ours, expected)
        assert expected.count_nonzero() > 0


def test_they_come_after_those_of_all_activations() -> None:
    model = network()
    order = arrival(model)
    backward(model, images())
    assert set(order[-3:]) == {"6.weight", "6.bias", "8.weight"}
    assert len(order) == len(list(model.parameters()))


def test_a_torch_that_gives_nodes_no_order_makes_the_same_ones_early(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = backward(network(), images())
    monkeypatch.setattr(late_gradients, "_SET_ORDER", "_a_name_that_no_node_has")
    model = network()
    order = arrival(model)
    for ours, theirs in zip(backward(model, images()), expected, strict=True):
        assert_same_bits(ours, theirs)
    assert set(order[-2:]) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("why", ["processes exchange gradients", "no activation waits", "weights that are computed"])
def test_they_are_made_at_once(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    model = network()
    if why == "processes exchange gradients":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elif why == "no activation waits":
        model[0].requires_grad_(False)
        model[2].requires_grad_(False)
    else:
        for i in (6, 8):
            nn.utils.parametrizations.weight_norm(model[i])
    called = []
    monkeypatch.setattr(late_gradients, "placeholders", lambda *_: called.append(1))
    first = model[8].parametrizations.weight.original1 if why == "weights that are computed" else model[8].weight
    if why == "no activation waits":  # but that of the first layer waits for the second
        x = model[:6](images())
        ops.linear(x, model[6].weight, model[6].bias).sum().backward()
        assert model[6].weight.grad is not None
    else:
        backward(model, images())
        assert first.grad is not None
    assert not called


def test_a_copy_of_a_placeholder_is_noticed() -> None:
    weight = torch.randn(4, 5, requires_grad=True)
    late, _ = late_gradients.late(weight, None)
    with pytest.raises(RuntimeError, match=r"expected a placeholder of ops\.linear as it was made"):
        late.sum().backward()


def layers_of(loss: Tensor) -> list[Any]:
    """The nodes of autograd's graph that belong to ops.linear."""
    found, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return [node for node in found if "vggfast_linear" in node.name()]


def test_a_hook_on_a_node_may_look_but_not_replace() -> None:
    """What it sees is NaN; what it put in its place would have become the gradient."""
    model = network()
    loss = model(images()).square().sum()
    for node in layers_of(loss):
        node.register_hook(lambda *_: None)
    loss.backward()
    assert all(bool(g.isfinite().all()) for g in gradients_of(model))
    loss = model(images()).square().sum()
    nodes = layers_of(loss)
    assert len(nodes) == 2
    for node in nodes:
        node.register_hook(lambda inputs, _: tuple(None if g is None else g.clone() for g in inputs))
    with pytest.raises(RuntimeError, match="register the hook on the weight or on a module"):
        loss.backward()


def test_copies_of_a_model_do_not_share_anything() -> None:
    model = network()
    other = copy.deepcopy(model)
    ours, theirs = backward(model, images()), backward(other, images())
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def test_a_pass_that_ended_before_the_late_node_leaves_nothing_behind() -> None:
    model = vggfast.convert(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()))
    x = torch.randn(2, 1024, requires_grad=True)
    y = model(x).square().sum()
    torch.autograd.grad(y, x, retain_graph=True)
    (again,) = torch.autograd.grad(y, model[0].weight, create_graph=True)
    torch.autograd.grad(y, x, retain_graph=True)
    with torch.autograd.set_detect_anomaly(True):
        (watched,) = torch.autograd.grad(y, model[0].weight, retain_graph=True)
    torch.testing.assert_close(again, watched)
    torch.testing.assert_close(again, torch.autograd.grad(y, model[0].weight)[0])
