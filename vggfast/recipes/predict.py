"""What is in an image: the most likely classes with their names. `python -m vggfast predict`, in Python."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vggfast.loading import LoadedModel, load_model
from vggfast.preprocessing import CAFFE, Normalisation
from vggfast.recipes import RecipeError, pictures
from vggfast.recipes.config import MODELS
from vggfast.recipes.evaluate import class_names
from vggfast.recipes.views import Classifier, Views
from vggfast.weights import VGG16_Weights

PREPROCESSING = {"imagenet": Normalisation(), "caffe": CAFFE}


@dataclass(frozen=True)
class Answer:
    """A class that an image may belong to."""

    name: str
    index: int  # of its score
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, the likeliest first; or `error`, why it cannot be read."""

    image: str
    answers: list[Answer]
    error: str | None = None


def open_model(weights: str | os.PathLike[str], preprocessing: str | None = None) -> LoadedModel:
    """`vggfast.load_model` for the command line.

    Args:
        weights: a path, a URL, a name as VGG16_Weights.DEFAULT; or also the name of a model, as vgg16_bn, for its
            published weights, or the output folder of a training run.
        preprocessing: "imagenet" or "caffe", in place of what the checkpoint says.

    Raises RecipeError where there is no such thing, or no VGG in it.
    """
    spec = os.fspath(weights)
    if os.path.isdir(spec):
        there = (name for name in ("model.safetensors", "checkpoint.pt") if os.path.exists(os.path.join(spec, name)))
        spec = os.path.join(spec, next(there, "model.safetensors"))  # the weights come when the run ends
    elif spec in MODELS and not os.path.exists(spec):
        spec = f"{spec.upper()}_Weights.DEFAULT"
    try:
        model = load_model(spec)
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"--weights {weights}: {error}") from error
    if preprocessing is not None:
        model.normalisation, model.normalisation_known = PREPROCESSING[preprocessing], True
    return model


def predict(
    images: Sequence[Any],
    models: Sequence[LoadedModel | nn.Module],
    views: Views | None = None,
    *,
    top: int = 5,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
) -> list[Prediction]:
    """The `top` most likely classes of each image.

    Args:
        images: paths of image files, PIL images, or tensors [C, H, W] of integers or of floats in [0, 1].
        models: one or an ensemble; see `Classifier`.
        views: None is the central crop, of the size and scale that the first checkpoint says or of 224 pixels.

    A path that cannot be read gets a Prediction with an `error`. Raises RecipeError where models do not fit each other.
    """
    size = default_size(models)
    views = views or Views(size=size, scales=default_scales(models, size))
    classifier = Classifier(models, views, device=device, batch_size=batch_size)
    names = class_names(models)
    predictions = []
    for image in images:
        is_path = isinstance(image, str | os.PathLike)
        name = os.fspath(image) if is_path else type(image).__name__
        try:
            pixels = pictures.read(image) if is_path else image
        except pictures.Unreadable as error:
            predictions.append(Prediction(name, [], str(error)))
            continue
        probabilities = classifier([pixels])[0]
        names = names or _usual_names(len(probabilities))
        values, indices = probabilities.topk(min(top, len(probabilities)))
        answers = [
            Answer(names[index], index, value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        ]
        predictions.append(Prediction(name, answers))
    return predictions


def default_size(models: Sequence[LoadedModel | nn.Module], otherwise: int = 224) -> int:
    """The size of the images that the first checkpoint which tells was trained on."""
    return next((model.size for model in models if isinstance(model, LoadedModel) and model.size), otherwise)


def default_scales(models: Sequence[LoadedModel | nn.Module], size: int) -> tuple[int] | None:
    """The scale of the first checkpoint that tells one for crops of `size`; None for the usual one."""
    told = (model for model in models if isinstance(model, LoadedModel) and model.scale and model.size == size)
    return next(((model.scale,) for model in told if model.scale), None)


def _usual_names(classes: int) -> list[str]:
    """Names where no checkpoint tells them: ImageNet's for 1000 classes, where torchvision knows them; else numbers."""
    names = VGG16_Weights.DEFAULT.meta.get("categories") if classes == 1000 else None
    return names or [f"class {index}" for index in range(classes)]
