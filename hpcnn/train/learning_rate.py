"""The learning rate as a pure function of the step."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Literal

from hpcnn.config import TrainConfig
from hpcnn.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Linear warm-up to the peak, then a fall: constant, step, cosine (to zero) or polynomial (to zero)."""

    peak: float
    """Rate at the end of the warm-up, scaled to the global batch."""
    warmup_steps: int
    """Steps in which the rate climbs by equal amounts; the last of them has the peak."""
    total_steps: int
    """Steps at which cosine and polynomial would reach zero."""
    schedule: Literal["constant", "step", "cosine", "polynomial"]
    milestone_steps: tuple[int, ...] = ()
    """Schedule "step": steps from which on the rate is multiplied by `gamma` once more."""
    gamma: float = 0.1
    power: float = 1.0

    def rate(self, step: int) -> float:
        """Return the learning rate of update number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        length = max(self.total_steps - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / length, 1.0)
        match self.schedule:
            case "constant":
                return self.peak
            case "step":
                return self.peak * self.gamma ** bisect.bisect_right(self.milestone_steps, step)
            case "cosine":
                return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))
            case "polynomial":
                return float(self.peak * (1.0 - done) ** self.power)


def build(config: TrainConfig, *, steps_per_epoch: int, total_steps: int) -> LearningRate:
    """Return the learning rate that a recipe describes.

    With `base_batch` the peak is lr * global_batch / base_batch (Goyal et al., arXiv:1706.02677).

    Raises
    ------
    ConfigError
        If the schedule is "step" and there are no milestones, or they do not ascend.
    """
    milestones = config.milestones
    if config.schedule == "step" and (not milestones or list(milestones) != sorted(set(milestones))):
        raise ConfigError(
            f"config: 'train.milestones' (={list(milestones)}) must be ascending epochs for train.schedule 'step'."
            " Set train.milestones=[30, 60, 80], or another schedule."
        )
    return LearningRate(
        peak=config.lr * (config.global_batch / config.base_batch if config.base_batch else 1.0),
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        total_steps=total_steps,
        schedule=config.schedule,
        milestone_steps=tuple(round(epoch * steps_per_epoch) for epoch in milestones),
        gamma=config.gamma,
        power=config.power,
    )
