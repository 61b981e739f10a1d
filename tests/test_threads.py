"""How layers are shared out over threads: all of them find work, whatever their number, and it does not show in a single bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from reference import assert_same_bits, normal, problem

from vggfast import _C, ops
from vggfast.bench.layers import VGG16_LAYERS, Layer

BLOCKS = {"baseline": 8, "neon": 16, "avx2": 16, "avx512": 32, "amx_emulated": 32}  # output channels of a micro-kernel


def jobs(plan: str, block: int, layer: Layer, batch: int) -> int:
    """What a plan for a layer's forward pass cuts it into, from its description."""
    blocks, tiles = -(-layer.c_out // block), batch * (-(-layer.size // 4)) ** 2
    if found := re.match(r"direct, bands of (\d+) rows", plan):
        return batch * -(-layer.size // int(found[1]))
    if found := re.search(r"tile-fused, tiles (\d+):", plan):
        return -(-tiles // int(found[1]))
    if found := re.search(r"channels and tiles split, tiles \d+ in (\d+) parts:", plan):
        return blocks * int(found[1])
    assert "output channels split" in plan, plan
    return blocks


@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("batch", [1, 8])
def test_every_layer_of_vgg16_has_work_for_all_threads(isa: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for layer in VGG16_LAYERS:
        plan = _C.cpu_plan("forward", batch, layer.c_in, layer.c_out, layer.size, layer.size)
        assert jobs(plan, BLOCKS[isa], layer, batch) >= 0.75 * threads, f"{layer.name}, {threads} threads: {plan}"


# Groups of tiles, and bands of rows, that two threads share as they are, and sixteen get parts of.
@pytest.mark.parametrize(
    ("algo", "shape", "many"),
    [
        ("winograd", (1, 20, 72, 30, 29), "tiles split"),
        ("winograd", (1, 40, 130, 21, 22), "tiles split"),
        ("direct", (1, 7, 34, 37, 11), "bands of 2 rows"),
        ("direct", (1, 64, 3, 37, 11), "bands of 2 rows"),
    ],
)
def test_sixteen_threads_give_the_bits_of_one(isa: str, algo: str, shape: tuple[int, ...], many: str) -> None:
    _C.set_conv_algo(algo)
    n, c_in, c_out, h, w = shape
    x, weight, bias = problem(n, c_in, c_out, h, w, grad=True)
    grad = normal(n, c_out, h // 2, w // 2)
    results = {}
    for threads in (1, 2, 16):
        torch.set_num_threads(threads)
        assert (many in _C.cpu_plan("forward", *shape)) == (threads == 16)
        y = ops.conv3x3(x, weight, bias, pool=True)
        results[threads] = (y, *torch.autograd.grad(y, (x, weight, bias), grad))
    for threads in (2, 16):
        for got, expected in zip(results[threads], results[1], strict=True):
            assert_same_bits(got, expected)


CALLS = [
    ("ops.conv3x3(x, weight)", (64, 64, 112)),
    ("ops.conv3x3(x, weight)", (256, 512, 14)),
    ("torch.ops.vggfast.conv3x3_grad_weight(x, grad, y, None)", (64, 64, 112)),
    ("torch.ops.vggfast.conv3x3_grad_weight(x, grad, y, None)", (256, 512, 14)),  # sums that are kept once alone
]
# CPU time of this thread, and of all, over twenty calls.
SHARES = """
import resource, time, torch
from vggfast import ops
def whole():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
torch.set_num_threads(2)
c_in, c_out, size = {shape}
x, weight, grad = torch.rand(2, c_in, size, size), torch.rand(c_out, c_in, 3, 3), torch.rand(2, c_out, size, size)
with torch.inference_mode():
    y = ops.conv3x3(x, weight)
    def call():
        {call}
    for _ in range(3):
        call()
    before = time.thread_time(), whole()
    for _ in range(20):
        call()
print((time.thread_time() - before[0]) / (whole() - before[1]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: two threads would take turns")
@pytest.mark.parametrize("algo", ["winograd", "direct"])
@pytest.mark.parametrize(("call", "shape"), CALLS)
def test_two_threads_share_the_work(algo: str, call: str, shape: tuple[int, int, int]) -> None:
    """Waiting threads sleep there, so that only work takes CPU time; a call that is serial takes all of it in one thread."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "VGGFAST_CONV_ALGO": algo}
    code, shares = SHARES.format(call=call, shape=shape), []
    for _ in range(3):  # work is handed out as threads come for it: one may come late where others have its CPU
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        shares.append(float(done.stdout))
        if 0.15 < shares[-1] < 0.85:
            return
    raise AssertionError(f"the calling thread's shares of the CPU time: {shares}")


def test_calls_from_several_threads_at_once_do_not_meet() -> None:
    """Each calling thread has memory of its own, and torch's pool is shared."""
    problems = [problem(1, 16 + 8 * i, 40, 20 + i, 23, seed=i) for i in range(4)]
    alone = [ops.conv3x3(*p) for p in problems]
    wrong: list[str] = []

    def repeat(i: int) -> None:
        for _ in range(20):
            if not torch.equal(ops.conv3x3(*problems[i]), alone[i]):
                wrong.append(f"problem {i}")

    callers = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


SWITCHED = """
import sys, threading, torch
from vggfast import _C

sys.setswitchinterval(1e-6)
generator = torch.Generator().manual_seed(0)
made = [torch.randn(s, generator=generator) for s in ((1, 16, 9, 9), (16, 16, 3, 3), (1, 16, 9, 9))]
x, weight, grad = (t.bfloat16().to(memory_format=torch.channels_last) for t in made)
calls = (
    lambda: torch.ops.vggfast.conv3x3(x, weight, None, False, False, False)[0],
    lambda: torch.ops.vggfast.conv3x3_grad_input(grad, weight, None, None, 9, 9),
    lambda: torch.ops.vggfast.conv3x3_grad_weight(x, grad, None, None)[0],
)

def switch():
    while not done.is_set():
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)

expected, done = [call() for call in calls], threading.Event()
switcher = threading.Thread(target=switch)
switcher.start()
results = [[call() for turn in range(5000)] for call in calls]  # nothing else, which would give the other thread its turns
done.set()
switcher.join()
print(max(float((y - good).float().norm() / good.float().norm()) for ys, good in zip(results, expected) for y in ys))
"""


def test_a_switch_of_another_thread_does_not_reach_a_call_that_has_begun() -> None:
    """A plan for tile registers has no kernels in the other instruction sets: a call that took both would not survive it."""
    done = subprocess.run([sys.executable, "-c", SWITCHED], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"
    assert float(done.stdout) < 0.01


SMALL_STACKS = """
import torch
from vggfast import _C, ops
torch.set_num_threads(4)
for isa in _C.cpu_isas():
    _C.set_cpu_isa(isa)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, matrix = (
            torch.rand(*size, dtype=dtype, requires_grad=True)
            for size in ((2, 16, 40, 40), (64, 16, 3, 3), (256, 4096))
        )
        for algo in ("winograd", "direct"):
            _C.set_conv_algo(algo)
            ops.conv3x3(x, weight, pool=True).sum().backward()
        rows = torch.rand(16, 4096, dtype=dtype, requires_grad=True)
        ops.linear(rows, matrix).sum().backward()
"""


def test_threads_may_have_small_stacks() -> None:
    """Of 64 KB, with which torch's own layers run."""
    environment = {**os.environ, "OMP_STACKSIZE": "64k"}
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STACKS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"
