"""scripts/gpu_check.sh and what it runs, as far as a machine without a GPU can tell."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vggfast import _C
from vggfast.bench import suites
from vggfast.bench.layers import VGG16_LAYERS
from vggfast.cuda_plan import Gpu

SCRIPTS = Path(__file__).parents[1] / "scripts"
FIGURES = [
    *(
        "layers-batch256",
        "predicted-batch256",
        "inference-batch256",
        "layers-batch1",
        "inference-batch1",
        "training-batch256",
    ),
    *("layers-batch32", "memory", "inference-batch32", "training-batch32", "layers-tf32", "predicted", "compiled"),
]
PROOFS = ("errors", "numbers", "layouts", "runtime", "memcheck", "racecheck")
PLANS = ("sm80", "sm90", "sm90patch")
STEPS = [
    *("environment", "build", "info"),
    *(f"{plan}-every-kernel" for plan in PLANS),
    *FIGURES,
    "inference-tf32",
    *(f"{plan}-{step}" for plan in reversed(PLANS) for step in PROOFS),
]
needs_cuda_build = pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA kernels: no plans to ask")


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", SCRIPTS / "gpu_check.sh", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_dry_run_names_every_step(tmp_path: Path) -> None:
    done = gpu_check("--dry", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == STEPS
    assert list(tmp_path.iterdir()) == []


def test_the_figures_fit_in_nine_minutes(tmp_path: Path) -> None:
    """By what the steps are expected to take; a step's own limit stops it long before it takes the time of all others."""
    lines = [line.split() for line in gpu_check("--dry", tmp_path).stdout.splitlines()]
    expected, limits = ({line[0]: int(line[i].removesuffix("s")) for line in lines} for i in (1, 2))
    assert sum(expected[step] for step in STEPS[: STEPS.index(FIGURES[-1]) + 1]) <= 520
    assert all(expected[step] < limits[step] <= 200 for step in STEPS)


def test_what_the_figures_measure(tmp_path: Path) -> None:
    """Every batch of layers, networks and memory that the benchmarks have for a GPU is some step's, and the layers' three tasks."""
    found: set[str] = set()
    for line in gpu_check("--dry", tmp_path).stdout.splitlines():
        if "record.py" not in line:
            continue
        part = re.search(r"--part (\w+)", line)[1]
        only = re.search(r"--only (.*?)(?: --| *$)", line)
        names = [group.id for group in suites.groups(part, "cuda", 2, True)]
        found |= {name for name in names if re.search(only[1] if only else "", name)}
    layers = [f"{layer.name} {task} bf16 batch {batch}" for layer in VGG16_LAYERS for batch in (1, 32, 256)
              for task in ("forward", "grad_input", "grad_weight") if task != "grad_input" or layer.c_in != 3]  # fmt: skip
    networks = [f"vgg16 inference bf16 batch {batch}" for batch in (1, 32, 256)]
    networks += [f"vgg16 training bf16 batch {batch}" for batch in (32, 256)]
    layers += [f"conv{i}_2 {task} fp32 batch 32" for i in range(1, 6) for task in ("forward", "grad_input")]
    wanted = {
        *layers,
        *networks,
        "memory: vgg16 training bf16 batch 256",
        *(f"compiled: {name}" for name in layers if "bf16" in name),
    }
    assert found >= wanted


def test_without_a_gpu_every_step_says_so(tmp_path: Path) -> None:
    done = gpu_check("--only", "environment|info|errors|racecheck", tmp_path)
    assert done.returncode == 1, done.stderr
    steps = {row["step"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert steps.pop("environment")["outcome"] == "passed"
    assert list(steps) == ["info", "sm80-errors", "sm80-racecheck"]
    for name, row in steps.items():
        assert row["outcome"] == "no GPU"
        assert "no GPU" in row["detail"]
        assert "not run: no GPU" in (tmp_path / f"{name}.log").read_text()
    assert json.loads((tmp_path / "environment.json").read_text())["gpus"] == []
    assert "sm80-racecheck     no GPU" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", [(), ("--fast", "x"), ("a", "b")])
def test_wrong_arguments(arguments: tuple[str, ...]) -> None:
    done = gpu_check(*arguments)
    assert done.returncode == 2
    assert "OUT_DIR" in done.stderr


def selects(expression: str, test: str) -> bool:
    """What pytest's -k makes of words, "and" and "not"."""
    return bool(eval(re.sub(r"\b(?!and\b|not\b)\w+", lambda word: str(word[0] in test), expression)))


def test_the_selections_are_the_gpus_tests_each_once() -> None:
    files = ["tests/test_cuda.py", "tests/test_cuda_runtime.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    collected = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True).stdout.splitlines()
    names = [name for name in collected if "::" in name]
    lines = [line for line in (SCRIPTS / "gpu_check.sh").read_text().splitlines() if '"${tests[@]}"' in line]
    selections = [re.search(r'(tests/\S+) -k "(.*)"', line).groups() for line in lines]
    for name in names:
        test = name.split("::")[1]
        selected = [e for file, e in selections if name.startswith(file) and selects(e, test)]
        assert len(selected) == ("cpu" not in test), name
    assert sum("cpu" not in name for name in names) > 150


@pytest.fixture(scope="module")
def gpu_kernels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_kernels", SCRIPTS / "gpu_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GPUS = [(Gpu(*numbers), "sm80") for numbers in ((80, 108), (86, 84), (89, 142), (90, 132), (100, 148), (120, 170))]


@needs_cuda_build
@pytest.mark.parametrize(
    ("gpu", "plan"), [*GPUS, *((Gpu(90, sms), plan) for sms in (132, 114) for plan in ("sm90", "sm90patch"))]
)
def test_every_kernel_is_called(gpu_kernels: ModuleType, gpu: Gpu, plan: str) -> None:
    problems = list(gpu_kernels.problems(gpu, plan))
    reached = set().union(*(gpu_kernels.planned_kernels(p, gpu, plan) for p in problems))
    assert gpu_kernels.expected_kernels(plan) - reached == set()
    assert len(problems) <= 30  # compute-sanitizer is slow


@needs_cuda_build
def test_the_calls_are_good_ones(gpu_kernels: ModuleType) -> None:
    """On the CPU, as for a small GPU: its batches are small."""
    for p in gpu_kernels.problems(Gpu(80, 16), "sm80"):
        gpu_kernels.run(p, "cpu")
    assert torch.cuda.is_available() or gpu_kernels.main() == 1
