"""Images in folders and in shards: found, divided, read by any number of workers; what cannot be read is skipped."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vggfast.preprocessing import Normalisation
from vggfast.recipes import RecipeError, pictures, shards, transforms
from vggfast.recipes.data import (
    SPLIT_SEED,
    TEST_FRACTION,
    Batch,
    Share,
    generator_for,
    pieces_of,
    shuffled,
    stratified_split,
)

LAYOUT = (
    "expected 'digits', 'mnist', 'fake', a folder with train/<class>/... and val/<class>/... images, or <class>/..., "
    'or shards as "data/{000..003}.tar", or a folder of them'
)


class File(Protocol):
    """An image file, wherever it lies; str() of it is its name."""

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class PathFile:
    path: str

    def __str__(self) -> str:
        return self.path

    def read(self) -> bytes:
        return pictures.content(self.path)


@dataclass
class LabelledFiles:
    """Image files with their classes, and where they were found."""

    place: str
    classes: list[str]
    files: list[File]
    targets: list[int]


class ImageData:
    """Images read with Pillow and torchvision, from class folders or from shards.

    `data` is a folder with train/ and val/ (or test/), each of class folders or of .tar files; or class folders or
    shards alone, of which a fixed 20 % are held out unless `val` names others. See `transforms.build` for `augment`.
    """

    in_channels = 3
    normalisation: Normalisation | None = Normalisation()  # ImageNet's, as in `transforms.build`

    def __init__(
        self,
        data: str,
        val: str | None,
        size: int,
        batch_size: int,
        seed: int,
        limit: int | None,
        workers: int,
        augment: str,
        scale: tuple[int, int],
        share: Share,
    ) -> None:
        self.batch_size, self.seed, self.workers, self.share = batch_size, seed, workers, share
        self.unreadable: dict[str, str] = {}
        for_training, for_testing = transforms.build(augment, size, scale)
        train, test = _find(data, val)
        if test is None:
            chosen = stratified_split(torch.tensor(train.targets), TEST_FRACTION, SPLIT_SEED)
        else:
            chosen = torch.arange(len(train.files)), torch.arange(len(test.files))
        train_indices, test_indices = (part[:limit].tolist() for part in shuffled(chosen))
        self.classes = train.classes
        self.train_size, self.test_size = len(train_indices), len(test_indices)
        if not self.test_size:
            raise RecipeError(f"{data}: expected at least two images in some class, one to test on; got one in each")
        self._train = _SeededImages(train, train_indices, for_training, seed, size)
        self._test = _SeededImages(test or train, test_indices, for_testing, seed, size)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        pieces = pieces_of(epoch, self.train_size, self.batch_size, self.seed, self.share, start)
        return self._load(self._train, [[(epoch, index) for index in piece] for piece in pieces])

    def test_batches(self) -> Iterator[Batch]:
        mine = range(self.test_size)[self.share.rank :: self.share.world]
        at_a_time = -(-self.batch_size // (self.share.world * self.share.pieces))
        batches = [mine[first : first + at_a_time] for first in range(0, len(mine), at_a_time)]
        return self._load(self._test, [[(0, index) for index in batch] for batch in batches])

    def _load(self, images: "_SeededImages", batches: list[list[tuple[int, int]]]) -> Iterator[Batch]:
        # A generator of its own: DataLoader would else draw from the global one.
        loader: Any = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=images.collate,
            generator=torch.Generator(),
        )
        for pixels, labels, unreadable in loader:
            self.unreadable.update(unreadable)
            yield pixels, labels


Read = tuple[Tensor, int] | tuple[str, str]  # image and label, or name and why it cannot be read


class _SeededImages(Dataset[Read]):
    """Images by (epoch, index), augmented by a seed of their own whichever worker reads them."""

    def __init__(
        self, images: LabelledFiles, indices: list[int], transform: transforms.Transform, seed: int, size: int
    ) -> None:
        self.images, self.indices, self.transform, self.seed, self.size = images, indices, transform, seed, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Read:
        epoch, index = key
        chosen = self.indices[index]
        file = self.images.files[chosen]
        try:
            picture = pictures.decode(file.read()).convert("RGB")
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(generator_for(self.seed, epoch, index).get_state())
                return self.transform(picture), self.images.targets[chosen]
        except Exception as error:  # of the transform MemoryError, where an image is a thousand times as long as wide
            return str(file), pictures.reason(error)

    def collate(self, items: list[Read]) -> tuple[Tensor, Tensor, dict[str, str]]:
        """Images, labels, and the unreadable ones; there may be no image at all."""
        read = [item for item in items if isinstance(item[0], Tensor)]
        unreadable = dict(item for item in items if isinstance(item[0], str))
        pixels = torch.stack([item[0] for item in read]) if read else torch.empty(0, 3, self.size, self.size)
        return pixels, torch.tensor([item[1] for item in read], dtype=torch.int64), unreadable


def _find(data: str, val: str | None) -> tuple[LabelledFiles, LabelledFiles | None]:
    """The images to train on, and those held out: None where they are to be taken from the former."""
    root = Path(data)
    if not data.endswith(".tar") and not root.is_dir():
        raise RecipeError(f"no data folder {root}: {LAYOUT}. Check --data")
    held_out = val
    if (root / "train").is_dir():
        data = str(root / "train")
        inside = [str(root / name) for name in ("val", "test") if (root / name).is_dir()]
        if held_out is None and not inside:
            raise RecipeError(f"{root} has train/ but neither val/ nor test/: {LAYOUT}, or name them with --val")
        held_out = held_out or inside[0]
    train = _labelled(data)
    if held_out is None:
        return train, None
    if not held_out.endswith(".tar") and not Path(held_out).is_dir():
        raise RecipeError(f"no folder {held_out} of held-out images. Check --val")
    return train, _labelled(held_out, train)


def _labelled(place: str, like: LabelledFiles | None = None) -> LabelledFiles:
    """The images at `place`; RecipeError where there are none, or their classes are not those of `like`."""
    if not shards.is_shards(place):
        images = _image_folder(Path(place))
        files: list[File] = [PathFile(path) for path, _ in images.samples]
        if like is not None and images.classes != like.classes:
            raise RecipeError(
                f"{place}: expected the same class folders as in {like.place}, {like.classes}, got {images.classes}"
            )
        return LabelledFiles(place, images.classes, files, images.targets)
    samples = shards.read_index(shards.find(place))
    classes = shards.classes_of(samples) if like is None else like.classes
    targets = shards.targets(samples, classes, like.place if like else place)
    return LabelledFiles(place, classes, [*samples], targets)


def _image_folder(root: Path) -> Any:
    """torchvision's ImageFolder; RecipeError where there is no image in it."""
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(root))
    except FileNotFoundError as error:  # no class folders, or one without an image
        raise RecipeError(
            f"{root}: expected one folder of images (.jpg, .png, ...) per class, got {sorted(os.listdir(root))[:8]}: "
            f"{str(error).splitlines()[0]}"
        ) from error
