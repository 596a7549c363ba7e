# SPDX-License-Identifier: Apache-2.0
"""Measured costs: the changed network is run on images and its output compared with the original's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from .activations import Activations
from .adapters import Adapter
from .calibration import CalibrationSet
from .cost import OutputCost
from .frontier import advance, end_of, first_change, left_to_right
from .maps import FittedMap, FittedMaps
from .plan import CompressionPlan, Half, Span
from .replay import activations, replay


@dataclass(frozen=True)
class Measured:
    """Means over `images` images: the cost (see `OutputCost`) and the relative squared error of the output."""

    cost: float
    relative_error: float
    images: int


@dataclass(frozen=True)
class Bench:
    """Everything a measurement needs beside what is measured.

    `chunk_size` images are held at a time, with all their hidden states, however many are measured.
    """

    adapter: Adapter
    images: CalibrationSet
    cost: OutputCost
    chunk_size: int = 32
    accelerator: Accelerator | None = None
    progress: bool = True

    @property
    def ranks(self) -> tuple[int, int]:
        """Number of this process, and of all."""
        if self.accelerator is None:
            return 0, 1
        return self.accelerator.process_index, self.accelerator.num_processes

    @property
    def quiet(self) -> bool:
        """Whether to show no bar on this process."""
        return not self.progress or self.ranks[0] > 0

    def summed(self, sums: Tensor) -> Tensor:
        """fp64 sums of all processes."""
        if self.ranks[1] == 1:
            return sums
        assert self.accelerator is not None
        return self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu()


def measure_items(bench: Bench, maps: FittedMaps, indices: Sequence[int]) -> dict[Span | Half, Measured]:
    """What replacing each span or half of `maps`, by itself, costs on the images `indices`.

    Of each chunk of images the original's hidden states are computed once; a candidate runs its map and what follows.
    """
    items = list(maps)
    empty = CompressionPlan(bench.adapter.depth)
    halves = any(isinstance(item, Half) for item in items)

    def outputs(found: Activations, context: Any) -> Iterator[Tensor]:
        for item in items:
            position, h = _state_after(bench.adapter, item, maps[item], found)
            yield bench.adapter.output(replay(bench.adapter, empty, {}, h, context, position))

    return dict(zip(items, _measure(bench, indices, len(items), outputs, halves, "costs")))


def measure_plans(
    bench: Bench, plans: Sequence[tuple[CompressionPlan, FittedMaps]], indices: Sequence[int], label: str = "plans"
) -> list[Measured]:
    """What each plan costs on the images `indices`.

    Of each chunk of images the original runs once; each plan goes on where it parts from the original or from the plan
    before it, in an order in which plans that begin alike follow each other.
    """
    order = sorted(range(len(plans)), key=lambda n: [_sort_key(item) for item in left_to_right(plans[n][0])])

    def outputs(found: Activations, context: Any) -> Iterator[Tensor]:
        path: list[_State] = []
        for plan, maps in (plans[n] for n in order):
            position, h = _last_state(bench.adapter, plan, maps, found, context, path)
            yield bench.adapter.output(replay(bench.adapter, plan, maps, h, context, position))

    results = _measure(bench, indices, len(plans), outputs, False, label)
    return [result for _, result in sorted(zip(order, results), key=lambda pair: pair[0])]


@torch.no_grad()
def _measure(
    bench: Bench,
    indices: Sequence[int],
    count: int,
    outputs: Callable[[Activations, Any], Iterator[Tensor]],
    halves: bool,
    label: str,
) -> list[Measured]:
    """Means of `count` outputs for each chunk of images against the original's."""
    adapter, (rank, world) = bench.adapter, bench.ranks
    totals = torch.zeros(2 * count + 1, dtype=torch.float64)
    chunks = len(range(rank, -(-len(indices) // bench.chunk_size), world))
    with tqdm(total=chunks * count, desc=label, disable=bench.quiet, leave=False) as bar:
        for chunk in bench.images.chunks(indices, bench.chunk_size, rank, world):
            pixel_values = chunk.pixel_values.to(adapter.model.device)
            _, context = adapter.embed(pixel_values)
            found = activations(adapter, pixel_values, halves=halves, fold=True)
            reference = adapter.output(found.hidden[-1])
            costs = torch.zeros(count, 2, dtype=torch.float64)
            for row, output in zip(costs, outputs(found, context)):
                row += bench.cost(reference, output, chunk.indices).sum(dim=1)
                bar.update()
            totals[1:] += costs.flatten()
            totals[0] += len(chunk.indices)
    bench.images.reader.check_readable(indices, bench.accelerator)
    images, *means = bench.summed(totals).tolist()
    return [Measured(means[2 * n] / images, means[2 * n + 1] / images, int(images)) for n in range(count)]


def _entry(entries: list[Tensor | None] | None, block: int) -> Tensor:
    """That of a block which has it, among what was asked for."""
    entry = None if entries is None else entries[block]
    assert entry is not None
    return entry


def _state_after(adapter: Adapter, item: Span | Half, fitted: FittedMap, found: Activations) -> tuple[int, Tensor]:
    """Position after the item and its hidden state when nothing else has changed; only the tokens still needed."""
    end = end_of(item)
    needed = slice(None, adapter.output_tokens if end == adapter.depth else None)
    if isinstance(item, Span):
        h = found.hidden[item.start][:, needed]
        if item.map == "fold":
            write = _entry(found.m, item.start - 1)[:, needed]
            return end, (h - write) + fitted(write)
        return end, fitted(h)
    if item.half == "mlp":
        y = (found.hidden[end] - _entry(found.m, item.block))[:, needed]
        return end, y + fitted(_entry(found.mn, item.block)[:, needed])
    y = found.hidden[item.block][:, needed] + fitted(_entry(found.an, item.block)[:, needed])
    return end, y + adapter.mlp_write(item.block, adapter.mlp_input(item.block, y))


class _State(NamedTuple):
    """A plan's tokens behind some of its items, with the maps that stood there."""

    items: tuple[Span | Half, ...]
    maps: tuple[FittedMap, ...]
    position: int
    h: Tensor


def _last_state(
    adapter: Adapter,
    plan: CompressionPlan,
    maps: FittedMaps,
    found: Activations,
    context: Any,
    path: list[_State],
) -> tuple[int, Tensor]:
    """A position from which `plan` can be replayed, the last that other plans may share, and its tokens.

    `path` holds the states of the plan before, ever more of its items in place; it becomes that of `plan`.
    """
    items = tuple(left_to_right(plan))
    fitted = tuple(maps[item] for item in items)
    while path and not _begins_with(items, fitted, path[-1]):
        path.pop()
    if not items:
        return plan.depth, found.hidden[-1]
    first = first_change(items[0])
    position, h = (path[-1].position, path[-1].h) if path else (first, found.hidden[first])
    for count in range(len(path[-1].items) + 1 if path else 1, len(items) + 1):
        last = count == len(items)
        if not last and first_change(items[count]) < end_of(items[count - 1]):
            continue  # both act in one block
        if count == 1 and isinstance(items[0], Span):
            position, h = _state_after(adapter, items[0], fitted[0], found)
        elif last:
            break
        else:
            h = advance(adapter, plan, maps, h, context, position, end_of(items[count - 1]))
            position = end_of(items[count - 1])
        path.append(_State(items[:count], fitted[:count], position, h))
    return position, h


def _begins_with(items: tuple[Span | Half, ...], fitted: tuple[FittedMap, ...], state: _State) -> bool:
    count = len(state.items)
    if items[:count] != state.items or any(a is not b for a, b in zip(fitted, state.maps)):
        return False
    return count == len(items) or first_change(items[count]) >= state.position


def _sort_key(item: Span | Half) -> tuple[int, int, str]:
    return first_change(item), end_of(item), str(item)
