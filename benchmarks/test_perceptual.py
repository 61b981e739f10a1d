"""Losses on VGG16's features, with the gradient of the images: both are checked before the step is timed."""

from __future__ import annotations

import pytest
from conftest import CLOCK

from vggfast.bench.results import Json

PART = "perceptual"
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_perceptual(replay: Json) -> None:
    assert replay["error"] <= replay["tolerance"]
    assert replay["seconds"]["p10"] <= replay["seconds"]["median"] <= replay["seconds"]["p90"]
