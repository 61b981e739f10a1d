"""Every option of train, evaluate and predict reaches what it is for."""

import dataclasses

import pytest
import torch
from small_vgg import narrow_vgg
from test_cli import run

import vggfast
from vggfast.recipes import RecipeError, commands, pictures
from vggfast.recipes import data as datasets
from vggfast.recipes import train as training
from vggfast.recipes.evaluate import evaluate, find
from vggfast.recipes.views import Views

Image = pytest.importorskip("PIL.Image")

TRAIN = {
    "data": "photos", "val": "held-out", "model": "vgg13", "epochs": 7, "batch_size": 24, "accumulate": 3,
    "gradient_checkpointing": True, "lr": 0.5, "weight_decay": 0.25, "ema": 0.75, "size": 64, "scale": "70-90", "limit": 9,
    "seed": 5, "device": "cuda:1", "amp": "bf16", "threads": 3, "workers": 2, "save_every": 11, "tensorboard": True,
}  # fmt: skip


def test_every_option_of_train_is_a_setting_of_the_run(tmp_path, monkeypatch):
    runs = []

    def caught(config, **how):
        runs.append((config, how["resume"], how["overwrite"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", caught)
    said = []
    for name, value in TRAIN.items():
        said += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    assert run("train", *said, "--output", tmp_path).exit_code == 130
    assert (
        run("train", *said, "--output", tmp_path, "--weights", "a.pth", "--recipe", "paper", "--overwrite").exit_code
        == 130
    )
    assert run("train", "--data", "photos", "--recipe", "modern", "--warm-start", "b.pth").exit_code == 130
    (first, *how), (second, *other), (third, *_) = runs
    assert {name: getattr(first, name) for name in TRAIN} == TRAIN
    assert (first.output, how, other) == (str(tmp_path), [False, False], [False, True])
    assert (second.weights, third.warm_start, third.output) == ("a.pth", "b.pth", "runs/photos")
    modern = (third.lr, third.weight_decay, third.batch_size, third.epochs, third.warm_up, third.label_smoothing)
    assert modern == (0.05, 1e-4, 256, 90, 0.05, 0.1)  # as docs/train.md has it
    assert second.patience == 5
    assert training.TrainConfig.recipe("digits").weight_decay == 5e-4


def test_a_run_goes_on_with_no_other_setting_that_would_change_its_result(tmp_path):
    config = training.TrainConfig.recipe("fake", output=str(tmp_path), limit=4, batch_size=4, device="cpu")
    data = datasets.load("fake", size=32, batch_size=4, seed=0, limit=4)

    def trainer(**settings) -> training.Trainer:
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
        return training.Trainer(dataclasses.replace(config, **settings), data, torch.device("cpu"), network)

    trainer().save()
    others = {
        "epochs": 3, "batch_size": 2, "accumulate": 2, "schedule": "plateau", "warm_up": 0.5, "patience": 1, "weight_decay": 0.1,
        "label_smoothing": 0.1, "ema": 0.5, "augment": "none", "limit": 3, "seed": 1, "amp": "bf16",
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(RecipeError, match=f"this run has --{name.replace('_', '-')} {value}"):
            trainer(**{name: value}).restore(tmp_path / "checkpoint.pt")
    trainer(threads=2, workers=1, save_every=3, tensorboard=True, gradient_checkpointing=True).restore(
        tmp_path / "checkpoint.pt"
    )


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Checkpoints of two sizes, images, and what the commands ask of the library."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (80, 80), (30 * number, 90, 10)).save(tmp_path / "data" / name / f"{number}.png")
    vggfast.save_weights(narrow_vgg(num_classes=2), tmp_path / "w.safetensors", classes=["a", "b"], size=48)
    asked = []
    for name in ("run_evaluation", "run_prediction"):
        real = getattr(commands, name)

        def spy(*arguments, real=real, **options):
            asked.append((*arguments, options, torch.get_num_threads()))
            return real(*arguments, **options)

        monkeypatch.setattr(commands, name, spy)
    return tmp_path, asked


def test_the_options_of_evaluate_are_those_of_the_evaluation(shown):
    folder, asked = shown
    data = ("evaluate", "--data", folder / "data", "--weights", folder / "w.safetensors")
    said = (
        "--limit",
        3,
        "--amp",
        "bf16",
        "--threads",
        1,
        "--batch-size",
        5,
        "--workers",
        3,
        "--preprocessing",
        "caffe",
    )
    torch.set_num_threads(2)
    assert run(*data, *said).exit_code == 0
    ([model], images, views, options, threads) = asked.pop()
    assert (len(images.samples), views, threads) == (3, Views(48), 1)
    assert (options["autocast"], options["batch_size"], options["workers"]) == (torch.bfloat16, 5, 3)
    assert model.normalisation.bgr
    assert model.normalisation_known
    assert run(*data, "--held-out", "--dense", "--size", 64, "--flip").exit_code == 0
    _, images, views, *_ = asked.pop()
    assert (len(images.samples), views) == (2, Views(64, dense=True, crops="none", flip=True))


def test_the_options_of_predict_are_those_of_the_prediction(shown):
    folder, asked = shown
    image = ("predict", folder / "data" / "a" / "1.png", "--weights", folder / "w.safetensors")
    assert run(*image, "--scales", "50,60", "--crops", "grid", "--flip", "--top", 1).exit_code == 0
    _, _, views, options, _ = asked.pop()
    assert (views, options["top"]) == (Views(48, (50, 60), crops="grid", flip=True), 1)


def test_a_run_on_whole_images_is_evaluated_on_whole_images(shown, monkeypatch):
    """Digits were trained on as they are: the checkpoint says so, and prediction and evaluation follow it."""
    folder, asked = shown
    monkeypatch.setattr(training, "build_model", lambda name, data: narrow_vgg(num_classes=10, in_channels=1))
    settings = {"output": str(folder / "run"), "epochs": 1, "limit": 16, "batch_size": 8, "threads": 1}
    training.fit(training.TrainConfig.recipe("digits", **settings))
    assert run("evaluate", "--data", "digits", "--weights", folder / "run", "--limit", 4).exit_code == 0
    assert run("predict", folder / "data" / "a" / "0.png", "--weights", folder / "run").exit_code == 0
    assert (
        run("evaluate", "--data", "fake", "--weights", folder / "w.safetensors", "--limit", 4).exit_code == 2
    )  # 10 classes, not 2
    assert run("predict", folder / "data" / "a" / "0.png", "--weights", folder / "run", "--size", 64).exit_code == 0
    assert [call[2] for call in asked[:2]] == [Views(32, (32,))] * 2
    assert asked[3][2] == Views(64, (73,))  # the training tells nothing of crops of that size
    assert asked[2][2] == Views(48, (48,))


def test_held_out_means_all_of_a_folder_with_a_part_of_its_own_and_val_comes_before_test(tmp_path):
    for part in ("train", "val", "test"):
        for number in range(5):
            (tmp_path / part / "a").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / "a" / f"{number}.PNG")
    found = find(str(tmp_path), held_out=True)
    assert (found.name, len(found.samples)) == (str(tmp_path / "val"), 5)
    assert find(str(tmp_path / "val"), limit=3).samples != found.samples[:3]  # of all classes, not of the first


def test_a_network_in_training_is_evaluated_as_it_would_be_afterwards_and_not_moved(shown):
    folder, _ = shown
    networks = [narrow_vgg(num_classes=2, batch_norm=True) for _ in range(2)]
    networks[0].train()
    before = {name: value.clone() for name, value in networks[0].state_dict().items()}
    results = [evaluate([network], str(folder / "data"), Views(32)) for network in networks]
    assert results[0].correct == results[1].correct
    assert not networks[0].training
    assert all(torch.equal(value, before[name]) for name, value in networks[0].state_dict().items())


def test_data_may_have_some_of_the_classes_of_a_network(shown):
    folder, _ = shown
    vggfast.save_weights(narrow_vgg(num_classes=3), folder / "three.safetensors", classes=["b", "c", "a"])
    model = vggfast.load_model(folder / "three.safetensors")
    model.model.classifier[6].weight.data.zero_()
    model.model.classifier[6].bias.data = torch.tensor([0.0, 1.0, 2.0])  # always "a", then "c"
    assert evaluate([model], str(folder / "data"), Views(32), top=(1, 2, 3)).correct == {1: 5, 2: 5, 3: 10}


def test_evaluation_finds_the_files_that_training_does():
    folder = pytest.importorskip("torchvision.datasets.folder")
    assert set(pictures.SUFFIXES) == set(folder.IMG_EXTENSIONS)
