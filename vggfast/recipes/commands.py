"""The commands `train`, `evaluate` and `predict`: options in, tables or JSON out."""

import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vggfast.allocator import keep_freed_memory
from vggfast.loading import LoadedModel
from vggfast.recipes import RecipeError
from vggfast.recipes import train as training
from vggfast.recipes.config import AMP_DTYPES, MOST_THREADS, AmpName, ModelName, PresetName, TrainConfig, check_data
from vggfast.recipes.distributed import rank
from vggfast.recipes.evaluate import BUILT_IN, Evaluation, Labelled, find
from vggfast.recipes.evaluate import evaluate as run_evaluation
from vggfast.recipes.predict import default_scales, default_size, open_model
from vggfast.recipes.predict import predict as run_prediction
from vggfast.recipes.progress import ProgressBar
from vggfast.recipes.views import Views

WeightsOption = Annotated[
    list[str],
    typer.Option(
        help="A checkpoint: torchvision's, timm's, Keras's (.h5) or vggfast's; a run's folder; or a name, as vgg16_bn, for "
        "published weights. Again for an ensemble."
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option(min=32, help="Crop, in pixels. Default: that of the training, else 224; 32 for digits, mnist, fake."),
]
ScalesOption = Annotated[
    str | None,
    typer.Option(
        help="Lengths of the shorter edge to rescale to, as 256,384,512. Default: as in the training, else 256 for crops of 224."
    ),
]
DenseOption = Annotated[bool, typer.Option("--dense", help="The whole image, through the fully convolutional network.")]
CropsOption = Annotated[
    Literal["center", "grid", "none"] | None,
    typer.Option(help="The central crop, or 5x5 of them. Default: center; none with --dense."),
]
FlipOption = Annotated[bool, typer.Option("--flip", help="Mirrored images too.")]
PreprocessingOption = Annotated[
    Literal["imagenet", "caffe"] | None,
    typer.Option(help="How images are normalised, where the checkpoint is wrong about it; caffe is BGR less its mean."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TrainDataOption = Annotated[
    str | None,
    typer.Option(
        help="digits, mnist, fake, a folder with train/<class>/ and val/<class>/, or shards: 'x-{000..003}.tar'."
    ),
]
RecipeOption = Annotated[
    PresetName | None,
    typer.Option(
        "--recipe",
        help="The paper's, the default of folders and shards, or today's. digits, mnist and fake keep their model, size and augmentation with either.",
    ),
]
StartWeightsOption = Annotated[
    str | None,
    typer.Option(help="Trained weights of the same network to start from: a file, a URL, or as VGG16_Weights.DEFAULT."),
]
WarmStartOption = Annotated[
    str | None,
    typer.Option(help="Checkpoint of a vgg11 whose first four convolutions and FC layers to start from."),
]
GradientCheckpointingOption = Annotated[
    bool | None, typer.Option("--gradient-checkpointing", help="Save memory: compute activations twice.")
]
CropScaleOption = Annotated[
    str | None, typer.Option(help="Shorter edge that the paper's recipe crops from: 256, or 256-512.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Use at most so many images of each part, training and held out.")
]
SaveEveryOption = Annotated[
    int | None, typer.Option(min=1, help="Write a checkpoint every so many steps too, not only after each epoch.")
]
TensorBoardOption = Annotated[bool | None, typer.Option("--tensorboard", help="Write metrics for TensorBoard, too.")]


def train(
    data: TrainDataOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.  \\[default: runs/<data>]")] = None,
    val: Annotated[str | None, typer.Option(help="Folder or shards of held-out images, if not in --data.")] = None,
    preset: RecipeOption = None,
    model: Annotated[ModelName | None, typer.Option(help="The model.")] = None,
    weights: StartWeightsOption = None,
    warm_start: WarmStartOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step, of all processes.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Pieces to cut a step into, to save memory.")] = None,
    gradient_checkpointing: GradientCheckpointingOption = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate at its peak.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="L2 penalty.")] = None,
    ema: Annotated[float | None, typer.Option(min=0, help="Decay of an average of the weights; 0: none.")] = None,
    size: Annotated[int | None, typer.Option(min=32, help="Height and width of the images.")] = None,
    scale: CropScaleOption = None,
    limit: LimitOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    amp: Annotated[AmpName | None, typer.Option(help="Mixed precision.")] = None,
    threads: ThreadsOption = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read images.")] = None,
    save_every: SaveEveryOption = None,
    tensorboard: TensorBoardOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Train a VGG; options left out are the recipe's for the data or, with --resume, those of the run it goes on with.

    Leaves checkpoint.pt, model.safetensors, metrics.csv and curve.png in the output folder. Stopped at any moment,
    it goes on from its last checkpoint with --resume. Under torchrun all processes train one model.
    """
    options: dict[str, Any] = {
        "model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
        "size": size, "limit": limit, "seed": seed, "device": device, "amp": amp, "threads": threads,
        "workers": workers, "save_every": save_every, "val": val, "weights": weights, "warm_start": warm_start, "accumulate": accumulate,
        "gradient_checkpointing": gradient_checkpointing, "ema": ema, "scale": scale, "tensorboard": tensorboard,
    }  # fmt: skip
    said = {name: value for name, value in options.items() if value is not None}
    if resume and preset:
        raise RecipeError("--resume goes on with the recipe that the run was started with; leave out --recipe")
    _train(data, output, preset, said, resume, overwrite)


def _train(
    data: str | None, output: Path | None, preset: str | None, said: dict[str, Any], resume: bool, overwrite: bool
) -> None:
    shown = Console(soft_wrap=True, quiet=rank() > 0)  # under torchrun one process speaks
    if data is not None:
        check_data(data)
    folder = str(output or TrainConfig.recipe(data or "digits").output)
    started = time.time()
    if resume:
        config = TrainConfig.resumed(folder, **said, **({"data": data} if data else {}))
    else:
        config = TrainConfig.recipe(data or "digits", preset, **said, output=folder)
    keep_freed_memory()
    try:
        with ProgressBar(shown) as bar:
            result = training.fit(config, resume=resume, overwrite=overwrite, listener=bar)
    except KeyboardInterrupt:
        saved = Path(folder) / "checkpoint.pt"
        if resume or (saved.exists() and saved.stat().st_mtime >= started):
            way = f"go on with: vggfast train --output {shlex.quote(folder)} --resume"
        else:
            way = f"it had saved nothing yet{f', and {saved} is of a run before' if saved.exists() else ''}"
        typer.echo(f"interrupted; {way}", err=True)
        raise typer.Exit(130) from None
    shown.print(f"test accuracy {result.test_accuracy:.2%}", style="bold", highlight=False)
    if skipped := result.history[-1].unreadable:
        shown.print(f"unreadable images skipped in the last epoch: {skipped:,}", style="bold red")
    for what, path in (
        ("learning curve", result.curve),
        ("metrics", result.metrics),
        ("weights", result.weights),
        ("checkpoint", result.checkpoint),
    ):
        shown.print(f"{what + ':':<16}{path}", highlight=False, markup=False)


def evaluate(
    data: Annotated[
        str,
        typer.Option(
            help="digits, mnist, fake, a folder with val/<class>/… images or with <class>/…, or shards as in train."
        ),
    ],
    weights: WeightsOption,
    size: SizeOption = None,
    scales: ScalesOption = None,
    dense: DenseOption = False,
    crops: CropsOption = None,
    flip: FlipOption = False,
    top: Annotated[str | None, typer.Option(help="Right is what is among the k likeliest. Default: 1,5.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many images.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Of <class>/… or shards, the fifth that training held out.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Crops at a time.")] = 16,
    preprocessing: PreprocessingOption = None,
    device: DeviceOption = "auto",
    amp: Annotated[Literal["none", "bf16", "fp16"], typer.Option(help="Mixed precision.")] = "none",
    threads: ThreadsOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Top-1 and top-5 accuracy of a checkpoint, or an ensemble: one crop, dense, multi-scale, multi-crop.

    As in the paper: probabilities (softmax) are averaged over flips, crops, scales and models; dense scores over the map
    before the softmax. --dense --crops grid does both. --scales 256,384,512 --crops grid --flip are the paper's 150 crops.
    """
    place, models = _prepare(weights, preprocessing, device, threads)
    size = size or default_size(models, otherwise=32 if data in BUILT_IN else 224)
    scales = scales or (str(size) if data in BUILT_IN else None)
    views = _views(models, size, scales, dense, crops, flip)
    images = find(data, size=size, limit=limit, held_out=held_out)
    with _Bar(images) as bar:
        result = run_evaluation(
            models, images, views, top=_numbers("top", top), device=place, batch_size=batch_size,
            autocast=AMP_DTYPES[amp], workers=workers, listener=bar.show,
        )  # fmt: skip
    _note_guessed_normalisation(models, images.normalisation_known)
    for text in (*result.unreadable, *result.notes):
        typer.echo(text, err=True)
    if as_json:
        settings = {"data": images.name, "weights": weights, "views": str(views), "views_of_an_image": views.count}
        typer.echo(json.dumps({**settings, **result.to_dict()}, indent=2))
        return
    table = Table(title=Text(f"{images.name}\n{views}"), title_justify="left")
    for column in ("", "accuracy", "error"):
        table.add_column(column, justify="right")
    for k in result.correct:
        table.add_row(f"top-{k}", f"{result.accuracy(k):.2%}", f"{result.error(k):.2%}")
    console = Console(soft_wrap=True)
    console.print(table)
    skipped = f", {len(result.unreadable)} unreadable" if result.unreadable else ""
    console.print(
        f"{result.images:,} images{skipped}, {result.images / result.seconds:.1f} images/s on {place}", highlight=False
    )


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.", readable=False)],
    weights: WeightsOption,
    top: Annotated[int, typer.Option(min=1, help="Classes to show of each image.")] = 5,
    size: SizeOption = None,
    scales: ScalesOption = None,
    dense: DenseOption = False,
    crops: CropsOption = None,
    flip: FlipOption = False,
    preprocessing: PreprocessingOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The most likely classes of each image, with their names and probabilities.

    Exits with 1 where an image cannot be read; the others are shown all the same.
    """
    place, models = _prepare(weights, preprocessing, device, threads)
    views = _views(models, size or default_size(models), scales, dense, crops, flip)
    predictions = run_prediction(images, models, views, top=top, device=place)
    _note_guessed_normalisation(models)
    if as_json:
        shown: list[dict[str, Any]] = [
            {"image": p.image, "error": p.error} if p.error else {"image": p.image, "top": [vars(a) for a in p.answers]}
            for p in predictions
        ]
        typer.echo(json.dumps(shown, indent=2))
    for prediction in predictions:
        if prediction.error:
            typer.echo(f"error: {prediction.error}", err=True)
        elif not as_json:
            typer.echo(prediction.image)
            for answer in prediction.answers:
                typer.echo(f"  {answer.probability:7.2%}  {answer.name}")
    if any(prediction.error for prediction in predictions):
        raise typer.Exit(1)


def _prepare(
    weights: list[str], preprocessing: str | None, device: str, threads: int | None
) -> tuple[torch.device, list[LoadedModel]]:
    keep_freed_memory()
    place = training.choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    return place, [open_model(each, preprocessing) for each in weights]


def _views(
    models: list[LoadedModel], size: int, scales: str | None, dense: bool, crops: str | None, flip: bool
) -> Views:
    lengths = _numbers("scales", scales) or default_scales(models, size)
    chosen: Any = crops or ("none" if dense else "center")
    return Views(size=size, scales=None if lengths is None else tuple(lengths), dense=dense, crops=chosen, flip=flip)


def _numbers(name: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--{name}: expected whole numbers with commas between, got {text!r}") from None


def _note_guessed_normalisation(models: list[LoadedModel], known: bool = False) -> None:
    """Say so where it was a guess how a model's images are normalised."""
    for model in models:
        if not (known or model.normalisation_known):
            typer.echo(
                f"{model.source} does not say how its images were normalised: ImageNet's mean and deviation were taken, as "
                "torchvision's and timm's weights have them; --preprocessing chooses",
                err=True,
            )


class _Bar:
    """How far the evaluation is, and how good so far, on stderr; nothing where that is no terminal."""

    def __init__(self, images: Labelled) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[so_far]}  left"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("evaluating", total=len(images.samples), so_far="")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, result: Evaluation) -> None:
        rates = ", ".join(f"top-{k} {result.accuracy(k):.1%}" for k in result.correct) if result.images else ""
        speed = f"{result.images / result.seconds:.1f} images/s"
        self._progress.update(self._task, completed=result.images + len(result.unreadable), so_far=f"{rates}  {speed}")
