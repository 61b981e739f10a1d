"""Convolutions of bfloat16 on AMX's tile registers, where this CPU has them, and on their emulation."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from reference import (
    AMX_FORMS,
    assert_same_bits,
    check_against_float64,
    composition,
    generator,
    gradients,
    integers,
    normal,
    problem,
)
from torch import Tensor

from vggfast import _C, explain, ops, switches, vgg11

pytestmark = pytest.mark.skipif(not AMX_FORMS, reason="AMX's kernels and their emulation need AVX-512")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True, params=AMX_FORMS)
def amx(request: pytest.FixtureRequest) -> str:
    _C.set_cpu_isa(request.param)
    _C.set_conv_algo("direct")  # so that gradients of filters are exact, too
    return str(request.param)


def equals_torch_for_integers(n: int, c_in: int, c_out: int, h: int, w: int) -> None:
    """Sums of small integers are exact: results, pools' decisions and gradients are then torch's, bit by bit."""
    for relu, pool in ((True, False), (False, False), (True, True), (False, True)):
        if pool and min(h, w) < 2:
            continue
        x = integers(n, c_in, h, w, dtype=BF16, grad=True)
        weight = integers(c_out, c_in, 3, 3, dtype=BF16, seed=1, grad=True)
        bias = integers(c_out, dtype=BF16, seed=2, grad=True)
        y = ops.conv3x3(x, weight, bias, relu=relu, pool=pool)
        exact = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
        expected = composition(*exact, relu=relu, pool=pool)
        assert_same_bits(y, expected.to(BF16), f"relu {relu}, pool {pool}")
        grad = integers(*y.shape, dtype=BF16, seed=3)
        ours, theirs = gradients(y, (x, weight, bias), grad), gradients(expected, tuple(exact), grad.float())
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_bits(mine + 0, other.to(BF16) + 0, f"gradient, relu {relu}, pool {pool}")  # -0 + 0 = 0


@pytest.mark.parametrize("w", [1, 2, 7, *range(13, 19), 28, 31, 32, 33, 34, 47, 48, 49])
def test_widths_around_tiles(w: int) -> None:
    for h in (1, 2, 5):
        equals_torch_for_integers(1, 33, 17, h, w)


@pytest.mark.parametrize("c_in", [1, 2, 3, 4, 5, 9, 10, 11, 12, 31, 32, 33, 63, 64, 65])
def test_input_channels_around_tiles(c_in: int) -> None:
    """Up to 10 channels a step is a row of three taps, above a tap of 32 channels."""
    equals_torch_for_integers(2, c_in, 20, 5, 18)


@pytest.mark.parametrize("c_out", [1, 3, 15, 16, 17, 31, 32, 33, 48, 49, 64])
def test_output_channels_around_tiles(c_out: int) -> None:
    equals_torch_for_integers(1, 40, c_out, 4, 15)


def test_channels_far_apart_in_the_band() -> None:
    """From 256 channels on pixels keep a distance that is no power of two."""
    for c_in in (255, 256, 260):
        x, weight, bias = problem(2, c_in, 40, 6, 17, BF16, grad=True)
        check_against_float64(x, weight, bias, normal(2, 40, 6, 17, dtype=BF16), relu=True, pool=False, algo="direct")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bands_and_ranges_of_channels_make_no_difference(threads: int) -> None:
    x, weight, bias = problem(3, 64, 130, 37, 21, BF16)
    torch.set_num_threads(1)
    expected = ops.conv3x3(x, weight, bias, pool=True)
    torch.set_num_threads(threads)
    assert_same_bits(ops.conv3x3(x, weight, bias, pool=True), expected)
    plans = {_C.cpu_plan("forward", n, 64, 130, h, 21, "bfloat16").partition(":")[0] for n, h in ((1, 14), (3, 37))}
    assert len(plans) == 2


@pytest.mark.parametrize("n", [1, 3])
def test_filters_packed_where_they_are_used(n: int) -> None:
    """Many filters for few pixels: each thread packs those of its own output channels, as long as each has two blocks of them."""
    torch.set_num_threads(2)
    assert "packed where they are used" in _C.cpu_plan("forward", n, 256, 264, 5, 9, "bfloat16")
    equals_torch_for_integers(n, 256, 264, 5, 9)
    x, weight = integers(n, 256, 5, 9, dtype=BF16), integers(264, 256, 3, 3, dtype=BF16, seed=1)
    expected = ops.conv3x3(x, weight)
    assert_same_bits(ops.conv3x3(x, weight.contiguous(memory_format=torch.channels_last)), expected)
    torch.set_num_threads(16)
    assert "packed where they are used" not in _C.cpu_plan("forward", n, 256, 264, 5, 9, "bfloat16")
    assert_same_bits(ops.conv3x3(x, weight), expected)


@pytest.mark.parametrize("pool", [False, True])
def test_small_images_share_a_job(pool: bool) -> None:
    """Many filters are then read once for all of them; the last job has fewer."""
    torch.set_num_threads(2)
    assert "bands of 8 rows of 5 images" in _C.cpu_plan("forward", 13, 512, 128, 7, 7, "bfloat16")
    x, weight = integers(13, 512, 7, 7, dtype=BF16), integers(128, 512, 3, 3, dtype=BF16, seed=1)
    y = ops.conv3x3(x, weight, pool=pool)
    assert_same_bits(y, composition(x.float(), weight.float(), None, pool=pool).to(BF16))
    torch.set_num_threads(16)
    assert "images" not in _C.cpu_plan("forward", 13, 512, 128, 7, 7, "bfloat16")
    assert_same_bits(ops.conv3x3(x, weight, pool=pool), y)


@pytest.mark.parametrize("c_out", [32, 48, 64])
def test_outputs_larger_than_the_caches(c_out: int) -> None:
    """Whole lines of 32 channels are stored past the caches; with other numbers of channels they are not."""
    x, weight, bias = integers(2, 16, 161, 255, dtype=BF16), integers(c_out, 16, 3, 3, dtype=BF16, seed=1), None
    y = ops.conv3x3(x, weight, bias)
    assert y.numel() * 2 > 4 << 20
    assert_same_bits(y, composition(x.float(), weight.float(), bias).to(BF16))


def filter_gradients(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = torch.zeros(grad.shape[1], x.shape[1], 3, 3, dtype=BF16), torch.zeros(grad.shape[1], dtype=BF16)
    weight.requires_grad_(), bias.requires_grad_()
    return tuple(gradients(ops.conv3x3(x, weight, bias, relu=False), (weight, bias), grad))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "shape",
    [(1, 16, 33, 200, 90), (7, 40, 16, 14, 14), (1, 260, 40, 30, 129), (40, 16, 16, 1, 1), (1, 16, 16, 700, 90)],
)
def test_filter_gradients_of_many_chunks(shape: tuple[int, ...]) -> None:
    """Several parts and chunks of rows, and rows that end within a tile: integers show each product that is missing or twice."""
    n, c_in, c_out, h, w = shape
    x, grad = integers(n, c_in, h, w, dtype=BF16), integers(n, c_out, h, w, dtype=BF16, seed=1)
    grad *= (torch.rand(grad.shape, generator=generator(2)) < 0.1).to(BF16)  # so that most sums are exact in bfloat16
    dw, db = filter_gradients(x, grad)
    exact = torch.nn.grad.conv2d_weight(x.double(), (c_out, c_in, 3, 3), grad.double(), padding=1)
    assert_same_bits(dw + 0, exact.to(BF16) + 0)
    assert_same_bits(db + 0, grad.double().sum((0, 2, 3)).to(BF16) + 0)


def test_bits_of_filter_gradients_do_not_depend_on_threads() -> None:
    x, grad = normal(2, 48, 61, 75, dtype=BF16), normal(2, 130, 61, 75, dtype=BF16, seed=1)
    torch.set_num_threads(1)
    expected = filter_gradients(x, grad)
    for threads in (2, 3, 8, 16):  # eight take three ranges of five blocks
        torch.set_num_threads(threads)
        for got, one in zip(filter_gradients(x, grad), expected, strict=True):
            assert_same_bits(got, one, f"{threads} threads")


def test_bits_do_not_depend_on_what_memory_held() -> None:
    """In the memory that a thread keeps, also in the places of channels that a block lacks."""
    torch.set_num_threads(1)
    found = []
    for c_in, c_out, value in ((40, 20, 1.0), (64, 32, math.nan), (40, 20, 1.0)):
        x, weight, bias = problem(1, c_in, c_out, 9, 20, BF16)
        grad = normal(1, c_out, 9, 20, dtype=BF16, seed=5) * value
        found.append([ops.conv3x3(x * value, weight, bias), *filter_gradients(x * value, grad)])
    for got, expected in zip(found[2], found[0], strict=True):
        assert_same_bits(got, expected)


def test_an_infinity_spoils_only_the_gradients_that_read_it() -> None:
    """Between rows lie zeros, which would make NaN of an infinity that they meet: not in the result."""
    x, grad = normal(2, 20, 6, 7, dtype=BF16), normal(2, 18, 6, 7, dtype=BF16, seed=1)
    x[0, 3, 2, 0] = math.inf
    dw, db = filter_gradients(x, grad)
    assert bool(db.isfinite().all())
    assert bool(dw[:, [c for c in range(20) if c != 3]].isfinite().all())
    assert bool(dw[:, 3, :, :2].isinf().all())  # the taps that read the first column
    assert bool(dw[:, 3, :, 2].isfinite().all())  # its pixel is left of all that the last tap reads
    assert not dw.isnan().any()


def test_only_bfloat16_and_only_where_winograd_is_not_asked_for() -> None:
    def plan(dtype: str, which: str = "forward") -> str:
        return str(_C.cpu_plan(which, 1, 64, 64, 56, 56, dtype))

    _C.set_conv_algo("auto")
    assert "AMX" in plan("bfloat16")
    assert "AMX" in plan("bfloat16", "grad_input")
    assert "AMX" in plan("bfloat16", "grad_weight")
    assert "AMX" not in plan("float32") + plan("float16")
    _C.set_conv_algo("winograd")
    assert "winograd" in plan("bfloat16")
    _C.set_conv_algo("direct")
    assert "AMX" in plan("bfloat16")
    _C.set_cpu_isa("avx512")
    assert "AMX" not in plan("bfloat16")
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16, got 'float64'"):
        plan("float64")


def test_explain_names_it(amx: str) -> None:
    model = vgg11(num_classes=10).to(BF16)
    told = str(explain(model, torch.rand(1, 3, 64, 64, dtype=BF16)))
    assert f"cpu {amx} direct on AMX tiles" in told
    with torch.autocast("cpu", BF16):
        assert f"cpu {amx} direct on AMX tiles" in str(explain(model.float(), torch.rand(1, 3, 64, 64)))


def test_denormals_are_zero() -> None:
    """The instruction takes them for zero, with any setting of the processor's flags; torch's kernels use it, too."""
    x, weight = torch.full((1, 40, 8, 8), 2.0**-130, dtype=BF16), torch.zeros(40, 40, 3, 3, dtype=BF16)
    weight[range(40), range(40), 1, 1] = 1
    assert float(x.max()) > 0
    assert not ops.conv3x3(x, weight).any()
    assert not ops.conv3x3(x * 0 + 1, weight * 2.0**-130).any()


def test_registers_and_emulation_agree() -> None:
    if "amx" not in AMX_FORMS:
        pytest.skip("this CPU has no AMX to compare its emulation with")
    for shape in ((2, 64, 48, 9, 14), (1, 3, 64, 18, 33), (1, 300, 16, 5, 16)):
        x, weight, bias = problem(*shape, BF16)
        _C.set_cpu_isa("amx")
        real = ops.conv3x3(x, weight, bias, relu=False)
        _C.set_cpu_isa("amx_emulated")
        emulated = ops.conv3x3(x, weight, bias, relu=False)
        different = (real != emulated).double().mean()
        assert different < 1e-3  # sums that fall to another side when they are rounded
        assert float((real - emulated).float().norm() / real.float().norm()) < 1e-4


def test_threads_and_torchs_own_use_of_the_registers() -> None:
    """The shape of the registers belongs to a thread; each call sets it, and leaves none behind."""
    torch.set_num_threads(1)
    x, weight, bias = problem(1, 48, 40, 9, 11, BF16)
    few = problem(1, 3, 40, 9, 21, BF16)
    a, b = normal(64, 96, dtype=BF16), normal(96, 80, dtype=BF16, seed=1)
    expected = ops.conv3x3(x, weight, bias), ops.conv3x3(*few), a @ b
    wrong: list[int] = []

    def work() -> None:
        for i in range(40):
            got = ops.conv3x3(x, weight, bias), a @ b, ops.conv3x3(*few), a @ b
            if not all(map(torch.equal, got, (expected[0], expected[2], expected[1], expected[2]))):
                wrong.append(i)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_emulation_is_never_chosen_by_itself() -> None:
    switches.set_cpu_isa("auto")
    assert switches.cpu_isa() != "amx_emulated"
    assert switches.cpu_isas()[-1] == "amx_emulated"
