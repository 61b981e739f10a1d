"""Results as pictures: networks by contender, layers beside each other and under the roofline, memory."""

from __future__ import annotations

from itertools import accumulate
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggfast.bench.cases import LOSSES
from vggfast.bench.contenders import VGGFAST
from vggfast.bench.layers import CONFIGS, VGG16_LAYERS
from vggfast.bench.measure import CONTROL
from vggfast.bench.results import Json, contender, digest
from vggfast.bench.stats import ratios

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = VGGFAST.name
TORCH = "torch channels_last"
BLUE, GREY, DARK, ORANGE = "#1f6feb", "#b6bec9", "#4a5361", "#d9822b"
ITEMSIZE = {"fp32": 4, "bf16": 2}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
TASK_NAMES = {
    "grad_input": "input gradient",
    "grad_weight": "filter gradient",
    "lpips": "LPIPS",
    "perceptual": "features and Gram matrices",
}
DIGEST = "vggfast-results"  # the field of a PNG's metadata that tells which results it shows


PICTURES = {
    "VGG16, inference and training": "networks",
    "VGG16's convolutions, forward and gradients": "layers",
    "Roofline of VGG16's convolutions": "roofline",
    "Memory of VGG16": "memory",
}
LOSS_PICTURES = {"Losses on VGG16's features": "losses"}


def draw_all(data: Json, folder: Path) -> dict[str, Path]:
    """Draw what ``data`` has into ``folder``; titles and files. Of several networks it is VGG16's that are shown."""
    folder.mkdir(parents=True, exist_ok=True)
    drawing = {"networks": networks, "layers": layers, "roofline": roofline, "memory": memory, "losses": losses}
    paths = {}
    for title, name in (PICTURES | LOSS_PICTURES).items():
        figure = drawing[name](data)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, metadata={DIGEST: digest(data)})
            paths[title.replace("VGG16", _network(data).upper())] = path
    return paths


def _network(data: Json) -> str:
    """The network that pictures are of: VGG16, which layers and losses are of too, or the only one that is there."""
    subjects = [g["case"]["subject"] for g in data["groups"]]
    others = [subject for subject in subjects if subject in CONFIGS]
    return "vgg16" if "vgg16" in subjects or not others else str(others[0])


def shown(path: Path) -> str:
    """The digest of the results that a picture was drawn from; empty if it was not drawn by ``draw_all``."""
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info.get(DIGEST, ""))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # No pyplot: it would pick a global backend.
    return Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")


def _note(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Text at a point of the data, moved by an offset in points."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", **{"fontsize": 8, **style})


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _where(data: Json) -> str:
    device = data["device"]
    threads = next(iter(data["runs"].values()))["settings"]["threads"]
    return device.get("gpu") or f"{device['cpu']}, {threads} threads"


def _times(theirs: Json, ours: Json) -> float:
    """How many times as long they take, as README has it: round by round."""
    return ratios(theirs["rounds"], ours["rounds"]).median


def title_of(case: Json) -> str:
    return f"{TASK_NAMES.get(case['task'], case['task'])}, {DTYPE_NAMES[case['dtype']]}, batch {case['batch']}"


# ---- networks ------------------------------------------------------------------------------------------------------


def networks(data: Json) -> Figure | None:
    """A panel for each group of the network's inference and training."""
    return _panels(data, ("inference", "training"), f"{_network(data).upper()}, 224×224")


def losses(data: Json) -> Figure | None:
    """A panel for each group of the losses on features."""
    return _panels(data, LOSSES, "Losses on VGG16's features with the images' gradient, 224×224")


