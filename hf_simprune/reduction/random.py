# SPDX-License-Identifier: Apache-2.0
"""The control: as many tokens as SimPrune, chosen by chance."""

import torch
from torch import Tensor, nn

from .base import PairReducer, PairSelection, Selection, all_indices, keep_count


class RandomReducer(PairReducer):
    """An independent, uniformly random subset in every row of both branches.

    Draws come from torch's default generator of the tokens' device. At keep rate 1 nothing is drawn.
    """

    name = "random"

    def pair(
        self, student: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: nn.Module | None = None
    ) -> PairSelection:
        return PairSelection(self._subset(student), self._subset(teacher))

    def local(
        self, local: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: nn.Module | None = None
    ) -> Selection:
        return Selection(self._subset(local))

    def _subset(self, tokens: Tensor) -> Tensor:
        rows, count, _ = tokens.shape
        keep = keep_count(count, self.keep_rate)
        if keep == count:
            return all_indices(tokens)
        shuffled = torch.rand(rows, count, device=tokens.device).argsort(dim=-1)
        return shuffled[:, :keep].sort(dim=-1).values
