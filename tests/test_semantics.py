"""Values where an answer can be accurate and still not torch's: NaN, infinities, signed zeros, denormals, ties, overflow.

Where a filter, or in a filter's gradient an incoming gradient, is NaN or infinite, products with the zero padding decide: torch's
float64 multiplies them (0 * Inf = NaN), its float32 on a CPU leaves them out. vggfast multiplies them, in every dtype and pass.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from reference import (
    AMX,
    CONFIGS,
    CONFIGS_FP32,
    NAMES,
    SUBNORMAL,
    Config,
    assert_same_bits,
    assert_same_specials,
    composition,
    float64_results,
    generator,
    gradients,
    normal,
    pool_positions,
    problem,
    results,
)
from torch import Tensor

from vggfast import _C, ops

NAN, INF = math.nan, math.inf
EPILOGUES = list(itertools.product([False, True], repeat=2))  # relu, pool


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The tensors are tiny; threads would only wait for each other."""
    torch.set_num_threads(1)


# ---- NaN and infinities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 40, 9, 11), (1, 3, 18, 8, 7)], ids=str)
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "grad"])
def test_nan_and_infinities_are_where_torch_has_them(config: Config, shape: tuple[int, ...], operand: str) -> None:
    """One value at a corner, an edge or inside; everything that it does not reach stays finite, whatever the tile it is in."""
    config.use()
    h, w = shape[3:]
    for (relu, pool), value in itertools.product(EPILOGUES, (NAN, INF, -INF)):
        for row, column in ((0, 0), (h - 1, w - 1), (h // 2, w // 2), (0, w - 1)):
            operands = list(problem(*shape, config.dtype))  # type: ignore[misc]
            size = composition(*operands, relu=relu, pool=pool).shape
            grad = normal(*size, dtype=config.dtype, seed=5)
            if operand == "bias":
                operands[2][column % 18] = value
            else:
                target = {"x": operands[0], "weight": operands[1], "grad": grad}[operand]
                target[0, 1, min(row, target.shape[2] - 1), min(column, target.shape[3] - 1)] = value
            ours = results(ops.conv3x3, operands, grad, relu, pool)
            what = f"{value} at {row, column}, relu={relu}, pool={pool}"
            for name, got, expected in zip(NAMES, ours, float64_results(operands, grad, relu, pool), strict=True):
                assert_same_specials(got, expected, f"{name}, {what}")
            reached = not all(bool(t.isfinite().all()) for t in ours)
            assert reached or (relu and value == -INF) or operand == "grad" or pool, what
            if config.dtype == torch.float32 and operand in ("x", "bias"):
                torchs = results(composition, operands, grad, relu, pool)
                for name, got, expected in zip(NAMES, ours, torchs, strict=True):
                    assert_same_specials(got, expected, f"{name}, {what}, torch's float32")


@pytest.mark.parametrize("config", [c for c in CONFIGS_FP32 if c.algo == "winograd"], ids=str)
@pytest.mark.parametrize(
    ("shape", "threads", "schedule"),
    [
        ((1, 20, 40, 47, 45), 1, "stay in L2"),
        ((1, 20, 40, 47, 45), 2, "stay in L2"),
        ((1, 64, 72, 9, 11), 1, "output channels split"),
        ((1, 64, 72, 9, 11), 2, "output channels split"),
        ((1, 1024, 17, 46, 46), 1, "few passes"),
        ((1, 1024, 17, 46, 46), 2, "few passes"),
        ((1, 1024, 17, 46, 46), 16, "tiles split"),
    ],
)
def test_every_schedule_of_winograd_repeats_what_it_spoiled(
    shape: tuple[int, ...], threads: int, schedule: str, config: Config
) -> None:
    """One value in the last block of channels or the last tile: found by whichever thread writes it."""
    config.use()
    torch.set_num_threads(threads)
    _, c_in, c_out, h, w = shape
    assert schedule in _C.cpu_plan("forward", *shape)
    x, weight, bias = problem(*shape)  # type: ignore[misc]
    clean = ops.conv3x3(x, weight, bias, relu=False)
    for value, operand, at in (
        (INF, x, (0, c_in - 1, h - 1, w - 1)),
        (NAN, x, (0, 1, 0, 0)),
        (-INF, bias, (c_out - 1,)),
    ):
        kept, operand[at] = operand[at].item(), value
        y, expected = ops.conv3x3(x, weight, bias, relu=False), composition(x, weight, bias, relu=False)
        operand[at] = kept
        assert_same_specials(y, expected, f"{value} at {at}")
        finite = expected.isfinite()
        assert not finite.all()
        error = (y.double() - expected.double())[finite].norm() / expected[finite].double().norm()
        assert error <= 5e-6
    assert_same_bits(ops.conv3x3(x, weight, bias, relu=False), clean, "after it")


@pytest.mark.parametrize("config", CONFIGS_FP32, ids=str)
@pytest.mark.parametrize("channel", [0, 5, 8, 13, 16, 24, 31, 32, 63])
def test_one_channel_that_is_not_finite(config: Config, channel: int) -> None:
    """In any vector of a block, all of which are whole: the others of the block do not tell."""
    config.use()
    for operand in range(4):  # x, filters of the output channel, its bias, its gradient
        operands = [*problem(1, 64, 64, 9, 10), normal(1, 64, 9, 10, seed=5)]
        operands[operand][(channel,) if operand in (1, 2) else (0, channel)].view(-1)[-1] = INF
        given = operands[:3], operands[3], False, False
        for name, got, exact in zip(NAMES, results(ops.conv3x3, *given), float64_results(*given), strict=True):
            assert_same_specials(got, exact, f"{name}, operand {operand}")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_many_special_values_at_once(config: Config) -> None:
    config.use()
    for seed, (relu, pool) in enumerate(EPILOGUES):
        if pool and config.dtype != torch.float32:
            continue  # near ties are decided after rounding, which the float64 reference does not know
        operands = list(problem(2, 17, 33, 13, 14, config.dtype, seed=seed))
        grad = normal(*composition(*operands, relu=relu, pool=pool).shape, dtype=config.dtype, seed=5)
        for t in (operands[0], operands[2], grad):
            draw = torch.rand(t.shape, generator=generator(seed))
            for value, below in ((NAN, 0.003), (INF, 0.002), (-INF, 0.001)):
                t[draw < below] = value
        ours, expected = (f(operands, grad, relu, pool) for f in (lambda *a: results(ops.conv3x3, *a), float64_results))
        for name, got, exact in zip(NAMES, ours, expected, strict=True):
            assert_same_specials(got, exact, f"{name}, relu={relu}, pool={pool}")
            both = got.isfinite() & exact.isfinite()
            error = (got.double() - exact)[both].norm() / exact[both].norm().clamp_min(1)
            assert error <= 2e-2 if config.dtype != torch.float32 else error <= 1e-5, name


# ---- pools: ties, NaN, signed zeros -----------------------------------------------------------------------------------

WINDOW_VALUES = (NAN, INF, -INF, 0.0, -0.0, 1.0)


def all_windows(values: tuple[float, ...], channels: int, dtype: torch.dtype) -> Tensor:
    """``[1, channels, 2, 2 * count]``: every 2x2 window of these values, in another order for every channel."""
    windows = torch.tensor(list(itertools.product(values, repeat=4)), dtype=dtype)
    row = windows.view(-1, 2, 2).permute(1, 0, 2).reshape(2, -1)
    return torch.stack([row.roll(2 * 5 * c, 1) for c in range(channels)])[None]


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.algo == "direct"], ids=str)
@pytest.mark.parametrize("channels", [1, 19])
def test_every_window_of_special_values_is_pooled_as_torchs(config: Config, channels: int) -> None:
    config.use()
    x = all_windows(WINDOW_VALUES, channels, config.dtype).requires_grad_()
    y, expected = ops.max_pool2x2(x), F.max_pool2d(x, 2)
    assert_same_bits(y.detach(), expected.detach())
    assert_same_bits(ops.max_pool2x2(x.detach()), expected.detach(), "where nobody asks for the positions")
    grad = normal(*y.shape, dtype=config.dtype)
    grad[0, 0, 0, ::3] = -0.0
    grad[0, 0, 0, 1::7] = NAN
    ours, torchs = (gradients(t, (x,), grad)[0] + 0 for t in (y, expected))  # torch adds gradients to zeros: 0 + -0 = 0
    assert_same_bits(ours, torchs, "x.grad")


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.dtype != torch.float32], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_pools_compare_what_is_stored(config: Config, relu: bool) -> None:
    """1 and 1 +- 2^-13 are one value in 16 bits: the first of the window wins, also where its fp32 sum was less."""
    config.use()
    tiny = all_windows((0.0, 2.0**-13, -(2.0**-13), 0.5), 1, config.dtype)
    x = torch.zeros(1, 18, 2, tiny.shape[3], dtype=config.dtype)
    x[:, 0], x[:, 1] = 1, tiny[:, 0]
    weight = torch.zeros(17, 18, 3, 3, dtype=config.dtype)
    weight[:, :2, 1, 1] = 1
    ours, torchs = (
        results(
            f,
            [x, weight, torch.zeros(17, dtype=config.dtype)],
            torch.ones(1, 17, 1, tiny.shape[3] // 2, dtype=config.dtype),
            relu,
            True,
        )
        for f in (ops.conv3x3, composition)
    )
    assert_same_bits(ours[0], torchs[0], "y")
    assert torch.equal(ours[1][0, 0] > 16, torchs[1][0, 0] > 16)  # where 17 filters' gradients meet
    _, position = pool_positions(1 + tiny.float())
    assert not torch.equal(pool_positions((1 + tiny.float()).to(config.dtype))[1], position)  # rounding did decide


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_zeros_have_torchs_sign(config: Config) -> None:
    config.use()

    def signed_zeros(*shape: int, seed: int) -> Tensor:
        return torch.where(torch.rand(shape, generator=generator(seed)) < 0.5, 0.0, -0.0).to(config.dtype)

    for relu, pool in EPILOGUES:
        operands = [
            signed_zeros(2, 18, 7, 6, seed=0),
            normal(20, 18, 3, 3, dtype=config.dtype),
            signed_zeros(20, seed=1),
        ]
        size = composition(*operands, relu=relu, pool=pool).shape
        for grad in (signed_zeros(*size, seed=2), normal(*size, dtype=config.dtype)):
            ours, torchs = (results(f, operands, grad, relu, pool) for f in (ops.conv3x3, composition))
            assert_same_bits(ours[0], torchs[0], "y")
            if relu:  # 0 and -0 are both shut
                assert not any(t.any() for t in ours[1:])


# ---- overflow and underflow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("pool", [False, True])
def test_the_edge_of_the_storage_type(config: Config, pool: bool) -> None:
    """Sums of two values around the largest: what rounds above it is infinite, what was above on the way only is not."""
    config.use()
    top = torch.finfo(config.dtype).max
    step = top - float(
        torch.nextafter(torch.tensor(top, dtype=config.dtype), torch.tensor(0, dtype=config.dtype)).double()
    )
    small = [0, step / 4, step / 2 + step / 8, step, -step / 4]
    if config.algo == "direct":
        small.append(step / 2)  # halfway, to even: infinity. Winograd's rounding may fall to either side
    x = torch.zeros(1, 18, 2, 2 * len(small), dtype=config.dtype)
    x[0, 0], x[0, 1, :, ::2] = top, torch.tensor(small, dtype=torch.float64).to(config.dtype)
    x[0, 2], x[0, 3] = top, -top
    weight = torch.zeros(20, 18, 3, 3, dtype=config.dtype)
    weight[:, :2, 1, 1] = 1
    weight[5:10, :2, 1, 1] = -1
    if config.dtype == torch.float16:  # in fp32, where the sum is made, it is far from overflow on its way
        weight[10:, 2:4, 1, 1] = 1
    ours, torchs = (f(x, weight, relu=False, pool=pool) for f in (ops.conv3x3, composition))
    assert_same_specials(ours, composition(x.double(), weight.double(), relu=False, pool=pool).to(config.dtype))
    assert_same_bits(ours, torchs)
    assert 0 < int(ours.isinf().sum()) < ours.numel()


@pytest.mark.parametrize("config", CONFIGS_FP32, ids=str)
def test_no_overflow_where_the_convolution_has_none(config: Config) -> None:
    """Winograd's transforms add up to 6x6 values of alternating sign: finite results of torch's must be finite here."""
    config.use()
    x, weight, bias = problem(2, 18, 20, 9, 10)
    operands, grad = [x * 6e37, weight / 50, bias], normal(2, 20, 9, 10, seed=3) * 6e37
    ours, exact = results(ops.conv3x3, operands, grad, False, False), float64_results(operands, grad, False, False)
    for name, got, expected in list(zip(NAMES, ours, exact, strict=True))[:2]:
        assert bool(got.isfinite().all()), name
        assert float((got.double() - expected).norm() / expected.norm()) <= 5e-6, name
    image, grad = normal(2, 18, 9, 10) * 1e18, normal(2, 20, 9, 10, seed=3) * 1e18
    got, expected = (
        f([image, weight, bias], grad, False, False)[2] for f in (lambda *a: results(ops.conv3x3, *a), float64_results)
    )
    assert bool(got.isfinite().all())
    assert float((got.double() - expected).norm() / expected.norm()) <= 5e-6


@pytest.mark.parametrize("config", CONFIGS_FP32, ids=str)
def test_no_overflow_in_some_pixels_of_a_tile(config: Config) -> None:
    """Winograd's factors differ from pixel to pixel: at some scale only the last ones of a tile overflow on their way."""
    config.use()
    for seed in range(8):
        x, weight, _ = problem(1, 18, 8, 4, 4, seed=seed)
        exact = composition(x.double(), weight.double(), relu=False)
        largest = torch.finfo(torch.float32).max / float(exact.abs().max())
        for share in (0.5 * 0.95**step for step in range(40)):
            y = ops.conv3x3(x, (weight.double() * largest * share).float(), relu=False)
            error = y.double() / largest / share - exact
            assert float(error.norm() / exact.norm()) <= 5e-6, share  # NaN, were one of them infinite


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.isa != AMX], ids=str)
@pytest.mark.parametrize("operand", ["x", "weight", "grad"])
def test_denormals_are_kept(config: Config, operand: str) -> None:
    """Operands below the smallest normal number: results are off by a few of the smallest steps (Winograd in fp32: of 2^-149)."""
    config.use()
    step = 2 * SUBNORMAL[config.dtype]
    operands, grad = list(problem(2, 18, 20, 9, 10, config.dtype)), normal(2, 20, 9, 10, dtype=config.dtype, seed=4)
    operands[2] *= 0
    values = {"x": operands[0], "weight": operands[1], "grad": grad}[operand]
    values.copy_(torch.randint(-100, 101, values.shape, generator=generator(7)).double() * step)
    assert 0 < float(values.abs().max()) < torch.finfo(config.dtype).tiny
    ours, exact = results(ops.conv3x3, operands, grad, False, False), float64_results(operands, grad, False, False)
    steps = 2.0  # a 16-bit result is rounded once
    if config.dtype == torch.float32:  # here each of the 180 products is
        steps = 512 if config.algo == "winograd" else 32
    for i in {"x": (0, 2), "weight": (0, 1), "grad": (1, 2, 3)}[operand]:
        assert ours[i].any(), NAMES[i]
        error = float((ours[i].double() - exact[i]).abs().max())
        rounding = float(exact[i].abs().max()) * torch.finfo(config.dtype).eps
        assert error <= steps * step + rounding, f"{NAMES[i]}: {error / step} steps"
    pooled = ops.conv3x3(*operands, relu=False, pool=True)
    assert_same_bits(pooled, F.max_pool2d(ours[0], 2))


