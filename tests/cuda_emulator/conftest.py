from __future__ import annotations

import platform
import shutil

import pytest
from cuda_emulator_harness import Emulator, build


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """All kernels, compiled for the emulator."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the CUDA emulator needs g++ on x86-64")
    return build(tmp_path_factory.mktemp("cuda_emulator"))
