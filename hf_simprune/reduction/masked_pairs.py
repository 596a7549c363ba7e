# SPDX-License-Identifier: Apache-2.0
"""SimPrune's selection where the student's global views are masked, as DINOv2 trains.

The patch loss compares a masked student token with the teacher's token at the same position of the same view. Such
pairs are formed first and stay or leave together; all other student tokens are compared across views, as ever.

Rows are views, R = 2B of them; the student's row r and the teacher's row r are the same view, and `other` teacher rows
are those of the other view of the same image. N patch tokens are left in every row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .base import PairSelection, all_indices, keep_count
from .curriculum import window_offset
from .simprune import SimPruneReducer, cosine_similarity, descending_ranks, select_window


MASKED_POLICIES = ("pair", "keep")


def validate_masked_policy(policy: str) -> None:
    """Raise InputError unless `policy` is one of MASKED_POLICIES."""
    if policy not in MASKED_POLICIES:
        raise InputError(f"--masked_policy {policy} is unknown: choose one of {', '.join(MASKED_POLICIES)}")


@torch.no_grad()
def pair_masked(
    reducer: SimPruneReducer, student: Tensor, teacher: Tensor, partner: Tensor, progress: Tensor, policy: str
) -> PairSelection:
    """As `reducer.pair`, with `partner` (2B, N) int64: for a masked student token the index of the teacher's token at
    the same position of the same view, -1 for the others.

    Without masked tokens the result is that of `reducer.pair`.
    """
    count = student.shape[1]
    keep = keep_count(count, reducer.keep_rate)
    if keep == count:
        return PairSelection(all_indices(student), all_indices(teacher))
    images = teacher.shape[0] // 2
    cross = cosine_similarity(student, teacher.roll(images, 0))
    same = paired_cosines(student, teacher, partner)
    offset = window_offset(progress, count, keep)
    return select_masked_pairs(cross, same, partner, keep, offset, policy, reducer.matching == "one_way")


def select_masked_pairs(
    cross: Tensor, same: Tensor, partner: Tensor, keep: int, offset: Tensor, policy: str, one_way: bool = True
) -> PairSelection:
    """Kept indices (R, keep) of both branches, every row of the teacher in its own numbers.

    The student keeps the window of ranks from `offset` on, where masked tokens rank by the cosine with their partners
    and the others by their best cosine in the other view. With policy "keep" only tokens that are not masked are
    ranked, and the masked ones stay as far as there are `keep` places.

    In the teacher's row, partners follow their masked tokens. Of the other tokens as many leave as are still to leave,
    by the rule of SimPrune (`select_one_way`, or each by its own rank where `one_way` is false) with the tokens of the
    other view's student that are not masked. Masked tokens neither vote nor are voted for.

    Args:
        cross: cosines (R, N student, N teacher of the other view).
        same: (R, N) cosine of each masked student token with its partner; not read elsewhere.
        partner: (R, N) int64 as in `pair_masked`; no two tokens of a row share one.
    """
    rows, count = partner.shape
    images = rows // 2
    masked = partner >= 0
    best_other, match = cross.max(2)
    scores = torch.where(masked, same.to(cross.dtype), best_other)
    student = _student_window(scores, masked, keep, offset, policy)
    stays = torch.zeros_like(masked).scatter(1, student, True)

    # From here on a row is a teacher's view; `cross` and the flags of the student are those of the other view.
    coupled = _any_at(partner.clamp_min(0), masked)
    coupled_stays = _any_at(partner.clamp_min(0), masked & stays)
    cross, match, masked, stays = (part.roll(images, 0) for part in (cross, match, masked, stays))
    # not -inf: a view whose other student is masked all over still ranks its free tokens before the coupled ones
    best, back_match = cross.masked_fill(masked.unsqueeze(2), torch.finfo(cross.dtype).min).max(1)
    places = keep - coupled_stays.sum(1, keepdim=True)
    free = (~coupled).sum(1, keepdim=True)
    start = _scaled_offset(offset, count - keep, free - places)
    rank = descending_ranks(best.masked_fill(coupled, -torch.inf))
    key = torch.maximum(start - rank, rank - (start + places - 1))
    if one_way:
        leaves = ~stays & ~masked
        voted = _any_at(match, leaves)
        key = key + (4 * voted.long() + 2 * leaves.gather(1, back_match).long()) * (count + 1)
    forced = torch.where(coupled_stays, -16 * (count + 1), 16 * (count + 1))
    order = torch.where(coupled, forced, key).argsort(dim=-1, descending=True, stable=True)
    return PairSelection(student, order[:, count - keep :].sort(dim=-1).values)


def paired_cosines(student: Tensor, teacher: Tensor, partner: Tensor) -> Tensor:
    """Cosine of every student token with its partner, (R, N) in at least fp32; of the others with token 0."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        index = partner.clamp_min(0).unsqueeze(-1).expand_as(student)
        found = F.normalize(teacher.to(dtype), dim=-1).gather(1, index)
        return (F.normalize(student.to(dtype), dim=-1) * found).sum(-1)


def _student_window(scores: Tensor, masked: Tensor, keep: int, offset: Tensor, policy: str) -> Tensor:
    """The student's kept indices (R, keep), ascending."""
    if policy == "pair":
        return select_window(scores, keep, offset)
    # The masked tokens take the places in the window's middle, which are kept: behind the `offset` best of the others.
    rank = descending_ranks(scores.masked_fill(masked, -torch.inf))
    part = torch.where(masked, 1, torch.where(rank < offset, 0, 2))
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    order = by_score.gather(1, part.gather(1, by_score).argsort(dim=-1, stable=True))
    window = torch.arange(keep, device=scores.device) + offset
    return order.index_select(1, window).sort(dim=-1).values


def _any_at(index: Tensor, flags: Tensor) -> Tensor:
    """(R, N) bool: whether any raised flag (R, N) points here; `index` (R, N) says where each points."""
    return torch.zeros_like(index).scatter_add(1, index, flags.long()) > 0


def _scaled_offset(offset: Tensor, most: int, leaving: Tensor) -> Tensor:
    """Where the window starts in rows of which `leaving` (R, 1) tokens leave, in proportion to `offset` of `most`."""
    return (2 * offset * leaving + most) // (2 * most)
