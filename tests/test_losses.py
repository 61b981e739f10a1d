"""`vggfast.losses` beside the package lpips, plain torch compositions and float64, in value and gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from network_reference import error
from reference import WINOGRAD_BOUND
from small_vgg import SmallLinear, narrow_vgg
from torch import Tensor, nn

import vggfast
from vggfast import distances
from vggfast.losses import LPIPS, Encoded, Perceptual, gram

SMALL = [8, 8, "M", 16, 16, "M", 24, "M"]
LAYERS = {"relu1_2": 1.0, "conv2_1": 0.5, "pool3": 2.0}
DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": lambda a, b: F.huber_loss(a, b, delta=0.3)}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(batch_norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return vggfast.make_layers(SMALL, batch_norm).eval()


def images(n: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss: Callable[..., Tensor], x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = loss(x, *others)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def plain_taps(network: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """What people write: the layers one after the other, with taps collected on the way."""
    mean, std = (x.new_tensor(t).view(1, 3, 1, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, found = (x - mean) / std, {}
    for name, child in zip(vggfast.taps.names(network), network, strict=True):
        x = F.relu(x) if isinstance(child, nn.ReLU) else child(x)
        found[name] = x
    return found


def plain_gram(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    rows = x.reshape(n, c, h * w)
    return rows @ rows.transpose(1, 2) / (c * h * w)


def plain_loss(network: nn.Sequential, kind: str, style: dict[str, float]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, target: Tensor) -> Tensor:
        ours, theirs = plain_taps(network, x), plain_taps(network, target)
        terms = [weight * DISTANCES[kind](ours[name], theirs[name]) for name, weight in LAYERS.items()]
        terms += [weight * F.mse_loss(plain_gram(ours[k]), plain_gram(theirs[k])) for k, weight in style.items()]
        return torch.stack(terms).sum()

    return loss


# ---- Perceptual ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("style", [{}, {"relu1_1": 1e3, "relu2_2": 1e2}])
def test_perceptual_is_the_plain_composition(kind: str, style: dict[str, float]) -> None:
    network = small()
    plain = copy.deepcopy(nn.Sequential(*network)).double()
    loss = Perceptual(network, LAYERS, distance=kind, delta=0.3, style=style)
    x, target = images(), images(seed=1)
    exact = value_and_gradient(plain_loss(plain, kind, style), x.double(), target.double())
    torchs = value_and_gradient(plain_loss(nn.Sequential(*network), kind, style), x, target)
    in_float64 = value_and_gradient(copy.deepcopy(loss).double(), x.double(), target.double())
    for form in (target, loss.encode(target)):
        ours = value_and_gradient(loss, x, form)
        for a, b, c, d in zip(ours, torchs, in_float64, exact, strict=True):
            assert error(a, d) <= 2 * error(b, d) + 10 * WINOGRAD_BOUND
            assert error(c, d) <= 1e-6  # the mean and deviation of the images are in float32


@pytest.mark.parametrize("kind", DISTANCES)
def test_reductions_terms_and_ranges(kind: str) -> None:
    network, x, target = small(), images(3), images(3, seed=1)
    whole = Perceptual(network, LAYERS, distance=kind, style=["relu1_1"], reduction="none")
    each = torch.stack([whole(x[i : i + 1], target[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(whole(x, target), each)
    terms = whole.terms(x, target)
    assert list(terms) == [*LAYERS, "gram relu1_1"]
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(0), each)
    for reduction, value in (("mean", each.mean()), ("sum", each.sum())):
        options = {"distance": kind, "style": ["relu1_1"], "reduction": reduction}
        torch.testing.assert_close(Perceptual(network, LAYERS, **options)(x, target), value)
        ranged = Perceptual(network, LAYERS, input_range=(-1, 1), **options)
        torch.testing.assert_close(ranged(2 * x - 1, 2 * target - 1), value)
        ranged = Perceptual(network, LAYERS, input_range=(0, 255), **options)
        torch.testing.assert_close(ranged(255 * x, 255 * target), value)


def test_style_of_another_image_of_another_size() -> None:
    loss = Perceptual(small(), ["relu2_2"], style=["relu1_1", "relu2_1"], reduction="none")
    x, target, style = images(2), images(2, seed=1), images(1, 48, seed=2)
    terms = loss.terms(x, target, style)
    torch.testing.assert_close(terms, loss.terms(x, loss.encode(target, style)))
    torch.testing.assert_close(terms["relu2_2"], loss.terms(x, target)["relu2_2"])
    ours = gram(loss.network((x - loss.centre) / loss.deviation)["relu1_1"])
    wanted = gram(loss.network((style - loss.centre) / loss.deviation)["relu1_1"])
    torch.testing.assert_close(terms["gram relu1_1"], (ours - wanted).square().mean((1, 2)), rtol=1e-4, atol=0)
    alone = Perceptual(small(), (), style=["relu1_1"])
    assert alone(style, style) == 0
    assert alone.encode(style).maps == {}


def test_gradients_reach_a_target_that_requires_them() -> None:
    loss = Perceptual(small(), LAYERS, style=["relu1_1"])
    x, target = images().requires_grad_(), images(seed=1).requires_grad_()
    found = torch.autograd.grad(loss(x, target), (x, target))
    swapped = torch.autograd.grad(loss(target, x), (x, target))
    torch.testing.assert_close(found, swapped)
    assert not any(t.requires_grad for part in loss.encode(target) for t in part.values())


def test_grey_images_and_one_target_for_many() -> None:
    loss = Perceptual(small(), LAYERS, style=["relu1_1"])
    x = images(3)
    torch.testing.assert_close(
        loss(x[:, :1], x[:, :1].flip(3)), loss(x[:, :1].expand_as(x), x[:, :1].flip(3).expand_as(x))
    )
    one = loss.encode(images(1, seed=1))
    torch.testing.assert_close(loss(x, one), loss(x, images(1, seed=1).expand(3, -1, -1, -1)))


def test_the_model_is_shared_and_left_alone() -> None:
    network = small(batch_norm=True).train()
    loss = Perceptual(network, LAYERS)
    state = copy.deepcopy(network.state_dict())
    assert not any(p.requires_grad for p in loss.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert network.training
    assert network[1].training
    assert not any(m.training for m in loss.train().network.modules())
    assert loss.training
    first = loss(images(), images(seed=1))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    with torch.no_grad():
        network[0].weight.mul_(2)
    assert loss(images(), images(seed=1)) != first
    assert [key for key in loss.state_dict() if not key.startswith("network.features.")] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision_neither_overflows_nor_vanishes(dtype: torch.dtype, way: str) -> None:
    """Features of some hundreds: their squares, and Gram matrices before the division, pass float16's 65504."""
    network = small()
    with torch.no_grad():
        network[0].weight.mul_(1000), network[0].bias.mul_(1000)
    x, target = images(), images(seed=1)
    loss = Perceptual(network, ["relu1_2", "relu2_2"], distance="l2", style=["relu1_2"])
    assert loss.encode(x).maps["relu1_2"].max() > 256
    wanted = value_and_gradient(loss, x, target)
    if way == "weights":
        loss = Perceptual(copy.deepcopy(network).to(dtype), ["relu1_2", "relu2_2"], distance="l2", style=["relu1_2"])
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        value, gradient = value_and_gradient(loss, x, target)
        assert loss.encode(x).maps["relu1_2"].dtype == dtype
    assert value.dtype == gradient.dtype == torch.float32
    assert error(value, wanted[0].double()) <= 0.02
    assert error(gradient, wanted[1].double()) <= 0.1


