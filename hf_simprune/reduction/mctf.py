# SPDX-License-Identifier: Apache-2.0
"""MCTF: fuse tokens that are alike, matter little and stand for few patches (arXiv 2403.10030)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .base import BranchReducer, ReductionSetting, Seen, keep_count
from .token_maps import Merged, TokenMap, Unchanged, descending_order, to_full_precision


class MCTFReducer(BranchReducer):
    """Multi-criteria token fusion inside the attention of a block, by its own attention map.

    Patch tokens alternate between the sets B (the even ones) and A (the odd ones). The edge between a token of each
    weighs similarity^(1/tau_similarity) * information^(1/tau_information) * size^(1/tau_size), where similarity is
    (cosine + 1) / 2 of the residual stream, information the product of both tokens' 1/importance, size that of their
    1/size, both divided by the largest. Importance is the mean attention that a token gets from all queries. Of the
    r = n - K tokens to go, r // 2 of A fuse into their best B, then the rest of B into their best of the A that is
    left, whole groups with them. A group is the mean of its tokens, weighted by importance times size. Output: what is
    left of A, then of B, each by index.

    For the FLOP counter: at the site "attention" the block computes q, k, v and the attention scores of all n tokens,
    then attention times values of the m fused tokens (m^2 d), the output projection and the MLP of m. The map itself
    is pooled for it, rows by `map.apply` and columns by `map.sum_columns`; `overhead_macs` has that.

    proportional: attention in later blocks counts a fused token as often as it has patches.
    """

    name = "mctf"
    merges = True
    site = "attention"

    def __init__(
        self,
        keep_rate: float,
        setting: ReductionSetting = ReductionSetting(),
        *,
        proportional: bool = True,
        tau_similarity: float = 1.0,
        tau_information: float = 20.0,
        tau_size: float = 40.0,
    ) -> None:
        """Raises InputError for a keep rate below 0.5 or above 1, or a temperature that is not above 0."""
        super().__init__(keep_rate, setting)
        if keep_rate < 0.5:
            raise InputError(f"keep_rate {keep_rate} is too low for mctf, which fuses pairs: give 0.5 to 1.")
        self.weighs_sizes = proportional
        self.exponents = (
            _exponent("tau_similarity", tau_similarity),
            _exponent("tau_information", tau_information),
            _exponent("tau_size", tau_size),
        )

    @torch.no_grad()
    def decide(self, seen: Seen) -> TokenMap:
        count = seen.patches.shape[1]
        keep = keep_count(count, self.keep_rate)
        if keep == count:
            return Unchanged(seen.patches)
        assert seen.attention is not None  # as at every `site` "attention"
        importance = column_importance(seen.attention, seen.prefix)
        sizes = torch.ones_like(importance) if seen.sizes is None else seen.sizes.to(importance.dtype)
        edges = log_edge_weights(seen.patches, importance, sizes, self.exponents)
        groups = fuse_both_ways(edges, count - keep)
        weights = importance * sizes
        totals = weights.new_zeros(weights.shape[0], keep).scatter_add(1, groups, weights)
        return Merged(groups, weights / totals.gather(1, groups), keep)

    def overhead_macs(self, stage: int, num_patches: int) -> int:
        """Cosines of A with B, which serve both directions; pooling of every head's map, its rows times weights and
        its columns added up; pooling of the residual stream and the values."""
        keep = keep_count(num_patches, self.keep_rate)
        if keep == num_patches:
            return 0
        width, heads, prefix = self.setting.hidden_size, self.setting.num_heads, self.setting.num_prefix
        cosines = (num_patches // 2) * (num_patches - num_patches // 2) * width
        rows = heads * num_patches * (prefix + num_patches)
        columns = heads * num_patches * (prefix + keep)
        return cosines + rows + columns + 2 * num_patches * width


def column_importance(attention: Tensor, prefix: int) -> Tensor:
    """Mean attention that each patch token gets from all queries: (R, prefix + n, prefix + n) -> (R, n), above 0."""
    importance = to_full_precision(attention).mean(1)[:, prefix:]
    # A token that softmax gives nothing would make 1/importance infinite.
    return importance.clamp_min(torch.finfo(importance.dtype).tiny)


def log_edge_weights(
    patches: Tensor, importance: Tensor, sizes: Tensor, exponents: tuple[float, float, float]
) -> Tensor:
    """Logarithm of the edge weights of A = patches[1::2] and B = patches[0::2], (R, n // 2, n - n // 2).

    Only their order matters, and as logarithms no exponent can make them all 0.
    """
    with torch.autocast(patches.device.type, enabled=False):
        units = F.normalize(to_full_precision(patches), dim=-1)
        cosines = units[:, 1::2] @ units[:, 0::2].transpose(1, 2)
    similarity = ((cosines + 1) / 2).clamp_min(torch.finfo(cosines.dtype).tiny)
    # x~ = (1/x) / max(1/x) = min(x) / x, without large quotients
    information = (importance.amin(1, keepdim=True) / importance).log()
    small = (sizes.amin(1, keepdim=True) / sizes).log()
    tokens = exponents[1] * information + exponents[2] * small
    return exponents[0] * similarity.log() + tokens[:, 1::2].unsqueeze(2) + tokens[:, 0::2].unsqueeze(1)


def fuse_both_ways(edges: Tensor, remove: int) -> Tensor:
    """The group of every token, (R, n) int64, after exactly `remove` fusions, from edges (R, A, B).

    remove // 2 of A go into their best B; the rest of B into their best of the remaining A, with whatever they took.
    Equal edges: the lower index first. Groups number the remaining A first, then the remaining B.
    """
    rows, num_a, num_b = edges.shape
    first = remove // 2
    second = remove - first
    best, partner = edges.max(2)
    order = descending_order(best, dim=1)
    a_gone, a_left = order[:, :first], order[:, first:].sort(1).values
    remaining = edges.gather(1, a_left.unsqueeze(2).expand(-1, -1, num_b))
    back, back_partner = remaining.max(1)
    order = descending_order(back, dim=1)
    b_gone, b_left = order[:, :second], order[:, second:].sort(1).values

    num_left = num_a - first
    places = torch.arange(num_left + num_b - second, device=edges.device).expand(rows, -1)
    groups_b = torch.empty_like(back_partner).scatter(1, b_left, places[:, num_left:])
    groups_b = groups_b.scatter(1, b_gone, back_partner.gather(1, b_gone))
    groups_a = torch.empty_like(partner).scatter(1, a_left, places[:, :num_left])
    groups_a = groups_a.scatter(1, a_gone, groups_b.gather(1, partner.gather(1, a_gone)))
    # Back to the tokens' order B, A, B, A, ...: an odd number of tokens ends with a B.
    pairs = torch.stack([groups_b[:, :num_a], groups_a], dim=2).flatten(1)
    return torch.cat([pairs, groups_b[:, num_a:]], dim=1)


def _exponent(name: str, tau: float) -> float:
    if not tau > 0 or math.isinf(1 / tau):
        raise InputError(f"reduction option {name} {tau} is out of range: give a number above 0.")
    return 1 / tau
