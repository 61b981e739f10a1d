"""A paper model of the CUDA kernels: per layer, the time that counted bytes and operations take at stated ceilings.

Nothing here was measured. It is what a measurement can be held against: where a kernel is slower than its prediction, a limit is
missing from the model; where it is faster, a ceiling is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from vggfast.explanation import Explanation

__all__ = ["Ceilings", "Prediction", "Step", "predict", "predict_step", "table"]


@dataclass(frozen=True)
class Ceilings:
    """What the model divides by. The defaults are assumptions about an H200, to be replaced by what the GPU at hand shows."""

    tflops: float = 788  # bf16 and fp16 tensor cores, dense; TF32 has half of it
    dram_tb: float = 4.3  # TB/s
    l2_bytes: float = 32  # to one SM, a clock
    ghz: float = 1.755
    sms: int = 132

    def __str__(self) -> str:
        return (
            f"Assumed, not measured: {self.tflops:g} TFLOP/s, {self.dram_tb:g} TB/s from DRAM, {self.l2_bytes:g} bytes a clock "
            f"from L2 to each of {self.sms} SMs at {self.ghz:g} GHz."
        )


@dataclass(frozen=True)
class Prediction:
    """One step of one layer. `flop` and `dram` count what the step must do, the times what the planned kernel does: `tensor` with
    its idle SMs and padded tiles, `l2` with what its tiles fetch again (0 where the plan does not say).
    """

    name: str
    step: str
    flop: int
    dram: int
    tensor_us: float
    dram_us: float
    l2_us: float

    @property
    def us(self) -> float:
        """The predicted time in microseconds: the longest of the three."""
        return max(self.tensor_us, self.dram_us, self.l2_us)

    @property
    def bound(self) -> str:
        """Which of the three that is."""
        return {self.tensor_us: "tensor cores", self.dram_us: "DRAM", self.l2_us: "L2"}[self.us]


@dataclass(frozen=True)
class Step:
    """A 3x3 convolution of ``[n, c, h, w]`` to k channels, pooled or not, in elements of so many bytes."""

    n: int
    c: int
    k: int
    h: int
    w: int
    pool: bool
    bytes: int

    @property
    def row(self) -> int:
        """Channels in 128 bytes, which a stage of forward and grad_input reduces."""
        return 128 // self.bytes

    @property
    def flop(self) -> int:
        """Multiplications and additions of nine taps."""
        return 18 * self.n * self.h * self.w * self.c * self.k

    def dram(self, step: str, workspace: int) -> int:
        """Every tensor once; the workspace is written and read."""
        pixels = self.n * self.h * self.w
        outputs = pixels * self.k // (4 if self.pool else 1)
        codes = outputs // 4 if self.pool else 0
        weight = 9 * self.c * self.k * self.bytes
        image, output = pixels * self.c * self.bytes, outputs * self.bytes + codes
        if step == "forward":
            return image + weight + output + 2 * workspace
        return image + weight + output + outputs * self.bytes + 2 * workspace  # the gradient and y


_PLAN = re.compile(
    r"wgmma(_patch)? tile=m(\d+)n(\d+) box=(\d+)x(\d+)x(\d+) tiles=(\d+)x(\d+) splits=(\d+) blocks=(\d+) workspace=(\d+)"
)


def predict_step(name: str, kernel: str, step: str, p: Step, ceilings: Ceilings) -> Prediction:
    """Of "forward", "grad_input" or "grad_weight" on the `kernel` that `explain` names, with its plan."""
    plan = _PLAN.search(kernel)
    rate = ceilings.tflops * 1e6 * 2 / p.bytes  # operations a microsecond
    tensor = p.flop / rate
    l2, workspace = 0.0, 0
    if plan is not None:
        rows, columns, _, box_h, box_n, tiles_m, tiles_n, splits, blocks, workspace = map(int, plan.groups()[1:])
        if plan[1]:
            lines = (box_h + 2) * box_n
            stage_bytes, stages, stage_flop = _patch_stage(step, p, rows, columns, 10 * lines, tiles_n, splits)
        else:
            stage_bytes, stages, stage_flop = _stage(step, p, rows, columns, tiles_m * tiles_n, splits, blocks)
        busiest = stages * ceil(_items(step, tiles_m * tiles_n, splits, blocks) / ceilings.sms)
        tensor = busiest * stage_flop / (rate / ceilings.sms)
        l2 = busiest * stage_bytes / (ceilings.l2_bytes * ceilings.ghz * 1e3)
    dram = p.dram(step, workspace)
    return Prediction(name, step, p.flop, dram, tensor, dram / (ceilings.dram_tb * 1e6), l2)


def _items(step: str, tiles: int, splits: int, blocks: int) -> int:
    """Pieces of work, of which each SM does one at a time."""
    return blocks if step == "grad_weight" else tiles * splits


def _stage(step: str, p: Step, rows: int, columns: int, tiles: int, splits: int, blocks: int) -> tuple[int, int, int]:
    """Bytes that a stage fetches, stages of a piece of work, operations of a stage."""
    if step == "grad_weight":
        pixels = 64
        stages = ceil(p.n * p.h * p.w / pixels / (blocks // tiles))
        return 2 * pixels * (rows + 3 * columns), stages, 2 * pixels * rows * columns * 3
    stages = ceil(9 * ceil((p.c if step == "forward" else p.k) / p.row) / splits)
    return 128 * (rows + columns), stages, 2 * p.row * rows * columns


def _patch_stage(
    step: str, p: Step, rows: int, columns: int, patch: int, tiles_n: int, splits: int
) -> tuple[int, int, int]:
    """The same where a stage is 64 channels: a patch of so many pixels, and the filters of nine taps unless they stay."""
    channels = ceil((p.c if step == "forward" else p.k) / 64)
    stay = columns == 64 and channels == 1 and tiles_n == 1
    return 128 * (patch + (0 if stay else 9 * columns)), ceil(channels / splits), 9 * 2 * 64 * rows * columns


def predict(explanation: Explanation, ceilings: Ceilings | None = None) -> list[Prediction]:
    """The predictions of every fused convolution of `explain(..., gpu="9.0,132")`, and in training mode of its gradients."""
    return list(_predictions(explanation, ceilings or Ceilings()))


def _predictions(explanation: Explanation, ceilings: Ceilings) -> Iterator[Prediction]:
    for row in explanation.rows:
        backward = row.layers in ("grad_input", "grad_weight")
        if not row.fused or not (backward or row.layers.startswith("Conv")):
            continue
        x, y = (row.output, row.input) if backward else (row.input, row.output)
        size = 4 if row.dtype == "float32" else 2
        problem = Step(x[0], x[1], y[1], x[2], x[3], x[2] != y[2], size)
        yield predict_step(row.name, row.kernel, row.layers if backward else "forward", problem, ceilings)


def table(predictions: list[Prediction], ceilings: Ceilings) -> str:
    """The predictions as text, with totals and the ceilings."""
    lines: list[tuple[str, ...]] = [
        ("layer", "step", "GFLOP", "MB", "tensor us", "DRAM us", "L2 us", "predicted us", "bound by")
    ]
    for p in predictions:
        times = (f"{time:.1f}" for time in (p.tensor_us, p.dram_us, p.l2_us, p.us))
        lines.append((p.name, p.step, f"{p.flop / 1e9:.2f}", f"{p.dram / 1e6:.1f}", *times, p.bound))
    total = sum(p.us for p in predictions)
    lines.append(("total", "", f"{sum(p.flop for p in predictions) / 1e9:.2f}", "", "", "", "", f"{total:.1f}", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            cell.ljust(w) if i in (0, 1, 8) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*(line.rstrip() for line in shown), str(ceilings)])
