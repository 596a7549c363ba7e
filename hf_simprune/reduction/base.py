# SPDX-License-Identifier: Apache-2.0
"""What a token reducer needs and what it returns: patch tokens in, indices of the kept ones out.

Shapes: B images; two global views stacked view-major, (2B, N, D); L local crops stacked crop-major, (L*B, n, D).
N, n count patch tokens only: prefix tokens ([CLS], distillation) are never matched and never dropped.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


class PairSelection(NamedTuple):
    """Kept patch indices of both branches, int64 of shape (2B, K), ascending in every row."""

    student: Tensor
    teacher: Tensor


class TokenReducer(ABC):
    """Chooses which patch tokens stay. Subclasses return indices, always the same number in every row."""

    name: str

    def __init__(self, keep_rate: float) -> None:
        """Raises InputError when `keep_rate` is not in (0, 1]."""
        validate_keep_rate(keep_rate)
        self.keep_rate = float(keep_rate)

    @abstractmethod
    def pair(self, student: Tensor, teacher: Tensor, progress: Tensor) -> PairSelection:
        """Select the global views' tokens in both branches.

        `student`, `teacher`: patch tokens (2B, N, D) at the same depth, in the same row order. Student view a is
        paired with teacher view b of the same image; the returned teacher indices refer to the teacher's own rows.
        `progress`: 0-dim tensor in [0, 1], see `curriculum.window_progress`.
        """

    @abstractmethod
    def local(self, local: Tensor, teacher: Tensor, progress: Tensor) -> Tensor:
        """Select the local crops' tokens: int64 (L*B, k), ascending in every row.

        `local`: student patch tokens (L*B, n, D). `teacher`: the global views' patch tokens (2B, N, D) at the same
        depth, before their own reduction there.
        """


def validate_keep_rate(keep_rate: float) -> None:
    """Raise InputError unless 0 < keep_rate <= 1."""
    if not 0 < keep_rate <= 1:
        raise InputError(f"keep_rate {keep_rate} is out of range: give a number above 0 and at most 1.")


def validate_reduction_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """The 0-based blocks at which tokens leave, ascending. Raises InputError when one is out of range or repeated."""
    for layer in layers:
        if not 0 <= layer < depth:
            raise InputError(f"reduction_layers contains {layer}: a model of {depth} blocks has 0 to {depth - 1}.")
    if len(set(layers)) != len(layers):
        repeated = sorted({layer for layer in layers if list(layers).count(layer) > 1})
        raise InputError(f"reduction_layers repeats {repeated} in {list(layers)}: name each block once.")
    return tuple(sorted(layers))


def default_reduction_layers(depth: int) -> tuple[int, ...]:
    """Blocks depth*k//4 for k = 1, 2, 3: (3, 6, 9) of 12, as EViT and SimPrune have it. Fewer where depth < 4."""
    return tuple(sorted({depth * k // 4 for k in (1, 2, 3)}))


def keep_count(num_patches: int, keep_rate: float) -> int:
    """K = ceil(keep_rate * num_patches), at least 1. Raises InputError when `keep_rate` is not in (0, 1]."""
    validate_keep_rate(keep_rate)
    # Without the slack 0.55 * 100 = 55.00000000000001 would keep 56.
    return max(1, math.ceil(keep_rate * num_patches - 1e-9))


def token_counts(num_patches: int, keep_rate: float, num_stages: int) -> list[int]:
    """Patch tokens before each of `num_stages` reductions and after the last: num_stages + 1 numbers."""
    counts = [num_patches]
    for _ in range(num_stages):
        counts.append(keep_count(counts[-1], keep_rate))
    return counts


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


def all_indices(tokens: Tensor) -> Tensor:
    """The selection that keeps everything: 0..N-1 for each row of tokens (P, N, D)."""
    rows, count, _ = tokens.shape
    return torch.arange(count, device=tokens.device).repeat(rows, 1)
