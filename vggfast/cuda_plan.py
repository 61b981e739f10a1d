"""Which kernel a call on a CUDA device takes: pure functions from sizes, dtype, GPU and switches to a `Decision`.

`why_not` is what the ops ask before every call. It repeats, in Python that torch.compile can trace, the limits of
`choose_plan` in csrc/cuda/plan.h; the words of a decision, and the plan itself, come from there.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any, NamedTuple

import torch

from vggfast import _C

HOW_TO_BUILD = (
    "Install anew from a checkout: pip install . brings nvcc on x86-64, in an environment of the build's own; elsewhere, or with "
    "--no-build-isolation, have CUDA's nvcc on PATH or name its toolkit in CUDA_HOME"
)
NOT_PROVEN = "CUDA kernels have not been proven on a GPU yet: VGGFAST_CUDA_PLAN=sm80 or sm90 turns them on"
_INT32 = 2**31 - 1 - 1024  # kernels count pixels up to a tile past the last
_VECTOR = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}  # elements in 16 bytes


class Decision(NamedTuple):
    """Which kernel a call takes: ``fused`` or not, the ``kernel``'s name, and the ``reason`` for the choice."""

    fused: bool
    kernel: str
    reason: str


class Gpu(NamedTuple):
    """What decides about a GPU: compute capability as 10 * major + minor, number of SMs, and why nothing here runs on it."""

    capability: int
    sm_count: int
    obstacle: str = ""

    @classmethod
    def parse(cls, text: str) -> Gpu:
        """From "8.0,108": compute capability and number of SMs. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)\.(\d)\s*,\s*([1-9]\d*)", text.strip())
        if match is None:
            raise ValueError(f"gpu: expected compute capability and number of SMs, as '8.0,108', got '{text}'")
        major, minor, sms = map(int, match.groups())
        return cls(10 * major + minor, sms)

    def __str__(self) -> str:
        return f"compute capability {self.capability // 10}.{self.capability % 10}, {self.sm_count} SMs"


class Problem(NamedTuple):
    """One 3x3 convolution, or with c = k one pool: ``[n, c, h, w]`` in, ``k`` channels out, computed in ``dtype``."""

    n: int
    c: int
    k: int
    h: int
    w: int
    pool: bool
    dtype: torch.dtype


def why_not(step: str, p: Problem, gpu: Gpu, plan: str, no_tf32: str) -> str:
    """Why no CUDA kernel takes the step "forward", "grad_input", "grad_weight" or "max_pool" of `p`; "" if one does.

    `plan` is what ``switches.cuda_plan()`` says, `no_tf32` what ``tf32_obstacle()`` does.
    """
    if plan == "aten":
        return NOT_PROVEN
    if gpu.obstacle:
        return gpu.obstacle
    if no_tf32 and p.dtype == torch.float32 and step != "max_pool":
        return no_tf32
    if _fits(step, p, gpu):
        return ""
    if torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in p[:5]):
        return "no CUDA kernel fits"  # a plan is made for numbers
    return planned(step, p, gpu)[1]


def decide(step: str, p: Problem, gpu: Gpu, plan: str, no_tf32: str) -> Decision:
    """`why_not`, with the kernel, its tile and its grid where one takes the step."""
    reason = why_not(step, p, gpu, plan, no_tf32)
    if reason:
        return Decision(False, "aten", reason)
    kernel, reason = planned(step, p, gpu, plan)
    family = "sm90" if kernel.startswith("wgmma") else "sm80"
    products = "; float32 is multiplied in TF32" if p.dtype == torch.float32 and step != "max_pool" else ""
    return Decision(True, f"cuda {family} {kernel}", reason + products)


def _fits(step: str, p: Problem, gpu: Gpu) -> bool:
    """Whether `choose_plan` has a kernel for the step."""
    vector, least = _VECTOR[p.dtype], 2 if p.pool else 1
    if gpu.capability < 80 or p.n < 1 or p.h < least or p.w < least or p.n * p.h * p.w > _INT32:
        return False
    if step == "max_pool":
        return p.c % vector == 0
    if 9 * p.c * p.k > _INT32 or (8 * p.w + 2048) * max(p.c, p.k) > _INT32 or p.k % vector != 0:
        return False
    return p.c % vector == 0 or (step == "forward" and p.c <= 3)


def planned(step: str, p: Problem, gpu: Gpu, plan: str = "sm80") -> tuple[str, str]:
    """The plan that is made with the kernels up to `plan`, as kernel with tile and grid, and its reason."""
    dtype = str(p.dtype).removeprefix("torch.")
    text: str = _C.cuda_plan(step, p.n, p.c, p.k, p.h, p.w, p.pool, dtype, gpu.sm_count, gpu.capability, plan)
    kernel, _, reason = text.partition(": ")
    return kernel, reason


def tf32_obstacle() -> str:
    """Why convolutions of float32 may not multiply in TF32, or "": torch's own setting, which ``cudnn.allow_tf32`` writes too."""
    if torch.compiler.is_compiling():
        return "float32 in a compiled graph, which would not notice a change of torch's TF32 setting"
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return "NVIDIA_TF32_OVERRIDE=0 forbids TF32, and float32 has tensor-core kernels in TF32 only"
    cudnn: Any = torch.backends.cudnn
    if cudnn.conv.fp32_precision != "tf32":
        return (
            "float32 has tensor-core kernels in TF32 only, and torch.backends.cudnn.conv.fp32_precision is not 'tf32'"
        )
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def gpu_of(index: int) -> Gpu:
    """The CUDA device of that index."""
    return _look_at(index)


@functools.cache
def _look_at(index: int) -> Gpu:
    if not torch.cuda.is_available():
        return Gpu(0, 0, "torch sees no GPU")
    properties = torch.cuda.get_device_properties(index)
    capability, sms = 10 * properties.major + properties.minor, properties.multi_processor_count
    return Gpu(capability, sms, build_obstacle() or _C.cuda_obstacle(index))


def build_obstacle() -> str:
    """Why this build has no kernel for any GPU, or ""."""
    return (
        ""
        if _C.build_info()["cuda"]
        else "this build has no CUDA kernels: it was built without nvcc, or with VGGFAST_CUDA=0"
    )
