"""The measured times of layers that VGG16 does not have, for docs/numerics.md, from results."""

from __future__ import annotations

from collections.abc import Iterator

from vggfast.bench.layers import OTHER_LAYERS, Layer
from vggfast.bench.plots import TASK_NAMES
from vggfast.bench.report import amount, measured_on
from vggfast.bench.results import Json, contender, group
from vggfast.bench.rows import OURS

RIVALS = ("torch channels_last", "torch NCHW")  # the faster of the two for each layer
TASKS = ("forward", "grad_input", "grad_weight")
NOTHING = "Nothing is recorded yet: `python benchmarks/record.py --part shapes` measures this machine."


def markdown(data: Json) -> str:
    """The section: a line for each layer, a column for each task with our time and the faster of torch's over it."""
    lines = [line for layer, batch in OTHER_LAYERS.items() for line in _lines(data, layer, batch)]
    if not lines:
        return NOTHING
    return "\n".join(
        [
            measured_on(data, ("vggfast", "torch")),
            "Convolution with bias and ReLU in float32: the time of a batch, and how many times as long torch takes, in channels_last or "
            "NCHW, whichever is faster.",
            "",
            f"| channels, image | batch | {' | '.join(TASK_NAMES.get(task, task) for task in TASKS)} |",
            "|---|---|" + "---|" * len(TASKS),
            *lines,
        ]
    )


def _lines(data: Json, layer: Layer, batch: int) -> Iterator[str]:
    """One line, or none where the layer was not measured."""
    cells = [_cell(group(data, f"{layer.name} {task} fp32 batch {batch}")) for task in TASKS]
    if any(cells):
        yield f"| {layer.c_in} → {layer.c_out}, {layer.size}×{layer.size} | {batch} | {' | '.join(cells)} |"


def _cell(measured: Json | None) -> str:
    ours, theirs = contender(measured, OURS), [contender(measured, rival) for rival in RIVALS]
    times = [record["seconds"]["median"] for record in theirs if record]
    if not ours or not times:
        return ""
    own = ours["seconds"]["median"]
    return f"{amount(own, 'seconds')}, **{min(times) / own:.2f}×**"
