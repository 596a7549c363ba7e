"""Choosing a plan: measured, within its budget, and never worse than what it is compared with."""

import itertools

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.rba import search
from hf_simprune.rba.adapters import module_forward
from hf_simprune.rba.analysis import Analysis, analyze
from hf_simprune.rba.choice import measure_choice, network_pieces, refit_choice
from hf_simprune.rba.cost import kl_logits, kl_similarity
from hf_simprune.rba.maps import ConstMap, ModuleMap, fit_all
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.planner import Budget, contiguous_plans
from hf_simprune.rba.replay import replay_output
from hf_simprune.rba.search import choose, plan_candidates
from hf_simprune.rba.stock_conversion import convert_to_stock

from .conftest import DEPTH, make_model
from .image_sets import calibration, pictures, quiet_model


def analysis_of(kind: str = "vit-classifier", **options) -> Analysis:
    settings = {"progress": False, "chunk_size": 4, "max_span": 3, "cost_images": 6, **options}
    return analyze(quiet_model(make_model(kind)), calibration(14, 9), **settings)


@pytest.fixture(scope="module")
def blocks() -> Analysis:
    return analysis_of()


@pytest.fixture(scope="module")
def halves() -> Analysis:
    return analysis_of(granularity="half")


@pytest.fixture(scope="module")
def pieces(blocks):
    return network_pieces(blocks)


@torch.no_grad()
def cost_of(analysis: Analysis, plan: CompressionPlan, maps) -> float:
    """Mean cost over the selection images, of all of them in one go."""
    [chunk] = analysis.images.chunks(analysis.images.select, 100)
    before = analysis.adapter.model(chunk.pixel_values).logits
    return kl_logits(before, replay_output(analysis.adapter, plan, maps, chunk.pixel_values)).mean().item()


def saved_macs(analysis, pieces, plan: CompressionPlan) -> int:
    table = {candidate.item: candidate for candidate in plan_candidates(analysis, pieces)}
    return sum(table[item].macs for item in plan.items)


def test_one_block_is_the_best_of_all_by_exhaustion(blocks, pieces):
    found = choose(blocks, Budget("blocks", 1), pieces=pieces, k=100)
    singles = [CompressionPlan(DEPTH, (Span(b, b + 1, kind),)) for b in range(1, DEPTH) for kind in ("fold", "linear")]
    costs = {plan: cost_of(blocks, plan, blocks.maps) for plan in singles}
    assert {row.plan for row in found.table} == set(singles)
    for row in found.table:
        assert row.cost == pytest.approx(costs[row.plan], rel=1e-3, abs=1e-6)
    # of the cheapest on the selection images, the cheapest on all calibration images
    finalists = [row for row in found.table if row.pooled_cost is not None]
    assert {row.plan for row in finalists} == set(sorted(costs, key=costs.get)[: search.FINALISTS])
    assert found.plan == min(finalists, key=lambda row: row.pooled_cost).plan


def test_the_measured_cost_is_that_of_the_converted_model(blocks, pieces):
    found = choose(blocks, Budget("blocks", 2), kinds=("fold",), pieces=pieces)
    assert len(found.plan.removed_blocks) == 2 and {span.map for span in found.plan.spans} == {"fold"}
    stock = convert_to_stock(blocks.adapter.model, found.plan, found.maps)
    [chunk] = blocks.images.chunks(blocks.images.select, 100)
    with torch.no_grad():
        cost = kl_logits(blocks.adapter.model(chunk.pixel_values).logits, stock(chunk.pixel_values).logits)
    assert found.cost == pytest.approx(cost.mean().item(), rel=1e-3)
    assert found.predicted_cost == pytest.approx(sum(blocks.costs[item].cost for item in found.plan.items))


def test_the_choice_is_the_cheapest_of_what_was_measured_and_the_same_again(blocks, pieces):
    found = choose(blocks, Budget("blocks", 3), pieces=pieces)
    assert found.measured.pooled_cost == min(row.pooled_cost for row in found.table if row.pooled_cost is not None)
    assert found.table[0] == found.measured
    assert all(row.blocks == 3 for row in found.table)
    contiguous = contiguous_plans(DEPTH, plan_candidates(blocks, pieces), Budget("blocks", 3))
    assert {scored.plan for scored in contiguous} <= {row.plan for row in found.table}
    again = choose(analysis_of(), Budget("blocks", 3), pieces=pieces)
    assert again.plan == found.plan and again.cost == found.cost


