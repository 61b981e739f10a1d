"""The one table of convolution shapes: VGG16's thirteen on a 224 x 224 image. Benchmarks and tests both read it."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A 3x3 convolution of a square image with ReLU, and a 2x2 pool behind it where ``pool`` is set."""

    name: str
    c_in: int
    c_out: int
    size: int  # height and width before pooling, in pixels
    pool: bool

    def gflop(self, batch: int) -> float:
        """Operations of one direct convolution, in 1e9; a multiplication and an addition count as two."""
        return 2e-9 * batch * self.size**2 * 9 * self.c_in * self.c_out


VGG16_LAYERS = [
    Layer("conv1_1", 3, 64, 224, False),
    Layer("conv1_2", 64, 64, 224, True),
    Layer("conv2_1", 64, 128, 112, False),
    Layer("conv2_2", 128, 128, 112, True),
    Layer("conv3_1", 128, 256, 56, False),
    Layer("conv3_2", 256, 256, 56, False),
    Layer("conv3_3", 256, 256, 56, True),
    Layer("conv4_1", 256, 512, 28, False),
    Layer("conv4_2", 512, 512, 28, False),
    Layer("conv4_3", 512, 512, 28, True),
    Layer("conv5_1", 512, 512, 14, False),
    Layer("conv5_2", 512, 512, 14, False),
    Layer("conv5_3", 512, 512, 14, True),
]
