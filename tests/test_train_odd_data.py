"""Runs on data that are not quite what they should be: images too odd to use, folders that changed, losses that diverge."""

import fcntl
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import StopAt, tiny_model
from test_train_images import load_folder, write_images

from vggfast.recipes import RecipeError, pictures
from vggfast.recipes import data as datasets
from vggfast.recipes.config import TrainConfig
from vggfast.recipes.curve import printable
from vggfast.recipes.train import Trainer, fit


@pytest.fixture(autouse=True)
def _needs_torchvision():
    pytest.importorskip("torchvision")


def test_the_output_may_not_be_taken_for_a_class(tmp_path, monkeypatch):
    write_images(tmp_path / "flat", {"cat": 3, "dog": 3})
    monkeypatch.chdir(tmp_path / "flat")
    for settings in ({"data": "."}, {"data": str(tmp_path / "flat"), "output": "results"}):
        with pytest.raises(RecipeError, match=r"of which each folder is a class of images\. Choose another --output"):
            fit(TrainConfig.recipe(**settings, size=32, epochs=1), model=tiny_model(3))
    assert sorted(entry.name for entry in (tmp_path / "flat").iterdir()) == ["cat", "dog"]


def test_an_image_that_cannot_be_transformed_is_skipped_and_named(tmp_path, monkeypatch):
    """As one of 1 x 20,000 pixels, for which rescaling wants more memory than there is."""
    write_images(tmp_path, {"train/cat": 3, "train/dog": 3, "val/cat": 1, "val/dog": 1})
    Image.new("RGB", (40, 50), (1, 2, 3)).save(tmp_path / "train/cat/0.png")
    images = load_folder(tmp_path)
    transform = images._train.transform

    def short_of_memory(picture):
        if picture.getpixel((0, 0)) == (1, 2, 3):
            raise MemoryError
        return transform(picture)

    monkeypatch.setattr(images._train, "transform", short_of_memory)
    assert sum(len(labels) for _, labels in images.train_batches(0)) == 5
    assert images.unreadable == {str(tmp_path / "train/cat/0.png"): "MemoryError"}


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    write_images(tmp_path, {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    images = load_folder(tmp_path)
    assert sum(len(labels) for _, labels in images.train_batches(0)) == 4
    (name,) = images.unreadable
    assert name.endswith("pipe.png")
    assert "no regular file" in images.unreadable[name]
    with pytest.raises(pictures.Unreadable, match="no regular file"):
        pictures.read(tmp_path / "train/cat/pipe.png")
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(RecipeError, match=r"x\.tar is no file"):
        datasets.load(str(tmp_path / "x.tar"), size=32, batch_size=4, seed=0)


def test_greys_of_16_bits_keep_their_upper_8(tmp_path):
    ramp = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.asarray(pictures.read(tmp_path / "a.png")).tolist() == [[0, 0, 1, 128, 255]]
    (tmp_path / "a.pgm").write_bytes(b"P5 5 1 65535\n" + ramp.astype(">u2").tobytes())
    assert np.asarray(pictures.read(tmp_path / "a.pgm")).tolist() == [[0, 0, 1, 128, 255]]
    (tmp_path / "ten.pgm").write_bytes(b"P5 3 1 1023\n" + np.array([0, 512, 1023], dtype=">u2").tobytes())
    assert np.asarray(pictures.read(tmp_path / "ten.pgm")).tolist() == [[0, 128, 255]]  # of its 10 bits


def test_a_batch_of_unreadable_images_moves_nothing(tmp_path):
    """Neither BatchNorm's statistics nor, without momentum and decay, the weights."""
    folders = {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1}
    write_images(tmp_path / "good", folders)
    write_images(tmp_path / "mixed", folders)
    for name in ("x", "y", "z"):
        (tmp_path / "mixed/train/cat" / f"{name}.png").write_bytes(b"no image")

    def counted(data: str) -> float:
        settings = {
            "size": 32,
            "epochs": 1,
            "batch_size": 1,
            "augment": "none",
            "output": str(tmp_path / f"out-{data}"),
        }
        result = fit(TrainConfig.recipe(str(tmp_path / data), **settings), model=tiny_model(3))
        (count,) = {value.item() for key, value in result.model.state_dict().items() if key.endswith("batches_tracked")}
        return count

    assert counted("good") == counted("mixed") == 4


def test_an_unreadable_image_counts_as_one_without_a_gradient(tmp_path):
    """Whichever process or piece it falls to, no other image's part in the step changes."""
    config = TrainConfig.recipe(
        "fake", output=str(tmp_path), limit=4, batch_size=4, epochs=1, lr=0.5, weight_decay=0, warm_up=0
    )
    data = datasets.load("fake", size=32, batch_size=4, seed=0, limit=4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10, bias=False))
    before = model[1].weight.detach().clone().requires_grad_()
    ((images, labels),) = data.train_batches(0)
    trainer = Trainer(config, data, torch.device("cpu"), model)
    trainer.train_step(iter([(images[:3], labels[:3])]))
    loss = torch.nn.functional.cross_entropy(images[:3].flatten(1) @ before.T, labels[:3], reduction="sum")
    (gradient,) = torch.autograd.grad(loss / 4, before)
    torch.testing.assert_close(model[1].weight, before - 0.5 * gradient)
    assert trainer.sums.tolist() == pytest.approx([loss.item(), trainer.sums[1].item(), 3, 1])


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    write_images(tmp_path / "data", {"train/cat": 4, "train/dog": 4, "val/cat": 1, "val/dog": 1})
    settings = {"size": 32, "epochs": 2, "batch_size": 4, "output": str(tmp_path / "out")}
    config = TrainConfig.recipe(str(tmp_path / "data"), **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(config, model=tiny_model(3), listener=StopAt(1, 1))
    (tmp_path / "data/train/cat/0.png").rename(tmp_path / "0.png")
    with pytest.raises(RecipeError, match="written with other data: training images: 8, now 7"):
        fit(config, resume=True, model=tiny_model(3))
    (tmp_path / "0.png").rename(tmp_path / "data/train/cat/0.png")
    (tmp_path / "data/train/cat").rename(tmp_path / "data/train/elk")
    (tmp_path / "data/val/cat").rename(tmp_path / "data/val/elk")
    with pytest.raises(RecipeError, match=r"classes: \['cat', 'dog'\], now \['dog', 'elk'\]"):
        fit(config, resume=True, model=tiny_model(3))


def test_divergence_in_the_last_step_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"the loss .*training diverged\. Use an --lr below 1e\+20"):
        fit(
            TrainConfig.recipe("fake", limit=8, batch_size=8, epochs=1, lr=1e20, warm_up=0.0, output=str(tmp_path)),
            model=tiny_model(3),
        )
    assert not (tmp_path / "model.safetensors").exists()


def test_names_that_are_no_utf_8_are_shown_in_ascii(tmp_path):
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\udce9.png"
    write_images(tmp_path / "data", {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    (tmp_path / "data/train/cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no image")
    script = (
        "import sys; from test_train import tiny_model; from vggfast import cli; from vggfast.recipes import train; "
    )
    script += "train.build_model = lambda name, data: tiny_model(3); cli.main()"
    command = [
        sys.executable,
        "-c",
        script,
        "train",
        "--data",
        "data",
        "--size",
        "32",
        "--epochs",
        "1",
        "--batch-size",
        "4",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": os.pathsep.join([*sys.path])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9.png cannot be read as an image" in done.stdout.replace("\n", "")


def test_two_runs_do_not_share_a_folder(tmp_path):
    config = TrainConfig.recipe("fake", limit=8, batch_size=8, epochs=1, output=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    folder = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as a run has it that is under way
    with pytest.raises(RecipeError, match="another run is writing there"):
        fit(config, model=tiny_model(3))
    os.close(folder)
    fit(config, model=tiny_model(3))
    fit(config, overwrite=True, model=tiny_model(3))