def test_float64_images_under_autocast() -> None:
    loss, x, target = Perceptual(small(), LAYERS), images(), images(seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x.double(), target.double()) == loss(x, target)


def test_the_classifiers_features() -> None:
    model, x, target = narrow_vgg(), images(), images(seed=1)
    loss = Perceptual(model, ["relu6"], distance="l2", mean=(0, 0, 0), std=(1, 1, 1), style=["fc7"], reduction="none")
    ours, theirs = (vggfast.features(model, ["relu6", "fc7"])(t) for t in (x, target))
    terms = loss.terms(x, target)
    torch.testing.assert_close(terms["relu6"], (ours["relu6"] - theirs["relu6"]).square().mean(1))
    grams = [torch.einsum("ni,nj->nij", t["fc7"], t["fc7"]) / 16 for t in (ours, theirs)]
    torch.testing.assert_close(terms["gram fc7"], (grams[0] - grams[1]).square().mean((1, 2)))
    heads = {"lin0.weight": torch.rand(16)}
    assert LPIPS(model, heads, layers=["relu6"], spatial=True)(x, target).shape == (2, 1, 32, 32)


def test_defaults() -> None:
    """Johnson's four layers, and torch's delta; the numbers that the documentation names."""
    torch.manual_seed(0)
    network = vggfast.make_layers([8, 8, "M", 16, 16, "M", 4, 4, 4, "M", 4, 4, 4, "M"])
    assert Perceptual(network).layers == dict.fromkeys(("relu1_2", "relu2_2", "relu3_3", "relu4_3"), 1.0)
    assert isinstance(rule := Perceptual(network, distance="huber").rule, distances.Huber)
    assert rule.delta == 1.0
    lpips = small_lpips(network)
    assert (Perceptual(network).reduction, lpips.reduction, lpips.input_range) == ("mean", "mean", (-1, 1))
    assert not any(p.requires_grad for p in lpips.parameters())


