"""Activations of a VGG by the names of the paper and of its Caffe models: conv3_3, relu4_2, pool5, fc6."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vggfast.dense import DenseVGG
from vggfast.fused import FusedSequential, State, run_children

__all__ = ["Features", "features"]

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish, nn.Hardswish, nn.Tanh)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.FractionalMaxPool2d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.InstanceNorm2d)


class Tap(NamedTuple):
    """A layer's output: of child number `child` of `part`, "features" or "classifier"."""

    part: str
    child: int
    channels: int


class Piece(NamedTuple):
    """Children `start` to `end`, the last of which is the tap `name`, or none."""

    start: int
    end: int
    name: str


class PoolToGrid(nn.Module):
    """What a `DenseVGG` does between its features and its classifier."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        height, width = (max(least, size) for least, size in zip(self.grid, x.shape[2:], strict=True))
        return F.adaptive_avg_pool2d(x, (height, width))


class Features(nn.Module):
    """Made by `features`: from images [N, C, H, W] to a dict of the activations asked for, in the order asked for.

    Attributes:
        taps: their names.
        channels: the number of channels of each.
        features: the layers of the model up to the last tap, under their names there.
        avgpool, classifier: likewise, where a tap lies behind them.
    """

    def __init__(self, model: nn.Module, taps: dict[str, Tap], torch_layout: bool) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.channels = {name: tap.channels for name, tap in taps.items()}
        self.torch_layout = torch_layout
        self._pieces = {
            part: _pieces({tap.child: name for name, tap in taps.items() if tap.part == part})
            for part in ("features", "classifier")
        }
        body, head = _parts(model)
        behind = bool(self._pieces["classifier"])
        if behind:  # the classifier needs the features to their end
            last = self._pieces["features"][-1].end if self._pieces["features"] else 0
            self._pieces["features"].append(Piece(last, len(_children(body)), ""))
        self.features = _first(body, self._pieces["features"][-1].end)
        if behind:
            assert head is not None
            self.avgpool: Any = PoolToGrid(model.grid) if isinstance(model, DenseVGG) else model.avgpool
            self.classifier = _first(head, self._pieces["classifier"][-1].end)
        self.training = model.training

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        state = self._run("features", State(x), found)
        if self._pieces["classifier"]:
            x = self.avgpool(state.as_in_torch())
            x = x if isinstance(self.avgpool, PoolToGrid) else x.flatten(1)
            # Average pooling to the size that is there already, and flattening, may return what is a tap.
            self._run("classifier", State(x, keep=state.keep or len(found) > 0), found)
        return {name: found[name] for name in self.taps}

    def _run(self, part: str, state: State, found: dict[str, Tensor]) -> State:
        """Run a part in pieces that end at its taps, which are put into `found`."""
        modules = getattr(self, part)._modules
        names, children = tuple(modules), tuple(modules.values())
        for start, end, name in self._pieces[part]:
            state = run_children(names[start:end], children[start:end], state)
            if name:
                found[name] = state.as_in_torch() if self.torch_layout else state.x
                # Whoever asked for a tap keeps it: an in-place layer behind it gets a copy.
                state = state._replace(keep=state.keep or found[name] is state.x)
        return state

    def extra_repr(self) -> str:
        return f"taps={', '.join(self.taps)}"


def features(model: nn.Module, taps: Iterable[str] | str, *, torch_layout: bool = True) -> Features:
    """A module that maps images to the activations of `model` called `taps`, and runs nothing behind the last of them.

    Names are those of the paper's Table 1 and of the Caffe models: conv1_1 … conv5_4 is a convolution's output before
    anything else, bn3_3 the BatchNorm's behind it, relu3_3 the activation's, norm1 a local response normalisation's,
    pool1 … pool5; fc6, relu6, drop6, fc7, relu7, drop7, fc8 of the classifier. Taps behind ReLU or pool leave the fused
    kernels whole; a tap on a convolution or BatchNorm ends the kernel there, and the ReLU runs on its own. No tap is
    overwritten by a later in-place layer.

    Args:
        model: a VGG of vggfast or torchvision, converted or not, or what `to_dense` makes of it; or an `nn.Sequential` such as
            its `features`, or a slice, whose blocks are counted from its own beginning. It is not changed.
        taps: one name or several.
        torch_layout: give each tap the strides that torch would. False saves the copy where kernels write channels_last
            (as `ops.conv3x3`).

    The layers are the model's own: weights, modes and `requires_grad` are shared with it, layers behind the last tap are
    not held. With `requires_grad_(False)` on what is returned nothing is kept or calculated for gradients of weights;
    gradients of the images flow.

    Raises ValueError for a name that the model does not have (it lists those it has), TypeError where `model` is none of these.
    """
    available = names(model)
    wanted = [taps] if isinstance(taps, str) else list(taps)
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"taps: expected at least one name, each once, got {wanted}")
    if unknown := [name for name in wanted if name not in available]:
        raise ValueError(
            f"taps: expected names of layers of this {type(model).__name__}, got {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(available)}"
        )
    return Features(_unwrapped(model), {name: available[name] for name in wanted}, torch_layout)


def frozen(network: Features) -> Features:
    """A copy of the modules, in eval mode, whose parameters are others on the same memory, without gradients."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in network.buffers()}
    return copy.deepcopy(network, memo).eval()


