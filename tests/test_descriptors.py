"""`vggfast.descriptors` beside the model itself, and beside loops over every window in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from network_reference import error
from reference import WINOGRAD_BOUND, normal
from small_vgg import SmallLinear
from torch import Tensor, nn

import vggfast


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> vggfast.VGG11:
    monkeypatch.setattr(nn, "Linear", SmallLinear)
    torch.manual_seed(0)
    model = vggfast.VGG11(num_classes=5)
    model.features = vggfast.make_layers([8, "M", 8, "M", 16, "M", 16, "M", 512, "M"])
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight), nn.init.normal_(module.bias)
    return model  # in training mode, with dropout


def relu7(model: vggfast.VGG11, x: Tensor) -> Tensor:
    return nn.Sequential(*model.classifier[:5])(x.flatten(1))


def slow(model: vggfast.VGG11, image: Tensor, scales: list[tuple[int, int]], flip: bool) -> list[Tensor]:
    """Each scale's vector [1, D], window by window, in float64."""
    model, vectors = copy.deepcopy(model).double().eval(), []
    for height, width in scales:
        resized = F.interpolate(image.double(), (height, width), mode="bilinear", antialias=True)
        seen = []
        for view in [resized, resized.flip(3)] if flip else [resized]:
            x = nn.Sequential(*model.features)(view)
            seen += [
                relu7(model, x[:, :, i : i + 7, j : j + 7])
                for i in range(x.shape[2] - 6)
                for j in range(x.shape[3] - 6)
            ]
        vectors.append(torch.stack(seen).mean(0))
    return vectors


def test_one_position_is_the_models_own_answer(model: vggfast.VGG11) -> None:
    x = normal(2, 3, 224, 224)
    expected = F.normalize(vggfast.features(model.eval(), "relu7")(x)["relu7"], dim=1)
    model.train()
    torch.testing.assert_close(vggfast.descriptors(model, x, flip=False), expected)
    small = normal(1, 3, 64, 64)  # pooled up to 7x7, as the model does
    expected = F.normalize(vggfast.features(model.eval(), "relu6")(small)["relu6"], dim=1)
    torch.testing.assert_close(vggfast.descriptors(model, small, flip=False, layer="relu6"), expected)


@pytest.mark.parametrize("stack", [False, True])
def test_space_flips_and_scales_are_pooled(model: vggfast.VGG11, stack: bool) -> None:
    images = [normal(3, 240, 256), normal(3, 300, 224, seed=1)]
    sizes = [[(240, 256), (288, 307)], [(321, 240), (386, 288)]]
    rows = []
    for image, scaled in zip(images, sizes, strict=True):
        vectors = slow(model, image[None], scaled, flip=True)
        joined = torch.cat(vectors, 1) if stack else torch.stack(vectors).mean(0)
        rows.append(joined / joined.norm())
    training = model.training
    found = vggfast.descriptors(model, images, scales=(240, 288), stack=stack)
    assert error(found, torch.cat(rows)) <= 10 * WINOGRAD_BOUND
    assert not found.requires_grad
    assert model.training == training
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_images_are_made_smaller_without_aliasing(model: vggfast.VGG11) -> None:
    x = normal(1, 3, 130, 260)
    resized = F.interpolate(x, (65, 130), mode="bilinear", antialias=True)
    found = vggfast.descriptors(model, x, scales=(65,), flip=False)
    torch.testing.assert_close(found, vggfast.descriptors(model, resized, flip=False))


def test_errors(model: vggfast.VGG11) -> None:
    x = normal(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"layer: expected a layer of the classifier.*got 'relu1_1'"):
        vggfast.descriptors(model, x, layer="relu1_1")
    with pytest.raises(TypeError, match="expected a VGG with features, avgpool and classifier"):
        vggfast.descriptors(model.features, x)
    with pytest.raises(ValueError, match=r"scales: expected lengths in pixels, got \[0\]"):
        vggfast.descriptors(model, x, scales=[0])
    for wrong in ([], x[0]):
        with pytest.raises(ValueError, match="images: expected"):
            vggfast.descriptors(model, wrong)
