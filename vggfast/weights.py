"""Published ImageNet weights under torchvision's names, and the loading of checkpoints from an enum, a path or a URL.

torchvision is not required. Where it is installed, preprocessing and category names come from it and its own enum
members are accepted; where it is not, `vggfast.preprocessing` computes the same.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from vggfast.checkpoint_files import SUFFIXES, fetch, read_state_dict
from vggfast.preprocessing import ImageClassification
from vggfast.weight_layouts import LAYOUTS, adapt_in_channels, recognise, to_timm, to_torchvision


def _torchvision_models(purpose: str) -> Any:
    """`torchvision.models`; ImportError naming `purpose` where it is missing or broken."""
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: a torchvision built for another torch
        raise ImportError(
            f"{purpose} from torchvision, which cannot be imported here ({error}): pip install torchvision"
        ) from error


def classification_transform(**options: Any) -> Callable[[Any], Tensor]:
    """torchvision's `ImageClassification` preset where torchvision is installed, else our twin of it.

    `options` are the constructor's: crop_size, resize_size, mean, std, antialias (and interpolation, in torchvision).
    """
    try:
        preset = _torchvision_models("the preset comes").VGG16_Weights.IMAGENET1K_V1.transforms
    except ImportError:
        preset = ImageClassification
    return preset(**options)  # type: ignore[no-any-return]


def _imagenet_categories() -> list[str]:
    """ImageNet's 1000 category names in the order of the scores."""
    models = _torchvision_models("ImageNet's category names come")
    return models.VGG16_Weights.IMAGENET1K_V1.meta["categories"]  # type: ignore[no-any-return]


class _Meta(dict[str, Any]):
    """A member's facts. Where torchvision is missing, only asking for the category names is an error."""

    def __missing__(self, key: str) -> Any:
        if key != "categories":
            raise KeyError(key)
        return _imagenet_categories()


@dataclass(frozen=True, eq=False)
class Weights:
    """One published checkpoint: where it lies, the preprocessing it wants, its facts (torchvision's `Weights`)."""

    url: str
    transforms: Callable[..., Callable[[Any], Tensor]]
    meta: dict[str, Any]


class WeightsEnum(Enum):
    """Base of the weight enums; mirrors `torchvision.models.WeightsEnum`.

    `meta` holds num_classes, num_params, min_size, recipe, `_metrics` (top-1 and top-5 accuracy on ImageNet in %),
    `_ops` (GMAC at 224x224) and `_file_size` (MiB). `meta["categories"]` needs torchvision, and says so.
    """

    def get_state_dict(self, progress: bool = True, check_hash: bool = True) -> dict[str, Tensor]:
        """The checkpoint's state_dict, downloaded into torch.hub's cache on first use; see `read_checkpoint`."""
        return read_state_dict(fetch(self.url, progress, check_hash))

    @property
    def url(self) -> str:
        """Where the checkpoint is downloaded from."""
        return self.value.url  # type: ignore[no-any-return]

    @property
    def transforms(self) -> Callable[..., Callable[[Any], Tensor]]:
        """Called without arguments it makes the preprocessing: from a PIL image, or a tensor [..., C, H, W], to [..., C, H, W]."""
        return self.value.transforms  # type: ignore[no-any-return]

    @property
    def meta(self) -> dict[str, Any]:
        """What is known of the weights; the class says which keys it has."""
        meta: dict[str, Any] = self.value.meta
        if "categories" not in meta:
            with suppress(ImportError):
                meta["categories"] = _imagenet_categories()
        return meta

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By name: some Python versions pickle the value instead, and its copy would match no member.
        return getattr, (type(self), self.name)


WeightsSpec: TypeAlias = WeightsEnum | str | os.PathLike[str]


def _published(file: str, num_params: int, top1: float, top5: float, gmac: float, size: float, **extra: Any) -> Weights:
    normalisation = {key: extra.pop(key) for key in ("mean", "std") if key in extra}
    meta = _Meta(
        num_classes=1000,
        num_params=num_params,
        min_size=(32, 32),
        recipe="https://github.com/pytorch/vision/tree/main/references/classification#alexnet-and-vgg",
        _metrics={"ImageNet-1K": {"acc@1": top1, "acc@5": top5}},
        _ops=gmac,
        _file_size=size,
    )
    meta.update(extra)
    transforms = partial(classification_transform, crop_size=224, **normalisation)
    return Weights(f"https://download.pytorch.org/models/{file}", transforms, meta)


class VGG11_Weights(WeightsEnum):
    IMAGENET1K_V1 = _published("vgg11-8a719046.pth", 132_863_336, 69.020, 88.628, 7.609, 506.84)
    DEFAULT = IMAGENET1K_V1


class VGG11_BN_Weights(WeightsEnum):
    IMAGENET1K_V1 = _published("vgg11_bn-6002323d.pth", 132_868_840, 70.370, 89.810, 7.609, 506.881)
    DEFAULT = IMAGENET1K_V1


class VGG13_Weights(WeightsEnum):
    IMAGENET1K_V1 = _published("vgg13-19584684.pth", 133_047_848, 69.928, 89.246, 11.308, 507.545)
    DEFAULT = IMAGENET1K_V1


