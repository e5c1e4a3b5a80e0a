"""How fast what learns: schedules, weight decay, and the scale of losses in fp16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitgen_cli.config import OptimizerConfig

NO_DECAY = ("null_text", "start", "scale_embedding.weight", "modulation", "log_scale", "text_pool.query")
"""Ends of the names of parameters without weight decay, besides biases and vectors.

`modulation` is the table of each block; the layers' weights are called `modulation.weight` and decay.
Source: INFINITY_FORMAT section 6, Recipe.
"""


@dataclass(frozen=True)
class Pace:
    """How fast a parameter learns, and from when.

    Attributes:
        rate: what the learning rate is multiplied with.
        start: the first step it learns in; its warm-up begins there.
    """

    rate: float = 1.0
    start: int = 0


def learning_rate(step: int, total: int, config: OptimizerConfig, start: int = 0) -> float:
    """The rate of a step: linear warm-up, then constant, or cosine to final_learning_rate x the peak.

    Args:
        step: 0 ... total - 1.
        total: steps of the training.
        config: peak, warm-up and schedule.
        start: the step that the warm-up begins at; before it the rate is 0.
    """
    if step < start:
        return 0.0
    warmed = min(1.0, (step - start + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warmed
    share = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    floor = config.final_learning_rate
    fallen = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, share))))
    return config.learning_rate * min(warmed, fallen)


def parameter_groups(module: nn.Module, weight_decay: float, paces: Mapping[str, Pace]) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay, in the order of their names in the module.

    Args:
        module: what is trained.
        weight_decay: of matrices.
        paces: as in `Stage`; parameters with a pace of their own are in groups of their own.
    """
    usual = Pace()
    groups: dict[tuple[Pace, float], list[nn.Parameter]] = {(usual, weight_decay): [], (usual, 0.0): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            pace = next((pace for start, pace in paces.items() if name.startswith(start)), usual)
            decay = 0.0 if _undecayed(name, parameter) else weight_decay
            groups.setdefault((pace, decay), []).append(parameter)
    return [{"params": found, "weight_decay": decay, "pace": pace} for (pace, decay), found in groups.items()]


def _undecayed(name: str, parameter: Tensor) -> bool:
    ends = ("bias", *(f".{end}" for end in NO_DECAY))
    return parameter.ndim <= 1 or f".{name}".endswith(ends)


@dataclass(frozen=True)
class LossScale:
    """What a loss is multiplied with so that small gradients survive fp16, adapted as torch's GradScaler does.

    GradScaler itself looks for overflows on one device; here the norm of all gradients over all processes tells of
    them, and the scale is a value that checkpoints keep.

    Attributes:
        adapts: False outside of fp16: the factor is 1 and stays so.
        value: the factor.
        good: steps without an overflow since it last changed.
    """

    adapts: bool = False
    value: float = 1.0
    good: int = 0

    GROWS_AFTER = 2000
    LARGEST = 2.0**24

    @staticmethod
    def start(precision: str) -> LossScale:
        """The scale a training begins with."""
        return LossScale(True, 65536.0) if precision == "fp16" else LossScale()

    def after(self, overflowed: bool) -> LossScale:
        """The scale of the next step: half after an overflow, twice after many steps without."""
        if not self.adapts:
            return self
        if overflowed:
            return LossScale(True, self.value / 2)
        if self.good + 1 < self.GROWS_AFTER:
            return LossScale(True, self.value, self.good + 1)
        return LossScale(True, min(2 * self.value, self.LARGEST))
