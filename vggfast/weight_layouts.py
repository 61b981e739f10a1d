"""The layouts in which people keep VGG checkpoints, recognised by their keys and converted to torchvision's.

- torchvision: `features.{i}`, `classifier.{0,3,6}`;
- timm: the same features, `pre_logits.fc1` and `fc2` (convolutions) and `head.fc`;
- Keras: `block{b}_conv{i}`, `fc1`, `fc2`, `predictions`, kernels HWIO (`vggfast.keras_weights` reads the files);
- a tutorial class that is copied widely: `conv.{i}`, `fc_layer.{i}`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

LAYOUTS = ("torchvision", "timm", "keras", "tutorial")
CLASSIFIER = ("classifier.0", "classifier.3", "classifier.6")
_TIMM_HEAD = ("pre_logits.fc1", "pre_logits.fc2", "head.fc")
_KERAS_CONV = re.compile(r"block(\d+)_conv(\d+)\.(kernel|bias)")
_KERAS_HEAD = ("fc1", "fc2", "predictions")


def recognise(keys: Iterable[str]) -> str | None:
    """Which of `LAYOUTS` has such keys, or None."""
    keys = set(keys)
    if any(_KERAS_CONV.fullmatch(key) for key in keys):
        return "keras"
    if "conv.0.weight" in keys:
        return "tutorial"
    if "features.0.weight" in keys:
        return "timm" if any(key.startswith(("pre_logits.", "head.")) for key in keys) else "torchvision"
    return None


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with torchvision's keys and shapes; one of a layout that is not known comes back as it is.

    The weights of fully connected layers that were written as convolutions, by timm or by `to_dense`, become matrices.
    Raises RuntimeError for Keras weights whose kernels are not [H, W, C_in, C_out].
    """
    layout = recognise(state)
    if layout == "keras":
        return _from_keras(state)
    renamed = dict(state)
    if layout == "timm":
        renamed = _rename(state, dict(zip(_TIMM_HEAD, CLASSIFIER, strict=True)))
    elif layout == "tutorial":
        linear = sorted({int(key.split(".")[1]) for key in state if re.fullmatch(r"fc_layer\.\d+\.weight", key)})
        names = CLASSIFIER if len(linear) == 3 else [f"classifier.{index}" for index in linear]
        layers = {f"fc_layer.{index}": name for index, name in zip(linear, names, strict=True)}
        renamed = _rename(state, layers | {"conv": "features"})
    for name in CLASSIFIER:
        key = f"{name}.weight"
        if key in renamed and renamed[key].ndim == 4:
            renamed[key] = renamed[key].flatten(1)
    return renamed


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The torchvision layout `state` with timm's keys, and with convolutions for the first two fully connected layers."""
    renamed = _rename(state, dict(zip(CLASSIFIER, _TIMM_HEAD, strict=True)))
    widths = {int(key.split(".")[1]): value.shape[0] for key, value in state.items() if is_convolution(key, value)}
    for name in _TIMM_HEAD[:2]:
        key = f"{name}.weight"
        if key in renamed:
            weight = renamed[key]
            grid = round((weight.shape[1] / widths[max(widths)]) ** 0.5) if name.endswith("fc1") and widths else 1
            renamed[key] = weight.reshape(weight.shape[0], -1, grid, grid)
    return renamed


def is_convolution(key: str, value: Tensor) -> bool:
    """Whether this entry of a torchvision layout is a convolution's weight."""
    return re.fullmatch(r"features\.\d+\.weight", key) is not None and value.ndim == 4


def _rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """`state` with every key's leading name that is in `names` replaced."""
    renamed = {}
    for key, value in state.items():
        old = next((name for name in names if key.startswith(f"{name}.")), None)
        renamed[key if old is None else names[old] + key[len(old) :]] = value
    return renamed


