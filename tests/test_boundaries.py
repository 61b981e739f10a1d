"""Sizes at which the CPU kernels change their way: channels around their vectors and blocks, images large enough to be stored
past the caches, tiles enough for every part of a filter gradient's sum, images that end within a tile."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from reference import CONFIGS, Config, assert_same_bits, check_against_float64, integers, normal, problem
from torch import Tensor

from vggfast import _C, ops

# Vectors hold 4, 8 or 16 channels, blocks 8, 16 or 32.
CHANNELS = [*range(1, 19), 31, 32, 33, 34, 47, 48, 49, 63, 64, 65, 66]


@pytest.mark.parametrize("algo", ["winograd", "direct"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_numbers_of_channels_around_vectors_and_blocks(isa: str, algo: str, channels: int) -> None:
    _C.set_conv_algo(algo)
    for c_in, c_out in ((channels, 18), (17, channels)):
        x, weight, bias = problem(1, c_in, c_out, 6, 9, grad=True, seed=channels)
        check_against_float64(x, weight, bias, normal(1, c_out, 6, 9), relu=True, pool=False, algo=algo)


@pytest.mark.parametrize("c_out", [16, 24, 33, 48])
@pytest.mark.parametrize("algo", ["winograd", "direct"])
def test_outputs_larger_than_the_caches(isa: str, algo: str, c_out: int) -> None:
    """Stores that pass the caches need whole, aligned vectors: only some numbers of channels have them at every pixel."""
    _C.set_conv_algo(algo)
    h = int(((5 << 18) / c_out) ** 0.5)  # 5 MB
    w = h + 3
    x, weight, bias = problem(1, 16, c_out, h, w)
    assert c_out * h * w * 4 > 4 << 20
    for moved in (False, True):
        if moved:  # another alignment of the input
            x = torch.cat([normal(1, 1, h, w), x], 1)[:, 1:]
        y = ops.conv3x3(x, weight, bias)
        exact = torch.relu(torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1))
        assert float((y.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("c_out", [16, 24])
@pytest.mark.parametrize("algo", ["winograd", "direct"])
def test_pooled_outputs_larger_than_the_caches(isa: str, algo: str, c_out: int) -> None:
    """With and without the winners' positions: windows at odd edges are left out, and no other store may be missing."""
    _C.set_conv_algo(algo)
    h = 2 * int(((9 << 18) / c_out) ** 0.5) + 1  # 9 MB after the pool
    x, weight, bias = problem(1, 16, c_out, h, h + 2)
    y = ops.conv3x3(x, weight, bias, pool=True)
    assert y.numel() * 4 > 8 << 20
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    exact = torch.nn.functional.max_pool2d(torch.relu(exact), 2)
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-6
    assert torch.equal(ops.conv3x3(x, weight.requires_grad_(), bias, pool=True).detach(), y)


# Schedule, channels, and threads with which it is taken for a few small images.
SCHEDULES = {"tile-fused": (20, 40, 1), "output channels split": (64, 72, 1), "tiles split": (1024, 17, 16)}
# Images, height, width: each remainder of four in either dimension. F(2) takes those of 1 and 2.
EDGES = [
    (3, 14, 14),
    (1, 13, 14),
    (2, 6, 9),
    (1, 14, 57),
    (2, 12, 13),
    (2, 9, 8),
    (1, 15, 6),
    (1, 5, 11),
    (3, 2, 3),
]


def use_schedule(schedule: str, n: int, h: int, w: int) -> tuple[int, int]:
    c_in, c_out, threads = SCHEDULES[schedule]
    _C.set_conv_algo("winograd")
    torch.set_num_threads(threads)
    assert schedule in _C.cpu_plan("forward", n, c_in, c_out, h, w)
    return c_in, c_out


