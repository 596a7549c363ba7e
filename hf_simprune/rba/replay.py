# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a model in pieces: its activations as it is, and its output as a plan would make it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .activations import Activations
from .adapters import Adapter
from .maps import FittedMaps
from .plan import CompressionPlan, check_depth


@torch.no_grad()
def activations(adapter: Adapter, pixel_values: Tensor, halves: bool = False, fold: bool = False) -> Activations:
    """One forward pass over images (B, C, H, W): all hidden states, and what moments need of the halves.

    `fold` adds the MLP writes `m`, `halves` also the normed inputs `an`, `mn` and the attention writes `a`. Each block
    runs once. Entries are None where a half is a map already.
    """
    h, context = adapter.embed(pixel_values)
    hidden = [h]
    recorded: dict[str, list[Tensor | None]] = {name: [] for name in ("an", "a", "mn", "m")}
    for b in range(adapter.depth):
        parts: dict[str, Tensor] = {}
        if (halves or fold) and adapter.is_block(b):
            parts["an"] = adapter.attention_input(b, h)
            parts["a"] = adapter.attention_write(b, parts["an"], context)
            y = h + parts["a"]
            parts["mn"] = adapter.mlp_input(b, y)
            parts["m"] = adapter.mlp_write(b, parts["mn"])
            h = y + parts["m"]
        else:
            h = adapter.block(b, h, context)
        hidden.append(h)
        full = adapter.halves(b)
        for name, half in (("an", "attention"), ("a", "attention"), ("mn", "mlp"), ("m", "mlp")):
            recorded[name].append(parts.get(name) if half in full else None)
    asked = ("an", "a", "mn", "m") if halves else ("m",) if fold else ()
    return Activations(hidden, **{name: recorded[name] for name in asked})


def check_plan(adapter: Adapter, plan: CompressionPlan) -> None:
    """Raise `InputError` unless the model has what the plan replaces or folds into, and the width for its ranks."""
    check_depth(plan, adapter.depth)
    for span in plan.spans:
        if span.rank is not None and span.rank > adapter.width:
            raise InputError(f"plan: {span}: 1 to {adapter.width} are accepted, the width of this model")
        if span.map == "fold" and "mlp" not in adapter.halves(span.start - 1):
            raise InputError(
                f"plan: {span} needs the MLP of block {span.start - 1}, which this model has replaced already: "
                "use another map"
            )
    for half in plan.halves:
        if half.half not in adapter.halves(half.block):
            raise InputError(f"plan: {half}: this model has replaced it already, leave it out")


@torch.no_grad()
def replay(
    adapter: Adapter, plan: CompressionPlan, maps: FittedMaps, h: Tensor, context: Any, start: int = 0
) -> Tensor:
    """The rest of the forward pass as `plan` makes it, from tokens `h` (B, T, D) at position `start`.

    Positions are those of the original model: `h` stands in for `hidden_states[start]`, and everything the plan
    changes before `start` has been done to it. Where a span starts at `start`, its map is the first thing to run; a
    fold's has then been applied, so start at its end instead. Returns `hidden_states[depth]`, reduced to the first
    `adapter.output_tokens` tokens where the output needs no more. Raises `ValueError` for a `start` the plan removes.
    """
    check_plan(adapter, plan)
    jumps = {span.start: span for span in plan.spans}
    folds = {span.start - 1: span for span in plan.spans if span.map == "fold"}
    if any(span.start < start < span.end or (span.start == start and span.map == "fold") for span in plan.spans):
        raise ValueError(f"start {start} is a position that the plan removes")
    replaced = {(half.block, half.half): half for half in plan.halves}

    def half_map(b: int, half: str, norm: Callable[[int, Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
        item = replaced.get((b, half))
        if item is None:
            return None
        fitted = maps[item]
        return fitted if item.map == "const" else lambda tokens: fitted(norm(b, tokens))

    count = adapter.output_tokens
    mixing = _last_attention(adapter, plan, start)
    if mixing is None:
        h = h[:, :count]
    position = start
    while position < adapter.depth:
        span = jumps.get(position)
        if span is not None:
            h = h if span.map == "identity" else maps[span](h)
            position = span.end
            continue
        fold = folds.get(position)
        h = _block(
            adapter,
            position,
            h,
            context,
            attention_map=half_map(position, "attention", adapter.attention_input),
            mlp_map=half_map(position, "mlp", adapter.mlp_input),
            fold=None if fold is None else maps[fold],
            queries=count if position == mixing else None,
        )
        position = position + 1 if fold is None else fold.end
    return h


@torch.no_grad()
def replay_output(adapter: Adapter, plan: CompressionPlan, maps: FittedMaps, pixel_values: Tensor) -> Tensor:
    """The output (B, C) that the model would have after `plan`, for images (B, C, H, W)."""
    h, context = adapter.embed(pixel_values)
    return adapter.output(replay(adapter, plan, maps, h, context))


def _last_attention(adapter: Adapter, plan: CompressionPlan, start: int) -> int | None:
    """The last block from `start` on in which tokens still see each other: after it, each goes its own way."""
    gone = {*plan.removed_blocks, *(half.block for half in plan.halves if half.half == "attention")}
    left = (b for b in range(start, adapter.depth) if b not in gone and "attention" in adapter.halves(b))
    return max(left, default=None)


def _block(
    adapter: Adapter,
    b: int,
    h: Tensor,
    context: Any,
    attention_map: Callable[[Tensor], Tensor] | None,
    mlp_map: Callable[[Tensor], Tensor] | None,
    fold: Callable[[Tensor], Tensor] | None,
    queries: int | None,
) -> Tensor:
    """Block `b` with what the plan changes in it, for the first `queries` tokens or for all."""
    if queries is None and attention_map is None and mlp_map is None and fold is None:
        return adapter.block(b, h, context)
    if attention_map is None:
        write = adapter.attention_write(b, adapter.attention_input(b, h), context, queries)
    else:
        write = attention_map(h)
    y = h[:, :queries] + write
    write = adapter.mlp_write(b, adapter.mlp_input(b, y)) if mlp_map is None else mlp_map(y)
    return y + (write if fold is None else fold(write))