def test_no_plan_is_measured_twice_and_swaps_are_bounded(halves, pieces, monkeypatch):
    measured = []

    def watched(bench, plans, indices, label="plans"):
        measured.extend(plan for plan, _ in plans)
        assert tuple(indices) == halves.images.select
        return original(bench, plans, indices, label)

    original = search.measure_plans
    monkeypatch.setattr(search, "measure_plans", watched)
    monkeypatch.setattr(search, "_HOPELESS", 100.0)
    found = choose(halves, Budget("blocks", 2), pieces=pieces)
    assert len(set(measured)) == len(measured) == len(found.table)
    # the block search is a part of this one, each with its own bound
    assert 0 < sum(row.source == "swap" for row in found.table) <= 2 * search.SWAP_EVALUATIONS


@torch.no_grad()
def test_finalists_meet_no_fit_image_with_a_map_that_was_fitted_on_it(blocks, pieces):
    found = choose(blocks, Budget("blocks", 2), kinds=("fold",), pieces=pieces)
    row = found.measured
    total = row.cost * len(blocks.images.select)
    for parity in (0, 1):
        maps = fit_all(row.plan.items, blocks.moments.subset(1 - parity))
        [chunk] = blocks.images.chunks([i for i in blocks.images.fit if i % 2 == parity], 100)
        before = blocks.adapter.model(chunk.pixel_values).logits
        total += kl_logits(before, replay_output(blocks.adapter, row.plan, maps, chunk.pixel_values)).sum().item()
    assert row.pooled_cost == pytest.approx(total / (len(blocks.images.select) + len(blocks.images.fit)), rel=1e-3)


def test_one_kind_alone_is_among_what_is_measured_when_kinds_may_mix(blocks, pieces):
    mixed = choose(blocks, Budget("blocks", 3), pieces=pieces, refine=False)
    fold = choose(blocks, Budget("blocks", 3), kinds=("fold",), pieces=pieces, refine=False)
    assert {row.plan for row in mixed.table} >= {row.plan for row in fold.table}


def test_swaps_without_a_prospect_are_not_run(blocks, pieces, monkeypatch):
    monkeypatch.setattr(search, "_HOPELESS", 0.0)
    assert "swap" not in {row.source for row in choose(blocks, Budget("blocks", 2), pieces=pieces).table}


def test_without_refinement_no_swaps_are_run(blocks, pieces):
    plain = choose(blocks, Budget("blocks", 2), pieces=pieces, refine=False)
    assert "swap" not in {row.source for row in plain.table}
    refined = choose(blocks, Budget("blocks", 2), pieces=pieces)
    assert min(row.cost for row in refined.table) <= min(row.cost for row in plain.table)


