"""What autograd keeps for the backward pass, and the most that a run takes."""

from __future__ import annotations

import pytest
from conftest import CLOCK

from vggfast.bench.measure import Entry
from vggfast.bench.results import Json

PART = "memory"
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_memory(replay: Json, entry: Entry) -> None:
    assert replay["peak_bytes"] > 0
    if entry.case.task == "training":
        assert replay["saved_bytes"] > 0
