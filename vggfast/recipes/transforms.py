"""How images of folders and shards become tensors, with torchvision's transforms (v2)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vggfast.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vggfast.recipes import RecipeError

Transform = Callable[[Any], Tensor]  # of a PIL image in RGB

# Principal components of ImageNet's RGB values in [0, 1] (columns), and their standard deviations: those that go with
# Krizhevsky et al. 2012, section 4.1, in most implementations since fb.resnet.torch.
COLOUR_DEVIATIONS = (0.2175, 0.0188, 0.0045)
COLOUR_COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
COLOUR_SHIFT = 0.1


class ColourShift(nn.Module):
    """Add to all pixels of an image [3, H, W] in [0, 1] one colour, drawn along the principal components above."""

    def forward(self, image: Tensor) -> Tensor:
        along = COLOUR_SHIFT * torch.randn(3) * torch.tensor(COLOUR_DEVIATIONS)
        return image + (torch.tensor(COLOUR_COMPONENTS) @ along)[:, None, None]


def build(augment: str, size: int, scale: tuple[int, int]) -> tuple[Transform, Transform]:
    """Transforms of the training images and of the held-out ones, from PIL to normalised float32 [3, size, size].

    "paper" (arXiv 1409.1556, section 3.1): the shorter edge becomes a length drawn from `scale`; of that a random crop,
    mirrored half of the time, its colour shifted, and the mean colour subtracted. As published weights have it, the
    result is divided by the colours' standard deviation, too. "modern": a crop of random area and shape, mirrored half
    of the time, and TrivialAugment. Held-out images, and all with "none", are the central crop.
    """
    try:
        import torchvision  # noqa: F401
        from torchvision.transforms import v2
    except ImportError as error:
        raise RecipeError(
            "--data FOLDER or SHARDS reads images with torchvision, which is not installed: pip install torchvision"
        ) from error
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    normalise = [v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]
    centre = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), *to_tensor, *normalise])
    if augment == "none":
        return centre, centre
    if augment == "modern":
        crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()]
        return v2.Compose([*crop, *to_tensor, *normalise]), centre
    least, greatest = scale
    crop = [v2.RandomShortestSize(list(range(least, greatest + 1))), v2.RandomCrop(size), v2.RandomHorizontalFlip()]
    return v2.Compose([*crop, *to_tensor, ColourShift(), *normalise]), centre
