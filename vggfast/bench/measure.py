"""A group of contenders on one case: each set up in its process, checked, then timed in interleaved rounds."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from vggfast.bench import BenchError, memory, runtimes
from vggfast.bench.cases import Case
from vggfast.bench.client import Worker, available_bytes
from vggfast.bench.contenders import ALLOCATOR, VGGFAST, Contender, find, rivals
from vggfast.bench.machine import Activity, check_proc
from vggfast.bench.stats import spread
from vggfast.bench.verdict import judge

Record = dict[str, Any]  # what the results' JSON holds of a contender or of a group
CONTROL = "vggfast again"  # the A/A control: the ratio of equals, and its spread, is what a ratio can be trusted to


@dataclass(frozen=True)
class Entry:
    """A contender in a group, under the name it has there."""

    label: str
    contender: Contender
    case: Case
    left_out: str = ""  # why it is not to be measured


@dataclass(frozen=True)
class Group:
    """What is compared side by side. ``part`` is the file of results it belongs to."""

    part: str
    case: Case
    entries: tuple[Entry, ...]

    @property
    def id(self) -> str:
        return f"{self.part}: {self.case.id}" if self.part in ("memory", "compiled", "threads") else self.case.id


@dataclass(frozen=True)
class Effort:
    """How long a group is timed: as many rounds as ``seconds`` allows, within limits; in each, every contender runs for ``turn_s``."""

    min_rounds: int
    max_rounds: int
    seconds: float
    turn_s: float


class Listener:
    """Is told how a measurement proceeds; does nothing."""

    def stage(self, group: Group, what: str) -> None: ...

    def round(self, group: Group, done: int, total: int) -> None: ...


def compare(part: str, case: Case, against: list[str] | None = None, full: bool = True) -> Group:
    """vggfast, itself again as the control, and everybody who computes ``case``, installed or not.

    float32 inference on a CPU also meets the runtimes in half precision: what they get there with less accuracy. Without ``full``
    who takes long to set up is left out, and named.
    """

    def entry(label: str, rival: Contender, case: Case) -> Entry:
        slow = "" if full or not rival.slow else f"only in the full form: {rival.slow}"
        return Entry(label, rival, case, slow)

    entries = [Entry(VGGFAST.name, VGGFAST, case)]
    if part != "memory":
        entries.append(Entry(CONTROL, VGGFAST, case))
    entries += [entry(rival.name, rival, case) for rival in rivals(case, against)]
    if part != "memory" and case.task == "inference" and case.dtype == "fp32":
        half = case.with_dtype("bf16")
        extra = {"openvino": "openvino bf16", "ncnn half": "ncnn half", "ncnn bf16": "ncnn bf16"}
        entries += [entry(extra[r.name], r, half) for r in rivals(half, against) if r.name in extra]
    return Group(part, case, tuple(entries))


def with_fewer_threads(case: Case) -> Group:
    """vggfast and torch with the case's threads, and with 1, 2, 4 and so on up to these."""
    fewer = [1 << i for i in range(case.threads.bit_length()) if 1 << i < case.threads]
    entries = []
    for each in (VGGFAST, find("torch channels_last")):
        entries.append(Entry(each.name, each, case))
        entries += [Entry(threads_label(each.name, count), each, replace(case, threads=count)) for count in fewer]
    return Group("threads", case, tuple(entries))


def threads_label(name: str, count: int) -> str:
    return f"{name}, {count} thread{'s' if count > 1 else ''}"


