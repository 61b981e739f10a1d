"""What a run can be asked for: schedules, recipes, accumulation, checkpointed gradients, averages, warm starts, TensorBoard."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_vgg import SmallLinear
from test_train import StopAt, assert_same_weights, tiny_fit, tiny_model
from torch import nn

import vggfast.models
from vggfast.recipes import RecipeError, checkpoint, warm_start
from vggfast.recipes import data as datasets
from vggfast.recipes.config import TrainConfig
from vggfast.recipes.layers import Place, training_form
from vggfast.recipes.schedule import Schedule
from vggfast.recipes.train import Listener, Trainer, fit


@pytest.fixture(autouse=True)
def _one_thread():
    """Runs are compared bit for bit, which holds for equal numbers of threads only. conftest.py restores the number."""
    torch.set_num_threads(1)


class Float64(nn.Module):
    """The tiny model in float64, where two ways to add the same numbers agree to 1e-12; without BatchNorm if asked."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        self.inner = tiny_model().double()
        if not batch_norm:
            self.inner[0] = nn.Sequential(*(m for m in self.inner[0] if not isinstance(m, nn.BatchNorm2d)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.double())


# ---- recipes and schedules -----------------------------------------------------------------------------------------


def test_the_papers_recipe_is_the_papers_and_that_of_folders_and_shards():
    for data in ("photos", "shards/{000..003}.tar"):
        config = TrainConfig.recipe(data)
        assert (config.lr, config.weight_decay, config.batch_size, config.epochs) == (1e-2, 5e-4, 256, 74)
        assert (config.schedule, config.augment, config.size, config.scale_range) == (
            "plateau",
            "paper",
            224,
            (256, 512),
        )
        assert config == TrainConfig.recipe(data, "paper")
    modern = TrainConfig.recipe("photos", "modern", epochs=3)
    assert (modern.schedule, modern.augment, modern.label_smoothing, modern.epochs) == ("cosine", "modern", 0.1, 3)
    digits = TrainConfig.recipe("digits", "paper")
    assert (digits.schedule, digits.size, digits.augment, digits.model) == ("plateau", 32, "shift", "vgg11_bn")
    assert TrainConfig.recipe("photos", scale="384").scale_range == (384, 384)
    assert TrainConfig.recipe("photos", size=112).scale_range == (128, 256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "200"}, "scale: expected a number of pixels or two as 256-512, none below the size 224, got '200'"),
        ({"scale": "512-256"}, "scale: expected a number of pixels or two as 256-512, none below the size 224"),
        ({"schedule": "step"}, "schedule: expected one of cosine, plateau, got 'step'"),
        ({"ema": 1.0}, "ema: expected a number >= 0 and < 1, got 1.0"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"threads": 99_999}, "threads: expected at most 1024, got 99999"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number, got 2.5"),
        ({"preset": "modern", "scale": "256"}, "scale: only the paper's recipe for folders and shards crops from it"),
        ({"warm_start": ""}, "warm_start: expected a name or a path, got nothing; leave it out"),
        ({"weights": " "}, "weights: expected a name or a path, got nothing"),
        ({"val": ""}, "val: expected a name or a path, got nothing"),
        ({"preset": "old"}, "recipe: expected one of paper, modern, got 'old'"),
    ],
)
def test_bad_settings_are_reported(settings, message):
    with pytest.raises(RecipeError) as caught:
        TrainConfig.recipe("photos", **settings)
    assert str(caught.value).startswith(message)


def test_a_scale_that_digits_do_not_have_is_refused():
    with pytest.raises(RecipeError, match="got '256' with images that are changed as in 'shift'; leave it out"):
        TrainConfig.recipe("digits", scale="256")


def test_the_learning_rate_is_divided_by_10_three_times_when_accuracy_stalls():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    schedule = Schedule(optimizer, TrainConfig(lr=0.01, schedule="plateau", patience=2), steps_per_epoch=5)
    accuracies = [0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.301, 0.3, 0.2, 0.301, 0.301, 0.301, 0.301, *[0.301] * 8]
    rates = []
    for accuracy in accuracies:
        for _ in range(5):
            schedule.step()  # steps alone change nothing
        schedule.epoch(accuracy)
        rates.append(schedule.learning_rate)
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 4 + [0.0001] * 3 + [0.00001] * 9, rel=1e-6)


