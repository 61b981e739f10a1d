"""What a run writes about itself: the learning curve and the learning rate of each epoch."""

import csv
import os

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from test_train import StopAt, _one_thread, tiny_fit, tiny_model  # noqa: F401 (the fixture is every test's)

from vggfast.atomic_files import atomic_write
from vggfast.recipes import curve
from vggfast.recipes import train as training
from vggfast.recipes.schedule import learning_rate_factor
from vggfast.recipes.train import Epoch, Listener, TrainConfig, Trainer, fit


@pytest.mark.parametrize("epochs", [1, 2, 5, 74])
def test_the_curve_has_whole_epochs_and_room_around_its_points(tmp_path, monkeypatch, epochs):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [Epoch(n, 2.3 / n, 1.0, 2.2 / n, 1.0, 0.01, 1.0, 1.0, 0) for n in range(1, epochs + 1)]
    curve.plot(rows, tmp_path / "curve.png", "a run")
    for axes, top in zip(drawn[0].axes, (2.3, 100), strict=True):
        ticks = axes.xaxis.get_major_locator()()
        (low, high), shown = axes.get_xlim(), [tick for tick in ticks if 1 <= tick <= epochs]
        assert shown
        assert all(tick == int(tick) for tick in ticks)
        assert low <= 0.5 < epochs + 0.5 <= high
        assert axes.get_ylim() == pytest.approx((0, 1.05 * top))


def test_learning_rate_rises_to_the_peak_and_falls_to_zero():
    factors = [learning_rate_factor(step, 100) for step in range(101)]
    assert max(factors) == factors[19] == 1
    assert factors[:20] == sorted(factors[:20])
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[100] == pytest.approx(0)
    assert learning_rate_factor(0, 1) == 1


def test_the_learning_rate_of_an_epoch_is_that_of_its_last_step(tmp_path):
    rates = []

    class Watch(Listener):
        def step(self, trainer: Trainer, loss: float) -> None:
            rates.append(trainer.schedule.learning_rate)  # of the step to come

    rows = tiny_fit(tmp_path / "two", listener=Watch()).history  # 2 epochs of 3 steps
    assert [row.learning_rate for row in rows] == [pytest.approx(rates[1]), pytest.approx(rates[4])]
    (row,) = tiny_fit(tmp_path / "one", epochs=1).history
    assert row.learning_rate == pytest.approx(0.05 * learning_rate_factor(2, 3))
    assert row.learning_rate > 0.01
    with pytest.raises(KeyboardInterrupt):  # stopped after the last step: there is none in the resumed run
        tiny_fit(tmp_path / "half", epochs=1, save_every=3, listener=StopBeforeTests())
    (resumed,) = tiny_fit(tmp_path / "half", epochs=1, resume=True).history
    assert resumed.learning_rate == row.learning_rate


class StopBeforeTests(Listener):
    """Leaves by an exception when the last step of an epoch is saved."""

    def start(self, trainer: Trainer) -> None:
        def evaluate() -> None:
            raise KeyboardInterrupt

        trainer.evaluate = evaluate


def test_the_curve_shows_each_metric_by_its_name(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [Epoch(n, 4 / n, 0.1 * n, 5 / n, 0.2 * n, 0.01, 1.0, 1.0, 0) for n in (1, 2, 3)]
    curve.plot(rows, tmp_path / "curve.png", "a run")
    expected = (
        {"training": [4, 2, 4 / 3], "held out": [5, 2.5, 5 / 3]},
        {"training": [10, 20, 30], "held out": [20, 40, 60]},
    )
    for axes, lines in zip(drawn[0].axes, expected, strict=True):
        assert axes.get_xlabel() == "epoch"
        assert [line.get_label() for line in axes.get_lines()] == list(lines)
        for line in axes.get_lines():
            assert list(line.get_xdata()) == [1, 2, 3]
            assert list(line.get_ydata()) == pytest.approx(lines[line.get_label()])
    assert drawn[0].axes[1].get_title() == "Accuracy (held out, last epoch: 60.00%)"


def test_a_file_is_replaced_and_never_written_over(tmp_path, monkeypatch):
    """Who has the old one open goes on reading it; and the new one is on the disk before it takes the name, its name after."""
    path, done = tmp_path / "a", []
    path.write_text("old")
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.path.realpath(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    with path.open() as reader:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert done == [str(temporary), "replace", str(tmp_path)]


def test_the_seed_is_that_of_the_initial_weights(tmp_path, monkeypatch):
    def build(name: str, data: object) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))

    monkeypatch.setattr(training, "build_model", build)
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)  # which the run does not look at
        settings = {"output": str(tmp_path / str(number)), "epochs": 1, "limit": 8, "lr": 0.0, "seed": seed}
        weights.append(load_file(fit(TrainConfig.recipe("fake", **settings)).weights)["1.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_run_has_the_threads_that_were_asked_for(tmp_path):
    found = []

    class Threads(Listener):
        def start(self, trainer: Trainer) -> None:
            found.append(torch.get_num_threads())

    tiny_fit(tmp_path, epochs=1, limit=16, threads=2, listener=Threads())
    assert found == [2]


def test_metrics_that_a_killed_run_did_not_write_come_when_it_is_resumed(tmp_path):
    result = tiny_fit(tmp_path)
    before = result.metrics.read_text()
    result.metrics.write_text("".join(before.splitlines(keepends=True)[:2]))
    assert tiny_fit(tmp_path, resume=True).metrics.read_text() == before
    with result.metrics.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == [vars(row) for row in result.history]


def test_the_loss_that_is_shown_is_the_mean_of_the_epoch_so_far_and_the_speed_that_of_this_run(tmp_path, monkeypatch):
    shown: list[float] = []

    class Losses(StopAt):
        def step(self, trainer: Trainer, loss: float) -> None:
            shown.append(loss)
            super().step(trainer, loss)

    rows = tiny_fit(tmp_path / "whole", listener=Losses(9, 9), limit=80, epochs=1).history  # 32, 32 and 16 images
    assert shown[-1] == pytest.approx(rows[0].train_loss)
    with pytest.raises(KeyboardInterrupt):
        tiny_fit(tmp_path / "half", listener=StopAt(0, 3), limit=80, epochs=1, save_every=2)
    clock = iter(range(100))
    monkeypatch.setattr("vggfast.recipes.trainer.time.perf_counter", lambda: next(clock))
    (resumed,) = tiny_fit(tmp_path / "half", resume=True, limit=80, epochs=1, save_every=2).history
    assert resumed.images_per_s == 16  # in the one second from one look at the clock to the next


def test_tied_layers_are_written_under_both_names(tmp_path):
    """safetensors refuses memory that has two names."""
    model = tiny_model()
    model.extend([torch.nn.Linear(10, 10), torch.nn.Linear(10, 10)])
    model[-1].weight = model[-2].weight
    config = TrainConfig.recipe("digits", output=str(tmp_path), epochs=1, limit=32, batch_size=32, lr=0.01)
    written = load_file(fit(config, model=model).weights)
    assert torch.equal(written["6.weight"], written["7.weight"])
