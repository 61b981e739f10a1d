"""From a checkpoint to a model that can classify images: the network, the names of its classes, its preprocessing."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggfast import models
from vggfast.checkpoint_files import read_metadata, read_state_dict, write_safetensors
from vggfast.preprocessing import CAFFE, IMAGENET_MEAN, IMAGENET_STD, Normalisation
from vggfast.weight_layouts import Architecture, architecture, recognise, to_torchvision
from vggfast.weights import VGG16_Weights, WeightsEnum, WeightsSpec, locate, resolve

MOST_PIXELS = 1 << 13


@dataclass
class LoadedModel:
    """A checkpoint's network, in evaluation mode, and what is known of it.

    Attributes:
        classes: names in the order of the scores; None where the checkpoint does not tell them.
        normalisation: how its images are normalised.
        normalisation_known: whether the checkpoint says so; else ImageNet's is assumed.
        size: height and width of the images that it was trained on, in pixels; None where the checkpoint does not tell.
        layout: of the checkpoint's keys, one of `vggfast.weight_layouts.LAYOUTS`.
        source: what was loaded.
        scale: length of the shorter edge, in pixels, of the images that those of `size` are cropped from; None where the
            checkpoint does not tell.
    """

    model: models.VGG
    classes: list[str] | None
    normalisation: Normalisation
    normalisation_known: bool
    size: int | None
    in_channels: int
    layout: str
    source: str
    scale: int | None = None

    @property
    def num_classes(self) -> int:
        """How many scores the network gives an image."""
        return self.model.classifier[6].out_features  # type: ignore[return-value]


def load_model(weights: WeightsSpec, progress: bool = True) -> LoadedModel:
    """Build the VGG that a checkpoint was saved from, of any width, and load it, in float32.

    `weights` is what `load_weights` takes, in every layout that it takes. Names of classes and the preprocessing come
    from what `save_weights` and `vggfast train` wrote beside the weights, or from the weight enum; Keras's weights get
    Caffe's preprocessing, all others ImageNet's.

    Raises what `read_checkpoint` raises; ValueError where the checkpoint is of no VGG, or holds no classifier.
    """
    spec = resolve(weights)
    if spec is VGG16_Weights.IMAGENET1K_FEATURES:
        raise ValueError(f"{spec!r} holds features only, no classifier: vggfast.vgg16(weights=…) loads it")
    path = locate(weights, progress)
    state = read_state_dict(path)
    layout = recognise(state) or "unknown"
    try:
        state = to_torchvision({key: _own(state.pop(key)) for key in list(state)})
        found = architecture(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if found.num_classes is None:
        raise ValueError(
            f"{path} holds no classifier. To load its features alone: "
            "model.load_state_dict(vggfast.weights.read_checkpoint(…), strict=False)"
        )
    model = _build(found)
    missing, unexpected = model.load_state_dict(_with_batch_counts(model, state), strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(f"{path}: missing keys {missing[:4]}, unexpected keys {unexpected[:4]}")
    about = _about(spec, path, layout, found)
    return LoadedModel(model.eval(), in_channels=found.in_channels, layout=layout, source=str(weights), **about)


def _own(value: Tensor) -> Tensor:
    """A copy, floats in float32: a file's tensors may lie in the file, and change with it, or share memory, also with themselves."""
    return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()


def _build(found: Architecture) -> models.VGG:
    """The network, on the meta device: its parameters are the checkpoint's own tensors."""
    assert found.num_classes is not None
    with torch.device("meta"):
        features = models.make_layers(found.cfg, found.batch_norm, found.in_channels)
        model = models.VGG(features, found.num_classes, init_weights=False)
        first, second = found.hidden
        model.avgpool = nn.AdaptiveAvgPool2d((found.grid, found.grid))
        channels = next(layer.out_channels for layer in reversed(features) if isinstance(layer, nn.Conv2d))
        model.classifier[0] = nn.Linear(channels * found.grid**2, first)
        model.classifier[3] = nn.Linear(first, second)
        model.classifier[6] = nn.Linear(second, found.num_classes)
    return model


def _with_batch_counts(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with zeros for the num_batches_tracked that checkpoints older than torch 0.4.1, and others', lack."""
    counts = (key for key in model.state_dict() if key.endswith(".num_batches_tracked"))
    return {key: torch.zeros((), dtype=torch.int64) for key in counts} | dict(state)


def _about(spec: Any, path: Path, layout: str, found: Architecture) -> dict[str, Any]:
    """What is known of the images; metadata of other programs that only look like ours are left out."""
    if isinstance(spec, WeightsEnum):
        published = spec.transforms.keywords  # type: ignore[attr-defined]
        normalisation = Normalisation(published.get("mean", IMAGENET_MEAN), published.get("std", IMAGENET_STD))
        return {
            "classes": spec.meta.get("categories"),
            "normalisation": normalisation,
            "normalisation_known": True,
            "size": published["crop_size"],
        }
    metadata = read_metadata(path)
    classes, said = metadata.get("classes"), metadata.get("preprocessing")
    named = isinstance(classes, list) and len(classes) == found.num_classes and all(isinstance(c, str) for c in classes)
    said = said if isinstance(said, dict) else {}
    known = all(_numbers(said.get(key), found.in_channels) for key in ("mean", "std")) and 0 not in said["std"]
    default = CAFFE if layout == "keras" else Normalisation()
    size, scale = (said.get(key) for key in ("size", "scale"))
    return {
        "classes": classes if named else None,
        "normalisation": Normalisation.from_dict(said) if known else default,
        "normalisation_known": known or layout == "keras",
        "size": size if _is_length(size) else None,
        "scale": scale if _is_length(scale) else None,
    }


def _is_length(value: Any) -> bool:
    """Of an image's edge, in pixels, that a VGG can have been trained on."""
    return type(value) is int and 0 < value <= MOST_PIXELS


def _numbers(value: Any, count: int) -> bool:
    if not isinstance(value, list) or len(value) != count:
        return False
    return all(isinstance(n, (int, float)) and abs(n) < 1e6 for n in value)  # no NaN either


def save_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    normalisation: Normalisation | None = None,
    size: int | None = None,
) -> None:
    """Write the weights of `model` as safetensors, and beside them what `load_model` tells of them.

    Args:
        path: ends in .safetensors; what is there is replaced, atomically.
        classes: names in the order of the scores.
        normalisation: how the images are normalised.
        size: height and width of the images that it was trained on, in pixels.

    Raises ValueError where `path` has another suffix or `classes` another number than the scores, OSError where the
    disk refuses.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name that ends in .safetensors, got {str(path)!r}")
    state = model.state_dict()
    about: dict[str, Any] = {}
    if recognise(state) is not None:
        found = architecture(to_torchvision(state))
        about["in_channels"] = found.in_channels
        if classes is not None and found.num_classes not in (None, len(classes)):
            raise ValueError(f"classes: expected {found.num_classes} names, as many as the scores, got {len(classes)}")
    if classes is not None:
        about["classes"] = list(classes)
    preprocessing = (normalisation.to_dict() if normalisation else {}) | ({"size": size} if size else {})
    if preprocessing:
        about["preprocessing"] = preprocessing
    write_safetensors(state, path, about)
