"""The training loop: SGD with momentum, a warm-up and a cosine, checkpoints that a run resumes from bit for bit."""

import csv
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vggfast.models
from vggfast.recipes import RecipeError, checkpoint, curve
from vggfast.recipes import data as datasets
from vggfast.recipes.config import AMP_DTYPES, FREE_SETTINGS, TrainConfig

__all__ = ["Epoch", "Listener", "Result", "TrainConfig", "Trainer", "choose_device", "fit"]

CHECKPOINT, WEIGHTS, METRICS, CURVE = "checkpoint.pt", "model.safetensors", "metrics.csv", "curve.png"
MOMENTUM = 0.9
WARM_UP = 0.2  # the part of all steps in which the learning rate rises


@dataclass(frozen=True)
class Epoch:
    """One row of metrics.csv. Losses are mean cross-entropies in nats, accuracies fractions in [0, 1]."""

    epoch: int  # from 1
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    learning_rate: float  # at the end of the epoch
    images_per_s: float  # of the training part
    seconds: float  # training and testing, in the process that finished the epoch


@dataclass(frozen=True)
class Result:
    """What `fit` returns: the trained model, its metrics, and the files in the output folder."""

    model: nn.Module
    test_accuracy: float
    history: list[Epoch]
    checkpoint: Path
    weights: Path
    metrics: Path
    curve: Path


class Listener:
    """What `fit` calls as it goes; this one does nothing."""

    def start(self, trainer: "Trainer") -> None:
        """Everything is ready and, when resuming, restored."""

    def step(self, trainer: "Trainer", loss: float) -> None:
        """A step was made; `loss` is the mean over the epoch so far."""

    def epoch(self, trainer: "Trainer", row: Epoch) -> None:
        """An epoch was trained, tested and saved."""


def fit(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    model: nn.Module | None = None,
    listener: Listener | None = None,
) -> Result:
    """Train `config.model` on `config.data`, test it after each epoch, and leave the results in `config.output`.

    Seeds torch's generators and sets its threads. On a CPU, with the same number of threads, a run that was stopped
    and resumed ends with bitwise the weights of one that was not.

    Args:
        resume: go on from the checkpoint in the output folder.
        overwrite: start anew although there is a checkpoint, and replace it; without this, it is an error.
        model: train this in place of `config.model`: from images [N, C, size, size] to scores [N, classes].
        listener: told of each step and epoch.

    Raises RecipeError for settings, data, checkpoints or disks that do not allow the run, and for a loss that is not
    finite.
    """
    listener = listener or Listener()
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    output = prepare_output(Path(config.output), resume, overwrite)
    data = datasets.load(
        config.data,
        size=config.size,
        batch_size=config.batch_size,
        seed=config.seed,
        limit=config.limit,
        workers=config.workers,
    )
    torch.manual_seed(config.seed)
    trainer = Trainer(config, data, device, model or build_model(config.model, data))
    if resume:
        trainer.restore(output / CHECKPOINT)
    listener.start(trainer)
    while trainer.epoch < config.epochs:
        row = trainer.run_epoch(listener)
        trainer.save()
        write_metrics(trainer)
        listener.epoch(trainer, row)
    history = trainer.history
    write_weights(trainer)
    write_metrics(trainer)  # again: the run may have been stopped between its last checkpoint and its metrics
    curve.plot(history, output / CURVE, f"{config.model} on {config.data}")
    return Result(
        trainer.model,
        history[-1].test_accuracy,
        history,
        *(output / name for name in (CHECKPOINT, WEIGHTS, METRICS, CURVE)),
    )


def build_model(name: str, data: datasets.Data) -> nn.Module:
    """The vggfast model `name` for the channels and classes of `data`, randomly initialised."""
    builder = getattr(vggfast.models, name)
    model: nn.Module = builder(num_classes=len(data.classes), in_channels=data.in_channels)
    return model


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if torch sees one. Raises RecipeError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise RecipeError(
            f"device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices. Use --device cpu, "
            "or install a CUDA build of torch and NVIDIA's driver"
        )
    return device


def prepare_output(output: Path, resume: bool, overwrite: bool) -> Path:
    """Make the folder and see that it can be written; RecipeError where not, or where a checkpoint would be lost."""
    if resume and overwrite:
        raise RecipeError("expected --resume (go on) or --overwrite (start anew), got both")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, WEIGHTS, METRICS, CURVE):
            checkpoint.remove_leftovers(output / name)
        with checkpoint.atomic_write(output / ".writable"):
            pass
        (output / ".writable").unlink()
    except (OSError, RecipeError) as error:
        raise RecipeError(f"cannot write to the output folder {output} ({error}). Choose another --output") from error
    if (output / CHECKPOINT).exists() and not (resume or overwrite):
        raise RecipeError(
            f"{output / CHECKPOINT} exists: a run was there before. Go on from it with --resume, replace it with "
            "--overwrite, or choose another --output"
        )
    return output


def learning_rate_factor(step: int, total: int) -> float:
    """Factor of the peak learning rate at `step` of `total`: up in a straight line, then down half a cosine to 0."""
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