def _panels(data: Json, tasks: tuple[str, ...], title: str) -> Figure | None:
    """A panel for each group of the network: a bar a contender, its 10th and 90th percentile as a whisker, the fastest on top."""
    network = f"{_network(data)} "
    of_tasks = [g for g in data["groups"] if g["id"].startswith(network) and g["case"]["task"] in tasks]
    chosen = [g for g in of_tasks if "seconds" in (contender(g, OURS) or {})]
    if not chosen:
        return None
    chosen.sort(key=lambda g: (g["case"]["task"], g["case"]["dtype"] != "fp32", g["case"]["batch"]))
    bars = [[c for c in g["contenders"] if "seconds" in c and c["label"] != CONTROL] for g in chosen]
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    tallest = [max(len(b) for b in bars[i * columns : (i + 1) * columns]) for i in range(rows)]
    figure = _figure(5.6 * columns, 0.9 + sum(0.29 * n + 0.75 for n in tallest))
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": [n + 1.6 for n in tallest]})
    for axes, group, records in zip(grid.flat, chosen, bars, strict=False):
        _network_panel(axes, group, records)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    figure.suptitle(f"{title}\n{_where(data)}\nmilliseconds per image: shorter is faster", fontsize=10.5)
    return figure


def _network_panel(axes: Axes, group: Json, records: list[Json]) -> None:
    batch = group["case"]["batch"]
    records = sorted(records, key=lambda c: -c["seconds"]["median"])
    per_image = [1e3 * c["seconds"]["median"] / batch for c in records]
    low = [1e3 * (c["seconds"]["median"] - c["seconds"]["p10"]) / batch for c in records]
    high = [1e3 * (c["seconds"]["p90"] - c["seconds"]["median"]) / batch for c in records]
    half = [c["dtype"] != group["case"]["dtype"] for c in records]
    colours = [BLUE if c["label"] == OURS else GREY for c in records]
    bars = axes.barh([c["label"] for c in records], per_image, color=colours, height=0.72)
    for bar, is_half in zip(bars, half, strict=True):
        if is_half:  # less accuracy than the panel's dtype
            bar.set_hatch("///")
            bar.set_edgecolor("white")
    places = range(len(records))
    axes.errorbar(per_image, places, xerr=[low, high], fmt="none", ecolor=DARK, elinewidth=0.9, capsize=2)
    ours = next(c for c in records if c["label"] == OURS)
    for place, record, value, above in zip(places, records, per_image, high, strict=True):
        times = "" if record["label"] == OURS else f"  {_times(record, ours):.2f}×"
        number = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        _note(axes, number + times, (value + above, place), (4, 0), va="center")
    axes.set_xlim(0, max(v + h for v, h in zip(per_image, high, strict=True)) * 1.24)
    hatched = "  (hatched: half precision)" if any(half) else ""
    axes.set_title(title_of(group["case"]) + hatched, fontsize=9.5, loc="left")
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.tick_params(axis="x", labelsize=8)
    _bare(axes)


# ---- layers --------------------------------------------------------------------------------------------------------


def _layer_groups(data: Json, task: str, batch: int) -> list[tuple[Any, Json, Json | None]]:
    """(layer, our record, torch's record) for each layer that has the task."""
    found = []
    for layer in VGG16_LAYERS:
        wanted = (layer.name, task, batch)
        same = (g for g in _of_layers(data) if (g["case"]["subject"], g["case"]["task"], g["case"]["batch"]) == wanted)
        group = next(same, None)
        ours = contender(group, OURS)
        if ours:
            found.append((layer, ours, contender(group, TORCH)))
    return found


def _layer_batch(data: Json) -> int:
    return max((g["case"]["batch"] for g in _of_layers(data)), default=0)


def _of_layers(data: Json) -> list[Json]:
    """The groups of the part layers; those of the part compiled have the same cases and other rivals."""
    return [g for g in data["groups"] if g["case"]["subject"].startswith("conv") and ": " not in g["id"]]


def layers(data: Json) -> Figure | None:
    """Speed of each layer beside torch channels_last, forward and both gradients: bars in direct GFLOP/s, the ratio above."""
    batch = _layer_batch(data)
    tasks = [t for t in ("forward", "grad_input", "grad_weight") if _layer_groups(data, t, batch)]
    if not tasks:
        return None
    figure = _figure(10.5, 0.8 + 2.5 * len(tasks))
    panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axes, task in zip(panels, tasks, strict=True):
        _layer_panel(axes, data, task, batch)
    panels[0].legend(loc="upper left", fontsize=8, frameon=False, ncols=3)
    figure.suptitle(
        f"VGG16's convolutions with ReLU and pool, batch {batch}: GFLOP/s counted as a direct convolution's; above, times torch's speed\n{_where(data)}",
        fontsize=10.5,
    )
    return figure


