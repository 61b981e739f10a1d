"""Measure this machine and keep the results as data: benchmarks/results/<device>/<part>.json.

    python benchmarks/record.py                     # everything
    python benchmarks/record.py --part layers       # one part at a time; parts do not touch each other's files
    python benchmarks/record.py --part inference --only "vgg16 .* batch 8"    # some groups of a part; they replace those recorded

Every group is written when it is done, so that what was measured stays where the rest is cut off. Nothing else should run
meanwhile: what did is written beside the times and printed.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch
from rich.console import Console

from vggfast.bench import BenchError, machine, results, suites, tables
from vggfast.bench.measure import Group, Lab
from vggfast.bench.results import Json

RESULTS = Path(__file__).parent / "results"


def options() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--part", choices=[*suites.PARTS, "all"], default="all")
    found.add_argument("--only", default="", help="regular expression: groups whose name it finds")
    found.add_argument(
        "--against", default=None, help="families of rivals, as in torch,compile; the usual ones if not given"
    )
    found.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--threads", type=int, default=min(2, machine.cores()))
    found.add_argument("--quick", action="store_true", help="the quick form's groups and rounds")
    found.add_argument("--quick-rounds", action="store_true", help="all groups, but the quick form's rounds")
    found.add_argument("--seconds", type=float, default=float("inf"), help="begin no group after so many seconds")
    found.add_argument("--output", type=Path, default=RESULTS, help="folder of the devices' folders")
    return found.parse_args()


def main() -> None:
    try:
        run(options(), time.monotonic())
    except (BenchError, re.error) as error:
        raise SystemExit(f"error: {error}") from error


def run(chosen: argparse.Namespace, begin: float) -> None:
    console = Console(width=None if Console().is_terminal else 160)
    against = chosen.against.split(",") if chosen.against else None
    for part in suites.PARTS if chosen.part == "all" else [chosen.part]:
        every = suites.groups(part, chosen.device, chosen.threads, not chosen.quick, against)
        groups = [group for group in every if re.search(chosen.only, group.id)]
        if groups:
            measure(groups, chosen, console, begin + chosen.seconds)
        else:
            why = f"no group's name matches {chosen.only!r}" if every else f"not measured on {chosen.device}"
            console.print(f"{part}: {why}", highlight=False)


def measure(groups: list[Group], chosen: argparse.Namespace, console: Console, deadline: float) -> None:
    part = groups[0].part
    effort = (suites.QUICK if chosen.quick or chosen.quick_rounds else suites.FULL)[part]
    path = chosen.output / machine.slug(chosen.device) / f"{part}.json"
    results.check_writable(path)
    done: list[Json] = []
    with tables.ProgressBar(console, len(groups)) as bar, Lab(chosen.threads, bar) as lab:
        key, run = results.new_run(chosen.device, chosen.threads, lab.ceilings(chosen.device))
        for group in groups:
            if time.monotonic() > deadline:
                break
            try:
                record = lab.measure_memory(group) if part == "memory" else lab.time(group, effort)
            except BenchError as error:
                console.print(f"not measured: {group.id}: {error}", style="yellow", highlight=False, markup=False)
                lab.end_torch()
                continue
            done.append(record)
            write(record, key, run, path, chosen.device)
            bar.done()
    for table in tables.tables(done):
        console.print(table)
    for line in [*tables.reasons(done), *map("disturbed: {}".format, tables.disturbances(done))]:
        console.print(line, style="yellow", highlight=False, markup=False)
    missing = [group.id for group in groups if group.id not in {record["id"] for record in done}]
    left = f", not {', '.join(missing)}" if missing else ""
    console.print(f"{part}: {len(done)} of {len(groups)} groups in {path}{left}", highlight=False, markup=False)
    if not done:
        raise SystemExit(1)


def write(record: Json, key: str, run: Json, path: Path, device: str) -> None:
    new = results.new(device)
    old = {**results.load(path), "device": new["device"]} if path.exists() else new
    results.save(results.merge(old, key, run, [record]), path)


if __name__ == "__main__":
    main()
