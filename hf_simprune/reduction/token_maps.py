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

    def sum_columns(self, columns: Tensor) -> Tensor:
        """Plain sums over what goes into every output token, (R, n, E) to (R, m, E); of maps inside attention only."""
        raise NotImplementedError(f"{type(self).__name__} is no map for tokens inside attention")

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


class Fused(TokenMap):
    """`indices` (R, K), ascending in every row, stay; the weighted sum of the others is appended as one more token.

    dropped: (R, count - K) int64, the other indices. weights: (R, count - K), not normalised (EViT). The fused token
    goes on like any other, but nothing is restored from it: the dropped tokens' group is -1.
    """

    def __init__(self, indices: Tensor, dropped: Tensor, weights: Tensor) -> None:
        self.indices = indices
        self.dropped = dropped
        self.weights = weights
        self.count = indices.shape[1] + dropped.shape[1]

    def apply(self, patches: Tensor) -> Tensor:
        dropped = to_full_precision(gather_tokens(patches, self.dropped, 0))
        with torch.autocast(patches.device.type, enabled=False):
            fused = self.weights.to(dropped.dtype).unsqueeze(1) @ dropped
        return torch.cat([gather_tokens(patches, self.indices, 0), fused.to(patches.dtype)], dim=1)

    def groups(self) -> Tensor:
        return Kept(self.indices, self.count).groups()

    def sizes(self, sizes: Tensor | None) -> Tensor | None:
        if sizes is None:
            return None
        return torch.cat([sizes.gather(1, self.indices), sizes.gather(1, self.dropped).sum(1, keepdim=True)], dim=1)


class Merged(TokenMap):
    """Every token goes into one of `kept` output tokens, each a weighted sum of its group.

    group_of: (R, n) int64, 0 to kept - 1. weights: (R, n) fp32, which sum to 1 in every group. Sums are taken in fp32.
    """

    def __init__(self, group_of: Tensor, weights: Tensor, kept: int) -> None:
        self.group_of = group_of
        self.weights = weights
        self.kept = kept
        self.count = group_of.shape[1]

    def apply(self, patches: Tensor) -> Tensor:
        weighted = to_full_precision(patches) * self.weights.unsqueeze(-1)
        return self._sum(weighted).to(patches.dtype)

    def groups(self) -> Tensor:
        return self.group_of

    def sizes(self, sizes: Tensor | None) -> Tensor:
        if sizes is None:
            sizes = torch.ones_like(self.weights)
        return sizes.new_zeros(sizes.shape[0], self.kept).scatter_add(1, self.group_of, sizes)

    def sum_columns(self, columns: Tensor) -> Tensor:
        """Plain sums over every group, (R, n, E) to (R, kept, E): the attention that a merged token gets."""
        return self._sum(to_full_precision(columns)).to(columns.dtype)

    def _sum(self, values: Tensor) -> Tensor:
        """Sums of (R, n, D) over every group, (R, kept, D)."""
        rows, count, width = values.shape
        # One flat table: index_add moves whole rows, where scatter_add would need an index for every number.
        index = self.group_of + torch.arange(rows, device=values.device).unsqueeze(1) * self.kept
        table = values.new_zeros(rows * self.kept, width)
        return table.index_add(0, index.reshape(-1), values.reshape(rows * count, width)).reshape(rows, -1, width)


class Mixed(TokenMap):
    """Every output token is a mix of all tokens, and every token can be had back as a mix of the output tokens.

    down: (R, m, n), rows that sum to 1. up: (R, n, m), rows that sum to 1. assigned: (R, n) int64, the output token
    that each token belongs to most. grid: (rows, columns) of the output tokens. Sums are taken in the weights' dtype,
    fp32 at least.
    """

    def __init__(self, down: Tensor, up: Tensor, assigned: Tensor, grid: tuple[int, int]) -> None:
        self.down = down
        self.up = up
        self.assigned = assigned
        self.count = assigned.shape[1]
        self._grid = grid

    def apply(self, patches: Tensor) -> Tensor:
        return mix_tokens(self.down, patches)

    def groups(self) -> Tensor:
        return self.assigned

    def grid(self, grid: tuple[int, int] | None) -> tuple[int, int]:
        return self._grid

    def restore(self, after: Tensor, before: Tensor) -> Tensor:
        """Mixes of the output tokens `after` (R, m, D) by the `up` weights; of `before` nothing is used."""
        return mix_tokens(self.up, after)


class Unchanged(TokenMap):
    """All of `patches` (R, n, D) stay as they are, and so do their sizes and their grid."""

    def __init__(self, patches: Tensor) -> None:
        self.rows, self.count = patches.shape[:2]
        self.device = patches.device

    def apply(self, patches: Tensor) -> Tensor:
        return patches

    def groups(self) -> Tensor:
        return torch.arange(self.count, device=self.device).repeat(self.rows, 1)

    def sizes(self, sizes: Tensor | None) -> Tensor | None:
        return sizes

    def sum_columns(self, columns: Tensor) -> Tensor:
        return columns

    def grid(self, grid: tuple[int, int] | None) -> tuple[int, int] | None:
        return grid

    def restore(self, after: Tensor, before: Tensor) -> Tensor:
        return after


def descending_order(scores: Tensor, dim: int = -1) -> Tensor:
    """The indices that sort `scores` along `dim`, the highest first; of equal scores the lower index comes first."""
    if torch.onnx.is_in_onnx_export():
        # It has no stable sort, and for the plain one it writes TopK, which puts the lower index first.
        return scores.argsort(dim=dim, descending=True)
    return scores.argsort(dim=dim, descending=True, stable=True)


def mix_tokens(weights: Tensor, tokens: Tensor) -> Tensor:
    """`weights` (R, m, n) times `tokens` (R, n, D), in the weights' dtype without autocast, then as the tokens are."""
    with torch.autocast(tokens.device.type, enabled=False):
        return (weights @ tokens.to(weights.dtype)).to(tokens.dtype)


def to_full_precision(tokens: Tensor) -> Tensor:
    """fp32, or fp64 if the tokens are."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


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
