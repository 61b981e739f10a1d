"""Top-1 and top-5 accuracy on labelled images, by the paper's protocols: `python -m vggfast evaluate`, in Python."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vggfast.loading import LoadedModel
from vggfast.preprocessing import Normalisation
from vggfast.recipes import RecipeError, pictures, shards
from vggfast.recipes import data as datasets
from vggfast.recipes.config import check_data
from vggfast.recipes.views import Classifier, Views

BUILT_IN = ("digits", "mnist", "fake")


@dataclass(frozen=True)
class Sample:
    """A labelled image that is read when it is needed; `read` raises `pictures.Unreadable` where it cannot be."""

    name: str
    label: int
    read: Callable[[], Any]


@dataclass(frozen=True)
class Labelled:
    """Labelled images.

    Attributes:
        normalised: they are tensors as the training had them, to be normalised no more.
        normalisation: the training's, for networks whose checkpoint does not say theirs; None where nothing is known of it.
    """

    name: str
    classes: list[str]
    samples: list[Sample]
    normalised: bool = False
    normalisation: Normalisation | None = None

    @property
    def normalisation_known(self) -> bool:
        return self.normalised or self.normalisation is not None


def find(data: str, *, size: int = 224, limit: int | None = None, held_out: bool = False) -> Labelled:
    """The images called `data`: the held-out ones of "digits", "mnist" or "fake", or those of a folder or of shards.

    Args:
        data: of a folder with val/ or test/ those, else all of it: folders <class>/…, or shards as training takes them.
        size: height and width of the images of "digits", "mnist" and "fake", in pixels.
        limit: at most so many images, in a fixed random order; None for all.
        held_out: of a folder of <class>/…, or of shards, only the fifth that training on it holds out.

    Raises RecipeError for a folder or shard that is missing, damaged or without images, and where a needed package is not installed.
    """
    check_data(data)
    if data in BUILT_IN:
        loaded = datasets.load(data, size=size, batch_size=256, seed=0)
        assert isinstance(loaded, datasets.TensorData)
        tensors = zip(loaded.pixels, loaded.test[1].tolist(), strict=True)
        samples = [Sample(f"{data} {n}", label, lambda i=image: i) for n, (image, label) in enumerate(tensors)]  # type: ignore[misc]
        own = loaded.normalisation
        return Labelled(f"{data}, held out", loaded.classes, _limited(samples, limit), own is None, own)
    root = Path(data)
    part = next((root / name for name in ("val", "test") if _holds_classes(root / name)), root)
    classes, samples = _from_shards(str(part)) if shards.is_shards(str(part)) else _from_folders(part)
    name = str(part)
    if held_out and part == root:
        labels = torch.tensor([sample.label for sample in samples])
        chosen = datasets.stratified_split(labels, datasets.TEST_FRACTION, datasets.SPLIT_SEED)[1]
        samples = [samples[index] for index in chosen.tolist()]
        name += ", held-out fifth"
    return Labelled(name, classes, _limited(samples, limit))


def _holds_classes(folder: Path) -> bool:
    """Whether this is a part of the data, with a folder for each class or with shards, and not a class of that name."""
    if not folder.is_dir():
        return False
    if shards.is_shards(str(folder)) or (folder.parent / "train").is_dir():
        return True
    entries = list(os.scandir(folder))
    images = any(entry.name.lower().endswith(pictures.SUFFIXES) and entry.is_file() for entry in entries)
    return not images and any(entry.is_dir() for entry in entries)


def _from_folders(root: Path) -> tuple[list[str], list[Sample]]:
    classes, files = pictures.in_class_folders(root)
    return classes, [Sample(str(path), label, partial(pictures.read, path)) for path, label in files]


def _from_shards(place: str) -> tuple[list[str], list[Sample]]:
    found = shards.read_index(shards.find(place))
    classes = shards.classes_of(found)
    targets = shards.targets(found, classes, place)
    return classes, [
        Sample(str(sample), label, partial(pictures.read_bytes, str(sample), sample.read))
        for sample, label in zip(found, targets, strict=True)
    ]


def _limited(samples: list[Sample], limit: int | None) -> list[Sample]:
    if limit is None:
        return samples
    generator = torch.Generator().manual_seed(datasets.SPLIT_SEED)
    order = torch.randperm(len(samples), generator=generator)[:limit]
    return [samples[index] for index in order.sort().values.tolist()]


@dataclass
class Evaluation:
    """How many of the images were classified right.

    Attributes:
        correct: for each k, images whose class was among the k that the models thought most likely.
        unreadable: images that could not be read, and why; they do not count.
    """

    images: int
    correct: dict[int, int]
    unreadable: list[str]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def accuracy(self, k: int = 1) -> float:
        """The part of the images, from 0 to 1, whose class was among the `k` likeliest; KeyError for a k not counted."""
        return self.correct[k] / self.images

    def error(self, k: int = 1) -> float:
        """What `accuracy` leaves of 1."""
        return 1 - self.accuracy(k)

    def to_dict(self) -> dict[str, Any]:
        """The results, ready for JSON; accuracies and errors are fractions."""
        rates = {f"top{k}_{what}": getattr(self, what)(k) for k in self.correct for what in ("accuracy", "error")}
        return {
            "images": self.images,
            **rates,
            "unreadable": self.unreadable,
            "seconds": self.seconds,
            "images_per_s": self.images / self.seconds,
            "notes": self.notes,
        }


def evaluate(
    models: Sequence[LoadedModel | nn.Module],
    data: Labelled | str,
    views: Views | None = None,
    *,
    top: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    workers: int = 2,
    listener: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
    """Classify labelled images with one model, or an ensemble, and count the right answers.

    Args:
        models: see `Classifier`.
        data: what `find` returns, or its argument.
        views: what of each image is classified; None is the central crop of 224 pixels from the shorter edge at 256.
        top: the k for which an image counts as right whose class is among the k most likely ones; None is 1 and, where
            there are more than 5 classes, 5.
        batch_size: see `Classifier`. At least so many images are read at a time.
        workers: threads that read images.
        listener: told how far it is, after each batch.

    Raises RecipeError where models and data do not fit, or no image can be read.
    """
    views = views or Views()
    data = find(data, size=views.size) if isinstance(data, str) else data
    classifier = Classifier(
        models, views, device=device, batch_size=batch_size, autocast=autocast, normalised=data.normalised,
        assumed=data.normalisation,
    )  # fmt: skip
    names = class_names(models)
    result, classes, to_model = Evaluation(0, {}, [], 0.0), 0, torch.empty(0, dtype=torch.int64)
    started = time.perf_counter()
    for read, unreadable in _batches(data.samples, batch_size, workers):
        result.unreadable += unreadable
        if read:
            probabilities = classifier([image for image, _ in read])
            if not classes:
                classes = probabilities.shape[1]
                to_model = _label_map(data, names, classes, result.notes)
                result.correct = dict.fromkeys(_top(top, classes), 0)
            order = probabilities.argsort(dim=1, descending=True, stable=True)  # of equals the first
            hit = order == to_model[torch.tensor([label for _, label in read])][:, None]
            for k in result.correct:
                result.correct[k] += int(hit[:, :k].sum())
            result.images += len(read)
        result.seconds = time.perf_counter() - started
        if listener is not None:
            listener(result)
    if not result.images:
        raise RecipeError(
            f"{data.name}: no image could be read; the first: {(result.unreadable or ['there is none'])[0]}"
        )
    return result


def class_names(models: Sequence[LoadedModel | nn.Module]) -> list[str] | None:
    """The names of the models' classes, or None where no checkpoint tells them; RecipeError where two differ."""
    known = [model for model in models if isinstance(model, LoadedModel) and model.classes is not None]
    for model in known[1:]:
        if model.classes != known[0].classes:
            raise RecipeError(
                f"{model.source}: expected the classes of {known[0].source}, in their order, as an ensemble needs"
            )
    return known[0].classes if known else None


