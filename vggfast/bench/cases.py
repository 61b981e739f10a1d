"""What is computed: a layer or a network, a task, a batch, a dtype; its random data, its float64 answer, its operations and bytes."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vggfast.models
from vggfast.bench import BenchError
from vggfast.bench.layers import CONFIGS, FULLY_CONNECTED, OTHER_LAYERS, VGG16_LAYERS, Layer, conv_layers

Task = Literal[
    "inference", "training", "lpips", "perceptual", "forward", "grad_input", "grad_weight", "forward+backward"
]
LOSSES: tuple[Task, ...] = ("lpips", "perceptual")  # on features; see bench.perceptual
LAYER_TASKS: tuple[Task, ...] = ("forward", "grad_input", "grad_weight", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDING = {**DTYPES, "tf32": torch.float16}  # whose eps is that of `Case.products`: TF32 has float16's mantissa
GIVEN = "given grad of y"  # in a layer's reference: the gradient that buffer 0 gets
OWN_ERROR = "torch's own error of "  # in the reference of a layer's gradients, and of a network's training in bfloat16
BUFFERS = 4  # inputs that are used in turn, so that none is still in a cache from the run before
GPU_BUFFERS = 2  # of a layer on a GPU, whose cache is overwritten before every run
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """``subject`` is vgg11 … vgg19, a layer of VGG16 (conv3_2), one of OTHER_LAYERS (64to12at112), or "module:function" that builds a network for [N, 3, size, size].

    dtype "bf16" is bfloat16 weights and activations for inference and layers, autocast for training. Training is forward,
    cross-entropy and backward, without the optimizer's step. "lpips" and "perceptual" are losses on features, of images beside
    targets, with the gradient of the images; dtypes as for training.
    """

    subject: str
    task: Task
    batch: int
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 2
    size: int = 224  # of a network's images; a layer has its own

    @property
    def id(self) -> str:
        return f"{self.subject} {self.task} {self.dtype} batch {self.batch}"

    @property
    def buffers(self) -> int:
        return GPU_BUFFERS if self.device == "cuda" and self.layer else BUFFERS

    @property
    def products(self) -> Literal["fp32", "bf16", "tf32"]:
        """What convolutions multiply in: float32 on a GPU is TF32, unless torch's setting forbids it."""
        return "tf32" if self.device == "cuda" and self.dtype == "fp32" else self.dtype

    @property
    def layer(self) -> Layer | None:
        return next((layer for layer in [*VGG16_LAYERS, *OTHER_LAYERS] if layer.name == self.subject), None)

    def with_dtype(self, dtype: Literal["fp32", "bf16"]) -> Case:
        return replace(self, dtype=dtype)

    def with_task(self, task: Task) -> Case:
        return replace(self, task=task)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def convolutions(self) -> list[Layer]:
        if self.layer:
            return [self.layer]
        return conv_layers(self.subject, self.size) if self.subject in CONFIGS else []

    def _passes(self, layer: Layer) -> int:
        """How often the task runs through a layer: forward, gradient of the input, of the filters. Images need no gradient."""
        passes = {"inference": 1, "forward": 1, "grad_input": 1, "grad_weight": 1}
        passes |= dict.fromkeys(LOSSES, 3)  # forward of images and of targets, and the images' gradient
        return passes.get(self.task, 2 if layer.c_in == 3 else 3)

    def gflop(self) -> float:
        """Operations in 1e9, convolutions counted as direct ones; 0 for a network that is not in the table."""
        convolutions = sum(self._passes(layer) * layer.gflop(self.batch) for layer in self.convolutions())
        if self.subject not in CONFIGS or self.task in LOSSES:
            return convolutions
        passes = 3 if self.task == "training" else 1
        return convolutions + passes * 2e-9 * self.batch * sum(i * o for i, o in FULLY_CONNECTED)

    def gigabytes(self) -> float:
        """Bytes in 1e9 that must be moved at least if every layer reads its input and filters once and writes its output once."""
        itemsize = DTYPES[self.dtype].itemsize
        convolutions = sum(self._passes(layer) * layer.gigabytes(self.batch, itemsize) for layer in self.convolutions())
        if self.subject not in CONFIGS or self.task in LOSSES:
            return convolutions
        passes = 3 if self.task == "training" else 1
        return convolutions + passes * 1e-9 * itemsize * sum(i * o for i, o in FULLY_CONNECTED)


