"""Everything that determines a training run, checked, with the recipe for each kind of data."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vggfast.recipes import RecipeError, checkpoint

ModelName = Literal[
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vgg16c", "vgg11_lrn"
]
AmpName = Literal["none", "bf16", "fp16"]
MODELS: tuple[str, ...] = get_args(ModelName)
AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# What `TrainConfig.recipe` changes in TrainConfig's defaults, which are those of the digits. The folder's are a start
# for images of natural scenes; the optimiser is the paper's (momentum, weight decay, learning rate; section 3.1).
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "fake": {"epochs": 2},
    "folder": {"model": "vgg16_bn", "size": 224, "epochs": 30, "lr": 0.01},
}

# Without BatchNorm the loss stays on its first plateau for some epochs, and only a larger step leaves it. Measured with
# vgg11; deeper networks may need the paper's way, starting from the weights of a shallower one.
DIGITS_WITHOUT_BATCH_NORM = {"epochs": 12, "lr": 0.02}

# Where a setting has a lower bound; VGG halves the image five times, so it needs 32 pixels.
LEAST = {"epochs": 1, "batch_size": 1, "size": 32, "limit": 1, "seed": 0, "workers": 0, "threads": 1, "save_every": 1}

# Settings that may differ between the run that wrote a checkpoint and the one that resumes from it.
FREE_SETTINGS = {"output", "device", "threads", "workers", "save_every"}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run. The defaults are the recipe for the digits.

    Args:
        data: "digits", "fake" or a folder of images; see `vggfast.recipes.data.load`.
        output: folder for the checkpoint, metrics, learning curve and final weights; made if missing.
        model: one of `MODELS`.
        epochs: passes over the training images.
        batch_size: images per optimiser step.
        lr: learning rate at its peak, a fifth of the way through.
        weight_decay: L2 penalty, on all parameters.
        size: height and width of the images, in pixels, at least 32.
        limit: use at most this many training images, and as many test images.
        seed: of initialisation, order, augmentation and dropout.
        device: "auto" (a GPU if torch sees one), "cpu", "cuda" or "cuda:N".
        amp: mixed precision: "none", "bf16" or "fp16" (which scales the loss).
        threads: CPU threads; None leaves torch's setting.
        workers: processes that read the images of a folder.
        save_every: also write a checkpoint every so many steps; one is always written after each epoch.
    """

    data: str = "digits"
    output: str = "runs/digits"
    model: str = "vgg11_bn"
    epochs: int = 5
    batch_size: int = 64
    lr: float = 0.004
    weight_decay: float = 5e-4
    size: int = 32
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    amp: str = "none"
    threads: int | None = None
    workers: int = 0
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name}: expected at least {least}, got {value}")
        for name, value, choices in (("model", self.model, MODELS), ("amp", self.amp, tuple(AMP_DTYPES))):
            if value not in choices:
                raise RecipeError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")

    @classmethod
    def recipe(cls, data: str, **settings: Any) -> "TrainConfig":
        """The recipe for `data`, with `settings` in place of its own; `output` defaults to runs/<name of the data>."""
        defaults = RECIPES.get(data, RECIPES["folder"])
        if data == "digits" and not settings.get("model", cls.model).endswith("_bn"):
            defaults = DIGITS_WITHOUT_BATCH_NORM
        return cls(**{"data": data, "output": str(Path("runs") / Path(data).name), **defaults, **settings})

    @classmethod
    def resumed(cls, output: str, **settings: Any) -> "TrainConfig":
        """The settings of the run that wrote the checkpoint in `output`, with `settings` in place of its own.

        Raises RecipeError where there is no readable checkpoint.
        """
        saved = checkpoint.load(Path(output) / "checkpoint.pt", mmap=True)["config"]
        return cls(**{**saved, "output": output, **settings})
