"""Results as README's table, as pictures, as tables in a terminal; and README is what the committed results say."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vggfast import cli
from vggfast.bench import elsewhere, loss_report, plots, report, results, rows, session, tables
from vggfast.bench.cases import Case
from vggfast.bench.measure import compare, with_fewer_threads

ROOT = Path(__file__).parents[1]
SLOWNESS = {"vggfast": 1.0, "vggfast again": 1.02, "openvino bf16": 1.25, "openvino": 2.5, "torch channels_last": 3.0}


def timed(label: str, dtype: str, case: Case) -> dict:
    times = SLOWNESS.get(label, 4.0)
    rounds = [1e-3 * times * case.batch * factor for factor in (1.0, 1.1, 0.9)]
    gflop = case.gflop() or 1.0
    return {
        "label": label, "dtype": dtype, "setting": "fast", "version": "1", "kernel": "cpu avx512 winograd F(4x4,3x3)",
        "error": 1e-6 * times, "error_of": "scores", "tolerance": 5e-5, "seconds": {"median": rounds[0], "p10": rounds[2], "p90": rounds[1]},
        "rounds": rounds, "runs": 3, "gflops": gflop / rounds[0], "gbps": 1.0, "ceiling_share": 0.5,
    }  # fmt: skip


def sample() -> dict:
    """Results with every row of README's table, in which vggfast is the faster one."""
    groups = []
    for row in rows.CPU_ROWS:
        for identifier in row.groups:
            part = "memory" if identifier.startswith("memory: ") else "inference"
            subject, task, dtype, _, batch = identifier.removeprefix("memory: ").split()
            case = Case(subject, task, int(batch), dtype)
            records = [timed(entry.label, entry.case.dtype, case) for entry in compare(part, case).entries]
            for record in records if part == "memory" else []:
                del record["seconds"], record["rounds"]
                record |= {
                    "saved_bytes": int(100e6 * SLOWNESS.get(record["label"], 4)),
                    "peak_bytes": int(900e6 * SLOWNESS.get(record["label"], 4)),
                }
            group = {"id": identifier, "case": case.to_dict(), "run": "now", "activity": None, "contenders": records}
            groups += [] if identifier in [g["id"] for g in groups] else [group]
    run = {
        "versions": {"vggfast": "0.1.0", "torch": "2.11", "openvino": "2026"},
        "settings": {"threads": 2},
        "ceilings": {"peak_gflops": {"fp32": 250.0, "bf16": 480.0}, "dram_gbps": 40.0},
    }
    device = {"slug": "some-cpu", "cpu": "Some CPU", "cores": 2}
    return {"schema": 1, "device": device, "runs": {"now": run}, "groups": groups}


@pytest.fixture
def data() -> dict:
    return sample()


def of(data: dict, identifier: str, label: str) -> dict:
    return next(c for c in results.group(data, identifier)["contenders"] if c["label"] == label)


# ---- README's table ------------------------------------------------------------------------------------------------


def test_every_row_is_there_with_the_fastest_rival(data):
    found = {row.what: report.compare(data, row) for row in rows.CPU_ROWS}
    assert None not in found.values()
    best = found["inference, float32, batch 8"]
    assert (best.rival, best.ratio.median, best.ours) == ("openvino", pytest.approx(2.5), pytest.approx(8e-3))
    assert found["inference, float32, batch 8, against bfloat16"].ratio.median == pytest.approx(1.25)
    convolutions = found["the 13 convolutions, float32, batch 8"]
    assert convolutions.ours == pytest.approx(13 * 8e-3)  # summed up
    assert found["their input gradients, float32, batch 8"].ours == pytest.approx(12 * 8e-3)  # the images have none
    assert found["saved activations, float32 training, batch 8"].ratio.median == pytest.approx(3.0)
    section = report.markdown(data, {"Networks": "networks.png"})
    assert (
        "| inference, float32, batch 8 | openvino | 20 ms | 8 ms | **2.50×** (2.50 to 2.50) | 2e-06, 1e-06 |" in section
    )
    assert (
        "| saved activations, float32 training, batch 8 | torch channels_last | 300 MB | 100 MB | **3.00×** |  |"
        in section
    )
    assert "![Networks](networks.png)" in section
    assert f"On this machine in none of the {len(report.comparisons(data))} comparisons measured." in section
    assert "**Some CPU, 2 cores, 2 threads**, now: vggfast 0.1.0, torch 2.11, openvino 2026" in section
    assert "1.02× (1.02 to 1.02" in section


