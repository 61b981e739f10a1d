"""Whole VGG16: inference and a training step, beside the same modules run by torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vggfast

CONTENDERS = ["vggfast", "torch channels_last", "torch nchw"]
CLASSES = 10


@pytest.fixture(scope="module")
def vgg16() -> vggfast.VGG:
    torch.manual_seed(0)
    return vggfast.VGG16(num_classes=CLASSES, dropout=0.0)


def contend(model: vggfast.VGG, contender: str, batch: int) -> tuple[nn.Module, Tensor]:
    """The model as the contender runs it: vggfast's own, or its children in a plain nn.Sequential."""
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    if contender == "vggfast":
        return model.to(memory_format=torch.contiguous_format), x
    plain = nn.Sequential(nn.Sequential(*model.features), model.avgpool, nn.Flatten(), model.classifier)
    if contender == "torch channels_last":
        return plain.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return plain.to(memory_format=torch.contiguous_format), x


def check_and_time(benchmark, model: vggfast.VGG, run: Callable[[], Tensor], x: Tensor, rounds: int) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        net = nn.Sequential(nn.Sequential(*model.features), model.avgpool, nn.Flatten(), model.classifier)
        expected, got = net(x), run()
    error = float((got - expected).norm() / expected.norm())
    assert error <= 2e-5, f"relative difference to torch before timing: {error:.2e}, expected at most 2e-5"
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info.update(images_per_second=len(x) / benchmark.stats.stats.median)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_inference(benchmark, vgg16: vggfast.VGG, contender: str, batch: int, rounds: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"VGG16 inference batch {batch}"
    net, x = contend(vgg16.eval(), contender, batch)

    def run() -> Tensor:
        with torch.inference_mode():
            y: Tensor = net(x)
            return y

    check_and_time(benchmark, vgg16, run, x, rounds)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_training_step(benchmark, vgg16: vggfast.VGG, contender: str, batch: int, rounds: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"VGG16 forward+backward batch {batch}"
    net, x = contend(vgg16.train(), contender, batch)
    target = torch.arange(batch) % CLASSES

    def run() -> Tensor:
        vgg16.zero_grad(set_to_none=True)
        with torch.enable_grad():
            y: Tensor = net(x)
            F.cross_entropy(y, target).backward()
        return y.detach()

    check_and_time(benchmark, vgg16, run, x, rounds)
    vgg16.zero_grad(set_to_none=True)