@pytest.mark.parametrize("removed", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_half_plan_is_never_worse_than_the_best_block_plan_at_equal_macs(removed, seed, pieces):
    model = quiet_model(make_model("vit-classifier", seed), 0.5)
    options = {"progress": False, "chunk_size": 16, "max_span": 3, "cost_images": 6}
    by_block = analyze(model, calibration(14, 9, seed), **options)
    by_half = analyze(model, calibration(14, 9, seed), granularity="half", **options)
    block = choose(by_block, Budget("blocks", removed), kinds=("fold",), pieces=pieces)
    half = choose(by_half, Budget("blocks", removed), kinds=("fold",), pieces=pieces)
    assert half.measured.macs >= block.measured.macs
    assert half.measured.pooled_cost <= block.measured.pooled_cost
    assert min(row.cost for row in half.table) <= min(row.cost for row in block.table)
    macs = Budget("macs", block.measured.macs)
    again = choose(by_block, macs, kinds=("fold",), pieces=pieces)
    assert half.measured.pooled_cost <= again.measured.pooled_cost


@pytest.mark.parametrize("kind", ["params", "macs", "seconds"])
def test_budgets_of_every_kind_are_kept(kind, blocks, pieces):
    two = choose(blocks, Budget("blocks", 2), kinds=("fold",), pieces=pieces, refine=False).measured
    wanted = 0.9 * vars(two)[kind]
    found = choose(blocks, Budget(kind, wanted), pieces=pieces)
    assert vars(found.measured)[kind] >= wanted
    assert all(vars(row)[kind] >= wanted for row in found.table)


def test_a_cost_budget_is_kept_by_the_measured_cost_and_saves_most(blocks, pieces):
    by_blocks = [choose(blocks, Budget("blocks", count), pieces=pieces) for count in (1, 2, 3)]
    limit = by_blocks[1].cost * 1.2
    found = choose(blocks, Budget("cost", limit), pieces=pieces)
    assert found.cost <= limit
    allowed = [row for row in found.table if row.cost <= limit]
    assert found.measured.macs == max(row.macs for row in allowed)
    assert found.measured.macs >= by_blocks[0].measured.macs


def test_a_cost_budget_below_everything_names_what_is_possible(blocks, pieces):
    with pytest.raises(InputError, match="max_cost=1e-09: the cheapest of"):
        choose(blocks, Budget("cost", 1e-9), pieces=pieces)


@pytest.mark.parametrize("granularity", ["blocks", "halves"])
def test_more_blocks_than_there_are_cannot_be_asked_for(granularity, request, pieces):
    analysis = request.getfixturevalue(granularity)
    with pytest.raises(InputError, match="at most"):
        choose(analysis, Budget("blocks", DEPTH), pieces=pieces)


def test_the_papers_choice_follows_block_redundancy_alone(blocks, pieces):
    redundancy = {(span.start, span.end): span.br_all for span in blocks.report.spans if span.start > 0}
    found = choose(blocks, Budget("blocks", 4), kinds=("linear",), strategy="br-contiguous", pieces=pieces)
    best = max((span for span in redundancy if span[1] - span[0] == 4), key=redundancy.get)
    assert found.plan == CompressionPlan(DEPTH, (Span(*best, "linear"),))  # longer than max_span, so fitted for it
    assert found.cost == pytest.approx(cost_of(blocks, found.plan, found.maps), rel=1e-3)

    greedy = choose(blocks, Budget("blocks", 2), kinds=("fold",), strategy="br-greedy", pieces=pieces).plan
    first = max((span for span in redundancy if span[1] - span[0] == 1), key=redundancy.get)
    apart = [s for s in redundancy if s[1] - s[0] == 1 and (s[0] > first[1] or s[1] < first[0])]
    second = max(apart, key=redundancy.get)
    assert {(span.start, span.end) for span in greedy.spans} == {first, second}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strategy": "best"}, "--strategy best"),
        ({"strategy": "br-greedy"}, "one kind of map, not fold, linear"),
        ({"kinds": ("identity",)}, "--map identity: the analysis measured only fold, linear"),
        ({"granularity": "half"}, "--granularity half: the analysis measured block"),
    ],
)
def test_what_the_analysis_cannot_answer_is_refused_by_name(options, named, blocks, pieces):
    with pytest.raises(InputError, match=named):
        choose(blocks, Budget("blocks", 1), pieces=pieces, **options)


def test_trained_maps_are_planned_as_linear_then_trained_and_measured(blocks, pieces):
    found = choose(blocks, Budget("blocks", 2), kinds=("mlp",), pieces=pieces)
    linear = choose(blocks, Budget("blocks", 2), kinds=("linear",), pieces=pieces)
    assert [(s.start, s.end) for s in found.plan.spans] == [(s.start, s.end) for s in linear.plan.spans]
    assert all(span.map == "mlp" and isinstance(found.maps[span], ModuleMap) for span in found.plan.spans)
    assert found.cost == pytest.approx(cost_of(blocks, found.plan, found.maps), rel=1e-3)
    assert found.measured.params < linear.measured.params + DEPTH * blocks.adapter.width


def test_a_plan_written_by_hand_gets_maps_that_the_analysis_did_not_make(blocks):
    plan = CompressionPlan(DEPTH, (Span(1, 5, "fold"),), (Half(5, "mlp", "const"),))
    found = measure_choice(blocks, plan)
    assert isinstance(found.maps[plan.halves[0]], ConstMap) and found.plan == plan
    assert found.cost == pytest.approx(cost_of(blocks, plan, found.maps), rel=1e-3)
    # what the analysis would have made of it, had it been asked
    asked = analysis_of(granularity="half", max_span=4)
    fold = plan.spans[0]
    assert torch.allclose(found.maps[fold].weight, asked.maps[fold].weight, rtol=1e-3, atol=1e-3)
    assert torch.allclose(found.maps[plan.halves[0]].bias, asked.maps[plan.halves[0]].bias, rtol=1e-3, atol=1e-4)


