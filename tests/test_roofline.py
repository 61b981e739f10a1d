"""The paper model: what it counts, and how a plan's tiles enter it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

import vggfast
from vggfast import _C, cli, switches
from vggfast.explanation import Explanation, Row
from vggfast.roofline import Ceilings, predict

KERNEL = "cuda sm90 wgmma tile=m256n128 box=8x16x2 tiles=1568x1 splits=1 blocks=132 workspace=0"
ROW = Row(
    "conv", "Conv3x3 128->128 + ReLU + MaxPool", "bfloat16", (32, 128, 112, 112), (32, 128, 56, 56), KERNEL, True, ""
)


def test_operations_bytes_and_times_of_one_layer() -> None:
    ceilings = Ceilings(tflops=1000, dram_tb=4, l2_bytes=50, ghz=2, sms=132)
    (p,) = predict(Explanation((ROW,)), ceilings)
    pixels = 32 * 112 * 112
    assert p.flop == 2 * 9 * 128 * 128 * pixels
    assert p.dram == 2 * (128 * pixels + 9 * 128 * 128 + 128 * pixels // 4) + 128 * pixels // 16
    tiles = 12  # of 256 pixels x 128 channels: 1568 of them on 132 SMs
    assert p.tensor_us == pytest.approx(tiles * 18 * (2 * 256 * 128 * 64) / (1000e6 / 132))
    assert p.l2_us == pytest.approx(tiles * 18 * (256 + 128) * 128 / 50 / 2e3)
    assert p.dram_us == pytest.approx(p.dram / 4e6)
    assert p.us == max(p.tensor_us, p.dram_us, p.l2_us)
    assert p.bound == "tensor cores"


def test_tf32_has_half_the_rate_and_twice_the_bytes() -> None:
    ceilings = Ceilings(tflops=1000, dram_tb=4, l2_bytes=50, ghz=2, sms=132)
    (half,), (p,) = (
        predict(Explanation((dataclasses.replace(ROW, dtype=d),)), ceilings) for d in ("bfloat16", "float32")
    )
    assert p.flop == half.flop
    assert p.tensor_us == pytest.approx(2 * half.tensor_us)
    assert p.l2_us == pytest.approx(2 * half.l2_us)


def test_a_patch_is_fetched_once_for_nine_taps() -> None:
    ceilings = Ceilings(tflops=1000, dram_tb=4, l2_bytes=50, ghz=2, sms=132)
    kernel = KERNEL.replace("wgmma ", "wgmma_patch ")
    (p,) = predict(Explanation((dataclasses.replace(ROW, kernel=kernel),)), ceilings)
    patch, filters = 10 * (16 + 2) * 2, 9 * 128
    assert p.l2_us == pytest.approx(12 * 2 * (patch + filters) * 128 / 50 / 2e3)  # twelve tiles of 2 x 64 channels
    assert p.tensor_us == pytest.approx(12 * 18 * (2 * 256 * 128 * 64) / (1000e6 / 132))
    stays = kernel.replace("m256n128", "m256n64")
    row = dataclasses.replace(ROW, kernel=stays, input=(32, 64, 112, 112), output=(32, 64, 56, 56))
    (p,) = predict(Explanation((row,)), ceilings)
    assert p.l2_us == pytest.approx(12 * patch * 128 / 50 / 2e3)


def test_no_plan_no_tiles() -> None:
    """Kernels without wgmma count operations and bytes alone; layers that are not fused are left out."""
    first = Row(
        "first", "Conv3x3 3->64 + ReLU", "bfloat16", (8, 3, 32, 32), (8, 64, 32, 32), "cuda sm80 first_layer", True, ""
    )
    other = Row("pool", "MaxPool", "bfloat16", (8, 64, 32, 32), (8, 64, 16, 16), "aten", False, "")
    (p,) = predict(Explanation((first, other)))
    assert p.l2_us == 0
    assert p.bound == "DRAM"


@pytest.mark.skipif(
    not _C.build_info()["cuda"], reason="the build has no CUDA kernels: there are no plans to predict from"
)
def test_on_the_command_line() -> None:
    command = ["explain", "vgg11", "--size", "64", "--dtype", "bf16", "--train", "--roofline"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0
    assert done.stdout.count("\nfeatures.") == 8 + 2 * 7  # no gradient kernels in the first layer
    assert "Assumed, not measured" in done.stdout
    switches.set_cuda_plan("sm90")
    network = vggfast.vgg11(init_weights=False).bfloat16().train()
    rows = predict(vggfast.explain(network, torch.zeros(1, 3, 64, 64).bfloat16(), gpu="9.0,132"))
    assert {row.step for row in rows} == {"forward", "grad_input", "grad_weight"}
    assert all(row.us > 0 and row.flop > 0 for row in rows)
