"""What training is fed with: the built-in data's values, each image's own draws, and dropout's, by seed, epoch and place."""

import contextlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import StopAt
from test_train_images import denormalised, ramp
from torch import nn

from vggfast.recipes import data as datasets
from vggfast.recipes import pictures, shards, transforms
from vggfast.recipes.config import TrainConfig
from vggfast.recipes.train import Listener, fit


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_digits_are_split_once_and_for_all_with_every_class_on_both_sides():
    a = datasets.load("digits", size=32, batch_size=64, seed=0)
    b = datasets.load("digits", size=32, batch_size=64, seed=1)
    assert torch.equal(a.test[0], b.test[0])
    assert a.train_size + a.test_size == 1797
    assert a.train[0].shape == (a.train_size, 1, 32, 32)
    assert a.in_channels == 1
    share = a.test[1].bincount() / (a.train[1].bincount() + a.test[1].bincount())
    assert torch.all((share - 0.2).abs() < 0.01)
    assert abs(a.train[0].mean()) < 1e-5
    assert abs(a.train[0].std() - 1) < 1e-5


def test_stratified_split_is_a_partition_and_leaves_single_images_to_training():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2])
    train, test = datasets.stratified_split(labels, 0.2, seed=3)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(13))
    assert labels[test].bincount(minlength=3).tolist() == [2, 1, 0]


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_an_epoch_started_in_the_middle_is_the_tail_of_the_whole(name):
    data = datasets.load(name, size=32, batch_size=32, seed=5, limit=100)
    whole, tail = list(data.train_batches(2)), list(data.train_batches(2, start=2))
    assert [len(labels) for _, labels in whole] == [32, 32, 32, 4]
    assert len(tail) == 2
    for (images, labels), (tail_images, tail_labels) in zip(whole[2:], tail, strict=True):
        assert torch.equal(images, tail_images)
        assert torch.equal(labels, tail_labels)
    other = next(data.train_batches(3))
    assert not torch.equal(whole[0][1], other[1])


def test_shift_moves_each_image_by_less_than_its_bound_and_repeats_the_border():
    images = torch.arange(32.0).repeat(50, 1, 32, 1)  # the value is the column
    moved = datasets.shift(images, 2 / 32, torch.Generator().manual_seed(0))
    offsets = moved[:, 0, 16, 16] - 16
    assert offsets.abs().max() <= 2
    assert offsets.min() < -1
    assert offsets.max() > 1
    assert moved.min() >= 0
    assert moved.max() <= 31
    torch.testing.assert_close(datasets.shift(images, 0.0, torch.Generator()), images)


def test_mnist_is_5000_real_images_of_which_the_same_1000_are_held_out():
    data, other = (datasets.load("mnist", size=32, batch_size=64, seed=seed, augment="affine") for seed in (0, 1))
    assert data.train[0].shape == (4000, 1, 32, 32)
    assert data.test[1].bincount().tolist() == [100] * 10
    assert torch.equal(data.test[0], other.test[0])
    assert (data.train[0][:, :, :2] == data.train[0].min()).all()  # the padding
    seen = {image.numpy().tobytes() for image in data.train[0]}
    assert sum(image.numpy().tobytes() in seen for image in data.test[0]) <= 1  # held out from training


def test_affine_turns_enlarges_and_moves_and_does_nothing_where_its_bounds_are_zero():
    images = torch.linspace(-1, 1, 33).repeat(200, 1, 33, 1)  # the value is x on the grid, which spans [-1, 1]
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(datasets.affine(images, 0, 0, 0, generator), images)
    changed = datasets.affine(images, 0, 30, 0.2, generator)[:, 0]
    along = (changed[:, 16, 20] - changed[:, 16, 12]) / (images[0, 0, 16, 20] - images[0, 0, 16, 12])
    across = (changed[:, 20, 16] - changed[:, 12, 16]) / (images[0, 0, 16, 20] - images[0, 0, 16, 12])
    degrees = torch.atan2(-across, along).rad2deg()
    zoom = torch.hypot(along, across)
    assert -30 < degrees.min() < -28 < 28 < degrees.max() < 30
    assert 0.8 < zoom.min() < 0.82 < 1.18 < zoom.max() < 1.2
    moved = datasets.affine(images, 2 / 32, 0, 0, generator)[:, 0, 16, 16]
    assert (
        0.12 < moved.abs().max() <= 4 / 32 * 33 / 32 + 1e-6
    )  # two of 32 pixels, where the value grows by 2 in 32 of 33


def test_limit_keeps_every_class():
    data = datasets.load("digits", size=32, batch_size=8, seed=0, limit=60)
    assert (data.train_size, data.test_size) == (60, 60)
    assert len(data.train[1].unique()) == len(data.test[1].unique()) == 10


