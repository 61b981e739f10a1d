"""Losses on a network's features: LPIPS, and L1 of features with Gram matrices; the loss and the gradient of the images.

Beside vggfast's stand the same losses as people write them in torch, and the package lpips.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggfast import losses, taps
from vggfast.bench import cases
from vggfast.bench.cases import BUFFERS, OWN_ERROR, Case, Outputs
from vggfast.bench.contenders import Runner

LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
MEAN, STD = (-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)  # ImageNet's, for images from -1 to 1
STYLE = 1e2  # brings the Gram matrices' terms to the size of the others


def body(case: Case, weights: Path | None) -> nn.Sequential:
    features = cases.network(case, weights).features
    assert isinstance(features, nn.Sequential)
    return features.requires_grad_(False)


def heads(features: nn.Sequential) -> list[Tensor]:
    """Random ones, positive as trained ones are."""
    generator = torch.Generator().manual_seed(5)
    channels = [tap.channels for name, tap in taps.names(features).items() if name in LAYERS]
    return [torch.rand(c, generator=generator) for c in channels]


class Plain(nn.Module):
    """The usual code: torchvision's layers in slices that end at the taps, and each formula written down."""

    def __init__(self, case: Case, features: nn.Sequential) -> None:
        super().__init__()
        ends = [0, *(tap.child + 1 for name, tap in taps.names(features).items() if name in LAYERS)]
        children = list(features)
        self.slices = nn.ModuleList(nn.Sequential(*children[a:b]) for a, b in pairwise(ends))
        self.heads = nn.ParameterList(head.view(1, -1, 1, 1) for head in heads(features)).requires_grad_(False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.distance = self.lpips if case.task == "lpips" else self.features_and_style

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.distance(self.run(x), self.run(target))

    def run(self, x: Tensor) -> list[Tensor]:
        x = (x - self.mean) / self.std
        found = []
        for part in self.slices:
            x = part(x)
            found.append(x)
        return found

    def lpips(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        total: Any = 0
        for head, a, b in zip(self.heads, ours, theirs, strict=True):
            a, b = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (a, b))
            total = total + F.conv2d((a - b).square(), head).mean((2, 3), keepdim=True)
        mean: Tensor = total.mean()
        return mean

    def features_and_style(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        terms = [F.l1_loss(a, b) for a, b in zip(ours, theirs, strict=True)]
        terms += [STYLE * F.mse_loss(self.gram(a), self.gram(b)) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(terms).sum()

    @staticmethod
    def gram(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows = x.reshape(n, c, h * w)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # in float16 and bfloat16 the sums are too large or too coarse
            rows = rows.to(torch.promote_types(x.dtype, torch.float32))
            return torch.bmm(rows, rows.transpose(1, 2)) / (c * h * w)


def ours(case: Case, features: nn.Sequential) -> nn.Module:
    if case.task == "lpips":
        state = {f"lin{i}.model.1.weight": head for i, head in enumerate(heads(features))}
        return losses.LPIPS(features, state, layers=LAYERS)
    style = dict.fromkeys(LAYERS, STYLE)
    return losses.Perceptual(features, LAYERS, style=style, input_range=(-1, 1))


def build(
    case: Case,
    files: dict[str, str],
    engine: str = "eager",
    layout: str = "channels_last",
    mode: str | None = None,
    graph: bool = False,
) -> Runner:
    """As `torch_runners.build`, which calls it. No contender of these tasks captures graphs."""
    features = body(case, Path(files["weights"]))
    memory: Any = torch.contiguous_format if engine == "vggfast" else getattr(torch, layout)
    plain: Any = Plain(case, features)
    loss: Any = ours(case, features) if engine == "vggfast" else plain.to(memory_format=memory)
    loss = loss.to(case.device)
    setting = "NCHW in" if engine == "vggfast" else {"contiguous_format": "NCHW"}.get(layout, layout)
    called: Any = loss
    if engine == "compile":
        called = torch.compile(loss, mode=mode)
        setting += ", inductor" + (f", {mode}" if mode else "")
    return _runner(case, called, list(loss.parameters()), memory, setting)


def build_package(case: Case, files: dict[str, str]) -> Runner:
    """The package lpips with the case's weights and heads."""
    from importlib.metadata import version

    import lpips

    torch.set_num_threads(case.threads)
    features = body(case, Path(files["weights"]))
    loss = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)
    slices = [child for i in range(1, 6) for child in getattr(loss.net, f"slice{i}")]
    for theirs, child in zip(slices, features, strict=False):
        theirs.load_state_dict(child.state_dict())
    for theirs, head in zip(loss.lins, heads(features), strict=True):
        theirs.model[-1].weight.copy_(head.view(1, -1, 1, 1))
    memory: Any = torch.channels_last
    loss = loss.to(case.device).to(memory_format=memory)
    runner = _runner(case, lambda x, target: loss(x, target).mean(), list(loss.parameters()), memory, "channels_last")
    runner.version = version("lpips")
    runner.clock = "cuda" if case.device == "cuda" else "cpu"
    return runner


def _runner(
    case: Case, loss: Callable[[Tensor, Tensor], Tensor], parameters: list[Any], memory: Any, setting: str
) -> Runner:
    inputs = [_images(case, i, memory).requires_grad_() for i in range(BUFFERS)]
    targets = [_images(case, BUFFERS + i, memory) for i in range(BUFFERS)]

    def run(buffer: int) -> tuple[Tensor, Tensor]:
        with _autocast(case):
            value = loss(inputs[buffer], targets[buffer])
        return value.detach(), torch.autograd.grad(value, inputs[buffer])[0]

    def outputs(result: tuple[Tensor, Tensor]) -> Outputs:
        return {name: t.float().cpu().contiguous() for name, t in zip(("loss", "grad of x"), result, strict=True)}

    return Runner(run, outputs, setting + (", autocast" if case.dtype == "bf16" else ""), parameters=parameters)


def _images(case: Case, buffer: int, memory: Any) -> Tensor:
    return cases.images(case, buffer).to(case.device, memory_format=memory)


def _autocast(case: Case) -> AbstractContextManager[Any]:
    return torch.autocast(case.device, torch.bfloat16) if case.dtype == "bf16" else nullcontext()


def reference(case: Case, weights: Path | None) -> Outputs:
    """For buffer 0 by torch's own operators in float64, and torch's own error with autocast where the case has that."""
    loss = Plain(case, nn.Sequential(*body(case, weights).children()))
    # The constants of the images as the losses have them, rounded to float32.
    exact = _outputs(copy.deepcopy(loss).double(), case, torch.float64)
    if case.dtype == "fp32":
        return exact
    with torch.autocast("cpu", torch.bfloat16):
        own = cases.relative_errors(_outputs(loss, case, torch.float32), exact)
    return exact | {OWN_ERROR + name: torch.tensor(error) for name, error in own.items()}


def _outputs(loss: nn.Module, case: Case, dtype: torch.dtype) -> Outputs:
    x = cases.images(case, 0).to(dtype).requires_grad_()
    value = loss(x, cases.images(case, BUFFERS).to(dtype))
    return {"loss": value.detach(), "grad of x": torch.autograd.grad(value, x)[0]}
