"""Bad input gets an error that says what was expected and what came; the interpreter survives all of it.

Damaged checkpoints are in test_weights.py and test_train.py, missing data in test_train.py and test_cli.py, models in test_models.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import CONFIGS, Config, assert_same_bits, normal
from torch import Tensor

from vggfast import _C, ops

RAW = torch.ops.vggfast
FOLDER = Path(__file__).parent
X, W, B = normal(2, 3, 8, 6), normal(5, 3, 3, 3), normal(5)
GRAD, POOLED = normal(2, 5, 8, 6), normal(2, 5, 4, 3)
ARGMAX = torch.zeros(2, 4, 3, 2, dtype=torch.uint8)


def in_a_process(*command: str, **environment: str) -> str:
    """The standard output of a Python that must end by itself, and well."""
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout


# ---- the public ops ---------------------------------------------------------------------------------------------------

SHAPE = r"\[5, 3, 5, 5\]"
PUBLIC: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x no tensor": (lambda: ops.conv3x3([1.0], W), TypeError, r"x: expected a torch\.Tensor, got list"),
    "weight no tensor": (lambda: ops.conv3x3(X, None), TypeError, r"weight: expected a torch\.Tensor, got NoneType"),
    "bias no tensor": (lambda: ops.conv3x3(X, W, 0.0), TypeError, r"bias: expected a torch\.Tensor, got float"),
    "numpy": (lambda: ops.conv3x3(X.numpy(), W), TypeError, r"x: expected a torch\.Tensor, got ndarray"),
    "5x5": (lambda: ops.conv3x3(X, normal(5, 3, 5, 5)), ValueError, rf"weight: expected \[C_out, C_in, 3, 3\], got {SHAPE}"),
    "weight of 3 dimensions": (lambda: ops.conv3x3(X, W[0]), ValueError, r"\[C_out, C_in, 3, 3\], got \[3, 3, 3\]"),
    "channels": (lambda: ops.conv3x3(normal(2, 4, 8, 6), W), RuntimeError, r"expected input\[2, 4, 8, 6\] to have 3 channels, but got 4"),
    "x of 2 dimensions": (lambda: ops.conv3x3(normal(8, 6), W), RuntimeError, r"(?i)expected 3D .*4D .*got input of size: \[8, 6\]"),
    "x of 5 dimensions": (lambda: ops.conv3x3(X[..., None], W), RuntimeError, r"got input of size: \[2, 3, 8, 6, 1\]"),
    "bias too long": (lambda: ops.conv3x3(X, W, normal(6)), RuntimeError, r"expected bias to be 1-dimensional with 5 elements.*\[6\]"),
    "bias of 2 dimensions": (lambda: ops.conv3x3(X, W, B[None]), RuntimeError, r"expected bias to be 1-dimensional.*\[1, 5\]"),
    # torch's own words, which are others where the CPU has no products of bfloat16
    "mixed dtypes": (lambda: ops.conv3x3(X.bfloat16(), W), RuntimeError, r"(?i)input type .*bfloat16.* weight type .*float.* should be the same|expected scalar type bfloat16 but found float"),
    "mixed dtype of bias": (lambda: ops.conv3x3(X, W, B.half()), RuntimeError, r"(?i)input type .*float.* bias type .*half.* should be the same"),
    "x sparse": (lambda: ops.conv3x3(X.to_sparse(), W), Exception, "(?i)sparse"),
    "weight sparse": (lambda: ops.conv3x3(X, W.to_sparse()), Exception, "(?i)sparse"),
    "too small to pool": (lambda: ops.conv3x3(X[:, :, :1], W, pool=True), RuntimeError, r"Given input size: \(5x1x6\)"),
    "empty image": (lambda: ops.conv3x3(X[:, :, :0], W, pool=True), RuntimeError, "(?i)size"),
    "pool of no tensor": (lambda: ops.max_pool2x2("x"), TypeError, r"x: expected a torch\.Tensor, got str"),
    "pool of one row": (lambda: ops.max_pool2x2(X[:, :, :1]), RuntimeError, r"Given input size: \(3x1x6\)"),
    "pool of 2 dimensions": (lambda: ops.max_pool2x2(X[0, 0]), RuntimeError, "3D or 4D .* tensor expected for input"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_ops_say_what_was_expected(name: str) -> None:
    call, kind, message = PUBLIC[name]
    with pytest.raises(kind, match=message):
        call()


def test_what_only_torch_takes_is_not_an_error() -> None:
    for x in (X.double(), X[0], X.to("meta"), X[:0]):
        like = {"device": x.device, "dtype": x.dtype}
        y, expected = ops.conv3x3(x, W.to(**like), B.to(**like), pool=True), F.max_pool2d(x, 2)
        assert y.shape[-2:] == ops.max_pool2x2(x).shape[-2:] == expected.shape[-2:]
        assert (y.dtype, y.device) == (x.dtype, x.device)
    assert (
        ops.conv3x3(X, W.to("meta")).device == F.conv2d(X, W.to("meta"), padding=1).device
    )  # torch takes meta for a fake


# ---- the raw ops ------------------------------------------------------------------------------------------------------

FORWARD = (True, False, False)
RAW_CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "x of 3 dimensions": (lambda: RAW.conv3x3(X[0], W, B, *FORWARD), r"x: expected \[N, C, H, W\], got \[3, 8, 6\]"),
    "no rows": (lambda: RAW.conv3x3(X[:, :, :0], W, B, *FORWARD), r"x: expected C, H, W of at least 1, got \[2, 3, 0, 6\]"),
    "float64": (lambda: RAW.conv3x3(X.double(), W.double(), None, *FORWARD), "expected float32, bfloat16 or float16, got Double"),
    "integers": (lambda: RAW.max_pool2x2(X.int(), False), "expected float32, bfloat16 or float16, got Int"),
    "channels": (lambda: RAW.conv3x3(X[:, :2], W, B, *FORWARD), r"x: expected 3 channels, as weight \[5, 3, 3, 3\] has, got \[2, 2, 8, 6\]"),
    "mixed dtypes": (lambda: RAW.conv3x3(X, W.half(), None, *FORWARD), "weight: expected the dtype of x, Float, got Half"),
    "bias": (lambda: RAW.conv3x3(X, W, normal(4), *FORWARD), r"bias: expected \[5\], got \[4\]"),
    "no filters": (lambda: RAW.conv3x3(X, W[:0], None, *FORWARD), r"weight: expected \[C_out, C_in, 3, 3\], got \[0, 3, 3, 3\]"),
    "5x5": (lambda: RAW.conv3x3(X, normal(5, 3, 5, 5), None, *FORWARD), rf"weight: expected \[C_out, C_in, 3, 3\], got {SHAPE}"),
    "sparse": (lambda: RAW.conv3x3(X.to_sparse(), W, None, *FORWARD), "SparseCPU"),
    "pool of one row": (lambda: RAW.conv3x3(X[:, :, :1], W, None, True, True, True), r"H and W of at least 2 to pool, got \[2, 3, 1, 6\]"),
    "max_pool2x2 of one column": (lambda: RAW.max_pool2x2(X[..., :1], True), r"H and W of at least 2 to pool, got \[2, 3, 8, 1\]"),
    "meta, dimensions": (lambda: RAW.conv3x3(X[0].to("meta"), W.to("meta"), None, *FORWARD), r"x: expected \[N, C, H, W\], got \[3, 8, 6\]"),
    "meta, channels": (lambda: RAW.conv3x3(X.to("meta"), W[:, :2].to("meta"), None, *FORWARD), r"weight: expected \[C_out, 3, 3, 3\]"),
    "height": (lambda: RAW.conv3x3_grad_input(GRAD, W, None, None, 9, 6), r"grad: expected height and width 9 x 6, got \[2, 5, 8, 6\]"),
    "negative height": (lambda: RAW.conv3x3_grad_input(GRAD, W, None, None, -8, 6), "expected height and width -8 x 6"),
    "huge height": (lambda: RAW.max_pool2x2_grad(POOLED, ARGMAX, 2**62, 6), rf"expected height and width {2**61} x 3"),
    "pooled height": (lambda: RAW.conv3x3_grad_input(POOLED, W, None, ARGMAX, 10, 6), r"expected height and width 5 x 3, got \[2, 5, 4, 3\]"),
    "one row": (lambda: RAW.max_pool2x2_grad(POOLED[:, :, :1], ARGMAX[:, :1], 1, 6), "expected height and width 0 x 3"),
    "y": (lambda: RAW.conv3x3_grad_input(GRAD, W, GRAD[:1], None, 8, 6), r"y: expected the size of grad, \[2, 5, 8, 6\], got \[1, 5, 8, 6\]"),
    "y's dtype": (lambda: RAW.conv3x3_grad_weight(X, GRAD, GRAD.half(), None), "y: expected the dtype of grad, Float, got Half"),
    "grad's dtype": (lambda: RAW.conv3x3_grad_weight(X, GRAD.half(), None, None), "grad: expected the dtype of x, Float, got Half"),
    "batch": (lambda: RAW.conv3x3_grad_weight(X, GRAD[:1], None, None), r"grad: expected batch 2, got \[1, 5, 8, 6\]"),
    "grad's channels": (lambda: RAW.conv3x3_grad_input(GRAD[:, :4], W, None, None, 8, 6), r"grad: expected 5 channels, got \[2, 4, 8, 6\]"),
    "no save_argmax": (lambda: RAW.conv3x3(X, W.clone().requires_grad_(), B, True, True, False)[0].sum().backward(), "expected save_argmax=True"),
    "pool, no save_argmax": (lambda: RAW.max_pool2x2(X.clone().requires_grad_(), False)[0].sum().backward(), "expected save_argmax=True"),
}  # fmt: skip
LINEAR = normal(3, 4), normal(5, 4), normal(5), normal(3, 5)  # x, weight, bias, and a gradient of the output
RAW_CALLS |= {
    "weight's dtype": (lambda: RAW.conv3x3_grad_input(GRAD, W.half(), None, None, 8, 6), "weight: expected the dtype of grad, Float, got Half"),
    "linear's bias": (lambda: RAW.linear(*LINEAR[:2], B.half(), False), "bias: expected the dtype of weight, Float, got Half"),
    "linear's y": (lambda: RAW.linear_grad_input(LINEAR[3], LINEAR[1], LINEAR[3].half()), "y: expected the dtype of grad, Float, got Half"),
    "rows of linear's y": (lambda: RAW.linear_grad_input(LINEAR[3], LINEAR[1], LINEAR[3][:2]), r"y: expected the size of grad, \[3, 5\], got \[2, 5\]"),
    "linear's grad": (lambda: RAW.linear_grad_weight(LINEAR[0], LINEAR[3].half(), None, False), "grad: expected the dtype of x, Float, got Half"),
    "rows of linear's grad": (lambda: RAW.linear_grad_weight(LINEAR[0], LINEAR[3][:2], None, False), r"grad: expected 3 rows, as x has, got \[2, 5\]"),
    "a gradient of 2^42 weights": (lambda: RAW.linear_grad_weight(*[normal(1, 1).expand(1, 2**21)] * 2, None, False), r"weight: expected at most \d+ elements, got \[1, 2097152\] outputs"),
    "an image of 2^41 elements": (lambda: RAW.max_pool2x2(normal(1, 1, 1, 1).expand(1, 2, 2**20, 2**20), False), r"x: expected at most \d+ elements, got \[1, 2, 1048576, 1048576\]"),
}  # fmt: skip
BAD_ARGMAX = {
    "dtype": ARGMAX.int(),
    "bool": ARGMAX.bool(),
    "too short": ARGMAX[:, :3],
    "one byte a pixel": ARGMAX[..., :1],
    "batch": ARGMAX[:1],
    "flat": ARGMAX.flatten(),
    "empty, as without save_argmax": torch.zeros(0, dtype=torch.uint8),
    "strided": torch.zeros(2, 4, 3, 4, dtype=torch.uint8)[..., ::2],
    "transposed": torch.zeros(2, 3, 4, 2, dtype=torch.uint8).transpose(1, 2),
    "expanded": torch.zeros(2, 4, 1, 2, dtype=torch.uint8).expand(2, 4, 3, 2),
}


@pytest.mark.parametrize("name", RAW_CALLS)
def test_raw_ops_say_what_was_expected(name: str) -> None:
    call, message = RAW_CALLS[name]
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        call()


@pytest.mark.parametrize("name", BAD_ARGMAX)
def test_an_argmax_that_does_not_fit_is_refused(name: str) -> None:
    argmax = BAD_ARGMAX[name]
    expected = (
        r"argmax: expected contiguous uint8 \[N, H/2, W/2, ceil\(C/4\)\] for grad \[2, 5, 4, 3\] on its device, got "
    )
    for call in (
        lambda: RAW.conv3x3_grad_input(POOLED, W, None, argmax, 8, 6),
        lambda: RAW.conv3x3_grad_weight(X, POOLED, None, argmax),
        lambda: RAW.max_pool2x2_grad(POOLED, argmax, 8, 6),
    ):
        with pytest.raises(RuntimeError, match=expected + r"\w+ " + re.escape(str(list(argmax.shape)))):
            call()


IMAGES = {"x": X, "weight": W, "bias": B, "grad": GRAD, "y": GRAD}
ROWS = dict(zip(("x", "weight", "bias", "grad"), LINEAR, strict=True)) | {"y": LINEAR[3]}
POOLS = {"x": X, "weight": W, "grad": POOLED, "y": POOLED, "argmax": ARGMAX}
READS: dict[str, tuple[dict[str, Tensor], tuple[str, ...], Callable[..., object]]] = {
    "conv3x3": (IMAGES, ("x", "weight", "bias"), lambda x, w, b: RAW.conv3x3(x, w, b, *FORWARD)),
    "grad_input": (POOLS, ("grad", "weight", "y", "argmax"), lambda *t: RAW.conv3x3_grad_input(*t, 8, 6)),
    "grad_weight": (POOLS, ("x", "grad", "y", "argmax"), RAW.conv3x3_grad_weight),
    "linear": (ROWS, ("x", "weight", "bias"), lambda *t: RAW.linear(*t, False)),
    "linear_grad_input": (ROWS, ("grad", "weight", "y"), RAW.linear_grad_input),
    "linear_grad_weight": (ROWS, ("x", "grad", "y"), lambda *t: RAW.linear_grad_weight(*t, False)),
    "max_pool": (POOLS, ("x",), lambda x: RAW.max_pool2x2(x, True)),
    "max_pool_grad": (POOLS, ("grad", "argmax"), lambda *t: RAW.max_pool2x2_grad(*t, 8, 6)),
}


def without_its_last_element(t: Tensor) -> Tensor:
    """`t` from the second element of a storage on, which was then made one element shorter than that needs."""
    storage = torch.cat([t.flatten()[:1], t.flatten()])
    view = storage[1:].view(t.shape)
    storage.untyped_storage().resize_(t.nbytes)
    return view


@pytest.mark.parametrize("name", READS)
def test_memory_that_is_no_longer_there_is_not_read(name: str) -> None:
    tensors, operands, call = READS[name]
    call(*(tensors[operand] for operand in operands))
    for short in operands:
        given = (without_its_last_element(tensors[o]) if o == short else tensors[o] for o in operands)
        with pytest.raises(RuntimeError, match=f"{short}: expected a storage of at least .* bytes"):
            call(*given)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_byte_is_a_valid_argmax(config: Config) -> None:
    """Whatever an argmax holds, also in the bits of channels that are not there, it names positions: nothing else is written."""
    config.use()
    argmax = torch.arange(256, dtype=torch.uint8).repeat_interleave(2).view(1, 1, 256, 2)
    grad = normal(1, 5, 1, 256, dtype=config.dtype)
    position = torch.stack([argmax >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)[..., :5].permute(0, 3, 1, 2)
    expected = torch.zeros(1, 5, 2, 512, dtype=config.dtype)
    for i in range(4):
        expected[:, :, i // 2 :: 2, i % 2 :: 2] = grad.where(position == i, 0)
    assert_same_bits(RAW.max_pool2x2_grad(grad, argmax, 2, 512), expected)
    weight, x = normal(5, 3, 3, 3, dtype=config.dtype), normal(1, 3, 2, 512, dtype=config.dtype)
    routed, plain = ((grad, argmax), (expected, None))
    for call in (
        lambda g, a: [RAW.conv3x3_grad_input(g, weight, None, a, 2, 512)],
        lambda g, a: RAW.conv3x3_grad_weight(x, g, None, a),
    ):
        for ours, reference in zip(call(*routed), call(*plain), strict=True):
            assert_same_bits(ours, reference)


# ---- the interpreter survives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_thousands_of_wrong_calls_end_in_python_errors(seed: int) -> None:
    """Shapes, dtypes, strides, layouts, devices and sizes at random; the public op fails exactly where torch does, in its words."""
    outcomes = json.loads(in_a_process(str(FOLDER / "raw_op_fuzz.py"), str(seed), "3000").splitlines()[-1])
    assert sum(outcomes.values()) == 3000
    assert outcomes["no error"] > 600
    assert outcomes["RuntimeError"] > 600


OUT_OF_MEMORY = """
import resource
import torch
from vggfast import _C, ops
torch.set_num_threads(2)
weight = torch.zeros(2, 3, 3, 3)
ops.conv3x3(torch.zeros(2, 3, 16, 16), weight)  # threads start, libraries load
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 27), used + (1 << 27)))
raised = 0
for algo in ("direct", "winograd"):
    _C.set_conv_algo(algo)
    for shape in ((1, 3, 1, 1 << 23), (1, 3, 8, 1 << 20), (1, 3, 1 << 12, 1 << 11), (1, 3, 1 << 14, 1 << 14)):
        x = torch.zeros(1).expand(shape)
        for call in (
            lambda: ops.conv3x3(x, weight, pool=x.shape[2] > 1),
            lambda: torch.ops.vggfast.conv3x3_grad_weight(x, torch.zeros(1).expand(1, 2, *x.shape[2:]), None, None),
        ):
            try:
                call()
            except RuntimeError as error:
                if "DefaultCPUAllocator: can't allocate memory" not in str(error):
                    raise
                raised += 1
