"""Which kernel every layer of a model takes on a given input, and why not a faster one."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vggfast import ops
from vggfast.cuda_plan import HOW_TO_BUILD, Gpu, build_obstacle
from vggfast.dispatch import switched_on
from vggfast.fused import Executed, FusedSequential, observer
from vggfast.runs import geometry_obstacle, operands

__all__ = ["Explanation", "Row", "explain"]

_POOLS = tuple(
    getattr(nn, f"{kind}Pool{n}d") for kind in ("Max", "Avg", "LP", "AdaptiveMax", "AdaptiveAvg") for n in (1, 2, 3)
)
_LISTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.ReLU, *_POOLS)
_OUTSIDE = (nn.modules.conv._ConvNd, nn.Linear, *_POOLS)  # what is listed of layers in no FusedSequential
_SHORT = {nn.BatchNorm2d: "BatchNorm", nn.MaxPool2d: "MaxPool"}


@dataclass(frozen=True)
class Row:
    """One layer, or one run of layers that is a single op.

    `name` is the layer's as in `model.named_modules()`, "features.0..2" for a run of children 0 to 2; `input` and
    `output` are shapes; `kernel` is "aten" where torch's own operators run; `reason` says why the kernel is this one,
    and why the run is not longer, where there is something to say.
    """

    name: str
    layers: str
    dtype: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    kernel: str
    fused: bool
    reason: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """The rows of `explain`, in the order of execution. `str()` is a table, `text()` fits a terminal, `to_dict()` is ready for JSON.

    `gpu` is the GPU that they tell of, where that is not the device the model is on; `cuda_plan` the switch they assume there.
    """

    rows: tuple[Row, ...]
    gpu: Gpu | None = None
    cuda_plan: str = "sm80"

    @property
    def convolutions(self) -> int:
        """How many rows begin with a convolution."""
        return sum(row.layers.startswith("Conv") for row in self.rows)

    @property
    def fused_convolutions(self) -> int:
        """How many of them run on a fused kernel."""
        return sum(row.layers.startswith("Conv") and row.fused for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Keys `rows` (one dict per row), `convolutions`, `fused_convolutions` and `gpu`; shapes are lists."""
        rows = [asdict(row) | {"input": list(row.input), "output": list(row.output)} for row in self.rows]
        return {
            "rows": rows,
            "convolutions": self.convolutions,
            "fused_convolutions": self.fused_convolutions,
            "gpu": None if self.gpu is None else str(self.gpu),
        }

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__  # what a notebook and a Python prompt show

    def text(self, width: int | None = None) -> str:
        """A table; where that has lines longer than `width`, the kernel and the reason come on lines of their own."""
        if not self.rows:
            return "No convolution, pooling or linear layer ran."
        lines = _aligned([("name", "layers", "dtype", "input", "output", "kernel", "why"), *map(_cells, self.rows)])
        longest = max(map(len, lines))
        if width is not None and longest > width:
            lines = self._paragraphs(width)
        else:
            lines.insert(1, "-" * longest)
        where = "" if self.gpu is None else f" on a GPU of {self.gpu}, with VGGFAST_CUDA_PLAN={self.cuda_plan}"
        lines.append(f"{self.fused_convolutions} of {self.convolutions} convolutions run on fused kernels{where}.")
        return "\n".join(lines)

    def _paragraphs(self, width: int) -> list[str]:
        lines = []
        heads = _aligned(
            [(name, layers, f"{x} -> {y}", dtype) for name, layers, dtype, x, y, *_ in map(_cells, self.rows)]
        )
        for row, head in zip(self.rows, heads, strict=True):
            why = ": ".join(filter(None, (row.kernel, row.reason)))
            lines += [head, *textwrap.wrap(why, width, initial_indent="    ", subsequent_indent="    ")]
        return lines


