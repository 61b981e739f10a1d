"""ops.linear: numbers against float64, torch's answers everywhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_bits, gradients, integers, normal
from torch import Tensor

from vggfast import dispatch, ops

RAW = torch.ops.vggfast
LARGE = (1100, 1000)  # out, in: just enough weights for the kernel


def composition(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.relu(y) if relu else y


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values in other memory, whose remaining elements are NaN."""
    if kind == "contiguous":
        return t.clone()
    if kind == "transposed":
        return t.t().contiguous().t()
    if kind == "expanded":
        return t[:1].clone().expand(t.shape)
    wide = torch.full((t.shape[0], 2 * t.shape[1] + 3), float("nan"), dtype=t.dtype)
    window = wide[:, 3 : 3 + t.shape[1]] if kind == "sliced" else wide[:, 1 : 2 * t.shape[1] : 2]
    window.copy_(t)
    return window


@pytest.mark.parametrize(
    ("rows", "columns", "outputs"),
    [
        *((1, 1, 1), (1, 16, 24), (2, 40, 7), (3, 17, 50), (4, 700, 13), (5, 33, 97), (6, 1030, 5), (7, 64, 26)),
        *((8, 2100, 49), (9, 31, 12), (11, 90, 61), (13, 48, 100), (15, 19, 3), (16, 1500, 52), (3, 20, 5000)),
    ],
    ids=str,
)
def test_error_is_at_most_twice_torchs(isa: str, rows: int, columns: int, outputs: int) -> None:
    for relu, with_bias in itertools.product((False, True), repeat=2):
        x, weight = normal(rows, columns, seed=1), normal(outputs, columns, seed=2) / columns**0.5
        bias = normal(outputs, seed=3) if with_bias else None
        grad = normal(rows, outputs, seed=4)
        results = []
        for dtype in (torch.float32, torch.float32, torch.float64):
            leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, bias)]
            if not results:
                y = RAW.linear(*leaves, relu)
                decisions = (y.detach() > 0).double() if relu else 1.0
            else:
                y = F.linear(*leaves)
                y = (y * decisions).to(dtype) if dtype == torch.float64 else (F.relu(y) if relu else y)
            results.append([y.detach(), *gradients(y, tuple(leaves), grad.to(dtype))])
        for ours, theirs, exact in zip(*results, strict=True):
            # Both sums of one or two products round once, at random; torch's may be exact by luck.
            assert error(ours, exact) <= max(2 * error(theirs, exact), 2.0**-23), (relu, with_bias)


def test_sums_of_small_integers_have_torchs_bits(isa: str) -> None:
    for rows, relu in itertools.product((1, 3, 8, 16), (False, True)):
        leaves = [integers(*size, seed=i, grad=True) for i, size in enumerate(((rows, 333), (101, 333), (101,)))]
        y, expected = RAW.linear(*leaves, relu), composition(*leaves, relu)
        assert_same_bits(y.detach() + 0, expected.detach() + 0, "y")
        grad = integers(rows, 101, seed=9)
        for ours, theirs in zip(
            gradients(y, tuple(leaves), grad), gradients(expected, tuple(leaves), grad), strict=True
        ):
            assert_same_bits(ours + 0, theirs + 0, "gradient")


