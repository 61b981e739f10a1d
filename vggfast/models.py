"""VGG as torchvision builds it: same structure, state_dict keys, constructor signatures and same-seed parameters.

The networks are configurations A to E of Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale
Image Recognition" (arXiv 1409.1556), Table 1. `features` is a `FusedSequential` of plain torch modules: what is fused
is the execution, not the structure.
"""

import functools
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import nn

from vggfast.allocator import wish_huge_pages
from vggfast.fused import FusedSequential
from vggfast.weight_layouts import adapt_in_channels
from vggfast.weights import (
    VGG11_BN_Weights,
    VGG11_Weights,
    VGG13_BN_Weights,
    VGG13_Weights,
    VGG16_BN_Weights,
    VGG16_Weights,
    VGG19_BN_Weights,
    VGG19_Weights,
    WeightsEnum,
    WeightsSpec,
    load_weights,
    resolve,
)

Layer: TypeAlias = int | str | tuple[int, int]

# One entry per layer: 64 is a 3x3 convolution to 64 channels and its ReLU, (256, 1) a 1x1 convolution to 256 and its
# ReLU, "M" a 2x2 max pool of stride 2, "LRN" a local response normalisation.
cfgs: dict[str, list[Layer]] = {
    "A": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "A-LRN": [64, "LRN", "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "B": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "C": [64, 64, "M", 128, 128, "M", 256, 256, (256, 1), "M", 512, 512, (512, 1), "M", 512, 512, (512, 1), "M"],
    "D": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
    "E": [64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M"],
}


def make_layers(cfg: Sequence[Layer], batch_norm: bool = False, in_channels: int = 3) -> FusedSequential:
    """The layers of `cfg` (an entry of `cfgs`, or a list written like one) at torchvision's indices.

    Takes [N, in_channels, H, W]; each "M" halves H and W, rounding down. Mirrors `torchvision.models.vgg.make_layers`.
    Raises TypeError or ValueError for an entry that is none of the four kinds that `cfgs` lists.
    """
    layers: list[nn.Module] = []
    channels = _count("in_channels", in_channels, least=1)
    for index, layer in enumerate(cfg):
        if layer == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        elif layer == "LRN":
            # Krizhevsky's n=5, k=2, alpha=1e-4, beta=0.75 (section 2.3). torch divides alpha by n; the paper does not.
            layers.append(nn.LocalResponseNorm(size=5, alpha=5e-4, beta=0.75, k=2.0))
        else:
            width, kernel = layer if isinstance(layer, tuple) else (layer, 3)
            out_channels = _count(f"cfg[{index}], where not 'M' or 'LRN'", width, least=1)
            layers.append(nn.Conv2d(channels, out_channels, kernel_size=kernel, padding=kernel // 2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
            channels = out_channels
    return FusedSequential(*layers)


class VGG(nn.Module):
    """`features`, pooled to 7x7, then three fully connected layers. Mirrors `torchvision.models.VGG`.

    Args:
        features: module from [N, C, H, W] to [N, 512, h, w]; see `make_layers`.
        num_classes: width of the last layer.
        init_weights: draw the parameters as torchvision does (the same seed gives bitwise the same); else they stay
            at torch's defaults.
        dropout: probability, after each of the first two fully connected layers.

    Takes [N, C, H, W] with H, W >= 32, returns scores [N, num_classes] (no softmax).
    Raises TypeError or ValueError for a `num_classes` that is no count, ValueError for `dropout` outside [0, 1].
    """

    def __init__(
        self, features: nn.Module, num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5
    ) -> None:
        super().__init__()
        num_classes = _count("num_classes", num_classes, least=0)  # 0: scores of width 0, as torchvision allows
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = FusedSequential(
            _linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(p=dropout),
            _linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(p=dropout),
            nn.Linear(4096, num_classes),
        )
        if init_weights:
            _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new last layer for `num_classes` in the place of the old, on its device and in its dtype, drawn as VGG draws it."""
        num_classes = _count("num_classes", num_classes, least=1)
        last = self.classifier[-1]
        if not isinstance(last, nn.Linear):
            raise TypeError(f"classifier: expected an nn.Linear as its last layer, got {type(last).__name__}")
        weight = last.weight
        new = nn.Linear(last.in_features, num_classes, last.bias is not None, weight.device, weight.dtype)
        nn.init.normal_(new.weight, 0, 0.01)
        if new.bias is not None:
            nn.init.zeros_(new.bias)
        self.classifier[-1] = new

    def reset_in_channels(self, in_channels: int) -> None:
        """Put a first convolution for images of `in_channels` in the place of the old, its filters adapted.

        `vggfast.weight_layouts.adapt_in_channels` says how. Raises TypeError where `features` begins with another layer.
        """
        in_channels = _count("in_channels", in_channels, least=1)
        first = self.features[0] if isinstance(self.features, nn.Sequential) else self.features
        if type(first) is not nn.Conv2d or first.groups != 1:
            raise TypeError(f"features: expected an nn.Conv2d as its first layer, got {type(first).__name__}")
        weight = nn.Parameter(adapt_in_channels(first.weight.detach(), in_channels), first.weight.requires_grad)
        first.weight, first.in_channels = weight, in_channels


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """An nn.Linear with its weight in huge pages: each pass reads all of it, in a virtual machine up to twice as fast there."""

    class InHugePages(nn.Linear):
        def reset_parameters(self) -> None:  # is called when the memory is there and nothing has been written to it
            wish_huge_pages(self.weight)
            super().reset_parameters()

    layer: nn.Linear = InHugePages(in_features, out_features)
    layer.__class__ = nn.Linear
    return layer


def _initialise(model: nn.Module) -> None:
    """torchvision's draws in torchvision's order; they follow the draws of the layers' own default initialisation."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def _count(name: str, value: Any, least: int) -> int:
    """`value` as an int; TypeError or ValueError naming the argument where it is no count of at least `least`."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer >= {least}, got {value!r} ({type(value).__name__})")
    if count < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {count}")
    return count


class _ConfiguredVGG(VGG):
    """A VGG of one row of `cfgs`, for the constructor that the paper's networks share.

    Args:
        num_classes: width of the last layer; published weights have 1000.
        batch_norm: a BatchNorm2d between each convolution and its ReLU.
        dropout: probability, after each of the first two fully connected layers.
        in_channels: channels of the images; published weights have 3.
        weights: None, a member of the network's weight enum or its name, a path (.pth, .pt, .safetensors) or a URL.
        init_weights: as in `VGG`; without effect where `weights` are loaded.
        progress: show a download's progress on stderr.

    Raises TypeError or ValueError for arguments that do not fit each other, before anything is downloaded, and what
    `vggfast.weights.load_weights` raises.
    """

    cfg: ClassVar[str]
    published: ClassVar[tuple[type[WeightsEnum], type[WeightsEnum]] | None] = None  # without and with BatchNorm

    def __init__(
        self,
        num_classes: int = 1000,
        batch_norm: bool = False,
        dropout: float = 0.5,
        in_channels: int = 3,
        weights: WeightsSpec | None = None,
        init_weights: bool = True,
        *,
        progress: bool = True,
    ) -> None:
        spec = resolve(weights, [self.published[bool(batch_norm)]] if self.published else [])
        if isinstance(spec, WeightsEnum):
            for name, value, expected in (
                ("num_classes", num_classes, spec.value.meta["num_classes"]),
                ("in_channels", in_channels, 3),
            ):
                if value != expected:
                    raise ValueError(
                        f"The parameter '{name}' expected value {expected} but got {value} instead: {spec!r} has "
                        f"{expected}. Leave {name} out, and replace the layer after loading."
                    )
        features = make_layers(cfgs[self.cfg], batch_norm, in_channels)
        super().__init__(features, num_classes, init_weights and spec is None, dropout)
        if spec is not None:
            load_weights(self, spec, progress)


class VGG11(_ConfiguredVGG):
    """Configuration A: 8 convolutions, 132.9 M parameters."""

    cfg = "A"
    published = (VGG11_Weights, VGG11_BN_Weights)


class VGG11LRN(_ConfiguredVGG):
    """Configuration A-LRN: A with one local response normalisation after the first ReLU. No published weights."""

    cfg = "A-LRN"


class VGG13(_ConfiguredVGG):
    """Configuration B: 10 convolutions, 133.0 M parameters."""

    cfg = "B"
    published = (VGG13_Weights, VGG13_BN_Weights)


class VGG16C(_ConfiguredVGG):
    """Configuration C: B and a 1x1 convolution at the end of blocks 3 to 5, 133.6 M parameters. No published weights."""

    cfg = "C"


class VGG16(_ConfiguredVGG):
    """Configuration D: 13 convolutions, 138.4 M parameters."""

    cfg = "D"
    published = (VGG16_Weights, VGG16_BN_Weights)


class VGG19(_ConfiguredVGG):
    """Configuration E: 16 convolutions, 143.7 M parameters."""

    cfg = "E"
    published = (VGG19_Weights, VGG19_BN_Weights)


Builder = TypeVar("Builder", bound=Callable[..., VGG])


def _accept_legacy(enum: type[WeightsEnum] | None) -> Callable[[Builder], Builder]:
    """Let a builder take calls from before torchvision 0.13 (positional arguments, `pretrained`), with its warnings."""

    def decorate(builder: Builder) -> Builder:
        name = builder.__name__

        @functools.wraps(builder)
        def wrapper(*args: Any, **kwargs: Any) -> VGG:
            if len(args) > 2:
                raise TypeError(f"{name}() takes at most weights and progress by position, got {len(args)} arguments")
            positional = dict(zip(("weights", "progress"), args, strict=False))
            if twice := positional.keys() & kwargs.keys():
                raise TypeError(f"{name}() got multiple values for argument {min(twice)!r}")
            if positional:
                _warn(
                    f"Using {' and '.join(positional)} as positional parameter(s) is deprecated", "keyword parameter(s)"
                )
            kwargs.update(positional)
            if "pretrained" in kwargs and "weights" not in kwargs:
                _warn("The parameter 'pretrained' is deprecated", "'weights'")
                kwargs["weights"] = bool(kwargs.pop("pretrained"))
            if isinstance(kwargs.get("weights"), bool):
                if kwargs["weights"] and enum is None:
                    raise ValueError(f"No weights available for model {name}; pass a path or a URL as `weights`")
                default = enum["DEFAULT"] if kwargs["weights"] and enum is not None else None
                _warn("A bool for 'weights' is deprecated", f"weights={default}, which is what it stands for")
                kwargs["weights"] = default
            return builder(**kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def _warn(what: str, instead: str) -> None:
    warnings.warn(f"{what} since torchvision 0.13; please use {instead} instead.", stacklevel=3)


@_accept_legacy(VGG11_Weights)
def vgg11(
    *, weights: VGG11_Weights | str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any
) -> VGG11:
    """`VGG11`, as `torchvision.models.vgg11` builds it; `kwargs` as `VGG11` takes them."""
    return VGG11(batch_norm=False, weights=weights, progress=progress, **kwargs)


@_accept_legacy(VGG11_BN_Weights)
def vgg11_bn(
    *, weights: VGG11_BN_Weights | str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any
) -> VGG11:
    """`VGG11` with BatchNorm, as `torchvision.models.vgg11_bn` builds it; `kwargs` as `VGG11` takes them."""
    return VGG11(batch_norm=True, weights=weights, progress=progress, **kwargs)


@_accept_legacy(VGG13_Weights)
def vgg13(
    *, weights: VGG13_Weights | str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any
) -> VGG13:
    """`VGG13`, as `torchvision.models.vgg13` builds it; `kwargs` as `VGG13` takes them."""
    return VGG13(batch_norm=False, weights=weights, progress=progress, **kwargs)


@_accept_legacy(VGG13_BN_Weights)
def vgg13_bn(
    *, weights: VGG13_BN_Weights | str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any
) -> VGG13:
    """`VGG13` with BatchNorm, as `torchvision.models.vgg13_bn` builds it; `kwargs` as `VGG13` takes them."""
    return VGG13(batch_norm=True, weights=weights, progress=progress, **kwargs)


@_accept_legacy(VGG16_Weights)
def vgg16(
    *, weights: VGG16_Weights | str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any
) -> VGG16:
    """`VGG16`, as `torchvision.models.vgg16` builds it; `kwargs` as `VGG16` takes them."""
    return VGG16(batch_norm=False, weights=weights, progress=progress, **kwargs)


@_accept_legacy(VGG16_BN_Weights)
def vgg16_bn(
    *, weights: VGG16_BN_Weights | str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any
) -> VGG16:
    """`VGG16` with BatchNorm, as `torchvision.models.vgg16_bn` builds it; `kwargs` as `VGG16` takes them."""
    return VGG16(batch_norm=True, weights=weights, progress=progress, **kwargs)


@_accept_legacy(VGG19_Weights)
def vgg19(
    *, weights: VGG19_Weights | str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any
) -> VGG19:
    """`VGG19`, as `torchvision.models.vgg19` builds it; `kwargs` as `VGG19` takes them."""
    return VGG19(batch_norm=False, weights=weights, progress=progress, **kwargs)


@_accept_legacy(VGG19_BN_Weights)
def vgg19_bn(
    *, weights: VGG19_BN_Weights | str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any
) -> VGG19:
    """`VGG19` with BatchNorm, as `torchvision.models.vgg19_bn` builds it; `kwargs` as `VGG19` takes them."""
    return VGG19(batch_norm=True, weights=weights, progress=progress, **kwargs)


@_accept_legacy(None)
def vgg11_lrn(*, weights: str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any) -> VGG11LRN:
    """`VGG11LRN`, which torchvision does not have; `kwargs` as `VGG11LRN` takes them."""
    return VGG11LRN(weights=weights, progress=progress, **kwargs)


@_accept_legacy(None)
def vgg16c(*, weights: str | os.PathLike[str] | None = None, progress: bool = True, **kwargs: Any) -> VGG16C:
    """`VGG16C`, which torchvision does not have; `kwargs` as `VGG16C` takes them."""
    return VGG16C(weights=weights, progress=progress, **kwargs)
