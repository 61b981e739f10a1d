"""Weight enums and checkpoints: what is accepted, and what is said about what is not.

The network is a small stand-in with VGG's names; nothing is downloaded except from file:// URLs.
"""

import copy
import json
import os
import pickle
import re
import sys
import urllib.error

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_vgg import needs_torchvision, torchvision_models
from torch import nn

import vggfast
from vggfast import weights
from vggfast.preprocessing import ImageClassification, Normalisation
from vggfast.weights import VGG11_Weights, VGG16_BN_Weights, VGG16_Weights, load_weights, read_checkpoint, resolve

ENUMS = list(weights._ENUMS.values())
MEMBERS = [member for enum in ENUMS for member in enum]


class Small(nn.Module):
    """VGG's names, few parameters."""

    def __init__(self, num_classes=5, in_channels=3, batch_norm=False):
        super().__init__()
        norm = [nn.BatchNorm2d(4)] if batch_norm else []
        self.features = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), *norm, nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(4, 6), *[nn.ReLU()] * 5, nn.Linear(6, num_classes))


def same(state, other):
    return list(state) == list(other) and all(torch.equal(state[key], other[key]) for key in state)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's cache, empty, on a machine with no network."""

    def refuse(request, *args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


# --- enums -----------------------------------------------------------------------------------------------------------


def test_names():
    stems = [f"VGG{depth}{norm}_Weights" for depth in (11, 13, 16, 19) for norm in ("", "_BN")]
    assert [enum.__name__ for enum in ENUMS] == stems
    for enum in ENUMS:
        assert enum.DEFAULT is enum.IMAGENET1K_V1
        assert repr(enum.DEFAULT) == f"{enum.__name__}.IMAGENET1K_V1"
    assert list(VGG16_Weights.__members__) == ["IMAGENET1K_V1", "IMAGENET1K_FEATURES", "DEFAULT"]


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_members_survive_pickle_and_copies(member):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is member
    assert copy.deepcopy(member) is member


@needs_torchvision
@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_facts_are_torchvisions(member):
    theirs = getattr(torchvision_models, type(member).__name__)
    assert list(theirs.__members__) == list(type(member).__members__)
    theirs = theirs[member.name]
    assert member.url == theirs.url
    assert member.meta["num_classes"] == 1000
    shared = [key for key in theirs.meta if key != "_docs"]
    assert {key: repr(member.meta[key]) for key in shared} == {key: repr(theirs.meta[key]) for key in shared}
    assert member.meta.get("categories") == theirs.meta["categories"]
    assert type(member.transforms()) is type(theirs.transforms())
    assert repr(member.transforms()) == repr(theirs.transforms())
    assert repr(member.transforms(crop_size=299, resize_size=342)) == repr(
        theirs.transforms(crop_size=299, resize_size=342)
    )


@pytest.fixture(params=["missing", "broken"])
def no_torchvision(request, monkeypatch, tmp_path):
    """torchvision cannot be imported: it is not there, or was built for another torch."""
    for member in MEMBERS:
        if member is not VGG16_Weights.IMAGENET1K_FEATURES:
            monkeypatch.delitem(member.value.meta, "categories", raising=False)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if request.param == "missing":
        monkeypatch.setitem(sys.modules, "torchvision", None)
        return "torchvision"
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    return "operator torchvision::nms does not exist"


def test_without_torchvision(no_torchvision):
    meta = VGG16_Weights.DEFAULT.meta
    assert meta["num_classes"] == 1000
    assert meta.get("categories") is None
    with pytest.raises(ImportError, match=rf"category names come from torchvision.*{no_torchvision}.*pip install"):
        meta["categories"]
    with pytest.raises(KeyError):
        meta["colour"]
    features = VGG16_Weights.IMAGENET1K_FEATURES
    assert features.meta["categories"] is None
    transform = features.transforms(resize_size=300)
    assert type(transform) is ImageClassification
    shown = "crop_size=224, resize_size=300, mean=[0.48235, 0.45882, 0.40784], std=[0.00392"
    assert repr(transform).startswith(f"ImageClassification({shown}")


# --- what `weights` may be -------------------------------------------------------------------------------------------


def test_resolve(tmp_path, monkeypatch):
    assert resolve(None) is None
    assert resolve(VGG11_Weights.DEFAULT) is VGG11_Weights.IMAGENET1K_V1
    assert resolve("VGG16_Weights.IMAGENET1K_FEATURES") is VGG16_Weights.IMAGENET1K_FEATURES
    assert resolve("DEFAULT", [VGG16_BN_Weights]) is VGG16_BN_Weights.IMAGENET1K_V1
    assert resolve("https://example.org/a.pth") == "https://example.org/a.pth"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/a.safetensors") == tmp_path / "a.safetensors"
    assert resolve(tmp_path) == tmp_path
    assert str(resolve("runs/last")) == "runs/last"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last").touch()
    assert str(resolve("last")) == "last"


@pytest.mark.parametrize("name", ["DEFAULT", "", "VGG16_Weights.V3", "VGG16", "ResNet18_Weights.DEFAULT"])
def test_unknown_names_are_answered_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"expected VGG11_Weights.IMAGENET1K_V1, .*, a path to a checkpoint, or a URL"):
        resolve(name)


