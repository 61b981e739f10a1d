"""Measure this machine and keep the results as data: benchmarks/results/<device>/<part>.json.

    python benchmarks/record.py                     # everything
    python benchmarks/record.py --part layers       # one part at a time; parts do not touch each other's files
    python benchmarks/record.py --part inference --only "vgg16 .* batch 8"    # some groups of a part; they replace those recorded

Nothing else should run meanwhile: what did is written beside the times and printed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from rich.console import Console

from vggfast.bench import machine, results, session, suites, tables

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--part", choices=[*suites.PARTS, "all"], default="all")
    options.add_argument("--only", default="", help="regular expression: groups whose name it finds")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--threads", type=int, default=min(2, machine.cores()))
    options.add_argument("--quick", action="store_true", help="the quick form's groups and rounds")
    options.add_argument("--output", type=Path, default=RESULTS, help="folder of the devices' folders")
    chosen = options.parse_args()
    console = Console(width=None if Console().is_terminal else 160)
    for part in suites.PARTS if chosen.part == "all" else [chosen.part]:
        effort = (suites.QUICK if chosen.quick else suites.FULL)[part]
        groups = suites.groups(part, chosen.device, chosen.threads, not chosen.quick)
        groups = [group for group in groups if re.search(chosen.only, group.id)]
        if not groups:
            console.print(f"{part}: no group's name matches {chosen.only!r}")
            continue
        with tables.ProgressBar(console, len(groups)) as bar:
            found = session.run([(group, effort) for group in groups], chosen.threads, bar, lambda _: bar.done())
        write(found, part, chosen.output, console)


def write(found: results.Json, part: str, folder: Path, console: Console) -> None:
    path = folder / found["device"]["slug"] / f"{part}.json"
    old = results.load(path) if path.exists() else {**found, "runs": {}, "groups": []}
    (key, run), *_ = found["runs"].items()
    results.save(results.merge({**old, "device": found["device"]}, key, run, found["groups"]), path)
    for table in tables.tables(found["groups"]):
        console.print(table)
    for line in [*tables.reasons(found["groups"]), *map("disturbed: {}".format, tables.disturbances(found["groups"]))]:
        console.print(line, style="yellow", highlight=False)
    console.print(f"{part}: {path}", highlight=False)


if __name__ == "__main__":
    main()
