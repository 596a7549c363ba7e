# SPDX-License-Identifier: Apache-2.0
"""From the cost of every candidate and a budget to the plans worth trying. Pure Python, no torch.

Costs of single replacements are taken to add up, which ranks plans well but not perfectly: the best plans are there
to be measured for real (`rba.search`).
"""

import math
from collections.abc import Collection, Iterable, Mapping

from ..errors import InputError
from .budget import UNITS, Budget, Candidate, ScoredPlan, make_plan, score_plan, usable
from .plan import CompressionPlan, Span
from .planner_dp import Graph, best_paths, build_graph, reachable_sums, smallest_spent
from .swaps import neighbours


__all__ = [
    "Budget",
    "Candidate",
    "ScoredPlan",
    "best_plans",
    "br_plan",
    "check_budget",
    "contiguous_plans",
    "neighbours",
    "score_plan",
]

STRATEGIES = ("contiguous", "greedy")


def best_plans(
    depth: int,
    candidates: Iterable[Candidate],
    budget: Budget,
    k: int = 10,
    protected_blocks: Collection[int] = (0,),
) -> list[ScoredPlan]:
    """The k best plans within the budget by summed cost, best first; exact, by dynamic programming.

    Best is the cheapest plan that saves enough, and under a `cost` budget the one that saves most MACs. Under a
    `blocks` budget exactly that many blocks go and halves, which remove none, are left out. A candidate that removes
    a protected block or replaces a half of it is not used; folding into it is fine.

    Raises:
        InputError: the budget cannot be met, or the candidates do not fit the model.
    """
    if k < 1:
        raise InputError(f"k={k!r}: at least one plan must be asked for")
    candidates = usable(depth, candidates, budget, protected_blocks)
    graph = _graph(depth, candidates, budget)
    _check_reachable(graph, candidates, budget)
    table = {candidate.item: candidate for candidate in candidates}
    wanted = k + 1 if budget.kind == "cost" else k  # the empty plan keeps to any cost budget, but is no answer
    paths = [items for items in best_paths(graph, budget.limit, wanted, budget.kind == "blocks") if items][:k]
    return sorted((score_plan(make_plan(depth, items), table) for items in paths), key=budget.order)


def contiguous_plans(
    depth: int,
    candidates: Iterable[Candidate],
    budget: Budget,
    protected_blocks: Collection[int] = (0,),
) -> list[ScoredPlan]:
    """For every kind of map the best plan of one span, best kind first; none for a kind that cannot meet the budget.

    It is the cheapest of the shortest spans that save enough (`blocks`: of exactly that length), and under a `cost`
    budget the span that saves most MACs.
    """
    best: dict[str, tuple[tuple[float, ...], ScoredPlan]] = {}
    for candidate in usable(depth, candidates, budget, protected_blocks):
        item = candidate.item
        if not isinstance(item, Span):
            continue
        scored = score_plan(CompressionPlan(depth, (item,)), {item: candidate})
        order = budget.order(scored) if budget.kind == "cost" else (item.length, *budget.order(scored))
        if budget.meets(scored) and (item.map not in best or order < best[item.map][0]):
            best[item.map] = order, scored
    return sorted((scored for _, scored in best.values()), key=budget.order)


def check_budget(
    depth: int,
    candidates: Iterable[Candidate],
    budget: Budget,
    protected_blocks: Collection[int] = (0,),
) -> None:
    """Makes sure that some plan meets the budget; costs only need to be finite, so it can be called before measuring.

    Raises:
        InputError: none does; the message names what was asked and the most that is possible.
    """
    candidates = usable(depth, candidates, budget, protected_blocks)
    _check_reachable(_graph(depth, candidates, budget), candidates, budget)


def br_plan(
    depth: int,
    br: Mapping[tuple[int, int], float],
    blocks: int,
    strategy: str = "contiguous",
    map: str = "linear",
    first_block: bool = False,
    rank: int | None = None,
) -> CompressionPlan:
    """The papers' own selection, by block redundancy alone (RBA and TBA, arXiv 2410.04941).

    Args:
        br: block redundancy of each span (i, j), larger is more redundant; values that are not finite are not used.
        blocks: how many blocks go.
        strategy: "contiguous" takes the span of that length with the highest value; "greedy" again and again the best
            single block that neither overlaps nor touches one taken before.
        map: what stands in for the blocks, with `rank` for low_rank.
        first_block: whether block 0 may go.

    Raises:
        InputError: an unknown strategy, or so many blocks cannot go in this way.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy={strategy!r}: one of {', '.join(STRATEGIES)} is needed")
    Budget("blocks", blocks)
    length = blocks if strategy == "contiguous" else 1
    first = 0 if first_block and map != "fold" else 1
    spans = [
        (i, j)
        for (i, j), value in br.items()
        if j - i == length < depth and first <= i and j <= depth and math.isfinite(value)
    ]
    chosen: list[tuple[int, int]] = []
    for i, j in sorted(spans, key=lambda span: (-br[span], span)):
        if len(chosen) * length < blocks and all(j < start or end < i for start, end in chosen):
            chosen.append((i, j))
    if len(chosen) * length < blocks:
        raise InputError(
            f"remove_blocks={blocks}: the {strategy} choice by block redundancy finds only {len(chosen) * length} of "
            f"{depth} blocks to remove: ask for fewer"
        )
    return CompressionPlan(depth, tuple(Span(i, j, map, rank) for i, j in chosen))


def _graph(depth: int, candidates: Iterable[Candidate], budget: Budget) -> Graph:
    return build_graph(depth, [(entry.item, budget.aim(entry), budget.spent(entry)) for entry in candidates])


def _check_reachable(graph: Graph, candidates: list[Candidate], budget: Budget) -> None:
    if budget.kind == "cost":
        cheapest = min((candidate.cost for candidate in candidates), default=math.inf)
        if cheapest > budget.limit:
            raise InputError(
                f"{budget.option}={budget.value:g}: the cheapest of {len(candidates)} replacements costs "
                f"{cheapest:g}: allow at least that"
            )
        return
    if budget.kind == "blocks":
        sums = {-spent for spent in reachable_sums(graph)}
        if budget.value not in sums:
            possible = ", ".join(str(count) for count in sorted(sums - {0})) or "none"
            raise InputError(
                f"{budget.option}={budget.value}: at most {max(sums)} of {graph.depth} blocks can be removed "
                f"(possible: {possible})"
            )
        return
    most = -smallest_spent(graph)
    if -most > budget.limit:
        raise InputError(
            f"{budget.option}: {_number(budget.value)} {UNITS[budget.kind]} would have to be saved, "
            f"but at most {_number(most)} can be"
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"
