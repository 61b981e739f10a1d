"""The arguments of constructors and builders: what is refused and with which words, and how `weights` are asked for."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
from small_vgg import BUILDERS, SmallLinear, assert_same_parameters, needs_torchvision, on_meta, torchvision_models
from torch import nn

from vggfast import models, weights


@pytest.fixture
def small_head(monkeypatch):
    monkeypatch.setattr(nn, "Linear", SmallLinear)


BAD_ARGUMENTS = [
    (models.VGG16, {"num_classes": "10"}, TypeError, r"num_classes: expected an integer >= 0, got '10' \(str\)"),
    (models.VGG16, {"num_classes": 10.0}, TypeError, r"num_classes: expected an integer >= 0, got 10.0 \(float\)"),
    (models.vgg16, {"num_classes": True}, TypeError, "num_classes: expected an integer >= 0, got True"),
    (models.vgg16, {"num_classes": -1}, ValueError, "num_classes: expected an integer >= 0, got -1"),
    (models.vgg16, {"dropout": 2}, ValueError, "between 0 and 1, but got 2"),
    (models.VGG16, {"in_channels": 0}, ValueError, "in_channels: expected an integer >= 1, got 0"),
    (models.vgg16, {"in_channels": None}, TypeError, "in_channels: expected an integer >= 1, got None"),
    (models.vgg16, {"classes": 10}, TypeError, "unexpected keyword argument 'classes'"),
    (
        models.vgg16,
        {"weights": "IMAGENET1K_V2"},
        ValueError,
        "expected VGG16_Weights.IMAGENET1K_V1, .* 'IMAGENET1K_V2'",
    ),
    (models.vgg16, {"weights": 3}, TypeError, "expected VGG16_Weights, a path, a URL or None but received int"),
    (models.VGG16, {"weights": True}, TypeError, "expected VGG16_Weights, a path, a URL or None but received bool"),
    (
        models.vgg16,
        {"weights": weights.VGG11_Weights.DEFAULT},
        TypeError,
        "Invalid Weight class provided; expected VGG16_Weights but received VGG11_Weights",
    ),
    (
        models.VGG16,
        {"weights": "VGG16_Weights.DEFAULT", "batch_norm": True},
        TypeError,
        "expected VGG16_BN_Weights but received VGG16_Weights",
    ),
    (
        models.vgg16,
        {"weights": "DEFAULT", "num_classes": 10},
        ValueError,
        "The parameter 'num_classes' expected value 1000 but got 10 instead",
    ),
    (models.vgg16, {"weights": "DEFAULT", "in_channels": 1}, ValueError, "'in_channels' expected value 3 but got 1"),
    (models.vgg16c, {"weights": "DEFAULT"}, ValueError, "no weights are published for this model"),
    (models.vgg16c, {"pretrained": True}, ValueError, "No weights available for model vgg16c"),
    (models.vgg16, {"weights": None, "pretrained": True}, TypeError, "unexpected keyword argument 'pretrained'"),
    (models.make_layers, {"cfg": [64, "X"]}, TypeError, r"cfg\[1\], where not 'M' or 'LRN': .* got 'X'"),
    (models.make_layers, {"cfg": [64, 0]}, ValueError, r"cfg\[1\], where not 'M' or 'LRN': expected an integer >= 1"),
]


@pytest.mark.filterwarnings("ignore:.*deprecated since torchvision")
@pytest.mark.parametrize(("call", "arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_say_what_was_expected(call, arguments, error, message):
    with pytest.raises(error, match=message):
        on_meta(call, **arguments)


@pytest.fixture
def requested(monkeypatch):
    """The weights that constructors ask for; nothing is loaded."""
    specs = []
    monkeypatch.setattr(models, "load_weights", lambda model, spec, progress: specs.append((spec, progress)))
    return specs


@pytest.mark.parametrize(
    ("args", "kwargs", "expected", "warned"),
    [
        (
            (),
            {"pretrained": True},
            "IMAGENET1K_V1",
            ["'pretrained' is deprecated", "weights=VGG16_Weights.IMAGENET1K_V1"],
        ),
        ((), {"pretrained": False}, None, ["'pretrained' is deprecated", "weights=None"]),
        ((True,), {}, "IMAGENET1K_V1", ["Using weights as positional", "weights=VGG16_Weights.IMAGENET1K_V1"]),
        ((False, False), {}, None, ["Using weights and progress as positional", "weights=None"]),
        ((None,), {"num_classes": 4}, None, ["Using weights as positional"]),
        ((), {"weights": "IMAGENET1K_FEATURES"}, "IMAGENET1K_FEATURES", []),
        ((), {"weights": "VGG16_Weights.DEFAULT"}, "IMAGENET1K_V1", []),
        ((), {"weights": weights.VGG16_Weights.DEFAULT, "num_classes": 1000}, "IMAGENET1K_V1", []),
    ],
)
def test_weights_and_their_legacy_spellings(args, kwargs, expected, warned, requested):
    with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
        warnings.simplefilter("always")
        models.vgg16(*args, **kwargs)
    assert requested == ([(weights.VGG16_Weights[expected], True)] if expected else [])
    for warning, text in zip(caught, warned, strict=True):
        assert text in str(warning.message)
        assert warning.filename == __file__  # points at the caller


@pytest.mark.filterwarnings("ignore:.*deprecated since torchvision")
@pytest.mark.parametrize("name", BUILDERS)
def test_each_builder_asks_for_its_own_weights(name, requested):
    enum = getattr(weights, f"{name.upper()}_Weights")
    on_meta(getattr(models, name), weights="DEFAULT", progress=False)
    on_meta(getattr(models, name), pretrained=True)
    assert requested == [(enum.IMAGENET1K_V1, False), (enum.IMAGENET1K_V1, True)]


@pytest.mark.parametrize("builder", [models.vgg16c, models.vgg11_lrn])
def test_the_papers_builders_take_files(builder, requested):
    on_meta(builder, weights="runs/best.pth", progress=False)
    assert requested == [(Path("runs/best.pth"), False)]


def test_weights_spare_the_initialisation(requested, small_head):
    assert models.vgg11(weights="DEFAULT", init_weights=True).features[0].bias.count_nonzero() == 64
    assert models.vgg11(init_weights=True).features[0].bias.count_nonzero() == 0


def test_too_many_positional_arguments():
    with pytest.raises(TypeError, match=r"vgg16\(\) takes at most weights and progress by position, got 3"):
        models.vgg16(None, True, 10)
    with pytest.raises(TypeError, match="multiple values for argument 'weights'"):
        models.vgg16(None, weights=None)


@needs_torchvision
def test_torchvisions_weight_enums_are_accepted(requested):
    on_meta(models.vgg16_bn, weights=torchvision_models.VGG16_BN_Weights.DEFAULT, progress=False)
    assert requested == [(weights.VGG16_BN_Weights.IMAGENET1K_V1, False)]
    with pytest.raises(TypeError, match=r"expected VGG16_Weights, .* but received ResNet18_Weights"):
        on_meta(models.vgg16, weights=torchvision_models.ResNet18_Weights.DEFAULT)


def test_published_weights_are_found_in_the_cache(tmp_path, monkeypatch, small_head):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    saved = models.vgg11(init_weights=False)
    cached = tmp_path / "hub" / "checkpoints" / "vgg11-8a719046.pth"
    cached.parent.mkdir(parents=True)
    torch.save(saved.state_dict(), cached)
    for loaded in (
        models.vgg11(weights="DEFAULT"),
        models.VGG11(weights=weights.VGG11_Weights.IMAGENET1K_V1),
        models.vgg11(weights=str(cached)),
        models.VGG11(weights=Path(cached)),
    ):
        assert_same_parameters(loaded, saved)
    with pytest.raises(RuntimeError, match=r"trained for 1000 classes: build with num_classes=1000"):
        models.vgg11(weights=cached, num_classes=10)


@pytest.mark.parametrize("name", [*BUILDERS, "vgg16c", "vgg11_lrn"])
def test_progress_is_shown_by_default(name):
    builder = getattr(models, name)
    assert inspect.signature(builder).parameters["progress"].default is True
    assert inspect.signature(inspect.signature(builder).return_annotation).parameters["progress"].default is True
