"""A training run's metrics as TensorBoard shows them."""

from pathlib import Path

from vggfast.recipes import RecipeError
from vggfast.recipes.trainer import Epoch, Listener, Trainer


class TensorBoard(Listener):
    """Passes everything on to another listener, and writes the metrics to the folder tensorboard in `output`."""

    def __init__(self, output: Path, following: Listener) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RecipeError(
                "--tensorboard needs tensorboard, which is not installed: pip install tensorboard"
            ) from error
        self._make = SummaryWriter
        self._folder, self._following = output / "tensorboard", following

    def start(self, trainer: Trainer) -> None:
        step = trainer.epoch * trainer.steps_per_epoch + trainer.step
        try:  # what a run that was killed had written beyond its last checkpoint comes again
            self._writer = self._make(str(self._folder), purge_step=step + 1 if step else None)
        except OSError as error:
            raise RecipeError(f"cannot write to {self._folder} ({error}). Leave out --tensorboard") from error
        self._following.start(trainer)

    def step(self, trainer: Trainer, loss: float) -> None:
        step = trainer.epoch * trainer.steps_per_epoch + trainer.step
        self._write(step, {"step/loss": loss, "step/learning_rate": trainer.schedule.last_learning_rate})
        self._following.step(trainer, loss)

    def epoch(self, trainer: Trainer, row: Epoch) -> None:
        step = row.epoch * trainer.steps_per_epoch
        self._write(
            step,
            {
                "loss/training": row.train_loss,
                "loss/held_out": row.test_loss,
                "accuracy/training": row.train_accuracy,
                "accuracy/held_out": row.test_accuracy,
                "images_per_s": row.images_per_s,
                "unreadable_images": row.unreadable,
            },
        )
        self._flush()
        self._following.epoch(trainer, row)

    def note(self, text: str) -> None:
        self._following.note(text)

    def _write(self, step: int, values: dict[str, float]) -> None:
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            raise self._refused(error) from error

    def _flush(self) -> None:
        try:
            self._writer.flush()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> RecipeError:
        return RecipeError(
            f"cannot write to {self._folder} ({error}). The last checkpoint is untouched; free some space, then go on "
            "with --resume"
        )