print(raised)
"""


def test_running_out_of_memory_is_a_python_error() -> None:
    """Also where it happens on another thread; in torch's words, for which programs look that then take a smaller batch."""
    assert int(in_a_process("-c", OUT_OF_MEMORY).split()[-1]) >= 4


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1, 1), (1, 1, 1, 1, -1), (1, 0, 8, 8, 8), (1, 8, 8, 2**62, 8)], ids=str)
def test_plans_of_impossible_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    for which in ("forward", "grad_input", "grad_weight"):
        with pytest.raises(ValueError, match=r"sizes: expected 1 \.\.\. 2\^40, got "):
            _C.cpu_plan(which, *sizes)
    with pytest.raises(ValueError, match="expected forward, grad_input or grad_weight, got 'sideways'"):
        _C.cpu_plan("sideways", 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "sizes", [(1, 2**40, 1, 1, 2**40 - 2), (2**20, 8, 8, 2**20, 8), (1, 2**20, 2**20, 8, 8)], ids=str
)
def test_plans_of_tensors_that_no_memory_holds_are_refused(sizes: tuple[int, ...]) -> None:
    """Each size is possible, their products are not: in 64 bits they wrap, the first to a division by zero."""
    for which in ("forward", "grad_input", "grad_weight"):
        with pytest.raises(ValueError, match=r"sizes: expected tensors of at most 2\^40 elements, got "):
            _C.cpu_plan(which, *sizes)


