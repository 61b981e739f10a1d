"""Which children of a `FusedSequential` are a run that one op computes, and why the others are not: asked anew at every call."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from vggfast import dispatch, switches
from vggfast.dispatch import DEVICES, DTYPES, PLAIN

_ZERO, _ONE, _TWO = (((n, n), n) for n in range(3))  # how modules write a setting of two dimensions
STAGES = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
# What a patched class would replace; a patch (padding that wraps around, say) must be seen, so it ends fusion.
_METHODS = tuple((c, name, getattr(c, name)) for c in (*STAGES, nn.Linear) for name in ("forward", "__call__"))
_METHODS += ((nn.Conv2d, "_conv_forward", nn.Conv2d._conv_forward),)
_FUNCTIONS: tuple[tuple[Any, str, Any], ...] = tuple(
    (F, name, getattr(F, name)) for name in ("conv2d", "batch_norm", "relu", "max_pool2d", "linear")
)
_FUNCTIONS += ((nn.Module, "_call_impl", nn.Module._call_impl),)


class Run(NamedTuple):
    """One call of `ops.conv3x3`, `ops.max_pool2x2` or `ops.linear` that stands for `length` children."""

    op: str
    length: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    bn: nn.BatchNorm2d | None = None
    relu: nn.ReLU | None = None
    pool: nn.MaxPool2d | None = None


def operands(run: Run) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that the convolution of `run` is called with."""
    assert run.weight is not None
    return (run.weight, run.bias) if run.bn is None else _fold(run.bn, run.weight, run.bias)


