"""The near end of a worker: starts it, asks it, sees whether it is idle, ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vggfast.bench import BenchError
from vggfast.bench.contenders import ALLOCATOR

LOOK_S = 0.001  # between two looks at a worker's threads
SETTLE_S = 2.0


class Worker:
    """A child process running ``vggfast.bench.worker``. A context manager: leaving it ends the process."""

    def __init__(self, name: str, threads: int, environment: Mapping[str, str] = ALLOCATOR) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as long as the process)
        extra = {"OMP_NUM_THREADS": str(threads), **environment}
        paths = [p for p in sys.path if p]
        if "" in sys.path:
            paths.insert(0, os.getcwd())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vggfast.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **extra},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises BenchError with what the worker said, or how it died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            print(json.dumps({"request": request, **arguments}), file=stdin, flush=True)
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            why = " (killed: out of memory?)" if status == -9 else ""
            raise BenchError(f"{self.name}: its process ended with status {status}{why} at {request}: {self._tail()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BenchError(f"{self.name}: {reply['error']}")
        return reply

    def _tail(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-800:].strip()

    def cpu_seconds(self) -> float:
        """CPU time of all its threads up to now."""
        try:
            return time.clock_gettime_ns(~self._process.pid << 3 | 2) * 1e-9  # Linux: the CPU-time clock of a process
        except OSError as error:
            raise BenchError(f"{self.name}: its process has ended: {self._tail()}") from error

    def settle(self) -> None:
        """Wait until no thread of it runs or wants to, so that the next worker has the cores for itself; SETTLE_S at most."""
        deadline = time.monotonic() + SETTLE_S
        asleep = 0
        while asleep < 2 and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            asleep = 0 if self._runnable() else asleep + 1

    def _runnable(self) -> bool:
        """Whether a thread is in state R. Unlike CPU time this tells a spinning thread also where others keep it from running."""
        for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
            try:
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it ended meanwhile
                continue
            if state == "R":
                return True
        return False

    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """There is nothing to save, and giving gigabytes back in order takes seconds."""
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._errors.close()


def available_bytes() -> int:
    """Memory that new processes can have, as Linux estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 0
