"""Checkpoints of every layout: recognised, converted, loaded into a model that gives the answers of the one saved."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_vgg import NARROW, NARROW_D, narrow_vgg
from torch import nn

import vggfast
from vggfast import load_model, load_weights, save_weights
from vggfast.models import VGG
from vggfast.preprocessing import Normalisation
from vggfast.weight_layouts import adapt_in_channels, architecture, recognise, to_timm, to_torchvision
from vggfast.weights import read_checkpoint

NARROW_C = [4, 4, "M", 6, 6, "M", 8, 8, (8, 1), "M", 8, 8, (8, 1), "M", 8, 8, (8, 1), "M"]
NARROW_LRN = [4, "LRN", "M", 6, "M", 8, 8, "M", 8, 8, "M", 8, 8, "M"]


def scores(model, x):
    with torch.no_grad():
        return model.eval()(x)


def images(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- torchvision's layout, and which VGG it is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_norm": True, "cfg": NARROW_D},
        {"cfg": NARROW_C, "num_classes": 3},
        {"cfg": NARROW_LRN, "in_channels": 1},
        {"cfg": NARROW_LRN, "batch_norm": True},
        {"hidden": 24, "grid": 2},
    ],
    ids=str,
)
def test_the_network_is_built_from_its_checkpoint(settings, tmp_path):
    model = narrow_vgg(**settings)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert isinstance(loaded.model, VGG)
    assert not loaded.model.training
    assert repr(loaded.model) == repr(model)
    assert (loaded.layout, loaded.classes, loaded.size) == ("torchvision", None, None)
    assert (loaded.num_classes, loaded.in_channels) == (settings.get("num_classes", 7), settings.get("in_channels", 3))
    assert (loaded.normalisation, loaded.normalisation_known) == (Normalisation(), False)
    x = images(2, loaded.in_channels, 64, 70)
    assert torch.equal(scores(loaded.model, x), scores(model, x))


@pytest.mark.parametrize("name", ["vgg11", "vgg13_bn", "vgg16", "vgg16c", "vgg19_bn", "vgg11_lrn"])
def test_the_papers_networks_are_known_again(name):
    with torch.device("meta"):
        model = getattr(vggfast, name)(num_classes=10)
    found = architecture(model.state_dict())
    assert list(found.cfg) == vggfast.models.cfgs[type(model).cfg]
    assert (found.batch_norm, found.hidden, found.num_classes, found.grid) == ("_bn" in name, (4096, 4096), 10, 7)


def test_half_precision_and_no_batch_counts(tmp_path):
    model = narrow_vgg(batch_norm=True)
    state = {k: v.bfloat16() for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth").model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.features[0].weight, state["features.0.weight"].float())


def test_what_is_saved_beside_the_weights(tmp_path):
    model, path = narrow_vgg(in_channels=1, num_classes=2), tmp_path / "a.safetensors"
    grey = Normalisation((0.25,), (0.5,))
    save_weights(model, path, classes=["cat", "dög"], normalisation=grey, size=48)
    loaded = load_model(str(path))
    assert (loaded.classes, loaded.normalisation, loaded.normalisation_known, loaded.size) == (
        ["cat", "dög"],
        grey,
        True,
        48,
    )
    assert loaded.source == str(path)
    with safe_open(path, "pt") as file:
        about = {name: json.loads(text) for name, text in file.metadata().items()}
    assert (about["in_channels"], about["classes"]) == (1, ["cat", "dög"])
    save_weights(vggfast.to_dense(model), path)  # replaces it; its convolutions are matrices again
    again = load_model(path)
    assert again.classes is None
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    before = again.model.classifier[6].weight.clone()
    path.write_bytes(b"\x01" * path.stat().st_size)  # as a copy onto it does: the same file, other bytes
    assert torch.equal(again.model.classifier[6].weight, before)
    with pytest.raises(ValueError, match="classes: expected 2 names, as many as the scores, got 3"):
        save_weights(model, path, classes=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"expected a name that ends in .safetensors, got 'a.pth'"):
        save_weights(model, "a.pth")
    with pytest.raises(OSError, match="nowhere"):
        save_weights(model, tmp_path / "nowhere" / "a.safetensors")


def test_a_file_of_the_training(tmp_path):
    from vggfast.recipes.train import TrainConfig, fit

    config = TrainConfig.recipe("digits", output=str(tmp_path / "run"), epochs=1, limit=32, batch_size=32, threads=1)
    model = narrow_vgg(num_classes=10, in_channels=1)
    fit(config, model=model)
    loaded = load_model(tmp_path / "run" / "model.safetensors")
    assert loaded.classes == [str(digit) for digit in range(10)]
    x = images(2, 1, 32, 32)
    assert torch.equal(scores(loaded.model, x), scores(model, x))
    assert torch.equal(scores(load_model(tmp_path / "run" / "checkpoint.pt").model, x), scores(model, x))


def without(state, *prefixes):
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: nn.Linear(2, 2).state_dict(),
            r"expected a VGG checkpoint as torchvision .* got the keys weight, bias$",
        ),
        (lambda: nn.Sequential(*[nn.Linear(2, 2)] * 9).state_dict(), r"got the keys 0.weight, .*, … \(18 in all\)"),
        (lambda: without(narrow_vgg().state_dict(), "classifier"), "holds no classifier. To load its features alone"),
        (
            lambda: without(narrow_vgg().state_dict(), "classifier.3"),
            "expected fully connected layers at classifier.0, ",
        ),
        (
            lambda: without(narrow_vgg().state_dict(), "features.3."),
            "features.0 and features.6: expected a ReLU, and a pool",
        ),
        (lambda: narrow_vgg().state_dict() | {"extra": torch.ones(1)}, r"unexpected keys \['extra'\]"),
        (lambda: without(narrow_vgg().state_dict(), "features.0.bias"), r"missing keys \['features.0.bias'\]"),
        (
            lambda: narrow_vgg().state_dict() | {"classifier.0.weight": torch.ones(16, 8 * 48)},
            r"classifier.0.weight: expected 8 channels by a square as inputs, got \[16, 384\]",
        ),
    ],
)
def test_what_is_no_vgg(state, message, tmp_path):
    torch.save(state(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in str(error.value)


def test_features_only_weights_are_refused_before_the_download():
    with pytest.raises(ValueError, match="IMAGENET1K_FEATURES holds features only, no classifier"):
        load_model("VGG16_Weights.IMAGENET1K_FEATURES")


# ---- timm ----------------------------------------------------------------------------------------------------------


def timm_vgg(cfg=NARROW, **settings):
    vgg = pytest.importorskip("timm.models.vgg", reason="compares with timm: pip install timm")
    torch.manual_seed(3)
    model = vgg.VGG(cfg, num_classes=7, mlp_ratio=0.005, **settings).eval()
    nn.init.normal_(model.head.fc.weight)
    return model


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_timms_layout(norm_layer, tmp_path):
    theirs = timm_vgg(norm_layer=norm_layer)
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    x = images(2, 3, 224, 224)
    loaded = load_model(tmp_path / "a.safetensors")
    assert loaded.layout == "timm"
    torch.testing.assert_close(scores(loaded.model, x), scores(theirs, x), rtol=1e-5, atol=1e-5)
    again = to_timm(to_torchvision(theirs.state_dict()))
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in again.items())


def test_loading_into_timms_model_and_from_it(tmp_path):
    theirs, other = timm_vgg(), timm_vgg()
    save_weights(theirs, tmp_path / "timm.safetensors", classes=list("abcdefg"))
    assert load_model(tmp_path / "timm.safetensors").classes == list("abcdefg")
    ours = load_model(tmp_path / "timm.safetensors").model
    torch.save({k: v + 1 for k, v in ours.state_dict().items()}, tmp_path / "ours.pth")
    load_weights(other, tmp_path / "ours.pth")
    for key, value in other.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key] + 1), key
    load_weights(other, tmp_path / "timm.safetensors")
    assert torch.equal(other.head.fc.weight, theirs.head.fc.weight)


# ---- the tutorial class --------------------------------------------------------------------------------------------


class Tutorial(nn.Module):
    """As it is copied: attributes `conv` and `fc_layer`."""

    def __init__(self):
        super().__init__()
        ours = narrow_vgg(seed=4)
        self.conv = nn.Sequential(*ours.features)
        first, second, last = (ours.classifier[index] for index in (0, 3, 6))
        self.fc_layer = nn.Sequential(first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout(), last)

    def forward(self, x):
        x = self.conv(x)
        return self.fc_layer(x.view(x.size(0), -1))


def test_the_tutorials_layout(tmp_path):
    theirs = Tutorial().eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert loaded.layout == "tutorial"
    assert list(architecture(read_checkpoint(tmp_path / "a.pth")).cfg) == NARROW  # configuration A, whatever its name
    x = images(2, 3, 224, 224)
    torch.testing.assert_close(scores(loaded.model, x), scores(theirs, x), rtol=1e-5, atol=1e-5)
    ours = narrow_vgg()
    load_weights(ours, tmp_path / "a.pth")
    assert torch.equal(ours.classifier[6].weight, theirs.fc_layer[6].weight)
    load_weights(theirs, tmp_path / "a.pth")  # its own keys, as they are


def test_the_tutorials_layout_with_layers_at_other_places():
    state = to_torchvision(
        {f"fc_layer.{i}.weight": torch.full((1, 1), i) for i in (0, 2, 4)} | {"conv.0.weight": torch.ones(1)}
    )
    assert [state[f"classifier.{i}.weight"].item() for i in (0, 3, 6)] == [0, 2, 4]


# ---- other channels, other classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "wanted"), [(3, 1), (3, 2), (3, 4), (3, 7), (1, 3), (2, 5)])
def test_adapted_filters_answer_grey_images_as_before(channels, wanted):
    weight = images(4, channels, 3, 3)
    adapted = adapt_in_channels(weight, wanted)
    assert adapted.shape == (4, wanted, 3, 3)
    if channels == 3:
        timm = pytest.importorskip("timm.models", reason="compares with timm: pip install timm")
        assert torch.equal(adapted, timm.adapt_input_conv(wanted, weight))
    if wanted % channels == 0 or wanted == 1:
        torch.testing.assert_close(adapted.sum(1), weight.sum(1))


def test_resetting_channels_and_classes():
    model = narrow_vgg(batch_norm=True).to(torch.bfloat16)
    weight = model.features[0].weight
    model.reset_in_channels(1)
    model.reset_classifier(4)
    assert torch.equal(model.features[0].weight, weight.detach().sum(1, keepdim=True))
    assert model.features[0].in_channels == 1
    last = model.classifier[6]
    assert (last.in_features, last.out_features, last.weight.dtype) == (16, 4, torch.bfloat16)
    assert torch.equal(last.bias, torch.zeros_like(last.bias))
    assert 0 < last.weight.std() < 0.02
    assert scores(model, images(2, 1, 32, 32).bfloat16()).shape == (2, 4)
    with pytest.raises(ValueError, match="num_classes: expected an integer >= 1, got 0"):
        model.reset_classifier(0)
    assert model.features[0].weight.requires_grad
    model.requires_grad_(False).reset_in_channels(3)
    assert not model.features[0].weight.requires_grad
    with pytest.raises(TypeError, match=r"in_channels: expected an integer >= 1, got 1\.5"):
        model.reset_in_channels(1.5)
    model.classifier[6] = nn.Linear(16, 4, bias=False)
    model.reset_classifier(2)
    assert model.classifier[6].bias is None
    model.classifier[6] = nn.Identity()
    with pytest.raises(TypeError, match=r"expected an nn.Linear as its last layer, got Identity"):
        model.reset_classifier(3)


@pytest.mark.parametrize("target", ["torchvision", "timm"])
def test_loading_adapts_where_it_is_asked_to(target, tmp_path):
    saved = narrow_vgg(hidden=20)
    torch.save(saved.state_dict(), tmp_path / "a.pth")
    if target == "timm":
        model = timm_vgg(in_chans=1)
        torch.save(to_torchvision(timm_vgg().state_dict()), tmp_path / "a.pth")
        saved = load_model(tmp_path / "a.pth").model
        model.reset_classifier(4)
        last = model.head.fc
    else:
        model = narrow_vgg(hidden=20, in_channels=1, num_classes=4, seed=9)
        last = model.classifier[6]
    before = last.weight.clone()
    with pytest.raises(RuntimeError, match=r"build with in_channels=3, or let load_weights\(…, adapt=True\)"):
        load_weights(model, tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth", adapt=True)
    assert torch.equal(last.weight, before)
    assert torch.equal(model.features[0].weight, saved.features[0].weight.sum(1, keepdim=True))
    assert torch.equal(model.features[3].weight, saved.features[3].weight)


def test_batches_that_were_counted_are_known_again(tmp_path):
    model = narrow_vgg(batch_norm=True)
    model.features[1].num_batches_tracked.fill_(5)
    save_weights(model, tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors").model.features[1].num_batches_tracked == 5


def test_adapting_loads_a_last_layer_that_fits(tmp_path):
    saved, model = narrow_vgg(), narrow_vgg(in_channels=1, seed=9)
    torch.save(saved.state_dict(), tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth", adapt=True)
    assert torch.equal(model.classifier[6].weight, saved.classifier[6].weight)


def test_tensors_that_share_memory(tmp_path):
    """Of tied layers, or expanded: what is loaded has memory of its own, and what is saved is whole."""
    model = narrow_vgg()
    model.classifier[3].bias = model.classifier[0].bias
    state = model.state_dict() | {"classifier.6.bias": torch.zeros(1).expand(7)}
    torch.save(state, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth").model
    with torch.no_grad():
        loaded.classifier[0].bias.add_(1)
        loaded.classifier[6].bias.add_(torch.arange(7))
    assert torch.equal(loaded.classifier[3].bias, model.classifier[3].bias)
    save_weights(model, tmp_path / "b.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "b.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    again = load_model(tmp_path / "b.safetensors").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_recognise():
    assert recognise(narrow_vgg().state_dict()) == "torchvision"
    assert recognise(Tutorial().state_dict()) == "tutorial"
    assert recognise(["block1_conv1.kernel"]) == "keras"
    assert recognise(["features.0.weight", "head.fc.weight"]) == "timm"
    assert recognise(["layer1.0.conv1.weight"]) is None


@pytest.mark.parametrize(
    "about",
    [
        {"classes": "2"},
        {"classes": '{"0": "cat", "1": "dog"}'},
        {"classes": '["cat"]'},
        {"classes": "cat,dog"},
        {"preprocessing": '"imagenet"'},
        {"preprocessing": '{"mean": [0.5, 0.5, 0.5]}'},
        {"preprocessing": '{"mean": [0.5, 0.5], "std": [0.5, 0.5], "size": "64"}'},
        {"preprocessing": '{"size": [64, 64], "scale": 64.5}'},
        {"preprocessing": '{"size": 0, "scale": 9999999}'},
    ],
)
def test_metadata_of_others_are_left_out(about, tmp_path):
    save_file(narrow_vgg(NARROW, num_classes=2).state_dict(), tmp_path / "a.safetensors", about)
    loaded = load_model(tmp_path / "a.safetensors")
    assert (loaded.classes, loaded.normalisation_known, loaded.size, loaded.scale) == (None, False, None, None)


def test_what_stands_beside_the_tensors_and_prefixes_in_either_order(tmp_path):
    state = narrow_vgg(NARROW, num_classes=2).state_dict()
    for name, wrapped in (
        ("flat", {**state, "epoch": 3}),
        ("inner", {"state_dict": {**state, "epoch": 3, "arch": "vgg"}}),
        ("compiled first", {f"module._orig_mod.{key}": value for key, value in state.items()}),
        ("compiled last", {f"_orig_mod.module.{key}": value for key, value in state.items()}),
    ):
        torch.save(wrapped, tmp_path / f"{name}.pth")
        found = load_model(tmp_path / f"{name}.pth").model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in state.items()), name


def test_a_network_of_other_names_is_no_vgg(tmp_path):
    torch.save(
        {"features.conv0.weight": torch.zeros(8, 3, 3, 3), "features.0.weight": torch.zeros(8)}, tmp_path / "a.pth"
    )
    with pytest.raises(ValueError, match="expected a VGG checkpoint"):
        load_model(tmp_path / "a.pth")


def test_sparse_tensors_leave_a_model_as_it_was(tmp_path):
    model, other = narrow_vgg(NARROW, num_classes=2), narrow_vgg(NARROW, num_classes=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = other.state_dict() | {"classifier.6.weight": other.classifier[6].weight.detach().to_sparse()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=r"quantised or complex ones, or ones without data: classifier\.6\.weight"):
        load_weights(model, tmp_path / "a.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
