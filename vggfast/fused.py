"""Runs of Conv3x3 -> BatchNorm -> ReLU -> MaxPool2x2, and of Linear -> ReLU, inside an `nn.Sequential`, each executed as one op.

The modules stay what they are: plain `nn.Conv2d`, `nn.ReLU`, `nn.Linear` and so on at their indices, with their parameters
and their state_dict keys. Only `forward` differs, and it decides anew at every call, from the modules
as they are then: nothing is cached, so nothing goes stale when weights, hooks, flags or children change.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vggfast import dispatch, ops

__all__ = ["FusedSequential", "convert"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")
_PLAIN = (Tensor, nn.Parameter)
_ZERO, _ONE, _TWO = (((n, n), n) for n in range(3))  # how modules write a setting of two dimensions
_STAGES = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
# What a patched class would replace; a patch (padding that wraps around, say) must be seen, so it ends fusion.
_METHODS = tuple((c, name, getattr(c, name)) for c in (*_STAGES, nn.Linear) for name in ("forward", "__call__"))
_METHODS += ((nn.Conv2d, "_conv_forward", nn.Conv2d._conv_forward),)


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs Conv3x3 [-> BatchNorm2d] [-> ReLU] [-> MaxPool2d 2x2], and Linear [-> ReLU], as one op per run.

    Takes and returns what `nn.Sequential` with the same children does: values within rounding, the same dtype, device
    and memory format, the same gradients, the same errors. A run may contain, in this order, exact torch classes only:

    - `nn.Conv2d`: kernel 3x3, stride 1, padding 1, dilation 1, groups 1, zero padding, with or without bias;
    - `nn.BatchNorm2d` in eval mode with running statistics: folded into weight and bias, in float32, at every call;
    - `nn.ReLU`, in place or not;
    - `nn.MaxPool2d`: kernel 2x2, stride 2, no padding; with `ceil_mode` only where height and width are even.

    Input is [N, C, H, W] in float32, bfloat16 or float16 on a CPU or CUDA device. A run of `nn.Linear` and `nn.ReLU` is one
    op for a small batch on a CPU; `ops.linear` says when. Everything else runs module by module
    as torch does, as does all that would otherwise see a difference: children with hooks, parametrisations or an own
    `forward`, global module hooks, tensor subclasses, dispatch modes, `torch.fx`, `torch.jit`, `torch.export`, ONNX.
    `vggfast.explain(model, x)` says for every layer which it was, and why.

    In-place ReLU: plain torch overwrites what a hook on the layer before may have kept. Here a ReLU never overwrites a
    tensor that a hook of another child has seen; it then writes a new one. Whatever torch overwrites beyond that is
    still overwritten: the caller's input where the first child is an in-place ReLU, and what a pre-hook of the in-place
    ReLU itself has seen. A child that may overwrite what a run with a ReLU saved for its gradient gets a copy.
    """

    def forward(self, input):  # type: ignore[no-untyped-def]
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            for module in self:
                input = module(input)
            return input
        return _forward(self, input)

    def __add__(self, other: nn.Sequential) -> "FusedSequential":
        return FusedSequential(*super().__add__(other))

    def __mul__(self, other: int) -> "FusedSequential":
        return FusedSequential(*super().__mul__(other))


Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model) -> Model:
    """Make every `nn.Sequential` in `model` that holds a fusible layer a `FusedSequential`; returns `model`.

    In place, and by changing the class of the `nn.Sequential` object itself, so that everything which refers to it
    (other parents, Python lists, hooks, optimizers, its own attributes) keeps doing so. No parameter is touched;
    converting twice does nothing more. A model that is an `nn.Sequential` becomes a `FusedSequential` itself.
    Subclasses of `nn.Sequential`, and one whose `forward` was replaced, are left alone: they may rely on their own code.

    Raises TypeError where `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the model, not its weights"
        )
    for module in model.modules():
        plain = type(module) is nn.Sequential and "forward" not in module.__dict__
        if plain and any(map(_fusible, module.children())):
            module.__class__ = FusedSequential
    return model


def _fusible(module: nn.Module) -> bool:
    """Whether `module` is a convolution or a fully connected layer that can begin a run."""
    if type(module) is nn.Linear:
        return module.in_features * module.out_features >= dispatch.LINEAR_WEIGHTS
    return type(module) is nn.Conv2d and not geometry_obstacle(module, module.weight)


class Run(NamedTuple):
    """One call of `ops.conv3x3`, `ops.max_pool2x2` or `ops.linear` that stands for `length` children."""

    op: str
    length: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    bn: nn.BatchNorm2d | None = None
    relu: nn.ReLU | None = None
    pool: nn.MaxPool2d | None = None


class Executed(NamedTuple):
    """What an observer is told after each step of a `FusedSequential`."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    run: Run | None  # None where the module was called
    x: Any
    y: Any
    reason: str  # why the step is not part of a longer run; "" where nothing could be fused with it


