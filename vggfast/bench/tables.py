"""Results as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vggfast.bench.contenders import VGGFAST
from vggfast.bench.layers import OTHER_LAYERS, VGG16_LAYERS
from vggfast.bench.measure import CONTROL, Group, Listener
from vggfast.bench.results import WHY_NOT, Json
from vggfast.bench.stats import ratios

OURS = VGGFAST.name


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _ratio(record: Json, ours: Json | None) -> str:
    if not ours or "rounds" not in ours or record["label"] == OURS:
        return ""
    found = ratios(record["rounds"], ours["rounds"])
    return f"{found.median:.2f}× ({found.p10:.2f}–{found.p90:.2f})"


def group_table(group: Json) -> Table:
    """A line a contender: times, how many times as long as vggfast it takes, rates, error, setting."""
    case = group["case"]
    ours = next((c for c in group["contenders"] if c["label"] == OURS and "rounds" in c), None)
    in_memory = any("peak_bytes" in record for record in group["contenders"])
    table = Table(title=group["id"], title_justify="left", title_style="bold", header_style="bold")
    table.add_column("contender", no_wrap=True)
    columns = (
        ["saved MB", "peak MB"]
        if in_memory
        else ["ms", "p10–p90", "ms/image", "time / vggfast's", "GFLOP/s", "of ceiling"]
    )
    for name in [*columns, "error"]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("setting", style="dim", overflow="fold")
    for record in group["contenders"]:
        label = Text(
            record["label"], style="bold" if record["label"] == OURS else "dim" if record["label"] == CONTROL else ""
        )
        why = next((f"{why}: {record[why]}" for why in WHY_NOT if why in record), None)
        error = f"{record['error']:.1e}" if "error" in record else ""
        if why:
            table.add_row(label, *[""] * len(columns), error, Text(why, style="yellow"))
        elif in_memory:
            saved = record["saved_bytes"]
            table.add_row(
                label,
                "" if saved is None else f"{saved / 1e6:.1f}",
                f"{record['peak_bytes'] / 1e6:.1f}",
                error,
                record["setting"],
            )
        else:
            table.add_row(label, *_timings(record, ours, case["batch"]), error, record["setting"])
    return table


def _timings(record: Json, ours: Json | None, batch: int) -> Iterator[str]:
    seconds = record["seconds"]
    yield milliseconds(seconds["median"])
    yield f"{milliseconds(seconds['p10'])}–{milliseconds(seconds['p90'])}"
    yield milliseconds(seconds["median"] / batch)
    yield _ratio(record, ours)
    yield f"{record['gflops']:.0f}" if "gflops" in record else ""
    yield f"{record['ceiling_share']:.0%}" if "ceiling_share" in record else ""


def layer_table(groups: list[Json]) -> Table:
    """Groups of single layers with one task, batch and dtype: a line a layer, a column a contender."""
    case = groups[0]["case"]
    labels = list(dict.fromkeys(c["label"] for group in groups for c in group["contenders"]))
    rivals = [label for label in labels if label != OURS]
    title = f"{case['task']}, {case['dtype']}, batch {case['batch']}: ms, and times vggfast's"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_footer=True)
    measured = [{c["label"]: c for c in group["contenders"] if "seconds" in c} for group in groups]
    for name in ["layer", OURS, *rivals, "GFLOP/s", "of ceiling", "worst error"]:
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    totals = {
        label: sum(m[label]["seconds"]["median"] for m in measured)
        for label in labels
        if all(label in m for m in measured)
    }
    for group, found in zip(groups, measured, strict=True):
        ours = found.get(OURS)
        cells = [milliseconds(ours["seconds"]["median"]) if ours else _why(group, OURS)]
        for label in rivals:
            theirs = found.get(label)
            if theirs is None:
                cells.append(_why(group, label))
            else:
                times = f"  {theirs['seconds']['median'] / ours['seconds']['median']:.2f}×" if ours else ""
                cells.append(milliseconds(theirs["seconds"]["median"]) + times)
        cells += [f"{ours['gflops']:.0f}", f"{ours['ceiling_share']:.0%}"] if ours else ["", ""]
        errors = [c["error"] for c in group["contenders"] if "error" in c]
        table.add_row(group["case"]["subject"], *cells, f"{max(errors):.1e}" if errors else "")
    table.columns[0].footer = "all"
    for column, label in zip(table.columns[1:], [OURS, *rivals], strict=False):
        if label in totals:
            times = f"  {totals[label] / totals[OURS]:.2f}×" if label != OURS and OURS in totals else ""
            column.footer = milliseconds(totals[label]) + times
    return table


def _why(group: Json, label: str) -> str:
    """In place of a time: missing, failed or refused; "" where the contender does not take the case."""
    record: Json = next((c for c in group["contenders"] if c["label"] == label), {})
    return next((why for why in WHY_NOT if why in record), "")


def tables(groups: list[Json]) -> Iterator[Table]:
    """Networks group by group, layers gathered by task."""
    names = {layer.name: i for i, layer in enumerate([*VGG16_LAYERS, *OTHER_LAYERS])}
    gathered: dict[tuple[Any, ...], list[Json]] = {}
    for group in groups:
        case = group["case"]
        if case["subject"] in names:
            part = group["id"].partition(": ")[0] if ": " in group["id"] else ""
            gathered.setdefault((part, case["task"], case["dtype"], case["batch"]), []).append(group)
        else:
            yield group_table(group)
    for layers in gathered.values():
        yield layer_table(sorted(layers, key=lambda group: names[group["case"]["subject"]]))


def reasons(groups: list[Json]) -> list[str]:
    """Why contenders have no time: each once, in full."""
    found: dict[str, None] = {}
    for group in groups:
        for record in group["contenders"]:
            for why in WHY_NOT:
                if why in record:
                    found.setdefault(f"{record['label']}: {why}: {record[why]}")
    return list(found)


def disturbances(groups: list[Json]) -> list[str]:
    """Groups during which more than a twentieth of the processors' time went to others: their times are not to be trusted."""
    found = []
    for group in groups:
        activity = group.get("activity") or {}
        shares = {name: activity.get(name, 0) for name in ("idle_workers", "other_programs", "stolen")}
        noisy = [f"{name.replace('_', ' ')} {share:.0%}" for name, share in shares.items() if share > 0.05]
        if noisy:
            found.append(f"{group['id']}: {', '.join(noisy)} of the processors' time")
    return found


class ProgressBar(Listener):
    """Shows which group is set up, checked, timed on `console`; where that is no terminal, a line a group."""

    def __init__(self, console: Console, groups: int) -> None:
        self._console = console
        self._progress = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=groups)
        self._shown = ""

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def stage(self, group: Group, what: str) -> None:
        self._show(group, what)

    def round(self, group: Group, done: int, total: int) -> None:
        self._show(group, f"round {min(done + 1, total)} of {total}")

    def done(self) -> None:
        self._progress.advance(self._task)

    def _show(self, group: Group, what: str) -> None:
        self._progress.update(self._task, description=f"{group.id}: {what}")
        if not self._console.is_terminal and group.id != self._shown:
            self._console.print(group.id, highlight=False)
            self._shown = group.id
