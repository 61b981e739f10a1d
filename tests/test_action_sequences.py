"""Drawn sequences of what users do to a network, done to FusedSequential and to nn.Sequential: both must show the same after each.

Compared are outputs and gradients (values, dtype, strides, whether they are leaves), parameters and buffers with their version
counters, calls of hooks, errors, the random numbers used, and what was done to the caller's input.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from vggfast import FusedSequential

# A value within rounding of zero, or of another in its window, may open a ReLU or win a pool here and not there.
BOUND, HALF_BOUND = 0.1, 0.4
# Errors of torch's alone: its in-place ReLUs overwrite what FusedSequential keeps for hooks and for gradients.
TORCHS_OWN = ("modified by an inplace operation", "is being modified inplace", "a leaf Variable")


class World:
    """One of the two networks, and what happened to it."""

    def __init__(self, network: nn.Sequential) -> None:
        self.network = network
        self.seen: list[tuple[str, Any]] = []
        self.handles: list[Any] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.half = False

    def see(self, what: str, value: Any) -> None:
        self.seen.append((what, kept(value)))


def kept(value: Any) -> Any:
    """What can be observed of a tensor, now."""
    if not isinstance(value, Tensor):
        return tuple(kept(v) for v in value) if isinstance(value, tuple) else value
    # Strides of dimensions of size 1 have tests of their own; behind a folded BatchNorm those of a gradient are not torch's.
    strides = tuple(s for s, n in zip(value.stride(), value.shape, strict=True) if n != 1)
    facts = (value.dtype, strides, value.requires_grad, value.is_leaf, value.grad_fn is None)
    return facts, value.detach().double().clone()


def state(world: World) -> list[tuple[str, Any]]:
    tensors = [*world.network.named_parameters(), *world.network.named_buffers()]
    return [
        ("keys", tuple(world.network.state_dict())),
        ("repr", repr(world.network).replace("FusedSequential", "Sequential")),
        ("random numbers", hash(tuple(torch.get_rng_state().tolist()))),
        *((name, (kept(t), t._version, kept(t.grad))) for name, t in tensors),
    ]


def assert_alike(ours: Any, torchs: Any, bound: float, where: str) -> None:
    if isinstance(torchs, Tensor):
        assert ours.shape == torchs.shape, where
        assert torch.equal(ours.isfinite(), torchs.isfinite()), where
        a, b = (t.nan_to_num(0, 0, 0) for t in (ours, torchs))
        assert (a - b).norm() <= bound * b.norm() + 1e-3 * bound, where
    elif isinstance(torchs, (tuple, list)):
        assert isinstance(ours, (tuple, list)), where
        assert len(ours) == len(torchs), where
        for a, b in zip(ours, torchs, strict=True):
            assert_alike(a, b, bound, f"{where} {b[0] if isinstance(b, tuple) and b and type(b[0]) is str else ''}")
    else:
        assert ours == torchs, where


# ---- what is done --------------------------------------------------------------------------------------------------


def image(world: World, draw: random.Random) -> Tensor:
    first = next(m for m in world.network.modules() if isinstance(m, nn.Conv2d))
    n, size = draw.choice([1, 2, 3]), draw.choice([8, 9, 16])
    generator = torch.Generator().manual_seed(draw.randrange(1000))
    x = torch.randn(n, first.in_channels, size, size + draw.choice([0, 1, 4]), generator=generator)
    x = x.to(first.weight.dtype)
    kinds: list[Callable[[], Tensor]] = [
        lambda: x,
        lambda: x,
        lambda: x.to(memory_format=torch.channels_last),
        lambda: torch.cat([x, x], 3)[..., ::2],
        lambda: x.transpose(2, 3),
        lambda: x[:1].expand(3, -1, -1, -1),
        lambda: x[:0],
        lambda: x[0],
        lambda: x[:, :, :1, :1],
        lambda: x.double(),
    ]
    return draw.choice(kinds)()


def mode(world: World, draw: random.Random) -> AbstractContextManager[Any]:
    kind = draw.choice(["", "", "", "no_grad", "inference", "autocast"])
    world.half = world.half or kind == "autocast"
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "autocast": lambda: torch.autocast("cpu")}
    return modes.get(kind, nullcontext)()


def step(world: World, draw: random.Random) -> None:
    x = image(world, draw).detach().requires_grad_(draw.random() < 0.5)
    passed = x * 1.0 if draw.random() < 0.5 else x
    before = passed.detach().clone()
    with mode(world, draw):
        y = world.network(passed)
    world.see("y", y)
    world.see("input", (passed._version, torch.equal(passed, before), y is passed))
    if y.requires_grad:
        world.see("loss", None)
        way = draw.choice(["sum", "square", "strided"])
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        if way == "strided":
            y.backward(grad.transpose(0, -1).contiguous().transpose(0, -1), retain_graph=draw.random() < 0.5)
        else:
            (y.sum() if way == "sum" else y.float().square().mean()).backward()
        world.see("gradient of the input", x.grad)
        if world.optimizer is not None:
            world.optimizer.step()
        if draw.random() < 0.5:
            world.network.zero_grad(set_to_none=draw.random() < 0.5)


def slices(world: World, draw: random.Random) -> None:
    """The network in two parts, with what lies between kept."""
    x = image(world, draw).detach().requires_grad_()
    at = draw.randrange(len(world.network) + 1)
    between = world.network[:at](x * 1.0)
    y = world.network[at:](between)
    world.see("y", y)
    (between.sum() + y.sum()).backward()
    world.see("gradient of the input", x.grad)


def switch(world: World, draw: random.Random) -> None:
    module = draw.choice([world.network, *world.network])
    draw.choice([module.train, module.eval, lambda: module.requires_grad_(draw.random() < 0.5)])()


def flip_in_place(world: World, draw: random.Random) -> None:
    relu = draw.choice([m for m in world.network.modules() if isinstance(m, nn.ReLU)] or [nn.ReLU()])
    relu.inplace = not relu.inplace


def layer(channels: int, draw: random.Random) -> nn.Module:
    c = channels
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.ReLU(draw.random() < 0.5),
        lambda: nn.LeakyReLU(0.1, draw.random() < 0.5),
        lambda: nn.Dropout(0.3, draw.random() < 0.5),
        lambda: nn.Identity(),
        lambda: nn.MaxPool2d(2, 2, ceil_mode=draw.random() < 0.5),
        lambda: nn.MaxPool2d(3, 2, 1),
        lambda: nn.AvgPool2d(2),
        lambda: nn.Conv2d(c, c, 3, padding=1, bias=draw.random() < 0.5),
        lambda: nn.Conv2d(c, c, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(c, c, 1),
        lambda: nn.Conv2d(c, c, 3, 2, 1),
        lambda: nn.Conv2d(c, c, 3, padding=2, dilation=2),
        lambda: nn.MaxPool2d(2, 2, 1),
        lambda: nn.BatchNorm2d(c, affine=draw.random() < 0.5, momentum=draw.choice([None, 0.1])).eval(),
        lambda: nn.GroupNorm(1, c),
        lambda: nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(True)),
    ]
    return draw.choice(kinds)()


def edit(world: World, draw: random.Random) -> None:
    network = world.network
    at = draw.randrange(1, len(network))
    channels = next(m.out_channels for m in reversed(network[:at]) if isinstance(m, nn.Conv2d))
    kind = draw.choice(["replace", "insert", "delete"])
    if kind == "replace" and not isinstance(network[at], nn.Conv2d):
        network[at] = layer(channels, draw)
    elif kind == "insert":
        network.insert(at, layer(channels, draw))
    elif kind == "delete" and not isinstance(network[at], nn.Conv2d):
        del network[at]


def reweigh(world: World, draw: random.Random) -> None:
    conv = draw.choice([m for m in world.network if isinstance(m, nn.Conv2d)])
    kind = draw.randrange(6)
    if kind == 0:
        conv.weight.data.mul_(0.9)
    elif kind == 1:
        conv.weight = nn.Parameter(conv.weight.detach().flip(0))
    elif kind == 2:
        conv.bias = None
    elif kind == 3:
        conv.to(memory_format=torch.channels_last)
    elif kind == 4:
        prune.l1_unstructured(conv, "weight", amount=0.5)
    else:
        parametrize.register_parametrization(conv, "weight", nn.Identity())


def hook(world: World, draw: random.Random) -> None:
    module, name = draw.choice(list(world.network)), f"hook {len(world.handles)}"
    kinds: list[Callable[[], Any]] = [
        lambda: module.register_forward_hook(lambda m, a, y: world.see(name, (a, y))),
        lambda: module.register_forward_pre_hook(lambda m, a: world.see(name, a)),
        lambda: module.register_full_backward_hook(lambda m, gi, go: world.see(name, (gi, go))),
        lambda: module.register_forward_hook(lambda m, a, y: y * 2),
        lambda: module.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    ]
    world.handles.append(draw.choice(kinds)())


def unhook(world: World, draw: random.Random) -> None:
    while world.handles:
        world.handles.pop().remove()


def replicate(world: World, draw: random.Random) -> None:
    unhook(world, draw)
    world.optimizer = None
    if draw.random() < 0.5:
        world.network = copy.deepcopy(world.network)
    elif not any(map(parametrize.is_parametrized, world.network)):
        world.network = pickle.loads(pickle.dumps(world.network))
    else:
        file = io.BytesIO()
        torch.save(world.network.state_dict(), file)
        file.seek(0)
        world.network.load_state_dict(torch.load(file, weights_only=True), assign=draw.random() < 0.5)


def optimize(world: World, draw: random.Random) -> None:
    parameters = list(world.network.parameters())
    world.optimizer = torch.optim.SGD(parameters, 0.001, momentum=0.9, foreach=draw.random() < 0.5)


def cast(world: World, draw: random.Random) -> None:
    world.network.to(draw.choice([torch.bfloat16, torch.float64]))
    step(world, draw)
    world.half = True
    world.network.float()


ACTIONS = [*[step] * 6, slices, switch, switch, flip_in_place, *[edit] * 4, reweigh, hook, hook, unhook]
ACTIONS += [replicate, optimize, cast]


# ---- the two, side by side -----------------------------------------------------------------------------------------


def chain(draw: random.Random) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels, norm = draw.choice([1, 3, 8]), draw.random() < 0.4
    for _ in range(draw.randrange(2, 5)):
        width = draw.choice([1, 5, 8, 16])
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")
        layers += [nn.BatchNorm2d(width).eval()] * norm + [nn.ReLU(draw.random() < 0.7)]
        layers += [nn.MaxPool2d(2, 2)] * (draw.random() < 0.4)
        channels = width
    return layers


def pair(seed: int) -> Iterator[World]:
    for build in (FusedSequential, nn.Sequential):
        torch.manual_seed(seed)
        yield World(build(*chain(random.Random(seed))))


def error_of(action: Callable[[World, random.Random], None], world: World, seed: int) -> tuple[str, str]:
    torch.manual_seed(seed)
    world.seen.clear()
    try:
        action(world, random.Random(seed))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_both_networks_show_the_same(first: int) -> None:
    torch.set_num_threads(1)
    for seed in range(first, first + 20):
        ours, torchs = pair(seed)
        draw = random.Random(seed)
        for number in range(12):
            action, value = draw.choice(ACTIONS), draw.randrange(2**31)
            where = f"sequence {seed}, {number}: {action.__name__}:"
            error, torchs_error = error_of(action, ours, value), error_of(action, torchs, value)
            if any(text in torchs_error[1] for text in TORCHS_OWN):
                break
            assert error[0] == torchs_error[0], (where, error, torchs_error)
            bound = HALF_BOUND if ours.half else BOUND
            assert_alike(ours.seen, torchs.seen, bound, where)
            if error[0]:  # how far a backward pass came does not matter
                ours.network.zero_grad()
                torchs.network.zero_grad()
            assert_alike(state(ours), state(torchs), bound, where)
