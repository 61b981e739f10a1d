"""What measures on a GPU, as far as a machine without one can tell: answers, results written group by group, predicted against
measured. Every time in here is SYNTHETIC: made up for the test, measured nowhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from vggfast.bench import BenchError, answers, cases, machine, measure, predicted, report, results, suites, tables
from vggfast.bench.cases import Case
from vggfast.bench.layers import Layer
from vggfast.bench.measure import Effort, Group, Lab

ROOT = Path(__file__).parents[1]
KERNEL = "cuda sm90 wgmma tile=m256n128 box=8x16x2 tiles=1568x1 splits=1 blocks=132 workspace=0"


SMALL = [Layer("first", 3, 16, 12, False), Layer("plain", 16, 24, 10, False), Layer("pooled", 24, 16, 8, True)]


@pytest.mark.parametrize("name", ["first", "plain", "pooled"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_layers_answer_is_that_of_torchs_operators(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of one image, and rounded to float32."""
    monkeypatch.setattr(cases, "VGG16_LAYERS", SMALL)
    case = Case(name, "forward+backward", 3, dtype)
    monkeypatch.setattr(answers, "ELEMENTS", case.layer.size**2 * case.layer.c_out)
    answers._layer.cache_clear()
    found, want = answers.load(case, ""), cases.reference(case)
    assert found.keys() == want.keys()
    # What is near a decision is judged by the spread of the piece, so a few elements differ in whether they get a gradient.
    assert ((found[cases.GIVEN] != 0) == (want[cases.GIVEN] != 0)).double().mean() > 0.98
    assert cases.relative_errors({"y": found["y"]}, {"y": want["y"]})["y"] < 1e-7
    given = found[cases.GIVEN].double()
    data = cases.layer_data(case, 0).to(torch.float64)
    inputs = cases.differentiated(case, data)
    y = cases.plain_layer(data.x, data.weight, data.bias, case.layer.pool)
    exact = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), given), strict=True))
    assert max(cases.relative_errors(found, exact).values()) < 1e-6


@pytest.mark.parametrize(("task", "dtype"), [("inference", "fp32"), ("training", "fp32"), ("training", "bf16")])
def test_a_networks_answer_is_the_same_in_pieces(task: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("bench_contenders:tiny", task, 5, dtype, size=32)
    monkeypatch.setattr(answers, "IMAGES", 2)
    net: nn.Module = cases.network(case)
    found, want = answers.network(case, net), cases.reference(case)
    assert found.keys() == want.keys()
    own = {name for name in want if name.startswith(cases.OWN_ERROR)}
    assert bool(own) == (dtype == "bf16")
    assert max(cases.relative_errors(found, {k: v for k, v in want.items() if k not in own}).values()) < 1e-6
    assert all(0.3 < found[name] / want[name] < 3 for name in own)


# ---- Results as they are written.


class FakeLab(Lab):
    """Measures nothing."""

    ended = 0

    def ceilings(self, device: str, dtypes: object = ()) -> dict:
        return {"peak_gflops": {"bf16": 700e3}, "dram_gbps": 4000.0}

    def time(self, group: Group, effort: Effort) -> dict:
        if group.case.subject == "conv1_2":
            raise BenchError("torch: its process ended with status -9")
        return synthetic_group(group.case, {"vggfast": 1e-3, "torch channels_last": 2e-3})

    def end_torch(self) -> None:
        FakeLab.ended += 1
        super().end_torch()


def synthetic_group(case: Case, seconds: dict[str, float], kernel: str = KERNEL) -> dict:
    contenders = [
        {"label": label, "dtype": case.dtype, "setting": "synthetic", "version": "0", "kernel": kernel, "error": 1e-3,
         "error_of": "y", "tolerance": 5e-3, "seconds": {"median": s, "p10": s, "p90": s}, "rounds": [s, s], "runs": 2,
         "gflops": 1.0, "gbps": 1.0, "ceiling_share": 0.5}
        for label, s in seconds.items()
    ]  # fmt: skip
    return {"id": case.id, "case": case.to_dict(), "contenders": contenders, "activity": None}


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import record as found

    monkeypatch.setattr(found, "Lab", FakeLab)
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "threads", "--device", "cuda"], "threads: not measured on cuda\n"),
        (["--part", "inference", "--only", "vgg17"], "inference: no group's name matches 'vgg17'\n"),
    ],
)
def test_a_recording_without_groups_says_why(
    record, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["record.py", *arguments])
    record.main()
    assert capsys.readouterr().out == said


