"""What to train on: scikit-learn's digits, made-up images, or a folder of images; one interface for the three.

Everything random is a pure function of (seed, epoch, position), never of what was drawn before, so a resumed run sees
the very images that an uninterrupted one would have.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vggfast.recipes import RecipeError

Batch = tuple[Tensor, Tensor]  # images [N, C, S, S] float32, labels [N] int64

SPLIT_SEED = 0  # not the training seed: runs with different seeds are measured on the same held-out images
TEST_FRACTION = 0.2
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Data(Protocol):
    """Labelled images for training and for testing."""

    classes: list[str]
    in_channels: int
    train_size: int
    test_size: int

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch`, shuffled and augmented, from number `start` on."""

    def test_batches(self) -> Iterator[Batch]:
        """The held-out images in a fixed order, not augmented."""


def load(data: str, *, size: int, batch_size: int, seed: int, limit: int | None = None, workers: int = 0) -> Data:
    """The data set called `data`: "digits", "fake", or a folder of images.

    Args:
        size: height and width of the images, in pixels; VGG needs at least 32.
        batch_size: images per batch; the last batch of an epoch may be smaller.
        seed: of order and augmentation, not of the split into training and test images.
        limit: keep at most this many training images, and as many test images.
        workers: processes that decode the images of a folder; 0 decodes in this process.

    Raises RecipeError for a folder that is missing or empty, or where a needed package is not installed.
    """
    if data == "digits":
        return _digits(size, batch_size, seed, limit)
    if data == "fake":
        return _fake(size, batch_size, seed, limit)
    return FolderData(Path(data), size, batch_size, seed, limit, workers)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (training, test): of each class about `fraction`, chosen by `seed`, for the test; both sorted.

    A class of two or more images has at least one on either side.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = min(max(1, round(fraction * len(members))), len(members) - 1)
        test.append(members[:held_out])
        train.append(members[held_out:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def generator_for(*position: int) -> torch.Generator:
    """A generator whose stream depends on all of `position`, e.g. (seed, epoch, batch)."""
    mixed = 0
    for part in position:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63  # Knuth's MMIX multiplier
    return torch.Generator().manual_seed(mixed)


def shift(images: Tensor, by: float, generator: torch.Generator) -> Tensor:
    """Move each image [N, C, H, W] by up to `by` of its width and height, sub-pixel, repeating its border."""
    moves = (2 * torch.rand(len(images), 2, generator=generator) - 1) * (2 * by)  # the grid spans [-1, 1]
    affine = torch.eye(2, 3).repeat(len(images), 1, 1)
    affine[:, :, 2] = moves
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass
class TensorData:
    """A data set that fits in memory: images [N, C, S, S] already scaled and normalised, labels [N]."""

    classes: list[str]
    train: Batch
    test: Batch
    batch_size: int
    seed: int
    max_shift: float = 2 / 32  # two pixels of a 32-pixel image

    def __post_init__(self) -> None:
        self.in_channels = self.train[0].shape[1]
        self.train_size, self.test_size = len(self.train[1]), len(self.test[1])

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        images, labels = self.train
        order = torch.randperm(self.train_size, generator=generator_for(self.seed, epoch))
        for number, chosen in enumerate(torch.split(order, self.batch_size)):
            if number >= start:
                yield shift(images[chosen], self.max_shift, generator_for(self.seed, epoch, number)), labels[chosen]

    def test_batches(self) -> Iterator[Batch]:
        images, labels = self.test
        yield from zip(torch.split(images, self.batch_size), torch.split(labels, self.batch_size), strict=True)


def _digits(size: int, batch_size: int, seed: int, limit: int | None) -> TensorData:
    """scikit-learn's 1,797 scanned 8x8 digits, enlarged to size x size; 80 % to train on, 20 % held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RecipeError(
            "--data digits needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    scanned: Any = load_digits()
    images = torch.tensor(scanned.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], 17 grey levels
    labels = torch.tensor(scanned.target, dtype=torch.int64)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    train, test = (part[:limit] for part in _shuffled(stratified_split(labels, TEST_FRACTION, SPLIT_SEED)))
    images = (images - images[train].mean()) / images[train].std()
    return TensorData(
        [str(digit) for digit in range(10)],
        (images[train], labels[train]),
        (images[test], labels[test]),
        batch_size,
        seed,
    )


def _fake(size: int, batch_size: int, seed: int, limit: int | None) -> TensorData:
    """Made-up RGB images, one random 8x8 pattern per class under noise: for trying things out and timing."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    patterns = F.interpolate(torch.randn(10, 3, 8, 8, generator=generator), size=(size, size))

    def draw(count: int) -> Batch:
        labels = torch.randint(0, 10, (count,), generator=generator)
        return patterns[labels] + torch.randn(count, 3, size, size, generator=generator), labels

    train, test = draw(min(512, limit or 512)), draw(min(128, limit or 128))
    return TensorData([f"pattern {number}" for number in range(10)], train, test, batch_size, seed)


def _shuffled(parts: Sequence[Tensor]) -> list[Tensor]:
    """Each of `parts` in a fixed random order, so that its first few have all the classes."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    return [part[torch.randperm(len(part), generator=generator)] for part in parts]


class FolderData:
    """Images in folders named after their classes, read with torchvision.

    `root` holds train/<class>/... and val/<class>/... (or test/<class>/...), or just <class>/..., of which a fixed
    20 % are then held out. Augmented as VGG's authors did on ImageNet (arXiv 1409.1556, section 3.1) as far as today's
    usual transforms do: random resized crop and flip; tested on the central crop.
    """

    in_channels = 3

    def __init__(self, root: Path, size: int, batch_size: int, seed: int, limit: int | None, workers: int) -> None:
        try:
            from torchvision import transforms
        except ImportError as error:
            raise RecipeError(
                "--data FOLDER reads images with torchvision, which is not installed: pip install torchvision"
            ) from error
        normalise = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        centre = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
        train_root, test_root = _find_folders(root)
        train = _image_folder(train_root, transforms.Compose(augment + normalise))
        test = _image_folder(test_root, transforms.Compose(centre + normalise))
        if train.classes != test.classes:
            raise RecipeError(
                f"{test_root}: expected the same class folders as in {train_root}, {train.classes}, got {test.classes}"
            )
        if train_root == test_root:
            chosen = stratified_split(torch.tensor(train.targets), TEST_FRACTION, SPLIT_SEED)
        else:
            chosen = torch.arange(len(train)), torch.arange(len(test))
        train_indices, test_indices = (part[:limit].tolist() for part in _shuffled(chosen))
        self.classes: list[str] = train.classes
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.train_size, self.test_size = len(train_indices), len(test_indices)
        if not self.test_size:
            raise RecipeError(f"{root}: expected at least two images in some class, one to test on; got one in each")
        self._train = _SeededImages(train, train_indices, seed)
        self._test = _SeededImages(test, test_indices, seed)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(self.train_size, generator=generator_for(self.seed, epoch))
        keys = [(epoch, index) for index in order[start * self.batch_size :].tolist()]
        return self._load(self._train, keys)

    def test_batches(self) -> Iterator[Batch]:
        return self._load(self._test, [(0, index) for index in range(self.test_size)])

    def _load(self, images: "_SeededImages", keys: list[tuple[int, int]]) -> Iterator[Batch]:
        # A generator of its own: DataLoader would else draw from the global one, which a resumed run must find as it was.
        generator = torch.Generator()
        loader: Any = DataLoader(images, self.batch_size, sampler=keys, num_workers=self.workers, generator=generator)
        try:
            yield from loader
        except RecipeError as error:  # from a worker it comes wrapped in that process's traceback: keep the message
            raise RecipeError(str(error).rpartition("RecipeError: ")[2].strip()) from None


class _SeededImages(Dataset[tuple[Tensor, int]]):
    """Images of a torchvision data set by (epoch, index), augmented by a seed of their own whichever worker reads them."""

    def __init__(self, images: Any, indices: list[int], seed: int) -> None:
        self.images, self.indices, self.seed = images, indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator_for(self.seed, epoch, index).get_state())
            try:
                image, label = self.images[self.indices[index]]
            except OSError as error:  # Pillow's errors for broken image files are OSErrors
                path = self.images.samples[self.indices[index]][0]
                raise RecipeError(f"{path} cannot be read as an image ({error}): repair or remove it") from error
            return image, label


def _find_folders(root: Path) -> tuple[Path, Path]:
    """The folders of class folders to train and to test on; the same one twice where `root` has only one."""
    layout = "expected 'digits', 'fake', or a folder with train/<class>/... and val/<class>/... images, or <class>/..."
    if not root.is_dir():
        raise RecipeError(f"no data folder {root}: {layout}. Check --data")
    if not (root / "train").is_dir():
        return root, root
    for name in ("val", "test"):
        if (root / name).is_dir():
            return root / "train", root / name
    raise RecipeError(f"{root} has train/ but neither val/ nor test/: {layout}")


def _image_folder(root: Path, transform: Any) -> Any:
    """torchvision's ImageFolder; RecipeError where there is no image in it."""
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(root), transform)
    except FileNotFoundError as error:  # no class folders, or one without an image
        raise RecipeError(
            f"{root}: expected one folder of images (.jpg, .png, ...) per class, got {sorted(os.listdir(root))[:8]}: "
            f"{str(error).splitlines()[0]}"
        ) from error