def _label_map(data: Labelled, names: list[str] | None, scores: int, notes: list[str]) -> torch.Tensor:
    """The score that stands for each class of the data: by name, or where no name is known, in the data's order."""
    if names is not None and len(names) == scores and set(data.classes) <= set(names):
        return torch.tensor([names.index(name) for name in data.classes])
    if len(data.classes) != scores:
        known = f"{', '.join(names[:5])}, …" if names else "of names unknown"
        raise RecipeError(
            f"{data.name} has {len(data.classes)} classes ({', '.join(data.classes[:5])}, …), the model {scores} "
            f"({known}): expected folders named after the model's classes, or as many as it has"
        )
    if names is not None and names != data.classes:
        notes.append("the data's classes have other names than the model's: taken to be in the same, sorted, order")
    return torch.arange(scores)


def _top(top: Sequence[int] | None, classes: int) -> list[int]:
    if top is None:
        return [1, 5] if classes > 5 else [1]
    for k in top:
        if not 1 <= k <= classes:
            raise RecipeError(f"top: expected numbers from 1 to {classes}, as many as there are classes, got {k}")
    return list(top)


def _batches(samples: list[Sample], size: int, workers: int) -> Iterator[tuple[list[tuple[Any, int]], list[str]]]:
    """Images with labels, and what is said of those that cannot be read; the next batch is read meanwhile."""

    def read(sample: Sample) -> tuple[Any, int] | str:
        try:
            return sample.read(), sample.label
        except pictures.Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        batches = [samples[first : first + size] for first in range(0, len(samples), size)]
        waiting = [pool.submit(read, sample) for sample in batches[0]] if batches else []
        for following in [*batches[1:], []]:
            current, waiting = waiting, [pool.submit(read, sample) for sample in following]
            results = [future.result() for future in current]
            yield [r for r in results if not isinstance(r, str)], [r for r in results if isinstance(r, str)]
