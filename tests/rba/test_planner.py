# SPDX-License-Identifier: Apache-2.0
"""The planner against enumeration of every plan, and the papers' own selection."""

import functools
import itertools
import math
import random
import time

import pytest

from hf_simprune.errors import InputError
from hf_simprune.rba.plan import HALF_MAPS, HALVES, CompressionPlan, Half, Span
from hf_simprune.rba.planner import (
    Budget,
    Candidate,
    best_plans,
    br_plan,
    check_budget,
    contiguous_plans,
    neighbours,
    score_plan,
)


KINDS = ("blocks", "params", "macs", "seconds", "cost")
MAPS = ("fold", "linear")


def all_items(depth, granularity, max_span=3, first=1):
    """Every item that may be offered; `first` is the first block that may go."""
    items = [
        Span(start, end, kind)
        for start in range(first, depth)
        for end in range(start + 1, min(depth, start + max_span) + 1)
        for kind in MAPS
        if start > 0 or kind != "fold"
    ]
    if granularity == "half":
        items += [Half(b, half, kind) for b in range(first, depth) for half in HALVES for kind in HALF_MAPS]
    return items


@functools.cache
def all_plans(depth, granularity, max_span=3, first=1):
    """Every valid plan of at least one item, by recursion over blocks and the rules in words."""
    items = all_items(depth, granularity, max_span, first)
    plans = []

    def extend(block, chosen, touches, mlp_kept):
        if block == depth:
            if chosen and sum(item.length for item in chosen if isinstance(item, Span)) < depth:
                plans.append(chosen)
            return
        for item in items:
            if isinstance(item, Span) and item.start == block and not touches and (mlp_kept or item.map != "fold"):
                extend(item.end, (*chosen, item), True, False)
        here = [item for item in items if isinstance(item, Half) and item.block == block]
        for attention in (None, *(item for item in here if item.half == "attention")):
            for mlp in (None, *(item for item in here if item.half == "mlp")):
                more = tuple(item for item in (attention, mlp) if item is not None)
                extend(block + 1, chosen + more, False, mlp is None)

    extend(0, (), False, False)
    assert len({frozenset(plan) for plan in plans}) == len(plans)
    return plans


def random_candidates(items, seed):
    """A table whose character changes with the seed: ties, costs that are not finite, savings or costs below zero."""
    draw = random.Random(seed)
    below_zero, ties, missing = seed % 3 == 2, seed % 4 == 1, seed % 5 == 3
    table = []
    for item in items:
        size = item.length if isinstance(item, Span) else 0.5
        cost = draw.randint(1, 4) / 4 if ties else size * draw.uniform(0.05, 1.0)
        saved = int(1000 * size) - (150 if item.map == "linear" else 0)
        if below_zero:
            cost, saved = cost - 0.25, saved - draw.randint(0, 900)
        if missing and draw.random() < 0.2:
            cost = draw.choice([math.inf, math.nan])
        seconds = size * draw.uniform(-0.1 if below_zero else 0.5, 1.0)
        blocks = item.length if isinstance(item, Span) else 0
        table.append(Candidate(item, cost, blocks, saved, 1000 * saved + draw.randint(0, 50) * 100, seconds))
    draw.shuffle(table)
    return table


def totals(plan, table):
    """(cost, blocks, params, macs, seconds) of a tuple of items."""
    entries = [table[item] for item in plan]
    fields = ("cost", "blocks", "params", "macs", "seconds")
    return dict(zip(fields, (math.fsum(getattr(entry, field) for entry in entries) for field in fields)))


def expected(plans, table, budget, k):
    """(what is minimised, what breaks ties) of the k best plans by enumeration."""
    orders = []
    for plan in plans:
        if not all(math.isfinite(table[item].cost) for item in plan):
            continue
        sums = totals(plan, table)
        if budget.kind == "cost":
            if sums["cost"] <= budget.value + 1e-9:
                orders.append((-sums["macs"], sums["cost"]))
        elif budget.kind == "blocks":
            if sums["blocks"] == budget.value and all(isinstance(item, Span) for item in plan):
                orders.append((sums["cost"], -sums["blocks"]))
        elif sums[budget.kind] >= budget.value - 1e-9:
            orders.append((sums["cost"], -sums[budget.kind]))
    return sorted(orders)[:k]


