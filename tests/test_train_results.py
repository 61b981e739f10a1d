"""What a run writes about itself: the learning curve and the learning rate of each epoch."""

import pytest
from matplotlib.figure import Figure
from test_train import _one_thread, tiny_fit  # noqa: F401 (the fixture is every test's)

from vggfast.recipes import curve
from vggfast.recipes.schedule import learning_rate_factor
from vggfast.recipes.train import Epoch, Listener, Trainer


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
