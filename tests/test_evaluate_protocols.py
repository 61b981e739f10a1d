"""The paper's protocols of evaluation against a slow reference in float64."""

import numpy
import pytest
import torch
from evaluation_reference import answer
from small_vgg import NARROW_D, narrow_vgg
from torch import nn

from vggfast.loading import LoadedModel
from vggfast.preprocessing import CAFFE, IMAGENET_MEAN, IMAGENET_STD, Normalisation
from vggfast.recipes import RecipeError
from vggfast.recipes.views import Classifier, Views

Image = pytest.importorskip("PIL.Image")


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PROTOCOLS = {
    "single crop": Views(64),
    "flip": Views(64, (70,), flip=True),
    "dense": Views(64, (96,), dense=True, crops="none"),
    "dense, multi-scale": Views(64, (64, 80, 128), dense=True, crops="none", flip=True),
    "dense below the size": Views(96, (64,), dense=True, crops="none"),
    "multi-crop": Views(64, (75, 90), crops="grid", flip=True),
    "dense and multi-crop": Views(64, (81,), dense=True, crops="grid", flip=True),
    "dense and central crop": Views(64, (100,), dense=True, crops="center"),
}


def reference(models, image, views, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return answer(models, image, mean, std, views.size, views.scales, views.dense, views.crops, views.flip)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "dense below the size"])
def test_protocols_are_the_references(name):
    views = PROTOCOLS[name]
    models = [narrow_vgg(seed=1).double(), narrow_vgg(NARROW_D, seed=2).double()]  # an ensemble
    models = models if views.crops != "grid" else models[:1]
    images = [pixels(3, 80, 110), pixels(3, 130, 75, seed=1)]
    for batch_size in (1, 7) if "multi-scale" in name else (16,):
        got = Classifier(models, views, batch_size=batch_size)(images)
        assert got.dtype == torch.float64
        for row, image in zip(got, images, strict=True):
            expected = reference(models, image, views)
            torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-12)
    assert (got[0] - got[1]).abs().max() > 1e-3  # the protocol can tell images apart
    assert views.count * 2 == sum(1 for image in images for _ in views.of(image))


@torch.no_grad()
def test_dense_below_the_size_is_the_plain_model():
    model, image = narrow_vgg().double(), pixels(3, 64, 64)
    x = Normalisation()(image)[None]
    got = Classifier([model], PROTOCOLS["dense below the size"])([image])
    # 64 pixels have features of 2x2, pooled to the 3x3 of a crop of 96, and those to 7x7
    maps = nn.functional.adaptive_avg_pool2d(nn.functional.adaptive_avg_pool2d(model.features(x), 3), 7)
    torch.testing.assert_close(got, model.classifier(maps.flatten(1)).softmax(1))


def test_the_papers_150_crops():
    views = Views(224, (256, 384, 512), crops="grid", flip=True)
    assert views.count == 150
    shapes = {view.pixels.shape for view in views.of(torch.rand(3, 300, 400))}
    assert shapes == {(3, 224, 224)}


def test_float32_and_files_agree_with_float64(tmp_path):
    path = tmp_path / "a.png"
    image = Image.fromarray((pixels(90, 120, 3) * 255).to(torch.uint8).numpy())
    image.save(path)
    model, views = narrow_vgg(), PROTOCOLS["dense and central crop"]
    got = Classifier([model], views)([Image.open(path)])[0]
    exact = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).double() / 255
    expected = reference([narrow_vgg().double()], exact, views)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)  # Pillow rounds resized pixels to 8 bits


def test_caffes_preprocessing():
    image = pixels(3, 40, 50)
    expected = (255 * image).flip(0) - torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(CAFFE(image), expected)
    model = narrow_vgg().double()
    loaded = LoadedModel(model, None, CAFFE, True, 64, 3, "keras", "here")
    got = Classifier([loaded], Views(32, (40,), crops="center"))([image])[0]
    crop = expected[:, 4:36, 9:41]
    torch.testing.assert_close(got, model(crop[None]).softmax(1)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 31}, "size: expected at least 32 pixels"),
        ({"scales": (223,)}, "scales: expected none below 224 pixels, the size of a crop"),
        ({"scales": (31,), "dense": True, "crops": "none"}, "scales: expected none below 32 pixels"),
        ({"scales": ()}, "scales: expected at least one length"),
        ({"crops": "none"}, "expected center or grid, or dense evaluation, got neither"),
        ({"crops": "corners"}, "crops: expected none, center or grid, got 'corners'"),
    ],
)
def test_views_that_cannot_be(settings, message):
    with pytest.raises(RecipeError, match=message):
        Views(**settings)


def test_models_that_do_not_fit():
    image = torch.rand(3, 40, 40)
    with pytest.raises(RecipeError, match="expected the same number of classes in each of an ensemble, got 7, 5"):
        Classifier([narrow_vgg(), narrow_vgg(num_classes=5)], Views(32))([image])
    with pytest.raises(RecipeError, match=r"image: expected \[1, H, W\], as the network takes, got \[3, 40, 40\]"):
        Classifier([narrow_vgg(in_channels=1)], Views(32))([image])
    with pytest.raises(RecipeError, match="dense evaluation: model: expected a VGG"):
        Classifier([nn.Conv2d(3, 3, 3)], Views(32, dense=True))
    broken = narrow_vgg()
    broken.classifier[6].bias.data.fill_(float("nan"))
    with pytest.raises(RecipeError, match="scores are not finite"):
        Classifier([broken], Views(32))([image])


def test_the_central_crop_is_torchvisions():
    functional = pytest.importorskip("torchvision.transforms.functional")
    for width in (35, 36, 37, 39):  # of which the middle may lie between two pixels
        image = pixels(3, 35, width)
        (view,) = Views(32, (35,)).of(image)
        assert torch.equal(view.pixels, functional.center_crop(image, 32))
