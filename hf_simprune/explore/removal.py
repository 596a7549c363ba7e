# SPDX-License-Identifier: Apache-2.0
"""What a network becomes without some of its blocks: the plan that they make, and before and after on one image."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..evaluation.latency import Ratio, compare_latency
from ..evaluation.model_cost import macs, parameters
from ..rba.adapters import Adapter, adapter_for, module_forward
from ..rba.analysis import Analysis
from ..rba.converter import convert
from ..rba.maps import FittedMaps, IdentityMap
from ..rba.plan import CompressionPlan, Span
from ..rba.plan_maps import plan_maps
from .attention import attention_map


TOP_CLASSES = 5
_TIMED_SECONDS = 1.5  # for both networks together
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 15


@dataclass(frozen=True)
class ClassShare:
    """One class and its probability under both networks."""

    label: str
    before: float
    after: float


@dataclass(frozen=True)
class RemovalEffect:
    """Pairs are (before, after); MACs and seconds are of one image.

    Attributes:
        plan: what was removed, and what stands in its place.
        seconds: medians of runs that took turns, on the network's device.
        latency_ratio: after / before with its 95 % interval.
        classes: the first classes of either network, the likeliest before first; empty without a classifier.
        cosine: of the outputs before and after: logits, or features where there is no classifier.
        attention: the last attention's map of each, (rows, columns).
    """

    plan: CompressionPlan
    blocks: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    seconds: tuple[float, float]
    latency_ratio: Ratio
    classes: tuple[ClassShare, ...]
    cosine: float
    attention: tuple[np.ndarray, np.ndarray]


def removable_blocks(adapter: Adapter) -> tuple[int, ...]:
    """Blocks that can be picked: all but the first."""
    return tuple(range(1, adapter.depth))


def plan_without(depth: int, blocks: Collection[int], kind: str = "identity") -> CompressionPlan:
    """The plan that removes these blocks, neighbours as one span, each span replaced by a map of that kind.

    Raises:
        InputError: block 0, or one that the network does not have.
    """
    for block in blocks:
        if not 1 <= block < depth:
            raise InputError(f"block {block}: blocks 1 to {depth - 1} can be removed, the first stays")
    ordered = sorted(set(blocks))
    starts = [block for block in ordered if block - 1 not in ordered]
    ends = [block + 1 for block in ordered if block + 1 not in ordered]
    return CompressionPlan(depth, tuple(Span(start, end, kind) for start, end in zip(starts, ends, strict=True)))


def maps_for(plan: CompressionPlan, analysis: Analysis | None) -> FittedMaps:
    """The maps of a plan: fitted on the analysis's images, or nothing in place of the removed blocks.

    Raises:
        InputError: a plan with fitted maps but no analysis, or a map that this network cannot have.
    """
    if all(span.map == "identity" for span in plan.spans):
        return {span: IdentityMap() for span in plan.spans}
    if analysis is None:
        raise InputError("fold: it is fitted on images; measure on a data set first, or replace by nothing")
    return plan_maps(analysis, plan)


def removal_effect(
    adapter: Adapter,
    plan: CompressionPlan,
    maps: FittedMaps,
    pixel_values: Tensor,
    timed_seconds: float = _TIMED_SECONDS,
) -> RemovalEffect:
    """Both networks on one image.

    Args:
        adapter: the network as it is; it is not changed.
        plan: for this network; an empty one compares it with itself.
        maps: of every span of the plan.
        pixel_values: (1, C, H, W), normalised.
        timed_seconds: about how long both are timed, at least 3 and at most 15 rounds.

    Raises:
        InputError: what `convert` cannot do.
    """
    pixels = pixel_values.to(adapter.model.device, adapter.model.dtype)
    changed = adapter_for(convert(adapter.model, plan, maps)) if plan.items else adapter
    sides = (adapter, changed)
    with torch.inference_mode():
        outputs = [module_forward(side, pixels)[0].float().cpu() for side in sides]
    latency = compare_latency(
        partial(module_forward, adapter),
        partial(module_forward, changed),
        pixels,
        _rounds(adapter, pixels, timed_seconds),
        warmup=1,
    )
    return RemovalEffect(
        plan=plan,
        blocks=(adapter.depth, changed.depth),
        parameters=(parameters(adapter.model), parameters(changed.model)),
        macs=(macs(partial(module_forward, adapter), pixels), macs(partial(module_forward, changed), pixels)),
        seconds=(latency.original, latency.compressed),
        latency_ratio=latency.ratio,
        classes=_classes(adapter, outputs) if adapter.head == "classifier" else (),
        cosine=torch.nn.functional.cosine_similarity(outputs[0], outputs[1], dim=0).item(),
        attention=(attention_map(adapter, pixels), attention_map(changed, pixels)),
    )


@torch.inference_mode()
def _rounds(adapter: Adapter, pixels: Tensor, timed_seconds: float) -> int:
    started = time.perf_counter()
    module_forward(adapter, pixels).sum().item()
    one = time.perf_counter() - started
    return min(_MOST_ROUNDS, max(_LEAST_ROUNDS, round(timed_seconds / (2 * one))))


def _classes(adapter: Adapter, logits: list[Tensor]) -> tuple[ClassShare, ...]:
    """The classes that come first before, then those that come first after and were not named."""
    before, after = (found.softmax(-1) for found in logits)
    count = min(TOP_CLASSES, len(before))
    first = dict.fromkeys([*before.topk(count).indices.tolist(), *after.topk(count).indices.tolist()])
    names: Any = adapter.model.config.id2label
    return tuple(ClassShare(str(names[index]), before[index].item(), after[index].item()) for index in first)
