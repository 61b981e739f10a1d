"""Training beside a loop in plain torch, step by step: rates, losses, weights, their average, and the metrics of each epoch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vggfast.recipes import data as datasets
from vggfast.recipes.config import AMP_DTYPES, TrainConfig
from vggfast.recipes.train import Listener, Trainer, fit


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def plain_model() -> nn.Module:
    """torch's own layers alone, so that both loops calculate with the same kernels; without dropout, whose masks are the recipe's."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
    return nn.Sequential(features, nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 10))


class Loop:
    """The recipe as docs/train.md and the paper have it, with no part of the library's but its batches."""

    def __init__(self, config: TrainConfig, data: datasets.Data) -> None:
        self.config, self.model = config, plain_model()
        self.train = [list(data.train_batches(epoch)) for epoch in range(config.epochs)]
        self.test = list(data.test_batches())
        self.rate, self.best, self.stalled = config.lr, -1.0, 0
        self.velocity = [torch.zeros_like(p) for p in self.model.parameters()]
        self.average: dict[str, torch.Tensor] | None = None
        self.steps: list[tuple[float, float, dict, dict | None]] = []
        self.rows: list[tuple[float, ...]] = []

    def run(self) -> None:
        for batches in self.train:
            self.model.train()
            loss, right, seen = 0.0, 0, 0
            for images, labels in batches:
                self.rate = self.cosine() if self.config.schedule == "cosine" else self.rate
                step_loss, step_right = self.step(images, labels)
                loss, right, seen = loss + step_loss, right + step_right, seen + len(labels)
                weights = copy.deepcopy(self.model.state_dict())
                self.average = self.averaged(weights) if self.config.ema else None
                self.steps.append((self.rate, loss / seen, weights, self.average))
            self.rows.append((loss / seen, right / seen, *self.tested(), self.rate))
            if self.config.schedule == "plateau":
                self.divide_where_it_stalls(self.rows[-1][3])

    def cosine(self) -> float:
        step, total = len(self.steps), self.config.epochs * len(self.train[0])
        rising = round(self.config.warm_up * total)
        part = (
            (step + 1) / rising if step < rising else (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2
        )
        return self.config.lr * part

    def divide_where_it_stalls(self, accuracy: float) -> None:
        self.stalled = 0 if accuracy > self.best else self.stalled + 1
        self.best = max(self.best, accuracy)
        if self.stalled > self.config.patience:
            self.rate, self.stalled = self.rate / 10, 0

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
        scale = 65536.0 if self.config.amp == "fp16" else 1.0
        size, loss, right = math.ceil(self.config.batch_size / self.config.accumulate), 0.0, 0
        self.model.zero_grad()
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            scores = self.scores(self.model, x)
            losses = F.cross_entropy(scores.float(), y, reduction="none", label_smoothing=self.config.label_smoothing)
            (losses.sum() / len(images) * scale).backward()
            loss, right = loss + losses.sum().item(), right + int((scores.argmax(1) == y).sum())
        with torch.no_grad():
            for parameter, velocity in zip(self.model.parameters(), self.velocity, strict=True):
                velocity.mul_(0.9).add_(parameter.grad / scale + self.config.weight_decay * parameter)
                parameter -= self.rate * velocity
        return loss, right

    def averaged(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights = {name: value for name, value in weights.items() if value.is_floating_point()}
        if self.average is None:
            return weights
        return {name: self.config.ema * self.average[name] + (1 - self.config.ema) * weights[name] for name in weights}

    @torch.no_grad()
    def tested(self) -> tuple[float, float]:
        model = copy.deepcopy(self.model).eval()
        model.load_state_dict(self.average or {}, strict=False)
        labels = torch.cat([labels for _, labels in self.test])
        scores = torch.cat([self.scores(model, images).float() for images, _ in self.test])
        return F.cross_entropy(scores, labels).item(), (scores.argmax(1) == labels).float().mean().item()

    def scores(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        dtype = AMP_DTYPES[self.config.amp]
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return model(images.to(memory_format=torch.channels_last))


class Record(Listener):
    def __init__(self) -> None:
        self.steps: list[tuple[float, float, dict, dict | None]] = []

    def step(self, trainer: Trainer, loss: float) -> None:
        average = None if trainer.average is None else copy.deepcopy(trainer.average.module.state_dict())
        rate = trainer.schedule.last_learning_rate
        self.steps.append((rate, loss, copy.deepcopy(trainer.model.state_dict()), average))


RUNS = {
    "paper": {"lr": 0.5, "weight_decay": 0.05, "schedule": "plateau", "patience": 0, "epochs": 5},
    "modern": {"lr": 0.1, "weight_decay": 0.05, "warm_up": 0.4, "label_smoothing": 0.1, "ema": 0.8},
    "in pieces": {"lr": 0.1, "warm_up": 0.1, "accumulate": 3, "ema": 0.5},
    "bf16": {"lr": 0.1, "amp": "bf16", "label_smoothing": 0.1},
    "fp16": {"lr": 0.1, "amp": "fp16", "accumulate": 2, "weight_decay": 0.05},
}


@pytest.mark.parametrize("name", RUNS)
def test_each_step_is_that_of_a_loop_in_plain_torch(tmp_path, name):
    """20 images in batches of 8: the last one, and its last piece, are short."""
    settings = {"epochs": 3, "limit": 20, "batch_size": 8, "seed": 3, **RUNS[name]}
    config = TrainConfig.recipe("fake", output=str(tmp_path), device="cpu", **settings)
    data = datasets.load("fake", size=32, batch_size=8, seed=3, limit=20, augment=config.augment)
    loop, record = Loop(config, data), Record()
    loop.run()
    history = fit(config, model=plain_model(), listener=record).history
    assert len(record.steps) == len(loop.steps) == 3 * config.epochs
    for (rate, loss, weights, average), expected in zip(record.steps, loop.steps, strict=True):
        assert (rate, loss) == pytest.approx(expected[:2], rel=1e-5)
        torch.testing.assert_close(weights, expected[2], rtol=1e-4, atol=1e-5)
        assert (average is None) == (expected[3] is None)
        for entry, value in (expected[3] or {}).items():
            torch.testing.assert_close(average[entry], value, rtol=1e-4, atol=1e-5)
    for row, values in zip(history, loop.rows, strict=True):
        got = (row.train_loss, row.train_accuracy, row.test_loss, row.test_accuracy, row.learning_rate)
        assert got == pytest.approx(values, rel=1e-5)


def test_a_resumed_run_scales_the_loss_as_before(tmp_path):
    config = TrainConfig.recipe("fake", output=str(tmp_path), limit=8, batch_size=8, amp="fp16", device="cpu")
    data = datasets.load("fake", size=32, batch_size=8, seed=0, limit=8)
    before, after = (Trainer(config, data, torch.device("cpu"), plain_model()) for _ in range(2))
    before.scaler.load_state_dict({**before.scaler.state_dict(), "scale": 8.0, "_growth_tracker": 5})
    before.save()
    after.restore(tmp_path / "checkpoint.pt")
    assert after.scaler.state_dict() == before.scaler.state_dict()
