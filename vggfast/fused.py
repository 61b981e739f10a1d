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

from vggfast import dispatch, ops
from vggfast.runs import (
    STAGES,
    Run,
    child_obstacle,
    context_obstacle,
    find_run,
    geometry_obstacle,
    hooked_globally,
    operands,
    subclass_obstacle,
)

__all__ = ["FusedSequential", "convert"]


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs Conv3x3 [-> BatchNorm2d] [-> ReLU] [-> MaxPool2d 2x2], and Linear [-> ReLU], as one op per run.

    Takes and returns what `nn.Sequential` with the same children does: values within rounding, the same dtype, device
    and memory format, the same gradients, the same errors. A run may contain, in this order, exact torch classes only:

    - `nn.Conv2d`: kernel 3x3, stride 1, padding 1, dilation 1, groups 1, zero padding, with or without bias;
    - `nn.BatchNorm2d` in eval mode with running statistics: folded into weight and bias, in float32, at every call;
    - `nn.ReLU`, in place or not;
    - `nn.MaxPool2d`: kernel 2x2, stride 2, no padding; with `ceil_mode` only where height and width are even.

    `nn.ReLU` and `nn.MaxPool2d` by themselves, as behind a `nn.BatchNorm2d` in training, are a run, too: ReLU comes last there, on
    a quarter of the values, with the same results.

    Input is [N, C, H, W] in float32, bfloat16 or float16 on a CPU or CUDA device. A run of `nn.Linear` and `nn.ReLU` is one
    op for a small batch on a CPU; `ops.linear` says when. Everything else runs module by module
    as torch does, as does all that would otherwise see a difference: children with hooks, parametrisations or an own
    `forward`, global module hooks, tensor subclasses, dispatch and function modes, `torch.fx`, `torch.jit`, `torch.export`, ONNX.
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
    x, layout, keep = state
    everywhere = context_obstacle() or subclass_obstacle(x)
    start, own = 0, False
    while start < len(children):
        run, reason = (None, everywhere) if everywhere else find_run(children, start, x, own)
        before = x if observe is not None else None
        if run is not None:
            end, layout = start + run.length, None if run.op == "linear" else _layout_after(run, x, layout)
            x = _execute(run, x)
            keep = run.relu is not None and x.requires_grad  # autograd has saved the output as the ReLU's mask
        else:
            end = start + 1
            x, layout, keep = _run_module(children[start], x, layout, keep)
        # Made by a module that writes a new tensor, and no hook has seen it.
        own = run is None and type(children[start]) in (nn.Conv2d, nn.BatchNorm2d) and not keep
        if observe is not None:
            observe(Executed(names[start:end], children[start:end], run, before, x, reason))
        start = end
    return State(x, layout, keep)


def _run_module(module: nn.Module, x: Any, layout: bool | None, keep: bool) -> tuple[Any, bool | None, bool]:
    """Call one child; takes and returns x, `layout` and `keep` as a `State` has them."""
    if module is None:
        return module(x), layout, keep
    hooked = hooked_globally() or any(child_obstacle(m) for m in module.modules())
    in_place = type(module) is nn.ReLU and module.inplace and isinstance(x, Tensor)
    keeps_layout = type(module) in (nn.ReLU, nn.BatchNorm2d) and not hooked
    if not keeps_layout:
        restored = _restore(x, layout)
        x, layout, keep = restored, None, keep and restored is x
    elif layout is not None and not in_place and (x.shape[1] == 1 or x.shape[2] == x.shape[3] == 1):
        layout = False  # where the strides fit both formats, torch's new tensors are contiguous
    if keep and isinstance(x, (Tensor, torch.fx.Proxy)) and _may_write(module):
        x, keep = x.clone(), False
    y = module(x)
    if type(module) in STAGES:
        return y, layout, hooked
    # Runs inside it, of another FusedSequential, may have saved their output as the ReLU's mask.
    saved = isinstance(y, Tensor) and y.requires_grad and any(isinstance(m, FusedSequential) for m in module.modules())
    return y, layout, hooked or keep or saved


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
    """x with the strides that plain torch would have given it, exactly: see `dispatch.contiguous`."""
    if layout is None:
        return x
    return dispatch.in_channels_last(x) if layout else dispatch.contiguous(x)


def _layout_after(run: Run, x: Tensor, layout: bool | None) -> bool:
    """Whether plain torch's output of `run` is channels_last.

    ATen's convolutions return channels_last where input or weight suggest it, its pooling where the input does.
    """
    n, c, h, w = x.shape
    suggested = dispatch.suggests_channels_last(x) if layout is None else layout
    if c == h == w == 1 and (layout is not None or n > 1):
        suggested = False  # ATen asks once more after making x dense, and the dense strides are those of both formats
    if run.weight is None:
        return suggested
    result = suggested or dispatch.suggests_channels_last(run.weight)
    if run.bn is not None or (run.relu is not None and not run.relu.inplace):
        result = result and not (run.weight.shape[0] == 1 or h == w == 1)  # as in _run_module
    return result


def _execute(run: Run, x: Tensor) -> Tensor:
    if run.op == "max_pool2x2":
        y = ops.max_pool2x2(x)
        return y if run.relu is None else torch.relu_(y)
    weight, bias = operands(run)
    if run.op == "linear":
        # `find_run` has asked whether the kernel takes it.
        return ops.fused_linear(x, weight, bias, run.relu is not None)
    return ops.conv3x3(x, weight, bias, relu=run.relu is not None, pool=run.pool is not None)