@needs_torchvision
def test_torchvisions_members_are_ours():
    for member in MEMBERS:
        assert resolve(getattr(torchvision_models, type(member).__name__)[member.name]) is member


# --- downloads and the cache -----------------------------------------------------------------------------------------


def test_no_network_says_what_to_put_where_and_then_finds_it(cache):
    model, saved = Small(), Small()
    with pytest.raises(OSError, match="no network") as error:
        load_weights(model, VGG16_Weights.DEFAULT)
    path = cache / "vgg16-397923af.pth"
    assert f"cannot download {VGG16_Weights.DEFAULT.url}" in str(error.value)
    assert str(path) in str(error.value)
    torch.save(saved.state_dict(), path)
    load_weights(model, VGG16_Weights.DEFAULT)
    assert same(model.state_dict(), saved.state_dict())
    assert same(VGG16_Weights.DEFAULT.get_state_dict(progress=False), saved.state_dict())


def test_urls_are_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source, saved = tmp_path / "mine-v2.pth", Small()
    torch.save(saved.state_dict(), source)
    for _ in range(2):
        assert same(read_checkpoint(source.as_uri(), progress=False), saved.state_dict())
        source.unlink(missing_ok=True)
    assert os.listdir(tmp_path / "hub" / "checkpoints") == ["mine-v2.pth"]
    with pytest.raises(OSError, match=r"cannot download .*gone\.pth"):
        read_checkpoint((tmp_path / "gone.pth").as_uri())


def test_a_published_file_with_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / "vgg11-8a719046.pth"
    torch.save(Small().state_dict(), source)
    published = VGG11_Weights.DEFAULT.value
    monkeypatch.setitem(published.__dict__, "url", source.as_uri())
    with pytest.raises(OSError, match=r'invalid hash value \(expected "8a719046"'):
        read_checkpoint(VGG11_Weights.DEFAULT, progress=False)
    assert os.listdir(tmp_path / "hub" / "checkpoints") == []


def test_a_url_without_a_file_name():
    with pytest.raises(ValueError, match=r"expected a URL that ends in a file name, got 'https://example.org/'"):
        read_checkpoint("https://example.org/")


# --- files -----------------------------------------------------------------------------------------------------------

WRAPPED = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {}},
    "its settings as model": lambda state: {"model": {"depth": 16}, "model_state_dict": state},
    "AveragedModel": lambda state: (
        {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in state.items()}
    ),
    "DistributedDataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "all of it": lambda state: {
        "state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()},
        "args": {"lr": 0.1},
    },
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_and_prefixes(how, tmp_path):
    saved, model = Small(batch_norm=True), Small(batch_norm=True)
    torch.save(WRAPPED[how](saved.state_dict()), tmp_path / "a.pt")
    load_weights(model, tmp_path / "a.pt")
    assert same(model.state_dict(), saved.state_dict())


def test_safetensors_and_old_formats(tmp_path):
    saved = Small()
    save_file(saved.state_dict(), tmp_path / "a.safetensors")
    torch.save(saved.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "old.pth"):
        model = Small()
        load_weights(model, str(tmp_path / name))
        assert same(model.state_dict(), saved.state_dict())


def test_half_precision_checkpoints_keep_the_models_dtype(tmp_path):
    torch.save({key: value.half() for key, value in Small().state_dict().items()}, tmp_path / "a.pt")
    model = Small()
    load_weights(model, tmp_path / "a.pt")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_batch_norm_without_a_batch_count(tmp_path):
    state = Small(batch_norm=True).state_dict()
    torch.save(
        {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, tmp_path / "a.pt"
    )
    load_weights(Small(batch_norm=True), tmp_path / "a.pt")


def cut(path):
    torch.save(Small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-600])


