"""Refitting a plan's maps in sequence: each map is the least-squares solution behind those before it."""

import pytest
import torch
from torch import Tensor

from hf_simprune.rba.analysis import Analysis, analyze
from hf_simprune.rba.frontier import advance, left_to_right
from hf_simprune.rba.maps import AffineMap, FittedMaps
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.refit import fit_behind, sequential_refit
from hf_simprune.rba.replay import replay_output

from .conftest import DEPTH, make_model
from .image_sets import calibration, quiet_model


EMPTY = CompressionPlan(DEPTH)
PLANS = {
    "folds": CompressionPlan(DEPTH, (Span(1, 2, "fold"), Span(4, 6, "fold"))),
    "linear": CompressionPlan(DEPTH, (Span(1, 3, "linear"), Span(4, 5, "linear"))),
    "mixed": CompressionPlan(DEPTH, (Span(1, 2, "identity"), Span(3, 4, "fold"), Span(5, 6, "linear"))),
    "halves": CompressionPlan(
        DEPTH,
        (Span(3, 4, "fold"),),
        (
            Half(1, "attention", "linear"),
            Half(1, "mlp", "const"),
            Half(2, "attention", "const"),
            Half(5, "mlp", "linear"),
        ),
    ),
}


@pytest.fixture(scope="module", params=["vit-classifier", "dinov2"])
def analysis(request) -> Analysis:
    options = {"progress": False, "chunk_size": 5, "max_span": 3, "cost_images": 4}
    kinds = ("fold", "linear", "identity")
    model = quiet_model(make_model(request.param), 0.6)
    return analyze(model, calibration(12, 5), kinds=kinds, granularity="half", **options)


def pixels(analysis: Analysis) -> Tensor:
    [chunk] = analysis.images.chunks(analysis.images.fit, 100)
    return chunk.pixel_values


@torch.no_grad()
def error_behind(analysis: Analysis, plan: CompressionPlan, maps: FittedMaps, item: Span | Half) -> float:
    """Mean squared distance to the original's hidden state behind the item, everything up to it in place."""
    adapter = analysis.adapter
    h, context = adapter.embed(pixels(analysis))
    end = item.end if isinstance(item, Span) else item.block + 1
    upto = left_to_right(plan)[: left_to_right(plan).index(item) + 1]
    spans = tuple(other for other in upto if isinstance(other, Span))
    part = CompressionPlan(plan.depth, spans, tuple(other for other in upto if isinstance(other, Half)))
    student = advance(adapter, part, maps, h, context, 0, end)
    teacher = advance(adapter, EMPTY, {}, h, context, 0, end)
    return (student - teacher).square().mean().item()


@pytest.mark.parametrize("name", PLANS)
def test_no_map_is_worse_than_before_at_its_own_objective(analysis, name):
    plan = PLANS[name]
    maps = {item: analysis.maps[item] for item in plan.items}
    refitted = sequential_refit(analysis.bench, plan, maps, ridge=1e-7)
    improved = []
    for place, item in enumerate(left_to_right(plan)):
        if item.map in ("identity", "const") or (isinstance(item, Half) and item.half == "attention"):
            continue
        # the maps before it are the refitted ones in both cases
        old = {**refitted, item: maps[item]}
        before, after = error_behind(analysis, plan, old, item), error_behind(analysis, plan, refitted, item)
        assert after <= before * (1 + 1e-4), item
        improved.append(place > 0 and after < 0.999 * before)
    assert any(improved)


@torch.no_grad()
def test_a_refitted_linear_map_is_the_least_squares_solution_behind_the_first(analysis):
    plan = PLANS["linear"]
    first, second = plan.spans
    refitted = sequential_refit(analysis.bench, plan, {item: analysis.maps[item] for item in plan.items}, ridge=0.0)
    adapter = analysis.adapter
    h, context = adapter.embed(pixels(analysis))
    teacher = [h]
    for b in range(DEPTH):
        teacher.append(adapter.block(b, teacher[-1], context))
    student = adapter.block(3, refitted[first](teacher[1]), context).flatten(0, 1).double()
    target = teacher[5].flatten(0, 1).double()
    ones = torch.ones(len(student), 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([student, ones], 1), target).solution
    best = (torch.cat([student, ones], 1) @ solution - target).square().sum()
    found = (refitted[second](student.float()).double() - target).square().sum()
    assert found == pytest.approx(best.item(), rel=1e-4)


@torch.no_grad()
def test_a_refitted_fold_is_the_least_squares_solution_behind_the_first(analysis):
    plan = PLANS["folds"]
    first, second = plan.spans
    refitted = sequential_refit(analysis.bench, plan, {item: analysis.maps[item] for item in plan.items}, ridge=0.0)
    adapter = analysis.adapter
    h, context = adapter.embed(pixels(analysis))
    teacher = advance(adapter, EMPTY, {}, h, context, 0, 6)
    y = h + adapter.attention_write(0, adapter.attention_input(0, h), context)
    y = y + refitted[first](adapter.mlp_write(0, adapter.mlp_input(0, y)))
    y = adapter.block(2, y, context)
    y = y + adapter.attention_write(3, adapter.attention_input(3, y), context)
    write = adapter.mlp_write(3, adapter.mlp_input(3, y)).flatten(0, 1).double()
    target = (teacher - y).flatten(0, 1).double()
    inputs = torch.cat([write, torch.ones(len(write), 1, dtype=torch.float64)], 1)
    best = (inputs @ torch.linalg.lstsq(inputs, target).solution - target).square().sum()
    found = (refitted[second](write.float()).double() - target).square().sum()
    assert found == pytest.approx(best.item(), rel=1e-4)


def test_behind_nothing_the_maps_are_those_of_the_moments(analysis):
    for item, expected in analysis.maps.items():
        if not isinstance(expected, AffineMap) or (isinstance(item, Span) and item.start not in (1, 3)):
            continue
        found = fit_behind(analysis.bench, EMPTY, {}, item)
        scale = expected.weight.abs().max()
        assert (found.weight - expected.weight).abs().max() <= 2e-2 * scale, item
        x = torch.randn(50, analysis.adapter.width)
        assert (found(x) - expected(x)).norm() <= 2e-2 * expected(x).norm(), item


def test_the_first_map_and_identities_stay_and_the_given_maps_are_not_changed(analysis):
    plan = PLANS["mixed"]
    maps = {item: analysis.maps[item] for item in plan.items}
    kept = {item: fitted.weight.clone() for item, fitted in maps.items() if isinstance(fitted, AffineMap)}
    refitted = sequential_refit(analysis.bench, plan, maps)
    assert refitted[plan.spans[0]] is maps[plan.spans[0]]
    assert all(torch.equal(maps[item].weight, weight) for item, weight in kept.items())
    assert not torch.allclose(refitted[plan.spans[2]].weight, kept[plan.spans[2]])


@pytest.mark.parametrize("name", PLANS)
def test_advancing_to_the_end_is_the_replay(analysis, name):
    plan = PLANS[name]
    adapter = analysis.adapter
    h, context = adapter.embed(pixels(analysis))
    tokens = advance(adapter, plan, analysis.maps, h, context, 0, DEPTH)
    with torch.no_grad():
        expected = replay_output(adapter, plan, analysis.maps, pixels(analysis))
        assert torch.allclose(adapter.output(tokens), expected, rtol=1e-4, atol=1e-5)