MIXED = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
MIXED += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("dtype", "weight_dtype"), MIXED, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rows", [1, 3, 8, 11, 16])
def test_sixteen_bits_are_the_exact_result_rounded_once(
    isa: str, rows: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    for relu, (columns, outputs) in itertools.product((False, True), ((333, 101), (1, 5), (2050, 7), (48, 96))):
        x = integers(rows, columns, dtype=dtype, seed=1, grad=True)
        weight = integers(outputs, columns, dtype=weight_dtype, seed=2, grad=True)
        bias = integers(outputs, dtype=weight_dtype, seed=3, grad=True)
        exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        y, plain = RAW.linear(x, weight, bias, relu), composition(*exact, relu)
        assert_same_bits(y.detach() + 0, plain.detach().to(dtype) + 0, "y")
        grad = integers(rows, outputs, seed=9)
        ours, theirs = gradients(y, (x, weight, bias), grad.to(dtype)), gradients(plain, tuple(exact), grad.double())
        for got, expected, leaf in zip(ours, theirs, (x, weight, bias), strict=True):
            assert_same_bits(got + 0, expected.to(leaf.dtype) + 0, "gradient")


@pytest.mark.parametrize(("dtype", "weight_dtype"), MIXED, ids=lambda d: str(d).removeprefix("torch."))
def test_error_of_sixteen_bits_is_at_most_twice_torchs(isa: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    rows, columns, outputs = 7, 3000, 130
    x, bias = normal(rows, columns, dtype=dtype, seed=1), normal(outputs, dtype=weight_dtype, seed=3)
    weight, grad = (
        (normal(outputs, columns, seed=2) / columns**0.5).to(weight_dtype),
        normal(rows, outputs, dtype=dtype),
    )
    results = []
    for kind in (None, dtype, torch.float64):
        leaves = [(t if kind is None else t.to(kind)).clone().requires_grad_() for t in (x, weight, bias)]
        y = RAW.linear(*leaves, False) if kind is None else F.linear(*leaves)
        results.append([y.detach(), *gradients(y, tuple(leaves), grad.to(kind or dtype))])
    assert [t.dtype for t in results[0]] == [dtype, dtype, weight_dtype, weight_dtype]
    for ours, theirs, exact in zip(*results, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact)


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "expanded", "sliced", "every other"])
def test_any_strides(isa: str, kind: str) -> None:
    x, weight, grad, y = (
        strided(integers(*size, seed=i), kind) for i, size in enumerate(((5, 70), (23, 70), (5, 23), (5, 23)))
    )
    bias = integers(46)[::2]
    assert torch.equal(RAW.linear(x, weight, bias, False), F.linear(x, weight, bias))
    assert torch.equal(RAW.linear(x, weight[:1], None, False), F.linear(x, weight[:1]))
    masked = torch.where(y <= 0, 0.0, grad)
    assert torch.equal(RAW.linear_grad_input(grad, weight, y), masked @ weight)
    grad_weight, grad_bias = RAW.linear_grad_weight(x, grad, y, False)
    assert torch.equal(grad_weight, masked.t() @ x)
    assert torch.equal(grad_bias, masked.sum(0))
    sixteen = [strided(t.bfloat16(), kind) for t in (x, weight, grad, y)]  # of the values that are in them, exact too
    assert torch.equal(RAW.linear(*sixteen[:2], bias.bfloat16(), False), F.linear(x, weight, bias).bfloat16())
    assert torch.equal(RAW.linear_grad_input(sixteen[2], *sixteen[1::2]), (masked @ weight).bfloat16())
    assert torch.equal(RAW.linear_grad_weight(sixteen[0], *sixteen[2:], True)[0], masked.t() @ x)


