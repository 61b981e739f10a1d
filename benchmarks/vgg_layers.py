"""The table of convolution shapes is the package's; tests and benchmarks import it from here."""

from vggfast.bench.layers import VGG16_LAYERS, Layer

__all__ = ["VGG16_LAYERS", "Layer"]
