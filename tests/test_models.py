"""The models are torchvision's: structure, keys, same-seed parameters, signatures, errors; and the paper's C and A-LRN.

What is compared with torchvision skips where it is not installed; `plain_features` and the tables here stand in for it
everywhere. `small_head` narrows the hidden fully connected layers, where their 120 M parameters do not matter.
"""

import copy
import inspect
import pickle

import pytest
import torch
from small_vgg import BUILDERS, SmallLinear, assert_same_parameters, needs_torchvision, on_meta, torchvision_models
from torch import nn

from vggfast import models
from vggfast.fused import FusedSequential

# builder: (class, convolutions per block, parameters, GMAC at 224x224)
NETWORKS = {
    "vgg11": (models.VGG11, (1, 1, 2, 2, 2), 132_863_336, 7.609),
    "vgg11_bn": (models.VGG11, (1, 1, 2, 2, 2), 132_868_840, 7.609),
    "vgg13": (models.VGG13, (2, 2, 2, 2, 2), 133_047_848, 11.308),
    "vgg13_bn": (models.VGG13, (2, 2, 2, 2, 2), 133_053_736, 11.308),
    "vgg16": (models.VGG16, (2, 2, 3, 3, 3), 138_357_544, 15.470),
    "vgg16_bn": (models.VGG16, (2, 2, 3, 3, 3), 138_365_992, 15.470),
    "vgg19": (models.VGG19, (2, 2, 4, 4, 4), 143_667_240, 19.632),
    "vgg19_bn": (models.VGG19, (2, 2, 4, 4, 4), 143_678_248, 19.632),
    "vgg16c": (models.VGG16C, (2, 2, 3, 3, 3), 133_638_952, 11.771),
    "vgg11_lrn": (models.VGG11LRN, (1, 1, 2, 2, 2), 132_863_336, 7.609),
}

CONV_INDICES = {
    "vgg11": [0, 3, 6, 8, 11, 13, 16, 18],
    "vgg13": [0, 2, 5, 7, 10, 12, 15, 17, 20, 22],
    "vgg16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
    "vgg19": [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34],
}


@pytest.fixture
def small_head(monkeypatch):
    monkeypatch.setattr(nn, "Linear", SmallLinear)


