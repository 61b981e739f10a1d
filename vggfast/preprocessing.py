"""What is done to an image before a VGG sees it: the published weights' preprocessing, and its parts, in plain torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of values in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normalisation:
    """(x - mean) / std of each channel, of images [..., C, H, W] in RGB with values in [0, 1]; then BGR if `bgr`.

    `mean` and `std` are in the order of the image's channels, before `bgr` reverses it. For an image of one channel
    where they have three, their averages are taken.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    bgr: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        channels = x.shape[-3]
        mean, std = (self._for(channels, values, x) for values in (self.mean, self.std))
        x = (x - mean) / std
        return x.flip(-3) if self.bgr else x

    @staticmethod
    def _for(channels: int, values: tuple[float, ...], x: Tensor) -> Tensor:
        if channels == 1 != len(values):
            values = (sum(values) / len(values),)
        if len(values) not in (1, channels):
            raise ValueError(f"image: expected {len(values)} channels, as mean and std have, got {channels}")
        return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)

    def to_dict(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Normalisation":
        """What `to_dict` wrote; what it does not know is left out."""
        mean, std = (tuple(map(float, settings[name])) for name in ("mean", "std"))
        return cls(mean, std, bool(settings.get("bgr", False)))


# Oxford's own Caffe models, and Keras's, which were converted from them: values in [0, 255], BGR, means subtracted.
CAFFE = Normalisation((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3, bgr=True)


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) with the shorter edge at `shorter` pixels and the aspect kept, rounded down as torchvision does."""
    if width <= height:
        return int(shorter * height / width), shorter
    return shorter, int(shorter * width / height)


def rescale(img: Any, shorter: int, antialias: bool = True) -> Tensor:
    """`img` with its shorter edge at `shorter` pixels, resized bilinearly as torchvision does, as a tensor.

    From a PIL image of 8 bits a band, [C, H, W] of uint8; from a tensor [C, H, W] or [N, C, H, W] of integers or floats,
    one of its dtype. Raises TypeError for anything else.
    """
    if isinstance(img, Tensor):
        return _rescale_tensor(img, shorter, antialias)
    if not hasattr(img, "getbands"):
        raise TypeError(f"image: expected a PIL image or a torch.Tensor, got {type(img).__name__}")
    height, width = resized_shape(img.height, img.width, shorter)
    bilinear = 2  # PIL.Image.Resampling.BILINEAR, without importing PIL
    img = img.resize((width, height), bilinear)
    pixels = torch.frombuffer(bytearray(img.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, len(img.getbands())).permute(2, 0, 1)


def _rescale_tensor(img: Tensor, shorter: int, antialias: bool) -> Tensor:
    if img.ndim not in (3, 4) or img.dtype == torch.bool:
        raise TypeError(
            "image: expected a tensor [C, H, W] or [N, C, H, W] of integers or of floats in [0, 1], "
            f"got {list(img.shape)} of {img.dtype}"
        )
    size = resized_shape(img.shape[-2], img.shape[-1], shorter)
    x = img if img.ndim == 4 else img.unsqueeze(0)
    x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=antialias)
    # Integers go back to their own grid before scaling, as PIL's and torchvision's resize leave them.
    x = (x if img.is_floating_point() else x.round()).to(img.dtype)
    return x if img.ndim == 4 else x.squeeze(0)


def unit_range(x: Tensor) -> Tensor:
    """Integers of full range as float32 in [0, 1]; floats as they are."""
    return x if x.is_floating_point() else x.to(torch.float32) / torch.iinfo(x.dtype).max


class ImageClassification(nn.Module):
    """torchvision's evaluation preprocessing in plain torch: resize, centre crop, scale to [0, 1], normalise.

    Takes a PIL image of three bands, or a tensor [C, H, W] or [N, C, H, W] of an integer dtype (full range) or a
    floating dtype (in [0, 1]); returns float32 [C, crop_size, crop_size] or [N, C, crop_size, crop_size].
    The shorter edge becomes `resize_size` pixels; where the crop is larger than the image, zeros fill it.
    Raises TypeError or ValueError for anything else. Mirrors `torchvision.transforms._presets.ImageClassification`, bit for bit, with bilinear interpolation.
    """

    def __init__(
        self,
        *,
        crop_size: int,
        resize_size: int = 256,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.resize_size = resize_size
        self.mean = list(mean)
        self.std = list(std)
        self.antialias = antialias

    def forward(self, img: Any) -> Tensor:
        if not isinstance(img, Tensor) and hasattr(img, "getbands") and len(img.getbands()) != 3:
            raise ValueError(f"image: expected three bands, got mode {img.mode!r}; call img.convert('RGB') first")
        x = rescale(img, self.resize_size, self.antialias)
        height, width = x.shape[-2:]
        top, left, size = self._offset(height), self._offset(width), self.crop_size
        x = F.pad(x, [-left, left + size - width, -top, top + size - height])  # a negative pad is a crop
        x = unit_range(x).to(torch.float32)
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        return (x - mean) / std

    def _offset(self, length: int) -> int:
        """Where the crop begins on an edge of `length` pixels; negative where the edge is padded instead."""
        excess = length - self.crop_size
        return round(excess / 2) if excess >= 0 else -(-excess // 2)

    def extra_repr(self) -> str:
        return f"crop_size={self.crop_size}, resize_size={self.resize_size}, mean={self.mean}, std={self.std}"
