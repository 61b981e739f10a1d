"""The learning curve of a run, as an image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vggfast.recipes.checkpoint import output_file

if TYPE_CHECKING:
    from vggfast.recipes.trainer import Epoch

HEADROOM = 1.05  # above the highest point


def printable(name: str) -> str:
    """Text that matplotlib draws: bytes of a path that are no UTF-8 stand in it as \\udce9."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def plot(history: Sequence["Epoch"], path: Path, title: str) -> None:
    """Write a PNG of loss and accuracy, on training and on held-out images, against the epoch.

    Training values are means over an epoch, during which the weights moved and dropout and augmentation were on; held-out
    values are taken at its end. Raises RecipeError where `path` cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row.epoch for row in history]
    room = max(0.5, 0.03 * len(epochs))  # beside the first and the last point
    figure = Figure(figsize=(10, 4), dpi=120)  # no pyplot: it would pick a global backend
    loss, accuracy = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.13, top=0.84, wspace=0.2)
    loss.plot(epochs, [row.train_loss for row in history], marker="o", label="training")
    loss.plot(epochs, [row.test_loss for row in history], marker="s", label="held out")
    loss.set(ylabel="cross-entropy loss (nats)", title="Loss")
    highest = max((y for row in history for y in (row.train_loss, row.test_loss) if math.isfinite(y)), default=0)
    loss.set_ylim(0, HEADROOM * highest or 1)
    accuracy.plot(epochs, [100 * row.train_accuracy for row in history], marker="o", label="training")
    accuracy.plot(epochs, [100 * row.test_accuracy for row in history], marker="s", label="held out")
    accuracy.set(
        ylabel="accuracy (%)",
        ylim=(0, 100 * HEADROOM),
        title=f"Accuracy (held out, last epoch: {history[-1].test_accuracy:.2%})",
    )
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xlim(epochs[0] - room, epochs[-1] + room)
        axes.xaxis.set_major_locator(
            MaxNLocator(integer=True, min_n_ticks=1)
        )  # 2 by default, which it makes of fractions
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(printable(title))
    with output_file(path) as temporary:
        figure.savefig(temporary, format="png")
