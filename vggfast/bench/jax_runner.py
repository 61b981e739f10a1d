"""JAX on a GPU: the same network or layer under jit, channels last, with the weights of torch's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggfast.bench import answers, cases
from vggfast.bench.cases import BUFFERS, Case
from vggfast.bench.contenders import Runner
from vggfast.bench.layers import Layer

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # other workers need memory too


def build(case: Case, files: dict[str, str]) -> Runner:
    """Inference, or loss and gradients, or a layer's task. ``run`` returns when the device is done, and is timed by the wall clock."""
    import jax
    import jax.numpy as jnp

    if case.layer:
        return _build_layer(case, case.layer, files)

    plain = cases.plain_network(cases.network(case, Path(files["weights"])))
    steps, parameters = _steps(plain)
    dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[case.dtype]
    inputs = [jnp.asarray(cases.images(case, i).permute(0, 2, 3, 1).numpy(), dtype) for i in range(BUFFERS)]
    weights = {name: jnp.asarray(value.numpy()) for name, value in parameters.items()}

    def scores(values: Any, images: Any) -> Any:
        x = images
        for step in steps:
            x = _apply(step, x, values, dtype)
        return x.astype(jnp.float32)

    def loss(values: Any, images: Any, target: Any) -> Any:
        found = scores(values, images)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(found), target[:, None], axis=1)
        return -chosen.mean(), found

    if case.task == "inference":
        weights = {name: value.astype(dtype) for name, value in weights.items()}
        infer = jax.jit(scores)
        return Runner(
            lambda buffer: jax.block_until_ready(infer(weights, inputs[buffer])),
            lambda result: {"scores": _tensor(result)},
            "jit, NHWC",
            clock="wall",
            version=jax.__version__,
        )
    target = jnp.asarray(cases.targets(case, weights[f"{steps[-1][1]}.bias"].shape[0]).numpy())
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def outputs(result: Any) -> dict[str, Tensor]:
        (_, found), gradients = result
        back = {f"grad of {name}": _to_torch_layout(_tensor(g)) for name, g in gradients.items()}
        return {"scores": _tensor(found), **back}

    return Runner(
        lambda buffer: jax.block_until_ready(step(weights, inputs[buffer], target)),
        outputs,
        "jit, NHWC, value_and_grad",
        clock="wall",
        version=jax.__version__,
    )


def _build_layer(case: Case, layer: Layer, files: dict[str, str]) -> Runner:
    """Gradients are pulled back through a forward pass that is done already, as torch's are."""
    import jax
    import jax.numpy as jnp

    dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[case.dtype]

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=dimensions)
        y = jax.nn.relu(y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)  # XLA fuses these
        return jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") if layer.pool else y

    def array(tensor: Tensor, *order: int) -> Any:
        return jnp.asarray(tensor.detach().permute(*order).float().cpu().numpy(), dtype)

    data = [cases.layer_data(case, i) for i in range(case.buffers)]
    if case.task != "forward":
        data[0].grad = answers.load(case, files["reference"])[cases.GIVEN]
    inputs = [(array(d.x, 0, 2, 3, 1), array(d.weight, 2, 3, 1, 0), array(d.bias, 0)) for d in data]
    grads = [array(d.grad, 0, 2, 3, 1) for d in data]
    wanted = {"grad of x": 0, "grad of weight": 1, "grad of bias": 2}
    names = cases.outputs_of(case)
    positions = [wanted[name] for name in names if name != "y"]

    def both(arguments: Any, grad: Any) -> Any:
        y, pull = jax.vjp(forward, *arguments)
        gradients = pull(grad)
        return [y, *(gradients[i] for i in positions)]

    def pulled(pull: Any, grad: Any) -> Any:
        gradients = pull(grad)
        return [gradients[i] for i in positions]

    compiled: Any
    arguments: list[Any]
    if case.task == "forward":
        compiled, arguments = jax.jit(lambda *x: [forward(*x)]), inputs
    elif case.task == "forward+backward":
        compiled, arguments = jax.jit(both), list(zip(inputs, grads, strict=True))
    else:
        compiled, arguments = (
            jax.jit(pulled),
            [(jax.vjp(forward, *x)[1], g) for x, g in zip(inputs, grads, strict=True)],
        )

    def outputs(results: Any) -> dict[str, Tensor]:
        return {name: _of_layer(name, _tensor(r)).to(case.device) for name, r in zip(names, results, strict=True)}

    runner = Runner(
        lambda buffer: jax.block_until_ready(compiled(*arguments[buffer])), outputs, "jit, NHWC, wall clock"
    )
    runner.clock, runner.version, runner.buffers, runner.of_layer = "wall", jax.__version__, case.buffers, True
    return runner


def _of_layer(name: str, value: Tensor) -> Tensor:
    if name == "grad of weight":
        return value.permute(3, 2, 0, 1)
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


def _steps(plain: nn.Module) -> tuple[list[tuple[str, str]], dict[str, Tensor]]:
    """(kind, name) of each layer in order, and the parameters by torch's names, filters as [3, 3, C_in, C_out]."""
    steps: list[tuple[str, str]] = []
    parameters: dict[str, Tensor] = {}
    names = {"0": "features", "3": "classifier"}  # plain_network's children
    for path, module in plain.named_modules():
        head, _, rest = path.partition(".")
        name = f"{names.get(head, head)}.{rest}"
        kind = type(module).__name__
        if kind in ("Conv2d", "Linear"):
            weight = module.weight.detach()
            parameters[f"{name}.weight"] = _from_torch_layout(weight)
            parameters[f"{name}.bias"] = module.bias.detach()
        if kind in ("Conv2d", "Linear", "ReLU", "MaxPool2d", "Flatten"):
            steps.append((kind, name))
    return steps, parameters


def _from_torch_layout(weight: Tensor) -> Tensor:
    return (weight.permute(2, 3, 1, 0) if weight.dim() == 4 else weight.t()).contiguous()


def _to_torch_layout(gradient: Tensor) -> Tensor:
    if gradient.dim() == 4:
        return gradient.permute(3, 2, 0, 1)
    return gradient.t() if gradient.dim() == 2 else gradient


def _tensor(array: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(array, dtype=np.float32))


def _apply(step: tuple[str, str], x: Any, values: Any, dtype: Any) -> Any:
    """One layer. The average pool before the classifier has nothing to do at 224 x 224."""
    import jax
    import jax.numpy as jnp

    kind, name = step
    if kind == "Conv2d":
        weight, bias = values[f"{name}.weight"].astype(dtype), values[f"{name}.bias"].astype(dtype)
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=dimensions) + bias
    if kind == "Linear":
        return x @ values[f"{name}.weight"].astype(dtype) + values[f"{name}.bias"].astype(dtype)
    if kind == "ReLU":
        return jax.nn.relu(x)
    if kind == "Flatten":  # in torch's order: channels first
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