class VGG13_BN_Weights(WeightsEnum):
    IMAGENET1K_V1 = _published("vgg13_bn-abd245e5.pth", 133_053_736, 71.586, 90.374, 11.308, 507.59)
    DEFAULT = IMAGENET1K_V1


class VGG16_Weights(WeightsEnum):
    """IMAGENET1K_FEATURES is the backbone SSD starts from: inputs in [0, 255] minus the mean, and a classifier that
    the published file fills with NaN. Only `features` is of use; the NaN is loaded as torchvision loads it."""

    IMAGENET1K_V1 = _published("vgg16-397923af.pth", 138_357_544, 71.592, 90.382, 15.47, 527.796)
    IMAGENET1K_FEATURES = _published(
        "vgg16_features-amdegroot-88682ab5.pth",
        138_357_544,
        float("nan"),
        float("nan"),
        15.47,
        527.802,
        mean=(0.48235, 0.45882, 0.40784),
        std=(1.0 / 255.0, 1.0 / 255.0, 1.0 / 255.0),
        categories=None,
        recipe="https://github.com/amdegroot/ssd.pytorch#training-ssd",
    )
    DEFAULT = IMAGENET1K_V1


class VGG16_BN_Weights(WeightsEnum):
    IMAGENET1K_V1 = _published("vgg16_bn-6c64b313.pth", 138_365_992, 73.360, 91.516, 15.47, 527.866)
    DEFAULT = IMAGENET1K_V1


class VGG19_Weights(WeightsEnum):
    IMAGENET1K_V1 = _published("vgg19-dcbb9e9d.pth", 143_667_240, 72.376, 90.876, 19.632, 548.051)
    DEFAULT = IMAGENET1K_V1


class VGG19_BN_Weights(WeightsEnum):
    IMAGENET1K_V1 = _published("vgg19_bn-c79401a0.pth", 143_678_248, 74.218, 91.842, 19.632, 548.143)
    DEFAULT = IMAGENET1K_V1


_ENUMS: dict[str, type[WeightsEnum]] = {enum.__name__: enum for enum in WeightsEnum.__subclasses__()}


def resolve(spec: Any, enums: Iterable[type[WeightsEnum]] = _ENUMS.values()) -> WeightsEnum | Path | str | None:
    """What `spec` stands for: a member of one of `enums`, a local path, a URL (str), or None for None.

    Members of torchvision's enums of the same names count as ours. A name may be qualified
    ("VGG16_Weights.IMAGENET1K_V1") or, where `enums` holds a single enum, bare ("DEFAULT").
    Raises TypeError for a member of another enum or another type, ValueError for an unknown name.
    """
    enums = list(enums)
    expected = " or ".join(enum.__name__ for enum in enums) or "no enum (no weights are published for this model)"
    if isinstance(spec, Enum) and type(spec).__name__ in _ENUMS:
        spec = f"{type(spec).__name__}.{spec.name}"
    if spec is None:
        return None
    if isinstance(spec, str) and "://" in spec:
        return spec
    if isinstance(spec, str):
        enum_name, _, member = spec.rpartition(".")
        enum = _ENUMS.get(enum_name) if enum_name else (enums[0] if len(enums) == 1 else None)
        if enum is not None and enum not in enums:
            raise TypeError(f"Invalid Weight class provided; expected {expected} but received {enum.__name__}.")
        if enum is not None and member in enum.__members__:
            return enum[member]
        path = Path(spec).expanduser()
        if enum_name not in _ENUMS and (path.suffix in SUFFIXES or os.sep in spec or path.is_file()):
            return path
        names = ", ".join(f"{enum.__name__}.{name}" for enum in enums for name in enum.__members__) or expected
        raise ValueError(f"weights: expected {names}, a path to a checkpoint, or a URL; got {spec!r}")
    if isinstance(spec, os.PathLike):
        return Path(spec).expanduser()
    raise TypeError(
        f"Invalid Weight class provided; expected {expected}, a path, a URL or None but received {type(spec).__name__}."
    )


def read_checkpoint(weights: WeightsSpec, progress: bool = True) -> dict[str, Tensor]:
    """The state_dict in a published checkpoint, a local file or behind a URL, with torchvision's keys, on the CPU.

    Files are torch's (.pth, .pt, .ckpt, .bin), safetensors, or Keras's (.h5, .keras). Wrappers ({"state_dict": …},
    {"model": …}) and what DistributedDataParallel, torch.compile and AveragedModel add to the keys are taken off; the layouts that
    `vggfast.weight_layouts` lists are converted, and keys of no known layout stay as they are. Only tensors are unpickled, never code. A URL is cached as torch.hub caches it: in
    `torch.hub.get_dir()/checkpoints/<last part of the URL>`, and a file of that name there is taken for it.
    Raises OSError (cannot download, no such file) or RuntimeError (the file is damaged or is no state_dict), and
    ImportError where a Keras file comes without h5py.
    """
    return to_torchvision(read_state_dict(locate(weights, progress)))


