"""A picture of a network: its layers in the order of execution, their shapes, kernels and, where measured, times."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vggfast.explanation import Explanation, Row
from vggfast.fused import Executed, FusedSequential, observer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINOGRAD, DIRECT, LINEAR, POOL, FUSED, TORCH = "#1f6feb", "#d9822b", "#c2497d", "#2f9e6e", "#7a4fd0", "#b6bec9"
DARK, LIGHT = "#2b3440", "#6b7480"
KINDS = {
    WINOGRAD: "fused, Winograd F(4x4, 3x3)",
    DIRECT: "fused, direct",
    LINEAR: "linear, weights read once",
    POOL: "fused max pool",
    FUSED: "fused, on tensor cores",
    TORCH: "torch's own operators",
}


def measure(model: nn.Module, *inputs: Any, rounds: int = 5) -> dict[str, float]:
    """Seconds of each row of `explain(model, *inputs)`, by its name: the median of forward runs, without gradients."""
    names = {id(module): name for name, module in model.named_modules()}
    containers = [m for m in model.modules() if isinstance(m, FusedSequential)]
    inside = {id(child) for m in containers for child in m.children()}
    outside = [m for m in model.modules() if id(m) not in inside and not list(m.children())]
    device = next(iter(model.parameters())).device
    taken: dict[str, float] = defaultdict(float)
    start = 0.0

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def begin(*_: Any) -> None:
        nonlocal start
        start = now()

    def end(name: str) -> None:
        taken[name] += now() - start
        begin()

    def executed(step: Executed) -> None:
        last = f"..{step.names[-1]}" if len(step.names) > 1 else ""
        end(names.get(id(step.modules[0]), step.names[0]) + last)

    found: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        for module in [*containers, *outside]:
            stack.callback(module.register_forward_pre_hook(begin).remove)
        for module in outside:
            stack.callback(module.register_forward_hook(lambda m, *_: end(names[id(m)])).remove)
        token = observer.set(executed)
        stack.callback(observer.reset, token)
        stack.enter_context(torch.no_grad())
        for count in range(rounds + 1):
            taken.clear()
            model(*inputs)
            if count:  # the first fills caches
                for name, seconds in taken.items():
                    found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def draw(explanation: Explanation, path: Path, title: str, seconds: dict[str, float] | None = None) -> None:
    """Write the picture to `path`, in the format of its suffix (PNG, PDF, SVG). `seconds` as from `measure`.

    Raises ValueError for a suffix of no format, OSError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = explanation.rows
    height = 1.5 + 0.42 * len(rows)
    figure = Figure(
        figsize=(13 if seconds else 10.5, height), dpi=110, facecolor="white"
    )  # no pyplot: no global backend
    top, bottom = 1 - 1.15 / height, 0.15 / height
    widths = {"net": 0.35, "text": 0.41, "time": 0.23} if seconds else {"net": 0.44, "text": 0.55}
    left, axes = 0.01, {}
    for name, width in widths.items():
        axes[name] = figure.add_axes((left, bottom, width, top - bottom))
        axes[name].set(ylim=(len(rows) - 0.5, -0.5))
        axes[name].axis("off")
        left += width
    figure.text(0.02, 1 - 0.35 / height, title, fontsize=14, weight="bold", color=DARK, va="center")
    summary = f"{explanation.fused_convolutions} of {explanation.convolutions} convolutions run on fused kernels"
    if explanation.gpu is not None:
        summary += f", on a GPU of {explanation.gpu} with VGGFAST_CUDA_PLAN={explanation.cuda_plan}"
    if seconds:
        summary += f";  {sum(seconds.values()) * 1e3:.1f} ms in all, median of each layer"
    figure.text(0.02, 1 - 0.65 / height, summary, fontsize=10, color=LIGHT, va="center")
    _net(axes["net"], rows)
    _kernels(axes["text"], rows)
    if seconds:
        _times(axes["time"], rows, seconds)
    _legend(figure, rows, 1 - 0.95 / height)
    figure.savefig(path)


def _colour(row: Row) -> str:
    if not row.fused:
        return TORCH
    found = {"winograd": WINOGRAD, "direct": DIRECT, "linear": LINEAR, "max_pool": POOL}
    return next((colour for word, colour in found.items() if word in row.kernel), FUSED)


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape[1:])) or "scalar"


def _net(axes: Axes, rows: tuple[Row, ...]) -> None:
    """Each layer as a bar as wide as its output is high, on a square-root scale; the output's shape beside it. Gradients are thin."""
    side = [(row.output[2] if len(row.output) == 4 else 1) ** 0.5 for row in rows]
    axes.set_xlim(-1.05, 1.95)
    for y, (row, width) in enumerate(zip(rows, side, strict=True)):
        half = max(0.06, 0.98 * width / max(side))
        gradient = row.layers.startswith("grad_")
        axes.barh(y, 2 * half, left=-half, height=0.4 if gradient else 0.78, color=_colour(row))
        axes.text(1.08, y, _shape(row.output), fontsize=8.5, va="center", color=DARK)
        if y + 1 < len(rows):
            axes.plot([0, 0], [y, y + 1], color=LIGHT, linewidth=1, zorder=0)


def _kernels(axes: Axes, rows: tuple[Row, ...]) -> None:
    axes.set_xlim(0, 1)
    for y, row in enumerate(rows):
        axes.text(0.0, y - 0.17, row.layers.replace("->", "→"), fontsize=9, va="center", color=DARK, weight="bold")
        kernel = row.kernel if row.fused else f"torch: {row.reason}" if row.reason else "torch"
        axes.text(0.0, y + 0.2, f"{row.name}   {_cut(kernel, 74)}", fontsize=7.5, va="center", color=LIGHT)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _times(axes: Axes, rows: tuple[Row, ...], seconds: dict[str, float]) -> None:
    longest, total = max(seconds.values()), sum(seconds.values())
    axes.set_xlim(0, 1.65 * longest)
    for y, row in enumerate(rows):
        if (value := seconds.get(row.name)) is not None and not row.layers.startswith("grad_"):
            axes.barh(y, value, height=0.62, color=_colour(row))
            label = f"{value * 1e3:.2f} ms  {value / total:.0%}"
            axes.text(value + 0.03 * longest, y, label, fontsize=8.5, va="center", color=DARK)


def _legend(figure: Any, rows: tuple[Row, ...], y: float) -> None:
    from matplotlib.patches import Patch

    used = {_colour(row) for row in rows}
    patches = [Patch(color=colour, label=label) for colour, label in KINDS.items() if colour in used]
    figure.legend(
        handles=patches, loc="center left", bbox_to_anchor=(0.013, y), ncols=len(patches), frameon=False, fontsize=8.5,
        handlelength=1, handleheight=1, columnspacing=1.5, borderpad=0,
    )  # fmt: skip
