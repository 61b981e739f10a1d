"""After `import vggfast.integrations.timm`, `timm.create_model("vggfast_vgg16", …)` makes timm's VGG on fused kernels.

For each of timm's VGGs there is one, with its parameters, its layout of the state_dict, its published weights and all
that timm's models can do.
"""

import functools
import importlib
import sys
from typing import Any

from torch import Tensor, nn

from vggfast.fused import convert
from vggfast.weight_layouts import to_timm, to_torchvision

try:
    timm_models: Any = importlib.import_module("timm.models")
    timm_vgg: Any = importlib.import_module("timm.models.vgg")
    feature_take_indices: Any = importlib.import_module("timm.models._features").feature_take_indices
except ImportError as error:
    raise ImportError(
        f"vggfast.integrations.timm needs timm, which cannot be imported here ({error}): pip install timm"
    ) from error

NAMES = ("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")
PREFIX = "vggfast_"

__all__ = ["VGG"]


class VGG(timm_vgg.VGG):  # type: ignore[misc]
    """timm's VGG, whose `features` is a `FusedSequential`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        convert(self)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's; the layers between two features run as fused as they can be."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected NCHW, got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.feature_ends), indices)
        intermediates = []
        start = 0
        for index, end in enumerate(self.feature_ends):
            if start >= len(self.features) or (stop_early and index > last):
                break
            x = self.features[start : end + 1](x)
            start = end + 1
            if index in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)


default_cfgs = timm_models.generate_default_cfgs(
    {
        f"{PREFIX}{name}.tv_in1k": {
            "hf_hub_id": f"timm/{name}.tv_in1k",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "features.0",
            "classifier": "head.fc",
            "license": "bsd-3-clause",
        }
        for name in NAMES
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    if name.endswith("_bn"):
        kwargs.setdefault("norm_layer", nn.BatchNorm2d)
    return timm_models.build_model_with_cfg(
        VGG,
        PREFIX + name,
        pretrained,
        model_cfg=timm_vgg.cfgs[name.removesuffix("_bn")],
        feature_cfg={
            "out_indices": kwargs.pop("out_indices", (0, 1, 2, 3, 4, 5)),
            "feature_cls": "getter",
            "flatten_sequential": True,  # for those who ask for feature_cls="list", "dict" or "hook"
        },
        pretrained_filter_fn=lambda state: to_timm(to_torchvision(state)),
        **kwargs,
    )


def _register(name: str) -> None:
    builder: Any = functools.partial(_create, name)
    builder.__name__ = PREFIX + name
    builder.__module__ = __name__
    builder.__doc__ = f"timm's {name} on fused kernels; arguments as timm's."
    setattr(sys.modules[__name__], builder.__name__, timm_models.register_model(builder))


for _name in NAMES:
    _register(_name)
