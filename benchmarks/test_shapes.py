"""Convolutions with ReLU of other networks and other images than VGG16's: forward and both gradients, beside torch."""

from __future__ import annotations

import pytest
from conftest import CLOCK

from vggfast.bench.results import Json

PART = "shapes"
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_shapes(replay: Json) -> None:
    assert replay["error"] <= replay["tolerance"]
    assert replay["seconds"]["p10"] <= replay["seconds"]["median"] <= replay["seconds"]["p90"]
