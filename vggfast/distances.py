"""How far two feature maps are apart at each position, with nothing kept for the gradient but the two maps themselves.

Each rule maps two [N, C, H, W] to a sum over channels, [N, H, W], in float32 (float64 for float64), so that neither squares
nor sums overflow or vanish in half precision. Its gradient calculates the rule again from the maps, which whoever
made them keeps anyway; on a CPU in pieces that fit into the caches.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vggfast import dispatch

Rule = Callable[..., Tensor]  # (a, b, *weights) -> [N, H, W]
PIECE = 1 << 18  # elements of a map that a CPU calculates with at a time: 1 MB in float32
EPS = 1e-10  # what LPIPS adds to a norm


def wide(t: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def absolute(a: Tensor, b: Tensor) -> Tensor:
    return (wide(a) - wide(b)).abs().sum(1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    return (wide(a) - wide(b)).square().sum(1)


def huber(a: Tensor, b: Tensor, delta: float) -> Tensor:
    return F.huber_loss(wide(a), wide(b), reduction="none", delta=delta).sum(1)


def unit(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """LPIPS: squared differences of the maps at unit length over the channels, weighted by `weight` [C]."""
    a, b = wide(a), wide(b)
    difference = a / (_norm(a) + EPS) - b / (_norm(b) + EPS)
    weighted: Tensor = difference.square().movedim(1, -1) @ weight.to(a.dtype)
    return weighted


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=1, keepdim=True)


def rule(distance: str, delta: float) -> Rule:
    """The rule of that name; ValueError where there is none."""
    rules: dict[str, Rule] = {"l1": absolute, "l2": squared, "huber": partial(huber, delta=delta)}
    if distance not in rules:
        raise ValueError(f"distance: expected one of {', '.join(rules)}, got {distance!r}")
    return rules[distance]


def rows(rule: Rule, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
    """`rule(a, b, *weights)`, with the gradients of a, b and `weights`."""
    transformed = dispatch.inside_functorch() or torch.autograd.forward_ad._current_level >= 0
    if torch.compiler.is_compiling() or transformed or torch._C._get_tracing_state() is not None:
        return rule(a, b, *weights)
    result: Tensor = _Rows.apply(rule, a, b, *weights)  # type: ignore[no-untyped-call]
    return result


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(a, b, *weights)
        n, _, h, w = a.shape
        result = a.new_empty((n, h, w), dtype=torch.promote_types(a.dtype, torch.float32))
        for piece in _pieces(a):
            result[piece[0], piece[2]] = rule(a[piece], b[piece], *weights)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph: from the whole maps, by operations that are recorded
            inputs = [t for t, needed in zip((a, b, *weights), needs, strict=True) if needed]
            found = iter(torch.autograd.grad(ctx.rule(a, b, *weights), inputs, grad, create_graph=True))
            return (None, *(next(found) if needed else None for needed in needs))
        maps = [torch.empty_like(t) if needed else None for t, needed in zip((a, b), needs[:2], strict=True)]
        sums = [torch.zeros_like(t) if needed else None for t, needed in zip(weights, needs[2:], strict=True)]
        for piece in _pieces(a):
            with torch.enable_grad():
                parts = [t.detach() for t in (a[piece], b[piece], *weights)]
                inputs = [t.requires_grad_() for t, needed in zip(parts, needs, strict=True) if needed]
                y = ctx.rule(*parts)
            found = iter(torch.autograd.grad(y, inputs, grad[piece[0], piece[2]]))
            for whole in maps:
                if whole is not None:
                    whole[piece] = next(found)
            for total in sums:
                if total is not None:
                    total += next(found)
        return (None, *maps, *sums)


def _pieces(t: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of [N, C, H]: whole images, or rows of one image where that alone is larger than PIECE."""
    n, c, h, w = t.shape
    if t.device.type != "cpu":
        yield slice(n), slice(c), slice(h)
        return
    images = max(1, PIECE // max(1, c * h * w))
    height = h if images > 1 else max(1, PIECE // max(1, c * w))
    for image in range(0, n, images):
        for row in range(0, h, height):
            yield slice(image, image + images), slice(c), slice(row, row + height)
