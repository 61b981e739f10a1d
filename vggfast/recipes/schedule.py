"""How the learning rate changes: along a cosine, step by step, or down by 10 when held-out accuracy stalls."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from vggfast.recipes.config import TrainConfig

DIVISIONS = 3  # of the learning rate, by 10 each (arXiv 1409.1556, section 3.1)


def learning_rate_factor(step: int, total: int, warm_up: float = 0.2) -> float:
    """Factor of the peak learning rate at `step` of `total`.

    Up in a straight line for a part `warm_up` of the steps, then down half a cosine to 0.
    """
    rising = max(1, round(warm_up * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


class Schedule:
    """The scheduler that `config` asks for, told of every step and every epoch; one of the two moves it."""

    def __init__(self, optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> None:
        total = config.epochs * steps_per_epoch
        self._optimizer, self._peak = optimizer, config.lr
        self._factor: Callable[[int], float] = lambda step: learning_rate_factor(step, total, config.warm_up)
        self._scheduler: LambdaLR | ReduceLROnPlateau
        if config.schedule == "plateau":
            self._scheduler = ReduceLROnPlateau(
                optimizer,
                mode="max",
                factor=0.1,
                patience=config.patience,
                threshold=0,
                threshold_mode="abs",
                min_lr=config.lr * 0.1**DIVISIONS,
                eps=config.lr * 1e-6,
            )
        else:
            self._scheduler = LambdaLR(optimizer, self._factor)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def last_learning_rate(self) -> float:
        """Of the last step, even if that was made before the run was resumed."""
        if not isinstance(self._scheduler, LambdaLR):
            return self.learning_rate  # it changes after the epoch's last step
        return self._peak * self._factor(self._scheduler.last_epoch - 1)

    def step(self) -> None:
        """The optimiser made a step."""
        if isinstance(self._scheduler, LambdaLR):
            self._scheduler.step()

    def epoch(self, test_accuracy: float) -> None:
        """An epoch ended with this accuracy on the held-out images."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(test_accuracy)

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)