observer: ContextVar[Callable[[Executed], None] | None] = ContextVar("observer", default=None)


class State(NamedTuple):
    """Between two children: their input, and what the next of them must know about it."""

    x: Any
    # None: x has the strides plain torch would give it. Else x is channels_last, and `layout` says if torch's would be.
    layout: bool | None = None
    keep: bool = False  # whether somebody holds on to x (a hook, autograd), so that no in-place module may overwrite it

    def as_in_torch(self) -> Any:
        """x with the strides that plain torch would have given it."""
        return _restore(self.x, self.layout)


def _forward(self: FusedSequential, x: Any) -> Any:
    return run_children(tuple(self._modules), tuple(self._modules.values()), State(x)).as_in_torch()


def run_children(names: tuple[str, ...], children: tuple[nn.Module, ...], state: State) -> State:
    """Run `children` of a `FusedSequential`, called `names` there, one after the other, fused where they can be."""
    observe = None if torch.compiler.is_compiling() else observer.get()
    everywhere = _context_obstacle()
    x, layout, keep = state
    start = 0
    while start < len(children):
        run, reason = (None, everywhere) if everywhere else _find_run(children, start, x)
        before = x if observe is not None else None
        if run is not None:
            end, layout = start + run.length, None if run.op == "linear" else _layout_after(run, x, layout)
            x = _execute(run, x)
            keep = run.relu is not None and x.requires_grad  # autograd has saved the output as the ReLU's mask
        else:
            end = start + 1
            x, layout, keep = _run_module(children[start], x, layout, keep)
        if observe is not None:
            observe(Executed(names[start:end], children[start:end], run, before, x, reason))
        start = end
    return State(x, layout, keep)


def _run_module(module: nn.Module, x: Any, layout: bool | None, keep: bool) -> tuple[Any, bool | None, bool]:
    """Call one child; takes and returns x, `layout` and `keep` as a `State` has them."""
    hooked = _hooked_globally() or any(child_obstacle(m) for m in module.modules())
    in_place = type(module) is nn.ReLU and module.inplace and isinstance(x, Tensor)
    keeps_layout = type(module) in (nn.ReLU, nn.BatchNorm2d) and not hooked
    if not keeps_layout:
        restored = _restore(x, layout)
        x, layout, keep = restored, None, keep and restored is x
    elif layout is not None and not in_place and (x.shape[1] == 1 or x.shape[2] == x.shape[3] == 1):
        layout = False  # where the strides fit both formats, torch's new tensors are contiguous
    if keep and isinstance(x, Tensor) and _may_write(module):
        x, keep = x.clone(), False
    makes_new = type(module) in _STAGES
    return module(x), layout, hooked or (keep and not makes_new)


def _may_write(module: nn.Module) -> bool:
    """Whether `module` might overwrite its input: it says `inplace`, or is nobody's that we know."""
    if type(module).forward in (nn.Sequential.forward, FusedSequential.forward):
        for child in module.children():
            if _may_write(child):
                return True
            if type(child) in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear):
                return False  # what comes later gets a tensor of its own
        return False
    return bool(getattr(module, "inplace", False)) or not type(module).__module__.startswith("torch.nn.")


def _restore(x: Any, layout: bool | None) -> Any:
    """x with the strides that plain torch would have given it.

    `contiguous()` would not do: it keeps the strides of dimensions of size 1, which decide what later layers return.
    """
    if layout is None:
        return x
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c) if layout else (c * h * w, h * w, w, 1)
    if x.stride() == strides:
        return x
    return x.clone(memory_format=torch.channels_last if layout else torch.contiguous_format)


