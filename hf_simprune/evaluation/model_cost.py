# SPDX-License-Identifier: Apache-2.0
"""Parameters, MACs and time: of a whole network, of every block and half of it, of the maps that stand in for them.

MACs (multiply-accumulates) are those of matrix products and convolutions as they run, for one image; FLOPs = 2 * MACs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError
from ..models.vit.maps_simprune_vit import MLPMap, ResMLPMap
from .latency import Clock, interleave, wall_seconds


if TYPE_CHECKING:
    from ..rba.adapters.base import Adapter
    from ..rba.plan import Half, Span


@dataclass(frozen=True)
class Cost:
    """Parameters held, and MACs and seconds of one image."""

    params: int = 0
    macs: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.seconds + other.seconds)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs, self.seconds - other.seconds)


@dataclass(frozen=True)
class Gains:
    """What a replacement saves; below zero where the map costs more than what it replaces."""

    blocks: int
    params: int
    macs: int
    seconds: float


@dataclass(frozen=True)
class HalfCost:
    """A half of a block: its layer norm alone, and the half with it."""

    norm: Cost
    whole: Cost


@dataclass(frozen=True)
class PieceCosts:
    """Costs of the pieces of one network at one input size.

    Attributes:
        total: the whole network: all its parameters, and MACs and seconds from pixels to output.
        blocks: every block, in order.
        halves: by (block, "attention" or "mlp"), those that are there in full.
        width: features of a token.
        maps: of one map over all tokens, by kind, without a layer norm: identity, const, linear, mlp, res_mlp.
    """

    total: Cost
    blocks: tuple[Cost, ...]
    halves: Mapping[tuple[int, str], HalfCost]
    width: int
    maps: Mapping[str, Cost]

    def map_cost(self, kind: str, rank: int | None = None) -> Cost:
        """Cost of a map. The time of a low rank one is that of the linear one by its share of MACs."""
        if kind == "fold":
            return Cost()
        if kind != "low_rank":
            return self.maps[kind]
        linear, share = self.maps["linear"], 2 * (rank or 0) / self.width
        params = round((linear.params - self.width) * share) + self.width
        return Cost(params, round(linear.macs * share), linear.seconds * share)


def gains(item: Span | Half, pieces: PieceCosts) -> Gains:
    """What replacing a span of blocks or half a block by its map saves.

    Raises:
        InputError: if the item names a block or half that the network does not have.
    """
    from ..rba.plan import Span  # not at import: rba builds on evaluation

    if isinstance(item, Span):
        if not 0 <= item.start < item.end <= len(pieces.blocks):
            raise InputError(f"span {item.start}-{item.end}: the network has {len(pieces.blocks)} blocks")
        saved = sum(pieces.blocks[item.start : item.end], Cost()) - pieces.map_cost(item.map, item.rank)
        return Gains(item.end - item.start, saved.params, saved.macs, saved.seconds)
    half = pieces.halves.get((item.block, item.half))
    if half is None:
        raise InputError(f"half {item.block} {item.half}: the network has no such half in full")
    # a linear map reads the normalised input, a constant needs no norm
    kept = half.norm if item.map == "linear" else Cost()
    saved = half.whole - kept - pieces.map_cost(item.map)
    return Gains(0, saved.params, saved.macs, saved.seconds)


def parameters(model: nn.Module) -> int:
    """Parameters of the whole model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(forward: Callable[[Tensor], Any], pixel_values: Tensor) -> int:
    """MACs of one image, counted while `forward` (a model or a function of its own) runs.

    Args:
        pixel_values: (B, C, H, W); the count is divided by B.
    """
    return _counted(lambda: forward(pixel_values)) // len(pixel_values)


