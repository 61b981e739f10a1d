"""The process a contender lives in: reads requests as JSON lines, sets up, checks and times, answers as JSON lines.

Only one worker is asked at a time, so thread pools of different runtimes never run beside each other. Times are taken in here;
the pipe costs nothing.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from vggfast.bench import BenchError, answers, cases, memory
from vggfast.bench.cases import OWN_ERROR, Case
from vggfast.bench.contenders import Runner

Reply = dict[str, Any]
BUSY_CYCLES = 1_000_000  # about half a millisecond of a GPU: longer than a layer takes to enqueue


class Worker:
    """One method a request; see ``client.Worker`` for the other end."""

    def __init__(self) -> None:
        self.runners: dict[str, Runner] = {}
        self._flush: torch.Tensor | None = None

    def prepare(self, key: str, builder: str, case: dict[str, Any], files: dict[str, str], options: Reply) -> Reply:
        module, function = builder.split(":")
        runner: Runner = getattr(importlib.import_module(module), function)(Case(**case), files, **options)
        self.runners[key] = runner
        return {
            "setting": runner.setting,
            "version": runner.version,
            **({"kernel": runner.kernel} if runner.kernel else {}),
        }

    def check(self, key: str, case: dict[str, Any], reference: str) -> Reply:
        """Relative errors on buffer 0, torch's own beside them where the reference has them, and whether buffer 1 gives
        something else, as different data must."""
        runner = self.runners[key]
        outputs = runner.outputs(runner.run(0))
        answer = answers.load(Case(**case), reference)
        errors = cases.relative_errors(outputs, cases.expected(Case(**case), answer))
        own = {name.removeprefix(OWN_ERROR): t.item() for name, t in answer.items() if name.startswith(OWN_ERROR)}
        name = next(iter(outputs))
        first = outputs[name].clone()
        again = runner.outputs(runner.run(1))[name]
        return {"errors": errors, "own_errors": own, "follows_input": not torch.equal(first, again)}

    def time(self, key: str, warmup: int, times: int, start: int) -> Reply:
        """Seconds of ``times`` runs, after ``warmup`` that do not count, on one buffer after the other from ``start``."""
        runner = self.runners[key]
        for i in range(warmup):
            runner.run((start + i) % runner.buffers)
        measured = []
        for i in range(warmup, warmup + times):
            measured.append(self._time_once(runner, (start + i) % runner.buffers))
        return {"seconds": measured}

    def _time_once(self, runner: Runner, buffer: int) -> float:
        if runner.clock == "cuda":
            return self._time_on_cuda(runner, buffer)
        begin = time.perf_counter_ns()
        result = runner.run(buffer)
        end = time.perf_counter_ns()
        del result
        return (end - begin) * 1e-9

    def _time_on_cuda(self, runner: Runner, buffer: int) -> float:
        """Between two events; the L2 cache is overwritten before. A single layer is enqueued while the device is kept busy, so that
        its time is the device's alone; a network's includes waiting for the host, as its users do."""
        if self._flush is None:
            self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        cuda: Any = torch.cuda
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda.synchronize()
        self._flush.zero_()
        if runner.of_layer:
            cuda._sleep(BUSY_CYCLES)
        begin.record()
        runner.run(buffer)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def measure_memory(self, key: str, case: dict[str, Any]) -> Reply:
        return memory.measure(self.runners[key], Case(**case))

    def forget(self) -> Reply:
        """Give back what the contenders of the last group hold."""
        self.runners.clear()
        torch.compiler.reset()  # or the next sizes would be compiled as dynamic ones, and the ninth not at all
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU, or none was used
        return {}

    # ---- work that is not timed ----

    def write_weights(self, case: dict[str, Any], path: str) -> Reply:
        cases.save_weights(Case(**case), Path(path))
        return {}

    def write_reference(self, case: dict[str, Any], weights: str | None, path: str) -> Reply:
        from safetensors.torch import save_file

        answer = cases.reference(Case(**case), Path(weights) if weights else None)
        big = sum(t.numel() for t in answer.values()) > 50e6  # gradients of 138 million parameters: half their size
        save_file({name: (t.float() if big else t).contiguous() for name, t in answer.items()}, path)
        return {}

    def export(self, kind: str, case: dict[str, Any], weights: str, folder: str) -> Reply:
        from vggfast.bench.runtimes import export

        return {"path": os.fspath(export(kind, Case(**case), Path(weights), Path(folder)))}

    def measure_ceilings(self, device: str, threads: int, dtypes: list[str]) -> Reply:
        from vggfast.bench.ceilings import measure

        return measure(device, threads, dtypes)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr, not among the answers
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("request"))(**request)
        except BenchError as error:
            reply = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