def _layer_panel(axes: Axes, data: Json, task: str, batch: int) -> None:
    found = _layer_groups(data, task, batch)
    names = [layer.name.removeprefix("conv") for layer, _, _ in found]
    places = range(len(found))
    rates = [(ours["gflops"], theirs["gflops"] if theirs else 0.0) for _, ours, theirs in found]
    axes.bar([p - 0.2 for p in places], [ours for ours, _ in rates], 0.4, color=BLUE, label=OURS)
    axes.bar([p + 0.2 for p in places], [theirs for _, theirs in rates], 0.4, color=GREY, label=TORCH)
    for place, rate, (_, ours, theirs) in zip(places, rates, found, strict=True):
        if theirs:
            _note(axes, f"{_times(theirs, ours):.1f}×", (place, max(rate)), (0, 2), ha="center")
    peak = _ceilings(data)["peak_gflops"].get(found[0][1]["dtype"])
    if peak:
        axes.axhline(peak, color=ORANGE, linewidth=1, linestyle="--", label="peak of multiply-adds")
    axes.set_ylim(0, max(peak or 0, *map(max, rates)) * 1.18)
    axes.set_xticks(list(places), names, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"{TASK_NAMES.get(task, task)}, {DTYPE_NAMES[found[0][1]['dtype']]}", fontsize=9.5, loc="left")
    axes.set_ylabel("GFLOP/s", fontsize=8.5)
    axes.tick_params(axis="y", labelsize=8)
    _bare(axes)


# ---- roofline ------------------------------------------------------------------------------------------------------


def _ceilings(data: Json) -> Json:
    """Of the latest run that measured layers."""
    ceilings: Json = data["runs"][max(g["run"] for g in _of_layers(data))]["ceilings"]
    return ceilings


def roofline(data: Json) -> Figure | None:
    """Forward of each layer: operations that were executed, over the bytes that must move, under the two ceilings."""
    batch = _layer_batch(data)
    found = _layer_groups(data, "forward", batch)
    if not found:
        return None
    dtype, ceilings = found[0][1]["dtype"], _ceilings(data)
    peak, bandwidth = ceilings["peak_gflops"].get(dtype), ceilings["dram_gbps"]
    figure = _figure(8.6, 5.2)
    axes = figure.subplots()
    intensities = [0.5, peak / bandwidth, 4000]
    axes.plot(intensities, [min(peak, bandwidth * i) for i in intensities], color=DARK, linewidth=1.4)
    # At the ridge: further right are the points of who reaches the peak.
    _note(axes, f"peak {peak:.0f} GFLOP/s", (peak / bandwidth, peak), (4, 4), fontsize=8.5, color=DARK)
    _note(axes, f"memory {bandwidth:.0f} GB/s", (4.3, 4.3 * bandwidth), (8, -6), fontsize=8.5, color=DARK)
    _roofline_points(axes, found, batch, dtype)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(4, 1500)
    rates = [o["gflops"] for _, o, _ in found] + [peak]
    axes.set_ylim(min(rates) / 4, max(rates) * 1.8)
    axes.set_xlabel("operations per byte moved (input, filters, output: once each)", fontsize=9)
    axes.set_ylabel("GFLOP/s", fontsize=9)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(loc="upper left", fontsize=8.5, frameon=True)
    what = f"VGG16's convolutions with ReLU and pool, {DTYPE_NAMES[dtype]}, batch {batch}"
    axes.set_title(f"{what}\n{_where(data)}", fontsize=10.5)
    _bare(axes)
    return figure


