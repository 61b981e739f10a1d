"""Whole networks with fewer threads and with all: vggfast and torch, side by side."""

from __future__ import annotations

import pytest
from conftest import CLOCK

from vggfast.bench.results import Json

PART = "threads"
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_threads(replay: Json) -> None:
    assert replay["error"] <= replay["tolerance"]
    assert replay["seconds"]["p10"] <= replay["seconds"]["median"] <= replay["seconds"]["p90"]
