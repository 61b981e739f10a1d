"""The CUDA ops themselves: csrc/cuda/conv3x3.cpp over torch's CPU tensors, its kernels on the emulator.

What a GPU's tests ask of the host side, without one: layouts, alignment, empty batches, refusals, devices, streams. Operands are
small integers, whose sums no type rounds: results are torch's own to the bit.
"""

from __future__ import annotations

import ctypes
import itertools
import pathlib
import subprocess
from collections.abc import Iterator

import pytest
import torch
from cuda_emulator_harness import CSRC, HERE, RUNTIME_FLAGS, Case, Emulator, compile_object
from cuda_reference import make_inputs
from reference import BIAS_LAYOUTS, LAYOUTS, float64_results, integers
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

import vggfast

OPS = ("conv3x3", "conv3x3_grad_input", "conv3x3_grad_weight", "max_pool2x2", "max_pool2x2_grad")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TORCH_FLAGS = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
N, C, K, H, W = 2, 16, 24, 5, 6
H100, TINY_GPU = (132, 90), (2, 90)
CONV_OPS = torch.ops.vggfast_emulated


@pytest.fixture(scope="module")
def library(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """torch.ops.vggfast_emulated, with vggfast's own schemas."""
    folder = tmp_path_factory.mktemp("ops")
    includes = tuple(f"-isystem{path}" for path in include_paths())
    compile_object(HERE / "ops_on_host.cpp", folder / "ops.o", CSRC, (*RUNTIME_FLAGS, *TORCH_FLAGS, *includes))
    kernels = pathlib.Path(emulator.library._name)
    command = ["g++", "-shared", "-o", str(folder / "ops.so"), str(folder / "ops.o"), str(kernels), "-Wl,-Bsymbolic"]
    command += [*(f"-L{path}" for path in library_paths()), "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"]
    subprocess.run(command, check=True)
    schemas = torch.library.Library("vggfast_emulated", "DEF")
    for op in OPS:
        schemas.define(str(getattr(torch.ops.vggfast, op).default._schema).removeprefix("vggfast::"))
    library = ctypes.CDLL(str(folder / "ops.so"))
    library.emu_use_host_memory(1)
    yield library
    library.emu_use_host_memory(0)
    emulator.library.emu_set_device(0)
    schemas._destroy()


@pytest.fixture(autouse=True)
def start(emulator: Emulator, library: ctypes.CDLL) -> Iterator[None]:
    """The kernels of sm_80, and another device current than the tensors', whose index on a CPU is -1."""
    emulator.reset(1)
    emulator.library.emu_set_gpu(*TINY_GPU)
    emulator.library.emu_set_device(0)
    library.emu_set_kernels(b"sm80")
    torch.use_deterministic_algorithms(True)  # new memory is NaN: what nobody writes shows
    yield
    torch.use_deterministic_algorithms(False)


def operands(dtype: torch.dtype = torch.bfloat16, c: int = C, *, pool: bool = True) -> dict[str, Tensor]:
    grad = (N, K, H // 2, W // 2) if pool else (N, K, H, W)
    shapes = {"x": (N, c, H, W), "weight": (K, c, 3, 3), "bias": (K,), "grad": grad}
    return {name: integers(*shape, seed=i).clamp(-1, 1).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def check(tensors: dict[str, Tensor], *, relu: bool = True, pool: bool = True) -> None:
    """Forward and, where the first layer does not leave them to torch, all gradients."""
    x, weight, bias, grad = (tensors[name] for name in ("x", "weight", "bias", "grad"))
    expected = float64_results([x, weight, bias], grad, relu, pool)
    y, argmax = CONV_OPS.conv3x3(x, weight, bias, relu, pool, True)
    ours = [y]
    if x.shape[1] > 3:
        saved = y if relu else None, argmax if pool else None
        ours.append(CONV_OPS.conv3x3_grad_input(grad, weight, *saved, H, W))
        ours += CONV_OPS.conv3x3_grad_weight(x, grad, *saved)
    for name, a, b in zip(("y", "grad x", "grad weight", "grad bias"), ours, expected, strict=False):
        assert torch.equal(a.double(), b), name
        assert a.dtype == x.dtype
        if a.dim() == 4:  # parameters lie as torch makes them
            layout = torch.contiguous_format if name == "grad weight" else torch.channels_last
            assert a.is_contiguous(memory_format=layout), name
    assert argmax.numel() == (N * (H // 2) * (W // 2) * K // 4 if pool else 0)


@pytest.mark.parametrize(("relu", "pool"), list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", ["sm80", "sm90", "sm90patch"])
def test_every_set_of_kernels(library: ctypes.CDLL, kernels: str, dtype: torch.dtype, relu: bool, pool: bool) -> None:
    library.emu_set_kernels(kernels.encode())
    check(operands(dtype, pool=pool), relu=relu, pool=pool)
    assert library.emu_torch_device() == 0  # torch's current device is what it was


@pytest.mark.parametrize(("kernels", "boxes"), [("sm80", 0), ("sm90", 9 + 9), ("sm90patch", 1 + 9)])
def test_the_set_that_is_named_runs(emulator: Emulator, library: ctypes.CDLL, kernels: str, boxes: int) -> None:
    """Pixels and filters that the copy engine brings for one tile: a box a tap, or one patch."""
    library.emu_set_kernels(kernels.encode())
    x, weight, bias, _ = operands().values()
    CONV_OPS.conv3x3(x, weight, bias, True, True, True)
    assert emulator.statistics().tma_boxes == boxes


def test_splits(emulator: Emulator, library: ctypes.CDLL) -> None:
    """As on a GPU that has SMs to spare: partial sums in the workspace, before what else lies there."""
    emulator.library.emu_set_gpu(*H100)
    for kernels in (b"sm80", b"sm90", b"sm90patch"):
        library.emu_set_kernels(kernels)
        check(operands())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "operand"), [(3, "x"), (C, "x"), (C, "weight"), (C, "grad")])
def test_every_layout_of_every_operand(c: int, operand: str, layout: str) -> None:
    tensors = operands(c=c)
    tensors[operand] = LAYOUTS[layout](tensors[operand])
    check(tensors)


@pytest.mark.parametrize("layout", BIAS_LAYOUTS)
def test_every_layout_of_the_bias(layout: str) -> None:
    tensors = operands()
    tensors["bias"] = BIAS_LAYOUTS[layout](tensors["bias"])
    check(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_come_back_in_any_layout(layout: str) -> None:
    """As from a hook that kept them elsewhere; the argmax, whose bytes are read two at a time, at an odd address."""
    x, weight, bias, grad = operands().values()
    y, argmax = CONV_OPS.conv3x3(x, weight, bias, True, True, True)
    y = LAYOUTS[layout](y)
    again = torch.cat([argmax.new_zeros(1), argmax.flatten()])[1:].view(argmax.shape)
    dense = y.contiguous(memory_format=torch.channels_last)
    for op, arguments in ((CONV_OPS.conv3x3_grad_input, (grad, weight)), (CONV_OPS.conv3x3_grad_weight, (x, grad))):
        sizes = (H, W) if arguments[1] is weight else ()
        ours, expected = op(*arguments, y, again, *sizes), op(*arguments, dense, argmax, *sizes)
        for a, b in zip(ours, expected, strict=True):  # images of one result, or two results
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pool_alone(layout: str) -> None:
    x = LAYOUTS[layout](operands()["x"])
    y, argmax = CONV_OPS.max_pool2x2(x, True)
    expected, expected_argmax = torch.ops.vggfast.max_pool2x2(x, True)
    assert torch.equal(y, expected)
    assert torch.equal(argmax, expected_argmax)
    grad = LAYOUTS[layout](y.flip(0))
    odd = torch.cat([argmax.new_zeros(1), argmax.flatten()])[1:].view(argmax.shape)
    assert torch.equal(
        CONV_OPS.max_pool2x2_grad(grad, odd, H, W), torch.ops.vggfast.max_pool2x2_grad(grad, argmax, H, W)
    )


def test_an_empty_batch_launches_nothing(emulator: Emulator) -> None:
    x, weight, bias, grad = operands().values()
    x, grad = x[:0], grad[:0]
    y, argmax = CONV_OPS.conv3x3(x, weight, bias, True, True, True)
    assert (y.shape, argmax.shape) == (grad.shape, (0, H // 2, W // 2, K // 4))
    assert CONV_OPS.conv3x3_grad_input(grad, weight, y, argmax, H, W).shape == x.shape
    for g in CONV_OPS.conv3x3_grad_weight(x, grad, y, argmax):
        assert not bool(g.any())
    y, argmax = CONV_OPS.max_pool2x2(x, True)
    assert CONV_OPS.max_pool2x2_grad(y, argmax, H, W).shape == x.shape
    assert emulator.statistics().accesses == 0


def test_what_no_kernel_takes_is_a_message(emulator: Emulator) -> None:
    x, weight, bias, _ = operands().values()
    with pytest.raises(RuntimeError, match="output channels are not a multiple of 16 bytes"):
        CONV_OPS.conv3x3(x, weight[:12], bias[:12], True, True, True)
    emulator.library.emu_set_gpu(40, 75)
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0"):
        CONV_OPS.conv3x3(x, weight, bias, True, True, True)
    assert vggfast.ops.conv3x3(x, weight, bias).shape == (N, K, H, W)


def test_a_failure_is_told_once(emulator: Emulator) -> None:
    """CUDA remembers the last error until it is asked for it: what comes next has not failed."""
    x, weight, bias, _ = operands().values()
    emulator.library.emu_set_gpu(0, 90)
    with pytest.raises(RuntimeError, match=r"\(device properties\)"):
        CONV_OPS.conv3x3(x, weight, bias, True, True, True)
    emulator.library.emu_set_gpu(*TINY_GPU)
    check(operands())


def test_large_shared_memory_is_asked_for_on_every_device(emulator: Emulator) -> None:
    case = Case(1, 4, 4, 8, 8)
    for device in (1, 2, 1):
        emulator.library.emu_set_device(device)
        emulator.forward(case, *make_inputs(case), tile="m128n128")
