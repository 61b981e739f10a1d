"""The public functional ops and their contracts; the only file that names ``torch.ops.vggfast``.

Each function always gives torch's answer: a call that no fused kernel takes runs as the plain aten composition, and
``conv3x3_kernel`` / ``max_pool2x2_kernel`` say why. Autograd and autocast of the ops are registered here, fake kernels in
``fake_kernels``, since torch's stable C++ ABI has none of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as nn_grad

from vggfast import dispatch, fake_kernels, late_gradients  # noqa: F401 (fake_kernels registers itself)
from vggfast.cuda_plan import Decision, Gpu, Problem

_ops = torch.ops.vggfast


# ---- the ops -------------------------------------------------------------------------------------------------------


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = True, pool: bool = False) -> Tensor:
    """``max_pool2d(relu(conv2d(x, weight, bias, padding=1)), 2)`` in one kernel; ReLU and pool only where asked for.

    Args:
        x: ``[N, C_in, H, W]`` with any strides (or whatever else ``conv2d`` takes; it then runs unfused).
        weight: ``[C_out, C_in, 3, 3]`` with any strides, in the dtype of ``x``.
        bias: ``[C_out]`` or ``None``.
        relu: apply ReLU; NaN stays NaN.
        pool: apply a 2x2 max-pool of stride 2 (an odd last row or column is dropped). The pre-pool activation is never
            stored; for the backward pass 2 bits an output element are.

    Returns:
        ``[N, C_out, H, W]``, or ``[N, C_out, H // 2, W // 2]`` with ``pool``; a fused kernel's result is in
        channels_last memory. float32, bfloat16 and float16 are fused, with fp32 arithmetic inside.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: ``weight`` is not ``[C_out, C_in, 3, 3]``.
        RuntimeError: whatever ``conv2d`` and ``max_pool2d`` raise on such tensors.
    """
    dispatch.check_conv3x3(x, weight, bias)
    if dispatch.why_not_conv3x3(x, weight, bias, pool):
        return _aten_conv3x3(x, weight, bias, relu, pool)
    if dispatch.inside_functorch():
        # An outer level may want the gradient, of which a tensor of this level says nothing: the argmax is saved.
        cast = _cast_operands(x, weight, bias)
        result: Tensor = _Conv3x3Function.apply(*cast, relu, pool, pool)[0]  # type: ignore[no-untyped-call]
        return result
    y: Tensor = _ops.conv3x3(x, weight, bias, relu, pool, pool and _wants_grad(x, weight, bias))[0]
    return y


def max_pool2x2(x: Tensor) -> Tensor:
    """``max_pool2d(x, 2)`` that keeps 2 bits an output element for the backward pass instead of int64 indices.

    Args:
        x: ``[N, C, H, W]`` with any strides; float32, bfloat16 and float16 are fused.

    Returns:
        ``[N, C, H // 2, W // 2]``, from a fused kernel in channels_last memory.

    Raises:
        TypeError: ``x`` is not a tensor.
        RuntimeError: whatever ``max_pool2d`` raises, as for H or W of 1.
    """
    dispatch.check_tensor("x", x)
    if dispatch.why_not_max_pool2x2(x):
        return F.max_pool2d(x, 2)
    if dispatch.inside_functorch():
        result: Tensor = _MaxPool2x2Function.apply(x, True)[0]  # type: ignore[no-untyped-call]
        return result
    y: Tensor = _ops.max_pool2x2(x, _wants_grad(x))[0]
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``relu(linear(x, weight, bias))``, ReLU only where asked for; for small batches on a CPU by one pass over the weights.

    A layer of 100 million weights and a few images is as fast as memory delivers the weights, once. torch's matrix product takes
    longer there.

    Args:
        x: ``[N, in]`` with any strides (or whatever else ``torch.nn.functional.linear`` takes; it then runs unfused).
        weight: ``[out, in]``, at least ``2**20`` elements for the kernel, which also wants ``N <= 16`` and float32, bfloat16 or
            float16. Under autocast, float32 weights are read as they are, and get float32 gradients: a copy of them in fewer bits
            would take longer to make than the layer does.
        bias: ``[out]`` or ``None``.
        relu: apply ReLU; NaN stays NaN.

    Returns:
        ``[N, out]``, contiguous, in the dtype of ``x`` (under autocast in autocast's), with fp32 arithmetic inside.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: whatever ``linear`` raises on such tensors.
    """
    dispatch.check_operands(x, weight, bias)
    if dispatch.why_not_linear(x, weight, bias):
        y = F.linear(x, weight, bias)
        return F.relu(y) if relu else y
    return fused_linear(x, weight, bias, relu)


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``linear`` by the kernel, for operands against which ``dispatch.why_not_linear`` says nothing."""
    if dispatch.inside_functorch():
        cast = _cast_linear_operands(x, weight, bias)
        result: Tensor = _LinearFunction.apply(*cast, relu)  # type: ignore[no-untyped-call]
        return result
    if late_gradients.pays(x, weight):
        weight, bias = late_gradients.late(weight, bias)
    fused: Tensor = _ops.linear(x, weight, bias, relu)
    return fused


def conv3x3_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    pool: bool = False,
    step: str = "forward",
    gpu: Gpu | None = None,
) -> Decision:
    """Which kernel ``conv3x3`` takes for these arguments, and why not a faster one. Runs nothing.

    ``step`` may also be "grad_input" or "grad_weight". With ``gpu`` the answer is what that GPU would do, wherever ``x``
    is, with the CUDA kernels switched on.
    """
    dispatch.check_conv3x3(x, weight, bias)
    return dispatch.decide_conv3x3(x, weight, bias, pool, step, gpu)


def max_pool2x2_kernel(x: Tensor, *, gpu: Gpu | None = None) -> Decision:
    """Which kernel ``max_pool2x2`` takes for ``x``, or would take on ``gpu``, and why not a faster one. Runs nothing."""
    dispatch.check_tensor("x", x)
    return dispatch.decide_max_pool2x2(x, gpu)


def linear_kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gpu: Gpu | None = None) -> Decision:
    """Which kernel ``linear`` takes for these arguments, or would take on ``gpu``, and why not a faster one. Runs nothing."""
    dispatch.check_operands(x, weight, bias)
    return dispatch.decide_linear(x, weight, bias, gpu)


# ---- torch's composition -------------------------------------------------------------------------------------------


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _aten_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, pool: bool) -> Tensor:
    y = F.conv2d(x, weight, bias, padding=1)
    if relu:
        y = F.relu(y)
    return F.max_pool2d(y, 2) if pool else y


# ---- autograd ------------------------------------------------------------------------------------------------------


def _unpool(grad: Tensor, argmax: Tensor, h: int, w: int) -> Tensor:
    """The gradient before a 2x2 pool, from differentiable torch operations. ``grad [N, C, H/2, W/2]`` -> ``[N, C, H, W]``."""
    n, c, ph, pw = grad.shape
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=argmax.device)
    positions = ((argmax.unsqueeze(-1) >> shifts) & 3).flatten(-2)[..., :c].permute(0, 3, 1, 2)
    parts = [torch.where(positions == i, grad, torch.zeros_like(grad)) for i in range(4)]
    windows = torch.stack(parts, -1).view(n, c, ph, pw, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(n, c, 2 * ph, 2 * pw)
    return F.pad(windows, (0, w - 2 * pw, 0, h - 2 * ph))


def _before_relu(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient before the ReLU that gave ``y``, as torch has it: its own derivative by ``y`` is zeros, not none.

    So whatever ``y`` depends on, a bias too, has a second derivative, which ``torch.autograd.grad`` asks for.
    """
    before: Tensor = torch.ops.aten.threshold_backward(grad, y, 0)
    return before


def _differentiated() -> bool:
    """Whether a backward pass is itself differentiated: it then consists of torch's own operations, which have all derivatives."""
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def _setup_conv3x3(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, relu, pool, save_argmax = inputs
    y, argmax = output
    ctx.set_materialize_grads(False)  # no gradient of the output is none of the input, not zeros
    ctx.pool, ctx.size, ctx.argmax_saved = pool, x.shape[2:], save_argmax
    ctx.weight_channels_last = dispatch.suggests_channels_last(weight)
    ctx.contiguous = not (dispatch.suggests_channels_last(x) or ctx.weight_channels_last)
    ctx.needs = needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    # The input only for the filters' gradient, the filters only for the input's, the output only for the ReLU's mask.
    saved_x = x if needs_weight or needs_bias else None
    ctx.save_for_backward(saved_x, weight if needs_x else None, y if relu else None, argmax if pool else None)
    ctx.mark_non_differentiable(argmax)


def _backward_conv3x3(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, weight, y, argmax = ctx.saved_tensors
    h, w = ctx.size
    if ctx.pool and not ctx.argmax_saved:
        raise RuntimeError(
            "vggfast::conv3x3: expected save_argmax=True for a pooled call that is differentiated, got False"
        )
    needs_x, needs_weight, needs_bias = ctx.needs  # ctx.needs_input_grad is not safe in two threads over one graph
    if _differentiated():
        no_input = no_weight = True
    else:
        c = x.shape[1] if weight is None else weight.shape[1]
        problem = Problem(grad.shape[0], c, grad.shape[1], h, w, ctx.pool, grad.dtype)
        no_input, no_weight = _steps_without_kernel(problem, grad.device)
    grad_x = grad_weight = grad_bias = None
    composed = (needs_x and no_input, needs_weight and no_weight, needs_bias and no_weight)
    if any(composed):
        grad_x, grad_weight, grad_bias = _composed_backward(x, weight, y, argmax, grad, h, w, composed)
    if needs_x and not no_input:
        grad_x = _ops.conv3x3_grad_input(grad, weight, y, argmax, h, w)
    if (needs_weight or needs_bias) and not no_weight:
        grad_weight, grad_bias = _ops.conv3x3_grad_weight(x, grad, y, argmax)
    # As torch's are: people write grad.view(n, -1), and a weight's gradient then becomes `.grad` without a copy.
    grad_x = dispatch.in_layout(grad_x, not ctx.contiguous)
    grad_weight = dispatch.in_layout(grad_weight, ctx.weight_channels_last) if needs_weight else None
    return grad_x, grad_weight, grad_bias if needs_bias else None, None, None, None


def _steps_without_kernel(problem: Problem, device: torch.device) -> tuple[bool, bool]:
    """Whether the gradient of the input, and those of weight and bias, are left to torch's operations."""
    if device.type == "cpu":
        return False, False
    no_input, no_weight = (dispatch.why_not_cuda(step, problem, device) for step in ("grad_input", "grad_weight"))
    return bool(no_input), bool(no_weight)


def _composed_backward(
    x: Tensor | None,
    weight: Tensor | None,
    y: Tensor | None,
    argmax: Tensor | None,
    grad: Tensor,
    h: int,
    w: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients asked for, from torch's own operations: differentiable where gradients are recorded."""
    if y is not None:
        grad = _before_relu(grad, y)
    if argmax is not None:
        grad = _unpool(grad, argmax, h, w) if _differentiated() else _ops.max_pool2x2_grad(grad, argmax, h, w)
    n, c_out = grad.shape[:2]
    grad_x = grad_weight = grad_bias = None
    if needs[0] and weight is not None:
        grad_x = nn_grad.conv2d_input([n, weight.shape[1], h, w], weight, grad, padding=1)  # type: ignore[no-untyped-call]
    if needs[1] and x is not None:
        grad_weight = nn_grad.conv2d_weight(x, [c_out, x.shape[1], 3, 3], grad, padding=1)  # type: ignore[no-untyped-call]
    if needs[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_weight, grad_bias


def _setup_max_pool2x2(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.argmax_saved = inputs
    ctx.set_materialize_grads(False)
    ctx.size, ctx.contiguous = x.shape[2:], not dispatch.suggests_channels_last(x)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_max_pool2x2(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    (argmax,) = ctx.saved_tensors
    h, w = ctx.size
    if not ctx.argmax_saved:
        raise RuntimeError("vggfast::max_pool2x2: expected save_argmax=True for a differentiated call, got False")
    if _differentiated():
        return _unpool(grad, argmax, h, w), None
    grad_x = _ops.max_pool2x2_grad(grad, argmax, h, w)
    return dispatch.contiguous(grad_x) if ctx.contiguous else grad_x, None


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, relu = inputs
    ctx.set_materialize_grads(False)
    ctx.needs = needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    ctx.weight_dtype, ctx.weight_shape, ctx.late = weight.dtype, weight.shape, late_gradients.node_of(weight)
    saved_x = x if needs_weight or needs_bias else None
    if ctx.late is not None:
        weight = late_gradients.leaf(weight)  # or its gradient might get a second part, to add
    ctx.save_for_backward(saved_x, weight if needs_x else None, output if relu else None)


def _backward_linear(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    x, weight, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs
    grad_x = grad_weight = grad_bias = None
    if _differentiated():
        late_gradients.made_at_once(ctx.late)
        if y is not None:
            grad = _before_relu(grad, y)
        grad_x = grad @ weight.to(grad.dtype) if needs_x else None
        return grad_x, grad.t() @ x if needs_weight else None, grad.sum(0) if needs_bias else None, None
    if needs_x:
        grad_x = _ops.linear_grad_input(grad, weight, y)
    if needs_weight or needs_bias:
        make = partial(_ops.linear_grad_weight, x, grad, y, ctx.weight_dtype == torch.float32)
        if ctx.late is None:
            grad_weight, grad_bias = make()
        else:
            grad_weight, grad_bias = late_gradients.placeholders(
                ctx.late, grad, ctx.weight_shape, ctx.weight_dtype, make
            )
    return grad_x, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None


torch.library.register_autograd("vggfast::linear", _backward_linear, setup_context=_setup_linear)
torch.library.register_autograd("vggfast::conv3x3", _backward_conv3x3, setup_context=_setup_conv3x3)
torch.library.register_autograd("vggfast::max_pool2x2", _backward_max_pool2x2, setup_context=_setup_max_pool2x2)


class _Conv3x3Function(torch.autograd.Function):
    """The same formula for torch.func.grad, which does not see formulas registered on an op."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, argmax = _ops.conv3x3(*arguments)
        return y, argmax

    setup_context = staticmethod(_setup_conv3x3)
    backward = staticmethod(_backward_conv3x3)


class _MaxPool2x2Function(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, argmax = _ops.max_pool2x2(*arguments)
        return y, argmax

    setup_context = staticmethod(_setup_max_pool2x2)
    backward = staticmethod(_backward_max_pool2x2)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        y: Tensor = _ops.linear(*arguments)
        return y

    setup_context = staticmethod(_setup_linear)
    backward = staticmethod(_backward_linear)


# ---- autocast ------------------------------------------------------------------------------------------------------


def _cast_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype that autocast asks for, where it is on."""
    x, weight = x.to(dispatch.compute_dtype(x)), weight.to(dispatch.compute_dtype(weight))
    return x, weight, None if bias is None else bias.to(dispatch.compute_dtype(bias))


def _cast_linear_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same of ``linear``, whose weights may stay in float32."""
    cast_x, cast_weight, cast_bias = _cast_operands(x, weight, bias)
    if weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32):
        return cast_x, weight, bias
    return cast_x, cast_weight, cast_bias


def _register_autocast(key: str) -> torch.library.Library:
    library = torch.library.Library("vggfast", "IMPL", key)  # type: ignore[no-untyped-call]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def conv3x3_autocast(x: Tensor, weight: Tensor, bias: Tensor | None, *flags: bool) -> tuple[Tensor, Tensor]:
        cast = _cast_operands(x, weight, bias)  # while autocast is still seen
        with torch._C._ExcludeDispatchKeyGuard(keys):
            y, argmax = _ops.conv3x3(*cast, *flags)
            return y, argmax

    def linear_autocast(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        cast = _cast_linear_operands(x, weight, bias)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            y: Tensor = _ops.linear(*cast, relu)
            return y

    library.impl("conv3x3", conv3x3_autocast)  # type: ignore[no-untyped-call]
    library.impl("linear", linear_autocast)  # type: ignore[no-untyped-call]
    return library


_autocast_libraries = [_register_autocast("AutocastCPU"), _register_autocast("AutocastCUDA")]
