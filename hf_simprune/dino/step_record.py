# SPDX-License-Identifier: Apache-2.0
"""What `metrics.jsonl` and the progress bar tell of the steps since they were last told something."""

from typing import Any

from .engine import StepResult
from .schedules import StepValues
from .window import Window


def step_record(window: Window, result: StepResult, values: StepValues, images_per_step: int) -> dict[str, Any]:
    """Means over `window`; gradient norm and features are those of its last step. Times are seconds a step."""
    n = window.steps
    return {
        "loss": window.loss / n,
        "teacher_entropy": window.entropy / n,
        "kl": (window.cls_loss - window.entropy) / n,
        **{name: value / n for name, value in window.parts.items()},
        "gradient_norm": result.gradient_norm,
        "learning_rate": values.learning_rate,
        "weight_decay": values.weight_decay,
        "momentum_teacher": values.momentum_teacher,
        "teacher_temp": values.teacher_temp,
        "cls_std": result.cls_std,
        "cls_rank": result.cls_rank,
        "images_per_second": images_per_step * n / window.seconds,
        "data_wait": window.data_wait / n,
        "compute": (window.seconds - window.data_wait) / n,
    }


def shown(window: Window, result: StepResult, images_per_step: int) -> dict[str, str]:
    """For the progress bar."""
    loss = {"loss": f"{result.loss:.3f}"}
    return loss | {"img/s": f"{images_per_step * window.steps / window.seconds:.0f}"} if window.steps else loss
