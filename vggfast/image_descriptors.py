"""One vector for an image, for a linear SVM or a search (arXiv 1409.1556, appendix B)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggfast.dense import to_dense
from vggfast.taps import Features, features, frozen, names

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

    Raises ValueError for a layer that is none of the classifier's, or images or scales that fit nothing; TypeError where `model`
    is none that `to_dense` takes.
    """
    dense = to_dense(model)
    if not (layer in (available := names(dense)) and available[layer].part == "classifier"):
        raise ValueError(f"layer: expected a layer of the classifier, fc6 to fc8, relu6 or relu7, got {layer!r}")
    network = frozen(features(dense, layer))
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
    found: Tensor = network(images.to(next(network.parameters()).dtype))[network.taps[0]]
    return found.to(torch.promote_types(found.dtype, torch.float32)).mean((2, 3))
