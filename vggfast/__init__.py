"""VGG on fused Conv3x3 + bias + ReLU + MaxPool kernels: a drop-in for torchvision's."""

import pkgutil

# After `pip install .` the compiled module lies beside the installed package; a checkout's own directory, first on the path when
# Python starts in it, has none. Both directories then make up the package.
__path__ = pkgutil.extend_path(__path__, __name__)

import torch as _torch  # noqa: E402, F401  (loads the libraries that _C is linked to)

from vggfast import ops  # noqa: E402

__all__ = ["ops"]