# 16 bits meet an edge in the transforms alone, which all schedules share.
@pytest.mark.parametrize(
    ("schedule", "dtype"), [*((s, torch.float32) for s in SCHEDULES), ("tile-fused", torch.bfloat16)]
)
@pytest.mark.parametrize("size", EDGES, ids=str)
def test_images_that_end_within_a_tile(isa: str, schedule: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    c_in, c_out = use_schedule(schedule, *size)
    n, h, w = size
    torch.use_deterministic_algorithms(True)  # what torch.empty gives is NaN
    spoiled = torch.full((n, c_in, h + 8, w + 8), math.nan, dtype=dtype)
    for pool in (False, True):
        x, weight, bias = problem(n, c_in, c_out, h, w, dtype, grad=True)
        ops.conv3x3(spoiled, weight.detach())  # and so is the memory that threads keep
        grad = normal(n, c_out, *((h // 2, w // 2) if pool else (h, w)), dtype=dtype)
        check_against_float64(x, weight, bias, grad, relu=True, pool=pool, algo="winograd")


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (3, 2), (7, 1)])
@pytest.mark.parametrize(("n", "c_in", "c_out"), [(1, 16, 17), (5, 40, 24), (130, 64, 66)])
def test_the_smallest_images(isa: str, n: int, c_in: int, c_out: int, h: int, w: int) -> None:
    """Winograd's by default, where direct convolution takes several times as long."""
    for step in ("forward", "grad_input", "grad_weight"):
        assert _C.cpu_plan(step, n, c_in, c_out, h, w).startswith("winograd")
    x, weight, bias = problem(n, c_in, c_out, h, w, grad=True)
    grad = normal(n, c_out, h, w)
    check_against_float64(x, weight, bias, grad, relu=True, pool=False, algo="winograd")


@pytest.mark.parametrize(("threads", "schedule"), [(16, "tiles split"), (2, "tile-fused")])
def test_images_that_end_within_a_tile_in_several_chunks(isa: str, threads: int, schedule: str) -> None:
    """144 tiles in two chunks: the last column's, whole ones and the last row's meet the cut at other places."""
    c_in, c_out = use_schedule("tiles split", 9, 14, 14)
    torch.set_num_threads(threads)
    plan = _C.cpu_plan("forward", 9, c_in, c_out, 14, 14)
    assert schedule in plan
    assert "tiles 72" in plan
    x, weight, bias = problem(9, c_in, c_out, 14, 14)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    y = ops.conv3x3(x, weight, bias, relu=False)
    errors = (y.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert errors.max() < 5e-6


def test_every_schedule_gives_an_edge_the_same_bits(isa: str) -> None:
    """Threads choose the schedule, and may not choose the result."""
    _C.set_conv_algo("winograd")
    x, weight, bias = problem(2, 64, 64, 14, 13)
    results, plans = [], set()
    for threads in (1, 16):
        torch.set_num_threads(threads)
        plans.add(_C.cpu_plan("forward", 2, 64, 64, 14, 13))
        results.append(ops.conv3x3(x, weight, bias))
    assert len(plans) == 2
    assert_same_bits(*results)


# Filters are made of 128 (AVX-512), 256 or 512 input channels at a time: the last part is one channel, or most of them.
@pytest.mark.parametrize("channels", [129, 257, 500, 513])
def test_channels_taken_in_parts(isa: str, channels: int) -> None:
    _C.set_conv_algo("winograd")
    torch.set_num_threads(1)
    for c_in, c_out in ((channels, 18), (17, channels)):
        x, weight, bias = problem(1, c_in, c_out, 13, 9, grad=True, seed=channels)
        check_against_float64(x, weight, bias, normal(1, c_out, 13, 9), relu=True, pool=False, algo="winograd")
    x, weight, bias = problem(1, channels, 18, 13, 9)
    assert "output channels split" in _C.cpu_plan("forward", 1, channels, 18, 13, 9)
    in_parts = ops.conv3x3(x, weight, bias)
    torch.set_num_threads(16)
    assert "output channels split" not in _C.cpu_plan("forward", 1, channels, 18, 13, 9)
    assert_same_bits(in_parts, ops.conv3x3(x, weight, bias))


@pytest.mark.parametrize("images", [4, 9])
def test_filters_made_in_every_pass(isa: str, images: int) -> None:
    """One pass or two where second-level caches are large, none elsewhere and for many threads: equal bits."""
    _C.set_conv_algo("winograd")
    x, weight, _ = problem(images, 512, 256, 28, 28)
    results = []
    for threads in (2, 16):
        torch.set_num_threads(threads)
        results.append(ops.conv3x3(x, weight))
    assert "output channels split" not in _C.cpu_plan("forward", images, 512, 256, 28, 28)
    assert_same_bits(*results)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("h", "w", "edges"),
    [(14, 14, "row and column"), (13, 22, "row and column"), (14, 15, "row"), (16, 9, "column"), (15, 16, "")],
)
def test_the_plan_names_the_edges_that_f2_computes(schedule: str, h: int, w: int, edges: str) -> None:
    c_in, c_out = use_schedule(schedule, 1, h, w)
    named = f"winograd F(4x4,3x3), F(2) in the last {edges}, " if edges else "winograd F(4x4,3x3), "
    for step in ("forward", "grad_input", "grad_weight"):
        plan = _C.cpu_plan(step, 1, c_in, c_out, h, w)
        assert plan.startswith(named)
        assert ("F(2)" in plan) == bool(edges)


@pytest.mark.parametrize(
    ("shape", "schedule"),
    [
        ((9, 256, 256, 64, 6), "outputs split"),
        ((7, 17, 40, 92, 6), "outputs split"),
        ((5, 133, 40, 6, 48), "outputs fused"),
    ],
)
def test_filter_gradients_where_tiles_lack_points(
    isa: str, shape: tuple[int, int, int, int, int], schedule: str
) -> None:
    """Tiles are ordered by size, so that a first chunk or a whole part may be the last column's alone. Equal bits for any threads."""
    n, c_in, c_out, h, w = shape
    _C.set_conv_algo("winograd")
    x, weight, _ = problem(n, c_in, c_out, h, w)
    grad = normal(n, c_out, h, w).to(memory_format=torch.channels_last)
    large = torch.full_like(x, 1e6)
    gradients, plans = [], []
    for threads in (1, 2, 5, 64):  # five take ranges of the input channels, too, where sums are fused
        torch.set_num_threads(threads)
        plans.append(_C.cpu_plan("grad_weight", n, c_in, c_out, h, w))
        torch.ops.vggfast.conv3x3_grad_weight(large, grad, None, None)  # whose sums are in the memory that threads keep
        gradients.append(torch.ops.vggfast.conv3x3_grad_weight(x, grad, None, None))
    assert schedule in plans[0]
    assert "F(2)" in plans[0]
    assert "points split" in plans[-1]
    assert schedule == "outputs split" or "channels in 1 x 1 ranges" not in plans[2]
    for many in gradients[1:]:
        assert_same_bits(gradients[0][0], many[0])
        assert_same_bits(gradients[0][1], many[1])
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    exact_bias = grad.double().sum((0, 2, 3))
    assert float((gradients[0][0].double() - exact).norm() / exact.norm()) < 5e-6
    assert float((gradients[0][1].double() - exact_bias).norm() / exact_bias.norm()) < 1e-6


@pytest.mark.parametrize("algo", ["direct", "winograd"])
def test_the_bias_gradient_of_a_long_row(isa: str, algo: str) -> None:
    """Equal gradients, whose roundings all go the same way: a row of them is not one chain of additions."""
    _C.set_conv_algo(algo)
    grad = torch.tensor(0.7123457).expand(1, 17, 2, 8193)
    _, bias = torch.ops.vggfast.conv3x3_grad_weight(normal(1, 16, 2, 8193), grad, None, None)
    exact = grad.double().sum((0, 2, 3))
    assert float((bias.double() - exact).norm() / exact.norm()) < 2e-7


def test_the_plan_of_a_direct_filter_gradient_names_no_bands() -> None:
    plan = _C.cpu_plan("grad_weight", 1, 3, 64, 224, 224)
    assert plan == "direct: with so few channels transforms cost more than they save"


@pytest.mark.parametrize(
    ("c_in", "c_out", "forward", "grad_weight"),
    [
        (7, 64, "direct", "direct"),
        (8, 8, "direct", "direct"),
        (8, 9, "winograd", "direct"),
        (12, 5, "direct", "winograd"),
        (13, 5, "winograd", "winograd"),
        (64, 4, "direct", "winograd"),
        (11, 64, "winograd", "direct"),
        (12, 64, "winograd", "winograd"),
    ],
)
def test_few_channels_by_either_algorithm(isa: str, c_in: int, c_out: int, forward: str, grad_weight: str) -> None:
    """On both sides of where the plan changes, and half a block of outputs or a last half with each of them."""
    assert _C.cpu_plan("forward", 2, c_in, c_out, 9, 11).startswith(forward)
    assert _C.cpu_plan("grad_weight", 2, c_in, c_out, 9, 11).startswith(grad_weight)
    for more in (0, 32):
        x, weight, bias = problem(2, c_in, c_out + more, 9, 11, grad=True)
        check_against_float64(x, weight, bias, normal(2, c_out + more, 9, 11), relu=True, pool=False, algo="winograd")


@pytest.mark.parametrize("c_in", [257, 600])
def test_few_outputs_of_many_channels(isa: str, c_in: int) -> None:
    """All taps of four outputs fill a block; their sums are of several chains from 257 channels on."""
    _C.set_conv_algo("direct")
    for c_out in (1, 3, 4):
        x, weight, bias = problem(1, c_in, c_out, 5, 6, grad=True)
        check_against_float64(x, weight, bias, normal(1, c_out, 5, 6), relu=True, pool=False, algo="direct")


@pytest.mark.parametrize("c_in", [500, 512])
def test_filter_gradients_larger_than_the_caches(isa: str, c_in: int) -> None:
    """Rows of a gradient are stored past the caches where they are whole lines."""
    _C.set_conv_algo("winograd")
    x, grad = normal(1, c_in, 5, 6), normal(1, 256, 5, 6, seed=1)
    dw, _ = torch.ops.vggfast.conv3x3_grad_weight(x, grad, None, None)
    assert dw.numel() * 4 > 4 << 20
    exact = torch.nn.grad.conv2d_weight(x.double(), dw.shape, grad.double(), padding=1)
    assert float((dw.double() - exact).norm() / exact.norm()) < 5e-6


def test_bits_do_not_depend_on_what_memory_held(isa: str) -> None:
    """In the memory that a thread keeps, also in the places of channels that a block lacks: NaN there would repeat the layer directly."""
    _C.set_conv_algo("winograd")
    torch.set_num_threads(1)
    for h, w in ((9, 10), (40, 50)):
        gradients = []
        for c_out in (32, 20, 32, 20):
            x, weight, bias = problem(1, 18, c_out, h, w, grad=True)
            y = ops.conv3x3(x, weight, bias, relu=False)
            grad = torch.full_like(y, math.nan) if len(gradients) == 2 else torch.full_like(y, 0.7)
            gradients.append(torch.autograd.grad(y, (x, weight, bias), grad))
        for first, again in zip(gradients[1], gradients[3], strict=True):
            assert_same_bits(first, again)


def test_sums_are_fused_for_any_number_of_threads_that_find_work(isa: str) -> None:
    """Numbers that divide no number of ranges leave some waiting; only more threads than there are ranges share V and Z."""
    for threads in range(1, 33):
        torch.set_num_threads(threads)
        assert "outputs fused" in _C.cpu_plan("grad_weight", 8, 512, 512, 14, 14)
    torch.set_num_threads(10_000)
    assert "points split" in _C.cpu_plan("grad_weight", 8, 512, 512, 14, 14)


@pytest.mark.parametrize(("n", "h", "w"), [(1, 92, 93), (3, 52, 55), (7, 36, 40)])
def test_filter_gradients_of_many_tiles(isa: str, n: int, h: int, w: int) -> None:
    """Four parts of the tiles are summed apart, and no part may be lost or counted twice."""
    for algo in ("winograd", "direct"):
        _C.set_conv_algo(algo)
        x, weight, bias = problem(n, 16, 20, h, w, grad=True)
        check_against_float64(x, weight, bias, normal(n, 20, h, w), relu=True, pool=False, algo=algo)
        # Of one image or tile at a time, too: an error in one part is a small share of the whole sum's norm.
        for _ in range(3):
            spot = torch.zeros(n, 20, h, w)
            at = [int(torch.randint(size, ())) for size in (n, h, w)]
            spot[at[0], :, at[1], at[2]] = 1.0
            grad = torch.autograd.grad(ops.conv3x3(x, weight, bias, relu=False), weight, spot)[0]
            exact = torch.nn.functional.pad(x.detach()[at[0]], (1, 1, 1, 1))[:, at[1] : at[1] + 3, at[2] : at[2] + 3]
            assert (grad - exact).abs().max() < 1e-5 * x.abs().max()


def test_direct_sums_past_the_caches_have_torchs_bits(isa: str) -> None:
    _C.set_conv_algo("direct")
    x, weight = integers(1, 5, 210, 211), integers(24, 5, 3, 3)
    assert_same_bits(ops.conv3x3(x, weight, relu=False) + 0, torch.nn.functional.conv2d(x, weight, padding=1) + 0, "y")


def far_apart(t: Tensor) -> Tensor:
    """`t` with more than 2^31 elements from its first entry to its second, most of them in pages that nobody touches."""
    size, apart, no_reserve = t[0].numel(), 2**31 + 64, 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, (apart + size) * t.element_size(), flags=flags), dtype=t.dtype)
    return memory.as_strided(t.shape, (apart, *t.stride()[1:])).copy_(t)


