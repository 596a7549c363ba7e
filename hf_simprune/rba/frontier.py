# SPDX-License-Identifier: Apache-2.0
"""A planned network run up to a place inside it, where the next map is to be fitted."""

from typing import Any

import torch
from torch import Tensor

from .adapters import Adapter
from .maps import FittedMap, FittedMaps
from .plan import CompressionPlan, Half, Span


@torch.no_grad()
def advance(
    adapter: Adapter, plan: CompressionPlan, maps: FittedMaps, h: Tensor, context: Any, start: int, stop: int
) -> Tensor:
    """Tokens at position `stop` as the plan makes them, from those at position `start`; all tokens, (B, T, D).

    Both are positions that the plan keeps. Unlike `replay`, it runs all tokens.
    """
    spans = {span.start: span for span in plan.spans if span.map != "fold"}
    folds = {span.start - 1: span for span in plan.spans if span.map == "fold"}
    changed = {*folds, *(half.block for half in plan.halves)}
    position = start
    while position < stop:
        if position in spans:
            h, position = maps[spans[position]](h), spans[position].end
            continue
        if position not in changed:
            h = adapter.block(position, h, context)
        else:
            y = after_attention(adapter, plan, maps, position, h, context)
            write = mlp_write(adapter, plan, maps, position, y)
            h = y + (maps[folds[position]](write) if position in folds else write)
        position = folds[position].end if position in folds else position + 1
    return h


def after_attention(
    adapter: Adapter, plan: CompressionPlan, maps: FittedMaps, b: int, h: Tensor, context: Any
) -> Tensor:
    """The stream between the halves of block `b`."""
    x = adapter.attention_input(b, h)
    fitted = _half_map(plan, maps, b, "attention")
    return h + (adapter.attention_write(b, x, context) if fitted is None else fitted(x))


def mlp_write(adapter: Adapter, plan: CompressionPlan, maps: FittedMaps, b: int, y: Tensor) -> Tensor:
    """What the MLP half of block `b` writes, before a fold changes it."""
    x = adapter.mlp_input(b, y)
    fitted = _half_map(plan, maps, b, "mlp")
    return adapter.mlp_write(b, x) if fitted is None else fitted(x)


def _half_map(plan: CompressionPlan, maps: FittedMaps, b: int, half: str) -> FittedMap | None:
    item = next((item for item in plan.halves if (item.block, item.half) == (b, half)), None)
    return None if item is None else maps[item]


def left_to_right(plan: CompressionPlan) -> list[Span | Half]:
    """The plan's items in the order in which a forward pass meets them."""

    def place(item: Span | Half) -> tuple[int, bool]:
        in_mlp = item.half == "mlp" if isinstance(item, Half) else item.map == "fold"
        return first_change(item), in_mlp

    return sorted(plan.items, key=place)


def first_change(item: Span | Half) -> int:
    """The block in which the item acts, or the first that it removes: up to there all is as without it."""
    if isinstance(item, Half):
        return item.block
    return item.start - 1 if item.map == "fold" else item.start


def end_of(item: Span | Half) -> int:
    """The position behind the item."""
    return item.block + 1 if isinstance(item, Half) else item.end