def names(model: nn.Module) -> dict[str, Tap]:
    """What can be tapped of `model`, in the order of execution."""
    model = _unwrapped(model)
    body, head = _parts(model)
    found = dict(_names_of_features(body))
    pooled = isinstance(getattr(model, "avgpool", None), (nn.AdaptiveAvgPool2d, nn.Identity, PoolToGrid))
    if head is not None and (pooled or isinstance(model, DenseVGG)):
        found |= _names_of_classifier(head)
    if not found:
        raise TypeError(f"model: expected a VGG or its features, got {type(model).__name__} without convolutions")
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself of a data-parallel or compiled one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else _unwrapped(compiled)


def _parts(model: nn.Module) -> tuple[nn.Sequential, nn.Sequential | None]:
    body: Any = model if isinstance(model, nn.Sequential) else getattr(model, "features", None)
    if not isinstance(body, nn.Sequential):
        raise TypeError(
            f"model: expected a VGG whose `features` are an nn.Sequential, or such a Sequential, got {type(model).__name__}"
        )
    if not _one_after_the_other(body):
        raise TypeError(
            f"model: expected layers that run one after the other, got {type(body).__name__} with an own forward"
        )
    head = getattr(model, "classifier", None)
    return body, head if isinstance(head, nn.Sequential) and _one_after_the_other(head) else None


def _one_after_the_other(sequential: nn.Sequential) -> bool:
    plain = (nn.Sequential.forward, FusedSequential.forward)
    return type(sequential).forward in plain and "forward" not in sequential.__dict__


def _children(sequential: nn.Sequential) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in sequential._modules.items() if child is not None]


def _first(sequential: nn.Sequential, count: int) -> FusedSequential:
    first = FusedSequential(OrderedDict(_children(sequential)[:count]))
    first.training = sequential.training
    return first


def _pieces(taps: dict[int, str]) -> list[Piece]:
    ends = sorted(taps)
    return [Piece(start, end + 1, taps[end]) for start, end in zip([0, *(e + 1 for e in ends)], ends, strict=False)]


def _names_of_features(body: nn.Sequential) -> Iterator[tuple[str, Tap]]:
    block, index, channels = 1, 0, 0
    for position, (_, child) in enumerate(_children(body)):
        name = ""
        if isinstance(child, nn.Conv2d):
            index, channels = index + 1, child.out_channels
            name = f"conv{block}_{index}"
        elif isinstance(child, _NORMS):
            name = f"bn{block}_{index}"
        elif isinstance(child, _ACTIVATIONS):
            name = f"relu{block}_{index}"
        elif isinstance(child, nn.LocalResponseNorm):
            name = f"norm{block}"
        elif isinstance(child, _POOLS):
            name = f"pool{block}"
            block, index = block + 1, 0
        if name and channels:
            yield name, Tap("features", position, channels)


def _names_of_classifier(head: nn.Sequential) -> Iterator[tuple[str, Tap]]:
    number, width = 5, 0
    for position, (_, child) in enumerate(_children(head)):
        kind = ""
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            number, width = number + 1, child.out_features if isinstance(child, nn.Linear) else child.out_channels
            kind = "fc"
        elif isinstance(child, _ACTIVATIONS):
            kind = "relu"
        elif isinstance(child, nn.Dropout):
            kind = "drop"
        if kind and width:
            yield f"{kind}{number}", Tap("classifier", position, width)
