# SPDX-License-Identifier: Apache-2.0
"""Recognises the two ways in which DINO stops learning.

With K prototypes, teacher entropy H and KL = loss − H: when KL stays near 0 the student has nothing left to learn;
H near ln K then means that every image gets the uniform answer, H near 0 that every image gets the same prototype.
"""

import math
from dataclasses import dataclass


KL_FLOOR = 0.01
PATIENCE_STEPS = 200

ADVICE = {
    "uniform": "the teacher answers uniformly: lower --teacher_temp or lengthen its warm-up from a lower "
    "--warmup_teacher_temp, lower --center_momentum, or use fewer prototypes (--out_dim)",
    "one-prototype": "the teacher always answers with the same prototype: raise --teacher_temp, lower "
    "--center_momentum so that the centre follows faster, or lower --learning_rate",
}


@dataclass
class CollapseMonitor:
    """Counts consecutive steps after warm-up on which the run looks collapsed, and reports each kind once.

    Args:
        out_dim: number of prototypes K.
        start_step: first step to look at, after every warm-up and freeze.
    """

    out_dim: int
    start_step: int
    uniform_steps: int = 0
    one_prototype_steps: int = 0

    def update(self, step: int, loss: float, teacher_entropy: float) -> str | None:
        """Returns a message on the step on which collapse is established, otherwise `None`."""
        if step < self.start_step:
            return None
        still = loss - teacher_entropy < KL_FLOOR
        highest = math.log(self.out_dim)
        self.uniform_steps = self.uniform_steps + 1 if still and teacher_entropy > 0.98 * highest else 0
        self.one_prototype_steps = self.one_prototype_steps + 1 if still and teacher_entropy < 0.02 * highest else 0
        for kind, count in (("uniform", self.uniform_steps), ("one-prototype", self.one_prototype_steps)):
            if count == PATIENCE_STEPS:
                return (
                    f"{kind} collapse at step {step}: for {PATIENCE_STEPS} steps KL = loss - H was below {KL_FLOOR}, "
                    f"with teacher entropy H = {teacher_entropy:.3f} of ln({self.out_dim}) = {highest:.3f}; "
                    f"{ADVICE[kind]}"
                )
        return None

    def state_dict(self) -> dict[str, int]:
        return {"uniform_steps": self.uniform_steps, "one_prototype_steps": self.one_prototype_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.uniform_steps = state["uniform_steps"]
        self.one_prototype_steps = state["one_prototype_steps"]
