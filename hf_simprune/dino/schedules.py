# SPDX-License-Identifier: Apache-2.0
"""Everything that changes with the training step, as pure functions of the step.

The formulas are those of facebookresearch/dino: warm-up reaches the peak on its last step, cosines start after it,
the teacher temperature changes once an epoch (or once a step, when its warm-up is given in steps).
"""

import math
from dataclasses import dataclass

from ..reduction.curriculum import window_progress


@dataclass(frozen=True)
class StepValues:
    """The schedules at one optimiser step."""

    learning_rate: float
    weight_decay: float
    momentum_teacher: float
    teacher_temp: float
    last_layer_frozen: bool
    window_progress: float


def cosine_schedule(step: int, total_steps: int, base: float, final: float, warmup_steps: int = 0) -> float:
    """Linear from 0 to `base` over `warmup_steps`, then half a cosine from `base` towards `final`."""
    if step < warmup_steps:
        return base * step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
    position = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * position))


def teacher_temperature(interval: int, warmup_intervals: int, start: float, final: float) -> float:
    """Linear from `start` to `final`, both included, over `warmup_intervals` epochs or steps."""
    if interval >= warmup_intervals:
        return final
    return start + (final - start) * interval / max(1, warmup_intervals - 1)


@dataclass(frozen=True)
class DinoSchedules:
    """Schedules of one run. Steps are optimiser steps, counted from 0.

    `teacher_temp_interval` is the number of steps after which the teacher temperature moves on (steps per epoch, or 1)
    and `warmup_teacher_temp_intervals` how many such intervals its warm-up lasts.
    """

    total_steps: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    weight_decay: float
    weight_decay_end: float
    momentum_teacher: float
    teacher_temp: float
    warmup_teacher_temp: float
    warmup_teacher_temp_intervals: int
    teacher_temp_interval: int
    freeze_last_layer_steps: int
    curriculum: str

    @property
    def warmup_end(self) -> int:
        """First step at which no warm-up or freeze is in force."""
        temperature = self.warmup_teacher_temp_intervals * self.teacher_temp_interval
        return max(self.warmup_steps, temperature, self.freeze_last_layer_steps)

    def at(self, step: int) -> StepValues:
        """Values for optimiser step `step`, 0 ≤ step < total_steps."""
        total = self.total_steps
        return StepValues(
            learning_rate=cosine_schedule(step, total, self.learning_rate, self.min_learning_rate, self.warmup_steps),
            weight_decay=cosine_schedule(step, total, self.weight_decay, self.weight_decay_end),
            momentum_teacher=cosine_schedule(step, total, self.momentum_teacher, 1.0),
            teacher_temp=teacher_temperature(
                step // self.teacher_temp_interval,
                self.warmup_teacher_temp_intervals,
                self.warmup_teacher_temp,
                self.teacher_temp,
            ),
            last_layer_frozen=step < self.freeze_last_layer_steps,
            window_progress=window_progress(self.curriculum, step, total),
        )
