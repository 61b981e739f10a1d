"""Which machine this is, which versions run, and whether anything else was running while it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

import vggfast
from vggfast import _C
from vggfast.bench import BenchError

# Microarchitectures by CPU family and ranges of models, where the name that the CPU gives does not say.
AMD_ZEN = [
    (23, 0x00, 0x2F, "zen1"), (23, 0x30, 0xFF, "zen2"),
    (25, 0x00, 0x0F, "zen3"), (25, 0x20, 0x5F, "zen3"), (25, 0x10, 0x1F, "zen4"), (25, 0x60, 0xAF, "zen4"),
    (26, 0x00, 0xFF, "zen5"),
]  # fmt: skip
WITHOUT_AVX512 = {"zen1", "zen2", "zen3"}  # of those named here
WITH_AMX = {"sapphirerapids", "emeraldrapids", "graniterapids"}
INTEL = {85: "skylake", 106: "icelake", 143: "sapphirerapids", 207: "emeraldrapids", 173: "graniterapids"}
ARM = {
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
}
PACKAGES = ["onnxruntime", "openvino", "ncnn", "pnnx", "onnx", "jax", "lpips", "numpy"]


def cpu_info() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"model name": platform.processor() or platform.machine()}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name(info: dict[str, str]) -> str:
    """As "AMD EPYC (zen4)" where the microarchitecture is known; a hypervisor that hides AVX-512 or AMX makes another device."""
    if "CPU part" in info:  # Arm, where no name is given
        implementer, part = info.get("CPU implementer", ""), info["CPU part"]
        return (
            f"Arm {ARM[part]}"
            if implementer == "0x41" and part in ARM
            else f"Arm part {part} of implementer {implementer}"
        )
    name = re.sub(r"\((R|TM)\)|CPU|@.*|Processor|\d+-Core", "", info.get("model name", "unknown"))
    name = " ".join(name.split())
    arch, flags = microarchitecture(info), info.get("flags", "").split()
    if arch and arch not in WITHOUT_AVX512 and "avx512f" not in flags:
        arch += " without AVX-512"
    elif arch in WITH_AMX and "amx_tile" not in flags:
        arch += " without AMX"
    elif not arch and "amx_tile" in flags:  # a hypervisor may give a model that it is not
        arch = "unknown model with AMX"
    return f"{name} ({arch})" if arch else name


def microarchitecture(info: dict[str, str]) -> str:
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    if info.get("vendor_id") == "AuthenticAMD":
        return next((name for f, low, high, name in AMD_ZEN if f == family and low <= model <= high), "")
    return INTEL.get(model, "") if info.get("vendor_id") == "GenuineIntel" and family == 6 else ""


def slug(device: str) -> str:
    """The folder of a device's results, as amd-epyc-zen4-2core or nvidia-h100-80gb-hbm3."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name(cpu_info())} {cores()}core"
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def cores() -> int:
    """Processors that this process may run on, where the system tells; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_proc() -> None:
    """Raises BenchError where the system has no /proc, without which nobody knows what else ran during a measurement."""
    if not Path("/proc/stat").exists():
        raise BenchError(
            f"expected Linux, whose /proc tells what else runs while something is timed; got {platform.system()}"
        )


def describe(device: str) -> dict[str, Any]:
    """The device for the results' JSON: what somebody needs to know to compare another one."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    found: dict[str, Any] = {
        "slug": slug(device),
        "cpu": cpu_name(cpu_info()),
        "cores": cores(),
        "memory_gib": round(memory),
        "isa": _C.cpu_isa(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        properties = torch.cuda.get_device_properties(0)
        found["sms"] = properties.multi_processor_count
        if clock := getattr(properties, "clock_rate", 0):  # in kHz; torch has it since 2.6
            found["ghz"] = round(clock / 1e6, 3)
    return found


def versions(device: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "vggfast": vggfast.__version__, "torch": torch.__version__}
    if device == "cuda":
        cudnn: Any = torch.backends.cudnn
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn.version())}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class HasCpuTime(Protocol):
    def cpu_seconds(self) -> float: ...


class Activity:
    """CPU time that went elsewhere while workers took turns: to idle workers, to other programs, to the hypervisor's other guests."""

    def __init__(self, workers: Sequence[HasCpuTime]) -> None:
        self._workers = workers
        self._start = time.monotonic()
        self._workers_start = self._workers_cpu()
        self._machine_start, self._own_start = machine_cpu(), time.process_time()
        self._active = 0.0

    def _workers_cpu(self) -> float:
        return sum(worker.cpu_seconds() for worker in self._workers)

    @contextmanager
    def turn(self, worker: HasCpuTime) -> Iterator[None]:
        before = worker.cpu_seconds()
        yield
        self._active += worker.cpu_seconds() - before

    def summary(self) -> dict[str, float]:
        """Shares of all processors' time: ``idle_workers``, ``other_programs``, ``stolen``; and ``seconds`` of the clock."""
        seconds = time.monotonic() - self._start
        workers = self._workers_cpu() - self._workers_start
        busy, stolen = (now - then for now, then in zip(machine_cpu(), self._machine_start, strict=True))
        whole = seconds * (os.cpu_count() or 1)
        others = busy - workers - (time.process_time() - self._own_start)
        return {
            "seconds": round(seconds, 2),
            "idle_workers": round(max(0.0, workers - self._active) / whole, 4),
            "other_programs": round(max(0.0, others) / whole, 4),
            "stolen": round(stolen / whole, 4),
        }


def machine_cpu() -> tuple[float, float]:
    """Seconds since boot that processors were busy, and that the hypervisor gave to other guests."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(f) for f in fields[:8])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks
