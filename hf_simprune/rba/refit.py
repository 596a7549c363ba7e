# SPDX-License-Identifier: Apache-2.0
"""Fitting a plan's maps again, each on what the maps before it really give."""

from typing import Any

import torch
from torch import Tensor

from .activations import Activations
from .candidates import TRAINED_MAPS
from .frontier import advance, after_attention, first_change, left_to_right, mlp_write
from .maps import FittedMap, FittedMaps, fit
from .measure import Bench
from .moment_pass import fit_moments, sum_device
from .moments import MomentAccumulator
from .plan import CompressionPlan, Half, Span


def sequential_refit(
    bench: Bench, plan: CompressionPlan, maps: FittedMaps, ridge: float = 1e-4, bias: bool = True
) -> FittedMaps:
    """The plan's closed-form maps fitted anew, left to right, on the fit images.

    Each map reads what the compressed network gives at that place and aims at the original's hidden state behind it,
    so that it also mends what the maps before it left over. The first map, identity and trained maps stay. One pass
    over the images for each other map; memory does not depend on their number. Whether the result is better has to be
    measured.

    Args:
        maps: as they are; not changed.
        ridge, bias: as for `fit_all`.
    """
    done: list[Span | Half] = []
    refitted: FittedMaps = {}
    for item in left_to_right(plan):
        before = _partial_plan(plan, done)
        stays = not done or item.map in ("identity", *TRAINED_MAPS)
        refitted[item] = maps[item] if stays else fit_behind(bench, before, refitted, item, ridge, bias)
        done.append(item)
    return refitted


def fit_behind(
    bench: Bench, before: CompressionPlan, maps: FittedMaps, item: Span | Half, ridge: float = 1e-4, bias: bool = True
) -> FittedMap:
    """The closed-form map of `item` where everything in `before`, which lies left of it, is in place.

    With an empty plan this is the map that `fit` makes of the moments of the whole network.
    """
    small, accumulator = _problem(bench, item)
    moments = fit_moments(
        bench, accumulator, lambda pixel_values: _activations(bench, before, maps, item, pixel_values), f"fit {item}"
    )
    return fit(small, moments, ridge, bias)


def _partial_plan(plan: CompressionPlan, items: list[Span | Half]) -> CompressionPlan:
    spans = tuple(item for item in items if isinstance(item, Span))
    return CompressionPlan(plan.depth, spans, tuple(item for item in items if isinstance(item, Half)))


def _problem(bench: Bench, item: Span | Half) -> tuple[Span | Half, MomentAccumulator]:
    """The item as if it were all there is of a network of one block (two for a fold), and that network's moments."""
    width = bench.adapter.width
    options: dict[str, Any] = {"prefix_tokens": bench.adapter.num_prefix_tokens, "device": sum_device(bench)}
    if isinstance(item, Half):
        return Half(0, item.half, item.map), MomentAccumulator(
            1, width, 1, (), True, full_halves=[(item.half,)], **options
        )
    if item.map == "fold":
        full = [("mlp",), ()]
        return Span(1, 2, "fold"), MomentAccumulator(2, width, 1, ("fold",), full_halves=full, **options)
    return Span(0, 1, item.map, item.rank), MomentAccumulator(1, width, 1, ("linear",), **options)


@torch.no_grad()
def _activations(
    bench: Bench, before: CompressionPlan, maps: FittedMaps, item: Span | Half, pixel_values: Tensor
) -> Activations:
    """What `_problem`'s network would show on these images: the compressed network's input, the original's target."""
    adapter = bench.adapter
    original = CompressionPlan(adapter.depth)
    h, context = adapter.embed(pixel_values)
    b = first_change(item)
    # both networks are the same up to the first item
    alike = min((first_change(other) for other in before.items), default=b)
    h = advance(adapter, original, {}, h, context, 0, alike)
    target = advance(adapter, original, {}, h, context, alike, b)
    h = advance(adapter, before, maps, h, context, alike, b)
    if isinstance(item, Span) and item.map != "fold":
        return Activations([h, advance(adapter, original, {}, target, context, b, item.end)])
    if isinstance(item, Half) and item.half == "attention":
        read = adapter.attention_input(b, h)
        write = after_attention(adapter, original, {}, b, target, context) - h
        return Activations([h, h + write], m=[None], an=[read], a=[write], mn=[None])
    y = after_attention(adapter, before, maps, b, h, context)
    if isinstance(item, Half):
        read = adapter.mlp_input(b, y)
        write = adapter.block(b, target, context) - y
        return Activations([h, y + write], m=[write], an=[None], a=[None], mn=[read])
    write = mlp_write(adapter, before, maps, b, y)
    target = advance(adapter, original, {}, target, context, b, item.end)
    return Activations([h, y + write, target], m=[write, None])
