# SPDX-License-Identifier: Apache-2.0
"""Do two views of an image keep the same places, and are the tokens that match from the same place?

Tokens stand for patches: `groups` (B, N) says which token each patch of a view went into, -1 where it was dropped. A
merged token is spread evenly over its patches, so that every method has as much weight to place as it has tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def members(groups: Tensor, tokens: int) -> Tensor:
    """(B, tokens, N): every token's weight on its patches, 1 in total; zeros for a token that stands for no patch."""
    found = F.one_hot(groups + 1, tokens + 1)[..., 1:].transpose(1, 2).double()
    return found / found.sum(-1, keepdim=True).clamp_min(1)


def patch_weights(groups: Tensor, tokens: int) -> Tensor:
    """(B, N): 1 for a patch with a token to itself, 1/s for one of s that share a token, 0 for a dropped one."""
    return members(groups, tokens).sum(1)


def match_by_cosine(a: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
    """(B, m) index of the most similar token of b (B, k, D) for each of a (B, m, D); candidates: (B, k) bool."""
    cosine = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(1, 2)
    return cosine.masked_fill(~candidates.unsqueeze(1), -torch.inf).argmax(-1)


def match_by_position(members_a: Tensor, members_b: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, m) index of the token of the other view whose patches lie nearest, within the crop, to those of each token.

    members_a, members_b: (B, m, N) and (B, k, N), of `members`. Equally near ones go by the lower index.
    """
    rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(members_a)
    a, b = members_a @ places, members_b @ places
    distance = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1).mul(1e6).round()
    return distance.masked_fill(members_b.sum(-1).unsqueeze(1) == 0, torch.inf).argmin(-1)


def pair_overlap(members_a: Tensor, members_b: Tensor, overlaps: Tensor) -> Tensor:
    """(B, m, k): how probable it is that a patch of one token and a patch of another overlap; overlaps: (B, N, N)."""
    return members_a @ overlaps.to(members_a) @ members_b.transpose(1, 2)


def overlap_of_matches(pairs: Tensor, match: Tensor, counted: Tensor) -> Tensor:
    """(B,) mean of `pairs` (B, m, k) at the matches (B, m), over the tokens that count, (B, m) bool."""
    found = pairs.gather(2, match.unsqueeze(2)).squeeze(2)
    return (found * counted).sum(1) / counted.sum(1)


def overlap_by_chance(pairs: Tensor, counted: Tensor, candidates: Tensor) -> Tensor:
    """(B,) the mean that matches drawn at random among the candidates (B, k) would have."""
    allowed = (counted.unsqueeze(2) & candidates.unsqueeze(1)).to(pairs)
    return (pairs * allowed).sum((1, 2)) / allowed.sum((1, 2))


def cls_margin(first: Tensor, second: Tensor) -> Tensor:
    """(B,) cosine of an image's two CLS tokens (B, D) minus the mean cosine of its first with the others' second."""
    cosine = F.normalize(first.double(), dim=-1) @ F.normalize(second.double(), dim=-1).T
    own = cosine.diagonal()
    return own - (cosine.sum(1) - own) / (len(cosine) - 1)
