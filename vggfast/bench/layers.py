"""The one table of convolution shapes, and what they cost: operations and bytes. Benchmarks and tests both read it."""

from __future__ import annotations

from typing import NamedTuple

from vggfast.models import cfgs

CONFIGS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
FULLY_CONNECTED = [(512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)]


class Layer(NamedTuple):
    """A 3x3 convolution of a square image with ReLU, and a 2x2 pool behind it where ``pool`` is set."""

    name: str
    c_in: int
    c_out: int
    size: int  # height and width before pooling, in pixels
    pool: bool

    def has(self, task: str) -> bool:
        """Whether the task is one of the layer: images need no gradient."""
        return task != "grad_input" or self.c_in != 3

    def gflop(self, batch: int) -> float:
        """Operations of one direct convolution, in 1e9; a multiplication and an addition count as two."""
        return 2e-9 * batch * self.size**2 * 9 * self.c_in * self.c_out

    def winograd_gflop(self, batch: int, edges: bool = False) -> float:
        """Operations of F(4x4, 3x3)'s products, in 1e9: 36 for each 4x4 tile and pair of channels; the transforms not counted.

        ``edges``: where one or two pixels are left for the last row and column of tiles, F(2) computes these.
        """
        points = 6 * -(-self.size // 4)  # of a row of tiles, in one dimension
        if edges and self.size % 4 in (1, 2):
            points -= 2
        return 2e-9 * batch * points**2 * self.c_in * self.c_out

    def gigabytes(self, batch: int, itemsize: int) -> float:
        """What must be moved at least, in 1e9 bytes: input, filters and bias read once, the (pooled) output written once."""
        output = batch * self.c_out * (self.size // 2 if self.pool else self.size) ** 2
        return 1e-9 * itemsize * (batch * self.c_in * self.size**2 + 9 * self.c_in * self.c_out + self.c_out + output)


def conv_layers(model: str, size: int = 224) -> list[Layer]:
    """The convolutions of vgg11 … vgg19 on ``size`` x ``size`` images, named as in the paper: conv<block>_<index>."""
    layers: list[Layer] = []
    block, index, c_in = 1, 1, 3
    config = cfgs[CONFIGS[model]]
    for this, following in zip(config, [*config[1:], None], strict=True):
        if isinstance(this, int):
            layers.append(Layer(f"conv{block}_{index}", c_in, this, size, following == "M"))
            index, c_in = index + 1, this
        else:
            block, index, size = block + 1, 1, size // 2
    return layers


VGG16_LAYERS = conv_layers("vgg16")


def _other(c_in: int, c_out: int, size: int) -> Layer:
    return Layer(f"{c_in}to{c_out}at{size}", c_in, c_out, size, pool=False)


# Layers of other networks, and of VGG on other images, with the batch that they are measured at: few channels, as small networks and
# the ends of decoders have them; numbers that fill no block; U-Nets; SSD's images of 300x300; images of 64x64 and 32x32.
OTHER_LAYERS = {
    _other(3, 16, 224): 8,
    _other(8, 16, 112): 8,
    _other(16, 16, 112): 8,
    _other(16, 32, 112): 8,
    _other(64, 12, 112): 8,
    _other(64, 3, 112): 8,
    _other(48, 48, 112): 8,
    _other(96, 192, 56): 8,
    _other(320, 320, 64): 1,
    _other(768, 256, 28): 8,
    _other(64, 64, 300): 1,
    _other(512, 512, 38): 1,
    _other(256, 256, 16): 32,
    _other(64, 64, 32): 128,
    _other(512, 512, 4): 128,
    _other(512, 512, 2): 128,
}