UNREADABLE = {
    "cut.pth": (cut, RuntimeError, r"got \d+ bytes that cannot be read, damaged or cut short"),
    "noise.pth": (lambda path: path.write_bytes(bytes(range(256)) * 40), RuntimeError, "got 10240 bytes that cannot"),
    "noise.safetensors": (lambda path: path.write_bytes(bytes(range(256))), RuntimeError, "got 256 bytes that cannot"),
    "empty.pth": (lambda path: path.touch(), RuntimeError, "got 0 bytes that cannot be read"),
    "empty.safetensors": (lambda path: path.touch(), RuntimeError, "got 0 bytes that cannot be read"),
    "page.pth": (lambda path: path.write_text("\n<!DOCTYPE html><title>Log in"), RuntimeError, "got a web page"),
    "whole.pth": (lambda path: torch.save(Small(), path), RuntimeError, "got pickled Python objects"),
    "list.pth": (lambda path: torch.save([1, 2], path), RuntimeError, r"expected a state_dict .* got list"),
    "other.pth": (lambda path: torch.save({"epoch": 3}, path), RuntimeError, r"got dict with keys 'epoch'"),
    "folder.pth": (lambda path: path.mkdir(), FileNotFoundError, "folder.pth is a directory"),
    "nothing.pth": (lambda path: None, FileNotFoundError, "nothing.pth does not exist"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files(name, tmp_path):
    make, error, message = UNREADABLE[name]
    make(tmp_path / name)
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message) as raised:
        load_weights(model, tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert same(model.state_dict(), before)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"features.0.weight": Payload(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match="got pickled Python objects, which can run any code"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


# --- checkpoints that do not fit -------------------------------------------------------------------------------------


def without_classifier(state):
    return {key: value for key, value in state.items() if not key.startswith("classifier")}


MISFITS = [
    (lambda: Small(5), lambda: Small(9).state_dict(), r"classifier.6.weight: expected \[5, 6\], got \[9, 6\]"),
    (lambda: Small(5), lambda: Small(9).state_dict(), "trained for 9 classes: build with num_classes=9; if you need"),
    (lambda: Small(), lambda: Small(in_channels=1).state_dict(), "images of other channels: build with in_channels=1"),
    (lambda: Small(), lambda: Small(batch_norm=True).state_dict(), r"unexpected keys \(5\): features.1.weight; .*…"),
    (lambda: Small(), lambda: Small(batch_norm=True).state_dict(), "saved with BatchNorm: build the model so, too"),
    (lambda: Small(batch_norm=True), lambda: Small().state_dict(), "saved without BatchNorm: build the model so, too"),
    (lambda: Small(), lambda: without_classifier(Small().state_dict()), r"missing keys \(4\): classifier.0.weight; "),
    (lambda: Small(), lambda: without_classifier(Small().state_dict()), r"holds no classifier.*strict=False"),
    (lambda: Small(), lambda: nn.Linear(2, 2).state_dict(), r"unexpected keys \(2\): weight; bias"),
    (lambda: Small(batch_norm=True), lambda: nn.Linear(2, 2).state_dict(), "saved from another architecture"),
]


@pytest.mark.parametrize(("build", "state", "message"), MISFITS)
def test_a_misfit_says_what_differs_and_what_to_do(build, state, message, tmp_path):
    model = build()
    before = copy.deepcopy(model.state_dict())
    torch.save(state(), tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match=message) as error:
        load_weights(model, tmp_path / "a.pt")
    assert str(error.value).startswith(f"{tmp_path / 'a.pt'} does not fit Small:")
    assert same(model.state_dict(), before)


def test_none_is_no_checkpoint():
    with pytest.raises(TypeError, match="expected a weights enum, a path or a URL, got None"):
        load_weights(Small(), None)


def test_features_only_weights(cache):
    """The published file fills the classifier with NaN, which is loaded; a file stripped of it leaves it as it was."""
    spec = VGG16_Weights.IMAGENET1K_FEATURES
    saved, model = Small().state_dict(), Small()
    before = copy.deepcopy(model.state_dict())
    cache.mkdir(parents=True)
    path = cache / "vgg16_features-amdegroot-88682ab5.pth"
    torch.save(without_classifier(saved), path)
    with pytest.warns(UserWarning, match="holds no classifier"):
        load_weights(model, spec)
    for key, value in model.state_dict().items():
        assert torch.equal(value, (saved if key.startswith("features") else before)[key])
    torch.save({k: v if k.startswith("features") else torch.full_like(v, torch.nan) for k, v in saved.items()}, path)
    load_weights(model, spec)
    assert all(value.isnan().all() == key.startswith("classifier") for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=re.escape("build with num_classes=5")):
        load_weights(Small(7), spec)


def test_the_same_weights_are_the_same_file(tmp_path):
    model = nn.Linear(3, 2)
    model.register_buffer("größe", torch.ones(1))
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        vggfast.save_weights(model, file, classes=["röd", 'a"b', "\x7f"], size=64, normalisation=Normalisation())
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["röd", 'a"b', "\x7f"]
        assert torch.equal(file.get_tensor("weight"), model.weight)
