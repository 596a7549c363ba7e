# SPDX-License-Identifier: Apache-2.0
"""From an analysis and a budget to one plan: planned from single costs, measured for real, improved by swaps."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from ..errors import InputError
from ..evaluation.model_cost import PieceCosts, gains
from .analysis import Analysis
from .budget import OPTIONS, blocks_as_macs, usable
from .candidates import GRANULARITIES, TRAINED_MAPS, closed_form_kinds
from .choice import Choice, MeasuredPlan, measure_choice, measured_row, network_pieces
from .finalists import FINALISTS, pooled_costs
from .measure import measure_plans
from .plan import CompressionPlan, Half, Span
from .plan_maps import plan_maps
from .planner import Budget, Candidate, ScoredPlan, best_plans, br_plan, contiguous_plans, neighbours, score_plan


STRATEGIES = ("measured", "br-contiguous", "br-greedy")
SWAP_EVALUATIONS = 40
_SWAPS_AT_ONCE = 10
_HOPELESS = 1.5  # a swap predicted to cost this many times the plan it would change is not run
_COST_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)  # of a cost budget, planned with until a plan keeps to it for real


def plan_candidates(
    analysis: Analysis, pieces: PieceCosts, kinds: Sequence[str] | None = None, granularity: str | None = None
) -> list[Candidate]:
    """What the planner may choose from: everything measured, of the wanted kinds, with cost and savings.

    `kinds` and `granularity` are those of the analysis if left out. A trained kind has the cost of "linear" and its
    own savings.
    """
    settings = analysis.report.settings
    kinds = tuple(kinds or settings["kinds"])
    granularity = granularity or settings["granularity"]
    if granularity not in GRANULARITIES or (granularity == "half" and settings["granularity"] != "half"):
        raise InputError(f"--granularity {granularity}: the analysis measured {settings['granularity']}")
    for kind in closed_form_kinds(kinds):
        if kind not in settings["kinds"]:
            raise InputError(f"--map {kind}: the analysis measured only {', '.join(settings['kinds'])}")
    found = []
    for item, measured in analysis.costs.items():
        for offered in _offered(item, kinds, granularity):
            saved = gains(offered, pieces)
            found.append(Candidate(offered, measured.cost, saved.blocks, saved.params, saved.macs, saved.seconds))
    return found


def choose(
    analysis: Analysis,
    budget: Budget,
    *,
    kinds: Sequence[str] | None = None,
    granularity: str | None = None,
    k: int = 10,
    strategy: str = "measured",
    refine: bool = True,
    pieces: PieceCosts | None = None,
    br_tokens: str = "all",
    seed: int = 0,
) -> Choice:
    """The best plan within a budget.

    "measured": the k plans with the least summed cost, of all kinds and of each kind alone, and the best single span
    of each kind, are run on the whole selection set; the best of them is then improved by local swaps, of which at
    most the 40 most promising are run. The cheapest few are compared once more on all calibration images, none with a
    map that was fitted on it (see `pooled_costs`). With granularity "half" the search over whole blocks is part of it,
    so the result is never worse on these images; a budget in blocks then means the MACs that folding away as many
    blocks would save. Under a cost budget the plan that saves most MACs is wanted, and its cost is the one measured
    for the plan as a whole.

    "br-contiguous", "br-greedy": the papers' choice by block redundancy (arXiv 2410.04941) of `br_tokens` ("all" or
    "cls"), for a budget in blocks and one kind of map.

    Args:
        kinds, granularity: of the analysis, if left out.
        pieces: from `network_pieces`, which is called if left out.
        seed: of trained maps.

    Raises:
        InputError: bad options, or a budget that cannot be met; the message says what is possible.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy {strategy}: one of {', '.join(STRATEGIES)} is accepted")
    kinds = tuple(kinds or analysis.report.settings["kinds"])
    granularity = granularity or analysis.report.settings["granularity"]
    pieces = pieces or network_pieces(analysis)
    candidates = plan_candidates(analysis, pieces, kinds, granularity)
    if strategy != "measured":
        plan = _br_choice(analysis, budget, strategy, kinds, br_tokens)
        return measure_choice(analysis, plan, pieces=pieces, source=strategy, seed=seed)
    if granularity == "half" and budget.kind == "blocks":
        budget = blocks_as_macs(analysis.adapter.depth, candidates, budget)
    search = _Search(analysis, budget, candidates, k, SWAP_EVALUATIONS if refine else 0)
    blocks_only = [candidate for candidate in candidates if isinstance(candidate.item, Span)]
    if granularity == "half":
        search.run(blocks_only, optional=True)
        search.settle()
    search.run(candidates)
    search.settle()
    return _with_trained_maps(analysis, search, pieces, seed)


