"""`convert` and `explain`: what they reach, what they say, and that they leave everything else alone."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from reference import normal
from torch import Tensor, nn

from vggfast import VGG16, Explanation, FusedSequential, convert, explain, vgg11, vgg16c


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def block(c_in: int = 3, c_out: int = 4) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True), nn.MaxPool2d(2)]


class Net(nn.Module):
    """Two plain blocks with a subclass and a classifier beside them."""

    class Own(nn.Sequential):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Sequential(*block()), *block(4))
        self.own = self.Own(*block(4))
        self.alone = nn.Conv2d(4, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.classifier = nn.Sequential(nn.Linear(4, 2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.strided(self.alone(self.own(self.features(x)))).mean((2, 3)))


# ---- convert -------------------------------------------------------------------------------------------------------


def test_convert_changes_every_sequential_with_a_convolution_and_nothing_else() -> None:
    net = Net()
    before, keys, objects = net.features, list(net.state_dict()), [id(m) for m in net.modules()]
    assert convert(net) is net
    assert net.features is before
    assert type(net.features) is type(net.features[0]) is FusedSequential
    assert type(net.own) is Net.Own
    assert type(net.classifier) is nn.Sequential
    assert list(net.state_dict()) == keys
    assert [id(m) for m in convert(net).modules()] == objects


def test_convert_of_a_sequential_keeps_its_attributes_hooks_and_mode() -> None:
    seen: list[Tensor] = []
    network = nn.Sequential(*block()).eval()
    network.note = "kept"
    network.register_forward_hook(lambda m, i, y: seen.append(y))
    references = [network]
    network = convert(network)
    assert type(references[0]) is FusedSequential
    assert not network.training
    assert network.note == "kept"
    assert network(normal(1, 3, 8, 8)) is seen[0]


def test_convert_keeps_shared_modules_shared() -> None:
    shared = nn.Sequential(*block(4))
    net = convert(nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])}))
    assert net["a"] is net["b"][0]
    assert type(net["a"]) is FusedSequential


def test_convert_leaves_a_sequential_with_its_own_forward() -> None:
    network = nn.Sequential(*block())
    network.forward = lambda x: x
    assert type(convert(network)) is nn.Sequential


@pytest.mark.parametrize("layers", [[nn.MaxPool2d(2)], [nn.Conv2d(3, 4, 1)], [nn.Linear(3, 4)], []])
def test_convert_leaves_a_sequential_without_a_3x3_convolution(layers: list[nn.Module]) -> None:
    assert type(convert(nn.Sequential(*layers))) is nn.Sequential


@pytest.mark.parametrize("call", [convert, lambda model: explain(model, torch.zeros(1))])
def test_what_is_no_module_is_refused(call: Callable) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got (dict|OrderedDict)"):
        call(Net().state_dict())


# ---- explain -------------------------------------------------------------------------------------------------------


def rows(explanation: Explanation) -> dict[str, tuple[str, bool]]:
    return {row.name: (row.layers, row.fused) for row in explanation.rows}


def reasons(explanation: Explanation) -> dict[str, str]:
    return {row.name: row.reason for row in explanation.rows}


def test_vgg16_has_13_fused_convolutions() -> None:
    explanation = explain(VGG16(num_classes=10, init_weights=False), normal(1, 3, 32, 32))
    assert (explanation.convolutions, explanation.fused_convolutions) == (13, 13)
    assert rows(explanation)["features.0..1"] == ("Conv3x3 3->64 + ReLU", True)
    assert rows(explanation)["features.28..30"] == ("Conv3x3 512->512 + ReLU + MaxPool", True)
    first = explanation.rows[0]
    assert (first.dtype, first.input, first.output) == ("float32", (1, 3, 32, 32), (1, 64, 32, 32))
    assert first.kernel.startswith("cpu ")
    assert [row.name for row in explanation.rows[13:]] == [
        "avgpool",
        "classifier.0..1",
        "classifier.3..4",
        "classifier.6",
    ]
    assert [row.fused for row in explanation.rows[13:]] == [False, True, True, False]  # the last has too few weights
    assert all(row.reason for row in explanation.rows[13:])


def test_the_table_and_the_dictionary() -> None:
    explanation = explain(convert(Net()), normal(2, 3, 32, 32))
    table = str(explanation).splitlines()
    assert table[0].split() == ["name", "layers", "dtype", "input", "output", "kernel", "why"]
    assert len(table) == 3 + len(explanation.rows)
    assert table[-1] == "2 of 5 convolutions run on fused kernels."
    column = table[0].index("kernel")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in table[2:-1])
    restored = json.loads(json.dumps(explanation.to_dict()))
    assert restored["fused_convolutions"] == 2
    assert [row["name"] for row in restored["rows"]] == [row.name for row in explanation.rows]
    assert restored["rows"][0]["input"] == [2, 3, 32, 32]


def test_a_layer_at_several_places_has_the_name_of_each() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), shared)
    model = convert(nn.Sequential(nn.Identity(), body))
    names = [row.name for row in explain(model, normal(1, 3, 16, 16)).rows]
    assert names == ["1.0..1", "1.2..3", "1.4..5", "1.6"]


def test_the_text_for_a_terminal() -> None:
    explanation = explain(convert(Net()), normal(2, 3, 32, 32))
    wide = max(map(len, str(explanation).splitlines()))
    assert explanation.text(wide) == explanation.text() == str(explanation) == repr(explanation)
    lines = explanation.text(90).splitlines()
    assert max(map(len, lines)) <= 90 < wide
    assert [line.split()[0] for line in lines[:-1] if line[0] != " "] == [row.name for row in explanation.rows]
    words = " ".join(explanation.text(90).split())
    assert all(f"{row.kernel}: {row.reason}" in words for row in explanation.rows if row.reason)
    assert lines[-1] == str(explanation).splitlines()[-1]


def test_reasons() -> None:
    net = Net()
    x = normal(2, 3, 32, 32)
    plain = reasons(explain(net, x))
    assert "vggfast.convert(model)" in plain["features.0.0"]
    assert "subclasses" in plain["own.0"]
    assert "vggfast.ops.conv3x3" in plain["alone"]
    assert plain["strided"] == "stride is not 1"
    assert plain["classifier.0"] == "no fused kernel for Linear"
    fused = reasons(explain(convert(net), x))
    assert "BatchNorm uses the batch's statistics" in fused["features.0.0"]
    assert fused["features.0.1"] == "uses the batch's statistics"
    net.eval().features[0][2].register_forward_hook(lambda *_: None)
    explanation = explain(net, x)
    assert rows(explanation)["features.0.0..1"] == ("Conv3x3 3->4 + BatchNorm", True)
    assert "has hooks" in reasons(explanation)["features.0.0..1"]
    assert reasons(explanation)["features.0.2"] == "has hooks"
    assert rows(explanation)["features.1..4"] == ("Conv3x3 4->4 + BatchNorm + ReLU + MaxPool", True)
    assert rows(explanation)["strided"] == ("Conv3x3 4->4 stride 2 groups 2", False)


def test_the_kernel_says_what_computes_the_edges() -> None:
    network = FusedSequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    kernels = [explain(network, normal(1, 64, size, size)).rows[0].kernel for size in (14, 16)]
    assert "F(2) in the last row and column" in kernels[0]
    assert "F(2)" not in kernels[1]


def test_other_settings_of_the_call() -> None:
    fused = FusedSequential(*block()[:1], nn.ReLU())
    x = normal(1, 3, 8, 8)
    double = explain(fused.double(), x.double()).rows[0]
    assert (double.fused, double.kernel, double.dtype) == (False, "aten", "float64")
    assert "float32" in double.reason
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(fused.float(), x).fused_convolutions == 1
    assert "1x1" in rows(explain(vgg16c(num_classes=2, init_weights=False), normal(1, 3, 32, 32)))["features.14"][0]
    assert str(explain(nn.Identity(), x)) == "No convolution, pooling or linear layer ran."


def test_layers_called_one_by_one_are_found() -> None:
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = vgg11(num_classes=2, init_weights=False).features

        def forward(self, x: Tensor) -> list[Tensor]:
            x = taps = self.features[:3](x)
            for layer in self.features[3:6]:
                x = layer(x)
            return [taps, self.features[6:](x)]

    explanation = explain(Taps(), normal(1, 3, 32, 32))
    assert rows(explanation)["features.0..2"] == ("Conv3x3 3->64 + ReLU + MaxPool", True)
    assert reasons(explanation)["features.3"] == "called on its own: call the FusedSequential, or a slice of it"
    assert rows(explanation)["features.6..7"] == ("Conv3x3 128->256 + ReLU", True)
    assert (explanation.convolutions, explanation.fused_convolutions) == (8, 7)


@pytest.mark.parametrize("training", [False, True])
def test_explaining_changes_nothing(training: bool) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(), convert(Net())).train(training)
    x = normal(2, 3, 32, 32).requires_grad_()
    state, random, input_ = (
        {k: v.clone() for k, v in net.state_dict().items()},
        torch.get_rng_state(),
        x.detach().clone(),
    )
    hooks = [len(m._forward_hooks) for m in net.modules()]
    explain(net, x)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, input_)
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert [len(m._forward_hooks) for m in net.modules()] == hooks
    assert all(m.training == training for m in net.modules())


def test_hooks_are_removed_after_an_error() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="channels"):
        explain(net, normal(1, 5, 8, 8))
    assert not any(m._forward_hooks for m in net.modules())


def test_wrapped_models() -> None:
    net = convert(Net()).eval()
    x = normal(1, 3, 32, 32)
    expected = explain(net, x)
    assert explain(torch.compile(net), x) == expected
    assert explain(nn.DataParallel(net), x) == expected
    with pytest.raises(TypeError, match="TorchScript"):
        explain(torch.jit.script(net), x)