def test_every_group_is_written_when_it_is_done(record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails does not take the others along, and what is out of time is named."""
    chosen = argparse.Namespace(output=tmp_path, device="cpu", threads=1, quick=False, quick_rounds=True)
    groups = [
        measure.compare("layers", Case(f"conv1_{i}", "forward", 1), ["torch"]) for i in (1, 2)
    ] + [measure.compare("layers", Case(f"conv2_{i}", "forward", 1), ["torch"]) for i in (1, 2)]  # fmt: skip
    path = tmp_path / machine.slug("cpu") / "layers.json"
    seen: list[int] = []
    monkeypatch.setattr(
        record, "write", lambda *a, write=record.write: (write(*a), seen.append(len(results.load(path)["groups"])))
    )
    clock = iter([0.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr(record.time, "monotonic", lambda: next(clock))
    console = Console(width=1000, record=True)  # a path may be long
    monkeypatch.setattr(record.tables, "ProgressBar", lambda *a: _Quiet())
    record.measure(groups, chosen, console, deadline=5.0)
    assert seen == [1, 2]
    text = console.export_text()
    assert "not measured: conv1_2 forward fp32 batch 1: torch: its process ended with status -9" in text
    assert "2 of 4 groups" in text
    assert text.strip().endswith("not conv1_2 forward fp32 batch 1, conv2_2 forward fp32 batch 1")
    assert FakeLab.ended >= 1


class _Quiet(measure.Listener):
    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def done(self) -> None: ...


def test_what_failed_on_a_gpu_ends_the_process_it_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel leaves it that wrote out of bounds: who was ready in it is lost, who comes after gets a new one."""
    case = Case("conv5_1", "forward", 1, "bf16", "cuda")
    group = measure.compare("layers", case, ["torch", "cudnn"])
    started: list[_Process] = []

    class _Process:
        def __init__(self, *_: object) -> None:
            started.append(self)
            self.closed = False

        def ask(self, request: str, key: str = "", **_: object) -> dict:
            assert not self.closed
            if request == "prepare" and key == "torch channels_last":
                raise BenchError("torch: CUDA error: an illegal memory access was encountered")
            return {"errors": {"y": 1e-4}, "own_errors": {}, "follows_input": True} if request == "check" else {}

        def settle(self) -> None: ...

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(measure, "Worker", _Process)
    with Lab(1) as lab:
        from contextlib import ExitStack

        ready, records = lab._set_up(group, ExitStack(), {})
    assert [entry.label for entry, _ in ready] == ["cudnn_convolution_relu"]
    assert "illegal memory access" in records["torch channels_last"]["failed"]
    assert records["vggfast"]["failed"] == "torch channels_last failed in the same process"
    assert len(started) == 2


# ---- Predicted against measured.


def synthetic_results(groups: list[dict]) -> dict:
    run = {
        "versions": {},
        "settings": {"threads": 2},
        "ceilings": {"peak_gflops": {"bf16": 700e3}, "dram_gbps": 4000.0},
    }
    device = {"slug": "synthetic-gpu", "cpu": "Some CPU", "gpu": "Synthetic GPU", "cores": 16, "sms": 132, "ghz": 1.98}
    return {
        "schema": 1,
        "device": device,
        "runs": {"now": run},
        "groups": [{**group, "run": "now"} for group in groups],
    }


def test_predicted_beside_measured() -> None:
    case = Case("conv2_2", "forward", 32, "bf16", "cuda")
    times = {"vggfast": 300e-6, "torch channels_last": 500e-6, "cudnn_convolution_relu": 450e-6}
    aten = synthetic_group(Case("conv1_1", "grad_weight", 32, "bf16", "cuda"), {"vggfast": 1e-3}, "aten: no kernel")
    data = synthetic_results([synthetic_group(case, times), aten])
    (row,) = predicted.rows(data)
    ceilings = predicted.ceilings_of(data)
    assert (ceilings.tflops, ceilings.dram_tb, ceilings.sms, ceilings.ghz) == (700, 4, 132, 1.98)
    tensor = 12 * 18 * (2 * 256 * 128 * 64) / (700e6 / 132)  # 1568 tiles on 132 SMs: twelve each
    l2 = 12 * 18 * (256 + 128) * 128 / ceilings.l2_bytes / 1980
    assert row.predicted_us == pytest.approx(max(tensor, l2))
    assert row.measured_us == pytest.approx(300)
    assert row.cudnn_us == pytest.approx(450)
    assert row.ratio == pytest.approx(300 / row.predicted_us)
    text = predicted.table([row], ceilings)
    assert "conv2_2" in text
    assert "1.50" in text  # cuDNN over vggfast
    assert "700 TFLOP/s and 4.00 TB/s, measured in the same run" in text


def test_kernels_that_read_patches_are_predicted_beside_the_others() -> None:
    groups = [
        synthetic_group(Case(layer, "forward", 32, "bf16", "cuda"), {"vggfast": 3e-4, "vggfast sm90patch": 2e-4})
        for layer in ("conv2_2", "conv3_2")
    ]
    groups[0]["contenders"][1]["kernel"] = KERNEL.replace("wgmma ", "wgmma_patch ")
    rows = predicted.rows(synthetic_results(groups))
    found = [(row.contender, row.layer) for row in rows]
    assert found == [("vggfast", "conv2_2"), ("vggfast", "conv3_2"), ("vggfast sm90patch", "conv2_2")]
    assert rows[2].measured_us == pytest.approx(200)
    assert rows[2].predicted_us <= rows[0].predicted_us


def test_nothing_to_predict() -> None:
    data = synthetic_results([])
    with pytest.raises(BenchError, match="VGGFAST_CUDA_PLAN"):
        predicted.rows(data)
    del data["device"]["gpu"]
    with pytest.raises(BenchError, match="a CPU's"):
        predicted.rows(data)


def test_the_script_writes_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import predicted as script

    cases_of = [Case(layer, "forward", b, "bf16", "cuda") for layer in ("conv2_2", "conv3_2") for b in (1, 32)]
    data = synthetic_results([synthetic_group(case, {"vggfast": 1e-3}) for case in cases_of])
    results.save(data, tmp_path / "layers.json")
    monkeypatch.setattr(sys, "argv", ["predicted.py", str(tmp_path)])
    script.main()
    assert capsys.readouterr().out.count("all 2") == 2
    written = (tmp_path / "predicted" / "layers.json").read_text()
    assert written.count('"predicted_us"') == 4
    assert len(results.load_folder(tmp_path)["groups"]) == 4  # the predictions are no results


def test_readmes_rows_of_a_gpu() -> None:
    """Layers summed up beside the faster of cuDNN's two forms; vggfast's other kernels are no rival that it loses to."""
    times = {"vggfast": 2e-4, "vggfast sm90patch": 1e-4, "torch channels_last": 5e-4, "cudnn_convolution_relu": 3e-4}
    layers = [Case(layer.name, "forward", 32, "bf16", "cuda") for layer in cases.VGG16_LAYERS]
    data = synthetic_results([synthetic_group(case, times) for case in layers])
    found = [comparison for row in report.rows(data) if (comparison := report.compare(data, row))]
    assert [c.row.what for c in found] == ["the 13 convolutions, bfloat16, batch 32"]
    assert (found[0].rival, found[0].ratio.median) == ("cudnn_convolution_relu", pytest.approx(1.5))
    assert found[0].ours == pytest.approx(13 * 2e-4)
    assert report.losses(data) == []


def test_tables_keep_the_parts_apart() -> None:
    case = Case("conv2_2", "forward", 32, "bf16", "cuda")
    plain, compiled = (synthetic_group(case, {"vggfast": 1e-3}) for _ in range(2))
    compiled["id"] = suites.groups("compiled", "cuda", 2, True)[0].id
    assert compiled["id"].startswith("compiled: ")
    assert len(list(tables.tables([plain, compiled]))) == 2
