# SPDX-License-Identifier: Apache-2.0
"""What may be replaced, what that costs and saves, and how much has to be saved. No torch."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError
from .plan import CompressionPlan, Half, Span


BUDGETS = ("blocks", "params", "macs", "seconds", "cost")
OPTIONS = {
    "blocks": "remove_blocks",
    "params": "max_params",
    "macs": "max_flops",
    "seconds": "max_latency",
    "cost": "max_cost",
}
UNITS = {
    "blocks": "blocks",
    "params": "parameters",
    "macs": "multiply-accumulates per image",
    "seconds": "seconds",
    "cost": "units of cost",
}
TOLERANCE = 1e-9  # relative; sums of floats that should be equal are not


@dataclass(frozen=True)
class Candidate:
    """One replacement that a plan may hold, its measured cost, and what choosing it saves.

    `blocks` is the number of blocks that go (0 for a half), `params` and `macs` (per image) whole numbers, `seconds`
    the time of one pass. Savings are net of what the map itself takes. A candidate whose cost is not finite is
    never used.
    """

    item: Span | Half
    cost: float
    blocks: int
    params: int
    macs: int
    seconds: float


@dataclass(frozen=True)
class Budget:
    """How much a plan has to save, or how much it may cost.

    `value` is the amount to save: exactly that many `blocks`, or at least that many `params`, `macs` or `seconds`.
    For `cost` it is the largest summed cost allowed, and the plan that saves most `macs` is wanted.

    Raises:
        InputError: an unknown kind, or a value that is not positive (for blocks: not a whole number).
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in BUDGETS:
            raise InputError(f"budget kind={self.kind!r}: one of {', '.join(BUDGETS)} is needed")
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if not number or not math.isfinite(self.value) or self.value <= 0:
            raise InputError(f"{self.option}={self.value!r}: a positive number of {UNITS[self.kind]} is needed")
        if self.kind == "blocks" and self.value != int(self.value):
            raise InputError(f"{self.option}={self.value!r}: a whole number of blocks is needed")

    @property
    def option(self) -> str:
        """The option by which a user sets this budget."""
        return OPTIONS[self.kind]

    @property
    def limit(self) -> float:
        """The largest `spent` allowed; float sums get a relative tolerance of 1e-9."""
        if self.kind == "cost":
            return self.value * (1 + TOLERANCE)
        if self.kind == "seconds":
            return -self.value * (1 - TOLERANCE)
        return -self.value

    def aim(self, amounts: "Candidate | ScoredPlan") -> float:
        """What is to be as small as possible: the cost, or minus the MACs saved under a `cost` budget."""
        return -amounts.macs if self.kind == "cost" else amounts.cost

    def spent(self, amounts: "Candidate | ScoredPlan") -> float:
        """What must not exceed `limit`: the cost under a `cost` budget, else minus what is saved."""
        if self.kind == "cost":
            return amounts.cost
        saved = {
            "blocks": amounts.blocks,
            "params": amounts.params,
            "macs": amounts.macs,
            "seconds": amounts.seconds,
        }
        return -saved[self.kind]

    def meets(self, scored: "ScoredPlan") -> bool:
        """Whether the plan keeps to the budget."""
        spent = self.spent(scored)
        return spent == self.limit if self.kind == "blocks" else spent <= self.limit

    def order(self, scored: "ScoredPlan") -> tuple[float, float]:
        """Sort key, best first: the aim, and among equals what is spent."""
        return self.aim(scored), self.spent(scored)


@dataclass(frozen=True)
class ScoredPlan:
    """A plan with the sums over its items: predicted cost, and what is saved (blocks, params, macs, seconds)."""

    plan: CompressionPlan
    predicted_cost: float
    blocks: int
    params: int
    macs: int
    seconds: float

    @property
    def cost(self) -> float:
        """The predicted cost, by the name that a candidate has for it."""
        return self.predicted_cost


def blocks_as_macs(depth: int, candidates: Iterable[Candidate], budget: Budget) -> Budget:
    """The MACs that removing so many whole blocks saves, by fold where folds are offered: a budget for halves too.

    Raises:
        InputError: so many blocks cannot be removed.
    """
    single = [entry.macs for entry in candidates if isinstance(entry.item, Span) and entry.blocks == 1]
    if budget.value >= depth or not single:
        raise InputError(f"--remove_blocks {budget.value}: at most {depth - 1} of {depth} blocks can be removed")
    return Budget("macs", int(budget.value) * max(single))


def make_plan(depth: int, items: Iterable[Span | Half]) -> CompressionPlan:
    """The plan of these items, in any order.

    Raises:
        InputError: the items do not go together.
    """
    items = tuple(items)
    spans = tuple(item for item in items if isinstance(item, Span))
    return CompressionPlan(depth, spans, tuple(item for item in items if isinstance(item, Half)))


def usable(
    depth: int, candidates: Iterable[Candidate], budget: Budget, protected_blocks: Collection[int]
) -> list[Candidate]:
    """The candidates that a plan within this budget may hold, in a fixed order.

    Left out are those of a cost that is not finite, those that remove a protected block or replace a half of it, a
    span over the whole model, and under a `blocks` budget the halves, which remove no block.

    Raises:
        InputError: a candidate lies outside the model, or two are for the same item.
    """
    kept: dict[Span | Half, Candidate] = {}
    for candidate in candidates:
        item = candidate.item
        first, last = (item.start, item.end - 1) if isinstance(item, Span) else (item.block, item.block)
        if last >= depth:
            raise InputError(f"candidates: {item} lies outside a model of {depth} blocks")
        if item in kept:
            raise InputError(f"candidates: {item} is given twice: give each item once")
        if not math.isfinite(candidate.cost) or any(first <= block <= last for block in protected_blocks):
            continue
        if last - first + 1 == depth and isinstance(item, Span):
            continue
        if budget.kind == "blocks" and isinstance(item, Half):
            continue
        kept[item] = candidate
    return sorted(kept.values(), key=lambda candidate: item_order(candidate.item))


def item_order(item: Span | Half) -> tuple:
    """Sort key that puts spans before halves, each by its fields."""
    if isinstance(item, Span):
        return 0, item.start, item.end, item.map, item.rank or 0
    return 1, item.block, item.half, item.map, 0


def score_plan(plan: CompressionPlan, candidates: Sequence[Candidate] | Mapping[Span | Half, Candidate]) -> ScoredPlan:
    """Sums cost and savings of a plan's items. A mapping from item to candidate spares building one each time.

    Raises:
        InputError: an item of the plan is not among the candidates.
    """
    table = candidates if isinstance(candidates, Mapping) else {entry.item: entry for entry in candidates}
    for item in plan.items:
        if item not in table:
            raise InputError(f"plan: {item} is not among the candidates that were measured")
    chosen = [table[item] for item in plan.items]
    return ScoredPlan(
        plan,
        predicted_cost=math.fsum(entry.cost for entry in chosen),
        blocks=sum(entry.blocks for entry in chosen),
        params=sum(entry.params for entry in chosen),
        macs=sum(entry.macs for entry in chosen),
        seconds=math.fsum(entry.seconds for entry in chosen),
    )
