"""The yardstick of the ops' tests: torch's own composition, in the tested dtype and in float64, and the error bounds between them.

How an error is judged
    ``ours`` and torch's own result in the same dtype are both compared with float64, in the L2 norm over the tensor. Ours may be
    twice as far off as torch's. Two floors exist because torch's error can be zero by luck, or by a summation order of its own:

    * ``store``: a result rounded once to a dtype of unit roundoff u is off by up to u times itself (2^-24, 2^-8, 2^-11), and in
      fp16 by up to 2^-25 where it is subnormal.
    * ``arithmetic``: the fp32 sum of n products. One chain of n multiply-adds collects rounding errors as a random walk does: about
      0.41 sqrt(n) u of the result's root mean square, taken as 0.5 sqrt(n) u. Winograd has the bound of 5e-6 instead, TF32
      that of one rounding to its 11 bits: two operands' are 0.6 of it on average. These are
      relative to ``scale``, the square root of the same linear map applied to the squared operands: the norm that the result has on
      average over the operands' signs, so that a result which happens to cancel does not tighten the bound. A result larger than
      that comes from products that add up, as those of expanded operands do: its partial sums grow in proportion to their number,
      and rounding errors of equal terms share a direction, so the walk is no longer random; the bound then grows with
      (norm / scale)^2, which turns sqrt(n) into n where all products are equal. Winograd's errors come from all nine taps wherever
      a tile touches the image, also from those that only meet padding, so its scale takes the mean over the taps.

Gradients of ReLU and pooling jump where an activation is near zero or two are near a tie, in float64 at another place than in the
tested dtype. The float64 gradient therefore takes the decisions (which elements pass, which position won) from the implementation
that is judged; that these decisions are right is checked on their own, exactly (``check_decisions``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vggfast import _C, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALGOS = ("winograd", "direct")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}  # half the smallest step
WINOGRAD_BOUND = 5e-6
DIRECT_CHAIN = 320  # products that the direct kernel sums in one chain at most, and the additions of such chains
ARITHMETIC = {"winograd": WINOGRAD_BOUND, "tf32": 2.0**-11}


class Config(NamedTuple):
    """One way to run the ops on this machine."""

    isa: str
    algo: str
    dtype: torch.dtype

    def use(self) -> None:
        _C.set_cpu_isa(self.isa)
        _C.set_conv_algo(self.algo)

    def __str__(self) -> str:
        return f"{self.isa}-{self.algo}-{str(self.dtype).removeprefix('torch.')}"


# AMX's tile registers, or the same kernels over an emulation of them: another direct kernel for bfloat16, and Winograd's products
# of many channels (test_pieces.py).
AMX_FORMS = [isa for isa in _C.cpu_isas() if isa.startswith("amx")]
AMX = next(iter(AMX_FORMS), None)
ISAS = [isa for isa in _C.cpu_isas() if isa not in AMX_FORMS]
CONFIGS = [Config(isa, algo, dtype) for isa in ISAS for algo in ALGOS for dtype in DTYPES]
CONFIGS += [Config(AMX, "direct", torch.bfloat16)] if AMX else []
CONFIGS_FP32 = [config for config in CONFIGS if config.dtype == torch.float32]


# ---- torch's composition --------------------------------------------------------------------------------------------


def composition(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = True, pool: bool = False
) -> Tensor:
    """What ``ops.conv3x3`` promises to equal, from torch's own operations."""
    y = F.conv2d(x, weight, bias, padding=1)
    y = F.relu(y) if relu else y
    return F.max_pool2d(y, 2) if pool else y


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype).requires_grad_(grad)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> Tensor:
    """-2 ... 2: every sum is exact in fp32, and equal values are frequent."""
    return torch.randint(-2, 3, shape, generator=generator(seed)).to(dtype).requires_grad_(grad)


