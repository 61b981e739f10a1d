"""What the ops promise beside their numbers: exact sums, bits that repeat, little saved memory, every combination of gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from reference import (
    ALGOS,
    CONFIGS,
    CONFIGS_FP32,
    DTYPES,
    LAYOUTS,
    SUBNORMAL,
    UNIT,
    Config,
    assert_same_bits,
    check_against_float64,
    composition,
    gradients,
    integers,
    normal,
    pool_positions,
    problem,
)
from torch import Tensor
from vgg_layers import VGG16_LAYERS, Layer

from vggfast import _C, ops

EPILOGUES = list(itertools.product([False, True], repeat=2))
CHANNELS = {(layer.c_in, layer.c_out): layer for layer in VGG16_LAYERS}


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.algo == "direct"], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 70, 11, 13), (1, 17, 5, 8, 6), (3, 33, 40, 7, 2), (1, 1, 1, 1, 1)], ids=str)
def test_direct_sums_of_small_integers_have_torchs_bits(config: Config, shape: tuple[int, ...]) -> None:
    """Nothing rounds before the store and ties are everywhere: outputs, decisions and gradients must be torch's exactly."""
    config.use()
    n, c_in, c_out, h, w = shape
    for relu, pool in EPILOGUES if h > 1 else [(False, False), (True, False)]:
        x, weight = (
            integers(n, c_in, h, w, grad=True, dtype=config.dtype),
            integers(c_out, c_in, 3, 3, grad=True, dtype=config.dtype),
        )
        bias = integers(c_out, dtype=config.dtype, grad=True)
        y, expected = (
            ops.conv3x3(x, weight, bias, relu=relu, pool=pool),
            composition(x, weight, bias, relu=relu, pool=pool),
        )
        assert_same_bits(y.detach(), expected.detach(), "y")
        grad = integers(*y.shape, dtype=config.dtype, seed=9)
        inputs = (
            (x, weight, bias) if config.dtype == torch.float32 else (x, weight)
        )  # torch adds up 16-bit biases in 16 bits
        for name, ours, theirs in zip(
            "xwb", gradients(y, inputs, grad), gradients(expected, inputs, grad), strict=False
        ):
            assert_same_bits(ours + 0, theirs + 0, f"grad {name}")  # + 0: an empty sum may be either zero


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.dtype != torch.float32], ids=str)
def test_16_bit_results_are_the_fp32_results_rounded_once(config: Config) -> None:
    config.use()
    for pool in (False, True):
        narrow = [t.detach().requires_grad_() for t in problem(2, 24, 37, 10, 9, config.dtype)]
        wide = [t.detach().float().requires_grad_() for t in narrow]
        y, fp32 = ops.conv3x3(*narrow, relu=False, pool=pool), ops.conv3x3(*wide, relu=False, pool=pool)
        grad = normal(*y.shape, dtype=config.dtype)
        pairs = [(y, fp32)]
        if not pool:  # a pool takes its decisions after rounding
            pairs += zip(gradients(y, tuple(narrow), grad), gradients(fp32, tuple(wide), grad.float()), strict=True)
        for ours, exact in pairs:
            unit = UNIT[config.dtype] * exact.abs() + SUBNORMAL[config.dtype]
            # Compilers may fuse the transforms' operations differently for each type, which moves fp32 by a few of its own units.
            assert ((ours.float() - exact).abs() <= unit * (1 + 2**-6) + 2**-20 * exact.abs().max()).all()


