"""Who competes: names, what each can compute, what it needs to be installed, and the code that sets it up."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vggfast.bench import BenchError
from vggfast.bench.cases import BUFFERS, LOSSES, Case

# glibc returns large blocks to the system and page-faults them in again at every use; without these settings torch at batch 8
# loses up to half its speed. In a virtual machine pages of 2 MB are read up to twice as fast as those of 4 KB. The settings go to
# every contender.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass
class Runner:
    """A contender that is set up for a case. ``run(buffer)`` is what is timed; ``outputs(run(buffer))`` is what is checked.

    ``clock`` is "cpu", "cuda" (events) or "wall" (a device without events: ``run`` returns when the device is done).
    """

    run: Callable[[int], Any]
    outputs: Callable[[Any], dict[str, Any]]
    setting: str
    clock: str = "cpu"
    buffers: int = BUFFERS
    of_layer: bool = False
    version: str = ""
    kernel: str = ""  # vggfast's, of a layer
    parameters: list[Any] = field(default_factory=list)  # of a network in torch: not counted as activations


@dataclass(frozen=True)
class Contender:
    """``builder`` is "module:function", called in the worker as ``function(case, files, **options)`` and returning a Runner."""

    name: str
    family: str  # what --against selects
    builder: str
    options: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()  # to be importable
    tasks: tuple[str, ...] = ("inference", "training", "layer", *LOSSES)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    batches: tuple[int, ...] = ()  # empty: any
    slow: str = ""  # what takes it so long to set up that the quick form leaves it out

    def takes(self, case: Case) -> bool:
        task = "layer" if case.layer else case.task
        return (
            (task in self.tasks or case.task in self.tasks)
            and case.dtype in self.dtypes
            and case.device in self.devices
            and (not self.batches or case.batch in self.batches)
        )

    def missing(self) -> str:
        """Which package it lacks here, and how to get it; empty if it can run."""
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"not installed: {', '.join(absent)}; pip install {' '.join(absent)}" if absent else ""


_TORCH, _RUNTIMES, _JAX = "vggfast.bench.torch_runners", "vggfast.bench.runtimes", "vggfast.bench.jax_runner"

VGGFAST = Contender("vggfast", "vggfast", f"{_TORCH}:build", {"engine": "vggfast"})
CONTENDERS = [
    VGGFAST,
    Contender("torch channels_last", "torch", f"{_TORCH}:build", {"layout": "channels_last"}),
    Contender("torch NCHW", "torch", f"{_TORCH}:build", {"layout": "contiguous_format"}, dtypes=("fp32",)),
    Contender(
        "torch.compile", "compile", f"{_TORCH}:build", {"engine": "compile"}, tasks=("inference", "training", *LOSSES)
    ),
    Contender(
        "torch.compile max-autotune",
        "autotune",
        f"{_TORCH}:build",
        {"engine": "compile", "mode": "max-autotune"},
        tasks=("inference", "training", "layer"),
        devices=("cuda",),
        slow="it tries many kernels",
    ),
    Contender(
        "torch CUDA graph",
        "cudagraph",
        f"{_TORCH}:build",
        {"layout": "channels_last", "graph": True},
        tasks=("inference", "training"),
        devices=("cuda",),
    ),
    Contender(
        "vggfast CUDA graph",
        "vggfast",
        f"{_TORCH}:build",
        {"engine": "vggfast", "graph": True},
        tasks=("inference", "training"),
        devices=("cuda",),
    ),
    Contender(
        "vggfast sm90patch",  # not the kernels' usual choice until a GPU has proven them
        "patch",
        f"{_TORCH}:build",
        {"engine": "vggfast", "plan": "sm90patch"},
        tasks=("forward", "grad_input"),
        dtypes=("bf16",),
        devices=("cuda",),
    ),
    Contender(
        "cudnn_convolution_relu", "cudnn", f"{_TORCH}:build", {"engine": "cudnn"}, tasks=("forward",), devices=("cuda",)
    ),
    Contender(
        "lpips package", "lpips", "vggfast.bench.perceptual:build_package", packages=("lpips",), tasks=("lpips",)
    ),
    Contender(
        "jax", "jax", f"{_JAX}:build", packages=("jax",), tasks=("inference", "training", "layer"), devices=("cuda",)
    ),
    Contender(
        "onnxruntime",
        "onnxruntime",
        f"{_RUNTIMES}:build_onnxruntime",
        packages=("onnxruntime", "onnx", "onnxscript"),
        tasks=("inference",),
        dtypes=("fp32",),  # its CPU kernels for convolutions have no bfloat16
        devices=("cpu",),
    ),
    Contender(
        "openvino",
        "openvino",
        f"{_RUNTIMES}:build_openvino",
        packages=("openvino", "onnx", "onnxscript"),
        tasks=("inference",),
        devices=("cpu",),
    ),
    Contender(
        "ncnn",
        "ncnn",
        f"{_RUNTIMES}:build_ncnn",
        packages=("ncnn", "pnnx"),
        tasks=("inference",),
        dtypes=("fp32",),
        devices=("cpu",),
        batches=(1,),  # it takes one image at a time
        slow="the conversion takes half a minute",
    ),
    *[
        Contender(
            f"ncnn {storage}",
            "ncnn",
            f"{_RUNTIMES}:build_ncnn",
            {"storage": storage},
            packages=("ncnn", "pnnx"),
            tasks=("inference",),
            dtypes=("bf16",),
            devices=("cpu",),
            batches=(1,),
            slow="the conversion takes half a minute",
        )
        for storage in ("half", "bf16")
    ],
]


def find(name: str) -> Contender:
    for contender in CONTENDERS:
        if contender.name == name:
            return contender
    raise BenchError(f"contender: expected one of {', '.join(c.name for c in CONTENDERS)}, got {name}")


def families() -> list[str]:
    """What --against takes."""
    return list(dict.fromkeys(contender.family for contender in CONTENDERS if contender is not VGGFAST))


def rivals(case: Case, against: list[str] | None = None) -> list[Contender]:
    """Everybody but vggfast that computes ``case``, whether installed or not; ``against`` selects families.

    Raises BenchError for a family that does not exist, and where none of those selected computes the case.
    """
    suited = dict.fromkeys(c.family for c in CONTENDERS if c.family != "vggfast" and c.takes(case))
    unknown = set(against or []) - set(families())
    if unknown or (against and not set(against) & set(suited)):
        raise BenchError(
            f"against: expected some of {', '.join(suited)} for {case.id} on {case.device}, "
            f"got {', '.join(sorted(unknown or against or [])) or 'nothing'}"
        )
    return [
        contender
        for contender in CONTENDERS
        if contender is not VGGFAST
        and contender.takes(case)
        and (against is None or contender.family in against or contender.family == "vggfast")
    ]
