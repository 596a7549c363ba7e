# SPDX-License-Identifier: Apache-2.0
"""Student and teacher in lockstep: the one module that data-parallel wrappers see.

Cross-branch matching needs the tokens of both branches at the same depth, so `DualBranch.forward` walks the blocks of
both together: teacher (without gradients), student, match, gather both, go on.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.deit import SimPruneDeiTModel
from ..models.vit import SimPruneViTModel
from ..reduction.base import TokenReducer
from ..reduction.token_maps import gather_tokens


class Branch(nn.Module):
    """A backbone and its projection head."""

    def __init__(self, backbone: SimPruneViTModel | SimPruneDeiTModel, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head


class DualOutput(NamedTuple):
    """Result of one pass over both branches.

    student_logits: (V·B, K) view-major, global views first. teacher_logits: (2B, K). teacher_cls: (2B, D).
    kept: for each reduction layer and for (student, teacher, local) the kept patch indices (rows, count), counted
    in the grid that entered that layer; local is an empty tensor without local crops.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    teacher_cls: Tensor
    kept: tuple[tuple[Tensor, Tensor, Tensor], ...]


class DualBranch(nn.Module):
    """DINO's two branches with token reduction between the attention and the MLP of `reduction_layers`.

    Args:
        student: trained by gradients.
        teacher: same architecture; always in evaluation mode and without gradients.
        reducer: decides which patch tokens stay, or `None` for dense training.
        reduction_layers: 0-based block indices.
    """

    def __init__(
        self,
        student: Branch,
        teacher: Branch,
        reducer: TokenReducer | None = None,
        reduction_layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.reducer = reducer
        self.reduction_layers = frozenset(reduction_layers) if reducer is not None else frozenset()
        self.teacher.load_state_dict(student.state_dict())
        self.teacher.eval()

    def train(self, mode: bool = True) -> "DualBranch":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, global_crops: Tensor, local_crops: Tensor | None, progress: Tensor) -> DualOutput:
        """Both branches on the global crops (2B, C, H, W), then the student on the local ones (L·B, C, h, w).

        `progress`, 0-dim, is the position in the curriculum, in [0, 1]; a tensor, so that nothing recompiles.
        """
        student, teacher, kept, seen = self._global_views(global_crops, progress)
        student_cls = [self.student.backbone.layernorm(student)]
        local_kept = [kept[i][0].new_empty(0) for i in range(len(kept))]
        if local_crops is not None:
            local, local_kept = self._local_views(local_crops, seen, progress)
            student_cls.append(self.student.backbone.layernorm(local))
        with torch.no_grad():
            teacher_cls = self.teacher.backbone.layernorm(teacher)
            teacher_logits = self.teacher.head(teacher_cls)
        student_logits = self.student.head(torch.cat(student_cls))
        records = tuple((s, t, lo) for (s, t), lo in zip(kept, local_kept, strict=True))
        return DualOutput(student_logits, teacher_logits, teacher_cls, records)

    def _global_views(self, crops: Tensor, progress: Tensor):
        student_net, teacher_net = self.student.backbone, self.teacher.backbone
        prefix = student_net.num_prefix_tokens
        kept: list[tuple[Tensor, Tensor]] = []
        seen: list[Tensor] = []  # the teacher's patch tokens before each reduction, for the local crops
        with torch.no_grad():
            teacher = teacher_net.embed(crops)
        student = student_net.embed(crops)
        last = len(student_net.layers) - 1
        for index, layers in enumerate(zip(student_net.layers, teacher_net.layers, strict=True)):
            student_layer, teacher_layer = layers
            if index in self.reduction_layers:
                with torch.no_grad():
                    attended_teacher = after_attention(teacher_layer, teacher, index == last)
                attended_student = after_attention(student_layer, student, index == last)
                selection = self.reducer.pair(
                    attended_student[:, prefix:].detach(), attended_teacher[:, prefix:], progress
                )
                seen.append(attended_teacher[:, prefix:])
                kept.append((selection.student, selection.teacher))
                if index < last:
                    with torch.no_grad():
                        teacher = teacher_layer(gather_tokens(attended_teacher, selection.teacher, prefix), half="mlp")
                    student = student_layer(gather_tokens(attended_student, selection.student, prefix), half="mlp")
                    continue
            with torch.no_grad():
                teacher = whole_block(teacher_layer, teacher, index == last)
            student = whole_block(student_layer, student, index == last)
        return student[:, 0], teacher[:, 0], kept, seen

    def _local_views(self, crops: Tensor, seen: list[Tensor], progress: Tensor) -> tuple[Tensor, list[Tensor]]:
        net = self.student.backbone
        prefix = net.num_prefix_tokens
        kept: list[Tensor] = []
        tokens = net.embed(crops)
        last = len(net.layers) - 1
        for index, layer in enumerate(net.layers):
            if index in self.reduction_layers:
                attended = after_attention(layer, tokens, index == last)
                keep = self.reducer.local(attended[:, prefix:].detach(), seen[len(kept)], progress).indices
                kept.append(keep)
                if index < last:
                    tokens = layer(gather_tokens(attended, keep, prefix), half="mlp")
                    continue
            tokens = whole_block(layer, tokens, index == last)
        return tokens[:, 0], kept


def whole_block(layer: nn.Module, tokens: Tensor, last: bool) -> Tensor:
    """Tokens after `layer`; of the last block only CLS, (B, 1, D), since nothing else of it is read."""
    if not last:
        return layer(tokens)
    return layer(layer(tokens, half="attention", num_queries=1), half="mlp")


def after_attention(layer: nn.Module, tokens: Tensor, last: bool) -> Tensor:
    """Tokens after the attention half of a reduction layer.

    In the last block they serve the matching alone and the block runs again for CLS, as in dense training: no
    gradient, and the random draws are put back.
    """
    if not last:
        return layer(tokens, half="attention")
    with torch.no_grad(), torch.random.fork_rng([tokens.device] if tokens.is_cuda else []):
        return layer(tokens, half="attention")


@torch.no_grad()
def update_teacher(model: DualBranch, momentum: float) -> None:
    """Exponential moving average of all parameters: teacher ← m·teacher + (1 − m)·student."""
    teacher = list(model.teacher.parameters())
    torch._foreach_lerp_(teacher, list(model.student.parameters()), 1 - momentum)