class _Search:
    """Plans measured so far, each once, and the best of them."""

    def __init__(
        self, analysis: Analysis, budget: Budget, candidates: Sequence[Candidate], k: int, swaps: int
    ) -> None:
        self.analysis, self.budget, self.k, self.swaps = analysis, budget, k, swaps
        self.depth = analysis.adapter.depth
        self.protected = () if analysis.report.settings["first_block"] else (0,)
        self.table: dict[CompressionPlan, MeasuredPlan] = {}
        self.by_item = {candidate.item: candidate for candidate in candidates}
        # until a trained map is trained, the linear one stands in for it
        self.maps = {item: analysis.maps[_stand_in(item)] for item in self.by_item}

    def run(self, candidates: Sequence[Candidate], optional: bool = False) -> None:
        """Plan with `candidates`, measure, improve. `optional`: that no plan meets the budget is no error."""
        try:
            self._start(candidates)
        except InputError:
            if not optional:
                raise
            return
        if self.best() is not None:
            self._improve(candidates)

    def best(self) -> MeasuredPlan | None:
        """The best plan that keeps to the budget, None without one: a finalist, once there are finalists."""
        allowed = list(filter(self._allowed, self.table.values()))
        finalists = [entry for entry in allowed if entry.pooled_cost is not None]
        return min(finalists or allowed, key=self._final_order, default=None)

    def settle(self) -> None:
        """Measure the cheapest plans on all calibration images."""
        allowed = sorted(filter(self._allowed, self.table.values()), key=self._order)[:FINALISTS]
        fresh = [entry for entry in allowed if entry.pooled_cost is None]
        stand_ins = {item: _stand_in(item) for item in self.maps}
        for entry, cost in zip(fresh, pooled_costs(self.analysis, fresh, stand_ins) or ()):
            self.table[entry.plan] = replace(entry, pooled_cost=cost)

    def _start(self, candidates: Sequence[Candidate]) -> None:
        budget = self.budget
        for share in _COST_SHARES if budget.kind == "cost" else (1.0,):
            planned = replace(budget, value=budget.value * share) if budget.kind == "cost" else budget
            try:
                found = best_plans(self.depth, candidates, planned, self.k, self.protected)
            except InputError:
                if share == 1.0:
                    raise
                break
            sources = dict.fromkeys((*found, *self._of_each_kind(candidates, planned)), "planned")
            for scored in contiguous_plans(self.depth, candidates, planned, self.protected):
                sources.setdefault(scored, "contiguous")
            self._measure(sources)
            if self.best() is not None:
                return
        least = min(entry.cost for entry in self.table.values())
        raise InputError(
            f"--{OPTIONS[budget.kind]} {budget.value:g}: the cheapest of {len(self.table)} plans that were run costs "
            f"{least:.3g}; allow at least that"
        )

    def _of_each_kind(self, candidates: Sequence[Candidate], budget: Budget) -> list[ScoredPlan]:
        """The best plans with one kind of span only: sums of costs are too coarse to rank them among mixed plans."""
        kinds = {entry.item.map for entry in candidates if isinstance(entry.item, Span)}
        found = []
        for kind in sorted(kinds) if len(kinds) > 1 else ():
            alone = [entry for entry in candidates if isinstance(entry.item, Half) or entry.item.map == kind]
            try:
                found += best_plans(self.depth, alone, budget, self.k, self.protected)
            except InputError:
                continue  # this kind alone cannot meet the budget
        return found

    def _improve(self, candidates: Sequence[Candidate]) -> None:
        """Greedy local swaps, lowest predicted cost first, until none is better or enough were run."""
        left = self.swaps
        offered = usable(self.depth, candidates, self.budget, self.protected)
        items = {candidate.item for candidate in offered}
        current = min(
            (entry for entry in self.table.values() if self._allowed(entry) and items.issuperset(entry.plan.items)),
            key=self._order,
            default=None,
        )
        while left > 0 and current is not None:
            fresh = (scored for scored in self._swaps(current, candidates) if scored.plan not in self.table)
            batch = list(islice(fresh, min(left, _SWAPS_AT_ONCE)))
            if not batch:
                return
            self._measure(dict.fromkeys(batch, "swap"))
            left -= len(batch)
            rows = [self.table[scored.plan] for scored in batch]
            better = min(filter(self._allowed, rows), key=self._order, default=None)
            if better is not None and self._order(better) < self._order(current):
                current = better

    def _swaps(self, current: MeasuredPlan, candidates: Sequence[Candidate]) -> Iterator[ScoredPlan]:
        """Neighbours of a plan that keep to the budget and are worth running, most promising first."""
        most = math.inf if self.budget.kind == "cost" else _HOPELESS * current.predicted_cost
        for plan in neighbours(current.plan, candidates, self.budget, self.protected):
            scored = score_plan(plan, self.by_item)
            if scored.predicted_cost <= most:
                yield scored

    def _measure(self, sources: Mapping[ScoredPlan, str]) -> None:
        fresh = list({scored.plan: scored for scored in sources if scored.plan not in self.table}.values())
        if not fresh:
            return
        runs = [(scored.plan, self.maps) for scored in fresh]
        results = measure_plans(self.analysis.bench, runs, self.analysis.images.select, "plans")
        for scored, result in zip(fresh, results):
            row = measured_row(scored, result.cost, result.relative_error, sources[scored])
            self.table[scored.plan] = row

    def _allowed(self, entry: MeasuredPlan) -> bool:
        # the planner has seen to all budgets but that of cost, which only measuring can tell
        return math.isfinite(entry.cost) and (self.budget.kind != "cost" or entry.cost <= self.budget.limit)

    def _order(self, entry: MeasuredPlan) -> tuple[float, float]:
        return (-entry.macs, entry.cost) if self.budget.kind == "cost" else (entry.cost, -entry.macs)

    def _final_order(self, entry: MeasuredPlan) -> tuple[float, float]:
        cost = entry.cost if entry.pooled_cost is None else entry.pooled_cost
        return (-entry.macs, cost) if self.budget.kind == "cost" else (cost, -entry.macs)


