"""The switches that choose kernels, in one place; the environment variables of the same names set them at the start.

| switch | environment | values |
|---|---|---|
| `cpu_isa` | `VGGFAST_CPU_ISA` | `auto`, `aten` (torch's own operators) or one of `cpu_isas()` |
| `conv_algo` | `VGGFAST_CONV_ALGO` | `auto`, `winograd`, `direct`: the algorithm on a CPU |
| `cuda_plan` | `VGGFAST_CUDA_PLAN` | `aten` (the default), `sm80`, `sm90`, `sm90patch`: the kernels on CUDA devices |

Each holds for the whole process, from the next call of an op on. Setters raise ValueError for a value that is none of these, getters
for such a value in the environment.
"""

import os
import platform

from vggfast import _C

__all__ = [
    "CUDA_PLANS",
    "conv_algo",
    "cpu_isa",
    "cpu_isas",
    "cuda_plan",
    "set_conv_algo",
    "set_cpu_isa",
    "set_cuda_plan",
]

CUDA_PLANS = ("aten", "sm80", "sm90", "sm90patch")
_cuda_plan = os.environ.get("VGGFAST_CUDA_PLAN") or "aten"

# What "auto" means for the CPU: kernels that no machine of its architecture has timed are off until they are asked for.
_AUTO_IS_ATEN = platform.machine() not in ("x86_64", "AMD64")


def _is_aten(cpu_isa: str) -> bool:
    return cpu_isa == "aten" or (cpu_isa == "auto" and _AUTO_IS_ATEN)


_cpu_aten = _is_aten(os.environ.get("VGGFAST_CPU_ISA") or "auto")


def cuda_plan() -> str:
    """Which kernels calls on CUDA devices take: "aten" for torch's own, "sm80" for this library's wherever one fits, "sm90" for
    those of Hopper (TMA and wgmma) where they fit and "sm80" elsewhere, "sm90patch" also for Hopper's that read all nine taps from
    one patch of pixels, where they are expected to be faster than "sm90"'s.
    """
    return _checked_cuda_plan(_cuda_plan)


def set_cuda_plan(name: str) -> None:
    """Use "aten", "sm80", "sm90" or "sm90patch" on CUDA devices. No GPU has proven the kernels yet, which is why "aten" is the default."""
    global _cuda_plan
    _cuda_plan = _checked_cuda_plan(name)
    if name != "aten" and hasattr(_C, "set_cuda_kernels"):
        _C.set_cuda_kernels(name)


def _checked_cuda_plan(name: str) -> str:
    if name not in CUDA_PLANS:
        raise ValueError(f"VGGFAST_CUDA_PLAN: expected {', '.join(CUDA_PLANS[:-1])} or {CUDA_PLANS[-1]}, got '{name}'")
    return name


def conv_algo() -> str:
    """The convolution algorithm on a CPU: "auto", "winograd" or "direct"."""
    return str(_C.conv_algo())


def set_conv_algo(name: str) -> None:
    """Use "auto", "winograd" or "direct" on a CPU; "direct" has the errors of a plain convolution."""
    _C.set_conv_algo(name)


def cpu_isa() -> str:
    """The instruction set of the kernels in use on the CPU; "aten" for torch's own operators."""
    isa = str(_C.cpu_isa())  # first, so that a wrong value in the environment is noticed
    return "aten" if _cpu_aten else isa


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU runs, the widest first."""
    return tuple(_C.cpu_isas())


def set_cpu_isa(name: str) -> None:
    """Use the instruction set of that name, with "aten" torch's own operators, and with "auto" the widest instruction set, or on
    other architectures than x86-64, where nobody has timed the kernels yet, "aten".
    """
    global _cpu_aten
    _C.set_cpu_isa(name)
    _cpu_aten = _is_aten(name)


def why_not_cpu() -> str:
    """Why torch's own operators run on the CPU; empty if this library's kernels do."""
    if not _cpu_aten:
        return ""
    if _AUTO_IS_ATEN:
        widest = cpu_isas()[0]
        return f"no machine of this architecture has timed the kernels yet, so they are off: VGGFAST_CPU_ISA={widest} turns them on"
    return "torch's own operators are asked for: VGGFAST_CPU_ISA=aten"
