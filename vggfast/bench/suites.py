"""Which comparisons make up the quick and the full form, part by part. A part is a file of results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from vggfast.bench.cases import LAYER_TASKS, LOSSES, Case
from vggfast.bench.contenders import VGGFAST, families
from vggfast.bench.layers import CONFIGS, OTHER_LAYERS, VGG16_LAYERS
from vggfast.bench.measure import Effort, Entry, Group, compare, with_fewer_threads
from vggfast.bench.networks import BATCH_NORM, SMALL

PARTS = ("inference", "training", "perceptual", "layers", "shapes", "memory", "compiled", "threads")

# At most seven rounds of a few runs: CI has three minutes for everything.
QUICK = {
    "inference": Effort(min_rounds=3, max_rounds=7, seconds=4, turn_s=0.02),
    "training": Effort(min_rounds=3, max_rounds=5, seconds=6, turn_s=0.02),
    "perceptual": Effort(min_rounds=3, max_rounds=5, seconds=4, turn_s=0.02),
    "layers": Effort(min_rounds=3, max_rounds=7, seconds=0.4, turn_s=0.005),
    "shapes": Effort(min_rounds=3, max_rounds=7, seconds=0.4, turn_s=0.005),
    "memory": Effort(1, 1, 1, 0.02),
    "compiled": Effort(min_rounds=3, max_rounds=7, seconds=0.4, turn_s=0.005),
    "threads": Effort(min_rounds=3, max_rounds=7, seconds=2, turn_s=0.02),
}
FULL = {
    "inference": Effort(min_rounds=9, max_rounds=25, seconds=50, turn_s=0.3),
    "training": Effort(min_rounds=7, max_rounds=15, seconds=60, turn_s=0.3),
    "perceptual": Effort(min_rounds=7, max_rounds=15, seconds=60, turn_s=0.3),
    "layers": Effort(min_rounds=7, max_rounds=15, seconds=3, turn_s=0.05),
    "shapes": Effort(min_rounds=7, max_rounds=15, seconds=3, turn_s=0.05),
    "memory": Effort(1, 1, 1, 0.02),
    "compiled": Effort(min_rounds=7, max_rounds=15, seconds=3, turn_s=0.05),
    "threads": Effort(min_rounds=7, max_rounds=15, seconds=40, turn_s=0.3),
}


def groups(part: str, device: str, threads: int, full: bool, against: list[str] | None = None) -> list[Group]:
    """The comparisons of a part on a device, "cpu" or "cuda"; with families of ``against`` alone."""
    parts = {
        "inference": _inference,
        "training": _training,
        "perceptual": _perceptual,
        "layers": _layers,
        "shapes": _shapes,
        "memory": _memory,
        "compiled": _compiled,
        "threads": _threads,
    }
    made = []
    for case in (_with(case, device, threads) for case in parts[part](device, full)):
        if part == "threads":
            made.append(with_fewer_threads(case))
            continue
        usual = ["autotune"] if part == "compiled" else _against(case, full, part)
        made.append(compare(part, case, usual if against is None else against, full))
    return made


def _with(case: Case, device: str, threads: int) -> Case:
    values = case.to_dict() | {"device": device, "threads": threads}
    return Case(**values)


def _against(case: Case, full: bool, part: str) -> list[str] | None:
    """Networks other than VGG16, and layers of others, meet torch only: what VGG16 shows of the others holds for them; its
    convolutions on images of 32x32, and VGG16 with BatchNorm, meet torch.compile, too. In the quick form inference alone
    meets everybody, since the others take long to set up. Layers on a GPU meet torch.compile in a part of their own, and
    kernels that no GPU has proven where they are named."""
    if part == "layers" and case.device == "cuda":
        return [family for family in families() if family not in ("compile", "autotune", "patch")]
    if case.subject in (SMALL, BATCH_NORM):
        return ["torch", "compile"]
    others = part == "shapes" or (case.subject in CONFIGS and case.subject != "vgg16")
    if not full and case.task in LOSSES:
        return ["torch", "lpips"]
    return ["torch"] if others or (not full and case.task == "training" and case.device == "cpu") else None


def _inference(device: str, full: bool) -> Iterator[Case]:
    if device == "cuda":
        for batch in (1, 32, 256) if full else (1, 32):
            yield Case("vgg16", "inference", batch, "bf16")
        if full:
            yield Case("vgg16", "inference", 32, "fp32")
    else:
        yield Case("vgg16", "inference", 1, "fp32")
        if full:
            yield Case("vgg16", "inference", 8, "fp32")
            yield Case("vgg16", "inference", 1, "bf16")
            yield Case("vgg16", "inference", 8, "bf16")
    if full:
        for model in ("vgg11", "vgg13", "vgg19"):
            for batch in (32,) if device == "cuda" else (1, 8):
                yield Case(model, "inference", batch, "bf16" if device == "cuda" else "fp32")
        if device == "cpu":
            yield Case(SMALL, "inference", 128, "fp32", size=32)


def _training(device: str, full: bool) -> Iterator[Case]:
    if device == "cuda":
        for batch in (32, 256) if full else (32,):
            yield Case("vgg16", "training", batch, "bf16")
    elif full:
        yield Case("vgg16", "training", 8, "fp32")
        yield Case("vgg16", "training", 8, "bf16")
    else:
        yield Case("vgg16", "training", 1, "fp32")
    if full:
        for model in ("vgg11", "vgg13", "vgg19"):
            yield Case(model, "training", 32 if device == "cuda" else 8, "bf16" if device == "cuda" else "fp32")
        if device == "cpu":
            yield Case(SMALL, "training", 128, "fp32", size=32)
            yield Case(BATCH_NORM, "training", 8, "fp32")


def _perceptual(device: str, full: bool) -> Iterator[Case]:
    dtype: Literal["fp32", "bf16"] = "bf16" if device == "cuda" else "fp32"
    yield Case("vgg16", "lpips", 1, dtype)
    if full:
        yield Case("vgg16", "lpips", 8, dtype)
        yield Case("vgg16", "perceptual", 8, dtype)
        if device == "cpu":
            yield Case("vgg16", "lpips", 8, "bf16")


def _layers(device: str, full: bool) -> Iterator[Case]:
    dtype: Literal["fp32", "bf16"] = "bf16" if device == "cuda" else "fp32"
    tasks = LAYER_TASKS if full else LAYER_TASKS[:3]  # the sum of the three in one is for the full form
    for batch in ((1, 32, 256) if full else (32,)) if device == "cuda" else ((1, 8) if full else (1,)):
        for layer in VGG16_LAYERS:
            for task in tasks:
                if layer.has(task):
                    yield Case(layer.name, task, batch, dtype)
    if device == "cuda" and full:  # TF32
        for layer in VGG16_LAYERS:
            for task in LAYER_TASKS[:3]:
                if layer.has(task):
                    yield Case(layer.name, task, 32, "fp32")


def _shapes(device: str, full: bool) -> Iterator[Case]:
    """On CPUs; in the quick form those whose plans no layer of VGG16 has: few channels, and numbers that fill half a block."""
    if device == "cuda":
        return
    for layer, batch in OTHER_LAYERS.items():
        for task in LAYER_TASKS[:3]:
            if (full or layer.name in ("64to12at112", "48to48at112")) and layer.has(task):
                yield Case(layer.name, task, batch, "fp32")


def _memory(device: str, full: bool) -> Iterator[Case]:
    if device == "cuda":
        for batch in (32, 256) if full else (32,):
            yield Case("vgg16", "training", batch, "bf16")
    else:
        yield Case("vgg16", "training", 8 if full else 1, "fp32")
        if full:
            yield Case("vgg16", "training", 8, "bf16")
            yield Case(BATCH_NORM, "training", 8, "fp32")
            yield Case("vgg16", "inference", 8, "fp32")
            yield Case("vgg16", "lpips", 8, "fp32")
            yield Case("vgg16", "lpips", 8, "bf16")


def _compiled(device: str, full: bool) -> Iterator[Case]:
    """Beside kernels that torch.compile tries out, which takes it seconds a layer: on a GPU, largest batches first."""
    if device != "cuda" or not full:
        return
    for batch in (256, 32, 1):
        for task in LAYER_TASKS[:3]:
            for layer in VGG16_LAYERS:
                if layer.has(task):
                    yield Case(layer.name, task, batch, "bf16")


def _threads(device: str, full: bool) -> Iterator[Case]:
    if device == "cuda":
        return
    yield Case("vgg16", "inference", 1, "fp32")
    if full:
        yield Case("vgg16", "inference", 8, "fp32")
        yield Case("vgg16", "training", 8, "fp32")


def selected(group: Group, labels: set[str]) -> Group:
    """The group with these contenders only, in its order; vggfast is always one, ratios are to it."""
    chosen: tuple[Entry, ...] = tuple(e for e in group.entries if e.label in labels or e.label == VGGFAST.name)
    return Group(group.part, group.case, chosen)
