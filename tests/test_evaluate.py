"""Evaluation, and the commands evaluate and predict: labelled images in folders and shards, counts, and what is said."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_vgg import narrow_vgg
from test_cli import assert_one_message, run
from torch import nn

import vggfast
from vggfast.loading import LoadedModel
from vggfast.preprocessing import Normalisation
from vggfast.recipes import RecipeError
from vggfast.recipes import data as datasets
from vggfast.recipes import train as training
from vggfast.recipes.evaluate import Labelled, Sample, evaluate, find
from vggfast.recipes.predict import open_model
from vggfast.recipes.views import Views

Image = pytest.importorskip("PIL.Image")
COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 40, 30)}


class Colours(nn.Module):
    """Scores that say which of red, green and blue there is most of; a model for whose answers no training is needed."""

    def __init__(self, order=("red", "green", "blue")):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        rgb = {"red": 0, "green": 1, "blue": 2}
        self.conv.weight.data = torch.eye(3)[[rgb[name] for name in order]].view(3, 3, 1, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.fixture
def folder(tmp_path):
    """Three classes, four images of each; one image of "green" is red, and two files are no images."""
    for name, colour in COLOURS.items():
        place = tmp_path / "data" / name
        place.mkdir(parents=True)
        for number in range(4):
            shown = COLOURS["red"] if (name, number) == ("green", 3) else colour
            Image.new("RGB", (50 + 5 * number, 40), shown).save(place / f"{number}.png")
    (tmp_path / "data" / "red" / "broken.jpg").write_bytes(b"no image")
    whole = (tmp_path / "data" / "blue" / "0.png").read_bytes()
    (tmp_path / "data" / "blue" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "blue" / "notes.txt").write_text("not an image, and not looked at")
    return tmp_path / "data"


def colours(classes=("red", "green", "blue")):
    return LoadedModel(
        Colours(), list(classes) if classes else None, Normalisation(), True, 32, 3, "torchvision", "here"
    )  # type: ignore[arg-type]


def test_a_folder_is_counted_by_the_names_of_its_classes(folder):
    seen = []
    result = evaluate([colours()], str(folder), Views(32), batch_size=3, listener=lambda r: seen.append(r.images))
    assert (result.images, result.correct) == (12, {1: 11})
    assert result.accuracy(1) == 11 / 12
    assert result.error(1) == pytest.approx(1 / 12)
    assert [re.sub(r"^.*?/data/(\S+) .*", r"\1", text) for text in result.unreadable] == [
        "blue/cut.png",
        "red/broken.jpg",
    ]
    assert "cannot be read as an image (" in result.unreadable[0]
    assert seen == sorted(seen)
    assert seen[-1] == 12
    data = result.to_dict()
    assert data["top1_accuracy"] == 11 / 12
    assert len(data["unreadable"]) == 2
    assert json.dumps(data)


def test_names_unknown_or_others(folder):
    by_order = evaluate([Colours(("blue", "green", "red"))], str(folder), Views(32))  # the folders' order
    assert by_order.correct == {1: 11}
    others = evaluate([colours(("n1", "n2", "n3"))], str(folder), Views(32))
    assert others.correct == {1: 3}  # only green keeps its place
    assert "other names than the model's" in others.notes[0]
    with pytest.raises(RecipeError, match=r"has 3 classes \(blue, green, red, …\), the model 7"):
        evaluate([narrow_vgg()], str(folder), Views(32))


def test_top_k_counts_the_k_likeliest_and_the_first_of_equals():
    class Fixed(nn.Module):
        def __init__(self, scores):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.scores = torch.tensor(scores)

        def forward(self, x):
            return self.scores.expand(len(x), -1)

    image = torch.rand(3, 32, 32)
    data = Labelled("made up", list("abcdefg"), [Sample(f"{label}", label, lambda: image) for label in range(7)])
    scores = [0.0, 3.0, 1.0, 2.0, 6.0, 5.0, 4.0]  # 4, 5, 6, 1, 3, 2, 0
    result = evaluate([Fixed(scores)], data, Views(32), top=(1, 2, 3, 7))
    assert result.correct == {1: 1, 2: 2, 3: 3, 7: 7}
    assert evaluate([Fixed(scores)], data, Views(32)).correct == {1: 1, 5: 5}
    assert evaluate([Fixed([1.0] * 7)], data, Views(32)).correct == {1: 1, 5: 5}
    with pytest.raises(RecipeError, match="top: expected numbers from 1 to 7, as many as there are classes, got 8"):
        evaluate([Fixed(scores)], data, Views(32), top=(8,))


def test_which_images_of_a_folder(folder, tmp_path):
    assert len(find(str(folder)).samples) == 14
    assert len(find(str(folder), limit=5).samples) == 5
    held_out = find(str(folder), held_out=True)
    assert len({Path(sample.name).parent for sample in held_out.samples}) == 3
    assert len(held_out.samples) == 3
    (tmp_path / "root" / "train").mkdir(parents=True)
    folder.rename(tmp_path / "root" / "val")
    assert find(str(tmp_path / "root")).name == str(tmp_path / "root" / "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="expected one folder of images"):
        find(str(tmp_path / "empty"))
    with pytest.raises(RecipeError, match="no data folder"):
        find(str(tmp_path / "nowhere"))


def test_the_folder_of_a_run_is_its_weights_or_while_there_are_none_its_checkpoint(tmp_path):
    with pytest.raises(RecipeError, match=r"model\.safetensors does not exist"):
        open_model(tmp_path)
    torch.save({"model": narrow_vgg(num_classes=2).state_dict()}, tmp_path / "checkpoint.pt")
    assert open_model(tmp_path).num_classes == 2
    save_file(narrow_vgg(num_classes=3).state_dict(), tmp_path / "model.safetensors")
    assert open_model(tmp_path).num_classes == 3


def test_a_class_called_test_is_a_class(folder, tmp_path):
    root = tmp_path / "classes"
    shutil.copytree(next(path for path in folder.iterdir() if path.is_dir()), root / "control")
    shutil.copytree(root / "control", root / "test")
    assert find(str(root)).classes == ["control", "test"]
    shutil.copytree(folder, root / "val")  # of its own classes: the held-out part
    assert find(str(root)).name == str(root / "val")


def test_held_out_images_are_those_of_the_training(folder):
    pytest.importorskip("torchvision")
    from vggfast.recipes import data as datasets

    for name in ("red/broken.jpg", "blue/cut.png"):
        (folder / name).unlink()
    ours = find(str(folder), held_out=True)
    theirs = datasets.load(str(folder), size=32, batch_size=4, seed=0)
    labels = torch.cat([labels for _, labels in theirs.test_batches()])
    assert sorted(labels.tolist()) == [sample.label for sample in ours.samples]
    assert theirs.classes == ours.classes


def write_shard(path, *samples):
    """(name without suffix, class, image) each; an image of None is bytes that are none."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, label, image in samples:
            png = io.BytesIO(b"" if image else b"no image")
            if image:
                image.save(png, "PNG")
            for suffix, content in (("png", png.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_shards_are_counted_as_folders_are(tmp_path):
    """By name, and by number; damaged images are named; held out are those of the training."""
    image = {name: Image.new("RGB", (50, 40), colour) for name, colour in COLOURS.items()}
    by_name = [("a", "red", image["red"]), ("b", "blue", image["green"]), ("c", "green", None)]
    write_shard(tmp_path / "val" / "0.tar", *by_name)
    write_shard(tmp_path / "val" / "1.tar", ("d", "green", image["green"]))
    for data in (str(tmp_path), str(tmp_path / "val"), str(tmp_path / "val" / "{0..1}.tar")):
        result = evaluate([colours()], data, Views(32))
        assert (result.images, result.correct[1]) == (3, 2)
        assert [text.partition(" cannot")[0] for text in result.unreadable] == [f"{tmp_path}/val/0.tar:c.png"]
    numbers = [(f"{n:02}", n % 3, image[("red", "green", "blue")[n % 3]]) for n in range(15)]
    write_shard(tmp_path / "numbered" / "0.tar", *numbers)
    place = str(tmp_path / "numbered" / "0.tar")
    assert evaluate([colours(("0", "1", "2"))], place, Views(32)).correct[1] == 0 + 15
    held_out = find(place, held_out=True)
    pytest.importorskip("torchvision")
    from vggfast.recipes import data as datasets

    theirs = datasets.load(place, size=32, batch_size=4, seed=0)
    assert len(held_out.samples) == theirs.test_size == 3
    chosen = {str(theirs._test.images.files[index]) for index in theirs._test.indices}
    assert {sample.name for sample in held_out.samples} == chosen
    with pytest.raises(RecipeError, match=r"expected 2 shards, .*1\.tar is not there"):
        find(str(tmp_path / "numbered" / "{0..1}.tar"))


def test_nothing_readable(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"no image could be read; the first: .*x\.png cannot be read as an image"):
        evaluate([narrow_vgg(num_classes=1)], str(tmp_path), Views(32))


# ---- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    model = narrow_vgg(num_classes=3)
    vggfast.save_weights(model, path, classes=["red", "green", "blue"], normalisation=Normalisation(), size=64)
    return path


def test_evaluate_prints_json_and_a_table(folder, checkpoint, tmp_path):
    other = tmp_path / "other.safetensors"
    vggfast.save_weights(narrow_vgg(num_classes=3, seed=5), other, classes=["red", "green", "blue"], size=64)
    options = (
        "--data",
        folder,
        "--weights",
        checkpoint,
        "--weights",
        other,
        "--scales",
        "64,96",
        "--dense",
        "--crops",
        "grid",
    )
    done = run("evaluate", *options, "--flip", "--json", "--threads", 1, "--top", "1,2")
    assert done.exit_code == 0, done.output
    got = json.loads(done.stdout)
    views = Views(64, (64, 96), dense=True, crops="grid", flip=True)
    expected = evaluate([vggfast.load_model(path) for path in (checkpoint, other)], str(folder), views, top=(1, 2))
    assert got["images"] == 12
    assert [got[f"top{k}_accuracy"] for k in (1, 2)] == [expected.accuracy(k) for k in (1, 2)]
    assert got["views_of_an_image"] == 104
    assert "broken.jpg cannot be read" in done.stderr
    assert f"{other} does not say how its images were normalised" in done.stderr
    assert str(checkpoint) not in done.stderr
    table = run("evaluate", "--data", folder, "--weights", checkpoint).stdout
    assert "central crop of 64, shorter edge 73: 1 an image" in table
    assert re.search(r"top-1 .*\d\.\d\d%", table)
    assert "12 images, 2 unreadable, " in table


def test_evaluate_on_digits_is_the_accuracy_of_the_training(tmp_path):
    model = narrow_vgg(num_classes=10, in_channels=1)
    vggfast.save_weights(model, tmp_path / "model.safetensors", size=32)
    got = json.loads(run("evaluate", "--data", "digits", "--weights", tmp_path, "--json").stdout)
    data = datasets.load("digits", size=32, batch_size=400, seed=0)
    [(images, labels)] = data.test_batches()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).sum().item()
    assert got["images"] == data.test_size
    assert got["top1_accuracy"] == right / data.test_size
    assert got["top5_accuracy"] > got["top1_accuracy"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The folder of a narrow VGG that was trained on a part of the digits, and its data, of another mean than all."""
    monkeypatch.setattr(training, "build_model", lambda name, data: narrow_vgg(num_classes=10, in_channels=1))
    settings = {"output": str(tmp_path / "run"), "epochs": 1, "limit": 60, "batch_size": 20, "lr": 0.05, "threads": 1}
    training.fit(training.TrainConfig.recipe("digits", **settings))
    return tmp_path / "run", datasets.load("digits", size=32, batch_size=60, seed=0, limit=60)


def test_a_digits_image_is_normalised_in_prediction_as_in_training(trained, tmp_path):
    run_folder, data = trained
    loaded = vggfast.load_model(run_folder / "model.safetensors")
    assert loaded.normalisation == data.normalisation
    pixels = (data.pixels[0, 0] * 255).round()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "digit.png")
    done = run("predict", tmp_path / "digit.png", "--weights", run_folder, "--top", 10, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    got = {answer["index"]: answer["probability"] for answer in json.loads(done.stdout)[0]["top"]}
    with torch.no_grad():
        expected = loaded.model(data.test[0][:1]).softmax(1)[0]
        elsewhere = loaded.model(Normalisation()(data.pixels[:1])).softmax(1)[0]
    torch.testing.assert_close(torch.tensor([got[index] for index in range(10)]), expected, atol=2e-3, rtol=0)
    assert (expected - elsewhere).abs().max() > 1e-2  # with ImageNet's mean and deviation it would show


def test_digits_are_normalised_once_in_evaluation_by_the_networks_own_mean(trained):
    run_folder, data = trained
    loaded = vggfast.load_model(run_folder / "model.safetensors")
    found = find("digits", size=32)
    assert not found.normalised
    shown = []
    loaded.model.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].clone()))
    evaluate([loaded], found, Views(32, (32,)), batch_size=400)
    pixels = torch.stack([sample.read() for sample in found.samples])
    assert 0 <= pixels.min() < pixels.max() <= 1
    torch.testing.assert_close(torch.cat(shown), data.normalisation(pixels))
    done = run("evaluate", "--data", "digits", "--weights", run_folder, "--json")
    assert done.stderr == ""


def test_the_commands_say_no_in_one_message(folder, checkpoint, tmp_path):
    data = ("evaluate", "--data", folder)
    assert_one_message(run(*data, "--weights", tmp_path / "no.pth"), "--weights", "no.pth does not exist")
    assert_one_message(run(*data, "--weights", "vgg12"), "VGG16_Weights.IMAGENET1K_V1", "got 'vgg12'")
    assert_one_message(run(*data, "--weights", checkpoint, "--scales", "a"), "--scales: expected whole numbers", "'a'")
    assert_one_message(run(*data, "--weights", checkpoint, "--scales", 50), "expected none below 64 pixels")
    assert_one_message(run(*data, "--weights", checkpoint, "--top", 9), "expected numbers from 1 to 3")
    assert_one_message(run("evaluate", "--data", "nowhere", "--weights", checkpoint), "no data folder nowhere")
    assert_one_message(run("evaluate", "--data", "", "--weights", checkpoint), "--data: expected digits", "got nothing")
    long = tmp_path / ("x" * 300)
    assert_one_message(run("evaluate", "--data", long, "--weights", checkpoint), f"{long}/val: File name too long")
    assert_one_message(run(*data, "--weights", checkpoint, "--device", "tpu"), "expected auto, cpu")


def test_predict_names_the_likeliest(folder, checkpoint, tmp_path):
    image = folder / "red" / "0.png"
    done = run("predict", image, "--weights", checkpoint, "--top", 2)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == str(image)
    assert len(lines) == 3
    x = Normalisation()(torch.tensor(COLOURS["red"]).view(3, 1, 1).expand(3, 64, 64) / 255)[None]
    with torch.no_grad():
        values, indices = narrow_vgg(num_classes=3)(x).softmax(1)[0].sort(descending=True)
    for line, value, index in zip(lines[1:], values.tolist(), indices.tolist(), strict=False):
        shown = re.fullmatch(r" +(\d+\.\d\d)%  (\w+)", line)
        assert float(shown[1]) == pytest.approx(100 * value, abs=0.02)
        assert shown[2] == ["red", "green", "blue"][index]
    got = json.loads(run("predict", image, "--weights", checkpoint, "--json", "--flip", "--dense").stdout)
    assert [a["name"] for a in got[0]["top"]] == [["red", "green", "blue"][i] for i in indices.tolist()]
    assert sum(a["probability"] for a in got[0]["top"]) == pytest.approx(1)


def test_predict_goes_on_after_an_unreadable_image(folder, checkpoint):
    images = [folder / "red" / "broken.jpg", folder / "none.png", folder, folder / "red" / "1.png"]
    done = run("predict", *images, "--weights", checkpoint)
    assert done.exit_code == 1
    assert str(images[3]) in done.stdout
    assert "broken.jpg cannot be read as an image (in no format that Pillow knows)" in done.stderr
    assert "none.png does not exist" in done.stderr
    assert f"error: {folder} is a folder; expected an image file" in done.stderr
    shown = json.loads(run("predict", *images, "--weights", checkpoint, "--json").stdout)
    assert ["error" in each for each in shown] == [True, True, True, False]