class Lab:
    """Workers, and the files they share, for a run of measurements. A context manager."""

    def __init__(self, threads: int, listener: Listener | None = None) -> None:
        check_proc()
        self.threads = threads
        self.listener = listener or Listener()
        self._folder = Path(tempfile.mkdtemp(prefix="vggfast-bench-"))
        self._torch: Worker | None = None  # contenders that share one process: see _shared
        self._helper: Worker | None = None  # for what is not timed; ended before timing
        self._files: dict[str, Path] = {}
        self._ceilings: dict[str, Record] = {}

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._end_helper()
        self.end_torch()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- files ----

    def _utility(self, where: str, request: str, **arguments: Any) -> Record:
        """Something that is not timed, in a process whose memory is free again before anything is; a GPU's own memory is free
        again anyway."""
        if where == "cuda":
            return self._torch_worker().ask(request, **arguments)
        if self._helper is None:
            self._helper = Worker("helper", self.threads)
        return self._helper.ask(request, **arguments)

    def _end_helper(self) -> None:
        if self._helper:
            self._helper.close()
        self._helper = None

    def _weights(self, case: Case) -> Path:
        name = f"{case.subject} weights"
        if name not in self._files:
            path = self._folder / f"weights{len(self._files)}.safetensors"
            self._utility(case.device, "write_weights", case=case.to_dict(), path=str(path))
            self._files[name] = path
        return self._files[name]

    def _reference(self, case: Case) -> Path | str:
        same = case
        if case.layer and case.device == "cuda":
            return ""  # computed where it is needed
        if case.layer:
            same = case.with_task("forward+backward")  # has what every task gives
        elif case.task == "inference":
            same = case.with_dtype("fp32")  # one answer for every dtype
        name = f"{same.id} {case.size} reference"
        if name not in self._files:
            path = self._folder / f"reference{len(self._files)}.safetensors"
            arguments = {
                "case": same.to_dict(),
                "weights": None if case.layer else str(self._weights(case)),
                "path": str(path),
            }
            if case.layer:
                self._torch_worker().ask("write_reference", **arguments)
            else:
                self._utility(case.device, "write_reference", **arguments)
            self._files[name] = path
        return self._files[name]

    def _export(self, kind: str, case: Case) -> Path:
        name = f"{case.subject} {case.size} {kind}"
        if name not in self._files:
            folder = self._folder / f"export{len(self._files)}"
            folder.mkdir()
            arguments = {
                "kind": kind,
                "case": case.to_dict(),
                "weights": str(self._weights(case)),
                "folder": str(folder),
            }
            self._files[name] = Path(self._utility("cpu", "export", **arguments)["path"])
        return self._files[name]

    def _files_for(self, entry: Entry) -> dict[str, str]:
        if entry.case.layer:
            return {"reference": str(self._reference(entry.case))}
        files = {"weights": str(self._weights(entry.case))}
        kind = runtimes.FILES.get(entry.contender.family)
        if kind:
            files[kind] = str(self._export(kind, entry.case))
        return files

    def ceilings(self, device: str, dtypes: Sequence[str] = ("fp32", "bf16")) -> Record:
        """What the machine can do at most; measured once in a run."""
        if device not in self._ceilings:
            arguments = {"device": device, "threads": self.threads, "dtypes": list(dtypes)}
            self._ceilings[device] = self._utility(device, "measure_ceilings", **arguments)
            self._end_helper()
        return self._ceilings[device]

    # ---- measurements ----

    def time(self, group: Group, effort: Effort) -> Record:
        """Check every contender of the group, time those that are right. The result is a group of the JSON: see ``results``."""
        with ExitStack() as stack:
            ready, records = self._set_up(group, stack, ALLOCATOR)
            self._end_helper()
            samples: dict[str, list[list[float]]] = {}
            activity = None
            while ready and activity is None:
                samples = {entry.label: [] for entry, _ in ready}
                try:
                    activity = self._rounds(group, effort, ready, samples)
                except _Failed as failed:  # the rounds of the others begin anew, so that all have the same
                    records[failed.entry.label]["failed"] = str(failed)
                    ready = self._without(failed.entry, ready, records)
        for entry, _ in ready:
            records[entry.label] |= _timing(entry.case, samples[entry.label], self.ceilings(entry.case.device))
        return {
            "id": group.id,
            "case": group.case.to_dict(),
            "contenders": [records[entry.label] for entry in group.entries],
            "activity": activity,
        }

    def measure_memory(self, group: Group) -> Record:
        """The same group's saved activations and peak memory, each contender alone in a new process."""
        records: dict[str, Record] = {}
        for entry in group.entries:
            with ExitStack() as stack:
                ready, record = self._set_up(Group(group.part, group.case, (entry,)), stack, memory.ALLOCATOR)
                records |= record
                self._end_helper()
                for _, worker in ready:
                    try:
                        found = worker.ask("measure_memory", key=entry.label, case=entry.case.to_dict())
                    except BenchError as error:
                        found = {"failed": str(error)}
                    records[entry.label] |= found
        return {"id": group.id, "case": group.case.to_dict(), "contenders": list(records.values()), "activity": None}

    def _set_up(
        self, group: Group, stack: ExitStack, allocator: dict[str, str]
    ) -> tuple[list[tuple[Entry, Worker]], dict[str, Record]]:
        """Start and check the contenders; a record of each, also of those that are missing, fail or are refused."""
        ready: list[tuple[Entry, Worker]] = []
        records: dict[str, Record] = {}
        if self._torch:
            self._torch.ask("forget")
        workers: dict[str, Worker | None] = {}
        for entry in group.entries:
            record = records[entry.label] = {"label": entry.label, "dtype": entry.case.dtype}
            reason = entry.left_out or entry.contender.missing() or _too_little_memory(entry.case, len(workers))
            if reason:
                record["missing"] = reason
            elif _shared(entry):
                workers[entry.label] = None
            else:  # all start at once, and import torch meanwhile
                workers[entry.label] = stack.enter_context(Worker(entry.label, self.threads, allocator))
        for own in filter(None, workers.values()):
            stack.callback(own.kill)  # all at once, before one after the other is waited for
        for entry in group.entries:
            if entry.label not in workers:
                continue
            worker, record = workers[entry.label] or self._torch_worker(), records[entry.label]
            self.listener.stage(group, f"{entry.label}: setting up")
            try:
                record |= worker.ask(
                    "prepare",
                    key=entry.label,
                    builder=entry.contender.builder,
                    case=entry.case.to_dict(),
                    files=self._files_for(entry),
                    options=entry.contender.options,
                )
                self.listener.stage(group, f"{entry.label}: checking")
                record |= self._check(entry, worker)
            except BenchError as error:
                record["failed"] = str(error)
                ready = self._without(entry, [*ready, (entry, worker)], records)
            if not record.keys() & {"failed", "refused"}:
                worker.settle()
                ready.append((entry, worker))
        return ready, records

    def _without(
        self, failed: Entry, ready: list[tuple[Entry, Worker]], records: dict[str, Record]
    ) -> list[tuple[Entry, Worker]]:
        """Who can still be timed. A process that has ended took along who was ready in it; so did one whose kernel failed on a
        GPU, which may be unusable to it from then on."""
        worker = next(worker for entry, worker in ready if entry is failed)
        left = [pair for pair in ready if pair[0] is not failed]
        if worker is not self._torch or not (failed.case.device == "cuda" or worker.ended()):
            return left
        self.end_torch()
        for other in (entry for entry, owner in left if owner is worker):
            records[other.label]["failed"] = f"{failed.label} failed in the same process"
        return [pair for pair in left if pair[1] is not worker]

    def end_torch(self) -> None:
        """End the process that contenders share: after a failure on a GPU the next group gets a new one."""
        if self._torch:
            self._torch.close()
        self._torch = None

    def _torch_worker(self) -> Worker:
        if self._torch is None:
            self._torch = Worker("torch", self.threads)
        return self._torch

    def _check(self, entry: Entry, worker: Worker) -> Record:
        reply = worker.ask(
            "check", key=entry.label, case=entry.case.to_dict(), reference=str(self._reference(entry.case))
        )
        return judge(entry, reply["errors"], reply["own_errors"], reply["follows_input"])

    def _rounds(
        self, group: Group, effort: Effort, ready: list[tuple[Entry, Worker]], samples: dict[str, list[list[float]]]
    ) -> Record:
        plan, round_s = {}, 0.0
        for entry, worker in ready:
            once = _seconds(entry, worker, warmup=1, times=1, start=0)[0]
            times = max(1, min(50 if group.case.device == "cpu" else 10, round(effort.turn_s / once)))
            # A contender in its own process finds cold caches and sleeping threads, which cost a long run nothing.
            warmup = 1 if once < 0.5 and not entry.case.layer else 0
            plan[entry.label] = (warmup, times)
            round_s += once * (warmup + times)
            worker.settle()
        rounds = max(effort.min_rounds, min(effort.max_rounds, int(effort.seconds / round_s)))
        order = random.Random(0)
        activity = Activity(list({id(worker): worker for _, worker in ready}.values()))
        for i in range(rounds):
            self.listener.round(group, i, rounds)
            for entry, worker in order.sample(ready, len(ready)):
                warmup, times = plan[entry.label]
                with activity.turn(worker):
                    measured = _seconds(entry, worker, warmup=warmup, times=times, start=i)
                    if len(ready) > 1 and not _shared(entry):
                        worker.settle()  # the next has the cores for itself
                samples[entry.label].append(measured)
        self.listener.round(group, rounds, rounds)
        return activity.summary()


