"""A training run from its settings to its files; under torchrun, on all its processes."""

import csv
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vggfast.models
from vggfast.atomic_files import remove_leftovers
from vggfast.checkpoint_files import save_tensors
from vggfast.recipes import RecipeError, checkpoint, curve, warm_start
from vggfast.recipes import data as datasets
from vggfast.recipes.config import MODELS, RECIPES, TrainConfig
from vggfast.recipes.distributed import Processes, local_device, processes
from vggfast.recipes.trainer import CHECKPOINT, Epoch, Listener, Trainer
from vggfast.weights import load_weights

__all__ = ["Epoch", "Listener", "Result", "TrainConfig", "Trainer", "choose_device", "fit"]

WEIGHTS, METRICS, CURVE = "model.safetensors", "metrics.csv", "curve.png"


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
    and resumed ends with bitwise the weights of one that was not. Started by torchrun, every process takes its share of
    each batch and the first one writes the files, in a folder that all of them can read.

    Args:
        resume: go on from the checkpoint in the output folder.
        overwrite: start anew although there is a checkpoint, and replace it; without this, it is an error.
        model: train this in place of `config.model`: from images [N, C, size, size] to scores [N, classes].
        listener: told of each step and epoch, in every process.

    Raises RecipeError for settings, data, checkpoints or disks that do not allow the run, and for a loss that is not
    finite.
    """
    device = local_device(choose_device(config.device))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with processes(device) as group, ExitStack() as held:
        if group.first:
            held.enter_context(_no_empty_folder(Path(config.output)))
        return _fit(config, device, group, resume, overwrite, model, listener or Listener(), held)


@contextmanager
def _no_empty_folder(output: Path) -> Iterator[None]:
    """Remove, after an exception, the folder and its parents where they were not there before and are still empty."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it holds something, or was never made
                folder.rmdir()
        raise


def _fit(
    config: TrainConfig,
    device: torch.device,
    group: Processes,
    resume: bool,
    overwrite: bool,
    model: nn.Module | None,
    listener: Listener,
    held: ExitStack,
) -> Result:
    output = Path(config.output)
    _check_place(config)
    if group.first:
        prepare_output(output, resume, overwrite)
        held.enter_context(_alone_in(output))
    data = datasets.load(
        config.data,
        size=config.size,
        batch_size=config.batch_size,
        seed=config.seed,
        limit=config.limit,
        workers=config.workers,
        val=config.val,
        augment=config.augment,
        scale=config.scale_range,
        share=datasets.Share(group.rank, group.world, config.accumulate),
    )
    torch.manual_seed(config.seed)
    name = config.model if model is None else type(model).__name__
    model = build_model(config.model, data) if model is None else model
    if not resume and (report := _start(model, config)) and group.first:
        listener.note(report)
    trainer = Trainer(config, data, device, model, group, name)
    if resume:
        trainer.restore(output / CHECKPOINT)
    if config.tensorboard and group.first:
        from vggfast.recipes.tensorboard import TensorBoard

        listener = TensorBoard(output, listener)
    listener.start(trainer)
    while trainer.epoch < config.epochs:
        row = trainer.run_epoch(listener)
        trainer.save()
        write_metrics(trainer)
        listener.epoch(trainer, row)
    write_weights(trainer)
    write_metrics(trainer)  # again: the run may have been stopped between its last checkpoint and its metrics
    if group.first:
        curve.plot(trainer.history, output / CURVE, f"{trainer.name} on {config.data}")
    return Result(
        trainer.tested,
        trainer.history[-1].test_accuracy,
        trainer.history,
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
    there = next((output / name for name in (CHECKPOINT, WEIGHTS) if (output / name).exists()), None)
    if there and not (resume or overwrite):
        go_on = "Go on from it with --resume, replace it" if there.name == CHECKPOINT else "Replace it"
        raise RecipeError(
            f"{there} exists: a run was there before. {go_on} with --overwrite, or choose another --output"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, WEIGHTS, METRICS, CURVE):
            remove_leftovers(output / name)
        with checkpoint.output_file(output / ".writable"):
            pass
        (output / ".writable").unlink()
    except (OSError, RecipeError) as error:
        raise RecipeError(f"cannot write to the output folder {output} ({error}). Choose another --output") from error
    return output


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Keep other runs out of the folder; RecipeError where one is in it. Where a file system has no locks nothing is kept."""
    folder = os.open(output, os.O_RDONLY)
    try:
        _lock(folder, output)
        yield
    finally:
        os.close(folder)  # and with it the lock


def _lock(folder: int, output: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RecipeError(
            f"{output}: another run is writing there. Wait for its end, or choose another --output"
        ) from error
    except OSError:  # a file system without locks
        pass


def _check_place(config: TrainConfig) -> None:
    """RecipeError where the output would be taken for a class of the images."""
    root, output = (Path(os.path.realpath(place)) for place in (config.data, config.output))  # links in a circle stay
    if config.data not in RECIPES and root.is_dir() and not (root / "train").is_dir() and output.is_relative_to(root):
        raise RecipeError(
            f"output: {config.output} lies in {config.data}, of which each folder is a class of images. Choose another --output"
        )


def write_metrics(trainer: Trainer) -> None:
    """Write metrics.csv, one row for each epoch so far, to the output folder, in the first process."""
    if not trainer.processes.first:
        return
    with (
        checkpoint.output_file(Path(trainer.config.output) / METRICS) as temporary,
        temporary.open("w", newline="") as file,
    ):
        table = csv.DictWriter(file, [field.name for field in dataclasses.fields(Epoch)])
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in trainer.history)


def _start(model: nn.Module, config: TrainConfig) -> str:
    """Give `model` the trained weights that the run is to start from; what was done, or "" where it starts at random."""
    if config.warm_start:
        return warm_start.apply(model, config.warm_start)
    if not config.weights:
        return ""
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("classifier.6.")}
    try:
        load_weights(model, config.weights, adapt=True)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise RecipeError(f"weights: {error}\n--model names the network: {', '.join(MODELS)}") from error
    same = before and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    kept = "; the last layer stays random, for it has other classes" if same else ""
    return f"starts from {config.weights}{kept}"


def write_weights(trainer: Trainer) -> None:
    """Write the weights as safetensors to the output folder, with what others need to use them (JSON) in it."""
    if not trainer.processes.first:
        return
    data = trainer.data
    about: dict[str, Any] = {"model": trainer.name, "in_channels": data.in_channels, "classes": data.classes}
    about["preprocessing"] = {
        "size": trainer.config.size,
        **(data.normalisation.to_dict() if data.normalisation else {}),
    }
    if trainer.config.data in RECIPES:
        about["preprocessing"]["scale"] = trainer.config.size  # trained on whole images: nothing is to be cropped
    with checkpoint.output_file(Path(trainer.config.output) / WEIGHTS) as temporary:
        save_tensors(trainer.tested.state_dict(), temporary, about)