def test_the_rival_is_chosen_by_the_ratio_round_by_round(data):
    """Not by medians: of the second rival's slow rounds none is one of ours."""
    group = "vgg16 inference fp32 batch 8"
    of(data, group, "vggfast")["rounds"] = [8e-3, 8e-3, 8e-3, 10e-3, 20e-3]
    of(data, group, "onnxruntime")["rounds"] = [19e-3] * 5
    of(data, group, "openvino")["rounds"] = [10e-3, 10e-3, 22e-3, 22e-3, 22e-3]
    row = report.compare(data, next(row for row in rows.CPU_ROWS if row.what == "inference, float32, batch 8"))
    assert (row.rival, row.ratio.median) == ("openvino", pytest.approx(1.25))


def test_where_vggfast_loses_is_said(data):
    of(data, "conv4_1 forward fp32 batch 1", "torch NCHW")["seconds"]["median"] = 0.5e-3
    of(data, "memory: vgg16 training fp32 batch 8", "torch NCHW")["peak_bytes"] = 90_000_000
    assert report.losses(data) == [
        ("memory: vgg16 training fp32 batch 8, peak", "torch NCHW", pytest.approx(0.1)),
        ("conv4_1 forward fp32 batch 1", "torch NCHW", pytest.approx(0.5)),
    ]
    section = report.markdown(data, {})
    assert f"On this machine in 2 of {len(report.comparisons(data))} comparisons" in section
    assert "- torch NCHW, forward fp32 batch 1: conv4_1 0.50×" in section
    assert "- torch NCHW, peak memory of training fp32 batch 8: vgg16 0.10×" in section


def test_the_control_is_no_loss_and_shows_what_a_ratio_is_worth(data):
    for group in data["groups"]:
        for record in group["contenders"]:
            if record["label"] == "vggfast again":
                record["seconds"]["median"] *= 0.9
    assert report.losses(data) == []
    assert report.control(data).median == pytest.approx(1.02 * 0.9)


def test_who_is_missing_refused_or_failed_is_neither_best_nor_silent(data):
    for identifier in ("vgg16 inference fp32 batch 8", "vgg16 inference fp32 batch 1"):
        record = of(data, identifier, "openvino")
        record["refused"] = "relative error 1"
    best = report.compare(data, rows.CPU_ROWS[0])
    assert best.rival == "torch channels_last"
    text = report.markdown(data, {})
    assert (
        "- Not measured: openvino in vgg16 inference fp32 batch 8, vgg16 inference fp32 batch 1: refused: relative error 1"
        in text
    )


def test_parts_that_were_recorded_one_by_one_name_what_each_was_measured_with(data):
    """The last run may have had no runtimes installed, and another speed of the machine."""
    later = copy.deepcopy(data["runs"]["now"])
    later["versions"] = {"vggfast": "0.1.0", "torch": "2.12"}
    later["ceilings"]["peak_gflops"]["fp32"] = 255.0
    data["runs"] = {"2026-01-01T08:00:00Z": data["runs"]["now"], "2026-01-03T08:00:00Z": later}
    text = report.markdown(data, {})
    assert "2 threads**, 2026-01-01 to 2026-01-03: vggfast 0.1.0, torch 2.11 and 2.12, openvino 2026." in text
    assert "float32 250 to 255 GFLOP/s, bfloat16 480 GFLOP/s, memory 40 GB/s." in text


def test_each_convolution_has_its_line_and_all_have_their_total(data):
    lines = list(report.layer_lines(data))
    assert lines[2] == "| | forward, batch 1 | forward, batch 8 | input gradient, batch 8 | filter gradient, batch 8 |"
    assert len(lines) == 4 + 13 + 1
    assert lines[4] == "| conv1_1: 3 → 64, 224×224 | 1 ms, 3.00× | 8 ms, 3.00× |  | 8 ms, 3.00× |"
    assert lines[5].startswith("| conv1_2: 64 → 64, 224×224, pool | 1 ms, 3.00× |")
    assert lines[-1] == "| all | 13 ms, **3.00×** | 104 ms, **3.00×** | 96 ms, **3.00×** | 104 ms, **3.00×** |"
    data["groups"] = [g for g in data["groups"] if g["id"] != "conv3_2 forward fp32 batch 1"]
    lines = list(report.layer_lines(data))
    assert lines[9].startswith("| conv3_2: 256 → 256, 56×56 |  | 8 ms")
    assert lines[-1].startswith("| all |  | 104 ms")  # a total of twelve would not be one of thirteen
    data["groups"] = [g for g in data["groups"] if not g["case"]["subject"].startswith("conv")]
    assert list(report.layer_lines(data)) == []


