"""How far two feature maps are apart at each position, with nothing kept for the gradient but the two maps themselves.

Each rule maps two [N, C, H, W] to a sum over channels, [N, H, W], in float32 (float64 for float64), so that neither squares
nor sums overflow or vanish in half precision. Its gradient calculates the rule again from the maps, which whoever
made them keeps anyway; on a CPU in pieces that fit into the caches.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vggfast import dispatch

PIECE = 1 << 19  # elements of a map that a CPU calculates with at a time: 2 MB in float32


def wide(t: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Rule:
    """A distance that is symmetric in both maps, [N, C, H, W]."""

    def value(self, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        """The sum over channels, [N, H, W]."""
        raise NotImplementedError

    def gradient(self, a: Tensor, b: Tensor, grad: Tensor, *weights: Tensor) -> Tensor:
        """The gradient of a for `grad` [N, H, W]."""
        raise NotImplementedError


class Absolute(Rule):
    """|d|, as `torch.nn.functional.l1_loss`."""

    def value(self, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        return (wide(a) - wide(b)).abs().sum(1)

    def gradient(self, a: Tensor, b: Tensor, grad: Tensor, *weights: Tensor) -> Tensor:
        return (wide(a) - wide(b)).sign_().mul_(grad[:, None])


class Squared(Rule):
    """d², as `torch.nn.functional.mse_loss`."""

    def value(self, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        return (wide(a) - wide(b)).square().sum(1)

    def gradient(self, a: Tensor, b: Tensor, grad: Tensor, *weights: Tensor) -> Tensor:
        return (wide(a) - wide(b)).mul_(2 * grad[:, None])


class Huber(Rule):
    """d²/2 up to delta, from there on delta · (|d| - delta/2), as `torch.nn.functional.huber_loss`."""

    def __init__(self, delta: float) -> None:
        self.delta = delta

    def value(self, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        difference = (wide(a) - wide(b)).abs()
        inside = difference.clamp(max=self.delta)
        return (inside * (difference - 0.5 * inside)).sum(1)

    def gradient(self, a: Tensor, b: Tensor, grad: Tensor, *weights: Tensor) -> Tensor:
        return (wide(a) - wide(b)).clamp_(-self.delta, self.delta).mul_(grad[:, None])


class Unit(Rule):
    """LPIPS: squared differences of the maps at unit length over the channels, weighted by `weights` [C]."""

    EPS = 1e-10  # what LPIPS adds to a length

    def value(self, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        a, b = wide(a), wide(b)
        difference = a * self._scale(a)[1] - b * self._scale(b)[1]
        return difference.square().movedim(1, -1) @ weights[0].to(a.dtype)

    def gradient(self, a: Tensor, b: Tensor, grad: Tensor, *weights: Tensor) -> Tensor:
        a, b = wide(a), wide(b)
        (length, scale), (_, scale_b) = self._scale(a), self._scale(b)
        ones = a * scale
        g = torch.addcmul(ones, b, scale_b, value=-1).mul_(weights[0].to(a.dtype)[:, None, None])
        along = (g * ones).sum(1, keepdim=True).div_(length.clamp(min=torch.finfo(a.dtype).tiny))
        return g.mul_(scale).sub_(ones.mul_(along)).mul_(2 * grad[:, None])

    def _scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Length over the channels, and what brings it to one; 0 for a length of 0, so that gradients stay finite."""
        length = torch.linalg.vector_norm(t, dim=1, keepdim=True)
        return length, torch.where(length > 0, 1 / (length + self.EPS), 0)


def rule(distance: str, delta: float) -> Rule:
    """The rule of that name; ValueError where there is none."""
    if distance == "huber" and not delta > 0:
        raise ValueError(f"delta: expected a number above 0, got {delta}")
    rules = {"l1": Absolute(), "l2": Squared(), "huber": Huber(delta)}
    if distance not in rules:
        raise ValueError(f"distance: expected one of {', '.join(rules)}, got {distance!r}")
    return rules[distance]


def rows(rule: Rule, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
    """`rule.value(a, b, *weights)`, with the gradients of all of them."""
    transformed = dispatch.inside_functorch() or torch.autograd.forward_ad._current_level >= 0
    learning = any(t.requires_grad for t in weights) and torch.is_grad_enabled()
    if transformed or learning or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return rule.value(a, b, *weights)
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
            result[piece[0], piece[2]] = rule.value(a[piece], b[piece], *weights)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        found: list[Tensor | None] = [None, None]
        if torch.is_grad_enabled():  # create_graph: from the whole maps, by operations that are recorded
            inputs = [t for t, needed in zip((a, b), needs, strict=True) if needed]
            recorded = iter(torch.autograd.grad(ctx.rule.value(a, b, *weights), inputs, grad, create_graph=True))
            found = [next(recorded) if needed else None for needed in needs]
        else:
            for i, (ours, theirs) in enumerate(((a, b), (b, a))):
                if needs[i]:
                    found[i] = whole = torch.empty_like(ours)
                    for piece in _pieces(ours):
                        of_piece = grad[piece[0], piece[2]]
                        whole[piece] = ctx.rule.gradient(ours[piece], theirs[piece], of_piece, *weights)
        return (None, *found, *(None for _ in weights))


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
