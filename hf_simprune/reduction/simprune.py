# SPDX-License-Identifier: Apache-2.0
"""SimPrune: prune the tokens of both branches in pairs, chosen by their similarity across views.

The paper (ICLR 2025) pairs each online token with its most similar target token and prunes pairs outside a sliding
window of similarity ranks. Its pairing is many-to-one, which leaves the branches with different counts; the rule
here resolves it to exactly K tokens in every row.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .base import PairReducer, PairSelection, ReductionSetting, Selection, all_indices, keep_count
from .curriculum import window_offset


MATCHINGS = ("one_way", "symmetric")


class SimPruneReducer(PairReducer):
    """Cross-branch matching in a sliding window of similarity ranks.

    matching="one_way" (the paper): the student prunes the tokens outside its window and the teacher first prunes their
    matches. matching="symmetric": each branch is windowed on its own best similarities.
    """

    name = "simprune"
    compares = True

    def __init__(
        self, keep_rate: float, setting: ReductionSetting = ReductionSetting(), *, matching: str = "one_way"
    ) -> None:
        """Raises InputError for a keep rate outside (0, 1] or an unknown matching."""
        super().__init__(keep_rate, setting)
        validate_matching(matching)
        self.matching = matching

    @torch.no_grad()
    def pair(
        self, student: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: nn.Module | None = None
    ) -> PairSelection:
        count = student.shape[1]
        keep = keep_count(count, self.keep_rate)
        if keep == count:
            return PairSelection(all_indices(student), all_indices(teacher))
        images = teacher.shape[0] // 2
        similarity = cosine_similarity(student, teacher.roll(images, 0))
        offset = window_offset(progress, count, keep)
        select = select_one_way if self.matching == "one_way" else select_symmetric
        student_keep, teacher_keep = select(similarity, keep, offset)
        return PairSelection(student_keep, teacher_keep.roll(images, 0))

    @torch.no_grad()
    def local(
        self, local: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: nn.Module | None = None
    ) -> Selection:
        count = local.shape[1]
        keep = keep_count(count, self.keep_rate)
        if keep == count:
            return Selection(all_indices(local))
        scores = local_scores(local, teacher)
        return Selection(select_window(scores, keep, window_offset(progress, count, keep)))


def validate_matching(matching: str) -> None:
    """Raise InputError unless `matching` is one of MATCHINGS."""
    if matching not in MATCHINGS:
        raise InputError(f"matching {matching!r} is unknown: choose one of {', '.join(MATCHINGS)}.")


def cosine_similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines of all token pairs: (P, M, D) and (P, N, D) -> (P, M, N) in fp32, or fp64 if the tokens are.

    Autocast is switched off: bf16 products would tie thousands of ranks. A zero vector has cosine 0 with everything.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(queries.to(dtype), dim=-1)
        keys = F.normalize(keys.to(dtype), dim=-1)
        return queries @ keys.transpose(-2, -1)


def local_scores(local: Tensor, teacher: Tensor) -> Tensor:
    """Best cosine of each local token in a teacher view, averaged over both views.

    (L*B, n, D) and (2B, N, D) -> (L*B, n).
    """
    rows, count, width = local.shape
    images, patches = teacher.shape[0] // 2, teacher.shape[1]
    # One product an image: all its local tokens against both of its views.
    by_image = local.reshape(-1, images, count, width).transpose(0, 1).reshape(images, -1, width)
    views = teacher.reshape(2, images, patches, width).transpose(0, 1).reshape(images, 2 * patches, width)
    similarity = cosine_similarity(by_image, views)
    scores = similarity.unflatten(-1, (2, patches)).amax(-1).mean(-1)
    return scores.reshape(images, -1, count).transpose(0, 1).reshape(rows, count)


def select_window(scores: Tensor, keep: int, offset: Tensor) -> Tensor:
    """Indices (P, keep), ascending, of the scores (P, N) whose descending ranks are offset .. offset + keep - 1.

    Equal scores rank by index, the lower first.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    window = torch.arange(keep, device=scores.device) + offset
    return order.index_select(1, window).sort(dim=-1).values


def select_symmetric(similarity: Tensor, keep: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher indices (P, keep) from cosines (P, N, N), each branch windowed on its own maxima."""
    student = select_window(similarity.amax(2), keep, offset)
    return student, select_window(similarity.amax(1), keep, offset)


def select_one_way(similarity: Tensor, keep: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher indices (P, keep) from cosines (P, N student, N teacher).

    The student keeps a window of the ranks of its best similarities. The teacher prunes as many tokens, in this order:
    matches of pruned student tokens; tokens whose own best student token is pruned; tokens whose rank is furthest
    outside the window, or nearest to its edges; the lower index. There are never more matches than places, so every
    pruned student token's match is pruned.
    """
    count = similarity.shape[-1]
    student_best, match = similarity.max(2)
    order = student_best.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(count, device=similarity.device) + offset
    student_keep = order.index_select(1, ranks[:keep]).sort(dim=-1).values
    student_drop = order.index_select(1, ranks[keep:] % count)
    return student_keep, follow_student(similarity, match, student_drop, offset)


def follow_student(similarity: Tensor, match: Tensor, student_drop: Tensor, offset: Tensor) -> Tensor:
    """Teacher indices (P, K), ascending, when the student prunes the N - K tokens `student_drop`, (P, N - K).

    similarity: cosines (P, N student, N teacher); match: (P, N), each student token's best teacher token.
    """
    count = similarity.shape[-1]
    keep = count - student_drop.shape[1]
    teacher_best, back_match = similarity.max(1)
    dropped = torch.zeros_like(match, dtype=torch.bool).scatter(1, student_drop, True)
    voted = torch.zeros_like(dropped).scatter(1, match.gather(1, student_drop), True)

    rank = descending_ranks(teacher_best)
    edge = torch.maximum(offset - rank, rank - (offset + keep - 1))
    # Integers: 4 * vote + 2 * dropped match + edge / (N + 1), free of rounding.
    key = (4 * voted.long() + 2 * dropped.gather(1, back_match).long()) * (count + 1) + edge
    teacher_order = key.argsort(dim=-1, descending=True, stable=True)
    return teacher_order[:, count - keep :].sort(dim=-1).values


def descending_ranks(scores: Tensor) -> Tensor:
    """Rank of each score in its row, 0 for the largest; equal scores rank by index, the lower first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)