def test_threads_have_a_line_and_are_no_comparison(data):
    """torch with fewer threads than vggfast is no rival; a group without one thread has no line."""
    before, panels = report.comparisons(data), len(plots.networks(data).axes)
    assert list(report.thread_lines(data)) == []
    case = Case("vgg16", "inference", 8)
    for threads in (2, 1):
        group = with_fewer_threads(replace(case, threads=threads))
        records = [timed(entry.label, "fp32", case) for entry in group.entries]
        record = {"id": group.id, "case": group.case.to_dict(), "run": "now", "activity": None, "contenders": records}
        data["groups"] = [g for g in data["groups"] if g["id"] != group.id] + [record]
        if threads == 2:
            head, _, line = report.thread_lines(data)
            assert head == "| With all threads, times as fast as with one | vggfast | torch channels_last |"
            assert line == "| inference, float32, batch 8, 2 threads | 4.00× (4.00 to 4.00) | 1.33× (1.33 to 1.33) |"
            assert line in report.markdown(data, {})
        else:
            assert list(report.thread_lines(data)) == []
    assert report.comparisons(data) == before
    assert len(plots.networks(data).axes) == panels


def test_time_and_memory_of_losses(data):
    text = loss_report.markdown(data, {"Losses": "losses.png"})
    assert "| | vggfast | torch channels_last | torch NCHW | torch.compile | lpips package |" in text
    assert "| LPIPS, float32, batch 8: time | **8 ms** | 24 ms | 32 ms | 32 ms | 32 ms |" in text
    assert "| LPIPS, float32, batch 8: saved | **100 MB** | 300 MB | 400 MB | 400 MB | 400 MB |" in text
    assert "| features and Gram matrices, float32, batch 8: time | **8 ms** | 24 ms | 32 ms | 32 ms |  |" in text
    assert "![Losses](losses.png)" in text
    assert loss_report.markdown({**data, "groups": []}, {}) == loss_report.NOTHING


def test_other_machines_are_columns_of_one_table(data):
    """A comparison that one of them has is a line; GPUs, whose comparisons are others, have a table of their own."""
    other = copy.deepcopy(data)
    other["device"]["cpu"] = "Another CPU"
    other["groups"] = [g for g in other["groups"] if not g["id"].endswith("batch 8")]
    gpu = {**copy.deepcopy(data), "device": {"gpu": "Some GPU"}}
    gpu["groups"] = [{**results.group(data, "vgg16 inference bf16 batch 1"), "id": "vgg16 inference bf16 batch 32"}]
    lines = elsewhere.tables([(data, "here"), (gpu, "far"), (other, "there")]).splitlines()
    assert lines[2] == "| VGG16 | [Some CPU, 2 cores, 2 threads](here) | [Another CPU, 2 cores, 2 threads](there) |"
    assert "| inference, float32, batch 8 | 2.50× openvino |  |" in lines
    assert "| the 13 convolutions, float32, batch 1 | 3.00× torch channels_last | 3.00× torch channels_last |" in lines
    assert "| measured | now: vggfast 0.1.0, torch 2.11 | now: vggfast 0.1.0, torch 2.11 |" in lines
    of_gpu = lines[lines.index("| VGG16 | [Some GPU](far) |") :]
    assert [line for line in of_gpu if "×" in line] == ["| inference, bfloat16, batch 32 | 3.00× torch channels_last |"]
    assert elsewhere.tables([]) == ""
    assert "vggfast loses" not in "".join(lines)


def test_what_is_lost_on_other_machines_is_named_after_their_table(data):
    other = copy.deepcopy(data)
    other["device"]["cpu"] = "Another CPU"
    of(other, "vgg16 inference fp32 batch 8", "openvino bf16")["rounds"] = [4e-3] * 3
    of(other, "memory: vgg16 training fp32 batch 8", "torch channels_last")["peak_bytes"] = 450_000_000
    lines = elsewhere.tables([(data, "here"), (other, "there")]).splitlines()
    assert lines[-2:] == [
        "",
        "Of these comparisons vggfast loses inference, float32, batch 8, against bfloat16 (0.50× openvino bf16 on Another CPU, "
        "2 cores, 2 threads); peak memory, float32 training, batch 8 (0.50× torch channels_last on Another CPU, 2 cores, "
        "2 threads).",
    ]


