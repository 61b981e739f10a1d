"""Everything that determines a training run, checked, with the recipe for each kind of data."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vggfast.recipes import RecipeError, checkpoint

ModelName = Literal[
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vgg16c", "vgg11_lrn"
]
AmpName = Literal["none", "bf16", "fp16"]
PresetName = Literal["paper", "modern"]
MODELS: tuple[str, ...] = get_args(ModelName)
AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("cosine", "plateau")
AUGMENTATIONS = ("none", "shift", "affine", "paper", "modern")

# What `TrainConfig.recipe` changes in TrainConfig's defaults, which are those of the digits.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist": {"augment": "affine", "epochs": 15, "lr": 0.01},
    "fake": {"epochs": 2},
}

# For folders and shards of photographs. "paper" is section 3.1 of arXiv 1409.1556; BatchNorm, which the paper did not
# have, lets a deep network start from random weights.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "model": "vgg16_bn", "size": 224, "epochs": 74, "batch_size": 256, "lr": 0.01, "weight_decay": 5e-4,
        "schedule": "plateau", "augment": "paper",
    },
    "modern": {
        "model": "vgg16_bn", "size": 224, "epochs": 90, "batch_size": 256, "lr": 0.05, "weight_decay": 1e-4,
        "schedule": "cosine", "warm_up": 0.05, "augment": "modern", "label_smoothing": 0.1,
    },
}  # fmt: skip
OF_THE_DATA = {"model", "size", "augment"}  # what a preset does not change for digits, mnist and fake

# Without BatchNorm the loss stays on its first plateau for some epochs, and only a larger step leaves it. Measured with
# vgg11; deeper networks may need the paper's way, starting from the weights of a shallower one.
DIGITS_WITHOUT_BATCH_NORM = {"epochs": 12, "lr": 0.02}

# Where a setting has a lower bound; VGG halves the image five times, so it needs 32 pixels.
LEAST = {
    "epochs": 1, "batch_size": 1, "size": 32, "limit": 1, "seed": 0, "workers": 0, "threads": 1, "save_every": 1,
    "accumulate": 1, "patience": 0,
}  # fmt: skip

MOST_THREADS = 1024  # a pool of more takes minutes to start, and no machine runs it: a slip of the hand

# Settings that may differ between the run that wrote a checkpoint and the one that resumes from it: they change no result.
FREE_SETTINGS = {"output", "device", "threads", "workers", "save_every", "tensorboard", "gradient_checkpointing"}


def check_data(data: str) -> None:
    """RecipeError where no data are named: as a path, that is the folder where the program runs."""
    if not data.strip():
        raise RecipeError("--data: expected digits, mnist, fake, a folder or shards, got nothing")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run. The defaults are the recipe for the digits.

    Args:
        data: "digits", "mnist", "fake", a folder of images, or shards; see `vggfast.recipes.data.load`.
        output: folder for the checkpoint, metrics, learning curve and final weights; made if missing.
        val: folder or shards with the held-out images, where `data` does not hold them.
        model: one of `MODELS`.
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes and all pieces.
        accumulate: pieces that each process cuts its images of a step into; their gradients are added.
        lr: learning rate at its peak.
        schedule: "cosine": up in a straight line for a part `warm_up` of all steps, then down to 0; "plateau": divided
            by 10 when held-out accuracy has not risen for more than `patience` epochs, three times at most.
        weight_decay: L2 penalty, on all parameters.
        label_smoothing: the part of the target that is spread over all classes.
        ema: if not 0, what is tested and written as weights is the exponential moving average with this decay.
        augment: "shift" or "affine" for digits, mnist and fake, "paper" or "modern" for images of folders and shards;
            "none" for all.
        size: height and width of the images, in pixels, at least 32.
        scale: length of the shorter edge that "paper" crops from, fixed ("256") or drawn for each image ("256-512");
            None is the latter at 224 pixels, and in proportion at other sizes.
        weights: trained weights of the same network to start from: a path, a URL, or a name as "VGG16_Weights.DEFAULT". For another
            number of classes the last layer stays random, for other channels of the images the first filters are adapted.
        warm_start: checkpoint of configuration A (vgg11, vgg11_bn, vgg11_lrn) to start from; see `warm_start.apply`.
        limit: use at most this many training images, and as many test images.
        seed: of initialisation, order, augmentation and dropout.
        device: "auto" (a GPU if torch sees one), "cpu", "cuda" or "cuda:N".
        amp: mixed precision: "none", "bf16" or "fp16" (which scales the loss).
        gradient_checkpointing: keep the activations at pools only and calculate the others again for the gradient.
        threads: CPU threads; None leaves torch's setting.
        workers: processes that read images, for each process that trains.
        save_every: also write a checkpoint every so many steps; one is always written after each epoch.
        tensorboard: also write the metrics for TensorBoard, to the folder tensorboard in `output`.
    """

    data: str = "digits"
    output: str = "runs/digits"
    val: str | None = None
    model: str = "vgg11_bn"
    epochs: int = 5
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 0.004
    schedule: str = "cosine"
    warm_up: float = 0.2
    patience: int = 5
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    ema: float = 0.0
    augment: str = "shift"
    size: int = 32
    scale: str | None = None
    weights: str | None = None
    warm_start: str | None = None
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    amp: str = "none"
    gradient_checkpointing: bool = False
    threads: int | None = None
    workers: int = 0
    save_every: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if isinstance(value, float):
                raise RecipeError(f"{name}: expected a whole number, got {value}")
            if value is not None and value < least:
                raise RecipeError(f"{name}: expected at least {least}, got {value}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise RecipeError(f"threads: expected at most {MOST_THREADS}, got {self.threads}")
        for name, choices in (
            ("model", MODELS),
            ("amp", tuple(AMP_DTYPES)),
            ("schedule", SCHEDULES),
            ("augment", AUGMENTATIONS),
        ):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.seed >= 2**63:
            raise RecipeError(f"seed: expected less than 2^63, got {self.seed}")
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")
        for name in ("warm_up", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name}: expected a number >= 0 and < 1, got {getattr(self, name)}")
        if self.weights and self.warm_start:
            raise RecipeError(
                "weights, warm_start: expected one of them: either a whole network's weights, or some of vgg11's"
            )
        for name in ("data", "val", "weights", "warm_start"):
            if (text := getattr(self, name)) is not None and not text.strip():
                raise RecipeError(f"{name}: expected a name or a path, got nothing; leave it out")
        _ = self.scale_range  # raises
        if self.scale is not None and self.augment != "paper":
            raise RecipeError(
                f"scale: only the paper's recipe for folders and shards crops from it, got {self.scale!r} with images that "
                f"are changed as in {self.augment!r}; leave it out"
            )

    @property
    def scale_range(self) -> tuple[int, int]:
        """Least and greatest length of the shorter edge that a training image is cropped from, in pixels."""
        if self.scale is None:
            return self.size * 256 // 224, self.size * 512 // 224
        least, _, greatest = self.scale.partition("-")
        greatest = greatest or least
        if least.isdecimal() and greatest.isdecimal() and self.size <= int(least) <= int(greatest):
            return int(least), int(greatest)
        raise RecipeError(
            f"scale: expected a number of pixels or two as 256-512, none below the size {self.size}, got {self.scale!r}"
        )

    @classmethod
    def recipe(cls, data: str, preset: str | None = None, **settings: Any) -> "TrainConfig":
        """The recipe for `data`, with `settings` in place of its own; `output` defaults to runs/<name of the data>.

        Args:
            preset: "paper" or "modern"; None is the data's own, or for folders and shards "paper".
        """
        if preset is not None and preset not in PRESETS:
            raise RecipeError(f"recipe: expected one of {', '.join(PRESETS)}, got {preset!r}")
        if data not in RECIPES:
            defaults = PRESETS[preset or "paper"]
        elif preset:
            of_preset = {name: value for name, value in PRESETS[preset].items() if name not in OF_THE_DATA}
            defaults = {**RECIPES[data], **of_preset}
        elif data == "digits" and not settings.get("model", cls.model).endswith("_bn"):
            defaults = DIGITS_WITHOUT_BATCH_NORM
        else:
            defaults = RECIPES[data]
        folder = Path(data).parent.name or "shards"
        name = folder if data.endswith(".tar") else os.path.basename(os.path.realpath(data))
        return cls(**{"data": data, "output": str(Path("runs") / name), **defaults, **settings})

    @classmethod
    def resumed(cls, output: str, **settings: Any) -> "TrainConfig":
        """The settings of the run that wrote the checkpoint in `output`, with `settings` in place of its own.

        Raises RecipeError where there is no readable checkpoint.
        """
        path = Path(output) / "checkpoint.pt"
        saved = checkpoint.load(path, mmap=True)["config"]
        with checkpoint.as_expected(path):
            return cls(**{**saved, "output": output, **settings})
