"""Options and fixtures of the benchmarks. Run: ``pytest benchmarks --benchmark-only`` (``--full`` for more rounds and batches)."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmark more batch sizes, with more rounds")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return 25 if request.config.getoption("--full") else 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", [1, 8] if metafunc.config.getoption("--full") else [1], ids="n{}".format)


def pytest_report_header() -> str:
    from vggfast import _C

    return f"vggfast: isa {_C.cpu_isa()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