def random_budget(kind, table, draw):
    if kind == "blocks":
        return Budget("blocks", draw.randint(1, 3))
    if kind == "cost":
        finite = [entry.cost for entry in table.values() if math.isfinite(entry.cost)]
        return Budget("cost", max(min(finite), 0.01) + draw.uniform(0, 1.5))
    one = max(totals((item,), table)[kind] for item in table)
    return Budget(kind, abs(one) * draw.uniform(0.2, 1.2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("depth", "granularity", "first"), [(7, "block", 1), (5, "block", 0), (4, "half", 1), (3, "half", 0)]
)
def test_the_k_best_plans_are_those_of_enumeration(depth, granularity, first, kind):
    plans = all_plans(depth, granularity, first=first)
    protected = (0,) if first else ()
    compared = 0
    for seed in range(24):
        candidates = random_candidates(all_items(depth, granularity, first=first), seed)
        table = {entry.item: entry for entry in candidates}
        draw = random.Random(1000 + seed)
        budget = random_budget(kind, table, draw)
        k = draw.choice([1, 3, 10, 40])
        wanted = expected(plans, table, budget, k)
        if not wanted:
            with pytest.raises(InputError, match=budget.option):
                best_plans(depth, candidates, budget, k, protected)
            continue
        found = best_plans(depth, candidates, budget, k, protected)
        assert len({scored.plan for scored in found}) == len(found)
        orders = []
        for scored in found:
            sums = totals(scored.plan.items, table)
            amounts = (scored.predicted_cost, scored.blocks, scored.params, scored.macs, scored.seconds)
            assert amounts == pytest.approx(tuple(sums.values()))
            orders.append((-sums["macs"], sums["cost"]) if kind == "cost" else (sums["cost"], -sums[kind]))
        assert orders == [pytest.approx(order, abs=1e-9) for order in wanted]
        compared += len(found)
    assert compared > 20


def test_half_blocks_contain_every_block_plan():
    candidates = random_candidates(all_items(4, "half"), 0)
    spans = [entry for entry in candidates if isinstance(entry.item, Span)]
    budget = Budget("macs", 1_500_000)
    assert best_plans(4, candidates, budget)[0].predicted_cost <= best_plans(4, spans, budget)[0].predicted_cost


def test_the_order_of_candidates_does_not_matter():
    candidates = random_candidates(all_items(5, "block"), 1)
    for kind, value in (("blocks", 2), ("params", 1500), ("cost", 0.8)):
        once = best_plans(5, candidates, Budget(kind, value))
        assert best_plans(5, candidates[::-1], Budget(kind, value)) == once


def test_block_0_goes_only_when_asked():
    candidates = [
        Candidate(Span(0, 1, "linear"), 0.1, 1, 10, 10, 1.0),
        Candidate(Span(1, 2), 0.5, 1, 10, 10, 1.0),
        Candidate(Half(0, "mlp", "const"), 0.01, 0, 10, 10, 1.0),
    ]
    assert [entry.plan.spans for entry in best_plans(3, candidates, Budget("blocks", 1))] == [(Span(1, 2),)]
    asked = best_plans(3, candidates, Budget("blocks", 1), protected_blocks=())
    assert [entry.plan.spans for entry in asked] == [(Span(0, 1, "linear"),), (Span(1, 2),)]
    assert [entry.plan.items for entry in best_plans(3, candidates, Budget("macs", 10))] == [(Span(1, 2),)]


def test_spans_stay_apart_even_where_touching_would_be_cheapest():
    candidates = [Candidate(Span(b, b + 1), 0.1 + (b > 2), 1, 1, 1, 1.0) for b in range(1, 6)]
    best = best_plans(6, candidates, Budget("blocks", 2))[0]
    assert best.plan.spans == (Span(1, 2), Span(3, 4))
    assert best.predicted_cost == pytest.approx(1.2)


def test_contiguous_plans_are_the_best_single_spans():
    for seed in range(12):
        candidates = random_candidates(all_items(7, "block"), seed)
        finite = [entry for entry in candidates if math.isfinite(entry.cost)]
        blocks = contiguous_plans(7, candidates, Budget("blocks", 2))
        for scored in blocks:
            (span,) = scored.plan.spans
            rivals = [entry.cost for entry in finite if entry.blocks == 2 and entry.item.map == span.map]
            assert scored.predicted_cost == min(rivals)
        assert sorted(scored.plan.spans[0].map for scored in blocks) == sorted(MAPS)
        assert blocks == sorted(blocks, key=lambda scored: scored.predicted_cost)
        for scored in contiguous_plans(7, candidates, Budget("params", 900)):
            (span,) = scored.plan.spans
            enough = [entry for entry in finite if entry.params >= 900 and entry.item.map == span.map]
            shortest = min(entry.blocks for entry in enough)
            assert scored.predicted_cost == min(entry.cost for entry in enough if entry.blocks == shortest)
        for scored in contiguous_plans(7, candidates, Budget("cost", 0.9)):
            (span,) = scored.plan.spans
            allowed = [entry.macs for entry in finite if entry.cost <= 0.9 and entry.item.map == span.map]
            assert scored.macs == max(allowed)
    assert contiguous_plans(7, candidates, Budget("blocks", 5)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("depth", "granularity"), [(7, "block"), (4, "half")])
def test_neighbours_are_valid_new_and_within_the_budget(kind, depth, granularity):
    plans = {frozenset(plan) for plan in all_plans(depth, granularity)}
    checked = 0
    for seed in (0, 1, 3, 4, 6, 7):
        candidates = random_candidates(all_items(depth, granularity), seed)
        table = {entry.item: entry for entry in candidates}
        budget = random_budget(kind, table, random.Random(seed))
        if not expected(all_plans(depth, granularity), table, budget, 1):
            continue
        for plan in [scored.plan for scored in best_plans(depth, candidates, budget, 3)]:
            found = list(neighbours(plan, candidates, budget))
            assert plan not in found and len(set(found)) == len(found)
            aims = []
            for other in found:
                assert frozenset(other.items) in plans
                sums = totals(other.items, table)
                assert math.isfinite(sums["cost"])
                if kind == "blocks":
                    assert sums["blocks"] == budget.value
                elif kind == "cost":
                    assert sums["cost"] <= budget.value * (1 + 1e-8)
                else:
                    assert sums[kind] >= budget.value * (1 - 1e-8)
                aims.append(-sums["macs"] if kind == "cost" else sums["cost"])
            assert aims == sorted(aims)
            checked += len(found)
    assert checked > 10


def uniform(items):
    return [Candidate(item, 1.0, item.length if isinstance(item, Span) else 0, 10, 10, 1.0) for item in items]


def test_neighbours_of_two_spans_are_just_the_local_swaps():
    candidates = uniform([item for item in all_items(8, "block") if item.map == "fold"])
    plan = CompressionPlan(8, (Span(2, 3), Span(5, 7)))
    found = {other.spans for other in neighbours(plan, candidates, Budget("blocks", 3))}
    assert found == {
        # one moved by one block
        (Span(1, 2), Span(5, 7)),
        (Span(3, 4), Span(5, 7)),
        (Span(2, 3), Span(4, 6)),
        (Span(2, 3), Span(6, 8)),
        # one longer, one shorter
        (Span(1, 3), Span(5, 6)),
        (Span(1, 3), Span(6, 7)),
        (Span(2, 4), Span(5, 6)),
        (Span(2, 4), Span(6, 7)),
        # one longer, one gone
        (Span(4, 7),),
        (Span(5, 8),),
        # one gone, a new one
        (Span(1, 2), Span(5, 7)),
        (Span(3, 4), Span(5, 7)),
        # one shorter, a new one
        (Span(2, 3), Span(4, 5), Span(6, 7)),
        (Span(2, 3), Span(5, 6), Span(7, 8)),
    }


def test_neighbours_change_maps_and_exchange_halves():
    items = [
        Span(2, 3),
        Span(2, 3, "linear"),
        Half(1, "mlp", "const"),
        Half(1, "mlp", "linear"),
        Half(3, "mlp", "const"),
    ]
    candidates = uniform(items)
    plan = CompressionPlan(5, (Span(2, 3, "linear"),), (Half(1, "mlp", "const"),))
    found = {other.items for other in neighbours(plan, candidates, Budget("macs", 20))}
    assert found == {
        (Span(2, 3, "linear"), Half(1, "mlp", "linear")),
        (Span(2, 3, "linear"), Half(3, "mlp", "const")),
    }  # a fold would go into the MLP that is replaced
    found = {other.items for other in neighbours(CompressionPlan(5, (Span(2, 3),)), candidates, Budget("macs", 10))}
    assert found == {(Span(2, 3, "linear"),)}


def test_a_plan_with_items_that_were_not_measured_has_no_neighbours():
    with pytest.raises(InputError, match="fold 3→4 is not among the candidates"):
        list(neighbours(CompressionPlan(6, (Span(3, 4),)), uniform([Span(1, 2)]), Budget("blocks", 1)))
    with pytest.raises(InputError, match="fold 3→4 is not among the candidates"):
        score_plan(CompressionPlan(6, (Span(3, 4),)), uniform([Span(1, 2)]))


def random_br(depth, seed):
    draw = random.Random(seed)
    return {(i, j): -draw.random() * (j - i) for i in range(depth) for j in range(i + 1, depth + 1)}


@pytest.mark.parametrize("seed", range(5))
def test_contiguous_br_takes_the_span_of_highest_redundancy(seed):
    br = random_br(8, seed)
    for blocks in (1, 2, 4):
        best = max((span for span in br if span[1] - span[0] == blocks and span[0] >= 1), key=br.get)
        assert br_plan(8, br, blocks).spans == (Span(*best, "linear"),)
        best = max((span for span in br if span[1] - span[0] == blocks), key=br.get)
        assert br_plan(8, br, blocks, first_block=True).spans == (Span(*best, "linear"),)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_br_takes_single_blocks_that_do_not_touch(seed):
    br = random_br(12, seed)
    free, wanted = set(range(1, 12)), []
    for blocks in range(1, 5):
        best = max(free, key=lambda block: br[block, block + 1])
        wanted.append(Span(best, best + 1, "fold"))
        free -= {best - 1, best, best + 1}
        assert br_plan(12, br, blocks, strategy="greedy", map="fold").spans == tuple(sorted(wanted))
        if not free:
            break


def test_br_plan_leaves_out_what_is_unknown_and_says_what_it_cannot_do():
    br = {**random_br(6, 0), (2, 3): math.nan, (0, 1): 1.0}
    assert Span(2, 3) not in br_plan(6, br, 2, "greedy", "fold").spans
    assert br_plan(6, br, 1, first_block=True).spans == (Span(0, 1, "linear"),)
    assert br_plan(6, br, 1, map="fold", first_block=True).spans[0].start >= 1
    assert br_plan(6, br, 2, map="low_rank", rank=8).spans[0].rank == 8
    with pytest.raises(InputError, match="strategy='random': one of contiguous, greedy"):
        br_plan(6, br, 1, "random")
    with pytest.raises(InputError, match="remove_blocks=6: the contiguous .* only 0 of 6"):
        br_plan(6, br, 6, first_block=True)
    with pytest.raises(InputError, match="remove_blocks=5: the greedy .* ask for fewer"):
        br_plan(6, br, 5, "greedy")
    with pytest.raises(InputError, match="remove_blocks=0"):
        br_plan(6, br, 0)
    with pytest.raises(InputError, match="one of fold, linear"):
        br_plan(6, br, 1, map="cubic")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("layers", 1, "budget kind='layers': one of blocks, params"),
        ("blocks", 1.5, "remove_blocks=1.5: a whole number"),
        ("blocks", 0, "remove_blocks=0: a positive number of blocks"),
        ("params", -3, "max_params=-3"),
        ("macs", math.nan, "max_flops=nan"),
        ("seconds", math.inf, "max_latency=inf"),
        ("cost", "1", "max_cost='1'"),
        ("cost", True, "max_cost=True"),
    ],
)
def test_a_bad_budget_is_refused(kind, value, message):
    with pytest.raises(InputError, match=message):
        Budget(kind, value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget("blocks", 4), r"remove_blocks=4: at most 3 of 6 blocks can be removed \(possible: 1, 2, 3\)"),
        (Budget("params", 40_000), "max_params: 40,000 parameters would have to be saved, but at most 30,000 can be"),
        (Budget("macs", 31), "max_flops: 31 multiply-accumulates per image would .* at most 30 can be"),
        (Budget("seconds", 3.5), "max_latency: 3.5 seconds would have to be saved, but at most 3 can be"),
        (Budget("cost", 0.2), "max_cost=0.2: the cheapest of 5 replacements costs 0.25: allow at least that"),
    ],
)
def test_a_budget_that_cannot_be_met_says_what_is_possible(budget, message):
    candidates = [Candidate(Span(b, b + 1), 0.25, 1, 10_000, 10, 1.0) for b in range(1, 6)]
    candidates.append(Candidate(Span(1, 6), math.inf, 5, 99_000, 99, 9.0))
    candidates.append(Candidate(Span(0, 1, "linear"), 0.1, 1, 10_000, 10, 1.0))
    for function in (check_budget, best_plans):
        with pytest.raises(InputError, match=message) as error:
            function(6, candidates, budget)
        assert "\n" not in str(error.value)
    assert contiguous_plans(6, candidates, budget) == []