def test_a_resumed_run_remembers_how_long_accuracy_has_stalled(tmp_path):
    """With a learning rate that moves nothing each epoch after the first is a stall, also the first after resuming."""
    settings = {"schedule": "plateau", "patience": 1, "lr": 1e-9, "epochs": 6, "limit": 32}
    whole = tiny_fit(tmp_path / "whole", **settings)
    assert [row.learning_rate for row in whole.history] == pytest.approx([1e-9] * 3 + [1e-10] * 2 + [1e-11], rel=1e-5)
    for stop in (2, 3):  # in the middle of a stall, and just after a division
        with pytest.raises(KeyboardInterrupt):
            tiny_fit(tmp_path / str(stop), listener=StopAt(stop, 1), **settings)
        resumed = tiny_fit(tmp_path / str(stop), resume=True, **settings)
        assert [row.learning_rate for row in resumed.history] == [row.learning_rate for row in whole.history]


# ---- pieces, processes, memory ---------------------------------------------------------------------------------------


def test_shares_divide_every_batch_into_equally_many_pieces():
    for world, pieces, batch_size in ((1, 1, 7), (2, 1, 7), (3, 2, 7), (2, 3, 8), (4, 2, 8)):
        for count in range(1, batch_size + 1):
            cuts = [datasets.Share(rank, world, pieces).cut(count, batch_size) for rank in range(world)]
            assert len({len(cut) for cut in cuts}) == 1
            assert 1 <= len(cuts[0]) <= pieces
            assert sorted(position for cut in cuts for piece in cut for position in piece) == list(range(count))
    assert datasets.Share(1, 2, 2).cut(8, 8) == [range(2, 4), range(6, 8)]


def test_processes_see_the_batches_of_one_and_each_held_out_image_once():
    def load(share: datasets.Share | None = None) -> datasets.Data:
        return datasets.load("digits", size=32, batch_size=12, seed=3, limit=40, share=share)

    one, halves = load(), [load(datasets.Share(rank, 2, 2)) for rank in range(2)]
    pieces = [list(half.train_batches(1, start=1)) for half in halves]
    in_order = [batch for pair in zip(*pieces, strict=True) for batch in pair]
    for part in range(2):
        whole = torch.cat([batch[part] for batch in one.train_batches(1, start=1)])
        assert torch.equal(torch.cat([batch[part] for batch in in_order]), whole)
    held_out = torch.cat([images for half in halves for images, _ in half.test_batches()])
    assert torch.equal(held_out.flatten(1).sum(1).sort().values, one.test[0].flatten(1).sum(1).sort().values)


def test_more_processes_and_pieces_than_images_are_reported():
    with pytest.raises(RecipeError, match="at least one image for each of 2 processes times 3 pieces, got 5"):
        datasets.load("digits", size=32, batch_size=5, seed=0, share=datasets.Share(0, 2, 3))


