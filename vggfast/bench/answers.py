"""Float64 answers on a GPU: a CPU would take minutes for a batch of 256, and longer still to hand them over.

A layer's is computed in the process that checks and stays there; its convolution is nine matrix products, one a tap, so that
cuDNN, which competes, is not its own judge. A network's comes from torch's operators in float64, some images at a time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggfast.bench import cases
from vggfast.bench.cases import GIVEN, OWN_ERROR, Case, Outputs
from vggfast.bench.layers import Layer

ELEMENTS = 1 << 28  # of the largest tensor that is in float64 at a time: 2 GiB
IMAGES = 16  # of a network at a time


def load(case: Case, path: str) -> Outputs:
    """The reference for buffer 0: from its file, or of a layer on a GPU computed here."""
    from safetensors.torch import load_file

    return load_file(path) if path else layer(case)


def layer(case: Case) -> Outputs:
    """What ``cases.reference`` gives, on the case's device and in float32 (rounded from float64)."""
    return _layer(case.subject, case.batch, case.dtype, case.device)


@lru_cache(maxsize=1)
def _layer(subject: str, batch: int, dtype: str, device: str) -> Outputs:
    case = Case(subject, "forward+backward", batch, dtype, device)  # type: ignore[arg-type]
    shape = case.layer
    assert shape is not None
    data = cases.layer_data(case, 0)
    weight = data.weight.double()
    images = max(1, ELEMENTS // (shape.size**2 * max(shape.c_in, shape.c_out)))
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(data.bias, dtype=torch.float64)
    parts: dict[str, list[Tensor]] = {GIVEN: [], "y": [], "grad of x": []}
    for x, grad in zip(torch.split(data.x, images), torch.split(data.grad, images), strict=True):
        x = x.double().permute(0, 2, 3, 1)
        before = _convolve(x, weight) + data.bias.double()
        given, y, back = _pointwise(before, grad.double(), shape, cases.ROUNDING[case.products])
        parts[GIVEN].append(given.float())
        parts["y"].append(y.float())
        if shape.c_in != 3:
            mirrored = weight.flip(2, 3).transpose(0, 1)
            parts["grad of x"].append(_convolve(back, mirrored).permute(0, 3, 1, 2).float())
        for tap, shifted in enumerate(_taps(x)):
            images_sums = back.flatten(1, 2).transpose(1, 2) @ shifted.flatten(
                1, 2
            )  # by images: one long sum has one block
            grad_weight[:, :, tap // 3, tap % 3] += images_sums.sum(0)
        grad_bias += back.sum((0, 1, 2))
    joined = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
    exact = joined | {"grad of weight": grad_weight.float(), "grad of bias": grad_bias.float()}
    return exact | cases.own_errors(case, exact)


def _taps(x: Tensor) -> list[Tensor]:
    """``x [N, H, W, C]`` as each of the nine taps sees it, zeros outside."""
    h, w = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    return [padded[:, r : r + h, s : s + w] for r in range(3) for s in range(3)]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """``[N, H, W, C]`` with ``[K, C, 3, 3]`` to ``[N, H, W, K]``."""
    y = torch.zeros(*x.shape[:3], weight.shape[0], dtype=x.dtype, device=x.device)
    for tap, shifted in enumerate(_taps(x)):
        y += shifted @ weight[:, :, tap // 3, tap % 3].T
    return y


def _pointwise(before: Tensor, grad: Tensor, shape: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """From the convolution ``[N, H, W, K]``: the gradient that is given, y (both NCHW), the convolution's gradient ``[N, H, W, K]``."""
    convolved = before.permute(0, 3, 1, 2).requires_grad_()
    given = grad * cases.decided(convolved.detach(), shape.pool, dtype)
    y = F.relu(convolved)
    y = F.max_pool2d(y, 2) if shape.pool else y
    (back,) = torch.autograd.grad(y, convolved, given)
    return given, y.detach(), back.permute(0, 2, 3, 1)


def network(case: Case, net: nn.Module) -> Outputs:
    """What ``cases.reference`` gives for a network on a GPU, in host memory."""
    images = cases.images(case, 0)
    net = net.to(case.device)
    cudnn: Any = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=False):  # trying every float64 kernel would take longer than the answer
        exact = _network(case, net.double(), images.double(), None)
    if case.task == "inference" or case.dtype == "fp32":
        return exact
    own = cases.relative_errors(_network(case, net.float(), images, torch.bfloat16), exact)
    return exact | {OWN_ERROR + name: torch.tensor(error) for name, error in own.items()}


def _network(case: Case, net: nn.Module, images: Tensor, autocast: torch.dtype | None) -> Outputs:
    plain = cases.plain_network(net)
    net.zero_grad()
    scores = []
    for first in range(0, case.batch, IMAGES):
        x = images[first : first + IMAGES].to(case.device)
        with (
            torch.set_grad_enabled(case.task == "training"),
            torch.autocast(case.device, autocast, autocast is not None),
        ):
            found: Tensor = plain(x)
        if case.task == "training":
            target = cases.targets(case, found.shape[1])[first : first + IMAGES].to(case.device)
            exact = found if autocast is None else found.float()
            torch.autograd.backward(F.cross_entropy(exact, target, reduction="sum") / case.batch)
        scores.append(found.detach().cpu())
    gradients = {f"grad of {name}": p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return {"scores": torch.cat(scores), **gradients}
