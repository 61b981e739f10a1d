"""What the tests of the models share: VGGs that cost little, and torchvision where it is installed."""

import pytest
import torch
from torch import nn

try:
    import torchvision.models as torchvision_models
except ImportError:
    torchvision_models = None

needs_torchvision = pytest.mark.skipif(
    torchvision_models is None, reason="compares with torchvision, which is not installed: pip install torchvision"
)

BUILDERS = ["vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]


class SmallLinear(nn.Linear):
    """nn.Linear with 64 for every 4096."""

    def __init__(self, in_features: int, out_features: int, **kwargs) -> None:
        super().__init__(*(64 if size == 4096 else size for size in (in_features, out_features)), **kwargs)


def on_meta(builder, **kwargs):
    with torch.device("meta"):
        return builder(**kwargs)


def assert_same_parameters(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
