"""Results as JSON: what is in a file, how runs are merged into it, how it is read.

    {"schema": 1, "device": {…}, "runs": {"<time>": {"versions", "settings", "ceilings"}}, "groups": [{"id", "part", "run", "case",
     "activity", "contenders": [{"label", "dtype", "setting", "version", "error", "error_of", "tolerance", "seconds": {"median",
     "p10", "p90"}, "rounds": [medians], "runs", "gflops", "gbps", "ceiling_share"} or {…, "missing" | "failed" | "refused": why}]}]}

Times in seconds a batch; memory has "saved_bytes" and "peak_bytes" in place of times.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any

from vggfast.atomic_files import atomic_write
from vggfast.bench import BenchError, machine
from vggfast.bench.cases import BUFFERS
from vggfast.bench.contenders import ALLOCATOR

SCHEMA = 1
Json = dict[str, Any]
WHY_NOT = ("missing", "failed", "refused")


def new(device: str) -> Json:
    """An empty result of this machine."""
    return {"schema": SCHEMA, "device": machine.describe(device), "runs": {}, "groups": []}


def new_run(device: str, threads: int, ceilings: Json) -> tuple[str, Json]:
    """What holds for all groups of one run, and the key it has in ``runs``."""
    run = {
        "versions": machine.versions(device) | _commit(),
        "settings": {"threads": threads, "allocator": ALLOCATOR, "input_buffers": BUFFERS},
        "ceilings": ceilings,
    }
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), run


def _commit() -> dict[str, str]:
    """The checkout's commit, with a + where it was changed; nothing outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def merge(old: Json, key: str, run: Json, groups: Iterable[Json]) -> Json:
    """``old`` with the groups of a run: they replace those of the same id; runs that nothing refers to any more are dropped."""
    added = [{**group, "run": key} for group in groups]
    replaced = {group["id"] for group in added}
    kept = [group for group in old["groups"] if group["id"] not in replaced]
    merged = sorted(kept + added, key=lambda group: group["id"])
    used = {group["run"] for group in merged}
    runs = {k: v for k, v in {**old["runs"], key: run}.items() if k in used}
    return {**old, "runs": dict(sorted(runs.items())), "groups": merged}


def load(path: Path) -> Json:
    """Raises BenchError for a file that is not a result of this schema."""
    try:
        data: Json = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: expected a file of results, got {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BenchError(
            f'{path}: expected "schema": {SCHEMA}, got {data.get("schema") if isinstance(data, dict) else data!r}'
        )
    if not all(isinstance(data.get(name), kind) for name, kind in (("device", dict), ("runs", dict), ("groups", list))):
        raise BenchError(f"{path}: expected device, runs and groups, got {', '.join(data)}")
    if lost := {str(group.get("run")) for group in data["groups"]} - set(data["runs"]):
        raise BenchError(f"{path}: expected the runs of all groups, got none of {', '.join(sorted(lost))}")
    return data


def save(data: Json, path: Path) -> None:
    """Write ``data`` as the whole new file; what was there stays where that fails. Raises BenchError where it cannot be written."""
    text = json.dumps(_rounded(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    check_writable(path)
    device = path.exists() and not path.is_file()  # as /dev/stdout, which a file must not replace
    try:
        with nullcontext(path) if device else atomic_write(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path}: cannot be written ({error.strerror}); choose another file") from error


def check_writable(path: Path) -> None:
    """Raises BenchError where a file of results cannot be: to be asked before minutes of measuring. Makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{path}: its folder cannot be made ({error.strerror}); choose another file") from error
    if path.is_dir():
        raise BenchError(f"{path}: expected a file to write results to, got a folder")
    if not os.access(path.parent, os.W_OK):
        raise BenchError(f"{path.parent}: expected a folder that can be written to; choose another file")


def _rounded(value: Any) -> Any:
    """Five significant digits: more is noise, and makes the files twice as large. JSON has no infinity, which an error can be."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def load_folder(folder: Path) -> Json:
    """All files of a device's folder as one result. Raises BenchError where there is none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise BenchError(f"{folder}: expected files of results, got none; python benchmarks/record.py makes them")
    parts = [load(path) for path in files]
    runs = {key: run for part in parts for key, run in part["runs"].items()}
    return {**parts[0], "runs": runs, "groups": [group for part in parts for group in part["groups"]]}


def digest(data: Json) -> str:
    """Of what is drawn and written, to tell whether a picture or a table is up to date."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def group(data: Json, identifier: str) -> Json | None:
    found: Json | None = next((g for g in data["groups"] if g["id"] == identifier), None)
    return found


def contender(group: Json | None, label: str) -> Json | None:
    """The record of a contender that was measured; None if it is not there or was not."""
    if group is None:
        return None
    found: Json | None = next((c for c in group["contenders"] if c["label"] == label), None)
    return found if found and not any(why in found for why in WHY_NOT) else None
