# SPDX-License-Identifier: Apache-2.0
"""The control: as many tokens as SimPrune, chosen by chance."""

import torch
from torch import Tensor, nn

from .base import PairReducer, PairSelection, Selection, all_indices, keep_count


_STUDENT, _TEACHER, _LOCAL = range(3)
_MOST_VIEWS = 2**16
# Of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers: torch has no unsigned arithmetic.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class RandomReducer(PairReducer):
    """An independent, uniformly random subset in every row of both branches.

    It follows from the image's own number (`draws`), the view, the branch and the stage; without such numbers draws
    come from torch's default generator of the tokens' device. At keep rate 1 nothing is drawn.
    """

    name = "random"

    def pair(
        self, student: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: nn.Module | None = None
    ) -> PairSelection:
        return PairSelection(self._subset(student, stage, _STUDENT), self._subset(teacher, stage, _TEACHER))

    def local(
        self, local: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: nn.Module | None = None
    ) -> Selection:
        return Selection(self._subset(local, stage, _LOCAL))

    def _subset(self, tokens: Tensor, stage: int, branch: int) -> Tensor:
        rows, count, _ = tokens.shape
        keep = keep_count(count, self.keep_rate)
        if keep == count:
            return all_indices(tokens)
        if self.draws is None:
            numbers = torch.rand(rows, count, device=tokens.device)
        else:
            numbers = random_numbers(self.draws.to(tokens.device), rows, count, 3 * stage + branch)
        return numbers.argsort(dim=-1)[:, :keep].sort(dim=-1).values


def random_numbers(draws: Tensor, rows: int, count: int, stream: int) -> Tensor:
    """(rows, count) int64, uniform over all of int64, for the rows, view-major, of B images with numbers `draws` (B,).

    A function of the image's number, its view, `stream` and the column alone.
    """
    views = rows // len(draws)
    view = torch.arange(views, device=draws.device).unsqueeze(1)
    row = _mixed(draws + _STEP * (_MOST_VIEWS * stream + view + 1)).reshape(rows, 1)
    return _mixed(row + _STEP * torch.arange(1, count + 1, device=draws.device))


def _mixed(numbers: Tensor) -> Tensor:
    for shift, factor in _MIX:
        numbers = (numbers ^ _shifted(numbers, shift)) * factor
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """To the right, filled up with zeros."""
    return (numbers >> by) & (2 ** (64 - by) - 1)
