"""The progress bar of a training run, and a line for each epoch."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vggfast.recipes.trainer import Epoch, Listener, Trainer


class ProgressBar(Listener):
    """Shows epoch, loss, images/s and the time left on `console`; where that is no terminal, only a line an epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %  loss {task.fields[loss]}  {task.fields[speed]} images/s  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = TaskID(0)
        self._last = 0.0  # when the steps since were begun, s

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def start(self, trainer: Trainer) -> None:
        config, data = trainer.config, trainer.data
        self._console.print(
            f"{trainer.name}: {sum(p.numel() for p in trainer.model.parameters()):,} parameters, on {config.data}: "
            f"{data.train_size:,} images to train on, {data.test_size:,} held out, {len(data.classes)} classes; "
            f"on {trainer.device}, amp {config.amp}"
            + (f", {trainer.processes.world} processes" if trainer.processes.world > 1 else ""),
            highlight=False,
            markup=False,
        )
        if trainer.epoch or trainer.step:
            self._console.print(f"resumed after epoch {trainer.epoch}, step {trainer.step}", highlight=False)
        total = config.epochs * trainer.steps_per_epoch
        self._task = self._progress.add_task("training", total=total, epoch="", loss="-", speed="-")
        self._show(trainer)
        self._progress.start()
        self._last = time.perf_counter()

    def step(self, trainer: Trainer, loss: float) -> None:
        now = time.perf_counter()
        speed = trainer.config.batch_size * trainer.steps_between_reports / (now - self._last)
        self._last = now
        self._show(trainer, loss=f"{loss:.4f}", speed=f"{speed:.0f}")

    def epoch(self, trainer: Trainer, row: Epoch) -> None:
        self._console.print(
            f"epoch {row.epoch}/{trainer.config.epochs}: loss {row.train_loss:.4f}, training accuracy "
            f"{row.train_accuracy:.2%}, test accuracy {row.test_accuracy:.2%}, {row.images_per_s:.0f} images/s, "
            f"{row.seconds:.1f} s",
            highlight=False,
        )
        self._show(trainer)
        self._last = time.perf_counter()

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _show(self, trainer: Trainer, **fields: str) -> None:
        self._progress.update(
            self._task,
            completed=trainer.epoch * trainer.steps_per_epoch + trainer.step,
            epoch=f"{min(trainer.epoch + 1, trainer.config.epochs)}/{trainer.config.epochs}",
            **fields,  # type: ignore[arg-type]
        )
