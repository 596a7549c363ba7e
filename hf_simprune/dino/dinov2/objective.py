# SPDX-License-Identifier: Apache-2.0
"""DINOv2's objective (arXiv:2304.07193): DINO on CLS, iBOT on masked patches, KoLeo, two ways of centring."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...errors import InputError
from ..loss import TeacherTargets, dino_loss, teacher_targets, updated_center
from ..objective import Objective, PassLoss, Views
from ..schedules import StepValues
from .branch import Dinov2Output
from .losses import koleo_loss, masked_patch_loss, sinkhorn_targets


CENTERINGS = ("sinkhorn_knopp", "centering")
CLS_CENTER, PATCH_CENTER = "cls_center", "patch_center"


class Dinov2Objective(Objective):
    """dino_weight · DINO + ibot_weight · iBOT + koleo_weight · (KoLeo of the first + of the second global view).

    The teacher's logits are centred by Sinkhorn-Knopp over the rows of a micro-batch of all ranks (`centering`
    "sinkhorn_knopp", no state), or by moving averages, one for CLS and one for masked patches ("centering").
    KoLeo looks for neighbours among the images of one micro-batch of all ranks; as published, it is of one rank.
    """

    part_names = ("dino_loss", "ibot_loss", "koleo_loss", "masked_tokens", "masked_tokens_kept")

    def __init__(
        self,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: str = "sinkhorn_knopp",
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
    ) -> None:
        """Raises InputError for an unknown `centering`."""
        super().__init__()
        check_centering(centering)
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.centering = centering
        self.dino_weight = dino_weight
        self.ibot_weight = ibot_weight
        self.koleo_weight = koleo_weight

    def prepare(self, out_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sums: dict[str, Tensor] = {}
        names = (CLS_CENTER, PATCH_CENTER) if self.centering == "centering" else ()
        self.state = {name: torch.zeros(out_dim, device=device, dtype=dtype) for name in names}

    def inputs(self, views: Views) -> dict[str, Any]:
        return {"masks": views.masks}

    def begin(self) -> None:
        # the sum of the logits, and behind it the number of rows
        self.sums = {name: torch.cat([center, center[:1]]).zero_() for name, center in self.state.items()}

    def loss(self, output: Dinov2Output, values: StepValues) -> PassLoss:
        teacher_cls, teacher_patches = (
            logits.to(self.dtype) for logits in (output.teacher_logits, output.teacher_patch_logits)
        )
        cls_targets = self._targets(CLS_CENTER, teacher_cls, values.teacher_temp)
        patch_targets = self._targets(PATCH_CENTER, teacher_patches, values.teacher_temp)

        global_views = len(teacher_cls)
        num_views = 2 * len(output.student_logits) // global_views
        student_cls = output.student_logits.to(self.dtype)
        dino = dino_loss(student_cls, cls_targets.probabilities, num_views, self.student_temp)
        student_patches = output.student_patch_logits.to(self.dtype)
        weights = output.patches_per_view.to(self.dtype).reciprocal()
        ibot = masked_patch_loss(
            student_patches, patch_targets.probabilities, weights, global_views, self.student_temp
        )
        koleo = dino.new_zeros(())
        if self.koleo_weight:
            first, second = output.student_cls.chunk(2)
            koleo = (koleo_loss(first) + koleo_loss(second)).to(self.dtype)
        loss = self.dino_weight * dino + self.ibot_weight * ibot + self.koleo_weight * koleo

        masked = output.masked_tokens.to(self.dtype) / global_views
        kept = dino.new_tensor(len(student_patches) / global_views)
        return PassLoss(loss, cls_targets.entropy, (dino.detach(), ibot.detach(), koleo.detach(), masked, kept))

    def end(self, accelerator: Accelerator) -> None:
        for name, total in self.sums.items():
            total = accelerator.reduce(total, "sum")
            if total[-1] > 0:
                self.state[name] = updated_center(self.state[name], total[:-1], total[-1], self.center_momentum)

    def _targets(self, name: str, logits: Tensor, temperature: float) -> TeacherTargets:
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_targets(logits, temperature)
        self.sums[name][:-1] += logits.sum(dim=0)
        self.sums[name][-1] += len(logits)
        return teacher_targets(logits, self.state[name], temperature)


def check_centering(centering: str) -> None:
    """Raise InputError unless `centering` is one of CENTERINGS."""
    if centering not in CENTERINGS:
        raise InputError(f"--centering {centering} is unknown: choose one of {', '.join(CENTERINGS)}")