def network(case: Case, weights: Path | None = None) -> nn.Module:
    """The network of ``case`` without dropout: with the weights of the file, else with new ones, biases random too."""
    if ":" in case.subject:
        module, function = case.subject.split(":")
        built: nn.Module = getattr(importlib.import_module(module), function)()
    elif case.subject in CONFIGS:
        torch.manual_seed(0)
        built = getattr(vggfast.models, case.subject)(dropout=0.0, init_weights=weights is None)
    else:
        raise BenchError(f"expected {', '.join(CONFIGS)}, a layer of VGG16 or module:function, got {case.subject}")
    if weights is not None:
        from safetensors.torch import load_file

        built.load_state_dict(load_file(weights))
    else:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in built.named_parameters():
            if name.endswith("bias"):  # they start as zeros, which would hide a contender that forgets them
                nn.init.normal_(parameter, std=0.05, generator=generator)
    return built.eval() if case.task == "inference" else built.train()


def save_weights(case: Case, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(network(case).state_dict(), path)


def images(case: Case, buffer: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + buffer)
    return torch.randn(case.batch, 3, case.size, case.size, generator=generator)


def targets(case: Case, classes: int) -> Tensor:
    return torch.arange(case.batch) % classes


@dataclass
class LayerData:
    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor  # of the output

    def to(self, *args: Any, **kwargs: Any) -> LayerData:
        return LayerData(*(t.to(*args, **kwargs) for t in (self.x, self.weight, self.bias, self.grad)))


def layer_data(case: Case, buffer: int) -> LayerData:
    """Random data in ``case.dtype`` on the case's device: the rounding of the data is no contender's error. The filters are the same in every buffer."""
    layer = case.layer
    assert layer is not None
    of_filters, of_images = (torch.Generator(case.device).manual_seed(seed) for seed in (7, 100 + buffer))

    def random(*shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    weight = random(layer.c_out, layer.c_in, 3, 3, generator=of_filters) * (2 / (9 * layer.c_in)) ** 0.5
    bias = random(layer.c_out, generator=of_filters)
    x = random(case.batch, layer.c_in, layer.size, layer.size, generator=of_images)
    side = layer.size // 2 if layer.pool else layer.size
    grad = random(case.batch, layer.c_out, side, side, generator=of_images)
    return LayerData(x, weight, bias, grad).to(DTYPES[case.dtype])


def plain_layer(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    y = F.relu(F.conv2d(x, weight, bias, padding=1), inplace=True)
    return F.max_pool2d(y, 2) if pool else y


def plain_network(net: nn.Module) -> nn.Module:
    """The same modules with the same parameters, called by torch one after the other."""
    if isinstance(net, vggfast.models.VGG):
        features, classifier = (nn.Sequential(*part.children()) for part in (net.features, net.classifier))
        plain = nn.Sequential(features, net.avgpool, nn.Flatten(), classifier)
    else:
        plain = nn.Sequential(*net.children())
    if any(isinstance(module, vggfast.FusedSequential) for module in plain.modules()):
        raise BenchError(
            "expected a network whose FusedSequentials are known here, got one that rivals would run fused"
        )
    return plain


def expected(case: Case, reference: Outputs) -> Outputs:
    """The part of a reference that the case's task must give."""
    if case.layer:
        return {name: reference[name] for name in outputs_of(case)}
    return {name: value for name, value in reference.items() if not name.startswith(OWN_ERROR)}


def reference(case: Case, weights: Path | None = None) -> Outputs:
    """The answer for buffer 0, computed by torch's own operators in float64. ``answers`` has those of layers on a GPU."""
    if case.layer:
        return _reference_layer(case, case.layer)
    if case.task in LOSSES:
        from vggfast.bench import perceptual

        return perceptual.reference(case, weights)
    if case.device == "cuda":
        from vggfast.bench import answers

        return answers.network(case, network(case, weights))
    net = network(case, weights).double()
    plain = plain_network(net)
    x = images(case, 0).double()
    if case.task == "inference":
        with torch.inference_mode():
            return {"scores": plain(x)}
    exact = _without_vanishing(_training_outputs(case, net, plain, x))
    if case.dtype == "fp32":
        return exact
    with torch.autocast("cpu", torch.bfloat16):
        own = relative_errors(_training_outputs(case, net.float(), plain, x.float()), exact)
    return exact | {OWN_ERROR + name: torch.tensor(error) for name, error in own.items()}


def _training_outputs(case: Case, net: nn.Module, plain: nn.Module, x: Tensor) -> Outputs:
    net.zero_grad()
    scores = plain(x)
    torch.autograd.backward(F.cross_entropy(scores, targets(case, scores.shape[1])))
    gradients = {f"grad of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"scores": scores.detach(), **gradients}


def _without_vanishing(exact: Outputs) -> Outputs:
    """Without gradients that are zero but for rounding, as those of biases before a BatchNorm: nothing can be said of their error."""
    norms = {name: float(value.norm()) for name, value in exact.items()}
    largest = max(norm for name, norm in norms.items() if name != "scores")
    return {name: value for name, value in exact.items() if name == "scores" or norms[name] > 1e-9 * largest}


def _reference_layer(case: Case, layer: Layer) -> Outputs:
    """Everything that any task of the layer gives, so that one reference serves them all."""
    data = layer_data(case, 0).to(torch.float64)
    before = F.conv2d(data.x, data.weight, data.bias, padding=1)
    data.grad *= decided(before, layer.pool, ROUNDING[case.products])
    inputs = differentiated(case.with_task("forward+backward"), data)
    y = plain_layer(data.x, data.weight, data.bias, layer.pool)
    gradients = torch.autograd.grad(y, list(inputs.values()), data.grad)
    exact = {GIVEN: data.grad, "y": y.detach(), **dict(zip(inputs, gradients, strict=True))}
    return exact | own_errors(case, exact)


def own_errors(case: Case, exact: Outputs) -> Outputs:
    """The errors of torch's own gradients of a layer in the case's dtype, of the same data: a gradient of filters or bias is a sum
    over all pixels, and how far that is off depends on how many there are. The larger of the layouts that compete."""
    layer, both = case.layer, case.with_task("forward+backward")
    assert layer is not None
    found: Outputs = {}
    for layout in (torch.channels_last, torch.contiguous_format)[: 2 if case.dtype == "fp32" else 1]:
        data = layer_data(case, 0)
        data.x, data.weight = (t.to(memory_format=layout) for t in (data.x, data.weight))
        inputs = differentiated(both, data)
        y = plain_layer(data.x, data.weight, data.bias, layer.pool)
        gradients = torch.autograd.grad(y, list(inputs.values()), exact[GIVEN].to(y.dtype, memory_format=layout))
        for name, error in relative_errors(dict(zip(inputs, gradients, strict=True)), exact).items():
            if name in inputs:
                found[OWN_ERROR + name] = torch.tensor(max(error, float(found.get(OWN_ERROR + name, 0.0))))
    return found


def decided(before: Tensor, pool: bool, dtype: torch.dtype) -> Tensor:
    """1 where rounding cannot change what ReLU and pool let through, else 0, from the convolution. Shaped as the output.

    An activation within rounding of zero opens its ReLU in one computation and not in the other; of two activations in a window
    within rounding of each other either may win. With no gradient there, gradients have errors of rounding only.
    """
    with torch.no_grad():
        # Who adds the bias to a convolution that is rounded already, as torch does on a GPU, has that rounding's error before ReLU.
        near_zero = max(1e-4, 3 * torch.finfo(dtype).eps) * before.std()
        if not pool:
            return (before.abs() > near_zero).to(before.dtype)
        n, c, h, w = before.shape
        windows = before.reshape(n, c, h // 2, 2, w // 2, 2).transpose(3, 4).reshape(n, c, h // 2, w // 2, 4)
        best, second = windows.topk(2, -1).values.unbind(-1)
        near_tie = near_zero + 2 * torch.finfo(dtype).eps * best.abs()
        return ((best < -near_zero) | ((best > near_zero) & (best - second > near_tie))).to(before.dtype)


def differentiated(case: Case, data: LayerData) -> dict[str, Tensor]:
    """The tensors that the task differentiates by, made to require gradients, under the names of the gradients."""
    tensors = {"grad of x": data.x, "grad of weight": data.weight, "grad of bias": data.bias}
    chosen = {name: tensors[name] for name in outputs_of(case) if name != "y"}
    for tensor in chosen.values():
        tensor.requires_grad_()
    return chosen


def outputs_of(case: Case) -> tuple[str, ...]:
    """What a layer's task gives. The first layer's input is an image, which nobody differentiates by."""
    layer = case.layer
    assert layer is not None
    x = () if layer.c_in == 3 else ("grad of x",)
    filters = ("grad of weight", "grad of bias")
    return {"forward": ("y",), "grad_input": x, "grad_weight": filters, "forward+backward": ("y", *x, *filters)}[
        case.task
    ]


def relative_errors(outputs: Outputs, expected: Outputs) -> dict[str, float]:
    """The L2 norm of the difference over that of the expected, for every expected output; infinite where one lacks or has NaN."""
    errors = {}
    for name, want in expected.items():
        got = outputs.get(name)
        if got is None or got.shape != want.shape:
            errors[name] = float("inf")
            continue
        error = _relative_error(got.detach().reshape(-1), want.detach().reshape(-1))
        errors[name] = error if error == error else float("inf")
    return errors


def _relative_error(got: Tensor, want: Tensor) -> float:
    """In float64, a piece at a time: gradients of 100 million parameters would leave the process gigabytes larger."""
    difference, size = 0.0, 0.0
    piece = 1 << 24 if got.is_cuda else 1 << 20
    for g, w in zip(torch.split(got, piece), torch.split(want, piece), strict=True):
        w = w.double()
        difference += float((g.double() - w).square().sum())
        size += float(w.square().sum())
    return float((difference / max(size, 1e-60)) ** 0.5)