def test_flushing_denormals_is_obeyed_as_torch_obeys_it() -> None:
    torch.set_num_threads(1)
    x, weight = torch.full((1, 16, 8, 8), 1e-40), torch.zeros(16, 16, 3, 3)
    weight[range(16), range(16), 1, 1] = 1
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    flushed = ops.conv3x3(x, weight), composition(x, weight)
    torch.set_flush_denormal(False)
    assert not flushed[0].any()
    assert not flushed[1].any()
    assert ops.conv3x3(x, weight).max() > 0.9e-40


def test_halves_are_read_as_they_are_where_denormals_are_flushed(isa: str) -> None:
    """float16's subnormals are ordinary float32 values: torch's conversions do not flush them, whichever way they are read."""
    torch.set_num_threads(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    half, small = torch.float16, 3e-5
    grey, colour = normal(1, 16, 9, 9), normal(1, 3, 9, 9)  # channels_last is read in vectors, three planes one by one
    for x, out in ((grey.to(memory_format=torch.channels_last), 20), (colour, 8)):
        x, weight = (small * x).to(half), normal(out, x.shape[1], 3, 3, seed=1).to(half)
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        assert float((ops.conv3x3(x, weight, relu=False).double() - exact).norm() / exact.norm()) < 4e-3
    x, weight = normal(1, 16, 9, 9).to(half), (small * normal(20, 16, 3, 3, seed=1)).to(half)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert float((ops.conv3x3(x, weight, relu=False).double() - exact).norm() / exact.norm()) < 4e-3
    x, grad = normal(4, 1024).to(half), (small * normal(4, 1024, seed=1)).to(half)
    exact = grad.double().T @ x.double()
    found = torch.ops.vggfast.linear_grad_weight(x, grad, None, True)[0]
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-3