def test_a_plan_for_another_depth_is_refused(blocks):
    with pytest.raises(InputError, match="the model has 6 blocks"):
        measure_choice(blocks, CompressionPlan(DEPTH + 1, (Span(1, 2),)))


def test_low_rank_maps_have_an_eighth_of_the_width_unless_told():
    analysis = analysis_of(kinds=("low_rank", "identity"))
    assert {item.rank for item in analysis.costs} == {3, None}
    assert {item.rank for item in analysis_of(kinds=("low_rank",), rank=5).costs} == {5}
    found = choose(analysis, Budget("blocks", 2), kinds=("low_rank",))
    assert all(span.rank == 3 for span in found.plan.spans)


def test_refitting_is_kept_only_if_it_costs_less(blocks, pieces):
    for count, kind in itertools.product((2, 3), ("fold", "linear")):
        found = choose(blocks, Budget("blocks", count), kinds=(kind,), pieces=pieces, refine=False)
        kept, cost = refit_choice(blocks, found)
        assert kept.plan == found.plan
        if cost < found.cost:
            assert kept.cost == cost == pytest.approx(cost_of(blocks, kept.plan, kept.maps), rel=1e-3)
        else:
            assert kept is found


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip-vision"])
def test_headless_networks_are_searched_by_their_features(kind):
    analysis = analysis_of(kind, kinds=("fold", "identity"))
    assert analysis.report.cost_name.startswith("KL of the similarities")
    found = choose(analysis, Budget("blocks", 2))
    assert len(found.plan.removed_blocks) == 2 and found.cost >= 0 and found.measured.relative_error > 0


@torch.no_grad()
def test_without_a_classifier_finalists_are_not_compared_with_themselves():
    analysis = analyze(make_model("dinov2"), calibration(14, 9), progress=False, chunk_size=4, max_span=2)
    found = choose(analysis, Budget("blocks", 2), kinds=("fold",))
    row, images, cost = found.measured, analysis.images, analysis.bench.cost
    assert cost.bank_rows == images.fit  # few enough that every image to fit on is in the bank
    total = row.cost * len(images.select)
    for parity in (0, 1):
        maps = fit_all(row.plan.items, analysis.moments.subset(1 - parity))
        for index in (i for i in images.fit if i % 2 == parity):
            [chunk] = images.chunks([index], 1)
            before = module_forward(analysis.adapter, chunk.pixel_values)
            after = replay_output(analysis.adapter, row.plan, maps, chunk.pixel_values)
            others = cost.bank[[other != index for other in cost.bank_rows]]
            total += kl_similarity(before, after, others).item()
    assert row.pooled_cost == pytest.approx(total / (len(images.select) + len(images.fit)), rel=1e-3)


@torch.no_grad()
def test_finalists_are_measured_on_the_images_that_can_be_read():
    images = pictures(23)
    readable = [b"no image" if index in (0, 2, 4, 6, 8, 15) else image for index, image in enumerate(images)]
    model = quiet_model(make_model("vit-classifier"))
    analysis = analyze(model, calibration(14, 9, images=readable), progress=False, chunk_size=4, max_span=2)
    measured = choose(analysis, Budget("blocks", 1), kinds=("fold",)).measured
    # five of the seven even images are missing: that is no reason to stop, nor do they count
    total = measured.cost * 8
    for parity, rows in ((0, [10, 12]), (1, [1, 3, 5, 7, 9, 11, 13])):
        maps = fit_all(measured.plan.items, analysis.moments.subset(1 - parity))
        [chunk] = analysis.images.chunks(rows, 100)
        before = model(chunk.pixel_values).logits
        after = replay_output(analysis.adapter, measured.plan, maps, chunk.pixel_values)
        total += kl_logits(before, after).sum().item()
    assert measured.pooled_cost == pytest.approx(total / 17, rel=1e-3)
