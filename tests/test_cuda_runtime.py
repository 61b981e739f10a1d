"""What surrounds the ops on a GPU, as on a CPU: memory, streams, graphs, autocast, torch.compile, whole models, training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from on_device import ALL_DTYPES, busy_stream, captured, check, gradient_for, kernel, relative, to
from reference import WINOGRAD_BOUND, assert_same_bits, composition, gradients, normal, problem
from torch import Tensor, nn

import vggfast
from vggfast import ops, switches
from vggfast.cuda_plan import NOT_PROVEN

# ---- memory, repeatability, streams ---------------------------------------------------------------------------------


def saved_bytes(leaves: list[Tensor], **flags: bool) -> list[int]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.conv3x3(*leaves, **flags)
    return sorted(t.numel() * t.element_size() for t in saved)


@ALL_DTYPES
def test_saved_memory(device: torch.device, dtype: torch.dtype) -> None:
    """Two bits an output element beside the pooled output; nothing of the activation before the pool."""
    leaves = to(device, *problem(2, 16, 8, 9, 11, dtype))
    kernel(device, *leaves, pool=True)
    size = leaves[0].element_size()
    x, weight, y = 2 * 16 * 9 * 11 * size, 8 * 16 * 9 * size, 2 * 8 * 4 * 5 * size
    assert saved_bytes(leaves, pool=True) == sorted([x, weight, y, 2 * 8 * 4 * 5 * 2 // 8])
    assert saved_bytes(leaves, pool=False) == sorted([x, weight, 2 * 8 * 9 * 11 * size])


def test_a_saved_argmax_may_come_back_at_any_address(device: torch.device) -> None:
    """As from a hook that keeps saved tensors in one buffer: its bytes are read two at a time."""
    leaves = to(device, *problem(2, 16, 24, 9, 11, torch.bfloat16))
    expected = gradients(ops.conv3x3(*leaves, pool=True), tuple(leaves))

    def shifted(t: Tensor) -> Tensor:
        if t.dtype != torch.uint8:
            return t
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    with torch.autograd.graph.saved_tensors_hooks(shifted, lambda t: t):
        y = ops.conv3x3(*leaves, pool=True)
    for ours, reference in zip(gradients(y, tuple(leaves)), expected, strict=True):
        assert_same_bits(ours, reference)


@ALL_DTYPES
def test_bits_repeat(device: torch.device, dtype: torch.dtype) -> None:
    leaves = to(device, *problem(3, 64, 72, 33, 35, dtype))
    for pool in (False, True):
        results = []
        for _ in range(4):
            y = ops.conv3x3(*leaves, pool=pool)
            results.append([y.detach(), *gradients(y, tuple(leaves))])
        for again in results[1:]:
            for first, other in zip(results[0], again, strict=True):
                assert_same_bits(other, first)


@pytest.mark.parametrize("c_in", [3, 16])
def test_everything_runs_on_the_current_stream(device: torch.device, c_in: int) -> None:
    leaves = to(device, *problem(4, c_in, 64, 32, 32, torch.bfloat16))
    y = ops.conv3x3(*leaves, pool=True)
    expected = [
        y.detach(),
        *gradients(y, tuple(leaves)),
        F.max_pool2d(leaves[0][:, :1].repeat(1, 16, 1, 1).detach(), 2),
    ]
    late = [torch.full_like(t, torch.nan) for t in leaves]
    with busy_stream(device):
        for t, leaf in zip(late, leaves, strict=True):
            t.copy_(leaf.detach())
        late = [t.requires_grad_() for t in late]
        y = ops.conv3x3(*late, pool=True)
        pooled = ops.max_pool2x2(late[0][:, :1].repeat(1, 16, 1, 1).detach())
        got = [y.detach(), *gradients(y, tuple(late)), pooled]
    if device.type == "cuda":
        torch.cuda.synchronize()
    for ours, reference in zip(got, expected, strict=True):
        assert_same_bits(ours, reference)


@pytest.mark.parametrize("c_in", [3, 64])
def test_graph_capture(device: torch.device, c_in: int) -> None:
    """Forward and backward, recorded once and replayed with other numbers."""
    leaves = to(device, *problem(2, c_in, 64, 16, 18, torch.bfloat16))

    def step() -> list[Tensor]:
        y = ops.max_pool2x2(ops.conv3x3(*leaves, pool=True))
        return [y.detach(), *gradients(y, tuple(leaves))]

    results, replay = captured(device, step)
    for seed in (20, 30):
        with torch.no_grad():
            for leaf, values in zip(leaves, problem(2, c_in, 64, 16, 18, torch.bfloat16, seed=seed), strict=True):
                leaf.copy_(values.to(device))
        replay()
        for ours, reference in zip(results, step(), strict=True):
            assert_same_bits(ours, reference)


@pytest.mark.parametrize("index", [0, 1])
def test_another_gpu_than_the_current_one(device: torch.device, index: int) -> None:
    if device.type == "cuda":
        if torch.cuda.device_count() <= index:
            pytest.skip(f"needs {index + 1} GPUs, found {torch.cuda.device_count()}")
        device = torch.device("cuda", index)
    leaves = to(device, *problem(2, 64, 64, 12, 12, torch.bfloat16))
    y = ops.conv3x3(*leaves, pool=True)
    assert y.device == leaves[0].device
    assert all(g.device == leaves[0].device for g in gradients(y, tuple(leaves)))
    check(device, *leaves, gradient_for(device, leaves[0], 64, True), relu=True, pool=True)  # type: ignore[arg-type]


def test_an_empty_batch(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, bias = to(device, *problem(0, 16, 24, 6, 8, dtype))
        y = ops.conv3x3(x, weight, bias, pool=True)
        assert y.shape == (0, 24, 3, 4)
        assert not any(bool(g.any()) for g in gradients(y, (x, weight, bias)))
        raw, argmax = torch.ops.vggfast.conv3x3(x.detach(), weight.detach(), None, True, True, True)
        assert (raw.shape, argmax.shape) == ((0, 24, 3, 4), (0, 3, 4, 6))
        assert torch.ops.vggfast.conv3x3_grad_input(raw, weight.detach(), raw, argmax, 6, 8).shape == x.shape
        assert not any(bool(g.any()) for g in torch.ops.vggfast.conv3x3_grad_weight(x.detach(), raw, raw, argmax))
        assert torch.ops.vggfast.max_pool2x2(x.detach(), True)[0].shape == (0, 16, 3, 4)


def test_more_than_2_31_elements(device: torch.device) -> None:
    """The last images of a batch are calculated as they are alone. On the CPU the batch is a small one."""
    images = 3
    if device.type == "cuda":
        images = (1 << 31) // (64 * 64 * 64) + 3
        free = torch.cuda.mem_get_info()[0]
        if free < 20 << 30:
            pytest.skip(f"needs 20 GiB of free GPU memory, found {free >> 30}")
    _, weight, _ = to(device, *problem(1, 64, 64, 1, 1, torch.bfloat16))
    last = normal(2, 64, 64, 64, dtype=torch.bfloat16).to(device, memory_format=torch.channels_last)
    x = torch.zeros(images, 64, 64, 64, dtype=torch.bfloat16, device=device).to(memory_format=torch.channels_last)
    x[-2:] = last
    results = []
    for batch in (last, x):
        leaf = batch.detach().requires_grad_()
        y = ops.conv3x3(leaf, weight, None, pool=True)
        grads = gradients(y, (leaf, weight))  # zeros elsewhere: images of zeros have dead ReLUs
        results.append([y[-2:].detach().clone(), grads[0][-2:].clone(), grads[1]])
        del y, grads, leaf
    for alone, in_batch in zip(*results, strict=True):
        assert float((in_batch.float() - alone.float()).norm()) <= 2**-8 * float(alone.float().norm())


# ---- what torch does around the ops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: torch.device, dtype: torch.dtype) -> None:
    x, weight, bias = to(device, *problem(2, 16, 24, 10, 12))
    with torch.autocast(device.type, dtype):
        kernel(device, x, weight, bias, pool=True)
        y = ops.conv3x3(x, weight, bias, pool=True)
    cast = to(device, *(t.to(dtype) for t in (x, weight, bias)))
    expected = ops.conv3x3(*cast, pool=True)
    assert_same_bits(y.detach(), expected.detach())
    for ours, reference in zip(gradients(y, (x, weight, bias)), gradients(expected, tuple(cast)), strict=True):
        assert_same_bits(ours, reference.float())


@pytest.mark.parametrize("c_in", [3, 16])
def test_compile(device: torch.device, c_in: int) -> None:
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(lambda *t: ops.conv3x3(*t, pool=True), fullgraph=True, backend=backend)
    for batch in (2, 3, 5):
        leaves = to(device, *problem(batch, c_in, 24, 10, 12, torch.bfloat16))
        y, expected = compiled(*leaves), ops.conv3x3(*leaves, pool=True)
        assert_same_bits(y.detach(), expected.detach())
        ours, theirs = gradients(y, tuple(leaves)), gradients(expected, tuple(leaves))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_opcheck(device: torch.device) -> None:
    leaves = to(device, *problem(2, 16, 24, 12, 12, torch.bfloat16))
    torch.library.opcheck(torch.ops.vggfast.conv3x3.default, (*leaves, True, True, True))
    torch.library.opcheck(torch.ops.vggfast.max_pool2x2.default, (leaves[0], True))
    x, weight, bias = (t.detach() for t in leaves)
    y, argmax = torch.ops.vggfast.conv3x3(x, weight, bias, True, True, True)
    torch.library.opcheck(torch.ops.vggfast.conv3x3_grad_input.default, (y, weight, y, argmax, 12, 12))
    torch.library.opcheck(torch.ops.vggfast.conv3x3_grad_weight.default, (x, y, y, argmax))
    torch.library.opcheck(torch.ops.vggfast.max_pool2x2_grad.default, (y, argmax, 12, 12))


def test_func_grad_and_double_backward(device: torch.device) -> None:
    leaves = to(device, *problem(2, 16, 24, 8, 9))

    def loss(function: Callable[..., Tensor], *t: Tensor, fused: bool) -> Tensor:
        return function(*t, relu=fused, pool=fused).sin().sum()

    fused = gradients(loss(ops.conv3x3, *leaves, fused=True), tuple(leaves))
    by_func = torch.func.grad(lambda *t: loss(ops.conv3x3, *t, fused=True), argnums=(0, 1, 2))(
        *(t.detach() for t in leaves)
    )
    recorded = torch.autograd.grad(loss(ops.conv3x3, *leaves, fused=True), leaves, create_graph=True)
    for a, b, c in zip(fused, by_func, recorded, strict=True):
        assert c.requires_grad
        assert max(relative(b, a), relative(c, a)) <= 3e-3  # the same decisions in torch's operations; TF32 on a GPU
    penalties = []
    for function in (ops.conv3x3, composition):  # without decisions, which TF32 may take otherwise in each
        first = torch.autograd.grad(loss(function, *leaves, fused=False), leaves, create_graph=True)
        penalties.append(gradients(sum(t.square().sum() for t in first), tuple(leaves)))  # type: ignore[arg-type]
    for a, b in zip(*penalties, strict=True):
        assert relative(a, b) <= 1e-2


@pytest.mark.parametrize(("c_in", "dtype"), [(12, torch.bfloat16), (16, torch.float64)])
def test_what_no_kernel_takes_is_torchs_own(device: torch.device, c_in: int, dtype: torch.dtype) -> None:
    leaves = to(device, *problem(2, c_in, 24, 8, 9, dtype))
    decision = ops.conv3x3_kernel(*leaves)
    if device.type == "cpu" and dtype == torch.bfloat16:
        assert decision.fused
        return
    assert (decision.fused, decision.kernel) == (False, "aten")
    assert ("channels" if c_in == 12 else "float64") in decision.reason
    assert_same_bits(ops.conv3x3(*leaves).detach(), composition(*leaves).detach())


def test_the_kernels_run_where_they_are_switched_on(device: torch.device) -> None:
    leaves = to(device, *problem(2, 16, 24, 8, 9, torch.bfloat16))
    kernel(device, *leaves)
    switches.set_cuda_plan("aten")
    decisions = ops.conv3x3_kernel(*leaves), ops.max_pool2x2_kernel(leaves[0])
    assert all(decision.fused == (device.type == "cpu") for decision in decisions)
    if device.type == "cuda":
        assert all(decision.reason == NOT_PROVEN for decision in decisions)
        assert_same_bits(ops.conv3x3(*leaves).detach(), composition(*leaves).detach())


# ---- whole models ---------------------------------------------------------------------------------------------------


def twins(device: torch.device, dtype: torch.dtype, **options: bool) -> tuple[vggfast.VGG, nn.Module, nn.Module]:
    """A VGG11, the same without fused runs, and that in float64."""
    torch.manual_seed(0)
    ours = vggfast.VGG11(num_classes=10, dropout=0.0, **options)
    ours.classifier = nn.Sequential(nn.Linear(512 * 49, 64), nn.ReLU(), nn.Linear(64, 10))
    ours = ours.to(device, dtype)
    plain = nn.Sequential(nn.Sequential(*ours.features), ours.avgpool, nn.Flatten(), ours.classifier)
    plain = copy.deepcopy(plain)
    return ours, plain, copy.deepcopy(plain).double()


@ALL_DTYPES
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_whole_model(device: torch.device, batch_norm: bool, dtype: torch.dtype) -> None:
    ours, plain, exact = (net.eval() for net in twins(device, dtype, batch_norm=batch_norm))
    x = normal(2, 3, 64, 64, dtype=dtype).to(device)
    explanation = vggfast.explain(ours, x)
    assert explanation.fused_convolutions == explanation.convolutions == 8
    assert all(row.kernel.startswith(device.type) for row in explanation.rows if row.fused)
    with torch.no_grad():
        y, by_torch, reference = ours(x), plain(x), exact(x.double())
        taps = ours.features[:6](x), plain[0][:6](x)
    # Eight layers round what they return: half as many roundings keep a lucky torch from deciding. TF32 has float16's bits.
    unit = torch.finfo(torch.float16 if device.type == "cuda" and dtype == torch.float32 else dtype).eps
    floor = max(4 * unit, 8 * WINOGRAD_BOUND)
    assert relative(y, reference) <= max(2 * relative(by_torch, reference), floor)
    assert taps[0].stride() == taps[1].stride()


@pytest.mark.parametrize("amp", [False, True])
def test_training_steps(device: torch.device, amp: bool) -> None:
    """Losses of some steps of SGD follow torch's, and the loss falls."""
    ours, plain, _ = twins(device, torch.float32)
    x, target = normal(8, 3, 32, 32).to(device), (torch.arange(8) % 10).to(device)
    losses: list[list[float]] = []
    for net in (ours, plain):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        losses.append([])
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(net(x).float(), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    for a, b in zip(*losses, strict=True):
        assert abs(a - b) <= 0.03 * losses[1][0], losses
