"""The commands `evaluate` and `predict`: options in, tables or JSON out."""

import json
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
from vggfast.recipes.config import AMP_DTYPES, MOST_THREADS
from vggfast.recipes.evaluate import BUILT_IN, Evaluation, Labelled, find
from vggfast.recipes.evaluate import evaluate as run_evaluation
from vggfast.recipes.predict import default_scales, default_size, open_model
from vggfast.recipes.predict import predict as run_prediction
from vggfast.recipes.train import choose_device
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
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
    _warn(models, images.normalisation_known)
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
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The most likely classes of each image, with their names and probabilities.

    Exits with 1 where an image cannot be read; the others are shown all the same.
    """
    place, models = _prepare(weights, preprocessing, device, threads)
    views = _views(models, size or default_size(models), scales, dense, crops, flip)
    predictions = run_prediction(images, models, views, top=top, device=place)
    _warn(models)
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
    place = choose_device(device)
    if threads is not None:
        if threads > MOST_THREADS:
            raise RecipeError(f"--threads: expected at most {MOST_THREADS}, got {threads}")
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


def _warn(models: list[LoadedModel], known: bool = False) -> None:
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
