# SPDX-License-Identifier: Apache-2.0
"""One optimiser step, from crops to updated student, teacher and centres."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from ..reduction.base import TokenReducer
from .dual_branch import DualBranch, update_teacher
from .loss import effective_rank, feature_std
from .objective import CENTER, DinoObjective, Objective, Views
from .optimizer import build_optimizer, clip_each_parameter, clip_global_norm, drop_last_layer_gradients
from .schedules import StepValues
from .sharding import PlainCopy, Sharding, shard_branches


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; nothing was updated."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured. `skipped` says that gradients were not finite, so that nothing moved.

    loss, teacher_entropy: nats. gradient_norm: L2, before clipping. cls_std, cls_rank: of the teacher's CLS features
    in all processes' last micro-batch; NaN where `diagnostics` was off. parts: what the objective tells beside.
    """

    loss: float
    teacher_entropy: float
    gradient_norm: float
    skipped: bool
    cls_std: float = math.nan
    cls_rank: float = math.nan
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def cls_loss(self) -> float:
        """The loss on CLS, which the teacher's entropy belongs to."""
        return self.parts.get("dino_loss", self.loss)

    @property
    def kl(self) -> float:
        return self.cls_loss - self.teacher_entropy


class DinoEngine:
    """Model, optimiser and objective of a run, and the step that moves them.

    All micro-batches of a step use the centres, temperature and window of its start; one centre update is made from
    the sums over micro-batches and ranks. A step whose gradients are not finite moves nothing.

    Args:
        model: moved to the accelerator's device and wrapped for its number of processes.
        accelerator: built by the caller; its gradient accumulation is left at 1, `step` accumulates itself.
        objective: the loss; DINO's with its published values when `None`.
        max_grad_norm: global-norm clipping, or `None`.
        clip_grad: DINO's clipping of each parameter by itself, or `None`.
        sharding: deal the parameters out over processes; `None` gives every process all of them.

    Attributes:
        dual: the networks that are trained. networks: those for use outside of a step, the same ones or, of sharded
            ones, a copy that is empty but within `whole_networks` and `whole_teacher`.
    """

    def __init__(
        self,
        model: DualBranch,
        accelerator: Accelerator,
        objective: Objective | None = None,
        max_grad_norm: float | None = 3.0,
        clip_grad: float | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.objective = objective if objective is not None else DinoObjective()
        self.max_grad_norm = max_grad_norm
        self.clip_grad = clip_grad
        self.dual = self.networks = model
        self._plain: PlainCopy | None = None
        if sharding is None:
            optimizer = build_optimizer(model.to(accelerator.device).student)
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        else:
            # not by accelerate: it would shard by class name, and cast the position in the curriculum
            self._plain = PlainCopy(model)
            self.networks = self._plain.networks
            shard_branches(model, sharding, accelerator.device)
            self.model, self.optimizer = model, AcceleratedOptimizer(build_optimizer(model.student), False)
        self.model.train()
        parameter = next(self.dual.parameters())
        # the centre follows a double-precision model, and is never coarser than fp32
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.objective.prepare(self.out_dim, accelerator.device, self.dtype)

    @property
    def out_dim(self) -> int:
        """Prototypes of the head on CLS."""
        head: Any = self.dual.student.head  # a `DinoHead`
        return head.last_layer.out_features

    @property
    def center(self) -> Tensor:
        """DINO's centre, (K,)."""
        return self.objective.state[CENTER]

    @property
    def sharded(self) -> bool:
        return self._plain is not None

    def whole_networks(self) -> AbstractContextManager[None]:
        """Within it the main process can use `networks`, of sharded ones on the CPU. Enter it in all processes."""
        if self._plain is None:
            return nullcontext()
        return self._plain.filled("", self.dual, "cpu", everywhere=False)

    def whole_teacher(self) -> AbstractContextManager[None]:
        """Within it every process can use `networks.teacher`, on its device. Enter it in all processes."""
        if self._plain is None:
            return nullcontext()
        return self._plain.filled("teacher", self.dual, self.accelerator.device, everywhere=True)

    def networks_from(self, read: Callable[[str], Mapping[str, Tensor]]) -> AbstractContextManager[None]:
        """Within it this process alone can use `networks`; of sharded ones `read` gives the tensors of a branch."""
        return nullcontext() if self._plain is None else self._plain.filled_with(read("student"), read("teacher"))

    def before_step(self, step: int, steps_per_epoch: int | None, micro_batches: Sequence[Views]) -> None:
        """Let the token reduction measure what it needs now and then; in every process, before each `step`."""
        reducer = self.dual.reducer
        dual: Any = self.dual
        if reducer is None or type(reducer).before_step is TokenReducer.before_step:
            return
        if self.sharded:  # a method may pass through the teacher by itself, block by block
            teacher = SimpleNamespace(backbone=self.networks.teacher.backbone, reduction=dual.teacher.reduction)
            dual = SimpleNamespace(student=dual.student, teacher=teacher)
        with self.whole_teacher():
            reducer.before_step(step, steps_per_epoch, micro_batches, dual)

    def step(self, micro_batches: Sequence[Views], values: StepValues, diagnostics: bool = False) -> StepResult:
        """One optimiser step over `micro_batches` of equal size.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite on some rank; no state was changed.
        """
        self._apply_schedules(values)
        progress = torch.tensor(values.window_progress, dtype=torch.float32, device=self.accelerator.device)
        self.optimizer.zero_grad()
        objective = self.objective
        objective.begin()
        totals = torch.zeros(2 + len(objective.part_names), device=self.accelerator.device, dtype=self.dtype)
        for index, views in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            # sharded gradients are summed up as parts, which takes a reduction a micro-batch and no memory
            with nullcontext() if last or self.sharded else self.accelerator.no_sync(self.model):
                crops = (views.global_crops, views.local_crops, progress)
                with self.accelerator.autocast() if self.sharded else nullcontext():  # else in the wrapper
                    output = self.model(*crops, draws=views.draws, **objective.inputs(views))
                found = objective.loss(output, values)
                whole = found.loss if output.auxiliary_loss is None else found.loss + output.auxiliary_loss
                self.accelerator.backward(whole / len(micro_batches))
            totals += torch.stack([found.loss.detach(), found.teacher_entropy, *found.parts])
        loss, entropy, *parts = (self.accelerator.reduce(totals, "mean") / len(micro_batches)).tolist()
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            raise NonFiniteLossError(f"loss is {loss}")
        norm, skipped = self._optimizer_step(values)
        if not skipped:
            update_teacher(self.dual, values.momentum_teacher)
            objective.end(self.accelerator)
        result = StepResult(loss, entropy, norm, skipped, parts=dict(zip(objective.part_names, parts, strict=True)))
        if diagnostics:
            features = self.accelerator.gather(output.teacher_cls)
            std, rank = feature_std(features).item(), effective_rank(features).item()
            result = replace(result, cls_std=std, cls_rank=rank)
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
