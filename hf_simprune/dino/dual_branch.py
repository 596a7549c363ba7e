# SPDX-License-Identifier: Apache-2.0
"""Student and teacher: the one module that data-parallel wrappers see.

Cross-branch matching needs the tokens of both branches at the same depth, so both walk their blocks together:
teacher (without gradients), student, match, gather both, go on. A single-branch method walks each of them alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..reduction.base import BranchReducer, TokenReducer
from ..reduction.token_maps import TokenMap
from .branch_passes import Backbone, PairStage, grid_of, walk_alone, walk_in_lockstep, walk_local
from .sharding import own_parts


class Branch(nn.Module):
    """A backbone, its projection head and, where token reduction learns, `reduction` with what it learned here."""

    def __init__(self, backbone: Backbone, head: nn.Module, reduction: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.reduction = reduction


def kept_indices(maps: Any) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """What `DualOutput.kept` says, from its `maps`, which must be of kept tokens."""
    return tuple(
        (student.indices, teacher.indices, student.indices.new_empty(0) if local is None else local.indices)
        for student, teacher, local in maps
    )


class DualOutput(NamedTuple):
    """Result of one pass over both branches.

    student_logits: (V·B, K) view-major, global views first. teacher_logits: (2B, K). teacher_cls: (2B, D).
    maps: for each stage and for (student, teacher, local) what became of the patch tokens that entered it; local is
    None without local crops. Of single-branch methods, a stage in the last block is there only if CLS depends on it.
    auxiliary_loss: what the token reduction adds to the loss, 0-dim, None for nothing.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    teacher_cls: Tensor
    maps: tuple[tuple[TokenMap, TokenMap, TokenMap | None], ...]
    auxiliary_loss: Tensor | None = None

    @property
    def kept(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """The kept patch indices (rows, count) in place of every map, of a method that drops tokens and no more;
        empty without local crops."""
        return kept_indices(self.maps)


class Passes(NamedTuple):
    """CLS (R, 1, D) after the last block of every pass, and the maps as in `DualOutput`."""

    student: Tensor
    teacher: Tensor
    local: Tensor | None
    maps: tuple[tuple[TokenMap, TokenMap, TokenMap | None], ...]


class DualBranch(nn.Module):
    """DINO's two branches with token reduction in the blocks `reducer.layers`.

    Args:
        student: trained by gradients.
        teacher: same architecture; always in evaluation mode and without gradients.
        reducer: decides what becomes of patch tokens, or `None` for dense training. Both branches get the module of
            what it learns.
    """

    def __init__(self, student: Branch, teacher: Branch, reducer: TokenReducer | None = None) -> None:
        super().__init__()
        if reducer is not None:
            student.reduction, teacher.reduction = reducer.build_learned(), reducer.build_learned()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.reducer = reducer
        self.teacher.load_state_dict(student.state_dict())
        self.teacher.eval()

    def train(self, mode: bool = True) -> "DualBranch":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None, progress: Tensor, draws: Tensor | None = None
    ) -> DualOutput:
        """Both branches on the global crops (2B, C, H, W), then the student on the local ones (L·B, C, h, w).

        `progress`, 0-dim, is the position in the curriculum, in [0, 1]; a tensor, so that nothing recompiles.
        `draws` (B,) int64, as in `Views`.
        """
        self.start_pass(global_crops, draws)
        run = self._each_alone if isinstance(self.reducer, BranchReducer) else self._in_lockstep
        found = run(global_crops, local_crops, progress)
        student_cls = [self.student.backbone.layernorm(found.student[:, 0])]
        if found.local is not None:
            student_cls.append(self.student.backbone.layernorm(found.local[:, 0]))
        with torch.no_grad():
            teacher_cls = self.teacher.backbone.layernorm(found.teacher[:, 0])
            teacher_logits = self.teacher.head(teacher_cls)
        student_logits = self.student.head(torch.cat(student_cls))
        return DualOutput(student_logits, teacher_logits, teacher_cls, found.maps, self.auxiliary_loss())

    def start_pass(self, global_crops: Tensor, draws: Tensor | None = None) -> None:
        """Tell the reducer that a pass begins."""
        if self.reducer is not None:
            self.reducer.draws = draws
            if self.training:
                self.reducer.before_pass(global_crops, self)
            self.reducer.take_auxiliary_loss()  # what activations computed again in the backward pass left behind

    def auxiliary_loss(self) -> Tensor | None:
        """What the reducer adds to the loss of the pass that just ended, so that all it learns has a gradient."""
        if self.reducer is None:
            return None
        loss = self.reducer.take_auxiliary_loss()
        learned = [] if self.student.reduction is None else list(self.student.reduction.parameters())
        if not learned:
            return loss
        # Data-parallel wrappers want a gradient for every parameter in every step, also of a stage that did not run.
        touched = 0.0 * torch.stack([parameter.sum() for parameter in learned]).sum()
        return touched if loss is None else loss + touched

    def _each_alone(self, global_crops: Tensor, local_crops: Tensor | None, progress: Tensor) -> Passes:
        with torch.no_grad():
            teacher, teacher_maps = self._alone(self.teacher, global_crops)
        student, student_maps = self._alone(self.student, global_crops)
        local: Tensor | None = None
        local_maps: Sequence[TokenMap | None] = [None] * len(student_maps)
        if local_crops is not None:
            local, local_maps = self._alone(self.student, local_crops)
        return Passes(student, teacher, local, tuple(zip(student_maps, teacher_maps, local_maps, strict=True)))

    def _alone(self, branch: Branch, crops: Tensor) -> tuple[Tensor, list[TokenMap]]:
        net = branch.backbone
        assert isinstance(self.reducer, BranchReducer)
        return walk_alone(net, net.embed(crops), grid_of(net, crops), self.reducer, branch.reduction)

    def _in_lockstep(self, global_crops: Tensor, local_crops: Tensor | None, progress: Tensor) -> Passes:
        student_net, teacher_net = self.student.backbone, self.teacher.backbone
        reducer: Any = self.reducer  # a `PairReducer`, if any
        learned = self.student.reduction
        layers = () if reducer is None else reducer.layers
        student, teacher, stages = walk_in_lockstep(
            student_net,
            teacher_net,
            student_net.embed(global_crops),
            torch.no_grad()(teacher_net.embed)(global_crops),
            layers,
            lambda student, teacher, stage: reducer.pair(student, teacher, progress, stage, learned),
        )
        local, local_maps = self._behind(stages, local_crops, progress)
        maps = ((stage.student, stage.teacher, kept) for stage, kept in zip(stages, local_maps, strict=True))
        return Passes(student, teacher, local, tuple(maps))

    def _behind(
        self, stages: list[PairStage], local_crops: Tensor | None, progress: Tensor
    ) -> tuple[Tensor | None, Sequence[TokenMap | None]]:
        """The student's local crops after a pass in lockstep: CLS, and what every stage did."""
        if local_crops is None:
            return None, [None] * len(stages)
        net, learned = self.student.backbone, self.student.reduction
        reducer: Any = self.reducer  # a `PairReducer`, if any
        return walk_local(
            net,
            net.embed(local_crops),
            () if reducer is None else reducer.layers,
            lambda local, stage: reducer.local(local, stages[stage].seen, progress, stage, learned),
        )


@torch.no_grad()
def update_teacher(model: DualBranch, momentum: float) -> None:
    """Exponential moving average of all parameters: teacher ← m·teacher + (1 − m)·student."""
    # sharded alike, the parts that this process keeps correspond
    teacher, student = (own_parts(branch.parameters()) for branch in (model.teacher, model.student))
    torch._foreach_lerp_(teacher, student, 1 - momentum)
