"""The table of comparisons in README, from results: what was compared, how much faster, and where vggfast is slower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vggfast.bench.layers import VGG16_LAYERS
from vggfast.bench.measure import CONTROL, threads_label
from vggfast.bench.plots import DTYPE_NAMES, TASK_NAMES, title_of
from vggfast.bench.results import WHY_NOT, Json, contender, group
from vggfast.bench.rows import CPU_ROWS, GPU_ROWS, OURS, TORCH, Row, layer_groups
from vggfast.bench.stats import Spread, ratios, spread


@dataclass(frozen=True)
class Comparison:
    """A row with its numbers: seconds a batch, or bytes. ``ratio`` is the rival's over ours: above 1 is in our favour."""

    row: Row
    rival: str
    ours: float
    theirs: float
    ratio: Spread
    our_error: float
    their_error: float


def rows(data: Json) -> list[Row]:
    return GPU_ROWS if "gpu" in data["device"] else CPU_ROWS


def _per_round(data: Json, row: Row, label: str) -> tuple[list[float], float] | None:
    """What a contender took in each round, summed over the row's groups, and its worst error; None if a group lacks it."""
    columns: list[list[float]] = []
    errors = []
    for identifier in row.groups:
        record = contender(group(data, identifier), label)
        if record is None or not record.get("rounds" if row.field == "seconds" else row.field):
            return None
        columns.append(record["rounds"] if row.field == "seconds" else [float(record[row.field])])
        errors.append(record["error"])
    return [sum(values) for values in zip(*columns, strict=False)], max(errors)


def compare(data: Json, row: Row) -> Comparison | None:
    """The row's numbers, against the rival whose ratio is the smallest; None where the results do not have it.

    By the ratio, round by round, not by medians: on a busy machine two rivals' may lie closer than the minutes between them.
    """
    ours = _per_round(data, row, OURS)
    found = {rival: values for rival in row.rivals if (values := _per_round(data, row, rival))}
    if ours is None or not found:
        return None
    against = {}
    for rival, (theirs, _) in found.items():
        length = min(len(ours[0]), len(theirs))
        against[rival] = ratios(theirs[:length], ours[0][:length])
    best = min(against, key=lambda rival: against[rival].median)
    theirs, error = found[best]
    return Comparison(row, best, spread(ours[0]).median, spread(theirs).median, against[best], ours[1], error)


def control(data: Json) -> Spread | None:
    """The ratio of vggfast to itself, over every group that has the control: what a ratio can be trusted to."""
    seen = []
    for each in data["groups"]:
        first, again = contender(each, OURS), contender(each, CONTROL)
        if first and again and "seconds" in first:
            seen.append(again["seconds"]["median"] / first["seconds"]["median"])
    return spread(seen) if seen else None


def losses(data: Json) -> list[tuple[str, str, float]]:
    """(group, rival, ratio) wherever a rival is faster, or takes less, the worst first. All groups count, not only README's rows."""
    return sorted((each for each in comparisons(data) if each[2] < 1), key=lambda loss: loss[2])


def comparisons(data: Json) -> list[tuple[str, str, float]]:
    """(group, rival, the rival's over ours), of times round by round and of bytes, of all groups."""
    found = []
    for each in data["groups"]:
        if _of_threads(each):  # rivals with fewer threads are no rivals
            continue
        ours = contender(each, OURS)
        for rival in each["contenders"]:
            record = contender(each, rival["label"])
            if not ours or not record or rival["label"].startswith(OURS):  # itself again, or in another form
                continue
            if "rounds" in ours:
                found.append((each["id"], rival["label"], ratios(record["rounds"], ours["rounds"]).median))
            for field in ("saved_bytes", "peak_bytes"):
                if ours.get(field) and record.get(field):
                    what = f"{each['id']}, {field.removesuffix('_bytes')}"
                    found.append((what, rival["label"], record[field] / ours[field]))
    return found


