"""Whole networks, inference: vggfast beside torch and the runtimes, each checked before it is timed."""

from __future__ import annotations

import pytest
from conftest import CLOCK

from vggfast.bench.results import Json

PART = "inference"
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_inference(replay: Json) -> None:
    assert replay["error"] <= replay["tolerance"]
    assert replay["seconds"]["p10"] <= replay["seconds"]["median"] <= replay["seconds"]["p90"]