class _Failed(BenchError):
    """A contender that was right and failed while it was timed."""

    def __init__(self, entry: Entry, why: BenchError) -> None:
        super().__init__(str(why))
        self.entry = entry


def _seconds(entry: Entry, worker: Worker, **turn: int) -> list[float]:
    try:
        seconds: list[float] = worker.ask("time", key=entry.label, **turn)["seconds"]
    except BenchError as error:
        raise _Failed(entry, error) from error
    return seconds


def _shared(entry: Entry) -> bool:
    """Whether the contender shares a process: single layers share torch's threads, and on a GPU everything of torch's could, since
    nothing that is timed runs on the CPU."""
    return bool(entry.case.layer) or (entry.case.device == "cuda" and entry.contender.family != "jax")


def _too_little_memory(case: Case, started: int) -> str:
    """Why one more process is too much, beside those that were started and have not grown yet; empty if it is not."""
    if case.layer or case.device != "cpu" or ":" in case.subject:
        return ""
    each = 1.3 + 0.1 * case.batch * (case.size / 224) ** 2 if case.task == "inference" else 2.2 + 0.3 * case.batch
    needed, available = (started + 1) * each, available_bytes() / 1e9
    return (
        "" if available >= needed else f"expected {needed:.1f} GB of memory for the processes, got {available:.1f} GB"
    )


def _timing(case: Case, rounds: list[list[float]], ceilings: Record) -> Record:
    """Statistics over all runs, the median of each round, and rates: convolutions are counted as direct ones."""
    seconds = spread([s for turn in rounds for s in turn])
    record: Record = {
        "seconds": seconds._asdict(),
        "rounds": [spread(turn).median for turn in rounds],
        "runs": sum(map(len, rounds)),
    }
    gflop, gigabytes = case.gflop(), case.gigabytes()
    if gflop:
        peak = ceilings["peak_gflops"].get(case.dtype)
        bound = max(gflop / peak, gigabytes / ceilings["dram_gbps"])
        record |= {
            "gflops": gflop / seconds.median,
            "gbps": gigabytes / seconds.median,
            "ceiling_share": bound / seconds.median,
        }
    return record