@pytest.mark.parametrize(
    ("setter", "known"), [(_C.set_cpu_isa, "baseline"), (_C.set_conv_algo, "auto, winograd or direct")]
)
def test_unknown_switches_are_answered_with_the_known_ones(setter: Callable[[str], None], known: str) -> None:
    with pytest.raises(ValueError, match=rf"expected auto.*{known}.*got 'avx1024'|expected {known}, got 'avx1024'"):
        setter("avx1024")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_memory_that_only_looks_large(config: Config) -> None:
    """Strides of zero in every dimension of every operand, at sizes where reading past the one element would fault."""
    config.use()
    shapes = ((2, 5, 40, 33), (7, 5, 3, 3), (7,))
    one = [torch.ones(1, dtype=config.dtype).expand(shape) for shape in shapes]
    dense: list[Tensor] = [t.contiguous() for t in one]
    for pool in (False, True):
        assert_same_bits(ops.conv3x3(*one, pool=pool), ops.conv3x3(*dense, pool=pool))
    grad = torch.ones(1, dtype=config.dtype).expand(2, 7, 40, 33)
    ours = [
        RAW.conv3x3_grad_input(grad, one[1], grad, None, 40, 33),
        *RAW.conv3x3_grad_weight(one[0], grad, grad, None),
    ]
    grad = grad.contiguous()
    theirs = [
        RAW.conv3x3_grad_input(grad, dense[1], grad, None, 40, 33),
        *RAW.conv3x3_grad_weight(dense[0], grad, grad, None),
    ]
    for got, expected in zip(ours, theirs, strict=True):
        assert_same_bits(got, expected)
