# SPDX-License-Identifier: Apache-2.0
"""Plans that differ from a given one by one local swap. No torch."""

from collections.abc import Collection, Iterable, Iterator

from ..errors import InputError
from .budget import Budget, Candidate, ScoredPlan, make_plan, score_plan, usable
from .plan import CompressionPlan, Half, Span


Items = tuple[Span | Half, ...]
Swap = tuple[Items, Items]  # items that leave the plan, items that come instead


def neighbours(
    plan: CompressionPlan,
    candidates: Iterable[Candidate],
    budget: Budget,
    protected_blocks: Collection[int] = (0,),
) -> Iterator[CompressionPlan]:
    """The valid plans within the budget that are one swap away, each once, lowest predicted cost first.

    A swap moves one span by one block, makes one a block longer or shorter or both for two of them (a span may so
    vanish, or a new one of a single block appear), changes the map of one item, or exchanges one half for another.

    Raises:
        InputError: an item of the plan is not among the candidates.
    """
    candidates = list(candidates)
    score_plan(plan, candidates)
    table = {candidate.item: candidate for candidate in candidates}
    offered = [candidate.item for candidate in usable(plan.depth, candidates, budget, protected_blocks)]
    found: dict[CompressionPlan, ScoredPlan] = {}
    for leaving, coming in _swaps(plan, offered):
        items = (*(item for item in plan.items if item not in leaving), *coming)
        try:
            other = make_plan(plan.depth, items)
        except InputError:
            continue
        if other != plan and other.items and other not in found:
            scored = score_plan(other, table)
            if budget.meets(scored):
                found[other] = scored
    for scored in sorted(found.values(), key=budget.order):
        yield scored.plan


def _swaps(plan: CompressionPlan, offered: list[Span | Half]) -> Iterator[Swap]:
    spans = [item for item in offered if isinstance(item, Span)]
    longer: list[Swap] = [((), (span,)) for span in spans if span.length == 1]
    shorter: list[Swap] = []
    for span in plan.spans:
        for other in spans:
            swap = (span,), (other,)
            start, end = other.start - span.start, other.end - span.end
            if start == end == 0 or (abs(start) == 1 and start == end and _same_map(span, other)):
                yield swap
            elif (start, end) in ((-1, 0), (0, 1)) and _same_map(span, other):
                longer.append(swap)
            elif (start, end) in ((1, 0), (0, -1)) and _same_map(span, other):
                shorter.append(swap)
        if span.length == 1:
            shorter.append(((span,), ()))
    yield from longer
    yield from shorter
    for leaving, coming in longer:
        for also_leaving, also_coming in shorter:
            if leaving != also_leaving:
                yield (*leaving, *also_leaving), (*coming, *also_coming)
    for half in plan.halves:
        for item in offered:
            if isinstance(item, Half):
                yield (half,), (item,)


def _same_map(left: Span, right: Span) -> bool:
    return (left.map, left.rank) == (right.map, right.rank)
