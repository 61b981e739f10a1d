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
        x = self._crop_tensor(img) if isinstance(img, Tensor) else self._crop_pil(img)
        if not x.is_floating_point():
            x = x.to(torch.float32) / torch.iinfo(x.dtype).max
        x = x.to(torch.float32)
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        return (x - mean) / std

    def _crop_tensor(self, img: Tensor) -> Tensor:
        if img.ndim not in (3, 4) or img.dtype == torch.bool:
            raise TypeError(
                "image: expected a tensor [C, H, W] or [N, C, H, W] of integers or of floats in [0, 1], "
                f"got {list(img.shape)} of {img.dtype}"
            )
        height, width = resized_shape(img.shape[-2], img.shape[-1], self.resize_size)
        x = img if img.ndim == 4 else img.unsqueeze(0)
        x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=self.antialias)
        # Integers go back to their own grid before scaling, as PIL's and torchvision's resize leave them.
        x = (x if img.is_floating_point() else x.round()).to(img.dtype)
        top, left = self._offset(height), self._offset(width)
        size = self.crop_size
        x = F.pad(x, [-left, left + size - width, -top, top + size - height])  # a negative pad is a crop
        return x if img.ndim == 4 else x.squeeze(0)

    def _crop_pil(self, img: Any) -> Tensor:
        if not hasattr(img, "getbands"):
            raise TypeError(f"image: expected a PIL image or a torch.Tensor, got {type(img).__name__}")
        if len(img.getbands()) != 3:
            raise ValueError(f"image: expected three bands, got mode {img.mode!r}; call img.convert('RGB') first")
        height, width = resized_shape(img.height, img.width, self.resize_size)
        top, left = self._offset(height), self._offset(width)
        size = self.crop_size
        bilinear = 2  # PIL.Image.Resampling.BILINEAR, without importing PIL
        img = img.resize((width, height), bilinear).crop((left, top, left + size, top + size))
        pixels = torch.frombuffer(bytearray(img.tobytes()), dtype=torch.uint8)
        return pixels.view(size, size, 3).permute(2, 0, 1)

    def _offset(self, length: int) -> int:
        """Where the crop begins on an edge of `length` pixels; negative where the edge is padded instead."""
        excess = length - self.crop_size
        return round(excess / 2) if excess >= 0 else -(-excess // 2)

    def extra_repr(self) -> str:
        return f"crop_size={self.crop_size}, resize_size={self.resize_size}, mean={self.mean}, std={self.std}"
