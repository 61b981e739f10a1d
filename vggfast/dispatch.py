"""Which calls fused kernels take: the rules for tensors, modes and transforms, and on each device what its kernels demand."""

from __future__ import annotations

import torch
from torch import Tensor

from vggfast import _C, cuda_plan, switches
from vggfast.cuda_plan import Decision, Gpu, Problem

# What kernels take, and the types of tensors whose own rules do not matter.
DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (torch.Tensor, torch.nn.Parameter)
LINEAR_ROWS = 16  # max_linear_rows in csrc/linear.h
LINEAR_WEIGHTS = 1 << 20  # fewer are served from the caches, where torch's matrix product is as fast


def check_tensor(name: str, value: object) -> None:
    """TypeError where the argument `name` is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """TypeError where one of them is no tensor; a bias may be None."""
    check_tensor("x", x)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)


def check_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """TypeError where one of them is no tensor, ValueError where `weight` is not `[C_out, C_in, 3, 3]`."""
    check_operands(x, weight, bias)
    if weight.dim() != 4 or weight.shape[2] != 3 or weight.shape[3] != 3:
        raise ValueError(f"weight: expected [C_out, C_in, 3, 3], got {list(weight.shape)}")


def why_not_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, pool: bool) -> str:
    """Why no fused kernel takes this call; empty if one does."""
    if reason := _why_not_operands(x, weight, bias, pool):
        return reason
    if x.device.type == "cpu":
        return switches.why_not_cpu()
    return why_not_cuda("forward", _conv_problem(x, weight, pool), x.device)


def why_not_max_pool2x2(x: Tensor) -> str:
    """Why no fused kernel takes this call; empty if one does."""
    if reason := _why_not_pooled(x):
        return reason
    if x.device.type == "cpu":
        return switches.why_not_cpu()
    return why_not_cuda("max_pool", _pool_problem(x), x.device)


def why_not_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why no kernel takes this fully connected layer; empty if one does."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # First: some, as torch.nn.utils' per-sample gradients, refuse to be asked anything.
    if not torch.compiler.is_compiling() and any(type(t) not in PLAIN for t in tensors):
        return "a tensor subclass, whose own rules apply"
    if any(t.device.type != "cpu" or t.layout != torch.strided or t.is_nested for t in tensors):
        return "no kernel for other devices than CPUs, nor for other layouts"
    if reason := switches.why_not_cpu():
        return reason
    if compute_dtype(x) not in DTYPES:
        return f"no kernel for {x.dtype}"
    if any(compute_dtype(t) != compute_dtype(x) for t in tensors):
        return "x, weight and bias differ in dtype"
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[0] == 0:
        return f"x {list(x.shape)} is not a batch of rows for weight {list(weight.shape)}"
    if x.shape[0] > LINEAR_ROWS:
        return f"more than {LINEAR_ROWS} rows: arithmetic, not memory, is the limit"
    if weight.numel() < LINEAR_WEIGHTS:
        return f"fewer than {LINEAR_WEIGHTS} weights lie in the caches, where torch is as fast"
    if weight.stride(1) != 1:
        return "the weights of an output are not adjacent"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}"
    return why_not_transforms()


def decide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gpu: Gpu | None = None) -> Decision:
    """The kernel of ``ops.linear``; on another GPU there is none."""
    if gpu is not None:
        return Decision(False, "aten", "no kernel for other devices than CPUs")
    if reason := why_not_linear(x, weight, bias):
        return Decision(False, "aten", reason)
    return Decision(True, f"cpu {_C.cpu_isa()} linear", "a small batch: each weight is read once")


def decide_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, pool: bool, step: str = "forward", gpu: Gpu | None = None
) -> Decision:
    """The kernel of one step of ``ops.conv3x3``; with `gpu` that of another GPU, with its kernels switched on."""
    if reason := _why_not_operands(x, weight, bias, pool):
        return Decision(False, "aten", reason)
    if gpu is not None or x.device.type == "cuda":
        return _decide_cuda(step, _conv_problem(x, weight, pool), x.device, gpu)
    if reason := switches.why_not_cpu():
        return Decision(False, "aten", reason)
    n, c_in, h, w = x.shape
    dtype = str(compute_dtype(x)).removeprefix("torch.")
    plan, _, why = _C.cpu_plan(step, n, c_in, weight.shape[0], h, w, dtype).partition(": ")
    return Decision(True, f"cpu {_C.cpu_isa()} {plan}", why)


def decide_max_pool2x2(x: Tensor, gpu: Gpu | None = None) -> Decision:
    """The kernel of ``ops.max_pool2x2``; `gpu` as for ``decide_conv3x3``."""
    if reason := _why_not_pooled(x):
        return Decision(False, "aten", reason)
    if gpu is not None or x.device.type == "cuda":
        return _decide_cuda("max_pool", _pool_problem(x), x.device, gpu)
    if reason := switches.why_not_cpu():
        return Decision(False, "aten", reason)
    return Decision(True, f"cpu {_C.cpu_isa()} max_pool2x2", "2-bit argmax")


def _conv_problem(x: Tensor, weight: Tensor, pool: bool) -> Problem:
    n, c, h, w = x.shape
    return Problem(n, c, weight.shape[0], h, w, pool, compute_dtype(x))


def _pool_problem(x: Tensor) -> Problem:
    n, c, h, w = x.shape
    return Problem(n, c, c, h, w, True, x.dtype)


def why_not_cuda(step: str, problem: Problem, device: torch.device) -> str:
    """Why no CUDA kernel takes the step on that device, as things are set now."""
    gpu = cuda_plan.gpu_of(device.index)
    return cuda_plan.why_not(step, problem, gpu, switches.cuda_plan(), cuda_plan.tf32_obstacle())


def switched_on() -> str:
    """The plan that is asked about for another GPU: the one in use, or "sm80" where that is torch's own."""
    plan = switches.cuda_plan()
    return plan if plan != "aten" else "sm80"


