# SPDX-License-Identifier: Apache-2.0
"""What a block's attention shows a reducer, and attention that pools its tokens on the way.

Shapes: queries, keys and values (R, heads, T, head width) with T = prefix + n; `mask` is added to the scores,
(R, 1, T, T) or (R, 1, 1, T).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .walk import ReductionStep


def seen_of_attention(
    needs: str, prefix: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """What a reducer `needs`, averaged over heads, in fp32 without autocast.

    "cls_attention": the attention of the first token to every patch token, (R, n), softmax taken over all T tokens.
    "keys": the keys of the patch tokens, (R, n, head width).
    """
    if needs == "keys":
        return key[:, :, prefix:].mean(1, dtype=torch.float32)
    with torch.autocast(key.device.type, enabled=False):
        scores = (query[:, :, :1].float() * scaling) @ key.float().transpose(2, 3)
        if mask is not None:
            scores = scores + mask[:, :, :1].float()
        return scores.softmax(-1).mean(1)[:, 0, prefix:]


def attend_pooled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    tokens: Tensor,
    reduction: ReductionStep,
) -> tuple[Tensor, Tensor]:
    """Attention whose own map decides which tokens are pooled, one step ahead of the pooling (MCTF, arXiv 2403.10030).

    The map over all T tokens is computed once. Its rows are pooled as tokens are, its columns are summed, and it
    meets pooled values. `dropout`: probability for an entry of the pooled map.

    Returns the mixed values (R, T', heads * head width) and the pooled `tokens` (R, T', D), the block's residual.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32)
    shown = weights if reduction.learns else weights.detach()
    pooled_tokens = reduction(tokens, shown.mean(1))
    values = reduction.apply(reduction.found, value.transpose(1, 2).flatten(2))
    values = values.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
    weights = F.dropout(_pool(weights, reduction).to(values.dtype), dropout, training=dropout > 0)
    return (weights @ values).transpose(1, 2).flatten(2), pooled_tokens


def _pool(weights: Tensor, reduction: ReductionStep) -> Tensor:
    """(R, heads, T, T) to (R, heads, T', T'): rows pooled, columns summed, those of the prefix left alone."""
    prefix, heads, count = reduction.prefix, weights.shape[1], weights.shape[2]
    columns = weights.permute(0, 3, 1, 2).flatten(2)  # (R, keys, heads * queries)
    columns = torch.cat([columns[:, :prefix], reduction.found.sum_columns(columns[:, prefix:])], dim=1)
    rows = columns.unflatten(-1, (heads, count)).permute(0, 3, 2, 1).flatten(2)  # (R, queries, heads * keys)
    return reduction.apply(reduction.found, rows).unflatten(-1, (heads, -1)).transpose(1, 2)
