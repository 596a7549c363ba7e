# SPDX-License-Identifier: Apache-2.0
"""DINOv2's two branches: the student sees masked global crops, the teacher whole ones, and both have patch heads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...models.dinov2 import SimPruneDinov2Model
from ...reduction.base import BranchReducer, PairSelection, TokenReducer
from ...reduction.masked_pairs import pair_masked, validate_masked_policy
from ...reduction.methods import METHODS
from ...reduction.simprune import SimPruneReducer
from ...reduction.token_maps import Kept, TokenMap
from ..branch_passes import Backbone, grid_of, walk_alone, walk_in_lockstep
from ..dual_branch import Branch, DualBranch, Passes, kept_indices
from .masked_tokens import MaskedTokens


class Dinov2Branch(Branch):
    """A backbone with a head on CLS and one on patches; `patch_head` None lets `head` do both."""

    def __init__(self, backbone: Backbone, head: nn.Module, patch_head: nn.Module | None = None) -> None:
        super().__init__(backbone, head)
        self.patch_head = patch_head

    def project_patches(self, tokens: Tensor) -> Tensor:
        """(M, D) patch features -> (M, K) logits."""
        return (self.head if self.patch_head is None else self.patch_head)(tokens)


class Dinov2Output(NamedTuple):
    """As `DualOutput`, and for the M masked tokens that are left in both branches:

    student_patch_logits, teacher_patch_logits: (M, K) in the same order. patches_per_view: (M,) int64, how many of
    them each one's view has. masked_tokens: 0-dim, how many were masked at the start. student_cls: (2B, D), of the
    global views.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    teacher_cls: Tensor
    maps: tuple[tuple[TokenMap, TokenMap, TokenMap | None], ...]
    auxiliary_loss: Tensor | None
    student_cls: Tensor
    student_patch_logits: Tensor
    teacher_patch_logits: Tensor
    patches_per_view: Tensor
    masked_tokens: Tensor

    @property
    def kept(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """As `DualOutput.kept`."""
        return kept_indices(self.maps)


class Dinov2DualBranch(DualBranch):
    """`DualBranch` with masked student views and all tokens of the last block.

    With SimPrune, masked student tokens and the teacher's tokens at the same positions stay or leave together. With
    other methods the branches may lose them apart; the patch loss is taken on those alive in both.

    Args:
        masked_policy: of SimPrune, see `reduction.masked_pairs`.

    Raises:
        InputError: unknown policy, or a method that merges tokens.
    """

    student: Dinov2Branch
    teacher: Dinov2Branch

    def __init__(
        self,
        student: Dinov2Branch,
        teacher: Dinov2Branch,
        reducer: TokenReducer | None = None,
        masked_policy: str = "pair",
    ) -> None:
        check_masked_reduction(reducer.name if reducer is not None and reducer.merges else "none")
        validate_masked_policy(masked_policy)
        super().__init__(student, teacher, reducer)
        self.masked_policy = masked_policy

    def forward(  # type: ignore[override]
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        progress: Tensor,
        masks: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Dinov2Output:
        """As `DualBranch.forward`; `masks` bool (2B, N) are of the student's global views, `None` masks nothing."""
        self.start_pass(global_crops, draws)
        if masks is None:
            rows, columns = grid_of(self.student.backbone, global_crops)
            masks = torch.zeros(len(global_crops), rows * columns, dtype=torch.bool, device=global_crops.device)
        tracked = MaskedTokens(masks)
        run = self._each_alone_masked if isinstance(self.reducer, BranchReducer) else self._in_lockstep_masked
        student, teacher, local, maps = run(global_crops, local_crops, progress, tracked)  # all tokens, CLS of local
        pairs = tracked.pairs()

        prefix = self.student.backbone.num_prefix_tokens
        with torch.no_grad():
            # the norm is taken of what is read only
            teacher_cls = self.teacher.backbone.layernorm(teacher[:, 0])
            teacher_logits = self.teacher.head(teacher_cls)
            teacher_patches = self.teacher.backbone.layernorm(teacher[pairs.rows, prefix + pairs.teacher])
            teacher_patch_logits = self.teacher.project_patches(teacher_patches)
        norm = self.student.backbone.layernorm
        student_cls = norm(student[:, 0])
        all_cls = student_cls if local is None else torch.cat([student_cls, norm(local[:, 0])])
        student_patches = norm(_pick(student, pairs.rows, prefix + pairs.student))
        return Dinov2Output(
            student_logits=self.student.head(all_cls),
            teacher_logits=teacher_logits,
            teacher_cls=teacher_cls,
            maps=maps,
            auxiliary_loss=self.auxiliary_loss(),
            student_cls=student_cls,
            student_patch_logits=self.student.project_patches(student_patches),
            teacher_patch_logits=teacher_patch_logits,
            patches_per_view=pairs.per_view,
            masked_tokens=masks.sum(),
        )

    def _each_alone_masked(
        self, global_crops: Tensor, local_crops: Tensor | None, progress: Tensor, tracked: MaskedTokens
    ) -> Passes:
        net, grid = self.student.backbone, grid_of(self.student.backbone, global_crops)
        with torch.no_grad():
            teacher, teacher_maps = self._walk(self.teacher, self.teacher.backbone.embed(global_crops), grid)
        student, student_maps = self._walk(self.student, embed_masked(net, global_crops, tracked.masks), grid)
        for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
            tracked.reduce(student_map, teacher_map)
        local: Tensor | None = None
        local_maps: Sequence[TokenMap | None] = []
        if local_crops is not None:
            local, local_maps = self._alone(self.student, local_crops)
        # CLS of a local crop may not depend on a stage in the last block
        local_maps = [*local_maps, *[None] * (len(student_maps) - len(local_maps))]
        return Passes(student, teacher, local, tuple(zip(student_maps, teacher_maps, local_maps, strict=True)))

    def _walk(self, branch: Dinov2Branch, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, list[TokenMap]]:
        assert isinstance(self.reducer, BranchReducer)
        return walk_alone(branch.backbone, tokens, grid, self.reducer, branch.reduction, whole=True)

    def _in_lockstep_masked(
        self, global_crops: Tensor, local_crops: Tensor | None, progress: Tensor, tracked: MaskedTokens
    ) -> Passes:
        student_net, teacher_net = self.student.backbone, self.teacher.backbone
        reducer: Any = self.reducer  # a `PairReducer`, if any
        learned = self.student.reduction

        def select(student: Tensor, teacher: Tensor, stage: int) -> PairSelection:
            if isinstance(reducer, SimPruneReducer):
                found = pair_masked(reducer, student, teacher, tracked.partner(), progress, self.masked_policy)
            else:
                found = reducer.pair(student, teacher, progress, stage, learned)
            count = student.shape[1]
            tracked.reduce(Kept(found.student, count), Kept(found.teacher, count))
            return found

        student, teacher, stages = walk_in_lockstep(
            student_net,
            teacher_net,
            embed_masked(student_net, global_crops, tracked.masks),
            torch.no_grad()(teacher_net.embed)(global_crops),
            () if reducer is None else reducer.layers,
            select,
            whole=True,
        )
        local, local_maps = self._behind(stages, local_crops, progress)
        maps = ((stage.student, stage.teacher, kept) for stage, kept in zip(stages, local_maps, strict=True))
        return Passes(student, teacher, local, tuple(maps))


def check_masked_reduction(name: str) -> None:
    """Raise InputError for a method that merges tokens: they have no counterpart at a position of the other branch."""
    if name == "none" or (name in METHODS and not METHODS[name].merges):
        return
    accepted = ["none", *(other for other, method in METHODS.items() if not method.merges)]
    raise InputError(
        f"--token_reduction {name}: with --objective dinov2 every token must stay a patch of its own, for the "
        f"loss on masked patches: choose one of {', '.join(accepted)}"
    )


def ensure_mask_token(backbone: Backbone) -> None:
    """Give the embeddings a mask token, of zeros as DINOv2 starts it, where they have none."""
    embeddings = backbone.embeddings
    if embeddings.mask_token is None:
        # CLS is (1, 1, D); DINOv2's mask token has no dimension for tokens
        like = embeddings.cls_token[:, 0] if "dinov2" in backbone.config.model_type else embeddings.cls_token
        embeddings.mask_token = nn.Parameter(torch.zeros_like(like))
        if hasattr(backbone.config, "use_mask_token"):
            backbone.config.use_mask_token = True


def embed_masked(backbone: Backbone, crops: Tensor, masks: Tensor) -> Tensor:
    """`backbone.embed` with the mask token in the place of masked patches, before positions are added."""
    if isinstance(backbone, SimPruneDinov2Model):
        return backbone.embed(crops, masks=masks)
    embeddings = backbone.embeddings
    same_size = tuple(crops.shape[-2:]) == tuple(embeddings.image_size)
    crops = crops.to(embeddings.patch_embeddings.projection.weight.dtype)
    return embeddings(crops, bool_masked_pos=masks, interpolate_pos_encoding=not same_size)


def _pick(tokens: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """tokens[rows, index] of (R, T, D) as (M, D), with a backward pass that copies whole rows."""
    count, length, width = tokens.shape
    return tokens.reshape(count * length, width).index_select(0, rows * length + index)