def plain_features(blocks, batch_norm):
    """`features` of torchvision's VGG, written down independently of `models.cfgs`."""
    layers, channels = [], 3
    for block, convolutions in enumerate(blocks):
        width = min(64 << block, 512)
        for _ in range(convolutions):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def plain_twin(model):
    """`model` with the same modules, `features` in a plain nn.Sequential."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.features = nn.Sequential(*model.features)
    return twin


# --- against torchvision ---------------------------------------------------------------------------------------------


@needs_torchvision
@pytest.mark.parametrize("name", BUILDERS)
def test_same_seed_gives_torchvisions_parameters(name):
    torch.manual_seed(3)
    ours = getattr(models, name)(num_classes=10)
    draws_after = torch.rand(4)
    torch.manual_seed(3)
    theirs = getattr(torchvision_models, name)(num_classes=10)
    assert torch.equal(draws_after, torch.rand(4))
    assert_same_parameters(ours, theirs)


@needs_torchvision
@pytest.mark.parametrize("name", BUILDERS)
def test_same_seed_without_init_weights_gives_torchvisions_parameters(name, small_head):
    torch.manual_seed(4)
    ours = getattr(models, name)(num_classes=10, init_weights=False)
    torch.manual_seed(4)
    theirs = getattr(torchvision_models, name)(num_classes=10, init_weights=False)
    assert_same_parameters(ours, theirs)


@needs_torchvision
@pytest.mark.parametrize("name", BUILDERS)
def test_structure_is_torchvisions(name):
    ours = on_meta(getattr(models, name), num_classes=7, dropout=0.25)
    theirs = on_meta(getattr(torchvision_models, name), num_classes=7, dropout=0.25)
    assert isinstance(ours.features, FusedSequential)
    containers = {"", "features", "classifier"}  # their types are ours, and a repr of theirs would hold them
    assert [key for key, _ in ours.named_modules()] == [key for key, _ in theirs.named_modules()]
    for (key, our_module), (_, their_module) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        if key not in containers:
            assert type(our_module) is type(their_module), key
            assert repr(our_module) == repr(their_module), key
    for name in ("features", "classifier"):
        assert isinstance(getattr(ours, name), type(getattr(theirs, name)))
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"


@needs_torchvision
def test_signatures_and_tables_are_torchvisions():
    theirs = torchvision_models.vgg
    for ours, reference in ((models.VGG.__init__, theirs.VGG.__init__), (models.vgg16, theirs.vgg16)):
        ours, reference = inspect.signature(ours).parameters, inspect.signature(reference).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in reference.values()
        ]
    ours, reference = (inspect.signature(module.make_layers).parameters for module in (models, theirs))
    assert list(ours)[: len(reference)] == list(reference)
    assert {key: models.cfgs[key] for key in theirs.cfgs} == theirs.cfgs


@needs_torchvision
def test_torchvisions_parts_and_ours_mix(small_head):
    theirs = torchvision_models.VGG(models.make_layers(models.cfgs["A"]), num_classes=3)
    ours = models.VGG(torchvision_models.vgg.make_layers(models.cfgs["A"]), num_classes=3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 40, 36)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


# --- without torchvision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_same_seed_gives_the_reconstructions_parameters(name, init_weights, small_head):
    torch.manual_seed(5)
    ours = getattr(models, name)(num_classes=10, init_weights=init_weights)
    torch.manual_seed(5)
    features = plain_features(NETWORKS[name][1], name.endswith("_bn"))
    classifier = nn.Sequential(
        *(nn.Linear(25088, 4096), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
        nn.Linear(4096, 10),
    )
    for module in [*features, *classifier] if init_weights else []:
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * 9
            module.weight.data.normal_(0, (2.0 / fan_out) ** 0.5)
            module.bias.data.zero_()
        elif isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.01)
            module.bias.data.zero_()
    assert_same_parameters(ours, nn.ModuleDict({"features": features, "classifier": classifier}))


@pytest.mark.parametrize("name", BUILDERS)
def test_convolutions_have_torchvisions_keys(name):
    model = on_meta(getattr(models, name))
    indices = CONV_INDICES[name.removesuffix("_bn")]
    if name.endswith("_bn"):  # each BatchNorm moves the layers after it by one
        indices = [index + before for before, index in enumerate(indices)]
    keys = [key for key, value in model.state_dict().items() if key.startswith("features") and value.ndim == 4]
    assert keys == [f"features.{index}.weight" for index in indices]
    assert {key for key in model.state_dict() if key.startswith("classifier")} == {
        f"classifier.{index}.{kind}" for index in (0, 3, 6) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_multiplications_are_the_published_ones(name):
    class_, _, num_params, gmac = NETWORKS[name]
    model = on_meta(getattr(models, name))
    assert type(model) is class_
    assert sum(p.numel() for p in model.parameters()) == num_params
    side, macs = 224, 0
    for layer in model.features:
        side = side // 2 if isinstance(layer, nn.MaxPool2d) else side
        macs += layer.weight.numel() * side * side if isinstance(layer, nn.Conv2d) else 0
    macs += sum(layer.weight.numel() for layer in model.classifier if isinstance(layer, nn.Linear))
    assert round(macs / 1e9, 3) == gmac


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("class_", [models.VGG11, models.VGG13, models.VGG16, models.VGG19])
def test_a_class_is_its_builder(class_, batch_norm, small_head):
    builder = getattr(models, class_.__name__.lower() + ("_bn" if batch_norm else ""))
    torch.manual_seed(6)
    model = class_(5, batch_norm, 0.1)
    torch.manual_seed(6)
    assert_same_parameters(model, builder(num_classes=5, dropout=0.1))
    assert [layer.p for layer in model.classifier if isinstance(layer, nn.Dropout)] == [0.1, 0.1]
    assert isinstance(model, models.VGG)


def test_constructor_signature_of_the_classes():
    parameters = inspect.signature(models.VGG16).parameters
    shared = "num_classes=1000 batch_norm=False dropout=0.5 in_channels=3 weights=None init_weights=True progress=True"
    assert [f"{p.name}={p.default}" for p in parameters.values()] == shared.split()


def test_configuration_c_ends_three_blocks_with_1x1():
    model = on_meta(models.vgg16c)
    pointwise = {
        i: tuple(m.weight.shape) for i, m in enumerate(model.features) if getattr(m, "kernel_size", 0) == (1, 1)
    }
    assert pointwise == {14: (256, 256, 1, 1), 21: (512, 512, 1, 1), 28: (512, 512, 1, 1)}
    assert all(model.features[index].padding == (0, 0) for index in pointwise)
    assert model.features(torch.empty(2, 3, 65, 32, device="meta")).shape == (2, 512, 2, 1)


def test_lrn_is_krizhevskys():
    model = on_meta(models.vgg11_lrn)
    assert [type(layer) for layer in model.features[:4]] == [nn.Conv2d, nn.ReLU, nn.LocalResponseNorm, nn.MaxPool2d]
    a = torch.rand(1, 7, 2, 2, dtype=torch.float64) * 300
    expected = torch.empty_like(a)
    for channel in range(7):  # b = a / (k + alpha * sum of squares over n neighbours)^beta, section 3.3
        squares = a[:, max(0, channel - 2) : channel + 3].square().sum(1)
        expected[:, channel] = a[:, channel] / (2 + 1e-4 * squares) ** 0.75
    torch.testing.assert_close(model.features[2](a), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_is_that_of_the_plain_modules(name, small_head):
    torch.manual_seed(7)
    model = getattr(models, name)(num_classes=4).eval()
    x = torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        expected = plain_twin(model).double()(x.double())
        error = (model.float()(x).double() - expected).norm() / expected.norm()
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in model.features)
    assert error < 5e-6 * convolutions  # what Winograd F(4x4, 3x3) is allowed in each, relative L2 in fp32


def test_other_images_and_sizes(small_head):
    model = models.VGG11(num_classes=3, in_channels=1, init_weights=False)
    assert model.features[0].weight.shape == (64, 1, 3, 3)
    assert model(torch.rand(2, 1, 33, 50)).shape == (2, 3)
    assert on_meta(models.vgg11, in_channels=5)(torch.empty(1, 5, 64, 64, device="meta")).shape == (1, 1000)


class Siamese(models.VGG):
    """As users write it: their own constructor arguments, methods and forward."""

    def __init__(self, margin: float) -> None:
        super().__init__(models.make_layers([8, "M", 512, "M"], batch_norm=True), num_classes=6, dropout=0.0)
        self.margin = margin

    def _init_weights(self, unused: nn.Module) -> None:
        raise AssertionError("a subclass may have this name for itself")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (super().forward(x) - super().forward(y)).square().sum(1) - self.margin


def test_subclassing(small_head):
    model = Siamese(margin=0.5)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x, x), torch.full((2,), -0.5))
    assert_same_parameters(pickle.loads(pickle.dumps(model)), model)
    narrow = models.VGG(models.make_layers([16, "M", 512]), 10, False, 0.3)
    assert narrow(x).shape == (2, 10)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("class_", [models.VGG11, models.VGG11LRN, models.VGG16C])
def test_pickle_and_deepcopy(class_, copier, small_head):
    model = class_(num_classes=3, init_weights=False).eval()
    twin = copier(model)
    assert type(twin) is class_
    assert type(twin.features) is FusedSequential
    assert_same_parameters(twin, model)
    x = torch.rand(1, 3, 32, 32)
    before = model(x)
    twin.features[0].weight.data.zero_()
    assert torch.equal(model(x), before)


# --- bad input ----------------------------------------------------------------------------------------------------------

BAD_INPUTS = {
    "four channels": lambda: torch.rand(1, 4, 32, 32),
    "no batch": lambda: torch.rand(3, 32, 32),
    "a matrix": lambda: torch.rand(32, 32),
    "five dimensions": lambda: torch.rand(1, 3, 32, 32, 1),
    "too small": lambda: torch.rand(1, 3, 16, 32),
    "bytes": lambda: torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    "float64": lambda: torch.rand(1, 3, 32, 32, dtype=torch.float64),
    "a list": lambda: [[1.0, 2.0]],
    "None": lambda: None,
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_raises_what_the_plain_modules_raise(kind, small_head):
    model = models.VGG11(num_classes=2, init_weights=False)
    errors = []
    for network in (model, plain_twin(model)):
        with pytest.raises(Exception) as error:  # noqa: PT011 - which one it is, is what is compared
            network(BAD_INPUTS[kind]())
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
