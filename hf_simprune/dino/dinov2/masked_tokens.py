# SPDX-License-Identifier: Apache-2.0
"""Where the masked patches are, while tokens leave both branches."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...reduction.token_maps import TokenMap


class MaskedPairs(NamedTuple):
    """The masked student tokens that are left and whose teacher tokens are left; M of them, row by row.

    rows: (M,) int64, the view. student, teacher: (M,) int64, the index among that view's patch tokens in each branch.
    per_view: (M,) int64, how many such pairs the view of each has.
    """

    rows: Tensor
    student: Tensor
    teacher: Tensor
    per_view: Tensor


class MaskedTokens:
    """Follows tokens through the stages by their positions in the grid.

    Args:
        masks: bool (R, N), True where the student's patch is masked.
    """

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks
        rows, count = masks.shape
        # (R, n): the position of every token that is left, -1 for a token that stands for no single position
        self.student = torch.arange(count, device=masks.device).repeat(rows, 1)
        self.teacher = self.student

    def reduce(self, student: TokenMap, teacher: TokenMap) -> None:
        """Take over what a stage did. The maps may drop tokens and append new ones, but merge none."""
        self.student = moved_positions(self.student, student)
        self.teacher = moved_positions(self.teacher, teacher)

    def partner(self) -> Tensor:
        """(R, n) int64: for each masked student token the index of the teacher's token at its position; -1 where the
        token is not masked or the teacher's is gone."""
        rows, count = self.teacher.shape
        # one more column, which takes tokens without a position
        masked = torch.cat([self.masks, self.masks.new_zeros(rows, 1)], dim=1)
        places = torch.full_like(masked, -1, dtype=torch.int64)
        indices = torch.arange(count, device=places.device).expand(rows, count)
        places.scatter_(1, _or_last(self.teacher, masked), indices)
        places[:, -1] = -1
        here = _or_last(self.student, masked)
        return torch.where(masked.gather(1, here), places.gather(1, here), -1)

    def pairs(self) -> MaskedPairs:
        """What the patch loss compares after the last block. Waits for the device, as their number varies."""
        partner = self.partner()
        alive = partner >= 0
        rows, student = alive.nonzero(as_tuple=True)
        return MaskedPairs(rows, student, partner[rows, student], alive.sum(1)[rows])


def moved_positions(positions: Tensor, found: TokenMap) -> Tensor:
    """Positions (R, m) of the tokens after a stage from those before it, (R, n); -1 for a token that came new."""
    groups = found.groups()
    rows = groups.shape[0]
    size = found.apply(positions.new_zeros(*positions.shape, 1, dtype=torch.float32)).shape[1]
    # one more column, which takes the dropped tokens
    moved = positions.new_full((rows, size + 1), -1)
    moved.scatter_(1, torch.where(groups < 0, size, groups), positions)
    return moved[:, :size]


def _or_last(positions: Tensor, table: Tensor) -> Tensor:
    """Positions as an index into the columns of `table`, the last one for those that are -1."""
    return torch.where(positions < 0, table.shape[1] - 1, positions)
