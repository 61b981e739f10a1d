"""README's table of devices that are not its own, from their results: a column each, with the comparisons of its own table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from vggfast.bench.report import compare, measured_with, place, rows
from vggfast.bench.results import Json


def tables(devices: list[tuple[Json, str]]) -> str:
    """A table for CPUs and one for GPUs, whose rows differ. Devices come as results and the path of their data and pictures."""
    of_a_kind = groupby(
        sorted(devices, key=lambda device: "gpu" in device[0]["device"]), lambda device: rows(device[0])
    )
    return "\n\n".join("\n".join(_table(list(group))) for _, group in of_a_kind)


def _table(devices: list[tuple[Json, str]]) -> Iterator[str]:
    """A line for each comparison that one of the devices has."""
    yield "On other machines, as many times as fast (or small) as the rival that comes closest:"
    yield ""
    yield "| VGG16 | " + " | ".join(f"[{place(data)}]({path})" for data, path in devices) + " |"
    yield "|---|" + "---|" * len(devices)
    losses = []
    for row in rows(devices[0][0]):
        found = [compare(data, row) for data, _ in devices]
        worse = [
            f"{c.ratio.median:.2f}× {c.rival} on {place(data)}"
            for c, (data, _) in zip(found, devices, strict=True)
            if c and c.ratio.median < 1
        ]
        losses += [f"{row.what} ({'; '.join(worse)})"] if worse else []
        if any(found):
            yield f"| {row.what} | " + " | ".join(f"{c.ratio.median:.2f}× {c.rival}" if c else "" for c in found) + " |"
    yield "| measured | " + " | ".join(measured_with(data, ("vggfast", "torch")) for data, _ in devices) + " |"
    if losses:
        yield ""
        yield f"Of these comparisons vggfast loses {'; '.join(losses)}."
