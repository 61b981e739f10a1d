"""The preprocessing of the published weights: torchvision's to the bit, and right where torchvision is not there."""

import pytest
import torch
from small_vgg import needs_torchvision, torchvision_models

from vggfast.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ImageClassification


def normalised(x):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def pil_image(height, width, mode="RGB"):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    return image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())).convert(mode)


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(256, 256, 16, 16), (256, 301, 16, 38), (259, 256, 18, 16)]
)
def test_crop_is_centred(height, width, top, left):
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)  # shorter edge 256: not resized
    expected = normalised(image[..., top : top + 224, left : left + 224] / 255)
    assert torch.equal(ImageClassification(crop_size=224)(image), expected)
    assert torch.equal(ImageClassification(crop_size=224)(image[0]), expected[0])


def test_resize_averages_what_it_shrinks():
    image = torch.rand(3, 512, 768, dtype=torch.float64)
    # Antialiased bilinear at half the size is a tent over four pixels, with weights 1, 3, 3, 1.
    tent = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    windows = image[:, 1:, 1:].unfold(1, 4, 2).unfold(2, 4, 2)  # pixel j of the result is window j - 1
    interior = torch.einsum("chwyx,y,x->chw", windows, tent, tent)
    got = ImageClassification(crop_size=224)(image)
    expected = normalised(interior[:, 15 : 15 + 224, 79 : 79 + 224].float())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_integers_are_rounded_after_the_resize():
    image = torch.randint(0, 256, (3, 100, 90), dtype=torch.uint8)
    transform = ImageClassification(crop_size=224, mean=(0.0,) * 3, std=(1.0,) * 3)
    got = transform(image)
    assert torch.isin(got, torch.arange(256) / 255).all()
    assert (got - transform(image / 255)).abs().max() <= 0.501 / 255


def test_pil_image_and_its_tensor_agree():
    image = pil_image(300, 420)
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(300, 420, 3).permute(2, 0, 1)
    transform = ImageClassification(crop_size=224)
    one_level = 1 / 255 / min(IMAGENET_STD)  # PIL resizes in fixed point
    torch.testing.assert_close(transform(image), transform(pixels), rtol=0, atol=1.01 * one_level)


SIZES = [(256, 256), (37, 53), (500, 333), (333, 500), (224, 1000), (1, 3)]
DTYPES = [torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@needs_torchvision
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, *size) for size in SIZES] + [(2, 3, 100, 91)], ids=str)
def test_tensors_come_out_as_from_torchvision(shape, dtype):
    floating = dtype.is_floating_point
    image = torch.rand(shape).to(dtype) if floating else torch.randint(0, torch.iinfo(dtype).max, shape, dtype=dtype)
    for options in ({}, {"crop_size": 300, "antialias": False}, {"crop_size": 33, "resize_size": 40}):
        theirs = torchvision_models.VGG16_Weights.DEFAULT.transforms(**options)
        assert torch.equal(ImageClassification(**{"crop_size": 224, **options})(image), theirs(image))


@needs_torchvision
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "HSV"])
def test_pil_images_come_out_as_from_torchvision(height, width, mode):
    image = pil_image(height, width, mode)
    for options in ({}, {"crop_size": 300}, {"crop_size": 33, "resize_size": 40}):
        theirs = torchvision_models.VGG16_Weights.DEFAULT.transforms(**options)
        assert torch.equal(ImageClassification(**{"crop_size": 224, **options})(image), theirs(image))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (lambda: torch.rand(20, 20), TypeError, r"expected a tensor \[C, H, W\] or .* got \[20, 20\]"),
        (lambda: torch.ones(3, 9, 9, dtype=torch.bool), TypeError, r"got \[3, 9, 9\] of torch.bool"),
        (lambda: "cat.jpg", TypeError, "expected a PIL image or a torch.Tensor, got str"),
        (lambda: pil_image(9, 9, "L"), ValueError, r"three bands, got mode 'L'; call img.convert\('RGB'\) first"),
    ],
)
def test_no_image(image, error, message):
    with pytest.raises(error, match=message):
        ImageClassification(crop_size=224)(image())
