"""Contenders for the tests of the measurement code: workers import this module by name."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch
from torch import nn

from vggfast import FusedSequential
from vggfast.bench import cases, torch_runners
from vggfast.bench.cases import Case
from vggfast.bench.contenders import Runner


def tiny() -> nn.Module:
    """A network for [N, 3, 32, 32]."""
    torch.manual_seed(0)
    return FusedSequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24 * 8 * 8, 10),
    )  # fmt: skip


def _layer(case: Case, change: Any) -> Runner:
    layer = case.layer
    assert layer is not None
    data = [cases.layer_data(case, i) for i in range(cases.BUFFERS)]

    def run(buffer: int) -> torch.Tensor:
        d = data[buffer]
        with torch.inference_mode():
            return change(cases.plain_layer(d.x, d.weight, d.bias, layer.pool))

    return Runner(run, lambda y: {"y": y}, "made for a test")


def wrong_at_one_place(case: Case, files: dict[str, str]) -> Runner:
    def change(y: torch.Tensor) -> torch.Tensor:
        y.view(-1)[5] += 0.1 * y.norm()
        return y

    return _layer(case, change)


def wrong_bias_gradient(case: Case, files: dict[str, str]) -> Runner:
    """torch's gradients, that of the bias off by 3e-5 of itself."""
    runner = torch_runners.build(case, files)
    outputs = runner.outputs

    def changed(result: Any) -> cases.Outputs:
        found = outputs(result)
        return found | {"grad of bias": found["grad of bias"] * (1 + 3e-5)}

    runner.outputs = changed
    return runner


def not_a_number(case: Case, files: dict[str, str]) -> Runner:
    return _layer(case, lambda y: y * float("nan"))


def remembers(case: Case, files: dict[str, str]) -> Runner:
    """Right for the first input, and then no longer calculates."""
    first: list[torch.Tensor] = []

    def change(y: torch.Tensor) -> torch.Tensor:
        first.append(y)
        return first[0]

    return _layer(case, change)


def chatty(case: Case, files: dict[str, str]) -> Runner:
    """Right, and prints where answers are expected."""
    print("chatter", flush=True)
    os.write(1, b"more chatter\n")
    return _layer(case, lambda y: y)


def raises(case: Case, files: dict[str, str]) -> Runner:
    raise RuntimeError("cannot be set up")


def dies(case: Case, files: dict[str, str]) -> Runner:
    os._exit(7)


def without_memory(case: Case, files: dict[str, str]) -> Runner:
    """Right, and in whose process memory cannot be measured."""
    runner = torch_runners.build(case, files)
    run, done = runner.run, []

    def counted(buffer: int) -> Any:
        done.append(buffer)
        if len(done) > 2:  # the check's
            raise RuntimeError("no such counter")
        return run(buffer)

    runner.run = counted
    return runner


def _after(runs: int, end: Any) -> Any:
    """Right so many times: to be checked takes two, to be planned for two more."""
    done = []

    def change(y: torch.Tensor) -> torch.Tensor:
        done.append(y)
        if len(done) > runs:
            end()
        return y

    return change


def fails_later(case: Case, files: dict[str, str]) -> Runner:
    def end() -> None:
        raise RuntimeError("no more")

    return _layer(case, _after(5, end))


def dies_later(case: Case, files: dict[str, str]) -> Runner:
    return _layer(case, _after(5, lambda: os._exit(7)))


SPIN_S = 0.3


def spins(case: Case, files: dict[str, str]) -> Runner:
    """Leaves a thread that spins for SPIN_S of CPU time after each run, as thread pools do."""

    def spin() -> None:
        while time.thread_time() < SPIN_S:
            pass

    def change(y: torch.Tensor) -> torch.Tensor:
        threading.Thread(target=spin, daemon=True).start()
        return y

    return _layer(case, change)
