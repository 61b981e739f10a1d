"""Results as README's table and as pictures; and README is what the committed results say."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_sample import of, sample, timed

from vggfast.bench import elsewhere, loss_report, plots, report, results, rows
from vggfast.bench.cases import Case
from vggfast.bench.measure import with_fewer_threads

ROOT = Path(__file__).parents[1]


@pytest.fixture
def data() -> dict:
    return sample()


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
    for record in results.group(data, group)["contenders"]:
        record["rounds"] = (2 * record["rounds"])[:5]
    row = report.compare(data, next(row for row in rows.CPU_ROWS if row.what == "inference, float32, batch 8"))
    assert (row.rival, row.ratio.median) == ("openvino", pytest.approx(1.25))
    assert (group, "openvino", pytest.approx(1.25)) in report.comparisons(data)
    texts = {text.get_text() for axes in plots.networks(data).axes for text in axes.texts}
    assert any(text.endswith("  1.25×") and text.startswith("2.5") for text in texts)  # the picture's ratio, too


def test_where_vggfast_loses_is_said(data):
    of(data, "conv4_1 forward fp32 batch 1", "torch NCHW")["rounds"] = [0.5e-3, 0.55e-3, 0.45e-3]
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


# ---- pictures -------------------------------------------------------------------------------------------------------


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


def test_names_of_layers_in_the_roofline_do_not_cover_each_other(data):
    """All at one speed and, as in Winograd's, many at nearly the same operations a byte."""
    from matplotlib.text import Text

    figure = plots.roofline(data)
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if "_" in text.get_text()]
    boxes = [Text.get_window_extent(name) for name in names]  # without their lines
    assert len(boxes) == 13
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_memory_of_another_network_is_named_so(data):
    titles = [axes.get_title(loc="left") for axes in plots.memory(data).axes]
    assert {"training, float32, batch 8", "vgg16_bn: training, float32, batch 8"} <= set(titles)


def test_nothing_is_drawn_of_nothing(data):
    nothing = {**data, "groups": []}
    drawing = (plots.networks, plots.layers, plots.roofline, plots.memory, plots.losses)
    assert [draw(nothing) for draw in drawing] == [None] * 5


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
