"""Packages that people use VGG with: torchvision and what builds on it, timm, LPIPS, torchsummary, safetensors, ONNX.

Each test gives the package's model twice, plain and converted (or built by vggfast in its place), with the same weights.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from network_reference import assert_as_good_as_torch, check_network, error
from reference import WINOGRAD_BOUND, normal
from small_vgg import BUILDERS, SmallLinear, needs_torchvision, torchvision_models
from torch import Tensor, nn

import vggfast
from vggfast import FusedSequential, convert, explain

IMAGE = (2, 3, 32, 32)


def package(name: str):
    return pytest.importorskip(
        name, reason=f"shows that vggfast works with {name}, which is not installed: pip install {name}"
    )


@pytest.fixture(autouse=True)
def _small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 120 M parameters of the fully connected layers do not matter here."""
    monkeypatch.setattr(nn, "Linear", SmallLinear)


def randomise_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(torchvision_models, name)(num_classes=5).eval()
    randomise_statistics(model)
    return model


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def assert_accurate(ours: Tensor, torchs: Tensor, exact: Tensor, model: nn.Module) -> None:
    assert ours.stride() == torchs.stride()
    assert_as_good_as_torch(ours, torchs, exact.detach(), exact.detach(), convolutions(model), type(model).__name__)


# ---- torchvision ---------------------------------------------------------------------------------------------------


@needs_torchvision
@pytest.mark.parametrize("name", BUILDERS)
def test_every_prefix_and_gradient_of_every_builder(name: str) -> None:
    plain = torchvision_model(name).features
    check_network(convert(copy.deepcopy(plain)), plain, normal(1, 3, 32, 32))


@needs_torchvision
@pytest.mark.parametrize("name", BUILDERS)
def test_whole_models(name: str) -> None:
    theirs = torchvision_model(name)
    converted, ours = convert(copy.deepcopy(theirs)), getattr(vggfast, name)(num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = normal(*IMAGE)
    assert torch.equal(ours(x), converted(x))
    assert_accurate(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()), theirs)
    explanation = explain(converted, x)
    assert explanation.convolutions == explanation.fused_convolutions == convolutions(theirs)
    theirs.train(), ours.train()
    random = torch.get_rng_state()
    losses = []
    for model in (ours, theirs):
        torch.set_rng_state(random)  # dropout draws the same
        losses.append(nn.functional.cross_entropy(model(x), torch.tensor([0, 4])))
        losses[-1].backward()
    exact = losses[1].double()
    assert error(losses[0], exact) <= 2 * WINOGRAD_BOUND * convolutions(theirs)
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in ours.parameters())


@needs_torchvision
@pytest.mark.parametrize("name", ["vgg16", "vgg11_bn"])
@pytest.mark.parametrize("training", [False, True])
def test_every_leaf_hooked(name: str, training: bool) -> None:
    """What hooks see is what each layer returned, also where torch's next in-place ReLU would have overwritten it."""
    theirs = torchvision_model(name)
    ours = convert(copy.deepcopy(theirs))
    for module in theirs.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    taps: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for model, seen in zip((ours, theirs), taps, strict=True):
        model.train(training)
        for key, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda m, i, y, key=key, seen=seen: seen.__setitem__(key, y))
        torch.manual_seed(1)
        model(normal(*IMAGE))
    assert list(taps[0]) == list(taps[1])
    assert all(torch.equal(taps[0][key], taps[1][key]) for key in taps[1] if "classifier" not in key)


@needs_torchvision
@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_create_feature_extractor(name: str) -> None:
    feature_extraction = package("torchvision.models.feature_extraction")
    theirs = torchvision_model(name)
    ours = convert(copy.deepcopy(theirs))
    assert feature_extraction.get_graph_node_names(ours) == feature_extraction.get_graph_node_names(theirs)
    nodes = {"features.2": "early", "features.10": "late", "avgpool": "pooled"}
    results = [feature_extraction.create_feature_extractor(model, nodes)(normal(*IMAGE)) for model in (ours, theirs)]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[1])


@needs_torchvision
def test_intermediate_layer_getter() -> None:
    """It keeps the children up to the last one asked for: the FusedSequential itself, or its children."""
    getter = package("torchvision.models._utils").IntermediateLayerGetter
    model = convert(torchvision_model("vgg11"))
    x = normal(*IMAGE)
    assert torch.equal(getter(model, {"features": "out"})(x)["out"], model.features(x))
    taps = getter(model.features, {"2": "first", "5": "second"})(x)
    for key, k in (("first", 3), ("second", 6)):
        assert error(taps[key], model.features[:k](x).double()) <= 2 * WINOGRAD_BOUND * 2


@needs_torchvision
@pytest.mark.parametrize("built_by", ["torchvision", "vggfast"])
def test_ssd300(built_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ssd = package("torchvision.models.detection.ssd")
    torch.manual_seed(0)
    theirs = ssd.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3).eval()
    if built_by == "vggfast":
        monkeypatch.setattr(ssd, "vgg16", vggfast.vgg16)
    torch.manual_seed(0)
    ours = convert(ssd.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3)).eval()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    x = normal(1, 3, 300, 300)
    explanation = explain(ours.backbone, x)
    assert sum(row.fused and row.layers.startswith("Conv3x3") for row in explanation.rows) == 13
    ceil = next(row for row in explanation.rows if row.input[2:] == (75, 75) and "MaxPool" in row.layers)
    assert ceil.output[2:] == (38, 38)
    with torch.no_grad():
        results = [model.backbone(x) for model in (ours, theirs)]
    assert results[0].keys() == results[1].keys()
    for key, torchs in results[1].items():
        assert results[0][key].stride() == torchs.stride()
        assert error(results[0][key], torchs.double()) <= 2 * WINOGRAD_BOUND * convolutions(theirs.backbone)


