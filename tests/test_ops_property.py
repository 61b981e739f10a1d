"""Drawn cases: any shape, layout and incoming gradient gives torch's answer at torch's precision, forward and backward.

The cases are the same in every run: hypothesis draws them from a seed that belongs to the configuration.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from reference import (
    BIAS_LAYOUTS,
    CONFIGS,
    LAYOUTS,
    Config,
    assert_same_bits,
    check_against_float64,
    gradients,
    integers,
    normal,
    problem,
)

from vggfast import ops

CASES = 2000  # of the convolution, over all configurations
POOL_CASES = 300
BUDGET = 40_000  # n * c_in * c_out * h * w of a case


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    relu: bool
    pool: bool
    bias: str | None
    x: str
    weight: str
    grad: str
    values: str
    threads: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes come from a budget, so that no draw is thrown away: what channels leave over, the image may use."""
    c_in, c_out = draw(
        st.permutations([draw(st.integers(1, 130)), draw(st.one_of(st.integers(1, 20), st.integers(1, 130)))])
    )
    n = draw(st.integers(1, 3))
    area = max(BUDGET // (n * c_in * c_out), 1)
    h = draw(st.integers(1, min(area, 32)))
    w = draw(st.integers(1, max(min(area // h, 32), 1)))
    layout = st.sampled_from(sorted(LAYOUTS))
    return Case(
        *(n, c_in, c_out, h, w, draw(st.booleans()), draw(st.booleans()) and h > 1 and w > 1),
        *(draw(st.sampled_from([None, *BIAS_LAYOUTS])), draw(layout), draw(layout)),
        draw(st.sampled_from(["of a sum", *sorted(LAYOUTS)])),
        *(draw(st.sampled_from(["normal", "integers"])), draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 2**31))),
    )


def run_cases(count: int, name: str, strategy: st.SearchStrategy[Case], check: Callable[[Case], None]) -> None:
    """Runs ``check`` on ``count`` drawn cases, and fails if fewer were run to their end."""
    done = 0

    @hypothesis.seed(zlib.crc32(name.encode()))
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(strategy)
    def run(case: Case) -> None:
        nonlocal done
        check(case)
        done += 1

    run()
    assert done >= count, f"{name}: expected {count} cases, {done} ran"


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Everything torch.empty gives is NaN: an output or workspace that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)


def tensors(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    make = normal if case.values == "normal" else integers
    x, weight, bias = problem(case.n, case.c_in, case.c_out, case.h, case.w, dtype, seed=case.seed)
    if case.values == "integers":
        x, weight, bias = (integers(*t.shape, dtype=dtype, seed=case.seed + i) for i, t in enumerate((x, weight, bias)))
    size = (case.n, case.c_out, case.h // 2, case.w // 2) if case.pool else (case.n, case.c_out, case.h, case.w)
    if case.grad == "of a sum":
        grad = torch.ones((), dtype=dtype).expand(size)
    else:
        grad = LAYOUTS[case.grad](make(*size, dtype=dtype, seed=case.seed + 3))
    x, weight = LAYOUTS[case.x](x), LAYOUTS[case.weight](weight)
    bias = None if case.bias is None else BIAS_LAYOUTS[case.bias](bias).detach().requires_grad_()
    return x.detach().requires_grad_(), weight.detach().requires_grad_(), bias, grad


def spoil_scratch(dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that a thread keeps between calls, from a problem larger than the drawn ones."""
    x, weight, bias = problem(1, 40, 40, 48, 48, dtype)
    ops.conv3x3(torch.full_like(x, math.nan), weight, bias)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_conv3x3(config: Config) -> None:
    config.use()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        spoil_scratch(config.dtype)

    def check(case: Case) -> None:
        if torch.get_num_threads() != case.threads:
            torch.set_num_threads(case.threads)
        x, weight, bias, grad = tensors(case, config.dtype)
        assert ops.conv3x3_kernel(x, weight, bias, relu=case.relu, pool=case.pool).fused
        check_against_float64(x, weight, bias, grad, relu=case.relu, pool=case.pool, algo=config.algo)

    run_cases(math.ceil(CASES / len(CONFIGS)), str(config), cases(), check)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.algo == "direct"], ids=lambda c: f"{c.isa}-{c.dtype}")
def test_max_pool2x2(config: Config) -> None:
    """No arithmetic is involved: torch's bits, forward and backward."""
    config.use()

    def check(case: Case) -> None:
        make = normal if case.values == "normal" else integers
        x = LAYOUTS[case.x](make(case.n, case.c_in, case.h + 1, case.w + 1, dtype=config.dtype, seed=case.seed))
        x = x.detach().requires_grad_()
        y, expected = ops.max_pool2x2(x), F.max_pool2d(x, 2)
        assert_same_bits(y.detach(), expected.detach(), "y")
        grad = LAYOUTS[case.grad](normal(*y.shape, dtype=config.dtype)) if case.grad in LAYOUTS else None
        assert_same_bits(gradients(y, (x,), grad)[0], gradients(expected, (x,), grad)[0], "x.grad")

    configurations = len(CONFIGS) // 2
    run_cases(math.ceil(POOL_CASES / configurations), f"pool {config}", cases(), check)