@pytest.mark.parametrize("layer", CHANNELS.values(), ids=lambda layer: layer.name)
def test_every_channel_pair_of_vgg16(isa: str, layer: Layer) -> None:
    """With the plan that is taken by default, where sums are longest; images are cropped to what a test can wait for."""
    size = min(layer.size, 12)
    x, weight, bias = problem(2, layer.c_in, layer.c_out, size, size, grad=True)
    algo = "winograd" if "winograd" in ops.conv3x3_kernel(x, weight, bias).kernel else "direct"
    y = composition(x, weight, bias, pool=layer.pool)
    check_against_float64(x, weight, bias, normal(*y.shape), relu=True, pool=layer.pool, algo=algo)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_every_operand(config: Config, layout: str) -> None:
    """One operand at a time has the layout, so that each of the 17 is certainly met by each operand."""
    config.use()
    for c_in, c_out, operand in ((3, 20, 0), (18, 20, 0), (18, 20, 1), (18, 20, 2)):
        x, weight, bias = problem(2, c_in, c_out, 7, 6, config.dtype)
        grad = normal(2, c_out, 3, 3, dtype=config.dtype)
        x, weight, grad = (LAYOUTS[layout](t) if i == operand else t for i, t in enumerate((x, weight, grad)))
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        check_against_float64(*leaves, grad, relu=True, pool=True, algo=config.algo)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_pixels_as_far_apart_as_there_are_channels(config: Config, channels: int) -> None:
    """Their distance is that of channels_last memory, the channels' is not."""
    config.use()
    x = normal(2, channels, 8, 6 * channels, dtype=config.dtype)[..., ::channels]
    _, weight, bias = problem(2, channels, 20, 8, 6, config.dtype)
    assert x.stride(3) == channels
    grad = normal(2, 20, 8, 6, dtype=config.dtype)
    found, expected = (
        (ops.conv3x3(t, weight, bias), *torch.ops.vggfast.conv3x3_grad_weight(t, grad, None, None))
        for t in (x, x.contiguous())
    )
    for got, one in zip(found, expected, strict=True):
        assert_same_bits(got, one)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "layout", ["sliced rows of channels_last", "every other pixel", "sliced channels of channels_last"]
)
def test_a_gradient_and_its_mask_in_different_layouts(config: Config, layout: str) -> None:
    """Inside the image and with whole vectors of channels, too."""
    config.use()
    x, weight, _ = problem(1, 20, 32, 13, 14, config.dtype)
    grad, y = (normal(1, 32, 13, 14, dtype=config.dtype, seed=seed) for seed in (3, 4))
    raw, results = torch.ops.vggfast, []
    for g, mask in ((grad, y), (LAYOUTS[layout](grad), y), (grad, LAYOUTS[layout](y))):
        results.append(
            [raw.conv3x3_grad_input(g, weight, mask, None, 13, 14), *raw.conv3x3_grad_weight(x, g, mask, None)]
        )
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_same_bits(got, expected)


# ---- repeatability --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 40, 40, 50), (1, 48, 130, 9, 9), (5, 3, 16, 21, 18)], ids=str)
def test_bits_repeat_from_run_to_run_and_for_any_number_of_threads(config: Config, shape: tuple[int, ...]) -> None:
    config.use()
    leaves = problem(*shape, config.dtype, grad=True)  # type: ignore[misc]
    for pool in (False, True):
        results = []
        for threads in (1, 2, 3, 16, 2):  # 16: more than grad_weight has parts and ranges
            torch.set_num_threads(threads)
            y = ops.conv3x3(*leaves, pool=pool)
            results.append([y.detach(), *gradients(y, leaves, normal(*y.shape, dtype=config.dtype))])
        for again in results[1:]:
            for first, other in zip(results[0], again, strict=True):
                assert_same_bits(other, first)


# ---- what is saved, and for whom ------------------------------------------------------------------------------------