# ---- other packages ------------------------------------------------------------------------------------------------


@needs_torchvision
@pytest.mark.parametrize("built_by", ["torchvision", "vggfast"])
def test_lpips(built_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = package("lpips.pretrained_networks")
    lpips = package("lpips")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()

    theirs = build()
    if built_by == "vggfast":
        monkeypatch.setattr(networks.tv, "vgg16", vggfast.vgg16)
    ours = convert(build())
    assert [type(getattr(ours.net, f"slice{i}")) for i in range(1, 6)] == [FusedSequential] * 5
    assert explain(ours, normal(*IMAGE), normal(*IMAGE, seed=1)).fused_convolutions == 26
    results = []
    for model, dtype in (
        (ours, torch.float32),
        (theirs, torch.float32),
        (copy.deepcopy(theirs).double(), torch.float64),
    ):
        x = normal(*IMAGE).to(dtype).requires_grad_()
        distance = model(x, normal(*IMAGE, seed=1).to(dtype))
        results.append((distance, torch.autograd.grad(distance.sum(), x)[0]))
    for what, bound in ((0, 13), (1, 26)):
        ours_error, torch_error = (error(results[i][what], results[2][what]) for i in (0, 1))
        assert ours_error <= 2 * torch_error + WINOGRAD_BOUND * bound


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
@pytest.mark.parametrize("features_only", [False, True])
def test_timm(name: str, features_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timm, vgg = package("timm"), package("timm.models.vgg")
    monkeypatch.setattr(
        vgg, "ConvMlp", lambda c_in, hidden, *args, ConvMlp=vgg.ConvMlp, **kw: ConvMlp(c_in, 64, *args, **kw)
    )
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, features_only=features_only).eval()
    randomise_statistics(theirs)
    ours = convert(copy.deepcopy(theirs))
    x = normal(1, 3, 64, 64)
    with torch.no_grad():
        outputs = [ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double())]
    for result, torchs, exact in zip(*(y if features_only else [y] for y in outputs), strict=True):
        assert_accurate(result, torchs, exact, theirs)
    if not features_only:
        assert sum(row.fused for row in explain(ours, x).rows if row.layers.startswith("Conv3x3")) == 8


def test_torchsummary(capsys: pytest.CaptureFixture[str]) -> None:
    torchsummary = package("torchsummary")
    printed = []
    for container in (nn.Sequential, FusedSequential):
        model = vggfast.vgg16_bn(num_classes=5)
        model.features = container(*model.features)
        torchsummary.summary(model, (3, 32, 32), device="cpu")
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "Conv2d-1 " in printed[1]
    assert "MaxPool2d" in printed[1]


@needs_torchvision
def test_safetensors(tmp_path: Path) -> None:
    safetensors = package("safetensors.torch")
    theirs, ours = torchvision_model("vgg11_bn"), vggfast.vgg11_bn(num_classes=5).eval()
    safetensors.save_model(theirs, str(tmp_path / "model.safetensors"))
    assert safetensors.load_model(ours, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(ours(normal(*IMAGE)), convert(theirs)(normal(*IMAGE)))


@needs_torchvision
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_converted_model(way: str) -> None:
    """A pickle of the plain model, made before there was a conversion, is converted after loading."""
    plain = torchvision_model("vgg11_bn")
    old, model = pickle.dumps(plain), convert(plain)
    if way == "deepcopy":
        again = copy.deepcopy(model)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    x = normal(*IMAGE)
    assert type(again.features) is FusedSequential
    assert torch.equal(again(x), model(x))
    assert torch.equal(convert(pickle.loads(old))(x), model(x))


def test_unet() -> None:
    def double_conv(c_in: int, c_out: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for c in (c_in, c_out):
            layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inc, self.down = double_conv(3, 8), nn.Sequential(nn.MaxPool2d(2), double_conv(8, 16))
            self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), double_conv(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            skip = self.inc(x)
            return self.out(torch.cat([skip, self.up(self.down(skip))], 1))

    torch.manual_seed(0)
    theirs = UNet().eval()
    randomise_statistics(theirs)
    ours = convert(copy.deepcopy(theirs))
    x = normal(*IMAGE)
    assert explain(ours, x).fused_convolutions == 6
    assert_accurate(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()), theirs)


@pytest.mark.parametrize("exporter", ["dynamo", "TorchScript"])
def test_onnx(exporter: str, tmp_path: Path) -> None:
    onnx, _ = package("onnx"), package("onnxscript")
    torch.manual_seed(0)
    model = vggfast.make_layers([8, "M", 8, "M"], batch_norm=True).eval()
    randomise_statistics(model)
    x, path = normal(1, 3, 16, 16), str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=exporter == "dynamo", verbose=False)
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded)
    assert {node.op_type for node in loaded.graph.node} <= {"Conv", "BatchNormalization", "Relu", "MaxPool"}
    (y,) = package("onnx.reference").ReferenceEvaluator(loaded).run(None, {loaded.graph.input[0].name: x.numpy()})
    exact = nn.Sequential(*model).double()(x.double())
    assert error(torch.from_numpy(y), exact.detach()) <= 2 * WINOGRAD_BOUND