def _cells(row: Row) -> tuple[str, ...]:
    shapes = ("x".join(map(str, shape)) for shape in (row.input, row.output))
    return (row.name, row.layers, row.dtype, *shapes, row.kernel, row.reason)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A line for each row, its cells below those of the others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def explain(model: nn.Module, *inputs: Any, gpu: str | None = None) -> Explanation:
    """Run `model(*inputs)` and say for each convolution, pooling and linear layer which kernel it took, and why.

    What ran is what is reported: the model's modes, hooks and the current autocast count. Parameters, buffers (also
    BatchNorm's statistics in training mode), gradients, random number generators and inputs stay as they are; hooks of
    the model do run. Compiled models run uncompiled. The model runs once; a second time where layers of a
    `FusedSequential` turn out to be called one by one, to find those.

    `gpu`, as in "8.0,108", asks for the kernels of a GPU of that compute capability and number of SMs: those of
    VGGFAST_CUDA_PLAN, or of "sm80" where the kernels are switched off. The model still runs where it is; no GPU is
    needed, but a build with nvcc is. In training mode the kernels of both gradients follow each convolution on a GPU.

    Raises ValueError where `gpu` is not of that form, or this build has no CUDA kernels; TypeError where `model` is not
    an `nn.Module`, or is a TorchScript one, whose layers cannot be watched; and whatever the model itself raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: a TorchScript module runs torch's own operators; explain the model that it was made of")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    target = None if gpu is None else Gpu.parse(gpu)
    if target is not None and (obstacle := build_obstacle()):
        raise ValueError(f"gpu: {obstacle}. {HOW_TO_BUILD}")
    inside = {id(child) for m in model.modules() if isinstance(m, FusedSequential) for child in m.children()}
    leaves = {id(m): m for m in model.modules() if isinstance(m, _OUTSIDE)}
    watched = [m for key, m in leaves.items() if key not in inside]
    rows, seen = _watch(model, inputs, watched, target)
    missed = [m for key, m in leaves.items() if key in inside and key not in seen]
    if missed:
        rows, _ = _watch(model, inputs, watched + missed, target)
    return Explanation(tuple(rows), target, switched_on())


def _watch(
    model: nn.Module, inputs: Sequence[Any], watched: Sequence[nn.Module], gpu: Gpu | None
) -> tuple[list[Row], set[int]]:
    """The rows of one run with hooks on the `watched` layers, and the ids of all children that were executed."""
    names = {id(module): name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    rows: list[Row] = []
    seen: set[int] = set()

    def executed(step: Executed) -> None:
        seen.update(map(id, step.modules))
        if step.run is not None or isinstance(step.modules[0], _LISTED):
            # Not the module's own name: it may stand at several places.
            within = names.get(id(step.modules[0]), "").rpartition(".")[0]
            name = ".".join(filter(None, (within, step.names[0])))
            name += f"..{step.names[-1]}" if len(step.names) > 1 else ""
            rows.append(_row_inside(name, step, gpu))
            if model.training and (gpu is not None or (isinstance(step.x, Tensor) and step.x.is_cuda)):
                rows.extend(_rows_backward(name, step, rows[-1], gpu))

    def called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reason = _reason_outside(module, parents.get(id(module)))
        rows.append(_row(names[id(module)], _label(module), args[0] if args else None, output, reason=reason))

    with ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(called).remove)
        token = observer.set(executed)
        stack.callback(observer.reset, token)
        stack.enter_context(_without_traces(model, inputs))
        copies = pytree.tree_map_only(Tensor, torch.clone, tuple(inputs))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.func.functional_call(model, buffers, copies)
    return rows, seen


@contextmanager
def _without_traces(model: nn.Module, inputs: Sequence[Any]) -> Iterator[None]:
    """No gradients, no compilation, and the random number generators as before on leaving."""
    tensors = [*model.parameters(), *(t for t in pytree.tree_leaves(tuple(inputs)) if isinstance(t, Tensor))]
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        yield


def _row_inside(name: str, step: Executed, gpu: Gpu | None) -> Row:
    layers = " + ".join(map(_label, step.modules))
    if step.run is None:
        return _row(name, layers, step.x, step.y, reason=step.reason or _reason_inside(step.modules[0]))
    if step.run.op == "max_pool2x2":
        decision = ops.max_pool2x2_kernel(step.x, gpu=gpu)
    elif step.run.op == "linear":
        decision = ops.linear_kernel(step.x, *operands(step.run), gpu=gpu)
    else:
        relu, pool = step.run.relu is not None, step.run.pool is not None
        decision = ops.conv3x3_kernel(step.x, *operands(step.run), relu=relu, pool=pool, gpu=gpu)
    reasons = [decision.reason, f"the next layer stays out: {step.reason}" if step.reason else ""]
    return _row(name, layers, step.x, step.y, decision.kernel, decision.fused, "; ".join(filter(None, reasons)))


def _rows_backward(name: str, step: Executed, forward: Row, gpu: Gpu | None) -> Iterator[Row]:
    """The kernels of both gradients of a fused convolution: one may be torch's where the other is not."""
    if step.run is None or step.run.op != "conv3x3" or not forward.fused:
        return
    for which in ("grad_input", "grad_weight"):
        pool = step.run.pool is not None
        decision = ops.conv3x3_kernel(step.x, *operands(step.run), pool=pool, step=which, gpu=gpu)
        yield _row(name, which, step.y, step.x, decision.kernel, decision.fused, decision.reason)


def _row(name: str, layers: str, x: Any, y: Any, kernel: str = "aten", fused: bool = False, reason: str = "") -> Row:
    first = y[0] if isinstance(y, tuple) else y  # a pool that also returns indices
    dtype = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else ""
    return Row(name, layers, dtype, _shape(x), _shape(first), kernel, fused, reason)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _label(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"Linear {module.in_features}->{module.out_features}"
    if not isinstance(module, nn.modules.conv._ConvNd):
        return _SHORT.get(type(module), type(module).__name__)
    kernel = "x".join(map(str, module.kernel_size))
    what = "ConvTranspose" if module.transposed else "Conv"
    label = f"{what}{kernel} {module.in_channels}->{module.out_channels}"
    ones = (1,) * len(module.kernel_size)
    for setting, usual in (("stride", ones), ("dilation", ones), ("groups", 1)):
        if (value := getattr(module, setting)) != usual:
            label += f" {setting} {value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value}"
    return label


def _reason_inside(module: nn.Module) -> str:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return "uses the batch's statistics"
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.ReLU)):
        return "no convolution directly before it is fused"
    return _no_kernel(module)


def _reason_outside(module: nn.Module, parent: nn.Module | None) -> str:
    if type(module) is not nn.Conv2d:
        return _no_kernel(module)
    if reason := geometry_obstacle(module, module.weight):
        return reason
    if type(parent) is nn.Sequential:
        return "in a plain nn.Sequential: vggfast.convert(model) fuses it"
    if isinstance(parent, FusedSequential):
        return "called on its own: call the FusedSequential, or a slice of it"
    if isinstance(parent, nn.Sequential):
        return f"in a {type(parent).__name__}: vggfast.convert leaves subclasses of nn.Sequential alone"
    return "not in an nn.Sequential: vggfast.ops.conv3x3 can be called in its place"


def _no_kernel(module: nn.Module) -> str:
    if type(module) is nn.MaxPool2d:
        return "only a 2x2 pool in a FusedSequential has a fused kernel"
    return f"no fused kernel for {type(module).__name__}"
