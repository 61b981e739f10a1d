"""The paper's evaluation, slow and obvious, in float64: one pixel, one window, one crop at a time."""

import math

import torch
import torch.nn.functional as F


def weights_of_pixel(position: int, old: int, new: int) -> list[tuple[int, float]]:
    """Which pixels of `old` in a row make number `position` of `new`, and how much each counts: a tent, as wide as the
    step from one new pixel to the next, or as two old ones where the image is enlarged."""
    step = old / new
    width = max(step, 1.0)
    center = (position + 0.5) * step
    near = range(max(0, math.floor(center - width)), min(old, math.ceil(center + width)))
    weights = [(j, max(0.0, 1 - abs(j + 0.5 - center) / width)) for j in near]
    total = sum(weight for _, weight in weights)
    return [(j, weight / total) for j, weight in weights if weight > 0]


def resize(image: torch.Tensor, shorter: int) -> torch.Tensor:
    channels, height, width = image.shape
    if height < width:
        new_height, new_width = shorter, math.floor(shorter * width / height)
    else:
        new_height, new_width = math.floor(shorter * height / width), shorter
    columns = torch.zeros(channels, height, new_width, dtype=torch.float64)
    for position in range(new_width):
        for j, weight in weights_of_pixel(position, width, new_width):
            columns[:, :, position] += weight * image[:, :, j]
    result = torch.zeros(channels, new_height, new_width, dtype=torch.float64)
    for position in range(new_height):
        for j, weight in weights_of_pixel(position, height, new_height):
            result[:, position] += weight * columns[:, j]
    return result


def features(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[C, H, W] to [C, h, w], for convolutions, ReLUs and pools."""
    x = x[None]
    for layer in model.features:
        if isinstance(layer, torch.nn.Conv2d):
            x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        elif isinstance(layer, torch.nn.ReLU):
            x = x.clamp(min=0)
        elif isinstance(layer, torch.nn.MaxPool2d):
            x = F.max_pool2d(x, 2)
        else:
            raise AssertionError(layer)
    return x[0]


def scores_of_features(model: torch.nn.Module, maps: torch.Tensor) -> torch.Tensor:
    """Class scores of the features of one crop [C, g, g]: pooled to 7x7, flattened, three matrices."""
    g = maps.shape[1]
    bins = [slice(i * g // 7, -(-(i + 1) * g // 7)) for i in range(7)]
    pooled = torch.stack(
        [torch.stack([maps[:, rows, columns].mean((1, 2)) for columns in bins], 1) for rows in bins], 1
    )
    first, second, third = (model.classifier[index] for index in (0, 3, 6))
    hidden = (first.weight @ pooled.flatten() + first.bias).clamp(min=0)
    hidden = (second.weight @ hidden + second.bias).clamp(min=0)
    return third.weight @ hidden + third.bias


def softmax(scores: torch.Tensor) -> torch.Tensor:
    powers = (scores - scores.max()).exp()
    return powers / powers.sum()


def dense_answer(model, image, size):
    """The network at every position of the features where a crop's would fit; scores averaged, then softmax."""
    maps = features(model, image)
    grid = size // 32
    found = [
        scores_of_features(model, maps[:, i : i + grid, j : j + grid])
        for i in range(maps.shape[1] - grid + 1)
        for j in range(maps.shape[2] - grid + 1)
    ]
    return softmax(torch.stack(found).mean(0))


def crops(image, size, which):
    rows, columns = image.shape[1] - size, image.shape[2] - size
    if which == "center":
        corners = [(round(rows / 2), round(columns / 2))]
    else:
        corners = [(round(i * rows / 4), round(j * columns / 4)) for i in range(5) for j in range(5)]
    return [image[:, top : top + size, left : left + size] for top, left in corners]


def answer(models, image, mean, std, size, scales, dense, which, flip):
    """Probabilities of one image [C, H, W] in [0, 1]."""
    of_models = []
    for model in models:
        of_kinds = []
        for kind in (["dense"] if dense else []) + ([which] if which != "none" else []):
            probabilities = []
            for scale in scales:
                whole = (resize(image, scale) - mean) / std
                for view in [whole] if kind == "dense" else crops(whole, size, kind):
                    for shown in [view, view.flip(2)] if flip else [view]:
                        if kind == "dense":
                            probabilities.append(dense_answer(model, shown, size))
                        else:
                            probabilities.append(softmax(scores_of_features(model, features(model, shown))))
            of_kinds.append(torch.stack(probabilities).mean(0))
        of_models.append(torch.stack(of_kinds).mean(0))
    return torch.stack(of_models).mean(0)
