"""Gradients of large fully connected weights that are made last in a backward pass, when no activation waits any more.

Autograd runs the node that was created last as soon as its gradient is there. In a VGG these are the classifier's: 494 MB of
gradients are made while all activations still wait for theirs. Here a node between a weight and its layer, of the lowest priority
there is, makes them instead: a training step needs the activations' memory or the gradients', not both. Values, hooks and ``.grad``
are what they are without; only the order in which the leaves get their gradients differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vggfast import dispatch

Gradients = tuple[Tensor, Tensor]  # of weight and bias

_SET_ORDER = "_set_sequence_nr"  # torch's own, which it does not promise; in a torch without it gradients are not late
_MAKE = "_vggfast_make"  # on a placeholder: the function that makes what it stands for


class _Late(torch.autograd.Function):
    """weight and bias as they are; their gradients are made here where placeholders come instead of them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor | None, grad_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        make: Callable[[], Gradients] | None = getattr(grad_weight, _MAKE, None)
        expected, ctx.expects_placeholder = getattr(ctx, "expects_placeholder", False), False
        if grad_weight is None:
            return None, grad_bias
        if make is not None:
            made = make()
            return made[0], None if grad_bias is None else made[1]
        if expected or (grad_weight.numel() > 1 and not any(grad_weight.stride())):
            raise RuntimeError(
                "vggfast: expected a placeholder of ops.linear as it was made, got another tensor in its place, which a hook on "
                "a node of autograd's graph has put there; register the hook on the weight or on a module"
            )
        return grad_weight, grad_bias


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether activations wait for their gradients behind a layer, so that those of ``weight`` had better be late.

    Not where processes send each other gradients as they come: the largest should be on their way first.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad and weight.requires_grad):
        return False
    return weight.is_leaf and not (torch.distributed.is_available() and torch.distributed.is_initialized())


def late(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The operands of a layer, whose gradients then wait until autograd has nothing else to do."""
    late_weight, late_bias = _Late.apply(weight, bias)  # type: ignore[no-untyped-call]
    node: Any = late_weight.grad_fn
    set_order = getattr(node, _SET_ORDER, None)
    if set_order is not None:
        set_order(0)  # after the node of anything else that is ready
    return late_weight, late_bias


def node_of(weight: Tensor) -> Any:
    """The node that makes the gradient of ``weight`` late, or None."""
    node: Any = _Late
    return weight.grad_fn if type(weight.grad_fn) is node._backward_cls else None


def leaf(weight: Tensor) -> Tensor:
    """What ``weight`` was before ``late``."""
    node: Any = weight.grad_fn
    found: Tensor = node.next_functions[0][0].variable
    return found


def made_at_once(node: Any) -> None:
    """``node``, of an operand of ``late`` or None, gets gradients: a pass before this one may have ended without its turn."""
    if node is not None:
        node.expects_placeholder = False


def placeholders(
    node: Any, grad: Tensor, weight_shape: torch.Size, dtype: torch.dtype, make: Callable[[], Gradients]
) -> Gradients:
    """Gradients without memory, for which ``node`` calls ``make`` when it is their turn.

    They are NaN, so that one which something else got hold of cannot be taken for a gradient. Where autograd looks for NaN, and
    under functorch, gradients are made at once.
    """
    if dispatch.inside_functorch() or torch.is_anomaly_enabled():
        made_at_once(node)
        return make()
    node.expects_placeholder = True
    nothing = grad.new_full((), float("nan"), dtype=dtype)
    weight = nothing.expand(weight_shape)
    setattr(weight, _MAKE, make)
    return weight, nothing.expand(weight_shape[:1])
