"""The yardstick for chains of layers: every prefix and every gradient of a network against float64, beside torch's own error.

``ours`` may be twice as far from float64 as torch's own float32 is, and each convolution that a value has passed may add its
part of 5e-6 (relative, L2; what Winograd in float32 is allowed). Random layers keep relative errors as they are, so the parts add.

Gradients of ReLU and pooling jump where an activation is near zero, or two are near a tie. The float64 gradient therefore takes
these decisions from the activations of the network that is judged, ours or torch's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from reference import WINOGRAD_BOUND
from torch import Tensor, nn


def error(value: Tensor, exact: Tensor) -> float:
    """Relative, in the L2 norm."""
    return float((value.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-30))


def assert_as_good_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, torch_exact: Tensor, convolutions: int, what: str
) -> None:
    assert ours.shape == torchs.shape, what
    assert ours.dtype == torchs.dtype, what
    ours_error, torch_error = error(ours, exact), error(torchs, torch_exact)
    bound = 2 * torch_error + WINOGRAD_BOUND * convolutions
    assert ours_error <= bound, (
        f"{what}: error {ours_error:.3e}, torch's own {torch_error:.3e}, {convolutions} convolutions"
    )


def prefixes(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    """x, and the output of the first 1, 2, ... children; each prefix runs on its own, so that runs of layers end there."""
    with torch.no_grad():
        return [x, *(network[:k](x) for k in range(1, len(network) + 1))]


def steps(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The same of a network that has nothing fused, child by child."""
    values = [x]
    with torch.no_grad():
        for child in network:
            # An in-place ReLU gets a copy: what it would overwrite is one of the values.
            values.append(child(values[-1].clone() if isinstance(child, nn.ReLU) else values[-1]))
    return values


def float64(network: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*copy.deepcopy(list(network))).double()


def _decided(network: nn.Sequential, x: Tensor, activations: Sequence[Tensor]) -> Tensor:
    """The output of the float64 ``network`` that takes the decisions of ReLU and max-pool that ``activations`` show."""
    for child, before, after in zip(network, activations[:-1], activations[1:], strict=True):
        if isinstance(child, nn.ReLU):
            x = torch.where(after > 0, x, torch.zeros_like(x))
        elif isinstance(child, nn.MaxPool2d):
            index = F.max_pool2d(
                before, child.kernel_size, child.stride, ceil_mode=child.ceil_mode, return_indices=True
            )[1]
            x = x.flatten(2).gather(2, index.flatten(2)).view(after.shape)
        else:
            x = child(x)
    return x


def gradients(network: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Of x and of every parameter, for an incoming ``grad``."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(network(x), [x, *network.parameters()], grad))


def exact_gradients(network: nn.Sequential, x: Tensor, activations: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    reference, x = float64(network), x.detach().double().requires_grad_()
    return list(torch.autograd.grad(_decided(reference, x, activations), [x, *reference.parameters()], grad.double()))


def check_network(ours: nn.Sequential, torchs: nn.Sequential, x: Tensor) -> None:
    """Outputs (values, dtype, strides) of every prefix and gradients of x and all parameters; both hold the same weights."""
    depth = sum(isinstance(child, nn.Conv2d) for child in torchs)
    our_values, torch_values, exact = prefixes(ours, x), steps(torchs, x), steps(float64(torchs), x.double())
    for k, (value, by_torch, reference) in enumerate(zip(our_values, torch_values, exact, strict=True)):
        convolutions = sum(isinstance(child, nn.Conv2d) for child in torchs[:k])
        assert_as_good_as_torch(value, by_torch, reference, reference, convolutions, f"output of [:{k}]")
        assert value.stride() == by_torch.stride(), f"strides of [:{k}]"
    grad = torch.randn(our_values[-1].shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    our_grads, torch_grads = gradients(ours, x, grad), gradients(torchs, x, grad)
    our_exact, torch_exact = (exact_gradients(torchs, x, values, grad) for values in (our_values, torch_values))
    names = ["x", *(name for name, _ in torchs.named_parameters())]
    for name, *values in zip(names, our_grads, torch_grads, our_exact, torch_exact, strict=True):
        assert_as_good_as_torch(*values, depth + 1, f"gradient of {name}")
