# SPDX-License-Identifier: Apache-2.0
"""What one reduction does to the patch tokens of a batch: (R, n, D) becomes (R, m, D), and how to go back.

Applying a map is differentiable in the tokens; what was decided, indices and weights, is not.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class TokenMap(ABC):
    """A decided reduction from `count` patch tokens to fewer."""

    count: int

    @abstractmethod
    def apply(self, patches: Tensor) -> Tensor:
        """(R, n, D) to (R, m, D), for any D."""

    @abstractmethod
    def groups(self) -> Tensor:
        """(R, n) int64: the output token that each input token went into, -1 where it was dropped."""

    def sizes(self, sizes: Tensor | None) -> Tensor | None:
        """Patches that each output token stands for, (R, m), from those of the input (R, n); None for one each."""
        return None

    def grid(self, grid: tuple[int, int] | None) -> tuple[int, int] | None:
        """(rows, columns) of the output tokens, None where they form no grid."""
        return None

    def restore(self, after: Tensor, before: Tensor) -> Tensor:
        """Back to all tokens, (R, n, D): the output tokens `after` (R, m, D) copied to every token that went into
        them; a dropped token has what it had in `before` (R, n, D), when it left."""
        groups = self.groups().unsqueeze(-1)
        return torch.where(groups < 0, before, after.gather(1, groups.clamp_min(0).expand_as(before)))


class Kept(TokenMap):
    """`indices` (R, K), ascending in every row, of `count` tokens stay; the others are dropped."""

    def __init__(self, indices: Tensor, count: int) -> None:
        self.indices = indices
        self.count = count

    def apply(self, patches: Tensor) -> Tensor:
        return gather_tokens(patches, self.indices, 0)

    def groups(self) -> Tensor:
        rows, keep = self.indices.shape
        places = torch.arange(keep, device=self.indices.device).expand(rows, keep)
        return self.indices.new_full((rows, self.count), -1).scatter(1, self.indices, places)

    def sizes(self, sizes: Tensor | None) -> Tensor | None:
        return None if sizes is None else sizes.gather(1, self.indices)


def gather_tokens(tokens: Tensor, keep: Tensor, num_prefix: int) -> Tensor:
    """Keep the prefix and the chosen patch tokens: (P, prefix + N, D) and indices (P, K) -> (P, prefix + K, D).

    `keep` counts patches from 0, without the prefix. Gradients flow to the kept tokens only.
    """
    rows, length, width = tokens.shape
    prefix = torch.arange(num_prefix, device=keep.device).expand(rows, num_prefix)
    index = torch.cat([prefix, keep + num_prefix], dim=1)
    # Whole rows of a flat table: both directions copy contiguous memory, several times faster than torch.gather.
    index = index + torch.arange(rows, device=keep.device).unsqueeze(1) * length
    return tokens.reshape(rows * length, width).index_select(0, index.reshape(-1)).reshape(rows, -1, width)