def test_a_step_in_pieces_is_the_step_of_the_whole_batch(tmp_path):
    """With dropout; without BatchNorm, whose statistics are those of a piece. The last batch is a short one."""
    losses = []
    for accumulate in (1, 3):
        config = TrainConfig.recipe(
            "digits", output=str(tmp_path / str(accumulate)), epochs=2, limit=90, batch_size=32, accumulate=accumulate
        )
        model = Float64(batch_norm=False)
        history = fit(config, model=model).history
        losses.append([value for row in history for value in (row.train_loss, row.test_loss)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the sums of losses are float32
    parameters = [torch.load(tmp_path / name / "checkpoint.pt")["model"].values() for name in ("1", "3")]
    for one, three in zip(*parameters, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-9, atol=1e-12)


def test_checkpointed_gradients_keep_less_and_change_no_bit(tmp_path):
    settings = {"epochs": 1, "limit": 64}
    plain = tiny_fit(tmp_path / "plain", **settings)
    checkpointed = tiny_fit(tmp_path / "checkpointed", gradient_checkpointing=True, **settings)
    assert_same_weights(plain.weights, checkpointed.weights)  # BatchNorm's running statistics, too
    assert plain.history[0].train_loss == checkpointed.history[0].train_loss

    def bytes_kept(checkpointing: bool) -> int:
        kept: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.untyped_storage().nbytes())
            return tensor

        model = tiny_model()
        with (
            training_form(model, Place(batch_size=8), 1, checkpointing),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(torch.randn(8, 1, 32, 32)).sum().backward()
        return sum(kept)

    assert bytes_kept(True) < 0.6 * bytes_kept(False)


def test_the_forms_of_training_are_gone_afterwards(tmp_path):
    model = tiny_model()
    kinds = [type(module) for module in model.modules()]
    config = TrainConfig.recipe(
        "digits", output=str(tmp_path), epochs=1, limit=32, gradient_checkpointing=True, save_every=1
    )
    assert fit(config, model=model).model is model
    assert [type(module) for module in model.modules()] == kinds
    assert not any("place" in vars(module) for module in model.modules())
    with pytest.raises(RecipeError, match=r"gradient_checkpointing: expected a model with a vggfast.FusedSequential"):
        fit(config, model=nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(1024, 10)), overwrite=True)


def test_dropout_drops_its_share_anew_in_every_step_and_layer():
    model = nn.Sequential(nn.Dropout(0.25), nn.Dropout(0.25))
    place = Place(seed=(0, 0, 0), batch_size=400)
    masks = []
    with training_form(model, place, 1, False):
        for step in range(2):
            place.seed = (0, 0, step)
            masks += [layer(torch.ones(400, 50)) for layer in model]
            assert torch.equal(masks[-1], model[1](torch.ones(400, 50)))  # as a second forward pass must find it
        place.first = 100
        assert torch.equal(model[1](torch.ones(30, 50)), masks[-1][100:130])
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
        assert mask.mean() == pytest.approx(1, abs=0.02)
    for index, mask in enumerate(masks):
        for other in masks[:index]:
            assert (mask == other).float().mean() == pytest.approx(0.75**2 + 0.25**2, abs=0.03)  # independent


# ---- averages, warm starts, TensorBoard ------------------------------------------------------------------------------


def test_the_average_of_the_weights_is_what_is_tested_and_written(tmp_path):
    seen: list[dict[str, torch.Tensor]] = []

    class Record(Listener):
        def step(self, trainer: Trainer, loss: float) -> None:
            seen.append({name: value.clone() for name, value in trainer.model.state_dict().items()})

    result = tiny_fit(tmp_path, ema=0.75, epochs=1, listener=Record())
    average = seen[0]["2.weight"]
    for state in seen[1:]:
        average = 0.75 * average + 0.25 * state["2.weight"]
    torch.testing.assert_close(result.model.state_dict()["2.weight"], average)
    assert not torch.allclose(average, seen[-1]["2.weight"])
    torch.testing.assert_close(load_file(result.weights)["2.weight"], average)
    saved = checkpoint.load(result.checkpoint)
    assert torch.equal(saved["model"]["2.weight"], seen[-1]["2.weight"])
    data = datasets.load("digits", size=32, batch_size=32, seed=0, limit=96)
    right = sum((result.model(images).argmax(1) == labels).sum().item() for images, labels in data.test_batches())
    assert right / data.test_size == result.test_accuracy


@pytest.fixture
def small(monkeypatch):
    """VGGs with 64 for every 4096 units of the fully connected layers."""
    monkeypatch.setattr(nn, "Linear", SmallLinear)


def test_a_warm_start_takes_four_convolutions_and_the_fully_connected_layers(small, tmp_path):
    shallow = vggfast.models.vgg11(num_classes=10)
    torch.save({"state_dict": shallow.state_dict()}, tmp_path / "a.pth")
    deep = vggfast.models.vgg13(num_classes=10)
    before = {name: value.clone() for name, value in deep.state_dict().items()}
    report = warm_start.apply(deep, str(tmp_path / "a.pth"))
    assert report == f"warm start from {tmp_path / 'a.pth'}: conv1_1, conv2_1, conv3_1, conv3_2, fc6, fc7, fc8"
    theirs, ours = shallow.state_dict(), deep.state_dict()
    origin = {"features.0": "features.0", "features.5": "features.3", "features.10": "features.6",
              "features.12": "features.8"} | {name: name for name in ("classifier.0", "classifier.3", "classifier.6")}  # fmt: skip
    for name, value in ours.items():
        layer, _, part = name.rpartition(".")
        expected = theirs[f"{origin[layer]}.{part}"] if layer in origin else before[name]
        assert torch.equal(value, expected), name


def test_a_run_starts_from_trained_weights_for_other_classes_and_channels(small, tmp_path):
    trained = vggfast.models.vgg11_bn(num_classes=7)  # of colour images; the digits are grey, and ten
    trained.features[1].bias.data.fill_(0.25)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "a.pth")
    notes: list[str] = []

    class Notes(StopAt):
        def note(self, text: str) -> None:
            notes.append(text)

    settings = {"output": str(tmp_path / "run"), "epochs": 2, "limit": 32, "batch_size": 16, "lr": 0.0}
    config = TrainConfig.recipe("digits", weights=str(tmp_path / "a.pth"), **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(config, listener=Notes(1, 1))
    result = fit(config, resume=True, listener=Notes(9, 9))  # its own weights, not those that it began with
    assert notes == [f"starts from {tmp_path / 'a.pth'}; the last layer stays random, for it has other classes"]
    found, wanted = load_file(result.weights), trained.state_dict()
    for name in (
        "features.4.weight",
        "features.25.bias",
        "features.1.bias",
        "classifier.0.weight",
        "classifier.3.bias",
    ):
        assert torch.equal(found[name], wanted[name]), name
    assert found["classifier.6.weight"].shape[0] == 10
    torch.testing.assert_close(found["features.0.weight"], wanted["features.0.weight"].sum(1, keepdim=True))


def test_weights_that_do_not_fit_end_a_run_before_it_starts(small, tmp_path):
    torch.save(vggfast.models.vgg13(num_classes=10).state_dict(), tmp_path / "a.pth")
    for settings, message in (
        ({"weights": str(tmp_path / "a.pth")}, "weights: .*without BatchNorm: build the model so, too.*--model names"),
        ({"weights": str(tmp_path / "b.pth")}, "weights: .*b.pth"),
        ({"weights": "VGG99_Weights.DEFAULT"}, "weights: expected .*VGG99_Weights.DEFAULT"),
        ({"weights": "a.pth", "warm_start": "b.pth"}, "weights, warm_start: expected one of them"),
    ):
        with pytest.raises(RecipeError, match=f"(?s){message}"):
            fit(TrainConfig.recipe("digits", output=str(tmp_path / "run"), limit=32, **settings))
    assert not (tmp_path / "run").exists()


def test_a_warm_start_names_what_does_not_fit_and_takes_batch_norm_along(small, tmp_path):
    path = str(tmp_path / "a.pth")
    shallow = vggfast.models.vgg11_bn(num_classes=10)
    shallow.features[1].running_mean.fill_(3)
    torch.save(shallow.state_dict(), path)
    deep = vggfast.models.vgg16_bn(num_classes=7)
    report = warm_start.apply(deep, path)
    assert "conv3_2, conv3_2.bn, fc6, fc7; left at random" in report
    assert report.endswith("they do not fit: fc8 (classifier.6.weight: expected [7, 64], got [10, 64])")
    assert torch.equal(deep.features[1].running_mean, torch.full((64,), 3.0))
    plain = warm_start.apply(vggfast.models.vgg16(num_classes=10), path)
    assert "conv1_1.bn (no such layer here)" in plain
    torch.save(deep.state_dict(), path)
    with pytest.raises(
        RecipeError, match="holds no network of configuration A: expected the weights of vgg11, vgg11_bn"
    ):
        warm_start.apply(deep, path)
    with pytest.raises(RecipeError, match=r"warm start: .*does not exist"):
        warm_start.apply(deep, str(tmp_path / "b.pth"))


def test_a_run_starts_warm_from_the_checkpoint_of_another_and_says_so(small, tmp_path):
    first = fit(TrainConfig.recipe("fake", output=str(tmp_path / "a"), model="vgg11", limit=4, epochs=1))

    class Notes(Listener):
        notes: list[str] = []  # noqa: RUF012
        first_layer = None

        def note(self, text: str) -> None:
            self.notes.append(text)

        def start(self, trainer: Trainer) -> None:
            Notes.first_layer = trainer.model.features[0].weight.clone()

    config = TrainConfig.recipe(
        "fake", output=str(tmp_path / "b"), model="vgg13", warm_start=str(first.checkpoint), limit=4, epochs=1
    )
    fit(config, listener=Notes())
    assert [note.partition(":")[0] for note in Notes.notes] == [f"warm start from {first.checkpoint}"]
    assert torch.equal(Notes.first_layer, first.model.features[0].weight)


def test_tensorboard_has_the_metrics_and_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"tensorboard": True, "epochs": 3}
    with pytest.raises(KeyboardInterrupt):
        tiny_fit(tmp_path, listener=StopAt(1, 2), **settings)  # steps 4 and 5 come again
    result = tiny_fit(tmp_path, resume=True, **settings)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, 10))
    with result.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for tag, column in (
        ("loss/training", "train_loss"),
        ("loss/held_out", "test_loss"),
        ("accuracy/training", "train_accuracy"),
        ("accuracy/held_out", "test_accuracy"),
        ("step/learning_rate", "learning_rate"),
    ):
        shown = {
            event.step: event.value for event in events.Scalars(tag) if event.step % 3 == 0
        }  # at the ends of epochs
        assert shown == pytest.approx({3 * int(row["epoch"]): float(row[column]) for row in rows}, rel=1e-6)


def test_a_full_disk_under_tensorboard_is_reported(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def refuse(self: SummaryWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", refuse)
    with pytest.raises(RecipeError, match=r"cannot write to .*tensorboard \(.*No space left.*go on with --resume"):
        tiny_fit(tmp_path, tensorboard=True)
    assert checkpoint.load(Path(tmp_path) / "checkpoint.pt")["progress"]["epoch"] == 1
