"""After `import vggfast.integrations.torchvision`, `torchvision.models.get_model("vggfast_vgg16", …)` makes vggfast's VGG16.

So do `list_models`, `get_model_builder` and, for those with published weights, `get_model_weights`.
"""

import functools
import importlib
import inspect
from typing import Any

from vggfast import models

try:
    torchvision_models: Any = importlib.import_module("torchvision.models")
    register_model: Any = importlib.import_module("torchvision.models._api").register_model
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    raise ImportError(
        "vggfast.integrations.torchvision needs torchvision, which cannot be imported here "
        f"({error}): pip install torchvision"
    ) from error

NAMES = (
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vgg16c", "vgg11_lrn",
)  # fmt: skip
PREFIX = "vggfast_"


def _register(name: str) -> None:
    builder = getattr(models, name)
    published = getattr(torchvision_models, f"{name.upper()}_Weights", None)

    @functools.wraps(builder)
    def build(*args: Any, **kwargs: Any) -> models.VGG:
        return builder(*args, **kwargs)  # type: ignore[no-any-return]

    build.__name__ = PREFIX + name
    # torchvision learns a builder's weights from the annotation of its argument.
    annotation = published | None if published is not None else str | None
    weights = inspect.Parameter("weights", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    progress = inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD, annotation=Any)
    build.__signature__ = inspect.Signature([weights, progress, rest], return_annotation=models.VGG)  # type: ignore[attr-defined]
    if build.__name__ not in torchvision_models.list_models():
        register_model(build.__name__)(build)


for _name in NAMES:
    _register(_name)
