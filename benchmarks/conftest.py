"""``pytest benchmarks --benchmark-only``: the quick form; ``--full`` for every batch, rival and network.

A group of contenders is measured by ``vggfast.bench`` in interleaved rounds when the first test of the group asks for it. Each test
is one contender of one group, and gives its times to pytest-benchmark.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from vggfast import _C
from vggfast.bench import machine, suites, tables
from vggfast.bench.measure import Effort, Entry, Group, Lab
from vggfast.bench.results import Json

MEASURED = pytest.StashKey[list[Json]]()
BESIDE_CUDNN = pytest.StashKey[list[str]]()  # a line a layer, of test_cudnn.py


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vggfast")
    group.addoption("--full", action="store_true", help="every batch, rival and network: takes far longer")
    group.addoption("--threads", type=int, default=min(2, machine.cores()), help="CPU threads of every contender")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``part`` in its module's PART becomes one test for each contender of each group."""
    if "entry" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    groups = suites.groups(metafunc.module.PART, device(), options.threads, options.full)
    pairs = [(group, entry) for group in groups for entry in group.entries]
    metafunc.parametrize(("group", "entry"), pairs, ids=[f"{group.id} | {entry.label}" for group, entry in pairs])


class Clock:
    """Time as it was measured. pytest-benchmark times one function after another; here the rounds were interleaved, so each test
    replays its contender's: ``replay`` moves the clock by one run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def replay(self) -> None:
        self.now += next(self.runs)


CLOCK = Clock()


class Measurements:
    """Measures a group once, and only with the contenders that were selected (``-k openvino``), vggfast among them."""

    def __init__(self, lab: Lab, items: list[pytest.Item], full: bool) -> None:
        self._lab, self._effort = lab, suites.FULL if full else suites.QUICK
        self._labels: dict[str, set[str]] = {}
        for item in items:
            params = getattr(item, "callspec", None)
            if params and "entry" in params.params:
                self._labels.setdefault(params.params["group"].id, set()).add(params.params["entry"].label)
        self.records: dict[str, Json] = {}

    def contender(self, group: Group, entry: Entry) -> Json:
        if group.id not in self.records:
            self.records[group.id] = self.group(
                suites.selected(group, self._labels[group.id]), self._effort[group.part]
            )
        found: Json = next(c for c in self.records[group.id]["contenders"] if c["label"] == entry.label)
        return found

    def group(self, group: Group, effort: Effort) -> Json:
        return self._lab.measure_memory(group) if group.part == "memory" else self._lab.time(group, effort)

    def ceilings(self) -> Json:
        return self._lab.ceilings(device())


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Iterator[Measurements]:
    options = request.config.option
    with Lab(options.threads) as lab:
        made = Measurements(lab, request.session.items, options.full)
        yield made
        request.config.stash[MEASURED] = list(made.records.values())


@pytest.fixture
def replay(benchmark: Any, measurements: Measurements, group: Group, entry: Entry) -> Json:
    """The contender's record, its times given to pytest-benchmark. Skips, with the reason, a rival that is not installed; fails for one
    that gave a wrong result, or none."""
    benchmark.group = group.id
    record = measurements.contender(group, entry)
    if "missing" in record:
        pytest.skip(f"{entry.label}: {record['missing']}")
    for why in ("refused", "failed"):
        assert why not in record, f"{entry.label}, {why} before it was timed: {record[why]}"
    benchmark.extra_info.update(
        {key: value for key, value in record.items() if key not in ("seconds", "rounds", "label")}
    )
    benchmark.extra_info["ceilings"] = measurements.ceilings()
    CLOCK.runs = iter(record.get("rounds", [0.0]))
    benchmark.pedantic(CLOCK.replay, rounds=len(record.get("rounds", [0.0])))
    return record


def pytest_report_header() -> str:
    place = torch.cuda.get_device_name() if device() == "cuda" else machine.cpu_name(machine.cpu_info())
    return f"vggfast: {place}, isa {_C.cpu_isa()}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Beside pytest-benchmark's tables, which have times only: ratios, errors, rates, and who is missing."""
    for line in config.stash.get(BESIDE_CUDNN, []):
        terminalreporter.line(line)
    groups = config.stash.get(MEASURED, [])
    if not groups:
        return
    width = int(os.environ.get("COLUMNS", 0)) or (None if Console().is_terminal else 150)
    console = Console(width=width)
    terminalreporter.section("vggfast beside others")
    for table in tables.tables(groups):
        console.print(table)
    for line in tables.reasons(groups):
        terminalreporter.line(f"not measured: {line}", yellow=True)
    for line in tables.disturbances(groups):
        terminalreporter.line(f"disturbed: {line}", yellow=True)