def absent(data: Json) -> list[str]:
    """Contenders that were not measured somewhere, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in data["groups"]:
        for record in each["contenders"]:
            for why in WHY_NOT:
                if why in record:
                    reasons.setdefault((record["label"], f"{why}: {record[why]}"), []).append(each["id"])
    return [f"{label} in {', '.join(ids)}: {reason}" for (label, reason), ids in reasons.items()]


# ---- layer by layer ------------------------------------------------------------------------------------------------

LAYER_COLUMNS = (("forward", 1), ("forward", 8), ("grad_input", 8), ("grad_weight", 8))  # task and batch, on a CPU
GPU_LAYER_COLUMNS = (("forward", 1), ("forward", 32), ("grad_input", 32), ("grad_weight", 32), ("forward", 256))


def layer_lines(data: Json) -> Iterator[str]:
    """A table with a line for each convolution, and their total: how many times as fast as torch channels_last."""
    gpu = "gpu" in data["device"]
    dtype = "bf16" if gpu else "fp32"
    columns = [
        (task, batch, found)
        for task, batch in (GPU_LAYER_COLUMNS if gpu else LAYER_COLUMNS)
        if (found := _layer_ratios(data, task, batch, dtype))
    ]
    if not columns:
        return
    yield f"Each convolution with its ReLU and pool, {DTYPE_NAMES[dtype]}: {OURS}'s time, and {TORCH}'s over it."
    yield ""
    yield "| | " + " | ".join(f"{TASK_NAMES.get(task, task)}, batch {batch}" for task, batch, _ in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for layer in VGG16_LAYERS:
        size = f"{layer.c_in} → {layer.c_out}, {layer.size}×{layer.size}{', pool' if layer.pool else ''}"
        yield f"| {layer.name}: {size} | " + " | ".join(f.get(layer.name, "") for _, _, f in columns) + " |"
    totals = (compare(data, Row("", layer_groups(task, batch, dtype), (TORCH,))) for task, batch, _ in columns)
    cells = (f"{amount(t.ours, 'seconds')}, **{t.ratio.median:.2f}×**" if t else "" for t in totals)
    yield "| all | " + " | ".join(cells) + " |"


def _layer_ratios(data: Json, task: str, batch: int, dtype: str) -> dict[str, str]:
    """By the layer's name; without those that were not measured."""
    found = {}
    for identifier in layer_groups(task, batch, dtype):
        if one := compare(data, Row("", (identifier,), (TORCH,))):
            found[identifier.partition(" ")[0]] = f"{amount(one.ours, 'seconds')}, {one.ratio.median:.2f}×"
    return found


# ---- threads -------------------------------------------------------------------------------------------------------


def thread_lines(data: Json) -> Iterator[str]:
    """A table of how many times as fast vggfast and torch are with all threads as with one."""
    found = [line for each in data["groups"] if _of_threads(each) and (line := _thread_line(each))]
    if found:
        yield f"| With all threads, times as fast as with one | {OURS} | {TORCH} |"
        yield "|---|---|---|"
        yield from found


def _of_threads(each: Json) -> bool:
    return str(each["id"]).startswith("threads: ")


def _thread_line(each: Json) -> str:
    cells = []
    for label in (OURS, TORCH):
        many, one = contender(each, label), contender(each, threads_label(label, 1))
        if not many or not one:
            return ""
        times = ratios(one["rounds"], many["rounds"])
        cells.append(f"{times.median:.2f}× ({times.p10:.2f} to {times.p90:.2f})")
    return f"| {title_of(each['case'])}, {each['case']['threads']} threads | {' | '.join(cells)} |"


# ---- markdown ------------------------------------------------------------------------------------------------------


