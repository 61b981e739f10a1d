"""`to_dense`: the fully convolutional VGG gives the plain one's answers, wherever that has one."""

import copy

import pytest
import torch
from evaluation_reference import features, scores_of_features
from small_vgg import NARROW, narrow_vgg, needs_torchvision, torchvision_models
from torch import nn

import vggfast
from vggfast import convert, to_dense


def test_vgg16_on_224_pixels_is_the_plain_model():
    torch.manual_seed(0)
    model = vggfast.vgg16(num_classes=10).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        scores, expected = to_dense(model)(x), model(x)
    assert scores.shape == (1, 10, 1, 1)
    assert expected.std() > 1e-3
    # Three layers, whose sums of up to 25,088 products the two add up in different orders.
    torch.testing.assert_close(scores.flatten(1), expected, rtol=1e-5, atol=5e-6 * expected.abs().max().item())
    with torch.no_grad():
        exact = model.double()(x.double())
    errors = [(y.flatten(1) - exact).norm() / exact.norm() for y in (scores, expected)]
    assert errors[0] <= 2 * errors[1]
    assert errors[1] < 3e-6


@pytest.mark.parametrize(("size", "shape"), [(224, (1, 2)), (160, (3, 4)), (32, (7, 8)), (256, (1, 1))])
def test_every_position_is_the_plain_model_on_its_features(size, shape):
    model = narrow_vgg().double()
    x = torch.rand(3, 224 + (size == 256) * 32 + 5, 256 + 31, dtype=torch.float64)
    with torch.no_grad():
        scores = to_dense(model, size)(x[None])[0]
        maps, grid = features(model, x), size // 32
        assert scores.shape == (7, *shape)
        for i in range(shape[0]):
            for j in range(shape[1]):
                expected = scores_of_features(model, maps[:, i : i + grid, j : j + grid])
                torch.testing.assert_close(scores[:, i, j], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (100, 223), (224, 240)])
def test_up_to_the_size_the_answer_is_the_models_own(shape):
    model = narrow_vgg(batch_norm=True)
    x = torch.rand(2, 3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(to_dense(model)(x).flatten(1), model(x))
        if shape == (64, 96):
            wide = to_dense(model)(x.repeat(1, 1, 1, 3))  # 64x288: pooled up to 7 rows, 9 columns as they are
            assert wide.shape == (2, 7, 1, 3)


def test_less_than_32_pixels_is_torchs_error():
    with pytest.raises(RuntimeError, match="Output size is too small"):
        to_dense(narrow_vgg())(torch.rand(1, 3, 31, 40))


def test_parameters_share_memory_and_the_model_stays_as_it_is():
    model = narrow_vgg().train()
    before = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    dense = to_dense(model)
    assert dense.training
    assert dense.classifier[2].training
    assert all(p.requires_grad for p in dense.parameters())
    assert list(model.modules()) == modules
    assert dense.features is model.features
    assert dense.classifier[0].weight.shape == (16, 8, 7, 7)
    for index in (0, 3, 6):
        assert dense.classifier[index].weight.data_ptr() == model.classifier[index].weight.data_ptr()
        assert dense.classifier[index].bias.data_ptr() == model.classifier[index].bias.data_ptr()
    assert list(dense.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    x = torch.rand(1, 3, 256, 256)
    dense(x).sum().backward()
    assert dense.classifier[0].weight.grad.abs().sum() > 0
    smaller = to_dense(model, 64)
    assert smaller.classifier[0].weight.data_ptr() != model.classifier[0].weight.data_ptr()
    assert smaller.classifier[3].weight.data_ptr() == model.classifier[3].weight.data_ptr()
    assert not any(p.requires_grad for p in to_dense(model.requires_grad_(False)).parameters())
    assert not any(module.training for module in to_dense(model.eval()).modules())


@needs_torchvision
@pytest.mark.parametrize("converted", [False, True])
def test_torchvisions_models(converted):
    with torch.device("meta"):
        theirs = torchvision_models.VGG(nn.Identity(), 7, init_weights=False)
    ours = narrow_vgg()
    theirs.features = nn.Sequential(*ours.features)
    theirs.avgpool, theirs.classifier = ours.avgpool, ours.classifier
    theirs = convert(theirs.eval()) if converted else theirs.eval()
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(to_dense(theirs)(x).flatten(1), theirs(x))
        torch.testing.assert_close(to_dense(theirs, 64)(x), to_dense(ours, 64)(x))


class Odd(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        model = narrow_vgg()
        for name in ("features", "avgpool", "classifier"):
            setattr(self, name, parts.get(name, getattr(model, name)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "expected a VGG with features, avgpool and classifier, as torchvision's, got Linear"),
        (Odd(classifier=nn.Linear(392, 7)), "model.classifier: expected an nn.Sequential, got Linear"),
        (Odd(classifier=nn.Sequential(nn.ReLU())), "expected an nn.Linear in it, got none"),
        (
            Odd(classifier=nn.Sequential(nn.Linear(392, 7), nn.Softmax(1))),
            "classifier.1: expected nn.Linear or an el.* got Softmax",
        ),
        (
            Odd(classifier=nn.Sequential(nn.Linear(100, 7))),
            r"classifier.0: expected 8 x 7 x 7 inputs, as avgpool gives, got 100",
        ),
        (
            Odd(avgpool=nn.AdaptiveMaxPool2d(7)),
            "model.avgpool: expected nn.AdaptiveAvgPool2d or nn.Identity, got Adapt",
        ),
        (Odd(features=nn.ReLU()), "model.features: expected convolutions in it, got none"),
    ],
)
def test_what_is_no_vgg(model, message):
    with pytest.raises(TypeError, match=message):
        to_dense(model)


def test_a_size_of_which_nothing_is_left():
    with pytest.raises(ValueError, match="size: expected an image that the features leave something of, got 20"):
        to_dense(narrow_vgg(NARROW), 20)


def test_a_layer_that_the_classifier_has_twice():
    torch.manual_seed(0)
    model = vggfast.vgg11(num_classes=10, init_weights=False)
    relu, middle = nn.ReLU(), nn.Linear(64, 64)
    model.avgpool = nn.AdaptiveAvgPool2d([7, 7])  # torch takes a list, too
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 64), relu, middle, relu, middle, relu, nn.Linear(64, 10))
    model.eval()
    dense, x = to_dense(model), torch.randn(1, 3, 224, 224)
    assert len(dense.classifier) == 7
    with torch.no_grad():
        torch.testing.assert_close(dense(x).flatten(1), model(x), rtol=1e-4, atol=1e-5)
