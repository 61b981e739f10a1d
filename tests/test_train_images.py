"""Training on images in folders and in shards: what is read, in which order, changed how, and what cannot be read."""

import gzip
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_train import StopAt, assert_same_weights, tiny_model

from vggfast.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vggfast.recipes import RecipeError, shards, transforms
from vggfast.recipes import data as datasets
from vggfast.recipes.config import TrainConfig
from vggfast.recipes.train import Listener, Result, fit

# ---- folders of images ---------------------------------------------------------------------------------------------


def write_images(root: Path, folders: dict[str, int]) -> None:
    """PNGs of random colours: {"train/cat": 3} makes train/cat/0.png ... 2.png under `root`."""
    from PIL import Image

    for folder, count in folders.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / folder / f"{number}.png")


def load_folder(root: Path, workers: int = 0) -> datasets.Data:
    return datasets.load(str(root), size=32, batch_size=4, seed=0, workers=workers)


def test_a_folder_is_read_the_same_by_workers_and_from_the_middle(tmp_path):
    pytest.importorskip("torchvision")
    write_images(tmp_path, {"train/cat": 6, "train/dog": 5, "val/cat": 2, "val/dog": 1})
    data = load_folder(tmp_path)
    assert (data.classes, data.train_size, data.test_size) == (["cat", "dog"], 11, 3)
    whole = list(data.train_batches(1))
    assert [tuple(images.shape) for images, _ in whole] == [(4, 3, 32, 32), (4, 3, 32, 32), (3, 3, 32, 32)]
    state = torch.get_rng_state()
    for got, expected in zip(load_folder(tmp_path, workers=2).train_batches(1, start=1), whole[1:], strict=True):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert torch.equal(torch.get_rng_state(), state)  # data never draw from the generator that dropout uses


def test_a_model_trains_on_a_folder_and_resumes(tmp_path):
    pytest.importorskip("torchvision")
    write_images(tmp_path / "data", {"train/cat": 6, "train/dog": 5, "val/cat": 2, "val/dog": 1})
    settings = {"size": 32, "epochs": 2, "batch_size": 4, "save_every": 1, "workers": 1}

    def run(name: str, **options) -> Result:
        config = TrainConfig.recipe(str(tmp_path / "data"), output=str(tmp_path / name), **settings)
        return fit(config, model=tiny_model(3), **options)

    with pytest.raises(KeyboardInterrupt):
        run("half", listener=StopAt(1, 2))
    whole = run("whole")
    assert_same_weights(whole.weights, run("half", resume=True).weights)
    with safe_open(whole.weights, "pt") as file:
        preprocessing = json.loads(file.metadata()["preprocessing"])
    assert (preprocessing["size"], tuple(preprocessing["mean"]), tuple(preprocessing["std"])) == (
        32, IMAGENET_MEAN, IMAGENET_STD,
    )  # fmt: skip