def _offered(item: Span | Half, kinds: Sequence[str], granularity: str) -> list[Span | Half]:
    if isinstance(item, Half):
        return [item] if granularity == "half" else []
    own: list[Span | Half] = [item] if item.map in kinds else []
    return own + [Span(item.start, item.end, kind) for kind in TRAINED_MAPS if item.map == "linear" and kind in kinds]


def _stand_in(item: Span | Half) -> Span | Half:
    if isinstance(item, Span) and item.map in TRAINED_MAPS:
        return Span(item.start, item.end, "linear")
    return item


def _br_choice(
    analysis: Analysis, budget: Budget, strategy: str, kinds: Sequence[str], tokens: str
) -> CompressionPlan:
    if budget.kind != "blocks":
        raise InputError(f"--strategy {strategy}: it removes a number of blocks, give --remove_blocks")
    if len(kinds) != 1:
        raise InputError(f"--strategy {strategy}: it takes one kind of map, not {', '.join(kinds)}")
    if tokens not in ("all", "cls"):
        raise InputError(f"br_tokens={tokens!r}: all or cls is accepted")
    redundancy: Callable = (lambda span: span.br_cls) if tokens == "cls" else (lambda span: span.br_all)
    settings = analysis.report.settings
    return br_plan(
        analysis.adapter.depth,
        {(span.start, span.end): redundancy(span) for span in analysis.report.spans},
        int(budget.value),
        strategy.removeprefix("br-"),
        kinds[0],
        settings["first_block"],
        settings["rank"] if kinds[0] == "low_rank" else None,
    )


def _with_trained_maps(analysis: Analysis, search: _Search, pieces: PieceCosts, seed: int) -> Choice:
    best = search.best()
    assert best is not None  # a search that finds no plan has raised
    table = sorted(search.table.values(), key=lambda entry: (entry != best, entry.cost, entry.predicted_cost))
    maps = {item: search.maps[item] for item in best.plan.items}
    if any(item.map in TRAINED_MAPS for item in best.plan.items):
        maps = plan_maps(analysis, best.plan, seed)
        trained = measure_choice(analysis, best.plan, maps, pieces=pieces, source="trained").measured
        best = replace(trained, predicted_cost=best.predicted_cost)  # without a pooled cost, which was the stand-in's
        table = [best, *table]
    return Choice(best.plan, maps, best, tuple(table))
