"""What becomes of a comparison in which a contender fails while it is timed, and of results that cannot be written."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vggfast.bench import BenchError, results, verdict
from vggfast.bench.cases import Case
from vggfast.bench.contenders import VGGFAST, Contender, find
from vggfast.bench.measure import Effort, Entry, Group, Lab

ROOT = Path(__file__).parents[1]
ONCE = Effort(min_rounds=2, max_rounds=2, seconds=0.1, turn_s=0)
LAYER = Case("conv5_3", "forward", 1)


def planted(name: str) -> Contender:
    return Contender(name, "test", f"bench_contenders:{name}", tasks=("forward",))


def measured(lab: Lab, *names: str) -> dict:
    chosen = [VGGFAST, *map(planted, names)]
    group = Group("layers", LAYER, tuple(Entry(c.name, c, LAYER) for c in chosen))
    return {record["label"]: record for record in lab.time(group, ONCE)["contenders"]}


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setattr(Lab, "ceilings", lambda *_: {"peak_gflops": {"fp32": 1.0}, "dram_gbps": 1.0})
    with Lab(1) as made:
        yield made


def test_a_system_without_proc_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: str(path) != "/proc/stat")
    with pytest.raises(BenchError, match=r"expected Linux, .*; got"):
        Lab(1)


def test_who_fails_while_it_is_timed_is_named_and_the_others_are_timed(lab):
    found = measured(lab, "fails_later", "chatty")
    assert found["fails_later"]["failed"] == "torch: RuntimeError: no more"
    assert "seconds" not in found["fails_later"]
    assert [len(found[name]["rounds"]) for name in ("vggfast", "chatty")] == [2, 2]


def test_a_process_that_ends_takes_along_who_shared_it_and_no_later_group(lab):
    found = measured(lab, "dies_later")
    assert "its process ended with status 7 at time" in found["dies_later"]["failed"]
    assert found["vggfast"]["failed"] == "dies_later failed in the same process"
    found = measured(lab, "dies", "chatty")  # in its first request
    assert found["vggfast"]["failed"] == "dies failed in the same process"
    assert len(found["chatty"]["rounds"]) == 2


def test_memory_that_cannot_be_measured_is_a_failure_of_that_contender(lab):
    case = Case("bench_contenders:tiny", "training", 2, size=32)
    group = Group("memory", case, tuple(Entry(c.name, c, case) for c in (VGGFAST, find("torch channels_last"))))
    builder = "bench_contenders:without_memory"
    broken = dataclasses.replace(group.entries[0], contender=dataclasses.replace(VGGFAST, builder=builder, options={}))
    ours, theirs = lab.measure_memory(dataclasses.replace(group, entries=(broken, group.entries[1])))["contenders"]
    assert "no such counter" in ours["failed"]
    assert theirs["peak_bytes"] > 0


def test_an_infinite_error_is_refused_also_where_torchs_own_is_infinite():
    infinite = {"grad of x": float("inf")}
    record = verdict.judge(Entry("x", VGGFAST, Case("vgg16", "training", 1, "bf16")), infinite, infinite, True)
    assert "got inf" in record["refused"]


def test_results_replace_a_file_as_a_whole_and_are_json_without_infinities(tmp_path):
    path = tmp_path / "new" / "x.json"
    results.save({"error": float("inf"), "rounds": [float("nan"), 1.0]}, path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"error": None, "rounds": [None, 1.0]}
    with pytest.raises(TypeError):
        results.save({"not for JSON": object()}, path)
    assert json.loads(path.read_text())["error"] is None
    assert [each.name for each in path.parent.iterdir()] == ["x.json"]


def test_results_go_to_a_device_as_they_are():
    code = "from pathlib import Path; from vggfast.bench import results; results.save({'a': 1}, Path('/dev/stdout'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"a": 1}
    assert Path("/dev/stdout").is_symlink()


@pytest.mark.parametrize(
    ("path", "message"),
    [(".", "got a folder"), ("file/x.json", "its folder cannot be made"), ("/proc/no/x.json", "folder cannot be made")],
)
def test_where_results_cannot_be_is_said_before_anything_is_measured(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match=message):
        results.check_writable(tmp_path / path)


def test_a_full_disk_is_a_message():
    with pytest.raises(BenchError, match=r"/dev/full: cannot be written .No space left"):
        results.save({"a": 1}, Path("/dev/full"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"schema": 1}', "expected device, runs and groups, got schema"),
        (b'{"schema": 1, "device": {}, "runs": {}, "groups": [{"run": "1"}]}', "expected the runs of all groups"),
        (b"\xff", "expected a file of results"),
    ],
)
def test_half_of_a_result_is_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(BenchError, match=message):
        results.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "("], "error: missing )"),
        (["--against", "tensorflow"], "error: against: expected some of"),
        (["--output", "/proc/no"], "error: /proc/no/"),
    ],
)
def test_the_recorder_says_what_is_wrong_before_it_measures(options, message):
    command = [sys.executable, ROOT / "benchmarks" / "record.py", "--device", "cpu", "--part", "memory", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