def results_of_raw_ops(x: Tensor, weight: Tensor, grad: Tensor, y: Tensor) -> list[Tensor]:
    raw, (h, w) = torch.ops.vggfast, x.shape[2:]
    return [
        raw.conv3x3(x, weight, None, False, True, False)[0],
        raw.conv3x3_grad_input(grad, weight, y, None, h, w),
        *raw.conv3x3_grad_weight(x, grad, y, None),
        raw.max_pool2x2(x, False)[0],
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("c_in", [3, 128])
def test_offsets_past_31_bits(config: Config, c_in: int) -> None:
    """Of images, of the output that masks a gradient, and of filters."""
    config.use()
    x, weight, _ = problem(2, c_in, 2, 9, 10, config.dtype)
    near = [t.to(memory_format=torch.channels_last) for t in (x, weight, normal(2, 2, 9, 10, dtype=config.dtype))]
    near.append(ops.conv3x3(x, weight))
    far = [far_apart(t) for t in near]
    for got, expected in zip(results_of_raw_ops(*far), results_of_raw_ops(*near), strict=True):
        assert_same_bits(got, expected)


def test_weights_of_a_linear_layer_past_31_bits(isa: str) -> None:
    x, weight, grad = normal(3, 40), normal(2, 40, seed=1), normal(3, 2, seed=2)
    far = far_apart(weight)
    assert_same_bits(torch.ops.vggfast.linear(x, far, None, False), torch.ops.vggfast.linear(x, weight, None, False))
    found, expected = (torch.ops.vggfast.linear_grad_input(grad, t, None) for t in (far, weight))
    assert_same_bits(found, expected)
