"""What the paper model predicts of a GPU's layers beside what was measured: where they differ, the model lacks a limit or has a
wrong ceiling."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from vggfast.bench import BenchError
from vggfast.bench.cases import Case
from vggfast.bench.contenders import VGGFAST
from vggfast.bench.results import Json, contender
from vggfast.roofline import Ceilings, Prediction, Step, predict_step

OURS = (VGGFAST.name, "vggfast sm90patch")
CUDNN = ("torch channels_last", "cudnn_convolution_relu")


@dataclass(frozen=True)
class Row:
    """One step of one layer. Times in microseconds; `cudnn_us` is the faster of what torch and cuDNN's fused convolution took."""

    layer: str
    step: str
    batch: int
    contender: str
    kernel: str
    predicted_us: float
    bound: str
    measured_us: float
    cudnn_us: float | None

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_us / self.predicted_us


def ceilings_of(data: Json) -> Ceilings:
    """The model's ceilings, with the rates that the same run measured in place of assumed ones."""
    run = data["runs"][max(data["runs"])]
    measured = run["ceilings"]
    defaults = Ceilings()
    return replace(
        defaults,
        tflops=measured["peak_gflops"].get("bf16", 1e3 * defaults.tflops) / 1e3,
        dram_tb=measured["dram_gbps"] / 1e3,
        sms=data["device"].get("sms", defaults.sms),
        ghz=data["device"].get("ghz", defaults.ghz),
    )


def rows(data: Json) -> list[Row]:
    """Of every layer's step that vggfast ran on a kernel of its own, in the order of the results. Raises BenchError where there is none."""
    if "gpu" not in data["device"]:
        raise BenchError("expected results of a GPU, got a CPU's: the model is of CUDA kernels")
    ceilings = ceilings_of(data)
    found = [row for label in OURS for group in data["groups"] if (row := _row(group, label, ceilings))]
    if not found:
        raise BenchError("expected layers that ran on vggfast's kernels, got none: was VGGFAST_CUDA_PLAN set?")
    return found


def _row(group: Json, label: str, ceilings: Ceilings) -> Row | None:
    case = Case(**group["case"])
    ours = contender(group, label)
    if (
        not case.layer
        or not ours
        or not ours.get("kernel", "aten").startswith("cuda")
        or case.task == "forward+backward"
    ):
        return None
    if label != VGGFAST.name and "wgmma_patch" not in ours["kernel"]:
        return None  # the same kernel under another name
    p = _predict(case, ours["kernel"], ceilings)
    rivals = [c["seconds"]["median"] for label in CUDNN if (c := contender(group, label))]
    return Row(
        case.subject,
        case.task,
        case.batch,
        label,
        ours["kernel"],
        p.us,
        p.bound,
        1e6 * ours["seconds"]["median"],
        1e6 * min(rivals) if rivals else None,
    )


def _predict(case: Case, kernel: str, ceilings: Ceilings) -> Prediction:
    layer = case.layer
    assert layer is not None
    itemsize = 4 if case.dtype == "fp32" else 2
    step = Step(case.batch, layer.c_in, layer.c_out, layer.size, layer.size, layer.pool, itemsize)
    return predict_step(layer.name, kernel, case.task, step, ceilings)


def to_dict(found: list[Row], ceilings: Ceilings) -> dict[str, Any]:
    return {"ceilings": asdict(ceilings), "rows": [asdict(row) | {"ratio": row.ratio} for row in found]}


def table(found: list[Row], ceilings: Ceilings) -> str:
    """The rows as text, with a total of each contender, batch and step."""
    head = (
        "layer",
        "step",
        "contender",
        "batch",
        "predicted us",
        "bound by",
        "measured us",
        "measured/predicted",
        "cuDNN us",
        "cuDNN/vggfast",
    )
    lines: list[tuple[str, ...]] = [head]
    for key in dict.fromkeys((row.contender, row.batch, row.step) for row in found):
        chosen = [row for row in found if (row.contender, row.batch, row.step) == key]
        lines += [_line(row.layer, row.bound, [row]) for row in chosen]
        lines.append(_line(f"all {len(chosen)}", "", chosen))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(w) if i in (0, 1, 2, 5) else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]  # fmt: skip
    used = (
        f"Ceilings: {ceilings.tflops:.0f} TFLOP/s and {ceilings.dram_tb:.2f} TB/s, measured in the same run; "
        f"{ceilings.l2_bytes:g} bytes a clock from L2 to each of {ceilings.sms} SMs at {ceilings.ghz:g} GHz, assumed."
    )
    return "\n".join([*map(str.rstrip, text), used])


def _line(name: str, bound: str, of: list[Row]) -> tuple[str, ...]:
    predicted, measured = sum(row.predicted_us for row in of), sum(row.measured_us for row in of)
    cudnn = [row.cudnn_us for row in of if row.cudnn_us is not None]
    beside = (f"{sum(cudnn):.1f}", f"{sum(cudnn) / measured:.2f}") if len(cudnn) == len(of) else ("", "")
    return (
        name,
        of[0].step,
        of[0].contender,
        str(of[0].batch),
        f"{predicted:.1f}",
        bound,
        f"{measured:.1f}",
        f"{measured / predicted:.2f}",
        *beside,
    )
