"""The fused kernels beside cuDNN, layer by layer on a GPU: correctness is asserted, speed is reported beside the recorded ratio.

Every run measures both, in interleaved rounds between events, with the L2 cache overwritten before each. The recorded ratio is that of
benchmarks/results/<device>/layers.json; a ratio outside the spread recorded there is named in the report, it does not fail.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BESIDE_CUDNN, CLOCK, Measurements, device
from record import RESULTS

from vggfast.bench import machine, results, rows, suites
from vggfast.bench.cases import Case
from vggfast.bench.contenders import VGGFAST, find
from vggfast.bench.layers import VGG16_LAYERS, Layer
from vggfast.bench.measure import Entry, Group
from vggfast.bench.stats import Spread, ratios

pytestmark = [
    pytest.mark.benchmark(timer=CLOCK),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with cuDNN: torch sees no CUDA GPU"),
]
BATCH = 32
CUDNN = {
    "forward": ("cudnn_convolution_relu", rows.TORCH),
    "grad_input": (rows.TORCH,),
    "grad_weight": (rows.TORCH,),
}
CASES = [(layer, task) for layer in VGG16_LAYERS for task in CUDNN if layer.has(task)]


def recorded(group: str, rival: str) -> Spread | None:
    """The ratio in the committed results of this device; None where there is none."""
    path = RESULTS / machine.slug(device()) / "layers.json"
    if not path.exists():
        return None
    found = results.group(results.load(path), group)
    ours, theirs = results.contender(found, VGGFAST.name), results.contender(found, rival)
    return ratios(theirs["rounds"], ours["rounds"]) if ours and theirs else None


@pytest.mark.parametrize(("layer", "task"), CASES, ids=[f"{layer.name} {task}" for layer, task in CASES])
def test_beside_cudnn(benchmark: Any, measurements: Measurements, layer: Layer, task: Any, request: Any) -> None:
    case = Case(layer.name, task, BATCH, "bf16", "cuda", request.config.option.threads)
    rivals = [Entry(name, find(name), case) for name in CUDNN[task]]
    group = Group("layers", case, (Entry(VGGFAST.name, VGGFAST, case), *rivals))
    record = measurements.group(group, suites.QUICK["layers"])
    ours = results.contender(record, VGGFAST.name)
    assert ours is not None, next(c for c in record["contenders"] if c["label"] == VGGFAST.name)
    theirs = [c for name in CUDNN[task] if (c := results.contender(record, name))]
    assert theirs, f"expected cuDNN to run, got {[c for c in record['contenders'] if c['label'] != VGGFAST.name]}"
    best = min(theirs, key=lambda c: c["seconds"]["median"])
    now, then = ratios(best["rounds"], ours["rounds"]), recorded(group.id, best["label"])
    benchmark.group = f"beside cuDNN: {group.id}"
    benchmark.extra_info.update(
        ratio=now._asdict(), recorded=then and then._asdict(), rival=best["label"], error=ours["error"]
    )
    CLOCK.runs = iter(ours["rounds"])
    benchmark.pedantic(CLOCK.replay, rounds=len(ours["rounds"]))
    outside = then is not None and not then.p10 <= now.median <= then.p90
    said = f"recorded {then.median:.2f} ({then.p10:.2f} to {then.p90:.2f})" if then else "nothing recorded for this GPU"
    request.config.stash.setdefault(BESIDE_CUDNN, []).append(
        f"{group.id}: {now.median:.2f}× as fast as {best['label']}; {said}{': OUTSIDE' if outside else ''}"
    )
