"""A model in training: its steps, alone or with other processes, and the state that a run resumes from bit for bit."""

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vggfast.recipes import RecipeError, checkpoint
from vggfast.recipes import data as datasets
from vggfast.recipes.config import AMP_DTYPES, FREE_SETTINGS, TrainConfig
from vggfast.recipes.distributed import Processes
from vggfast.recipes.layers import Place, training_form
from vggfast.recipes.schedule import Schedule

CHECKPOINT = "checkpoint.pt"
MOMENTUM = 0.9
NO_CLASS = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class Epoch:
    """One row of metrics.csv. Losses are mean cross-entropies in nats, accuracies fractions in [0, 1]."""

    epoch: int  # from 1
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    learning_rate: float  # of the epoch's last step
    images_per_s: float  # of the training part, all processes
    seconds: float  # training and testing, in the process that finished the epoch
    unreadable: int  # images, for training and held out, that were skipped


class Listener:
    """What `fit` calls as it goes; this one only passes notes on, as warnings."""

    def start(self, trainer: "Trainer") -> None:
        """Everything is ready and, when resuming, restored."""

    def step(self, trainer: "Trainer", loss: float) -> None:
        """A step was made; `loss` is the mean over the epoch so far."""

    def epoch(self, trainer: "Trainer", row: Epoch) -> None:
        """An epoch was trained, tested and saved."""

    def note(self, text: str) -> None:
        """Something that the user should know; only the first process says it."""
        warnings.warn(text, stacklevel=2)