def test_digits_have_their_17_greys_from_0_to_1():
    pixels = datasets.load("digits", size=64, batch_size=8, seed=0).pixels
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_mnist_is_in_the_middle_of_its_padding():
    images = datasets.load("mnist", size=32, batch_size=8, seed=0).pixels
    drawn = images.sum((0, 1)) > 0
    for lengths in (drawn.any(0), drawn.any(1)):
        assert not lengths[:2].any()
        assert not lengths[-2:].any()
        assert lengths[4:-4].all()
    assert images.max() == 1


def test_images_are_normalised_by_the_training_images_alone():
    data = datasets.load("digits", size=32, batch_size=8, seed=0, limit=20)
    assert data.train[0].mean() == pytest.approx(0, abs=1e-5)
    assert data.train[0].std() == pytest.approx(1, abs=1e-5)


def test_each_image_is_moved_turned_and_enlarged_by_draws_of_its_own():
    """On an image whose value is x on the grid: in its middle the value is the move, and its slopes are angle and zoom."""
    x = torch.linspace(-1, 1, 33)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for plane in (x.expand(33, 33), x[:, None].expand(33, 33)):
        images = plane.expand(400, 1, 33, 33).contiguous()
        changed = datasets.TENSOR_AUGMENTATIONS["affine"](images, generator.manual_seed(0))[:, 0]
        draws += [
            changed[:, 16, 16],
            (changed[:, 16, 20] - changed[:, 16, 12]) * 2,
            (changed[:, 20, 16] - changed[:, 12, 16]) * 2,
        ]
    across, cosine, other_sine, down, sine, other_cosine = draws
    torch.testing.assert_close(cosine, other_cosine, atol=1e-5, rtol=0)  # turned, not sheared
    torch.testing.assert_close(sine, -other_sine, atol=1e-5, rtol=0)
    angle, zoom = torch.atan2(sine, cosine).rad2deg(), torch.hypot(cosine, sine)
    assert 11.5 < angle.abs().max() < 12.01
    assert 0.09 < (zoom - 1).abs().max() < 0.101
    bound = 2 * datasets.MAX_SHIFT
    assert 0.95 * bound < across.abs().max() < 1.1 * bound
    assert 0.95 * bound < down.abs().max() < 1.1 * bound
    correlation = torch.corrcoef(torch.stack([across, down, angle, zoom]))
    assert (correlation - torch.eye(4)).abs().max() < 0.2
    shifted = datasets.TENSOR_AUGMENTATIONS["shift"](images, generator.manual_seed(0))[:, 0, 16, 16]
    assert shifted.unique().numel() == 400
    assert 0.95 * bound < shifted.abs().max() < 1.1 * bound


def test_the_order_and_the_changes_of_images_are_those_of_the_seed_the_epoch_and_the_batch():
    def fed(seed: int, epoch: int, start: int = 0) -> tuple[list[float], list[float]]:
        """What tells the images of an epoch apart, in their order, and what was drawn for each batch."""
        data = datasets.load("digits", size=32, batch_size=8, seed=seed, limit=16)
        draws: list[float] = []
        data.augment = lambda images, generator: draws.append(torch.rand(1, generator=generator).item()) or images
        return [
            value for images, _ in data.train_batches(epoch, start) for value in images.flatten(1).sum(1).tolist()
        ], draws

    cases = [fed(*case) for case in ((0, 0), (0, 1), (1, 0))]
    assert len({draw for _, draws in cases for draw in draws}) == 6
    assert len({tuple(images) for images, _ in cases}) == 3
    assert len({tuple(sorted(images)) for images, _ in cases}) == 1
    assert fed(0, 1, start=1) == (cases[1][0][8:], cases[1][1][1:])


def test_an_image_of_a_folder_is_changed_by_its_seed_epoch_and_place(tmp_path):
    pytest.importorskip("torchvision")
    for part in ("train/a", "val/a"):
        (tmp_path / part).mkdir(parents=True)
        for number in range(3):
            ramp(60, 50).save(tmp_path / part / f"{number}.png")

    def batch(seed: int, epoch: int) -> list[torch.Tensor]:
        data = datasets.load(str(tmp_path), size=32, batch_size=3, seed=seed)
        return [*next(data.train_batches(epoch))[0]]

    images = [*batch(0, 0), *batch(0, 1), *batch(1, 0)]
    for index, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:index])
    held_out = next(datasets.load(str(tmp_path), size=32, batch_size=3, seed=0).test_batches())[0]
    assert torch.equal(held_out[0], held_out[1])  # the central crop


def test_held_out_images_elsewhere_take_the_place_of_those_beside_the_training_images(tmp_path):
    pytest.importorskip("torchvision")
    for part, count in (("data/train/a", 2), ("data/val/a", 1), ("data/test/a", 4), ("other/a", 3)):
        (tmp_path / part).mkdir(parents=True)
        for number in range(count):
            ramp(60, 50).save(tmp_path / part / f"{number}.png")
    sizes = [
        datasets.load(str(tmp_path / "data"), size=32, batch_size=2, seed=0, val=val, limit=limit).test_size
        for val, limit in ((None, None), (str(tmp_path / "other"), None), (str(tmp_path / "other"), 2))
    ]
    assert sizes == [1, 3, 2]