def locate(weights: WeightsSpec, progress: bool = True) -> Path:
    """Where the file of `weights` lies, downloaded if need be; see `read_checkpoint`."""
    spec = resolve(weights)
    if spec is None:
        raise TypeError("weights: expected a weights enum, a path or a URL, got None")
    if isinstance(spec, Path):
        return spec
    published = isinstance(spec, WeightsEnum)
    return fetch(spec.url if isinstance(spec, WeightsEnum) else spec, progress, check_hash=published)


def load_weights(model: nn.Module, weights: WeightsSpec, progress: bool = True, *, adapt: bool = False) -> None:
    """Load a checkpoint (see `read_checkpoint`) into `model`, all of it or, on any error, nothing.

    `model` has torchvision's keys, timm's, or those of the checkpoint. With `adapt`, a model for another number of
    channels gets the first filters by `adapt_in_channels`, and one for another number of classes keeps its last layer.

    Raises RuntimeError where keys or shapes do not fit: it names them and says what to change. As an exception,
    IMAGENET1K_FEATURES may lack the classifier, which then keeps its values, with a warning.
    """
    own = model.state_dict()
    state = _as_in(own, read_state_dict(locate(weights, progress)), adapt)
    # Checkpoints older than torch 0.4.1 have no num_batches_tracked; BatchNorm then starts counting at its own value.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = {
        key: (list(own[key].shape), list(getattr(state[key], "shape", ())))
        for key in own
        if key in state and own[key].shape != getattr(state[key], "shape", ())
    }
    headless = bool(missing) and all(key.startswith("classifier.") for key in missing)
    if headless and not unexpected and not shapes and resolve(weights) is VGG16_Weights.IMAGENET1K_FEATURES:
        warnings.warn("the checkpoint holds no classifier: it keeps its values from before", stacklevel=2)
    elif missing or unexpected or shapes:
        wrong = [f"{key}: expected {expected}, got {got}" for key, (expected, got) in shapes.items()]
        lists = (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", wrong))
        report = "".join(f"\n  {title} ({len(items)}): {_shorten(items)}" for title, items in lists if items)
        advice = _advice(own, state, shapes, headless)
        raise RuntimeError(f"{weights} does not fit {type(model).__name__}:{report}\n{advice}")
    model.load_state_dict(state, strict=False)


def _as_in(own: Mapping[str, Tensor], state: dict[str, Tensor], adapt: bool) -> dict[str, Tensor]:
    """`state` in the layout of `own`: its keys, its fully connected layers as matrices or as convolutions."""
    layout = recognise(own)
    if layout != recognise(state) and layout is not None:
        state = to_torchvision(state)
        state = to_timm(state) if layout == "timm" else state
    for name in ("classifier.0", "classifier.3", "classifier.6"):
        key = f"{name}.weight"
        if key in own and key in state and own[key].ndim != state[key].ndim and own[key].numel() == state[key].numel():
            state[key] = state[key].view(own[key].shape)
    if not adapt:
        return state
    first, last = "features.0.weight", "head.fc" if layout == "timm" else "classifier.6"
    if first in own and first in state and state[first].ndim == 4 and state[first].shape[1]:
        state[first] = adapt_in_channels(state[first], own[first].shape[1])
    last_keys = [key for key in (f"{last}.weight", f"{last}.bias") if key in own and key in state]
    if any(own[key].shape[0] != state[key].shape[0] for key in last_keys):
        state |= {key: own[key] for key in last_keys}
    return state


def _shorten(items: list[str], limit: int = 4) -> str:
    return "; ".join(items[:limit]) + ("; …" if len(items) > limit else "")


def _advice(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[list[int], list[int]]],
    headless: bool,
) -> str:
    """What to do about a checkpoint that does not fit, from the most telling difference."""
    last, first = "classifier.6.weight", "features.0.weight"
    has_norm = any(key.endswith("running_mean") for key in state)
    if first in state and has_norm != any(key.endswith("running_mean") for key in own):
        return f"The checkpoint was saved {'with' if has_norm else 'without'} BatchNorm: build the model so, too."
    if first in shapes and len(shapes[first][1]) == 4 and shapes[first][0][1] != shapes[first][1][1]:
        return (
            f"The checkpoint takes images of other channels: build with in_channels={shapes[first][1][1]}, or let "
            "load_weights(…, adapt=True) adapt the first filters."
        )
    if last in shapes and set(shapes) <= {last, "classifier.6.bias"}:
        classes = shapes[last][1][0]
        return (
            f"The checkpoint was trained for {classes} classes: build with num_classes={classes}; if you need another "
            "number, call model.reset_classifier(…) after loading, or load_weights(…, adapt=True)."
        )
    if headless:
        return (
            "The checkpoint holds no classifier. To load its features alone: "
            "model.load_state_dict(vggfast.weights.read_checkpoint(…), strict=False)."
        )
    known = f"with the keys of {recognise(state)}" if recognise(state) else f"with keys of none of {', '.join(LAYOUTS)}"
    return (
        f"The checkpoint was saved from another architecture, {known}: build the model that it was saved from, or let "
        "vggfast.load_model(…) build it."
    )