def test_a_folder_without_train_is_split(tmp_path):
    pytest.importorskip("torchvision")
    write_images(tmp_path, {"cat": 10, "dog": 5})
    data = load_folder(tmp_path)
    assert (data.train_size, data.test_size) == (12, 3)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (None, "no data folder .*expected 'digits', 'mnist', 'fake', a folder"),
        ({}, "expected one folder of images .* per class, got \\[\\]"),
        ({"cat": 0}, "expected one folder of images .* per class, got \\['cat'\\]"),
        ({"train/cat": 1}, "has train/ but neither val/ nor test/"),
        ({"train/cat": 1, "val/dog": 1}, r"expected the same class folders as in .*\['cat'\], got \['dog'\]"),
        ({"cat": 1}, "expected at least two images in some class"),
    ],
)
def test_a_folder_that_is_no_data_set_is_reported(tmp_path, folders, message):
    pytest.importorskip("torchvision")
    if folders is not None:
        (tmp_path / "data").mkdir()
        write_images(tmp_path / "data", folders)
    with pytest.raises(RecipeError, match=message):
        load_folder(tmp_path / "data")


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_once_skipped_and_counted(tmp_path, workers):
    pytest.importorskip("torchvision")
    write_images(tmp_path / "data", {"train/cat": 6, "train/dog": 6, "val/cat": 3, "val/dog": 1})
    broken = [tmp_path / "data" / name for name in ("train/cat/0.png", "train/dog/3.png", "val/cat/1.png")]
    os.truncate(broken[0], 30)
    broken[1].write_bytes(b"")
    broken[2].write_text("no image")
    config = TrainConfig.recipe(
        str(tmp_path / "data"), output=str(tmp_path / "run"), size=32, epochs=2, batch_size=4, workers=workers
    )
    listener = Notes()
    result = fit(config, model=tiny_model(3), listener=listener)
    named = [note.partition(" cannot be read as an image and is skipped (")[0] for note in listener.notes]
    assert sorted(named) == sorted(map(str, broken))
    assert [row.unreadable for row in result.history] == [3, 3]
    assert result.metrics.read_text().splitlines()[1].endswith(",3")
    assert round(result.test_accuracy * 3, 6) in (0, 1, 2, 3)  # of the three that can be read


def test_a_library_user_is_warned_of_an_unreadable_image(tmp_path):
    pytest.importorskip("torchvision")
    write_images(tmp_path / "data", {"train/cat": 3, "val/cat": 1})
    (tmp_path / "data" / "train" / "cat" / "0.png").write_text("no image")
    config = TrainConfig.recipe(str(tmp_path / "data"), output=str(tmp_path / "run"), size=32, epochs=1)
    with pytest.warns(UserWarning, match=r"0\.png cannot be read as an image and is skipped"):
        fit(config, model=tiny_model(3))


def test_a_batch_without_a_readable_image_changes_nothing_and_a_folder_without_one_is_reported(tmp_path):
    pytest.importorskip("torchvision")
    write_images(tmp_path / "data", {"train/cat": 3, "val/cat": 1})
    for number in range(3):
        (tmp_path / "data" / "train" / "cat" / f"{number}.png").write_text("no image")
    config = TrainConfig.recipe(
        str(tmp_path / "data"), output=str(tmp_path / "run"), size=32, epochs=1, weight_decay=0, batch_size=2
    )
    model = tiny_model(3)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(
        RecipeError, match=r"none of the images to train on could be read: .*\.png: in no format that Pillow"
    ):
        fit(config, model=model, listener=Notes())
    assert all(map(torch.equal, model.parameters(), before))


def test_a_folder_without_torchvision_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RecipeError, match="which is not installed: pip install torchvision"):
        load_folder(tmp_path)


