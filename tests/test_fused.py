"""FusedSequential gives what nn.Sequential gives: which runs are fused and which are not, values, strides, errors, side effects."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from network_reference import error, float64
from reference import WINOGRAD_BOUND, normal
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vggfast import FusedSequential, ops

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The tensors are tiny; threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The op calls made so far, as "conv relu pool" or "pool"."""
    made: list[str] = []
    conv3x3, max_pool2x2 = ops.conv3x3, ops.max_pool2x2

    def spy_conv(*args, relu=True, pool=False, **kwargs):
        made.append("conv" + " relu" * relu + " pool" * pool)
        return conv3x3(*args, relu=relu, pool=pool, **kwargs)

    def spy_pool(x):
        made.append("pool")
        return max_pool2x2(x)

    monkeypatch.setattr(ops, "conv3x3", spy_conv)
    monkeypatch.setattr(ops, "max_pool2x2", spy_pool)
    return made


def conv(c_in: int = 4, c_out: int = 4, **settings) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, **{"kernel_size": 3, "padding": 1} | settings)


def batch_norm(channels: int = 4, **settings) -> nn.BatchNorm2d:
    """With statistics and parameters that are not those of the start."""
    bn = nn.BatchNorm2d(channels, **settings)
    with torch.no_grad():
        for tensor, low in ((bn.running_mean, -0.5), (bn.running_var, 0.5), (bn.weight, 0.5), (bn.bias, -0.5)):
            if tensor is not None:
                tensor.uniform_(low, low + 1)
    return bn


def pair(*layers: nn.Module) -> tuple[FusedSequential, nn.Sequential]:
    """The same layers twice, with the same weights: fused, and plain."""
    return FusedSequential(*copy.deepcopy(layers)), nn.Sequential(*layers)


def block() -> list[nn.Module]:
    """No bias before the BatchNorm, whose training mode makes its gradient zero: a number that is all rounding."""
    return [
        conv(3, 6),
        nn.ReLU(inplace=True),
        conv(6, 5, bias=False),
        batch_norm(5),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        conv(5, 4),
    ]


# ---- which layers form a run ---------------------------------------------------------------------------------------

RUNS = {
    "conv": ([conv()], ["conv"]),
    "no bias": ([conv(bias=False), nn.ReLU()], ["conv relu"]),
    "conv, ReLU, pool": ([conv(), nn.ReLU(inplace=True), nn.MaxPool2d(2)], ["conv relu pool"]),
    "conv, pool": ([conv(), nn.MaxPool2d(2, 2)], ["conv pool"]),
    "padding by name": ([conv(padding="same"), nn.ReLU()], ["conv relu"]),
    "settings as numbers": ([conv(stride=1, dilation=1), nn.MaxPool2d(2, 2, 0, 1)], ["conv pool"]),
    "pool alone": ([nn.MaxPool2d(2)], ["pool"]),
    "pool, conv": ([nn.MaxPool2d(2), conv()], ["pool", "conv"]),
    "ReLU, conv": ([nn.ReLU(), conv()], ["conv"]),
    "ceil_mode, even": ([conv(), nn.MaxPool2d(2, ceil_mode=True)], ["conv pool"]),
    "BatchNorm in eval": ([conv(), batch_norm().eval(), nn.ReLU(), nn.MaxPool2d(2)], ["conv relu pool"]),
    "BatchNorm in training": ([conv(), batch_norm(), nn.ReLU(), nn.MaxPool2d(2)], ["conv", "pool"]),
    "BatchNorm without statistics": ([conv(), nn.BatchNorm2d(4, track_running_stats=False).eval()], ["conv"]),
    "two BatchNorms": ([conv(), batch_norm().eval(), batch_norm().eval(), nn.ReLU()], ["conv"]),
    "pool before ReLU": ([conv(), nn.MaxPool2d(2), nn.ReLU()], ["conv pool"]),
    "two convs": ([conv(), conv(), nn.ReLU()], ["conv", "conv relu"]),
    "other activation": ([conv(), nn.LeakyReLU(), nn.MaxPool2d(2)], ["conv", "pool"]),
    "dropout between": ([conv(), nn.Dropout(0.0), nn.ReLU()], ["conv"]),
    "1x1": ([conv(kernel_size=1, padding=0), nn.ReLU()], []),
    "5x5": ([conv(kernel_size=5, padding=2)], []),
    "3x1": ([conv(kernel_size=(3, 1), padding=(1, 0))], []),
    "stride": ([conv(stride=2)], []),
    "no padding": ([conv(padding=0)], []),
    "valid padding": ([conv(padding="valid")], []),
    "dilation": ([conv(dilation=2)], []),
    "same padding, dilated": ([conv(padding="same", dilation=2)], []),
    "groups": ([conv(groups=2)], []),
    "reflected": ([conv(padding_mode="reflect")], []),
    "circular": ([conv(padding_mode="circular")], []),
    "pool 3x3": ([nn.MaxPool2d(3, 2)], []),
    "pool 2x2, stride 1": ([nn.MaxPool2d(2, 1)], []),
    "pool padded": ([nn.MaxPool2d(2, padding=1)], []),
    "pool dilated": ([nn.MaxPool2d(2, dilation=2)], []),
    "average pool": ([conv(), nn.AvgPool2d(2)], ["conv"]),
    "transposed": ([nn.ConvTranspose2d(4, 4, 3, padding=1)], []),
    "subclass": ([type("Own", (nn.Conv2d,), {})(4, 4, 3, padding=1), nn.ReLU()], []),
    "subclass of ReLU": ([conv(), type("Own", (nn.ReLU,), {})()], ["conv"]),
    "lazy": ([nn.LazyConv2d(4, 3, padding=1)], []),
    "parametrised": ([nn.utils.parametrizations.weight_norm(conv()), nn.ReLU()], []),
    "spectral norm": ([nn.utils.parametrizations.spectral_norm(conv()).eval()], []),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(name: str, calls: list[str]) -> None:
    layers, expected = copy.deepcopy(RUNS[name])
    fused, plain = pair(*layers)
    x = normal(2, 4, 8, 10)
    with torch.random.fork_rng():
        ours = fused(x.clone())  # a lazy layer draws its weights now
    torchs = plain(x.clone())
    assert calls == expected
    assert ours.stride() == torchs.stride()
    assert error(ours.detach(), torchs.detach().double()) <= 2 * WINOGRAD_BOUND * max(1, len(expected))


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (7, 7), (1, 1), (1, 8)])
def test_ceil_mode_is_decided_by_the_input(size: tuple[int, int], calls: list[str]) -> None:
    fused, plain = pair(conv(), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True))
    x = normal(1, 4, *size)
    assert fused(x).shape == plain(x).shape
    assert calls == ["conv relu"]


