"""Each of VGG16's convolutions with its ReLU and pool: forward, both gradients, and forward with backward."""

from __future__ import annotations

import pytest
from conftest import CLOCK

from vggfast.bench.results import Json

PART = "layers"
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_layers(replay: Json) -> None:
    assert replay["error"] <= replay["tolerance"]
    assert replay["seconds"]["p10"] <= replay["seconds"]["median"] <= replay["seconds"]["p90"]
