"""One vector for an image, for a linear SVM or a search (arXiv 1409.1556, appendix B)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggfast.taps import Features, features, frozen

__all__ = ["descriptors"]


def descriptors(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    *,
    scales: Sequence[int] = (),
    flip: bool = True,
    layer: str = "relu7",
    stack: bool = False,
) -> Tensor:
    """A vector of length 1 for each image: activations of the penultimate layer, averaged over space, flips and scales.

    The fully connected layers are applied at every position of the whole image, as convolutions. That map is averaged over
    its positions, then with the flipped image's and over the scales, and brought to an L2 norm of 1.

    Args:
        model: a VGG of vggfast or torchvision with its classifier. It runs in eval mode, without gradients, and is not changed.
        images: [N, 3, H, W] normalised as the model's weights need it, or images [3, H, W] of several sizes.
        scales: lengths of the shortest side in pixels, to which images are resized (bilinear, antialiased), such as the
            paper's (256, 384, 512); empty for the images as they are.
        flip: average with the image mirrored left to right.
        layer: "relu7", or another of the classifier's, as `vggfast.features` names them.
        stack: put the scales' vectors one behind the other, as the paper does for Caltech, in place of averaging them.

    Returns [N, 4096], or [N, 4096 * len(scales)] stacked, in the dtype of the model, at least float32.

    Raises ValueError for a layer that is none of the classifier's, or images or scales that fit nothing.
    """
    network = frozen(features(model, layer))
    if not hasattr(network, "classifier"):
        raise ValueError(f"layer: expected a layer of the classifier, fc6 to fc8, relu6 or relu7, got {layer!r}")
    if not all(scale >= 1 for scale in scales):
        raise ValueError(f"scales: expected lengths in pixels, got {list(scales)}")
    batches = [images] if isinstance(images, Tensor) else [image.unsqueeze(0) for image in images]
    if not batches or any(batch.dim() != 4 for batch in batches):
        raise ValueError("images: expected [N, C, H, W], or a sequence of at least one [C, H, W]")
    with torch.no_grad():
        return torch.cat([_describe(network, batch, scales, flip, stack) for batch in batches])


def _describe(network: Features, images: Tensor, scales: Sequence[int], flip: bool, stack: bool) -> Tensor:
    vectors = []
    for scale in scales or (0,):
        resized = _resize(images, scale) if scale else images
        views = [resized, resized.flip(3)] if flip else [resized]
        vectors.append(torch.stack([_pooled(network, view) for view in views]).mean(0))
    joined = torch.cat(vectors, 1) if stack else torch.stack(vectors).mean(0)
    return F.normalize(joined, dim=1)


def _resize(images: Tensor, shortest: int) -> Tensor:
    height, width = images.shape[2:]
    size = [max(1, round(side * shortest / min(height, width))) for side in (height, width)]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _pooled(network: Features, images: Tensor) -> Tensor:
    """The activations averaged over positions: [N, C, H, W] -> [N, D]."""
    x = network.features(images.to(next(network.parameters()).dtype))
    output = getattr(network.avgpool, "output_size", (7, 7))
    rows, columns = output if isinstance(output, tuple) else (output, output)
    # A feature map smaller than the window is pooled up to it, as the model's avgpool does.
    x = F.adaptive_avg_pool2d(x, (max(rows, x.shape[2]), max(columns, x.shape[3])))
    windows = x.unfold(2, rows, 1).unfold(3, columns, 1)  # [N, C, h, w, rows, columns]
    n, _, h, w = windows.shape[:4]
    found: Tensor = network.classifier(windows.permute(0, 2, 3, 1, 4, 5).reshape(n * h * w, -1))
    return found.to(torch.promote_types(found.dtype, torch.float32)).view(n, h * w, -1).mean(1)
