# SPDX-License-Identifier: Apache-2.0
"""ToMe (Bolya et al., 2023, arXiv 2210.09461): tokens with the most similar keys are merged into their mean."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .base import BranchReducer, ReductionSetting, Seen, keep_count
from .token_maps import Merged, TokenMap, Unchanged, descending_order, to_full_precision


SCHEDULES = ("stages", "every_layer")


class ToMeReducer(BranchReducer):
    """Bipartite soft matching between attention and MLP: the patches of odd index merge into those of even index.

    proportional: attention after a merge counts a token as often as it has patches, by adding the log of its size.
    schedule: "stages" merges n - ceil(keep_rate * n) of n tokens at each reduction layer; "every_layer" (the paper)
    merges `r` in every block, never more than half of them, and does not use the keep rate.
    """

    name = "tome"
    merges = True
    needs = "keys"

    def __init__(
        self,
        keep_rate: float,
        setting: ReductionSetting = ReductionSetting(),
        *,
        proportional: bool = True,
        schedule: str = "stages",
        r: int | None = None,
    ) -> None:
        """Raises InputError for a keep rate outside [0.5, 1] in stages, an unknown schedule, or an `r` that is
        missing, below 1, or given without "every_layer"."""
        super().__init__(keep_rate, setting)
        _check_schedule(self.keep_rate, schedule, r)
        self.weighs_sizes = proportional
        self.schedule = schedule
        self.r = r

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.setting.depth)) if self.schedule == "every_layer" else self.setting.layers

    def counts(self, grid: tuple[int, int]) -> list[int]:
        counts = [grid[0] * grid[1]]
        for _ in self.layers:
            counts.append(counts[-1] - self._merges(counts[-1]))
        return counts

    def overhead_macs(self, stage: int, num_patches: int) -> int:
        """The cosines of the two halves, and the weighted sums."""
        if not self._merges(num_patches):
            return 0
        odd, head_width = num_patches // 2, self.setting.hidden_size // self.setting.num_heads
        return odd * (num_patches - odd) * head_width + num_patches * self.setting.hidden_size

    def decide(self, seen: Seen) -> TokenMap:
        count = seen.patches.shape[1]
        merges = self._merges(count)
        if merges == 0:
            return Unchanged(seen.patches)
        assert seen.attention is not None  # as `needs` says
        return merge_similar(seen.attention, seen.sizes, merges)

    def _merges(self, count: int) -> int:
        """How many of `count` tokens merge into another one."""
        if self.schedule == "every_layer":
            assert self.r is not None  # which this schedule must have
            return min(self.r, count // 2)
        return count - keep_count(count, self.keep_rate)


def merge_similar(keys: Tensor, sizes: Tensor | None, merges: int) -> Merged:
    """The map that merges the `merges` tokens of odd index with the highest cosine to a token of even index into it.

    keys: (R, n, head width). sizes: (R, n) patches of every token, None for one each. 0 <= merges <= n // 2.
    Output tokens: those of odd index that are left, then those of even index, both in their order. A merged token is
    the mean of its patches. Equal cosines go by the lower index.
    """
    # With one prefix token these are the halves of the paper, whose first half begins with [CLS].
    with torch.autocast(keys.device.type, enabled=False):
        unit = F.normalize(to_full_precision(keys), dim=-1)
        best, match = (unit[:, 1::2] @ unit[:, ::2].transpose(1, 2)).max(-1)

    left = best.shape[1] - merges
    order = descending_order(best)
    stay = order[:, merges:].sort(dim=-1).values
    places = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[0], -1)
    group_of = match.new_empty(keys.shape[:2])
    group_of[:, 1::2] = (match + left).scatter(1, stay, places[:, :left])
    group_of[:, ::2] = places[:, left : left + keys.shape[1] - best.shape[1]]
    return mean_of_groups(group_of, sizes, keys.shape[1] - merges)


def mean_of_groups(group_of: Tensor, sizes: Tensor | None, kept: int) -> Merged:
    """The map to the mean of every group's patches: a token counts as often as `sizes` (R, n) say, None for once."""
    sizes = torch.ones(group_of.shape, device=group_of.device) if sizes is None else sizes.float()
    totals = sizes.new_zeros(sizes.shape[0], kept).scatter_add(1, group_of, sizes)
    return Merged(group_of, sizes / totals.gather(1, group_of), kept)


def _check_schedule(keep_rate: float, schedule: str, r: int | None) -> None:
    if schedule not in SCHEDULES:
        raise InputError(f"reduction option schedule {schedule!r}: tome has {', '.join(SCHEDULES)}.")
    if schedule == "every_layer":
        if r is None:
            raise InputError("reduction option r is missing: every_layer needs the tokens to merge per block, as r=8.")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise InputError(f"reduction option r {r}: give the tokens to merge in a block, at least 1.")
    elif r is not None:
        raise InputError(f"reduction option r {r} needs schedule every_layer: in stages the keep rate decides.")
    elif keep_rate < 0.5:
        raise InputError(f"keep_rate {keep_rate}: tome merges at most every second token at once, so give 0.5 to 1.")
