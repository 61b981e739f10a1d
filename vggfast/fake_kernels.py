"""The ops' shapes and strides without data, for torch.compile, torch.export and fake tensors; importing registers them."""

from __future__ import annotations

import torch
from torch import Tensor


def _image_size(name: str, image: Tensor) -> torch.Size:
    if image.dim() != 4:
        raise RuntimeError(f"{name}: expected [N, C, H, W], got {list(image.shape)}")
    return image.shape


def _empty_nhwc(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _empty_argmax(like: Tensor, wanted: bool, n: int, c: int, h: int, w: int) -> Tensor:
    size = (n, h // 2, w // 2, (c + 3) // 4) if wanted else (0,)
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _fake_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, pool: bool, save_argmax: bool
) -> tuple[Tensor, Tensor]:
    n, c_in, h, w = _image_size("x", x)
    c = weight.shape[0]
    if tuple(weight.shape[1:]) != (c_in, 3, 3):
        raise RuntimeError(f"weight: expected [C_out, {c_in}, 3, 3] for x {list(x.shape)}, got {list(weight.shape)}")
    y = _empty_nhwc(x, n, c, h // 2, w // 2) if pool else _empty_nhwc(x, n, c, h, w)
    return y, _empty_argmax(x, pool and save_argmax, n, c, h, w)


def _fake_conv3x3_grad_input(
    grad: Tensor, weight: Tensor, y: Tensor | None, argmax: Tensor | None, h: int, w: int
) -> Tensor:
    return _empty_nhwc(grad, _image_size("grad", grad)[0], weight.shape[1], h, w)


def _fake_conv3x3_grad_weight(
    x: Tensor, grad: Tensor, y: Tensor | None, argmax: Tensor | None
) -> tuple[Tensor, Tensor]:
    c_in, c_out = _image_size("x", x)[1], _image_size("grad", grad)[1]
    return x.new_empty((c_out, c_in, 3, 3)), x.new_empty((c_out,))


def _fake_max_pool2x2(x: Tensor, save_argmax: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = _image_size("x", x)
    return _empty_nhwc(x, n, c, h // 2, w // 2), _empty_argmax(x, save_argmax, n, c, h, w)


def _fake_max_pool2x2_grad(grad: Tensor, argmax: Tensor, h: int, w: int) -> Tensor:
    n, c, _, _ = _image_size("grad", grad)
    return _empty_nhwc(grad, n, c, h, w)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_linear_grad_input(grad: Tensor, weight: Tensor, y: Tensor | None) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1]))


def _fake_linear_grad_weight(x: Tensor, grad: Tensor, y: Tensor | None, in_float32: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if in_float32 else x.dtype
    return x.new_empty((grad.shape[1], x.shape[1]), dtype=dtype), x.new_empty((grad.shape[1],), dtype=dtype)


for _fake in (
    _fake_conv3x3,
    _fake_conv3x3_grad_input,
    _fake_conv3x3_grad_weight,
    _fake_max_pool2x2,
    _fake_max_pool2x2_grad,
    _fake_linear,
    _fake_linear_grad_input,
    _fake_linear_grad_weight,
):
    torch.library.register_fake(_fake.__name__.replace("_fake_", "vggfast::"), _fake)