def test_a_row_without_data_is_left_out(data):
    data["groups"] = [g for g in data["groups"] if g["id"] != "conv3_2 forward fp32 batch 1"]
    assert "the 13 convolutions, float32, batch 1 " not in report.markdown(data, {})
    assert report.compare(data, rows.Row("x", ("nothing",), ("torch NCHW",))) is None


def test_the_section_replaces_what_is_between_the_markers():
    assert report.splice("a\n<b>\nold\n<e>\nz\n", "new\n", "<b>", "<e>") == "a\n<b>\nnew\n<e>\nz\n"
    for text in ("no markers", "<b> <b> <e>"):
        with pytest.raises(ValueError, match="expected the line '<b>' once"):
            report.splice(text, "new", "<b>", "<e>")


# ---- pictures and tables -------------------------------------------------------------------------------------------


def test_pictures_know_which_results_they_show(data, tmp_path):
    drawn = plots.draw_all(data, tmp_path)
    assert {path.name for path in drawn.values()} == {
        *("networks.png", "layers.png", "roofline.png", "memory.png", "losses.png"),
    }
    for path in drawn.values():
        assert plots.shown(path) == results.digest(data)
        assert path.stat().st_size > 10_000
    other = copy.deepcopy(data)
    of(other, "vgg16 inference fp32 batch 8", "vggfast")["seconds"]["median"] *= 2
    assert results.digest(other) != results.digest(data)


def test_bars_are_as_long_as_the_times_and_the_control_is_not_drawn(data):
    axes = plots.networks(data).axes
    panel = next(a for a in axes if a.get_title(loc="left").startswith("inference, float32, batch 8"))
    lengths = dict(
        zip((t.get_text() for t in panel.get_yticklabels()), (bar.get_width() for bar in panel.patches), strict=True)
    )
    assert "vggfast again" not in lengths
    assert (lengths["vggfast"], lengths["openvino"]) == (pytest.approx(1.0), pytest.approx(2.5))


def test_layers_are_those_of_their_part_and_under_the_ceiling_of_their_run(data):
    """The part compiled has the same cases, with other rivals."""
    first = next(g for g in data["groups"] if g["id"] == "conv1_1 forward fp32 batch 8")
    compiled = {**copy.deepcopy(first), "id": f"compiled: {first['id']}"}
    compiled["contenders"] = [c for c in compiled["contenders"] if c["label"] != "torch channels_last"]
    data["groups"].insert(0, compiled)
    later = copy.deepcopy(data["runs"]["now"])
    later["ceilings"]["peak_gflops"]["fp32"] = 1.0
    data["runs"]["zz"] = later
    panel = plots.layers(data).axes[0]
    assert [text.get_text() for text in panel.texts] == ["3.0×"] * 13
    assert panel.lines[0].get_ydata()[0] == 250.0


def test_nothing_is_drawn_of_nothing(data):
    nothing = {**data, "groups": []}
    drawing = (plots.networks, plots.layers, plots.roofline, plots.memory, plots.losses)
    assert [draw(nothing) for draw in drawing] == [None] * 5


def shown(*found) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        for table in found:
            console.print(table)
    return captured.get()


def test_tables_have_time_ratio_error_and_who_is_missing(data):
    group = results.group(data, "vgg16 inference fp32 batch 8")
    of(data, group["id"], "onnxruntime").clear()
    group["contenders"] = [
        c or {"label": "onnxruntime", "dtype": "fp32", "missing": "not installed: onnxruntime"}
        for c in group["contenders"]
    ]
    text = "".join(" ".join(line.split()) + "\n" for line in shown(tables.group_table(group)).splitlines())
    assert "│ openvino │ 20.0 │ 18.0–22.0 │ 2.500 │ 2.50× (2.50–2.50) │" in text
    assert "2.5e-06" in text
    assert "missing: not installed: onnxruntime" in text
    assert tables.reasons([group]) == ["onnxruntime: missing: not installed: onnxruntime"]
    layers = [g for g in data["groups"] if g["case"]["subject"].startswith("conv")]
    summed = shown(*tables.tables(layers))
    assert "grad_weight, fp32, batch 8" in summed
    assert "3.00×" in summed


