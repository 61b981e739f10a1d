"""Whole networks, a training step (forward, cross-entropy, backward): gradients are checked before the step is timed."""

from __future__ import annotations

import pytest
from conftest import CLOCK

from vggfast.bench.results import Json

PART = "training"
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_training(replay: Json) -> None:
    assert replay["error"] <= replay["tolerance"]
    assert replay["seconds"]["p10"] <= replay["seconds"]["median"] <= replay["seconds"]["p90"]
