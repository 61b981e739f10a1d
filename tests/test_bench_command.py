"""`vggfast bench`: tables in a terminal, data, pictures and exit statuses."""

from __future__ import annotations

import json

import pytest
from bench_sample import of, sample
from rich.console import Console
from typer.testing import CliRunner

from vggfast import cli
from vggfast.bench import plots, results, session, tables


@pytest.fixture
def data() -> dict:
    return sample()


def shown(*found, width: int = 200) -> str:
    console = Console(width=width)
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
    assert "openvino 20.0 18.0–22.0 2.500 2.50× (2.50–2.50) " in text
    assert "2.5e-06" in text
    assert "missing: not installed: onnxruntime" in text
    assert tables.reasons([group]) == ["onnxruntime: missing: not installed: onnxruntime"]
    layers = [g for g in data["groups"] if g["case"]["subject"].startswith("conv")]
    summed = shown(*tables.tables(layers))
    assert "grad_weight, fp32, batch 8" in summed
    assert "3.00×" in summed


@pytest.mark.parametrize("width", [70, 80, 100, 120])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_cells(data, width):
    group = results.group(data, "vgg16 inference fp32 batch 8")
    layers = [g for g in data["groups"] if g["case"]["subject"].startswith("conv") and g["case"]["task"] == "forward"]
    text = shown(tables.group_table(group), *tables.tables(layers), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = text.split()
    assert {"2.50×", "(2.50–2.50)", "conv1_1", "conv5_3", "vggfast's"} <= set(words)
    assert ("p10–p90" in words) == (width >= 100)
    assert all(c["setting"] in " ".join(words) for c in group["contenders"] if "setting" in c)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "--memory"], "expected no --memory"),
        (["--layers", "--model", "vgg19"], "expected no --model vgg19"),
        (["--json", "."], "got a folder"),
        (["--plot", "/dev/null"], "cannot be made"),
        (["--against", ","], "got nothing"),
    ],
)
def test_bench_says_what_is_wrong_before_it_measures(monkeypatch, options, message):
    monkeypatch.setattr(session, "run", lambda *arguments: pytest.fail("measured"))
    done = CliRunner().invoke(cli.app, ["bench", "--device", "cpu", *options])
    assert done.exit_code == 2
    assert message in done.stderr


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