def amount(value: float, field: str) -> str:
    """As 61.3 ms or 290 MB: three significant digits."""
    if field != "seconds":
        return f"{value / 1e6:.0f} MB"
    milliseconds = value * 1e3
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def markdown(data: Json, pictures: dict[str, str]) -> str:
    """README's section: the device, the table, where vggfast loses, pictures (title to path)."""
    found = [comparison for row in rows(data) if (comparison := compare(data, row))]
    lines = [*_preamble(data), ""]
    lines += [
        "| VGG16 | fastest rival | | vggfast | ratio (10th to 90th percentile) | error: rival's, vggfast's |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(comparison) for comparison in found]
    lines += ["", *_losses(data), ""]
    if layered := list(layer_lines(data)):
        lines += [*layered, ""]
    if threads := list(thread_lines(data)):
        lines += [*threads, ""]
    for title, path in pictures.items():
        lines += [f"![{title}]({path})", ""]
    return "\n".join(lines)


def _line(c: Comparison) -> str:
    span = f" ({c.ratio.p10:.2f} to {c.ratio.p90:.2f})" if c.row.field == "seconds" else ""
    errors = f"{c.their_error:.0e}, {c.our_error:.0e}" if c.row.field == "seconds" else ""
    theirs, ours = amount(c.theirs, c.row.field), amount(c.ours, c.row.field)
    return f"| {c.row.what} | {c.rival} | {theirs} | {ours} | **{c.ratio.median:.2f}×**{span} | {errors} |"


def _preamble(data: Json) -> Iterator[str]:
    yield measured_on(data, ("vggfast", "torch", "onnxruntime", "openvino", "ncnn", "lpips", "jax"))
    yield f"Ceilings, measured in the same runs: {_ceilings(data)}."
    same = control(data)
    if same:
        yield (
            f"vggfast against itself, as the control: {same.median:.2f}× ({same.p10:.2f} to {same.p90:.2f} over all comparisons). "
            "Times are of a batch, of 224×224 images where nothing else is said; a ratio above 1 is in vggfast's favour; errors are relative, against float64."
        )


def measured_on(data: Json, packages: tuple[str, ...]) -> str:
    """A sentence that says where, when and with what all was measured."""
    return f"Measured on **{place(data)}**, {measured_with(data, packages)}."


def place(data: Json) -> str:
    """The device by name, a CPU with the threads that ran."""
    device = data["device"]
    threads = _range([float(run["settings"]["threads"]) for run in data["runs"].values()])
    return str(device.get("gpu") or f"{device['cpu']}, {device['cores']} cores, {threads} threads")


def measured_with(data: Json, packages: tuple[str, ...]) -> str:
    """The days and the versions of all runs: parts may have been recorded one by one."""
    runs = data["runs"]
    days = sorted({key.partition("T")[0] for key in runs})
    versions = []
    for name in packages:
        seen = sorted({run["versions"][name] for run in runs.values() if name in run["versions"]})
        versions += [f"{name} {' and '.join(seen)}"] if seen else []
    day = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{day}: {', '.join(versions)}"


def _ceilings(data: Json) -> str:
    ceilings = [run["ceilings"] for run in data["runs"].values()]
    peaks = [
        f"{DTYPE_NAMES[dtype]} {_range([c['peak_gflops'][dtype] for c in ceilings if dtype in c['peak_gflops']])} GFLOP/s"
        for dtype in ceilings[-1]["peak_gflops"]
    ]
    return ", ".join([*peaks, f"memory {_range([c['dram_gbps'] for c in ceilings])} GB/s"])


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _losses(data: Json) -> Iterator[str]:
    worse = losses(data)
    yield "**Where vggfast loses.** " + (
        f"On this machine in {len(worse)} of {len(comparisons(data))} comparisons, here with the rival's time (or bytes) over vggfast's:"
        if worse
        else f"On this machine in none of the {len(comparisons(data))} comparisons measured."
    )
    if worse:
        yield ""
        for (task, rival), cases in _by_task(worse).items():
            yield f"- {rival}, {task}: " + ", ".join(f"{name} {ratio:.2f}×" for name, ratio in cases)
    for reason in absent(data):
        yield f"- Not measured: {reason}"


def _by_task(worse: list[tuple[str, str, float]]) -> dict[tuple[str, str], list[tuple[str, float]]]:
    """Losses by task and rival, so that thirteen layers are one line."""
    grouped: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for identifier, rival, ratio in worse:
        subject, _, task = identifier.removeprefix("memory: ").partition(" ")
        task, _, of_memory = task.partition(", ")  # saved or peak
        task = f"{of_memory} memory of {task}" if of_memory else task
        grouped.setdefault((task, rival), []).append((subject, ratio))
    return grouped


def splice(text: str, section: str, begin: str, end: str) -> str:
    """``text`` with what stands between the two marker lines replaced. Raises ValueError unless each marker is there once."""
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ValueError(f"expected the line {marker!r} once, got it {text.count(marker)} times")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{section.strip()}\n{end}{rest.split(end)[1]}"
