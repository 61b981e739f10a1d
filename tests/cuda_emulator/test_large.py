"""Tensors of more than 2^31 elements: only the blocks at the far end run, memory in between is never touched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cuda_emulator_harness import (
    Case,
    Emulator,
    EmulatorError,
    ForwardPointers,
    GradInputPointers,
    GradPreactPointers,
    GradWeightPointers,
    PoolPointers,
)
from cuda_reference import (
    convolution_gradients,
    convolve,
    grad_preact,
    make_inputs,
    make_saved,
    pool_in_torch_order,
    torch_like,
)

IMAGES = (1 << 31) // (8 * 8 * 512) + 8  # past 2^31 elements with the last eight images
HUGE = Case(IMAGES, 8, 8, 512, 8)


def far(address: int, case: Case, channels: int, images: int, *, pooled: bool = False) -> int:
    """Address of the last ``images`` of a tensor of ``case``."""
    pixels = case.h // 2 * (case.w // 2) if pooled else case.h * case.w
    return address + (case.n - images) * pixels * channels * case.dtype.itemsize


def test_forward_far_end(emulator: Emulator) -> None:
    """The last image of x lies past 2^31 elements."""
    emulator.reset(1)
    last = dataclasses.replace(HUGE, n=1)
    x, weight, bias = make_inputs(last)
    plan = emulator.retile(emulator.plan("forward", HUGE.problem), "m64n64", 64 * HUGE.n, HUGE.k)
    emulator.library.emu_run_last_blocks(1)
    inputs = emulator.allocate(HUGE.n * 64 * HUGE.c, HUGE.dtype, read_only=True)
    emulator.upload(x, far(inputs, HUGE, HUGE.c, 1))
    y = emulator.allocate(HUGE.n * 64 * HUGE.k, HUGE.dtype)
    arguments = ForwardPointers(inputs, emulator.upload(weight), emulator.upload(bias), y, None, 0, 0, 0, 0)
    emulator.call("emu_forward", HUGE.problem, plan, arguments)
    ours = emulator.download(far(y, HUGE, HUGE.k, 1), (1, 8, 8, HUGE.k), HUGE.dtype)
    expected = torch_like(x, weight, bias, True, HUGE.dtype)
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_first_layer_far_end(emulator: Emulator) -> None:
    """The last four images, a tile each, of x in NHWC: their pixels are found by strides."""
    emulator.reset(1)
    case = Case((1 << 31) // (8 * 8 * 3) // 4 * 4 + 8, 8, 8, 3, 8)
    last = dataclasses.replace(case, n=4)
    x, weight, bias = make_inputs(last)
    emulator.library.emu_run_last_blocks(1)
    inputs = emulator.allocate(case.n * 64 * 3, case.dtype, read_only=True)
    emulator.upload(x, far(inputs, case, 3, 4))
    y = emulator.allocate(case.n * 64 * case.k, case.dtype)
    arguments = ForwardPointers(inputs, emulator.upload(weight), emulator.upload(bias), y, None, 0, *x.stride())
    emulator.call("emu_forward", case.problem, emulator.plan("forward", case.problem), arguments)
    ours = emulator.download(far(y, case, case.k, 4), (4, 8, 8, case.k), case.dtype)
    torch.testing.assert_close(ours, torch_like(x, weight, bias, True, case.dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("pool", [False, True])
def test_outputs_far_end(emulator: Emulator, pool: bool) -> None:
    """The last image of y lies past 2^31 elements; with pool, that of the argmax past 2^31 bytes."""
    emulator.reset(1)
    case = Case(16 * IMAGES if pool else IMAGES, 8, 8, 8, 512, pool=pool)
    images = 4 if pool else 1
    x, weight, bias = make_inputs(dataclasses.replace(case, n=images))
    rows = 16 if pool else 64
    plan = emulator.retile(emulator.plan("forward", case.problem), "m64n64", 64 * case.n, case.k)
    emulator.library.emu_run_last_blocks(8)
    inputs = emulator.allocate(case.n * 64 * case.c, case.dtype, read_only=True)
    emulator.upload(x, far(inputs, case, case.c, images))
    y = emulator.allocate(case.n * rows * case.k, case.dtype)
    argmax = emulator.allocate(case.n * rows * case.k // 4, torch.uint8) if pool else None
    arguments = ForwardPointers(inputs, emulator.upload(weight), emulator.upload(bias), y, argmax, 0, 0, 0, 0)
    emulator.call("emu_forward", case.problem, plan, arguments)
    expected = torch_like(x, weight, bias, True, case.dtype)[-1:]
    if pool:
        expected = pool_in_torch_order(expected)[0]
        emulator.download(argmax + (case.n - 1) * rows * case.k // 4, (rows, case.k // 4), torch.uint8)  # was written
    ours = emulator.download(far(y, case, case.k, 1, pooled=pool), tuple(expected.shape), case.dtype)
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("relu", "pool"), [(False, False), (True, False), (True, True)])
def test_grad_input_far_end(emulator: Emulator, relu: bool, pool: bool) -> None:
    """Through registers, and where there is nothing to mask by asynchronous copies."""
    emulator.reset(1)
    case = Case(4 * IMAGES if pool else IMAGES, 8, 8, 8, 512, relu=relu, pool=pool)
    last = dataclasses.replace(case, n=1)
    _, weight, _ = make_inputs(last)
    saved = make_saved(last)
    pixels = 16 if pool else 64
    plan = emulator.retile(emulator.plan("grad_input", case.problem), "m64n64", 64 * case.n, case.c)
    emulator.library.emu_run_last_blocks(1)
    grad, y = (emulator.allocate(case.n * pixels * case.k, case.dtype, read_only=True) for _ in range(2))
    emulator.upload(saved.grad, far(grad, case, case.k, 1, pooled=pool))
    if saved.y is not None:
        emulator.upload(saved.y, far(y, case, case.k, 1, pooled=pool))
    codes = None
    if pool:
        codes = emulator.allocate(case.n * pixels * case.k // 4, torch.uint8, read_only=True)
        emulator.upload(saved.argmax, codes + (case.n - 1) * pixels * case.k // 4)
    out = emulator.allocate(case.n * 64 * case.c, case.dtype)
    emulator.call("emu_grad_input", case.problem, plan, GradInputPointers(grad, y, codes, emulator.upload(weight), out))
    ours = emulator.download(far(out, case, case.c, 1), (1, 8, 8, case.c), case.dtype)
    exact = convolve(grad_preact(last, saved), weight.flip(1, 2).transpose(0, 3), None, False, torch.float64)
    torch.testing.assert_close(ours.double(), exact, rtol=0.02, atol=0.02)


def test_grad_weight_far_end(emulator: Emulator) -> None:
    """The last split alone, of 32 pixels: the lower half of the last image."""
    emulator.reset(1)
    case = dataclasses.replace(HUGE, relu=False)
    last = dataclasses.replace(case, n=1)
    x, weight, _ = make_inputs(last)
    saved = make_saved(last)
    plan = emulator.plan("grad_weight", case.problem)
    plan.splits = case.n * 64 // 32
    emulator.library.emu_run_last_blocks(plan.tiles_m * plan.tiles_n)
    inputs = emulator.allocate(case.n * 64 * case.c, case.dtype, read_only=True)
    emulator.upload(x, far(inputs, case, case.c, 1))
    grad = emulator.allocate(case.n * 64 * case.k, case.dtype, read_only=True)
    emulator.upload(saved.grad, far(grad, case, case.k, 1))
    elements = 9 * case.c * case.k + case.k
    workspace = emulator.allocate(plan.splits * elements, torch.float32)
    out, out_bias = emulator.allocate(9 * case.c * case.k, case.dtype), emulator.allocate(case.k, case.dtype)
    arguments = GradWeightPointers(grad, None, None, inputs, workspace, out, out_bias)
    with pytest.raises(EmulatorError, match=r"grad_weight reduction: .*uninitialised"):  # splits that did not run
        emulator.call("emu_grad_weight", case.problem, plan, arguments)
    ours = emulator.download(workspace + (plan.splits - 1) * elements * 4, (elements,), torch.float32)
    saved.grad[:, :4] = 0
    _, exact, exact_bias = convolution_gradients(saved.grad, x, weight, torch.float64)
    torch.testing.assert_close(ours.double(), torch.cat([exact.flatten(), exact_bias]), rtol=1e-5, atol=1e-4)


def test_pointwise_far_end(emulator: Emulator) -> None:
    emulator.reset(1)
    case = Case(4 * IMAGES, 8, 8, 8, 512, pool=True, relu=False)  # the pooled tensors too
    last = dataclasses.replace(case, n=1)
    saved = make_saved(last)
    emulator.library.emu_run_last_blocks(32)
    grad = emulator.allocate(case.n * 16 * case.k, case.dtype, read_only=True)
    codes = emulator.allocate(case.n * 16 * case.k // 4, torch.uint8, read_only=True)
    emulator.upload(saved.grad, far(grad, case, case.k, 1, pooled=True))
    emulator.upload(saved.argmax, codes + (case.n - 1) * 16 * case.k // 4)
    out = emulator.allocate(case.n * 64 * case.k, case.dtype)
    emulator.call("emu_grad_preact", case.problem, GradPreactPointers(grad, None, codes, out))
    full = grad_preact(last, saved)
    assert torch.equal(emulator.download(far(out, case, case.k, 1), tuple(full.shape), case.dtype), full)

    emulator.reset(1)
    emulator.library.emu_run_last_blocks(16)
    x = torch.randn(1, 8, 8, 512).to(case.dtype)
    inputs = emulator.allocate(case.n * 64 * case.k, case.dtype, read_only=True)
    emulator.upload(x, far(inputs, case, case.k, 1))
    y = emulator.allocate(case.n * 16 * case.k, case.dtype)
    emulator.call("emu_max_pool2x2", dataclasses.replace(case, c=512).problem, PoolPointers(inputs, y, None))
    ours = emulator.download(far(y, case, case.k, 1, pooled=True), (1, 4, 4, case.k), case.dtype)
    assert torch.equal(ours, pool_in_torch_order(x)[0])


def test_quotients_up_to_2_31(emulator: Emulator) -> None:
    """Where a multiplication in place of a division would first be wrong: around multiples of the divisor, the large ones above all."""
    largest = 2**31 - 1
    powers = [2**k + offset for k in range(1, 31) for offset in (-1, 0, 1)]
    for divisor in {*range(1, 300), *powers, 224, 14 * 14, 12345677, largest}:
        multiples = {0, divisor, largest // 2 // divisor * divisor, largest // divisor * divisor}
        for n in {m + offset for m in multiples for offset in (-1, 0, 1)} | {largest}:
            if 0 <= n <= largest:
                assert emulator.library.emu_quotient(n, divisor) == n // divisor, (n, divisor)