def test_pool_with_indices(calls: list[str]) -> None:
    fused, plain = pair(conv(), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    x = normal(1, 4, 8, 8)
    for ours, torchs in zip(fused(x), plain(x), strict=True):
        assert ours.shape == torchs.shape
        assert ours.stride() == torchs.stride()
    assert calls == ["conv relu"]


def replace_forward(layer: nn.Module) -> None:
    layer.forward = type(layer).forward.__get__(layer)


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward with kwargs": lambda m: m.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "full backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "own forward": replace_forward,
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_hook_ends_the_run(hook: str, where: int, calls: list[str]) -> None:
    fused, plain = pair(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(), nn.ReLU(), nn.MaxPool2d(2))
    removable = HOOKS[hook](fused[3 + where])
    x = normal(1, 4, 8, 8)
    assert error(fused(x).detach(), plain(x).detach().double()) <= 4 * WINOGRAD_BOUND
    after = {0: ["pool"], 1: ["conv", "pool"], 2: ["conv relu"]}[where]
    assert calls == ["conv relu pool", *after]
    calls.clear()
    if removable is None:
        del fused[3 + where].forward
    else:
        removable.remove()
    fused(x)
    assert calls == ["conv relu pool", "conv relu pool"]


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ],
)
def test_global_hooks_see_every_module(register: Callable, calls: list[str]) -> None:
    fused, _ = pair(conv(), nn.ReLU(), nn.MaxPool2d(2))
    seen: list[type] = []
    handle = register(lambda module, *_: seen.append(type(module)))
    try:
        fused(normal(1, 4, 8, 8).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {nn.Conv2d, nn.ReLU, nn.MaxPool2d, FusedSequential} <= set(seen)
    assert calls == []


def test_hooks_of_the_container_run_once_and_do_not_stop_fusion(calls: list[str]) -> None:
    fused, _ = pair(conv(), nn.ReLU())
    seen: list[Tensor] = []
    fused.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = fused(normal(1, 4, 8, 8))
    assert len(seen) == 1
    assert seen[0] is y
    assert calls == ["conv relu"]


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_patched_class_is_obeyed(name: str, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    original = getattr(nn.Conv2d, name)
    monkeypatch.setattr(nn.Conv2d, name, lambda self, *args: original(self, *args) + 1)
    fused, plain = pair(conv(), nn.ReLU())
    x = normal(1, 4, 8, 8)
    assert torch.equal(fused(x), plain(x))
    assert calls == []


@pytest.mark.parametrize("name", ["conv2d", "relu", "max_pool2d", "batch_norm"])
def test_a_patched_function_is_obeyed(name: str, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **options: original(*args, **options) * 2 + 1)
    fused, plain = pair(*block())
    for network in (fused, plain):
        network.eval()
    x = normal(1, 3, 8, 8)
    assert torch.equal(fused(x), plain(x))
    assert calls == []


def test_a_patched_object_is_obeyed(calls: list[str]) -> None:
    """Padding that wraps around, as image generators patch it in."""
    fused, plain = pair(conv(), nn.ReLU())
    for network in (fused, plain):
        network[0]._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, [1] * 4, "circular"), weight, bias)
    x = normal(1, 4, 8, 8)
    assert torch.equal(fused(x), plain(x))
    assert calls == []


