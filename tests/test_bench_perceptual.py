"""Every contender of the losses on features gives the loss and the gradient of float64's plain composition."""

from __future__ import annotations

import importlib

import pytest
from small_vgg import SmallLinear
from torch import nn

from vggfast.bench import cases, contenders, measure, perceptual
from vggfast.bench.cases import Case
from vggfast.bench.contenders import VGGFAST

CASES = [Case("vgg16", task, 1, dtype, threads=1, size=64) for task in cases.LOSSES for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg16.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "Linear", SmallLinear)
        cases.save_weights(CASES[0], path)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_contenders(case, weights, monkeypatch):
    monkeypatch.setattr(nn, "Linear", SmallLinear)
    reference = cases.reference(case, weights)
    for contender in [VGGFAST, *contenders.rivals(case)]:
        if contender.family == "compile" or contender.missing():
            continue
        module, function = contender.builder.split(":")
        build = getattr(importlib.import_module(module), function)
        runner = build(case, {"weights": str(weights)}, **contender.options)
        outputs = runner.outputs(runner.run(0))
        own = {name.removeprefix(cases.OWN_ERROR): float(t) for name, t in reference.items() if cases.OWN_ERROR in name}
        errors = cases.relative_errors(outputs, cases.expected(case, reference))
        record = measure.judge(measure.Entry(contender.name, contender, case), errors, own, True)
        assert "refused" not in record, (contender.name, record)
        assert set(outputs) == {"loss", "grad of x"}
        assert outputs["loss"] != runner.outputs(runner.run(1))["loss"]


def test_who_takes_part_and_what_is_counted():
    assert [c.name for c in contenders.rivals(CASES[0])] == [
        "torch channels_last", "torch NCHW", "torch.compile", "lpips package",
    ]  # fmt: skip
    assert "lpips package" not in [c.name for c in contenders.rivals(Case("vgg16", "perceptual", 1))]
    convolutions = sum(layer.gflop(1) for layer in Case("vgg16", "lpips", 1).convolutions())
    assert Case("vgg16", "lpips", 1).gflop() == pytest.approx(3 * convolutions)
    assert set(perceptual.LAYERS) == {"relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"}
