"""What autograd keeps between forward and backward, and the most that a run takes, in bytes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from vggfast.bench import BenchError
from vggfast.bench.cases import Case
from vggfast.bench.contenders import Runner

# Unlike for timing, freed blocks go back to the system at once, so that the process is as large as what is alive.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Saved:
    """Counts what autograd saves inside ``with``: every storage once, parameters and copies of parameters left out.

    A parameter is recognised by its storage, a copy (autocast's bfloat16 filters) by its values.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = {p.untyped_storage().data_ptr(): p for p in parameters}
        self._seen: dict[int, torch.Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._parameters and address not in self._seen and not self._is_copy(tensor.detach()):
            self._seen[address] = tensor.detach()  # kept alive, so that its address is not given away again
        return tensor

    def _is_copy(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a parameter, perhaps transposed, in its own dtype."""
        ways = (tensor, tensor.t()) if tensor.dim() == 2 else (tensor,)
        return any(
            parameter.shape == way.shape and torch.equal(parameter.detach().to(way.dtype), way)
            for parameter in self._parameters.values()
            for way in ways
        )

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())


def measure(runner: Runner, case: Case) -> dict[str, Any]:
    """``saved_bytes`` of one run with gradients (null for inference), ``peak_bytes`` above what was there before the run."""
    runner.run(0)  # sets up what stays: workspaces, code
    saved = None
    if case.task != "inference":
        with Saved(runner.parameters) as counted:
            runner.run(0)
        saved = counted.bytes
        for parameter in runner.parameters:
            parameter.grad = None
        del counted
    gc.collect()
    # A run that finds memory which the process has not given back yet seems to take less.
    return {"saved_bytes": saved, "peak_bytes": max(_peak(runner, case) for _ in range(3))}


def _peak(runner: Runner, case: Case) -> int:
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner.run(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of the resident set starts anew
    before = _status("VmRSS")
    runner.run(0)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise BenchError(f"/proc/self/status: expected a line {field}, got none; peak memory is measured on Linux only")