def _from_keras(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    matches = (match for match in map(_KERAS_CONV.fullmatch, state) if match and match[3] == "kernel")
    convolutions = sorted(tuple(map(int, match.groups()[:2])) for match in matches)
    renamed: dict[str, Tensor] = {}
    index, channels = 0, 0
    for position, (block, number) in enumerate(convolutions):
        if position and block != convolutions[position - 1][0]:
            index += 1  # the pool that ends a block
        kernel = state[f"block{block}_conv{number}.kernel"]
        follows = kernel.ndim == 4 and (position == 0 or kernel.shape[2] == channels)
        if not follows or kernel.shape[0] != kernel.shape[1]:
            raise RuntimeError(
                f"block{block}_conv{number}: expected a kernel [H, W, C_in, C_out], got {list(kernel.shape)}: these are "
                "Theano's weights (th_kernels); use the file for TensorFlow (tf_kernels)"
            )
        renamed[f"features.{index}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        _copy_bias(state, f"block{block}_conv{number}", renamed, f"features.{index}")
        index, channels = index + 2, kernel.shape[3]
    for old, new in zip(_KERAS_HEAD, CLASSIFIER, strict=True):
        if f"{old}.kernel" in state:
            dense = state[f"{old}.kernel"]
            renamed[f"{new}.weight"] = (_hwc_to_chw(dense, channels) if old == "fc1" else dense.T).contiguous()
            _copy_bias(state, old, renamed, new)
    return renamed


def _copy_bias(state: Mapping[str, Tensor], old: str, renamed: dict[str, Tensor], new: str) -> None:
    if (bias := state.get(f"{old}.bias")) is not None:
        renamed[f"{new}.bias"] = bias


def _hwc_to_chw(kernel: Tensor, channels: int) -> Tensor:
    """The first dense kernel [H * W * C, out], after Keras's flattening of [H, W, C], as [out, C * H * W]."""
    grid = round((kernel.shape[0] / max(channels, 1)) ** 0.5)
    if kernel.ndim != 2 or not channels or grid * grid * channels != kernel.shape[0]:
        raise RuntimeError(f"fc1: expected a kernel of {channels} channels by a square, got {list(kernel.shape)}")
    return kernel.view(grid, grid, channels, -1).permute(3, 2, 0, 1).flatten(1)


def adapt_in_channels(weight: Tensor, in_channels: int) -> Tensor:
    """A first convolution's weight [C_out, C, k, k] for images of `in_channels` channels: [C_out, in_channels, k, k].

    For one channel the filters are summed over theirs; for others they are repeated and scaled by C / in_channels, so
    that a grey image gives what it gave before. As timm's `adapt_input_conv` does for C = 3.
    """
    channels = weight.shape[1]
    if in_channels == channels:
        return weight
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-in_channels // channels), 1, 1)[:, :in_channels]
    return repeated * (channels / in_channels)


@dataclass(frozen=True)
class Architecture:
    """A VGG as its checkpoint tells it, in torchvision's layout.

    Attributes:
        cfg: its convolutions and pools, as an entry of `vggfast.models.cfgs` is written.
        hidden: widths of the two hidden fully connected layers.
        num_classes: width of the last layer; None where the checkpoint holds no classifier.
        grid: height and width of the features that the first fully connected layer takes.
    """

    cfg: tuple[int | str | tuple[int, int], ...]
    batch_norm: bool
    in_channels: int
    hidden: tuple[int, int]
    num_classes: int | None
    grid: int


def architecture(state: Mapping[str, Tensor]) -> Architecture:
    """The VGG that `state`, in torchvision's layout, belongs to.

    What stands between two convolutions follows from the gap between their indices. Raises ValueError, naming the keys
    that were seen, where this is no VGG.
    """
    weights = {int(key.split(".")[1]): value for key, value in state.items() if is_convolution(key, value)}
    if 0 not in weights:
        raise ValueError(_unknown(state))
    batch_norm = any(key.endswith(".running_mean") for key in state)
    cfg: list[int | str | tuple[int, int]] = []
    indices = sorted(weights)
    for index, after in zip(indices, [*indices[1:], None], strict=True):
        width, _, kernel, columns = weights[index].shape
        if kernel != columns or not weights[index].numel():
            raise ValueError(
                f"features.{index}.weight: expected filters [C_out, C_in, k, k], got {list(weights[index].shape)}"
            )
        cfg.append(width if kernel == 3 else (width, kernel))
        between = 1 if after is None else after - index - (3 if batch_norm else 2)
        if between not in (0, 1, 2):
            raise ValueError(
                f"features.{index} and features.{after}: expected a ReLU, and a pool or not, between them.\n{_unknown(state)}"
            )
        cfg += [[], ["M"], ["LRN", "M"]][between]
    return Architecture(tuple(cfg), batch_norm, weights[0].shape[1], *_classifier(state, weights[indices[-1]].shape[0]))


def _classifier(state: Mapping[str, Tensor], channels: int) -> tuple[tuple[int, int], int | None, int]:
    """Widths of the hidden layers, classes and grid; the usual ones and None where there is no classifier."""
    if not any(key.startswith("classifier.") for key in state):
        return (4096, 4096), None, 7
    first, second, last = (state.get(f"{name}.weight") for name in CLASSIFIER)
    if first is None or second is None or last is None:
        raise ValueError(f"classifier: expected fully connected layers at {', '.join(CLASSIFIER)}.\n{_unknown(state)}")
    for name, weight in zip(CLASSIFIER, (first, second, last), strict=True):
        if weight.ndim != 2 or not weight.numel():
            raise ValueError(f"{name}.weight: expected a matrix [outputs, inputs], got {list(weight.shape)}")
    grid = round((first.shape[1] / channels) ** 0.5)
    if grid * grid * channels != first.shape[1]:
        raise ValueError(
            f"classifier.0.weight: expected {channels} channels by a square as inputs, got {list(first.shape)}"
        )
    return (first.shape[0], second.shape[0]), last.shape[0], grid


def _unknown(keys: Iterable[str], limit: int = 8) -> str:
    """What is said of a checkpoint that is no VGG."""
    seen: Sequence[str] = list(keys)
    shown = ", ".join(seen[:limit]) + (f", … ({len(seen)} in all)" if len(seen) > limit else "")
    return (
        "expected a VGG checkpoint as torchvision (features.*, classifier.*), timm (features.*, pre_logits.*, head.*), Keras "
        f"(block*_conv*, fc1, fc2, predictions) or the tutorial class (conv.*, fc_layer.*) writes it; got the keys {shown or 'none'}"
    )
