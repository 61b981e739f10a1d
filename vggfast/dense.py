"""VGG as a fully convolutional network, which takes a whole image of any size (arXiv 1409.1556, section 3.2)."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggfast.fused import FusedSequential

# What may stand between the fully connected layers: works on one value at a time, whatever the shape.
_ELEMENTWISE = (nn.ReLU, nn.Dropout, nn.Identity, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Hardswish, nn.Tanh)


class WindowConv2d(nn.Conv2d):
    """An `nn.Conv2d` of stride 1 without padding whose windows are gathered and multiplied as one matrix.

    A convolution would reorder the weight, 411 MB of VGG's first fully connected layer, at every call.
    """

    def forward(self, input: Tensor) -> Tensor:
        windows = input.unfold(2, self.kernel_size[0], 1).unfold(3, self.kernel_size[1], 1)  # [N, C, h, w, k, k]
        rows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
        return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class DenseVGG(nn.Module):
    """Made by `to_dense`: from images [N, C, H, W] to a map of class scores [N, num_classes, h, w].

    Attributes:
        features: the convolutions of the model that it was made from, the same module.
        classifier: its fully connected layers as convolutions, at the same indices.
        grid: height and width of the features that one position of the map sees.
    """

    def __init__(self, features: nn.Module, classifier: nn.Sequential, grid: tuple[int, int]) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        height, width = (max(least, size) for least, size in zip(self.grid, x.shape[2:], strict=True))
        x = F.adaptive_avg_pool2d(x, (height, width))  # nothing, where the grid fits into the features
        return self.classifier(x)  # type: ignore[no-any-return]


def to_dense(model: nn.Module, size: int = 224) -> DenseVGG:
    """`model` as a fully convolutional network: a map of class scores, one for each crop of `size` pixels.

    The first fully connected layer becomes a 7x7 convolution, the others 1x1. An image of 224x224 gives a map of one
    position, the model's own answer; a larger one a position for every 32 pixels more (rounded down, in either
    direction), so 288x256 gives 3x2. In a direction in which the image is smaller than `size`, its features are pooled
    up to the grid, as the model's `avgpool` does with them: where both are, the answer is the model's own.

    Args:
        model: a VGG of vggfast or torchvision, fused or not, or any model of its structure: `features`, an
            `nn.AdaptiveAvgPool2d` as `avgpool`, and a `classifier` of `nn.Linear` and elementwise layers. It is not changed.
        size: height and width of the crops in pixels, usually those that the model was trained on. For others than 224
            the average pooling to 7x7 becomes part of the first convolution, so a model trained on 32 pixels
            gives a map of 2x2 for 64x64.

    The convolutions' parameters share the memory of the model's: what is loaded into or trained in one is seen in the
    other, until one is moved or cast. Only for another `size` than 224 the first weight is a copy. Mode and devices
    are the model's.

    Raises TypeError where `model` is no such model, ValueError for a `size` that its features leave nothing of.
    """
    features, avgpool, classifier = (getattr(model, name, None) for name in ("features", "avgpool", "classifier"))
    if not isinstance(features, nn.Module) or not isinstance(avgpool, nn.Module):
        raise TypeError(
            f"model: expected a VGG with features, avgpool and classifier, as torchvision's, got {type(model).__name__}"
        )
    if type(classifier) not in (nn.Sequential, FusedSequential):
        raise TypeError(f"model.classifier: expected an nn.Sequential, got {type(classifier).__name__}")
    channels, height, width = _features_of(features, size)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    first = True
    for name, layer in classifier._modules.items():  # type: ignore[union-attr]  # named_children() has a module once
        if type(layer) is nn.Linear:
            weight = layer.weight.detach()
            shape = _pooled(avgpool, height, width) if first else (1, 1)
            if first and layer.in_features != channels * shape[0] * shape[1]:
                raise TypeError(
                    f"model.classifier.{name}: expected {channels} x {shape[0]} x {shape[1]} inputs, as avgpool gives, "
                    f"got {layer.in_features}"
                )
            weight = weight.reshape(layer.out_features, -1, *shape)
            if first:
                weight = _absorb_pooling(weight, height, width)
            layers[name] = _convolution(weight, layer)
            first = False
        elif isinstance(layer, nn.Flatten):
            continue
        elif isinstance(layer, _ELEMENTWISE):
            layers[name] = layer
        else:
            raise TypeError(
                f"model.classifier.{name}: expected nn.Linear or an elementwise layer, got {type(layer).__name__}"
            )
    if first:
        raise TypeError("model.classifier: expected an nn.Linear in it, got none")
    dense = DenseVGG(features, nn.Sequential(layers), (height, width))
    dense.training = dense.classifier.training = model.training
    return dense


def _features_of(features: nn.Module, size: int) -> tuple[int, int, int]:
    """Channels, height and width of the features of an image of `size` pixels; nothing is computed for it."""
    weight = next((module.weight for module in features.modules() if isinstance(module, nn.Conv2d)), None)
    if weight is None:
        raise TypeError("model.features: expected convolutions in it, got none")
    parts: dict[str, Any] = {**dict(features.named_parameters()), **dict(features.named_buffers())}
    image = torch.empty(1, weight.shape[1], size, size, device="meta", dtype=weight.dtype)
    try:
        shape = torch.func.functional_call(features, {key: part.to("meta") for key, part in parts.items()}, image).shape
    except RuntimeError as error:  # a pool of nothing
        raise ValueError(
            f"size: expected an image that the features leave something of, got {size} ({error})"
        ) from error
    return shape[1], shape[2], shape[3]


def _pooled(avgpool: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Height and width after `avgpool`."""
    if isinstance(avgpool, nn.Identity):
        return height, width
    if type(avgpool) is not nn.AdaptiveAvgPool2d:
        raise TypeError(f"model.avgpool: expected nn.AdaptiveAvgPool2d or nn.Identity, got {type(avgpool).__name__}")
    output: Any = avgpool.output_size
    rows, columns = output if isinstance(output, (tuple, list)) else (output, output)
    return rows or height, columns or width


def _absorb_pooling(weight: Tensor, height: int, width: int) -> Tensor:
    """The filter on features of height x width that does adaptive average pooling and then `weight` [out, C, h, w]."""
    for dimension, size in ((2, height), (3, width)):
        pooled = weight.shape[dimension]
        if pooled != size:
            eye = torch.eye(size, dtype=torch.float64, device=weight.device)
            matrix = F.adaptive_avg_pool1d(eye, pooled).to(weight.dtype)  # [size, pooled]
            weight = torch.tensordot(weight, matrix, ([dimension], [1])).movedim(-1, dimension)
    return weight


def _convolution(weight: Tensor, layer: nn.Linear) -> WindowConv2d:
    """A convolution on that weight [out, in, h, w], without a copy of it, and on the bias of `layer`."""
    out_channels, in_channels, height, width = weight.shape
    has_bias = layer.bias is not None
    convolution = WindowConv2d(in_channels, out_channels, (height, width), bias=has_bias, device="meta")
    convolution.weight = nn.Parameter(weight, layer.weight.requires_grad)
    if has_bias:
        convolution.bias = nn.Parameter(layer.bias.detach(), layer.bias.requires_grad)
    return convolution.train(layer.training)
