# SPDX-License-Identifier: Apache-2.0
"""What a training step minimises: the loss of a pass over both branches, and the state kept from step to step.

The engine owns networks, gradients and optimiser; an objective owns the loss, its centres and what it logs.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from .dual_branch import DualOutput
from .loss import dino_loss, teacher_targets, updated_center
from .schedules import StepValues


CENTER = "center"


class Views(NamedTuple):
    """Normalised crops of one micro-batch: global (2B, C, H, W) view-major; local (L·B, C, h, w) or `None`.

    `bad_indices` are the examples that could not be read and were replaced. `masks` bool (2B, N): the patches of the
    global crops that the student does not see, `None` where nothing is masked. `draws` (B,) int64: a random number of
    each example, the same in whatever process and batch it is, `None` where examples have none.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    bad_indices: tuple[int | str, ...] = ()
    masks: Tensor | None = None
    draws: Tensor | None = None


class PassLoss(NamedTuple):
    """Of one micro-batch. loss: 0-dim, with its gradient. teacher_entropy: 0-dim, of the CLS targets, in nats.

    parts: 0-dim, without gradient, one for each of the objective's `part_names`.
    """

    loss: Tensor
    teacher_entropy: Tensor
    parts: tuple[Tensor, ...] = ()


class Objective(ABC):
    """The loss of a step. A step is `begin`, `loss` for every micro-batch, and `end` if the step moved anything.

    part_names: what is logged beside the loss, averaged over micro-batches and ranks; "dino_loss" among them is the
    loss on CLS, where that is not the whole loss.
    state: tensors of the checkpoint by name; the same on all ranks.
    """

    part_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def prepare(self, out_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the state for `out_dim` prototypes."""

    def inputs(self, views: Views) -> dict[str, Any]:
        """What the model is given of the views beside the crops, by name."""
        return {}

    @abstractmethod
    def begin(self) -> None:
        """Forget what an earlier step, finished or not, has summed up."""

    @abstractmethod
    def loss(self, output: Any, values: StepValues) -> PassLoss:
        """The loss of one micro-batch. Changes no state, but sums up what `end` needs.

        output: a `DualOutput`, or what the objective's own kind of model gives in its place.
        """

    @abstractmethod
    def end(self, accelerator: Accelerator) -> None:
        """Move the state by the sums over the step's micro-batches and all ranks."""


class DinoObjective(Objective):
    """DINO's loss between CLS tokens, with one centre of the teacher's logits."""

    def __init__(self, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum

    def prepare(self, out_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self.state = {CENTER: torch.zeros(out_dim, device=device, dtype=dtype)}

    def begin(self) -> None:
        self.logit_sum, self.rows = torch.zeros_like(self.state[CENTER]), 0

    def loss(self, output: DualOutput, values: StepValues) -> PassLoss:
        center = self.state[CENTER]
        teacher_logits = output.teacher_logits.to(center.dtype)
        targets = teacher_targets(teacher_logits, center, values.teacher_temp)
        num_views = 2 * len(output.student_logits) // len(teacher_logits)
        student_logits = output.student_logits.to(center.dtype)
        loss = dino_loss(student_logits, targets.probabilities, num_views, self.student_temp)
        self.logit_sum += teacher_logits.sum(dim=0)
        self.rows += len(teacher_logits)
        return PassLoss(loss, targets.entropy)

    def end(self, accelerator: Accelerator) -> None:
        logit_sum = accelerator.reduce(self.logit_sum, "sum")
        rows = self.rows * accelerator.num_processes
        self.state[CENTER] = updated_center(self.state[CENTER], logit_sum, rows, self.center_momentum)