def _decide_cuda(step: str, problem: Problem, device: torch.device, gpu: Gpu | None) -> Decision:
    """What `why_not_cuda` answers, as a `Decision`; for another GPU than the device with the kernels on."""
    plan = switches.cuda_plan() if gpu is None else switched_on()
    return cuda_plan.decide(step, problem, gpu or cuda_plan.gpu_of(device.index), plan, cuda_plan.tf32_obstacle())


def _why_not_operands(x: Tensor, weight: Tensor, bias: Tensor | None, pool: bool) -> str:
    reason = _why_not_image(x, pool)
    if reason:
        return reason
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not torch.compiler.is_compiling() and any(type(t) not in PLAIN for t in tensors):
        return "weight or bias is a tensor subclass, whose own rules apply"
    if any(t.device != x.device or t.layout != torch.strided for t in tensors):
        return "weight or bias is on another device or not strided"
    if any(compute_dtype(t) != compute_dtype(x) for t in tensors):
        return "x, weight and bias differ in dtype"
    if x.shape[1] != weight.shape[1] or x.shape[1] == 0 or weight.shape[0] == 0:
        return f"x {list(x.shape)} and weight {list(weight.shape)} do not fit, or have no channels"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}"
    return ""


def _why_not_pooled(x: Tensor) -> str:
    reason = _why_not_image(x, pool=True)
    if not reason and x.dtype not in DTYPES:  # autocast would cast it for a convolution, not for a pool
        return f"no fused kernel for {x.dtype}"
    return reason


def _why_not_image(x: Tensor, pool: bool) -> str:
    if x.device.type not in DEVICES:
        return f"no fused kernel for device {x.device.type}"
    if x.layout != torch.strided or x.is_nested:
        return f"no fused kernel for layout {x.layout}" if not x.is_nested else "no fused kernel for nested tensors"
    if compute_dtype(x) not in DTYPES:
        return f"no fused kernel for {x.dtype}"
    if x.dim() != 4:
        return f"x is {list(x.shape)}, not a batch [N, C, H, W]"
    if x.shape[0] == 0 or x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        return "x is empty"
    if pool and (x.shape[2] < 2 or x.shape[3] < 2):
        return f"x {list(x.shape)} is too small to pool"
    if not torch.compiler.is_compiling() and type(x) not in PLAIN:
        return f"x is a {type(x).__name__}, whose own rules apply"
    return why_not_transforms()


def why_not_transforms() -> str:
    """Why nothing is fused under the torch.func transforms that are active now; empty if something may be."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.compiler.is_compiling():
        # Dynamo sees that there is a transform, not which; without one it sees an object that holds None.
        transform = isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
        return "a torch.func transform is compiled" if transform else ""
    if inside_functorch():
        stack = torch._C._functorch.get_interpreter_stack() or []
        if any(level.key() != torch._C._functorch.TransformType.Grad for level in stack):
            return "a torch.func transform other than grad is active"
    return ""


def inside_functorch() -> bool:
    """Whether a torch.func transform is active; False while torch.compile traces, where `why_not_transforms` looks another way."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype an op computes in: autocast's, where it is on and would cast ``t``."""
    if torch.is_autocast_enabled(t.device.type) and t.dtype.is_floating_point and t.dtype != torch.float64:
        return torch.get_autocast_dtype(t.device.type)
    return t.dtype


def suggests_channels_last(t: Tensor) -> bool:
    """What `Tensor::suggest_memory_format` in c10/core/MemoryFormat.h answers for a 4-D tensor; it has no Python name."""
    sizes, strides = t.shape, t.stride()
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d]
    return True


def contiguous(t: Tensor) -> Tensor:
    """`t` [N, C, H, W] with the strides of a new contiguous tensor.

    `Tensor.contiguous()` would not do: it keeps the strides of dimensions of size 1, which decide what later layers return.
    """
    _, c, h, w = t.shape
    return t if t.stride() == (c * h * w, h * w, w, 1) else t.clone(memory_format=torch.contiguous_format)


def in_channels_last(t: Tensor) -> Tensor:
    """`t` [N, C, H, W] with the strides of a new channels_last tensor, exactly, for the same reason."""
    _, c, h, w = t.shape
    return t if t.stride() == (h * w * c, 1, w * c, c) else t.clone(memory_format=torch.channels_last)


def in_layout(t: Tensor | None, channels_last: bool) -> Tensor | None:
    """`t` [N, C, H, W] in channels_last memory, or as `contiguous` makes it."""
    if t is None:
        return None
    if not channels_last:
        return contiguous(t)
    # Not by memory_format, which vmap does not know; and no view where none is needed, since autograd adds to none in place.
    nhwc = t.permute(0, 2, 3, 1)
    dense = contiguous(nhwc)
    return t if dense is nhwc else dense.permute(0, 3, 1, 2)
