# SPDX-License-Identifier: Apache-2.0
"""Ways to pair the tokens of two views and to keep the same number in both, from cosines (P, N student, N teacher).

One-way and symmetric are the package's own. Greedy and Hungarian pair every token with one other, so that whole pairs
are kept; they are here to show what that costs.
"""

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_simprune.reduction.simprune import descending_ranks, select_one_way, select_symmetric, select_window


Select = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]


def match_greedy(similarity: Tensor) -> Tensor:
    """(P, N): the teacher token of every student token when the most similar pair that is left is taken again and
    again. Equal cosines go by the lower student index, then the lower teacher index."""
    pairs, count, _ = similarity.shape
    left = similarity.clone()
    rows = torch.arange(pairs, device=similarity.device)
    match = torch.empty(pairs, count, dtype=torch.int64, device=similarity.device)
    for _ in range(count):
        best = left.flatten(1).argmax(1)
        student, teacher = best // count, best % count
        match[rows, student] = teacher
        left[rows, student] = -torch.inf
        left[rows, :, teacher] = -torch.inf
    return match


def match_hungarian(similarity: Tensor) -> Tensor:
    """(P, N): the one-to-one pairing with the largest sum of cosines, found on the CPU."""
    found = [linear_sum_assignment(row, maximize=True)[1] for row in similarity.cpu().numpy()]
    return torch.stack([torch.from_numpy(columns) for columns in found]).to(similarity.device)


def select_pairs(match: Callable[[Tensor], Tensor]) -> Select:
    """A selection that keeps those whole pairs of a one-to-one `match` whose cosines lie in the window."""

    def select(similarity: Tensor, keep: int, offset: Tensor) -> tuple[Tensor, Tensor]:
        partner = match(similarity)
        cosine = similarity.gather(2, partner.unsqueeze(2)).squeeze(2)
        student = select_window(cosine, keep, offset)
        return student, partner.gather(1, student).sort(dim=-1).values

    return select


SELECTIONS: dict[str, Select] = {
    "one_way": select_one_way,
    "symmetric": select_symmetric,
    "greedy": select_pairs(match_greedy),
    "hungarian": select_pairs(match_hungarian),
}


def matches(name: str, similarity: Tensor) -> Tensor:
    """(P, N): each student token's partner. Symmetric has the same as one-way; it differs in what is kept."""
    if name in ("one_way", "symmetric"):
        return similarity.argmax(2)
    return {"greedy": match_greedy, "hungarian": match_hungarian}[name](similarity)


def teacher_left(similarity: Tensor, keep: int, offset: Tensor) -> Tensor:
    """(P,) teacher tokens that stay when the partners of the pruned student tokens leave and nothing is topped up.

    One-way: several student tokens may have the same partner, so more than `keep` stay.
    """
    best, match = similarity.max(2)
    ranks = descending_ranks(best)
    pruned = (ranks < offset) | (ranks >= offset + keep)
    targets = torch.zeros_like(pruned).scatter_reduce(1, match, pruned, "amax")
    return (~targets).sum(1)