def test_a_disturbed_group_is_told():
    quiet = {"id": "a", "activity": {"idle_workers": 0.01, "other_programs": 0.02, "stolen": 0.0}}
    loud = {"id": "b", "activity": {"idle_workers": 0.0, "other_programs": 0.4, "stolen": 0.1}}
    assert tables.disturbances([quiet, loud, {"id": "c", "activity": None}]) == [
        "b: other programs 40%, stolen 10% of the processors' time"
    ]


# ---- the command ---------------------------------------------------------------------------------------------------


def test_bench_shows_a_table_and_writes_data_and_pictures(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(session, "run", lambda groups, *rest: asked.extend(groups) or data)
    arguments = ["bench", "--model", "vgg13", "--batch", "2", "--against", "torch, openvino", "--train", "--memory"]
    done = CliRunner().invoke(
        cli.app, [*arguments, "--device", "cpu", "--json", str(tmp_path / "x.json"), "--plot", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert [group.id for group, _ in asked] == ["vgg13 training fp32 batch 2", "memory: vgg13 training fp32 batch 2"]
    assert [entry.label for entry in asked[0][0].entries] == [
        "vggfast",
        "vggfast again",
        "torch channels_last",
        "torch NCHW",
    ]
    assert "openvino bf16" in done.stdout
    assert json.loads((tmp_path / "x.json").read_text())["groups"]
    assert (tmp_path / "roofline.png").exists()


def test_bench_of_layers_and_an_unknown_rival(data, monkeypatch):
    asked = []
    monkeypatch.setattr(session, "run", lambda groups, *rest: asked.extend(groups) or data)
    assert CliRunner().invoke(cli.app, ["bench", "--layers", "--train", "--device", "cpu"]).exit_code == 0
    assert len(asked) == 4 * 13 - 1
    done = CliRunner().invoke(cli.app, ["bench", "--against", "tensorflow", "--device", "cpu"])
    assert done.exit_code == 2
    assert "got tensorflow" in done.stderr
    done = CliRunner().invoke(cli.app, ["bench", "--train", "--against", "onnxruntime", "--device", "cpu"])
    assert done.exit_code == 2  # it does not train, and nobody else was asked for
    assert "expected some of torch" in done.stderr
    assert "got onnxruntime" in done.stderr


def test_bench_draws_any_network_and_says_where_there_is_nothing_to_draw(data, tmp_path, monkeypatch):
    for group in data["groups"]:
        group["id"] = group["id"].replace("vgg16", "vgg11")
        group["case"]["subject"] = group["case"]["subject"].replace("vgg16", "vgg11")
    monkeypatch.setattr(session, "run", lambda *arguments: data)
    command = ["bench", "--model", "vgg11", "--device", "cpu", "--plot", str(tmp_path)]
    done = CliRunner().invoke(cli.app, command)
    assert f"VGG11, inference and training: {tmp_path}/networks.png" in done.stdout.replace("\n", "")
    assert plots.networks(data).get_suptitle().startswith("VGG11, 224×224")
    assert plots.memory(data).get_suptitle().startswith("VGG11's memory")
    assert "no picture" not in done.stdout
    data["groups"] = [results.group(data, "vgg11 inference fp32 batch 8")]
    record = of(data, "vgg11 inference fp32 batch 8", "vggfast")
    for name in ("seconds", "rounds"):
        del record[name]
    record["failed"] = "out of memory"
    done = CliRunner().invoke(cli.app, command)
    assert "no picture: vggfast has no result in vgg11 inference fp32 batch 8" in done.stdout.replace("\n", " ")


def test_bench_fails_where_vggfast_is_wrong(data, monkeypatch):
    of(data, "vgg16 inference fp32 batch 8", "vggfast")["refused"] = "relative error 1"
    monkeypatch.setattr(session, "run", lambda *arguments: data)
    assert CliRunner().invoke(cli.app, ["bench", "--device", "cpu"]).exit_code == 1


# ---- README --------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import report as found

    return found


def test_the_pages_say_what_the_committed_results_say(script):
    pages = script.pages(script.RESULTS / script.README_DEVICE)
    assert [page.name for page in pages] == ["README.md", "features.md", "numerics.md"]
    for page, text in pages.items():
        assert page.read_text() == text, f"{page.name} differs: run python benchmarks/report.py"


def test_committed_pictures_show_the_committed_results(script):
    for folder in script.measured_devices():
        pictures = list(folder.glob("*.png"))
        assert pictures
        for path in pictures:
            assert plots.shown(path) == results.digest(results.load_folder(folder)), (
                f"{path}: run python benchmarks/report.py"
            )
