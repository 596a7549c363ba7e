# SPDX-License-Identifier: Apache-2.0
"""One optimiser step of DINO, from crops to updated student, teacher and centre."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from .dual_branch import DualBranch, update_teacher
from .loss import dino_loss, effective_rank, feature_std, teacher_targets, updated_center
from .optimizer import build_optimizer, clip_each_parameter, clip_global_norm, drop_last_layer_gradients
from .schedules import StepValues


class Views(NamedTuple):
    """Normalised crops of one micro-batch: global (2B, C, H, W) view-major; local (L·B, C, h, w) or `None`.

    `bad_indices` are the examples that could not be read and were replaced.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    bad_indices: tuple[int, ...] = ()


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; nothing was updated."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured. `skipped` says that gradients were not finite, so that nothing moved.

    loss, teacher_entropy: nats. gradient_norm: L2, before clipping. cls_std, cls_rank: of the teacher's CLS features
    of the last micro-batch; NaN where `diagnostics` was off.
    """

    loss: float
    teacher_entropy: float
    gradient_norm: float
    skipped: bool
    cls_std: float = math.nan
    cls_rank: float = math.nan

    @property
    def kl(self) -> float:
        return self.loss - self.teacher_entropy


class DinoEngine:
    """Model, optimiser and centre of a run, and the step that moves them.

    All micro-batches of a step use the centre, temperature and window of its start; one centre update is made from
    the sums over micro-batches and ranks. A step whose gradients are not finite moves nothing.

    Args:
        model: moved to the accelerator's device and wrapped for its number of processes.
        accelerator: built by the caller; its gradient accumulation is left at 1, `step` accumulates itself.
        student_temp, center_momentum: as in DINO.
        max_grad_norm: global-norm clipping, or `None`.
        clip_grad: DINO's clipping of each parameter by itself, or `None`.
    """

    def __init__(
        self,
        model: DualBranch,
        accelerator: Accelerator,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        max_grad_norm: float | None = 3.0,
        clip_grad: float | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.max_grad_norm = max_grad_norm
        self.clip_grad = clip_grad
        self.dual = model.to(accelerator.device)
        optimizer = build_optimizer(self.dual.student)
        self.model, self.optimizer = accelerator.prepare(self.dual, optimizer)
        self.model.train()
        parameter = next(self.dual.parameters())
        out_dim = self.dual.student.head.last_layer.out_features
        # the centre follows a double-precision model, and is never coarser than fp32
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.center = torch.zeros(out_dim, device=accelerator.device, dtype=dtype)

    def step(self, micro_batches: Sequence[Views], values: StepValues, diagnostics: bool = False) -> StepResult:
        """One optimiser step over `micro_batches` of equal size.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite on some rank; no state was changed.
        """
        self._apply_schedules(values)
        progress = torch.tensor(values.window_progress, dtype=torch.float32, device=self.accelerator.device)
        self.optimizer.zero_grad()
        logit_sum, rows = torch.zeros_like(self.center), 0
        totals = torch.zeros(2, device=self.accelerator.device, dtype=self.center.dtype)
        for index, views in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                output = self.model(views.global_crops, views.local_crops, progress)
                teacher_logits = output.teacher_logits.to(self.center.dtype)
                targets = teacher_targets(teacher_logits, self.center, values.teacher_temp)
                num_views = 2 * len(output.student_logits) // len(teacher_logits)
                student_logits = output.student_logits.to(self.center.dtype)
                loss = dino_loss(student_logits, targets.probabilities, num_views, self.student_temp)
                self.accelerator.backward(loss / len(micro_batches))
            logit_sum += teacher_logits.sum(dim=0)
            rows += len(teacher_logits)
            totals += torch.stack([loss.detach(), targets.entropy])
        loss, entropy = (self.accelerator.reduce(totals, "mean") / len(micro_batches)).tolist()
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            raise NonFiniteLossError(f"loss is {loss}")
        norm, skipped = self._optimizer_step(values)
        if not skipped:
            update_teacher(self.dual, values.momentum_teacher)
            logit_sum = self.accelerator.reduce(logit_sum, "sum")
            rows *= self.accelerator.num_processes
            self.center = updated_center(self.center, logit_sum, rows, self.center_momentum)
        result = StepResult(loss, entropy, norm, skipped)
        if diagnostics:
            std, rank = feature_std(output.teacher_cls).item(), effective_rank(output.teacher_cls).item()
            result = StepResult(loss, entropy, norm, skipped, std, rank)
        return result

    def _apply_schedules(self, values: StepValues) -> None:
        decayed, plain = self.optimizer.param_groups
        decayed["lr"] = plain["lr"] = values.learning_rate
        decayed["weight_decay"] = values.weight_decay

    def _optimizer_step(self, values: StepValues) -> tuple[float, bool]:
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer.optimizer)
        if values.last_layer_frozen:
            drop_last_layer_gradients(self.dual.student)
        parameters = self.dual.student.parameters()
        if self.clip_grad is not None:
            norm = clip_each_parameter(parameters, self.clip_grad).item()
        else:
            norm = clip_global_norm(parameters, self.max_grad_norm).item()
        if scaler is None and not math.isfinite(norm):
            self.optimizer.zero_grad()
            return norm, True
        scale = scaler.get_scale() if scaler is not None else 1.0
        self.optimizer.step()
        # a fused optimiser skips inside its kernel, so only the lowered scale tells of an overflow
        return norm, scaler is not None and scaler.get_scale() < scale
