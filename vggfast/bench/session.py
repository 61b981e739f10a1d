"""A run of measurements from groups to one result, as the command line and the recorder make it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vggfast.bench import results
from vggfast.bench.measure import Effort, Group, Lab, Listener
from vggfast.bench.results import Json


def run(
    groups: Sequence[tuple[Group, Effort]],
    threads: int,
    listener: Listener | None = None,
    after: Callable[[Json], None] = lambda group: None,
) -> Json:
    """Measure the groups one after the other, all of one device; ``after`` gets the record of each when it is done."""
    device = groups[0][0].case.device
    measured = []
    with Lab(threads, listener) as lab:
        for group, effort in groups:
            record = lab.measure_memory(group) if group.part == "memory" else lab.time(group, effort)
            measured.append(record)
            after(record)
        key, facts = results.new_run(device, threads, lab.ceilings(device))
    return results.merge(results.new(device), key, facts, measured)