def _fold(bn: nn.BatchNorm2d, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does `bn` after a convolution with `weight` [C_out, C_in, 3, 3], `bias`.

    Computed in float32 and rounded once. Differentiable in weight, bias, gamma and beta.
    """
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None  # see _fold_obstacle
    assert var is not None
    scale = torch.rsqrt(var.float() + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.float()
    shift = -mean.float() if bias is None else bias.float() - mean.float()
    shift = shift * scale
    if bn.bias is not None:
        shift = shift + bn.bias.float()
    return (weight.float() * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def find_run(children: tuple[nn.Module, ...], start: int, x: Any, own: bool = False) -> tuple[Run | None, str]:
    """The longest run that starts at `start` and takes x, or None; and why the next child is not part of it.

    `own`: nobody else has x, or sees that an in-place ReLU did not overwrite it.
    """
    first = children[start]
    if type(first) is nn.MaxPool2d:
        reason = _single_pool_obstacle(first, x)
        return (None if reason else Run("max_pool2x2", 1, pool=first)), reason
    if type(first) is nn.Linear:
        return _find_linear_run(first, children[start + 1 : start + 2], x)
    if type(first) is nn.ReLU:
        return _find_relu_run(first, children[start + 1 : start + 2], x, own)
    if type(first) is not nn.Conv2d:
        return None, child_obstacle(first)
    weight, bias = first.weight, first.bias
    reason = child_obstacle(first) or geometry_obstacle(first, weight) or _input_obstacle(x)
    reason = reason or _operand_obstacle(weight, bias, x)
    if reason:
        return None, reason
    bn = relu = pool = None
    after = iter(children[start + 1 : start + 4])
    child = next(after, None)
    if type(child) is nn.BatchNorm2d and not (reason := child_obstacle(child) or _fold_obstacle(child, weight)):
        bn, child = child, next(after, None)
    if type(child) is nn.ReLU and not (reason := child_obstacle(child)):
        relu, child = child, next(after, None)
    if type(child) is nn.MaxPool2d and not (reason := child_obstacle(child) or _pool_obstacle(child, x)):
        pool = child
    length = 1 + (bn is not None) + (relu is not None) + (pool is not None)
    return Run("conv3x3", length, weight, bias, bn, relu, pool), reason


def _find_linear_run(first: nn.Linear, after: tuple[nn.Module, ...], x: Any) -> tuple[Run | None, str]:
    reason = child_obstacle(first) or ("" if type(x) in PLAIN else "input is not a plain tensor")
    reason = reason or dispatch.why_not_linear(x, first.weight, first.bias)
    if reason:
        return None, reason
    relu = None
    if after and type(after[0]) is nn.ReLU and not (reason := child_obstacle(after[0])):
        relu = after[0]
    return Run("linear", 1 + (relu is not None), first.weight, first.bias, relu=relu), reason


def _find_relu_run(relu: nn.ReLU, after: tuple[nn.Module, ...], x: Any, own: bool) -> tuple[Run | None, str]:
    """ReLU and a pool, as behind a BatchNorm in training: the largest of a window is known before ReLU, which then has a quarter of
    the values to do, and autograd as many to keep. One channel is left out: its strides fit two memory formats."""
    if reason := child_obstacle(relu):
        return None, reason
    pool = after[0] if after else None
    if type(pool) is not nn.MaxPool2d or (relu.inplace and not own):
        return None, ""
    if _single_pool_obstacle(pool, x) or x.shape[1] == 1:
        return None, ""
    return Run("max_pool2x2", 2, relu=relu, pool=pool), ""


def context_obstacle() -> str:
    """Why nothing may be fused at present, or ""."""
    # Dynamo answers True to torch.compiler.is_exporting() on torch < 2.13 also where it compiles; not so to its flag.
    if torch._C._get_tracing_state() is not None or torch.compiler._is_exporting_flag:
        return "traced or exported: the graph keeps torch's own operators"
    if hooked_globally():
        return "global module hooks are registered"
    if any(getattr(owner, name) is not method for owner, name, method in _METHODS):
        return "a torch.nn class was patched"
    if any(getattr(owner, name) is not function for owner, name, function in _FUNCTIONS):
        return "a function of torch.nn was patched"
    return _watched() or dispatch.why_not_transforms()


def subclass_obstacle(x: Any) -> str:
    """Why nothing may be fused for an input x of a container, or "".

    Within a function of a tensor subclass, as its `backward`, layers return plain tensors where they otherwise return the subclass.
    What is computed again there, for a checkpoint, must save what the first time saved, when all layers got the subclass.
    """
    if not isinstance(x, Tensor) or type(x) in PLAIN or torch._C._is_torch_function_enabled():
        return ""
    return "input is not a plain tensor"


def _watched() -> str:
    """Why torch's own operators must run, for somebody who looks at each or puts another in its place, or ""."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active: it sees torch's own operators"
    if torch._C._len_torch_function_stack():
        modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if any(type(mode) is not DeviceContext for mode in modes):  # which torch.set_default_device leaves on
            return "a TorchFunctionMode is active: it sees torch's own functions"
    return ""


def hooked_globally() -> bool:
    """Whether hooks of all modules are registered, as by `torch.nn.modules.module.register_module_forward_hook`."""
    return bool(nn_module._has_any_global_hook())  # type: ignore[no-untyped-call]


def child_obstacle(module: nn.Module) -> str:
    """Why `module` must be called as the module it is, or ""."""
    if module is None:
        return "is None"  # which torch calls, too, and so raises its TypeError
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if _replaced(module, "forward") or (isinstance(module, nn.Conv2d) and _replaced(module, "_conv_forward")):
        return "its forward was replaced"
    return ""


def _replaced(module: nn.Module, method: str) -> bool:
    """Whether `module` has a `method` of its own in place of its class's."""
    # Read first: a compiled graph is made anew where an attribute that was read is another, not where `__dict__` is.
    return getattr(module, method) is None or method in module.__dict__


def geometry_obstacle(conv: nn.Conv2d, weight: Tensor) -> str:
    """Why `conv` with `weight` is not a convolution that `ops.conv3x3` computes, or ""."""
    shape = weight.shape
    if len(shape) != 4 or shape[2] != 3 or shape[3] != 3:
        return "kernel is not 3x3"
    if conv.stride not in _ONE:
        return "stride is not 1"
    if (conv.padding not in _ONE and conv.padding != "same") or conv.padding_mode != "zeros":
        return "padding is not 1 zero on every side"
    if conv.dilation not in _ONE or conv.groups != 1:
        return "is dilated or grouped"
    return ""


def _input_obstacle(x: Any) -> str:
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested:
        return "input is not a plain tensor"
    if x.dim() != 4 or x.numel() == 0:
        return "input is not a non-empty [N, C, H, W]"
    if x.dtype not in DTYPES:
        return "input is not float32, bfloat16 or float16"
    if x.device.type not in DEVICES:
        return "input is not on a CPU or CUDA device"
    return switches.why_not_cpu() if x.device.type == "cpu" else ""


def _operand_obstacle(weight: Tensor, bias: Tensor | None, x: Tensor) -> str:
    """Why a 3x3 weight and a bias cannot be used on x, which `_input_obstacle` has passed, or ""."""
    if type(weight) not in PLAIN or weight.layout is not torch.strided:
        return "weight is not a plain tensor"
    shape, dtype, device = weight.shape, weight.dtype, x.device
    if shape[1] != x.shape[1] or shape[0] == 0 or weight.device != device:
        return "weight does not fit the input"
    if dtype is not x.dtype and not (dtype in DTYPES and torch.is_autocast_enabled(device.type)):
        return "weight and input have different dtypes"
    if bias is None:
        return ""
    if type(bias) not in PLAIN or bias.shape != shape[:1] or bias.dtype is not dtype or bias.device != device:
        return "bias does not fit the weight"
    return ""


def _fold_obstacle(bn: nn.BatchNorm2d, weight: Tensor) -> str:
    if bn.training or bn.running_mean is None or bn.running_var is None:
        return "BatchNorm uses the batch's statistics"
    if bn.running_mean.requires_grad or bn.running_var.requires_grad:
        return "BatchNorm's statistics require gradients"
    for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
        if t is None:
            continue
        if type(t) not in PLAIN or t.shape != weight.shape[:1] or t.device != weight.device:
            return "BatchNorm does not fit the weight"
        if t.dtype not in (weight.dtype, torch.float32):
            return "BatchNorm has another dtype"
    return ""


def _single_pool_obstacle(pool: nn.MaxPool2d, x: Any) -> str:
    """Why `ops.max_pool2x2` cannot stand for `pool` on x, or ""."""
    return child_obstacle(pool) or _input_obstacle(x) or _pool_obstacle(pool, x)


def _pool_obstacle(pool: nn.MaxPool2d, x: Tensor) -> str:
    """Why `pool` on a tensor of the height and width of x is not 2x2 pooling that drops odd rows and columns, or ""."""
    if pool.kernel_size not in _TWO or pool.stride not in _TWO:
        return "pooling is not 2x2 with stride 2"
    if pool.padding not in _ZERO or pool.dilation not in _ONE or pool.return_indices:
        return "pooling is padded or dilated, or returns indices"
    _, _, h, w = x.shape
    if h < 2 or w < 2:
        return "height or width is less than 2"
    if pool.ceil_mode and (h % 2 or w % 2):
        return "ceil_mode with an odd height or width"
    return ""
