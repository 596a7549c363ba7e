# SPDX-License-Identifier: Apache-2.0
"""What a run sums up from one logged step to the next."""

from dataclasses import dataclass, field

from .engine import StepResult


@dataclass
class Window:
    """Sums since the last logged step."""

    steps: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    seconds: float = 0.0
    data_wait: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, result: StepResult, seconds: float, data_wait: float) -> None:
        self.steps += 1
        self.loss += result.loss
        self.entropy += result.teacher_entropy
        self.seconds += seconds
        self.data_wait += data_wait
        for name, value in result.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value

    @property
    def cls_loss(self) -> float:
        """As `StepResult.cls_loss`, summed."""
        return self.parts.get("dino_loss", self.loss)