def test_the_modern_augmentation_crops_mirrors_and_passes_each_image_on(monkeypatch):
    pytest.importorskip("torchvision")
    from torchvision.transforms import v2

    passed: list[tuple[int, int]] = []
    monkeypatch.setattr(v2, "TrivialAugmentWide", lambda: lambda picture: passed.append(picture.size) or picture)
    torch.manual_seed(0)
    train, _ = transforms.build("modern", 32, (36, 73))
    crops = torch.stack([denormalised(train(ramp(256, 256))) for _ in range(200)])
    assert passed == [(32, 32)] * 200
    across = (crops[:, 0, :, 28] - crops[:, 0, :, 3]).mean(1) / 25 * 32  # of the image's width
    down = (crops[:, 1, 28] - crops[:, 1, 3]).mean(1) / 25 * 32
    assert 0.4 < (across < 0).float().mean() < 0.6  # mirrored
    assert (down > 0).all()  # never upside down
    area, shape = across.abs() * down, across.abs() / down
    assert 0.07 < area.min() < 0.12 < 0.9 < area.max() < 1.05
    assert 0.7 < shape.min() < 0.8 < 1.25 < shape.max() < 1.4


def test_shards_with_names_have_sorted_classes_and_other_letters(tmp_path):
    """Names that only look like numbers are names where one of them does not; suffixes may be in capitals."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, label in (
            ("x/1.seg.PNG", b""),
            ("x/1.PNG", b""),
            ("x/1.cls", b"red"),
            ("x/2.PNG", b""),  # without a class
            ("y/2.cls", b"red"),  # without an image
            ("y/1.cls", b"007"),
            ("y/1.PNG", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(label)
            tar.addfile(member, io.BytesIO(label))
    samples = shards.read_index([tmp_path / "a.tar"])
    classes = shards.classes_of(samples)
    assert [sample.name for sample in samples] == ["x/1.PNG", "y/1.PNG"]
    assert classes == ["007", "red"]
    assert shards.targets(samples, classes, "a.tar") == [1, 0]


class Masks(nn.Module):
    """Dropout of two kinds, and what each dropped in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fixed, self.drawn = nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Dropout2d()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        fixed, drawn = self.fixed(x), self.drawn(torch.ones_like(x))
        if self.training:
            self.seen.append((fixed == 0, drawn == 0))
        return (fixed * drawn).mean((2, 3)).repeat(1, 3)[:, :10]


def test_dropout_is_of_its_seed_epoch_and_step_also_in_a_resumed_run(tmp_path):
    def masks(name: str, seed: int, listener: Listener | None = None, resume: bool = False):
        settings = {"epochs": 2, "limit": 16, "batch_size": 8, "seed": seed, "save_every": 1, "device": "cpu"}
        model = Masks()
        config = TrainConfig.recipe("fake", output=str(tmp_path / name), **settings)
        with contextlib.suppress(KeyboardInterrupt):
            fit(config, model=model, listener=listener, resume=resume)
        return model.seen

    whole, other = masks("a", 0), masks("b", 1)
    for kind in (0, 1):
        seen = [step[kind] for step in (*whole, *other)]
        assert len(seen) == 8
        for index, mask in enumerate(seen):
            assert not any(torch.equal(mask, before) for before in seen[:index])
    masks("c", 0, StopAt(1, 1))
    resumed = masks("c", 0, resume=True)
    assert all(torch.equal(a, b) for step in zip(resumed, whole[2:], strict=True) for a, b in zip(*step, strict=True))


def test_palettes_alpha_and_cmyk_are_read_as_rgb_and_a_picture_of_16_bits_is_turned_upright(tmp_path):
    red = Image.new("RGB", (4, 6), (255, 0, 0))
    for mode, suffix in (("P", "png"), ("RGBA", "png"), ("CMYK", "tif")):
        red.convert(mode).save(tmp_path / f"{mode}.{suffix}")
        read = pictures.read(tmp_path / f"{mode}.{suffix}")
        assert read.mode == "RGB"
        assert read.getpixel((0, 0))[0] > 240 > 20 > read.getpixel((0, 0))[1], mode
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for name in ("wide.png", "wide.tif"):
        Image.fromarray(np.zeros((4, 6), dtype=np.uint16)).save(tmp_path / name, exif=exif)
        assert pictures.read(tmp_path / name).size == (4, 6)
    Image.fromarray(np.full((4, 6), 200, dtype=np.int32)).save(tmp_path / "deep.tif")
    assert pictures.read(tmp_path / "deep.tif").getpixel((0, 0)) == (200, 200, 200)