def file_size(folder: str | Path) -> int:
    """Bytes of the weights (safetensors files) in a saved model's folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


@torch.inference_mode()
def piece_costs(
    adapter: Adapter, pixel_values: Tensor, rounds: int = 10, warmup: int = 2, clock: Clock = wall_seconds
) -> PieceCosts:
    """Count and time every piece of a network on `pixel_values`.

    Pieces of the same sort with the same parameters and MACs share one time, the median over all of them, so that
    noise never makes one block look cheaper than its twin.

    Args:
        pixel_values: (B, C, H, W) on the model's device and in its dtype. B decides what the time means: of one image
            alone, or of each in a batch.
        rounds: how often each piece is timed, in turns with all others.
    """
    images = len(pixel_values)
    modules = _map_modules(adapter.width, pixel_values)
    calls = _calls(adapter, modules, pixel_values)
    counts = {name: _count(call) for name, call in calls.items()}
    for name in counts:
        if name[0] in modules:
            counts[name] = (parameters(modules[name[0]]), counts[name][1])
    counts["total", 0] = (parameters(adapter.model), counts["total", 0][1])
    times = interleave(calls, rounds, pixel_values.device, warmup, clock)

    def cost(sort: str, index: int = 0) -> Cost:
        count = counts[sort, index]
        twins = [times[name] for name in calls if name[0] == sort and counts[name] == count]
        seconds = statistics.median([second for twin in twins for second in twin])
        return Cost(count[0], count[1] // images, seconds / images)

    return PieceCosts(
        total=cost("total"),
        blocks=tuple(cost("block", b) for b in range(adapter.depth)),
        halves={
            (b, half): HalfCost(norm=cost(f"{half} norm", b), whole=cost(f"{half} half", b))
            for b in range(adapter.depth)
            for half in adapter.halves(b)
        },
        width=adapter.width,
        maps={kind: cost(kind) for kind in modules} | {"identity": Cost(), "const": Cost(params=adapter.width)},
    )


def _calls(
    adapter: Adapter, modules: Mapping[str, nn.Module], pixel_values: Tensor
) -> dict[tuple[str, int], Callable[[], object]]:
    """One call for each piece, by (sort of piece, index); all pieces read the same tokens."""
    hidden, context = adapter.embed(pixel_values)
    calls: dict[tuple[str, int], Callable[[], object]] = {("total", 0): partial(_forward, adapter, pixel_values)}
    for b in range(adapter.depth):
        calls["block", b] = partial(adapter.block, b, hidden, context)
        for half in adapter.halves(b):
            if half == "attention":
                norm = partial(adapter.attention_input, b, hidden)
                write = partial(adapter.attention_write, b, context=context)
            else:
                norm, write = partial(adapter.mlp_input, b, hidden), partial(adapter.mlp_write, b)
            calls[f"{half} norm", b] = norm
            calls[f"{half} half", b] = partial(_in_turn, norm, write)
    return calls | {(kind, 0): partial(module, hidden) for kind, module in modules.items()}


def _in_turn(first: Callable[[], Tensor], then: Callable[[Tensor], Tensor]) -> Tensor:
    return then(first())


def _forward(adapter: Adapter, pixel_values: Tensor) -> Tensor:
    hidden, context = adapter.embed(pixel_values)
    for b in range(adapter.depth):
        hidden = adapter.block(b, hidden, context)
    return adapter.output(hidden)


def _map_modules(width: int, like: Tensor) -> dict[str, nn.Module]:
    modules = {"linear": nn.Linear(width, width), "mlp": MLPMap(width), "res_mlp": ResMLPMap(width)}
    return {kind: module.eval().to(like.device, like.dtype) for kind, module in modules.items()}


class _ParametersUsed(TorchFunctionMode):
    """Collects the parameters that reach any torch function, whatever module they live in."""

    def __init__(self) -> None:
        self.seen: dict[int, nn.Parameter] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        for value in tree_iter((args, kwargs or {})):
            if isinstance(value, nn.Parameter):
                self.seen[id(value)] = value
        return func(*args, **(kwargs or {}))


def _count(call: Callable[[], object]) -> tuple[int, int]:
    """Parameters that `call` uses and MACs it runs."""
    with _ParametersUsed() as used:
        count = _counted(call)
    return sum(parameter.numel() for parameter in used.seen.values()), count


def _counted(call: Callable[[], object]) -> int:
    # The fused attention of the CPU is not known to the counter; its plain form is. Without inference mode the
    # counter's hooks stumble over a view of a parameter, which is what a constant map gives.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2
