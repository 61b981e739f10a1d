"""Training on images in folders and in shards: what is read, in which order, changed how, and what cannot be read."""

import os
import sys
from pathlib import Path

import pytest
import torch
from test_train import StopAt, assert_same_weights, tiny_model

from vggfast.recipes import RecipeError
from vggfast.recipes import data as datasets
from vggfast.recipes.config import TrainConfig
from vggfast.recipes.train import Result, fit

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
    assert_same_weights(run("whole").weights, run("half", resume=True).weights)


def test_a_folder_without_train_is_split(tmp_path):
    pytest.importorskip("torchvision")
    write_images(tmp_path, {"cat": 10, "dog": 5})
    data = load_folder(tmp_path)
    assert (data.train_size, data.test_size) == (12, 3)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (None, "no data folder .*expected 'digits', 'fake', or a folder"),
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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tmp_path, workers):
    pytest.importorskip("torchvision")
    write_images(tmp_path, {"train/cat": 1, "val/cat": 1})
    broken = tmp_path / "train" / "cat" / "0.png"
    os.truncate(broken, 30)
    with pytest.raises(RecipeError) as caught:
        list(load_folder(tmp_path, workers).train_batches(0))
    assert str(caught.value).startswith(f"{broken} cannot be read as an image (")
    assert "\n" not in str(caught.value)


def test_a_folder_without_torchvision_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RecipeError, match="which is not installed: pip install torchvision"):
        load_folder(tmp_path)
