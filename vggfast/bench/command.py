"""`vggfast bench`: one comparison, or VGG16's layers, as tables; JSON and pictures on request."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from vggfast.bench import BenchError, plots, results, session, tables
from vggfast.bench.cases import LAYER_TASKS, Case, Task
from vggfast.bench.layers import VGG16_LAYERS
from vggfast.bench.measure import Effort, Group, compare
from vggfast.bench.results import Json

NETWORK = Effort(min_rounds=5, max_rounds=15, seconds=30, turn_s=0.1)
LAYER = Effort(min_rounds=5, max_rounds=11, seconds=1, turn_s=0.02)


def chosen_groups(
    model: str,
    batch: int,
    dtype: Literal["fp32", "bf16"],
    device: Literal["cpu", "cuda"],
    threads: int,
    against: list[str] | None,
    layers: bool,
    train: bool,
    memory: bool,
) -> list[tuple[Group, Effort]]:
    """What the options ask for; raises BenchError for a rival that does not exist, and for options that exclude each other."""
    if layers and (memory or model != "vgg16"):
        wrong = "--memory" if memory else f"--model {model}"
        raise BenchError(f"--layers times VGG16's convolutions one by one: expected no {wrong}; leave one of them out")
    if layers:
        tasks: tuple[Task, ...] = LAYER_TASKS if train else ("forward",)
        cases = [
            Case(layer.name, task, batch, dtype, device, threads)
            for layer in VGG16_LAYERS
            for task in tasks
            if layer.has(task)
        ]
        return [(compare("layers", case, against), LAYER) for case in cases]
    case = Case(model, "training" if train else "inference", batch, dtype, device, threads)
    groups = [(compare("training" if train else "inference", case, against), NETWORK)]
    return [*groups, (compare("memory", case, against), NETWORK)] if memory else groups


def bench(
    groups: list[tuple[Group, Effort]], threads: int, console: Console, json: Path | None, plot: Path | None
) -> Json:
    """Measure, show, and write what was asked for. Exit statuses are the caller's."""
    if json:
        results.check_writable(json)
    if plot:
        results.check_writable(plot / "networks.png")
    with tables.ProgressBar(console, len(groups)) as bar:
        data = session.run(groups, threads, bar, lambda _: bar.done())
    for table in tables.tables(data["groups"]):
        console.print(table, width=None if console.is_terminal else 150)  # a file has room for all columns
    for line in tables.reasons(data["groups"]):
        console.print(f"not measured: {line}", style="yellow", highlight=False, markup=False)
    for line in tables.disturbances(data["groups"]):
        console.print(f"disturbed: {line}", style="yellow", highlight=False, markup=False)
    (run,) = data["runs"].values()
    peaks = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in run["ceilings"]["peak_gflops"].items())
    console.print(
        f"ceilings: {peaks}; memory {run['ceilings']['dram_gbps']:.0f} GB/s, read plus written", highlight=False
    )
    if json:
        results.save(data, json)
        console.print(f"{'data:':<16}{json}", highlight=False, markup=False)
    drawn = plots.draw_all(data, plot) if plot else {}
    for title, path in drawn.items():
        console.print(f"{title + ':':<16} {path}", highlight=False, markup=False)
    if plot and not drawn:
        measured = ", ".join(group["id"] for group in data["groups"])
        console.print(f"no picture: vggfast has no result in {measured}", style="yellow", highlight=False)
    return data
