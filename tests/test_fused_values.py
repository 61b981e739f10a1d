"""FusedSequential gives the values, gradients and strides of nn.Sequential, in every layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from network_reference import check_network, error
from reference import LAYOUTS, WINOGRAD_BOUND, normal
from test_fused import CHANNELS_LAST, _one_thread, batch_norm, block, conv, pair  # noqa: F401 (the fixture is every test's)
from torch import Tensor, nn

from vggfast import FusedSequential, convert


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced rows and columns"])
def test_every_prefix_and_every_gradient(training: bool, layout: str) -> None:
    fused, plain = pair(*block(), batch_norm(4), nn.ReLU(inplace=True))
    for network in (fused, plain):
        network.train(training)[7].eval()
    check_network(fused, plain, LAYOUTS[layout](normal(4, 3, 11, 10)))


def test_statistics_that_require_gradients_are_refused_as_torch_refuses_them() -> None:
    for network in pair(conv(), batch_norm().eval()):
        network[1].running_var.requires_grad_()
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_var'"):
            network(normal(1, 4, 8, 8))


def test_statistics_of_batch_norm_in_training() -> None:
    fused, plain = pair(*block())
    for seed in range(3):
        for network in (fused, plain):
            network(normal(4, 3, 11, 10, seed=seed))
    for (name, ours), torchs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert error(ours, torchs.double()) <= 4 * WINOGRAD_BOUND, name


CORNERS = [
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 3, 1, 1),
    (2, 3, 1, 1),
    (2, 1, 2, 2),
    (1, 1, 5, 4),
    (2, 3, 5, 4),
    (2, 3, 2, 1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("wide", [1, 3])
def test_strides_are_torchs(layout: str, weight_format: str, wide: int) -> None:
    """On sizes of 1 the strides fit several formats, and what later layers return depends on which one it is."""
    chains = {
        "conv": lambda c: [conv(c, wide)],
        "ReLU": lambda c: [conv(c, wide), nn.ReLU(), conv(wide, 3)],
        "ReLU in place": lambda c: [conv(c, wide), nn.ReLU(inplace=True), conv(wide, 1)],
        "BatchNorm": lambda c: [conv(c, wide), batch_norm(wide), nn.ReLU(inplace=True), conv(wide, 3)],
        "BatchNorm in eval": lambda c: [conv(c, wide), batch_norm(wide).eval(), conv(wide, 3)],
        "tail": lambda c: [conv(c, wide), nn.ReLU(), nn.Identity(), nn.ReLU(), nn.MaxPool2d(3, 1, 1), conv(wide, 1)],
    }
    for shape, (name, layers) in itertools.product(CORNERS, chains.items()):
        if name == "BatchNorm" and shape[0] * shape[2] * shape[3] == 1:
            continue  # torch refuses to normalise one value in training mode
        fused, plain = pair(*layers(shape[1]))
        if weight_format == "channels_last":
            fused, plain = fused.to(memory_format=CHANNELS_LAST), plain.to(memory_format=CHANNELS_LAST)
        x = LAYOUTS[layout](normal(*shape))
        for k in range(1, len(plain) + 1):
            assert fused[:k](x).stride() == plain[:k](x).stride(), (name, shape, k)


def test_what_a_child_or_a_hook_sees_has_torchs_strides() -> None:
    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], -1)

    fused, _ = pair(conv(), nn.ReLU(), conv(), nn.ReLU(), View())
    flat = []
    fused[3].register_forward_hook(lambda module, inputs, output: flat.append((inputs[0].view(-1), output.view(-1))))
    fused(normal(2, 4, 8, 8))
    assert len(flat) == 1


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("wrap", [nn.Sequential, Wrapped])
@pytest.mark.parametrize(
    "follower", [nn.Dropout2d(0.5, inplace=True), nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)]
)
def test_an_in_place_layer_behind_a_nested_block(wrap: type[nn.Module], follower: nn.Module) -> None:
    """The block's pooled output is its ReLU's mask, and leaves it as it is where the images are channels_last."""
    gradients = []
    for fuse in (convert, lambda network: network):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        network = fuse(nn.Sequential(wrap(block), follower, nn.Conv2d(8, 8, 3, padding=1)))
        x = normal(2, 3, 8, 8).to(memory_format=torch.channels_last)
        network(x).square().sum().backward()
        gradients.append(block[0].weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_of_the_output_is_none_of_the_weights() -> None:
    """Not zeros, with which an optimizer would let momentum and decay go on."""
    network = convert(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2))
    )
    Stop.apply(network(normal(2, 3, 12, 12))).sum().backward()
    head = convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 8192), nn.ReLU()))
    Stop.apply(head(normal(2, 3, 4, 4))).sum().backward()
    assert all(p.grad is None for p in (*network.parameters(), *head.parameters()))


def test_a_child_that_is_none_is_torchs_error() -> None:
    for network in pair(conv(), nn.ReLU()):
        network[1] = None
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            network(normal(1, 4, 8, 8))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strides_behind_one_pixel_of_one_channel(images: int, inplace: bool, layout: torch.memory_format) -> None:
    """Which fit both memory formats: what came before decides."""
    first, second = (nn.Conv2d(*channels, 3, padding=1) for channels in ((3, 1), (1, 8)))
    for size, pool in ((1, []), (2, [nn.MaxPool2d(2)])):
        x = normal(images, 3, size, size).to(memory_format=layout)
        strides = [
            container(first, nn.ReLU(inplace), *pool, second)(x).stride()
            for container in (FusedSequential, nn.Sequential)
        ]
        assert strides[0] == strides[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batch_norm_of_another_dtype_is_torchs_error(dtype: torch.dtype) -> None:
    norm = nn.BatchNorm2d(8).to(dtype).eval()
    for container in (FusedSequential, nn.Sequential):
        with pytest.raises(RuntimeError, match="mixed dtype"):
            container(nn.Conv2d(3, 8, 3, padding=1), norm)(normal(1, 3, 8, 8))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("between", [nn.Identity, nn.Dropout])
def test_an_in_place_layer_behind_one_that_hands_its_input_on(between: type[nn.Module], nested: bool) -> None:
    """What it gets is still the pooled output, and so the mask of the ReLU before it."""
    gradients = []
    for fuse in (convert, lambda network: network):
        torch.manual_seed(0)
        last = [between(), nn.Hardtanh(-0.2, 0.2, inplace=True)]
        block = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        network = fuse(nn.Sequential(*block, *([nn.Sequential(*last)] if nested else last))).eval()
        x = normal(2, 3, 8, 8).to(memory_format=torch.channels_last)
        network(x).square().sum().backward()
        gradients.append(block[0].weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
