# SPDX-License-Identifier: Apache-2.0
"""What a token reducer needs and what it returns.

Shapes: B images; two global views stacked view-major, (2B, N, D); L local crops stacked crop-major, (L*B, n, D); R is
any number of rows. N, n count patch tokens only: prefix tokens ([CLS], distillation) are never matched, merged or
dropped.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from .token_maps import TokenMap


@dataclass(frozen=True)
class ReductionSetting:
    """The network and the crops that a reducer is built for.

    layers: 0-based blocks at which tokens leave, ascending; a method with a schedule of its own may use others.
    grids: patches (rows, columns) of every crop size that will come, the global one first; empty where unknown.
    """

    layers: tuple[int, ...] = ()
    depth: int = 12
    hidden_size: int = 384
    num_heads: int = 6
    num_prefix: int = 1
    grids: tuple[tuple[int, int], ...] = ()


class TokenReducer(ABC):
    """Makes patch tokens fewer, always to the same number in every row.

    Its options are the keyword-only arguments of `__init__`, of type bool, int, float or str.

    merges: tokens go on that stand for several patches and have no position, so that no loss on single patches works.
    counts_epochs: it does something every few epochs, and so needs data of known length.
    draws: (B,) int64, a random number of each image of the pass under way, for what is drawn by chance: so it depends
    on no batch and no process. None where images have none; torch's default generator serves then.
    """

    name: ClassVar[str]
    merges: ClassVar[bool] = False
    counts_epochs: ClassVar[bool] = False
    draws: Tensor | None = None

    def __init__(self, keep_rate: float, setting: ReductionSetting = ReductionSetting()) -> None:
        """Raises InputError when `keep_rate` is not in (0, 1]."""
        validate_keep_rate(keep_rate)
        self.keep_rate = float(keep_rate)
        self.setting = setting

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based blocks at which tokens leave, ascending; `stage` counts them from 0."""
        return self.setting.layers

    def counts(self, grid: tuple[int, int]) -> list[int]:
        """Patch tokens of a crop of `grid` patches before the first stage and after every stage."""
        return token_counts(grid[0] * grid[1], self.keep_rate, len(self.layers))

    def overhead_macs(self, stage: int, num_patches: int) -> int:
        """MACs that the method itself adds in one row at a stage which `num_patches` patch tokens enter."""
        return 0

    def build_learned(self) -> nn.Module | None:
        """The method's own parameters and buffers for one branch, None where nothing is learned or remembered."""
        return None

    def before_step(self, step: int, steps_per_epoch: int | None, views: Sequence[Any], dual: Any) -> None:
        """Called in every process before the 0-based optimiser step `step`, for what is measured now and then.

        views: the step's micro-batches, with `global_crops` (2B, C, H, W) and `local_crops` (L*B, C, h, w) or None.
        dual: has `student` and `teacher`, each with a `backbone` and `reduction`, the module of `build_learned`.
        steps_per_epoch: None where the number of images is unknown.
        """

    def before_pass(self, global_crops: Tensor, dual: Any) -> None:
        """Called at the start of every training pass over both branches, inside of it; arguments as `before_step`."""

    def take_auxiliary_loss(self) -> Tensor | None:
        """The method's own loss of the pass that just ended, 0-dim and already weighted, to be added to the training
        loss; None where there is none. Asking again gives None."""
        return None


class BranchReducer(TokenReducer):
    """Reduces every branch by itself, from what that branch alone shows. Also works at inference.

    needs: what `decide` is told of the attention of the block: "nothing"; "cls_attention", the attention of CLS to
    every patch token, averaged over heads, (R, n) fp32; or "keys", the keys averaged over heads, (R, n, head width)
    fp32. At the site "attention" it is always the whole map, (R, prefix + n, prefix + n) fp32, averaged over heads.
    site: where in the block tokens change: "attention" (inside it, between the attention map and the values; residual
    and values are pooled), "middle" (between attention and MLP) or "after" (behind the block).
    weighs_sizes: attention of all later blocks counts a merged token as often as it has patches (proportional
    attention of ToMe).
    restore_after: block behind which all patch tokens are there again, None for never.
    learns: `decide` has gradients, and is computed again where activations are.
    """

    needs: ClassVar[str] = "nothing"
    site: ClassVar[str] = "middle"
    learns: ClassVar[bool] = False
    weighs_sizes: bool = False
    restore_after: int | None = None

    @abstractmethod
    def decide(self, seen: "Seen") -> TokenMap:
        """What becomes of the patch tokens. Called without gradients, unless the method learns."""


class Seen(NamedTuple):
    """What a single-branch reducer decides from.

    patches: (R, n, D) patch tokens at the site. attention: as `needs` says. sizes: (R, n) patches that each token
    stands for, None for one each. grid: (rows, columns) of `patches`, None where they form none.
    stage: which of the reducer's stages this is. prefix: number of prefix tokens.
    learned: the branch's own module from `build_learned`, None without. full_grid: that of all patches, if any.
    """

    patches: Tensor
    attention: Tensor | None
    sizes: Tensor | None
    grid: tuple[int, int] | None
    stage: int
    prefix: int
    learned: Any
    full_grid: tuple[int, int] | None = None


class Selection(NamedTuple):
    """Kept patch indices, int64 (R, K), ascending in every row; factors (R, K) on the kept tokens, None for 1."""

    indices: Tensor
    factors: Tensor | None = None


class PairSelection(NamedTuple):
    """Kept patch indices of both branches, int64 of shape (2B, K), ascending in every row.

    factors: (2B, K), what the student's kept tokens are multiplied by, None for 1.
    """

    student: Tensor
    teacher: Tensor
    factors: Tensor | None = None


class PairReducer(TokenReducer):
    """Chooses which patch tokens stay from the tokens of both branches, between attention and MLP.

    compares: the student's tokens are compared with all of the teacher's, which the FLOP counter adds.
    """

    compares: ClassVar[bool] = False

    @abstractmethod
    def pair(
        self, student: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: nn.Module | None = None
    ) -> PairSelection:
        """Select the global views' tokens in both branches.

        `student`, `teacher`: patch tokens (2B, N, D) at the same depth, in the same row order. Student view a is
        paired with teacher view b of the same image; the returned teacher indices refer to the teacher's own rows.
        `progress`: 0-dim tensor in [0, 1], see `curriculum.window_progress`. `learned`: the student's module.
        """

    @abstractmethod
    def local(
        self, local: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: nn.Module | None = None
    ) -> Selection:
        """Select the local crops' tokens.

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


def all_indices(tokens: Tensor) -> Tensor:
    """The selection that keeps everything: 0..N-1 for each row of tokens (P, N, D)."""
    rows, count, _ = tokens.shape
    return torch.arange(count, device=tokens.device).repeat(rows, 1)
