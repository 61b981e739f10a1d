"""VGG on fused Conv3x3 + bias + ReLU + MaxPool kernels: a drop-in for torchvision's."""

import pkgutil

# After `pip install .` the compiled module lies beside the installed package; a checkout's own directory, first on the path when
# Python starts in it, has none. Both directories then make up the package.
__path__ = pkgutil.extend_path(__path__, __name__)

import torch as _torch  # noqa: F401  (loads the libraries that _C is linked to)

from vggfast import losses, ops, switches
from vggfast._C import build_info as _build_info
from vggfast.allocator import keep_freed_memory
from vggfast.dense import to_dense
from vggfast.explanation import Explanation, explain
from vggfast.fused import FusedSequential, convert
from vggfast.image_descriptors import descriptors
from vggfast.loading import LoadedModel, load_model, save_weights
from vggfast.models import (
    VGG,
    VGG11,
    VGG11LRN,
    VGG13,
    VGG16,
    VGG16C,
    VGG19,
    make_layers,
    vgg11,
    vgg11_bn,
    vgg11_lrn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg16c,
    vgg19,
    vgg19_bn,
)
from vggfast.taps import Features, features
from vggfast.weights import (
    VGG11_BN_Weights,
    VGG11_Weights,
    VGG13_BN_Weights,
    VGG13_Weights,
    VGG16_BN_Weights,
    VGG16_Weights,
    VGG19_BN_Weights,
    VGG19_Weights,
    load_weights,
)

__version__: str = _build_info()["version"]

__all__ = [
    "VGG",
    "VGG11",
    "VGG11LRN",
    "VGG13",
    "VGG16",
    "VGG16C",
    "VGG19",
    "Explanation",
    "Features",
    "FusedSequential",
    "LoadedModel",
    "VGG11_BN_Weights",
    "VGG11_Weights",
    "VGG13_BN_Weights",
    "VGG13_Weights",
    "VGG16_BN_Weights",
    "VGG16_Weights",
    "VGG19_BN_Weights",
    "VGG19_Weights",
    "convert",
    "descriptors",
    "explain",
    "features",
    "keep_freed_memory",
    "load_model",
    "load_weights",
    "losses",
    "make_layers",
    "ops",
    "save_weights",
    "switches",
    "to_dense",
    "vgg11",
    "vgg11_bn",
    "vgg11_lrn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg16c",
    "vgg19",
    "vgg19_bn",
]
