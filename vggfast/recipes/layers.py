"""The forms that layers take while they train: dropout that depends on nothing but its place in the run, BatchNorm over
all processes, and features that keep few activations.

Only the class of the module objects changes, and only for a while: parameters, hooks and the state_dict stay.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from vggfast.fused import FusedSequential
from vggfast.recipes import RecipeError
from vggfast.recipes.data import seed_for


@dataclass
class Place:
    """Which images of which step a model is given; the layers look here in forward, and again where they recompute."""

    seed: tuple[int, ...] = ()  # of the step
    batch_size: int = 0  # of all processes and pieces
    first: int = 0  # position, in the batch, of the first image
    empty: bool = False  # the image only stands in for none


class SeededDropout(nn.Dropout):
    """Dropout whose mask is a function of the step and of the image's position in the batch of all processes.

    So neither resuming, nor the number of processes, nor pieces change what is dropped.
    """

    place: Place
    number: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1):
            return super().forward(input)
        generator = torch.Generator(input.device).manual_seed(seed_for(*self.place.seed, self.number))
        rows = self.place.batch_size + 1  # one more for the image that stands in for none
        draws = torch.rand(rows, *input.shape[1:], generator=generator, device=input.device)
        kept = draws[self.place.first : self.place.first + len(input)] >= self.p
        return input * (kept.to(input.dtype) * (1 / (1 - self.p)))


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; the gradient of it is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the images of all processes, as nn.SyncBatchNorm, which has no CPU form."""

    place: Place

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        weight = 0.0 if self.place.empty else 1.0
        here = torch.cat([weight * x.sum((0, 2, 3)), x.new_full((1,), weight * x.numel() / x.shape[1])])
        everywhere: Tensor = _AllReduce.apply(here)  # type: ignore[no-untyped-call]
        mean, count = everywhere[:-1] / everywhere[-1], everywhere[-1].detach()
        centred = x - mean[:, None, None]
        squares: Tensor = _AllReduce.apply(weight * centred.square().sum((0, 2, 3)))  # type: ignore[no-untyped-call]
        variance = squares / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            part = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), part)
            self.running_var.lerp_(variance.detach() * count / (count - 1), part)
        y = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)


class CheckpointedSequential(FusedSequential):
    """A FusedSequential that keeps only what leaves each of its pools, and calculates the rest again in backward."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)  # type: ignore[no-any-return,no-untyped-call]
        x, segment = input, []
        for child in self:
            segment.append(child)
            if isinstance(child, nn.MaxPool2d):
                x, segment = _checkpointed(segment, x), []
        return _checkpointed(segment, x) if segment else x


def _checkpointed(segment: list[nn.Module], x: Tensor) -> Tensor:
    run = FusedSequential(*segment)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_untouched(run)

    result: Tensor = run_again_in_backward(run, x, use_reentrant=False, context_fn=contexts)
    return result


@contextmanager
def _statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Without this the second forward pass would count the batch into the running statistics once more."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    counts = [None if count is None else count.clone() for _, _, count in before]
    for norm in norms:
        norm.momentum = 0.0  # not track_running_stats, with which torch saves other tensors for the gradient
    try:
        yield
    finally:
        for (norm, momentum, tracked), count in zip(before, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)


@contextmanager
def training_form(model: nn.Module, place: Place, world: int, checkpointing: bool) -> Iterator[None]:
    """Give the layers of `model` the forms above for the time of the `with` block.

    Raises RecipeError where `checkpointing` has nothing to work on.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []

    def become(module: nn.Module, form: type[nn.Module], **attributes: Any) -> None:
        changed.append((module, type(module)))
        module.__class__ = form
        for name, value in attributes.items():
            setattr(module, name, value)

    try:
        for number, module in enumerate(model.modules()):
            if type(module) is nn.Dropout:
                become(module, SeededDropout, place=place, number=number)
            elif world > 1 and type(module) is nn.BatchNorm2d:
                if next(model.parameters()).is_cuda:
                    become(module, nn.SyncBatchNorm, process_group=None)
                else:
                    become(module, CpuSyncBatchNorm, place=place)
            elif checkpointing and type(module) is FusedSequential and _has_pool(module):
                become(module, CheckpointedSequential)
        if checkpointing and not any(isinstance(m, CheckpointedSequential) for m in model.modules()):
            raise RecipeError(
                "gradient_checkpointing: expected a model with a vggfast.FusedSequential that holds pools, got none. "
                "vggfast.convert(model) makes them"
            )
        yield
    finally:
        for module, form in changed:
            module.__class__ = form
            for name in ("place", "number", "process_group"):
                module.__dict__.pop(name, None)


def _has_pool(module: nn.Module) -> bool:
    return any(isinstance(child, nn.MaxPool2d) for child in module.children())