class Trainer:
    """A model in training and all state that a checkpoint has to hold.

    Attributes:
        epoch: epochs finished.
        step: steps made in the epoch that is under way.
        sums: [4] float64 over this process's share of those steps: loss times images, images classified right, images
            seen, images that could not be read.
        history: one row for each epoch finished.
        unreadable: images that could not be read, by any process, and why.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: datasets.Data,
        device: torch.device,
        model: nn.Module,
        processes: Processes | None = None,
        name: str | None = None,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.name = name or config.model  # in what is shown and written
        self.processes = processes or Processes()
        self.share = datasets.Share(self.processes.rank, self.processes.world, config.accumulate)
        self.steps_between_reports = 1 if device.type == "cpu" else 10  # reading the loss makes a GPU wait
        self.steps_per_epoch = math.ceil(data.train_size / config.batch_size)
        self.model = model.to(device)
        self.network: nn.Module = self.model
        if self.processes.world > 1:
            # Statistics of BatchNorm are computed over all processes (layers.py): there are no buffers to broadcast.
            self.network = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.average: AveragedModel | None = None
        if config.ema:
            averaging = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=averaging, use_buffers=True)
        # fused: one pass over parameter, gradient and momentum; VGG's classifier alone has 120 million of each
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = Schedule(self.optimizer, config, self.steps_per_epoch)
        self.scaler = torch.amp.grad_scaler.GradScaler(device.type, enabled=config.amp == "fp16")
        self.autocast = torch.autocast(device.type, AMP_DTYPES[config.amp], enabled=config.amp != "none")
        self.epoch, self.step = 0, 0
        self.place = Place(batch_size=config.batch_size)
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.history: list[Epoch] = []
        self.unreadable: dict[str, str] = {}

    @property
    def tested(self) -> nn.Module:
        """The model that is tested and whose weights are written: the one in training, or its average."""
        return self.model if self.average is None else self.average.module

    def run_epoch(self, listener: Listener) -> Epoch:
        """Train on what is left of the epoch under way, test, and add a row to the history."""
        started = time.perf_counter()
        images_before = self.processes.sum(self.sums)[2].item()
        self._train_epoch(listener)
        loss, correct, images, skipped = self.processes.sum(self.sums).tolist()  # waits for the device
        trained = time.perf_counter()
        test_loss, test_accuracy, test_skipped = self.evaluate()
        self._name_unreadable(listener)
        self._check_finite(test_loss, f"on the held-out images became {test_loss} in epoch {self.epoch + 1}")
        row = Epoch(
            epoch=self.epoch + 1,
            train_loss=loss / self._readable(images, "train on"),
            train_accuracy=correct / images,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            learning_rate=self.schedule.last_learning_rate,
            images_per_s=(images - images_before) / (trained - started),
            seconds=time.perf_counter() - started,
            unreadable=round(skipped) + test_skipped,
        )
        self.schedule.epoch(test_accuracy)
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        return row

    def _train_epoch(self, listener: Listener) -> None:
        self.model.train()
        pieces = self.data.train_batches(self.epoch, start=self.step)
        with training_form(self.model, self.place, self.processes.world, self.config.gradient_checkpointing):
            while self.step < self.steps_per_epoch:
                self.train_step(pieces)
                self.step += 1
                if self.step % self.steps_between_reports == 0:
                    self._report(listener)
                if self.config.save_every and self.step % self.config.save_every == 0:
                    self.save()

    def _report(self, listener: Listener) -> None:
        loss, _, seen, _ = self.processes.sum(self.sums).tolist()
        self._check_finite(loss, f"became {loss} in step {self.step} of epoch {self.epoch + 1}")
        listener.step(self, loss / max(seen, 1))

    def _check_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise RecipeError(f"the loss {what}: training diverged. Use an --lr below {self.config.lr:g}")

    def train_step(self, pieces: Iterator[datasets.Batch]) -> None:
        """One optimiser step: this process's share of the batch, taken from `pieces`, and the others' by all-reduce."""
        count = min(self.config.batch_size, self.data.train_size - self.step * self.config.batch_size)
        share = self.share.cut(count, self.config.batch_size)
        self.optimizer.zero_grad()
        for number, positions in enumerate(share):
            images, labels = next(pieces)
            alone = number < len(share) - 1 and isinstance(self.network, DistributedDataParallel)
            with self.network.no_sync() if alone else nullcontext():  # type: ignore[operator]
                self._backward(images, labels, positions, count)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _backward(self, images: Tensor, labels: Tensor, positions: range, count: int) -> None:
        """Add the gradient of one piece, `positions` of a batch of `count` images, on the CPU, to the parameters'."""
        skipped = len(positions) - len(labels)
        empty = not len(labels)
        if empty and self.processes.world == 1:
            self._pass_over(skipped)
            return
        if empty:  # the other processes need this one's part in their collectives all the same
            images, labels = images.new_zeros(1, *images.shape[1:]), labels.new_full((1,), NO_CLASS)
        self._set_place(positions.start, empty)
        images = images.to(self.device, memory_format=torch.channels_last)
        labels = labels.to(self.device)
        with self.autocast:
            scores = self.network(images)
            loss = F.cross_entropy(
                scores, labels, ignore_index=NO_CLASS, reduction="sum", label_smoothing=self.config.label_smoothing
            )
        # DistributedDataParallel takes the mean over processes; an unreadable image counts as one without a gradient.
        self.scaler.scale(loss * (self.processes.world / count)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            correct = (scores.argmax(1) == labels).sum()
            seen = torch.full_like(loss, 0 if empty else len(labels))
            self.sums += torch.stack([loss, correct, seen, torch.full_like(loss, skipped)])

    def _pass_over(self, skipped: int) -> None:
        """A piece of which no image can be read: gradients of zero, and BatchNorm's statistics see nothing."""
        self.scaler.scale(torch.zeros((), device=self.device))  # as for any loss: it begins with the first
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sums[3] += skipped

    def _set_place(self, first: int, empty: bool) -> None:
        self.place.seed = (self.config.seed, self.epoch, self.step)
        self.place.first, self.place.empty = first, empty
        # For layers that draw from torch's own generators.
        torch.manual_seed(datasets.seed_for(*self.place.seed, first))

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float, int]:
        """Mean loss and accuracy over the held-out images, and how many of them could not be read."""
        model = self.tested.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss times images, images right, images
        for images, labels in self.data.test_batches():
            if not len(labels):
                continue
            images = images.to(self.device, memory_format=torch.channels_last)
            labels = labels.to(self.device)
            with self.autocast:
                scores = model(images)
            loss = F.cross_entropy(scores.float(), labels, reduction="sum")
            correct = (scores.argmax(1) == labels).sum()
            sums += torch.stack([loss, correct, torch.full_like(loss, len(labels))])
        loss_sum, right, seen = self.processes.sum(sums).tolist()
        return loss_sum / self._readable(seen, "test on"), right / seen, self.data.test_size - round(seen)

    def _readable(self, count: float, what: str) -> float:
        """`count` images; RecipeError where there are none."""
        if count:
            return count
        named = "; ".join(f"{name}: {reason}" for name, reason in list(self.data.unreadable.items())[:3])
        raise RecipeError(f"none of the images to {what} could be read: {named or 'see the other processes'}")

    def _name_unreadable(self, listener: Listener) -> None:
        for found in self.processes.gather(self.data.unreadable):
            for name, reason in found.items():
                if name not in self.unreadable and self.processes.first:
                    listener.note(f"{name} cannot be read as an image and is skipped ({reason})")
                self.unreadable.setdefault(name, reason)

    def save(self) -> None:
        """Write the checkpoint to the output folder; every process calls this, the first one writes."""
        sums = self.processes.gather(self.sums.cpu())
        if not self.processes.first:
            return
        checkpoint.save(
            Path(self.config.output) / CHECKPOINT,
            {
                "config": dataclasses.asdict(self.config),
                "data": self._data(),
                "progress": {"epoch": self.epoch, "step": self.step, "sums": torch.stack(sums)},
                "history": [dataclasses.asdict(row) for row in self.history],
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        )

    def _data(self) -> dict[str, Any]:
        """What must be the same when a run goes on, or steps and classes would mean other images."""
        return {
            "training images": self.data.train_size,
            "held-out images": self.data.test_size,
            "classes": self.data.classes,
        }

    def restore(self, path: Path) -> None:
        """Go back to the state that `save` wrote, with any number of processes.

        Raises RecipeError where it is damaged or of another run.
        """
        state = checkpoint.load(path)
        with checkpoint.as_expected(path):
            self._restore(path, state)

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        mine = dataclasses.asdict(self.config)
        for name in sorted(mine.keys() - FREE_SETTINGS):
            if mine[name] != state["config"].get(name):
                flag = f"--{name.replace('_', '-')}"
                raise RecipeError(
                    f"{path} was written with {flag} {state['config'].get(name)}, this run has {flag} {mine[name]}. "
                    f"Leave {flag} out to go on as before, or start again with --overwrite"
                )
        for what, now in self._data().items():
            before = state.get("data", {}).get(what, now)  # older checkpoints do not say
            if before != now:
                raise RecipeError(
                    f"{path} was written with other data: {what}: {before}, now {now}. Put them back as they were, or start "
                    "again with --overwrite"
                )
        checkpoint.load_weights_into(self.model, state["model"], path)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = (int(state["progress"][what]) for what in ("epoch", "step"))
        if not (0 <= self.epoch <= self.config.epochs and self.step >= 0):
            raise ValueError(f"epoch {self.epoch} of {self.config.epochs}, step {self.step}")
        sums = state["progress"]["sums"]
        if len(sums) == self.processes.world:
            self.sums.copy_(sums[self.processes.rank])  # exactly what this process had
        elif self.processes.first:
            self.sums.copy_(sums.sum(0))
        self.history = [Epoch(**row) for row in state["history"]]
