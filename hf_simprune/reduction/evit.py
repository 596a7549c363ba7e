# SPDX-License-Identifier: Apache-2.0
"""EViT (Liang et al., 2022, arXiv 2202.07800): the tokens that [CLS] attends to most stay, the others fuse into one.

At constant keep rate; the paper trains at keep rate 1 first and lowers it later.
"""

from torch import Tensor

from ..errors import InputError
from .base import BranchReducer, ReductionSetting, Seen, keep_count
from .token_maps import Fused, Kept, TokenMap, Unchanged, descending_order


class EViTReducer(BranchReducer):
    """Of the n patch tokens that enter a stage, K = ceil(keep_rate * n) stay, between attention and MLP.

    fuse: append the sum of the dropped tokens, each times its attention, not normalised: K + 1 tokens go on. A fused
    token is ordinary afterwards and counts at the next stage. Where K = n nothing is dropped and none is appended.
    """

    name = "evit"
    needs = "cls_attention"

    def __init__(self, keep_rate: float, setting: ReductionSetting = ReductionSetting(), *, fuse: bool = True) -> None:
        """Raises InputError for a keep rate outside (0, 1] or a network without a [CLS] token."""
        super().__init__(keep_rate, setting)
        if setting.num_prefix < 1:
            raise InputError(
                "token_reduction evit reads the attention of the [CLS] token and this model has none: use a model with"
                " a [CLS] token, or a method that needs none, such as tome."
            )
        self.fuse = fuse

    def counts(self, grid: tuple[int, int]) -> list[int]:
        counts = [grid[0] * grid[1]]
        for _ in self.layers:
            keep = keep_count(counts[-1], self.keep_rate)
            counts.append(keep + int(self.fuse and keep < counts[-1]))
        return counts

    def overhead_macs(self, stage: int, num_patches: int) -> int:
        """The row of [CLS] in the attention map, and the fused sum."""
        row = num_patches + self.setting.num_prefix
        fused = num_patches - keep_count(num_patches, self.keep_rate) if self.fuse else 0
        return (row + fused) * self.setting.hidden_size

    def decide(self, seen: Seen) -> TokenMap:
        keep = keep_count(seen.patches.shape[1], self.keep_rate)
        if keep == seen.patches.shape[1]:
            return Unchanged(seen.patches)
        assert seen.attention is not None  # as `needs` says
        return keep_attended(seen.attention, keep, self.fuse)


def keep_attended(attention: Tensor, keep: int, fuse: bool) -> TokenMap:
    """The map that keeps the `keep` < n largest entries of each row of `attention` (R, n); equal ones by lower index.

    With `fuse` the others are summed, weighted by their attention, and appended.
    """
    # Not topk, which breaks ties as it likes. Sorting again keeps the order in the image.
    order = descending_order(attention)
    kept = order[:, :keep].sort(dim=-1).values
    if not fuse:
        return Kept(kept, attention.shape[1])
    dropped = order[:, keep:].sort(dim=-1).values
    return Fused(kept, dropped, attention.gather(1, dropped))
