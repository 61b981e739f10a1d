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


NARROW = [4, "M", 6, "M", 8, 8, "M", 8, 8, "M", 8, 8, "M"]  # configuration A with few channels
NARROW_D = [4, 4, "M", 6, 6, "M", 8, 8, 8, "M", 8, 8, 8, "M", 8, 8, 8, "M"]


def narrow_vgg(cfg=NARROW, num_classes=7, in_channels=3, batch_norm=False, hidden=16, grid=7, seed=0, lively=True):
    """A VGG of few channels, in evaluation mode; `lively`: with scores far enough apart to tell one class from another."""
    from vggfast.models import VGG, make_layers

    with torch.device("meta"):
        model = VGG(nn.Identity(), num_classes, init_weights=False)
    torch.manual_seed(seed)
    model.features = make_layers(cfg, batch_norm, in_channels)
    model.avgpool = nn.AdaptiveAvgPool2d((grid, grid))
    channels = [layer for layer in cfg if isinstance(layer, int)][-1]
    for index, sizes in ((0, (channels * grid**2, hidden)), (3, (hidden, hidden)), (6, (hidden, num_classes))):
        model.classifier[index] = nn.Linear(*sizes)
    for name, value in model.state_dict().items():
        if lively and value.is_floating_point():
            if value.ndim > 1:
                nn.init.kaiming_normal_(value, nonlinearity="relu")
            else:
                value.uniform_(0.5, 1.5) if "running_var" in name else value.uniform_(-0.2, 0.2)
    return model.eval()
