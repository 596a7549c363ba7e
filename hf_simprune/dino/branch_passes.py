# SPDX-License-Identifier: Apache-2.0
"""How tokens pass through the blocks: one branch by itself, two branches in lockstep, local crops behind them.

All functions take embedded tokens (R, prefix + N, D) and give those after the last block, before the final norm: of
CLS alone, (R, 1, D), or of all tokens left where `whole` asks for them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.deit import SimPruneDeiTModel
from ..models.dinov2 import SimPruneDinov2Model
from ..models.vit import SimPruneViTModel
from ..reduction.base import BranchReducer, PairSelection, Selection
from ..reduction.token_maps import Kept, TokenMap, gather_tokens
from ..reduction.walk import BranchWalk, ReductionStep


Backbone = SimPruneViTModel | SimPruneDeiTModel | SimPruneDinov2Model
# (student patches (R, n, D), detached; teacher patches (R, n, D); stage) -> what both keep
SelectPair = Callable[[Tensor, Tensor, int], PairSelection]
# (patches (R, n, D), detached; stage) -> what stays
SelectLocal = Callable[[Tensor, int], Selection]


class PairStage(NamedTuple):
    """One stage of a pass in lockstep. seen: the teacher's patch tokens (R, n, D) that were compared."""

    student: Kept
    teacher: Kept
    seen: Tensor


def grid_of(net: Backbone, crops: Tensor) -> tuple[int, int]:
    """(rows, columns) of the patches of crops (R, C, H, W)."""
    side: Any = net.config.patch_size  # declared as a number or two, and in these families a number
    return crops.shape[-2] // side, crops.shape[-1] // side


def walk_alone(
    net: Backbone,
    tokens: Tensor,
    grid: tuple[int, int],
    reducer: BranchReducer,
    learned: nn.Module | None = None,
    whole: bool = False,
) -> tuple[Tensor, list[TokenMap]]:
    """One branch while a single-branch reducer makes its tokens fewer: the tokens, and what every stage did.

    For CLS alone, a stage in the last block runs only where it changes CLS, inside the attention.
    """
    walk = BranchWalk(reducer, net.num_prefix_tokens, grid, learned)
    *layers, last_layer = net.layers
    for index, layer in enumerate(layers):
        tokens = walk.block(index, layer, tokens)
    last = len(layers)
    if whole:
        return walk.block(last, last_layer, tokens), walk.maps
    bias = walk.key_bias(tokens)
    if last in reducer.layers and reducer.site == "attention":
        step = ReductionStep(walk, reducer.layers.index(last))
        return last_layer(tokens, bias, reduction=step)[:, :1], [*walk.maps, step.found]
    return last_layer(last_layer(tokens, bias, half="attention", num_queries=1), half="mlp"), walk.maps


def walk_in_lockstep(
    student_net: Backbone,
    teacher_net: Backbone,
    student: Tensor,
    teacher: Tensor,
    layers: Sequence[int],
    select: SelectPair | None,
    whole: bool = False,
) -> tuple[Tensor, Tensor, list[PairStage]]:
    """Both branches side by side, the teacher without gradients; in `layers`, `select` says what stays."""
    prefix = student_net.num_prefix_tokens
    stages: list[PairStage] = []
    last = None if whole else len(student_net.layers) - 1
    for index, (student_layer, teacher_layer) in enumerate(zip(student_net.layers, teacher_net.layers, strict=True)):
        if index in layers:
            with torch.no_grad():
                attended_teacher = after_attention(teacher_layer, teacher, index == last)
            attended_student = after_attention(student_layer, student, index == last)
            seen = attended_teacher[:, prefix:]
            assert select is not None  # as wherever there are stages
            keep = select(attended_student[:, prefix:].detach(), seen, len(stages))
            stages.append(PairStage(Kept(keep.student, seen.shape[1]), Kept(keep.teacher, seen.shape[1]), seen))
            if index != last:
                with torch.no_grad():
                    teacher = teacher_layer(gather_tokens(attended_teacher, keep.teacher, prefix), half="mlp")
                student = student_layer(
                    keep_tokens(attended_student, Selection(keep.student, keep.factors), prefix), half="mlp"
                )
                continue
        with torch.no_grad():
            teacher = whole_block(teacher_layer, teacher, index == last)
        student = whole_block(student_layer, student, index == last)
    return student, teacher, stages


def walk_local(
    net: Backbone, tokens: Tensor, layers: Sequence[int], select: SelectLocal | None, whole: bool = False
) -> tuple[Tensor, list[Kept]]:
    """The student's local crops behind a pass in lockstep; in `layers`, `select` says what stays."""
    prefix = net.num_prefix_tokens
    kept: list[Kept] = []
    last = None if whole else len(net.layers) - 1
    for index, layer in enumerate(net.layers):
        if index in layers:
            attended = after_attention(layer, tokens, index == last)
            assert select is not None
            keep = select(attended[:, prefix:].detach(), len(kept))
            kept.append(Kept(keep.indices, attended.shape[1] - prefix))
            if index != last:
                tokens = layer(keep_tokens(attended, keep, prefix), half="mlp")
                continue
        tokens = whole_block(layer, tokens, index == last)
    return tokens, kept


def keep_tokens(tokens: Tensor, keep: Selection, num_prefix: int) -> Tensor:
    """The prefix and the kept patch tokens, these times their factors: (R, prefix + n, D) -> (R, prefix + K, D)."""
    kept = gather_tokens(tokens, keep.indices, num_prefix)
    if keep.factors is None:
        return kept
    patches = kept[:, num_prefix:] * keep.factors.to(kept.dtype).unsqueeze(-1)
    return torch.cat([kept[:, :num_prefix], patches], dim=1)


def whole_block(layer: nn.Module, tokens: Tensor, last: bool) -> Tensor:
    """Tokens after `layer`; of the last block only CLS, (R, 1, D), since nothing else of it is read."""
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