def _roofline_points(axes: Axes, found: list[tuple[Any, Json, Json | None]], batch: int, dtype: str) -> None:
    executed, direct, theirs = [], [], []  # (operations a byte, GFLOP/s)
    for layer, record, rival in found:
        seconds, gigabytes, gflop = (
            record["seconds"]["median"],
            layer.gigabytes(batch, ITEMSIZE[dtype]),
            layer.gflop(batch),
        )
        kernel = record.get("kernel", "")
        products = layer.winograd_gflop(batch, edges="F(2)" in kernel) if "winograd" in kernel else gflop
        executed.append((products / gigabytes, products / seconds))
        direct.append((gflop / gigabytes, gflop / seconds))
        if rival:
            theirs.append((gflop / gigabytes, gflop / rival["seconds"]["median"]))
        axes.plot(*zip(executed[-1], direct[-1], strict=True), color=BLUE, alpha=0.25, linewidth=0.8)
    names = [layer.name.removeprefix("conv") for layer, _, _ in found]
    _names_below(axes, executed, names, 0.78 * min(rate for _, rate in executed + theirs))
    for points, face, edge, label in (
        (theirs, GREY, DARK, TORCH),
        (executed, BLUE, BLUE, "vggfast, operations executed"),
        (direct, "white", BLUE, "vggfast, counted as a direct convolution's"),
    ):
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=34, color=face, edgecolor=edge, linewidth=0.8, label=label, zorder=3)


def _names_below(axes: Axes, points: list[tuple[float, float]], names: list[str], height: float) -> None:
    """The points' names in a row at `height`, a line to each: beside the points, which are close, they would cover each other."""
    found = sorted(zip(points, names, strict=True))
    exponents = [log10(x) for (x, _), _ in found]
    width = 0.075  # of a name, in decades of the axis
    pushed_right = accumulate(exponents, lambda before, x: max(x, before + width))
    pushed_left = accumulate(reversed(exponents), lambda behind, x: min(x, behind - width))
    for (point, name), right, left in zip(found, pushed_right, reversed(list(pushed_left)), strict=True):
        axes.annotate(
            name,
            point,
            xytext=(10 ** ((right + left) / 2), height),
            ha="center",
            va="top",
            fontsize=7.5,
            color=BLUE,
            arrowprops={"arrowstyle": "-", "color": BLUE, "alpha": 0.4, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


# ---- memory --------------------------------------------------------------------------------------------------------


def memory(data: Json) -> Figure | None:
    """Saved activations and peak of every group of the part memory."""
    chosen = [g for g in data["groups"] if any("peak_bytes" in c for c in g["contenders"])]
    if not chosen:
        return None
    chosen.sort(key=lambda g: (g["case"]["task"] != "training", g["case"]["dtype"] != "fp32"))
    bars = [sorted((c for c in g["contenders"] if "peak_bytes" in c), key=lambda c: -c["peak_bytes"]) for g in chosen]
    figure = _figure(9.5, 0.9 + sum(0.42 * len(b) + 0.7 for b in bars))
    heights = {"height_ratios": [len(b) + 1 for b in bars]}
    panels = figure.subplots(len(chosen), 1, squeeze=False, gridspec_kw=heights)[:, 0]
    for axes, group, records in zip(panels, chosen, bars, strict=True):
        subject = group["case"]["subject"].rpartition(":")[2]
        of_network = "" if subject == _network(data) else f"{subject}: "
        places = range(len(records))
        is_ours = [c["label"] == OURS for c in records]
        peaks, saved = [c["peak_bytes"] / 1e6 for c in records], [(c["saved_bytes"] or 0) / 1e6 for c in records]
        axes.barh(list(places), peaks, 0.7, color=["#a9c8f8" if ours else "#dde1e6" for ours in is_ours])
        axes.barh(list(places), saved, 0.7, color=[BLUE if ours else "#8d97a5" for ours in is_ours])
        for place, kept, peak in zip(places, saved, peaks, strict=True):
            _note(
                axes,
                f"{kept:.0f} saved, {peak:.0f} peak" if kept else f"{peak:.0f}",
                (peak, place),
                (4, 0),
                va="center",
            )
        axes.set_yticks(list(places), [c["label"] for c in records], fontsize=8.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(peaks) * 1.25)
        axes.set_title(of_network + title_of(group["case"]), fontsize=9.5, loc="left")
        _bare(axes)
    panels[-1].set_xlabel(
        "MB: light, the most a run takes beyond weights and inputs; dark, what autograd keeps for the backward pass",
        fontsize=8.5,
    )
    figure.suptitle(f"{_network(data).upper()}'s memory\n{_where(data)}", fontsize=10.5)
    return figure