def _layout_after(run: Run, x: Tensor, layout: bool | None) -> bool:
    """Whether plain torch's output of `run` is channels_last.

    ATen's convolutions return channels_last where input or weight suggest it, its pooling where the input does.
    """
    n, c, h, w = x.shape
    suggested = _suggests_channels_last(x) if layout is None else layout
    if c == h == w == 1 and (layout is not None or n > 1):
        suggested = False  # ATen asks once more after making x dense, and the dense strides are those of both formats
    if run.weight is None:
        return suggested
    result = suggested or _suggests_channels_last(run.weight)
    if run.bn is not None or (run.relu is not None and not run.relu.inplace):
        result = result and not (run.weight.shape[0] == 1 or h == w == 1)  # as in _run_module
    return result


def _suggests_channels_last(t: Tensor) -> bool:
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


def _execute(run: Run, x: Tensor) -> Tensor:
    if run.op == "max_pool2x2":
        return ops.max_pool2x2(x)
    weight, bias = operands(run)
    if run.op == "linear":
        return ops.linear(x, weight, bias, relu=run.relu is not None)
    return ops.conv3x3(x, weight, bias, relu=run.relu is not None, pool=run.pool is not None)


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


def _find_run(children: tuple[nn.Module, ...], start: int, x: Any) -> tuple[Run | None, str]:
    """The longest run that starts at `start` and takes x, or None; and why the next child is not part of it."""
    first = children[start]
    if type(first) is nn.MaxPool2d:
        reason = child_obstacle(first) or _input_obstacle(x) or _pool_obstacle(first, x)
        return (None if reason else Run("max_pool2x2", 1, pool=first)), reason
    if type(first) is nn.Linear:
        return _find_linear_run(first, children[start + 1 : start + 2], x)
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
    reason = child_obstacle(first) or ("" if type(x) in _PLAIN else "input is not a plain tensor")
    reason = reason or dispatch.why_not_linear(x, first.weight, first.bias)
    if reason:
        return None, reason
    relu = None
    if after and type(after[0]) is nn.ReLU and not (reason := child_obstacle(after[0])):
        relu = after[0]
    return Run("linear", 1 + (relu is not None), first.weight, first.bias, relu=relu), reason


def _context_obstacle() -> str:
    """Why nothing may be fused at present, or ""."""
    # Dynamo answers True to torch.compiler.is_exporting() on torch < 2.13 also where it compiles; not so to its flag.
    if torch._C._get_tracing_state() is not None or torch.compiler._is_exporting_flag:
        return "traced or exported: the graph keeps torch's own operators"
    if _hooked_globally():
        return "global module hooks are registered"
    if any(getattr(owner, name) is not method for owner, name, method in _METHODS):
        return "a torch.nn class was patched"
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active: it sees torch's own operators"
    return dispatch.why_not_transforms()


def _hooked_globally() -> bool:
    return bool(nn_module._has_any_global_hook())  # type: ignore[no-untyped-call]


def child_obstacle(module: nn.Module) -> str:
    """Why `module` must be called as the module it is, or ""."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "its forward was replaced"
    return ""


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
    if type(x) not in _PLAIN or x.layout is not torch.strided or x.is_nested:
        return "input is not a plain tensor"
    if x.dim() != 4 or x.numel() == 0:
        return "input is not a non-empty [N, C, H, W]"
    if x.dtype not in _DTYPES:
        return "input is not float32, bfloat16 or float16"
    if x.device.type not in _DEVICES:
        return "input is not on a CPU or CUDA device"
    return ""


def _operand_obstacle(weight: Tensor, bias: Tensor | None, x: Tensor) -> str:
    """Why a 3x3 weight and a bias cannot be used on x, which `_input_obstacle` has passed, or ""."""
    if type(weight) not in _PLAIN or weight.layout is not torch.strided:
        return "weight is not a plain tensor"
    shape, dtype, device = weight.shape, weight.dtype, x.device
    if shape[1] != x.shape[1] or shape[0] == 0 or weight.device != device:
        return "weight does not fit the input"
    if dtype is not x.dtype and not (dtype in _DTYPES and torch.is_autocast_enabled(device.type)):
        return "weight and input have different dtypes"
    if bias is None:
        return ""
    if type(bias) not in _PLAIN or bias.shape != shape[:1] or bias.dtype is not dtype or bias.device != device:
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
        if type(t) not in _PLAIN or t.shape != weight.shape[:1] or t.device != weight.device:
            return "BatchNorm does not fit the weight"
        if t.dtype not in (weight.dtype, torch.float32):
            return "BatchNorm has another dtype"
    return ""


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
