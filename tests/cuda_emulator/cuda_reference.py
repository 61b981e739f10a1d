"""What the kernels must give: float64 references, torch's own result in the same type, and derived error bounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cuda_emulator_harness import Case, Saved


def make_inputs(case: Case, seed: int = 0, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``x [N, H, W, C]``, ``weight [K, 3, 3, C]`` of VGG's scale, ``bias [K]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n, case.h, case.w, case.c, generator=generator)
    weight = torch.randn(case.k, 3, 3, case.c, generator=generator) * (2 / (9 * case.c)) ** 0.5
    shift = torch.randn(case.k, generator=generator) * 0.2 if bias else None
    return x.to(case.dtype), weight.to(case.dtype), None if shift is None else shift.to(case.dtype)


def round_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 rounded to TF32's 10 mantissa bits, ties away from zero."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool, dtype: torch.dtype
) -> torch.Tensor:
    """torch's convolution of NHWC tensors in ``dtype``, ``[N, H, W, K]``."""
    nchw, filters = x.to(dtype).permute(0, 3, 1, 2), weight.to(dtype).permute(0, 3, 1, 2)
    y = F.conv2d(nchw, filters, None if bias is None else bias.to(dtype), padding=1)
    return (F.relu(y) if relu else y).permute(0, 2, 3, 1)


def torch_like(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool, dtype: torch.dtype
) -> torch.Tensor:
    """torch's CPU result in the kernel's type; fp32 kernels multiply in TF32, so torch gets TF32 operands."""
    if dtype == torch.float32:
        return convolve(round_tf32(x), round_tf32(weight), bias, relu, dtype)
    return convolve(x, weight, bias, relu, dtype)


def assert_close(ours: torch.Tensor, exact: torch.Tensor, theirs: torch.Tensor) -> None:
    """Our error against float64 is at most twice torch's, in root mean square and at the worst element.

    The worst element of a few hundred is a noisy measure, so it also gets one rounding of the output type.
    """
    ours64, theirs64 = ours.double() - exact, theirs.double() - exact
    limit = 2 * theirs64.square().mean().sqrt()
    got = ours64.square().mean().sqrt()
    assert got <= limit, f"rms error {got:.3e}, torch's is {limit / 2:.3e}"
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max()
    limit = 2 * theirs64.abs().max() + rounding
    got = ours64.abs().max()
    assert got <= limit, f"worst error {got:.3e}, torch's is {theirs64.abs().max():.3e}"


def pool_in_torch_order(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's 2x2 max pool of ``[N, H, W, K]`` and the positions ``2 dh + dw`` it chose, both ``[N, Ho, Wo, K]``."""
    values, flat = F.max_pool2d(y.permute(0, 3, 1, 2).float(), 2, return_indices=True)
    width = y.shape[2]
    position = flat // width % 2 * 2 + flat % width % 2
    return values.permute(0, 2, 3, 1).to(y.dtype), position.permute(0, 2, 3, 1)


def pack_argmax(position: torch.Tensor) -> torch.Tensor:
    """Positions ``[N, Ho, Wo, K]`` as two bits a channel, ``[N, Ho, Wo, ceil(K / 4)]`` bytes."""
    padded = F.pad(position, (0, -position.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return (padded << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)


def unpack_argmax(codes: torch.Tensor, channels: int) -> torch.Tensor:
    """Inverse of `pack_argmax`."""
    return (codes.unsqueeze(-1).int() >> torch.tensor([0, 2, 4, 6]) & 3).flatten(-2)[..., :channels]


def make_saved(case: Case, seed: int = 0) -> Saved:
    """A random gradient, and an output whose elements are positive, zero and NaN: all that a ReLU mask tells apart."""
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn(case.output_shape, generator=generator).to(case.dtype)
    y = torch.randn(case.output_shape, generator=generator).relu().to(case.dtype)
    y.view(-1)[3::17] = torch.nan
    position = torch.randint(0, 4, case.output_shape, generator=generator)
    return Saved(grad, y if case.relu else None, pack_argmax(position) if case.pool else None)


def grad_preact(case: Case, saved: Saved) -> torch.Tensor:
    """Gradient of the convolution's own output, ``[N, H, W, K]``: exact, nothing is rounded."""
    grad = saved.grad
    if saved.y is not None:
        grad = torch.where(saved.y <= 0, torch.zeros_like(grad), grad)
    if saved.argmax is None:
        return grad
    position = unpack_argmax(saved.argmax, case.k)
    full = torch.zeros(case.n, case.h, case.w, case.k, dtype=case.dtype)
    for code in range(4):
        rows, columns = slice(code // 2, case.h // 2 * 2, 2), slice(code % 2, case.w // 2 * 2, 2)
        full[:, rows, columns] = torch.where(position == code, grad, torch.zeros_like(grad))
    return full


def convolution_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch's gradients in ``dtype`` of input ``[N, H, W, C]``, weight ``[K, 3, 3, C]`` and bias ``[K]``."""
    tensors = [tensor.to(dtype).permute(0, 3, 1, 2) for tensor in (grad, x, weight)]
    wanted = [True, True, True]
    one = [1, 1]
    gradients = torch.ops.aten.convolution_backward(
        *tensors, [weight.shape[0]], one, one, one, False, [0, 0], 1, wanted
    )
    return gradients[0].permute(0, 2, 3, 1), gradients[1].permute(0, 2, 3, 1), gradients[2]


def torch_like_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch's CPU gradients in the kernel's type; TF32 operands for fp32, but a bias gradient of plain sums."""
    if dtype != torch.float32:
        return convolution_gradients(grad, x, weight, dtype)
    plain = convolution_gradients(grad, x, weight, dtype)
    rounded = convolution_gradients(round_tf32(grad), round_tf32(x), round_tf32(weight), dtype)
    return rounded[0], rounded[1], plain[2]