def problem(
    n: int,
    c_in: int,
    c_out: int,
    h: int,
    w: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``x [n, c_in, h, w]``, ``weight [c_out, c_in, 3, 3]`` and ``bias [c_out]``; outputs have a variance near one."""
    weight = (normal(c_out, c_in, 3, 3, seed=seed + 1) / math.sqrt(9 * c_in)).to(dtype).requires_grad_(grad)
    return (
        normal(n, c_in, h, w, dtype=dtype, seed=seed, grad=grad),
        weight,
        normal(c_out, dtype=dtype, seed=seed + 2, grad=grad),
    )


def gradients(y: Tensor, inputs: tuple[Tensor | None, ...], grad: Tensor | None = None) -> list[Tensor]:
    """Gradients of ``(y * grad).sum()`` with respect to those inputs that are there; ``grad`` defaults to ones."""
    wanted = [t for t in inputs if t is not None]
    return list(torch.autograd.grad(y, wanted, torch.ones_like(y) if grad is None else grad))


NAMES = ("y", "grad x", "grad weight", "grad bias")  # of what these give


def results(function, operands: list[Tensor], grad: Tensor, relu: bool, pool: bool) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.detach().requires_grad_() for t in operands]
    y = function(*leaves, relu=relu, pool=pool)
    return [y.detach(), *gradients(y, tuple(leaves), grad)]


def float64_results(operands: list[Tensor], grad: Tensor, relu: bool, pool: bool) -> list[Tensor]:
    """torch's in float64, but the input's gradient as the convolution that it is, whose padding is multiplied as the forward's."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in operands)
    z = F.conv2d(x, weight, bias, padding=1)
    y = F.relu(z) if relu else z
    y = F.max_pool2d(y, 2) if pool else y
    dz, dw, db = torch.autograd.grad(y, (z, weight, bias), grad.double())
    return [y.detach(), F.conv2d(dz, weight.detach().flip(2, 3).transpose(0, 1), padding=1), dw, db]


# ---- memory layouts -------------------------------------------------------------------------------------------------


def _inside(t: Tensor, *window: slice, last: bool = False) -> Tensor:
    """``t`` as a window of a larger tensor, whose other elements are NaN: a kernel that reads them shows it."""
    shape = [
        size if s == slice(None) else s.start + size * (s.step or 1) + 1
        for size, s in zip(t.shape, window, strict=True)
    ]
    base = torch.full(shape, math.nan, dtype=t.dtype)
    base = base.to(memory_format=torch.channels_last) if last else base
    cut = [
        s if s == slice(None) else slice(s.start, s.start + size * (s.step or 1), s.step)
        for size, s in zip(t.shape, window, strict=True)
    ]
    view = base[tuple(cut)]
    view.copy_(t)
    return view


def _offset(t: Tensor) -> Tensor:
    """The same strides in a storage that starts one element late: misaligned for every vector width."""
    storage = torch.full((t.numel() + 1,), math.nan, dtype=t.dtype)
    storage[1:] = t.permute(0, 2, 3, 1).reshape(-1)
    n, c, h, w = t.shape
    return storage[1:].view(n, h, w, c).permute(0, 3, 1, 2)


ALL = slice(None)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced channels": lambda t: _inside(t, ALL, slice(1, None), ALL, ALL),
    "sliced channels of channels_last": lambda t: _inside(t, ALL, slice(2, None), ALL, ALL, last=True),
    "sliced rows and columns": lambda t: _inside(t, ALL, ALL, slice(1, None), slice(2, None)),
    "sliced rows of channels_last": lambda t: _inside(t, ALL, ALL, slice(1, None), slice(1, None), last=True),
    "every other image": lambda t: _inside(t, slice(1, None, 2), ALL, ALL, ALL, last=True),
    "every other pixel": lambda t: _inside(t, ALL, ALL, slice(0, None, 2), slice(0, None, 2), last=True),
    "every other channel": lambda t: _inside(t, ALL, slice(0, None, 2), ALL, ALL, last=True),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels first of all": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded batch": lambda t: t[:1].expand_as(t),
    "expanded channels": lambda t: t[:, :1].expand_as(t),
    "expanded rows of channels_last": lambda t: LAYOUTS["channels_last"](t[:, :, :1]).expand_as(t),
    "expanded everywhere": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "offset": _offset,
    "negative bit": lambda t: torch._neg_view(-t),
}
BIAS_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "strided": lambda t: torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


