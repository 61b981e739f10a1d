"""`VGGFAST_CPU_ISA=aten`: torch's own operators on a CPU, which is also the default where nobody has timed the kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_bits, normal
from torch import Tensor, nn

from vggfast import FusedSequential, explain, ops, switches

WIDEST = switches.cpu_isas()[0]
OFF = "torch's own operators are asked for: VGGFAST_CPU_ISA=aten"


def network() -> FusedSequential:
    """Runs of each kind, a pool by itself, and a fully connected layer that a kernel would take."""
    return FusedSequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(512, 2048), nn.ReLU(inplace=True),
    )  # fmt: skip


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("training", [False, True])
def test_aten_runs_the_plain_modules(training: bool) -> None:
    model, x = network().train(training), normal(2, 3, 16, 16)
    plain = nn.Sequential(*model)
    fused = explain(model, x).rows
    assert len(fused) < len(model)
    assert sum(row.fused for row in fused) >= 4
    switches.set_cpu_isa("aten")
    rows = explain(model, x).rows
    assert {row.kernel for row in rows} == {"aten"}
    assert len(rows) == len(model) - 1  # all but Flatten
    assert {row.reason for row in rows if row.layers.startswith(("Conv", "MaxPool", "Linear"))} == {
        switches.why_not_cpu()
    }
    assert switches.why_not_cpu()
    for got, expected in zip(results(model, x), results(plain, x), strict=True):
        assert_same_bits(got, expected)


def test_aten_ops_are_torchs() -> None:
    x, weight, bias = normal(2, 16, 12, 12), normal(16, 16, 3, 3), normal(16)
    rows, matrix = normal(2, 1024), normal(1024, 1024)
    fused = ops.conv3x3(x, weight, bias, pool=True)
    switches.set_cpu_isa("aten")
    assert_same_bits(
        ops.conv3x3(x, weight, bias, pool=True), F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2)
    )
    assert_same_bits(ops.max_pool2x2(x), F.max_pool2d(x, 2))
    assert_same_bits(ops.linear(rows, matrix, relu=True), F.relu(F.linear(rows, matrix)))
    switches.set_cpu_isa("baseline")
    assert switches.cpu_isa() == "baseline"
    switches.set_cpu_isa(WIDEST)
    assert_same_bits(ops.conv3x3(x, weight, bias, pool=True), fused)


def test_a_compiled_function_follows_the_switch() -> None:
    x, weight = normal(2, 16, 12, 12), normal(16, 16, 3, 3)
    compiled = torch.compile(lambda x: ops.conv3x3(x, weight), backend="eager", fullgraph=True)
    fused = ops.conv3x3(x, weight)
    assert_same_bits(compiled(x), fused)
    switches.set_cpu_isa("aten")
    assert_same_bits(compiled(x), F.relu(F.conv2d(x, weight, padding=1)))
    switches.set_cpu_isa(WIDEST)
    assert_same_bits(compiled(x), fused)


DEFAULT = """
import platform
platform.machine = lambda: {machine!r}
from vggfast import switches
print(switches.cpu_isa(), "|", switches.why_not_cpu())
"""


@pytest.mark.parametrize(
    ("machine", "value", "on", "why"),
    [
        ("x86_64", None, True, ""),
        ("x86_64", "aten", False, OFF),
        ("aarch64", None, False, f"VGGFAST_CPU_ISA={switches.cpu_isas()[0]} turns them on"),
        ("aarch64", "auto", False, "no machine of this architecture has timed the kernels yet"),
        ("aarch64", "baseline", True, ""),
    ],
)
def test_the_default_depends_on_the_architecture(machine: str, value: str | None, on: bool, why: str) -> None:
    environment = {key: text for key, text in os.environ.items() if key != "VGGFAST_CPU_ISA"}
    environment |= {} if value is None else {"VGGFAST_CPU_ISA": value}
    code = DEFAULT.format(machine=machine)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    isa, reason = done.stdout.strip("\n").split(" | ") if " | " in done.stdout else (done.stdout.split()[0], "")
    assert (isa != "aten") == on
    assert (why in reason) if why else reason == ""
