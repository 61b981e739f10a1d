"""`explain --plot`: the picture has every layer with its kernel and shape, and the measured times are those of the layers."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from reference import normal
from small_vgg import SmallLinear
from torch import Tensor, nn
from typer.testing import CliRunner

from vggfast import _C, FusedSequential, cli, explain, explain_plot


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.05)
        return x


def network() -> nn.Module:
    body = FusedSequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), Slow()
    )
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [t.get_text() for t in figure.texts]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_times_are_the_layers() -> None:
    net, x = network(), normal(1, 3, 16, 16)
    seconds = explain_plot.measure(net, x, rounds=3)
    assert {row.name for row in explain(net, x).rows} <= set(seconds)
    assert seconds["0.4"] >= 0.05
    assert all(value > 0 for value in seconds.values())
    assert not [m for m in net.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_the_picture_has_every_layer(tmp_path: Path, drawn: list[Figure]) -> None:
    net, x = network(), normal(1, 3, 16, 16)
    explanation = explain(net, x)
    explain_plot.draw(explanation, tmp_path / "net.png", "a title", explain_plot.measure(net, x, rounds=1))
    (figure,) = drawn
    written = "\n".join(texts(figure))
    for wanted in (
        "a title",
        "Conv3x3 3→8 + ReLU + MaxPool",
        "Conv1x1 8→8",
        "8 × 8 × 8",
        "Linear 8→2",
        "kernel is not 3x3",
    ):
        assert wanted in written
    for row in explanation.rows:
        assert row.kernel in written or row.reason in written
    assert written.count(" ms ") == len(explanation.rows) + 1
    colours = [bar.get_facecolor() for bar in figure.axes[0].patches]
    assert colours[1:] == [colours[1]] * (len(explanation.rows) - 1)  # torch's
    assert colours[0] != colours[1]
    head = (tmp_path / "net.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:])
    assert width > 1000
    assert height > 300


def test_on_the_command_line(tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "Linear", SmallLinear)
    torch.set_num_threads(1)
    invoke = CliRunner().invoke
    base = ["explain", "vgg11", "--size", "32", "--plot"]
    result = invoke(cli.app, [*base, str(tmp_path / "net.svg"), "--measure"])
    assert result.exit_code == 0, result.output
    assert "8 of 8 convolutions" in result.output
    assert any("vgg11, 1 × 3 × 32 × 32, fp32" in text for text in texts(drawn[0]))
    assert (tmp_path / "net.svg").read_text().lstrip().startswith("<?xml")
    if _C.build_info()["cuda"]:
        gpu = ["--gpu", "9.0,132", "--dtype", "bf16", "--train"]
        assert invoke(cli.app, [*base, str(tmp_path / "gpu.png"), *gpu]).exit_code == 0
        assert any("grad_weight" in text for text in texts(drawn[1]))
        assert "leave one of them out" in invoke(cli.app, [*base, str(tmp_path / "x.png"), *gpu, "--measure"]).output
    for arguments, message in (
        ([*base, str(tmp_path / "net.xyz")], "--plot: "),
        (["explain", "vgg11", "--size", "32", "--measure"], "--measure: expected --plot FILE"),
    ):
        result = invoke(cli.app, arguments)
        assert result.exit_code == 2
        assert f"error: {message}" in result.output


def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.vggfast, "explain", lambda *_, **__: pytest.fail("explained"))
    (tmp_path / "file").touch()
    for folder, wrong in (("no", "does not exist"), ("file", "is no folder")):
        command = ["explain", "vgg11", "--plot", str(tmp_path / folder / "net.png"), "--measure"]
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 2
        assert f"error: --plot: expected a file in a folder that is there, {tmp_path / folder} {wrong}" in result.output