def saved_bytes(leaves: list[Tensor], **flags: bool) -> list[int]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.conv3x3(*leaves, **flags)
    return sorted(t.numel() * t.element_size() for t in saved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_memory(dtype: torch.dtype) -> None:
    """A pooled call saves two bits an output element beside its output; nothing is saved of the activation before the pool."""
    leaves = [t.requires_grad_() for t in problem(2, 6, 8, 9, 11, dtype)]
    size = leaves[0].element_size()
    x, weight = 2 * 6 * 9 * 11 * size, 8 * 6 * 9 * size
    full, pooled = 2 * 8 * 9 * 11 * size, 2 * 8 * 4 * 5 * size
    argmax = 2 * 8 * 4 * 5 * 2 // 8
    assert saved_bytes(leaves, relu=True, pool=True) == sorted([x, weight, pooled, argmax])
    assert saved_bytes(leaves, relu=False, pool=True) == sorted([x, weight, argmax])
    assert saved_bytes(leaves, relu=True) == sorted([x, weight, full])
    assert saved_bytes(leaves, relu=False) == sorted([x, weight])
    leaves[0].requires_grad_(False)
    assert saved_bytes(leaves, relu=True, pool=True) == sorted([x, pooled, argmax])
    with torch.no_grad():
        assert saved_bytes(leaves, relu=True, pool=True) == []


def test_a_pool_alone_saves_two_bits_an_element() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.max_pool2x2(normal(2, 6, 9, 11, grad=True))
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 2 * 4 * 5 * 2)]


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize(("relu", "pool"), EPILOGUES)
def test_gradients_only_where_wanted(wanted: tuple[bool, ...], relu: bool, pool: bool) -> None:
    leaves = problem(2, 5, 7, 6, 8)
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    y, expected = ops.conv3x3(*leaves, relu=relu, pool=pool), composition(*leaves, relu=relu, pool=pool)
    assert y.requires_grad == any(wanted)
    if not any(wanted):
        return
    y.square().sum().backward()
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf, theirs in zip(inputs, gradients(expected.square().sum(), tuple(inputs)), strict=True):
        torch.testing.assert_close(leaf.grad, theirs)
    assert all(leaf.grad is None for leaf in leaves if not leaf.requires_grad)


@pytest.mark.parametrize(("relu", "pool"), EPILOGUES)
@pytest.mark.parametrize("target", ["x", "weight", "bias", "y"])
def test_changing_a_saved_tensor_in_place_is_refused_where_torch_refuses(target: str, relu: bool, pool: bool) -> None:
    def refused(function) -> bool:  # type: ignore[no-untyped-def]
        leaves = dict(zip(("x", "weight", "bias"), problem(2, 5, 7, 6, 8, grad=True), strict=True))
        tensors = {name: t * 1 for name, t in leaves.items()}  # in-place changes of leaves are refused anyway
        y = function(*tensors.values(), relu=relu, pool=pool)
        result = y.mul_(2) if target == "y" else y
        if target != "y":
            tensors[target].add_(1)
        message = ""
        try:
            result.sum().backward()
        except RuntimeError as error:
            message = str(error)
        assert message == "" or "modified by an inplace operation" in message
        return message != ""

    # torch's pool saves its input, not its output; a fused pool with ReLU needs the output, which is refused, not wrong.
    assert refused(ops.conv3x3) == (refused(composition) or (target == "y" and relu and pool))


# ---- derivatives of derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relu", "pool"), EPILOGUES)
def test_gradcheck_in_float64(relu: bool, pool: bool) -> None:
    leaves = problem(1, 2, 3, 4, 5, torch.float64, grad=True)

    def call(*t: Tensor) -> Tensor:
        return ops.conv3x3(*t, relu=relu, pool=pool)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(ops.max_pool2x2, leaves[:1])