# ---- inputs that only torch takes ----------------------------------------------------------------------------------


class Tagged(Tensor):
    pass


INPUTS: dict[str, Callable[[], Tensor]] = {
    "float64": lambda: normal(1, 4, 8, 8).double(),
    "one image without a batch": lambda: normal(4, 8, 8),
    "subclass": lambda: normal(1, 4, 8, 8).as_subclass(Tagged),
    "empty batch": lambda: normal(0, 4, 8, 8),
    "meta": lambda: torch.empty(1, 4, 8, 8, device="meta"),
    "wrong channels": lambda: normal(1, 3, 8, 8),
    "wrong dimensions": lambda: normal(1, 4, 8),
    "too small to pool": lambda: normal(1, 4, 1, 8),
    "wrong dtype": lambda: normal(1, 4, 8, 8).half(),
    "integers": lambda: torch.zeros(1, 4, 8, 8, dtype=torch.int64),
    "sparse": lambda: normal(1, 4, 8, 8).to_sparse(),
    "no tensor": lambda: [1, 2, 3],  # type: ignore[dict-item, return-value]
}


def outcome(network: nn.Module, x: Tensor) -> Tensor | str:
    try:
        return network(x)
    except Exception as error:
        return repr(error)


@pytest.mark.parametrize("name", INPUTS)
def test_unusual_inputs_get_torchs_answer_or_torchs_error(name: str) -> None:
    fused, plain = pair(conv(), nn.ReLU(), nn.MaxPool2d(2))
    x = INPUTS[name]()
    if name in ("float64", "meta"):
        fused, plain = fused.to(x), plain.to(x)
    expected, y = outcome(plain, x), outcome(fused, x)
    if isinstance(expected, str):
        assert y == expected
        return
    assert type(y) is type(expected)
    assert (y.shape, y.dtype, y.stride(), y.device) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
        expected.device,
    )
    if name != "meta":
        assert torch.equal(y, expected)


def test_a_parameter_may_be_the_input(calls: list[str]) -> None:
    """Style transfer optimises the image."""
    fused, _ = pair(conv(), nn.ReLU())
    image = nn.Parameter(normal(1, 4, 8, 8))
    fused(image).sum().backward()
    assert image.grad is not None
    assert calls == ["conv relu"]


def test_no_children() -> None:
    x = normal(1, 4, 8, 8)
    assert FusedSequential()(x) is x


def test_children_may_take_and_return_anything(calls: list[str]) -> None:
    class Join(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return torch.cat(pair, 1)

    fused, plain = pair(Join(), conv(8), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    x = (normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1))
    assert error(fused(x).detach(), plain(x).detach().double()) <= 4 * WINOGRAD_BOUND
    assert calls == ["conv relu"]


def test_dispatch_modes_see_torchs_operators() -> None:
    fused, plain = pair(*block())
    counts = []
    for network in (fused, plain):
        with FlopCounterMode(display=False) as counter:
            network(normal(1, 3, 8, 8))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Doubled(TorchFunctionMode):
    """What a simulation of other arithmetic does, or a log of what is called."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.conv2d else result


def test_function_modes_see_torchs_functions(calls: list[str]) -> None:
    fused, plain = pair(*block())
    for network in (fused, plain):
        network.eval()
    x = normal(1, 3, 8, 8)
    with Doubled():
        assert torch.equal(fused(x), plain(x))
    assert calls == []
    with torch.device("cpu"):  # a mode as well, of torch's own
        fused(x)
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_dtype", [None, torch.float32])
def test_half_precision_is_as_accurate_as_torchs(
    dtype: torch.dtype, norm_dtype: torch.dtype | None, calls: list[str]
) -> None:
    fused, plain = pair(conv(8, 16), batch_norm(16).eval(), nn.ReLU(), nn.MaxPool2d(2))
    fused, plain = fused.to(dtype), plain.to(dtype)
    for network in (fused, plain):
        network[1].to(norm_dtype or dtype)
    x = normal(2, 8, 16, 16, dtype=dtype)
    ours, torchs, exact = fused(x), plain(x), float64(plain)(x.double())
    assert ours.dtype == torchs.dtype == dtype
    assert error(ours.detach(), exact) <= 2 * error(torchs.detach(), exact)
    assert calls == ["conv relu pool"]
