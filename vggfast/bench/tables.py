"""Results as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
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


@dataclass
class Column:
    """Of a `FittedTable`. Where a terminal is too narrow for all, those with `spare` are left out, 1 before 2; lines of a `wraps` may break."""

    name: str  # may have several lines
    cells: list[str | Text] = field(default_factory=list)
    footer: str = ""
    left: bool = False
    spare: int = 0
    wraps: bool = False

    def least(self) -> int:
        if self.wraps:
            return 24
        return max(map(cell_len, [*self.name.split("\n"), self.footer, *map(str, self.cells)]))


@dataclass
class FittedTable:
    """A table of which no cell is cut off: it has as many of its columns as a terminal has room for."""

    title: str
    columns: list[Column]
    notes: list[str] = field(default_factory=list)  # below it, where the column that wraps was left out

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = list(self.columns)
        while sum(column.least() + 2 for column in shown) > options.max_width:
            spare = [column for column in shown if column.spare]
            if not spare:
                break
            shown.remove(min(spare, key=lambda column: column.spare))
        table = Table(
            title=self.title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD,
            show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_footer=any(column.footer for column in shown),
        )  # fmt: skip
        for column in shown:
            table.add_column(
                column.name,
                column.footer,
                justify="left" if column.left else "right",
                no_wrap=not column.wraps,
                overflow="fold",
            )
        for cells in zip(*(column.cells for column in shown), strict=True):
            table.add_row(*cells)
        yield table
        if any(column.wraps for column in self.columns if column not in shown):
            yield from (Text(note, style="dim") for note in self.notes)
        yield ""


def group_table(group: Json) -> FittedTable:
    """A line a contender: times, how many times as long as vggfast it takes, rates, error, setting."""
    case = group["case"]
    ours = next((c for c in group["contenders"] if c["label"] == OURS and "rounds" in c), None)
    in_memory = any("peak_bytes" in record for record in group["contenders"])
    names = (
        {"saved MB": 0, "peak MB": 0}
        if in_memory
        else {"ms": 0, "p10–p90": 3, "ms/image": 4, "time /\nvggfast's": 0, "GFLOP/s": 5, "of\nceiling": 6}
    )
    numbers = [Column(name, spare=spare) for name, spare in names.items()]
    labels, errors = Column("contender", left=True), Column("error", spare=7)
    settings = Column("setting", left=True, spare=2, wraps=True)
    for record in group["contenders"]:
        style = "bold" if record["label"] == OURS else "dim" if record["label"] == CONTROL else ""
        labels.cells.append(Text(record["label"], style=style))
        errors.cells.append(f"{record['error']:.1e}" if "error" in record else "")
        why = next((f"{why}: {record[why]}" for why in WHY_NOT if why in record), None)
        settings.cells.append(Text(why, style="yellow") if why else Text(record["setting"], style="dim"))
        cells = [""] * len(numbers)
        if not why:
            cells = [*(_megabytes(record) if in_memory else _timings(record, ours, case["batch"]))]
        for column, cell in zip(numbers, cells, strict=True):
            column.cells.append(cell)
    notes = [f"{record['label']}: {record['setting']}" for record in group["contenders"] if record.get("setting")]
    return FittedTable(group["id"], [labels, *numbers, errors, settings], notes)


def _megabytes(record: Json) -> Iterator[str]:
    saved = record["saved_bytes"]
    yield "" if saved is None else f"{saved / 1e6:.1f}"
    yield f"{record['peak_bytes'] / 1e6:.1f}"


def _timings(record: Json, ours: Json | None, batch: int) -> Iterator[str]:
    seconds = record["seconds"]
    yield milliseconds(seconds["median"])
    yield f"{milliseconds(seconds['p10'])}–{milliseconds(seconds['p90'])}"
    yield milliseconds(seconds["median"] / batch)
    yield _ratio(record, ours)
    yield f"{record['gflops']:.0f}" if "gflops" in record else ""
    yield f"{record['ceiling_share']:.0%}" if "ceiling_share" in record else ""


def layer_table(groups: list[Json]) -> FittedTable:
    """Groups of single layers with one task, batch and dtype: a line a layer, a column a contender."""
    case = groups[0]["case"]
    measured = [{c["label"]: c for c in group["contenders"] if "seconds" in c} for group in groups]
    labels = list(dict.fromkeys(c["label"] for group in groups for c in group["contenders"]))
    of_contenders = {label: Column(label.replace(" ", "\n")) for label in [OURS, *(x for x in labels if x != OURS)]}
    layers, errors = Column("layer", left=True, footer="all"), Column("worst\nerror", spare=3)
    rates, shares = Column("GFLOP/s", spare=1), Column("of\nceiling", spare=2)
    for group, found in zip(groups, measured, strict=True):
        ours = found.get(OURS)
        layers.cells.append(group["case"]["subject"])
        for label, column in of_contenders.items():
            seconds = found[label]["seconds"]["median"] if label in found else None
            if seconds is None:
                column.cells.append(_why(group, label))
            else:
                column.cells.append(_beside(seconds, ours["seconds"]["median"] if ours else None, label))
        rates.cells.append(f"{ours['gflops']:.0f}" if ours else "")
        shares.cells.append(f"{ours['ceiling_share']:.0%}" if ours else "")
        known = [c["error"] for c in group["contenders"] if "error" in c]
        errors.cells.append(f"{max(known):.1e}" if known else "")
    totals = {
        label: sum(m[label]["seconds"]["median"] for m in measured)
        for label in labels
        if all(label in m for m in measured)
    }
    for label, total in totals.items():
        of_contenders[label].footer = _beside(total, totals.get(OURS), label)
    title = f"{case['task']}, {case['dtype']}, batch {case['batch']}: ms, and times vggfast's"
    return FittedTable(title, [layers, *of_contenders.values(), rates, shares, errors])


def _beside(seconds: float, ours: float | None, label: str) -> str:
    """A time, and how many times vggfast's it is."""
    times = f"  {seconds / ours:.2f}×" if ours and label != OURS else ""
    return milliseconds(seconds) + times


def _why(group: Json, label: str) -> str:
    """In place of a time: missing, failed or refused; "" where the contender does not take the case."""
    record: Json = next((c for c in group["contenders"] if c["label"] == label), {})
    return next((why for why in WHY_NOT if why in record), "")


def tables(groups: list[Json]) -> Iterator[FittedTable]:
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