class Trainer:
    """A model in training and all state that a checkpoint has to hold.

    Attributes:
        epoch: epochs finished.
        step: steps made in the epoch that is under way.
        sums: [3] float64 over those steps: loss times images, images classified right, images.
        history: one row for each epoch finished.
    """

    def __init__(self, config: TrainConfig, data: datasets.Data, device: torch.device, model: nn.Module) -> None:
        self.config, self.data, self.device = config, data, device
        self.steps_between_reports = 1 if device.type == "cpu" else 10  # reading the loss makes a GPU wait
        self.steps_per_epoch = math.ceil(data.train_size / config.batch_size)
        self.model = model.to(device)
        # fused: one pass over parameter, gradient and momentum; VGG's classifier alone has 120 million of each
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay, fused=True
        )
        total = config.epochs * self.steps_per_epoch
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, total)
        )
        self.scaler = torch.amp.grad_scaler.GradScaler(device.type, enabled=config.amp == "fp16")
        self.autocast = torch.autocast(device.type, AMP_DTYPES[config.amp], enabled=config.amp != "none")
        self.epoch, self.step = 0, 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.history: list[Epoch] = []

    def run_epoch(self, listener: Listener) -> Epoch:
        """Train on what is left of the epoch under way, test, and add a row to the history."""
        started = time.perf_counter()
        images_before = self.sums[2].item()
        self._train_epoch(listener)
        loss, correct, images = self.sums.tolist()  # waits for the device
        trained = time.perf_counter()
        test_loss, test_accuracy = self.evaluate()
        row = Epoch(
            epoch=self.epoch + 1,
            train_loss=loss / images,
            train_accuracy=correct / images,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            learning_rate=float(self.scheduler.get_last_lr()[0]),
            images_per_s=(images - images_before) / (trained - started),
            seconds=time.perf_counter() - started,
        )
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        return row

    def _train_epoch(self, listener: Listener) -> None:
        self.model.train()
        for images, labels in self.data.train_batches(self.epoch, start=self.step):
            self.train_step(images, labels)
            self.step += 1
            if self.step % self.steps_between_reports == 0:
                loss, _, seen = self.sums.tolist()
                if not math.isfinite(loss):
                    raise RecipeError(
                        f"the loss became {loss} in step {self.step} of epoch {self.epoch + 1}: training diverged. "
                        f"Use an --lr below {self.config.lr:g}"
                    )
                listener.step(self, loss / seen)
            if self.config.save_every and self.step % self.config.save_every == 0:
                self.save()

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One optimiser step on images [N, C, S, S] float32 and labels [N] int64, both on the CPU."""
        images = images.to(self.device, memory_format=torch.channels_last)
        labels = labels.to(self.device)
        with self.autocast:
            scores = self.model(images)
            loss = F.cross_entropy(scores, labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        with torch.no_grad():
            correct = (scores.argmax(1) == labels).sum()
            self.sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the held-out images."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in self.data.test_batches():
            images = images.to(self.device, memory_format=torch.channels_last)
            labels = labels.to(self.device)
            with self.autocast:
                scores = self.model(images)
            loss += F.cross_entropy(scores.float(), labels, reduction="sum")
            correct += (scores.argmax(1) == labels).sum()
        return loss.item() / self.data.test_size, correct.item() / self.data.test_size

    def save(self) -> None:
        """Write the checkpoint to the output folder."""
        checkpoint.save(
            Path(self.config.output) / CHECKPOINT,
            {
                "config": dataclasses.asdict(self.config),
                "progress": {"epoch": self.epoch, "step": self.step, "sums": self.sums.cpu()},
                "history": [dataclasses.asdict(row) for row in self.history],
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": checkpoint.rng_state(self.device),
            },
        )

    def restore(self, path: Path) -> None:
        """Go back to the state that `save` wrote; RecipeError where it is damaged or of another run."""
        state = checkpoint.load(path)
        mine = dataclasses.asdict(self.config)
        for name in sorted(mine.keys() - FREE_SETTINGS):
            if mine[name] != state["config"].get(name):
                flag = f"--{name.replace('_', '-')}"
                raise RecipeError(
                    f"{path} was written with {flag} {state['config'].get(name)}, this run has {flag} {mine[name]}. "
                    f"Leave {flag} out to go on as before, or start again with --overwrite"
                )
        checkpoint.load_weights_into(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        checkpoint.set_rng_state(state["rng"], self.device)
        self.epoch, self.step = state["progress"]["epoch"], state["progress"]["step"]
        self.sums.copy_(state["progress"]["sums"])
        self.history = [Epoch(**row) for row in state["history"]]


def write_metrics(trainer: Trainer) -> None:
    """Write metrics.csv, one row for each epoch so far, to the output folder."""
    with (
        checkpoint.atomic_write(Path(trainer.config.output) / METRICS) as temporary,
        temporary.open("w", newline="") as file,
    ):
        table = csv.DictWriter(file, [field.name for field in dataclasses.fields(Epoch)])
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in trainer.history)


def write_weights(trainer: Trainer) -> None:
    """Write the weights as safetensors to the output folder, with the model's name, channels and classes (JSON) in it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.model.state_dict().items()}
    data = trainer.data
    about = {"model": trainer.config.model, "in_channels": data.in_channels, "classes": data.classes}
    with checkpoint.atomic_write(Path(trainer.config.output) / WEIGHTS) as temporary:
        try:
            save_file(tensors, temporary, {name: json.dumps(value) for name, value in about.items()})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