@pytest.mark.parametrize("kind", ["perceptual", "lpips"])
def test_compiled_in_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    network = small()
    loss = Perceptual(network, LAYERS, style=["relu1_1"]) if kind == "perceptual" else small_lpips(network)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, target = images(), images(seed=1)
    for form in (target, loss.encode(target)):
        for ours, wanted in zip(value_and_gradient(compiled, x, form), value_and_gradient(loss, x, form), strict=True):
            assert error(ours, wanted.double()) <= WINOGRAD_BOUND


# ---- LPIPS ---------------------------------------------------------------------------------------------------------

HEADS = {
    f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=torch.Generator().manual_seed(i))
    for i, c in enumerate((8, 16))
}


def small_lpips(network: nn.Module, **options: object) -> LPIPS:
    return LPIPS(network, HEADS, layers=["relu1_2", "relu2_2"], **options)


@pytest.fixture(scope="module")
def package() -> nn.Module:
    lpips = pytest.importorskip("lpips", reason="compares with lpips, which is not installed: pip install lpips")
    torch.manual_seed(0)
    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False)


def backbone(package: nn.Module) -> vggfast.VGG16:
    """Its weights in a VGG16, the way a checkpoint would come."""
    model = vggfast.VGG16(num_classes=1, init_weights=False)
    slices = [child for i in range(1, 6) for child in getattr(package.net, f"slice{i}")]
    for ours, theirs in zip(model.features, slices, strict=False):
        ours.load_state_dict(theirs.state_dict())
    return model


def test_lpips_is_the_packages(package: nn.Module) -> None:
    loss = LPIPS(backbone(package), reduction="none")
    x, target = 2 * images() - 1, 2 * images(seed=1) - 1
    exact = value_and_gradient(copy.deepcopy(package).double(), x.double(), target.double())
    torchs = value_and_gradient(package, x, target)
    assert torchs[0].shape == (2, 1, 1, 1)
    for form in (target, loss.encode(target)):
        value, gradient = value_and_gradient(loss, x, form)
        assert error(value, exact[0].flatten()) <= 2 * error(torchs[0], exact[0]) + 13 * WINOGRAD_BOUND
        assert error(gradient, exact[1]) <= 2 * error(torchs[1], exact[1]) + 26 * WINOGRAD_BOUND
    in_float64 = value_and_gradient(copy.deepcopy(loss).double(), x.double(), target.double())
    assert error(in_float64[0], exact[0].flatten()) <= 1e-12
    assert error(in_float64[1], exact[1]) <= 1e-12


def test_lpips_maps_are_the_packages(package: nn.Module) -> None:
    x, target = 2 * images() - 1, 2 * images(seed=1) - 1
    spatial = copy.deepcopy(package)
    spatial.spatial = True
    ours = LPIPS(backbone(package), spatial=True)(x, target)
    assert ours.shape == (2, 1, 32, 32)
    assert error(ours, spatial.double()(x.double(), target.double())) <= 13 * WINOGRAD_BOUND


def test_lpips_where_all_features_are_zero() -> None:
    """An image that leaves a layer dead; the package's gradient would be NaN."""
    network = small()
    with torch.no_grad():
        network[0].bias.fill_(-1e3)
        network[2].bias.fill_(-1.0)
    value, gradient = value_and_gradient(small_lpips(network), images(), images(seed=1))
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_heads_from_a_file_and_trained(tmp_path: Path) -> None:
    network, x, target = small(), images(), images(seed=1)
    torch.save(HEADS, tmp_path / "heads.pth")
    expected = small_lpips(network)(x, target)
    assert LPIPS(network, tmp_path / "heads.pth", layers=["relu1_2", "relu2_2"])(x, target) == expected
    assert LPIPS(network, dict(reversed(HEADS.items())), layers=["relu1_2", "relu2_2"])(x, target) == expected
    loss = small_lpips(network)
    loss.heads.requires_grad_(True)
    assert loss(x, target) == expected
    doubled = copy.deepcopy(loss)
    with torch.no_grad():
        for head in doubled.heads:
            head.mul_(2)
    gradients = torch.autograd.grad(loss(x, target), list(loss.heads))
    linear = sum((g * head).sum() for g, head in zip(gradients, loss.heads, strict=True))
    torch.testing.assert_close(linear, doubled(x, target) - expected)


