"""The machine that is measured on, and the files of results."""

from __future__ import annotations

import json
import time

import pytest

from vggfast.bench import BenchError, machine, results

# ---- the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "name", "expected"),
    [
        ("AuthenticAMD", 25, 1, "avx avx2", "AMD EPYC", "AMD EPYC (zen3)"),
        ("AuthenticAMD", 25, 17, "avx avx2 avx512f", "AMD EPYC", "AMD EPYC (zen4)"),
        ("AuthenticAMD", 25, 17, "avx avx2", "AMD EPYC", "AMD EPYC (zen4 without AVX-512)"),
        ("AuthenticAMD", 26, 2, "avx512f", "AMD EPYC 9755 128-Core Processor", "AMD EPYC 9755 (zen5)"),
        (
            "GenuineIntel",
            6,
            143,
            "avx512f amx_tile",
            "Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz",
            "Intel Xeon Platinum 8480C (sapphirerapids)",
        ),
        ("GenuineIntel", 6, 207, "avx512f", "Intel(R) Xeon(R) Processor", "Intel Xeon (emeraldrapids without AMX)"),
        ("GenuineIntel", 6, 207, "avx2", "Intel(R) Xeon(R) Processor", "Intel Xeon (emeraldrapids without AVX-512)"),
        ("GenuineIntel", 6, 106, "avx512f", "Intel(R) Xeon(R) Processor", "Intel Xeon (icelake)"),
        (
            "GenuineIntel",
            6,
            167,
            "avx512f amx_tile",
            "Intel(R) Xeon(R) Processor",
            "Intel Xeon (unknown model with AMX)",
        ),
        ("Other", 1, 1, "", "Some CPU", "Some"),
    ],
)
def test_the_name_of_a_processor(vendor, family, model, flags, name, expected):
    fields = {"cpu family": str(family), "model": str(model), "model name": name, "flags": flags}
    assert machine.cpu_name({"vendor_id": vendor, **fields}) == expected


@pytest.mark.parametrize(
    ("implementer", "part", "expected"),
    [
        ("0x41", "0xd40", "Arm Neoverse V1"),
        ("0x41", "0xfff", "Arm part 0xfff of implementer 0x41"),
        ("0xc0", "0xd40", "Arm part 0xd40 of implementer 0xc0"),
    ],
)
def test_the_name_of_an_arm_processor(implementer, part, expected):
    assert machine.cpu_name({"BogoMIPS": "243.75", "CPU implementer": implementer, "CPU part": part}) == expected


@pytest.mark.parametrize(
    ("flags", "folder"), [("avx2 avx512f", "amd-epyc-zen4-2core"), ("avx2", "amd-epyc-zen4-without-avx-512-2core")]
)
def test_the_folder_of_this_machine(monkeypatch, flags, folder):
    fields = {"cpu family": "25", "model": "17", "model name": "AMD EPYC", "flags": flags}
    monkeypatch.setattr(machine, "cpu_info", lambda: {"vendor_id": "AuthenticAMD", **fields})
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert machine.slug("cpu") == folder


def test_cpu_time_of_others_is_told_apart_from_that_of_the_active_worker():
    class Fake:
        used = 0.0

        def cpu_seconds(self) -> float:
            return self.used

    active, idle = Fake(), Fake()
    activity = machine.Activity([active, idle])
    with activity.turn(active):
        time.sleep(0.05)
        active.used += 1.0
        idle.used += 0.02  # spins while it should be idle
    summary = activity.summary()
    assert summary["idle_workers"] == pytest.approx(0.02 / (summary["seconds"] * machine.os.cpu_count()), rel=0.2)


# ---- results -------------------------------------------------------------------------------------------------------


def test_a_run_replaces_its_groups_and_leaves_the_others(tmp_path):
    old = {
        "schema": 1,
        "device": {},
        "runs": {"1": {"a": 1}, "0": {}},
        "groups": [{"id": "x", "run": "1"}, {"id": "y", "run": "0"}],
    }
    merged = results.merge(old, "2", {"b": 2}, [{"id": "y", "new": 1 / 3}, {"id": "z"}])
    assert [(g["id"], g["run"]) for g in merged["groups"]] == [("x", "1"), ("y", "2"), ("z", "2")]
    assert set(merged["runs"]) == {"1", "2"}  # nothing refers to run 0 any more
    results.save(merged, tmp_path / "folder" / "part.json")
    assert results.load(tmp_path / "folder" / "part.json")["groups"][1]["new"] == 0.33333
    assert (
        results.load_folder(tmp_path / "folder")["groups"] == results.load(tmp_path / "folder" / "part.json")["groups"]
    )


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(BenchError, match="expected files of results, got none"):
        results.load_folder(tmp_path)
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "expected a file of results"),
        (json.dumps({"schema": 99}), 'expected "schema": 1, got 99'),
        ("[]", "got"),
    ):
        path.write_text(text)
        with pytest.raises(BenchError, match=message):
            results.load(path)
