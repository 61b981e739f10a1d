"""Calls the ops with what they should not get, many times, in a process of its own: it must end by itself, with every error a Python one.

python raw_op_fuzz.py SEED CALLS
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from vggfast import _C, ops

RAW = torch.ops.vggfast
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64, torch.bool]
SIZES = [-(2**63), -(2**40), -2, -1, 0, 2**40, 2**62, 2**63 - 1]


class Fuzzer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def tensor(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """Of that shape and dtype, or nearly; with strides of any kind."""
        shape = list(shape)
        if self.chance(0.05):
            dtype = self.random.choice([*DTYPES, torch.uint8])
        if self.chance(0.08):
            i = self.random.randrange(len(shape))
            shape[i] = max(0, shape[i] + self.random.choice([-2, -1, 1, 5]))
        if self.chance(0.03):
            shape = self.random.choice([shape[:-1], [*shape, 1], []])
        t = torch.randint(0, 256, shape, dtype=dtype) if dtype == torch.uint8 else torch.randn(shape).to(dtype)
        kind = self.random.randrange(20)
        if kind == 0 and t.dim() == 4:
            return t.to(memory_format=torch.channels_last)
        if kind == 1 and t.dim() > 1:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == 2 and t.dim() > 1:
            return torch.stack([t, t], -1)[..., 0]
        if kind == 3 and t.dim() > 1:
            return t[:1].expand(t.shape) if len(t) else t
        if kind == 4 and t.numel():
            return t.as_strided(t.shape, [0] * t.dim())
        if kind == 5 and dtype != torch.uint8:
            return self.random.choice([Tensor.to_sparse, lambda t: t.to("meta")])(t)
        return t.requires_grad_() if kind == 6 and t.is_floating_point() else t

    def maybe(self, t: Tensor) -> Tensor | None:
        return None if self.chance(0.3) else t

    def size(self, right: int) -> int:
        return self.random.choice([*SIZES, right + 1, 2 * right]) if self.chance(0.1) else right

    def call(self) -> Tensor | tuple[Tensor, ...]:
        r = self.random
        _C.set_cpu_isa(r.choice(_C.cpu_isas()))
        _C.set_conv_algo(r.choice(["auto", "direct", "winograd"]))
        n, c_in, c_out = r.randint(0, 3), r.choice([1, 2, 3, 17, 33]), r.choice([1, 3, 16, 40])
        h, w = r.randint(1, 10), r.randint(1, 10)
        dtype = r.choice(DTYPES[:3] * 4 + DTYPES)
        relu, pool = r.random() < 0.5, r.random() < 0.5
        x, weight = self.tensor([n, c_in, h, w], dtype), self.tensor([c_out, c_in, 3, 3], dtype)
        bias = self.maybe(self.tensor([c_out], dtype))
        after = [n, c_out, h // 2, w // 2] if pool else [n, c_out, h, w]
        grad, y = self.tensor(after, dtype), self.maybe(self.tensor(after, dtype))
        argmax = self.tensor([n, h // 2, w // 2, (c_out + 3) // 4], torch.uint8)
        saved = (y, argmax if pool != self.chance(0.05) else None)
        rows, kind = r.randint(0, 17), r.choice(DTYPES[:3] * 4 + DTYPES)
        row, matrix, out = (self.tensor(size, kind) for size in ([rows, c_in], [c_out, c_in], [rows, c_out]))
        vector, saved_out = self.maybe(self.tensor([c_out], kind)), self.maybe(self.tensor([rows, c_out], kind))
        return r.choice(
            [
                lambda: RAW.conv3x3(x, weight, bias, relu, pool, r.random() < 0.5),
                lambda: RAW.conv3x3_grad_input(grad, weight, *saved, self.size(h), self.size(w)),
                lambda: RAW.conv3x3_grad_weight(x, grad, *saved),
                lambda: RAW.max_pool2x2(x, r.random() < 0.5),
                lambda: RAW.max_pool2x2_grad(grad, argmax, self.size(h), self.size(w)),
                lambda: RAW.linear(row, matrix, vector, relu),
                lambda: RAW.linear_grad_input(out, matrix, saved_out),
                lambda: RAW.linear_grad_weight(row, out, saved_out, relu),
                lambda: public_op(x, weight, bias, relu, pool),
            ]
        )()


def public_op(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, pool: bool) -> Tensor:
    """Fails exactly where torch fails."""
    try:
        expected = F.conv2d(x, weight, bias, padding=1)
        expected = F.relu(expected) if relu else expected
        expected = F.max_pool2d(expected, 2) if pool else expected
    except Exception as error:
        try:
            ops.conv3x3(x, weight, bias, relu=relu, pool=pool)
        except ValueError as ours:  # of a weight that conv2d would take, too
            if "[C_out, C_in, 3, 3]" not in str(ours):
                raise AssertionError(f"expected {error!r}, got {ours!r}") from ours
            raise
        except Exception as ours:
            if type(ours) is not type(error) or str(ours) != str(error):
                raise AssertionError(f"expected {error!r}, got {ours!r}") from ours
            raise
        raise AssertionError(f"expected {error!r}, got no error") from error
    y = ops.conv3x3(x, weight, bias, relu=relu, pool=pool)
    if y.shape != expected.shape or y.dtype != expected.dtype or y.device != expected.device:
        raise AssertionError(
            f"expected {expected.shape} {expected.dtype} {expected.device}, got {y.shape} {y.dtype} {y.device}"
        )
    return y


def main(seed: int, calls: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    fuzzer, outcomes = Fuzzer(seed), Counter[str]()
    for _ in range(calls):
        try:
            fuzzer.call()
            outcomes["no error"] += 1
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
            outcomes[type(error).__name__] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
