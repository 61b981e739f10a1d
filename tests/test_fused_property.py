"""Drawn chains of layers: FusedSequential returns what nn.Sequential returns, in value, dtype, strides and side effects."""

from __future__ import annotations

import dataclasses

import hypothesis
import torch
from hypothesis import strategies as st
from network_reference import assert_as_good_as_torch, float64
from reference import LAYOUTS, normal
from torch import Tensor, nn

from vggfast import FusedSequential, convert

KINDS = {
    "conv": lambda c, o: nn.Conv2d(c, o, 3, padding=1),
    "conv without bias": lambda c, o: nn.Conv2d(c, o, 3, padding=1, bias=False),
    "conv of channels_last": lambda c, o: nn.Conv2d(c, o, 3, padding=1).to(memory_format=torch.channels_last),
    "1x1": lambda c, o: nn.Conv2d(c, o, 1),
    "stride": lambda c, o: nn.Conv2d(c, o, 3, stride=2, padding=1),
    "nested": lambda c, o: nn.Sequential(nn.Conv2d(c, o, 3, padding=1), nn.ReLU(inplace=True)),
    "BatchNorm": lambda c, o: nn.BatchNorm2d(c),
    "BatchNorm without parameters": lambda c, o: nn.BatchNorm2d(c, affine=False),
    "BatchNorm without statistics": lambda c, o: nn.BatchNorm2d(c, track_running_stats=False),
    "ReLU": lambda c, o: nn.ReLU(),
    "ReLU in place": lambda c, o: nn.ReLU(inplace=True),
    "LeakyReLU": lambda c, o: nn.LeakyReLU(0.1),
    "pool": lambda c, o: nn.MaxPool2d(2, 2),
    "pool, ceil_mode": lambda c, o: nn.MaxPool2d(2, 2, ceil_mode=True),
    "pool 3x3": lambda c, o: nn.MaxPool2d(3, 1, 1),
    "dropout": lambda c, o: nn.Dropout(0.0),
    "identity": lambda c, o: nn.Identity(),
}
CONVOLUTIONS = list(KINDS)[:6]


@dataclasses.dataclass(frozen=True)
class Chain:
    kinds: list[tuple[str, int]]  # and the number of output channels, where the layer has one
    hooked: set[int]
    channels: int
    n: int
    h: int
    w: int
    layout: str
    training: bool
    needs_grad: bool

    def build(self) -> nn.Sequential:
        torch.manual_seed(0)
        layers, channels = [], self.channels
        for kind, out_channels in self.kinds:
            layers.append(KINDS[kind](channels, out_channels))
            channels = out_channels if kind in CONVOLUTIONS else channels
        for module in layers:
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
        return nn.Sequential(*layers).train(self.training)


_kinds = st.one_of(st.sampled_from(list(KINDS)), st.sampled_from(["conv", "ReLU in place", "pool"]))
_chains = st.builds(
    Chain,
    kinds=st.lists(st.tuples(_kinds, st.sampled_from([1, 2, 5, 8])), min_size=1, max_size=7),
    hooked=st.one_of(st.just(set()), st.sets(st.integers(0, 6), max_size=3)),
    channels=st.sampled_from([1, 3, 4]),
    n=st.integers(1, 2),
    h=st.sampled_from([1, 2, 5, 8]),
    w=st.sampled_from([1, 2, 4, 7]),
    layout=st.sampled_from([name for name in LAYOUTS if name != "negative bit"]),
    training=st.booleans(),
    needs_grad=st.booleans(),
)


def run(network: nn.Sequential, x: Tensor, needs_grad: bool) -> Tensor | str:
    """The output, after a backward pass where gradients are wanted, or the error."""
    x = x.detach().requires_grad_(needs_grad)
    try:
        y = network(x)
        if needs_grad:
            y.square().sum().backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return y.detach()


@hypothesis.seed(0)
@hypothesis.settings(max_examples=400, deadline=None, database=None)
@hypothesis.given(_chains)
def test_a_chain_returns_what_plain_modules_return(chain: Chain) -> None:
    torch.set_num_threads(1)
    plain, exact = chain.build(), float64(chain.build())
    fused = convert(FusedSequential(*chain.build()))
    for network in (plain, fused):
        for k in chain.hooked:
            if k < len(network):
                network[k].register_forward_hook(lambda *_: None)
    # An in-place ReLU that comes first writes to its input, so each network has its own, with the same strides.
    ours_input, torchs_input = (
        LAYOUTS[chain.layout](normal(chain.n, chain.channels, chain.h, chain.w)) for _ in range(2)
    )
    torchs = run(plain, torchs_input, chain.needs_grad)
    ours = run(fused, ours_input, chain.needs_grad)
    if isinstance(torchs, str):
        # The only errors of torch's that are not ours: an in-place ReLU spoils what an earlier ReLU saved for its gradient,
        # or is refused a leaf that a hook has seen and that therefore is not overwritten.
        assert (
            ours == torchs
            or "modified by an inplace operation" in torchs
            or (chain.hooked and "a leaf Variable" in torchs)
        )
        return
    assert isinstance(ours, Tensor), ours
    if not chain.hooked or chain.layout in ("contiguous", "channels_last"):  # a copy in place of the input is dense
        assert ours.stride() == torchs.stride()
    if not chain.hooked:
        assert torch.equal(ours_input, torchs_input)
    if (
        not chain.training
    ):  # in training mode BatchNorm magnifies errors without bound, where it normalises equal values
        with torch.no_grad():
            reference = exact(LAYOUTS[chain.layout](normal(chain.n, chain.channels, chain.h, chain.w)).double())
        convolutions = sum(kind in CONVOLUTIONS for kind, _ in chain.kinds)
        assert_as_good_as_torch(ours, torchs, reference, reference, convolutions, "output")