def test_nan_infinity_and_negative_zero(isa: str) -> None:
    x = torch.ones(2, 20)
    weight = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1.0, -1.0]).view(6, 1).repeat(1, 20)
    for relu in (False, True):
        assert torch.equal(
            RAW.linear(x, weight, None, relu).nan_to_num(7.0), composition(x, weight, None, relu).nan_to_num(7.0)
        )
    assert torch.signbit(RAW.linear(x, weight, None, True)[0, 3]) == torch.signbit(
        composition(x, weight, None, True)[0, 3]
    )
    y = RAW.linear(x, weight, None, True)
    assert torch.equal(
        RAW.linear_grad_input(torch.ones(2, 6), torch.eye(6), y), (~(y <= 0)).float()
    )  # NaN lets it through


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_stays_one_in_fewer_bits(isa: str, dtype: torch.dtype) -> None:
    """Of a float32 weight with all bits set: rounded as a number it would be -0."""
    weight = torch.ones(3, 20)
    weight[1, 5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = torch.ops.vggfast.linear(torch.ones(2, 20, dtype=dtype), weight, None, False)
    assert y.isnan().tolist() == [[False, True, False]] * 2


def test_bits_do_not_depend_on_threads_or_on_the_run(isa: str) -> None:
    x, weight, grad = normal(8, 3000), normal(200, 3000, seed=1), normal(8, 200, seed=2)
    runs = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        runs.append(
            [
                RAW.linear(x, weight, None, True),
                RAW.linear_grad_input(grad, weight, None),
                *RAW.linear_grad_weight(x, grad, None, False),
            ]
        )
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


# ---- the public op ---------------------------------------------------------------------------------------------------


def large(rows: int = 2, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return normal(rows, LARGE[1], grad=grad), normal(*LARGE, seed=1, grad=grad), normal(LARGE[0], seed=2, grad=grad)


REFUSED = {
    "17 rows": lambda: large(17),
    "float64": lambda: tuple(t.double() for t in large()),
    "few weights": lambda: (normal(2, 1000), normal(1000, 1000), None),
    "three dimensions": lambda: (normal(2, 2, LARGE[1]), normal(*LARGE), None),
    "one dimension": lambda: (normal(LARGE[1]), normal(*LARGE), None),
    "no rows": lambda: large(0),
    "transposed weight": lambda: (normal(2, LARGE[0]), normal(*LARGE).t(), None),
    "meta": lambda: tuple(t.to("meta") for t in large()),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_kernel_is_torchs(kind: str) -> None:
    arguments = REFUSED[kind]()
    decision = ops.linear_kernel(*arguments)
    assert (decision.kernel, decision.fused) == ("aten", False)
    assert decision.reason
    y, expected = ops.linear(*arguments, relu=True), composition(*arguments, True)
    assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
    assert y.is_meta or torch.equal(y, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((normal(2, 3), normal(4, 5)), "shapes cannot be multiplied"),
        ((normal(2, 3), normal(4, 3).double()), "same dtype"),
        ((normal(2, LARGE[1]).bfloat16(), normal(*LARGE)), "same dtype"),
    ],
)
def test_torchs_errors(arguments: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.linear(*arguments)
    with pytest.raises(TypeError, match=r"weight: expected a torch\.Tensor, got list"):
        ops.linear(normal(2, 3), [1.0])  # type: ignore[arg-type]


def test_autograd_of_every_kind() -> None:
    shapes = ((3, LARGE[1]), LARGE, LARGE[:1])
    x, weight, bias = (integers(*shape, seed=i, grad=True) for i, shape in enumerate(shapes))  # no decision is near
    loss = ops.linear(x, weight, bias, relu=True).square().sum()
    plain = composition(x, weight, bias, True).square().sum()
    first = torch.autograd.grad(loss, (x, weight, bias), create_graph=True)
    for ours, theirs in zip(first, torch.autograd.grad(plain, (x, weight, bias), create_graph=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    second = torch.autograd.grad(first[0].square().sum(), (weight, x))
    again = torch.autograd.grad(plain, x, create_graph=True)[0].square().sum()
    for ours, theirs in zip(second, torch.autograd.grad(again, (weight, x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    functional = torch.func.grad(lambda w: ops.linear(x, w, bias, relu=True).square().sum())(weight)
    torch.testing.assert_close(functional, first[1].detach(), rtol=1e-5, atol=1e-4)
    assert ops.linear_kernel(x, weight, bias).fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_reads_float32_weights_as_they_are(dtype: torch.dtype, kept: torch.dtype) -> None:
    x, weight, bias = (t.to(kept).requires_grad_() for t in large(3))
    with torch.autocast("cpu", dtype):
        y, plain = ops.linear(x, weight, bias), composition(x, weight, bias, False)
        decision = ops.linear_kernel(x, weight, bias)
    assert (y.dtype, plain.dtype, decision.fused) == (dtype, dtype, True)
    read = weight if kept == torch.float32 else weight.to(dtype)
    exact = composition(x.detach().to(dtype).double(), read.detach().double(), bias.detach().double(), False)
    assert error(y.detach(), exact) <= 2 * error(plain.detach(), exact)
    grad = normal(3, LARGE[0], dtype=dtype)
    for ours, theirs, leaf in zip(
        gradients(y, (x, weight, bias), grad), gradients(plain, (x, weight, bias), grad), (x, weight, bias), strict=True
    ):
        assert ours.dtype == theirs.dtype == leaf.dtype
        assert error(ours, theirs.double()) < 0.01


def test_functional_gradients_under_autocast() -> None:
    x, weight, bias = large(3)
    image, filters = normal(2, 16, 8, 8), normal(16, 16, 3, 3) / 12

    def losses(w: Tensor, f: Tensor) -> tuple[Tensor, ...]:
        ours = ops.linear(x, w, bias, relu=True), ops.conv3x3(image, f)
        plain = composition(x, w, bias, True), F.relu(F.conv2d(image, f, padding=1))
        return tuple(sum(y.float().square().sum() for y in ys) for ys in (ours, plain))

    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (torch.func.grad(lambda w, f, i=i: losses(w, f)[i], (0, 1))(weight, filters) for i in (0, 1))
    for got, expected in zip(ours, plain, strict=True):
        assert got.dtype == expected.dtype == torch.float32
        assert error(got, expected.double()) < 0.01


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]) -> None:
    leaves = [t.requires_grad_(need) for t, need in zip(large(), needs, strict=True)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.linear(*leaves, relu=True)
    assert any(t.shape == LARGE for t in saved) == needs[0]  # the weights only for the input's gradient
    y.sum().backward()
    expected = [t.detach().requires_grad_(t.requires_grad) for t in leaves]
    composition(*expected, True).sum().backward()
    for ours, theirs in zip(leaves, expected, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


def test_the_bound_of_the_rows_is_that_of_the_kernels() -> None:
    x, weight = normal(dispatch.LINEAR_ROWS + 1, 8), normal(8, 8)
    assert RAW.linear(x[:-1], weight, None, False).shape == (dispatch.LINEAR_ROWS, 8)
    with pytest.raises(RuntimeError, match=f"expected at most {dispatch.LINEAR_ROWS} rows of 8"):
        RAW.linear(x, weight, None, False)