# ---- decisions: what ReLU let through, which position a pool took ---------------------------------------------------


@dataclasses.dataclass
class Decisions:
    """``passed`` where the ReLU is open (None without ReLU); ``position`` 0 ... 3 of each window's maximum (None without pool)."""

    passed: Tensor | None
    position: Tensor | None

    def route(self, grad: Tensor, h: int, w: int) -> Tensor:
        """The float64 gradient before ReLU and pool, ``[N, C, h, w]``."""
        grad = grad.double()
        if self.passed is not None:
            grad = grad.where(self.passed, torch.zeros((), dtype=torch.float64))
        if self.position is None:
            return grad
        n, c, ph, pw = grad.shape
        full = torch.zeros(n, c, h, w, dtype=torch.float64)
        for i in range(4):
            part = grad.where(self.position == i, torch.zeros((), dtype=torch.float64))
            full[:, :, i // 2 : 2 * ph : 2, i % 2 : 2 * pw : 2] = part
        return full

    def same(self, other: Decisions) -> bool:
        pairs = ((self.passed, other.passed), (self.position, other.position))
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def decode_argmax(argmax: Tensor, channels: int) -> Tensor:
    """``[N, H/2, W/2, ceil(C/4)]`` of 2 bits a channel, as positions ``[N, C, H/2, W/2]``."""
    positions = torch.stack([argmax >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    return positions[..., :channels].permute(0, 3, 1, 2).long()


def pool_positions(y: Tensor) -> tuple[Tensor, Tensor]:
    """torch's 2x2 max-pool and the position 0 ... 3 it took in each window."""
    pooled, index = F.max_pool2d(y, 2, return_indices=True)
    row, column = index // y.shape[3], index % y.shape[3]
    return pooled, row % 2 * 2 + column % 2


def decisions_of_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, pool: bool
) -> tuple[Tensor, Decisions]:
    with torch.no_grad():
        y, position = composition(x, weight, bias, relu=relu), None
        if pool:
            y, position = pool_positions(y)
        return y, Decisions(~(y <= 0) if relu else None, position)


def check_decisions(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, pool: bool) -> tuple[Tensor, Decisions]:
    """The fused op's output and decisions, after the proof that a fused pool is torch's pool of the unpooled op, bit for bit."""
    with torch.no_grad():
        y, argmax = torch.ops.vggfast.conv3x3(x, weight, bias, relu, pool, pool)
        if not pool:
            return y, Decisions(~(y <= 0) if relu else None, None)
        position = decode_argmax(argmax, y.shape[1])
        pooled, expected = pool_positions(torch.ops.vggfast.conv3x3(x, weight, bias, relu, False, False)[0])
        assert_same_bits(y, pooled, "fused pool against torch's pool of the unpooled op")
        assert torch.equal(position, expected), "argmax: expected torch's positions"
        spare = argmax.shape[3] * 4 - y.shape[1]
        assert spare == 0 or not (argmax[..., -1] >> 2 * (4 - spare)).any(), "argmax: expected unused bits to be zero"
        return y, Decisions(~(y <= 0) if relu else None, position)


# ---- errors ---------------------------------------------------------------------------------------------------------


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal shape, dtype and values: NaN where NaN is expected, and zeros of the same sign."""
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    same = (got == expected) & (got.signbit() == expected.signbit()) | got.isnan() & expected.isnan()
    wrong = torch.nonzero(~same)
    assert len(wrong) == 0, (
        f"{what}: {len(wrong)} of {got.numel()} differ, first at {wrong[0].tolist()}: {got[tuple(wrong[0])]} for {expected[tuple(wrong[0])]}"
    )


def assert_same_specials(got: Tensor, expected: Tensor, what: str = "") -> None:
    """NaN, Inf and -Inf at exactly the same places."""
    for name, test in (("NaN", torch.isnan), ("Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        a, b = test(got), test(expected)
        assert torch.equal(a, b), (
            f"{what}: {name} at {int(a.sum())} places, expected at {int(b.sum())}; {int((a & ~b).sum())} too many"
        )


def assert_as_good_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, torch_exact: Tensor, scale: Tensor, terms: int, algo: str, what: str
) -> float:
    """Error at most twice torch's, beside the floors of this module's docstring. Returns the ratio of the two errors.

    ``exact`` and ``torch_exact`` are float64; they differ only where ours and torch took different decisions. ``terms`` is
    the number of products in a sum.
    """
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert ours.dtype == torchs.dtype, f"{what}: {ours.dtype}, expected {torchs.dtype}"
    error, torch_error = float((ours.double() - exact).norm()), float((torchs.double() - torch_exact).norm())
    # The norm of a few elements strays from its expectation: a bound on a mean of one or two would be a bound on luck.
    few = 1 + 3 / math.sqrt(exact.unique().numel())
    chain = few * ARITHMETIC.get(algo, 0.5 * math.sqrt(terms) * UNIT[torch.float32])
    expected, norm = float(scale.norm()), float(exact.norm())
    arithmetic = chain * (expected if norm <= expected else norm * norm / expected)
    store = UNIT[ours.dtype] * norm + SUBNORMAL[ours.dtype] * math.sqrt(exact.numel())
    # A 16-bit result carries both errors, an fp32 result has its last rounding among those of its sum.
    floor = max(arithmetic, store) if ours.dtype == torch.float32 else arithmetic + store
    bound = max(2 * torch_error, floor)
    assert error <= bound, (
        f"{what}: error {error:.3e}, torch's own {torch_error:.3e}, floor {floor:.3e}, norm {norm:.3e}"
    )
    return error / max(torch_error, 1e-300)


def tap_energy(weight: Tensor, algo: str) -> Tensor:
    square = weight.double() ** 2
    return square.mean((2, 3), keepdim=True).expand_as(square) if algo == "winograd" else square


def exact_gradients(dz: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from the gradient before ReLU and pool, in float64."""
    sizes = [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(dz, x.double(), weight.double(), *sizes)
    return result


def check_against_float64(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, *, relu: bool, pool: bool, algo: str
) -> dict[str, float]:
    """Forward and every gradient of ``ops.conv3x3``, for an incoming ``grad``; returns our error over torch's, by name.

    ``algo`` is the one in force; x, weight and bias are leaves that require gradients.
    """
    h, w = x.shape[2:]
    inputs = (x, weight, bias)
    with torch.no_grad():
        exact = composition(x.double(), weight.double(), None if bias is None else bias.double(), relu=relu, pool=pool)
        bias_square = None if bias is None else bias.double() ** 2
        scale = composition(x.double() ** 2, tap_energy(weight, algo), bias_square, relu=relu, pool=pool).sqrt()
    y, decided = check_decisions(x, weight, bias, relu, pool)
    by_torch, torch_decided = decisions_of_torch(x, weight, bias, relu, pool)
    chain = DIRECT_CHAIN if algo == "direct" else 9 * max(weight.shape[:2])
    terms = (min(9 * x.shape[1], chain), min(9 * weight.shape[0], chain), x.shape[0] * h * w, x.shape[0] * h * w)
    ratios = {"y": assert_as_good_as_torch(y, by_torch, exact, exact, scale, terms[0], algo, "y")}

    output = ops.conv3x3(x, weight, bias, relu=relu, pool=pool)
    assert_same_bits(output.detach(), y, "public op against the raw op")
    ours = gradients(output, inputs, grad)
    theirs = gradients(composition(x, weight, bias, relu=relu, pool=pool), inputs, grad)
    with torch.no_grad():
        dz = decided.route(grad, h, w)
        references = exact_gradients(dz, x, weight)
        scales = [t.sqrt() for t in exact_gradients(dz**2, x.double() ** 2, tap_energy(weight, algo))]
        same = decided.same(torch_decided)
        torch_references = references if same else exact_gradients(torch_decided.route(grad, h, w), x, weight)
    for i, name in enumerate(("x.grad", "weight.grad", "bias.grad")[: len(ours)]):
        ratios[name] = assert_as_good_as_torch(
            ours[i], theirs[i], references[i], torch_references[i], scales[i], terms[i + 1], algo, name
        )
    return ratios