# ---- shards --------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, pattern: str, labels: list[int], per_shard: int = 4) -> list[str]:
    """Samples of these classes in shards made by webdataset, the package itself; their names, in order."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / pattern), maxcount=per_shard, verbose=0) as writer:
        for number, label in enumerate(labels):
            pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
            writer.write({"__key__": f"sample{number:03}", "png": pixels, "cls": label, "json": {"width": 50}})
    return [f"sample{number:03}.png" for number in range(len(labels))]


def test_shards_of_webdataset_are_read_the_same_by_workers_and_from_the_middle(tmp_path):
    pytest.importorskip("torchvision")
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    names = write_shards(tmp_path, "a-%03d.tar", labels)
    write_shards(tmp_path / "held-out", "b-%03d.tar", [3, 2, 1])
    samples = shards.read_index(shards.find(str(tmp_path / "a-{000..002}.tar")))
    assert [sample.name for sample in samples] == names
    assert [int(sample.label) for sample in samples] == labels
    assert samples == shards.read_index(shards.find(str(tmp_path)))

    from webdataset import WebDataset

    theirs = [sample["png"] for sample in WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False)]
    assert [sample.read() for sample in samples] == theirs

    settings = {"size": 32, "batch_size": 4, "seed": 0, "val": str(tmp_path / "held-out")}
    data = datasets.load(str(tmp_path / "a-{000..002}.tar"), **settings)
    assert (data.classes, data.train_size, data.test_size) == (["0", "1", "2", "3"], 10, 3)
    whole = list(data.train_batches(1))
    assert sorted(torch.cat([labels for _, labels in whole]).tolist()) == sorted(labels)
    for got, expected in zip(
        datasets.load(str(tmp_path), workers=2, **settings).train_batches(1, 1), whole[1:], strict=True
    ):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_a_run_on_shards_resumes_and_skips_what_cannot_be_read(tmp_path):
    pytest.importorskip("torchvision")
    write_shards(tmp_path / "data" / "train", "%03d.tar", [0, 1] * 6)
    write_shards(tmp_path / "data" / "val", "%03d.tar", [0, 1])
    shard = tmp_path / "data" / "train" / "001.tar"
    sample = shards.read_index([shard])[0]
    content = bytearray(shard.read_bytes())
    content[sample.offset : sample.offset + 20] = bytes(20)
    shard.write_bytes(content)

    def run(name: str, listener: Listener, **options) -> Result:
        settings = {"size": 32, "epochs": 2, "batch_size": 4, "save_every": 1}
        config = TrainConfig.recipe(str(tmp_path / "data"), output=str(tmp_path / name), **settings)
        return fit(config, model=tiny_model(3), listener=listener, **options)

    stopping = StopAt(1, 2)
    stopping.note = lambda text: None
    with pytest.raises(KeyboardInterrupt):
        run("half", stopping)
    listener = Notes()
    whole = run("whole", listener)
    assert [note.split(" cannot")[0] for note in listener.notes] == [f"{shard}:{sample.name}"]
    resumed = run("half", Notes(), resume=True)
    assert_same_weights(whole.weights, resumed.weights)
    assert [row.unreadable for row in resumed.history] == [1, 1]


def test_braces_stand_for_what_a_shell_makes_of_them():
    assert shards.expand("a/{08..10}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar"]
    assert shards.expand("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    with pytest.raises(RecipeError, match=r"expected two numbers in braces, as \{000\.\.003\}, got \{3\.\.1\}"):
        shards.expand("{3..1}.tar")


def test_shards_that_are_no_data_set_are_reported(tmp_path):
    pytest.importorskip("torchvision")
    write_shards(tmp_path, "%03d.tar", [0, 1, 0, 1, 0, 1])

    def load(data: object, **settings) -> None:
        datasets.load(str(data), size=32, batch_size=4, seed=0, **settings)

    with pytest.raises(RecipeError, match=r"expected 4 shards, .*002\.tar is not there"):
        load(tmp_path / "{000..003}.tar")
    write_shards(tmp_path / "other", "%03d.tar", [0, 7])
    with pytest.raises(RecipeError, match=r"000\.tar:sample001\.png is of class '7': expected the classes 0, 1 of "):
        load(tmp_path, val=str(tmp_path / "other"))
    with tarfile.open(tmp_path / "other" / "empty.tar", "w"):
        pass
    with pytest.raises(RecipeError, match=r"empty\.tar: expected pairs of files as 000017\.jpg and 000017\.cls"):
        load(tmp_path / "other" / "empty.tar")
    whole = (tmp_path / "000.tar").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("packed", gzip.compress(whole))):
        (tmp_path / "other" / f"{name}.tar").write_bytes(content)
        with pytest.raises(RecipeError, match=rf"{name}\.tar cannot be read as a shard \(.*uncompressed tar file"):
            load(tmp_path / "other" / f"{name}.tar")


# ---- what becomes of an image ----------------------------------------------------------------------------------------


def ramp(width: int, height: int):
    """An image whose red grows from left to right, green from top to bottom, and whose blue is 128."""
    from PIL import Image

    red = torch.linspace(0, 255, width).round().expand(height, width)
    green = torch.linspace(0, 255, height).round()[:, None].expand(height, width)
    return Image.fromarray(torch.stack([red, green, torch.full_like(red, 128)], 2).to(torch.uint8).numpy())


def denormalised(image: torch.Tensor) -> torch.Tensor:
    return image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]


def test_the_papers_augmentation_has_the_papers_distributions():
    """Scale, position, mirroring and colour of 300 crops, read off an image that shows where each pixel was."""
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    train, _ = transforms.build("paper", 32, (40, 80))
    picture = ramp(256, 256)
    crops = torch.stack([denormalised(train(picture)) for _ in range(300)])
    assert crops.shape == (300, 3, 32, 32)
    slope = (crops[:, 0, :, 28] - crops[:, 0, :, 3]).mean(1) / 25  # of red, for each pixel: 1 / scale
    scale = 1 / slope.abs()
    assert 39 < scale.min() < 42 < 78 < scale.max() < 82
    assert scale.std() > 10  # uniform on [40, 80]: 11.8
    assert 0.4 < (slope < 0).float().mean() < 0.6  # mirrored
    assert ((crops[:, 1, 28] - crops[:, 1, 3]).mean(1) > 0).all()  # never upside down
    for axis, middle in ((0, crops[:, 0].mean((1, 2))), (1, crops[:, 1].mean((1, 2)))):
        room = (1 - 32 / scale) / 2  # how far the middle of the crop may be from the image's
        place = (middle - 0.5) / room.clamp(min=0.05)
        assert place[scale > 60].std() > 0.45, axis  # uniform on [-1, 1]: 0.58
        assert (middle - 0.5).abs().max() < room.max() + 0.06
    blue = crops[:, 2] - 128 / 255
    assert (blue - blue.mean((1, 2), keepdim=True)).abs().max() < 1e-5  # one colour for a whole image
    components, deviations = torch.tensor(transforms.COLOUR_COMPONENTS), torch.tensor(transforms.COLOUR_DEVIATIONS)
    expected = 0.1 * (components[2] * deviations).norm()
    assert 0.85 < blue.mean((1, 2)).std() / expected < 1.15


def test_a_fixed_scale_is_that_scale_and_held_out_images_are_central():
    pytest.importorskip("torchvision")
    train, test = transforms.build("paper", 32, (64, 64))
    crops = torch.stack([denormalised(train(ramp(256, 256))) for _ in range(10)])
    slope = (crops[:, 0, :, 28] - crops[:, 0, :, 3]).mean(1) / 25
    torch.testing.assert_close(1 / slope.abs(), torch.full((10,), 64.0), atol=1, rtol=0)
    held_out = denormalised(test(ramp(300, 200)))
    torch.testing.assert_close(held_out[:2].mean((1, 2)), torch.full((2,), 0.5), atol=0.02, rtol=0)
    assert torch.equal(test(ramp(300, 200)), test(ramp(300, 200)))


def test_the_modern_augmentation_differs_from_image_to_image_and_none_does_not():
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    picture = ramp(64, 48)
    modern, _ = transforms.build("modern", 32, (36, 73))
    images = [modern(picture) for _ in range(4)]
    assert all(image.shape == (3, 32, 32) for image in images)
    assert not torch.equal(images[0], images[1])
    none, test = transforms.build("none", 32, (36, 73))
    assert torch.equal(none(picture), test(picture))


def test_an_augmentation_of_other_data_is_reported(tmp_path):
    with pytest.raises(RecipeError, match=r"augment: expected one of none, paper, modern for --data .*, got 'shift'"):
        datasets.load(str(tmp_path), size=32, batch_size=4, seed=0, augment="shift")
    with pytest.raises(
        RecipeError, match="augment: expected one of none, shift, affine for --data digits, got 'paper'"
    ):
        datasets.load("digits", size=32, batch_size=4, seed=0, augment="paper")
