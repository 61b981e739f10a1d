"""vggfast's VGGs in the registries of timm and torchvision, used as their users use them."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_vgg import narrow_vgg, needs_torchvision, torchvision_models
from torch import nn

import vggfast
from vggfast import FusedSequential

ROOT = Path(__file__).parents[1]


@pytest.fixture
def timm(monkeypatch):
    """timm with vggfast's models, and heads of 64 in place of 4096 features between two layers."""
    timm = pytest.importorskip("timm", reason="pip install timm")
    importlib.import_module("vggfast.integrations.timm")
    vgg = importlib.import_module("timm.models.vgg")
    small = vgg.ConvMlp
    monkeypatch.setattr(
        vgg, "ConvMlp", lambda c_in, hidden, *args, **kw: small(c_in, hidden, *args, **(kw | {"mlp_ratio": 0.01}))
    )
    return timm


def pair(timm, name="vgg11", **settings):
    """vggfast's model of timm's registry and timm's own, with the same parameters."""
    torch.manual_seed(0)
    ours = timm.create_model(f"vggfast_{name}", **settings).eval()
    torch.manual_seed(0)
    theirs = timm.create_model(name, **settings).eval()
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    return ours, theirs


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_timms_interface(timm, name):
    ours, theirs = pair(timm, name, num_classes=7, in_chans=1)
    assert type(ours.features) is FusedSequential
    x = torch.rand(2, 1, 64, 80, generator=torch.Generator().manual_seed(0))
    assert_close(ours(x), theirs(x))
    features = ours.forward_features(x)
    assert_close(features, theirs.forward_features(x))
    for pre_logits in (False, True):
        assert_close(ours.forward_head(features, pre_logits), theirs.forward_head(features, pre_logits))
    for settings in ({}, {"indices": 2}, {"indices": [1]}, {"indices": [0, 3], "stop_early": True}, {"indices": [5]}):
        got, expected = ours.forward_intermediates(x, **settings), theirs.forward_intermediates(x, **settings)
        for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
            assert_close(a, b)
        only = ours.forward_intermediates(x, intermediates_only=True, **settings)
        assert all(torch.equal(a, b) for a, b in zip(only, got[1], strict=True))
    assert ours.get_classifier() is ours.head.fc
    named = ("architecture", "hf_hub_id", "tag", "url")
    published = [{key: cfg[key] for key in cfg if key not in named} for cfg in (ours.default_cfg, theirs.default_cfg)]
    assert published[0] == published[1]
    assert ours.pretrained_cfg["hf_hub_id"] == f"timm/{name}.tv_in1k"
    ours.reset_classifier(3)
    assert ours(x).shape == (2, 3)
    ours.reset_classifier(0, "avg")
    assert ours(x).shape == (2, 4096)
    with pytest.raises(ValueError, match="output_fmt: expected NCHW, got 'NLC'"):
        ours.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"out_indices": (1, 3)}, {"out_indices": (3, 1), "feature_cls": "hook"}, {"feature_cls": "list"}]
)
def test_timms_features_only(timm, settings):
    torch.manual_seed(0)
    ours = timm.create_model("vggfast_vgg11_bn", features_only=True, **settings).eval()
    torch.manual_seed(0)
    theirs = timm.create_model("vgg11_bn", features_only=True, **settings).eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert_close(a, b)


@torch.no_grad()
def test_timm_loads_our_files_and_its_own(timm, tmp_path):
    ours, theirs = pair(timm, num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    vggfast.save_weights(vggfast.load_model(tmp_path / "timm.pth").model, tmp_path / "ours.safetensors")
    x = torch.rand(1, 3, 64, 64)
    for name in ("timm.pth", "ours.safetensors"):
        overlay = {"file": str(tmp_path / name), "num_classes": 7}
        loaded = timm.create_model(
            "vggfast_vgg11", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay
        ).eval()
        assert_close(loaded(x), ours(x))
        grey = timm.create_model(
            "vggfast_vgg11", pretrained=True, num_classes=4, in_chans=1, pretrained_cfg_overlay=overlay
        )
        assert_close(grey.features[0].weight, ours.features[0].weight.sum(1, keepdim=True))
    assert copy.deepcopy(ours)(x).shape == (1, 7)


def test_timms_lists(timm):
    names = [f"vggfast_vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")]
    assert timm.list_models("vggfast_*") == sorted(names)
    assert timm.list_pretrained("vggfast_vgg16*") == ["vggfast_vgg16.tv_in1k", "vggfast_vgg16_bn.tv_in1k"]


@needs_torchvision
def test_torchvisions_registry(monkeypatch):
    importlib.import_module("vggfast.integrations.torchvision")
    names = [f"vggfast_{name}" for name in ("vgg11", "vgg11_bn", "vgg16", "vgg16c", "vgg11_lrn")]
    assert set(names) <= set(torchvision_models.list_models())
    with torch.device("meta"):
        model = torchvision_models.get_model("vggfast_vgg16_bn", num_classes=5)
        small = torchvision_models.get_model("vggfast_vgg16c", in_channels=1, dropout=0.2)
    assert type(model) is vggfast.VGG16
    assert isinstance(model.features[1], nn.BatchNorm2d)
    assert type(small) is vggfast.VGG16C
    assert small.classifier[2].p == 0.2
    assert torchvision_models.get_model_weights("vggfast_vgg16") is torchvision_models.VGG16_Weights
    assert torchvision_models.get_model_builder("vggfast_vgg16").__name__ == "vggfast_vgg16"
    monkeypatch.setattr(
        vggfast.models, "load_weights", lambda model, spec, progress: loaded.append((type(model), spec, progress))
    )
    loaded = []
    with torch.device("meta"):
        for weights in (torchvision_models.VGG16_Weights.DEFAULT, "DEFAULT", "IMAGENET1K_FEATURES"):
            torchvision_models.get_model("vggfast_vgg16", weights=weights)
        torchvision_models.get_model("vggfast_vgg16", weights="DEFAULT", progress=False)
        with pytest.warns(UserWarning, match="'pretrained' is deprecated"):  # as torchvision takes it to this day
            torchvision_models.get_model("vggfast_vgg16", pretrained=True)
    ours = vggfast.VGG16_Weights
    expected = [(ours.DEFAULT, True), (ours.DEFAULT, True), (ours.IMAGENET1K_FEATURES, True)]
    expected += [(ours.DEFAULT, False), (ours.DEFAULT, True)]
    assert loaded == [(vggfast.VGG16, spec, progress) for spec, progress in expected]


@pytest.mark.parametrize(
    ("name", "message"), [("timm", "pip install timm"), ("torchvision", "pip install torchvision")]
)
def test_a_missing_library_is_named(name, message):
    script = f"import sys; sys.modules[{name!r}] = None\nimport vggfast.integrations.{name}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: vggfast.integrations.{name} needs {name}, which cannot be imported here")
    assert message in last


def test_converted_models_save_and_load(timm, tmp_path):
    """A narrow VGG goes through timm's registry's layout and back without loss."""
    model = narrow_vgg()
    state = vggfast.weight_layouts.to_timm(model.state_dict())
    torch.save(state, tmp_path / "a.pth")
    loaded = vggfast.load_model(tmp_path / "a.pth").model
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