def test_budgets_that_can_just_be_met_pass():
    candidates = [Candidate(Span(b, b + 1), 0.1, 1, 10_000, 10, 0.1) for b in range(1, 6)]
    for budget in (Budget("blocks", 3), Budget("params", 30_000), Budget("seconds", 0.3), Budget("cost", 0.3)):
        check_budget(6, candidates, budget)
        assert best_plans(6, candidates, budget)[0].plan.removed_blocks == (1, 3, 5)


def test_counts_of_blocks_between_the_possible_ones_are_refused():
    candidates = [Candidate(Span(1, 4), 0.1, 3, 10, 10, 1.0), Candidate(Span(5, 6), 0.1, 1, 10, 10, 1.0)]
    with pytest.raises(InputError, match=r"remove_blocks=2: at most 4 .*possible: 1, 3, 4"):
        check_budget(6, candidates, Budget("blocks", 2))
    with pytest.raises(InputError, match="at most 0 of 6 blocks can be removed .possible: none"):
        check_budget(6, [], Budget("blocks", 2))


def test_candidates_that_do_not_fit_the_model_are_refused():
    with pytest.raises(InputError, match="fold 3→5 lies outside a model of 4 blocks"):
        best_plans(4, uniform([Span(3, 5)]), Budget("blocks", 1))
    with pytest.raises(InputError, match="candidates: fold 1→2 is given twice"):
        best_plans(4, uniform([Span(1, 2), Span(1, 2)]), Budget("blocks", 1))
    with pytest.raises(InputError, match="k=0"):
        best_plans(4, uniform([Span(1, 2)]), Budget("blocks", 1), k=0)


@pytest.mark.parametrize("same_cost", [False, True])
def test_a_deep_model_at_half_granularity_is_planned_in_seconds(same_cost):
    items = all_items(24, "half", max_span=6)
    candidates = random_candidates(items, 0)
    if same_cost:
        candidates = uniform(items)
    most = sum(sorted(entry.seconds for entry in candidates if isinstance(entry.item, Half))[-24:])
    for budget in (Budget("seconds", most / 3), Budget("macs", 100 if same_cost else 8_000_000), Budget("cost", 6.0)):
        begun = time.process_time()
        assert len(best_plans(24, candidates, budget)) == 10
        assert time.process_time() - begun < 10


def test_enumeration_itself_finds_what_is_counted_by_hand():
    """Depth 3, folds only: {1}, {2}, {1,2} as one span; never {1} and {2}, which touch."""
    plans = [plan for plan in all_plans(3, "block") if all(item.map == "fold" for item in plan)]
    assert sorted(plans) == [(Span(1, 2),), (Span(1, 3),), (Span(2, 3),)]
    assert len(all_plans(2, "half", max_span=1)) == 2 + 3 * 3 - 1
    assert sum(1 for _ in itertools.islice(all_plans(4, "half"), 10)) == 10