def test_functional_gradients() -> None:
    loss, x, target = small_lpips(small()), images(), images(seed=1)
    value, gradient = value_and_gradient(loss, x, target)
    found, also = torch.func.grad_and_value(loss)(x, target)
    torch.testing.assert_close(found, gradient)
    torch.testing.assert_close(also, value)
    x = x.requires_grad_()
    first = torch.autograd.grad(loss(x, target), x, create_graph=True)[0]
    assert torch.autograd.grad(first.square().sum(), x)[0].isfinite().all()


# ---- errors --------------------------------------------------------------------------------------------------------


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = small()
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "distance: expected one of l1, l2, huber, got 'l3'", lambda: Perceptual(network, distance="l3", layers=["pool1"])),
        (ValueError, "got 'relu3_3'; it has conv1_1", lambda: Perceptual(network, ["relu3_3"])),
        (ValueError, "layers: expected each layer once, got pool1, pool1", lambda: Perceptual(network, ["pool1", "pool1"])),
        (ValueError, "reduction: expected 'mean', 'sum' or 'none'", lambda: Perceptual(network, ["pool1"], reduction="no")),
        (ValueError, r"input_range: expected .* got \(1, 0\)", lambda: Perceptual(network, ["pool1"], input_range=(1, 0))),
        (ValueError, "model: expected a VGG, or one of vgg11, .*got 'vgg17'", lambda: Perceptual("vgg17")),
        (ValueError, "weights: expected trained ones for 'vgg16'", lambda: Perceptual("vgg16")),
        (ValueError, "weights: expected None beside a model", lambda: Perceptual(network, weights="x.pth")),
        (ValueError, r"heads: expected .* of \[8\] channels.* got \[8, 16\]", lambda: LPIPS(network, HEADS, layers=["pool1"])),
        (ValueError, "heads: expected .* got the keys a, b", lambda: LPIPS(network, {"a": torch.ones(1), "b": torch.ones(1)}, layers=["pool1"])),
        (ValueError, r"images: expected \[N, C, H, W\], got \[3, 32, 32\]", lambda: small_lpips(network)(images()[0], images()[0])),
        (ValueError, r"images: expected 3 channels, as mean and std have, got \[2, 4, 32, 32\]", lambda: small_lpips(network)(torch.rand(2, 4, 32, 32), images())),
        (ValueError, r"images: expected floating point values in \(-1.0, 1.0\), got torch.uint8; input_range=\(0, 255\)", lambda: small_lpips(network)(images().to(torch.uint8), images())),
        (ValueError, r"target: expected the size of the input.* got \[2, 8, 16, 16\] for \[2, 8, 32, 32\] at relu1_2", lambda: small_lpips(network)(images(), images(size=16))),
        (ValueError, r"target: .* got \[2, 8, 32, 32\] for \[3, 8", lambda: small_lpips(network)(images(3), images())),
        (ValueError, r"target: .* got \[3, 8, 32, 32\] for \[1, 8", lambda: small_lpips(network)(images(1), images(3))),
        (ValueError, "target: expected what this loss has encoded, got one without pool1", lambda: Perceptual(network, ["pool1"])(images(), Encoded({}, {}))),
        (ValueError, r"target: .* got \[2, 8, 8\] for \[3, 8, 8\] at relu1_2", lambda: Perceptual(network, {}, style=["relu1_2"])(images(3), images())),
        (ValueError, "delta: expected a number above 0, got -1", lambda: Perceptual(network, ["pool1"], distance="huber", delta=-1)),
        (ValueError, "style: expected None beside an encoded target", lambda: Perceptual(network, ["pool1"])(images(), Encoded({}, {}), images())),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    bytes_ = (images() * 255).clamp(0, 255).to(torch.uint8)
    of_bytes = Perceptual(network, ["pool1"], input_range=(0, 255))
    torch.testing.assert_close(of_bytes(bytes_, bytes_.flip(2)), of_bytes(bytes_.float(), bytes_.flip(2).float()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install lpips"):
        LPIPS(network, layers=["pool1"])
    assert math.isfinite(float(small_lpips(network)(images(), images(seed=1))))


def test_a_builders_name_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "Linear", SmallLinear)
    model = vggfast.vgg11(num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "vgg11.pth")
    loss = Perceptual("vgg11", ["relu2_1"], weights=tmp_path / "vgg11.pth")
    assert loss(images(), images(seed=1)) == Perceptual(model, ["relu2_1"])(images(), images(seed=1))