@pytest.mark.parametrize("config", CONFIGS_FP32, ids=str)
@pytest.mark.parametrize(("relu", "pool"), EPILOGUES)
def test_gradient_penalty(config: Config, relu: bool, pool: bool) -> None:
    """Second derivatives of the fused op against torch's in float64, through every operand."""
    config.use()

    def penalty(function, dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [t.to(dtype).requires_grad_() for t in problem(2, 16, 18, 8, 9)]
        y = function(*leaves, relu=relu, pool=pool)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        assert all(t.requires_grad for t in first)
        return gradients(sum(t.square().sum() for t in first), tuple(leaves))  # type: ignore[arg-type]

    for ours, exact in zip(penalty(ops.conv3x3, torch.float32), penalty(composition, torch.float64), strict=True):
        assert float((ours.double() - exact).norm()) <= 2e-5 * float(
            exact.norm()
        )  # sin' and two passes add to each other


@pytest.mark.parametrize("pool", [False, True])
def test_a_gradient_penalty_has_a_gradient_wherever_torchs_has_one(pool: bool) -> None:
    """Zeros for a bias, which only decides where ReLU cuts off, not None, for which `torch.autograd.grad` has an error."""
    for function in (composition, ops.conv3x3):
        x, weight, bias = (t.requires_grad_() for t in problem(2, 5, 6, 8, 9))
        (first,) = torch.autograd.grad(function(x, weight, bias, relu=True, pool=pool).sum(), x, create_graph=True)
        again = torch.autograd.grad(first.square().sum(), (x, weight, bias))
        assert [bool(t.any()) for t in again] == [False, True, False]


def test_double_backward_of_a_pool() -> None:
    def second(function) -> Tensor:  # type: ignore[no-untyped-def]
        x = normal(2, 5, 7, 6, grad=True)
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        return gradients(first.pow(2).sum(), (x,))[0]

    assert_same_bits(second(ops.max_pool2x2), second(lambda x: F.max_pool2d(x, 2)))


# ---- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("pool", [False, True])
def test_results_are_channels_last_and_shaped_as_torchs(algo: str, pool: bool) -> None:
    _C.set_conv_algo(algo)
    for shape in ((2, 5, 7, 6, 9), (1, 4, 1, 5, 5), (3, 2, 9, 2, 3)):
        leaves = problem(*shape, grad=True)
        y, expected = ops.conv3x3(*leaves, pool=pool), composition(*leaves, pool=pool)
        assert y.shape == expected.shape
        assert y.stride() == torch.empty_like(y, memory_format=torch.channels_last).stride()
        for ours, leaf in zip(gradients(y, leaves), leaves, strict=True):
            assert ours.shape == leaf.shape
            assert ours.dtype == leaf.dtype


def test_an_empty_batch_has_empty_results_and_zero_gradients() -> None:
    for relu, pool in EPILOGUES:
        x, weight, bias = problem(0, 5, 7, 6, 8, grad=True)
        y = ops.conv3x3(x, weight, bias, relu=relu, pool=pool)
        assert y.shape == composition(x, weight, bias, relu=relu, pool=pool).shape
        grads = gradients(y, (x, weight, bias))
        assert [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]
        assert not any(g.any() for g in grads)
    x = torch.empty(0, 3, 8, 8)
    assert ops.max_pool2x2(x).shape == (0, 3, 4, 4)
    raw, argmax = torch.ops.vggfast.conv3x3(x, normal(7, 3, 3, 3), None, True, True, True)
    assert (raw.shape, argmax.shape) == ((0, 7, 4, 4), (0, 4, 4, 2))
    assert torch.ops.vggfast.conv3x3_grad_input(raw, normal(7, 3, 3, 3), raw, argmax, 8, 8).shape == x.shape
    for grad in torch.ops.vggfast.conv3x3_grad_weight(x, raw, raw, argmax):
        assert not grad.any()


# Of the second, whole tiles end at the odd row and column, which no window holds, and groups of tiles begin beside that row.
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("n", "h", "w"), [(2, 9, 10), (1, 13, 61)])
def test_gradients_routed_inside_the_kernels_are_those_of_routed_gradients(
    config: Config, n: int, h: int, w: int
) -> None:
    """A gradient kernel that applies the mask or the argmax itself gives the bits it gives for the gradient they lead to."""
    config.use()
    x, weight, bias = problem(n, 20, 37, h, w, config.dtype)
    for pool in (False, True):
        y, argmax = torch.ops.vggfast.conv3x3(x, weight, bias, True, pool, pool)
        grad = normal(*y.shape, dtype=config.dtype)
        masked = grad.where(~(y <= 0), 0)
        full = masked
        if pool:
            unpooled = ops.conv3x3(x, weight, bias)
            _, index = F.max_pool2d(unpooled, 2, return_indices=True)
            assert_same_bits(pool_positions(unpooled)[0], y)
            full = F.max_unpool2d(masked.float(), index, 2, output_size=x.shape[2:]).to(config.dtype)
        saved = (y, argmax if pool else None)
        raw = torch.ops.vggfast
        assert_same_bits(
            raw.conv3x3_grad_input(grad, weight, *saved, h, w), raw.conv3x3_grad_input(full, weight, None, None, h, w)
        )
        for ours, expected in zip(
            raw.conv3x3_grad_weight(x, grad, *saved), raw.conv3x3_grad_weight(x, full, None, None), strict=True
        ):
            assert_same_bits(ours, expected)
    assert not math.isnan(float(full.sum()))
