"""Networks that are measured beside torchvision's."""

from __future__ import annotations

import torch
from torch import nn

from vggfast import models
from vggfast.fused import FusedSequential
from vggfast.models import cfgs, make_layers

SMALL = "vggfast.bench.networks:vgg16_32x32"
BATCH_NORM = "vggfast.bench.networks:vgg16_bn"


def vgg16_32x32() -> nn.Module:
    """VGG16's convolutions as they are trained on CIFAR-10's images of 32x32: the last ones see 2x2 pixels, and one fully connected
    layer follows. The same seed gives the same weights in every process.
    """
    torch.manual_seed(0)
    return FusedSequential(*make_layers(cfgs["D"]), nn.Flatten(), nn.Linear(512, 10))


def vgg16_bn() -> nn.Module:
    """VGG16 with BatchNorm, without dropout; the same weights in every process."""
    torch.manual_seed(0)
    return models.vgg16_bn(dropout=0.0)
