"""Results for the tests of pictures, pages and tables: nothing was measured."""

from __future__ import annotations

from vggfast.bench import results, rows
from vggfast.bench.cases import Case
from vggfast.bench.measure import compare

SLOWNESS = {"vggfast": 1.0, "vggfast again": 1.02, "openvino bf16": 1.25, "openvino": 2.5, "torch channels_last": 3.0}


def timed(label: str, dtype: str, case: Case) -> dict:
    times = SLOWNESS.get(label, 4.0)
    rounds = [1e-3 * times * case.batch * factor for factor in (1.0, 1.1, 0.9)]
    gflop = case.gflop() or 1.0
    return {
        "label": label, "dtype": dtype, "setting": "fast", "version": "1", "kernel": "cpu avx512 winograd F(4x4,3x3)",
        "error": 1e-6 * times, "error_of": "scores", "tolerance": 5e-5, "seconds": {"median": rounds[0], "p10": rounds[2], "p90": rounds[1]},
        "rounds": rounds, "runs": 3, "gflops": gflop / rounds[0], "gbps": 1.0, "ceiling_share": 0.5,
    }  # fmt: skip


def sample() -> dict:
    """Results with every row of README's table, in which vggfast is the faster one."""
    groups = []
    for row in rows.CPU_ROWS:
        for identifier in row.groups:
            part = "memory" if identifier.startswith("memory: ") else "inference"
            subject, task, dtype, _, batch = identifier.removeprefix("memory: ").split()
            case = Case(subject, task, int(batch), dtype)
            records = [timed(entry.label, entry.case.dtype, case) for entry in compare(part, case).entries]
            for record in records if part == "memory" else []:
                del record["seconds"], record["rounds"]
                record |= {
                    "saved_bytes": int(100e6 * SLOWNESS.get(record["label"], 4)),
                    "peak_bytes": int(900e6 * SLOWNESS.get(record["label"], 4)),
                }
            group = {"id": identifier, "case": case.to_dict(), "run": "now", "activity": None, "contenders": records}
            groups += [] if identifier in [g["id"] for g in groups] else [group]
    run = {
        "versions": {"vggfast": "0.1.0", "torch": "2.11", "openvino": "2026"},
        "settings": {"threads": 2},
        "ceilings": {"peak_gflops": {"fp32": 250.0, "bf16": 480.0}, "dram_gbps": 40.0},
    }
    device = {"slug": "some-cpu", "cpu": "Some CPU", "cores": 2}
    return {"schema": 1, "device": device, "runs": {"now": run}, "groups": groups}


def of(data: dict, identifier: str, label: str) -> dict:
    return next(c for c in results.group(data, identifier)["contenders"] if c["label"] == label)
