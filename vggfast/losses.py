"""Losses that compare images by a VGG's features: `Perceptual` (features and Gram matrices) and `LPIPS`."""

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vggfast import distances, models
from vggfast.distances import Rule, wide
from vggfast.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vggfast.taps import features, frozen
from vggfast.weights import WeightsSpec, read_checkpoint

__all__ = ["LPIPS", "Encoded", "Perceptual", "gram"]

UNIT = distances.Unit()
Layers = Mapping[str, float] | Iterable[str]


class Encoded(NamedTuple):
    """What a loss keeps of a target: its feature maps and Gram matrices, by layer."""

    maps: dict[str, Tensor]
    grams: dict[str, Tensor]


def gram(x: Tensor) -> Tensor:
    """Gram matrices [N, C, C] of feature maps [N, C, H, W], over C·H·W; calculated and returned in float32 or float64."""
    n, c, h, w = x.shape
    with torch.autocast(x.device.type, enabled=False):
        rows = wide(x).permute(0, 2, 3, 1).reshape(n, h * w, c)
        return torch.bmm(rows.transpose(1, 2), rows) / (c * h * w)


class FeatureLoss(nn.Module):
    """What `Perceptual` and `LPIPS` share: the frozen network, the images' normalisation, targets that are encoded once."""

    def __init__(
        self,
        model: nn.Module | str,
        weights: WeightsSpec | None,
        taps: Iterable[str],
        styled: Iterable[str],
        input_range: tuple[float, float],
        mean: Iterable[float],
        std: Iterable[float],
        reduction: str,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
        low, high = input_range
        if not low < high:
            raise ValueError(f"input_range: expected the values of black and of white, as (0, 1), got {input_range}")
        self.reduction, self.input_range = reduction, (low, high)
        self.map_taps, self.gram_taps = tuple(taps), tuple(styled)
        wanted = dict.fromkeys((*self.map_taps, *self.gram_taps))
        self.network = frozen(features(_network(model, weights), wanted, torch_layout=False))
        centre = torch.tensor([low + (high - low) * value for value in mean]).view(1, -1, 1, 1)
        deviation = torch.tensor([(high - low) * value for value in std]).view(1, -1, 1, 1)
        self.centre: Tensor
        self.deviation: Tensor
        self.register_buffer("centre", centre, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def train(self, mode: bool = True) -> "FeatureLoss":
        """As of any module, but the network stays in eval mode, where BatchNorm and dropout do not change."""
        super().train(mode)
        self.network.eval()
        return self

    def encode(self, target: Tensor, style: Tensor | None = None) -> Encoded:
        """What the loss needs of `target`, for use in its place, any number of times. No gradient flows to it.

        With `style` the Gram matrices are those of that image, which may have another size.
        """
        with torch.no_grad():
            return self._encode(target, style)

    def _encode(self, target: Tensor, style: Tensor | None = None) -> Encoded:
        taps = self._run(target)
        grams = taps if style is None or not self.gram_taps else self._run(style)
        return Encoded(
            {name: taps[name] for name in self.map_taps}, {name: gram(grams[name]) for name in self.gram_taps}
        )

    def _run(self, images: Tensor) -> dict[str, Tensor]:
        if images.dim() != 4:
            raise ValueError(f"images: expected [N, C, H, W], got {list(images.shape)}")
        low, high = self.input_range
        if not images.is_floating_point() and high - low <= 2:
            raise ValueError(
                f"images: expected floating point values in {self.input_range}, got {images.dtype}; input_range=(0, 255) takes bytes"
            )
        channels = self.centre.shape[1]
        if channels != images.shape[1] and 1 not in (channels, images.shape[1]):
            raise ValueError(f"images: expected {channels} channels, as mean and std have, got {list(images.shape)}")
        images = (wide(images) - self.centre) / self.deviation
        images = images.to(next(self.network.parameters()).dtype)  # under autocast too, which leaves float64 as it is
        taps: dict[str, Tensor] = self.network(images)
        # A classifier's features [N, D] are maps of one position.
        return {name: tap if tap.dim() == 4 else tap[:, :, None, None] for name, tap in taps.items()}

    def _pair(self, input: Tensor, target: Tensor | Encoded, style: Tensor | None) -> tuple[Encoded, Encoded]:
        """Both images encoded, one after the other: so nothing is kept for the gradient of a target that wants none."""
        if isinstance(target, Encoded) and style is not None:
            raise ValueError("style: expected None beside an encoded target; give it to encode")
        if not isinstance(target, Encoded):
            target = self._encode(target, style)
        absent = [name for name in self.map_taps if name not in target.maps]
        absent += [f"gram {name}" for name in self.gram_taps if name not in target.grams]
        if absent:
            raise ValueError(f"target: expected what this loss has encoded, got one without {', '.join(absent)}")
        ours = self._encode(input)
        pairs = [(name, ours.maps[name], target.maps[name]) for name in self.map_taps]
        pairs += [(name, ours.grams[name], target.grams[name]) for name in self.gram_taps]
        for name, found, wanted in pairs:
            a, b = found.shape, wanted.shape
            if a[1:] != b[1:] or b[0] not in (1, a[0]):
                raise ValueError(
                    f"target: expected the size of the input, and as many images or one, got {list(b)} for "
                    f"{list(a)} at {name}"
                )
        return ours, target

    def _reduce(self, value: Tensor) -> Tensor:
        return value if self.reduction == "none" else value.mean() if self.reduction == "mean" else value.sum()


class Perceptual(FeatureLoss):
    """Distance of two images in the features of a VGG, and of the Gram matrices of features (style).

    The sum over `layers` of weight · mean over [C, H, W] of the distance of the feature maps (Johnson et al., arXiv
    1603.08155, eq. 2, with `distance="l2"`), and over `style` of weight · mean over [C, C] of the squared difference of the Gram
    matrices (`gram`), in the mean over the images.

    Args:
        model: a VGG or its features (see `vggfast.features`), or a builder's name such as "vgg19", for `weights`.
        layers: names, each with weight 1, or a mapping of names to weights.
        weights: with a builder's name: a path, a URL or a member of its weight enum.
        distance: "l1", "l2", or "huber" with `delta`.
        style: layers whose Gram matrices are compared; names or a mapping, as `layers`.
        input_range: the values of black and white in the images: (0, 1), (-1, 1), (0, 255).
        mean, std: what the network's weights were trained with, for images from 0 to 1.
        reduction: over the images: "mean", "sum", or "none" for [N].

    The images are [N, 3, H, W], or [N, 1, H, W] for grey ones. The model is not changed: the loss has parameters of its own on
    the same memory, which require no gradient, and keeps them in eval mode. Sums are in float32 also where features are
    float16 or bfloat16.

    Raises ValueError or TypeError for arguments that do not fit each other, and what `vggfast.features` raises.
    """

    def __init__(
        self,
        model: nn.Module | str,
        layers: Layers = ("relu1_2", "relu2_2", "relu3_3", "relu4_3"),
        *,
        weights: WeightsSpec | None = None,
        distance: str = "l1",
        delta: float = 1.0,
        style: Layers = (),
        input_range: tuple[float, float] = (0.0, 1.0),
        mean: Iterable[float] = IMAGENET_MEAN,
        std: Iterable[float] = IMAGENET_STD,
        reduction: str = "mean",
    ) -> None:
        at, styled = _weighted("layers", layers), _weighted("style", style)
        super().__init__(model, weights, at, styled, input_range, mean, std, reduction)
        self.layers, self.style = at, styled
        self.rule: Rule = distances.rule(distance, delta)

    def forward(self, input: Tensor, target: Tensor | Encoded, style: Tensor | None = None) -> Tensor:
        """The loss of `input` beside `target`: images of equal size, or what `encode` made of the target.

        With `style` the Gram matrices are compared to those of that image. Gradients flow to the target too, if it requires them.
        """
        return self._reduce(torch.stack(list(self.terms(input, target, style).values())).sum(0))

    def terms(self, input: Tensor, target: Tensor | Encoded, style: Tensor | None = None) -> dict[str, Tensor]:
        """What `forward` sums up, each [N], weighted: by the layer's name, "gram relu1_2" of Gram matrices."""
        ours, theirs = self._pair(input, target, style)
        terms = {}
        with torch.autocast(input.device.type, enabled=False):
            for name, weight in self.layers.items():
                a = ours.maps[name]
                distance = distances.rows(self.rule, a, theirs.maps[name].expand_as(a)).mean((1, 2))
                terms[name] = distance * (weight / a.shape[1])
            for name, weight in self.style.items():
                difference = ours.grams[name] - theirs.grams[name]
                terms[f"gram {name}"] = difference.square().mean((1, 2)) * weight
        return terms


class LPIPS(FeatureLoss):
    """The learned perceptual metric of Zhang et al. (arXiv 1801.03924), as the package lpips calculates it with `net="vgg"`.

    At each layer the features of both images are brought to unit length over the channels, their squared differences weighted
    by the layer's head, summed over the channels and averaged over positions; the layers add up.

    Args:
        model: VGG16 with ImageNet's weights (torchvision's, as the heads were trained on), or "vgg16" for `weights`.
        heads: path of a file of heads such as the package's `weights/v0.1/vgg.pth`, or its state_dict; None for the file of the
            installed package lpips.
        weights, mean, std: as of `Perceptual`.
        layers: of which the heads are, in their order.
        spatial: give a map [N, 1, H, W] of the images' size in place of one value an image.
        input_range: the values of black and white in the images; the package expects (-1, 1).
        reduction: over the images: "mean", "sum", or "none" for [N]. Without effect on maps.

    Images, modes and dtypes as of `Perceptual`. Where all features of a position are zero, its gradient is zero (the package's is NaN).

    Raises ImportError where `heads` is None and the package is not installed, ValueError where heads and layers do not fit.
    """

    def __init__(
        self,
        model: nn.Module | str,
        heads: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
        *,
        weights: WeightsSpec | None = None,
        layers: Iterable[str] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"),
        spatial: bool = False,
        input_range: tuple[float, float] = (-1.0, 1.0),
        mean: Iterable[float] = IMAGENET_MEAN,
        std: Iterable[float] = IMAGENET_STD,
        reduction: str = "mean",
    ) -> None:
        super().__init__(model, weights, layers, (), input_range, mean, std, reduction)
        self.spatial = spatial
        self.heads = nn.ParameterList(_heads(heads, [self.network.channels[name] for name in self.map_taps]))
        self.heads.requires_grad_(False)

    def forward(self, input: Tensor, target: Tensor | Encoded) -> Tensor:
        """The distance of `input` from `target`, images of equal size, or what `encode` made of the target."""
        ours, theirs = self._pair(input, target, None)
        total: Any = 0
        with torch.autocast(input.device.type, enabled=False):
            for head, (name, a) in zip(self.heads, ours.maps.items(), strict=True):
                found = distances.rows(UNIT, a, theirs.maps[name].expand_as(a), head)
                if self.spatial:
                    found = nn.functional.interpolate(
                        found[:, None], input.shape[2:], mode="bilinear", align_corners=False
                    )
                total = total + (found if self.spatial else found.mean((1, 2)))
        return total if self.spatial else self._reduce(total)


def _weighted(what: str, layers: Layers) -> dict[str, float]:
    if isinstance(layers, str):
        return {layers: 1.0}
    if isinstance(layers, Mapping):
        return {name: float(weight) for name, weight in layers.items()}
    names = list(layers)
    if len(set(names)) != len(names):
        raise ValueError(f"{what}: expected each layer once, got {', '.join(names)}")
    return dict.fromkeys(names, 1.0)


def _network(model: nn.Module | str, weights: WeightsSpec | None) -> nn.Module:
    if not isinstance(model, str):
        if weights is not None:
            raise ValueError(
                "weights: expected None beside a model; load them into it, or give the name of a builder as model"
            )
        return model
    from vggfast.recipes.config import MODELS

    if model not in MODELS:
        raise ValueError(f"model: expected a VGG, or one of {', '.join(MODELS)}, got {model!r}")
    if weights is None:
        raise ValueError(
            f"weights: expected trained ones for {model!r} (a path, a URL or 'DEFAULT'): a random network compares nothing"
        )
    built: nn.Module = getattr(models, model)(weights=weights)
    return built


def _heads(source: str | os.PathLike[str] | Mapping[str, Tensor] | None, channels: list[int]) -> list[Tensor]:
    """One [C] for each layer, from the package's keys `lin0.model.1.weight` [1, C, 1, 1], in the order of their numbers."""
    if source is None:
        package = importlib.util.find_spec("lpips")
        if package is None or package.origin is None:
            raise ImportError(
                "heads: None takes them from the package lpips, which is not installed: pip install lpips, "
                "or give the path of its weights/v0.1/vgg.pth"
            )
        source = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    state = source if isinstance(source, Mapping) else read_checkpoint(os.fspath(source))
    found = {int(m[1]): value for key, value in state.items() if (m := re.fullmatch(r"lin(\d+)\..*weight", key))}
    heads = [found[number].detach().flatten().clone() for number in sorted(found)]
    if [head.numel() for head in heads] != channels:
        got = f"{[head.numel() for head in heads]}" if heads else f"the keys {', '.join(list(state)[:8])}"
        raise ValueError(
            f"heads: expected lin0.model.1.weight, lin1… of {channels} channels, as the layers have, got {got}"
        )
    return heads
